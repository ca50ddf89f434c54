"""The memory ladder: how many environments, and which training settings, fit on a GPU of 24, 48, 80 or 141 GB.

A ``MemoryPreset`` is derived from the estimates of ``memory_estimates.py``, not typed in; ``choose_preset`` takes the
largest that fits into what is free, and ``require_memory`` refuses what does not fit before anything is allocated.

    preset = choose_preset(free_memory("cuda"))
    envs = DreamVectorEnv(preset.num_envs, world_model=..., device="cuda", dtype=preset.dtype)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from rawdream_env.errors import NotEnoughMemoryError
from rawdream_env.world_models.memory_estimates import (
    GIB,
    MemoryEstimate,
    rollout_memory,
    training_memory,
)
from rawdream_env.world_models.wan_config import wan_config

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
    batch, estimate, checkpointing, offloaded = 0, training_memory(arch), True, False
    for checkpointing, offloaded in ((False, False), (True, False), (True, True)):
        for batch in TRAINING_BATCHES:
            estimate = training_memory(arch, batch, checkpointing=checkpointing, offload_optimizer=offloaded)
            if estimate.total <= usable:
                break
        if batch >= 4 and estimate.total <= usable:
            break
    return MemoryPreset(
        name=f"{total_gib}gb",
        total_gib=total_gib,
        num_envs=count,
        micro_batch=rows,
        train_micro_batch=batch,
        gradient_checkpointing=checkpointing,
        offload=("optimiser state", "averaged weights") if offloaded else (),
        dtype="bfloat16",
        rollout=rollout_memory(arch, num_envs=count, micro_batch=rows),
        training=estimate,
    )


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
_SHARD = "shard over more devices, or train with the optimiser's state on the host"
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
    "activations": "take a smaller micro-batch, or turn gradient checkpointing on",
}
