"""Ask a judge while something else goes on: calls run on threads, verdicts are fetched later by their tag.

For judges that wait rather than compute: a server's answer takes as long as a rollout, and asking it in between doubles
the time of everything. Such a judge says ``remote = True``, which promises that it may be called from several threads
at once. A judge that computes in this process gains nothing here.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

from rawdream_env.errors import JudgeUnavailableError
from rawdream_env.judges.base import ask, check_pairs, invalid
from rawdream_env.types import Judge, Verdict, Video

Tag = TypeVar("Tag", bound=Hashable)


def is_remote(judge: object) -> bool:
    """Whether a judge declares that asking it means waiting (attribute ``remote``)."""
    return bool(getattr(judge, "remote", False))


class OverlappedJudge(Generic[Tag]):
    """Submit videos, go on, fetch verdicts.

    A verdict belongs to the tag its video was submitted with, whenever and in whatever order it arrives. What a caller
    does must follow from the tags, never from the order: then its results do not depend on timing.

    Args:
        judge: called from ``threads`` threads at once.
        threads: maximum number of calls under way; further ones wait their turn.
    """

    def __init__(self, judge: Judge, threads: int = 4) -> None:
        self.judge = judge
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="judge")
        self._calls: dict[Future[list[Verdict]], tuple[Tag, ...]] = {}

    def __len__(self) -> int:
        """Videos submitted whose verdicts have not been fetched."""
        return sum(map(len, self._calls.values()))

    def submit(
        self,
        tags: Sequence[Tag],
        videos: Sequence[Video],
        instructions: Sequence[str],
        *,
        invalid_on_outage: bool = False,
    ) -> None:
        """One call of the judge; one tag, video and instruction each.

        ``invalid_on_outage``: an unreachable judge gives INVALID verdicts instead of raising when they are fetched.
        """
        check_pairs(videos, instructions)
        if len(tags) != len(videos):
            raise ValueError(f"{len(tags)} tags but {len(videos)} videos; give one each")
        if tags:
            call = self._pool.submit(self._ask, list(videos), list(instructions), invalid_on_outage)
            self._calls[call] = tuple(tags)

    def _ask(self, videos: list[Video], instructions: list[str], invalid_on_outage: bool) -> list[Verdict]:
        try:
            return ask(self.judge, videos, instructions)
        except JudgeUnavailableError as error:
            if not invalid_on_outage:
                raise
            return [invalid(f"judge unavailable: {error}")] * len(videos)

    def fetch(self, *, wait_s: float = 0.0) -> dict[Tag, Verdict]:
        """The verdicts that have arrived since the last time; when none has, wait for one at most ``wait_s``.

        Raises whatever the judge raised; the other calls can still be fetched.
        """
        if not self._calls:
            return {}
        wait(self._calls, timeout=wait_s, return_when=FIRST_COMPLETED)
        arrived: dict[Tag, Verdict] = {}
        done = [call for call in self._calls if call.done()]
        failed = next((call for call in done if call.exception() is not None), None)
        if failed is not None:  # before anything else is taken off the list, so that nothing is lost
            self._calls.pop(failed)
            failed.result()
        for call in done:
            arrived.update(zip(self._calls.pop(call), call.result(), strict=True))
        return arrived

    def forget(self) -> None:
        """Drop everything submitted: calls not yet begun are cancelled, the answers of others thrown away."""
        for call in self._calls:
            call.cancel()
        self._calls.clear()

    def close(self) -> None:
        """Forget everything and let the threads end; a call under way is not waited for."""
        self.forget()
        self._pool.shutdown(wait=False, cancel_futures=True)
