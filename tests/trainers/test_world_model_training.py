"""Training a world model: windows of unequal episodes, starting from another model, resuming after kill -9."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rawdream_env.data import schema
from rawdream_env.data.lerobot import LeRobotReader, LeRobotWriter
from rawdream_env.errors import CheckpointError, DatasetError, InvalidOptionError, NotEnoughMemoryError
from rawdream_env.files import load_safetensors
from rawdream_env.piper.arm_map import ArmMap
from rawdream_env.piper.geometry import HOME_POSE, project
from rawdream_env.seeding import NoiseKey, mix
from rawdream_env.trainers.common.distributed import ALONE
from rawdream_env.trainers.common.training_loop import TrainingLoop
from rawdream_env.trainers.world_model import train as training_module
from rawdream_env.trainers.world_model.action_bounds import bounds_of_model, rollout_bounds
from rawdream_env.trainers.world_model.config import LossConfig, StageConfig, WorldModelTrainConfig
from rawdream_env.trainers.world_model.latent_episodes import EpisodeSampler, LatentEpisodes, focus_cells
from rawdream_env.trainers.world_model.latent_windows import DataEntry, WindowObjective, cached_mixture
from rawdream_env.trainers.world_model.losses import BatchNoise, episode_loss
from rawdream_env.trainers.world_model.train import train_world_model
from rawdream_env.world_models import memory
from rawdream_env.world_models.autoencoders import AutoencoderConfig, PackedFrameAutoencoder
from rawdream_env.world_models.loading import read_world_model, save_world_model
from rawdream_env.world_models.memory import GIB
from rawdream_env.world_models.wan.config import wan_config
from rawdream_env.world_models.wan.rollout import WAN_ROLLOUT, RolloutConfig, WanWorldModel
from rawdream_env.world_models.wan.transformer import WanConfig, WanWorldModelTransformer
from rawdream_env.world_models.wan.vae import WanVAE
from tests.killing import kill_at_random_moments

WEIGHTS = {
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "autoencoder": "autoencoder/model.safetensors",
}
MODEL = WanConfig(
    num_layers=1, num_attention_heads=2, attention_head_dim=24, ffn_dim=64, stem_channels=16,
    stem_blocks=1, head_blocks=1, arm_map_channels=384, warp_last_frame=True,
)  # fmt: skip


def write_data(root: Path, lengths: tuple[int, ...], *, poses: bool = False, fps: int = 10) -> str:
    """A LeRobot folder of a square that slides over a 64 x 64 picture; ``poses`` follow the actions, or are noise."""
    features = {schema.ACTION_KEY: schema.numeric_feature(7), schema.STATE_KEY: schema.numeric_feature(7)}
    writer = LeRobotWriter(root, fps=fps, image_shape=(64, 64, 3), features=features)
    for seed, steps in enumerate(lengths):
        rng = np.random.default_rng(seed)
        frames = np.full((steps + 1, 64, 64, 3), 150, np.uint8)
        for t, frame in enumerate(frames):
            left = (seed * 5 + t) % 26
            frame[10:16, left : left + 6] = (200, 40, 40)
        actions = rng.uniform(-1, 1, (steps, 7)).astype(np.float32)
        state = np.tile(np.asarray(HOME_POSE, np.float32), (steps + 1, 1)) + rng.normal(0, 0.01, (steps + 1, 7))
        if poses:
            first = torch.tensor(HOME_POSE, dtype=torch.float32)[None]
            state = torch.cat([first, ArmMap().integrate(first, torch.from_numpy(actions)[None])[0]]).numpy()
        writer.add_episode(frames, actions, state.astype(np.float32), "play")
    writer.finalize()
    return str(root)


def config(data: str, out: Path, **changes: object) -> WorldModelTrainConfig:
    """A run of seconds."""
    stage = StageConfig(steps=4, batch_size=2, lr=1e-3, warmup=2)
    base = WorldModelTrainConfig(
        data=(data,), run_dir=str(out), bf16=False, episode_chunks=3, autoencoder=stage, transformer=stage, model=MODEL,
        save_every=1,
        autoencoder_model=AutoencoderConfig(widths=(16, 16)),
    )  # fmt: skip
    return replace(base, **changes)  # type: ignore[arg-type]


def numbered_episodes(chunks: tuple[int, ...]) -> LatentEpisodes:
    """Episodes whose every number says where it comes from: 1000 x episode + position."""

    def numbers(counts: list[int], shape: tuple[int, ...]) -> torch.Tensor:
        rows = [1000.0 * e + torch.arange(n) for e, n in enumerate(counts)]
        return torch.cat(rows)[(..., *[None] * len(shape))].expand(-1, *shape)

    steps = [8 * n for n in chunks]
    return LatentEpisodes(
        chunks=torch.tensor(chunks),
        latents=numbers([2 * n for n in chunks], (16, 8, 8)),
        stills=numbers([n + 1 for n in chunks], (16, 8, 8)),
        actions=numbers(steps, (7,)),
        poses=numbers([n + 1 for n in steps], (7,)),
    )


def test_windows_of_unequal_episodes(tmp_path: Path) -> None:
    chunks = (5, 2, 3)
    settings = config("", tmp_path, model=replace(MODEL, arm_map_channels=0, warp_last_frame=False, pose_dim=0))
    wide = {"action_low": (-4096.0,) * 7, "action_high": (4096.0,) * 7}
    settings = replace(settings, rollout=replace(settings.rollout, arm_map=None, **wide))
    batch = EpisodeSampler(numbered_episodes(chunks), settings).draw(np.random.default_rng(0), 64)
    seen = set()
    for latents, conditions in zip(batch.latents[:, :, 0, 0, 0], batch.conditions, strict=True):
        episode, start = divmod(int(latents[0]), 1000)  # the anchor: the still before the first chunk
        seen.add((episode, start))
        assert latents[1:].tolist() == [1000 * episode + 2 * start + i for i in range(6)]
        actions = conditions[1:].reshape(24, 7)[:, 0] * 4096
        assert actions.tolist() == [1000 * episode + 8 * start + i for i in range(24)]
        assert not conditions[0].any()
    assert seen == {(0, 0), (0, 1), (0, 2), (2, 0)}  # episode 1 is too short, and nothing runs over an end

    with pytest.raises(DatasetError, match="no episode has 3 chunks of 8 steps .the longest has 2"):
        EpisodeSampler(numbered_episodes((2, 1)), settings)


def test_commanded_poses_follow_their_actions(tmp_path: Path) -> None:
    episodes = numbered_episodes((5, 4))
    sampler = EpisodeSampler(episodes, config("", tmp_path))
    assert sampler.arm_map is not None
    batch = sampler.draw(np.random.default_rng(1), 8)
    for latents, conditions in zip(batch.latents[:, :, 0, 0, 0], batch.conditions, strict=True):
        episode, start = divmod(int(latents[0]), 1000)
        first = 1000.0 * episode + 8 * start
        expected = first + torch.tensor([0.0] * 4 + [1.0 + i for i in range(24)])  # held, then one after each action
        poses = sampler.arm_map.normalise(expected.view(1, 7, 4, 1).expand(-1, -1, -1, 7))[0]
        assert torch.equal(conditions.unflatten(1, (4, 14))[..., 7:], poses)


def test_training_draws_the_maps_that_a_rollout_draws(tmp_path: Path) -> None:
    actions = torch.rand(1, 24, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    first = torch.tensor(HOME_POSE, dtype=torch.float32)[None]
    poses = torch.cat([first[:, None], ArmMap().integrate(first, actions)], 1)
    zeros = torch.zeros(7, 16, 8, 8)
    episodes = LatentEpisodes(torch.tensor([3]), zeros[:6], zeros[:4], actions[0], poses[0])
    batch = EpisodeSampler(episodes, config("", tmp_path)).draw(np.random.default_rng(0), 1)
    model = WanWorldModel(WanWorldModelTransformer(MODEL), PackedFrameAutoencoder(AutoencoderConfig(widths=(16, 16))))
    state = model.start(torch.zeros(1, 64, 64, 3, dtype=torch.uint8), [NoiseKey(0)], first)
    for chunk in range(3):
        state, _ = model.imagine(state, actions[:, 8 * chunk : 8 * chunk + 8])
    assert batch.arm_maps is not None
    torch.testing.assert_close(state.arm_maps, batch.arm_maps, atol=1e-5, rtol=0)  # the anchor and all six new frames
    torch.testing.assert_close(state.conditions, batch.conditions, atol=1e-5, rtol=0)
    assert state.arm_maps[0, 1:, -4:].abs().amax() > 0.3


def test_the_loss_looks_where_objects_are_handled() -> None:
    poses = np.tile(np.asarray([0.30, 0.0, 0.20, 0, 0, 0, 1], np.float32), (17, 1))
    places = np.full((17, 4, 3), np.nan)
    places[:, 0] = (0.25, -0.10, 0.02)  # stands still, out of reach
    places[:, 1] = (0.30, 0.03, 0.19)  # held out to the tool, still
    places[:, 2] = (0.35, 0.10, 0.02)
    places[12:, 2] = (0.35, 0.02, 0.02)  # pushed in the second chunk
    cells = focus_cells(places, poses, MODEL, ArmMap())
    assert cells.shape == (4, 8, 8) and cells.dtype == np.uint8

    def marked(frame: int, place: tuple[float, float, float]) -> bool:
        u, v = project(np.asarray([place]), 8)[0][0]
        return bool(cells[frame, int(v), int(u)])

    assert not any(marked(m, (0.25, -0.10, 0.02)) for m in range(4))
    assert all(marked(m, (0.30, 0.03, 0.19)) for m in range(4))
    assert [marked(m, (0.35, 0.02, 0.02)) for m in range(4)] == [False, False, True, True]
    assert [marked(m, (0.35, 0.10, 0.02)) for m in range(4)] == [False, False, True, True]  # where it has left
    assert not focus_cells(None, poses, MODEL, ArmMap()).any()


def test_object_weight_weighs_the_cells_in_focus(tmp_path: Path) -> None:
    settings = config("", tmp_path, loss=LossConfig(change_weight=0.0))
    model = WanWorldModelTransformer(MODEL)
    episodes = numbered_episodes((3,))
    latents = torch.randn(episodes.latents.shape, generator=torch.Generator().manual_seed(0))
    episodes = replace(episodes, latents=latents, stills=episodes.stills[..., :1, :1].expand(-1, -1, 8, 8) * 0)
    batch = EpisodeSampler(episodes, settings).draw(np.random.default_rng(0), 2)

    def loss(focus: torch.Tensor | None) -> float:
        chosen = replace(batch, focus=focus)
        return episode_loss(model, chosen, BatchNoise(torch.Generator().manual_seed(1), 2), settings.loss)[0].item()

    everywhere, nowhere = torch.ones(2, 6, 8, 8, dtype=torch.uint8), torch.zeros(2, 6, 8, 8, dtype=torch.uint8)
    assert loss(nowhere) == loss(None)
    assert loss(everywhere) == pytest.approx((1 + settings.loss.object_weight) * loss(None), rel=1e-4)


def test_it_goes_on_from_another_world_model(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", (40, 24, 12))
    left_over = tmp_path / "first" / "world_model" / ".transformer.1234.tmp"  # of a run that was killed while it saved
    left_over.mkdir(parents=True)
    first = train_world_model(config(data, tmp_path / "first"))
    assert first == left_over.parent and not left_over.exists()
    still = StageConfig(steps=1, batch_size=2, lr=0.0)
    again = train_world_model(config(data, tmp_path / "again", init=str(first), transformer=still))
    for name in ("transformer", "autoencoder"):
        ours, theirs = (load_safetensors(folder / WEIGHTS[name]) for folder in (again, first))
        assert all(torch.allclose(ours[key], theirs[key], atol=1e-6) for key in theirs), name
    assert not (tmp_path / "again" / "autoencoder").exists()
    other = RolloutConfig(action_low=(-2.0,) * 7, action_high=(2.0,) * 7)
    with pytest.raises(InvalidOptionError, match=r"first.* was trained with action bounds .* Leave rollout.action-low"):
        train_world_model(config(data, tmp_path / "bounds", init=str(first), rollout=other))
    wider = replace(MODEL, ffn_dim=96)
    with pytest.raises(CheckpointError, match=r"first.*has another architecture than this run \(ffn_dim: 64 -> 96\)"):
        train_world_model(config(data, tmp_path / "wider", init=str(first), model=wider))
    with pytest.raises(CheckpointError, match="no world model in"):
        train_world_model(config(data, tmp_path / "none", init=str(tmp_path)))


def train_on(run_dir: Path, data: str) -> None:
    train_world_model(config(data, run_dir))


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_bit_identical(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", (40, 24))
    unbroken, killed = kill_at_random_moments("test_world_model_training:train_on", tmp_path, data)
    for run in killed:
        for stage in ("autoencoder", "transformer"):
            last = f"{stage}/checkpoints/step_00000004/manifest.json"
            hashes = [json.loads((folder / last).read_text())["files"] for folder in (run, unbroken)]
            assert hashes[0] == hashes[1], stage
            saved = [load_safetensors(folder / "world_model" / WEIGHTS[stage]) for folder in (run, unbroken)]
            assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])


def window_config(tmp_path: Path, **changes: object) -> WorldModelTrainConfig:
    """A run on windows with a trained codec and far anchors."""
    stage = StageConfig(steps=4, batch_size=2, lr=1e-3, warmup=2)
    return replace(config(str(tmp_path / "data"), tmp_path / "out", objective="window", transformer=stage), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("max_time", [RolloutConfig().max_time, WAN_ROLLOUT.max_time, 8])
def test_windows_give_the_model_what_a_rollout_gives_it(tmp_path: Path, max_time: int) -> None:
    """Conditions, maps and positions, behind a near and a far anchor, at every shipped rollout setting: a window exists
    only where a rollout gets to."""
    reader = LeRobotReader(write_data(tmp_path / "data", (64,), poses=True))
    codec = PackedFrameAutoencoder(AutoencoderConfig(widths=(16, 16))).eval()
    settings = window_config(
        tmp_path, bf16=False, loss=LossConfig(far_anchor=1.0), rollout=RolloutConfig(max_time=max_time)
    )
    mixture = cached_mixture([DataEntry(str(tmp_path / "data"))], codec, tmp_path / "latents", settings, ALONE)
    low, high = rollout_bounds(mixture.bounds[0], 7)
    assert low[0] > -1 and high[0] < 1  # quantiles: some actions lie outside
    rollout = replace(settings.rollout, action_low=low, action_high=high)
    model = WanWorldModel(WanWorldModelTransformer(MODEL), codec, rollout)
    episode = reader.episode(0)
    states = [model.start(torch.from_numpy(episode.frames[:1]), [NoiseKey(0)], torch.from_numpy(episode.state[:1]))]
    for chunk in range(8):
        actions = torch.from_numpy(episode.actions[None, 8 * chunk : 8 * chunk + 8])
        states.append(model.imagine(states[-1], actions)[0])
    objective, seen = WindowObjective(mixture, settings, device="cpu"), set()
    rows = list(range(100))
    windows = mixture.draw(np.random.default_rng(mix(0, 2, 0, 0)), 100, 4, 1.0, max_offset=max_time - 7)
    batch = objective.draw(0, rows, 100)
    assert batch.maps is not None and torch.equal(batch.times, windows.times)
    for row, (_, first, anchor) in enumerate(windows.places.tolist()):
        n = int(batch.drawn.context[row])
        assert n == 6 or first == anchor  # step s of a rollout has min(2 s, 6) latents of context
        if anchor:
            continue
        seen.add((first, n))
        state = states[first + n // 2 + 1]  # after the chunk behind the context
        new = slice(n + 1, n + 3)
        assert int(batch.times[row, n + 1]) == model._time(first + n // 2)
        torch.testing.assert_close(batch.conditions[row, new], state.conditions[0, -2:], atol=1e-4, rtol=0)
        torch.testing.assert_close(batch.maps[row, new], state.arm_maps[0, -2:], atol=1e-4, rtol=0)
        before = states[first + n // 2]  # what it looked back on
        recent = slice(7 - n, 7)
        torch.testing.assert_close(batch.conditions[row, 0], before.conditions[0, 0], atol=1e-4, rtol=0)
        torch.testing.assert_close(batch.conditions[row, 1 : n + 1], before.conditions[0, recent], atol=1e-4, rtol=0)
        torch.testing.assert_close(batch.maps[row, 1 : n + 1], before.arm_maps[0, recent], atol=1e-4, rtol=0)
    assert {first for first, _ in seen} >= {0, 2, 4} and {n for _, n in seen} >= {0, 2, 4, 6}
    part = objective.draw(0, [3, 17], 100)
    assert torch.equal(part.latents, batch.latents[[3, 17]]) and torch.equal(
        part.drawn.noise, batch.drawn.noise[[3, 17]]
    )


@pytest.mark.slow
def test_a_run_on_windows_resumes_bit_identical(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    for name, lengths in (("data", (40, 72)), ("demos", (48,)), ("held_out", (40,))):
        write_data(tmp_path / name, lengths)
    changes: dict[str, object] = {
        "data": (str(tmp_path / "data"), f"{tmp_path / 'demos'},weight=3,name=few"),
        "validation": (str(tmp_path / "held_out"),), "validation_windows": 3, "validate_every": 2, "deploy": "few",
        "log_every": 1,
    }  # fmt: skip
    unbroken = train_world_model(window_config(tmp_path, **changes))
    stopped = replace(window_config(tmp_path, **changes), run_dir=str(tmp_path / "stopped"))
    save, saves = TrainingLoop.save, []

    def killed(self: TrainingLoop) -> None:
        save(self)
        saves.append(self.step)
        if self.folder.name == "transformer" and self.step == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingLoop, "save", killed)
        train_world_model(stopped)
    resumed = train_world_model(stopped)
    a, b = (load_safetensors(folder / WEIGHTS["transformer"]) for folder in (unbroken, resumed))
    assert saves[-1] == 2 and all(torch.equal(a[key], b[key]) for key in a)
    logs = [(folder.parent / "transformer" / "metrics.jsonl").read_text() for folder in (unbroken, resumed)]
    assert logs[0] == logs[1]
    lines = [json.loads(line) for line in logs[0].splitlines()]
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 2, 4]
    assert {"val_dream_psnr_moving_0_8", "val_copy_last_ssim_32_40"} <= lines[-1].keys()
    assert (unbroken.parent / "transformer/validation/step_00000004.mp4").stat().st_size > 1000
    written = json.loads((unbroken / "statistics.json").read_text())
    low, high = rollout_bounds((np.array(written["few"]["action_low"]), np.array(written["few"]["action_high"])), 7)
    model = read_world_model(unbroken)
    assert (model.config.action_low, model.config.action_high) == (low, high)
    assert written["data"]["q01"] != list(low)
    assert written["data"]["action_low"] == list(low)  # one embodiment, one set of bounds


def test_fine_tuning_keeps_the_bounds_of_the_initial_model(tmp_path: Path) -> None:
    """One raw action has one condition before and after; another robot gets its own bounds by name."""
    for name, lengths in (("data", (40, 72)), ("demos", (33,)), ("other", (48,))):
        write_data(tmp_path / name, lengths)

    def train(run: str, *data: str, **changes: object) -> tuple[WanWorldModel, dict[str, dict[str, list[float]]]]:
        paths = tuple(str(tmp_path / entry) for entry in data)
        folder = train_world_model(window_config(tmp_path, data=paths, run_dir=str(tmp_path / run), **changes))
        return read_world_model(folder), json.loads((folder / "statistics.json").read_text())

    init = str(tmp_path / "first/world_model")
    first, written = train("first", "data", codec="embedded")
    tuned, kept = train("tuned", "demos", init=init)
    assert kept["demos"]["q01"] != written["data"]["q01"]  # the data alone would give other bounds
    actions = torch.rand(1, 2, 4, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    poses = torch.zeros(1, 2, 4, 7)
    assert torch.equal(first._conditions(actions, poses), tuned._conditions(actions, poses))

    _, mixed = train("mixed", "demos", "other,embodiment=b", init=init)
    for side, quantile in (("action_low", "q01"), ("action_high", "q99")):
        assert mixed["demos"][side] == written["data"][quantile]
        assert mixed["other"][side] == mixed["other"][quantile] != written["data"][quantile]
    deployed, again = train("again", "demos,embodiment=b", init=str(tmp_path / "mixed/world_model"))
    assert again["demos"]["action_low"] == mixed["other"]["q01"] == list(deployed.config.action_low)
    with pytest.raises(InvalidOptionError, match="validation data are of embodiment c, the saved model is for b"):
        train("held", "demos,embodiment=b", validation=(f"{tmp_path / 'other'},embodiment=c",))

    new = WanWorldModel(WanWorldModelTransformer(MODEL), first.autoencoder, first.config)  # actions have no effect yet
    assert bounds_of_model(new, tmp_path) == {} and bounds_of_model(first, init).keys() == {""}
    old = {"play": {"path": "a", "weight": 1.0, "q01": [0.0] * 7, "q99": [2.0] * 7}}  # of an earlier version
    (tmp_path / "statistics.json").write_text(json.dumps(old))
    known = bounds_of_model(first, tmp_path)
    assert known["play"][1].tolist() == [2.0] * 7 and tuple(known[""][0]) == first.config.action_low
    (tmp_path / "statistics.json").write_text(json.dumps({"play": {"q01": [0.0]}}))
    with pytest.raises(CheckpointError, match=r"statistics.json has no action quantiles of 'play'; restore"):
        bounds_of_model(first, tmp_path)


def test_it_trains_on_with_wans_vae(tmp_path: Path) -> None:
    from diffusers import AutoencoderKLWan

    write_data(tmp_path / "data", (32,), fps=20)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        arch = replace(MODEL, latent_shape=(16, 4, 4), residual=False, pose_dim=0, arm_map_channels=0, warp_last_frame=False,
                       stem_channels=0, stem_blocks=0, head_blocks=0, text_dim=8)  # fmt: skip
        vae, transformer = WanVAE(AutoencoderKLWan(base_dim=8), 32), WanWorldModelTransformer(arch)
    save_world_model(WanWorldModel(transformer, vae, RolloutConfig(arm_map=None)), tmp_path / "wan")
    folder = train_world_model(window_config(tmp_path, init=str(tmp_path / "wan"), model=arch))
    assert (folder / "vae" / "config.json").is_file() and not (folder / "autoencoder").exists()
    caches = {"anchored": tmp_path / "out/latents/data", "episode": tmp_path / "cut/latents/data"}
    train_world_model(window_config(tmp_path, init=str(tmp_path / "wan"), model=arch, run_dir=str(tmp_path / "cut"),
                                    window_latents="episode"))  # fmt: skip
    assert [json.loads((c / "index.json").read_text())["window_chunks"] for c in caches.values()] == [4, 0]
    assert (read_world_model(folder).config.arm_map, read_world_model(folder).fps) == (None, 20.0)
    with pytest.raises(InvalidOptionError, match='needs the bundled codec; give objective="window"'):
        train_world_model(config(str(tmp_path / "data"), tmp_path / "x", init=str(tmp_path / "wan"), model=arch))


def test_an_optimiser_on_the_host_trains_the_same_and_may_change_on_the_way(tmp_path: Path) -> None:
    write_data(tmp_path / "data", (40, 24))
    torch.set_num_threads(1)
    settings = {"codec": "embedded", "save_every": 2, "checkpointing": True}

    def train(name: str, steps: int = 4, **changes: object) -> dict[str, torch.Tensor]:
        stage = StageConfig(steps=steps, batch_size=2, lr=1e-3, warmup=2, decay=1e-6)
        train_world_model(
            window_config(tmp_path, run_dir=str(tmp_path / name), transformer=stage, **settings, **changes)
        )
        step = tmp_path / name / f"transformer/checkpoints/step_{steps:08d}"
        return load_safetensors(step / "tensors.safetensors")

    whole = train("whole")
    train("changed", 2, offload=True)
    for other in (train("host", offload=True), train("changed", 4)):
        assert whole.keys() == other.keys() and all(torch.equal(whole[key], other[key]) for key in whole)
    assert any(key.startswith("optimizer/") for key in whole)


def test_training_that_does_not_fit_is_refused_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data(tmp_path / "data", (40,))
    free = 0
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    with pytest.raises(NotEnoughMemoryError, match=r"Training 2 rows at a time needs .* but 0.00 GiB .* lower micro"):
        train_world_model(window_config(tmp_path, codec="embedded"))
    assert not (tmp_path / "out").exists()
    full = window_config(
        tmp_path, model=wan_config("wan2.1-1.3b"), transformer=StageConfig(steps=4, batch_size=12, lr=1e-3)
    )
    for gib, fits in ((40, {"checkpointing": True}), (22, {"checkpointing": True, "offload": True})):
        free = gib * GIB
        with pytest.raises(NotEnoughMemoryError, match="Training 12 rows at a time needs"):
            training_module._require_memory(full, ALONE)
        training_module._require_memory(replace(full, micro_batch_size=4, **fits), ALONE)
    with pytest.raises(InvalidOptionError, match="fsdp2 spreads it over the devices already"):
        training_module._check(window_config(tmp_path, offload=True, parallel="fsdp2"), ALONE)


def test_a_run_of_an_earlier_version_resumes(tmp_path: Path) -> None:
    """Its stored configuration has the old names of settings, and some that are gone."""
    write_data(tmp_path / "data", (40,))
    settings = window_config(tmp_path, codec="embedded", save_every=2)
    train_world_model(settings)
    path = tmp_path / "out/transformer/config.json"
    stored = json.loads(path.read_text())
    stored["model"]["carry"] = stored["model"].pop("warp_last_frame")
    path.write_text(json.dumps({**stored, "fit_memory": False}))
    train_world_model(replace(settings, transformer=replace(settings.transformer, steps=6)))
    assert (tmp_path / "out/transformer/checkpoints/step_00000006").is_dir()


@pytest.mark.parametrize("windows", [False, True])
def test_states_that_are_no_poses_are_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, windows: bool
) -> None:
    features = {schema.ACTION_KEY: schema.numeric_feature(7), schema.STATE_KEY: schema.numeric_feature(5)}
    writer = LeRobotWriter(tmp_path / "data", fps=10, image_shape=(64, 64, 3), features=features)
    for _ in range(2):
        frames = np.zeros((41, 64, 64, 3), np.uint8)
        writer.add_episode(frames, np.zeros((40, 7), np.float32), np.zeros((41, 5), np.float32), "play")
    writer.finalize()
    monkeypatch.setattr(
        training_module, "train_autoencoder", lambda *_: pytest.fail("the autoencoder was trained first")
    )
    monkeypatch.setattr(training_module, "read_episodes", lambda *_: pytest.fail("the frames were read first"))
    settings = window_config(tmp_path) if windows else config(str(tmp_path / "data"), tmp_path / "out")
    with pytest.raises(DatasetError, match=r"the data's states have 5 dimensions"):
        train_world_model(settings)


def test_mistakes_are_named(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", (40,))

    def refused(error: type[Exception], said: str, **changes: object) -> None:
        with pytest.raises(error, match=said):
            train_world_model(window_config(tmp_path, codec="embedded", run_dir=str(tmp_path / "x"), **changes))

    refused(InvalidOptionError, "deploy='few' is not among the data entries; choose from data", deploy="few")
    refused(InvalidOptionError, "init has its own codec: give init or codec, not both", init="embedded")
    refused(InvalidOptionError, "'wheight=2' in the data entry .* is no setting", data=(f"{data},wheight=2",))
    refused(InvalidOptionError, "weight in the data entry .* is no number", data=(f"{data},weight=two",))
    refused(InvalidOptionError, 'are for objective="window"', data=(f"{data},weight=2",), objective="episode")
    refused(
        InvalidOptionError,
        "context_latents 5 is no multiple of chunk_latents 2",
        model=replace(MODEL, context_latents=5),
    )
    wide = replace(MODEL, latent_shape=(16, 32, 32))
    refused(
        CheckpointError,
        r"makes latents \(16, 8, 8\) of 64-pixel frames, the transformer takes \(16, 32, 32\)",
        model=wide,
    )
    refused(CheckpointError, "no world-model configuration 'wan3'", model_name="wan3")
    refused(DatasetError, "takes 9 pose dimensions", model=replace(MODEL, pose_dim=9))
    short = write_data(tmp_path / "short", (4,))
    refused(DatasetError, "none of 1 episodes is 8 steps long", validation=(short,))
    assert DataEntry.parse("a/b,weight=2,name=n,camera=c,embodiment=e") == DataEntry("a/b", 2.0, "n", "c", "e")


def test_episodes_clip_actions_as_a_rollout_does(tmp_path: Path) -> None:
    settings = config("", tmp_path, model=replace(MODEL, arm_map_channels=0, warp_last_frame=False, pose_dim=0))
    settings = replace(settings, rollout=replace(settings.rollout, arm_map=None))
    model = WanWorldModel(WanWorldModelTransformer(settings.model), PackedFrameAutoencoder(), settings.rollout)
    episodes = numbered_episodes((3,))
    episodes = replace(episodes, actions=torch.linspace(-2, 2, 24 * 7).view(24, 7))
    batch = EpisodeSampler(episodes, settings).draw(np.random.default_rng(0), 1)
    expected = model._conditions(episodes.actions.view(1, 6, 4, 7), torch.zeros(1, 6, 4, 7))
    assert torch.equal(batch.conditions[:, 1:], expected) and expected.abs().max() == 1
