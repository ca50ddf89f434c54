"""Two processes train what one trains, and a run goes on with another number of them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import test_world_model_training as training
import torch

from rawdream_env.errors import InvalidOptionError
from rawdream_env.files import load_safetensors
from rawdream_env.trainers.common.distributed import ALONE, ProcessGroup, gather, join, micro_batches
from rawdream_env.trainers.world_model.config import LossConfig, StageConfig, WorldModelTrainConfig
from rawdream_env.trainers.world_model.train import train_world_model
from rawdream_env.world_models.autoencoders import AutoencoderConfig, PackedFrameAutoencoder
from rawdream_env.world_models.loading import save_world_model
from rawdream_env.world_models.wan.rollout import RolloutConfig, WanWorldModel
from rawdream_env.world_models.wan.transformer import WanConfig, WanWorldModelTransformer

WAN = WanConfig(
    num_layers=2, num_attention_heads=2, attention_head_dim=24, ffn_dim=64, pose_dim=0, stem_channels=0, stem_blocks=0,
    head_blocks=0, residual=False, text_dim=8, text_rows=1,
)  # fmt: skip


def wan_world_model(folder: Path) -> str:
    """A model like Wan: velocity, attention to a prompt (of which queries and keys have no gradient), actions alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = WanWorldModelTransformer(WAN)
        codec = PackedFrameAutoencoder(AutoencoderConfig(widths=(16, 16)))
    save_world_model(WanWorldModel(transformer, codec, RolloutConfig(arm_map=None)), folder)
    return str(folder)


def config(base: Path, out: str, **changes: object) -> WorldModelTrainConfig:
    """Six steps of windows from a converted model."""
    settings = training.config(
        str(base / "data"), base / out, objective="window", init=str(base / "init"), model=WAN, checkpointing=True,
        transformer=StageConfig(steps=6, batch_size=4, lr=1e-3, warmup=2), log_every=1, save_every=3,
        loss=LossConfig(far_anchor=0.5), validation=(str(base / "held_out"),), validation_windows=5, validate_every=6,
    )  # fmt: skip
    return replace(settings, **changes)  # type: ignore[arg-type]


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "transformer" / "metrics.jsonl").read_text().splitlines()]


WORKER = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/../.."]
import torch
torch.set_num_threads(1)
import test_distributed as t
base, parallel, objective, out, steps = Path(sys.argv[2]), *sys.argv[3:7]
changes = dict(parallel=parallel, micro_batch_size=1)
if objective == "episode":
    changes |= dict(objective="episode", init="", model=t.training.MODEL, checkpointing=False)
t.train_world_model(t.config(base, out, **changes, transformer=t.stage(int(steps))))
"""


def stage(steps: int) -> StageConfig:
    """The learning rate of a shorter run is that of the longer one: it is cut before the decay."""
    return StageConfig(steps=steps, batch_size=4, lr=1e-3, warmup=2, decay=1e-6)


def torchrun(base: Path, parallel: str, objective: str, out: str, steps: int = 6) -> None:
    script = base / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    command += [str(Path(__file__).parent), str(base), parallel, objective, out, str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    training.write_data(folder / "data", (40, 24, 72, 48))
    training.write_data(folder / "held_out", (40,))
    wan_world_model(folder / "init")
    return folder


def close(a: Path, b: Path) -> None:
    def lines(out: Path) -> list[dict[str, float]]:  # a run of three steps has validated at its end
        return [line for line in metrics(out) if "loss" in line or line["step"] != 3]

    ours, theirs = lines(a), lines(b)
    assert len(ours) == len(theirs) >= 7
    for one, other in zip(ours, theirs, strict=True):
        shared = {name for name in one if "loss" in name or name in ("grad_norm", "mse_pure_noise")}
        assert shared
        assert {n: one[n] for n in shared} == pytest.approx({n: other[n] for n in shared}, abs=1e-4, rel=1e-4)
    states = [load_safetensors(sorted(x.glob("transformer/checkpoints/*"))[-1] / "tensors.safetensors") for x in (a, b)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        if name.startswith(("model/", "ema/")):
            torch.testing.assert_close(states[1][name], value, atol=2e-4, rtol=1e-3, msg=name)


@pytest.mark.slow
def test_two_processes_train_what_one_trains(base: Path) -> None:
    torch.set_num_threads(1)
    train_world_model(config(base, "one", transformer=stage(6)))
    for parallel in ("ddp", "fsdp2"):
        torchrun(base, parallel, "window", parallel)
        close(base / "one", base / parallel)
    torchrun(base, "fsdp2", "window", "resized", steps=3)
    train_world_model(config(base, "resized", transformer=stage(6)))  # three steps of two processes, three of one
    close(base / "one", base / "resized")


@pytest.mark.slow
def test_episodes_and_the_autoencoder_under_fsdp2(base: Path) -> None:
    torch.set_num_threads(1)
    changes = {"objective": "episode", "init": "", "model": training.MODEL, "checkpointing": False}
    train_world_model(config(base, "episodes", **changes, transformer=stage(6)))
    torchrun(base, "fsdp2", "episode", "episodes_fsdp2")
    close(base / "episodes", base / "episodes_fsdp2")


def test_rows_and_micro_batches() -> None:
    assert [ProcessGroup("ddp", rank, 3).rows(7) for rank in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]
    assert micro_batches([0, 2, 4, 6, 8], 2) == [[0, 2], [4, 6], [8]] and micro_batches([1, 3], 0) == [[1, 3]]
    value = torch.ones(2)
    assert ALONE.total(value) is value and ALONE.value_from_first(3) == 3
    assert dict(ALONE.from_first({"a": value})) == {"a": value} and gather([("a", value)], ProcessGroup(rank=1)) == {}


def test_what_does_not_fit_the_processes(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    for parallel in ("ddp", "fsdp2"):
        with pytest.raises(
            InvalidOptionError, match=f"parallel='{parallel}' needs several processes: .*torchrun --nproc-per-node"
        ):
            train_world_model(config(base, "x", parallel=parallel))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidOptionError, match="device 'cuda' needs a GPU and a CUDA build of torch.*--device cpu"):
        train_world_model(config(base, "x", device="cuda"))
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InvalidOptionError, match="has started 3 processes, but .* add --parallel ddp or"):
        train_world_model(config(base, "x"))
    with pytest.raises(InvalidOptionError, match=r"batch_size 4 cannot be divided among 3 processes; .* say 6\."):
        from rawdream_env.trainers.world_model.train import _check

        _check(config(base, "x"), ProcessGroup("ddp", 0, 3))
    with pytest.raises(InvalidOptionError), join("none", "cpu"):
        pass
