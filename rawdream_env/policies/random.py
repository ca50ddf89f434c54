"""A policy without weights: every action token is equally likely."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rawdream_env.policies.action_tokens import NUM_TOKENS
from rawdream_env.policies.base import TokenPolicy
from rawdream_env.types import ACTION_DIM


class RandomPolicy(TokenPolicy):
    """Draws every action uniformly from [-1, 1] at temperature 1; for data, and as the lowest baseline."""

    image_size = None

    def __init__(self, chunk_len: int = 8, action_dim: int = ACTION_DIM) -> None:
        super().__init__()
        self.chunk_len, self.action_dim = chunk_len, action_dim

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def logits(self, images: Any, instructions: Sequence[str]) -> Tensor:
        """Equal scores."""
        return torch.zeros(len(instructions), self.num_action_tokens, NUM_TOKENS)
