"""LPIPS and FVD against formulas worked out by hand, ghosting against dreams whose ghosts are known, the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rawdream_env.cli import main
from rawdream_env.errors import CheckpointError, DatasetError
from rawdream_env.evaluation.fidelity import RecordedEpisode
from rawdream_env.evaluation.ghosting import ghost_counts
from rawdream_env.evaluation.perceptual import I3DFeatures, LpipsAlexNet, frechet_distance, fvd, lpips
from rawdream_env.evaluation.world_model import EvaluateWorldModelConfig, evaluate_world_model, score_world_model
from rawdream_env.evaluation.world_model_report import summary
from rawdream_env.world_models.null import NullWorldModel

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
RNG = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


class TwoLayers:
    """Colours, and colours at half the resolution with the second layer counted double."""

    def __call__(self, frames: np.ndarray) -> list[Tensor]:
        x = torch.from_numpy(frames.copy()).double().permute(0, 3, 1, 2) + 1
        unit = x / x.square().sum(1, keepdim=True).sqrt()
        small = nn.functional.avg_pool2d(x, 2)
        return [unit, np.sqrt(2) * small / small.square().sum(1, keepdim=True).sqrt()]


def test_lpips_is_the_formula() -> None:
    a, b = noise(2, 8, 8, 3), noise(2, 8, 8, 3)
    expected = np.zeros(2)
    for n in range(2):
        for half, weight in ((False, 1.0), (True, 2.0)):
            pictures = [x[n].astype(np.float64) + 1 for x in (a, b)]
            if half:
                pictures = [x.reshape(4, 2, 4, 2, 3).mean((1, 3)) for x in pictures]
            units = [x / np.sqrt((x**2).sum(-1, keepdims=True)) for x in pictures]
            expected[n] += weight * ((units[0] - units[1]) ** 2).sum(-1).mean()
    np.testing.assert_allclose(lpips(TwoLayers(), a, b), expected, rtol=1e-12)
    assert lpips(TwoLayers(), a, a).tolist() == [0, 0]
    mask = np.zeros((2, 8, 8), bool)
    mask[0] = True
    masked = lpips(TwoLayers(), a, b, mask)
    assert masked[0] == pytest.approx(expected[0]) and np.isnan(masked[1])


def alexnet(folder: Path) -> tuple[Path, Path]:
    """Tiny values in the real layouts of torchvision's AlexNet and of LPIPS's heads."""
    torch.manual_seed(0)
    sizes = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    trunk = {"classifier.1.weight": torch.zeros(2, 2)}
    for number, (out, channels, kernel) in sizes.items():
        trunk[f"features.{number}.weight"] = torch.randn(out, channels, kernel, kernel) / kernel / channels**0.5
        trunk[f"features.{number}.bias"] = 0.1 * torch.randn(out)
    heads = {f"lin{i}.model.1.weight": torch.rand(1, sizes[n][0], 1, 1) for i, n in enumerate(sizes)}
    torch.save(trunk, folder / "alexnet.pth")
    torch.save(heads, folder / "alex.pth")
    return folder / "alexnet.pth", folder / "alex.pth"


def test_lpips_alexnet_reads_the_usual_files(tmp_path: Path) -> None:
    files = alexnet(tmp_path)
    network = LpipsAlexNet(*files)
    a, b = noise(2, 64, 64, 3), noise(2, 64, 64, 3)
    trunk, heads = torch.load(files[0], weights_only=True), torch.load(files[1], weights_only=True)

    def by_hand(frames: np.ndarray) -> list[Tensor]:
        x = torch.from_numpy(frames).permute(0, 3, 1, 2) / 255 * 2 - 1
        x = (x - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor([0.458, 0.448, 0.450])[
            :, None, None
        ]
        layers = nn.Sequential(
            nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(),
            nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
        )  # fmt: skip
        layers.load_state_dict({k.removeprefix("features."): v for k, v in trunk.items() if k.startswith("features.")})
        out = []
        for i, layer in enumerate(layers):
            x = layer(x)
            if i in (1, 4, 7, 9, 11):
                out.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return out

    with torch.no_grad():
        expected = sum(
            nn.functional.conv2d((x - y) ** 2, heads[f"lin{i}.model.1.weight"]).mean((1, 2, 3))
            for i, (x, y) in enumerate(zip(by_hand(a), by_hand(b), strict=True))
        )
    np.testing.assert_allclose(lpips(network, a, b), expected, rtol=1e-4)
    broken = torch.load(files[1], weights_only=True)
    del broken["lin0.model.1.weight"]
    broken["lin1.model.1.weight"] = torch.zeros(1, 5, 1, 1)
    torch.save(broken, files[1])
    with pytest.raises(CheckpointError, match=r"lin0.model.1.weight is missing; lin1.model.1.weight has shape"):
        LpipsAlexNet(*files)


def test_frechet_distance_of_known_gaussians() -> None:
    """Diagonal covariances: the squared difference of means and of standard deviations."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 3))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T  # exactly white
    a, b = x * [1, 2, 3] + [0, 0, 1], x * [2, 2, 0.5] + [1, 0, 0]
    assert frechet_distance(a, b) == pytest.approx(1 + 1 + 1 + 0 + 2.5**2)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    few = rng.standard_normal((5, 20)), rng.standard_normal((7, 20))  # singular covariances
    assert frechet_distance(*few) == pytest.approx(frechet_distance(*few[::-1]))
    with pytest.raises(ValueError, match=r"at least two equally long rows, got \(1, 3\), \(400, 3\)"):
        frechet_distance(a[:1], b)


class Detector(nn.Module):
    """Called as the I3D network is: means over the picture of the first and the last frame."""

    def forward(self, x: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        assert rescale and resize and return_features
        return torch.cat([x[:, :, 0].mean((2, 3)), x[:, :, -1].mean((2, 3))], 1)


def test_fvd_runs_a_torchscript_network(tmp_path: Path) -> None:
    torch.jit.script(Detector()).save(str(tmp_path / "i3d.pt"))
    network = I3DFeatures(tmp_path / "i3d.pt", batch_size=3)
    truth = [noise(10, 8, 8, 3) for _ in range(5)]
    assert fvd(network, truth, truth) == {"value": pytest.approx(0, abs=1e-4), "n": 5, "dimensions": 6}
    brighter = [np.minimum(clip, 245) + 10 for clip in truth]
    assert fvd(network, brighter, truth)["value"] > 100
    with pytest.raises(CheckpointError, match="download i3d_torchscript.pt"):
        I3DFeatures(tmp_path / "nothing.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(CheckpointError, match="is no TorchScript network"):
        I3DFeatures(tmp_path / "text.pt")


def slides(x: int) -> np.ndarray:
    frame = np.full((16, 16, 3), 20, np.uint8)
    frame[4:8, x : x + 4] = 200
    return frame


def test_ghosts_are_counted_where_something_has_left() -> None:
    start, background = slides(0), np.full((16, 16, 3), 20, np.uint8)
    truth = np.stack([slides(0), slides(2), slides(8)])
    counts = ghost_counts(truth, truth, start, background)
    assert counts.tolist() == [[0, 0], [0, 8], [0, 16]]
    still = np.broadcast_to(start, truth.shape)
    assert ghost_counts(still, truth, start, background).tolist() == [[0, 0], [8, 8], [16, 16]]
    half = truth.copy()
    half[2, 4:6, 0:4] = 200
    assert ghost_counts(half, truth, start, background)[2].tolist() == [8, 16]


class Deaf:
    """Dreams the same whatever is done."""

    chunk_len, frame_shape, fps = 8, (64, 64, 3), 10.0

    def start(self, frames: Tensor, keys: list, proprio: Tensor | None = None) -> Tensor:
        return frames

    def imagine(self, state: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        return state, state[:, None].expand(-1, 8, -1, -1, -1)


def episodes(count: int, steps: int = 20) -> list[RecordedEpisode]:
    return [
        RecordedEpisode(noise(steps + 1, 64, 64, 3), RNG.uniform(-1, 1, (steps, 7)).astype(np.float32))
        for _ in range(count)
    ]


def test_report_says_what_is_wrong_and_what_is_missing(tmp_path: Path) -> None:
    fidelity, report = score_world_model(Deaf(), episodes(3))  # type: ignore[arg-type]
    assert len(report["warnings"]) == 2
    assert "does not listen to its actions: swapped actions change the picture by 0.00" in report["warnings"][0]
    assert [m.split(":")[0] for m in report["missing"]] == ["LPIPS is not measured", "FVD is not measured"]
    assert fidelity.episodes == 3
    assert "lpips" not in report["horizon"][0]["dream"]
    with pytest.raises(DatasetError, match=r"at least one chunk \(8 actions\)"):
        score_world_model(Deaf(), episodes(1, 5))  # type: ignore[arg-type]


def test_all_metrics_by_bucket(tmp_path: Path) -> None:
    torch.jit.script(Detector()).save(str(tmp_path / "i3d.pt"))
    network = I3DFeatures(tmp_path / "i3d.pt")
    _, report = score_world_model(
        NullWorldModel(), [*episodes(4, 40), *episodes(1, 8)], frame_features=TwoLayers(), video_features=network
    )
    assert report["missing"] == []
    assert [row["frames"] for row in report["horizon"]] == [[0, 8], [8, 16], [16, 32], [32, 40]]
    for row, n in zip(report["horizon"], (5, 4, 4, 4), strict=True):
        assert {"psnr", "ssim_moving", "lpips", "lpips_moving", "fvd"} <= row["dream"].keys()
        assert row["dream"]["lpips"]["n"] == n
        assert 0 <= row["ghosting"]["value"] <= 1 or row["ghosting"]["value"] is None
    assert report["horizon"][0]["dream"]["fvd"]["why"] == "needs clips of 10 frames"
    assert report["horizon"][2]["dream"]["fvd"]["n"] == 4
    assert report["horizon"][2]["copy_last"]["fvd"]["value"] >= 0
    assert any("4 videos, fewer than its 6 dimensions" in said for said in report["warnings"])
    report["config"] = {"out": "x"}
    text, code = summary(report)
    assert code == 0 and "FVD" in text and "needs clips of 10 frames" in text


def test_the_command_writes_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["collect", "--root", str(tmp_path / "play"), "--episodes", "2", "--steps-per-episode", "16"]) == 0
    out = tmp_path / "out"
    arguments = ["evaluate-world-model", "--data", str(tmp_path / "play"), "--out", str(out)]
    assert main([*arguments, "--world-model", "null", "--episodes", "2"]) == 0
    printed = capsys.readouterr().out
    assert "ghosting" in printed and "copy of the last true frame" in printed and "2 episodes." in printed
    assert {p.name for p in out.iterdir()} == {"fidelity.json", "fidelity.gif", "fidelity.png", "report.html"}
    report = json.loads((out / "fidelity.json").read_text())
    assert report["run"]["versions"]["torch"] and report["config"]["episodes"] == 2
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 5 and "data:video/mp4" in page and "http" not in page.replace("github.com", "")
    assert main([*arguments, "--lpips", "one.pth"]) == 2
    assert "--lpips takes two files" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"There is no file .*download i3d"):
        evaluate_world_model(EvaluateWorldModelConfig((str(tmp_path / "play"),), fvd=str(tmp_path / "no.pt")))
