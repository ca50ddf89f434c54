"""Floating-point operations of the denoiser, from shapes: two per multiply-add of matrix products and attention.

Element-wise operations, norms and tables of constants are not counted. The operations of the decoders are counted by
``counted`` on PyTorch's "meta" device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rawdream_env.world_models.wan.config import WanConfig


def block_flops(arch: WanConfig, tokens: int, keys: float, *, keys_only: bool = False) -> float:
    """One block over ``tokens`` of a row, each of which sees ``keys`` keys."""
    d = arch.width
    if keys_only:
        return float(4 * d * d * tokens)
    prompt = 4 * d * d + 4 * arch.text_rows * d if arch.text_dim and arch.text_rows > 1 else 0
    return float(tokens * (8 * d * d + 4 * keys * d + 4 * d * arch.ffn_dim + prompt))


def _ends(arch: WanConfig, frames: int, *, both: bool = True) -> float:
    """Patch embedding and action condition of ``frames`` and, with ``both``, the output projection."""
    if arch.stem_channels:
        raise ValueError("operations are counted for models without a convolutional stem")
    patch = arch.patch_size**2 * arch.width
    per_token = 2 * patch * (arch.latent_shape[0] * (2 if arch.residual else 1) + arch.map_channels)
    if both:
        per_token += 2 * patch * arch.latent_shape[0]
    return float(frames * arch.tokens_per_frame * per_token)


def _action(arch: WanConfig, frames: int) -> float:
    d = arch.width
    return float(frames * 2 * d * (arch.condition_dim + d + 7 * d))


def denoiser_flops(
    arch: WanConfig, evaluations: int, context_cache: str = "step", *, dense: bool = False, shared: int = 1
) -> float:
    """One autoregressive step of one row whose context is full.

    ``dense`` counts masked pairs of attention too, as a dense mask computes them; ``shared`` rows have one anchor.
    """
    p, r, g, layers = arch.tokens_per_frame, arch.context_latents, arch.chunk_latents, arch.num_layers
    n = 1 + r

    def causal(first: int, frames: int) -> float:  # mean keys of ``frames`` frames that come after ``first`` others
        return float(p * (first + (frames if dense else (frames + 1) / 2)))

    if context_cache == "none":
        one = layers * block_flops(arch, (n + g) * p, causal(0, n + g)) + _ends(arch, n, both=False) + _ends(arch, g)
        return float(evaluations * (one + _action(arch, n)) + _action(arch, g))
    if context_cache == "rolling":
        first, fresh = n - g, g
    else:
        first, fresh = 1, r
    context = (layers - 1) * block_flops(arch, fresh * p, causal(first, fresh))
    context += block_flops(arch, fresh * p, 0, keys_only=True)
    anchor = (layers - 1) * block_flops(arch, p, p) + block_flops(arch, p, 0, keys_only=True)
    ends = _ends(arch, fresh, both=False) + _action(arch, fresh)
    anchor += _ends(arch, 1, both=False) + _action(arch, 1)
    new = layers * block_flops(arch, g * p, causal(n, g)) + _ends(arch, g)
    return float(anchor / shared + context + ends + evaluations * new + _action(arch, g))


def counted(function: Callable[[], object]) -> int:
    """Operations of ``function`` as PyTorch counts them; on "meta" tensors nothing is computed."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())


def decode_flops(codec: Any, latents: int = 2) -> int:
    """Decoding the next ``latents`` of one row; ``codec`` may lie on "meta"."""
    import copy

    import torch

    shadow = copy.deepcopy(codec).to("meta")
    given = torch.empty(1, latents, *codec.latent_shape, device="meta")
    state = shadow.start_decoding(given[:, 0])
    return counted(lambda: shadow.decode_next(state, given))
