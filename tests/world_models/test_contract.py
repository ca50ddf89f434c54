"""One suite over every world model behind the protocol: keyed noise, replay, rows that do not depend on each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rawdream_env.errors import InvalidActionError
from rawdream_env.piper import geometry as piper
from rawdream_env.piper.simulator.twin import PiperTwin
from rawdream_env.seeding import NoiseKey
from rawdream_env.types import SupportsShownFrames, SupportsTrace, WorldModel
from rawdream_env.world_models.autoencoders import AutoencoderConfig, PackedFrameAutoencoder
from rawdream_env.world_models.null import NullWorldModel
from rawdream_env.world_models.scene.dynamics import DynamicsConfig
from rawdream_env.world_models.scene.loading import new_dynamics
from rawdream_env.world_models.scene.maps import SceneMaps
from rawdream_env.world_models.scene.painter import PainterConfig, ScenePainter
from rawdream_env.world_models.scene.reader import ReaderConfig, SceneReader
from rawdream_env.world_models.scene.rollout import SceneRolloutConfig, SceneWorldModel
from rawdream_env.world_models.wan.config import WanConfig
from rawdream_env.world_models.wan.rollout import RolloutConfig, WanWorldModel
from rawdream_env.world_models.wan.transformer import WanWorldModelTransformer


def awake(module: nn.Module) -> nn.Module:
    """Random weights, also where a new network starts at zero."""
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return module


def wan() -> WanWorldModel:
    config = WanConfig(
        num_layers=2, num_attention_heads=2, attention_head_dim=24, ffn_dim=64, stem_channels=16, stem_blocks=1,
        head_blocks=1, arm_map_channels=384, warp_last_frame=True,
    )  # fmt: skip
    transformer = WanWorldModelTransformer(config)
    awake(transformer)
    return WanWorldModel(
        transformer, PackedFrameAutoencoder(AutoencoderConfig(widths=(16, 16))), RolloutConfig(num_inference_steps=2)
    )


def scene() -> SceneWorldModel:
    reader = SceneReader(ReaderConfig(widths=(8, 8), window=4, window_width=8, hidden=8))
    painter = ScenePainter(PainterConfig(map_channels=SceneMaps().channels, widths=(8, 8), blocks=(1, 1)))
    dynamics = new_dynamics(DynamicsConfig(0, width=16, layers=1))
    for part in (reader, painter, dynamics):
        awake(part)
    return SceneWorldModel(reader, dynamics, painter, SceneRolloutConfig(allowed_overlap=0.001))


@pytest.fixture(scope="module", params=["null", "wan", "scene"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return {"null": NullWorldModel, "wan": wan, "scene": scene}[request.param]()


@pytest.fixture(scope="module")
def starts() -> Tensor:
    """Real scenes: what a reader is made for."""
    twin = PiperTwin()
    frames = [twin.reset(seed, objects=("pot", "spoon", "cup")[: 1 + seed % 3]) for seed in range(20)]
    twin.close()
    return torch.from_numpy(np.stack(frames))


def actions_of(row: int, chunks: int = 3) -> Tensor:
    return torch.rand(chunks, 8, 7, generator=torch.Generator().manual_seed(row)) * 2 - 1


def dream(model: WorldModel, starts: Tensor, rows: list[int], chunks: int = 3, draw: int = 0) -> tuple[Any, Tensor]:
    poses = torch.tensor(np.stack([piper.HOME_POSE] * len(rows)), dtype=torch.float32)
    state = model.start(starts[rows], [NoiseKey(row, draw=draw) for row in rows], poses)
    frames = []
    for chunk in range(chunks):
        state, new = model.imagine(state, torch.stack([actions_of(row)[chunk] for row in rows]))
        frames.append(new)
    return state, torch.cat(frames, 1)


def test_it_follows_the_protocol(model: Any, starts: Tensor) -> None:
    assert isinstance(model, WorldModel)
    state, frames = dream(model, starts, [0, 1], chunks=1)
    assert frames.dtype == torch.uint8 and tuple(frames.shape) == (2, model.chunk_len, *model.frame_shape)
    assert len(state) == 2


def test_a_row_does_not_depend_on_the_others(model: Any, starts: Tensor) -> None:
    rows = list(range(19))
    _, frames = dream(model, starts, rows)
    for some in ([0], [18], [1, 2], [7, 5, 0], rows[::-1], [3, 3, 3]):
        assert torch.equal(dream(model, starts, some)[1], frames[some]), some


def test_a_key_replays_and_another_draw_differs(model: Any, starts: Tensor) -> None:
    _, frames = dream(model, starts, [0, 1, 2])
    assert torch.equal(dream(model, starts, [0, 1, 2])[1], frames)
    again = dream(model, starts, [0, 1, 2], draw=1)[1]
    assert all(not torch.equal(a, b) for a, b in zip(frames, again, strict=True))


def test_frames_that_are_left_out_change_nothing(model: Any, starts: Tensor) -> None:
    if not isinstance(model, SupportsShownFrames):
        pytest.skip("computes every frame")
    whole: Any = model
    state, _ = dream(whole, starts, [0, 1], chunks=1)
    actions = torch.stack([actions_of(row)[1] for row in (0, 1)])
    after, frames = whole.imagine(state, actions)
    last = torch.arange(model.chunk_len).expand(2, -1) == model.chunk_len - 1
    mixed = torch.stack([last[0] | (torch.arange(model.chunk_len) == 1), last[0] & False])
    for shown in (last, mixed, last & False, last | True):
        same, some = whole.imagine_shown(state, actions, shown)
        assert torch.equal(some, frames[shown])
        assert torch.equal(whole.imagine(same, actions)[1], whole.imagine(after, actions)[1])
    if isinstance(model, SupportsTrace):
        traced = whole.trace(state, actions)
        assert len(traced) == model.chunk_len and torch.equal(traced[-1].position, after.position)


def test_actions_matter_at_once(model: Any, starts: Tensor) -> None:
    poses = torch.tensor(np.stack([piper.HOME_POSE]), dtype=torch.float32)
    state = model.start(starts[:1], [NoiseKey(0)], poses)
    changed = actions_of(0)[:1].clone()
    changed[0, 0, 1] = -changed[0, 0, 1]
    assert not torch.equal(model.imagine(state, actions_of(0)[:1])[1], model.imagine(state, changed)[1])


def test_rows_are_chosen_and_mixed(model: Any, starts: Tensor) -> None:
    """Partial reset: row 1 starts over while row 0 goes on; both as if alone."""
    poses = torch.tensor(np.stack([piper.HOME_POSE] * 2), dtype=torch.float32)
    fresh = model.start(starts[:2], [NoiseKey(0), NoiseKey(1)], poses)
    state, _ = dream(model, starts, [0, 1], chunks=2)
    mixed = type(state).where(torch.tensor([False, True]), fresh, state)
    _, frames = model.imagine(mixed, torch.stack([actions_of(0)[2], actions_of(1)[0]]))
    assert torch.equal(frames[0], dream(model, starts, [0])[1][0, -8:])
    assert torch.equal(frames[1], dream(model, starts, [1], chunks=1)[1][0])
    one = mixed[torch.tensor([1, 0, 1])]
    assert len(one) == 3
    assert torch.equal(model.imagine(one, torch.stack([actions_of(1)[0]] * 3))[1][0], frames[1])


@pytest.mark.parametrize("kind", ["wan", "scene"])
def test_bad_input_is_named(kind: str, starts: Tensor) -> None:
    model: Any = {"wan": wan, "scene": scene}[kind]()
    poses = torch.tensor(np.stack([piper.HOME_POSE]), dtype=torch.float32)
    with pytest.raises(ValueError, match="resize them"):
        model.start(starts[:1, :32], [NoiseKey(0)], poses)
    with pytest.raises(ValueError, match="1 start frames but 2 noise keys"):
        model.start(starts[:1], [NoiseKey(0)] * 2, poses)
    with pytest.raises(ValueError, match="give proprio"):
        model.start(starts[:1], [NoiseKey(0)])
    state = model.start(starts[:1], [NoiseKey(0)], poses)
    with pytest.raises(InvalidActionError, match=r"\(1, 8, 7\), got \(1, 4, 7\)"):
        model.imagine(state, torch.zeros(1, 4, 7))
    with pytest.raises(InvalidActionError, match="NaN"):
        model.imagine(state, torch.full((1, 8, 7), torch.nan))
