"""Exactness on a CUDA device; skipped without one. RAWDREAM_TEST_DEVICE=cpu runs the same code on a CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rawdream_env.envs.dream import DreamVectorEnv
from rawdream_env.seeding import NoiseKey
from rawdream_env.starts.memory import NullStarts
from rawdream_env.world_models.autoencoders import AutoencoderConfig, PackedFrameAutoencoder
from rawdream_env.world_models.memory import require_memory, rollout_memory
from rawdream_env.world_models.wan.attention import attend, frame_mask
from rawdream_env.world_models.wan.config import WanConfig
from rawdream_env.world_models.wan.dream_state import DreamState
from rawdream_env.world_models.wan.rollout import RolloutConfig, WanWorldModel
from rawdream_env.world_models.wan.transformer import WanWorldModelTransformer
from rawdream_env.world_models.wan.vae import WanVAE

pytestmark = pytest.mark.gpu
ARCH = WanConfig(
    latent_shape=(16, 32, 32), num_layers=2, num_attention_heads=2, attention_head_dim=32, ffn_dim=128, text_dim=16,
    text_rows=2, pose_dim=0, stem_channels=0, residual=False,
)  # fmt: skip
"""256 tokens a frame, as the full size: masks are FlexAttention's on a GPU."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@pytest.fixture
def device() -> Iterator[str]:
    name = os.environ.get("RAWDREAM_TEST_DEVICE", "cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("PyTorch sees no CUDA device; RAWDREAM_TEST_DEVICE=cpu tries these tests on a CPU")
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # else convolutions in fp32 are right to three digits only
    yield name
    torch.backends.cudnn.allow_tf32 = before


def transformer(device: str, dtype: torch.dtype = torch.float32) -> WanWorldModelTransformer:
    torch.manual_seed(0)
    model = WanWorldModelTransformer(ARCH)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model.to(device, dtype)


def world_model(device: str, dtype: torch.dtype, reuse: str = "step") -> WanWorldModel:
    torch.manual_seed(0)
    codec = PackedFrameAutoencoder(AutoencoderConfig(image_size=256, widths=(16, 16)))
    config = RolloutConfig(num_inference_steps=2, arm_map=None, anchor_noise_start=1)
    return WanWorldModel(transformer("cpu"), codec, config, context_cache=reuse).to(device, dtype)  # type: ignore[arg-type]


def dream(model: WanWorldModel, rows: list[int], chunks: int = 4) -> DreamState:
    frames = torch.stack([torch.randint(0, 256, (256, 256, 3), generator=seeded(r), dtype=torch.uint8) for r in rows])
    state = model.start(frames, [NoiseKey(r) for r in rows])
    for chunk in range(chunks):
        actions = torch.stack([torch.rand(8, 7, generator=seeded(100 * r + chunk)) * 2 - 1 for r in rows])
        state, pictures = model.imagine(state, actions)
    assert pictures.device.type == model.device.type
    return state


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(3, 3), (2, 5)], ids=["all frames", "new frames"])
def test_block_masks_equal_dense_ones(device: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    new, seen = shape
    visible = torch.ones(seen, seen, dtype=torch.bool).tril()[-new:]
    q, k, v = (torch.randn(2, 2, n * 128, 32, generator=seeded(n)).to(device, dtype) for n in (new, seen, seen))
    block, dense = (frame_mask(visible, 128, torch.device(device), flex=flex) for flex in (True, False))
    assert distance(attend(q, k, v, block), attend(q, k, v, dense)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_reuse_equals_recomputation(device: str, dtype: torch.dtype) -> None:
    step, none = (dream(world_model(device, dtype, reuse), [0, 1]) for reuse in ("step", "none"))
    assert torch.isfinite(step.recent).all()
    assert distance(step.recent, none.recent) < TOLERANCE[dtype]


def test_rows_hardly_depend_on_their_neighbours(device: str) -> None:
    model = world_model(device, torch.float32)
    assert distance(dream(model, [1]).recent, dream(model, [0, 1, 2]).recent[1:2]) < TOLERANCE[torch.float32]


def test_device_equals_cpu(device: str) -> None:
    here, there = (dream(world_model(name, torch.float32), [0], 2) for name in (device, "cpu"))
    assert distance(here.recent.cpu(), there.recent) < 1e-3


@torch.no_grad()
def test_streamed_decoding_equals_the_window(device: str) -> None:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    codec = WanVAE(AutoencoderKLWan(base_dim=8), 64).to(device)
    latents = torch.randn(2, 5, *codec.latent_shape, generator=seeded(0)).to(device)
    state, first = codec.decode_pixels(codec.start_decoding(latents[:, 0]), latents[:, 1:3])
    _, second = codec.decode_pixels(state, latents[:, 3:])
    mean, std = codec._mean_and_std(latents.device)
    whole = codec.vae.decode((latents * std + mean).transpose(1, 2)).sample
    assert float((torch.cat([first, second], 2) - whole[:, :, 1:]).abs().max()) < 1e-3


def test_training_step(device: str) -> None:
    """A window in bfloat16 autocast: checkpointing changes no gradient, and a few steps lower the loss."""
    model = transformer(device).train()
    clean, noise = (torch.randn(1, 4, *ARCH.latent_shape, generator=seeded(i)).to(device) for i in (0, 1))
    level = torch.tensor([[0.0, 0.05, 0.6, 0.6]], device=device)
    noisy = (1 - level[..., None, None, None]) * clean + level[..., None, None, None] * noise
    actions = torch.zeros(1, 4, ARCH.condition_dim, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def loss() -> Tensor:
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            velocity = model(noisy, level, actions)
        return (velocity - (noise - clean))[:, 2:].float().pow(2).mean()

    gradients = []
    for checkpointing in (False, True):
        model.enable_gradient_checkpointing() if checkpointing else model.disable_gradient_checkpointing()
        model.zero_grad()
        loss().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert distance(gradients[1], gradients[0]) < 1e-2
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(float(value))
    assert losses[-1] < 0.9 * losses[0], losses


def test_memory_stays_within_the_estimate(device: str) -> None:
    model = world_model(device, torch.bfloat16)
    parts = rollout_memory(ARCH, model.autoencoder, 4, 4, torch.bfloat16)
    require_memory(parts, device, "four rows", "free some memory")
    if not device.startswith("cuda"):
        pytest.skip("PyTorch counts its memory on CUDA devices only")
    dream(model, [0, 1, 2, 3])  # compiles
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    dream(model, [0, 1, 2, 3])
    used = torch.cuda.max_memory_allocated(device) - before
    assert used <= 1.1 * sum(parts.values())


def test_offloaded_weights_leave_the_device_and_come_back_unchanged(device: str) -> None:
    model = world_model(device, torch.float32)
    env = DreamVectorEnv(
        2, world_model=model, judge="none", starts=NullStarts((256, 256, 3)), max_episode_steps=2,
        autoreset_mode="Disabled", device=device,
    )  # fmt: skip

    def allocated() -> int:
        return torch.cuda.memory_allocated(device) if device.startswith("cuda") else 0

    def last_frames() -> Any:
        env.reset(seed=0)
        return [env.step(np.full((2, 8, 7), 0.1, np.float32))[0]["image"] for _ in range(2)]

    first, home, full = last_frames(), model.device, allocated()
    assert all(np.array_equal(a, b) for a, b in zip(last_frames(), first, strict=True))
    assert allocated() == full  # the state is freed
    with env.offload():
        assert model.device.type == "cpu"
        if device.startswith("cuda"):
            assert full - allocated() >= sum(p.nbytes for p in model.transformer.parameters())
    assert model.device == home and abs(allocated() - full) < 2**20
    assert all(np.array_equal(a, b) for a, b in zip(last_frames(), first, strict=True))
