"""The models of the GPU benchmark: the world model with random weights created on the device, and the baselines.

Speed does not depend on the weights, so nothing is downloaded. ``FULL`` is the paper's model, ``TINY`` the same code at a
size that takes a second on a CPU.

Shape letters: B rows, F frames, C channels, H W height and width.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from rawdream_env.world_models.wan.config import PROMPT_ROWS, WanConfig, wan_config


@dataclass(frozen=True)
class Size:
    """Sizes of the models and of the batches."""

    name: str
    arch: WanConfig
    base_dim: int
    """Width of the VAE; 96 is Wan's."""
    image_size: int
    batches: tuple[int, ...]
    """Rows of the exact step, the most important first; comparisons use the first."""
    matmul: int
    """Side of the matrices whose product measures the peak rate."""
    tiny_widths: tuple[int, int, int, int]
    """Channels of the tiny decoder."""
    backend: str
    """Mode of torch.compile."""

    @property
    def batch(self) -> int:
        """Number of rows of every comparison."""
        return self.batches[0]


FULL = Size(
    "full",
    replace(wan_config("wan2.1-1.3b"), text_rows=2),
    96,
    256,
    (8, 64, 1, 32),
    8192,
    (256, 128, 64, 64),
    "inductor",
)
TINY = Size(
    "tiny",
    replace(
        FULL.arch, latent_shape=(16, 4, 4), num_layers=2, num_attention_heads=2, attention_head_dim=24, ffn_dim=64,
        text_dim=16, freq_dim=32,
    ),
    4, 32, (2, 1), 128, (8, 8, 8, 8), "eager",
)  # fmt: skip


def random_transformer(size: Size, device: str, dtype: Any) -> Any:
    """The world model's transformer; its action path, zero in a new one, is random too."""
    import torch

    from rawdream_env.world_models.wan.transformer import WanWorldModelTransformer

    with torch.device(device):
        transformer = WanWorldModelTransformer(size.arch)
    with torch.no_grad():
        for parameter in transformer.condition_embedder.action_proj.parameters():
            parameter.normal_(std=0.02)
        transformer.prompt_rows.normal_()
        transformer.prompt_counts.copy_(torch.tensor([1.0, PROMPT_ROWS - 1.0]))
    return transformer.to(device, dtype).eval().requires_grad_(False)


def random_codec(size: Size, device: str, dtype: Any) -> Any:
    """Wan 2.1's VAE."""
    import torch
    from diffusers import AutoencoderKLWan

    from rawdream_env.world_models.wan.vae import WanVAE

    with torch.device(device):
        vae = AutoencoderKLWan(base_dim=size.base_dim)
    return WanVAE(vae, size.image_size).to(device, dtype)


def compiled(transformer: Any, size: Size, mode: str | None = None) -> Any:
    """A copy whose blocks are compiled; the copy shares nothing, so that the original stays eager."""
    import torch

    from rawdream_env.world_models.wan import attention

    torch._dynamo.config.recompile_limit = 64
    if hasattr(attention, "_compiled_flex"):  # within a compiled block FlexAttention is compiled with it
        attention._compiled_flex = _flex
    twin = copy.deepcopy(transformer)
    for block in twin.blocks:
        block.compile(dynamic=False, backend=size.backend, mode=mode)
    return twin


def _flex() -> Any:
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if torch.compiler.is_compiling() else _flex_alone()


@functools.lru_cache(maxsize=1)
def _flex_alone() -> Any:
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def world_model(transformer: Any, codec: Any, context_cache: str = "step", evaluations: int = 5) -> Any:
    """The parts as a world model."""
    from rawdream_env.world_models.wan.rollout import RolloutConfig, WanWorldModel

    config = RolloutConfig(num_inference_steps=evaluations, arm_map=None)
    model = WanWorldModel(transformer, codec, config, context_cache=context_cache)  # type: ignore[arg-type]
    weight = transformer.proj_out.weight
    return model.to(weight.device, weight.dtype)


def full_context(model: Any, rows: int, starts: int = 8) -> tuple[Any, Any]:
    """A state whose context is full, and actions. At most ``starts`` different starts: groups of equal ones, as in GRPO.

    Give it an eager model: the contexts on the way have other shapes, each of which would be compiled.
    """
    import torch

    from rawdream_env.seeding import NoiseKey

    generator = torch.Generator().manual_seed(0)
    few = min(rows, starts)
    frames = torch.randint(0, 256, (few, *model.frame_shape), generator=generator, dtype=torch.uint8)
    actions = torch.rand(rows, model.chunk_len, 7, generator=generator) * 2 - 1
    state = model.start(frames, [NoiseKey(i) for i in range(few)])
    for _ in range(4):
        state, _ = model.imagine(state, actions[:few])
    if rows > few:
        state = replace(state[[i % few for i in range(rows)]], keys=tuple(NoiseKey(i) for i in range(rows)))
    return state, actions


@contextmanager
def without_decoder(model: Any) -> Iterator[None]:
    """Replace the decoder by a stand-in, so that ``imagine`` runs only the denoiser."""
    import torch

    frames = torch.zeros(256, model.chunk_len, *model.frame_shape, dtype=torch.uint8, device=model.device)
    model.autoencoder.decode_next = lambda state, latents: (state, frames[: len(latents)])
    try:
        yield
    finally:
        del model.autoencoder.decode_next  # the class's own shows again


class DiffusersBaseline:
    """diffusers' ``WanTransformer3DModel`` over all frames at each of 5 evaluations, prompt of 512 rows, as published."""

    def __init__(self, size: Size, device: str, dtype: Any, codec: Any) -> None:
        import torch
        from diffusers import WanTransformer3DModel

        a = size.arch
        with torch.device(device):
            self.transformer = WanTransformer3DModel(
                num_attention_heads=a.num_attention_heads,
                attention_head_dim=a.attention_head_dim,
                num_layers=a.num_layers,
                ffn_dim=a.ffn_dim,
                text_dim=a.text_dim,
                freq_dim=a.freq_dim,
                in_channels=a.latent_shape[0],
                out_channels=a.latent_shape[0],
            )
            self.prompt = torch.randn(1, PROMPT_ROWS, a.text_dim).to(dtype)
        self.transformer = self.transformer.to(dtype).eval().requires_grad_(False)
        self.size, self.device, self.dtype, self.codec = size, device, dtype, codec

    def sample(self, context: Any, new: int = 2) -> Any:
        """(B, F, C, H, W) latents -> the same with ``new`` more frames."""
        import torch

        from rawdream_env.world_models.sampler import sample_flow

        b = len(context)

        def denoise(x: Any, sigma: float) -> Any:
            window = torch.cat([context, x], 1).transpose(1, 2).to(self.dtype)
            level = torch.full((b,), 1000 * sigma, device=self.device)
            prompt = self.prompt.expand(b, -1, -1)
            velocity = self.transformer(window, level, prompt, return_dict=False)[0]
            return x - sigma * velocity.transpose(1, 2)[:, -new:].float()

        noise = torch.randn(b, new, *context.shape[2:], device=self.device)
        with torch.no_grad():
            return torch.cat([context, sample_flow(denoise, noise, 5)], 1)

    def decode(self, latents: Any, frames: int) -> Any:
        """Latents (B, F, C, H, W), all decoded -> the last ``frames`` uint8 (B, frames, H, W, 3)."""
        import torch

        with torch.no_grad():
            mean, std = self.codec._mean_and_std(latents.device)
            scaled = (latents * std + mean).transpose(1, 2).to(self.dtype)
            video = self.codec.vae.decode(scaled, return_dict=False)[0]
        pixels = (video[:, :, -frames:].float().clamp(-1, 1) + 1) * 127.5
        return pixels.round().to(torch.uint8).permute(0, 2, 3, 4, 1)

    def one_by_one(self, context: Any) -> list[Any]:
        """One environment at a time: 7 context frames (B, 7, C, H, W) -> each one's 8 new frames."""
        return [self.decode(self.sample(row), 8) for row in context.split(1)]

    def host_path(self, frames: Any) -> Any:
        """A re-implementation of what RLinf's Wan environment does for a chunk: the last 5 frames (B, 5, H, W, 3) of every
        environment, finished or not, as PIL pictures on the host -> encoded again -> 2 latents imagined -> all 13 frames
        decoded -> PIL pictures again. Its context of 2 latents is shorter than ours of 7.
        """
        import numpy as np
        import torch
        from PIL import Image

        def through_pil(video: Any) -> Any:
            pictures = [[Image.fromarray(frame) for frame in row] for row in video.cpu().numpy()]
            return torch.from_numpy(np.stack([np.stack([np.asarray(p) for p in row]) for row in pictures]))

        context = self.codec.encode_video(through_pil(frames).to(self.device))
        return through_pil(self.decode(self.sample(context), 13))[:, -8:]
