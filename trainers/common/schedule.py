"""Training budget and learning-rate schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then a constant rate, then a cosine from ``lr`` to ``floor * lr``."""

    lr: float
    """Peak learning rate."""
    steps: int
    """Number of optimizer steps; with ``minutes`` the maximum."""
    warmup: int
    """Steps of linear warm-up."""
    minutes: float = 0.0
    """Budget of training time, earlier runs included; 0: no limit."""
    decay: float | None = None
    """Share of the training, at its end, over which the rate decays; None: all of it. With a constant part, the number of
    steps can be changed until the decay begins."""
    floor: float = 0.02
    """Final rate as a share of the peak."""

    def done(self, step: int, seconds: float = 0.0) -> float:
        """Share of the budget used after ``step`` steps: of the steps or of the minutes, whichever is larger."""
        share = step / self.steps if self.steps else 1.0
        return max(share, seconds / (60 * self.minutes)) if self.minutes else share

    def learning_rate(self, step: int, seconds: float = 0.0) -> float:
        """The rate of ``step``, which begins after ``seconds`` of training."""
        progress = self.done(step, seconds)
        if self.decay is not None:
            progress = max(0.0, (progress - 1 + self.decay) / self.decay)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.lr * min(1.0, (step + 1) / max(1, self.warmup)) * (self.floor + (1 - self.floor) * cosine)
