"""Configuration of a world-model run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rawdream_env.trainers.common.distributed import Parallel
from rawdream_env.world_models.autoencoders import AutoencoderConfig
from rawdream_env.world_models.wan.config import WAN_CONFIGS, WanConfig
from rawdream_env.world_models.wan.rollout import RolloutConfig

MAY_CHANGE = (
    "autoencoder",
    "transformer",
    "log_every",
    "save_every",
    "validate_every",
    "device",
    "parallel",
    "micro_batch_size",
    "checkpointing",
    "offload",
    "fit_memory",  # from earlier versions
    "window_latents",  # the latent cache refuses a change
    "robot",  # filled in when the data are read
)
"""Settings that may differ when a run is resumed: they do not change the result of a step."""


@dataclass(frozen=True)
class StageConfig:
    """Optimization of one stage."""

    steps: int
    """Number of optimizer steps."""
    batch_size: int
    """Groups of four frames (autoencoder); episodes or windows, over all processes (transformer)."""
    lr: float
    """Peak learning rate of AdamW."""
    warmup: int = 100
    """Steps of linear warm-up."""
    decay: float = 0.4
    """Share of the steps, at the end, over which the learning rate decays to 2 %; 1 is a cosine over the whole run, as in the
    paper. The number of steps may change on resume until the decay begins."""
    weight_decay: float = 0.02
    """AdamW weight decay."""
    ema: float = 0.998
    """Decay of the averaged weights (EMA), which are the saved ones; it increases from 0 at the start. Not in the paper."""


@dataclass(frozen=True)
class LossConfig:
    """Noise levels and loss weights."""

    context_noise: float = 0.3
    """Maximum context noise level: each position draws its level from U[0, context_noise]. With objective "episode", half of
    the episodes draw levels; the others have the level of a rollout.
    """
    pure_noise: float = 0.3
    """Share of targets (chunks of an episode, or windows) that are pure noise, tau = 1."""
    timestep_shift: float = 1.0
    """Objective "window": tau becomes shift * tau / (1 + (shift - 1) * tau); values above 1 raise the noise levels."""
    far_anchor: float = 0.5
    """Objective "window": share of windows whose anchor is an earlier frame of the episode, as late in a rollout. Such a
    window always has a whole context."""
    change_weight: float = 3.0
    """Extra weight of latent cells that differ from the last context frame."""
    object_weight: float = 12.0
    """Extra weight of latent cells in which an object moves or is within reach of the gripper, for data with object poses
    (``privileged.object_poses``). Objects are only a few pixels wide, but the judge's verdict depends on them.
    """
    self_forcing: float = 0.4
    """Objective "episode": share of training, at its end, in which the context is the model's own prediction."""
    self_forcing_depth: int = 3
    """Maximum number of chunks for which the model continues from its own predictions."""


@dataclass(frozen=True)
class WorldModelTrainConfig:
    """Configuration of a world-model run."""

    data: tuple[str, ...]
    """LeRobotDataset v3 folders. With objective "window" each may have settings:
    FOLDER[,weight=W][,name=N][,camera=C][,embodiment=E]. Entries of one embodiment (by default all) share their action
    bounds; name the embodiments of a mixture of robots."""
    run_dir: str
    """Run folder. Rerun the same command to resume an interrupted run. The model is written to ``run_dir/world_model``."""
    init: str = ""
    """World model to fine-tune, a folder or "embedded" (the bundled video model). Codec and action bounds are kept; so are
    architecture and rollout settings unless others are given."""
    codec: str = ""
    """World model, a folder or "embedded", to take the frame codec from; the transformer is trained from scratch."""
    validation: tuple[str, ...] = ()
    """Data folders of held-out episodes, written like ``data``; of the deployed embodiment."""
    deploy: str = ""
    """Objective "window": data entry whose action bounds the saved model uses; by default the first one."""
    robot: str = ""
    """Robot whose kinematics the model uses; by default the robot named in the data."""
    camera: str = ""
    """Camera of the arm map: a file of `rawdream camera calibrate`; by default that of ``rollout``, the simulator's."""
    seed: int = 0
    """Seed of initialization, batches and noise."""
    device: str = "cpu"
    """Device to train on. "cuda" under torchrun: one GPU per process."""
    parallel: Parallel = "none"
    """Under torchrun: ddp (a full copy on every process) or fsdp2 (weights and optimizer state sharded over processes)."""
    bf16: bool = True
    """Train in bfloat16 autocast."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: a third more compute, a fraction of the memory."""
    micro_batch_size: int = 0
    """Rows per forward pass of a process, with gradient accumulation; 0: all rows of the process."""
    offload: bool = False
    """Keep optimizer state and averaged weights in host memory: slower steps, 12 bytes per weight less device memory."""
    objective: Literal["episode", "window"] = "episode"
    """The loss: over whole episodes (the bundled size), or over windows with random context (the paper's)."""
    window_latents: Literal["anchored", "episode"] = "anchored"
    """Objective "window" with Wan's VAE: encode every window as a video that starts at its own anchor, as a rollout does
    (four times the encoding and disk space more), or cut windows from latents of whole episodes, which differ from those
    (docs/world_model.md has the difference). With the bundled codec both are the same."""
    episode_chunks: int = 8
    """Objective "episode": chunks in a training episode."""
    autoencoder: StageConfig = field(default_factory=lambda: StageConfig(steps=5000, batch_size=16, lr=2e-3, ema=0.99))
    """Stage 1, unless ``init`` or ``codec`` gives the frame codec."""
    transformer: StageConfig = field(default_factory=lambda: StageConfig(steps=6000, batch_size=8, lr=6e-4))
    """Stage 2."""
    autoencoder_model: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    """Architecture of the autoencoder; the image size is taken from the data."""
    model_name: str = ""
    """A named architecture, "embedded" or "wan2.1-1.3b", instead of ``model``."""
    model: WanConfig = field(default_factory=lambda: WAN_CONFIGS["embedded"])
    """Architecture of the transformer; with ``init`` the default is that of ``init``."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Rollout settings saved with the model; the arm map is also used in training. Frames per second are taken from the
    data. Action bounds are those of ``init``; a new model with objective "window" takes them from the data."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Noise levels and loss weights."""
    log_every: int = 25
    """Steps between lines of metrics."""
    save_every: int = 250
    """Steps between checkpoints."""
    validate_every: int = 1000
    """Steps between validations, when there are ``validation`` data."""
    validation_episodes: int = 8
    """Held-out episodes imagined at each validation."""
    validation_windows: int = 32
    """Held-out windows or episodes whose loss is measured at each validation."""
