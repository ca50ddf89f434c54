"""Ghosting on synthetic videos, and ``rawdream world-model evaluate`` from a data folder to its files."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rawdream_env import cli
from rawdream_env.data import schema
from rawdream_env.data.lerobot import LeRobotWriter
from rawdream_env.data.reader import LeRobotReader
from rawdream_env.data.recorded import RecordedEpisode, episodes_from_dataset
from rawdream_env.errors import CheckpointError, InvalidOptionError
from rawdream_env.evaluation.world_model import evaluate as world_model
from rawdream_env.evaluation.world_model import ghosting
from rawdream_env.evaluation.world_model.evaluate import EvaluateWorldModelConfig, evaluate_world_model
from rawdream_env.evaluation.world_model.fidelity import evaluate_fidelity
from rawdream_env.evaluation.world_model.replay import action_sensitivity_warning
from rawdream_env.world_models.null import NullWorldModel

SIZE, K, STEPS = 24, 4, 16
TABLE = np.full((SIZE, SIZE, 3), 150, np.uint8)


def scene(object_at: tuple[int, int] | None, arm_at: int) -> np.ndarray:
    """A grey table, an arm (a dark bar from the top) and perhaps an object (a red square of 4 x 4)."""
    frame = TABLE.copy()
    frame[:6, arm_at : arm_at + 3] = 30
    if object_at is not None:
        y, x = object_at
        frame[y : y + 4, x : x + 4] = (220, 20, 20)
    return frame


def moving_away(row: int = 14) -> np.ndarray:
    """The arm moves from the first frame on; the object leaves its place after frame 8: (STEPS + 1, H, W, 3)."""
    return np.stack([scene((row, 4 if t <= 8 else 16), arm_at=2 + t) for t in range(STEPS + 1)])


def counts(dream: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    one = ghosting.episode_ghosts(dream, truth, TABLE, K)
    return ghosting.summarise_ghosts({name: np.stack([c[8:STEPS].sum(0)] * 3) for name, c in one.items()})


def test_ghosting_of_perfect_copying_and_half_ghostly_models() -> None:
    truth = moving_away()
    perfect = counts(truth[1:], truth)
    assert perfect["dream"]["value"] == 0.0 and perfect["truth"]["value"] == 0.0
    assert perfect["copy_first"]["value"] == 1.0
    assert perfect["pixels"] == 3 * 16 * 8 and perfect["dream"]["n"] == 3  # 16 pixels, 8 frames, 3 episodes
    assert counts(truth[:1].repeat(STEPS, 0), truth)["dream"]["value"] == 1.0
    half = truth[1:].copy()
    half[8:, 14:16, 4:8] = truth[0, 14:16, 4:8]
    assert counts(half, truth)["dream"]["value"] == 0.5 and counts(half, truth)["reappeared"]["value"] == 0.0
    late = truth[1:].copy()
    late[12:, 14:18, 4:8] = truth[0, 14:18, 4:8]  # gone for four frames, then back
    assert counts(late, truth)["dream"]["value"] == counts(late, truth)["reappeared"]["value"] == 0.5
    other = truth[1:].copy()
    other[8:, 14:18, 4:8] = 30  # a dark arm where the red object was: closer to it than to the table, but not alike
    assert counts(other, truth)["dream"]["value"] == 1.0 and counts(other, truth)["alike"]["value"] == 0.0
    assert counts(late, truth)["alike"]["value"] == 0.5


def test_only_what_lay_still_and_left_counts() -> None:
    truth = moving_away()
    places = ghosting.object_places(truth, TABLE, K)
    assert np.argwhere(places).min(0).tolist() == [14, 4] and places.sum() == 16  # not the arm
    still = np.stack([scene((14, 4), arm_at=2 + t) for t in range(STEPS + 1)])
    nothing = counts(still[1:], still)
    assert nothing["pixels"] == 0 and nothing["dream"] == {"value": None, "low": None, "high": None, "n": 0}
    covered = still.copy()
    covered[9:, 14:18, 4:8] = 30  # the arm stands before it: not background, so nothing was vacated
    assert counts(covered[1:], covered)["pixels"] == 0


class Deaf:
    """A world model that shows the start frame whatever it is told, with keyed noise when ``noise`` is positive."""

    chunk_len, frame_shape, fps = K, (SIZE, SIZE, 3), 10.0

    def __init__(self, noise: int = 0) -> None:
        self.noise = noise

    def start(self, frames: torch.Tensor, keys: Any, proprio: Any = None) -> Any:
        rows = []
        for frame, key in zip(frames.numpy(), keys, strict=True):
            fresh = key.numpy(0).integers(0, self.noise + 1, frame.shape)
            rows.append((frame.astype(int) + fresh).clip(0, 255).astype(np.uint8))
        return torch.from_numpy(np.stack(rows))

    def imagine(self, state: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return state, state[:, None].expand(-1, K, -1, -1, -1)


@pytest.mark.parametrize("noise", [0, 5])
def test_a_model_that_ignores_actions_is_called_so(noise: int) -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (3, STEPS, 7)).astype(np.float32)
    episodes = [RecordedEpisode(moving_away(row), a) for row, a in zip((8, 13, 18), actions, strict=True)]
    fidelity = evaluate_fidelity(Deaf(noise), episodes)
    assert "The world model ignores its actions" in fidelity.notes[0] and "n=3" in fidelity.notes[0]
    assert fidelity.overall["ghosting"]["dream"]["value"] == 1.0


def test_little_more_than_noise_is_not_listening() -> None:
    ratio = {"value": 1.2, "low": 0.9, "high": 1.6, "n": 5}
    heard = {"change": 3.0, "ratio": {**ratio, "low": 1.1}}
    assert action_sensitivity_warning({"n": 5, "swapped": heard, "zeroed": heard}) == ""
    said = action_sensitivity_warning({"n": 5, "swapped": heard, "zeroed": {"change": 3.0, "ratio": ratio}})
    assert "no motion at all" in said and "1.20 times" in said and "[0.90, 1.60], n=5" in said
    equal = {"value": 0.5, "low": None, "high": None, "n": 5}  # every resample gives the same ratio
    said = action_sensitivity_warning({"n": 5, "swapped": {"change": 3.0, "ratio": equal}, "zeroed": heard})
    assert "0.50 times" in said and "[no interval], n=5" in said


class ToyVideoFeatures:
    """Mean colour of a clip."""

    def __call__(self, clips: np.ndarray) -> np.ndarray:
        return clips.mean((1, 2, 3), dtype=np.float64)


class ToyFrameFeatures:
    """The colours themselves."""

    weights = (torch.ones(3, dtype=torch.float64),)

    def __call__(self, frames: np.ndarray) -> list[torch.Tensor]:
        return [torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).double()]


@pytest.fixture(scope="module")
def play(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four episodes of 64 x 64 and 20 actions."""
    root = tmp_path_factory.mktemp("data") / "play"
    rng = np.random.default_rng(0)
    features = {"action": schema.numeric_feature(7), "observation.state": schema.numeric_feature(7)}
    writer = LeRobotWriter(root, fps=10, image_shape=(64, 64, 3), features=features)
    for _ in range(4):
        small = np.concatenate([moving_away(), moving_away()[:4]])[:, :16, :16]
        actions = rng.uniform(-1, 1, (20, 7)).astype(np.float32)
        state = rng.normal(size=(21, 7)).astype(np.float32)
        writer.add_episode(small.repeat(4, axis=1).repeat(4, axis=2), actions, state, "play")
    writer.finalize()
    return root


def test_the_command_writes_its_files(play: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = EvaluateWorldModelConfig((str(play),), "null", str(out), episodes=3, horizon=16, videos=2)
    first = evaluate_world_model(
        config, frame_features=ToyFrameFeatures(), video_features=ToyVideoFeatures(), progress=False
    )
    assert sorted(p.name for p in out.iterdir()) == ["fidelity.json", "grid.gif", "grid.mp4", "report.html"]
    report = json.loads((out / "fidelity.json").read_text())
    assert report == json.loads(json.dumps(first.report)) and report["episodes"] == 3 and "versions" in report["run"]
    assert [row["frames"] for row in report["horizon"]] == [[0, 8], [8, 16]]
    assert report["overall"]["dream"]["lpips"]["n"] == 3 and report["overall"]["dream"]["fvd"]["clips"] == 3
    assert "3 clips of 3 features" in report["notes"][-1]
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 7 and "Ghosts: not measured" in page and "data:video/mp4;base64" in page
    assert not re.search(r'(?:src|href)="(?!data:)', page) and "<th>" not in page and "<video autoplay" in page
    assert 'name="viewport"' in page and "The first 2 episodes" in page
    from PIL import Image

    with Image.open(io.BytesIO((out / "grid.gif").read_bytes())) as gif:
        assert gif.size == (3 * 64 + 2 * 2, 2 * 64 + 2 + 16)
    assert "FVD, 16-frame clips (lower is better)" in first.table()
    again = evaluate_world_model(config, progress=False)  # in the same folder, without extractors
    assert again.report["horizon"][0]["dream"]["psnr"] == first.report["horizon"][0]["dream"]["psnr"]
    assert "LPIPS, whole image" in again.table() and "not measured" in again.table()
    assert sum("is not measured" in note and "--" in note for note in again.report["notes"]) == 2


def test_frames_of_a_data_set_stay_on_disk(play: Path) -> None:
    reader = LeRobotReader(play)
    stored = list(episodes_from_dataset(reader, limit=2, horizon=8))
    assert [(len(e.actions), len(e.frames)) for e in stored] == [(8, 9)] * 2
    assert stored[1].frames is not stored[1].frames and np.array_equal(stored[1].frames, reader.episode(1).frames[:9])
    loaded = [RecordedEpisode(e.frames, e.actions, e.proprio, e.name, e.camera) for e in stored]
    world = NullWorldModel((64, 64, 3))
    assert evaluate_fidelity(world, stored).as_dict() == evaluate_fidelity(world, loaded).as_dict()


def test_the_command_line_prints_the_table(play: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", str(play), "--world-model", "null", "--out", str(tmp_path), "--episodes", "2", "--videos", "0"]
    assert cli.main(["evaluate-world-model", *options]) == 0
    out = capsys.readouterr().out
    assert "copy of the last true frame" in out and "Ghosts, %" in out and f"{tmp_path}/report.html" in out
    assert not (tmp_path / "grid.mp4").exists()


def test_recordings_of_another_size_are_resized_and_it_is_said(play: Path, tmp_path: Path) -> None:
    config = EvaluateWorldModelConfig(
        data=(str(play),), out=str(tmp_path), episodes=1, horizon=8, sensitivity_episodes=0
    )
    report = evaluate_world_model(config, world_model=NullWorldModel((32, 32, 3)), progress=False).report
    assert any("frames of shape (64, 64, 3); they are resized to (32, 32, 3)" in note for note in report["notes"])


def test_mistakes_are_found_before_the_work(play: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing may be imagined")

    monkeypatch.setattr(world_model, "evaluate_fidelity", never)

    def run(model: Any = None, **options: Any) -> None:
        given: dict[str, Any] = {"data": (str(play),), "world_model": "null", "out": str(tmp_path / "o"), **options}
        evaluate_world_model(EvaluateWorldModelConfig(**given), world_model=model)

    with pytest.raises(InvalidOptionError, match="--data FOLDER"):
        run(data=())
    with pytest.raises(InvalidOptionError, match="batch_size=0"):
        run(batch_size=0)
    with pytest.raises(InvalidOptionError, match="horizon=4 is less than one chunk"):
        run(horizon=4)
    with pytest.raises(CheckpointError, match="alexnet-owt"):
        run(lpips=str(tmp_path))
    with pytest.raises(CheckpointError, match="i3d_torchscript.pt"):
        run(fvd=str(tmp_path / "i3d_torchscript.pt"))
    with pytest.raises(AssertionError, match="imagined"):
        run()
