"""Image augmentation of OpenVLA-OFT's training: crops, colors against colorsys, keyed by the generator."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch

from rawdream_env.policies.openvla_oft import images
from rawdream_env.policies.openvla_oft.augment import augment, crop, shift_colors


def smooth(n: int = 2) -> np.ndarray:
    """Images (n, 224, 224, 3) of slow waves."""
    x = np.linspace(0, 3, 224)
    waves = [np.sin(x[:, None] * (i + 1) + c) * np.cos(x * (c + 1)) for i in range(n) for c in range(3)]
    return (127 + 120 * np.stack(waves).reshape(n, 3, 224, 224).transpose(0, 2, 3, 1)).astype(np.uint8)


def test_a_crop_in_the_middle_is_that_of_acting() -> None:
    side = float(np.sqrt(images.CROP_AREA))
    middle = torch.full((2, 1, 1, 1), (1 - side) / 2)
    cropped = crop(torch.from_numpy(smooth()).permute(0, 3, 1, 2).float(), middle, middle, side)
    expected = np.stack([images.centre_crop(image) for image in smooth()])
    assert np.abs(cropped.permute(0, 2, 3, 1).numpy() - expected).max() <= 1
    top = crop(
        torch.arange(224.0)[None, None, :, None].expand(1, 1, 224, 224), torch.zeros(1, 1, 1, 1), middle[:1], side
    )
    assert top[0, 0, 0].max() == 0 and top[0, 0, -1].mean().item() == pytest.approx(223 * side, rel=1e-5)


def test_colors_are_those_of_colorsys() -> None:
    colors = np.random.default_rng(0).random((200, 3))
    colors[:4] = [[0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5], [1, 0, 0]]
    for saturation, hue in ((0.8, 0.05), (1.2, -0.05), (1.0, 0.0)):
        turned = [colorsys.rgb_to_hsv(*color) for color in colors]
        expected = [colorsys.hsv_to_rgb((h + hue) % 1, min(1, s * saturation), v) for h, s, v in turned]
        pixels = torch.from_numpy(colors.astype(np.float32)).T.reshape(1, 3, 200, 1)
        found = shift_colors(pixels, torch.full((1, 1, 1, 1), saturation), torch.full((1, 1, 1, 1), hue))
        np.testing.assert_allclose(found[0, :, :, 0].T, expected, atol=1e-5)


def test_every_image_has_its_own_draw_in_upstream_s_ranges() -> None:
    grey = torch.full((400, 8, 8, 3), 128, dtype=torch.uint8)
    shade = augment(grey, np.random.default_rng(1)).float()[:, 0, 0, 0] / 255
    assert 0.29 < shade.min() < 0.32 and 0.68 < shade.max() < 0.71  # brightness alone changes a uniform grey
    frames = torch.from_numpy(smooth(1)).expand(2, -1, -1, -1)
    a, b = (augment(frames, np.random.default_rng(7)) for _ in range(2))
    assert a.shape == frames.shape and a.dtype == torch.uint8
    assert torch.equal(a, b) and (a[0].float() - a[1].float()).abs().mean() > 2
