"""The memory ladder: how many environments, and which training settings, fit on a GPU of 24, 48, 80 or 141 GB.

A ``MemoryPreset`` is derived from the estimates of ``memory_estimates.py``, not typed in; ``choose_preset`` takes the
largest that fits into what is free, and ``require_memory`` refuses what does not fit before anything is allocated.

    preset = choose_preset(free_memory("cuda"))
    envs = gym.make_vec("rawdream/Dream-v0", preset.num_envs, world_model=..., device="cuda", dtype=preset.dtype)

Environments ask by themselves (``WanWorldModel.prepare``), and so does the trainer (``fit_memory``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from rawdream_env.errors import NotEnoughMemoryError
from rawdream_env.world_models.autoencoders import FrameCodec
from rawdream_env.world_models.memory_estimates import (
    GIB,
    MemoryEstimate,
    rollout_memory,
    training_memory,
)
from rawdream_env.world_models.wan.chunk import ContextCache
from rawdream_env.world_models.wan.config import WanConfig, wan_config

SIZES = (24, 48, 80, 141)
"""Nominal memory of the cards of the ladder."""
USABLE = 0.93
"""Share of a card's nominal memory, in GiB, that a process can count on: a "24 GB" card offers 23.5 GiB, a "141 GB" H200
139.8."""
WORKING_SHARE = 0.25
"""Most of the usable memory that goes to the rows being imagined; a GPU is busy from 8 rows on."""
TRAINING_BATCHES = (12, 8, 4, 2, 1)
"""Windows per device to choose among; 12 is the paper's whole batch."""


@dataclass(frozen=True)
class MemoryPreset:
    """What to run on a GPU of this size with the full-size model and Wan's VAE at 256 pixels; imagining and training
    take turns, and each may have the whole card.
    """

    name: str
    total_gib: int
    """Nominal memory of the card."""
    num_envs: int
    """Environments whose states are held on the GPU."""
    micro_batch: int
    """Environments imagined and decoded at a time."""
    train_micro_batch: int
    """Windows of 33 frames per forward pass in training, on one GPU."""
    gradient_checkpointing: bool
    """Compute each block's activations again in the backward pass."""
    offload: tuple[str, ...]
    """What lives in the host's memory. The text encoder is never loaded; decoder streams stay on the GPU: moving one
    there and back takes 12 to 25 ms a chunk over PCIe, beside the 36 ms in which an H200 can imagine the chunk."""
    dtype: str
    """Of weights and caches when imagining; training keeps fp32 weights and computes in bfloat16."""
    rollout: MemoryEstimate
    training: MemoryEstimate

    @property
    def needed_bytes(self) -> int:
        """Free memory that the preset asks for."""
        return max(self.rollout.total, self.training.total)


@lru_cache(maxsize=1)
def memory_presets() -> tuple[MemoryPreset, ...]:
    """The ladder, smallest first; takes a few seconds the first time (the full-size model's shapes are laid out)."""
    return tuple(_derive(size) for size in SIZES)


def _derive(total_gib: int) -> MemoryPreset:
    """The largest micro-batch within its share of the memory, then as many environments as fit; for training the largest
    micro-batch with the first of three settings that allows 4 windows.
    """
    arch, usable = wan_config("wan2.1-1.3b"), int(USABLE * total_gib * GIB)
    per_row = rollout_memory(arch).parts["a micro-batch at work"]
    rows = 1
    while 2 * rows * per_row <= WORKING_SHARE * usable:
        rows *= 2
    count = rows
    while rollout_memory(arch, num_envs=count + rows, micro_batch=rows).total <= usable:
        count += rows
    fit = fit_training(arch, usable, TRAINING_BATCHES)
    return MemoryPreset(
        name=f"{total_gib}gb",
        total_gib=total_gib,
        num_envs=count,
        micro_batch=rows,
        train_micro_batch=fit.micro_batch,
        gradient_checkpointing=fit.checkpointing,
        offload=("optimiser state", "averaged weights") if fit.offload else (),
        dtype="bfloat16",
        rollout=rollout_memory(arch, num_envs=count, micro_batch=rows),
        training=fit.estimate,
    )


@dataclass(frozen=True)
class TrainingFit:
    """Settings of training that fit: windows per forward pass, and whether activations are computed again in the
    backward pass and optimiser state and averaged weights live on the host.
    """

    micro_batch: int
    checkpointing: bool
    offload: bool
    estimate: MemoryEstimate


def fit_training(
    arch: WanConfig,
    free_bytes: int,
    micro_batches: Sequence[int],
    *,
    frames: int = 9,
    world_size: int = 1,
    may_offload: bool = True,
) -> TrainingFit:
    """The fastest settings that fit: no checkpointing, then checkpointing, then the optimiser on the host as well; of these
    the first that allows 4 windows at a time, else the one that allows most.

    Args:
        arch: the transformer.
        free_bytes: what there is.
        micro_batches: windows at a time to choose among, descending.
        frames, world_size: as for ``training_memory``.
        may_offload: whether the host may be used.

    Raises:
        NotEnoughMemoryError: nothing fits.
    """
    best: TrainingFit | None = None
    settings = [(False, False), (True, False), (True, True)] if may_offload else [(False, False), (True, False)]
    estimate = training_memory(arch)
    for checkpointing, offload in settings:
        for micro_batch in micro_batches:
            estimate = training_memory(
                arch, micro_batch, frames, world_size=world_size, checkpointing=checkpointing, offload_optimizer=offload
            )
            if estimate.total > free_bytes:
                continue
            if best is None or micro_batch > best.micro_batch:
                best = TrainingFit(micro_batch, checkpointing, offload, estimate)
            break
        if best is not None and best.micro_batch >= min(4, micro_batches[0]):
            return best
    if best is None:
        require_memory(estimate, free_bytes, "Training, even with the thriftiest settings,")
    assert best is not None
    return best


def fit_rollout(
    arch: WanConfig,
    codec: FrameCodec,
    num_envs: int,
    dtype: torch.dtype,
    reuse: ContextCache,
    device: torch.device,
    micro_batch: int = 0,
) -> int:
    """How many of ``num_envs`` episodes to imagine at a time on ``device``, where the model has been loaded: ``micro_batch``
    if it is given, else all of them, or the largest power of two that fits.

    Raises:
        NotEnoughMemoryError: the episodes' states do not fit, or not with this ``micro_batch``.
    """
    free = free_memory(device)
    powers = [2**i for i in reversed(range(max(0, num_envs - 1).bit_length()))]
    rows, estimate = micro_batch, MemoryEstimate({})
    for rows in [micro_batch] if micro_batch else [num_envs, *powers]:
        estimate = rollout_memory(arch, codec, num_envs, dtype, reuse, micro_batch=rows).without("weights")
        if device.type == "cpu":  # no context, no work space, and what the allocator holds is not known
            estimate = estimate.without("headroom")
        if estimate.total <= free:
            return rows
    require_memory(estimate, free, f"Imagining {num_envs} episodes, {rows} at a time,")
    return rows


def choose_preset(free_bytes: int) -> MemoryPreset:
    """The largest preset that fits into ``free_bytes``; ``NotEnoughMemoryError`` when none does."""
    fitting = [preset for preset in memory_presets() if preset.needed_bytes <= free_bytes]
    if not fitting:
        smallest = memory_presets()[0]
        raise NotEnoughMemoryError(
            f"{free_bytes / GIB:.2f} GiB are free, but the smallest preset, {smallest.name!r} with {smallest.num_envs} "
            f"environments, needs {smallest.needed_bytes / GIB:.2f} GiB; take fewer environments (rollout_memory says "
            "what they need), or the embedded model, which runs on a CPU."
        )
    return fitting[-1]


def require_weights(modules: Sequence[nn.Module], dtype: torch.dtype, device: torch.device) -> None:
    """``NotEnoughMemoryError`` when the weights of ``modules`` do not fit on ``device``, where they are not yet."""
    tensors = (x for module in modules for x in (*module.parameters(), *module.buffers()))
    size = sum(x.numel() * (dtype if x.is_floating_point() else x.dtype).itemsize for x in tensors)
    require_memory(MemoryEstimate({"weights": size}), free_memory(device), "The world model")


def preset_table() -> str:
    """The ladder as a Markdown table; every number is estimated."""
    names = ("preset", "environments", "at a time", "rollout GiB", "training windows", "checkpointing", "on the host")
    rows: list[tuple[object, ...]] = [(*names, "training GiB"), ("---",) * 8]
    rows += [
        (
            p.name,
            p.num_envs,
            p.micro_batch,
            f"{p.rollout.total / GIB:.1f}",
            p.train_micro_batch,
            "yes" if p.gradient_checkpointing else "no",
            ", ".join(p.offload) or "-",
            f"{p.training.total / GIB:.1f}",
        )
        for p in memory_presets()
    ]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def free_memory(device: str | torch.device) -> int:
    """Bytes that can still be allocated on ``device``: CUDA's free memory and what PyTorch holds unused, or the host's
    available memory within the limit of its control group.
    """
    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + int(unused)
    return host_memory(Path("/"))


def host_memory(root: Path) -> int:
    """Available bytes of the host whose /proc and /sys lie under ``root``; 2**63 when the system does not say."""
    found = [2**63]
    meminfo = _read(root / "proc/meminfo")
    if "MemAvailable:" in meminfo:
        found.append(int(meminfo.split("MemAvailable:")[1].split()[0]) * 1024)
    for line in _read(root / "proc/self/cgroup").splitlines():  # "0::/path", or "4:memory:/path" of the first version
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        base, names = ("memory", ("limit_in_bytes", "usage_in_bytes")) if kinds else ("", ("max", "current"))
        for folder in (root / "sys/fs/cgroup" / base / path.lstrip("/"), root / "sys/fs/cgroup" / base):
            limit, used = (_read(folder / f"memory.{name}").strip() for name in names)
            if limit.isdigit() and used.isdigit():
                found.append(max(int(limit) - int(used), 0))
    return min(found)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def require_memory(estimate: MemoryEstimate, free_bytes: int, what: str) -> None:
    """Raise ``NotEnoughMemoryError`` when ``what`` needs more than there is, before anything is allocated."""
    if estimate.total <= free_bytes:
        return
    name = max((n for n in estimate.parts if n != "headroom"), key=lambda n: estimate.parts[n])
    raise NotEnoughMemoryError(
        f"{what} needs {estimate}, but {free_bytes / GIB:.2f} GiB are free; most of it is {name}: {_ADVICE[name]}."
    )


_STATES = "take fewer environments, or a smaller preset of choose_preset"
_SHARD = "shard over more devices (fsdp2), or keep the optimiser on the host (offload, or fit_memory)"
_ADVICE = {
    "weights": "use bfloat16, shard over more devices, or take a larger one",
    "states": _STATES,
    "decoder streams": f"{_STATES}, or the tiny decoder",
    "rolling caches": f"{_STATES}, or reuse='step', which keeps no cache",
    "a micro-batch at work": "imagine fewer environments at a time (micro_batch)",
    "gradients": _SHARD,
    "optimiser": _SHARD,
    "averaged weights": _SHARD,
    "weights in bfloat16": _SHARD,
    "activations": "take a smaller micro-batch, turn gradient checkpointing on, or let fit_memory choose",
}
