"""Optimizer offloading: the optimizer works in host memory, and the device holds only weights and gradients.

AdamW keeps two numbers per weight and the average a third: 17 GB for the full-size model, of the 24 GB of a small GPU. Here
the optimizer works on copies of the weights in host memory: gradients are copied to the host, new weights back to the
device. The arithmetic is the same. The cost is the transfer over PCIe (5.7 GB in each direction for a step of the full size)
and the speed of the host's processors.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class HostCopies:
    """Copies of ``parameters`` on the host, by name in ``copies``; in pinned memory when the originals are on a GPU.

    A step is ``pull_gradients``, the optimizer's step on ``copies``, ``push_weights``.
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
        """Copy the weights from the device to the host."""
        for name, original in self.originals.items():
            self.copies[name].copy_(original)

    @torch.no_grad()
    def pull_gradients(self) -> None:
        """Copy the gradients from the device to the host; returns when they have arrived."""
        for name, buffer in self._gradients.items():
            gradient = self.originals[name].grad
            self.copies[name].grad = None if gradient is None else buffer.copy_(gradient, non_blocking=True)
        if any(original.is_cuda for original in self.originals.values()):
            torch.cuda.synchronize()

    @torch.no_grad()
    def push_weights(self) -> None:
        """Copy the trained weights from the host to the device."""
        for name in self._gradients:
            # Asynchronous, in stream order: the next forward pass and the next pull wait for it.
            self.originals[name].copy_(self.copies[name], non_blocking=True)


def _on_host(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
