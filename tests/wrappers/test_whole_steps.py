"""A step happens wholly or not at all, whatever wrapper fails after the environment's own step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rawdream_env.envs.dream import DreamVectorEnv
from rawdream_env.errors import InvalidOptionError, JudgeError
from rawdream_env.judges.scripted import ScriptedJudge
from rawdream_env.types import Verdict
from rawdream_env.wrappers import DualNoiseVerification, InstructionObservation, Record, TorchIO, record

HORIZON = 2


class Broken(ScriptedJudge):
    """Fails at calls of the given numbers, counted from 0."""

    def __init__(self, failures: dict[int, BaseException | None]) -> None:
        super().__init__(success_rate=0.7)
        self.failures, self.asked = failures, 0

    def __call__(self, videos: Any, instructions: Any) -> list[Verdict]:
        self.asked += 1
        if (number := self.asked - 1) in self.failures:
            if (failure := self.failures[number]) is None:
                return []  # `ask` raises JudgeError
            raise failure
        return super().__call__(videos, instructions)


def dream(judge: Any, mode: str) -> DreamVectorEnv:
    return DreamVectorEnv(
        4,
        world_model="null",
        judge=judge,
        starts="null",
        autoreset_mode=mode,
        max_episode_steps=HORIZON,
        return_frames=True,
    )


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, tuple) or (isinstance(a, np.ndarray) and a.dtype == object):
        return all(map(equal, a, b))
    return bool(np.array_equal(a, b, equal_nan=getattr(a, "dtype", None) == np.float64))


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
@pytest.mark.parametrize("failure", [KeyboardInterrupt(), None])
def test_a_failure_in_the_second_dream_undoes_the_step(
    mode: str, failure: BaseException | None, tmp_path: Path
) -> None:
    def run(failures: dict[int, BaseException | None], folder: Path) -> tuple[list[Any], Any, list[str]]:
        verified = DualNoiseVerification(dream(Broken(failures), mode))
        env = InstructionObservation(Record(verified, folder))
        answers, failed = [env.reset(seed=3)], 0
        env.action_space.seed(1)
        for _ in range(2 * HORIZON if mode != "Disabled" else HORIZON):
            actions = env.action_space.sample()
            elapsed, kept = env.unwrapped.elapsed_steps, verified.last_replays
            try:
                answers.append(env.step(actions))
            except (KeyboardInterrupt, JudgeError):
                failed += 1
                assert env.unwrapped.elapsed_steps == elapsed and verified.last_replays == kept
                answers.append(env.step(actions))
        assert failed == len(failures)
        return answers, verified.statistics, sorted(path.name for path in folder.iterdir())

    whole = run({}, tmp_path / "whole")
    cut = run({1: failure}, tmp_path / "cut")  # call 0: the first dreams; call 1: the second dreams
    assert whole[1].n_success and whole[1:] == cut[1:]
    assert all(equal(a, b) for a, b in zip(whole[0], cut[0], strict=True))


def test_a_film_that_cannot_be_written_undoes_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        if "env2" in path.name and path.name not in tried:
            tried.append(path.name)
            raise OSError(28, "No space left on device")
        write(path, data)

    write, tried = record.atomic_write_bytes, list[str]()
    monkeypatch.setattr(record, "atomic_write_bytes", full)
    verified = DualNoiseVerification(dream(ScriptedJudge(success_rate=0.7), "NextStep"))
    env = Record(TorchIO(verified), tmp_path)
    env.reset(seed=3)
    actions = np.zeros(env.action_space.shape, np.float32)
    env.step(actions)
    with pytest.raises(OSError, match="No space left"):
        env.step(actions)
    assert env.unwrapped.elapsed_steps == (1,) * 4 and env.n_videos == 0 and verified.statistics.n_episodes == 0
    *_, infos = env.step(actions)
    assert infos["_verified"].all() and env.n_videos == len(list(tmp_path.iterdir())) == 4
    assert verified.statistics.n_episodes == 4


def test_an_instruction_outside_the_charset_undoes_the_step() -> None:
    base = dream(ScriptedJudge(), "NextStep")
    env = InstructionObservation(base)
    env.reset(seed=0)
    actions = np.zeros(env.action_space.shape, np.float32)
    env.step(actions)
    base.reset(seed=0)
    before = base.elapsed_steps
    env._text = type(env._text)(200, charset="xyz")
    with pytest.raises(InvalidOptionError, match="outside the charset"):
        env.step(actions)
    assert base.elapsed_steps == before
