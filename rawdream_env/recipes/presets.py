"""Amounts of data and training for the bundled models."""

from __future__ import annotations

from dataclasses import dataclass, field

from rawdream_env.piper.scene_states import ShardSize
from rawdream_env.trainers.world_model.config import StageConfig


@dataclass(frozen=True)
class SceneScale:
    """Amounts of data and training of the scene world model."""

    shards: int
    """Files of states, of the pre-trained and the few-shot policy."""
    more_shards: int
    """Files of states with policies among them that were trained in a first world model."""
    dreamers: int
    """Number of those policies; an untrained world model imagines no success to train them on."""
    dreamer_steps: int
    """GRPO steps of each."""
    pictures: int
    """Episodes with a few pictures each, for the painter."""
    start_pictures: int
    """Start pictures, for the reader."""
    reader_minutes: float
    painter_minutes: float
    first_dynamics_minutes: float
    dynamics_minutes: float
    """Training time of each part, of the dynamics in the first world model and after it; 0: no limit."""
    shard: ShardSize = field(default_factory=ShardSize)
    steps: int = 1_000_000
    """Maximum number of optimizer steps of each part; by default the minutes decide."""


@dataclass(frozen=True)
class VideoScale:
    """Amounts of training of the video world model, which learns from play and rollouts."""

    autoencoder: StageConfig
    transformer: StageConfig


@dataclass(frozen=True)
class Scale:
    """Amounts of data, training and measurement."""

    world_model: SceneScale | VideoScale
    """Which world model is trained, and how much."""
    play: int
    """Play episodes (128 control steps each) for judge, policy and video world model."""
    rollouts: int
    """Rollouts of the pre-trained policy, on instructions of no task, for the judge and the video world model."""
    other_play: int
    """Play episodes for the imagined clips; the world model is not trained on them."""
    held_out: int
    """Held-out play episodes on which the world model is measured."""
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
    expert_episodes: int
    """Scripted episodes of relations that are no task, for the judge; as many by a shaky expert."""
    expert_clips: int
    """Imagined clips of either."""
    dreamer_episodes: int = 0
    """Rollouts of each policy that was trained in the first world model, on instructions of no task, for the judge."""
    dreamer_clips: int = 0
    """Imagined clips of each policy's rollouts."""
    imagined_share: float = 0.3
    """Share of each of the judge's batches that is imagined."""
    judge_validation: float = 0.1
    """Share of the judge's episodes that is kept out of training."""
    judge_on_dreams: bool = True
    """Train the judge on imagined clips too. An untrained scene world model imagines no success to learn from."""


CPU = Scale(
    world_model=SceneScale(
        shards=80,
        more_shards=45,
        dreamers=2,
        dreamer_steps=30,
        pictures=4000,
        start_pictures=48_000,
        reader_minutes=20.0,
        painter_minutes=14.0,
        first_dynamics_minutes=25.0,
        dynamics_minutes=40.0,
    ),
    play=1568,
    rollouts=960,
    other_play=320,
    held_out=200,
    dream_clips=1200,
    dreamer_episodes=400,
    dreamer_clips=1600,
    imagined_share=0.5,
    judge_steps=4000,
    judge_batch=32,
    pretrain_steps=4500,
    pretrain_batch=32,
    fewshot_steps=500,
    starts=64,
    episodes=100,
    expert_episodes=320,
    expert_clips=700,
)
GPU = Scale(
    world_model=VideoScale(
        autoencoder=StageConfig(steps=10_000, batch_size=64, lr=2e-3, ema=0.995),
        transformer=StageConfig(steps=20_000, batch_size=32, lr=6e-4),
    ),
    play=6000,
    rollouts=4000,
    other_play=800,
    held_out=200,
    dream_clips=4000,
    judge_steps=6000,
    judge_batch=64,
    pretrain_steps=20_000,
    pretrain_batch=64,
    fewshot_steps=2000,
    starts=64,
    episodes=200,
    expert_episodes=1000,
    expert_clips=2000,
)
SMOKE = Scale(
    world_model=SceneScale(
        shards=1,
        more_shards=1,
        dreamers=0,
        dreamer_steps=0,
        pictures=4,
        start_pictures=8,
        reader_minutes=0.0,
        painter_minutes=0.0,
        first_dynamics_minutes=0.0,
        dynamics_minutes=0.0,
        shard=ShardSize(rows=2, batches=1, scripted=4),
        steps=2,
    ),
    play=16,
    rollouts=8,
    other_play=8,
    held_out=2,
    dream_clips=64,
    judge_steps=2,
    judge_batch=2,
    pretrain_steps=2,
    pretrain_batch=4,
    fewshot_steps=2,
    starts=2,
    episodes=1,
    expert_episodes=4,
    expert_clips=8,
    judge_validation=0.5,
    judge_on_dreams=False,
)
PRESETS: dict[str, Scale] = {"cpu": CPU, "gpu": GPU, "smoke": SMOKE}
