"""A second robot in a few lines: collect, a world model with its kinematics, its dream environment, GRPO in the dream.

The robot is a coloured square that is moved over a plane. What it brings stands between the two lines; docs/second_robot.md
goes through it.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from rawdream_env.data import schema
from rawdream_env.data.collect import CollectConfig, collect
from rawdream_env.data.lerobot import EpisodeData
from rawdream_env.data.reader import LeRobotReader
from rawdream_env.envs.base import ChunkResult, ChunkVectorEnv
from rawdream_env.errors import DatasetError, InvalidOptionError
from rawdream_env.evaluation.side_by_side.evaluate import EvaluateConfig, evaluate
from rawdream_env.judges.scripted import ScriptedJudge
from rawdream_env.policies.tiny_vla import TinyVLA, TinyVLAConfig
from rawdream_env.robots import Robot, find_goals, find_robot, register_robot
from rawdream_env.starts.base import draw_task, find_task, seed_for
from rawdream_env.testing.check_vector_env import check_vector_env
from rawdream_env.trainers.common.run_dir import read_jsonl
from rawdream_env.trainers.grpo.config import GRPOConfig
from rawdream_env.trainers.grpo.grpo import train_grpo
from rawdream_env.trainers.world_model.config import StageConfig, WorldModelTrainConfig
from rawdream_env.trainers.world_model.latent_episodes import with_robot
from rawdream_env.trainers.world_model.train import train_world_model
from rawdream_env.types import Start
from rawdream_env.world_models.autoencoders import AutoencoderConfig
from rawdream_env.world_models.loading import read_world_model
from rawdream_env.world_models.null import NullWorldModel
from rawdream_env.world_models.wan.config import WanConfig

# -- the robot ---------------------------------------------------------------------------------------------------------

SIDE = 32
TASKS = (("left", "move the square to the left"), ("right", "move the square to the right"))


def draw(place: np.ndarray) -> np.ndarray:
    """The square at ``place`` in [-1, 1]^2 on a grey picture."""
    picture = np.full((SIDE, SIDE, 3), 150, np.uint8)
    u, v = ((place + 1) / 2 * (SIDE - 8)).astype(int)
    picture[v : v + 8, u : u + 8] = (200, 40, 40)
    return picture


def move(place: np.ndarray, action: np.ndarray) -> np.ndarray:
    """The first two numbers of an action move the square."""
    return np.clip(place + 0.1 * action[:2], -1, 1).astype(np.float32)


class SquareStarts:
    tasks = TASKS

    def __init__(self, image_size: int = SIDE, layout: str = "narrow") -> None: ...

    def sample(self, key, task=None) -> Start:
        number = draw_task(key, 2) if task is None else find_task(task, *zip(*TASKS, strict=True))
        return self.scene(seed_for(key.seed, key.episode), number)

    def scene(self, seed: int, number: int) -> Start:
        place = np.random.default_rng(seed).uniform(-0.5, 0.5, 2).astype(np.float32)
        return Start(draw(place), TASKS[number][1], number, place, seed)


class SquareSim(ChunkVectorEnv):
    robot, tasks = "square", TASKS

    def __init__(self, num_envs=1, *, task=None, layout="narrow", **options) -> None:
        super().__init__(num_envs, frame_shape=(SIDE, SIDE, 3), chunk_len=8, fps=10.0, **options)
        self.task, self.starts = task, SquareStarts()
        self.first, self.now = np.zeros((2, num_envs, 2), np.float32)

    def _begin(self, rows, keys, given) -> list[Start]:
        starts = [
            self.starts.sample(key, self.task) if start is None else self.starts.scene(start.seed, start.task_id)
            for key, start in zip(keys, given, strict=True)
        ]
        self.first[rows] = self.now[rows] = [start.proprio for start in starts]
        return starts

    def _advance(self, rows, actions, last) -> ChunkResult:
        frames = np.zeros((*actions.shape[:2], SIDE, SIDE, 3), np.uint8)
        for i, row in enumerate(rows):
            for k, action in enumerate(actions[i]):
                self.now[row] = move(self.now[row], action)
                frames[i, k] = draw(self.now[row])
        wanted = np.array([1 if self.task_id[row] else -1 for row in rows])
        success = (self.now - self.first)[rows, 0] * wanted > 0.3
        nothing = np.zeros(len(rows), bool)
        return ChunkResult(frames, success.astype(np.int8), ~nothing, nothing)


class SquareSource:
    fps, robot_type, image_shape, instructions = 10.0, "square", (SIDE, SIDE, 3), ("play",)
    features = {schema.STATE_KEY: schema.numeric_feature(2), schema.ACTION_KEY: schema.numeric_feature(7)}  # noqa: RUF012

    def __init__(self, config: CollectConfig) -> None:
        self.config = replace(config, steps_per_episode=config.steps)

    def steps(self, index: int) -> int:
        return self.config.steps

    def __call__(self, index: int) -> EpisodeData:
        rng = np.random.default_rng([self.config.seed, index])
        actions = rng.uniform(-1, 1, (self.config.steps, 7)).astype(np.float32)
        places = [rng.uniform(-1, 1, 2).astype(np.float32)]
        for action in actions:
            places.append(move(places[-1], action))
        return EpisodeData(np.stack([draw(place) for place in places]), actions, np.stack(places), "play")

    def close(self) -> None: ...


class SquareKinematics:
    state_dim = 2

    def __init__(self, config) -> None: ...

    def integrate(self, pose, actions):
        return (pose[:, None] + 0.1 * actions[..., :2].cumsum(1)).clamp(-1, 1)

    def normalise(self, poses):
        return poses

    def draw(self, poses, latent_size):
        h, w = latent_size
        u, v = torch.linspace(-1, 1, w), torch.linspace(-1, 1, h)[:, None]
        return torch.exp(-((u - poses[..., 0, None, None]) ** 2) - (v - poses[..., 1, None, None]) ** 2)

    def motion(self, poses, reference, latent_size):
        return torch.cat([poses[:, :, i] - reference for i in (0, -1)], -1) * latent_size[0] / 2


register_robot(
    Robot(
        "square",
        dream_env="toy/SquareDream-v0",
        sim_env="toy/SquareSim-v0",
        kinematics=f"{__name__}:SquareKinematics",
        episode_source=f"{__name__}:SquareSource",
        sim_starts=f"{__name__}:SquareStarts",
    )
)
gym.register("toy/SquareSim-v0", vector_entry_point=f"{__name__}:SquareSim")
gym.register(
    "toy/SquareDream-v0",
    vector_entry_point="rawdream_env.envs.dream:DreamVectorEnv",
    kwargs={"robot": "square", "starts": "sim"},
)

# ----------------------------------------------------------------------------------------------------------------------

SMALL = TinyVLAConfig(
    image_size=SIDE,
    stem_channels=16,
    trunk_channels=16,
    trunk_blocks=1,
    width=32,
    heads=2,
    decoder_layers=1,
    bin_rank=16,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    out = str(tmp_path_factory.mktemp("square") / "data")
    collect(CollectConfig(out, robot="square", episodes=4, steps_per_episode=24, episodes_per_shard=2, progress=False))
    return out


@pytest.fixture(scope="module")
def world_model(data: str, tmp_path_factory) -> str:
    model = WanConfig(
        latent_shape=(16, 4, 4), num_layers=1, num_attention_heads=2, attention_head_dim=24, ffn_dim=64,
        stem_channels=16, stem_blocks=1, head_blocks=1, pose_dim=2, arm_map_channels=4, warp_last_frame=True,
    )  # fmt: skip
    stage = StageConfig(steps=3, batch_size=2, lr=1e-3)
    config = WorldModelTrainConfig(
        data=(data,), run_dir=str(tmp_path_factory.mktemp("run")), bf16=False, episode_chunks=3, autoencoder=stage,
        transformer=stage, model=model, autoencoder_model=AutoencoderConfig(widths=(16, 16)),
    )  # fmt: skip
    return str(train_world_model(config))


def test_data_sets_name_the_robot_and_resume(data: str) -> None:
    reader = LeRobotReader(data)
    assert (reader.robot_type, len(reader), reader.episode(3).state.shape) == ("square", 4, (25, 2))
    collect(CollectConfig(data, robot="square", episodes=5, steps_per_episode=24, episodes_per_shard=2, progress=False))
    assert len(LeRobotReader(data)) == 5
    with pytest.raises(DatasetError, match="was collected with robot='square', now it is None"):
        collect(CollectConfig(data, episodes=5, steps_per_episode=24, episodes_per_shard=2, progress=False))


def test_the_checkpoint_names_the_robot(world_model: str, monkeypatch) -> None:
    model = read_world_model(world_model)
    assert model.robot == "square"
    with pytest.raises(ValueError, match=r"give proprio \(1, 2\)"):
        model.start(torch.zeros(1, SIDE, SIDE, 3, dtype=torch.uint8), [None], torch.zeros(1, 7))  # type: ignore[list-item]
    monkeypatch.delitem(sys.modules["rawdream_env.robots"]._ROBOTS, "square")
    with pytest.raises(InvalidOptionError, match=r"robot 'square' is not registered \(registered: .*'piper'\)"):
        read_world_model(world_model)


def test_dream_and_simulator_begin_alike() -> None:
    dream = gym.make_vec("toy/SquareDream-v0", num_envs=2, world_model=NullWorldModel((SIDE, SIDE, 3)), judge="none")
    simulator = gym.make_vec(find_robot("square").sim_env, num_envs=2)
    assert dream.single_action_space == simulator.single_action_space
    for seed in (0, [5, 5]):
        (seen, _), (true, infos) = dream.unwrapped.reset(seed=seed), simulator.unwrapped.reset(seed=seed)
        np.testing.assert_array_equal(seen["image"], true["image"])
    check_vector_env(SquareSim, num_envs=(1, 3), chunks=8)
    right = np.zeros((2, 8, 7), np.float32)
    right[..., 0] = 1
    assert (simulator.step(right)[4]["is_success"] == (infos["task_id"] == 1)).all()


def test_grpo_in_the_dream(world_model: str, tmp_path: Path) -> None:
    env = gym.make_vec(
        "toy/SquareDream-v0", num_envs=4, world_model=world_model, judge=ScriptedJudge(), max_episode_steps=2,
        autoreset_mode="Disabled",
    )  # fmt: skip
    assert (env.unwrapped.robot, env.unwrapped.tasks) == ("square", TASKS)
    config = GRPOConfig(
        tmp_path,
        steps=2,
        num_envs=4,
        group_size=4,
        groups_per_step=1,
        temperature=1.0,
        tensorboard=False,
        progress=False,
    )
    result = train_grpo(config, env=env, policy=TinyVLA(SMALL))
    assert result.step == 2
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 2


def test_side_by_side_evaluation(world_model: str, tmp_path: Path) -> None:
    config = EvaluateConfig(
        dream_env="toy/SquareDream-v0", sim_env="toy/SquareSim-v0", world_model=world_model, judge="scripted",
        episodes_per_task=3, max_episode_steps=2, num_envs=4, videos=0, out=tmp_path / "report",
    )  # fmt: skip
    result = evaluate(config, policies={"small": TinyVLA(SMALL)}, progress=False)
    assert {record.task for record in result.records} == {"left", "right"} and len(result.records) == 6
    assert result.report["policies"][0]["all"]["simulator"]["n"] == 6
    assert result.report["policies"][0]["horizon"].keys() == {"dreamed_actions", "simulator_actions"}
    named = evaluate(replace(config, sim_env="", out=None), policies={"small": TinyVLA(SMALL)}, progress=False)
    assert named.records == result.records  # the dream's robot names its simulator


def test_what_is_missing_is_named(data: str) -> None:
    assert find_goals("square") is None and find_goals("no such robot") is None
    with pytest.raises(InvalidOptionError, match=r"robot 'square' has no start_pack; set Robot\.start_pack"):
        gym.make_vec("toy/SquareDream-v0", num_envs=1, world_model="null", judge="none", starts="pack")
    config = WorldModelTrainConfig(data=(data,), run_dir="")
    reader = LeRobotReader(data)
    assert with_robot(config, [reader]).robot == "square"
    reader.robot_type = "arm of somebody else"
    with pytest.raises(
        DatasetError, match=r"the data are of \['arm of somebody else'\], of which \[\] have kinematics"
    ):
        with_robot(config, [reader])
    pictures = replace(config, model=WanConfig(pose_dim=0))
    assert with_robot(pictures, [reader]).robot == "arm of somebody else"  # without kinematics: pictures alone


def test_installed_packages_announce_robots(monkeypatch) -> None:
    class Announced:
        @staticmethod
        def load() -> None:
            register_robot(Robot("announced"))

    def entry_points(group: str, name: str) -> list[type]:
        return [Announced] if (group, name) == ("rawdream.robots", "announced") else []

    robots = sys.modules["rawdream_env.robots"]
    monkeypatch.setattr(robots, "entry_points", entry_points)
    monkeypatch.setattr(robots, "_ROBOTS", dict(robots._ROBOTS))
    assert find_robot("announced").name == "announced"


def test_the_default_robot_is_found_without_importing_its_parts() -> None:
    code = "import sys, rawdream_env.robots as r; print(r.find_robot().name, [m for m in sys.modules if 'env.piper.' in m])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "piper []"
    assert find_robot("piper") is find_robot()
    with pytest.raises(InvalidOptionError, match="robot 'fly' is not registered"):
        find_robot("fly")
