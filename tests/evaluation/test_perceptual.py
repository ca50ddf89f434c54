"""LPIPS by hand on a toy extractor, the Fréchet distance in closed form, and the extractors on tiny or random files."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rawdream_env.errors import CheckpointError
from rawdream_env.evaluation.world_model import fvd, lpips
from rawdream_env.evaluation.world_model.fidelity import compare_episode


class Toy:
    """Layer 1: the channels themselves. Layer 2: 2 x 2 means of red and of green plus blue. All float64."""

    weights = (torch.tensor([0.5, 0.25, 1.0], dtype=torch.float64), torch.tensor([2.0, 3.0], dtype=torch.float64))

    def __call__(self, frames: np.ndarray) -> list[Tensor]:
        x = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).double()
        pooled = torch.nn.functional.avg_pool2d(x, 2)
        return [x, torch.stack([pooled[:, 0], pooled[:, 1] + pooled[:, 2]], 1)]


def by_hand(a: np.ndarray, b: np.ndarray) -> float:
    """The formula with loops for one pair (H, W, 3)."""
    total = 0.0
    for one, two, weights in zip(Toy()(a[None]), Toy()(b[None]), Toy.weights, strict=True):
        _, channels, height, width = one.shape
        for i in range(height):
            for j in range(width):
                u, v = (m[0, :, i, j].tolist() for m in (one, two))
                lu, lv = (math.sqrt(sum(e * e for e in w)) for w in (u, v))
                difference = [(u[c] / lu - v[c] / lv) ** 2 * float(weights[c]) for c in range(channels)]
                total += sum(difference) / (height * width)
    return total


def test_lpips_is_the_formula_and_zero_for_equal_frames() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(1, 256, (2, 3, 4, 6, 3), dtype=np.uint8)
    measured = lpips.lpips(Toy(), a, b)
    assert measured.dtype == np.float64
    assert measured == pytest.approx([by_hand(x, y) for x, y in zip(a, b, strict=True)], abs=1e-9)
    assert lpips.lpips(Toy(), a, a).tolist() == [0.0, 0.0, 0.0]
    assert lpips.lpips(Toy(), np.zeros_like(a), a).max() < 5  # no features at all: no division by zero


def test_masked_lpips_looks_at_its_part() -> None:
    rng = np.random.default_rng(1)
    truth = rng.integers(1, 256, (3, 4, 6, 3), dtype=np.uint8)
    wrong = truth.copy()
    wrong[:, :, :2] = rng.integers(1, 256, (3, 4, 2, 3))
    mask = np.zeros((3, 4, 6), bool)
    mask[0, :, :2], mask[1, :, 2:] = True, True
    values = lpips.lpips(Toy(), wrong, truth, mask)
    cut = lpips.lpips(Toy(), wrong[:1, :, :2], truth[:1, :, :2])
    assert values[0] == pytest.approx(cut[0]) and values[1] == 0.0 and np.isnan(values[2])
    assert lpips.lpips(Toy(), wrong, truth, np.ones_like(mask)) == pytest.approx(lpips.lpips(Toy(), wrong, truth))


def test_episode_scores_gain_two_columns() -> None:
    rng = np.random.default_rng(2)
    truth = rng.integers(1, 256, (7, 8, 8, 3), dtype=np.uint8)
    dream = rng.integers(1, 256, (6, 8, 8, 3), dtype=np.uint8)
    scores = compare_episode(dream, truth, 4, features=Toy())
    for name, frames in {"dream": dream, "copy_first": truth[[0] * 6], "copy_last": truth[[0] * 4 + [4] * 2]}.items():
        assert scores[name].shape == (6, 6)
        assert scores[name][:, 4] == pytest.approx(lpips.lpips(Toy(), frames, truth[1:]))


def save_lpips(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random weights in the layout of the published files."""
    torch.manual_seed(0)
    shapes = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}
    net = {f"features.{i}.weight": torch.randn(s) / math.sqrt(s[1] * s[2] * s[3]) for i, s in shapes.items()}
    net |= {f"features.{i}.bias": torch.randn(s[0]) / 10 for i, s in shapes.items()}
    net["classifier.1.weight"] = torch.zeros(2, 2)
    heads = {f"lin{i}.model.1.weight": torch.rand(1, s[0], 1, 1) for i, s in enumerate(shapes.values())}
    torch.save(net, folder / lpips.ALEXNET_FILE)
    torch.save(heads, folder / lpips.HEADS_FILE)
    return net, heads


def test_alexnet_files(tmp_path: Path) -> None:
    net, heads = save_lpips(tmp_path)
    extractor = lpips.LpipsAlex(tmp_path)
    frames = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    maps = extractor(frames)
    assert [tuple(m.shape[1:]) for m in maps] == [(64, 15, 15), (192, 7, 7), (384, 3, 3), (256, 3, 3), (256, 3, 3)]
    x = torch.from_numpy(frames).permute(0, 3, 1, 2) / 127.5 - 1
    x = (x - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor([0.458, 0.448, 0.450])[:, None, None]
    first = torch.conv2d(x, net["features.0.weight"], net["features.0.bias"], stride=4, padding=2).relu()
    assert torch.allclose(maps[0], first, atol=1e-5)
    assert torch.equal(extractor.weights[3], heads["lin3.model.1.weight"].flatten())
    assert lpips.lpips(extractor, frames, frames).tolist() == [0.0, 0.0]
    assert (lpips.lpips(extractor, frames, frames[::-1].copy()) > 0).all()


def test_wrong_alexnet_files_are_named_tensor_by_tensor(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no file .*alexnet-owt.*--lpips FOLDER"):
        lpips.LpipsAlex(tmp_path)
    net, heads = save_lpips(tmp_path)
    bad = {name: value for name, value in net.items() if name != "features.0.bias"}
    bad["features.3.bias"], bad["features.12.weight"] = torch.zeros(7), torch.zeros(1)
    bad["features.6.bias"] = torch.full((384,), torch.nan)
    torch.save(bad, tmp_path / lpips.ALEXNET_FILE)
    with pytest.raises(CheckpointError) as caught:
        lpips.LpipsAlex(tmp_path)
    for said in (
        "features.0.bias is missing",
        "features.12.weight is unknown",
        "features.3.bias has shape (7,), expected (192,)",
        "features.6.bias holds 384 non-finite values",
    ):
        assert said in str(caught.value)
    torch.save(net, tmp_path / lpips.ALEXNET_FILE)
    (tmp_path / lpips.HEADS_FILE).write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="alex.pth is damaged"):
        lpips.LpipsAlex(tmp_path)


def exact_rows(mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Rows whose sample mean and diagonal sample covariance are exactly these: (2 D, D)."""
    size = len(mean)
    scale = np.sqrt((2 * size - 1) / 2)
    return mean + np.concatenate([np.diag(deviation), -np.diag(deviation)]) * scale


def test_frechet_distance_of_diagonal_gaussians() -> None:
    m1, m2, s1, s2 = np.random.default_rng(0).uniform(0.1, 3.0, (4, 5))
    expected = ((m1 - m2) ** 2).sum() + ((s1 - s2) ** 2).sum()
    assert fvd.frechet_distance(exact_rows(m1, s1), exact_rows(m2, s2)) == pytest.approx(expected, rel=1e-12)
    assert fvd.frechet_distance(exact_rows(m1, s1), exact_rows(m1, s1)) == pytest.approx(0.0, abs=1e-12)
    assert math.isnan(fvd.frechet_distance(m1[None], exact_rows(m2, s2)))


@pytest.mark.parametrize("rows", [40, 4])
def test_frechet_distance_is_scipys(rows: int) -> None:
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(rows)
    a, b = rng.normal(size=(rows, 6)) @ rng.normal(size=(6, 6)), rng.normal(size=(rows + 3, 6)) + 0.5
    c1, c2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(c1 @ c2)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c1 + c2 - 2 * np.real(root))
    assert fvd.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6 if rows > 6 else 1e-3)


def test_fvd_says_how_many_and_that_they_are_few() -> None:
    rng = np.random.default_rng(0)
    real = [rng.normal(size=(3, 4)) for _ in range(30)] + [np.empty((0, 4))]
    fake = [r + 1.0 for r in real]
    result = fvd.frechet_video_distance(real, fake)
    assert result["value"] == pytest.approx(4.0) and (result["n"], result["clips"], result["features"]) == (30, 90, 4)
    assert result["low"] <= result["value"] <= result["high"] and fvd.caution(result) == ""
    far = fvd.frechet_video_distance(real, [r * rng.uniform(0.5, 2) for r in real])
    assert far["low"] < far["value"] < far["high"]
    alike = fvd.frechet_video_distance([real[0]] * 5, [fake[0]] * 5)  # leaving a group out changes nothing
    assert alike["value"] > 0 and alike["low"] is None and alike["high"] is None and alike["n"] == 5
    few = fvd.frechet_video_distance(real[:1], fake[:1])
    assert few["low"] is None and "3 clips of 4 features" in fvd.caution(few)
    assert "too few" in fvd.caution(fvd.frechet_video_distance(real[-1:], fake[-1:]))


def test_windows_are_whole_clips() -> None:
    assert fvd.windows(0, 8, 128) == [(0, 8)]
    assert fvd.windows(32, 64, 60) == [(32, 48)]
    assert fvd.windows(16, 32, 20) == []


class TinyI3D(nn.Module):
    """Answers as the published file does: mean and spread of the colours, and the number of frames."""

    def forward(self, x: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        if rescale:
            x = x / 127.5 - 1
        frames = torch.full_like(x[:, 0, 0, 0, 0], float(x.size(2)))
        return torch.cat([x.mean((2, 3, 4)), x.std((2, 3, 4)), frames[:, None]], 1)


class NoVideoNet(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_i3d_file(tmp_path: Path) -> None:
    torch.jit.script(TinyI3D()).save(str(tmp_path / "i3d.pt"))
    extractor = fvd.I3DTorchScript(tmp_path / "i3d.pt", batch_size=2)
    clips = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 8, 3), dtype=np.uint8)
    features = extractor(clips)
    held = np.concatenate([clips, clips[:, -1:], clips[:, -1:]], axis=1)
    assert features.shape == (3, 7) and features.dtype == np.float64 and (features[:, 6] == 10).all()
    assert features[:, :3] == pytest.approx((held / 127.5 - 1).mean((1, 2, 3)), abs=1e-5)
    with pytest.raises(CheckpointError, match="no file .*--fvd FILE"):
        fvd.I3DTorchScript(tmp_path / "none.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="no TorchScript file"):
        fvd.I3DTorchScript(tmp_path / "junk.pt")
    torch.jit.script(NoVideoNet()).save(str(tmp_path / "other.pt"))
    with pytest.raises(CheckpointError, match="cannot be called as I3D"):
        fvd.I3DTorchScript(tmp_path / "other.pt")(clips)
