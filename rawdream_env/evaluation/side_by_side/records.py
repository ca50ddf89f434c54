"""What a side-by-side evaluation keeps: a record of every episode, a few clips to look at, and the result of it all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rawdream_env.envs.verification import EpisodeResult, episode_result
from rawdream_env.types import Outcome, UInt8Array, Verdict


@dataclass(frozen=True)
class EpisodeRecord:
    """Everything kept of one start under one policy; verdicts are 1, 0 or -1 (INVALID), None: not asked."""

    policy: str
    task: str
    index: int
    seed: int
    simulator: bool
    simulator_end: bool
    dream: int
    second: int | None = None
    dreamed_actions: bool | None = None
    dreamed_actions_end: bool | None = None
    simulator_actions: int | None = None
    judge_on_simulator: int | None = None

    @property
    def result(self) -> EpisodeResult:
        """What the dream's verdicts amount to under the rule of dual-noise verification."""
        second = None if self.second is None else Verdict(Outcome(self.second))
        return episode_result(Verdict(Outcome(self.dream)), second)

    @property
    def flagged(self) -> bool:
        """Dreamed a success that did not repeat."""
        return self.result.flagged


_KINDS = {
    (True, 1): "both succeed",
    (False, 0): "both fail",
    (False, 1): "only the dream succeeds",
    (True, 0): "only the simulator succeeds",
}


@dataclass(frozen=True)
class Clip:
    """Frames for the report: ``left`` what happened in the simulator, ``right`` the dream, uint8 (F, H, W, 3).

    ``happened``: whether the left one is a success; ``same_actions``: the left one executes the dream's actions.
    """

    record: EpisodeRecord
    instruction: str
    left: UInt8Array
    right: UInt8Array
    happened: bool
    same_actions: bool

    @property
    def kind(self) -> str:
        """Whether both worlds agree, and on what."""
        return _KINDS.get((self.happened, self.record.dream), "no verdict")


class Clips(list[Clip]):
    """The first ``limit`` clips of each kind and policy: whatever comes first, so that none is picked by hand."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def add(self, clip: Clip) -> None:
        """Keep the clip if it is among the first of its kind."""
        kind = clip.record.policy, clip.kind
        if sum((c.record.policy, c.kind) == kind for c in self) < self.limit:
            self.append(clip)


@dataclass
class SideBySide:
    """The result: ``report`` (JSON), the ``records`` behind it and the ``clips`` to look at."""

    report: dict[str, Any]
    records: list[EpisodeRecord]
    clips: list[Clip] = field(default_factory=list)
