"""Supervised fine-tuning in two processes trains what one process trains."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import test_sft_openvla as toy
import torch

from rawdream_env.errors import InvalidOptionError
from rawdream_env.files import load_safetensors
from rawdream_env.testing.openvla_oft import write_tiny_openvla
from rawdream_env.trainers.common.run_dir import read_jsonl
from rawdream_env.trainers.policy import sft

WORKER = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/../.."]
import torch
torch.set_num_threads(1)
import test_sft_distributed as t
t.train(sys.argv[2], sys.argv[3], parallel="ddp")
"""


def train(base: str, out: str, **changes: Any) -> None:
    """Two steps of an uneven batch in microbatches."""
    root = Path(base)
    options: dict[str, Any] = {"steps": 2, "batch_size": 5, "microbatch_size": 2, "ema": 0.5, "lr": 1e-4, **changes}
    sft.train_sft(toy.config(root / out, root / "openvla", root / "arm", **options), progress=False)


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    write_tiny_openvla(tmp_path / "openvla")
    toy.write_data(tmp_path / "arm")
    train(str(tmp_path), "one")
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        [*command, str(Path(__file__).parent), str(tmp_path), "two"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-5000:]
    ours, theirs = (read_jsonl(tmp_path / run / "metrics.jsonl") for run in ("one", "two"))
    assert len(ours) == len(theirs) == 3  # two steps and a validation
    for line, same in zip(ours, theirs, strict=True):
        assert same == pytest.approx(line, abs=1e-5, rel=1e-4)
    for file in ("adapters/adapter_model.safetensors", "policy/model.safetensors"):
        states = [load_safetensors(tmp_path / run / file) for run in ("one", "two")]
        assert states[0].keys() == states[1].keys()
        for name, value in states[0].items():
            torch.testing.assert_close(states[1][name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_options_that_do_not_fit_several_processes(tmp_path: Path) -> None:
    with pytest.raises(InvalidOptionError, match="minutes needs one process"):
        toy.config(tmp_path, tmp_path, tmp_path, parallel="ddp", minutes=1.0)
    with pytest.raises(InvalidOptionError, match="needs several processes: start it with `torchrun"):
        sft.train_sft(toy.config(tmp_path, tmp_path, tmp_path, parallel="ddp"))
