"""Asynchronous judging: finished episodes wait for their verdicts while the next ones are imagined.

In a synchronous loop the world model waits for a remote judge and the judge for the world model. Here the dream leaves its
episodes unjudged (``reset(options={"judge": False})``), threads send their videos to the judge, rows begin the next episode
at once, and verdicts that have arrived are collected between two chunks. A success is then imagined again (dual-noise
verification, section 3.2) and its second video is judged in the same way. Results do not depend on when a verdict arrives:
a verdict belongs to its episode, and an imagined episode does not depend on the rest of its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from gymnasium.vector import VectorEnv

from rawdream_env.envs.episodes import Rollout, held_out_verdict
from rawdream_env.envs.verification import Verifier, episode_result
from rawdream_env.judges.overlap import OverlappedJudge
from rawdream_env.types import Judge, Outcome, Trajectory, Verdict, Video


@dataclass(frozen=True)
class _Waiting:
    """A rollout without its result yet. With ``first``, the first verdict, it waits for the second."""

    rollout: Rollout
    first: Verdict | None = None


class AsyncJudging:
    """Judges the rollouts of a dream in the background, and verifies their successes.

    Args:
        env: the dream whose judge is asked, or wrappers around it.
        verifier: dual-noise verification, or None: successes are not verified.
        threads: maximum number of calls of the judge at once.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any], verifier: Verifier | None, threads: int = 4) -> None:
        base: Any = env.unwrapped
        self._base = base
        self._verifier = verifier
        judge: Judge = base.judge
        self._judge: OverlappedJudge[int] = OverlappedJudge(judge, threads)
        self._waiting: dict[int, _Waiting] = {}
        self._count = 0

    def __len__(self) -> int:
        """Number of rollouts whose results are not known yet."""
        return len(self._waiting)

    def submit(self, rollouts: Sequence[Rollout]) -> None:
        """Unjudged rollouts with their frames."""
        self._send([(_Waiting(rollout), rollout.frames) for rollout in rollouts])

    def results(self, *, wait_s: float = 0.0) -> list[Rollout]:
        """Rollouts whose results have become known; if none has, wait at most ``wait_s`` for a verdict.

        Raises whatever the judge raised about a first video; an unreachable judge makes a second verdict INVALID.
        """
        known: list[Rollout] = []
        successes: list[_Waiting] = []
        for tag, verdict in sorted(self._judge.fetch(wait_s=wait_s).items()):
            episode = self._waiting.pop(tag)
            if episode.first is None and verdict.outcome == Outcome.SUCCESS and self._verifier is not None:
                successes.append(replace(episode, first=verdict))
            else:
                known.append(self._result(episode, verdict))
        return known + self._verify(successes)

    def _verify(self, successes: list[_Waiting]) -> list[Rollout]:
        """Dream again and submit; second dreams that break down have their result at once."""
        if self._verifier is None:
            return []
        replays = self._verifier.second_dreams([_trajectory(episode) for episode in successes], judged=False)
        known, sent = [], []
        for episode, replay in zip(successes, replays, strict=True):
            if replay.verdict is not None:  # only a dream that broke down has one
                known.append(self._result(episode, replay.verdict))
            else:
                sent.append((episode, replay.frames))
        self._send(sent)
        return known

    def _send(self, episodes: Sequence[tuple[_Waiting, Any]]) -> None:
        tags = list(range(self._count, self._count + len(episodes)))
        self._count += len(tags)
        self._waiting.update((tag, episode) for tag, (episode, _) in zip(tags, episodes, strict=True))
        videos = [Video(frames, self._base.fps) for _, frames in episodes]
        instructions = [episode.rollout.start.instruction for episode, _ in episodes]
        again = any(episode.first is not None for episode, _ in episodes)
        self._judge.submit(tags, videos, instructions, invalid_on_outage=again)

    def _result(self, episode: _Waiting, verdict: Verdict) -> Rollout:
        if episode.first is None:
            result = episode_result(verdict)
        else:
            assert self._verifier is not None
            self._verifier.count(replayed=[_trajectory(episode)], verdicts=[verdict])
            result = self._verifier.result(episode.first, verdict)
        others = episode.rollout.other_verdicts | held_out_verdict(episode.first or verdict)
        return replace(episode.rollout, frames=None, other_verdicts=others, **result._asdict())

    def forget(self) -> None:
        """Drop every rollout on its way."""
        self._judge.forget()
        self._waiting.clear()

    def close(self) -> None:
        """Drop everything and let the threads end."""
        self.forget()
        self._judge.close()


def _trajectory(episode: _Waiting) -> Trajectory:
    assert episode.rollout.trajectory is not None
    return episode.rollout.trajectory
