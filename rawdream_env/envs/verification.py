"""From verdicts to a reward: dual-noise verification and the one rule that applies it (RAW-Dream, section 3.2 and
appendix A.2).

The vocabulary, used everywhere:

==========  ========================================================================================================
verdict     what a judge concluded about an episode: SUCCESS, FAILURE, or INVALID (no answer, unreadable, outage)
verified    a second dream of the same actions with fresh noise was judged a success too, or the verdict is FAILURE,
            which needs no check
flagged     judged a success first and a failure in the second dream: the first one was a hallucination
valid       the reward is known; an episode that is not valid is never trained on
==========  ========================================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from rawdream_env.envs.imagination import Replay
from rawdream_env.errors import InvalidOptionError, JudgeUnavailableError
from rawdream_env.types import Judge, Outcome, Trajectory, Verdict

OnDisagree = Literal["mask", "zero"]
"""The result of a flagged episode: "mask" makes it not valid (the paper), "zero" a valid failure."""


class EpisodeResult(NamedTuple):
    """The result of an episode. ``verdict`` is the first one; ``reason`` explains INVALID."""

    reward: float
    verdict: Outcome
    valid: bool
    verified: bool
    flagged: bool
    reason: str = ""


def episode_result(first: Verdict, second: Verdict | None = None, on_disagree: OnDisagree = "mask") -> EpisodeResult:
    """Reward and flags of an episode from its verdict and, where a success was verified, the second dream's verdict.

    =======  ========  ======  ======================  ========  =======
    first    second    reward  valid                   verified  flagged
    =======  ========  ======  ======================  ========  =======
    FAILURE  any       0       yes                     yes       no
    INVALID  any       0       no                      no        no
    SUCCESS  None      1       yes                     no        no
    SUCCESS  SUCCESS   1       yes                     yes       no
    SUCCESS  FAILURE   0       only with "zero"        no        yes
    SUCCESS  INVALID   0       no                      no        no
    =======  ========  ======  ======================  ========  =======
    """
    if first.outcome != Outcome.SUCCESS:
        known = first.outcome == Outcome.FAILURE
        return EpisodeResult(0.0, first.outcome, known, known, False, first.reason)
    if second is None:
        return EpisodeResult(1.0, Outcome.SUCCESS, True, False, False, first.reason)
    repeated, flagged = second.outcome == Outcome.SUCCESS, second.outcome == Outcome.FAILURE
    valid = repeated or (flagged and on_disagree == "zero")
    return EpisodeResult(float(repeated), Outcome.SUCCESS, valid, repeated, flagged, second.reason)


@dataclass(frozen=True)
class DualNoiseStatistics:
    """Counts of a :class:`Verifier`.

    ``n_episodes`` ended; ``n_success`` of them were judged a success in the first dream and imagined again;
    ``n_flagged`` of those failed the second time; ``n_invalid`` had an INVALID second verdict. ``chunks`` and
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
        """Share flagged of the successes with a second verdict; NaN while there are none."""
        n = self.n_success - self.n_invalid
        return self.n_flagged / n if n else float("nan")

    @property
    def work_ratio(self) -> float:
        """World-model work with verification over work without; 1 + p where episodes are equally long."""
        return 1.0 + self.replayed_chunks / self.chunks if self.chunks else float("nan")


class Verifier:
    """Imagines recorded successes again with fresh noise and counts the results.

    Args:
        env: a dream with ``replay(trajectories, draw)``; its judge, or the judge of its reflector, is asked.
        draw: noise draw of the second dream, >= 1 (0 is the first dream's).
        on_disagree: the result of a flagged episode.
        keep_frames: keep the second dreams' frames.

    Raises:
        InvalidOptionError: the environment is no dream (a simulator has no noise to redraw), ``draw`` < 1, or an
            unknown ``on_disagree``.
    """

    def __init__(self, env: Any, draw: int = 1, on_disagree: OnDisagree = "mask", *, keep_frames: bool = False) -> None:
        if not (callable(getattr(env, "replay", None)) and callable(getattr(env, "trajectories", None))):
            raise InvalidOptionError(
                f"Dual-noise verification needs a dream that can replay its episodes; {env} cannot. Simulators and arms have "
                "no noise to redraw: leave verification off there, or use a ...Dream-v0 id."
            )
        if draw < 1:
            raise InvalidOptionError(f"draw={draw} would repeat the first dream's noise (draw 0); use draw >= 1.")
        if on_disagree not in ("mask", "zero"):
            raise InvalidOptionError(f"on_disagree={on_disagree!r} is unknown; use 'mask' or 'zero'.")
        self.env, self.draw, self.keep_frames = env, draw, keep_frames
        self.on_disagree: OnDisagree = on_disagree
        self.statistics = DualNoiseStatistics()

    @property
    def judge(self) -> Judge | None:
        """The judge of the first dreams: the reflector's where there is one, else the environment's."""
        reflector = getattr(self.env, "reflector", None)
        judge: Judge | None = getattr(self.env, "judge", None) if reflector is None else reflector.judge
        return judge

    def second_dreams(self, trajectories: Sequence[Trajectory], *, judged: bool = True) -> list[Replay]:
        """The trajectories under fresh noise, in one batch, judged unless ``judged`` is False.

        An unreachable judge gives INVALID verdicts here, never an exception: the first dream has happened and is not
        lost with the second.
        """
        if not trajectories:
            return []
        options: dict[str, Any] = {"draw": self.draw, "return_frames": self.keep_frames or not judged}
        if not judged:
            options["judge"] = False
        elif getattr(self.env, "reflector", None) is not None:
            options["judge"] = self.judge
        try:
            replays: list[Replay] = self.env.replay(list(trajectories), **options)
        except JudgeUnavailableError as error:
            replays = [Replay(None, Verdict(Outcome.INVALID, f"judge unavailable: {error}"))] * len(trajectories)
        missing = Verdict(Outcome.INVALID, "the second dream was not judged")
        return [replace(r, verdict=missing) if judged and r.verdict is None else r for r in replays]

    def result(self, first: Verdict, second: Verdict | None) -> EpisodeResult:
        """:func:`episode_result` with this verifier's ``on_disagree``."""
        return episode_result(first, second, self.on_disagree)

    def count(
        self,
        *,
        episodes: int = 0,
        chunks: int = 0,
        replayed: Sequence[Trajectory] = (),
        verdicts: Sequence[Verdict] = (),
    ) -> None:
        """Add to ``statistics``: episodes that ended, with their chunks, and second verdicts of ``replayed``."""
        s, outcomes = self.statistics, [verdict.outcome for verdict in verdicts]
        self.statistics = DualNoiseStatistics(
            n_episodes=s.n_episodes + episodes,
            n_success=s.n_success + len(replayed),
            n_flagged=s.n_flagged + outcomes.count(Outcome.FAILURE),
            n_invalid=s.n_invalid + outcomes.count(Outcome.INVALID),
            chunks=s.chunks + chunks,
            replayed_chunks=s.replayed_chunks + sum(len(trajectory.actions) for trajectory in replayed),
        )
