"""The instant reflector: a reward at every chunk and an end when the task looks done (World-Env, arXiv 2509.24948)."""

from __future__ import annotations

from typing import Any

from rawdream_env.envs.reflector import Reflector
from rawdream_env.errors import InvalidOptionError
from rawdream_env.wrappers.base import AnyVectorEnv, ForwardingVectorWrapper


class InstantReflector(ForwardingVectorWrapper):
    """Asks a judge for a success probability after every chunk, on a dream and a simulator alike.

    *Reward*: the probability now minus the probability a chunk ago; before the first chunk it is ``initial``. So the
    rewards of an episode sum to the final probability minus ``initial``, and moving back and forth gains nothing.
    It replaces the environment's own reward.

    *End*: an episode is terminated when the judge finds the task done in ``patience`` consecutive chunks, so that a
    policy cannot undo its success. The environment's own ends remain.

    *INVALID*: a chunk whose verdict is INVALID (outage, unreadable, frames that are not finite) has reward 0, ``valid``
    False and no ``success_probability``; it ends nothing, and the next difference is to the last known probability.

    In infos, ``verdict`` and ``is_success`` are the reflector's (in a step that ends an episode 1 when the judge finds the
    task done, else 0 or -1; before that -1), ``success_probability`` (float64) is every chunk's, and ``env_verdict``
    (int8) is what the environment's own ``verdict`` was: the truth in a simulator.

    The wrapper attaches a :class:`rawdream_env.envs.reflector.Reflector` to the environment it wraps;
    ``gym.make_vec(..., reflector={"judge": ..., "threshold": ...})`` does the same without a wrapper. The environment needs
    ``return_frames=True``: the judge is shown every frame since the start. It may be made with ``judge="none"``, or, for a
    simulator whose own successes should not end episodes, with ``judge_every="episode"``. `DualNoiseVerification` around it
    asks the same judge about the second dream.

    Args:
        env: a vector environment of this package, in any autoreset mode, before its first reset.
        judge: a judge, its name or its folder; None: the environment's own.
        threshold: probability from which a task counts as done; None: the judge's own decision.
        patience: number of consecutive chunks that must count as done.
        initial: probability before the first chunk.
        last_frames: show the judge only this many frames (judges of short windows); None: all since the start.

    Raises:
        InvalidOptionError: not an environment of this package, no frames, no judge, or an option out of range.
    """

    def __init__(
        self,
        env: AnyVectorEnv,
        judge: Any = None,
        *,
        threshold: float | None = None,
        patience: int = 1,
        initial: float = 0.0,
        last_frames: int | None = None,
    ) -> None:
        super().__init__(env)
        base: Any = env.unwrapped
        if not callable(getattr(base, "attach_reflector", None)):
            raise InvalidOptionError(
                f"InstantReflector needs an environment of this package (a ChunkVectorEnv), not {env}."
            )
        own = getattr(base, "judge", None) if judge is None else judge
        self.reflector = Reflector(
            own, threshold=threshold, patience=patience, initial=initial, last_frames=last_frames
        )
        base.attach_reflector(self.reflector)
