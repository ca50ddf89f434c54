"""Call a judge in the background: calls run on threads, verdicts are fetched later by their tag.

For judges on a server: an answer can take as long as a rollout, so waiting for it would double the time of a step. Such
a judge has ``remote = True``, which also means that several threads may call it at once. A judge that computes in this
process gains nothing.
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
    """Whether a judge waits for a server (attribute ``remote``)."""
    return bool(getattr(judge, "remote", False))


class OverlappedJudge(Generic[Tag]):
    """Submit videos now, fetch verdicts later.

    A verdict belongs to the tag of its video, in whatever order verdicts arrive. Callers must rely on the tags and never
    on the order; then their results do not depend on timing.

    Args:
        judge: called from ``threads`` threads at once.
        threads: maximum number of simultaneous calls; further calls wait.
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
        """Submit one call of the judge, with one tag, video and instruction per item.

        ``invalid_on_outage``: an unreachable judge gives INVALID verdicts instead of raising when they are fetched.
        """
        check_pairs(videos, instructions)
        if len(tags) != len(videos):
            raise ValueError(f"{len(tags)} tags but {len(videos)} videos; expected one tag per video")
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
        """The verdicts that have arrived since the last call; if none has, wait for one, at most ``wait_s`` seconds.

        Raises an exception of the judge; the other calls can still be fetched.
        """
        if not self._calls:
            return {}
        wait(self._calls, timeout=wait_s, return_when=FIRST_COMPLETED)
        arrived: dict[Tag, Verdict] = {}
        done = [call for call in self._calls if call.done()]
        failed = next((call for call in done if call.exception() is not None), None)
        if failed is not None:  # before anything else is removed, so that nothing is lost
            self._calls.pop(failed)
            failed.result()
        for call in done:
            arrived.update(zip(self._calls.pop(call), call.result(), strict=True))
        return arrived

    def forget(self) -> None:
        """Drop everything submitted: calls not yet started are canceled, the answers of the others discarded."""
        for call in self._calls:
            call.cancel()
        self._calls.clear()

    def close(self) -> None:
        """Drop everything and let the threads end, without waiting for running calls."""
        self.forget()
        self._pool.shutdown(wait=False, cancel_futures=True)
