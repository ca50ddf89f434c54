"""What training adds to the judge's network: losses, a head that locates objects, and the augmentation.

Shape letters: B clips, Q questions, F frames, P places of the feature map, D width, H W image, N = B * F pictures, O objects.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rawdream_env.judges.embedded_network import to_metres

POSITION_SCALE = 20.0
"""Scales the localization losses: an error of 5 cm counts 1."""


class Locator(nn.Module):
    """Predicts the position of every object from the features: features (N, P, D) -> metres (N, O, 3).

    Used in training only. A binary label teaches the trunk little about positions; O positions in every frame do, and
    once the features separate the objects the text attends to them quickly.
    """

    def __init__(self, width: int, objects: int) -> None:
        super().__init__()
        self.heat = nn.Linear(width, objects)
        self.where = nn.Linear(width, 3)

    def forward(self, features: Tensor) -> Tensor:
        """See the class."""
        attention = self.heat(features).float().softmax(dim=1).to(features.dtype)  # (N, P, O)
        return to_metres(self.where(attention.transpose(1, 2) @ features))


def answer_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Weighted binary cross-entropy over all questions (B, Q)."""
    return F.binary_cross_entropy_with_logits(logits.float(), labels, weight=weights)


def place_loss(found: Tensor, places: Tensor) -> Tensor:
    """Smooth L1 between found and true places (..., 3) in metres; NaN targets (absent objects) have weight 0."""
    known = ~torch.isnan(places)
    truth = torch.nan_to_num(places) * POSITION_SCALE
    error = F.smooth_l1_loss(found.float() * POSITION_SCALE, truth, reduction="none")
    return (error * known).sum() / known.sum().clamp(min=1)


def look_imagined(frames: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Make a share of the clips look as if a world model had imagined them.

    ``frames`` uint8 (B, F, H, W, 3) -> float32 in [0, 255] of the same shape. Every clip gets a small change of
    brightness and color. In a ``share`` of them the frames after the first are smoothed as by an autoencoder (down- and
    upsampled), blurred and noisy, by random amounts. The start frame stays sharp: in a dream it is a real image.
    """
    b, f, h, w, _ = frames.shape
    device = frames.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return (low + (high - low) * torch.rand(shape, generator=generator)).to(device)

    x = frames.float().permute(0, 1, 4, 2, 3)  # (B, F, 3, H, W)
    changed = (torch.rand(b, 1, generator=generator) < share).to(device) & (torch.arange(f, device=device) > 0)
    flat = x.flatten(0, 1)
    small = F.avg_pool2d(flat, 2)
    smooth = F.interpolate(small, size=(h, w), mode="bilinear", align_corners=False).view_as(x)
    blurred = F.avg_pool2d(F.pad(flat, (1, 1, 1, 1), mode="replicate"), 3, stride=1).view_as(x)
    amount = uniform(0.0, 1.0, 2, b, f, 1, 1, 1) * changed[None, :, :, None, None, None]
    x = x + 0.7 * amount[0] * (smooth - x) + 0.6 * amount[1] * (blurred - x)
    noise = torch.randn(x.shape, generator=generator).to(device)
    x = x + noise * uniform(0.0, 8.0, b, 1, 1, 1, 1) * changed[:, :, None, None, None]
    gain, shift = uniform(0.93, 1.07, b, 1, 3, 1, 1), uniform(-8.0, 8.0, b, 1, 3, 1, 1)
    return (x * gain + shift).clamp(0, 255).permute(0, 1, 3, 4, 2)
