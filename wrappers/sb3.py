"""A vector environment as a stable-baselines3 ``VecEnv``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from rawdream_env.envs.infos import row_info
from rawdream_env.errors import InvalidOptionError, MissingDependencyError
from rawdream_env.wrappers.base import AnyVectorEnv, as_numpy, autoreset_mode, chain
from rawdream_env.wrappers.spaces import FlatAction

try:
    from stable_baselines3.common.vec_env import VecEnv
    from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices
except ImportError as error:
    raise MissingDependencyError(
        "SB3VecEnv needs stable-baselines3, which is not installed: pip install 'rawdream-env[sb3]'."
    ) from error


class SB3VecEnv(VecEnv):
    """A vector environment for the algorithms of stable-baselines3, in a dream or a simulator.

    ::

        envs = gym.make_vec("rawdream/PiperDream-v0", num_envs=4, autoreset_mode="SameStep")
        model = PPO("MultiInputPolicy", VecMonitor(SB3VecEnv(envs)))

    The wrapper translates between the two interfaces:

    - actions: stable-baselines3 sees the chunk flattened, ``Box(-1, 1, (K * A,))``, since some of its algorithms only
      take vectors; the ``MultiDiscrete`` of `TokenActions` stays as it is;
    - episode ends: ``dones`` is terminated or truncated, ``TimeLimit.truncated`` marks truncation, the last observation is
      ``terminal_observation``, the infos of that step are those of the episode that ended (``is_success`` with them),
      and the new episode's are in ``reset_infos``;
    - rewards are float32.

    stable-baselines3 does not know ``valid``: with `DualNoiseVerification` use ``on_disagree="zero"``.

    Args:
        env: a vector environment with SAME_STEP autoreset.
        end_at_horizon: report the horizon as a terminal state, without ``TimeLimit.truncated``. At a truncation
            stable-baselines3 adds gamma times the value of the last observation to the reward. That suits tasks that go
            on; here an episode without success at the horizon has failed, and with gamma 1 it would be rewarded.

    Raises:
        InvalidOptionError: another autoreset mode (stable-baselines3 would train on the reset step), a text
            observation, or an action space that is neither ``Box`` nor ``MultiDiscrete``.
        MissingDependencyError: stable-baselines3 is not installed.
    """

    def __init__(self, env: AnyVectorEnv, *, end_at_horizon: bool = False) -> None:
        mode = autoreset_mode(env)
        if mode is not AutoresetMode.SAME_STEP:
            raise InvalidOptionError(
                f"SB3VecEnv needs SAME_STEP autoreset, this environment has {mode.name}: "
                'make it with gym.make_vec(id, num_envs=..., autoreset_mode="SameStep").'
            )
        actions, observations = env.single_action_space, env.single_observation_space
        if not isinstance(actions, spaces.Box | spaces.MultiDiscrete):
            raise InvalidOptionError(f"SB3VecEnv takes Box or MultiDiscrete actions, not {type(actions).__name__}.")
        if isinstance(observations, spaces.Dict) and any(isinstance(s, spaces.Text) for s in observations.values()):
            raise InvalidOptionError(
                "stable-baselines3 takes no text observations: use InstructionObservation(env, words=True), or omit it and "
                "read infos['instruction']."
            )
        self.env = FlatAction(env) if isinstance(actions, spaces.Box) else env
        self.end_at_horizon = end_at_horizon
        self._actions: NDArray[Any] | None = None
        super().__init__(env.num_envs, observations, self.env.single_action_space)

    def reset(self) -> Any:
        """Reset every environment with the seeds of ``seed()`` (used once); infos go to ``reset_infos``."""
        seeds = [seed for seed in self._seeds if seed is not None]
        kwargs: dict[str, Any] = {"seed": seeds} if len(seeds) == self.num_envs else {}
        if any(self._options):
            if any(options != self._options[0] for options in self._options):
                raise InvalidOptionError(
                    "A vector environment has one set of reset options; pass the same options for every row."
                )
            kwargs["options"] = self._options[0]
        observations, infos = self.env.reset(**kwargs)
        self.reset_infos = [row_info(infos, row) for row in range(self.num_envs)]
        self._reset_seeds()
        self._reset_options()
        return _arrays(observations)

    def step_async(self, actions: NDArray[Any]) -> None:
        """Keep ``actions`` (B, K * A) for ``step_wait``."""
        self._actions = np.asarray(actions)

    def step_wait(self) -> tuple[Any, NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """Take the step: observations, rewards float32 (B,), dones bool (B,), one info dict per row."""
        if self._actions is None:
            raise InvalidOptionError("step_wait() without step_async(actions): call step(actions).")
        observations, rewards, terminations, truncations, infos = self.env.step(self._actions)
        self._actions = None
        terminated, truncated = as_numpy(terminations).astype(bool), as_numpy(truncations).astype(bool)
        dones = terminated | truncated
        finals = {key: infos.pop(key) for key in ("final_obs", "final_info") if key in infos}
        rows = []
        for row in range(self.num_envs):
            info = row_info(infos, row)
            if dones[row]:
                self.reset_infos[row] = info
                info = row_info(finals["final_info"], row)
                info["terminal_observation"] = _arrays(finals["final_obs"][row])
            info["TimeLimit.truncated"] = bool(truncated[row] and not terminated[row] and not self.end_at_horizon)
            rows.append(info)
        return _arrays(observations), as_numpy(rewards).astype(np.float32), dones, rows

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def get_images(self) -> Sequence[NDArray[np.uint8] | None]:
        """One rendered frame per row, None where ``render_mode`` is None."""
        if self.env.render_mode is None:
            return [None] * self.num_envs
        frames = self.env.render()
        return [None] * self.num_envs if frames is None else list(frames)  # type: ignore[arg-type]

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """The attribute of the rows in ``indices`` (all by default)."""
        if attr_name == "render_mode":  # the base class asks before anything else
            values: Sequence[Any] = [self.env.render_mode] * self.num_envs
        else:
            values = self._vector("get_attr")(attr_name)
        return [values[row] for row in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set the attribute on the rows in ``indices`` (all by default)."""
        if indices is None:
            self._vector("set_attr")(attr_name, value)
            return
        values = self.get_attr(attr_name)
        for row in self._get_indices(indices):
            values[row] = value
        self._vector("set_attr")(attr_name, values)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of the sub-environments; returns the rows in ``indices``. It is called on all of them."""
        values = self._vector("call")(method_name, *method_args, **method_kwargs)
        return [values[row] for row in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[Any], indices: VecEnvIndices = None) -> list[bool]:
        """Whether a vector wrapper of that class is in the chain, for every row."""
        wrapped = any(isinstance(layer, wrapper_class) for layer in chain(self.env))
        return [wrapped for _ in self._get_indices(indices)]

    def _vector(self, name: str) -> Any:
        # Gymnasium's own wrappers do not forward call, get_attr and set_attr: take the outermost layer that has them.
        for layer in chain(self.env):
            if hasattr(layer, name):
                return getattr(layer, name)
        raise AttributeError(f"{self.env} has no {name}().")


def _arrays(observations: Any) -> Any:
    if isinstance(observations, dict):
        return {key: as_numpy(value) for key, value in observations.items()}
    return as_numpy(observations)
