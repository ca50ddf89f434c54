"""The base class of token policies: checks, keyed sampling, log-probabilities. A subclass defines ``logits``.

Shape letters: B rows, H W image, K actions in a chunk, A action dimensions, L = K*A tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rawdream_env.errors import InvalidOptionError
from rawdream_env.policies import action_tokens
from rawdream_env.seeding import NoiseKey
from rawdream_env.types import PolicyOutput


class TokenPolicy(nn.Module):
    """Base of policies that emit L = K*A categorical tokens in one parallel pass (paper section 3.2).

    A subclass sets ``chunk_len`` K, ``action_dim`` A, ``image_size`` (H, W), None for any, and defines ``logits``.
    ``to_environment`` and ``encode_actions`` may scale the actions that tokens stand for. ``act_batch`` is the
    fixed number of rows in one forward pass of ``act``: a batch is cut into blocks of exactly that many rows, and the
    last block is padded. Matrix kernels choose their blocking by shape, so that the batch size would otherwise change the
    last bits of a row. On CPU in float32, row i is bit-identical for every batch size and for all neighbours.
    """

    chunk_len: int
    action_dim: int
    image_size: tuple[int, int] | None
    act_batch: int = 8
    feature_width: int
    """Width W of ``action_features``."""
    hidden_width: int
    """Width of heads on them."""
    token_head: tuple[str, ...]
    """Beginnings of the names of parameters that only serve tokens."""

    @abstractmethod
    def logits(self, images: Any, instructions: Sequence[str]) -> Tensor:
        """Unnormalised scores (B, L, 256) in token order; differentiable; any B."""

    def action_features(self, frames: Tensor, instructions: Sequence[str]) -> Tensor:
        """What action heads read: (B, K, W) for ``frames`` uint8 (B, H, W, 3) as checked; differentiable; any B."""
        raise InvalidOptionError(f"{type(self).__name__} has no features for an action head.")

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    @property
    def num_action_tokens(self) -> int:
        """L = K*A."""
        return self.chunk_len * self.action_dim

    @torch.no_grad()
    def act(
        self, images: Any, instructions: Sequence[str], *, temperature: float, keys: Sequence[NoiseKey]
    ) -> PolicyOutput:
        """Sample a chunk per row. ``images`` uint8 (B, H, W, 3), numpy or torch; ``temperature`` 0 is greedy.

        Returns actions float32 (B, K, A) in [-1, 1], tokens int64 (B, K*A) and log-probabilities fp32 (B, K*A) at
        ``temperature`` (at T = 1 when greedy). Row i depends only on its image, instruction and key.
        """
        frames = self.check_images(images, instructions)
        shape = (self.num_action_tokens, action_tokens.NUM_TOKENS)
        logits = self.blocked(self.logits, frames, list(instructions), shape)
        tokens = action_tokens.sample_tokens(logits, temperature, keys)
        logprobs = action_tokens.token_logprobs(logits, tokens, temperature)
        return PolicyOutput(actions=self.decode_actions(tokens), tokens=tokens, logprobs=logprobs)

    def decode_actions(self, tokens: Tensor) -> Tensor:
        """Tokens (B, K*A) -> environment actions float32 (B, K, A)."""
        return self.to_environment(action_tokens.decode(tokens).reshape(-1, self.chunk_len, self.action_dim))

    def to_environment(self, actions: Tensor) -> Tensor:
        """The model's actions (B, K, A), any values -> the environment's, in [-1, 1]."""
        return actions.clamp(-1, 1)

    def encode_actions(self, actions: Tensor) -> Tensor:
        """Environment actions (B, K, A) -> tokens int64 (B, K*A), labels of supervised training."""
        return action_tokens.encode(actions).flatten(1)

    def logprobs(self, images: Any, instructions: Sequence[str], tokens: Tensor, *, temperature: float) -> Tensor:
        """Log-probabilities fp32 (B, K*A) of ``tokens`` int64 (B, K*A) at ``temperature``; differentiable."""
        return action_tokens.token_logprobs(self._scores(images, instructions, tokens), tokens, temperature)

    def logprobs_and_entropy(
        self, images: Any, instructions: Sequence[str], tokens: Tensor, *, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """As ``logprobs``, with the entropy (B, K*A) of each token in nats from the same pass; both differentiable."""
        logits = self._scores(images, instructions, tokens)
        return (
            action_tokens.token_logprobs(logits, tokens, temperature),
            action_tokens.token_entropy(logits, temperature),
        )

    def _scores(self, images: Any, instructions: Sequence[str], tokens: Tensor) -> Tensor:
        frames = self.check_images(images, instructions)
        expected = (frames.shape[0], self.num_action_tokens)
        if tuple(tokens.shape) != expected:
            raise InvalidOptionError(f"tokens have shape {tuple(tokens.shape)}, expected {expected} = (rows, K*A).")
        return self.logits(frames, instructions)

    @torch.no_grad()
    def entropy(self, images: Any, instructions: Sequence[str], *, temperature: float) -> Tensor:
        """Entropy (B, K*A) in nats of every token's distribution, at most ln 256 = 5.545."""
        return action_tokens.token_entropy(self.logits(images, instructions), temperature)

    def check_images(self, images: Any, instructions: Sequence[str]) -> Tensor:
        """Images as a uint8 tensor (B, H, W, 3) on the policy's device, or ``InvalidOptionError`` with the numbers."""
        tensor = torch.as_tensor(np.ascontiguousarray(images) if isinstance(images, np.ndarray) else images)
        size = self.image_size or tuple(tensor.shape[1:3])
        expected = (len(instructions), *size, 3)
        if tensor.dtype != torch.uint8 or tuple(tensor.shape) != expected:
            raise InvalidOptionError(
                f"images are {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}, expected uint8 "
                f"{expected} = (one per instruction, H, W, 3); resize or re-batch them."
            )
        return tensor.to(self.device)

    def blocked(
        self,
        compute: Callable[[Tensor, list[str]], Tensor],
        frames: Tensor,
        instructions: list[str],
        shape: tuple[int, ...],
    ) -> Tensor:
        """``compute(frames, instructions)``, (B, *shape), in blocks of exactly ``act_batch`` rows."""
        if not len(frames):
            return torch.zeros(0, *shape, device=self.device)
        parts = [compute(frames[rows], [instructions[r] for r in rows]) for rows in self.blocks(len(frames))]
        return torch.cat(parts)[: len(frames)]

    def blocks(self, num_rows: int) -> list[list[int]]:
        """Rows 0 .. ``num_rows`` - 1 in blocks of exactly ``act_batch``; the last block is padded with the last row."""
        rows = list(range(num_rows)) + [num_rows - 1] * (-num_rows % self.act_batch)
        return [rows[i : i + self.act_batch] for i in range(0, len(rows), self.act_batch)]
