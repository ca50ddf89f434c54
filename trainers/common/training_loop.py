"""The loop shared by the supervised trainers: learning rate, gradient clipping, averaged weights (EMA), log, checkpoints.

A trainer draws batches and computes losses; the loop does the rest::

    schedule = Schedule(lr=1e-3, steps=1000, warmup=100)
    with TrainingLoop(run_dir, config, model, optimizer, schedule, save_every=100, name="judge") as loop:
        for step in loop:
            loss = ...  # a function of (seed, step), so that a resumed run continues bit-identically
            loss.backward()
            loop.update()
            if loop.every(20):
                loop.log(loss=loss)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rawdream_env.errors import CheckpointError
from rawdream_env.trainers.common.checkpoints import Checkpoint
from rawdream_env.trainers.common.distributed import ALONE, ProcessGroup, gather, local, spread_like
from rawdream_env.trainers.common.offload import HostCopies
from rawdream_env.trainers.common.optimizer_state import pack_optimizer, unpack_optimizer
from rawdream_env.trainers.common.run_dir import RunDir
from rawdream_env.trainers.common.schedule import Schedule

MAX_GRAD_NORM = 1.0
_OPTIMIZER = "optimizer/"
_OLD_OPTIMIZER = ("optimizer/optimizer.", "optimizer.")  # how earlier versions named its tensors


class TrainingLoop:
    """Iterating yields the steps that remain; ``update`` applies the gradients of one, ``log`` reports it.

    Saves a checkpoint every ``save_every`` steps and at the end, and resumes from the newest one. Weights must be contiguous
    (only activations may be channels-last): AdamW's fused CPU kernel pairs weights and moments by their position in memory,
    and moments read from a checkpoint are contiguous.

    Args:
        folder: the run folder.
        settings: the configuration stored with the run; ``may_change`` names the keys that may differ on resume.
        model: holds all trained weights. Weights that do not require gradients are not changed.
        optimizer: optimizes the model's weights, or their ``host`` copies.
        schedule: number of steps or minutes, and learning rates.
        save_every: steps between checkpoints.
        name: label of the progress bar.
        ema: decay of the averaged weights, which ramps up from 0; None: no averaging.
        averaged: the submodule of ``model`` whose weights are averaged; by default the whole model.
        trained_only: leave weights that do not require gradients out of averages and checkpoints: ``model`` has them
            at every start of the run.
        added: settings that earlier versions did not store, with the values their runs were made with.
        timed: store the training time in checkpoints. Without it, equal runs write equal bytes.
        group: the processes that train together; process 0 reads and writes files.
        host: copies of the weights in host memory, on which the optimizer works.
        progress: show a progress bar.
        old_names: prefixes of tensor names in checkpoints of earlier versions, and their current names.

    Attributes:
        step: optimizer steps taken.
        rate: learning rate of the current step.

    Raises:
        RunDirError: the folder holds a run with other settings, or is in use.
        CheckpointError: every checkpoint is damaged, or the newest one belongs to another model.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: Any,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        *,
        save_every: int,
        name: str,
        ema: float | None = None,
        averaged: nn.Module | None = None,
        trained_only: bool = False,
        may_change: tuple[str, ...] = (),
        added: Mapping[str, Any] | None = None,
        timed: bool = False,
        group: ProcessGroup = ALONE,
        host: HostCopies | None = None,
        progress: bool = True,
        old_names: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.model, self.optimizer, self.group, self.host = Path(folder), model, optimizer, group, host
        self.schedule, self.ema, self.save_every, self.timed = schedule, ema, save_every, timed
        self.run = RunDir(folder, settings, may_change=may_change, added=added) if group.first else None
        self._averaged = model if averaged is None else averaged
        self._weights = dict(self._averaged.named_parameters()) if host is None else host.copies
        self._left_out: set[str] = set()
        if trained_only:
            self._weights = {name: weight for name, weight in self._weights.items() if weight.requires_grad}
            self._left_out = {name for name, weight in model.named_parameters() if not weight.requires_grad}
        self.average = {} if ema is None else {name: w.detach().clone() for name, w in self._weights.items()}
        self.step, self.rate, self._first, self._spent, self._begun = 0, 0.0, 0, 0.0, perf_counter()
        self._resume(old_names or {})
        hidden = not (progress and group.first)
        self._bar = tqdm(total=schedule.steps, initial=self.step, desc=name, unit="step", mininterval=2, disable=hidden)

    # -- one step ----------------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[int]:
        """The steps that remain, with the learning rate set and the gradients cleared."""
        self._begun, self._first, saved = perf_counter(), self.step, self.step
        while self.schedule.done(self.step, seconds := self.seconds) < 1:
            self.rate = self.schedule.learning_rate(self.step, seconds)
            for options in self.optimizer.param_groups:
                options["lr"] = self.rate
            self.model.zero_grad(set_to_none=True)
            yield self.step
            if self.every(self.save_every):
                self.save()
                saved = self.step
        if saved != self.step:
            self.save()

    def update(self) -> Tensor:
        """Clip the gradients, take an optimizer step and update the average; returns the norm of the gradients."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        if self.host is not None:
            self.host.pull_gradients()
        self.optimizer.step()
        if self.host is not None:
            self.host.push_weights()
        if self.ema is not None:
            decay = min(self.ema, (self.step + 1) / (self.step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(local(self.average.values()), local(self._weights.values()), 1 - decay)
        self.step += 1
        self._bar.update()
        return norm

    def log(self, **scalars: float | Tensor) -> None:
        """Write a line of metrics (process 0)."""
        values = {name: float(x.detach() if isinstance(x, Tensor) else x) for name, x in scalars.items()}
        if self.run is not None:
            self.run.log(self.step, **values)
        if "loss" in values:
            self._bar.set_postfix_str(f"loss {values['loss']:.3f}", refresh=False)

    def log_timings(self, **scalars: float) -> None:
        """Write a line of wall-clock values (process 0)."""
        if self.run is not None:
            self.run.log_timings(self.step, **scalars)

    # -- progress ------------------------------------------------------------------------------------------------

    @property
    def last(self) -> bool:
        """Whether all steps are taken."""
        return self.step >= self.schedule.steps

    @property
    def seconds(self) -> float:
        """Training time in seconds, earlier runs included."""
        return self._spent + perf_counter() - self._begun

    @property
    def steps_per_s(self) -> float:
        """Mean speed since the run was started or resumed."""
        return (self.step - self._first) / (perf_counter() - self._begun)

    def every(self, steps: int) -> bool:
        """Whether the number of steps taken is a multiple of ``steps``."""
        return self.step % steps == 0

    # -- weights and checkpoints ---------------------------------------------------------------------------------------------

    def averaged(self) -> dict[str, Tensor]:
        """The averaged model's ``state_dict`` on the CPU of process 0, {} elsewhere. Every process must call it."""
        return gather((self._averaged.state_dict() | self.average).items(), self.group)

    def save(self) -> None:
        """Write an atomic checkpoint. Every process must call it."""
        optimizer = pack_optimizer(self.optimizer, _OPTIMIZER)
        tensors = gather({**self._tensors(), **optimizer}.items(), self.group)
        if self.run is not None:
            self.run.save(self.step, tensors, {"seconds": self.seconds} if self.timed else {})

    def close(self) -> None:
        """Release the run folder."""
        self._bar.close()
        if self.run is not None:
            self.run.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _tensors(self) -> dict[str, Tensor]:
        kept = (entry for entry in self.model.state_dict().items() if entry[0] not in self._left_out)
        model = {f"model/{name}": value for name, value in kept}
        return model | {f"ema/{name}": value for name, value in self.average.items()}

    def _resume(self, old_names: Mapping[str, str]) -> None:
        """Resume from the newest checkpoint, which process 0 reads."""
        checkpoint = None if self.run is None else self.run.load_latest()
        self.step = self.group.value_from_first(0 if checkpoint is None else checkpoint.step)
        if not self.step:
            return
        if checkpoint is not None:
            self._spent = _seconds(checkpoint)
        own, moments = self._tensors(), dict[str, Tensor]()
        trained = [weight for options in self.optimizer.param_groups for weight in options["params"]]
        missing = set(own)
        with torch.no_grad():
            for stored, value in self.group.from_first(None if checkpoint is None else checkpoint.tensors):
                name = _current_name(stored, old_names)
                if name.startswith(_OPTIMIZER):
                    kind, index, _ = name.removeprefix(_OPTIMIZER).split(".", 2)
                    spread = kind == "state" and value.ndim > 0
                    moments[name] = spread_like(value, trained[int(index)]) if spread else value.cpu()
                elif name in own and own[name].shape == value.shape:
                    own[name].copy_(spread_like(value, own[name]))
                    missing.discard(name)
        if missing:
            raise CheckpointError(
                f"The checkpoint of step {self.step} in {self.folder} lacks {len(missing)} of {len(own)} tensors of this "
                f"model, such as {min(missing)!r}: it belongs to another model. Use another run folder."
            )
        unpack_optimizer(self.optimizer, moments, _OPTIMIZER)
        if self.host is not None:
            self.host.pull_weights()


def _current_name(name: str, old_names: Mapping[str, str]) -> str:
    for old in _OLD_OPTIMIZER:
        if name.startswith(old):
            return _OPTIMIZER + name.removeprefix(old)
    for old, new in old_names.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _seconds(checkpoint: Checkpoint) -> float:
    return float(checkpoint.state.get("seconds", checkpoint.state.get("elapsed_s", 0.0)))
