"""Training in one process, or in several under torchrun: which process computes which rows, and how weights are sharded.

    torchrun --nproc-per-node 8 -m rawdream_env world-model train --parallel fsdp2 ...

``ddp`` replicates everything on every process; ``fsdp2`` shards weights, averages and optimizer state and gathers one block
at a time. Both are PyTorch's implementations. Batches are drawn by global row, and process r of w computes the rows r, r + w,
..., so the number of processes changes only the order in which gradients are summed.

Checkpoints hold whole tensors, gathered one by one to process 0, which alone writes: a run can be resumed with another
number of processes or another ``--parallel``.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from rawdream_env.errors import InvalidOptionError
from rawdream_env.world_models.wan.transformer import WanWorldModelTransformer

Parallel = Literal["none", "ddp", "fsdp2"]
PATIENCE = timedelta(hours=24)
"""How long processes wait for process 0, which trains the autoencoder, encodes the data and validates. torchrun ends all
processes when one fails.
"""
_GLOO_DRAIN_S = 0.1
"""Gloo's threads outlive the process group, which the mesh of sharded weights keeps. A thread that drops the tensors of the
last collectives while the interpreter ends aborts the process; it needs a moment in which this thread does nothing.
"""


@dataclass(frozen=True)
class ProcessGroup:
    """This process, number ``rank`` of ``size``; ``device`` is its own ("cuda:3" in the fourth process of a machine)."""

    parallel: Parallel = "none"
    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def rows(self, batch_size: int) -> list[int]:
        """The rows of a global batch that this process computes."""
        return list(range(self.rank, batch_size, self.size))

    @property
    def loss_factor(self) -> int:
        """Factor of a process's part of a loss before the backward pass: FSDP2 averages gradients instead of adding them."""
        return self.size if self.parallel == "fsdp2" else 1

    def wait(self) -> None:
        """Wait until every process has called this."""
        if self.size > 1:
            dist.barrier()

    def total(self, value: Tensor) -> Tensor:
        """The sum of ``value`` over all processes."""
        if self.size > 1:
            value = value.detach().clone()
            dist.all_reduce(value)
        return value

    def from_first(self, values: Mapping[str, Tensor] | None) -> Iterator[tuple[str, Tensor]]:
        """The tensors of process 0, on every process and one at a time; the other processes pass None."""
        if self.size == 1:
            yield from (values or {}).items()
            return
        names = [[(k, v.shape, v.dtype) for k, v in values.items()] if values is not None else None]
        dist.broadcast_object_list(names, device=torch.device(self.device))
        for name, shape, dtype in names[0] or []:
            value = torch.empty(shape, dtype=dtype) if values is None else values[name]
            value = value.detach().to(self.device).contiguous()
            dist.broadcast(value, 0)
            yield name, value

    def value_from_first(self, value: Any) -> Any:
        """A small Python value of process 0, on every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, device=torch.device(self.device))
        return box[0]

    def everyone(self, value: Any) -> list[Any]:
        """The Python values that all processes pass, in order of rank; on every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """With ``ddp``, sum the gradients of all processes, in one exchange per precision; FSDP2 does it by itself."""
        if self.parallel != "ddp":
            return
        given = list(parameters)
        has = torch.tensor([p.grad is not None for p in given], dtype=torch.int32, device=self.device)
        dist.all_reduce(has)
        given = [p for p, count in zip(given, has.tolist(), strict=True) if count]  # without a gradient AdamW leaves it
        for dtype in dict.fromkeys(p.dtype for p in given):
            members = [p for p in given if p.dtype == dtype]
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in members])
            dist.all_reduce(flat)
            for p, part in zip(members, flat.split([p.numel() for p in members]), strict=True):
                p.grad = part.view_as(p).clone()

    def share(self, module: nn.Module) -> None:
        """Copy the weights of ``module`` from process 0 to every process."""
        if self.size > 1:
            own = module.state_dict()
            for name, value in self.from_first(own if self.first else None):
                own[name].copy_(value)


ALONE = ProcessGroup()


@contextlib.contextmanager
def join(parallel: Parallel, device: str) -> Iterator[ProcessGroup]:
    """The processes that torchrun started, or this one alone; the process group is destroyed at the end.

    Raises:
        InvalidOptionError: no such device, or ``parallel`` does not fit the number of processes.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InvalidOptionError(
            f"device {device!r} needs a GPU and a CUDA build of torch, but torch {torch.__version__} finds no GPU; use "
            "--device cpu, or see `rawdream doctor`."
        )
    if parallel != "none" and "WORLD_SIZE" not in os.environ:
        raise InvalidOptionError(
            f"parallel={parallel!r} needs several processes: start it with `torchrun --nproc-per-node N -m "
            "rawdream_env COMMAND ...`, or leave parallel out."
        )
    if parallel == "none":
        if size > 1:
            raise InvalidOptionError(
                f"torchrun has started {size} processes, but with parallel='none' each would train the same model; add "
                "--parallel ddp or --parallel fsdp2."
            )
        yield ProcessGroup(device=device)
        return
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield ProcessGroup(parallel, rank, size, device)
        dist.barrier()  # process 0 writes last, and torchrun ends it if another one fails on its way out
    finally:
        dist.destroy_process_group()
        if backend == "gloo":
            time.sleep(_GLOO_DRAIN_S)


class Objective(nn.Module):
    """A model whose ``forward`` computes the whole loss, because DDP and FSDP2 attach their hooks to ``forward``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[Any], Any]) -> Any:
        """``compute(model)``."""
        return compute(self.model)


def spread(model: WanWorldModelTransformer, group: ProcessGroup) -> nn.Module:
    """An ``Objective`` of ``model``, ready for training in ``group``.

    FSDP2 gathers each block when it runs. The attention to the prompt is a separate unit: its weights are used before the
    first block runs (``prompt_keys``) and stay gathered until the end of the backward pass. Gathered weights are
    fp32, with autocast as in one process.
    """
    objective = Objective(model)
    if group.parallel == "ddp":
        return DistributedDataParallel(objective)
    if group.parallel == "fsdp2":
        mesh: DeviceMesh = init_device_mesh(group.device.split(":")[0], (group.size,))
        for block in model.blocks:
            if block.attn2 is not None:
                fully_shard(block.attn2, mesh=mesh, reshard_after_forward=False)
                register_fsdp_forward_method(block.attn2, "prepare")
                register_fsdp_forward_method(block.attn2, "add")
            fully_shard(block, mesh=mesh)
            register_fsdp_forward_method(block, "keys_values")  # teacher forcing stops there in the last block
        fully_shard(objective, mesh=mesh)
    return objective


POLICY_FORWARDS = ("act", "logprobs", "logprobs_and_entropy")


def shard_policy(policy: Any, group: ProcessGroup, forwards: Sequence[str] = POLICY_FORWARDS) -> None:
    """With ``fsdp2``, shard a policy's weights: each of its ``layers`` is gathered when it runs, the rest together.

    ``forwards``: names of the methods that the trainer calls; none may call another.
    """
    if group.parallel != "fsdp2":
        return
    mesh: DeviceMesh = init_device_mesh(group.device.split(":")[0], (group.size,))
    for layer in getattr(policy, "layers", ()):
        fully_shard(layer, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    for name in forwards:
        register_fsdp_forward_method(policy, name)


@contextlib.contextmanager
def gathered(policy: Any) -> Iterator[None]:
    """All weights of a sharded policy on every process, so that processes may act different numbers of times, or one saves."""
    if not isinstance(policy, FSDPModule):
        yield
        return
    modules: Any = policy
    shards = [module for module in modules.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
    try:
        for module in shards:
            module.unshard()
        modules.state_dict = lambda: dict(modules.named_parameters())  # FSDP2's own would shard the weights again
        yield
    finally:
        vars(modules).pop("state_dict", None)
        for module in shards:
            module.reshard()
            module.set_reshard_after_forward(module is not policy, recurse=False)


def accumulating(module: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """A context for a forward and backward pass: only the ``last`` micro-batch synchronizes gradients."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    elif isinstance(module, DistributedDataParallel) and not last:
        context: AbstractContextManager[Any] = module.no_sync()
        return context
    return contextlib.nullcontext()


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This process's shards, not copied. Call it under ``torch.no_grad``."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one. Every process must call it."""
    full: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full


def gather(named: Iterable[tuple[str, Tensor]], group: ProcessGroup) -> dict[str, Tensor]:
    """Full tensors on the CPU of process 0, gathered one at a time, so that no device holds all of them; {} elsewhere."""
    result = {}
    for name, value in named:
        full = whole(value).detach()
        if group.first:  # copied: a gathered tensor may be a part of a larger buffer
            result[name] = full.to("cpu", copy=isinstance(value, DTensor))
    return result


def spread_like(value: Tensor, like: Tensor) -> Tensor:
    """``value``, which every process holds in full, sharded like ``like``."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def share_of(values: Tensor, size: int, group: ProcessGroup) -> tuple[Tensor, ...]:
    """This process's share of a minibatch's ``values`` in parts of at most ``size``, some of them empty: every process gets as
    many parts, since FSDP2's processes run together.
    """
    if group.size == 1:
        parts: tuple[Tensor, ...] = values.split(size)
        return parts
    return values[group.rank :: group.size].tensor_split(-(-len(values) // (group.size * size)))


def micro_batches(rows: Sequence[int], size: int) -> list[list[int]]:
    """``rows`` in parts of at most ``size``; one part when ``size`` is 0."""
    step = size or len(rows)
    return [list(rows[i : i + step]) for i in range(0, len(rows), step)]
