"""Importing the package is light, registers what exists and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys

import gymnasium as gym
import pytest

import rawdream_env

NULL = {"world_model": "null", "judge": "scripted", "starts": "null"}
SCRIPT = """
import json, sys, time
import gymnasium
begin = time.perf_counter()
import rawdream_env
took = time.perf_counter() - begin
heavy = ("torch", "mujoco", "diffusers", "transformers", "PIL", "pyarrow", "av")
loaded = [name for name in heavy if name in sys.modules]
ids = sorted(name for name in gymnasium.registry if name.startswith("rawdream/"))
from rawdream_env import NoiseKey, Outcome
loaded += [name for name in ("torch", "mujoco") if name in sys.modules]
print(json.dumps({"took": took, "loaded": loaded, "ids": ids}))
"""


def test_import_is_light_and_registers():
    out = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=60)
    result = json.loads(out.stdout)
    assert result["loaded"] == []
    assert result["took"] < 0.5
    assert {"rawdream/Dream-v0", "rawdream/PiperDream-v0", "rawdream/PiperSim-v0"} <= set(result["ids"])


def test_every_registered_entry_point_exists():
    for name, spec in gym.registry.items():
        if name.startswith("rawdream/"):
            assert callable(gym.envs.registration.load_env_creator(spec.entry_point)), name
            assert callable(gym.envs.registration.load_env_creator(spec.vector_entry_point)), name
            assert spec.max_episode_steps is None, "a TimeLimit would truncate twice"


def test_public_names_resolve():
    for name in rawdream_env.__all__:
        assert getattr(rawdream_env, name) is not None
    assert set(rawdream_env.__all__) <= set(dir(rawdream_env))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = rawdream_env.no_such_name


def test_make_vec_options_are_json_and_make_again():
    envs = gym.make_vec("rawdream/Dream-v0", num_envs=3, max_episode_steps=2, autoreset_mode="SameStep", **NULL)
    text = envs.spec.to_json()
    again = gym.make_vec(gym.envs.registration.EnvSpec.from_json(text))
    assert (again.num_envs, again.unwrapped.max_episode_steps) == (3, 2)
    assert again.metadata["autoreset_mode"] == gym.vector.AutoresetMode.SAME_STEP
    assert gym.make_vec("rawdream_env:rawdream/PiperDream-v0", num_envs=2, **NULL).num_envs == 2


def test_make_single_truncates_once_at_its_own_horizon():
    env = gym.make("rawdream/Dream-v0", horizon=3, **NULL)
    env.reset(seed=0)
    steps = 0
    while True:
        _, _, terminated, truncated, info = env.step(env.action_space.sample())
        steps += 1
        if terminated or truncated:
            break
    assert steps == 3
    assert terminated != truncated
    assert info["verdict"] == int(terminated)
