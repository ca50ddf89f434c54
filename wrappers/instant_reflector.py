"""The instant reflector: a reward at every chunk and an end when the task looks done (World-Env, arXiv 2509.24948)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from rawdream_env.envs.infos import Infos, objects, put, put_nested
from rawdream_env.errors import InvalidOptionError, JudgeUnavailableError
from rawdream_env.types import Judge, Outcome, UInt8Array, Verdict, Video
from rawdream_env.wrappers.base import AnyVectorEnv, ForwardingVectorWrapper, as_numpy, reset_rows

_NEW_EPISODE = ("frames", "success_probability", "env_verdict")
"""Infos that an episode has none of before its first step."""


@dataclass
class Reflection:
    """The rule for one episode: success probabilities in, rewards and the predicted end out.

    ``threshold`` None follows the judge's own decision. The rewards of an episode sum to its last known probability
    minus ``probability``'s initial value.
    """

    threshold: float | None
    patience: int
    probability: float = 0.0
    streak: int = 0

    def add(self, verdict: Verdict) -> tuple[float, bool]:
        """Reward of a chunk with this verdict, and whether the episode is finished.

        An INVALID verdict rewards nothing and neither continues nor breaks a streak of finished chunks; the next
        readable one is compared with the last readable one. Without a probability a success counts 1, a failure 0.
        """
        if verdict.outcome == Outcome.INVALID:
            return 0.0, False
        chance = float(verdict.outcome) if verdict.probability is None else float(verdict.probability)
        reward, self.probability = chance - self.probability, chance
        self.streak = self.streak + 1 if self.is_done(verdict) else 0
        return reward, self.streak >= self.patience

    def is_done(self, verdict: Verdict) -> bool:
        """Whether a readable verdict says that the task is done."""
        if self.threshold is None or verdict.probability is None:
            return verdict.outcome == Outcome.SUCCESS
        return verdict.probability >= self.threshold


@dataclass
class _Episode:
    """What a row has shown since its reset."""

    reflection: Reflection
    frames: list[UInt8Array]
    instruction: str = ""


@dataclass(frozen=True)
class _Told:
    """The judge's answers of one step, for ``rows``."""

    rows: NDArray[np.intp]
    verdicts: list[Verdict]
    rewards: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    done: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))


class InstantReflector(ForwardingVectorWrapper):
    """Asks a judge for a success probability after every chunk, on a dream and a simulator alike.

    *Reward*: the probability now minus the probability a chunk ago; before the first chunk it is ``initial``. So the
    rewards of an episode sum to the final probability minus ``initial``, and nothing is gained by going back and forth.
    It replaces the environment's own reward.

    *End*: an episode is terminated when the judge says for ``patience`` chunks in a row that the task is done, so that
    a policy does not go on and spoil it. The environment's own ends stay.

    *INVALID*: a chunk whose verdict is INVALID (outage, unreadable, frames that are not finite) has reward 0, ``valid``
    False and no ``success_probability``; it ends nothing, and the next difference is to the last known probability.

    In infos, ``verdict`` and ``is_success`` are the reflector's (in a step that ends an episode 1 when the judge says
    done there, else 0 or -1; before that -1), ``success_probability`` (float64) is every chunk's, and ``env_verdict``
    (int8) is what the environment's own ``verdict`` was: the truth in a simulator.

    The environment needs ``return_frames=True``: the judge sees every frame since the start. It may be made with
    ``judge="none"``, or ``judge_every="episode"`` for a simulator that shall not end by itself. Put
    `DualNoiseVerification` outside.

    Args:
        env: a vector environment of this package, in any autoreset mode.
        judge: a judge, its name or its folder; None: the environment's own.
        threshold: probability from which a task counts as done; None: the judge's own decision.
        patience: so many chunks in a row must say so.
        initial: probability before the first chunk.
        last_frames: show the judge only so many frames (judges of short windows); None: all since the start.

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
        if not callable(getattr(base, "end_episodes", None)):
            raise InvalidOptionError(f"InstantReflector needs an environment with end_episodes(); {env} has none.")
        if not getattr(base, "return_frames", False):
            raise InvalidOptionError("InstantReflector shows the judge every frame: make it with return_frames=True.")
        if threshold is not None and not 0.0 < threshold <= 1.0:
            raise InvalidOptionError(f"threshold={threshold} must be above 0 and at most 1, or None.")
        if patience < 1 or not 0.0 <= initial <= 1.0 or (last_frames is not None and last_frames < 2):
            raise InvalidOptionError(
                f"patience={patience} must be at least 1, initial={initial} between 0 and 1 and "
                f"last_frames={last_frames} at least 2, or None."
            )
        self._owned = judge is not None
        self.judge: Judge = self._loaded(getattr(base, "judge", None) if judge is None else judge)
        self.threshold, self.patience, self.initial, self.last_frames = threshold, patience, initial, last_frames
        self._episodes: list[_Episode | None] = [None] * self.num_envs
        self._over = np.zeros(self.num_envs, bool)

    @staticmethod
    def _loaded(judge: Any) -> Judge:
        if judge is None or (isinstance(judge, str) and judge == "none"):
            raise InvalidOptionError("InstantReflector has nobody to ask: give a judge, such as judge='embedded'.")
        from rawdream_env.judges import load_judge

        return load_judge(judge)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset; nothing is judged before the first chunk."""
        rows = reset_rows(options, self.num_envs)
        observations, infos = self.env.reset(seed=seed, options=options)
        self._begin(np.flatnonzero(rows), observations, infos)
        return observations, infos

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step, ask, reward, and end what is done."""
        observations, _, terminations, truncations, infos = self.env.step(actions)
        terminated, truncated = np.array(as_numpy(terminations), bool), np.array(as_numpy(truncations), bool)
        ended = terminated | truncated
        same_step = self.autoreset_mode is AutoresetMode.SAME_STEP
        finals = infos.get("final_info", {}) if same_step else {}
        told = self._ask(infos, finals)
        rewards = np.zeros(self.num_envs, np.float64)
        rewards[told.rows] = told.rewards
        stopped = told.rows[told.done & ~ended[told.rows]]
        terminated[told.rows[told.done]], truncated[told.rows[told.done]] = True, False
        infos = self._told_infos(infos, finals, told, ended)

        by_row = dict(zip(told.rows.tolist(), told.verdicts, strict=True))
        base: Any = self.unwrapped
        base.end_episodes(stopped.tolist(), [by_row[row] for row in stopped.tolist()])
        if same_step and len(stopped):
            observations, infos = self._restarted(stopped, observations, infos)
        self._after(terminated | truncated, observations, infos, same_step)
        return observations, rewards, terminated, truncated, infos

    def close(self, **kwargs: Any) -> None:
        """Close the environment, and the judge if it was given here."""
        super().close(**kwargs)
        close = getattr(self.judge, "close", None)
        if self._owned and callable(close):
            close()

    def _begin(self, rows: NDArray[np.intp], observations: Any, infos: Infos) -> None:
        images = as_numpy(observations["image"])
        for row in rows.tolist():
            reflection = Reflection(self.threshold, self.patience, self.initial)
            self._episodes[row] = _Episode(reflection, [images[row][None].copy()], str(infos["instruction"][row]))
        self._over[rows] = False

    def _after(self, ended: NDArray[np.bool_], observations: Any, infos: Infos, same_step: bool) -> None:
        """Begin the record of episodes that the environment began in this step."""
        begun = ended if same_step else self._over & ~ended & np.asarray(infos.get("_instruction", False))
        self._begin(np.flatnonzero(begun), observations, infos)
        self._over = np.zeros(self.num_envs, bool) if same_step else ended

    def _ask(self, infos: Infos, finals: Infos) -> _Told:
        """Show the judge the episodes that advanced; in SAME_STEP an ended episode's chunk is in ``finals``."""
        shown: dict[int, Infos] = {}
        for source in (infos, finals):
            if "frames" in source:
                shown |= dict.fromkeys(np.flatnonzero(source["_frames"]).tolist(), source)
        rows = sorted(shown)
        asked, verdicts = [], dict[int, Verdict]()
        for row in rows:
            episode = self._episodes[row]
            assert episode is not None
            episode.frames.append(np.array(as_numpy(shown[row]["frames"][row])))
            if shown[row]["valid"][row]:
                asked.append(row)
            else:
                verdicts[row] = Verdict(Outcome.INVALID, "the environment could not vouch for this chunk")
        verdicts |= dict(zip(asked, self._answers(asked), strict=True))
        ordered = [verdicts[row] for row in rows]
        results = [self._record(row).reflection.add(verdicts[row]) for row in rows]
        rewards = np.array([reward for reward, _ in results], np.float64)
        done = np.array([done for _, done in results], bool)
        return _Told(np.array(rows, np.intp), ordered, rewards, done)

    def _record(self, row: int) -> _Episode:
        episode = self._episodes[row]
        assert episode is not None
        return episode

    def _answers(self, rows: list[int]) -> list[Verdict]:
        if not rows:
            return []
        fps = float(self.unwrapped.fps)  # type: ignore[attr-defined]
        videos = [np.concatenate(self._record(row).frames) for row in rows]
        if self.last_frames is not None:
            videos = [frames[-self.last_frames :] for frames in videos]
        try:
            answers = self.judge([Video(frames, fps) for frames in videos], [self._record(r).instruction for r in rows])
        except JudgeUnavailableError as error:  # the chunk has happened and must be returned
            return [Verdict(Outcome.INVALID, f"judge unavailable: {error}")] * len(rows)
        if len(answers) != len(rows):
            raise InvalidOptionError(
                f"{type(self.judge).__name__} gave {len(answers)} verdicts for {len(rows)} videos; it owes one each."
            )
        return answers

    def _told_infos(self, infos: Infos, finals: Infos, told: _Told, ended: NDArray[np.bool_]) -> Infos:
        """The infos with the reflector's verdicts, nested ones for rows whose episode the environment ended."""
        infos, finals = dict(infos), dict(finals)
        inner = np.array([row in set(np.flatnonzero(ended)) and bool(finals) for row in told.rows], bool)
        for target, chosen in ((infos, ~inner), (finals, inner)):
            if not chosen.any():
                continue
            rows = told.rows[chosen]
            verdicts = [verdict for verdict, yes in zip(told.verdicts, chosen, strict=True) if yes]
            over = ended[rows] | told.done[chosen]
            says = np.array([self._says(row, verdict) for row, verdict in zip(rows, verdicts, strict=True)], np.int8)
            own = np.array(as_numpy(target["verdict"])[rows], np.int8)
            for key in ("verdict", "is_success", "valid"):
                target[key] = np.array(as_numpy(target[key]))
            readable = np.array([verdict.outcome != Outcome.INVALID for verdict in verdicts], bool)
            target["verdict"][rows] = np.where(over, says, -1)
            target["is_success"][rows] = over & (says == 1)
            target["valid"][rows] = readable
            for key in ("success_probability", "_success_probability"):
                target.pop(key, None)
            chances = np.array([self._record(row).reflection.probability for row in rows], np.float64)
            put(target, self.num_envs, "success_probability", rows[readable], chances[readable])
            put(target, self.num_envs, "env_verdict", rows, own)
        if finals:
            infos["final_info"] = finals
        return infos

    def _says(self, row: int, verdict: Verdict) -> int:
        if verdict.outcome == Outcome.INVALID:
            return -1
        return int(self._record(row).reflection.is_done(verdict))

    def _restarted(self, rows: NDArray[np.intp], observations: Any, infos: Infos) -> tuple[Any, Infos]:
        """SAME_STEP: move the end of ``rows`` to ``final_obs`` and ``final_info``, as the environment does for its own."""
        n = self.num_envs
        finals: Infos = dict(infos.get("final_info", {}))
        endings = objects([{key: value[row] for key, value in observations.items()} for row in rows.tolist()])
        for key in [key for key in infos if not key.startswith("_") and key not in ("final_obs", "final_info")]:
            known = rows[infos["_" + key][rows]]
            if key in finals:
                finals[key], finals["_" + key] = np.array(finals[key]), np.array(finals["_" + key])
            put(finals, n, key, known, infos[key][known])
            if key in _NEW_EPISODE:
                infos[key], infos["_" + key] = np.array(infos[key]), np.array(infos["_" + key])
                infos[key][rows], infos["_" + key][rows] = 0, False
        mask = np.zeros(n, bool)
        mask[rows] = True
        observations, begun = self.env.reset(options={"reset_mask": mask})
        for key in [key for key in begun if not key.startswith("_")]:
            put(infos, n, key, rows, begun[key][rows])
        put(infos, n, "final_obs", rows, endings)
        earlier = np.array(infos.get("_final_info", np.zeros(n, bool)))
        put_nested(infos, n, "final_info", np.flatnonzero(earlier | mask), finals)
        return observations, infos
