"""Judging behind the rollouts: ended episodes wait for their verdicts while the next ones are imagined.

The world model and a remote judge take turns in a plain loop: each stands still while the other works. Here the dream is
told to leave its episodes unjudged; their videos go to the judge on threads, the row takes the next rollout at once, and
what has arrived is looked at between two chunks. A success is then dreamt again (dual-noise verification, section 3.3)
and its second video goes the same way. Nothing depends on when a verdict arrives: an ending belongs to its member, and
dreams do not depend on what else is in a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from gymnasium.vector import VectorEnv

from rawdream_env.judges.overlap import OverlappedJudge
from rawdream_env.types import Outcome, Trajectory, Verdict, Video
from rawdream_env.wrappers.base import chain
from rawdream_env.wrappers.dual_noise import DualNoiseVerification

M = TypeVar("M")


@dataclass(frozen=True)
class EpisodeResult:
    """How an episode ended: as ``Rollout`` has it, and why its verdict is INVALID where it is."""

    reward: float
    verdict: Outcome
    valid: bool
    flagged: bool
    reason: str = ""

    @property
    def unreadable(self) -> bool:
        """Whether the episode, or its second dream, could not be judged."""
        return not self.valid and not self.flagged


@dataclass(frozen=True)
class _Waiting(Generic[M]):
    """An ended episode on its way: of ``member``, its recording, and whether this is its second video."""

    member: M
    trajectory: Trajectory
    second: bool


def can_overlap(env: VectorEnv[Any, Any, Any]) -> bool:
    """Whether the verdicts of ``env`` may come later: a dream judged at the horizon, with nothing around it that looks
    at verdicts but dual-noise verification.
    """
    *wrappers, base = chain(env)
    return (
        getattr(base, "judge", None) is not None
        and hasattr(base, "defer_judging")
        and getattr(base, "judge_every", "") == "episode"
        and all(isinstance(wrapper, DualNoiseVerification) for wrapper in wrappers)
    )


class AsyncJudging(Generic[M]):
    """Takes over the judging of a dream until it is closed.

    Args:
        env: the dream, or dual-noise verification around it; see ``can_overlap``.
        threads: most calls of the judge at once.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any], threads: int = 4) -> None:
        *wrappers, base = chain(env)
        self._base: Any = base
        self._verification: DualNoiseVerification | None = wrappers[0] if wrappers else None
        self._judge: OverlappedJudge[int] = OverlappedJudge(base.judge, threads)
        self._waiting: dict[int, _Waiting[M]] = {}
        self._count = 0
        base.defer_judging = True

    def __len__(self) -> int:
        """Members whose endings are not known yet."""
        return len(self._waiting)

    def submit(self, members: dict[int, M]) -> None:
        """Members that ended in the last step, by row."""
        rows = list(members)
        recordings = zip(members.values(), self._base.trajectories(rows), self._base.videos(rows), strict=True)
        self._send([(_Waiting(member, trajectory, False), video) for member, trajectory, video in recordings])

    def endings(self, *, wait_s: float = 0.0) -> list[tuple[M, EpisodeResult]]:
        """What has become known; if nothing has, wait at most ``wait_s`` for a verdict. Dreams successes again."""
        known: list[tuple[M, EpisodeResult]] = []
        successes: list[_Waiting[M]] = []
        for tag, verdict in sorted(self._judge.fetch(wait_s=wait_s).items()):
            episode = self._waiting.pop(tag)
            if not episode.second and verdict.outcome == Outcome.SUCCESS and self._verification is not None:
                successes.append(episode)
            else:
                known.append((episode.member, self._ending(episode, verdict)))
        return known + self._verify(successes)

    def _verify(self, successes: list[_Waiting[M]]) -> list[tuple[M, EpisodeResult]]:
        """Dream again and submit; dreams that broke down have their ending at once."""
        if not successes or self._verification is None:
            return []
        trajectories = [episode.trajectory for episode in successes]
        replays = self._base.replay(trajectories, draw=self._verification.draw, return_frames=True, judge=False)
        known, sent = [], []
        for episode, replay in zip(successes, replays, strict=True):
            again = _Waiting(episode.member, episode.trajectory, True)
            if replay.verdict is not None:  # only a dream that broke down has one
                known.append((episode.member, self._ending(again, replay.verdict)))
            else:
                sent.append((again, Video(replay.frames, self._base.fps)))
        self._send(sent)
        return known

    def _send(self, episodes: list[tuple[_Waiting[M], Video]]) -> None:
        tags = list(range(self._count, self._count + len(episodes)))
        self._count += len(tags)
        self._waiting.update((tag, episode) for tag, (episode, _) in zip(tags, episodes, strict=True))
        instructions = [episode.trajectory.start.instruction for episode, _ in episodes]
        self._judge.submit(tags, [video for _, video in episodes], instructions)

    def _ending(self, episode: _Waiting[M], verdict: Verdict) -> EpisodeResult:
        outcome = verdict.outcome
        if not episode.second:
            return EpisodeResult(
                float(outcome == Outcome.SUCCESS), outcome, outcome != Outcome.INVALID, False, verdict.reason
            )
        assert self._verification is not None
        self._verification.count(0, 0, [episode.trajectory], [outcome])  # its step has counted the episode itself
        repeated, flagged = outcome == Outcome.SUCCESS, outcome == Outcome.FAILURE
        valid = repeated or (flagged and self._verification.on_disagree == "zero")
        return EpisodeResult(float(repeated), Outcome.SUCCESS, valid, flagged, verdict.reason)

    def forget(self) -> None:
        """Drop every episode on its way."""
        self._judge.forget()
        self._waiting.clear()

    def close(self) -> None:
        """Give the judging back to the dream."""
        self.forget()
        self._judge.close()
        self._base.defer_judging = False
