"""Supervised fine-tuning: losses by hand, samples from play and experts, learning, resuming, the simulator's verdict."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rawdream_env.data import schema
from rawdream_env.data.lerobot import LeRobotWriter
from rawdream_env.data.reader import LeRobotReader
from rawdream_env.errors import DatasetError, InvalidOptionError
from rawdream_env.piper.goals import phrases
from rawdream_env.piper.relations import OBJECTS, RELATION_NAMES, TASKS, relation_index
from rawdream_env.policies import load_policy
from rawdream_env.policies.tiny_vla import TinyVLAConfig
from rawdream_env.seeding import NoiseKey
from rawdream_env.trainers.common.run_dir import read_jsonl
from rawdream_env.trainers.policy import demonstrations as demos
from rawdream_env.trainers.policy import sft
from rawdream_env.trainers.policy.batches import draw_batch, jitter_and_blur, load_sources
from rawdream_env.trainers.policy.config import SFTConfig
from rawdream_env.trainers.policy.losses import readout_loss, token_loss
from rawdream_env.trainers.policy.validation import simulator_success
from rawdream_env.types import PolicyOutput

SMALL = TinyVLAConfig(
    stem_channels=16, trunk_channels=16, trunk_blocks=1, width=32, heads=2, decoder_layers=1, bin_rank=16
)
FEATURES = {"action": schema.numeric_feature(7), "observation.state": schema.numeric_feature(7)}
TRUTH = {
    "privileged.object_poses": schema.numeric_feature(49),
    "privileged.relations": schema.numeric_feature(len(RELATION_NAMES)),
}


def dot_frames(places: np.ndarray) -> np.ndarray:
    """Grey frames (N, 64, 64, 3) with a red square whose column is ``places`` in [0, 1]."""
    frames = np.full((len(places), 64, 64, 3), 120, np.uint8)
    for frame, place in zip(frames, places, strict=True):
        column = int(4 + place * 48)
        frame[28:36, column : column + 8] = (220, 30, 30)
    return frames


@pytest.fixture(scope="module")
def expert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three 40-step episodes of two tasks: dx follows the square, dy tells the task, the last 10 steps are idle."""
    return write_experts(tmp_path_factory.mktemp("expert"), 3)


def write_experts(root: Path, per_task: int) -> Path:
    writer = LeRobotWriter(root, fps=10, image_shape=(64, 64, 3), features=FEATURES)
    rng = np.random.default_rng(0)
    for i in range(2 * per_task):
        places = np.full(41, rng.random())
        frames = dot_frames(places)
        frames[30:] = 120  # nothing to see, nothing to do
        actions = np.zeros((40, 7), np.float32)
        actions[:30, 0] = places[:30] * 1.6 - 0.8
        actions[:30, 1] = 0.6 if i % 2 else -0.6
        actions[:, 6] = -1.0
        state = np.zeros((41, 7), np.float32)
        state[:, 0] = places * 0.3
        writer.add_episode(frames, actions, state, TASKS[i % 2].instruction)
    writer.finalize()
    return root


def play_episode(writer: LeRobotWriter, moved: str, goal: str, relation: str) -> None:
    """An open gripper comes down to ``moved`` (rows 0-9), holds and lifts it (10-19), and lets go on or in ``goal``."""
    n = 40
    t = np.arange(n + 1)
    holding = (t >= 10) & (t < 20)
    poses = np.full((n + 1, 7, 7), np.nan, np.float32)
    for name in (moved, goal):
        poses[:, OBJECTS.index(name)] = [0.3, 0.05, 0.02, 1, 0, 0, 0]
    poses[:, OBJECTS.index(goal), 1] = -0.05
    poses[holding, OBJECTS.index(moved), 2] = 0.08
    poses[t >= 20, OBJECTS.index(moved), 1] = -0.05
    truth = np.zeros((n + 1, len(RELATION_NAMES)), np.float32)
    truth[holding, relation_index(f"holding:{moved}")] = 1
    truth[(t >= 12) & (t < 20), relation_index(f"lifted:{moved}")] = 1
    truth[t >= 22, relation_index(relation)] = 1
    state = np.zeros((n + 1, 7), np.float32)
    state[:, :3] = [0.3, 0.05, 0.02]
    state[:10, 2] = 0.02 + 0.01 * (10 - t[:10])
    state[:, 6] = np.where((t >= 9) & (t < 20), 1.0, -1.0)
    actions = np.full((n, 7), 0.25, np.float32)
    actions[:, 6] = state[1:, 6]
    frames = dot_frames(np.linspace(0, 1, n + 1))
    writer.add_episode(frames, actions, state, "play", {"object_poses": poses, "relations": truth})


@pytest.fixture(scope="module")
def play_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("play")
    writer = LeRobotWriter(root, fps=10, image_shape=(64, 64, 3), features=FEATURES | TRUTH)
    for _ in range(3):
        play_episode(writer, "cup", "stove", "on:cup:stove")
        play_episode(writer, "cup", "pot", "in:cup:pot")  # a task's pair: must never be used
    writer.finalize()
    return root


def config(out: Path, *data: Path, **changes: Any) -> SFTConfig:
    base = SFTConfig(
        data=tuple(map(str, data)),
        run_dir=str(out),
        steps=6,
        batch_size=8,
        warmup=2,
        lr=3e-3,
        model=SMALL,
        bf16=False,
        jitter=0.02,
        log_every=1,
        save_every=3,
        held_out=0.3,
    )
    return replace(base, **changes)


# -- losses --------------------------------------------------------------------------------------------------------


def test_token_loss_by_hand() -> None:
    logits = torch.zeros(1, 7, 256)
    logits[0, :, 127] = 3.0  # token 127 is action 0
    zero = torch.full((1, 7), 127)
    expected = np.log(np.exp(3.0) + 255) - 3.0
    assert token_loss(logits, zero, 0.0).item() == pytest.approx(expected, rel=1e-6)
    # Smoothed: the mass w at the centre earns the 3, the rest nothing.
    w = 1 / np.exp(-0.5 * (np.arange(-127, 129) / 2.0) ** 2).sum()
    assert token_loss(logits, zero, 2.0).item() == pytest.approx(np.log(np.exp(3.0) + 255) - 3.0 * w, rel=1e-5)


def test_readout_loss_counts_only_what_is_known() -> None:
    target = torch.full((2, 13), float("nan"))
    target[0, 0] = 0.3  # metres; 3.0 in the head's unit
    readout = torch.full((2, 13), 100.0)
    readout[0, 0] = 2.0  # off by one unit: Huber with beta 0.2 gives 1 - 0.1
    assert readout_loss(readout, target).item() == pytest.approx(0.9, rel=1e-5)
    assert readout_loss(readout, torch.full((2, 13), float("nan"))).item() == 0.0


def test_augment_keeps_geometry_and_is_keyed() -> None:
    frames = torch.from_numpy(dot_frames(np.array([0.1, 0.9])))
    same = jitter_and_blur(frames, np.random.default_rng(0), jitter=0.0, blur_share=0.0)
    assert torch.equal(same, frames) and same.dtype == torch.uint8
    a, b = (jitter_and_blur(frames, np.random.default_rng(4), jitter=0.05, blur_share=0.5) for _ in range(2))
    assert torch.equal(a, b) and not torch.equal(a, frames)
    redness = (a[..., 0].int() - a[..., 1].int()).amax(1).argmax(-1)
    assert 8 <= redness[0] <= 17 and 47 <= redness[1] <= 56  # the square has stayed where it was


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ()}, "data is empty"),
        ({"replay_share": 1.0}, "1.0"),
        ({"steps": 0}, "at least 1"),
        ({"stage": "rl"}, "'rl'"),
    ],
)
def test_bad_options(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        SFTConfig(**({"data": ("x",), "run_dir": "y"} | changes))


# -- samples -------------------------------------------------------------------------------------------------------


def test_chunk_targets_hold_still_after_the_end() -> None:
    actions = np.arange(10 * 7, dtype=np.float32).reshape(10, 7)
    targets = demos.chunk_targets(actions, 2, 6, 8)
    assert targets.shape == (4, 8, 7)
    np.testing.assert_array_equal(targets[0, :4], actions[2:6])
    assert (targets[0, 4:, :6] == 0).all() and (targets[0, 4:, 6] == actions[5, 6]).all()
    np.testing.assert_array_equal(targets[3, 0], actions[5])


def test_play_samples_leave_the_tasks_out(play_folder: Path) -> None:
    (found,) = demos.load_play([str(play_folder)], 8)
    assert {found.goals[g] for g in found.goal} == {"on:cup:stove"}
    assert sorted(set(found.episode)) == [0, 2, 4]
    rng = np.random.default_rng(0)
    sentences = {found.instruction(0, rng) for _ in range(40)}
    assert len(sentences) > 5 and sentences <= set(phrases("on:cup:stove"))
    whole = LeRobotReader(play_folder).load_all()
    kept = demos.play_demonstrations(whole, 8)
    np.testing.assert_array_equal(kept.frames[kept.rows], found.frames[found.rows])  # compact loading changes nothing
    assert len(found.frames) == len(set(kept.rows)) < len(whole.frames)
    np.testing.assert_allclose(found.readout[0, 7:], [0.3, 0.05, 0.02, 0.3, -0.05, 0.02], atol=1e-6)
    np.testing.assert_allclose(found.readout[:, :7], whole.state[kept.rows])
    with pytest.raises(DatasetError, match="none of the 6 play episodes"):
        demos.play_demonstrations(whole, 8, exclude_pairs=[("cup", "stove"), ("cup", "pot")])


def test_expert_samples(expert_folder: Path) -> None:
    (found,) = demos.load_experts([str(expert_folder)], 8, demos_per_task=2)
    assert set(found.goals) == {TASKS[0].instruction, TASKS[1].instruction}
    assert len(np.unique(found.episode)) == 4
    assert len(found) == 4 * (30 + 8)  # the idle tail is cut to one chunk
    assert found.instruction(0, np.random.default_rng(0)) == TASKS[0].instruction
    assert np.isnan(found.readout[:, 7:]).all() and not np.isnan(found.readout[:, :7]).any()
    with pytest.raises(DatasetError, match="3 demonstrations of .*, expected 4. Lower demos_per_task"):
        demos.load_experts([str(expert_folder)], 8, demos_per_task=4)


def test_split_is_by_episode(expert_folder: Path) -> None:
    (found,) = demos.load_experts([str(expert_folder)], 8, demos_per_task=3)
    train, held = found.split(0.3, seed=1)
    assert len(train) + len(held) == len(found) and not set(train.episode) & set(held.episode)
    assert len(set(held.episode)) == 2
    assert len(found.split(0.0, seed=1)[1]) == 0


# -- training ------------------------------------------------------------------------------------------------------


def test_learns_where_and_what(tmp_path: Path) -> None:
    data = write_experts(tmp_path / "data", 16)
    result = sft.train_sft(
        config(
            tmp_path / "run",
            data,
            steps=300,
            batch_size=16,
            save_every=300,
            log_every=10,
            demos_per_task=16,
            ema=0.9,
            blur_share=0.0,
            model=replace(SMALL, trunk_channels=24),
            lr=4e-3,
        ),
        progress=False,
    )
    lines = [line for line in read_jsonl(tmp_path / "run/metrics.jsonl") if "loss" in line]
    assert lines[-1]["loss"] < lines[0]["loss"] - 1.0
    assert result.validation["val_action_error"] < 0.1
    policy = load_policy(tmp_path / "run/policy")
    frames = dot_frames(np.array([0.1, 0.9]))
    for task, dy in ((0, -0.6), (1, 0.6)):
        out = policy.act(frames, [TASKS[task].instruction] * 2, temperature=0.0, keys=[NoiseKey(0)] * 2)
        assert out.actions[1, :4, 0].mean() - out.actions[0, :4, 0].mean() > 0.4  # looks at the square
        assert abs(float(out.actions[:, 0, 1].mean()) - dy) < 0.25  # listens to the sentence
        assert (out.actions[..., 6] < -0.9).all()


def test_pretrain_then_fewshot_with_replay(play_folder: Path, expert_folder: Path, tmp_path: Path) -> None:
    first = sft.train_sft(config(tmp_path / "a", play_folder, stage="pretrain"), progress=False)
    assert first.steps == 6 and {"val_loss", "val_tool_mm", "val_object_mm", "val_goal_mm"} <= set(first.validation)
    few = config(
        tmp_path / "b",
        expert_folder,
        init=str(tmp_path / "a/policy"),
        replay=(str(play_folder),),
        replay_share=0.25,
        lr=1e-6,
        steps=2,
    )
    sources, held_out = load_sources(few, 8)
    batch = draw_batch(sources, few, 0)
    assert [s in {t.instruction for t in TASKS} for s in batch.instructions] == [True] * 6 + [False] * 2
    assert {held_out.goals[g] for g in held_out.goal} == {"on:cup:stove"}
    second = sft.train_sft(few, progress=False)
    for a, b in zip(first.policy.parameters(), second.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0.0)  # it did start from there
    with pytest.raises(InvalidOptionError, match="max_episode|trains TinyVLA|is not a policy"):
        sft.train_sft(replace(few, run_dir=str(tmp_path / "c"), init=3), progress=False)  # type: ignore[arg-type]


def test_resumes_to_identical_weights(expert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sft.train_sft(config(tmp_path / "whole", expert_folder), progress=False)
    compute, calls = sft.compute_losses, []

    def dies(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return compute(*args)

    monkeypatch.setattr(sft, "compute_losses", dies)
    with pytest.raises(KeyboardInterrupt):
        sft.train_sft(config(tmp_path / "cut", expert_folder), progress=False)
    monkeypatch.setattr(sft, "compute_losses", compute)
    resumed = sft.train_sft(config(tmp_path / "cut", expert_folder), progress=False)
    for a, b in zip(whole.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert torch.equal(a, b)
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "cut/metrics.jsonl").read_bytes()


# -- the simulator -------------------------------------------------------------------------------------------------


class Recorder:
    """A policy that holds still and writes down what it was shown."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, int, int], int] = {}

    def act(self, images: Any, instructions: Any, *, temperature: float, keys: Any) -> PolicyOutput:
        for image, sentence, key in zip(images, instructions, keys, strict=True):
            self.seen[sentence, key.seed, key.chunk] = int(image.astype(np.int64).sum())
        actions = torch.zeros(len(keys), 8, 7)
        return PolicyOutput(actions, torch.zeros(len(keys), 56, dtype=torch.long), torch.zeros(len(keys), 56))


def test_success_in_the_simulator_does_not_depend_on_the_batch() -> None:
    together, apart = Recorder(), Recorder()
    rates = simulator_success(together, 3, seed=50, max_episode_steps=2)  # type: ignore[arg-type]
    assert [(name, rate.successes, rate.n) for name, rate in rates.items()] == [(task.name, 0, 3) for task in TASKS]
    assert all(rate.high > 0.5 for rate in rates.values())
    simulator_success(apart, 3, seed=50, max_episode_steps=2, num_envs=2)  # type: ignore[arg-type]
    assert together.seen == apart.seen and len(together.seen) == 4 * 6
    for task in TASKS:  # three different scenes of each
        assert len({together.seen[task.instruction, seed, 0] for seed in (50, 51, 52)}) == 3
