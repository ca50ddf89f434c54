"""Weights whose optimiser lives on the host, so that a device needs memory for weights and gradients alone.

AdamW keeps two numbers per weight and the average a third: 17 GB for the full-size model, of the 24 GB of a small card. With
copies of the weights in the host's memory the optimiser works there, on gradients that are brought over, and the device
gets the new weights back. The same arithmetic in another place; the price is the way over PCIe (5.7 GB there and back
for each step of the full size) and the speed of the host's processors.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class HostCopies:
    """Copies of ``parameters`` on the host, by name in ``copies``; pinned where a GPU has the originals.

    A step is ``pull_gradients``, the optimiser's step on ``copies``, ``push_weights``.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.originals = dict(parameters)
        self.copies: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}
        for name, original in self.originals.items():
            self.copies[name] = _on_host(original).requires_grad_(original.requires_grad)
            if original.requires_grad:
                self._gradients[name] = _on_host(original)
        self.pull_weights()

    @torch.no_grad()
    def pull_weights(self) -> None:
        """Make the copies equal to the originals."""
        for name, original in self.originals.items():
            self.copies[name].copy_(original)

    @torch.no_grad()
    def pull_gradients(self) -> None:
        """Give the copies the originals' gradients; returns when they have arrived."""
        for name, buffer in self._gradients.items():
            gradient = self.originals[name].grad
            self.copies[name].grad = None if gradient is None else buffer.copy_(gradient, non_blocking=True)
        if any(original.is_cuda for original in self.originals.values()):
            torch.cuda.synchronize()

    @torch.no_grad()
    def push_weights(self) -> None:
        """Give the originals the copies' values."""
        for name in self._gradients:
            # In the stream's order: the next forward pass waits for it, and so does the next pull.
            self.originals[name].copy_(self.copies[name], non_blocking=True)


def _on_host(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
