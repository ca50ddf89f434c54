"""One stage of training: optimiser, averaged weights (EMA), log, and checkpoints that survive a kill and a resize.

Shared by the world model's autoencoder and transformer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rawdream_env.trainers.common.distributed import ALONE, ProcessGroup, gather, local, spread_like, whole
from rawdream_env.trainers.common.offload import HostCopies
from rawdream_env.trainers.common.run_dir import RunDir, pack_optimizer, unpack_optimizer


@dataclass(frozen=True)
class StageConfig:
    """Optimisation of one stage."""

    steps: int
    """Optimiser steps."""
    batch_size: int
    """Autoencoder: groups of four frames; transformer: episodes or windows, of all processes together."""
    lr: float
    """Peak learning rate of AdamW."""
    warmup: int = 100
    """Steps of linear warm-up."""
    decay: float = 0.4
    """Share of the steps, at the end, over which the learning rate falls; 1 is the paper's cosine."""
    weight_decay: float = 0.02
    """AdamW weight decay."""
    ema: float = 0.998
    """Decay of the averaged weights that are saved; ramps up from 0."""


def learning_rate(stage: StageConfig, step: int) -> float:
    """Linear warm-up, constant, then a cosine to 2 % of the peak over the last ``decay`` of the steps.

    A run can thus be lengthened or cut short before the decay without having wasted anything.
    """
    progress = max(0.0, (step / stage.steps - 1 + stage.decay) / stage.decay)
    return stage.lr * min(1.0, (step + 1) / stage.warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


M = TypeVar("M", bound=nn.Module)


class TrainingStage(Generic[M]):
    """``loop`` yields the steps that remain; ``backward`` and ``update`` do them.

    Weights stay contiguous (only activations are channels-last): AdamW's fused CPU kernel pairs weights and moments element
    by element in memory, and moments read from a checkpoint are contiguous.

    Args:
        folder: the run folder of this stage.
        settings: what the run depends on; ``may_change`` names the keys that may differ when it is continued.
        model: whose weights are trained and averaged; those that do not require gradients stay.
        module: ``model``, or what spreads it over processes (``distributed.spread``).
        offload: keep optimiser state and averaged weights in the host's memory.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        config: StageConfig,
        model: M,
        module: nn.Module | None = None,
        *,
        world: ProcessGroup = ALONE,
        log_every: int = 25,
        save_every: int,
        may_change: tuple[str, ...] = (),
        offload: bool = False,
    ) -> None:
        self.folder, self.config, self.world = folder, config, world
        self.log_every, self.save_every = log_every, save_every
        self.model, self.module = model, model if module is None else module
        self.run = RunDir(folder, settings, may_change=may_change) if world.first else None
        self.host = HostCopies(dict(model.named_parameters())) if offload else None
        self.parameters: dict[str, Tensor] = dict(model.named_parameters()) if self.host is None else self.host.copies
        self.average = {name: value.detach().clone() for name, value in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            [value for value in self.parameters.values() if value.requires_grad],
            lr=config.lr,
            betas=(0.9, 0.95),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.first = 0
        self._loss: Tensor | float = 0.0
        self._sums: dict[str, Tensor] = {}
        self._resume()

    def loop(self) -> Iterator[int]:
        """Steps to do, with the learning rate set, a progress bar and a checkpoint every ``save_every`` steps."""
        steps, name = self.config.steps, self.folder.name
        with tqdm(
            total=steps, initial=self.first, desc=name, unit="step", mininterval=2, disable=not self.world.first
        ) as bar:
            for step in range(self.first, steps):
                for group in self.optimizer.param_groups:
                    group["lr"] = learning_rate(self.config, step)
                self.model.zero_grad(set_to_none=True)
                self._loss, self._sums = 0.0, {}
                yield step
                bar.update()
                if (step + 1) % self.save_every == 0 or step + 1 == steps:
                    self.save(step + 1)

    def backward(self, loss: Tensor, share: float = 1.0, sums: Mapping[str, Tensor] | None = None) -> None:
        """Add the gradient of ``share * loss``; what is logged are the sums over micro-batches and processes."""
        (loss if share == 1.0 else loss * share).backward()
        self._loss = self._loss + loss.detach() * share
        for name, value in (sums or {}).items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def update(self, step: int, **scalars: float | Tensor) -> None:
        """One optimiser step with clipping of the global norm, the EMA, and a log line every ``log_every`` steps."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if self.host is not None:
            self.host.pull_gradients()
        self.optimizer.step()
        if self.host is not None:
            self.host.push_weights()
        decay = min(self.config.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(local(self.average.values()), local(self.parameters.values()), 1 - decay)
        if (step + 1) % self.log_every == 0:
            assert isinstance(self._loss, Tensor)
            loss = self.world.total(self._loss) / self.world.size
            sums = {name: self.world.total(value) for name, value in self._sums.items()}
            values = {name: float(value[0] / (value[1] + 1e-9)) for name, value in sums.items()}
            values |= {name: float(value) for name, value in scalars.items()}
            self.log(step + 1, loss=float(loss), grad_norm=float(whole(norm)), **values)

    def log(self, step: int, **scalars: float) -> None:
        """Write a line of metrics (process 0)."""
        if self.run is not None:
            self.run.log(step, **scalars)

    def averaged(self) -> dict[str, Tensor]:
        """The averaged model's whole ``state_dict`` on the CPU of process 0 ({} elsewhere); every process has to ask."""
        return gather((self.model.state_dict() | self.average).items(), self.world)

    def save(self, step: int) -> None:
        """Write an atomic checkpoint."""
        parts = {"model": self.model.state_dict(), "ema": self.average, "optimizer": pack_optimizer(self.optimizer)}
        named = ((f"{part}/{name}", value) for part, values in parts.items() for name, value in values.items())
        tensors = gather(named, self.world)
        if self.run is not None:
            self.run.save(step, tensors, {"stage": self.folder.name})

    def close(self) -> None:
        """Give the run folder free."""
        if self.run is not None:
            self.run.close()

    def _resume(self) -> None:
        """Go on from the newest checkpoint, which process 0 reads."""
        checkpoint = None if self.run is None else self.run.load_latest()
        self.first = self.world.value_from_first(0 if checkpoint is None else checkpoint.step)
        if not self.first:
            return
        own = {"model": self.model.state_dict(), "ema": self.average}
        moments: dict[str, Tensor] = {}
        trained = self.optimizer.param_groups[0]["params"]
        with torch.no_grad():
            for key, value in self.world.from_first(None if checkpoint is None else checkpoint.tensors):
                part, _, name = key.partition("/")
                if part == "optimizer":
                    kind, index = name.split(".")[1:3]
                    spread = kind == "state" and value.ndim > 0
                    moments[name] = spread_like(value, trained[int(index)]) if spread else value.cpu()
                else:
                    own[part][name].copy_(spread_like(value, own[part][name]))
        unpack_optimizer(self.optimizer, moments)
        if self.host is not None:
            self.host.pull_weights()
