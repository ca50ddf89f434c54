"""How much memory a world model needs, from shapes alone.

``rollout_memory`` and ``training_memory`` add up what is allocated; weights, states and caches are exact, activations an
upper estimate of what the code holds at once. Models are laid out on PyTorch's "meta" device, so that asking for the
full size costs neither memory nor time. What follows from the estimates is in ``memory.py``.

At the full size (256 pixels, bfloat16) an environment costs, in MB: 310 for the decoder's stream, as often as
``STATE_COPIES`` says; and while its rows are imagined 330 for the context's keys and values.

What is not counted and why: the text encoder (the prompt is fixed when the weights are converted, it is never loaded),
the policy and the judge (they may live on another device).

Shape letters: D width, P tokens in a frame, R recent latent frames, G new ones.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rawdream_env.world_models.autoencoders import FrameCodec
from rawdream_env.world_models.wan.chunk import ContextCache
from rawdream_env.world_models.wan.config import WanConfig
from rawdream_env.world_models.wan.transformer import WanWorldModelTransformer

GIB = 2**30
FIXED_HEADROOM = GIB
"""Bytes that no tensor owns: the CUDA context and the work space of its libraries."""
HEADROOM = 0.08
"""Share of the sum that the allocator loses to fragmentation."""
STATE_COPIES = {"decoder": 2, "others": 3}
"""How often a state's tensors are alive in ``imagine``: the old ones and the new ones, and, but for the decoder's streams,
those of the rows picked for denoising."""
OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2, "sgd": 0}
"""Bytes of optimiser state per parameter."""
Optimizer = Literal["adamw", "adamw8bit", "sgd"]


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by purpose."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All of it, in bytes."""
        return sum(self.parts.values())

    def without(self, *names: str) -> MemoryEstimate:
        """The same but for some of its parts: those there is memory for already."""
        return MemoryEstimate({name: 0 if name in names else size for name, size in self.parts.items()})

    def __str__(self) -> str:
        listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.parts.items() if size)
        return f"{self.total / GIB:.2f} GiB ({listed})"


def _with_headroom(parts: dict[str, int]) -> MemoryEstimate:
    return MemoryEstimate({**parts, "headroom": FIXED_HEADROOM + int(HEADROOM * sum(parts.values()))})


class _LiveBytes(TorchDispatchMode):
    """Follows the bytes of all storages made under it; ``peak`` is the most that lived at once."""

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: int = 0
        self.peak: int = 0
        # Held on to, so that no new storage can take the place of an old one.
        self._known: dict[int, object] = {s._cdata: s for s in (tensor.untyped_storage() for tensor in existing)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        name, size = storage._cdata, storage.nbytes()
        if name in self._known:
            return

        def gone(_: object) -> None:
            self._known.pop(name, None)
            self.live -= size

        self._known[name] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


def peak_bytes(function: Callable[[], object], existing: Iterable[Tensor] = ()) -> int:
    """The most bytes of new tensors alive at once while ``function`` runs; works on "meta" tensors too.

    ``existing`` tensors that the function uses are not counted; it must list them all, since a view of an unknown
    tensor cannot be told from a new one.
    """
    with torch.no_grad(), _LiveBytes(existing) as mode:
        kept = function()
        del kept
    peak: int = mode.peak
    return peak


@lru_cache(maxsize=16)
def _transformer_numbers(arch: WanConfig, dtype: torch.dtype = torch.float32) -> tuple[int, int]:
    """Numbers in parameters, and bytes of parameters and buffers in ``dtype`` (whole numbers stay as they are)."""
    with torch.device("meta"):
        model = WanWorldModelTransformer(arch)
    parameters = sum(p.numel() for p in model.parameters())
    return parameters, parameters * dtype.itemsize + sum(
        b.numel() * (dtype if b.is_floating_point() else b.dtype).itemsize for b in model.buffers()
    )


@dataclass(frozen=True)
class _CodecBytes:
    weights: int
    stream: int  # of a row, between calls
    working: int  # of a row, while it is decoded, its next stream not counted


def _codec_bytes(codec: FrameCodec, dtype: torch.dtype, chunk_latents: int) -> _CodecBytes:
    """By laying the codec out on "meta" and decoding one row's chunk there.

    Its weights are not copied on the way: whoever asks may have no memory left for that.
    """
    module = cast(nn.Module, codec)
    shadows: dict[int, Any] = {id(x): nn.Parameter(torch.empty_like(x, device="meta")) for x in module.parameters()}
    shadows |= {id(x): torch.empty_like(x, device="meta") for x in module.buffers()}
    shadow = cast(Any, copy.deepcopy(module, shadows).to("meta", dtype))
    weights = sum(x.nbytes for x in (*shadow.parameters(), *shadow.buffers()))
    latents = torch.empty(1, chunk_latents, *codec.latent_shape, device="meta")
    stream = shadow.start_decoding(latents[:, 0])
    own = sum(x.nbytes for x in stream)
    existing = (*shadow.parameters(), *shadow.buffers(), *stream, latents)
    return _CodecBytes(weights, own, peak_bytes(lambda: shadow.decode_next(stream, latents), existing) - own)


def full_size_codec(image_size: int = 256) -> FrameCodec:
    """Wan 2.1's VAE laid out on "meta": its shapes without its weights."""
    from diffusers import AutoencoderKLWan

    from rawdream_env.world_models.wan.vae import WanVAE

    with torch.device("meta"):
        vae = cast(Any, AutoencoderKLWan)()
    return WanVAE(vae, image_size)


@lru_cache(maxsize=4)
def _full_size_codec_bytes(dtype: torch.dtype, chunk_latents: int) -> _CodecBytes:
    return _codec_bytes(full_size_codec(), dtype, chunk_latents)


def state_bytes(arch: WanConfig) -> int:
    """One row of a ``DreamState`` without decoder stream and rolling cache: fp32 latents, conditions and maps."""
    c, h, w = arch.latent_shape
    r = arch.context_latents
    return 4 * ((1 + r) * (c * h * w + arch.condition_dim + arch.map_channels * h * w) + 7)  # 7: the commanded pose


def frame_keys_bytes(arch: WanConfig, dtype: torch.dtype) -> int:
    """Keys and values of one latent frame in all blocks."""
    return 2 * arch.num_layers * arch.width * arch.tokens_per_frame * dtype.itemsize


def rolling_bytes(arch: WanConfig, dtype: torch.dtype) -> int:
    """One row's rolling cache."""
    return arch.context_latents * frame_keys_bytes(arch, dtype)


def _pass_elements(arch: WanConfig, frames: int, context: int) -> int:
    """Numbers alive at once inside a block for one row of new ``frames`` that see ``context`` frames before them."""
    p, d = arch.tokens_per_frame, arch.width
    tokens = frames * p
    attention = 11 * tokens * d + 2 * (context + frames) * p * d  # x, h, q, k, v, rotated and their halves, out, joined
    feed_forward = 4 * tokens * d + 2 * tokens * arch.ffn_dim
    c, h, w = arch.latent_shape
    pictures = c * (2 if arch.residual else 1) + arch.map_channels + (2 * c if arch.carry else 0)
    ends = frames * h * w * (2 * pictures + 4 * arch.stem_channels)
    return max(attention, feed_forward) + ends


def denoise_bytes(arch: WanConfig, dtype: torch.dtype, reuse: ContextCache = "step") -> int:
    """What one row needs while it is denoised: keys and values of its context, and activations."""
    r, g, keys = arch.context_latents, arch.chunk_latents, frame_keys_bytes(arch, dtype)
    c, h, w = arch.latent_shape
    pictures = 4 * (1 + r) * h * w * (4 * c + arch.map_channels)  # fp32 context: clean, noise, noisy, joined; maps

    def working(frames: int, context: int) -> int:
        return _pass_elements(arch, frames, context) * dtype.itemsize + pictures

    if reuse == "none":
        return (1 + r + g) * keys // 2 + working(1 + r + g, 0)  # tokens of the context, of the new frames, and joined
    evaluation = (1 + r) * keys + working(g, 1 + r)
    if reuse == "rolling":  # anchor, older ones rotated, new ones, both lists joined, padded, and all of it rotated
        return max((4 * r + 3) * keys + pictures, r * keys + evaluation)
    join = (1 + r) * keys * (arch.num_layers + 1) // arch.num_layers  # rotated and joined block by block
    return max(join + pictures, (1 + r) * keys + working(r, 1), evaluation)


def rollout_memory(
    arch: WanConfig,
    codec: FrameCodec | None = None,
    num_envs: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    reuse: ContextCache = "step",
    *,
    micro_batch: int | None = None,
) -> MemoryEstimate:
    """What imagining ``num_envs`` episodes needs.

    Args:
        arch: the transformer.
        codec: the frame codec, on any device; None: Wan's VAE at 256 pixels.
        num_envs: episodes whose states are held.
        dtype: of weights and caches.
        reuse: as for ``WanWorldModel``.
        micro_batch: episodes imagined at a time; None: all of them.
    """
    if codec is None:
        parts = _full_size_codec_bytes(dtype, arch.chunk_latents)
    else:
        parts = _codec_bytes(codec, dtype, arch.chunk_latents)
    rows = num_envs if micro_batch is None else min(micro_batch, num_envs)
    denoise = denoise_bytes(arch, dtype, reuse)
    streams, others = num_envs * STATE_COPIES["decoder"], num_envs * STATE_COPIES["others"]
    streams += rows if rows < num_envs else 0  # a micro-batch's new streams, until they are copied to their place
    return _with_headroom(
        {
            "weights": _transformer_numbers(arch, dtype)[1] + parts.weights,
            "states": others * state_bytes(arch),
            "decoder streams": streams * parts.stream,
            "rolling caches": others * rolling_bytes(arch, dtype) if reuse == "rolling" else 0,
            "a micro-batch at work": rows * max(denoise, parts.working),
        }
    )


def training_memory(
    arch: WanConfig,
    micro_batch: int = 1,
    frames: int = 9,
    optimizer: Optimizer = "adamw",
    world_size: int = 1,
    checkpointing: bool = True,
    *,
    offload_optimizer: bool = False,
) -> MemoryEstimate:
    """What one of ``world_size`` devices needs to train the transformer with everything sharded (FSDP2).

    fp32 weights, gradients and averaged weights, bfloat16 compute. Latents come from a cache: the codec is not loaded.

    Args:
        arch: the transformer.
        micro_batch: windows per device and forward pass.
        frames: latent frames that go through the blocks per window (9 for the paper's 33 frames; teacher forcing sends
            clean and noisy ones through).
        optimizer: which states it keeps per parameter.
        world_size: devices that share weights, gradients and states.
        checkpointing: keep only each block's input and compute the rest again in the backward pass.
        offload_optimizer: optimiser state and averaged weights live in the host's memory.
    """
    parameters = _transformer_numbers(arch)[0]
    shard = -(-parameters // world_size)
    tokens = micro_batch * frames * arch.tokens_per_frame
    kept = tokens * saved_per_token(arch)
    block_input = 4 * tokens * arch.width  # fp32: layer norms and residuals are not autocast
    return _with_headroom(
        {
            "weights": 4 * shard,
            "gradients": 4 * shard,
            "optimiser": 0 if offload_optimizer else OPTIMIZER_BYTES[optimizer] * shard,
            "averaged weights": 0 if offload_optimizer else 4 * shard,
            "weights in bfloat16": 2 * (parameters if world_size == 1 else 2 * parameters // arch.num_layers),
            "activations": arch.num_layers * block_input + kept if checkpointing else arch.num_layers * kept,
        }
    )


def saved_per_token(arch: WanConfig) -> int:
    """Bytes a block saves for its backward pass per token, under bfloat16 autocast."""
    half = 10 * arch.width + 3 * arch.ffn_dim  # inputs of products, q, k, v rotated, attention's output, GELU's input
    single = 12 * arch.width  # fp32: residuals, layer norms, modulation
    return 2 * half + 4 * single
