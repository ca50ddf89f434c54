"""Configurations of the judge's and the reward model's training."""

from __future__ import annotations

from dataclasses import dataclass, field

from rawdream_env.errors import InvalidOptionError
from rawdream_env.judges.embedded_network import EmbeddedJudgeConfig


@dataclass(frozen=True)
class JudgeTrainConfig:
    """Everything a judge run depends on."""

    data: tuple[str, ...]
    """LeRobotDataset v3 folders with privileged poses and relations: play, and expert-like episodes."""
    run_dir: str
    """Run folder. Rerun the same command to resume an interrupted run. The judge is written to ``run_dir/judge``."""
    imagined: tuple[str, ...] = ()
    """Folders of imagined clips (format: ``rawdream_env.trainers.judge.clips``)."""
    imagined_share: float = 0.3
    """Share of each batch that is imagined, when there are imagined clips."""
    init: str = ""
    """Judge folder to start from, for example to continue with imagined clips; empty: train from scratch."""
    steps: int = 1600
    """Number of optimizer steps; with ``minutes`` the maximum."""
    minutes: float = 0.0
    """Budget of training time in minutes; 0: no limit (only then are resumed runs bit-identical)."""
    batch_size: int = 32
    """Clips in a batch."""
    questions: int = 6
    """Questions asked about each clip; the image trunk runs once per clip whatever their number."""
    lr: float = 1.5e-3
    """Peak learning rate of AdamW: linear warm-up, then a cosine to 2 %."""
    warmup: int = 100
    """Steps of linear warm-up."""
    weight_decay: float = 0.03
    """AdamW weight decay."""
    ema: float = 0.995
    """Decay of the averaged weights, which are the ones saved; ramps up from 0."""
    position_weight: float = 0.5
    """Weight of the localization losses, which tie pixels to objects and objects to their names."""
    augment: float = 0.6
    """Share of clips whose frames are made to look imagined: smoothed, blurred, noisy, colors shifted."""
    validation_share: float = 0.1
    """Share of the episodes kept out of training: half calibrates the threshold, half is reported."""
    per_goal: int = 40
    """Maximum number of successes, and of failures, per goal in the report."""
    target_precision: float = 0.95
    """The threshold is the lowest one that reaches this precision on the calibration clips."""
    calibrate_on: tuple[str, ...] = ("on", "in", "text")
    """Kinds of goals used for the calibration: those that environments ask for."""
    stride: int = 4
    """Rows between the ends of windows."""
    seed: int = 0
    """Seed of initialization, windows, batches and augmentation."""
    device: str = "cpu"
    """Device to train on."""
    bf16: bool = True
    """Train in bfloat16 autocast."""
    save_every: int = 200
    """Steps between checkpoints."""
    model: EmbeddedJudgeConfig = field(default_factory=EmbeddedJudgeConfig)
    """Size of the network."""


@dataclass(frozen=True)
class RewardModelSize:
    """Size of a network trained from scratch (a folder given by ``init`` brings its own)."""

    image_size: int = 64
    patch_size: int = 16
    hidden_size: int = 128
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 4


@dataclass(frozen=True)
class RewardModelConfig:
    """Everything a reward-model run depends on."""

    data: tuple[str, ...]
    """LeRobotDataset v3.0 folders of successful demonstrations."""
    run_dir: str
    """Run folder. Rerun the same command to resume an interrupted run. The judge is written to ``run_dir/judge``."""
    demos_per_task: int = 3
    """Number of demonstrations per task, the first ones in the data (paper: 1, with ten tasks per model)."""
    init: str = ""
    """Local transformers folder of a VideoMAE encoder to fine-tune; empty: random weights."""
    ending: float = 0.25
    """Windows within this share of the episode at its end are positives."""
    beginning: float = 0.4
    """Windows within this share of the episode at its beginning are negatives."""
    steps: int = 800
    """Number of optimizer steps."""
    batch_size: int = 16
    """Windows in a batch."""
    lr: float = 5e-4
    """Peak learning rate of AdamW: linear warm-up, then a cosine to 0. Use about 5e-5 for a pre-trained encoder."""
    warmup: int = 20
    """Steps of linear warm-up."""
    weight_decay: float = 0.05
    """AdamW weight decay."""
    augment: float = 0.5
    """Share of windows whose frames are made to look imagined."""
    threshold: float = 0.5
    """Probability from which a window counts as a success (paper: 0.9, which almost nothing reached; then 0.5)."""
    seed: int = 0
    """Seed of initialization, batches and augmentation."""
    device: str = "cpu"
    """Device to train on."""
    save_every: int = 100
    """Steps between checkpoints."""
    progress: bool = True
    """Show a progress bar."""
    model: RewardModelSize = field(default_factory=RewardModelSize)
    """Size of the network."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        shares = (self.ending, self.beginning)
        if min(shares) <= 0 or sum(shares) > 1 or min(self.steps, self.demos_per_task, self.save_every) < 1:
            raise InvalidOptionError(
                f"ending {self.ending} and beginning {self.beginning} must be positive and sum to at most 1; steps "
                f"{self.steps}, demos_per_task {self.demos_per_task} and save_every {self.save_every} at least 1."
            )
        if self.batch_size < 4 or not self.lr > 0 or not 0 < self.threshold < 1:
            raise InvalidOptionError(
                f"batch_size={self.batch_size} must be at least 4, lr={self.lr} positive and "
                f"threshold={self.threshold} between 0 and 1."
            )
