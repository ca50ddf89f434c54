"""The policy in training: weights, their average and optimizer, saved, restored, and put back when an update went wrong."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rawdream_env.errors import CheckpointError, InvalidOptionError
from rawdream_env.trainers.common.optimizer_state import pack_optimizer, unpack_optimizer
from rawdream_env.trainers.common.run_dir import RunDir
from rawdream_env.trainers.grpo.config import GRPOConfig


@dataclass(frozen=True)
class Learner:
    """A policy, its trainable parameters by name, and their optimizer; ``average``: their average over steps, or empty."""

    policy: Any
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor]

    @classmethod
    def of(cls, policy: Any, config: GRPOConfig) -> Learner:
        """Parameters with ``requires_grad`` are trained and saved; the others stay as loaded."""
        if not isinstance(policy, nn.Module):
            raise InvalidOptionError(f"GRPO trains torch modules, but the policy is a {type(policy).__name__}.")
        policy.eval()  # with dropout, log-probabilities in training would differ from those of sampling
        parameters = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        if not parameters:
            raise InvalidOptionError("The policy has no parameter with requires_grad: there is nothing to train.")
        optimizer = torch.optim.AdamW(parameters.values(), config.lr, weight_decay=config.weight_decay)
        average = {name: p.detach().clone() for name, p in parameters.items()} if config.ema else {}
        return cls(policy, parameters, optimizer, average)

    @torch.no_grad()
    def follow(self, decay: float, step: int) -> None:
        """Move the average towards the weights after ``step``; the decay rises from 1/6, to forget the first weights soon."""
        decay = min(decay, (step + 1) / (step + 6))
        for name, average in self.average.items():
            average.lerp_(self.parameters[name].detach(), 1 - decay)

    @torch.no_grad()
    def use_average(self) -> None:
        """Give the policy the averaged weights, if there are any; training cannot go on from them."""
        for name, average in self.average.items():
            self.parameters[name].copy_(average)

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

    def save(self, run: RunDir, step: int, state: Mapping[str, Any]) -> None:
        """Checkpoint after ``step`` steps; ``state``: further JSON values."""
        tensors = {f"policy.{name}": parameter.detach() for name, parameter in self.parameters.items()}
        tensors |= {f"average.{name}": average for name, average in self.average.items()}
        run.save(step, {**tensors, **pack_optimizer(self.optimizer)}, {"step": step, **state})

    def restore(self, run: RunDir) -> tuple[int, dict[str, Any]]:
        """Load weights and optimizer of the last checkpoint; returns the steps done and its state, (0, {}) in a new run."""
        checkpoint = run.load_latest()
        if checkpoint is None:
            return 0, {}
        stored = {n.removeprefix("policy."): t for n, t in checkpoint.tensors.items() if n.startswith("policy.")}
        wrong = sorted({*stored} ^ {*self.parameters})
        wrong = wrong or [name for name, p in self.parameters.items() if p.shape != stored[name].shape]
        if wrong:
            raise CheckpointError(
                f"{checkpoint.path} belongs to another policy: {len(wrong)} parameters differ in name or shape, first "
                f"{wrong[0]!r}. Give the policy this run started with, or choose another run_dir."
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(stored[name])
            for name, average in self.average.items():
                average.copy_(checkpoint.tensors[f"average.{name}"])
        unpack_optimizer(self.optimizer, checkpoint.tensors)
        return checkpoint.step, checkpoint.state
