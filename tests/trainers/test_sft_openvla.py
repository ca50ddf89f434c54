"""Supervised fine-tuning of a tiny OpenVLA-OFT: statistics, choice of demonstrations, accumulation, resuming, learning."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rawdream_env.data import schema
from rawdream_env.data.collect import CollectConfig, collect
from rawdream_env.data.lerobot import LeRobotWriter
from rawdream_env.errors import DatasetError
from rawdream_env.policies import load_policy
from rawdream_env.policies.openvla_oft.policy import OpenVLAOFT
from rawdream_env.testing.openvla_oft import write_tiny_openvla
from rawdream_env.trainers.common.run_dir import read_jsonl
from rawdream_env.trainers.policy import demonstrations, sft
from rawdream_env.trainers.policy.batches import Batch
from rawdream_env.trainers.policy.config import SFTConfig
from tests.killing import kill_at_random_moments

pytest.importorskip("peft")
TASKS = ("lift the cup", "push the pot away")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_openvla(tmp_path_factory.mktemp("tiny"), name="elsewhere")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "arm")


def write_data(root: Path, shape: tuple[int, int, int] = (48, 64, 3)) -> Path:
    """Four episodes of each of two tasks, of no known robot: dx tells the episode, dy the task, the rest is constant."""
    features = {"action": schema.numeric_feature(7), "observation.state": schema.numeric_feature(7)}
    writer = LeRobotWriter(root, fps=10, image_shape=shape, features=features)
    rng = np.random.default_rng(0)
    for i in range(8):
        actions = np.zeros((6, 7), np.float32)
        actions[:, 0], actions[:, 1], actions[:, 6] = 0.1 * (i // 2 + 1), 0.5 if i % 2 else -0.5, 1 - 2 * (i % 2)
        frames = rng.integers(0, 256, (1, *shape), dtype=np.uint8).repeat(7, axis=0)
        writer.add_episode(frames, actions, np.zeros((7, 7), np.float32), TASKS[i % 2])
    writer.finalize()
    return root


def config(run_dir: Path, init: Path, *data: Path, **changes: Any) -> SFTConfig:
    base = SFTConfig(
        data=tuple(map(str, data)),
        run_dir=str(run_dir),
        init=str(init),
        demos_per_task=2,
        demos_seed=5,
        val_demos_per_task=1,
        steps=4,
        batch_size=2,
        warmup=1,
        lora_rank=4,
        bf16=False,
        log_every=1,
        save_every=2,
    )
    return replace(base, **changes)


def test_the_choice_is_seeded_and_leaves_others_for_validation(data: Path) -> None:
    def chosen(**options: Any) -> set[tuple[str, int]]:
        (found,) = demonstrations.load_experts([str(data)], 8, **options)
        first = np.unique(found.episode, return_index=True)[1]
        return {(found.goals[found.goal[n]], round(float(found.actions[n, 0, 0]) * 10)) for n in first}

    assert chosen(demos_per_task=2) == {(task, number) for task in TASKS for number in (1, 2)}
    seeds = [chosen(demos_per_task=2, seed=seed) for seed in range(6)]
    assert len(set(map(frozenset, seeds))) > 3 and seeds[2] == chosen(demos_per_task=2, seed=2)
    rest = chosen(demos_per_task=2, skip=2, seed=2)
    assert len(seeds[2]) == len(rest) == 4 and len(seeds[2] | rest) == 8
    with pytest.raises(DatasetError, match="4 demonstrations of 'lift the cup', expected 5"):
        chosen(demos_per_task=3, skip=2)


@pytest.mark.parametrize("lora_rank", [4, 0])
def test_the_folder_loads_and_has_upstream_s_names(tiny: Path, data: Path, tmp_path: Path, lora_rank: int) -> None:
    result = sft.train_sft(config(tmp_path / "run", tiny, data, lora_rank=lora_rank, steps=2), progress=False)
    folder = tmp_path / "run" / "policy"
    before, after = (load_file(path / "model.safetensors") for path in (tiny, folder))
    assert before.keys() == after.keys()
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"vision_backbone", "projector", "language_model"}
    action = json.loads((folder / "dataset_statistics.json").read_text())["arm"]["action"]
    assert action["mask"] == [True] * 6 + [False] and action["q01"][6] == 0.0 and action["q99"][6] == 1.0
    assert action["q01"][1] == -0.5 and action["q99"][1] == 0.5 and action["q99"][2] == 0.0
    assert json.loads((folder / "config.json").read_text())["norm_stats"].keys() == {"arm"}
    frames = np.random.default_rng(0).integers(0, 256, (2, 48, 64, 3), dtype=np.uint8)
    expected = result.policy.logits(frames, list(TASKS))
    again = load_policy(folder)
    assert isinstance(again, OpenVLAOFT) and again.unnorm_key == "arm"
    torch.testing.assert_close(again.logits(frames, list(TASKS)), expected, atol=5e-3, rtol=0)
    checkpoint = next((tmp_path / "run" / "checkpoints").rglob("*.safetensors"))
    assert any("base_layer" in name or name.endswith("lm_head.weight") for name in load_file(checkpoint)) == (
        not lora_rank
    )
    if lora_rank:
        base = load_policy(tiny)
        assert isinstance(base, OpenVLAOFT)
        base.load_adapters(tmp_path / "run" / "adapters")
        torch.testing.assert_close(base.logits(frames, list(TASKS)), expected, atol=5e-3, rtol=0)


def test_statistics_can_be_kept(tiny: Path, data: Path, tmp_path: Path) -> None:
    kept = config(tmp_path / "run", tiny, data, steps=1, keep_statistics=True, unnorm_key="elsewhere", dtype="bfloat16")
    policy = sft.train_sft(kept, progress=False).policy
    assert isinstance(policy, OpenVLAOFT) and policy.statistics.keys() == {"elsewhere"}
    saved = load_file(tmp_path / "run" / "policy" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["tiny_vla", "openvla_oft"])
def test_four_times_two_is_eight(tiny: Path, tmp_path: Path, kind: str) -> None:
    base = config(tmp_path, tiny, tmp_path, image_aug=False, readout_weight=2.0, label_sigma=1.0)
    generator = torch.Generator().manual_seed(0)
    readout = torch.rand(8, 13, generator=generator)
    readout[1:4, 3:] = float("nan")
    batch = Batch(
        torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8, generator=generator),
        [*TASKS, "stop", "place the blue block onto the red one"] * 2,
        torch.rand(8, 8, 7, generator=generator) * 2 - 1,
        readout,
    )
    gradients, losses = [], []
    for size in (0, 2):
        policy: Any = load_policy("embedded" if kind == "tiny_vla" else tiny)
        losses.append(sft.add_gradients(policy, batch, replace(base, microbatch_size=size)))
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        gradients.append({name: p.grad for name, p in policy.named_parameters()})
    for name, loss in losses[0].items():
        assert losses[1][name].item() == pytest.approx(loss.item(), rel=1e-6)
    assert all(name in losses[0] for name in ("loss", "readout_loss")[: 2 if kind == "tiny_vla" else 1])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=0)


def test_resumes_to_identical_weights(tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"ema": 0.5, "train_vision": False, "image_aug": False, "bf16": True}
    sft.train_sft(config(tmp_path / "whole", tiny, data, **options), progress=False)
    compute, calls = sft.compute_losses, []

    def dies(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return compute(*args)

    monkeypatch.setattr(sft, "compute_losses", dies)
    with pytest.raises(KeyboardInterrupt):
        sft.train_sft(config(tmp_path / "cut", tiny, data, **options), progress=False)
    monkeypatch.setattr(sft, "compute_losses", compute)
    options |= {"microbatch_size": 2, "gradient_checkpointing": True}  # these may change, and change nothing
    sft.train_sft(config(tmp_path / "cut", tiny, data, **options), progress=False)
    for file in ("metrics.jsonl", "policy/model.safetensors", "adapters/adapter_model.safetensors"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes(), file


def train_from(run_dir: Path, tiny: str, data: str) -> None:
    options: dict[str, Any] = {"steps": 20, "save_every": 5, "lora_rank": 4, "demos_per_task": 2}
    sft.train_sft(config(run_dir, Path(tiny), Path(data), **options), progress=False)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_bit_identical(tiny: Path, data: Path, tmp_path: Path) -> None:
    unbroken, killed = kill_at_random_moments("test_sft_openvla:train_from", tmp_path, tiny, data)
    for run in killed:
        for file in ("metrics.jsonl", "policy/model.safetensors"):
            assert (run / file).read_bytes() == (unbroken / file).read_bytes(), file


@pytest.mark.slow
def test_it_learns_from_three_demonstrations_of_each_task(tiny: Path, tmp_path: Path) -> None:
    demos = CollectConfig(out=str(tmp_path / "demos"), kind="expert", episodes=16, successes_only=True, progress=False)
    collect(demos)
    options: dict[str, Any] = {"demos_per_task": 3, "steps": 60, "batch_size": 8, "lr": 3e-3, "save_every": 20}
    result = sft.train_sft(config(tmp_path / "run", tiny, tmp_path / "demos", warmup=5, **options), progress=False)
    losses = [line["val_loss"] for line in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "val_loss" in line]
    assert losses[-1] < losses[0] - 0.2 and result.validation["val_loss"] == losses[-1]
    policy = load_policy(tmp_path / "run" / "policy")
    assert isinstance(policy, OpenVLAOFT) and policy.unnorm_key == "demos"
