"""Workers that are killed or stopped in the middle of a call, through the environment. The rows in them are counters."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from rawdream_env.envs import row_workers
from rawdream_env.envs.row_workers import RowGroup
from rawdream_env.errors import SimulatorError
from rawdream_env.libero import envs
from rawdream_env.libero.envs import LiberoSimVectorEnv
from rawdream_env.libero.workers import LiberoWorkers
from tests.waiting import gone, wait_until

SIDE = 8
FAULTS = "RAWDREAM_TEST_FAULTS"
LONG = 300.0


class CountingRows(RowGroup):
    """A row is the number of its steps. A file CALL-ROW in the folder ``FAULTS`` holds the signal that ends the worker once
    in that call.
    """

    def __init__(self) -> None:
        super().__init__()
        self._rows: dict[int, int | None] = {}

    def _fault(self, call, rows=(0, 1)):
        for row in rows:
            file = Path(os.environ[FAULTS]) / f"{call}-{row}"
            if file.exists():
                number, again = map(int, file.read_text().split())
                if not again:
                    file.unlink()
                os.kill(os.getpid(), number)

    def _picture(self, row):
        return np.full((SIDE, SIDE, 3), 10 * row + (self._rows[row] or 0), np.uint8)

    def reset(self, rows, tasks, numbers):
        self._fault("reset", rows)
        self._rows.update(dict.fromkeys(rows, 0))
        return [(self._picture(row), np.zeros(8, np.float32)) for row in rows]

    def step(self, rows, actions, every_frame):
        self._fault("step", rows)
        answers = []
        for row in rows:
            if self._rows.get(row) is None:
                answers.append(None)
                continue
            self._rows[row] += 1
            answers.append((self._picture(row)[None], np.zeros((1, 8), np.float32), False, False))
        return answers

    def state(self, rows):
        return [self._rows.get(row) for row in rows]

    def restore(self, rows, states):
        self._rows.update(zip(rows, states, strict=True))
        return [None] * len(rows)

    def close(self):
        self._fault("close", self._rows)


class CountingWorkers(LiberoWorkers):
    def _group(self, rows):
        return partial(CountingRows)

    def _replace(self, worker, what):
        super()._replace(worker, what)
        self._timeout_s = LONG  # starting takes as long as it takes


@pytest.fixture(autouse=True)
def faults(tmp_path, monkeypatch):
    monkeypatch.setenv(FAULTS, str(tmp_path))
    monkeypatch.setattr(envs, "LiberoWorkers", CountingWorkers)
    monkeypatch.setattr(envs, "task_list", lambda suite: (("put_bowl", "put the bowl"),))

    def fault(call, row, number, again=False):
        (tmp_path / f"{call}-{row}").write_text(f"{int(number)} {int(again)}")

    return fault


def make(workers=2, **options) -> LiberoSimVectorEnv:
    return LiberoSimVectorEnv(
        2, suite="libero_goal", image_size=SIDE, num_workers=workers,
        **{"autoreset_mode": "SameStep", "max_episode_steps": 3, "timeout_s": LONG, **options},
    )  # fmt: skip


ACTIONS = np.zeros((2, 8, 7), np.float32)


def children() -> dict[int, str]:
    """State of every child process: "Z" is a zombie."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it ended meanwhile
            continue
        if int(parent) == os.getpid():
            found[int(stat.parent.name)] = state
    return found


def pids(env) -> set[int]:
    return {process.pid for process in env._workers._processes}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_lost_in_a_step_voids_its_episode_alone(faults, number) -> None:
    env, reference = make(), make(workers=0)
    try:
        env.reset(seed=0), reference.reset(seed=0)
        started = pids(env)
        faults("step", 1, number)
        env._workers._timeout_s = LONG if number == signal.SIGKILL else 3.0  # that of its neighbour as well
        begun = time.monotonic()
        step = env._workers.step([0, 1], list(ACTIONS))
        assert time.monotonic() - begun < LONG / 2, "within the deadline, or at once"
        assert step.lost.tolist() == [False, True] and len(started & pids(env)) == 1
        here, there = env.step(ACTIONS), reference.step(ACTIONS)
        assert here[3].tolist() == [False, True] and here[4]["final_info"]["valid"].tolist() == [False, False]
        assert np.array_equal(here[0]["image"][0], there[0]["image"][0] + 1), "its neighbour has gone on"
        assert env.step(ACTIONS)[4]["valid"].all()
        assert not started - pids(env) & children().keys()
    finally:
        env.close()
        reference.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_lost_in_a_reset_is_started_again(faults, number) -> None:
    env = make()
    try:
        env.reset(seed=0)
        faults("reset", 1, number)
        env._workers._timeout_s = LONG if number == signal.SIGKILL else 3.0
        observation, infos = env.reset(seed=1)
        assert infos["valid"].all() and observation["image"][1].max() == 10
        assert "Z" not in children().values()
    finally:
        env.close()


def test_a_worker_lost_twice_is_named(faults) -> None:
    env = make()
    try:
        faults("reset", 1, signal.SIGKILL, again=True)
        with pytest.raises(
            SimulatorError, match=r"libero_goal worker 1 \(rows \[1\], tasks \[0\]\) died or did not answer"
        ):
            env.reset(seed=0)
    finally:
        env.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_closing_ends_every_worker(faults, monkeypatch, number) -> None:
    monkeypatch.setattr(row_workers, "_CLOSE_S", 1.0)
    env = make()
    env.reset(seed=0)
    workers = pids(env)
    faults("close", 1, number)
    begun = time.monotonic()
    env.close()
    assert time.monotonic() - begun < 60
    wait_until(lambda: all(map(gone, workers)))


def test_200_episodes_leak_no_descriptor_and_no_process(faults) -> None:
    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(children())

    before = held()
    env = make(max_episode_steps=1)
    env.reset(seed=0)
    opened = held()
    for chunk in range(100):
        if chunk % 40 == 20:
            faults("step", 1, signal.SIGKILL)
        env.step(ACTIONS)
    assert held() == opened
    env.close()
    assert held()[0] <= before[0] + 1 and "Z" not in children().values()  # one for multiprocessing's own tracker
