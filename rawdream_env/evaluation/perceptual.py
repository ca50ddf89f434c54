"""LPIPS and FVD: distances between features of a network, which the caller brings.

No weights are shipped or fetched. ``LpipsAlexNet`` and ``I3DFeatures`` read the files everybody uses; anything else with
the same shape of call does as well.

- LPIPS (Zhang et al. 2018, "The unreasonable effectiveness of deep features as a perceptual metric", Eq. 1): features of
  every layer are scaled to unit length over channels; squared differences are weighted, averaged over the picture, summed
  over layers. Lower is better.
- FVD (Unterthiner et al. 2018): the Fréchet distance between Gaussians fitted to the features of two sets of videos. It is
  biased upwards when there are few videos, strongly so when fewer than feature dimensions.

Shape letters: N pictures or videos, F frames, H W C picture, D features.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from rawdream_env.errors import CheckpointError
from rawdream_env.files import check_weights, load_tensors
from rawdream_env.types import UInt8Array

Float64Array = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

LPIPS_ADVICE = (
    "LPIPS is not measured: download alexnet-owt-7be5be79.pth (torchvision's AlexNet, download.pytorch.org/models, 233 MB) "
    "and lpips/weights/v0.1/alex.pth (github.com/richzhang/PerceptualSimilarity, 6 kB), and give both with --lpips."
)
FVD_ADVICE = (
    "FVD is not measured: download i3d_torchscript.pt (the I3D network as TorchScript that StyleGAN-V and others score "
    "videos with, 51 MB) and give it with --fvd."
)


class FrameFeatures(Protocol):
    """Features of pictures for LPIPS."""

    def __call__(self, frames: UInt8Array) -> list[Tensor]:
        """uint8 (N, H, W, 3) -> one (N, D, h, w) per layer, weighted: the squared difference counts as it is."""
        ...


class VideoFeatures(Protocol):
    """Features of videos for FVD."""

    min_frames: int
    """Shortest video it takes."""

    def __call__(self, videos: UInt8Array) -> Float64Array:
        """uint8 (N, F, H, W, 3) -> (N, D)."""
        ...


def unit_length(features: Tensor) -> Tensor:
    """(N, D, h, w) scaled to length 1 over D."""
    return features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)


def lpips(
    features: FrameFeatures, prediction: UInt8Array, truth: UInt8Array, mask: BoolArray | None = None
) -> Float64Array:
    """LPIPS of each frame, uint8 (F, H, W, 3) twice -> (F,).

    ``mask`` bool (F, H, W) averages over some pixels, each layer's map enlarged to the picture; NaN where it has none.
    """
    total = np.zeros(len(truth))
    with torch.no_grad():
        for a, b in zip(features(prediction), features(truth), strict=True):
            distance = (a - b).square().sum(1)
            if mask is None:
                total += distance.mean((1, 2)).double().cpu().numpy()
                continue
            size = (truth.shape[1], truth.shape[2])
            large = functional.interpolate(distance[:, None], size, mode="bilinear")[:, 0].double().cpu().numpy()
            count = mask.sum((1, 2))
            total += np.where(count > 0, (large * mask).sum((1, 2)) / np.maximum(count, 1), np.nan)
    return total


class LpipsAlexNet(nn.Module):
    """``FrameFeatures`` of AlexNet with LPIPS's linear heads, version 0.1.

    Reads torchvision's AlexNet (``features.0.weight``, ...) and the heads of the LPIPS repository (``lin0.model.1.weight``,
    ...); the roots of the heads' weights are multiplied in, so that squared differences come out weighted.
    """

    _LAYERS = ((0, 64, 11, 4, 2), (3, 192, 5, 1, 2), (6, 384, 3, 1, 1), (8, 256, 3, 1, 1), (10, 256, 3, 1, 1))
    _POOLED = (3, 6)  # layers with max-pooling before them

    def __init__(self, alexnet: str | os.PathLike[str], heads: str | os.PathLike[str]) -> None:
        super().__init__()
        channels, wanted, weights = 3, {}, {}
        for i, (number, out, kernel, _, _) in enumerate(self._LAYERS):
            wanted[f"features.{number}.weight"] = torch.empty(out, channels, kernel, kernel, device="meta")
            wanted[f"features.{number}.bias"] = torch.empty(out, device="meta")
            weights[f"lin{i}.model.1.weight"] = torch.empty(1, out, 1, 1, device="meta")
            channels = out
        trunk = {k: v for k, v in load_tensors(alexnet).items() if not k.startswith("classifier.")}
        check_weights(trunk, wanted, alexnet, "architecture (torchvision's AlexNet)")
        linear = load_tensors(heads)
        check_weights(linear, weights, heads, "architecture (LPIPS 0.1 for AlexNet)")
        for name, tensor in {**trunk, **linear}.items():
            self.register_buffer(name.replace(".", "_"), tensor.float())
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("spread", torch.tensor([0.458, 0.448, 0.450])[:, None, None])
        self.shift: Tensor
        self.spread: Tensor

    def __call__(self, frames: UInt8Array) -> list[Tensor]:
        """uint8 (N, H, W, 3) -> five weighted feature maps."""
        x = torch.from_numpy(np.ascontiguousarray(frames)).to(self.shift.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        x = (x - self.shift) / self.spread
        out = []
        for i, (number, _, _, stride, padding) in enumerate(self._LAYERS):
            if number in self._POOLED:
                x = functional.max_pool2d(x, 3, 2)
            weight, bias = self.get_buffer(f"features_{number}_weight"), self.get_buffer(f"features_{number}_bias")
            x = functional.relu(functional.conv2d(x, weight, bias, stride, padding))
            out.append(unit_length(x) * self.get_buffer(f"lin{i}_model_1_weight").clamp(min=0).sqrt())
        return out


class I3DFeatures:
    """``VideoFeatures`` of the I3D network as TorchScript.

    A TorchScript file is a program; it is opened only because you name it.
    """

    min_frames = 10

    def __init__(self, path: str | os.PathLike[str], device: str = "cpu", batch_size: int = 8) -> None:
        if not Path(path).is_file():
            raise CheckpointError(f"There is no file {path}. {FVD_ADVICE}")
        try:
            self.model = torch.jit.load(os.fspath(path), map_location=device).eval()
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path} is no TorchScript network ({str(error).splitlines()[0]}).") from error
        self.device, self.batch_size = device, batch_size

    def __call__(self, videos: UInt8Array) -> Float64Array:
        """uint8 (N, F, H, W, 3), F >= 10 -> (N, 400)."""
        parts = []
        with torch.no_grad():
            for first in range(0, len(videos), self.batch_size):
                batch = torch.from_numpy(np.ascontiguousarray(videos[first : first + self.batch_size]))
                x = batch.to(self.device).permute(0, 4, 1, 2, 3).float()
                parts.append(self.model(x, rescale=True, resize=True, return_features=True).double().cpu().numpy())
        return np.concatenate(parts)


def _root(matrix: Float64Array) -> Float64Array:
    """Symmetric square root of a covariance matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray((vectors * np.sqrt(values.clip(min=0))) @ vectors.T)


def frechet_distance(a: Float64Array, b: Float64Array) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features (N, D), N >= 2.

    |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) with sample covariances A, B; the trace of the root is the sum of the
    roots of the eigenvalues of A^(1/2) B A^(1/2), which is symmetric.
    """
    if min(len(a), len(b)) < 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"the Fréchet distance needs two sets of at least two equally long rows, got {a.shape}, {b.shape}"
        )
    cov_a, cov_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    root = _root(cov_a)
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0)).sum()
    distance = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    return max(float(distance), 0.0)  # rounding may leave a little less than nothing


def fvd(
    features: VideoFeatures, prediction: Sequence[UInt8Array], truth: Sequence[UInt8Array]
) -> dict[str, float | int]:
    """FVD between equally long clips (F, H, W, 3): ``{"value", "n", "dimensions"}``."""
    a, b = features(np.stack(prediction)), features(np.stack(truth))
    return {"value": frechet_distance(a, b), "n": len(a), "dimensions": a.shape[1]}
