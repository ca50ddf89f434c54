"""Dual-noise verification: a success counts only when it repeats with fresh noise (RAW-Dream, section 3.2 and appendix A.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from rawdream_env.envs.verification import DualNoiseStatistics, OnDisagree, Verifier
from rawdream_env.types import Outcome, Verdict
from rawdream_env.wrappers.base import AnyVectorEnv, ForwardingVectorWrapper, as_numpy, episode_infos

if TYPE_CHECKING:
    from rawdream_env.envs.imagination import Replay


class DualNoiseVerification(ForwardingVectorWrapper):
    """Imagines every success a second time with independent noise; a success that does not repeat loses its reward.

    A world model sometimes hallucinates the outcome: a grasp that misses closes on an object after all. Physics does
    not depend on the diffusion noise, a hallucination does. So when an episode ends judged a success, its recorded
    start and actions are imagined again with noise draw ``draw`` at every chunk, and the second video is judged too.
    Failures are not checked: the cost is 1 + p world-model work, p the share of successes. All episodes that end in one
    step are replayed in one batch.

    The step that ends an episode carries, in ``infos`` (in ``infos["final_info"]`` with SAME_STEP autoreset), arrays
    of length num_envs with Gymnasium's ``_key`` masks:

    ==============================  =======  ==============================================================
    ``verified``                    bool     the success repeated, or it was a failure, which needs no check
    ``flagged``                     bool     judged a success first, a failure the second time
    ``second_verdict``              int8     1 success, 0 failure, -1 not replayed or INVALID
    ``replay_success_probability``  float64  of the second video; masked out where the judge gives none
    ==============================  =======  ==============================================================

    ``verdict`` and ``is_success`` stay those of the first dream: count ``is_success & verified``.

    What happens to ``rewards`` and ``valid`` is the rule of :func:`rawdream_env.envs.verification.episode_result`: a success
    that does not repeat, or whose second verdict is INVALID, loses its reward and is not ``valid``. With
    ``on_disagree="zero"`` a flagged episode stays valid, as a failure, for libraries that do not know ``valid``
    (stable-baselines3, skrl, TorchRL). "mask" is the paper's: a flagged rollout is left out of the group's statistics and
    has advantage 0.

    Args:
        env: a dream with ``trajectories()`` and ``replay(trajectories, draw)``, or wrappers around one.
        draw: noise draw of the second dream, >= 1 (0 is the first dream's).
        on_disagree: "mask" or "zero", above.
        keep_frames: keep the second dreams' frames in ``last_replays``; `Record` switches it on.

    Attributes:
        statistics: counts since the wrapper was made, a `DualNoiseStatistics`.
        last_replays: the second dreams of the latest step, row -> ``Replay`` (``frames`` uint8 (F, H, W, 3) or None,
            and ``verdict``).

    Raises:
        InvalidOptionError: the environment is no dream (a simulator has no noise to redraw), ``draw`` < 1, or an
            unknown ``on_disagree``.
    """

    _CHANGES = ("last_replays", "statistics")

    def __init__(
        self, env: AnyVectorEnv, draw: int = 1, on_disagree: OnDisagree = "mask", keep_frames: bool = False
    ) -> None:
        super().__init__(env)
        self.verifier = Verifier(env.unwrapped, draw, on_disagree, keep_frames=keep_frames)
        self.last_replays: dict[int, Replay] = {}

    @property
    def statistics(self) -> DualNoiseStatistics:
        """Counts since the wrapper was made."""
        return self.verifier.statistics

    @statistics.setter
    def statistics(self, value: DualNoiseStatistics) -> None:
        self.verifier.statistics = value

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset the environment; nothing is verified at a reset."""
        with self.all_or_nothing():
            self.last_replays = {}
            return self.env.reset(seed=seed, options=options)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step; where an episode ends as a success, imagine it again and judge the second video.

        When that raises, or is interrupted by Ctrl-C, the step is undone and can be taken again.
        """
        with self.all_or_nothing():
            return self._verified_step(actions)

    def _verified_step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        observations, rewards, terminations, truncations, infos = self.env.step(actions)
        self.last_replays = {}
        done = as_numpy(terminations).astype(bool) | as_numpy(truncations).astype(bool)
        finals = episode_infos(infos, self.autoreset_mode)
        if "is_success" in finals:
            # A row idling after its end (autoreset disabled) keeps its flags, but has no infos.
            ended = done & as_numpy(finals["_is_success"])
            self._verify(np.flatnonzero(ended), np.flatnonzero(ended & as_numpy(finals["is_success"]).astype(bool)))
            finals, rewards = self._applied(finals, ended, rewards)
            infos = {**infos, "final_info": finals} if self.autoreset_mode is AutoresetMode.SAME_STEP else finals
        return observations, rewards, terminations, truncations, infos

    def _verify(self, ended: NDArray[np.intp], successes: NDArray[np.intp]) -> None:
        """Fill ``last_replays`` for the rows ``successes`` in one batch, and count."""
        base: Any = self.unwrapped
        chunks = sum(len(trajectory.actions) for trajectory in base.trajectories(ended.tolist()))
        trajectories = base.trajectories(successes.tolist())
        replays = self.verifier.second_dreams(trajectories)
        self.last_replays = dict(zip(successes.tolist(), replays, strict=True))
        verdicts = [replay.verdict for replay in replays if replay.verdict is not None]
        self.verifier.count(episodes=len(ended), chunks=chunks, replayed=trajectories, verdicts=verdicts)

    def _applied(self, finals: dict[str, Any], ended: NDArray[np.bool_], rewards: Any) -> tuple[dict[str, Any], Any]:
        """Infos and rewards after the rule; both are copied where they change."""
        n = self.num_envs
        second, probability = np.full(n, Outcome.INVALID, np.int8), np.full(n, np.nan)
        verified, flagged = np.zeros(n, bool), np.zeros(n, bool)
        valid = as_numpy(finals["valid"]).astype(bool)
        lost = []
        for row in np.flatnonzero(ended).tolist():
            replay = self.last_replays.get(row)
            again = replay.verdict if replay is not None else None
            result = self.verifier.result(Verdict(Outcome(int(finals["verdict"][row]))), again)
            verified[row], flagged[row] = result.verified, result.flagged
            if again is not None:
                second[row] = again.outcome
                probability[row] = np.nan if again.probability is None else again.probability
                valid[row] &= result.valid
                lost += [] if result.reward else [row]
        if lost:
            rewards = rewards.clone() if hasattr(rewards, "clone") else np.array(rewards)
            rewards[lost] = 0.0
        fields = {
            "verified": (verified, ended),
            "flagged": (flagged, ended),
            "second_verdict": (second, ended),
            "replay_success_probability": (probability, np.isfinite(probability)),
        }
        infos = {**finals, "valid": valid}
        for name, (values, mask) in fields.items():
            infos[name], infos[f"_{name}"] = values, mask.copy()
        return infos, rewards
