"""Memory that a world model needs, compared with the free memory before anything is allocated.

Sizes of weights, states and caches are exact; activations are an upper bound. The estimates have not been compared with a
GPU yet. Not counted: the policy and the judge.

Shape letters: D width, P tokens in a frame, R recent latent frames, G new ones.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from rawdream_env.errors import NotEnoughMemoryError
from rawdream_env.world_models.autoencoders import FrameCodec
from rawdream_env.world_models.wan.chunk import ContextCache
from rawdream_env.world_models.wan.config import WanConfig
from rawdream_env.world_models.wan.transformer import WanWorldModelTransformer

GIB = 2**30


def free_memory(device: str | torch.device) -> int:
    """Bytes that can be allocated on ``device``: on CUDA the free memory and PyTorch's unused reserve, on a CPU the host's
    available memory within the limit of its control group.
    """
    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + int(unused)
    return host_memory(Path("/"))


def host_memory(root: Path) -> int:
    """Available bytes of the host whose /proc and /sys lie under ``root``; 2**63 when the system does not report it."""

    def read(name: str) -> str:
        path = root / name
        return path.read_text(encoding="utf-8").strip() if path.is_file() else ""

    found, meminfo, group = [2**63], read("proc/meminfo"), "sys/fs/cgroup/memory"
    if "MemAvailable:" in meminfo:
        found.append(int(meminfo.split("MemAvailable:")[1].split()[0]) * 1024)
    for limit, used in (("max", "current"), ("limit_in_bytes", "usage_in_bytes")):  # control groups, versions 2 and 1
        folder = group if limit == "limit_in_bytes" else "sys/fs/cgroup"
        most, now = read(f"{folder}/memory.{limit}"), read(f"{folder}/memory.{used}")
        if most.isdigit() and now.isdigit():
            found.append(max(int(most) - int(now), 0))
    return min(found)


def require_memory(parts: Mapping[str, int], device: str | torch.device, what: str, advice: str) -> None:
    """Raise ``NotEnoughMemoryError`` when the bytes of ``parts`` are not free on ``device``."""
    needed, free = needed_memory(parts, device), free_memory(device)
    if needed > free:
        listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
        raise NotEnoughMemoryError(
            f"{what} needs about {needed / GIB:.2f} GiB ({listed}), but {free / GIB:.2f} GiB are free on "
            f"{torch.device(device)}; {advice}."
        )


def needed_memory(parts: Mapping[str, int], device: str | torch.device) -> int:
    """The sum; on a GPU plus 8 % for fragmentation and 1 GiB for CUDA's context and libraries."""
    total = sum(parts.values())
    return total if torch.device(device).type == "cpu" else total + int(0.08 * total) + GIB


def module_bytes(modules: Sequence[nn.Module], dtype: torch.dtype) -> int:
    """Bytes of parameters and buffers once they are in ``dtype``; integers stay as they are."""
    tensors = (x for module in modules for x in (*module.parameters(), *module.buffers()))
    return sum(x.numel() * (dtype if x.is_floating_point() else x.dtype).itemsize for x in tensors)


def rollout_memory(
    arch: WanConfig,
    codec: FrameCodec,
    num_envs: int,
    rows: int,
    dtype: torch.dtype,
    context_cache: ContextCache = "step",
) -> dict[str, int]:
    """Bytes to imagine ``num_envs`` episodes, ``rows`` at a time, without the weights."""
    (c, h, w), r, tokens = arch.latent_shape, arch.context_latents, arch.tokens_per_frame
    state = 4 * ((1 + r) * (c * h * w + arch.condition_dim + arch.map_channels * h * w) + 7)  # fp32; 7: the pose
    frame_keys = 2 * arch.num_layers * arch.width * tokens * dtype.itemsize  # keys and values of a frame in all blocks
    rolling = r * frame_keys if context_cache == "rolling" else 0
    stream = _stream_bytes(codec, dtype)
    rows = min(rows, num_envs)
    blocks = tokens * (16 * arch.width + 2 * arch.ffn_dim)
    ends = h * w * (8 * c + 5 * arch.map_channels + 8 * arch.stem_channels)
    denoising = (1 + r + arch.chunk_latents) * (blocks + ends) * dtype.itemsize
    denoising += (1 + r) * frame_keys * (4 if rolling else 1)  # rolling: old, new, joined and rotated
    frames = arch.chunk_len * math.prod(codec.frame_shape)
    decoding = 3 * stream // 2 + 16 * frames
    return {
        # States: old, new, selected for denoising and joined. Decoder streams: old, new and those of the rows at work.
        "states": 4 * num_envs * (state + rolling),
        "decoder streams": (2 * num_envs + (rows if rows < num_envs else 0)) * stream,
        "frames": num_envs * frames,
        "rows at work": rows * max(denoising, decoding),
    }


def _stream_bytes(codec: FrameCodec, dtype: torch.dtype) -> int:
    """One row's decoder state, from a copy of ``codec`` on the meta device; no weight is copied."""
    module = cast(nn.Module, codec)
    empty: dict[int, Any] = {id(x): nn.Parameter(torch.empty_like(x, device="meta")) for x in module.parameters()}
    empty |= {id(x): torch.empty_like(x, device="meta") for x in module.buffers()}
    shadow = cast(FrameCodec, copy.deepcopy(module, empty).to(dtype))
    with torch.no_grad():
        stream = shadow.start_decoding(torch.empty(1, *codec.latent_shape, device="meta"))
    total: int = sum(x.nbytes for x in stream)
    return total


def rows_that_fit(
    arch: WanConfig,
    codec: FrameCodec,
    num_envs: int,
    dtype: torch.dtype,
    context_cache: ContextCache,
    device: torch.device,
) -> int:
    """How many of ``num_envs`` episodes to imagine at a time: all, else the largest power of two that fits, at least 1."""
    free = free_memory(device)
    for rows in [num_envs, *(1 << i for i in reversed(range(max(0, num_envs - 1).bit_length())))]:
        if needed_memory(rollout_memory(arch, codec, num_envs, rows, dtype, context_cache), device) <= free:
            return rows
    return 1


def training_memory(
    arch: WanConfig, rows: int, frames: int, *, shards: int = 1, checkpointing: bool = False, offload: bool = False
) -> dict[str, int]:
    """Bytes on one device to train the transformer on ``rows`` windows of ``frames`` latent frames at a time.

    fp32 weights, gradients, averaged weights and AdamW's state, divided among ``shards``; bfloat16 autocast. Latents come
    from a cache: the codec is not loaded.
    """
    with torch.device("meta"):
        parameters = sum(p.numel() for p in WanWorldModelTransformer(arch).parameters())
    shard, tokens = -(-parameters // shards), rows * frames * arch.tokens_per_frame
    saved = tokens * (68 * arch.width + 6 * arch.ffn_dim)  # bytes a block keeps for its backward pass
    inputs = 4 * tokens * arch.width  # a block's own input, fp32
    return {
        "weights and gradients": 8 * shard,
        "optimiser and averaged weights": 0 if offload else 12 * shard,
        "weights in bfloat16": 2 * (parameters if shards == 1 else 2 * parameters // arch.num_layers),
        "activations": arch.num_layers * inputs + saved if checkpointing else arch.num_layers * saved,
    }
