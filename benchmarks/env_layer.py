"""Cost of the environment itself: the world model answers at once, so that only the rest of ``step`` is timed.

Milliseconds of processor time per environment and chunk: equal to wall-clock time on a free core, and not inflated by other
programs on a busy machine. The judge is asked at the end of every episode; frames are returned or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.common import ROUNDS, Result, interleave

GOAL_MS = 0.3


@dataclass
class _State:
    rows: int

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, rows: Any) -> _State:
        return _State(len(rows))

    @staticmethod
    def where(mask: Any, a: _State, b: _State) -> _State:
        """No settings."""
        return b


class InstantWorldModel:
    """Returns the same frames every time, at almost no cost."""

    chunk_len, frame_shape, fps = 8, (64, 64, 3), 10.0

    def __init__(self, rows: int) -> None:
        import torch

        self.frames = torch.zeros(rows, self.chunk_len, *self.frame_shape, dtype=torch.uint8)

    def start(self, frames: Any, keys: Sequence[Any], proprio: Any = None) -> _State:
        """See ``WorldModel``."""
        return _State(len(keys))

    def imagine(self, state: _State, actions: Any) -> tuple[_State, Any]:
        """See ``WorldModel``."""
        return state, self.frames[: len(state)]


def run(quick: bool = False) -> Result:
    """Whole episodes of 8 chunks with automatic reset, at 1, 8 and 64 environments."""
    import numpy as np

    from rawdream_env.envs.dream import DreamVectorEnv
    from rawdream_env.judges.scripted import ScriptedJudge
    from rawdream_env.types import Outcome

    lines, numbers, passed = [], {}, True
    for num_envs in (1, 8, 64):
        envs = {
            label: DreamVectorEnv(
                num_envs,
                world_model=InstantWorldModel(num_envs),
                judge=ScriptedJudge(lambda video, text: Outcome.FAILURE),
                starts="null",
                autoreset_mode="SameStep",
                return_frames=frames,
            )
            for label, frames in (("plain", False), ("frames", True))
        }
        actions = np.zeros((num_envs, 8, 7), np.float32)
        episodes, chunks = (1 if num_envs > 8 else 4), 8
        for env in envs.values():
            env.reset(seed=0)

        def play(env: Any, steps: int = episodes * chunks, actions: Any = actions) -> None:
            for _ in range(steps):
                env.step(actions)

        times = interleave({label: (lambda env=env: play(env)) for label, env in envs.items()}, ROUNDS)
        for label, t in times.items():
            unit = 1e3 / (num_envs * episodes * chunks)
            numbers[f"{num_envs} envs, {label}"] = {
                "min_ms": float(t.processor.min()) * unit,
                "median_ms": float(np.median(t.processor)) * unit,
                "wall_median_ms": t.median * unit,
                "rounds": ROUNDS,
            }
        plain, full = (numbers[f"{num_envs} envs, {label}"] for label in ("plain", "frames"))
        passed &= bool(plain["median_ms"] <= GOAL_MS)
        lines.append(
            f"{num_envs:2d} envs: {plain['min_ms']:.3f} / {plain['median_ms']:.3f} ms per environment and chunk "
            f"(min / median), with return_frames {full['min_ms']:.3f} / {full['median_ms']:.3f}"
        )
        for env in envs.values():
            env.close()
    return Result("env_layer", f"<= {GOAL_MS} ms per environment and chunk (median, plain)", passed, lines, numbers)
