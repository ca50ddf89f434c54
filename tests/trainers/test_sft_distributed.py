"""Supervised fine-tuning in two processes trains what one process trains."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_sft_openvla as toy
import torch

from rawdream_env.errors import InvalidOptionError
from rawdream_env.files import load_safetensors
from rawdream_env.policies.tiny_vla import TinyVLAConfig
from rawdream_env.testing.openvla_oft import write_tiny_openvla
from rawdream_env.trainers.common.run_dir import read_jsonl
from rawdream_env.trainers.policy import sft

WORKER = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/../.."]
import torch
torch.set_num_threads(1)
import test_sft_distributed as t
t.train(*sys.argv[2:5], parallel=sys.argv[4])
"""
IDLE = ("conv1.bias", "conv2.bias", "key_value.bias")
"""Weights of TinyVLA without an effect, before a norm or on all keys alike: AdamW makes steps of their gradients' rounding."""
SIZES = TinyVLAConfig(
    image_size=16, stem_channels=8, trunk_channels=8, trunk_blocks=1, width=16, heads=2, decoder_layers=1
)


def train(base: str, kind: str, out: str, **changes: Any) -> None:
    """Two steps of an uneven batch, with a microbatch that one of two processes has not."""
    root = Path(base)
    options: dict[str, Any] = {
        "steps": 2,
        "batch_size": 5,
        "microbatch_size": 1,
        "ema": 0.5,
        "lr": 1e-4,
        "save_every": 1,
    }
    options |= changes
    options |= {"tiny": {"init": None, "model": SIZES}, "openvla": {}, "full": {"lora_rank": 0, "ema": 0.0}}[kind]
    config = toy.config(root / out, root / "openvla", root / "arm")
    sft.train_sft(replace(config, **options), progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tiny", "openvla", "full"])
def test_two_processes_train_what_one_trains(tmp_path: Path, kind: str) -> None:
    torch.set_num_threads(1)
    write_tiny_openvla(tmp_path / "openvla")
    toy.write_data(tmp_path / "arm", (16, 16, 3) if kind == "tiny" else (48, 64, 3))
    train(str(tmp_path), kind, "none")
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    for parallel in ("ddp", "fsdp2"):
        words = [*command, str(Path(__file__).parent), str(tmp_path), kind, parallel]
        done = subprocess.run(words, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-5000:]
        close(tmp_path / "none", tmp_path / parallel)
    assert (tmp_path / "fsdp2/checkpoints/step_00000001").is_dir()
    shutil.rmtree(tmp_path / "fsdp2/checkpoints/step_00000002")
    train(str(tmp_path), kind, "fsdp2")  # one step of two processes, one of one
    close(tmp_path / "none", tmp_path / "fsdp2")


def close(one: Path, other: Path) -> None:
    """Metrics, weights and adapters equal to 1e-5."""
    ours, theirs = (read_jsonl(run / "metrics.jsonl") for run in (one, other))
    assert len(ours) == len(theirs) == 4  # two steps, each with a validation
    for line, same in zip(ours, theirs, strict=True):
        assert same == pytest.approx(line, abs=1e-5, rel=1e-4)
    files = [file.relative_to(one) for file in (*one.glob("policy/*.safetensors"), *one.glob("adapters/*.safetensors"))]
    assert files
    for file in files:
        states = [load_safetensors(run / file) for run in (one, other)]
        assert states[0].keys() == states[1].keys()
        for name, value in states[0].items():
            if not name.endswith(IDLE):
                torch.testing.assert_close(states[1][name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_options_that_do_not_fit_several_processes(tmp_path: Path) -> None:
    with pytest.raises(InvalidOptionError, match="minutes needs one process"):
        toy.config(tmp_path, tmp_path, tmp_path, parallel="ddp", minutes=1.0)
    with pytest.raises(InvalidOptionError, match="needs several processes: start it with `torchrun"):
        sft.train_sft(toy.config(tmp_path, tmp_path, tmp_path, parallel="ddp"))
