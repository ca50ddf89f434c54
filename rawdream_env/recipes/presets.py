"""Amounts of data and training for the bundled models."""

from __future__ import annotations

from dataclasses import dataclass

from rawdream_env.trainers.world_model.config import StageConfig


@dataclass(frozen=True)
class Scale:
    """Amounts of data, training and measurement."""

    play: int
    """Play episodes (128 control steps each) for world model, judge and policy."""
    rollouts: int
    """Rollouts of the pre-trained policy, on instructions of no task, for the world model and the judge."""
    other_play: int
    """Play episodes for the imagined clips; the world model is not trained on them."""
    held_out: int
    """Held-out play episodes on which the world model is measured."""
    autoencoder: StageConfig
    transformer: StageConfig
    dream_clips: int
    judge_steps: int
    judge_batch: int
    pretrain_steps: int
    pretrain_batch: int
    fewshot_steps: int
    starts: int
    """Starts per task in each start pack."""
    episodes: int
    """Episodes per task in the final side-by-side measurement."""


CPU = Scale(
    play=1568,
    rollouts=960,
    other_play=320,
    held_out=200,
    autoencoder=StageConfig(steps=3200, batch_size=16, lr=2e-3, ema=0.99),
    transformer=StageConfig(steps=7500, batch_size=4, lr=6e-4, decay=0.7),
    dream_clips=1200,
    judge_steps=1600,
    judge_batch=32,
    pretrain_steps=4500,
    pretrain_batch=32,
    fewshot_steps=500,
    starts=64,
    episodes=100,
)
GPU = Scale(
    play=6000,
    rollouts=4000,
    other_play=800,
    held_out=200,
    autoencoder=StageConfig(steps=10_000, batch_size=64, lr=2e-3, ema=0.995),
    transformer=StageConfig(steps=20_000, batch_size=32, lr=6e-4),
    dream_clips=4000,
    judge_steps=6000,
    judge_batch=64,
    pretrain_steps=20_000,
    pretrain_batch=64,
    fewshot_steps=2000,
    starts=64,
    episodes=200,
)
SMOKE = Scale(
    play=16,
    rollouts=8,
    other_play=8,
    held_out=2,
    autoencoder=StageConfig(steps=2, batch_size=2, lr=1e-3),
    transformer=StageConfig(steps=2, batch_size=1, lr=1e-4),
    dream_clips=64,
    judge_steps=2,
    judge_batch=2,
    pretrain_steps=2,
    pretrain_batch=4,
    fewshot_steps=2,
    starts=2,
    episodes=1,
)
PRESETS: dict[str, Scale] = {"cpu": CPU, "gpu": GPU, "smoke": SMOKE}
