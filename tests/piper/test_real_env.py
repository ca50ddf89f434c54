"""The arm as an environment, with the fake arm: SDK, virtual CAN bus, controller and the twin's physics."""

from __future__ import annotations

import json
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

pytest.importorskip("can", reason="needs the extra piper")
pytest.importorskip("piper_sdk", reason="needs the extra piper")

from rawdream_env.data.reader import LeRobotReader
from rawdream_env.errors import (
    ArmFaultError,
    CameraError,
    CanBusError,
    InvalidOptionError,
    ResetNeededError,
)
from rawdream_env.evaluation.side_by_side.evaluate import EvaluateConfig, evaluate
from rawdream_env.piper import geometry as geo
from rawdream_env.piper.arm import frames as fr
from rawdream_env.piper.arm.faults import DriverConfig
from rawdream_env.piper.arm.operator import TerminalOperator, TwinOperator
from rawdream_env.piper.envs import PiperDreamVectorEnv, PiperSimVectorEnv
from rawdream_env.piper.real import PiperRealVectorEnv
from rawdream_env.piper.simulator.twin import PiperTwin
from rawdream_env.piper.starts import SimStarts
from rawdream_env.seeding import NoiseKey
from rawdream_env.testing.check_vector_env import check_vector_env
from rawdream_env.types import Outcome, Verdict
from rawdream_env.wrappers import DualNoiseVerification
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("opengl")


@pytest.fixture
def make():
    made = []

    def new(**kwargs):
        made.append(PiperRealVectorEnv(fake=True, **{"record": None, **kwargs}))
        return made[-1]

    yield new
    for env in made:
        env.close()
        assert env._bus.error is None
        received = env._bus.arm.received
        assert not any(f.can_id == fr.STOP_ID and f.data[0] == fr.StopCode.RESET for f in received)
        assert not env._bus.arm.dropped


def some_actions(seed=0, size=0.5):
    return np.random.default_rng(seed).uniform(-size, size, (1, 8, 7)).astype(np.float32)


class Person(TwinOperator):
    """Stops, denies and clears as told."""

    def __init__(self, env):
        super().__init__(env._bus.arm, env.operator.tasks, env.layout)
        self.stops, self.says, self.faults = False, False, []

    def stop_requested(self):
        return self.stops

    def done(self):
        return self.says is True

    def success(self, instruction):
        return self.says

    def clear(self, fault):
        self.faults.append(fault)


def outcomes(folder):
    return [json.loads(line) for line in (folder / "meta" / "outcomes.jsonl").read_text().splitlines()]


def test_contract():
    report = check_vector_env(
        lambda num_envs: PiperRealVectorEnv(num_envs, fake=True, record=None, max_episode_steps=1, return_frames=True),
        num_envs=(1,),
        chunks=2,
        strict=True,
        skip=("aliasing", "global_rng"),
    )
    assert set(report.skipped) == {"row_independence", "neighbours", "partial_reset"}  # of several rows
    assert "autoreset" in report.passed and "seeding" in report.passed


def test_single_env_passes_gymnasiums_checker():
    env = gym.make("rawdream/PiperReal-v0", fake=True, record=None, render_mode="rgb_array")
    check_env(env.unwrapped, skip_render_check=True, skip_close_check=True)
    env.close()


def test_same_spaces_infos_and_scenes_as_the_simulator(make):
    real, sim = make(return_frames=True), PiperSimVectorEnv(1, return_frames=True, judge_every="episode")
    assert real.single_observation_space == sim.single_observation_space
    assert real.single_action_space == sim.single_action_space
    (a, info_a), (b, info_b) = real.reset(seed=3), sim.reset(seed=3)
    assert info_a.keys() == info_b.keys() and info_a["instruction"] == info_b["instruction"]
    assert np.abs(a["image"].astype(int) - b["image"]).mean() < 0.5  # a tenth of a second later
    np.testing.assert_allclose(real.start_of(0).proprio[:6], sim.start_of(0).proprio[:6], atol=1e-6)
    got, expected = real.step(some_actions()), sim.step(some_actions())
    assert got[4].keys() == expected[4].keys() - {"lifted", "_lifted"}
    for key, value in got[4].items():
        assert value.dtype == expected[4][key].dtype and value.shape == expected[4][key].shape
    tool = real._bus.arm.twin.tool_pose()[:3]
    np.testing.assert_allclose(tool, sim._workers._call("state", [0])[0].pose[:3], atol=0.02)
    sim.close()


def test_same_spaces_and_infos_as_the_dream(make):
    real, dream = make(return_frames=True), PiperDreamVectorEnv(1, return_frames=True)
    assert real.single_observation_space == dream.single_observation_space
    assert real.single_action_space == dream.single_action_space
    for ours, theirs in (
        (real.reset(seed=3)[1], dream.reset(seed=3)[1]),
        (e.step(some_actions())[4] for e in (real, dream)),
    ):
        assert ours.keys() <= theirs.keys()
        assert all(value.dtype == theirs[key].dtype and value.shape == theirs[key].shape for key, value in ours.items())
    dream.close()


def test_actions_add_up_as_in_the_simulator_where_the_guard_delays_them(make):
    actions = np.zeros((1, 8, 7), np.float32)
    actions[0, :, 1] = [1, -1, 1, -1, 1, 0, 0, 0]  # the guard takes two commands for a reversal
    env, twin = make(task="place_cup"), PiperTwin(render=False)
    env.reset(seed=3)
    twin.reset(env.start_of(0).seed, task="place_cup")
    env.step(actions)
    for action in actions[0]:
        twin.step(action)
    np.testing.assert_allclose(env.driver.pose[:6], twin.pose[:6], atol=1e-6)
    np.testing.assert_allclose(env._bus.arm.twin.tool_pose()[:3], twin.tool_pose()[:3], atol=1e-3)


def test_starts_of_the_simulator(make):
    start = SimStarts().sample(NoiseKey(5), "place_cup")
    env = make()
    observation, infos = env.reset(options={"starts": [start]})
    assert infos["task_id"].tolist() == [start.task_id] and env.start_of(0).seed == start.seed
    assert np.abs(observation["image"][0].astype(int) - start.frame).mean() < 0.5
    with pytest.raises(InvalidOptionError, match="task_id 9"):
        env.reset(options={"starts": [replace(start, task_id=9)]})


def test_verification_and_impossible_options_are_refused(make):
    with pytest.raises(InvalidOptionError, match=r"PiperRealVectorEnv.* cannot"):
        DualNoiseVerification(make())
    for options, match in (
        ({"num_envs": 2}, "there is one arm"),
        ({"autoreset_mode": "NextStep"}, "cannot reset itself"),
        ({"success": "judge"}, "pass a judge"),
        ({"judge": "embedded"}, "pass a judge"),
        ({"fake": False}, "camera=None"),
    ):
        with pytest.raises(InvalidOptionError, match=match):
            PiperRealVectorEnv(**{"fake": True, "record": None, **options})
    with pytest.raises(CameraError, match="'/dev/no such camera'|no such camera"):
        PiperRealVectorEnv(camera="/dev/no such camera", record=None)


def test_a_named_camera_is_closed_if_the_bus_does_not_open(tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr("rawdream_env.piper.arm.camera.TwinFrames.close", lambda self: closed.append(self))
    with pytest.raises(CanBusError):
        PiperRealVectorEnv(camera="twin", channel="no such bus", record=None)
    assert len(closed) == 1


def test_trials_on_the_arm_are_a_third_column(tmp_path):
    config = EvaluateConfig(
        real=True, real_trials=1, real_kwargs={"fake": True, "record": None}, episodes_per_task=1, tasks=("stack_block",),
        judge="state", judge_every="chunk", num_envs=1, workers=0, videos=0, diagnose=False, verify=False, out=tmp_path,
    )  # fmt: skip
    evaluate(config, progress=False)
    (line,) = map(json.loads, (tmp_path / "real" / "trials.jsonl").read_text().splitlines())
    assert line["task"] == "stack_block" and line["outcome"] in (0, 1)


def test_operator_and_judge_are_recorded_apart(make, tmp_path):
    def judge(videos, instructions):
        assert len(videos[0].frames) == 17
        return [Verdict(Outcome.SUCCESS, probability=0.75)]

    env = make(success="both", judge=judge, max_episode_steps=2, record=tmp_path / "data", return_frames=True)
    env.operator = person = Person(env)
    env.reset(seed=0)
    first = env.step(some_actions(0))
    assert "operator_verdict" not in first[4]
    person.says = None
    infos = env.step(some_actions(1))[4]
    assert (infos["operator_verdict"][0], infos["judge_verdict"][0], infos["verdict"][0]) == (-1, 1, -1)
    env.reset()
    person.says, env.judge = True, None
    _, rewards, terminations, _, infos = env.step(some_actions(2))
    assert rewards[0] == 1.0 and terminations[0] and infos["is_success"][0]
    rows = outcomes(tmp_path / "data")
    assert [rows[0][name] for name in ("operator", "judge", "judge_probability", "steps")] == [-1, 1, 0.75, 16]
    reader = LeRobotReader(tmp_path / "data")
    episode = reader.episode(0)
    assert len(reader) == 2 and episode.frames.shape == (17, 64, 64, 3) and reader.task(0) == rows[0]["instruction"]
    again = geo.integrate_actions(episode.state[0].astype(np.float64), episode.actions.astype(np.float64))
    np.testing.assert_allclose(again, episode.state[1:], atol=1e-5)  # as sent
    measured, time = episode.privileged["measured_pose"], episode.privileged["time"]
    assert 0 < np.abs(measured - episode.state)[:, :3].max() < 0.04
    np.testing.assert_allclose(np.diff(time[:, 0]), 0.1, atol=0.081)


def test_a_fault_ends_the_episode_and_the_operator_clears_it(make, tmp_path):
    env = make(record=tmp_path / "data")
    env.operator = person = Person(env)
    env.reset(seed=0)
    env.step(some_actions())
    env._bus.feedback = lambda frames: []
    _, rewards, terminations, truncations, infos = env.step(some_actions())
    assert truncations[0] and not terminations[0] and not infos["valid"][0] and infos["verdict"][0] == -1
    assert "no complete feedback" in infos["fault"][0] and rewards[0] == 0
    with pytest.raises(ArmFaultError, match="cannot be cleared"):
        env.reset()
    env._bus.feedback = lambda frames: frames
    env.clock.sleep(0.1)
    infos = env.reset()[1]
    assert "fault" not in infos and "no complete feedback" in person.faults[-1]
    assert env.step(some_actions())[4]["valid"][0]
    row = outcomes(tmp_path / "data")[0]
    assert 8 < row["steps"] < 16 and "no complete feedback" in row["fault"]
    assert len(LeRobotReader(tmp_path / "data").episode(0).frames) == row["steps"] + 1


def test_in_real_time_a_camera_thread_draws(make):
    patient = DriverConfig(feedback_timeout=20.0, frozen_timeout=20.0, policy_timeout=20.0, max_lag=0.2)
    env = make(realtime=True, max_frame_age=3.0, driver=patient)
    env.reset(seed=0)
    first, at = env.camera.read()
    assert first.shape == (64, 64, 3) and at <= env.clock.now()
    wait_until(lambda: env.camera.read()[1] > at)


def test_the_stop_key_stops_and_leaves_no_way_on(make, tmp_path):
    env = make(record=tmp_path / "data")
    env.reset(seed=0)
    env.operator = person = Person(env)
    person.stops = True
    infos = env.step(some_actions())[4]
    assert "stop key" in infos["fault"][0]
    assert env._bus.arm.status == fr.ArmStatus.EMERGENCY_STOP
    with pytest.raises(ArmFaultError, match="switch its power off"):
        env.reset()
    with pytest.raises(ResetNeededError):
        env.step(some_actions())


def test_an_interrupted_step_is_recorded_and_needs_a_reset(make, tmp_path, monkeypatch):
    env = make(record=tmp_path / "data")
    env.reset(seed=0)
    read, calls = env.camera.read, []

    def interrupt():
        calls.append(0)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return read()

    monkeypatch.setattr(env.camera, "read", interrupt)
    with pytest.raises(KeyboardInterrupt):
        env.step(some_actions())
    pose = env.driver.pose
    env.clock.sleep(0.5)
    assert env.driver.fault is None and (env.driver.pose == pose).all()  # it holds
    with pytest.raises(ResetNeededError):
        env.step(some_actions())
    env.reset()
    env.step(some_actions())
    assert [(r["steps"], r["fault"]) for r in outcomes(tmp_path / "data")] == [(4, "interrupted: KeyboardInterrupt")]


def test_the_terminal_asks(monkeypatch):
    operator, answers = TerminalOperator(), iter(["maybe", "y", "x", "n", "q", "c"])
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    assert [operator.success("stack") for _ in range(3)] == [True, None, False]
    with pytest.raises(ArmFaultError, match="gave up"):
        operator.clear("The arm is silent.")
    operator.clear("The arm is silent.")
    monkeypatch.setattr("builtins.input", lambda question: (_ for _ in ()).throw(EOFError()))
    with pytest.raises(ArmFaultError, match="no terminal"):
        operator.arrange("stack", 0, 0)
