"""Faults of the arm, of its camera, of its operator and of its caller: each has a name, the arm holds, and nothing is lost."""

from __future__ import annotations

import errno
import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("can", reason="needs the extra piper")
pytest.importorskip("piper_sdk", reason="needs the extra piper")

from rawdream_env.data.reader import LeRobotReader
from rawdream_env.errors import ArmFaultError, CanBusError, ClosedEnvironmentError, DatasetError
from rawdream_env.piper.arm import frames as fr
from rawdream_env.piper.arm.faults import DriverConfig
from rawdream_env.piper.arm.link import PiperLink
from rawdream_env.piper.arm.operator import TwinOperator
from rawdream_env.piper.real import PiperRealVectorEnv
from tests.piper.arm import causes
from tests.waiting import wait_until

FORTH = np.tile(np.float32([0.6, 0.3, -0.3, 0, 0, 0.2, 1.0]), (1, 8, 1))
BACK = FORTH * np.float32([-1, -1, -1, 1, 1, -1, 1])


pytestmark = pytest.mark.usefixtures("opengl")


@pytest.fixture
def make(tmp_path):
    made = []

    def new(**kwargs):
        made.append(PiperRealVectorEnv(fake=True, **{"record": tmp_path / "data", "max_episode_steps": 3, **kwargs}))
        return made[-1]

    yield new
    for env in made:
        env.close()


def outcomes(folder):
    return [json.loads(line) for line in (folder / "data" / "meta" / "outcomes.jsonl").read_text().splitlines()]


def camera_frozen(r):
    last = r.camera.read()
    r.camera.read = lambda: last


def camera_gone(r):
    def read():
        raise OSError("no such device")

    r.camera.read = read


CAUSES = [
    (name, cause, known) for name, cause, _, known in causes.FAULTS if name not in ("controller fault", "blocked")
]
CAUSES += [("camera frozen", camera_frozen, 0.25), ("camera gone", camera_gone, 0.1)]  # older than it may be; next read


@pytest.mark.parametrize(("name", "cause", "known"), CAUSES, ids=[c[0] for c in CAUSES])
def test_a_fault_is_latched_the_arm_holds_and_the_episode_is_kept(make, tmp_path, name, cause, known):
    env, seen = make(), []
    env.reset(seed=0)
    env._bus.commands = lambda frame: seen.append((env.clock.now(), frame)) or True
    env.step(BACK)
    cause(SimpleNamespace(bus=env._bus, driver=env.driver, camera=env.camera))
    begin = env.clock.now()
    _, rewards, terminations, truncations, infos = env.step(FORTH)
    fault, sentence = env.driver.fault, infos["fault"][0]
    assert fault.at - begin - known <= 0.1 and fault.message in sentence and "\n" not in sentence
    assert truncations[0] and not terminations[0] and not infos["valid"][0] and rewards[0] == 0
    env.clock.sleep(0.5)
    if name != "unplugged":  # nothing can be sent any more
        held = [at for at, frame in seen if frame.can_id == fr.END_POSE_IDS[0] and at > fault.at]
        assert held[0] - begin - known <= 0.2 and len(held) >= 3
    assert not any(frame.can_id in (fr.STOP_ID, fr.POWER_ID) for _, frame in seen) and not env._bus.arm.dropped
    (row,) = outcomes(tmp_path)
    assert row["fault"] == sentence and 8 <= row["steps"] <= 16
    assert len(LeRobotReader(tmp_path / "data").episode(0).frames) == row["steps"] + 1


def test_a_policy_that_died_between_two_chunks_leaves_an_arm_that_holds(make, tmp_path):
    env = make()
    env.reset(seed=0)
    env.step(FORTH)
    pose = env.driver.pose
    env.clock.sleep(2.0)
    assert env.driver.fault is None and (env.driver.pose == pose).all()
    env.driver.latch("bus", "The cable is out.")
    env.close()
    assert outcomes(tmp_path)[0]["fault"].startswith("The cable is out. abandoned: the environment was closed")


class Broken(TwinOperator):
    """Raises in one method, or answers nonsense."""

    def __init__(self, env, name):
        super().__init__(env._bus.arm, env.operator.tasks, env.layout)

        def method(*about):
            if name == "answer":
                return "maybe"
            raise KeyError("a bug")

        setattr(self, "success" if name == "answer" else name, method)


@pytest.mark.parametrize("name", ["watch", "stop_requested", "done", "success", "answer"])
def test_an_operator_that_fails_ends_the_episode_which_is_kept(make, tmp_path, name):
    env = make(max_episode_steps=2)
    env.reset(seed=0)
    env.step(BACK)
    whole, env.operator = env.operator, Broken(env, name)
    said = "returned 'maybe'" if name == "answer" else "KeyError: 'a bug'"
    if name == "watch":  # fails again when the episode is over
        with pytest.raises(ArmFaultError, match=said):
            env.step(FORTH)
    else:
        assert said in env.step(FORTH)[4]["fault"][0]
        assert said in outcomes(tmp_path)[0]["fault"]
    env.operator = whole
    env.reset()
    assert env.step(FORTH)[4]["valid"][0]


@pytest.mark.parametrize("name", ["arrange", "clear"])
def test_an_operator_that_fails_ends_the_reset(make, name):
    env = make()
    env.reset(seed=0)
    whole, env.operator = env.operator, Broken(env, name)
    env.driver.latch("arm", "A test.")
    with pytest.raises(ArmFaultError, match=rf"The operator's {name}\(\) failed \(KeyError"):
        env.reset()
    env.operator = whole
    env.reset()


@pytest.mark.parametrize(
    ("picture", "at", "said"),
    [
        (np.zeros((48, 64, 3), np.uint8), 0.0, r"uint8 \(48, 64, 3\), not uint8 \(64, 64, 3\)"),
        (np.zeros((64, 64, 3), np.float32), 0.0, "float32"),
        (np.zeros((64, 64, 3), np.uint8), "now", "ValueError"),
        (np.zeros((64, 64, 3), np.uint8), np.nan, "its time is nan"),
        (None, None, "TypeError"),
    ],
)
def test_what_is_no_frame_is_a_fault_of_the_camera(make, picture, at, said):
    env = make(record=None)
    env.reset(seed=0)
    env.camera.read = lambda: (picture, at)
    infos = env.step(FORTH)[4]
    assert env.driver.fault.kind == "camera"
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(infos["fault"][0])


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda env: env.reset(), ArmFaultError, r"reset\(\) was called while the arm moves"),
        (lambda env: env.step(FORTH), ArmFaultError, r"step\(\) was called while the arm moves"),
        (lambda env: env.close(), None, ""),
    ],
)
def test_a_call_inside_a_step(make, tmp_path, call, error, said):
    env, raised = make(), []
    env.reset(seed=0)
    read = env.camera.read

    def reading():  # as from another thread
        if len(env._episode.frames) == 4:
            try:
                call(env)
            except ArmFaultError as problem:
                raised.append(problem)
        return read()

    env.camera.read = reading
    if error is None:
        with pytest.raises(ClosedEnvironmentError, match="closed during step"):
            env.step(FORTH)
        assert outcomes(tmp_path)[0]["steps"] == 4
    else:
        assert env.step(FORTH)[4]["valid"][0] and isinstance(raised[0], error)
        with pytest.raises(error, match=said):
            raise raised[0]
    env.close()
    env.close()
    with pytest.raises(ClosedEnvironmentError, match="create a new one"):
        env.step(FORTH)


def test_closed_by_another_thread_while_the_arm_moves(make, tmp_path):
    patient = DriverConfig(feedback_timeout=20.0, frozen_timeout=20.0, policy_timeout=20.0, max_lag=0.2)
    env, raised = make(realtime=True, max_frame_age=2.0, driver=patient, max_episode_steps=1000), []
    env.reset(seed=0)

    def move():
        try:
            while True:
                env.step(FORTH)
                env.step(BACK)
        except Exception as error:  # noqa: BLE001
            raised.append(error)

    thread, episode = threading.Thread(target=move), env._episode
    thread.start()
    wait_until(lambda: len(episode.sent) > 4 or raised)
    env.close()
    thread.join()
    assert isinstance(raised[0], ClosedEnvironmentError), raised[0]
    (row,) = outcomes(tmp_path)
    assert row["steps"] > 3 and len(LeRobotReader(tmp_path / "data").episode(0).frames) == row["steps"] + 1


def test_one_driver_on_a_bus_and_one_recorder_in_a_folder(make, tmp_path):
    env = make()
    channel = env._bus.channel
    with pytest.raises(CanBusError, match="is driven already"):
        PiperLink(channel, "virtual")
    with pytest.raises(DatasetError, match="is being written"):
        make()
    env.close()
    PiperLink(channel, "virtual").close()
    make()


def test_episodes_wait_in_memory_until_the_disk_has_room(make, tmp_path, monkeypatch):
    env = make(max_episode_steps=1)
    with monkeypatch.context() as full:

        def write(path, data):
            raise OSError(errno.ENOSPC, "No space left on device")

        env.reset(seed=0)
        full.setattr("rawdream_env.files.write_bytes_synced", write)
        for call in (lambda: env.step(FORTH), env.reset, env.close, env.close):
            with pytest.raises(DatasetError, match=r"1 episodes cannot be written .*No space left"):
                call()
    env.close()
    assert outcomes(tmp_path)[0]["operator"] == 0 and len(LeRobotReader(tmp_path / "data").episode(0).frames) == 9
