"""What a dream keeps in memory: states of running episodes alone, and no weights on the device within ``offload``."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rawdream_env.envs.dream import DreamVectorEnv
from rawdream_env.errors import OffloadedError
from rawdream_env.judges.scripted import ScriptedJudge
from rawdream_env.starts.memory import NullStarts
from rawdream_env.world_models.null import NullState, NullWorldModel

SHAPE = (16, 16, 3)


class Shade(nn.Linear):
    """Weights that record where they are moved to."""

    def __init__(self, moves: list[str]) -> None:
        super().__init__(7, 1)
        self.moves = moves

    def to(self, *args: Any, **kwargs: Any) -> Shade:
        self.moves.append(str(args[0]))
        return super().to(*args, **kwargs)


class ShadeWorldModel(NullWorldModel):
    """Frames as bright as a layer of weights says."""

    def __init__(self, moves: list[str] | None = None) -> None:
        super().__init__(SHAPE, 8)
        self.layer = Shade([] if moves is None else moves)
        with torch.no_grad():
            self.layer.weight.fill_(1 / 7)
            self.layer.bias.zero_()

    def imagine(self, state: NullState, actions: Tensor) -> tuple[NullState, Tensor]:
        state, frames = super().imagine(state, actions)
        shade = (127 * (1 + self.layer(actions))).detach().clamp(0, 255).to(torch.uint8)
        return state, torch.zeros_like(frames) + shade[..., None, None]


def state_bytes() -> int:
    """Bytes of all states that are alive."""
    return sum(s.frame.nbytes + s.trace.nbytes for s in gc.get_objects() if isinstance(s, NullState))


def dream(num_envs: int, mode: str, model: NullWorldModel | None = None, **kwargs: Any) -> DreamVectorEnv:
    judge = ScriptedJudge(lambda video, instruction: bool(video.frames[-1].mean() > 127))
    options: dict[str, Any] = {"max_episode_steps": 2, "return_frames": True, "autoreset_mode": mode, **kwargs}
    return DreamVectorEnv(
        num_envs, world_model=model or ShadeWorldModel(), judge=judge, starts=NullStarts(SHAPE), **options
    )


def actions(num_envs: int, step: int) -> np.ndarray:
    return np.random.default_rng(step).uniform(-1, 1, (num_envs, 8, 7)).astype(np.float32)


def test_states_are_freed_when_all_episodes_are_over_and_rows_begin_anew() -> None:
    gc.collect()
    before = state_bytes()
    env, fresh = dream(3, "Disabled", NullWorldModel(SHAPE, 8)), dream(1, "Disabled", NullWorldModel(SHAPE, 8))
    env.reset(seed=0)
    env.step(actions(3, 0))
    assert state_bytes() > before
    env.step(actions(3, 1))
    assert state_bytes() == before
    env.reset(seed=[None, 7, None], options={"reset_mask": np.array([False, True, False])})
    fresh.reset(seed=7)
    for step in range(2):
        chunk = actions(3, step)
        frames = env.step(chunk)[-1]["frames"]
        assert np.array_equal(frames[1], fresh.step(chunk[1:2])[-1]["frames"][0])
    assert state_bytes() == before


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_episodes_that_begin_by_themselves_do_not_change(mode: str) -> None:
    """Rows whose episodes end at different times against one row alone, through ends where nothing else runs."""
    env, alone = dream(2, mode, judge_every="chunk"), dream(1, mode, judge_every="chunk")
    env.reset(seed=[3, 4])
    alone.reset(seed=4)
    for step in range(12):
        chunk = actions(2, step)
        ours, theirs = env.step(chunk), alone.step(chunk[1:])
        assert np.array_equal(ours[0]["image"][1], theirs[0]["image"][0])
        assert [part[1] for part in ours[1:4]] == [part[0] for part in theirs[1:4]]


def test_offloaded_weights_come_back() -> None:
    moves: list[str] = []
    env = dream(2, "Disabled", ShadeWorldModel(moves))
    env.reset(seed=0)
    moves.clear()  # those of loading
    with pytest.raises(OffloadedError, match=r"step\(\) was called within offload\(\)"), env.offload():
        assert moves == ["cpu"]
        env.step(actions(2, 0))
    assert moves == ["cpu", "cpu"]
    env.step(actions(2, 0))
