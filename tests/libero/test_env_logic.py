"""The environment around the simulator: seeds, horizon, verdicts, lost workers. The simulator is a stand-in."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest

from rawdream_env.errors import InvalidOptionError, ProtocolMismatchError
from rawdream_env.evaluation.side_by_side.evaluate import EvaluateConfig, _check_protocols, evaluate, make_starts
from rawdream_env.libero import envs, starts
from rawdream_env.libero.envs import LiberoDreamVectorEnv, LiberoSimVectorEnv
from rawdream_env.libero.protocols import find_protocol
from rawdream_env.libero.workers import LiberoStep
from rawdream_env.policies.tiny_vla import TinyVLA, TinyVLAConfig
from rawdream_env.starts.pack import PackStarts, save_start_pack
from rawdream_env.testing.check_vector_env import check_vector_env
from rawdream_env.types import Start
from rawdream_env.world_models.null import NullWorldModel

SIDE = 16
TASKS = (("put_bowl", "put the bowl"), ("open_drawer", "open the drawer"))


class StandIn:
    """What ``LiberoWorkers`` answers: pictures of (task, initial state, steps so far); a gripper that closes is a success."""

    def __init__(self, num_envs, num_workers, options, timeout_s=0.0) -> None:
        self.rows, self.saved, self.dead, self.sizes = {}, {}, set(), []
        self.side = options.image_size

    def picture(self, row):
        return np.full((self.side, self.side, 3), np.array(self.rows[row]) % 256, np.uint8)

    def reset(self, rows, tasks, numbers):
        self.rows.update({row: (task, number, 0) for row, task, number in zip(rows, tasks, numbers, strict=True)})
        self.dead -= set(rows)
        return [(self.picture(row), np.zeros(8, np.float32)) for row in rows]

    def step(self, rows, actions, every_frame=True):
        frames, some, end = [], [], []
        for row, chunk in zip(rows, actions, strict=True):
            seen = []
            for action in chunk:
                task, number, steps = self.rows[row]
                self.rows[row] = task, number, steps + 1 + round(10 * abs(float(action[0])))
                seen.append(self.picture(row))
            self.sizes.append(len(chunk))
            frames.append(np.stack(seen if every_frame else seen[-1:]))
            some.append((chunk[:, 6] == 1).any())
            end.append(chunk[-1, 6] == 1)
        lost = np.array([row in self.dead for row in rows])
        frames = [part[:0] if gone else part for part, gone in zip(frames, lost, strict=True)]
        proprio = [np.zeros((len(part), 8), np.float32) for part in frames]
        return LiberoStep(frames, proprio, np.array(some) & ~lost, np.array(end) & ~lost, lost)

    def mark(self):
        self.saved = dict(self.rows)

    def take_back(self, mark):
        self.rows = dict(self.saved)

    def close(self): ...


@pytest.fixture(autouse=True)
def stand_in(monkeypatch) -> None:
    for module in (envs, starts):
        monkeypatch.setattr(module, "LiberoWorkers", StandIn)
        monkeypatch.setattr(module, "task_list", lambda suite: TASKS)


def sim(num_envs=1, **options) -> LiberoSimVectorEnv:
    return LiberoSimVectorEnv(num_envs, **{"suite": "libero_goal", "image_size": SIDE, **options})


def actions(num_envs, *grippers):
    chunk = np.zeros((num_envs, 8, 7), np.float32)
    chunk[..., 6] = -1
    for k in grippers:
        chunk[:, k, 6] = 1
    return chunk


def test_contract() -> None:
    for mode in ("NextStep", "SameStep", "Disabled"):
        check_vector_env(
            lambda num_envs, mode=mode, **kw: sim(num_envs, max_episode_steps=2, autoreset_mode=mode),
            num_envs=(1, 3),
            chunks=5,
            strict=True,
        )


@pytest.mark.parametrize("title", ["Spatial", "Object", "Goal", "Long", "90"])
def test_every_id(title) -> None:
    env = gym.make_vec(f"rawdream/Libero{title}Sim-v0", num_envs=2)
    dream = gym.make_vec(f"rawdream/Libero{title}Dream-v0", num_envs=2, world_model="null", judge="none")
    assert env.single_observation_space["image"].shape == (256, 256, 3)
    assert env.single_action_space == dream.single_action_space
    assert env.unwrapped.protocol["horizon"] == dream.unwrapped.protocol["horizon"]
    assert (
        env.unwrapped.max_episode_steps
        == dream.unwrapped.max_episode_steps
        == -(-env.unwrapped.protocol["horizon"] // 8)
    )
    single = gym.make(f"rawdream/Libero{title}Sim-v0", horizon=3)
    assert single.reset(seed=0)[0]["image"].shape == (256, 256, 3)


@pytest.mark.parametrize("env_id", [name for name in gym.registry if name.startswith("rawdream/Libero")])
def test_every_id_keeps_the_contract(env_id) -> None:
    options = {"image_size": SIDE}
    if "Dream" in env_id:
        options = {"world_model": NullWorldModel((SIDE, SIDE, 3)), "judge": "scripted"}
    report = check_vector_env(
        lambda num_envs, autoreset_mode: gym.make_vec(
            env_id, num_envs, autoreset_mode=autoreset_mode, max_episode_steps=2, **options
        ),
        modes=("SameStep",),
        num_envs=(1, 3),
        chunks=3,
        strict=True,
    )
    assert report.passed and not report.failed


def test_tasks_by_name_index_instruction_and_all() -> None:
    for task in (1, "open_drawer", "Open the drawer"):
        assert sim(3, task=task).reset(seed=0)[1]["task_id"].tolist() == [1, 1, 1]
    assert set(sim(16, task="all").reset(seed=0)[1]["task_id"]) == {0, 1}
    with pytest.raises(InvalidOptionError, match="task='close' is unknown"):
        sim(task="close")


def test_the_horizon_is_in_control_steps() -> None:
    env = sim(protocol="openvla-oft", suite="libero_spatial", return_frames=True)
    env.reset(seed=0)
    for chunk in range(28):
        _, rewards, terminated, truncated, infos = env.step(actions(1, 5)) if chunk == 27 else env.step(actions(1))
    assert env._workers.sizes == [8] * 27 + [4]
    assert truncated[0] and not terminated[0] and not rewards[0], "step 5 of the last chunk is beyond the horizon"
    assert infos["frames"].shape == (1, 8, SIDE, SIDE, 3) and (infos["frames"][0, 3:] == infos["frames"][0, 3]).all()


def test_success_at_any_step_and_later_at_the_end() -> None:
    env = sim(end_on_success=False, max_episode_steps=4)
    env.reset(seed=0)
    steps = [env.step(chunk) for chunk in (actions(1), actions(1, 2), actions(1, 2), actions(1, 7))]
    assert [int(step[4]["verdict"][0]) for step in steps] == [0, 1, 0, 1]
    assert [float(step[1][0]) for step in steps] == [0, 1, 0, 0] and steps[-1][2][0]
    env = sim(judge_every="episode", max_episode_steps=1)
    env.reset(seed=0)
    assert env.step(actions(1, 2))[4]["verdict"][0] == 0


def test_a_lost_row_is_invalid_and_begins_again() -> None:
    env = sim(2, autoreset_mode="SameStep", return_frames=True)
    before, _ = env.reset(seed=0)
    env._workers.dead = {1}
    observation, rewards, terminated, truncated, infos = env.step(actions(2, 2))
    assert infos["final_info"]["valid"].tolist() == [True, False] and infos["final_info"]["verdict"].tolist() == [1, -1]
    assert (terminated.tolist(), truncated.tolist(), rewards.tolist()) == ([True, False], [False, True], [1, 0])
    assert np.array_equal(infos["final_obs"][1]["image"], before["image"][1])
    assert env.step(actions(2))[4]["valid"].all()


def test_the_protocol_is_recorded_with_its_changes() -> None:
    assert sim().protocol == {**find_protocol("raw-dream", "libero_goal").as_dict(), "init_states": "eval"}
    changed = sim(protocol="rlinf", max_episode_steps=2, settle_steps=1).protocol
    assert changed["name"] == "rlinf with horizon 16 with settle_steps 1"
    assert (changed["horizon"], changed["settle_steps"]) == (16, 1)
    assert sim(protocol="rlinf", max_episode_steps=40).protocol["name"] == "rlinf"


def test_evaluations_go_through_the_initial_states_in_order() -> None:
    env = sim(4)
    begun = make_starts(env, [("open_drawer", index) for index in (0, 1, 49, 50)], seed=0)
    env.reset(options={"starts": begun})
    assert [env._workers.rows[row][:2] for row in range(4)] == [(1, 0), (1, 1), (1, 49), (1, 0)]
    trained = sim(64, init_states="train")
    trained.reset(seed=0)
    assert {number for _, number, _ in trained._workers.rows.values()} <= set(range(25))
    with pytest.raises(InvalidOptionError, match=r"starts'\]\[0\] has seed None"):
        sim().reset(options={"starts": [Start(np.zeros((SIDE, SIDE, 3), np.uint8), "x", 0)]})


def dream(num_envs=2, **options) -> LiberoDreamVectorEnv:
    model = NullWorldModel((SIDE, SIDE, 3))
    return LiberoDreamVectorEnv(
        num_envs, **{"suite": "libero_goal", "world_model": model, "judge": "scripted", **options}
    )


def test_the_dream_begins_where_the_simulator_does(tmp_path) -> None:
    imagined, true = dream(3), sim(3, init_states="train")
    for seed in (5, None):
        (a, infos), (b, others) = imagined.reset(seed=seed), true.reset(seed=seed)
        assert np.array_equal(a["image"], b["image"]) and infos.keys() == others.keys()
        assert infos["instruction"].tolist() == others["instruction"].tolist()
    pack = tmp_path / "goal.safetensors"
    save_start_pack(pack, [true.start_of(row) for row in range(3)], TASKS, provenance={"robot": "libero_goal"})
    assert PackStarts(pack).provenance == {"robot": "libero_goal"}
    packed = dream(1, starts=str(pack))
    seen, _ = packed.reset(seed=0)
    again, _ = sim(1).reset(options={"starts": [packed.start_of(0)]})
    assert np.array_equal(seen["image"], again["image"])


def test_the_dream_needs_its_parts_named() -> None:
    for name in ("world_model", "judge"):
        with pytest.raises(InvalidOptionError, match=f"bundled for LIBERO; pass {name}="):
            dream(**{name: None})


def test_side_by_side_by_the_robots_own_names(tmp_path) -> None:
    config = EvaluateConfig(
        dream_env="rawdream/LiberoGoalDream-v0", dream_kwargs={"max_episode_steps": 2}, judge="scripted", num_envs=2,
        episodes_per_task=2, out=tmp_path / "report", videos=0, workers=0, diagnose=False,
    )  # fmt: skip
    model = NullWorldModel((SIDE, SIDE, 3))
    policy = TinyVLA(
        TinyVLAConfig(image_size=SIDE, stem_channels=16, trunk_channels=16, trunk_blocks=1, width=32, heads=2,
                      decoder_layers=1, bin_rank=16)
    )  # fmt: skip
    made = dream(2, autoreset_mode="Disabled", return_frames=True, max_episode_steps=2, world_model=model)
    result = evaluate(config, policies={"p": policy}, dream=made, progress=False)
    assert result.report["protocol"]["name"] == "raw-dream with horizon 16"
    assert {record.task for record in result.records} == {"put_bowl", "open_drawer"}
    other = sim(
        2, autoreset_mode="Disabled", protocol="rlinf", max_episode_steps=2, end_on_success=False, return_frames=True
    )
    with pytest.raises(ProtocolMismatchError, match="the dream and the simulator follow different protocols"):
        _check_protocols(made, other)
