"""Options of the policy's supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from rawdream_env.errors import InvalidOptionError
from rawdream_env.policies.tiny_vla import TinyVLAConfig
from rawdream_env.trainers.common.distributed import Parallel


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
    """Policy to start from: "embedded", or a TinyVLA or OpenVLA-OFT folder or hub id; None: a TinyVLA from scratch."""
    demos_per_task: int = 3
    """Expert episodes per task; the paper uses 1 in simulation and 3 on the real arm."""
    demos_seed: int | None = None
    """Seed of the choice of these episodes among all of a task; None: the first ones."""
    val_demos_per_task: int = 0
    """Further expert episodes per task of the first data set, kept for validation (stage fewshot)."""
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
    microbatch_size: int = 0
    """Maximum number of samples in a forward pass; 0: all. Affects memory only: gradients are accumulated."""
    lr: float | None = None
    """Peak learning rate of AdamW: linear warm-up, then a cosine to 2 %. None: 1e-3, for OpenVLA-OFT 5e-4 (upstream's)."""
    warmup: int = 100
    """Steps of linear warm-up."""
    weight_decay: float = 0.02
    """AdamW weight decay of matrices and kernels."""
    ema: float | None = None
    """Decay of the averaged weights, which are the ones saved and evaluated; ramps up from 0. 0: off. None: 0.998, for
    OpenVLA-OFT 0.
    """
    label_sigma: float | None = None
    """Standard deviation of the smoothed labels in bins; 0 is one-hot. None: 2, for OpenVLA-OFT 0."""
    readout_weight: float = 1.0
    """TinyVLA: weight of the auxiliary position read-out, for positions that the data contain; 0 disables it."""
    jitter: float = 0.08
    """TinyVLA: per-image gain and offset per color channel, standard deviation as a share of full scale."""
    blur_share: float = 0.2
    """TinyVLA: share of images that are slightly blurred, to resemble imagined frames."""
    image_aug: bool = True
    """OpenVLA-OFT: random crops of area 0.9 and color jitter, as upstream; else the centre crop of acting."""
    lora_rank: int = 32
    """OpenVLA-OFT: rank of the LoRA adapters; 0: train all weights."""
    train_vision: bool = True
    """OpenVLA-OFT: also train the vision towers, as upstream. Without, and without image_aug, features are computed once."""
    dtype: str | None = None
    """OpenVLA-OFT: precision of the weights. None: as stored, or float32 when all weights are trained."""
    unnorm_key: str | None = None
    """OpenVLA-OFT: data set of the initial policy whose action statistics are used, if it has several."""
    keep_statistics: bool = False
    """OpenVLA-OFT: keep these statistics; else use those of the demonstrations, under the name of their folder."""
    gradient_checkpointing: bool = False
    """OpenVLA-OFT: compute the language model's activations again in the backward pass, to save memory."""
    held_out: float = 0.04
    """Share of play episodes kept for validation, at least one. The few-shot stage validates on val_demos_per_task
    episodes, else on held-out replay, else on its training data.
    """
    model: TinyVLAConfig = field(default_factory=TinyVLAConfig)
    """Architecture when ``init`` is None."""
    sim_episodes: int = 0
    """Simulator episodes per task at the end; 0 skips the simulator."""
    sim_env: str = ""
    """Environment id of the simulator; empty: the default robot's."""
    layout: str = "narrow"
    """How far objects are scattered in simulator episodes: "narrow" or "wide"."""
    bf16: bool = True
    """Train in bfloat16 autocast. The precision of the weights does not change."""
    device: str = "cpu"
    """Device to train on."""
    parallel: Parallel = "none"
    """How the processes that torchrun started share every batch: "ddp" replicates the policy on each, "fsdp2" shards its
    weights. The result is that of one process, but for rounding.
    """
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
        if min(self.val_demos_per_task, self.microbatch_size, self.lora_rank) < 0:
            raise InvalidOptionError("val_demos_per_task, microbatch_size and lora_rank must be at least 0.")
        if self.parallel != "none" and self.minutes:
            raise InvalidOptionError("minutes needs one process, since each has its own clock; give steps alone.")
        if self.stage not in ("pretrain", "fewshot"):
            raise InvalidOptionError(f"stage={self.stage!r} is not known; choose 'pretrain' or 'fewshot'.")

    def filled(self, defaults: Mapping[str, float]) -> SFTConfig:
        """The options with ``defaults`` of a kind of policy in place of None."""
        missing: dict[str, Any] = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return replace(self, **missing)


TINY_VLA_DEFAULTS = {"lr": 1e-3, "ema": 0.998, "label_sigma": 2.0}
OPENVLA_OFT_DEFAULTS = {"lr": 5e-4, "ema": 0.0, "label_sigma": 0.0}
_LATER = {
    *("demos_seed", "val_demos_per_task", "microbatch_size", "image_aug", "lora_rank", "train_vision", "dtype"),
    *("unnorm_key", "keep_statistics", "gradient_checkpointing", "parallel"),
}
ADDED: dict[str, Any] = {option.name: option.default for option in fields(SFTConfig) if option.name in _LATER}
"""Options that did not exist in earlier versions, with the values that their runs were made with."""
