"""Configuration of the policy's supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rawdream_env.errors import InvalidOptionError
from rawdream_env.policies.tiny_vla import TinyVLAConfig


@dataclass(frozen=True)
class SFTConfig:
    """Everything a supervised run depends on."""

    data: tuple[str, ...]
    """LeRobotDataset v3 folders: play (stage pretrain) or expert episodes (stage fewshot)."""
    run_dir: str
    """Run folder. Rerun the same command to resume an interrupted run. The policy is written to ``run_dir/policy``."""
    stage: Literal["pretrain", "fewshot"] = "fewshot"
    """"pretrain": play, labelled in hindsight; "fewshot": ``demos_per_task`` whole expert episodes per task."""
    init: str | None = None
    """Policy to start from ("embedded" or a folder); None: train from scratch."""
    demos_per_task: int = 3
    """Expert episodes per task; the paper uses 1 in simulation and 3 on the real arm."""
    replay: tuple[str, ...] = ()
    """Play folders mixed into few-shot batches to limit forgetting."""
    replay_share: float = 0.5
    """Share of each few-shot batch that comes from ``replay``."""
    steps: int = 3000
    """Number of optimizer steps; with ``minutes`` the maximum."""
    minutes: float | None = None
    """Budget of training time in minutes; the learning rate finishes its schedule within it. None: no limit."""
    batch_size: int = 64
    """Samples per step."""
    lr: float = 1e-3
    """Peak learning rate of AdamW: linear warm-up, then a cosine to 2 %."""
    warmup: int = 100
    """Steps of linear warm-up."""
    weight_decay: float = 0.02
    """AdamW weight decay of matrices and kernels."""
    ema: float = 0.998
    """Decay of the averaged weights, which are the ones saved and evaluated; ramps up from 0."""
    label_sigma: float = 2.0
    """Standard deviation of the smoothed labels in bins; 0 is one-hot."""
    readout_weight: float = 1.0
    """Weight of the auxiliary position read-out, for positions that the data contain; 0 disables it."""
    jitter: float = 0.08
    """Color augmentation: per-image gain and offset per channel, standard deviation as a share of full scale."""
    blur_share: float = 0.2
    """Share of images that are slightly blurred, to resemble imagined frames."""
    held_out: float = 0.04
    """Share of episodes kept for validation (at least one; the few-shot stage trains on all and validates on replay)."""
    model: TinyVLAConfig = field(default_factory=TinyVLAConfig)
    """Architecture when ``init`` is None."""
    sim_episodes: int = 0
    """Simulator episodes per task at the end; 0 skips the simulator."""
    sim_env: str = ""
    """Environment id of the simulator; empty: the default robot's."""
    layout: str = "narrow"
    """How far objects are scattered in simulator episodes: "narrow" or "wide"."""
    bf16: bool = True
    """Train in bfloat16 autocast; the saved weights are float32 either way."""
    device: str = "cpu"
    """Device to train on."""
    seed: int = 0
    """Seed of initialization, batches and augmentation."""
    log_every: int = 25
    """Steps between lines of metrics."""
    save_every: int = 500
    """Steps between checkpoints and validations."""

    def __post_init__(self) -> None:
        """Refuse options that contradict each other, with the numbers."""
        if not self.data:
            raise InvalidOptionError("data is empty: name at least one data set folder.")
        if not 0.0 <= self.replay_share < 1.0:
            raise InvalidOptionError(f"replay_share must be in [0, 1), got {self.replay_share}.")
        if min(self.steps, self.batch_size, self.demos_per_task, self.log_every, self.save_every) < 1:
            raise InvalidOptionError("steps, batch_size, demos_per_task, log_every and save_every must be at least 1.")
        if self.stage not in ("pretrain", "fewshot"):
            raise InvalidOptionError(f"stage={self.stage!r} is not known; choose 'pretrain' or 'fewshot'.")
