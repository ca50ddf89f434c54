"""The checker passes good environments, and catches deliberately broken ones with the right check."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from rawdream_env.envs.dream import DreamVectorEnv
from rawdream_env.errors import InvalidOptionError
from rawdream_env.testing.check_vector_env import (
    GENERIC_CHECKS,
    STRICT_CHECKS,
    VectorEnvCheckError,
    check_vector_env,
)
from rawdream_env.testing.trees import difference

MODES = ("NextStep", "SameStep", "Disabled")


def cartpole(num_envs):
    return gym.make_vec("CartPole-v1", num_envs=num_envs)


def synchronous(num_envs, autoreset_mode):
    kwargs = {"autoreset_mode": autoreset_mode}
    return gym.make_vec("CartPole-v1", num_envs=num_envs, vectorization_mode="sync", vector_kwargs=kwargs)


def test_gymnasiums_own_environments_pass_the_generic_checks():
    report = check_vector_env(cartpole, chunks=60)
    assert report.passed == list(GENERIC_CHECKS)
    assert not report.skipped
    report = check_vector_env(synchronous, chunks=60, modes=MODES)
    assert len(report.passed) == 3 * len(GENERIC_CHECKS)


def test_strict_checks_find_what_cartpole_does_not_promise():
    with pytest.raises(VectorEnvCheckError) as caught:
        check_vector_env(cartpole, chunks=60, strict=True)
    assert {"row_independence", "row_seeds", "partial_reset", "order", "attributes"} <= set(caught.value.failed)


def test_too_few_steps_is_a_skip_with_its_reason():
    report = check_vector_env(cartpole, chunks=2, num_envs=[1])
    assert "chunks=" in report.skipped["autoreset"]
    with pytest.raises(InvalidOptionError, match=r"unknown checks \['colour'\]; known: spaces, metadata"):
        check_vector_env(cartpole, skip=["colour"])
    with pytest.raises(InvalidOptionError, match=r"num_envs=\[\] has no batch size"):
        check_vector_env(cartpole, num_envs=[])


class Good(DreamVectorEnv):
    """A base to break: three chunks an episode, some successes."""

    def __init__(self, num_envs, autoreset_mode="NextStep"):
        super().__init__(
            num_envs,
            world_model="null",
            judge="scripted",
            starts="null",
            max_episode_steps=3,
            judge_every="chunk",
            autoreset_mode=autoreset_mode,
        )


class WrongSpace(Good):
    def __init__(self, num_envs, **kwargs):
        super().__init__(num_envs, **kwargs)
        self.action_space = self.single_action_space


class NoMetadata(Good):
    def __init__(self, num_envs, **kwargs):
        super().__init__(num_envs, **kwargs)
        self.metadata = {"autoreset_mode": "NextStep"}


class WrongDtype(Good):
    def step(self, actions):
        observation, *rest = super().step(actions)
        return {"image": observation["image"].astype(np.float32)}, *rest


class NanRewards(Good):
    def step(self, actions):
        observation, rewards, *rest = super().step(actions)
        return observation, np.where(rest[1], np.nan, rewards), *rest


class NoMask(Good):
    def step(self, actions):
        *rest, infos = super().step(actions)
        del infos["_verdict"]
        return *rest, infos


class GlobalNoise(Good):
    def step(self, actions):
        observation, *rest = super().step(actions)
        observation["image"] ^= np.random.randint(0, 2, observation["image"].shape, dtype=np.uint8)
        return observation, *rest


class SharedBuffer(Good):
    def _observe(self, images):
        return {"image": images}


class SharedRewards(Good):
    def step(self, actions):
        observation, rewards, *rest = super().step(actions)
        self.buffer = getattr(self, "buffer", np.zeros(self.num_envs))
        self.buffer[:] = rewards
        return observation, self.buffer, *rest


class ChangesActions(Good):
    def step(self, actions):
        actions *= 0.5
        return super().step(actions)


class NeverResets(Good):
    """Says NextStep, but goes on acting after an end."""

    def step(self, actions):
        out = super().step(actions)
        self._phase[:] = 1
        return out


class NoFinalObs(Good):
    def step(self, actions):
        *rest, infos = super().step(actions)
        for key in ("final_obs", "_final_obs"):
            infos.pop(key, None)
        return *rest, infos


class FinalObsReturned(Good):
    def step(self, actions):
        observation, *rest, infos = super().step(actions)
        for row in np.flatnonzero(infos.get("_final_obs", [])):
            observation["image"][row] = infos["final_obs"][row]["image"]
        return observation, *rest, infos


class Immortal(Good):
    """Says Disabled, but rows come alive by themselves."""

    def step(self, actions):
        if self.autoreset_mode == AutoresetMode.DISABLED and (self._phase == 2).any():
            self._restart(np.flatnonzero(self._phase == 2))
        return super().step(actions)


class LooksAtNeighbours(Good):
    def step(self, actions):
        return super().step(np.clip(actions + 1e-2 * actions.mean(axis=0), -1, 1))


class SizeDependent(Good):
    def _begin(self, rows, keys, given):
        return super()._begin(rows, [type(key)(key.seed + self.num_envs, episode=key.episode) for key in keys], given)


class IgnoresMask(Good):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)


class PopsMask(Good):
    def reset(self, *, seed=None, options=None):
        mask = (options or {}).pop("reset_mask", None)
        return super().reset(seed=seed, options=None if mask is None else {"reset_mask": mask})


class TakesNan(Good):
    def step(self, actions):
        return super().step(np.nan_to_num(actions, posinf=1, neginf=-1))


class StepsWhenClosed(Good):
    def _require_open(self, what):
        pass

    def close_extras(self, **kwargs):
        pass


class ClosesOnce(Good):
    def close(self, **kwargs):
        if self.closed:
            raise RuntimeError("closed twice")
        super().close()


BROKEN = [
    (WrongSpace, "NextStep", "spaces", "batch_space"),
    (NoMetadata, "NextStep", "metadata", "AutoresetMode"),
    (WrongDtype, "NextStep", "results", "not in single_observation_space"),
    (NanRewards, "NextStep", "results", "must be finite"),
    (NoMask, "NextStep", "infos", "'_verdict'"),
    (GlobalNoise, "NextStep", "seeding", "never from numpy's"),
    (SharedBuffer, "NextStep", "aliasing", "changed after they were returned"),
    (SharedRewards, "NextStep", "aliasing", "rewards of call 2 shares memory with rewards of call 1"),
    (ChangesActions, "NextStep", "actions_untouched", "Copy before"),
    (NeverResets, "NextStep", "autoreset", "NextStep"),
    (NoFinalObs, "SameStep", "autoreset", "final_obs"),
    (FinalObsReturned, "SameStep", "autoreset", "next episode's first observation"),
    (Immortal, "Disabled", "autoreset", "A row that is over earns 0"),
    (LooksAtNeighbours, "NextStep", "neighbours", "other seeds and actions"),
    (SizeDependent, "NextStep", "row_independence", "between num_envs=1 and num_envs=2"),
    (IgnoresMask, "NextStep", "partial_reset", "reset_mask was False"),
    (PopsMask, "Disabled", "partial_reset", "do not pop it"),
    (TakesNan, "NextStep", "invalid_actions", "a NaN"),
    (StepsWhenClosed, "NextStep", "order", "after close"),
    (ClosesOnce, "NextStep", "closing", "closed twice"),
]


@pytest.mark.parametrize(("broken", "mode", "check", "words"), BROKEN, ids=[b[0].__name__ for b in BROKEN])
def test_broken_environments_are_caught(broken, mode, check, words):
    others = (set(GENERIC_CHECKS) | set(STRICT_CHECKS)) - {check}
    with pytest.raises(VectorEnvCheckError) as caught:
        check_vector_env(broken, modes=[mode], num_envs=(1, 2), chunks=7, strict=True, skip=others)
    assert caught.value.failed == (f"{check}[{mode}]",)
    message = str(caught.value)
    assert words in message
    assert "1 of 1 checks failed" in message
    assert "\n    -> " in message


def test_good_base_of_the_broken_ones_passes():
    for mode in MODES:
        check_vector_env(Good, modes=[mode], num_envs=(1, 2), chunks=7, strict=True)


def test_a_crash_inside_the_environment_is_a_finding_with_its_place():
    class Crashing(Good):
        def step(self, actions):
            raise KeyError("lost")

    with pytest.raises(VectorEnvCheckError, match=r"raised KeyError: 'lost' at .*test_check_vector_env\.py:\d+"):
        check_vector_env(Crashing, num_envs=(1,), chunks=2)


def test_difference_speaks_plainly():
    assert difference({"a": np.array([1.0, np.nan])}, {"a": np.array([1.0, np.nan])}) is None
    assert "['a'] differs in 1 of 2 values (first at (0,)" in difference(
        {"a": np.array([1, 2])}, {"a": np.array([3, 2])}
    )
    assert "float64" in difference(np.zeros(2), np.zeros(2, np.float32))
    assert "keys" in difference({"a": 1}, {"b": 1})
    assert difference(float("nan"), float("nan")) is None
    assert "2 entries here and 1" in difference((1, 2), (1,))
