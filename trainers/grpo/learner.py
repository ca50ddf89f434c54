"""The policy in training: weights, their average and optimizer, saved, restored, and put back when an update went wrong."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rawdream_env.errors import CheckpointError, InvalidOptionError
from rawdream_env.policies import load_policy
from rawdream_env.trainers.common.distributed import ALONE, ProcessGroup, gather, local, shard_policy, spread_like
from rawdream_env.trainers.common.optimizer_state import pack_optimizer, unpack_optimizer
from rawdream_env.trainers.common.run_dir import RunDir
from rawdream_env.trainers.grpo.config import GRPOConfig

_logger = logging.getLogger(__name__)


def loaded_policy(config: GRPOConfig, policy: Any = None) -> Any:
    """The policy that ``config`` describes, or ``policy`` prepared likewise.

    Raises:
        InvalidOptionError: options of OpenVLA-OFT for a policy that does not have them.
    """
    given = config.policy if policy is None else policy
    loaded: Any = load_policy(given, device=config.device, dtype=config.dtype, unnorm_key=config.unnorm_key)
    for option, method in (("lora_rank", "add_lora"), ("gradient_checkpointing", "enable_gradient_checkpointing")):
        if not (value := getattr(config, option)):
            continue
        if not callable(change := getattr(loaded, method, None)):
            raise InvalidOptionError(f"{option}={value} does not fit a {type(loaded).__name__}; it is for OpenVLA-OFT.")
        change(*([value] if option == "lora_rank" else []))
    return loaded


def _decay_groups(parameters: Mapping[str, nn.Parameter], config: GRPOConfig) -> list[dict[str, Any]]:
    """AdamW's groups: matrices with weight decay, biases and norms without; one group where that makes no difference."""
    if not config.weight_decay or config.decayed == "all":
        return [{"params": list(parameters.values()), "weight_decay": config.weight_decay}]
    small = {name for name, p in parameters.items() if p.ndim < 2 or name.endswith("bias")}
    groups = [
        {"params": [p for name, p in parameters.items() if (name in small) == flag], "weight_decay": decay}
        for flag, decay in ((False, config.weight_decay), (True, 0.0))
    ]
    return [group for group in groups if group["params"]]


@dataclass(frozen=True)
class Learner:
    """A policy, its trainable parameters by name, and their optimizer; ``average``: their average over steps, or empty."""

    policy: Any
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor]
    group: ProcessGroup = ALONE

    @classmethod
    def of(cls, policy: Any, config: GRPOConfig, group: ProcessGroup = ALONE) -> Learner:
        """Parameters with ``requires_grad`` are trained and saved; the others stay as loaded."""
        if not isinstance(policy, nn.Module):
            raise InvalidOptionError(f"GRPO trains torch modules, but the policy is a {type(policy).__name__}.")
        policy.eval()  # with dropout, log-probabilities in training would differ from those of sampling
        shard_policy(policy, group)
        parameters = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        if not parameters:
            raise InvalidOptionError("The policy has no parameter with requires_grad: there is nothing to train.")
        half = [name for name, p in parameters.items() if p.dtype in (torch.bfloat16, torch.float16)]
        if half:
            _logger.warning(
                "%d trained parameters are in half precision, first %s: updates below their rounding are lost. Use lora_rank "
                "or dtype float32.", len(half), half[0],
            )  # fmt: skip
        optimizer = torch.optim.AdamW(_decay_groups(parameters, config), config.lr)
        average = {name: p.detach().clone() for name, p in parameters.items()} if config.ema else {}
        return cls(policy, parameters, optimizer, average, group)

    @torch.no_grad()
    def follow(self, decay: float, step: int) -> None:
        """Move the average towards the weights after ``step``; the decay rises from 1/6, to forget the first weights soon."""
        decay = min(decay, (step + 1) / (step + 6))
        for name, average in self.average.items():
            mine, latest = local([average, self.parameters[name].detach()])
            mine.lerp_(latest, 1 - decay)

    @torch.no_grad()
    def use_average(self) -> None:
        """Give the policy the averaged weights, if there are any; training cannot go on from them."""
        for name, average in self.average.items():
            self.parameters[name].copy_(average)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the context the policy has the averaged weights, if there are any."""
        latest = {name: self.parameters[name].detach().clone() for name in self.average}
        self.use_average()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in latest.items():
                    self.parameters[name].copy_(value)

    def copy(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Copies of the weights and of the optimizer's state, for ``put_back``."""
        weights = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        return weights, copy.deepcopy(self.optimizer.state_dict())

    def put_back(self, copied: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
        """Make weights and optimizer what they were at ``copy``, bit by bit."""
        weights, state = copied
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(weights[name])
        self.optimizer.load_state_dict(state)

    def save(self, run: RunDir | None, step: int, state: Mapping[str, Any]) -> None:
        """Checkpoint after ``step`` steps; ``state``: further JSON values. Every process must call it; the first, which has
        the run folder, writes.
        """
        tensors = {f"policy.{name}": parameter.detach() for name, parameter in self.parameters.items()}
        tensors |= {f"average.{name}": average for name, average in self.average.items()}
        whole = gather({**tensors, **pack_optimizer(self.optimizer)}.items(), self.group)
        if run is not None:
            run.save(step, whole, {"step": step, **state})

    def restore(self, run: RunDir | None) -> tuple[int, dict[str, Any]]:
        """Load weights and optimizer of the last checkpoint; returns the steps done and its state, (0, {}) in a new run."""
        checkpoint = None if run is None else run.load_latest()
        found = (checkpoint.step, checkpoint.state, checkpoint.path) if checkpoint is not None else None
        found = self.group.value_from_first(found)
        if found is None:
            return 0, {}
        step, state, path = found
        tensors = dict(self.group.from_first(None if checkpoint is None else checkpoint.tensors))
        stored = {n.removeprefix("policy."): t for n, t in tensors.items() if n.startswith("policy.")}
        wrong = sorted({*stored} ^ {*self.parameters})
        wrong = wrong or [name for name, p in self.parameters.items() if p.shape != stored[name].shape]
        if wrong:
            raise CheckpointError(
                f"{path} belongs to another policy: {len(wrong)} parameters differ in name or shape, first "
                f"{wrong[0]!r}. Give the policy this run started with, or choose another run_dir."
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(spread_like(stored[name], parameter))
            for name, average in self.average.items():
                average.copy_(spread_like(tensors[f"average.{name}"], average))
        trained = [p for options in self.optimizer.param_groups for p in options["params"]]
        moments = {n: t for n, t in tensors.items() if n.startswith("optimizer.")}
        for name, value in moments.items():
            if name.startswith("optimizer.state.") and value.ndim:
                moments[name] = spread_like(value, trained[int(name.split(".")[2])])
        unpack_optimizer(self.optimizer, moments)
        return step, state
