"""A step of the simulator happens wholly or not at all, in any thread, process or copy."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from rawdream_env.errors import ClosedEnvironmentError, JudgeError, RendererError, SimulatorError
from rawdream_env.piper.envs import PiperSimVectorEnv
from rawdream_env.piper.simulator.twin import PiperTwin
from rawdream_env.piper.simulator.workers import PiperWorkers
from rawdream_env.types import Outcome, Verdict
from tests.waiting import gone, wait_until

WORKERS = pytest.mark.parametrize("workers", [0, 2])


pytestmark = pytest.mark.usefixtures("opengl")


def chunks(num_envs=2, count=3):
    return np.random.default_rng(1).uniform(-1, 1, (count, num_envs, 8, 7)).astype(np.float32)


def run(script, timeout=60, **options):
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=timeout, **options)


def once(function, error, *, after=False):
    """``function`` that raises ``error`` the first time it is called with a last row, before or after doing its work."""
    left = [error]

    def broken(self, *args, **kwargs):
        if not after and left:
            raise left.pop()
        result = function(self, *args, **kwargs)
        if left:
            raise left.pop()
        return result

    return broken


def same(a, b):
    """Two results of step."""
    assert np.array_equal(a[0]["image"], b[0]["image"])
    for x, y in zip(a[1:4], b[1:4], strict=True):
        assert np.array_equal(x, y)
    assert a[4].keys() == b[4].keys()
    for key in ("frames", "verdict", "is_success", "instruction"):
        assert np.array_equal(a[4][key], b[4][key])


@WORKERS
@pytest.mark.parametrize("after", [False, True])
def test_an_interrupted_step_did_not_happen(monkeypatch, workers, after):
    env, reference = (
        PiperSimVectorEnv(2, num_workers=workers, return_frames=True),
        PiperSimVectorEnv(2, return_frames=True),
    )
    env.reset(seed=3), reference.reset(seed=3)
    actions = chunks()
    same(env.step(actions[0]), reference.step(actions[0]))
    where, name = (PiperWorkers, "_receive") if workers else (PiperTwin, "frame")
    with monkeypatch.context() as patched:
        patched.setattr(where, name, once(getattr(where, name), KeyboardInterrupt(), after=after))
        with pytest.raises(KeyboardInterrupt):
            env.step(actions[1])
    assert env.elapsed_steps == (1, 1)
    same(env.step(actions[1]), reference.step(actions[1]))  # tried again: as if it had never been interrupted
    with monkeypatch.context() as patched:
        patched.setattr(where, name, once(getattr(where, name), KeyboardInterrupt(), after=after))
        with pytest.raises(KeyboardInterrupt):
            env.step(actions[2])
    assert np.array_equal(env.reset(seed=100)[0]["image"], reference.reset(seed=100)[0]["image"])
    env.close(), reference.close()


@WORKERS
def test_an_interrupted_reset_did_not_happen(monkeypatch, workers):
    env, reference = (
        PiperSimVectorEnv(2, num_workers=workers, return_frames=True),
        PiperSimVectorEnv(2, return_frames=True),
    )
    env.reset(seed=3), reference.reset(seed=3)
    with monkeypatch.context() as patched:
        patched.setattr(PiperWorkers, "proprio", once(PiperWorkers.proprio, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            env.reset(seed=8)
    assert env.row_seeds == (3, 4)
    same(env.step(chunks()[0]), reference.step(chunks()[0]))
    env.close(), reference.close()


@WORKERS
def test_a_step_whose_next_episode_cannot_begin_is_tried_again_whole(monkeypatch, workers):
    options = {"autoreset_mode": "SameStep", "max_episode_steps": 1, "return_frames": True}
    env, reference = PiperSimVectorEnv(2, num_workers=workers, **options), PiperSimVectorEnv(2, **options)
    env.reset(seed=3), reference.reset(seed=3)
    with monkeypatch.context() as patched:
        patched.setattr(PiperWorkers, "reset", once(PiperWorkers.reset, RendererError("gone"), after=True))
        with pytest.raises(RendererError):
            env.step(chunks()[0])
    a, b = env.step(chunks()[0]), reference.step(chunks()[0])
    assert a[3].tolist() == b[3].tolist() == [True, True]
    assert np.array_equal(a[0]["image"], b[0]["image"])
    for key in ("frames", "verdict"):
        assert np.array_equal(a[4]["final_info"][key], b[4]["final_info"][key])
    env.close(), reference.close()


def test_a_step_whose_reflector_fails_did_not_happen():
    asked = []

    def judge(videos, instructions):
        asked.append([len(video.frames) for video in videos])
        if len(asked) == 2:
            return None
        return [Verdict(Outcome.FAILURE, probability=0.1 * len(asked)) for _ in videos]

    env = PiperSimVectorEnv(1, return_frames=True, reflector={"judge": judge})
    plain = PiperSimVectorEnv(1, return_frames=True)
    env.reset(seed=0), plain.reset(seed=0)
    actions = chunks(1)
    assert env.step(actions[0])[1][0] == pytest.approx(0.1)
    with pytest.raises(JudgeError):
        env.step(actions[1])
    observations, rewards, *_ = env.step(actions[1])
    plain.step(actions[0])
    assert np.array_equal(observations["image"], plain.step(actions[1])[0]["image"])
    assert asked == [[9], [17], [17]], "the failed step's frames are not shown twice"
    assert rewards[0] == pytest.approx(0.3 - 0.1)


@WORKERS
def test_pickles_and_copies_continue_from_the_same_state(workers):
    env = PiperSimVectorEnv(2, num_workers=workers, return_frames=True)
    env.reset(seed=3)
    actions = chunks()
    env.step(actions[0])
    copies = [pickle.loads(pickle.dumps(env)), copy.deepcopy(env)]
    expected = [env.step(a) for a in actions[1:]]
    for other in copies:
        for action, result in zip(actions[1:], expected, strict=True):
            same(other.step(action), result)
        other.close()
    env.close()
    with pytest.raises(ClosedEnvironmentError):
        pickle.loads(pickle.dumps(env)).step(actions[0])


def test_another_thread_may_step():
    env, reference = PiperSimVectorEnv(1, return_frames=True), PiperSimVectorEnv(1, return_frames=True)
    env.reset(seed=0), reference.reset(seed=0)
    results = []
    actions = chunks(1)
    for action in actions[:2]:
        thread = threading.Thread(target=lambda action=action: results.append(env.step(action)))
        thread.start()
        thread.join()
    results.append(env.step(actions[2]))
    for action, result in zip(actions, results, strict=True):
        same(result, reference.step(action))
    env.close()


def test_asynchronous_vectorization_works():
    done = run(
        "import gymnasium as gym, numpy as np, rawdream_env\n"
        "env = gym.make_vec('rawdream/PiperSim-v0', num_envs=2, vectorization_mode='async')\n"
        "first, _ = env.reset(seed=3)\n"
        "after, *_ = env.step(np.zeros(env.action_space.shape, np.float32))\n"
        "print(first['image'].astype(int).sum(), after['image'].astype(int).sum())\n"
        "env.close()\n"
    )
    assert done.returncode == 0, done.stderr
    env = PiperSimVectorEnv(2)
    first, _ = env.reset(seed=3)
    after, *_ = env.step(np.zeros(env.action_space.shape, np.float32))
    assert done.stdout.split() == [str(x["image"].astype(int).sum()) for x in (first, after)]


def test_a_fork_of_a_process_that_has_drawn_is_refused_and_does_not_hang():
    done = run(
        "import os\n"
        "from rawdream_env.piper.simulator.twin import PiperTwin\n"
        "twin = PiperTwin(); twin.reset(0)\n"
        "if os.fork() == 0:\n"
        "    try: PiperTwin().reset(0)\n"
        "    except Exception as error: print(type(error).__name__, error, flush=True)\n"
        "    os._exit(0)\n"
        "os.wait(); twin.frame()\n"
    )
    assert done.stdout.startswith("RendererError process ")
    assert "context='spawn'" in done.stdout
    assert done.returncode == 0, done.stderr


def test_every_wait_for_a_worker_ends():
    workers = PiperWorkers(2, num_workers=2, timeout_s=30)
    workers.reset([0, 1], [0, 1], [None, None])
    pids = [process.pid for process in workers._processes]
    os.kill(pids[1], signal.SIGSTOP)
    workers._timeout_s = 3.0  # that of the other worker as well
    begun = time.monotonic()
    with pytest.raises(SimulatorError, match=r"worker 1 \(rows \[1\], exit code None\) did not answer within 3 s"):
        workers.proprio([0, 1])
    assert time.monotonic() - begun < 60
    wait_until(lambda: all(map(gone, pids)))  # stopped or not, no worker is left


def test_a_request_that_is_not_read_fails():
    workers = PiperWorkers(1, num_workers=1, timeout_s=2.0)
    try:
        workers.reset([0], [0], [None])
    except SimulatorError:
        pytest.skip("too slow to start within 2 s")
    os.kill(workers._processes[0].pid, signal.SIGSTOP)
    begun = time.monotonic()
    with pytest.raises(SimulatorError, match="did not read its request within 2 s"):
        workers.step([0], np.zeros((1, 50_000, 7)))  # more than the pipe holds
    assert time.monotonic() - begun < 60


def test_a_program_ends_although_a_worker_is_stopped():
    done = run(
        "import os, signal\n"
        "from rawdream_env.piper.simulator.workers import PiperWorkers\n"
        "if __name__ == '__main__':\n"
        "    workers = PiperWorkers(1, num_workers=1)\n"
        "    workers.reset([0], [0], [None])\n"
        "    os.kill(workers._processes[0].pid, signal.SIGSTOP)\n"
        "    print(workers._processes[0].pid)\n"
    )
    assert done.returncode == 0, done.stderr
    wait_until(lambda: gone(int(done.stdout)))


def test_ctrl_c_is_the_parents_alone():
    """A terminal sends SIGINT to every process of the group."""
    script = (
        "import os, signal, time, numpy as np\n"
        "from rawdream_env.piper.envs import PiperSimVectorEnv\n"
        "env = PiperSimVectorEnv(2, num_workers=2)\n"
        "actions = np.zeros(env.action_space.shape, np.float32)\n"
        "try:\n"
        "    os.killpg(0, signal.SIGINT)\n"  # while the workers are still starting
        "    time.sleep(5)\n"
        "except KeyboardInterrupt: print('first')\n"
        "env.reset(seed=0)\n"
        "try:\n"
        "    os.killpg(0, signal.SIGINT)\n"
        "    time.sleep(5)\n"
        "except KeyboardInterrupt: print('second')\n"
        "print(int(env.step(actions)[0]['image'].astype(int).sum()))\n"
        "env.close()\n"
    )
    done = run(script, start_new_session=True)
    assert done.returncode == 0, done.stderr
    env = PiperSimVectorEnv(2)
    env.reset(seed=0)
    expected = int(env.step(np.zeros(env.action_space.shape, np.float32))[0]["image"].astype(int).sum())
    assert done.stdout.split() == ["first", "second", str(expected)]
