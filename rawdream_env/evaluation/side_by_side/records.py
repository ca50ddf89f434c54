"""Records of a side-by-side evaluation: one per episode, a few clips for the report, and the result."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from rawdream_env.envs.verification import EpisodeResult, episode_result
from rawdream_env.errors import DatasetError
from rawdream_env.types import Float32Array, Outcome, Trajectory, UInt8Array, Verdict


@dataclass(frozen=True, slots=True)
class EpisodeRecord:
    """Outcomes of one policy at one start. Verdicts are 1, 0 or -1 (INVALID); None: not measured.

    ``..._end``: success at the end, else after any chunk. ``dream_state`` and ``simulator_actions_state``: what the dream's own
    state says of the closed-loop dream and of the simulator's actions, by the judge's time rule, -1 where it is not known.
    ``..._lifted``: whether the task's object was picked up under the simulator's actions, in the simulator and in the dream.
    """

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
    dream_state: int = -1
    simulator_actions_state: int = -1
    simulator_lifted: int = -1
    simulator_actions_lifted: int = -1

    @property
    def result(self) -> EpisodeResult:
        """Result of the dream's verdicts under dual-noise verification."""
        second = None if self.second is None else Verdict(Outcome(self.second))
        return episode_result(Verdict(Outcome(self.dream)), second)

    @property
    def flagged(self) -> bool:
        """Whether the dream has a success that did not repeat."""
        return self.result.flagged

    @property
    def trusted(self) -> bool:
        """Whether the dream's outcome is known: judged, and not flagged."""
        return self.result.valid


def read_records(path: Path) -> list[EpisodeRecord]:
    """The records of an ``episodes.jsonl``.

    Raises:
        DatasetError: it is missing or damaged.
    """
    names = {item.name for item in fields(EpisodeRecord)}
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [EpisodeRecord(**{key: value for key, value in line.items() if key in names}) for line in lines]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DatasetError(
            f"{path} cannot be read ({error}); evaluate again with `rawdream policy evaluate`."
        ) from error


_KINDS = {
    (True, 1): "both succeed",
    (False, 0): "both fail",
    (False, 1): "only the dream succeeds",
    (True, 0): "only the simulator succeeds",
}


@dataclass(frozen=True)
class Clip:
    """Frames for the report: ``left`` from the simulator, ``right`` from the dream, uint8 (F, H, W, 3).

    ``happened``: whether the simulator's episode is a success; ``same_actions``: it executes the dream's actions.
    ``left_actions`` (T, K, A) and ``dreamed`` repeat the two episodes.
    """

    record: EpisodeRecord
    instruction: str
    left: UInt8Array
    right: UInt8Array
    happened: bool
    same_actions: bool
    left_actions: Float32Array | None = None
    dreamed: Trajectory | None = None

    @property
    def kind(self) -> str:
        """Which of the two worlds succeed."""
        return _KINDS.get((self.happened, self.record.dream), "no verdict")


class Clips(list[Clip]):
    """The first ``limit`` clips of each kind and policy, in the order of the episodes: clips are not selected."""

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
    """The result: ``report`` (JSON), the ``records`` it is computed from, and ``clips``."""

    report: dict[str, Any]
    records: list[EpisodeRecord]
    clips: list[Clip] = field(default_factory=list)
