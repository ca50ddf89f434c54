"""Training a judge: windows, balance, held-out pairs, imagined clips, and a run on drawn scenes: it learns, it resumes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rawdream_env.data import schema
from rawdream_env.data.lerobot import LeRobotWriter
from rawdream_env.errors import CheckpointError, DatasetError
from rawdream_env.evaluation.judges.report import JudgeClip, JudgeReport, evaluate
from rawdream_env.files import load_safetensors, save_safetensors
from rawdream_env.judges import load_judge
from rawdream_env.judges.embedded_network import EmbeddedJudgeConfig
from rawdream_env.piper.goals import GOAL_NAMES, HELD_OUT_JUDGE_PAIRS, TASK_PAIRS
from rawdream_env.piper.hindsight import GRAMMAR
from rawdream_env.piper.relations import OBJECTS, RELATION_NAMES, SHAPES, relations
from rawdream_env.trainers.judge.clips import (
    UNKNOWN,
    ClipSet,
    QuestionSampler,
    episode_windows,
    examination,
    goal_objects,
    imagined_clips,
    instruction_for,
    is_held_out,
    merge,
    positions_of,
    recorded_clips,
    split,
)
from rawdream_env.trainers.judge.config import JudgeTrainConfig
from rawdream_env.trainers.judge.dream_clips import DreamClipsConfig, make_dream_clips
from rawdream_env.trainers.judge.losses import answer_loss, look_imagined, place_loss
from rawdream_env.trainers.judge.train import train_judge
from rawdream_env.types import Judge
from rawdream_env.world_models.null import NullWorldModel
from tests.killing import kill_at_random_moments

MODEL = EmbeddedJudgeConfig(frame_size=32, stem=16, mid=16, deep=24, width=32, heads=2, layers=2, text_layers=1)
COLOURS = np.array(
    [[40, 60, 230], [220, 40, 40], [90, 90, 90], [30, 30, 30], [230, 220, 90], [60, 200, 90], [240, 130, 220]]
)
ROWS = 25


def draw(poses: np.ndarray) -> np.ndarray:
    """A top view: one coloured square an object, the highest on top, smaller when it lies below the next."""
    picture = np.full((32, 32, 3), 160, dtype=np.uint8)
    for index in np.argsort(np.nan_to_num(poses[:, 2], nan=-1)):
        if np.isnan(poses[index, 0]):
            continue
        row, column = int((poses[index, 0] - 0.18) * 125), int((poses[index, 1] + 0.12) * 125)
        half = 2 if OBJECTS[index] in ("blue_block", "red_block", "cup", "spoon") else 4
        picture[max(0, row - half) : row + half + 1, max(0, column - half) : column + half + 1] = COLOURS[index]
    return picture


def episode(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Blocks and a cup; half-way one is put onto another, or beside it. Frames, poses and relations of every row."""
    rng = np.random.default_rng(seed)
    names = ["blue_block", "red_block", "cup"]
    poses = np.full((ROWS, 7, 7), np.nan)
    places = rng.permutation([(0.24, -0.06), (0.30, 0.0), (0.36, 0.06)]) + rng.normal(0, 0.008, (3, 2))
    for name, place in zip(names, places, strict=True):
        poses[:, OBJECTS.index(name)] = [*place, SHAPES[name].half[2], 1, 0, 0, 0]
    a, b = (OBJECTS.index(name) for name in rng.permutation(names)[:2])
    when = int(rng.integers(8, 16))
    if rng.random() < 0.6:
        top = poses[0, b, 2] + SHAPES[OBJECTS[b]].half[2] + SHAPES[OBJECTS[a]].half[2]
        poses[when:, a, :3] = [*poses[0, b, :2], top]
    else:
        poses[when:, a, 1] += rng.choice([-0.05, 0.05])
    truth = relations(poses, np.full(ROWS, 0.07), np.tile([0.3, 0.0, 0.25], (ROWS, 1)))
    return np.stack([draw(p) for p in poses]), poses, truth


def write_data(root: Path, episodes: int) -> str:
    """A LeRobot folder of drawn episodes."""
    features = {
        schema.ACTION_KEY: schema.numeric_feature(7), schema.STATE_KEY: schema.numeric_feature(7),
        "privileged.object_poses": schema.numeric_feature(49),
        "privileged.relations": schema.numeric_feature(len(RELATION_NAMES)),
    }  # fmt: skip
    writer = LeRobotWriter(root, fps=10, image_shape=(32, 32, 3), features=features)
    for seed in range(episodes):
        frames, poses, truth = episode(seed)
        zeros = np.zeros((ROWS, 7), np.float32)
        privileged = {"object_poses": poses.reshape(ROWS, 49), "relations": truth}
        writer.add_episode(frames, zeros[1:], zeros, "play", privileged)
    writer.finalize()
    return str(root)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Drawn episodes on disk, once."""
    return write_data(tmp_path_factory.mktemp("data") / "play", 160)


@pytest.fixture(scope="module")
def clips(folder: str) -> ClipSet:
    """Their windows, once."""
    return recorded_clips([folder], seed=0)


def write_dreams(path: Path, n: int = 6, *, truth: bool = False, **changes: object) -> Path:
    """A folder with one file of imagined clips."""
    path.mkdir(parents=True, exist_ok=True)
    told = [episode(1000 + i) for i in range(n)]
    tensors = {
        "frames": torch.from_numpy(np.stack([t[0] for t in told])),
        "labels": torch.tensor([i % 2 for i in range(n)], dtype=torch.uint8),
    }
    if truth:
        tensors["object_poses"] = torch.from_numpy(np.stack([np.nan_to_num(t[1][[0, -1]]) for t in told])).float()
        tensors["relations"] = torch.from_numpy(np.stack([t[2][[0, -1]] for t in told]).astype(np.uint8))
    tensors |= {key: value for key, value in changes.items() if isinstance(value, torch.Tensor)}
    texts = changes.get("instructions", ["stack the blue block onto the red block", "lift the cup"] * (n // 2))
    save_safetensors(path / "part-0.safetensors", tensors, {"instructions": json.dumps(texts)})
    return path


# -- windows and labels -----------------------------------------------------------------------------------------------


def test_windows_are_whole_chunks_and_gather_around_what_happened() -> None:
    placed = np.zeros((129, 2), dtype=bool)
    placed[50:, 1] = True
    windows = episode_windows(placed, np.random.default_rng(0), stride=16)
    assert windows.min() >= 0 and windows.max() <= 128
    length = windows[:, 1] - windows[:, 0]
    assert set(length % 8) == {0} and length.min() >= 8 and length.max() <= 64
    assert {(0, 8 * k) for k in range(1, 9)} <= {(int(a), int(b)) for a, b in windows}
    ends = windows[:, 1]
    assert ((ends >= 38) & (ends < 50)).sum() >= 3 and ((ends >= 50) & (ends < 75)).sum() >= 4
    assert len(episode_windows(placed[:8], np.random.default_rng(0), 4)) == 0


def test_labels_say_what_happened(clips: ClipSet) -> None:
    assert clips.goals == GOAL_NAMES and clips.frames.shape == (160 * ROWS, 32, 32, 3)
    for window in range(0, len(clips), 97):
        number = int(clips.episodes[window])
        first, last = clips.spans[window] - number * ROWS
        _, _, truth = episode(number)
        for name in ("on:blue_block:red_block", "on:cup:blue_block"):
            column = RELATION_NAMES.index(name)
            expected = UNKNOWN if truth[first, column] else int(truth[last, column])
            assert clips.labels[window, clips.goals.index(name)] == expected
        assert clips.labels[window, clips.goals.index("in:spoon:bowl")] == UNKNOWN  # neither is in the scene
    assert (clips.rows(np.arange(len(clips)))[:, [0, -1]] == clips.spans).all()
    assert len(clips.video(0).frames) == clips.spans[0, 1] - clips.spans[0, 0] + 1


def test_split_keeps_episodes_whole_and_merge_keeps_them_apart(clips: ClipSet) -> None:
    train, held = split(clips, 0.25, seed=0, salt=7)
    assert len(train) + len(held) == len(clips) and len(held) > 0
    assert not set(train.episodes) & set(held.episodes)
    assert 0.1 < len(set(held.episodes)) / 160 < 0.4
    both = merge([train, held])
    assert len(set(both.episodes)) == 160
    assert (both.video(len(train)).frames == held.video(0).frames).all()


# -- questions --------------------------------------------------------------------------------------------------------


def test_held_out_pairs_are_never_asked_in_training_and_are_apart_in_the_report(clips: ClipSet) -> None:
    assert not any(is_held_out(f"on:{a}:{b}", GRAMMAR) for a, b in TASK_PAIRS)
    assert is_held_out("on:red_block:cup", GRAMMAR) and is_held_out("near:red_block:cup", GRAMMAR)
    assert not is_held_out("on:blue_block:red_block", GRAMMAR) and not is_held_out("lifted:cup", GRAMMAR)
    batch = QuestionSampler(clips, 6).draw(np.random.default_rng(0), 500)
    asked = {goal_objects(clips.goals[goal], GRAMMAR) for goal in batch.goals.ravel()}
    assert not asked & set(HELD_OUT_JUDGE_PAIRS) and ("blue_block", "red_block") in asked
    report = examination(clips, 10, seed=0)
    apart = {clip.relation for clip in report if clip.held_out}
    assert "on:red_block:cup" in apart and "on:blue_block:red_block" not in apart
    words = [clip.instruction for clip in report if clip.relation == "on:red_block:cup"]
    assert len(set(words)) > 3 and all("red block" in text and "cup" in text for text in words)


def test_questions_are_right_balanced_and_hard(clips: ClipSet) -> None:
    sampler = QuestionSampler(clips, 6)
    sampler.balance(0)
    batch = sampler.draw(np.random.default_rng(1), 2000)
    truth = clips.labels[batch.windows[:, None], batch.goals]
    assert (truth != UNKNOWN).all() and (truth == batch.labels).all()
    assert 0.42 < batch.labels[:, 0].mean() < 0.58
    weight = sampler.weights[batch.labels.astype(int), batch.goals]
    column = clips.goals.index("on:blue_block:red_block")
    here = batch.goals == column
    yes, no = (weight[here & (batch.labels == value)].sum() for value in (1, 0))
    assert 0.75 < yes / no < 1.33
    leading = batch.goals[:, 0] == column
    failed = batch.windows[leading & (batch.labels[:, 0] == 0)]
    swapped = clips.labels[failed][:, clips.goals.index("on:cup:red_block")] == 1
    assert swapped.mean() > clips.labels[:, clips.goals.index("on:cup:red_block")].clip(0).mean()
    again = sampler.draw(np.random.default_rng(1), 2000)
    assert (again.goals == batch.goals).all() and (again.windows == batch.windows).all()


def test_positions_belong_to_the_objects_named(clips: ClipSet) -> None:
    windows = np.array([5, 60])
    goals = np.array([[clips.goals.index("on:cup:red_block"), clips.goals.index("lifted:cup")]] * 2)
    places = positions_of(clips, clips.rows(windows), goals)
    assert places.shape == (2, 2, 6, 2, 3)
    number = int(clips.episodes[60])
    _, poses, _ = episode(number)
    last = int(clips.spans[60, 1]) - number * ROWS
    np.testing.assert_allclose(places[1, 0, -1, 0], poses[last, OBJECTS.index("cup"), :3], atol=1e-6)
    np.testing.assert_allclose(places[1, 0, -1, 1], poses[last, OBJECTS.index("red_block"), :3], atol=1e-6)
    assert np.isnan(places[1, 1, :, 1]).all() and not np.isnan(places[1, 1, :, 0]).any()


# -- imagined clips ---------------------------------------------------------------------------------------------------


def test_imagined_clips_ask_their_own_words_and_with_truth_everything(tmp_path: Path) -> None:
    plain = imagined_clips(write_dreams(tmp_path / "plain"))
    assert plain.source == "dream" and len(plain) == 6
    column = plain.goals.index("text:lift the cup")
    assert plain.labels[:, column].tolist() == [UNKNOWN, 1] * 3
    assert instruction_for("text:lift the cup", GRAMMAR, np.random.default_rng(0)) == "lift the cup"
    rich = imagined_clips(write_dreams(tmp_path / "rich", truth=True))
    _, _, truth = episode(1002)
    name = "on:blue_block:cup"
    expected = int(truth[-1, RELATION_NAMES.index(name)])
    assert rich.labels[2, rich.goals.index(name)] == expected
    assert rich.labels[2, rich.goals.index("in:spoon:bowl")] == UNKNOWN
    united = merge([plain, rich])
    assert united.labels[6, united.goals.index(name)] == rich.labels[0, rich.goals.index(name)]
    assert united.labels[0, united.goals.index(name)] == UNKNOWN


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": torch.zeros(6, 5, 8, 8, 3)}, "uint8"),
        ({"labels": torch.zeros(5, dtype=torch.uint8)}, "6 labels"),
        ({"instructions": ["go"]}, "6 instructions"),
        ({"instructions": {"a": 1}}, "6 instructions"),
        ({"object_poses": torch.zeros(6, 7, 7), "relations": torch.zeros(6, 2, 1)}, "do not fit"),
    ],
)
def test_bad_imagined_files_are_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(DatasetError, match=f"part-0.safetensors.*{message}"):
        imagined_clips(write_dreams(tmp_path, **changes))
    with pytest.raises(DatasetError, match="no \\*.safetensors"):
        imagined_clips(tmp_path / "nothing")


def test_imagining_is_resumed_with_the_same_world_model_alone(folder: str, tmp_path: Path) -> None:
    class Other(NullWorldModel):
        pass

    config = DreamClipsConfig(folder, str(tmp_path), clips=4, clips_per_file=2, progress=False)
    make_dream_clips(config, world_model=NullWorldModel((32, 32, 3)))
    written = {path: path.read_bytes() for path in tmp_path.glob("clips-*.safetensors")}
    next(iter(written)).unlink()
    make_dream_clips(config, world_model=NullWorldModel((32, 32, 3)))
    assert {path: path.read_bytes() for path in tmp_path.glob("clips-*.safetensors")} == written
    assert len(imagined_clips(tmp_path)) == 4
    with pytest.raises(DatasetError, match="was imagined with world_model_fingerprint='NullWorldModel "):
        make_dream_clips(config, world_model=Other((32, 32, 3)))


def test_look_imagined_is_keyed_and_keeps_the_start_sharp() -> None:
    torch.manual_seed(0)
    frames = torch.randint(0, 256, (8, 6, 32, 32, 3), dtype=torch.uint8)
    first, second = (look_imagined(frames, 1.0, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second) and first.min() >= 0 and first.max() <= 255
    roughness = (first[:, :, 1:] - first[:, :, :-1]).abs().mean(dim=(2, 3, 4))
    assert (roughness[:, 0] > 1.15 * roughness[:, 1:].mean(1)).float().mean() > 0.7
    plain = look_imagined(frames, 0.0, torch.Generator().manual_seed(3))
    assert (plain - frames).abs().mean() < 15


def test_losses_by_hand() -> None:
    logits, labels = torch.tensor([[0.0, 2.0]], dtype=torch.float64), torch.tensor([[1.0, 0.0]])
    expected = (0.5 * np.log(2.0) + 2.0 * (2.0 + np.log1p(np.exp(-2.0)))) / 2
    assert float(answer_loss(logits, labels, torch.tensor([[0.5, 2.0]]))) == pytest.approx(expected, rel=1e-6)
    found = torch.tensor([[0.30, 0.0, 0.0], [9.0, 9.0, 9.0]])
    truth = torch.tensor([[0.30, 0.10, 0.01], [float("nan")] * 3])  # 0, 2 and 0.2 units off
    assert float(place_loss(found, truth)) == pytest.approx((0.0 + (2.0 - 0.5) + 0.5 * 0.2**2) / 3, rel=1e-5)
    assert float(place_loss(found[1:], truth[1:])) == 0.0


# -- the run ----------------------------------------------------------------------------------------------------------


def config(folder: str, out: Path, **changes: object) -> JudgeTrainConfig:
    """A run of seconds."""
    base = JudgeTrainConfig(
        data=(folder,), run_dir=str(out), steps=12, batch_size=8, questions=4, warmup=5, save_every=6, bf16=False,
        validation_share=0.2, per_goal=8, model=MODEL, lr=3e-3,
    )  # fmt: skip
    return replace(base, **changes)  # type: ignore[arg-type]


@pytest.mark.slow
def test_it_learns_who_is_on_whom(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rawdream_env.trainers.judge import train as module

    held_out: list[JudgeClip] = []

    def evaluate_and_keep(judge: Judge, clips: list[JudgeClip]) -> JudgeReport:
        held_out.extend(clips)
        return evaluate(judge, clips)

    monkeypatch.setattr(module, "evaluate", evaluate_and_keep)
    settings = config(folder, tmp_path / "run", steps=360, batch_size=16, questions=6, augment=0.2, warmup=30, ema=0.97)
    result = train_judge(settings, progress=False)
    verdicts = result.judge([clip.video for clip in held_out], [clip.instruction for clip in held_out])
    answers = [
        ((verdict.probability or 0.0) >= 0.5) == clip.label
        for clip, verdict in zip(held_out, verdicts, strict=True)
        if clip.relation.startswith("on:") and not clip.held_out
    ]
    assert len(answers) > 40 and np.mean(answers) > 0.8, result.report.table(("kind", "relation on"))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["steps"] == 360 and metrics["threshold"] == result.judge.threshold
    on = metrics["groups"]["kind on"]["precision"]
    assert on["low"] <= on["value"] <= on["high"] and on["n"] > 0
    assert metrics["groups"]["held-out pairs"]["n"] > 0 and len(metrics["threshold_sweep"]) > 10
    again = load_judge(result.folder)
    clip = held_out[0]
    ours = result.judge([clip.video], [clip.instruction])
    assert again([clip.video], [clip.instruction])[0].probability == ours[0].probability


def test_a_stopped_run_continues_bit_identically(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train_judge(config(folder, tmp_path / "whole"), progress=False)

    from rawdream_env.trainers.judge import train as module

    loss = module._loss

    def killed(settings: JudgeTrainConfig, *rest: object) -> object:
        if rest[-1] == 9:
            raise KeyboardInterrupt
        return loss(settings, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        train_judge(config(folder, tmp_path / "cut"), progress=False)
    monkeypatch.setattr(module, "_loss", loss)
    resumed = train_judge(config(folder, tmp_path / "cut"), progress=False)
    ours, theirs = (load_safetensors(r.folder / "model.safetensors") for r in (whole, resumed))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def train_from(run_dir: Path, folder: str) -> None:
    train_judge(config(folder, run_dir), progress=False)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_bit_identical(folder: str, tmp_path: Path) -> None:
    unbroken, killed = kill_at_random_moments("test_judge_training:train_from", tmp_path, folder)
    last = "checkpoints/step_00000012/manifest.json"
    hashes = [json.loads((run / last).read_text())["files"]["tensors.safetensors"] for run in (unbroken, *killed)]
    assert all(found == hashes[0] for found in hashes)


def test_imagined_clips_join_the_training_and_the_report(folder: str, tmp_path: Path) -> None:
    dreams = write_dreams(tmp_path / "dreams", n=40, truth=True)
    result = train_judge(config(folder, tmp_path / "run", imagined=(str(dreams),), steps=4), progress=False)
    assert {"source simulator", "source dream"} <= set(result.report.rows)
    more = train_judge(config(folder, tmp_path / "more", init=str(result.folder), steps=1, lr=0.0), progress=False)
    ours, theirs = (load_safetensors(r.folder / "model.safetensors") for r in (result, more))
    assert all(torch.allclose(ours[name], theirs[name]) for name in ours)


def test_data_without_anything_to_learn_are_refused(tmp_path: Path) -> None:
    few = write_data(tmp_path / "few", 1)
    with pytest.raises(DatasetError, match="training and .* held-out simulator clips"):
        train_judge(config(few, tmp_path / "run"), progress=False)
    still = recorded_clips([few], seed=0)
    nothing = replace(still, labels=np.where(still.labels == 1, 0, still.labels))
    with pytest.raises(DatasetError, match="no goal with both successes and failures"):
        QuestionSampler(nothing, 2)


def test_frames_of_another_size_than_the_networks_are_refused_before_training(folder: str, tmp_path: Path) -> None:
    side = MODEL.frame_size
    wrong = config(folder, tmp_path / "run", model=replace(MODEL, frame_size=side // 2))
    with pytest.raises(
        DatasetError, match=f"frames of {side}x{side} .* looks at {side // 2}x{side // 2}.*frame-size {side}"
    ):
        train_judge(wrong, progress=False)
    assert not (tmp_path / "run").exists()
    clips = recorded_clips([folder], seed=0)
    with pytest.raises(DatasetError, match="frames of different sizes"):
        merge([clips, replace(clips, frames=clips.frames[:, ::2, ::2])])


@pytest.mark.parametrize(
    "sizes", [{"mid": 50}, {"deep": 12}, {"heads": 0}, {"heads": 3}, {"frame_size": 0}, {"layers": -1}, {"text_len": 0}]
)
def test_sizes_that_cannot_be_built_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(CheckpointError, match="The judge's sizes do not fit"):
        EmbeddedJudgeConfig(**sizes)
