"""The simulator environment: the dream's interface on ground truth."""

from __future__ import annotations

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from rawdream_env.envs.dream import DreamVectorEnv
from rawdream_env.errors import ClosedEnvironmentError, InvalidOptionError
from rawdream_env.piper.envs import PiperSimVectorEnv
from rawdream_env.piper.relations import TASKS
from rawdream_env.piper.starts import make_start_pack
from rawdream_env.starts.base import seed_for
from rawdream_env.starts.export import ExportStartsConfig, export_starts
from rawdream_env.starts.pack import PackStarts
from rawdream_env.testing.check_vector_env import check_vector_env
from rawdream_env.types import Start

pytestmark = pytest.mark.usefixtures("opengl")


def dream(num_envs, **kwargs):
    return DreamVectorEnv(num_envs, world_model="null", judge="scripted", starts="sim", **kwargs)


def test_contract():
    report = check_vector_env(
        lambda num_envs, autoreset_mode: PiperSimVectorEnv(
            num_envs, autoreset_mode=autoreset_mode, max_episode_steps=1
        ),
        modes=("SameStep",),
        num_envs=(1, 2),
        chunks=2,
        strict=True,
        skip=("aliasing", "global_rng"),
    )
    assert not report.skipped


def test_aliasing_and_disabled_mode():
    report = check_vector_env(
        lambda num_envs: PiperSimVectorEnv(
            num_envs, autoreset_mode="Disabled", max_episode_steps=1, return_frames=True
        ),
        num_envs=(2,),
        chunks=2,
        skip=("seeding",),
    )
    assert "autoreset" in report.passed


def test_single_env_passes_gymnasiums_checker():
    env = gym.make("rawdream/PiperSim-v0", render_mode="rgb_array")
    check_env(env.unwrapped, skip_render_check=True, skip_close_check=True)
    assert env.unwrapped.render().shape == (64, 64, 3)
    env.close()


def test_same_interface_and_same_scenes_as_the_dream():
    sim, imagined = PiperSimVectorEnv(2, return_frames=True), dream(2, return_frames=True)
    assert sim.observation_space == imagined.observation_space
    assert sim.action_space == imagined.action_space
    for seed in (0, None):
        (a, info_a), (b, info_b) = sim.reset(seed=seed), imagined.reset(seed=seed)
        assert np.array_equal(a["image"], b["image"])
        assert info_a.keys() == info_b.keys()
        assert np.array_equal(info_a["instruction"], info_b["instruction"])
        assert np.array_equal(sim.start_of(1).proprio, imagined.start_of(1).proprio)
    assert sim.start_of(1).seed == imagined.start_of(1).seed == seed_for(1, 1)
    actions = np.zeros(sim.action_space.shape, np.float32)
    infos, others = sim.step(actions)[4], imagined.step(actions)[4]
    assert infos.keys() - {"lifted", "_lifted"} == others.keys()  # a dream without object states does not know
    assert infos["_lifted"].all() and not infos["lifted"].any()
    assert all(infos[key].dtype == others[key].dtype and infos[key].shape == others[key].shape for key in others)
    assert infos["verdict"].tolist() == [0, 0]


def test_starts_of_the_dream_put_the_simulator_into_their_scenes():
    imagined, sim = dream(2, task="put_spoon"), PiperSimVectorEnv(2)
    first, _ = imagined.reset(seed=11)
    starts = [imagined.start_of(row) for row in range(2)]
    again, infos = sim.reset(seed=5, options={"starts": starts})
    assert np.array_equal(first["image"], again["image"])
    assert infos["instruction"].tolist() == ["put the spoon into the bowl"] * 2
    with pytest.raises(InvalidOptionError, match=r"starts'\]\[1\] has seed None"):
        sim.reset(options={"starts": [None, Start(starts[0].frame, "x", 1)]})


def test_workers_change_nothing():
    actions = np.random.default_rng(0).uniform(-1, 1, (2, 8, 7)).astype(np.float32)
    results = []
    for workers in (0, 2):
        env = PiperSimVectorEnv(2, num_workers=workers, autoreset_mode="SameStep", max_episode_steps=1)
        env.reset(seed=3)
        results.append([env.step(actions) for _ in range(2)])
        env.close()
        with pytest.raises(ClosedEnvironmentError):
            env.step(actions)
    for a, b in zip(*results, strict=True):
        assert np.array_equal(a[0]["image"], b[0]["image"])
        assert np.array_equal(a[4]["final_obs"][1]["image"], b[4]["final_obs"][1]["image"])


def test_the_last_frame_does_not_depend_on_return_frames():
    actions = np.full((1, 8, 7), 0.3, np.float32)
    images = []
    for return_frames in (False, True):
        env = PiperSimVectorEnv(1, return_frames=return_frames)
        env.reset(seed=0)
        observation, _, _, _, infos = env.step(actions)
        images.append(observation["image"])
        assert ("frames" in infos) == return_frames
    assert np.array_equal(images[0], images[1])
    assert np.array_equal(infos["frames"][0, -1], images[1][0])
    assert len(np.unique(infos["frames"][0].reshape(8, -1), axis=0)) > 1, "the arm moves within the chunk"


def test_start_pack_from_the_simulator(tmp_path):
    path = tmp_path / "starts.safetensors"
    assert make_start_pack(path, n_per_task=2, layout="wide", seed=4) == 8
    pack = PackStarts(path)
    assert pack.task_ids.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert pack.instructions == tuple(task.instruction for task in TASKS)
    sim = PiperSimVectorEnv(1, layout="wide")
    observation, _ = sim.reset(options={"starts": [pack[5]]})
    assert np.array_equal(observation["image"][0], pack[5].frame)
    assert np.array_equal(sim.start_of(0).proprio, pack[5].proprio)


def test_start_packs_from_the_command_line(tmp_path):
    out = tmp_path / "packs" / "starts.safetensors"
    config = ExportStartsConfig(out, tasks=("put_spoon",), per_task=2, image_size=48, seed=3)
    pack = PackStarts(export_starts(config))
    assert set(pack.task_ids.tolist()) == {2} and pack.frames.shape == (2, 48, 48, 3)
    assert (pack.provenance["robot"], pack.provenance["seed"], pack.provenance["protocol"]) == ("piper", 3, None)
    assert not np.array_equal(pack.frames[0], pack.frames[1])
    with pytest.raises(InvalidOptionError, match="the options do not fit the starts of 'piper'"):
        export_starts(replace(config, options={"protocol": "rlinf"}))
    with pytest.raises(InvalidOptionError, match="must end with .safetensors"):
        export_starts(replace(config, out=tmp_path / "starts.npz"))


def test_bad_options():
    with pytest.raises(InvalidOptionError, match="stack_block"):
        PiperSimVectorEnv(1, task="fold_towel")
    with pytest.raises(InvalidOptionError, match="num_workers=-1"):
        PiperSimVectorEnv(1, num_workers=-1)
    assert PiperSimVectorEnv(1, task="place the pot on the stove").reset(seed=0)[1]["task_id"][0] == 1
