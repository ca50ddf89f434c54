"""Worker processes of simulated rows that are started again: a counter per row is the simulator."""

from __future__ import annotations

import os
import signal
import time
from functools import partial

import pytest

from rawdream_env.envs.row_workers import RowGroup, RowWorkers
from rawdream_env.errors import ClosedEnvironmentError, InvalidOptionError
from tests.waiting import gone, wait_until

LONG = 300.0


class Counters(RowGroup):
    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, int] = {}

    def reset(self, rows, values):
        self.rows.update(zip(rows, values, strict=True))
        return values

    def step(self, rows, by):
        for row in rows:
            if row in self.rows:
                self.rows[row] += by
        return [self.rows.get(row) for row in rows]

    def sleep(self, rows, seconds):
        time.sleep(seconds)
        return list(rows)

    def state(self, rows):
        return [self.rows.get(row) for row in rows]

    def restore(self, rows, states):
        self.rows.update({row: state for row, state in zip(rows, states, strict=True) if state is not None})
        return [None] * len(rows)


class Counting(RowWorkers):
    _NAME, _RESTARTS = "counting", True

    def _group(self, rows):
        return partial(Counters)

    def _options(self):
        return self.num_envs, self.num_workers, self._timeout_s

    def _replace(self, worker, what):
        super()._replace(worker, what)
        self._timeout_s = LONG  # starting takes as long as it takes

    def __call__(self, name, rows, *args):
        return self._call(name, self._check_rows(rows), *args)


def begun(num_envs=4, num_workers=2, timeout_s=LONG):
    workers = Counting(num_envs, num_workers, timeout_s)
    workers("reset", list(range(num_envs)), [10 * row for row in range(num_envs)])
    return workers


def pids(workers) -> list[int]:
    return [process.pid for process in workers._processes]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_worker_is_started_again_and_its_rows_alone_are_void(number, caplog) -> None:
    workers = begun()
    lost, kept = pids(workers)[1], pids(workers)[0]
    os.kill(lost, number)
    workers._timeout_s = LONG if number == signal.SIGKILL else 3.0  # that of the other worker as well
    begin = time.monotonic()
    assert workers("step", [0, 1, 2, 3], 1) == [1, None, 21, None]
    assert time.monotonic() - begin < LONG / 2
    assert "rows [1, 3]" in caplog.text and "it was started again" in caplog.text
    assert workers("step", [1, 2], 1) == [None, 22], "void until it is reset"
    workers("reset", [1], [5])
    assert workers("step", [0, 1, 2, 3], 1) == [2, 6, 23, None]
    assert pids(workers)[0] == kept
    wait_until(lambda: gone(lost))
    workers.close()
    with pytest.raises(ClosedEnvironmentError):
        workers("step", [0], 1)


def test_a_worker_dies_during_a_reset_and_a_close() -> None:
    workers = begun(2)
    os.kill(pids(workers)[0], signal.SIGKILL)
    assert workers("reset", [0, 1], [7, 8]) == [None, 8]
    assert workers("reset", [0], [7]) == [7]
    os.kill(pids(workers)[1], signal.SIGSTOP)
    left = pids(workers)
    workers.close()
    wait_until(lambda: all(map(gone, left)))


def test_calls_are_taken_back_also_around_a_lost_worker() -> None:
    workers = begun()
    mark = workers.mark()
    workers("step", [0, 1, 2, 3], 1)
    os.kill(pids(workers)[1], signal.SIGKILL)
    workers("step", [0, 1], 1)
    workers.take_back(mark)
    assert workers("step", [0, 1, 2, 3], 1) == [1, None, 21, None]
    workers.close()


def test_restarts_leak_no_descriptors() -> None:
    workers = begun(1, 1)
    counts = []
    for _ in range(4):
        os.kill(pids(workers)[0], signal.SIGKILL)
        workers("step", [0], 1)
        counts.append(len(os.listdir("/proc/self/fd")))
    assert len(set(counts)) == 1
    workers.close()


def test_the_deadline_holds_for_an_answer_that_is_late() -> None:
    workers = begun(2, 2)
    workers._timeout_s = 0.5
    assert workers("sleep", [0], 30.0) == [None]
    assert workers("step", [1], 1) == [11]
    workers.close()


def test_bad_numbers() -> None:
    with pytest.raises(InvalidOptionError, match="num_workers=-1"):
        Counting(1, -1, 1.0)
