"""The planner of GRPO, against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rawdream_env import cli
from rawdream_env.errors import InvalidOptionError, NotEnoughMemoryError
from rawdream_env.testing.openvla_oft import TINY, write_tiny_openvla
from rawdream_env.trainers.grpo.plan import CARDS, PlanConfig, memory, plan, seconds
from rawdream_env.trainers.grpo.plan_costs import PolicyCost, policy_cost
from rawdream_env.world_models.memory import GIB

LLAMA_LAYER = 4 * 4096**2 + 3 * 4096 * 11008
FITS = PlanConfig(gradient_checkpointing=True, microbatch_size=16, num_envs=16)
COST = PolicyCost(
    weights=1000, trained=100, weight_bytes=2000, trained_bytes=400, act=3e12, forward=2e12, train=4e12, saved=50,
    inputs=5, block=30,
)  # fmt: skip


def test_openvla_7b_with_adapters_is_counted_from_its_sizes() -> None:
    pytest.importorskip("peft")
    cost = policy_cost("openvla-oft-7b", 32, torch.bfloat16)
    ends = 2176 + 8704, 8704 + 4096, 4096 + 4096  # of the projector
    assert cost.trained == 32 * (32 * (4 * 8192 + 3 * (4096 + 11008)) + sum(ends))
    assert cost.trained_bytes == 4 * cost.trained
    assert cost.weight_bytes == 2 * cost.weights + 2 * cost.trained  # adapters are float32
    assert cost.block == 2 * (LLAMA_LAYER + 2 * 4096) + 4 * 32 * (4 * 8192 + 3 * 15104)
    tokens = 256 + 32 + 56 + 1
    language = 2 * tokens * 32 * LLAMA_LAYER + 4 * tokens**2 * 4096 * 32
    projector = 2 * 256 * (2176 * 8704 + 8704 * 4096 + 4096**2)
    adapters = 2 * (tokens * 32 * 32 * (4 * 8192 + 3 * 15104) + 256 * 32 * sum(ends))
    assert cost.forward == pytest.approx(language + projector + adapters, rel=1e-3)
    assert cost.train == pytest.approx(2 * cost.forward, rel=0.05)  # no gradients of frozen weights
    towers = 2 * 261 * 23 * 12 * 1024**2 + 2 * 256 * 26 * (4 * 1152**2 + 2 * 1152 * 4304)
    assert cost.act - cost.forward == pytest.approx(towers, rel=0.05)
    assert cost.saved > 10 * cost.inputs > 10 * 32 * tokens * 4096 * 2


def test_a_folder_is_counted_from_its_config(tmp_path: object) -> None:
    folder = write_tiny_openvla(f"{tmp_path}/tiny")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    cost = policy_cost(str(folder), 0, torch.float32)
    layer = 4 * 64**2 + 3 * 64 * 128 + 2 * 64
    assert cost.trained == cost.weights > 2 * 32064 * 64 + TINY.num_hidden_layers * layer
    assert cost.block == 4 * layer
    with pytest.raises(InvalidOptionError, match="there is no policy 'nowhere' to plan for"):
        policy_cost("nowhere", 0, torch.float32)
    with pytest.raises(InvalidOptionError, match="lora_rank=4 does not fit TinyVLA"):
        policy_cost("tiny-vla", 4, torch.float32)


def test_memory_by_hand() -> None:
    config = PlanConfig(world_model="none", microbatch_size=10)
    rollout, update = memory(config, COST, None)
    assert sum(rollout.values()) == 2000 + 2 * 400 + 400
    assert sum(update.values()) == 2000 + 2 * 400 + 400 + 400 + 3 * 400 + 10 * 50
    plain = replace(config, ema=0.0, max_kl=None, gradient_checkpointing=True)
    assert sum(memory(plain, COST, None)[1].values()) == 2000 + 2 * 400 + 400 + 10 * 5
    rollout, update = memory(replace(plain, gpus=4, parallel="fsdp2"), COST, None)
    assert (rollout["policy"], update["policy"]) == (2000 + 100, 500 + 60)
    assert update["gradients"] == 100 and update["optimizer"] == 200


def test_seconds_by_hand() -> None:
    """8 groups of 8 episodes of 25 chunks, half of the groups kept, on 2 H100 at 50 %: 800 kept chunks each."""
    config = PlanConfig(
        gpus=2, parallel="ddp", chunks=25, kept_groups=0.5, policy_utilisation=0.5, world_model="none", max_kl=None
    )
    rate = 0.5 * 989e12
    found = seconds(config, COST, None)
    assert found["rollouts, policy"] == pytest.approx(1600 * 3e12 / rate)
    assert found["update"] == pytest.approx(800 * 4e12 / rate)
    assert found["exchange of gradients"] == pytest.approx(2 * 2 * 400 / 450e9)
    guarded = seconds(replace(config, max_kl=0.1, gradient_checkpointing=True, epochs=2), COST, None)
    assert guarded["update"] == pytest.approx(2 * 800 * 8e12 / rate)
    heavy = replace(COST, weight_bytes=int(3.35e12))  # one second to read
    assert seconds(config, heavy, None)["rollouts, policy"] == pytest.approx(200)


def test_it_prints_its_assumptions(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.main(
            ["plan", "--policy", "tiny-vla", "--world-model", "embedded", "--lora-rank", "0", "--dtype", "float32"]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert "memory per GPU, estimated" in text and "time per step, estimated" in text and "Judge: apart" in text
    assert "67 TFLOP/s float32" in text and "3.35 TB/s" in text and "40 % and 40 % of the peak" in text


def test_what_cannot_fit_is_refused_with_the_smallest_change(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("diffusers")
    made, offloaded = plan(FITS), plan(replace(FITS, offload_world_model=True))
    assert made.fits and 30 * GIB < made.peak < 79 * GIB
    assert made.rollout == offloaded.rollout and made.rollout["imagined rollouts"] > 10 * GIB
    assert "imagined rollouts" not in made.update  # of episodes that are over
    moved = made.update.pop("world model")
    assert made.update == offloaded.update and moved == made.rollout["world model"]
    assert sum(offloaded.seconds.values()) == pytest.approx(sum(made.seconds.values()) + 2 * moved / 6e9)
    with pytest.raises(
        NotEnoughMemoryError, match=r"rollouts would need .* the h100 has 79\.1\. Smallest .*: --num-envs 32 "
    ):
        plan(replace(FITS, num_envs=64))
    with pytest.raises(NotEnoughMemoryError, match=r"the update would need .*: --microbatch-size 8 \(est"):
        plan(replace(FITS, gradient_checkpointing=False, microbatch_size=24))
    assert cli.main(["plan", "--gpu", "rtx-4090"]) == 2
    assert "Smallest change that fits: --" in capsys.readouterr().err
    for wrong, match in (
        ({"gpus": 2}, "gpus=2 does not fit parallel='none'"),
        ({"gpu": "h1000"}, "gpu"),
        ({"kept_groups": 0.0}, "kept_groups=0.0 must be above 0"),
    ):
        with pytest.raises(InvalidOptionError, match=match):
            PlanConfig(**wrong)  # type: ignore[arg-type]
    assert set(CARDS) >= {"h100", "h200", "a100-80"}
