"""The valid inputs that are mutated, one tiny folder for each kind, and what opens a folder of that kind.

An opener uses what it has opened: it reads every episode, imagines a chunk, acts, resumes a run.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from rawdream_env import cli, media
from rawdream_env.data import schema
from rawdream_env.data.import_hdf5 import ImportConfig, import_hdf5
from rawdream_env.data.lerobot import EpisodeData, LeRobotReader, LeRobotWriter
from rawdream_env.evaluation.judges.watch import read_video
from rawdream_env.judges import load_judge
from rawdream_env.judges.embedded import EmbeddedJudge
from rawdream_env.judges.embedded_network import EmbeddedJudgeConfig, JudgeNetwork
from rawdream_env.judges.videomae import VideoMAEJudge, VideoMAEJudgeConfig, VideoMAENetwork
from rawdream_env.policies import load_policy
from rawdream_env.policies.tiny_vla import TinyVLA, TinyVLAConfig
from rawdream_env.seeding import NoiseKey
from rawdream_env.starts import load_starts
from rawdream_env.starts.pack import save_start_pack
from rawdream_env.trainers.common.run_dir import RunDir
from rawdream_env.trainers.common.schedule import Schedule
from rawdream_env.trainers.common.training_loop import TrainingLoop
from rawdream_env.trainers.world_model.latent_cache import CacheConfig, cache_latents
from rawdream_env.trainers.world_model.latent_dataset import LatentDataset
from rawdream_env.types import Start, Video
from rawdream_env.world_models import load_world_model
from rawdream_env.world_models.autoencoders import AutoencoderConfig, PackedFrameAutoencoder
from rawdream_env.world_models.loading import save_world_model
from rawdream_env.world_models.wan.config import WanConfig
from rawdream_env.world_models.wan.convert import ConvertWanConfig, convert_wan
from rawdream_env.world_models.wan.rollout import WAN_ROLLOUT, RolloutConfig, WanWorldModel
from rawdream_env.world_models.wan.transformer import WanWorldModelTransformer
from rawdream_env.world_models.wan.vae import WanVAE

FEATURES = {"action": schema.numeric_feature(7), "observation.state": schema.numeric_feature(7)}
SIZES = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 32}
PLAIN = {"text_dim": 16, "pose_dim": 0, "stem_channels": 0, "stem_blocks": 0, "head_blocks": 0, "residual": False}
VLA = {"image_size": 16, "stem_channels": 8, "trunk_channels": 8, "trunk_blocks": 1, "width": 16, "heads": 2}
JUDGE = {"frame_size": 32, "stem": 8, "mid": 8, "deep": 16, "width": 16, "heads": 2, "layers": 1, "text_layers": 1}
MAE = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}


def frames(count: int, size: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def episodes() -> list[EpisodeData]:
    rng = np.random.default_rng(0)
    data = []
    for index, rows in enumerate((9, 17, 9)):
        actions = rng.uniform(-1, 1, (rows - 1, 7)).astype(np.float32)
        state = rng.uniform(-1, 1, (rows, 7)).astype(np.float32)
        data.append(EpisodeData(frames(rows, seed=index), actions, state, f"task {index}"))
    return data


def writer(root: Path) -> LeRobotWriter:
    return LeRobotWriter(root, fps=10, image_shape=(16, 16, 3), features=FEATURES, episodes_per_shard=2)


# -- making ------------------------------------------------------------------------------------------------------------


def make_dataset(root: Path) -> None:
    made = writer(root)
    for episode in episodes():
        made.add_episode(episode.frames, episode.actions, episode.state, episode.task)
    made.finalize()


def make_pictures(root: Path) -> None:
    """A data set with PNG pictures inside its data files, and one picture as a file."""
    make_dataset(root)
    info = json.loads((root / schema.INFO_PATH).read_text())
    info["features"]["observation.image"] = {"dtype": "image", "shape": [16, 16, 3], "names": None}
    (root / schema.INFO_PATH).write_text(json.dumps(info))
    (root / "picture.png").write_bytes(media.encode_picture(frames(1)[0]))
    for path in sorted(root.glob("data/*/*.parquet")):
        rows = pq.read_table(path).to_pylist()
        cells = [{"bytes": media.encode_picture(frames(1, seed=i)[0]), "path": None} for i in range(len(rows))]
        cells[0] = {"bytes": None, "path": "picture.png"}
        pq.write_table(
            pa.Table.from_pylist([r | {"observation.image": c} for r, c in zip(rows, cells, strict=True)]), path
        )
    for path in sorted(root.glob("videos/**/*.mp4")):
        path.unlink()


def make_hdf5(root: Path) -> None:
    rows = 6
    names = (("ee_pos", 3), ("ee_ori", 3), ("gripper_states", 2), ("joint_states", 7))
    with h5py.File(root / "demos.hdf5", "w") as file:
        data = file.create_group("data")
        data.attrs["macros_image_convention"] = "opengl"
        data.attrs["problem_info"] = json.dumps({"language_instruction": "open it"})
        data.attrs["env_args"] = json.dumps({"env_kwargs": {"control_freq": 20}})
        for index in range(2):
            group = data.create_group(f"demo_{index}")
            group.attrs["num_samples"] = str(rows)
            group.attrs["ep_meta"] = json.dumps({"lang": "close it"})
            obs = group.create_group("obs")
            for name, width in names:
                obs[name] = np.repeat(np.arange(rows)[:, None] / 10, width, 1)
            obs.create_dataset("agentview_rgb", data=frames(rows), chunks=(2, 16, 16, 3), compression="gzip")
            group["states"] = np.repeat(np.arange(rows)[:, None] / 10, 12, 1)
            group["actions"] = np.repeat(np.arange(rows)[:, None] / 100, 7, 1)


def make_world_model(root: Path) -> None:
    config = WanConfig(
        latent_shape=(4, 4, 4), stem_channels=8, stem_blocks=1, head_blocks=1, arm_map_channels=0, pose_dim=0, **SIZES
    )
    codec = PackedFrameAutoencoder(AutoencoderConfig(32, 4, (8, 8), (1, 1), (1, 1)))
    rollout = RolloutConfig(num_inference_steps=1, arm_map=None)
    save_world_model(WanWorldModel(WanWorldModelTransformer(config), codec, rollout), root)


def make_wan(root: Path) -> None:
    """A converted world model with Wan's VAE."""
    from diffusers import AutoencoderKLWan

    vae = WanVAE(AutoencoderKLWan(base_dim=4, z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4), 32)
    config = WanConfig(latent_shape=(4, 4, 4), text_rows=1, **PLAIN, **SIZES)
    save_world_model(WanWorldModel(WanWorldModelTransformer(config), vae, WAN_ROLLOUT), root)


def make_release(root: Path) -> None:
    """A tiny Wan 2.1 in diffusers' layout, with the VAE of Wan's own release."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 24, "text_dim": 16, "freq_dim": 32, "ffn_dim": 32}
    WanTransformer3DModel(in_channels=4, out_channels=4, num_layers=1, **sizes).save_pretrained(root / "transformer")
    statistics = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    AutoencoderKLWan(base_dim=4, z_dim=4, **statistics).save_pretrained(root / "vae")
    state = WanTransformer3DModel(in_channels=4, out_channels=4, num_layers=1, **sizes).state_dict()
    torch.save(state, root / "transformer.pth")


def make_judge(root: Path) -> None:
    EmbeddedJudge(JudgeNetwork(EmbeddedJudgeConfig(**JUDGE)), metadata={"steps": 3}).save_pretrained(root)


def make_videomae(root: Path) -> None:
    config = VideoMAEJudgeConfig(("open it", "close it"), num_attention_heads=2, **MAE)
    VideoMAEJudge(VideoMAENetwork(config)).save_pretrained(root)


def make_policy(root: Path) -> None:
    TinyVLA(TinyVLAConfig(decoder_layers=1, bin_rank=8, **VLA)).save_pretrained(root, metadata={"steps": 3})


def make_pack(root: Path) -> None:
    starts = [Start(frames(1, seed=i)[0], "open it", 0, np.zeros(7, np.float32), i) for i in range(3)]
    save_start_pack(root / "pack.safetensors", starts, [("open", "open it")], layout="narrow")


def make_photos(root: Path) -> None:
    for name, kind in (("a.png", "png"), ("b.jpg", "jpeg")):
        (root / name).write_bytes(media.encode_picture(frames(1)[0], kind))
    entries = {"a.png": "open it", "b.jpg": {"instruction": "close it", "task_id": 1, "proprio": [0.1], "seed": 3}}
    (root / "instructions.json").write_text(json.dumps(entries))


def make_run(root: Path) -> None:
    open_run(root)


def make_training(root: Path) -> None:
    open_training(root)


def make_video(root: Path) -> None:
    (root / "episode.mp4").write_bytes(media.encode_video([frames(9, 32)], 10))
    make_judge(root / "judge")


def make_latents(root: Path) -> None:
    make_dataset(root / "data")
    codec = PackedFrameAutoencoder(AutoencoderConfig(16, 4, (8, 8), (1, 1), (1, 1))).eval()
    cache_latents(LeRobotReader(root / "data"), codec, root / "cache", CacheConfig(progress=False))


def make_options(root: Path) -> None:
    values = {"data": ["a", "b"], "run_dir": "r", "steps": 3, "minutes": None, "lr": 1e-3, "model": VLA, "bf16": True}
    (root / "config.json").write_text(json.dumps(values))
    (root / "config.yaml").write_text("data: [a, b]\nrun_dir: r\nsteps: 3\nmodel: {width: 16, heads: 2}\n")
    judge = {"kind": "vlm_local", "model": "model", "max_frames": 8}
    (root / "judge.json").write_text(json.dumps(judge))


# -- opening -----------------------------------------------------------------------------------------------------------


def open_dataset(root: Path) -> None:
    reader = LeRobotReader(root)
    for index in range(min(len(reader), 3)):
        reader.episode(index)
    reader.load_all()


def open_writer(root: Path) -> None:
    """An interrupted collection is resumed."""
    made = writer(root)
    episode = episodes()[0]
    made.add_episode(episode.frames, episode.actions, episode.state, episode.task)
    made.finalize()


def open_hdf5(root: Path) -> None:
    import_hdf5(ImportConfig(str(root / "demos.hdf5"), str(root / "out"), image_size=16, progress=False))


def open_world_model(root: Path) -> None:
    model = load_world_model(root)
    shape = model.frame_shape
    if max(shape) > 256:
        return
    start = torch.zeros(1, *shape, dtype=torch.uint8)
    low = len(model.config.action_low)
    model.imagine(model.start(start, [NoiseKey(0)]), torch.zeros(1, model.chunk_len, low))


def open_release(root: Path) -> None:
    convert_wan(ConvertWanConfig(str(root), str(root / "out"), image_size=32))


def open_release_file(root: Path) -> None:
    source = str(root / "transformer.pth")
    convert_wan(ConvertWanConfig(source, str(root / "out"), vae=str(root / "vae"), image_size=32))


def open_judge(root: Path) -> None:
    load_judge(root)([Video(frames(9, 32), 10.0)], ["open it"])


def open_policy(root: Path) -> None:
    policy: Any = load_policy(root)
    size = policy.config.image_size
    policy.act(torch.zeros(1, size, size, 3, dtype=torch.uint8), ["open it"], temperature=1.0, keys=[NoiseKey(0)])


def open_starts(root: Path) -> None:
    load_starts(root, frame_shape=(16, 16, 3)).sample(NoiseKey(0))


def open_run(root: Path) -> None:
    config = {"steps": 3, "lr": 0.1, "names": ["a", "b"]}
    with RunDir(root, config, may_change=("steps",), tensorboard=False) as run:
        checkpoint = run.load_latest()
        step = 0 if checkpoint is None else checkpoint.step
        run.read_metrics()
        for number in range(step + 1, step + 3):
            run.log(number, loss=1.0 / number, note="x")
            run.log_timings(number, seconds=1.0)
            run.save(number, {"weight": torch.zeros(3)}, {"rng": {"state": number}})


def open_training(root: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = Schedule(lr=0.1, steps=4, warmup=1)
    with TrainingLoop(
        root, {"steps": 4}, model, optimizer, schedule, name="x", ema=0.9, save_every=2, progress=False
    ) as loop:
        for _ in loop:
            model(torch.ones(1, 2)).sum().backward()
            loop.update()
            loop.log(loss=torch.zeros(()))
            if loop.step == 3:
                break


def open_video(root: Path) -> None:
    read_video(root / "episode.mp4")


def open_latents(root: Path) -> None:
    dataset = LatentDataset(root / "cache")
    bounds, actions = dataset.bounds, dataset.all_actions()
    assert len(bounds) == 2 and actions.ndim == 2
    for episode in range(min(len(dataset), 3)):
        dataset.window(episode, 0, 1)


def open_options(root: Path) -> None:
    from rawdream_env.cli.arguments import parse
    from rawdream_env.cli.commands import COMMANDS
    from rawdream_env.judges import _options
    from rawdream_env.judges.vlm.config import parse_vlm_spec

    parse_vlm_spec(_options(root / "judge.json"))
    for name in ("config.json", "config.yaml"):
        parse("policy sft", COMMANDS["policy sft"], ["--config", str(root / name)])


def through_cli(*words: str) -> Callable[[Path], None]:
    """An opener that runs a command; ROOT in its words is the folder. Exit codes above 3 are faults."""

    def run(root: Path) -> None:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main([word.replace("ROOT", str(root)) for word in words])
        said = [line for line in err.getvalue().replace(str(root), ".").splitlines() if line.startswith("rawdream ")]
        if code not in (0, 1, 2, 3) or (code >= 2 and len(said) != 1) or len("".join(said)) > 600:
            raise AssertionError(f"exit code {code}, stderr {err.getvalue()[-1500:]!r}")

    return run


SFT = ("policy", "sft", "--data", "ROOT", "--run-dir", "ROOT/run", "--steps", "1", "--demos-per-task", "1",
       "--batch-size", "2", "--no-bf16",
       "--model.image-size", "16", "--model.stem-channels", "8", "--model.trunk-channels", "8", "--model.width", "16",
       "--model.heads", "2", "--model.bin-rank", "8")  # fmt: skip

KINDS: dict[str, tuple[str, Callable[[Path], None], float]] = {
    "dataset": ("dataset", open_dataset, 8),
    "pictures": ("pictures", open_dataset, 4),
    "writer": ("dataset", open_writer, 2),
    "dataset sft": ("dataset", through_cli(*SFT), 1),
    "hdf5": ("hdf5", open_hdf5, 6),
    "hdf5 cli": (
        "hdf5",
        through_cli("data", "import-hdf5", "--src", "ROOT/demos.hdf5", "--out", "ROOT/out", "--image-size", "16"),
        1,
    ),
    "world model": ("world_model", open_world_model, 5),
    "wan": ("wan", open_world_model, 3),
    "release": ("release", open_release, 2),
    "release file": ("release", open_release_file, 1),
    "release cli": (
        "release",
        through_cli("world-model", "convert", "ROOT", "--out", "ROOT/out", "--image-size", "32"),
        0.5,
    ),
    "judge": ("judge", open_judge, 3),
    "videomae": ("videomae", open_judge, 2),
    "policy": ("policy", open_policy, 3),
    "pack": ("pack", open_starts, 2),
    "photos": ("photos", open_starts, 2),
    "run": ("run", open_run, 4),
    "training": ("training", open_training, 3),
    "video": ("video", open_video, 2),
    "watch cli": (
        "video",
        through_cli("judge", "watch", "ROOT/episode.mp4", "--instruction", "open it", "--judge", "ROOT/judge"),
        1,
    ),
    "latents": ("latents", open_latents, 2),
    "options": ("options", open_options, 3),
}
"""Kind -> folder of valid inputs, what opens it, and how often it is drawn."""


def make_all(base: Path) -> None:
    torch.manual_seed(0)
    for name in sorted({seed for seed, _, _ in KINDS.values()}):
        (base / name).mkdir(parents=True)
        globals()[f"make_{name}"](base / name)
