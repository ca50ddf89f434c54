"""Dual-noise verification: a success counts only when it is dreamt twice (RAW-Dream, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from rawdream_env.errors import InvalidOptionError, JudgeUnavailableError
from rawdream_env.types import Outcome, Trajectory, Verdict
from rawdream_env.wrappers.base import AnyVectorEnv, ForwardingVectorWrapper, as_numpy

if TYPE_CHECKING:
    from rawdream_env.envs.imagination import Replay


@dataclass(frozen=True)
class DualNoiseStatistics:
    """Counts since the wrapper was made.

    ``n_episodes`` ended; ``n_success`` of them were judged successful in the first dream and so dreamt again;
    ``n_flagged`` of those failed the second time; ``n_invalid`` had no readable second verdict. ``chunks`` and
    ``replayed_chunks`` count world-model work.
    """

    n_episodes: int = 0
    n_success: int = 0
    n_flagged: int = 0
    n_invalid: int = 0
    chunks: int = 0
    replayed_chunks: int = 0

    @property
    def flagged_rate(self) -> float:
        """Share of the successes with a readable second verdict that did not repeat; NaN while there are none."""
        n = self.n_success - self.n_invalid
        return self.n_flagged / n if n else float("nan")

    @property
    def work_ratio(self) -> float:
        """World-model work with verification over work without; 1 + p where episodes are equally long."""
        return 1.0 + self.replayed_chunks / self.chunks if self.chunks else float("nan")


class DualNoiseVerification(ForwardingVectorWrapper):
    """Dreams every success a second time with independent noise and takes away what does not repeat.

    A world model sometimes hallucinates the outcome: the grasp that missed closes on an object after all. Physics does
    not depend on the diffusion noise, a hallucination does. So when an episode ends judged a success, its recorded
    start and actions are imagined again with noise draw ``draw`` at every chunk, and the second video is judged too
    (section 3.3; GRPO's use of the flags is section 3.4). Failures are not checked: the cost is 1 + p world-model work,
    p the share of successes. All episodes that end in one step are replayed in one batch.

    The step that ends an episode carries, in ``infos`` (in ``infos["final_info"]`` with SAME_STEP autoreset), arrays
    of length num_envs with Gymnasium's ``_key`` masks:

    ==============================  =======  ==============================================================
    ``verified``                    bool     the success repeated, or it was a failure, which needs no check
    ``flagged``                     bool     judged a success first, a failure the second time
    ``second_verdict``              int8     1 success, 0 failure, -1 not replayed or not readable
    ``replay_success_probability``  float64  of the second video; masked out where the judge gives none
    ==============================  =======  ==============================================================

    ``verdict`` and ``is_success`` stay those of the first dream: count ``is_success & verified``.

    What happens to the reward:

    ==============  ======  ===========================  =====
    second verdict  reward  ``valid`` with "mask"        "zero"
    ==============  ======  ===========================  =====
    success         kept    kept                         kept
    failure         0.0     False: must not be trained   kept: trained on as a failure
    invalid         0.0     False                        False
    ==============  ======  ===========================  =====

    "mask" is the paper's: a flagged rollout is left out of the group's statistics and has advantage 0. "zero" is for
    libraries that do not know ``valid`` (stable-baselines3, skrl, TorchRL).

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

    def __init__(
        self,
        env: AnyVectorEnv,
        draw: int = 1,
        on_disagree: Literal["mask", "zero"] = "mask",
        keep_frames: bool = False,
    ) -> None:
        super().__init__(env)
        base: Any = env.unwrapped
        if not (callable(getattr(base, "replay", None)) and callable(getattr(base, "trajectories", None))):
            raise InvalidOptionError(
                f"DualNoiseVerification needs a dream that can replay its episodes; {env} cannot. A simulator has no "
                "noise to redraw: leave the wrapper off there, or use a ...Dream-v0 id."
            )
        if draw < 1:
            raise InvalidOptionError(f"draw={draw} would repeat the first dream's noise (draw 0); use draw >= 1.")
        if on_disagree not in ("mask", "zero"):
            raise InvalidOptionError(f"on_disagree={on_disagree!r} is unknown; use 'mask' or 'zero'.")
        self.draw = draw
        self.on_disagree = on_disagree
        self.statistics = DualNoiseStatistics()
        self.last_replays: dict[int, Replay] = {}
        self.keep_frames = keep_frames

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset the environment; nothing is verified at a reset."""
        self.last_replays = {}
        return self.env.reset(seed=seed, options=options)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step; where an episode ends as a success, dream it again and judge the second video."""
        observations, rewards, terminations, truncations, infos = self.env.step(actions)
        self.last_replays = {}
        done = as_numpy(terminations).astype(bool) | as_numpy(truncations).astype(bool)
        same_step = self.autoreset_mode is AutoresetMode.SAME_STEP
        finals = infos.get("final_info", {}) if same_step else infos
        if "is_success" in finals:
            # A row idling after its end (autoreset disabled) keeps its flags, but has no infos.
            ended = done & as_numpy(finals["_is_success"])
            successes = ended & as_numpy(finals["is_success"]).astype(bool)
            self._replay(np.flatnonzero(ended), np.flatnonzero(successes))
            finals, rewards = self._applied(finals, ended, rewards)
            infos = {**infos, "final_info": finals} if same_step else finals
        return observations, rewards, terminations, truncations, infos

    def _replay(self, ended: NDArray[np.intp], successes: NDArray[np.intp]) -> None:
        """Fill ``last_replays`` for the rows ``successes`` in one batch, and count."""
        base: Any = self.unwrapped
        chunks = sum(len(trajectory.actions) for trajectory in base.trajectories(ended.tolist()))
        trajectories = base.trajectories(successes.tolist())
        if trajectories:
            replays = self._second_dreams(base, trajectories)
            self.last_replays = dict(zip(successes.tolist(), replays, strict=True))
        self.count(
            len(ended), chunks, trajectories, [_verdict(replay).outcome for replay in self.last_replays.values()]
        )

    def count(self, ended: int, chunks: int, replayed: list[Trajectory], outcomes: list[Outcome]) -> None:
        """Add to the statistics: ``ended`` episodes of ``chunks`` chunks in all, and the second verdicts of ``replayed``.

        Called by ``step``, and by those who verify for themselves because their verdicts come later.
        """
        s = self.statistics
        self.statistics = DualNoiseStatistics(
            n_episodes=s.n_episodes + ended,
            n_success=s.n_success + len(replayed),
            n_flagged=s.n_flagged + outcomes.count(Outcome.FAILURE),
            n_invalid=s.n_invalid + outcomes.count(Outcome.INVALID),
            chunks=s.chunks + chunks,
            replayed_chunks=s.replayed_chunks + sum(len(trajectory.actions) for trajectory in replayed),
        )

    def _second_dreams(self, base: Any, trajectories: list[Trajectory]) -> list[Replay]:
        try:
            replays: list[Replay] = base.replay(trajectories, draw=self.draw, return_frames=self.keep_frames)
        except JudgeUnavailableError as error:
            # The first dream's step has happened and must be returned; without a second verdict it is not verified.
            from rawdream_env.envs.imagination import Replay

            return [Replay(None, Verdict(Outcome.INVALID, f"judge unavailable: {error}"))] * len(trajectories)
        return replays

    def _applied(self, finals: dict[str, Any], ended: NDArray[np.bool_], rewards: Any) -> tuple[dict[str, Any], Any]:
        """The infos with what the second dreams said, and the rewards without the successes that did not repeat."""
        n = self.num_envs
        second = np.full(n, Outcome.INVALID, np.int8)
        probability = np.full(n, np.nan)
        replayed = np.zeros(n, bool)
        for row, replay in self.last_replays.items():
            verdict = _verdict(replay)
            replayed[row], second[row] = True, verdict.outcome
            probability[row] = np.nan if verdict.probability is None else verdict.probability
        flagged = replayed & (second == Outcome.FAILURE)
        unreadable = replayed & (second == Outcome.INVALID)
        failed = ended & (as_numpy(finals["verdict"]) == Outcome.FAILURE)
        masked = unreadable | flagged if self.on_disagree == "mask" else unreadable

        if (flagged | unreadable).any():
            rewards = rewards.clone() if hasattr(rewards, "clone") else np.array(rewards)
            for row in np.flatnonzero(flagged | unreadable).tolist():
                rewards[row] = 0.0
        fields = {
            "verified": (failed | (replayed & (second == Outcome.SUCCESS)), ended),
            "flagged": (flagged, ended),
            "second_verdict": (second, ended),
            "replay_success_probability": (probability, np.isfinite(probability)),
        }
        infos = {**finals, "valid": as_numpy(finals["valid"]).astype(bool) & ~masked}
        for name, (values, mask) in fields.items():
            infos[name], infos[f"_{name}"] = values, mask.copy()
        return infos, rewards


def _verdict(replay: Replay) -> Verdict:
    return replay.verdict or Verdict(Outcome.INVALID, "nobody judged the second dream")
