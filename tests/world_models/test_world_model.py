"""The world model: sampler parity, causality, exact context reuse, row independence, checkpoints."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rawdream_env.errors import CheckpointError, InvalidActionError
from rawdream_env.piper import geometry as piper
from rawdream_env.piper.arm_map import ArmMap
from rawdream_env.seeding import NoiseKey
from rawdream_env.trainers.world_model.teacher_forcing import EpisodeBatch, denoise_all_chunks
from rawdream_env.world_models import load_world_model
from rawdream_env.world_models.autoencoders import AutoencoderConfig, PackedFrameAutoencoder, pack_frames, unpack_frames
from rawdream_env.world_models.loading import save_world_model
from rawdream_env.world_models.sampler import flow_sigmas, sample_flow
from rawdream_env.world_models.wan import rollout as rollout_module
from rawdream_env.world_models.wan.chunk import ChunkDenoiser, ConditionCache, Context, ContextCache
from rawdream_env.world_models.wan.config import WanConfig
from rawdream_env.world_models.wan.dream_state import DreamState
from rawdream_env.world_models.wan.rollout import WAN_ROLLOUT, RolloutConfig, WanWorldModel
from rawdream_env.world_models.wan.transformer import WanWorldModelTransformer, shifted

WAN = WanConfig(
    num_layers=2, num_attention_heads=2, attention_head_dim=24, ffn_dim=64, text_dim=16, text_rows=2, pose_dim=0,
    stem_channels=0, residual=False,
)  # fmt: skip
"""Wan's own shape: velocity, a prompt, no stem, no arm map."""
TINY = WanConfig(
    num_layers=2, num_attention_heads=2, attention_head_dim=24, ffn_dim=64, stem_channels=16, stem_blocks=1,
    head_blocks=1, arm_map_channels=384, warp_last_frame=True,
)  # fmt: skip


def transformer(config: WanConfig = TINY) -> WanWorldModelTransformer:
    """Random weights, also where a new model starts at zero."""
    torch.manual_seed(0)
    model = WanWorldModelTransformer(config)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model.eval()


def build(config: WanConfig, context_cache: ContextCache = "step") -> WanWorldModel:
    torch.manual_seed(0)
    autoencoder = PackedFrameAutoencoder(AutoencoderConfig(widths=(16, 16)))
    rollout = RolloutConfig(num_inference_steps=2)
    if not config.pose_dim:
        rollout = replace(rollout, arm_map=None, max_time=7, anchor_noise_start=1)
    return WanWorldModel(transformer(config), autoencoder, rollout, context_cache=context_cache)


@pytest.fixture(scope="module", params=[TINY, WAN], ids=["embedded", "wan"])
def model(request: pytest.FixtureRequest) -> WanWorldModel:
    return build(request.param)


def start_frames(rows: list[int]) -> Tensor:
    frames = [np.random.default_rng(r).integers(0, 256, (64, 64, 3), dtype=np.uint8) for r in rows]
    return torch.from_numpy(np.stack(frames))


def dream(
    model: WanWorldModel, rows: list[int], chunks: int = 5, draw: int = 0, actions: Tensor | None = None
) -> tuple[DreamState, Tensor]:
    poses = torch.tensor(np.stack([piper.HOME_POSE] * len(rows)), dtype=torch.float32)
    state = model.start(start_frames(rows), [NoiseKey(r, draw=draw) for r in rows], poses)
    if actions is None:
        actions = torch.stack(
            [torch.rand(chunks, 8, 7, generator=torch.Generator().manual_seed(r)) * 2 - 1 for r in rows]
        )
    frames = []
    for chunk in range(chunks):
        state, new = model.imagine(state, actions[:, chunk])
        frames.append(new)
    return state, torch.cat(frames, 1) if frames else torch.empty(0)


@pytest.mark.parametrize("steps", [1, 2, 5, 8])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sampler_equals_diffusers_unipc(steps: int, shift: float) -> None:
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=2
    )
    scheduler.set_timesteps(steps)
    gen = torch.Generator().manual_seed(1)
    noise, weight = (torch.randn(n, 8, generator=gen, dtype=torch.float64) for n in (4, 8))

    def velocity(x: Tensor, sigma: float) -> Tensor:
        return torch.tanh(0.3 * x @ weight) + sigma * x

    x = noise.clone()
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(velocity(x, float(scheduler.sigmas[i])), t, x, return_dict=False)[0]
    ours = sample_flow(lambda x, sigma: x - sigma * velocity(x, sigma), noise, steps, shift)
    torch.testing.assert_close(ours, x, rtol=0, atol=2e-6)  # diffusers keeps its noise levels in fp32
    assert len(flow_sigmas(steps, shift)) == steps + 1


def test_packing_round_trip() -> None:
    frames = start_frames([0, 1, 2, 3])[None]
    assert torch.equal(unpack_frames(pack_frames(frames)), frames)


def test_rows_do_not_depend_on_the_batch(model: WanWorldModel) -> None:
    state, frames = dream(model, list(range(8)))
    for rows in ([0], [3], [1, 2], [7, 5, 0], [0, 1, 2, 3]):
        own_state, own_frames = dream(model, rows)
        assert torch.equal(own_frames, frames[rows]), rows
        assert torch.equal(own_state.recent, state.recent[rows]), rows


def test_rows_at_different_chunks_share_a_batch(model: WanWorldModel) -> None:
    """Partial reset: row 1 starts over while row 0 goes on; both as if alone."""
    actions = torch.rand(2, 4, 8, 7, generator=torch.Generator().manual_seed(5)) * 2 - 1
    state, _ = dream(model, [0, 1], chunks=2, actions=actions)
    fresh, _ = dream(model, [0, 1], chunks=0, actions=actions)
    mixed = DreamState.where([False, True], fresh, state)
    assert mixed.chunks == (2, 0)
    _, frames = model.imagine(mixed, torch.stack([actions[0, 2], actions[1, 0]]))
    _, alone = dream(model, [0], chunks=3, actions=actions[:1])
    _, first = dream(model, [1], chunks=1, actions=actions[1:])
    assert torch.equal(frames[0], alone[0, -8:])
    assert torch.equal(frames[1], first[0])
    assert torch.equal(DreamState.cat([mixed[[0]], mixed[[1]]]).recent, mixed.recent)
    assert len(mixed[np.array([True, False])]) == 1


def test_context_reuse_is_bit_identical(model: WanWorldModel) -> None:
    state, frames = dream(model, [0, 1, 2])
    model.context_cache = "none"
    try:
        slow_state, slow_frames = dream(model, [0, 1, 2])
    finally:
        model.context_cache = "step"
    assert torch.equal(state.recent, slow_state.recent)
    assert torch.equal(frames, slow_frames)


@pytest.mark.parametrize("config", [TINY, WAN], ids=["embedded", "wan"])
@pytest.mark.parametrize("recent", [0, 2, 6])
def test_context_reuse_in_float64(config: WanConfig, recent: int) -> None:
    """The saving is algebra, not luck of rounding: 1e-12 at every length of the growing window."""
    net, gen = transformer(config).double(), torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=gen, dtype=torch.float64)

    n, maps = 1 + recent, config.map_channels
    seen = Context(normal(n, 16, 8, 8), 0.05, [0.1, 0.1], ["same", "same"], normal(n, config.condition_dim),
                   normal(n, maps, 8, 8), [1 + recent, 2 + recent])  # fmt: skip
    for part in (seen.frames, seen.conditions, seen.maps):
        part[1, 0] = part[0, 0]  # two rows with one anchor
    inputs = normal(2, config.condition_dim), normal(2, maps, 8, 8)
    x = normal(2, 16, 8, 8)
    with torch.no_grad():
        fast, slow = (
            ChunkDenoiser(net, ConditionCache(net), seen, *inputs, reuse)(x, 0.6) for reuse in ("step", "none")
        )
    assert fast.dtype == torch.float64
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)


def test_rows_that_share_a_start_are_what_they_are_alone(model: WanWorldModel) -> None:
    """A group computes its anchor's keys and values once; no row changes by a bit, nor do strangers in the batch."""
    starts, own = start_frames([0, 0, 3, 0]), [NoiseKey(7), NoiseKey(8), NoiseKey(9), NoiseKey(7, draw=1)]
    poses = torch.tensor(np.stack([piper.HOME_POSE] * 4), dtype=torch.float32)
    actions = torch.rand(4, 6, 8, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def run(rows: list[int]) -> Tensor:
        state = model.start(starts[rows], [own[i] for i in rows], poses[rows])
        for chunk in range(6):
            state, _ = model.imagine(state, actions[rows, chunk])
        return state.recent

    together = run([0, 1, 2, 3])
    for i in range(4):
        assert torch.equal(together[i : i + 1], run([i]))
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("config", [TINY, WAN], ids=["embedded", "wan"])
def test_rolling_cache_is_close_and_its_rows_are_independent(config: WanConfig) -> None:
    exact, rolling = build(config), build(config, "rolling")
    (early, _), (early_rolling, _) = dream(exact, [0, 1], chunks=2), dream(rolling, [0, 1], chunks=2)
    torch.testing.assert_close(early.recent, early_rolling.recent, rtol=0, atol=1e-5)  # nothing is kept before chunk 2
    (late, _), (state, _) = dream(exact, [0, 1]), dream(rolling, [0, 1])
    assert not torch.equal(late.recent, state.recent)
    assert torch.isfinite(state.recent).all()
    fresh, _ = dream(rolling, [0, 1], chunks=0)
    mixed = DreamState.cat([DreamState.where([True, False], fresh, state)[[1]], fresh[[0]]])
    actions = torch.zeros(2, 8, 7)
    (after, _), (alone, _) = rolling.imagine(mixed, actions), rolling.imagine(state[[1]], actions[:1])
    assert torch.equal(after.recent[:1], alone.recent)
    assert all(torch.equal(a[:1], b) for a, b in zip(after.cache, alone.cache, strict=True))


def test_noise_and_actions_matter(model: WanWorldModel) -> None:
    state, _ = dream(model, [0])
    again, _ = dream(model, [0])
    other_noise, _ = dream(model, [0], draw=1)
    other_actions, _ = dream(model, [0], actions=torch.zeros(1, 5, 8, 7))
    assert torch.equal(state.recent, again.recent)
    assert not torch.equal(state.recent, other_noise.recent)
    assert not torch.equal(state.recent, other_actions.recent)


def batch(latents: Tensor, seed: int = 0) -> EpisodeBatch:
    gen = torch.Generator().manual_seed(seed)
    b, m = latents.shape[:2]
    maps = torch.rand(b, m, TINY.map_channels, 8, 8, generator=gen)
    return EpisodeBatch(latents, torch.randn(b, m, TINY.condition_dim, generator=gen), maps)


def test_causality() -> None:
    """Changing a later frame's noise, action or latent leaves every earlier prediction bit-identical."""
    net = transformer()
    gen = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 9, 16, 8, 8, generator=gen)
    data = batch(latents)
    args = [
        latents[:, :7].clone(),
        torch.full((1, 7), 0.05),
        torch.randn(1, 8, 16, 8, 8, generator=gen),
        torch.rand(1, 8),
    ]
    with torch.no_grad():
        before, _ = denoise_all_chunks(net, data, *args)
        changed = replace(data, conditions=data.conditions.clone())
        changed.conditions[:, 6] += 1.0  # latent 6 is output 5
        args[0][:, 6] += 1.0
        args[2][:, 5] += 1.0
        after, _ = denoise_all_chunks(net, changed, *args)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])


def test_teacher_forcing_sees_what_a_rollout_sees() -> None:
    """Predicting chunk 2 in one pass over the episode equals predicting it from its own context window."""
    net = transformer()
    gen = torch.Generator().manual_seed(0)
    latents, noisy = torch.randn(2, 9, 16, 8, 8, generator=gen), torch.randn(2, 8, 16, 8, 8, generator=gen)
    data = batch(latents)
    level = torch.full((2, 7), 0.05)
    with torch.no_grad():
        packed, _ = denoise_all_chunks(net, data, latents[:, :7], level, noisy, torch.full((2, 8), 0.7))
        assert data.arm_maps is not None
        context, new = slice(0, 5), slice(5, 7)
        seen = Context(
            latents[:, context],
            0.05,
            [0.05, 0.05],
            [0, 1],
            data.conditions[:, context],
            data.arm_maps[:, context],
            [5, 5],
        )
        denoiser = ChunkDenoiser(net, ConditionCache(net), seen, data.conditions[:, new], data.arm_maps[:, new])
        window = denoiser(noisy[:, 4:6], 0.7)
    torch.testing.assert_close(packed[:, 4:6], window, rtol=0, atol=2e-5)


def test_anchor_noise_follows_the_paper() -> None:
    config = RolloutConfig()
    levels = [round(1000 * config.anchor_noise(s)) for s in (0, 3, 4, 10, 33, 100)]
    assert levels == [0, 0, 10, 70, 300, 300]


@pytest.mark.parametrize("settings", [RolloutConfig(), WAN_ROLLOUT], ids=["embedded", "wan"])
def test_the_denoiser_receives_the_noise_of_the_paper(settings: RolloutConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anchor, context and new latents at every step of a rollout: their levels, and noise that is fresh at every step and
    in every draw.
    """
    arch = TINY if settings.arm_map else WAN
    steps, seen = 36, []

    class Recorded(ChunkDenoiser):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            self.first = True

        def __call__(self, x: Tensor, sigma: float) -> Tensor:
            if self.first:
                seen.append((self.context, x))
            self.first = False
            return x[:, :1].expand_as(x) * 0.5

    monkeypatch.setattr(rollout_module, "ChunkDenoiser", Recorded)
    model = build(arch)
    model.config = replace(settings, num_inference_steps=1)
    monkeypatch.setattr(model, "_by_rows", lambda what, n, compute: compute(slice(None)))
    runs = []
    for draw in (0, 1):
        poses = torch.tensor(np.stack([piper.HOME_POSE] * 2), dtype=torch.float32)
        state = model.start(start_frames([0, 0]), [NoiseKey(7, draw=draw), NoiseKey(8, draw=draw)], poses)
        run = []
        for chunk in range(steps):
            before = state
            state, _ = model.imagine(state, torch.zeros(2, 8, 7))
            context, x = seen.pop()
            n = min(2 * chunk, 6)
            level = min(0.01 * max(chunk - 3, 0), 0.3)  # s counts from 0
            assert context.frames.shape[1] == 1 + n
            assert list(context.anchor_level) == pytest.approx([level] * 2) and context.level == 0.05
            anchor = context.frames[:, 0] - (1 - level) * before.anchor
            assert level or not anchor.any()
            recent = (context.frames[:, 1:] - 0.95 * before.recent[:, 6 - n :]) / 0.05
            noises = {"new": x} | ({"anchor": anchor / level} if level else {}) | ({"recent": recent} if n else {})
            for name, noise in noises.items():
                assert abs(noise.mean()) < 0.15 and abs(noise.std() - 1) < 0.1, (name, chunk)
            run.append(noises)
        assert torch.equal(run[9]["anchor"][0], run[9]["anchor"][1])  # two rows from one start share the anchor's noise
        runs.append(run)
    for chunk, noises in enumerate(runs[0]):
        for name, noise in noises.items():
            others = [runs[1][chunk][name], *([runs[0][chunk - 1][name]] if name in runs[0][chunk - 1] else [])]
            for other in others:  # the second draw, and the step before
                size = min(noise.shape[1], other.shape[1]) if name == "recent" else None
                assert correlation(noise[:, :size], other[:, :size]) < 0.2, (name, chunk)


def correlation(a: Tensor, b: Tensor) -> float:
    return abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item())


def test_arm_map_follows_the_kinematics() -> None:
    """The shadow channel peaks at the projected tool point; the integrated pose is the simulator's."""
    arm_map = ArmMap()
    pose = torch.tensor(piper.HOME_POSE, dtype=torch.float32)
    pose[:3] = torch.tensor([0.30, 0.10, 0.05])
    maps = arm_map.draw(pose.expand(1, 1, 4, 7), (32, 32)).view(4, 6, 32, 32)
    peak = maps[0, 5].flatten().argmax().item()
    expected, _ = piper.project(np.array([0.30, 0.10, 0.0]), 32)
    assert abs(peak % 32 + 0.5 - expected[0]) <= 1
    assert abs(peak // 32 + 0.5 - expected[1]) <= 1
    actions = torch.rand(1, 3, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    by_hand = pose.numpy()
    for action in actions[0].numpy():
        by_hand = piper.integrate_action(by_hand, action)
    np.testing.assert_allclose(arm_map.integrate(pose[None], actions)[0, -1].numpy(), by_hand, atol=1e-6)


def test_pictures_are_carried_with_the_tool() -> None:
    pictures = torch.randn(2, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    moved = shifted(pictures, torch.tensor([[[2.0, -1.0]], [[0.0, 0.0]]]))  # right by two cells, up by one
    torch.testing.assert_close(moved[0, 0, :, :-1, 2:], pictures[0, 0, :, 1:, :-2], atol=1e-5, rtol=0)
    assert moved[0, 0, :, -1].abs().max() < 1e-5 and moved[0, 0, :, :, :2].abs().max() < 1e-5
    torch.testing.assert_close(moved[1], pictures[1], atol=1e-5, rtol=0)

    before, after = (torch.tensor(piper.HOME_POSE, dtype=torch.float32) for _ in range(2))
    before[:3], after[:3] = torch.tensor([0.30, 0.05, 0.10]), torch.tensor([0.25, -0.02, 0.16])
    poses = torch.stack([before, before, before, after])[None, None]
    (motion,) = ArmMap().motion(poses, before[None, None], (8, 8))[0]
    expected = piper.project(after[:3].numpy()[None], 8)[0] - piper.project(before[:3].numpy()[None], 8)[0]
    np.testing.assert_allclose(motion, [0, 0, *expected[0]], atol=1e-3)
    with pytest.raises(ValueError, match="needs residual and arm_map_channels"):
        WanWorldModelTransformer(replace(TINY, arm_map_channels=0))


def test_bad_input_is_named(model: WanWorldModel) -> None:
    pose = torch.zeros(1, 7)
    with pytest.raises(ValueError, match=r"uint8.*resize them"):
        model.start(torch.zeros(1, 32, 32, 3, dtype=torch.uint8), [NoiseKey(0)], pose)
    with pytest.raises(ValueError, match="1 start frames but 2 noise keys"):
        model.start(start_frames([0]), [NoiseKey(0), NoiseKey(1)], pose)
    if model.transformer.arch.pose_dim:
        with pytest.raises(ValueError, match="give proprio"):
            model.start(start_frames([0]), [NoiseKey(0)])
    state = model.start(start_frames([0]), [NoiseKey(0)], pose)
    with pytest.raises(InvalidActionError, match=r"shape \(1, 8, 7\)"):
        model.imagine(state, torch.zeros(1, 4, 7))
    with pytest.raises(InvalidActionError, match="NaN"):
        model.imagine(state, torch.full((1, 8, 7), float("nan")))


def test_checkpoint_round_trip_and_errors(model: WanWorldModel, tmp_path) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "wm"
    save_world_model(model, folder)
    loaded = load_world_model(folder)
    assert isinstance(loaded, WanWorldModel)
    assert loaded.config == model.config
    assert torch.equal(dream(loaded, [0])[1], dream(model, [0])[1])
    fast = load_world_model(folder, num_inference_steps=1)
    assert isinstance(fast, WanWorldModel)
    assert fast.config.num_inference_steps == 1

    settings = folder / "transformer" / "config.json"
    config = json.loads(settings.read_text())
    config["num_layers"] = 3
    settings.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"blocks\.2\.\S+ is missing"):
        load_world_model(folder)
    config["wings"] = 2
    settings.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="wings"):
        load_world_model(folder)
    for text in ("{", "[" * 100_000):
        settings.write_text(text)
        with pytest.raises(CheckpointError, match="cannot be read as JSON"):
            load_world_model(folder)
    (folder / "config.json").write_text('{"format": "rawdream-world-model-1"}')
    with pytest.raises(
        CheckpointError, match="expected format 'rawdream-world-model-2', found 'rawdream-world-model-1'"
    ):
        load_world_model(folder)
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load_world_model(tmp_path / "nothing")


def test_sizes_are_compared_with_the_tensors_before_anything_is_built(tmp_path: Path) -> None:
    """A hostile configuration costs no memory and ends in a ``CheckpointError``."""
    folder = tmp_path / "wm"
    save_world_model(build(TINY), folder)
    places = {"transformer": folder / "transformer/config.json", "autoencoder": folder / "autoencoder/config.json"}

    def refused(path: Path, change: Callable[[dict[str, Any]], None], said: str) -> None:
        before = path.read_text()
        content = json.loads(before)
        change(content)
        path.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=said):
            load_world_model(folder)
        path.write_text(before)

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(
        places["autoencoder"],
        lambda c: c.update(widths=[8192, 8192]),
        r"decoder.0.weight has shape .* expected \(8192,",
    )
    refused(places["autoencoder"], lambda c: c.update(widths=[65536, 65536]), "multiples of 8 up to 8192")
    refused(places["autoencoder"], lambda c: c.update(encoder_blocks=[1, 10**9]), "must be between 0 and 1000")
    refused(places["autoencoder"], lambda c: c.update(image_size="64"), "has image_size '64', expected int")
    refused(places["autoencoder"], lambda c: c.update(widths=[16]), r"has widths '\(16,\)', expected tuple")
    refused(places["transformer"], lambda c: c.update(num_attention_heads=4096), "has shape .* expected")
    refused(
        places["transformer"],
        lambda c: c.update(num_layers=10**9),
        "num_layers is 10{9}; it must be .* 0 and 1000",
    )
    refused(places["transformer"], lambda c: c.update(ffn_dim=-1), "ffn_dim is -1; it must be between 1 and 65536")
    refused(places["transformer"], lambda c: c.update(num_layers=True), "has num_layers 'True', expected int")
    for name, value, said in (
        ("num_inference_steps", 10**9, "num_inference_steps 1000000000"), ("fps", 0, "fps 0"), ("fps", "ten", "expected float"),
        ("action_low", [1.0] * 7, "each low below its high"), ("context_noise", 2.0, "between 0 and 1"),
        ("arm_map", {"resolution": 10**6}, "resolution 1000000 must be between 1 and 1024"), ("arm_map", 3, "has arm_map '3'"),
    ):  # fmt: skip
        refused(folder / "config.json", lambda c, n=name, v=value: c["rollout"].update({n: v}), said)  # type: ignore[misc]
    refused(folder / "config.json", lambda c: c.pop("rollout"), "has no rollout settings")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200_000  # kB; the widths alone would take 9 GB
    load_world_model(folder)
