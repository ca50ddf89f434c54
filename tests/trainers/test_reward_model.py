"""The VideoMAE reward model: scanning, checkpoints, encoders of transformers, and training from a few demonstrations."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rawdream_env.data import schema
from rawdream_env.data.lerobot import EpisodeData, ShardWriter
from rawdream_env.errors import CheckpointError, DatasetError, InvalidOptionError
from rawdream_env.files import load_safetensors
from rawdream_env.judges import load_judge
from rawdream_env.judges.videomae import (
    VideoMAEJudge,
    VideoMAEJudgeConfig,
    VideoMAENetwork,
    from_transformers,
    scan_starts,
)
from rawdream_env.trainers.judge import reward_model
from rawdream_env.trainers.judge.config import RewardModelConfig, RewardModelSize
from rawdream_env.trainers.judge.reward_model import batch, load_windows
from rawdream_env.types import Judge, Outcome, Video

TASKS = ("paint it red", "paint it blue")
SIZES: dict[str, int] = {
    "image_size": 16, "patch_size": 8, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2,
}  # fmt: skip
CONFIG = VideoMAEJudgeConfig(TASKS, **SIZES)


@pytest.fixture
def judge() -> VideoMAEJudge:
    torch.manual_seed(0)
    return VideoMAEJudge(VideoMAENetwork(CONFIG), metadata={"steps": 3})


def video(frames: int = 20, seed: int = 0, size: int = 16) -> Video:
    return Video(np.random.default_rng(seed).integers(0, 256, (frames, size, size, 3), dtype=np.uint8), 10.0)


def test_scanning_covers_the_video_and_ends_with_it() -> None:
    assert scan_starts(20, 4) == [0, 4, 8, 12] and scan_starts(22, 4) == [0, 4, 8, 12, 14]
    assert scan_starts(8, 4) == scan_starts(2, 4) == [0]


def test_the_first_window_above_the_threshold_is_the_success(
    judge: VideoMAEJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = np.array([0.1, 0.6, 0.2, 0.9])
    monkeypatch.setattr(judge, "window_probabilities", lambda frames, task, starts: found[: len(starts)])
    verdict = judge([video()], [TASKS[1]])[0]
    assert verdict.outcome is Outcome.SUCCESS and "frames 4 to 11" in verdict.reason and verdict.probability == 0.9
    judge.threshold = 0.95
    verdict = judge([video()], [TASKS[1]])[0]
    assert verdict.outcome is Outcome.FAILURE and "the best has 0.900" in verdict.reason
    found[2] = math.nan
    assert judge([video()], [TASKS[1]])[0].outcome is Outcome.INVALID


def test_it_is_a_judge_and_what_it_cannot_know_is_invalid(judge: VideoMAEJudge) -> None:
    assert isinstance(judge, Judge)
    clips = [video(), video(3, 1), video(30, 2, 33), video(1), video()]
    texts = [TASKS[0], " Paint it  BLUE ", TASKS[1], TASKS[0], "fold it"]
    first, second = judge(clips, texts), judge(clips, texts)
    assert [v.probability for v in first] == [v.probability for v in second]
    assert [v.outcome is Outcome.INVALID for v in first] == [False, False, False, True, True]
    assert "not trained on 'fold it'" in first[4].reason and "1 frames" in first[3].reason
    other = judge([video()], [TASKS[1]])[0].probability
    assert other != first[0].probability  # the task matters


def test_round_trip_and_damaged_folders(judge: VideoMAEJudge, tmp_path: Path) -> None:
    judge.threshold = 0.7
    folder = judge.save_pretrained(tmp_path)
    again = load_judge(folder)
    assert isinstance(again, VideoMAEJudge) and again.threshold == 0.7 and again.metadata == {"steps": 3}
    assert again([video()], [TASKS[0]])[0].probability == judge([video()], [TASKS[0]])[0].probability
    good = json.loads((folder / "config.json").read_text())
    changes: list[dict[str, Any]] = [
        {"tasks": "go"}, {"tasks": ["go", "GO"]}, {"hidden_size": True}, {"hidden_size": 10**9}, {"threshold": 1},
        {"patch_size": 7}, {"colour": 1}, {"hidden_size": 32},
    ]  # fmt: skip
    for change in changes:
        (folder / "config.json").write_text(json.dumps({**good, "model": {**good["model"], **change}}))
        with pytest.raises(CheckpointError):
            load_judge(folder)
    (folder / "config.json").write_text(json.dumps({**good, "kind": "other"}))
    with pytest.raises(CheckpointError, match="kind='other'"):
        load_judge(folder)


def test_an_encoder_of_transformers_is_taken_over_from_a_local_folder(tmp_path: Path) -> None:
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    sizes = {name: value for name, value in SIZES.items() if name != "tasks"}
    theirs = VideoMAEForVideoClassification(VideoMAEConfig(num_frames=16, tubelet_size=2, **sizes))
    theirs.save_pretrained(tmp_path / "mae")
    network = from_transformers(tmp_path / "mae", TASKS)
    assert network.config == CONFIG
    wanted = theirs.state_dict()["videomae.encoder.layer.0.attention.attention.query.weight"]
    assert torch.equal(network.state_dict()["videomae.encoder.layer.0.attention.attention.query.weight"], wanted)
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match="no VideoMAE folder"):
            from_transformers(folder, TASKS)


# -- training ---------------------------------------------------------------------------------------------------------


def demonstrations(root: Path, per_task: int = 3, frames: int = 40) -> str:
    """Grey scenes that turn into their task's colour on the way."""
    features = {
        schema.STATE_KEY: schema.numeric_feature(1, ["x"]),
        schema.ACTION_KEY: schema.numeric_feature(7, list("abcdefg")),
    }
    writer = ShardWriter(str(root), fps=10.0, image_shape=(16, 16, 3), features=features)
    episodes = []
    for index in range(per_task * len(TASKS)):
        task = index % len(TASKS)
        rng = np.random.default_rng(index)
        clip = rng.integers(90, 130, (frames, 16, 16, 3), dtype=np.uint8)
        clip[int(0.6 * frames) :, ..., 0 if task == 0 else 2] = 250
        state, actions = np.zeros((frames, 1), np.float32), np.zeros((frames - 1, 7), np.float32)
        episodes.append(EpisodeData(frames=clip, actions=actions, state=state, task=TASKS[task], privileged={}))
    writer.write(0, episodes, first_episode=0, first_row=0, tasks=TASKS)
    writer.finalize(TASKS, robot_type="toy")
    return str(root)


def config(folder: str, out: Path, **changes: Any) -> RewardModelConfig:
    base = RewardModelConfig(
        (folder,), str(out), steps=60, batch_size=8, lr=3e-3, warmup=5, augment=0.2, save_every=20, progress=False,
        model=RewardModelSize(**SIZES),
    )  # fmt: skip
    return replace(base, **changes)


def test_windows_and_batches_are_what_they_say(tmp_path: Path) -> None:
    settings = config(demonstrations(tmp_path / "demos"), tmp_path / "run", demos_per_task=2)
    windows = load_windows(settings, 16)
    assert windows.demonstrations == 4 and windows.frames.shape == (160, 16, 16, 3)
    position = windows.ends[:, 0] % 40
    assert position.min() == 30 and position.max() == 32  # the last quarter
    assert (windows.beginnings[:, 0] % 40).max() == 8  # ends before frame 16
    clips, tasks, labels = batch(settings, windows, 3)
    again = batch(settings, windows, 3)
    assert clips.shape == (8, 8, 16, 16, 3) and labels.tolist() == [1.0] * 4 + [0.0] * 4
    assert torch.equal(clips, again[0]) and torch.equal(tasks, again[1])
    blue = clips[..., 2].mean((1, 2, 3)) > 180
    assert (blue[:4] == (tasks[:4] == 1)).all()  # ends, asked about their own task
    for changes, message in (({"demos_per_task": 9}, "3 demonstrations of"), ({"beginning": 0.1}, "no window of 8")):
        with pytest.raises(DatasetError, match=message):
            load_windows(replace(settings, **changes), 16)
    with pytest.raises(InvalidOptionError, match="sum to at most 1"):
        replace(settings, beginning=0.9)


def test_it_learns_from_three_demonstrations_and_resumes_bit_identically(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = demonstrations(tmp_path / "demos")
    whole = reward_model.train_reward_model(config(folder, tmp_path / "whole"))
    assert whole.metrics == {"ends_passed": 1.0, "beginnings_passed": 0.0, "other_tasks_passed": 0.0}
    draw = reward_model.batch

    def killed(settings: Any, windows: Any, step: int) -> Any:
        if step == 33:
            raise KeyboardInterrupt
        return draw(settings, windows, step)

    monkeypatch.setattr(reward_model, "batch", killed)
    with pytest.raises(KeyboardInterrupt):
        reward_model.train_reward_model(config(folder, tmp_path / "cut"))
    monkeypatch.setattr(reward_model, "batch", draw)
    resumed = reward_model.train_reward_model(config(folder, tmp_path / "cut"))
    ours, theirs = (load_safetensors(result.folder / "model.safetensors") for result in (resumed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    red = np.full((20, 16, 16, 3), 110, np.uint8)
    red[12:, ..., 0] = 250
    verdicts = load_judge(whole.folder)([Video(red, 10.0)] * 2, list(TASKS))
    assert [v.outcome for v in verdicts] == [Outcome.SUCCESS, Outcome.FAILURE]
