"""LPIPS, the learned perceptual distance between two images, for any feature extractor.

For every layer l the features are scaled to unit length along their channels; the distance is the weighted squared
difference of these, averaged over the layer's positions and summed over the layers:

    d(x, y) = sum_l 1/(H_l W_l) sum_hw sum_c w_lc (x_lhwc - y_lhwc)^2

:class:`LpipsAlex` is the usual extractor, AlexNet with the linear heads of LPIPS v0.1, from two files that the
user provides. The architecture is defined here; torchvision is not needed.

Shape letters: N frames, H W image, C_l h_l w_l channels and positions of layer l.
Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018, Eq. 1.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from rawdream_env.errors import CheckpointError
from rawdream_env.types import UInt8Array

Float64Array = NDArray[np.float64]

ALEXNET_FILE, HEADS_FILE = "alexnet-owt-7be5be79.pth", "alex.pth"
"""The two files of :class:`LpipsAlex`, as their publishers name them."""

HOW_TO_GET = (
    f"LPIPS is not measured: put {ALEXNET_FILE} (torchvision's AlexNet weights, published by PyTorch, 233 MB) and "
    f"{HEADS_FILE} (lpips/weights/v0.1 of richzhang/PerceptualSimilarity on GitHub, 6 KB) into one folder and pass it "
    "with --lpips FOLDER."
)


class FrameFeatures(Protocol):
    """Features of single frames: uint8 (N, H, W, 3) -> one map (N, C_l, h_l, w_l) per layer.

    ``weights`` has one (C_l,) tensor per layer, on the device of the features. Maps are in [N, C, h, w] order and
    floating; float64 features give a float64 distance.
    """

    weights: Sequence[Tensor]

    def __call__(self, frames: UInt8Array) -> list[Tensor]:
        """One feature map per layer."""
        ...


def distance(
    a: Sequence[Tensor], b: Sequence[Tensor], weights: Sequence[Tensor], mask: NDArray[np.bool_] | None = None
) -> Float64Array:
    """LPIPS of feature maps: two lists of (N, C_l, h_l, w_l) -> float64 (N,).

    ``mask`` bool (N, H, W) averages over part of the picture: a position of a layer counts by the share of its cell
    that is selected, so a full mask is the plain average. NaN where nothing is selected. Features see beyond the mask:
    their receptive fields are larger than a cell.
    """
    selected = None if mask is None else torch.from_numpy(np.asarray(mask, dtype=np.float32))[:, None]
    total = np.zeros(len(a[0]))
    for left, right, weight in zip(a, b, weights, strict=True):
        difference = (_unit(left) - _unit(right)) ** 2
        where = (difference * weight.to(difference.dtype)[:, None, None]).sum(1)
        if selected is None:
            total += where.mean((1, 2)).double().cpu().numpy()
            continue
        share = F.adaptive_avg_pool2d(selected.to(where), (where.shape[1], where.shape[2]))[:, 0]
        count = share.sum((1, 2))
        mean = (where * share).sum((1, 2)) / count.clamp_min(1e-12)
        total += torch.where(count > 0, mean, torch.nan).double().cpu().numpy()
    return total


def _unit(features: Tensor) -> Tensor:
    """Scaled to unit length along the channels; where all are zero they stay zero."""
    return features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)


def lpips(
    features: FrameFeatures, prediction: UInt8Array, truth: UInt8Array, mask: NDArray[np.bool_] | None = None
) -> Float64Array:
    """LPIPS of each pair of frames, uint8 (N, H, W, 3) twice -> float64 (N,); ``mask`` as in :func:`distance`."""
    with torch.inference_mode():
        return distance(features(prediction), features(truth), features.weights, mask)


_TAPS = (1, 4, 7, 9, 11)
"""Positions of the five ReLUs in torchvision's ``alexnet().features``."""
_CHANNELS = (64, 192, 384, 256, 256)


def _alexnet() -> nn.Sequential:
    """The layers of torchvision's ``alexnet().features`` up to the last ReLU, at the same positions."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    )


class LpipsAlex:
    """AlexNet features with the linear heads of LPIPS v0.1, a :class:`FrameFeatures`.

    Args:
        folder: holds ``alexnet-owt-7be5be79.pth`` (a state dict with ``features.0.weight``, ...; its classifier is not
            used) and ``alex.pth`` (``lin0.model.1.weight`` (1, 64, 1, 1), ... ``lin4.model.1.weight``).
        device: torch device.

    Raises:
        CheckpointError: a file is missing or unreadable, or tensors do not fit; the message names every one of them.
    """

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self._network = _alexnet().eval().requires_grad_(False)
        wanted = {f"features.{name}": tensor for name, tensor in self._network.state_dict().items()}
        found = _read(Path(folder) / ALEXNET_FILE, wanted, ignore="classifier.")
        self._network.load_state_dict({name.removeprefix("features."): tensor for name, tensor in found.items()})
        self._network.to(self.device)
        heads = {f"lin{layer}.model.1.weight": torch.empty(1, c, 1, 1) for layer, c in enumerate(_CHANNELS)}
        found = _read(Path(folder) / HEADS_FILE, heads)
        self.weights: Sequence[Tensor] = tuple(found[name].flatten().to(self.device) for name in heads)
        # LPIPS's own standardisation of pictures in [-1, 1].
        self._shift = torch.tensor([-0.030, -0.088, -0.188], device=self.device)[:, None, None]
        self._scale = torch.tensor([0.458, 0.448, 0.450], device=self.device)[:, None, None]

    @torch.inference_mode()
    def __call__(self, frames: UInt8Array) -> list[Tensor]:
        """Five maps (N, C_l, h_l, w_l), after each ReLU; frames of at least 31 x 31 pixels."""
        pictures = torch.from_numpy(np.ascontiguousarray(frames)).to(self.device).permute(0, 3, 1, 2)
        x = (pictures.float() / 127.5 - 1.0 - self._shift) / self._scale
        maps: list[Tensor] = []
        for position, layer in enumerate(self._network):
            x = layer(x)
            if position in _TAPS:
                maps.append(x)
        return maps


def _read(path: Path, wanted: dict[str, Tensor], ignore: str = "\0") -> dict[str, Tensor]:
    """The ``wanted`` tensors of a state dict, as float32; names beginning with ``ignore`` may be there as well."""
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}. {HOW_TO_GET}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is damaged or no state dict ({reason}); download it again.") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a state dict; download it again.")
    problems = [f"{name} is missing" for name in wanted.keys() - state.keys()]
    problems += [f"{name} is unknown" for name in state.keys() - wanted.keys() if not str(name).startswith(ignore)]
    for name in wanted.keys() & state.keys():
        value = state[name]
        if not isinstance(value, Tensor):
            problems.append(f"{name} is a {type(value).__name__}, not a tensor")
        elif value.shape != wanted[name].shape:
            problems.append(f"{name} has shape {tuple(value.shape)}, expected {tuple(wanted[name].shape)}")
        elif not bool(value.isfinite().all()):
            problems.append(f"{name} holds {int((~value.isfinite()).sum())} non-finite values")
    if problems:
        raise CheckpointError(f"{path} is not the file LPIPS needs: {'; '.join(sorted(problems))}. {HOW_TO_GET}")
    return {name: state[name].float() for name in wanted}
