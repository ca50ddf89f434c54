"""GRPO in imagination: ``grpo.py`` reads like the algorithm, ``losses.py`` holds its formulas, ``rollout.py`` collects."""

from __future__ import annotations

from rawdream_env.trainers.grpo.config import GRPOConfig
from rawdream_env.trainers.grpo.gradients import TrainingDivergedError
from rawdream_env.trainers.grpo.grpo import GRPOResult, train_grpo

__all__ = ["GRPOConfig", "GRPOResult", "TrainingDivergedError", "train_grpo"]
