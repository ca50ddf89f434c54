"""Continuous policies: the Laplace distribution, L1 heads of upstream, and GRPO with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import Laplace
from torch.nn import functional as F

from rawdream_env.envs.dream import DreamVectorEnv
from rawdream_env.errors import CheckpointError, InvalidOptionError
from rawdream_env.judges.scripted import ScriptedJudge
from rawdream_env.policies import load_policy
from rawdream_env.policies.laplace import LaplacePolicy, laplace_logprobs, sample_laplace
from rawdream_env.policies.openvla_oft.policy import OpenVLAOFT
from rawdream_env.policies.tiny_vla import TinyVLA, TinyVLAConfig
from rawdream_env.seeding import NoiseKey
from rawdream_env.starts.memory import NullStarts
from rawdream_env.testing.openvla_oft import write_tiny_openvla
from rawdream_env.trainers.common.run_dir import read_jsonl
from rawdream_env.trainers.grpo import GRPOConfig, train_grpo
from rawdream_env.types import Policy
from rawdream_env.world_models.null import NullState, NullWorldModel

SIDE = 16
WORDS = ["lift the cup", "stack the blue block onto the red block and then go back, slowly", ""]


def tiny_vla() -> TinyVLA:
    return TinyVLA(TinyVLAConfig(image_size=SIDE, stem_channels=8, trunk_channels=8, trunk_blocks=1, width=32, heads=2))


def upstream_head(width: int = 64, seed: int = 0) -> dict[str, torch.Tensor]:
    """An L1 head as upstream's training writes it."""
    rng = torch.Generator().manual_seed(seed)
    sizes = {"fc1": (width, 7 * width), "fc2": (7, width)}
    sizes |= {f"mlp_resnet_blocks.{i}.ffn.1": (width, width) for i in range(2)}
    norms = {"layer_norm1": 7 * width, "layer_norm2": width} | {f"mlp_resnet_blocks.{i}.ffn.0": width for i in range(2)}
    draw = lambda *shape: torch.randn(*shape, generator=rng)  # noqa: E731
    tensors = {f"{name}.weight": draw(*shape) * shape[1] ** -0.5 for name, shape in sizes.items()}
    tensors |= {f"{name}.bias": 0.1 * draw(shape[0]) for name, shape in sizes.items()}
    for name, size in norms.items():
        tensors |= {f"{name}.weight": 1 + 0.1 * draw(size), f"{name}.bias": 0.1 * draw(size)}
    return {f"module.model.{name}": tensor for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_tiny_openvla(tmp_path_factory.mktemp("l1"))
    torch.save(upstream_head(), path / "action_head--150000_checkpoint.pt")
    return path


def images(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, SIDE, SIDE, 3), dtype=np.uint8)


def keys(n: int) -> list[NoiseKey]:
    return [NoiseKey(seed=100 + i) for i in range(n)]


@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_log_probabilities_are_torch_s(temperature: float) -> None:
    rng = torch.Generator().manual_seed(0)
    location, values = (torch.randn(3, 56, generator=rng, dtype=torch.float64) for _ in range(2))
    scale = torch.rand(3, 56, generator=rng, dtype=torch.float64) + 0.01
    reference = Laplace(location, scale * temperature).log_prob(values)
    torch.testing.assert_close(laplace_logprobs(location, scale, values, temperature), reference, rtol=0, atol=1e-12)


def test_samples_have_the_distribution() -> None:
    location, scale = torch.full((1, 20000), 0.3), torch.full((1, 20000), 0.1)
    values = sample_laplace(location, scale, 1.6, keys(1))
    places = Laplace(0.3, 0.16).cdf(values).sort().values[0]
    assert (places - torch.linspace(0, 1, 20000)).abs().max() < 0.015  # Kolmogorov-Smirnov
    assert torch.equal(sample_laplace(location, scale, 0.0, keys(1)), location)
    assert torch.equal(sample_laplace(location, scale, 1.6, keys(1)), values)


@pytest.mark.parametrize("kind", ["tiny", "openvla"])
def test_policy_contract(kind: str, folder: Path) -> None:
    policy = LaplacePolicy(tiny_vla()).eval() if kind == "tiny" else load_policy(folder)
    assert isinstance(policy, LaplacePolicy) and isinstance(policy, Policy)
    whole = policy.act(images(3), WORDS, temperature=1.6, keys=keys(3))
    assert whole.actions.shape == (3, 8, 7) and whole.actions.abs().max() <= 1
    assert whole.tokens.dtype == whole.logprobs.dtype == torch.float32 and whole.tokens.shape == (3, 56)
    part = policy.act(images(3)[[2]], WORDS[2:], temperature=1.6, keys=keys(3)[2:])
    assert torch.equal(part.tokens, whole.tokens[2:]) and torch.equal(part.logprobs, whole.logprobs[2:])
    logprobs, entropy = policy.logprobs_and_entropy(images(3), WORDS, whole.tokens, temperature=1.6)
    assert (logprobs - whole.logprobs).exp().sub(1).abs().mean() < 1e-4  # rounding of the location, divided by b
    location, scale = policy.distribution(images(3), WORDS)
    torch.testing.assert_close(entropy, Laplace(location, 1.6 * scale).entropy())
    torch.testing.assert_close(scale, torch.full_like(scale, 0.05))
    logprobs.sum().backward()
    assert not [name for name, p in policy.named_parameters() if p.requires_grad and p.grad is None]
    assert policy.scale[-1].weight.grad.abs().sum() > 0
    assert policy.act(images(0), [], temperature=1.0, keys=[]).actions.shape == (0, 8, 7)
    with pytest.raises(InvalidOptionError, match=r"tokens are torch.int64 \(3, 56\), expected floating"):
        policy.logprobs(images(3), WORDS, whole.tokens.long(), temperature=1.0)


def test_an_upstream_head_gives_upstream_s_actions(folder: Path, tmp_path: Path) -> None:
    policy, head = load_policy(folder), upstream_head()
    policy.backbone.act_batch = 2
    x = policy.backbone.action_features(torch.from_numpy(images(2)), ["lift the cup"] * 2)
    assert x.shape == (2, 8, 7 * 64)

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, head[f"module.model.{name}.weight"], head[f"module.model.{name}.bias"])

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], head[f"module.model.{name}.weight"], head[f"module.model.{name}.bias"])

    x = linear("fc1", norm("layer_norm1", x)).relu()
    for i in range(2):
        x = x + linear(f"mlp_resnet_blocks.{i}.ffn.1", norm(f"mlp_resnet_blocks.{i}.ffn.0", x)).relu()
    expected = linear("fc2", norm("layer_norm2", x))
    greedy = policy.act(images(2), ["lift the cup"] * 2, temperature=0.0, keys=keys(2))
    torch.testing.assert_close(greedy.tokens.reshape(2, 8, 7), expected, rtol=0, atol=1e-5)
    policy.scale[-1].bias.data += 0.5
    policy.save_pretrained(tmp_path)
    again = load_policy(tmp_path)
    for a, b in zip(
        again.distribution(images(2), ["lift the cup"] * 2),
        policy.distribution(images(2), ["lift the cup"] * 2),
        strict=True,
    ):
        assert torch.equal(a, b)
    with pytest.raises(CheckpointError, match="continuous action head"):
        OpenVLAOFT.from_pretrained(tmp_path)  # its language model has no action tokens
    (folder / "action_head--5.pt").touch()
    with pytest.raises(CheckpointError, match="has 2 action heads"):
        load_policy(folder)
    (folder / "action_head--5.pt").unlink()


class ShowMotion(NullWorldModel):
    """Frames as bright as the chunk's mean motion along x is far."""

    def imagine(self, state: NullState, actions: torch.Tensor) -> tuple[NullState, torch.Tensor]:
        state, frames = super().imagine(state, actions)
        shade = ((actions[:, :, 0].mean(1) + 1) * 127).round().to(torch.uint8)
        return state, torch.zeros_like(frames) + shade[:, None, None, None, None]


def motion_env() -> DreamVectorEnv:
    judge = ScriptedJudge(lambda video, instruction: bool(video.frames[-1].mean() > 127 * 1.15))
    model, starts = ShowMotion((SIDE, SIDE, 3), 8), NullStarts((SIDE, SIDE, 3))
    return DreamVectorEnv(
        16, world_model=model, judge=judge, starts=starts, max_episode_steps=1, autoreset_mode="Disabled"
    )


@pytest.mark.parametrize("kind", ["tiny", "openvla"])
def test_grpo_trains_heads_and_backbone_together(kind: str, folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 12, "lr": 2e-4} if kind == "tiny" else {"steps": 1, "lr": 1e-4, "lora_rank": 4}
    options |= {
        "max_kl": None,
        "ema": 0.0,
        "warmup_steps": 0,
        "temperature": 1.0 if kind == "tiny" else 8.0,
        "dual_noise_verification": False,
        "progress": False,
    }
    if kind == "tiny":
        LaplacePolicy(tiny_vla(), initial_scale=0.4).save_pretrained(tmp_path / "start")
    else:
        pytest.importorskip("peft")
    start = folder if kind == "openvla" else tmp_path / "start"
    before = {name: p.detach().clone() for name, p in load_policy(start).named_parameters()}
    config = GRPOConfig(
        tmp_path / "run", policy=str(start), group_size=8, groups_per_step=4, minibatches=1, baseline="leave_one_out",
        tensorboard=False, **options,
    )  # fmt: skip
    train_grpo(config, env=motion_env())
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert all(abs(line["first_ratio_deviation"]) < 1e-4 for line in lines)
    trained = dict(load_policy(tmp_path / "run" / "policy").named_parameters())
    moved = {name for name, p in trained.items() if not torch.equal(p, before[name])}
    assert {"model.fc2.weight", "scale.3.weight"} < moved and any(name.startswith("backbone.") for name in moved)
    if kind == "tiny":
        assert lines[-1]["success_rate"] > lines[0]["success_rate"] + 0.2, [line["success_rate"] for line in lines]
