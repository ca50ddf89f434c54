"""GRPO in two processes trains what one process trains, and a run goes on with another number of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import test_grpo_openvla as toy
import torch

from rawdream_env.files import load_safetensors
from rawdream_env.policies import load_policy
from rawdream_env.policies.tiny_vla import TinyVLA, TinyVLAConfig
from rawdream_env.testing.openvla_oft import write_tiny_openvla
from rawdream_env.trainers.common.run_dir import read_jsonl
from rawdream_env.trainers.grpo.grpo import train_grpo

IDLE = ("conv1.bias", "conv2.bias", "key_value.bias")
"""Weights of TinyVLA without an effect, before a norm or on all keys alike: AdamW makes steps of their gradients' rounding."""
WORKER = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/../.."]
import torch
torch.set_num_threads(1)
import test_grpo_distributed as t
t.train(*sys.argv[2:5], steps=int(sys.argv[5]), parallel=sys.argv[6])
"""


def simulator(num_envs: int, **kwargs: Any) -> Any:
    """For evaluations, which are process 0's."""
    assert os.environ.get("RANK", "0") == "0"
    return toy.toy_env(num_envs)


gym.register("test/Shared-v0", vector_entry_point=simulator)


def train(base: str, kind: str, out: str, *, steps: int = 2, parallel: Any = "none") -> None:
    """Two steps with replaced groups, uneven minibatches, guard and average; later, rounding may flip a sampled token."""
    policy: Any
    if kind == "tiny":
        sizes = TinyVLAConfig(
            image_size=16, stem_channels=8, trunk_channels=8, trunk_blocks=1, width=16, heads=2, decoder_layers=1
        )
        policy, lr = TinyVLA(sizes), 1e-3
    else:
        policy, lr = load_policy(Path(base) / "openvla"), 2e-4
        policy.add_lora(4)
    config = toy.config(
        Path(base) / out, steps=steps, parallel=parallel, lr=lr, groups_per_step=3, microbatch_size=3, max_kl=0.5,
        ema=0.9, save_every=1, max_groups_per_step=12, eval_every=1, eval_env_id="test/Shared-v0", eval_episodes=5,
    )  # fmt: skip
    train_grpo(config, env=toy.toy_env(8), policy=policy)


def torchrun(base: Path, kind: str, out: str, parallel: str, steps: int = 2) -> None:
    script = base / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    command += [str(Path(__file__).parent), str(base), kind, out, str(steps), parallel]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]


def close(one: Path, other: Path) -> None:
    """Equal counts; weights and metrics equal to 1e-5."""
    ours, theirs = (read_jsonl(run / "metrics.jsonl") for run in (one, other))
    assert len(ours) == len(theirs) == 2 and any(line["groups"] > line["groups_kept"] for line in ours)
    assert all(line["eval_n"] == 5 for line in ours)
    for line, same in zip(ours, theirs, strict=True):
        assert line.keys() == same.keys()
        for name, value in line.items():
            assert same[name] == (value if value is None else pytest.approx(value, abs=1e-5, rel=1e-4)), name
    states = [load_safetensors(run / "checkpoints/step_00000002/tensors.safetensors") for run in (one, other)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        if name.startswith(("policy.", "average.")) and not name.endswith(IDLE):
            torch.testing.assert_close(states[1][name], value, atol=1e-5, rtol=1e-4, msg=name)
    manifests = [json.loads((run / "config.json").read_text()) for run in (one, other)]
    assert {k for k in manifests[0] if manifests[0][k] != manifests[1][k]} <= {"run_dir", "parallel"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tiny", "openvla"])
def test_two_processes_train_what_one_trains(tmp_path: Path, kind: str) -> None:
    torch.set_num_threads(1)
    if kind == "openvla":
        pytest.importorskip("peft")
        write_tiny_openvla(tmp_path / "openvla")
    train(str(tmp_path), kind, "one")
    for parallel in ("ddp", "fsdp2"):
        torchrun(tmp_path, kind, parallel, parallel)
        close(tmp_path / "one", tmp_path / parallel)
    assert (tmp_path / "fsdp2/policy/config.json").is_file()
    saved, plain = (load_safetensors(tmp_path / run / "policy/model.safetensors") for run in ("fsdp2", "one"))
    assert {n: t.shape for n, t in saved.items()} == {n: t.shape for n, t in plain.items()}
    torchrun(tmp_path, kind, "resized", "fsdp2", steps=1)
    train(str(tmp_path), kind, "resized")  # one step of two processes, one of one
    close(tmp_path / "one", tmp_path / "resized")
