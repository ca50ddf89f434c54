"""Evaluation during training: the policy that would be saved, in the simulator, from the same starts every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gymnasium.vector import VectorEnv

from rawdream_env.envs.episodes import EpisodeRequest, Rollout, make_env, run_episodes
from rawdream_env.files import atomic_write_bytes
from rawdream_env.media import encode_video, has_h264
from rawdream_env.seeding import NoiseKey, mix
from rawdream_env.statistics import wilson_interval
from rawdream_env.trainers.grpo.config import GRPOConfig

_STREAM_EVALUATION = 31


class Simulation:
    """Runs ``config.eval_episodes`` episodes in ``config.eval_env_id``; the environment is made at the first evaluation."""

    def __init__(self, config: GRPOConfig) -> None:
        self.config = config
        self._env: VectorEnv[Any, Any, Any] | None = None

    def due(self, step: int) -> bool:
        """Whether the policy is evaluated after ``step`` steps."""
        return bool(self.config.eval_every) and step % self.config.eval_every == 0

    def evaluate(self, policy: Any, step: int) -> dict[str, float]:
        """Metrics of the policy: ``eval_success_rate`` over the ``eval_n`` episodes with a verdict, and its 95 % Wilson
        interval. ``videos/step_STEP.mp4`` is written into the run folder.
        """
        config = self.config
        seeds = [mix(config.seed, number, _STREAM_EVALUATION) for number in range(config.eval_episodes)]
        requests = [EpisodeRequest(None, seed, NoiseKey(seed)) for seed in seeds]
        played = list(run_episodes(self._made(), requests, policy, temperature=config.eval_temperature))
        self._write(played[: config.eval_videos], Path(config.run_dir) / "videos" / f"step_{step:08d}.mp4")
        judged = [rollout for rollout in played if rollout.valid]
        successes = sum(rollout.success_any for rollout in judged)
        low, high = wilson_interval(successes, len(judged))
        rate = successes / len(judged) if judged else float("nan")
        return {"eval_success_rate": rate, "eval_success_low": low, "eval_success_high": high, "eval_n": len(judged)}

    def close(self) -> None:
        """Close the environment."""
        if self._env is not None:
            self._env.close()

    def _made(self) -> VectorEnv[Any, Any, Any]:
        if self._env is None:
            config = self.config
            options: dict[str, Any] = {"task": config.task, "layout": config.layout, "return_frames": True}
            self._env = make_env(config.eval_env_id, min(config.num_envs, config.eval_episodes), **options)
        return self._env

    def _write(self, played: list[Rollout], path: Path) -> None:
        """One video with the episodes one after the other."""
        clips = [rollout.frames for rollout in played if rollout.frames is not None]
        if clips and has_h264():
            path.parent.mkdir(exist_ok=True)
            fps = float(getattr(self._made().unwrapped, "fps", 10.0))
            atomic_write_bytes(path, encode_video(clips, fps))
