"""Collected episodes of LIBERO: complete, flagged, the same after an interruption; experts that solve their tasks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rawdream_env.data.collect import CollectConfig, collect
from rawdream_env.data.lerobot import LeRobotReader
from rawdream_env.envs.episodes import EpisodeRequest, make_env, run_episodes
from rawdream_env.errors import InvalidOptionError
from rawdream_env.libero.collect import LiberoSource
from rawdream_env.libero.envs import LiberoSimVectorEnv
from rawdream_env.libero.experts import SCRIPTS, LiberoExpert
from rawdream_env.libero.protocols import find_protocol
from rawdream_env.policies.random import RandomPolicy
from rawdream_env.seeding import NoiseKey
from rawdream_env.trainers.world_model.config import StageConfig, WorldModelTrainConfig
from rawdream_env.trainers.world_model.train import train_world_model
from rawdream_env.world_models.wan.config import WanConfig
from tests.libero.conftest import SIDE

TASKS = tuple(SCRIPTS)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def config(out: Path, **options) -> CollectConfig:
    given = {"robot": "libero_goal", "kind": "random", "episodes": 2, "steps_per_episode": 10, "action_noise": 0.1}
    return CollectConfig(str(out), image_size=SIDE, progress=False, **{**given, **options})


def test_an_episode_is_what_the_simulator_shows(group, tmp_path) -> None:
    reader = LeRobotReader(collect(config(tmp_path / "data", tasks=TASKS[:2])))
    assert (len(reader), reader.fps, reader.robot_type) == (2, 20.0, "libero_goal")
    assert [reader.task(i) for i in range(2)] == [name.replace("_", " ") for name in TASKS[:2]]
    assert [entry.success for entry in reader.meta.entries] == [False, False]
    episode = reader.episode(1)
    assert episode.actions.shape == (16, 7) and len(episode.frames) == 17  # whole chunks


def test_frames_and_states_are_those_of_the_environment(group, tmp_path) -> None:
    source = LiberoSource(config(tmp_path, tasks=TASKS[:1]))
    options = {"max_episode_steps": 2, "image_size": SIDE, "return_frames": True}
    env = LiberoSimVectorEnv(suite="libero_goal", init_states="train", **options)
    try:
        written, success = source.attempt(0, 4007)
        task = [name for name, _ in env.tasks].index(TASKS[0])
        start = env.start_at(task, find_protocol("raw-dream", "libero_goal").scene(4007, "train"))
        frames, states = [env.reset(options={"starts": [start]})[0]["image"]], [env.start_of(0).proprio[None]]
        for chunk in written.actions.reshape(2, 1, 8, 7):
            infos = env.step(chunk)[4]
            frames.append(infos["frames"][0])
            states.append(infos["proprio"][0])
    finally:
        env.close()
        source.close()
    assert np.array_equal(written.frames, np.concatenate(frames)) and not success and written.success is False
    assert np.array_equal(written.state, np.concatenate(states)) and len(np.unique(written.state[:, 0])) == 17
    assert np.abs(written.actions).max() == 1 and written.task == TASKS[0].replace("_", " ")


def test_what_cannot_be_collected_is_named(libero, tmp_path) -> None:
    with pytest.raises(InvalidOptionError, match="LIBERO has no play"):
        collect(config(tmp_path / "a", kind="play"))
    with pytest.raises(InvalidOptionError, match="the scripted experts solve .* asked for put_the_bowl_on_the_stove"):
        collect(config(tmp_path / "b", kind="expert", tasks=("put_the_bowl_on_the_stove",)))
    with pytest.raises(InvalidOptionError, match="the scripted experts solve .* asked for libero_spatial"):
        collect(config(tmp_path / "c", kind="expert", robot="libero_spatial"))
    assert not any(tmp_path.iterdir())


def test_a_random_policy_fills_the_box() -> None:
    keys = [NoiseKey(3), NoiseKey(4)]
    output = RandomPolicy(chunk_len=32).act(np.zeros((2, 8, 8, 3), np.uint8), ["a", "b"], temperature=1.0, keys=keys)
    assert output.actions.shape == (2, 32, 7) and output.actions.abs().max() <= 1
    assert (
        output.actions.std() == pytest.approx(1 / 3**0.5, abs=0.05)
        and not (output.actions[0] == output.actions[1]).all()
    )


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_an_expert_solves_its_task(group, task: str) -> None:
    env = make_env("rawdream/LiberoGoalSim-v0", 2, task=task, image_size=SIDE)
    number = [name for name, _ in env.unwrapped.tasks].index(task)
    requests = [EpisodeRequest(env.unwrapped.start_at(number, i), i, NoiseKey(i)) for i in range(20)]
    solved = sum(rollout.success_any for rollout in run_episodes(env, requests, LiberoExpert()))
    env.close()
    assert solved >= 16


@pytest.mark.slow
def test_killed_and_resumed_equals_unbroken_and_trains_a_dream(group, tmp_path) -> None:
    options = {"kind": "expert", "episodes": 20, "steps_per_episode": 32, "action_noise": 0.3, "episodes_per_shard": 3}
    whole = Path(collect(config(tmp_path / "whole", **options)))
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    words += ["--robot=libero_goal", f"--image-size={SIDE}", f"--out={tmp_path / 'killed'}", "--workers=1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "rawdream_env", "data", "collect", *words], start_new_session=True
    )
    deadline = time.monotonic() + 1800
    while len(list((tmp_path / "killed").glob("meta/episodes/*/*"))) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = files(tmp_path / "killed")
    assert len(before) < len(files(whole))
    collect(config(tmp_path / "killed", workers=1, **options))
    assert files(tmp_path / "killed") == files(whole)
    reader = LeRobotReader(whole)
    assert len(reader) == 20 and sorted(reader.tasks) == sorted(name.replace("_", " ") for name in TASKS)

    model = train_world_model(
        WorldModelTrainConfig(
            data=(str(whole),),
            run_dir=str(tmp_path / "run"),
            objective="window",
            codec="embedded",
            model=WanConfig(pose_dim=0),
            transformer=StageConfig(steps=2, batch_size=2, lr=1e-3),
        )
    )
    dream = make_env("rawdream/LiberoGoalDream-v0", 2, world_model=str(model), judge="none", max_episode_steps=2)
    try:
        observation, infos = dream.reset(seed=0)
        sim = dream.unwrapped.starts
        start = sim.sample(NoiseKey(0))
        assert np.array_equal(observation["image"][0], start.frame) and infos["instruction"][0] == start.instruction
        imagined, *_, infos = dream.step(np.zeros((2, 8, 7), np.float32))
        assert infos["valid"].all() and not np.array_equal(imagined["image"], observation["image"])
    finally:
        dream.close()
