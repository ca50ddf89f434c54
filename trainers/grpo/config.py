"""Options of GRPO."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from rawdream_env import files
from rawdream_env.errors import InvalidOptionError, RunDirError
from rawdream_env.robots import find_robot
from rawdream_env.trainers.common.distributed import Parallel
from rawdream_env.trainers.common.trackers import TrackerName
from rawdream_env.trainers.grpo.losses import Baseline, LossType, RatioLevel, ScaleRewards


@dataclass(frozen=True)
class GRPOConfig:
    """Options of :func:`train_grpo`. ``loss_type``, ``scale_rewards``, ``importance_sampling_level``,
    ``gradient_checkpointing`` and ``report_to`` are named as in TRL. In TRL's names: ``num_generations`` = ``group_size``,
    ``epsilon`` = ``clip_eps_low``, ``epsilon_high`` = ``clip_eps_high``, ``num_iterations`` = ``epochs``, ``beta`` = 0.
    """

    run_dir: Path
    """Where configuration, metrics and checkpoints go. The same command on the same folder resumes."""
    env_id: str = find_robot().dream_env
    """A dream, or a simulator to train in the ground truth (then without dual-noise verification)."""
    env_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Further keyword arguments of the environment, such as world_model, judge, starts, judge_every.
    judge_every chunk: success ends the episode, as in a simulator; else the bundled judge is asked only at the horizon.
    """
    task: str | int | None = None
    """A task's name, instruction or id; None: every start draws a task."""
    layout: Literal["narrow", "wide"] = "narrow"
    """How widely the objects of the starts are spread."""
    policy: str = "embedded"
    """The policy to improve: "embedded" (the bundled one) or a checkpoint folder, after supervised fine-tuning."""
    lora_rank: int = 0
    """OpenVLA-OFT: rank of new LoRA adapters, which alone are trained; 0: train the weights."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """OpenVLA-OFT: precision of the weights; None: as stored. Adapters, scores and log-probabilities are float32."""
    unnorm_key: str | None = None
    """OpenVLA-OFT: the data set whose statistics scale the actions; None: the only one."""
    gradient_checkpointing: bool = False
    """OpenVLA-OFT: compute the language model's activations again in the backward pass, to save memory."""
    device: str = "cpu"
    """Device of policy and environment."""
    parallel: Parallel = "none"
    """How processes started by torchrun train together: "ddp" replicates the policy on each, "fsdp2" shards its weights during
    updates. Each has its own environments and rolls out whole groups. Results do not depend on it, but for rounding."""
    num_envs: int = 64
    """Number of episodes imagined in parallel, per process. Results do not depend on it."""
    offload_world_model: bool = False
    """Keep the world model's weights in host memory while the policy is updated, if both share a GPU. Same results."""

    steps: int = 50
    """Number of training steps (paper: 50, on LIBERO-Object 20). May be raised when resuming."""
    minutes: float | None = None
    """Stop after the first step that ends later than this, counted from the start of the process, or as soon as a step needs
    more groups for dropped ones: that step begins anew when the run is resumed. None: no limit."""
    group_size: int = 8
    """Number of rollouts that share a start."""
    groups_per_step: int = 8
    """Number of groups per step, without dropped ones (times group_size: trajectories; peers use 512-1024)."""
    max_groups_per_step: int = 64
    """Maximum number of groups rolled out in a step, dropped ones included; a step may then have fewer groups."""
    temperature: float = 1.6
    """Temperature of sampling and log-probabilities: 1.6 suits a large pre-trained policy, 0.3 to 1 the bundled one."""
    dual_noise_verification: bool = True
    """Imagine every success again and leave out those that do not repeat. Ignored in a simulator, which has no noise."""
    held_out_judge: str = ""
    """A judge that sees the same videos and never rewards. Its success rate is logged, and an alarm watches the gap."""
    alarm_margin: float = 0.1
    """Raise the alarm when the judge's success rate is above another verdict's by more than this, with 95 % confidence.
    Other verdicts: the held-out judge's, and info["state_success"] of a world model that knows its state.
    """
    alarm_window: int = 8
    """Number of steps whose episodes the alarm compares."""
    stop_on_alarm: bool = False
    """End the run while the alarm is raised."""
    reflector: str = ""
    """A judge that is asked after every chunk: its success probability's increase is the reward, and an episode that looks done
    ends (World-Env's instant reflector). Leave the environment's own judge out by --env-kwargs judge none. "": off.
    """
    reflector_threshold: float | None = None
    """Probability from which the reflector ends an episode; None: its judge's own decision."""
    reflector_patience: int = 1
    """Number of consecutive chunks that must look done."""
    overlap_judge: Literal["auto", "on", "off"] = "auto"
    """Judge finished episodes while the next are imagined; "auto": if the judge is a server. Same results."""
    max_flagged: int = 2
    """A group with more flagged or invalid members than this is dropped."""

    lr: float = 5e-6
    """AdamW learning rate after the warm-up. 5e-6 suits a 7B policy; a small one needs about 1e-4."""
    warmup_steps: int = 5
    """Steps over which the learning rate rises to lr, because AdamW's first updates move furthest; 0 (paper): none."""
    max_kl: float | None = 0.05
    """Undo an update after which approx_kl on its own minibatch exceeds this, and go on; None (paper): off.
    Costs one forward pass per update, and a copy of the trained weights and of the optimizer.
    """
    ema: float = 0.95
    """Decay per step of the averaged weights, which are those of the policy that is saved: the last steps' noise averages out.
    Rollouts sample from the latest weights. 0 (paper): off.
    """
    weight_decay: float = 0.0
    """AdamW weight decay."""
    decayed: Literal["matrices", "all"] = "matrices"
    """What weight_decay applies to: "matrices" leaves out biases and norms."""
    clip_eps_low: float = 0.2
    """Ratios below 1 - clip_eps_low no longer push a bad action's probability down."""
    clip_eps_high: float = 0.28
    """Ratios above 1 + clip_eps_high no longer push a good action's probability up."""
    loss_type: LossType = "grpo"
    """"grpo": mean over each trajectory, then over the group (paper); "dapo": every token counts equally (TRL's default).
    "trajectory" and "token" are former names of the two.
    """
    scale_rewards: ScaleRewards = "group"
    """"group" divides advantages by the group's standard deviation (paper), "none" does not."""
    baseline: Baseline = "mean"
    """What is subtracted from a reward: the group's "mean" (paper), or "leave_one_out", the mean of the others (RLOO)."""
    importance_sampling_level: RatioLevel = "token"
    """A ratio and a clip per action "token", or per "chunk": the product over its tokens."""
    epochs: int = 1
    """Number of passes over a step's trajectories."""
    minibatches: int = 2
    """Number of updates per pass, each on whole trajectories."""
    microbatch_size: int = 256
    """Maximum number of chunks in a forward pass. Affects memory only: gradients are accumulated."""
    max_grad_norm: float = 1.0
    """Maximum gradient norm; larger gradients are scaled down."""

    seed: int = 0
    """Seed of the run."""
    save_every: int = 5
    """Steps between checkpoints."""
    eval_every: int = 0
    """Steps between evaluations of the policy that would be saved, in a simulator; 0: none."""
    eval_env_id: str = find_robot().sim_env
    """The simulator. task and layout hold there too."""
    eval_episodes: int = 32
    """Number of episodes of an evaluation; their starts are the same every time."""
    eval_temperature: float = 0.0
    """Temperature of evaluations; 0: greedy."""
    eval_videos: int = 4
    """Number of episodes that are written to RUN/videos."""
    report_to: tuple[TrackerName, ...] = ()
    """Experiment trackers that get the metrics too: wandb, trackio."""
    tensorboard: bool = True
    """Write TensorBoard logs."""
    progress: bool = True
    """Show a progress bar with the current success rate, and a table of the tasks every ten steps."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        lowest = {"num_envs": 1, "steps": 1, "group_size": 2, "groups_per_step": 1, "epochs": 1, "minibatches": 1}
        lowest |= {"microbatch_size": 1, "save_every": 1, "max_flagged": 0, "max_groups_per_step": self.groups_per_step}
        lowest |= {"warmup_steps": 0, "alarm_window": 1, "lora_rank": 0, "eval_every": 0, "eval_episodes": 1}
        for name, minimum in lowest.items():
            if getattr(self, name) < minimum:
                raise InvalidOptionError(f"{name}={getattr(self, name)} must be at least {minimum}.")
        for name in ("temperature", "lr", "max_grad_norm", "clip_eps_high"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise InvalidOptionError(f"{name}={getattr(self, name)} must be positive.")
        for name in ("clip_eps_low", "alarm_margin"):
            if not 0 < getattr(self, name) < 1:
                raise InvalidOptionError(f"{name}={getattr(self, name)} must lie between 0 and 1.")
        if not 0 <= self.ema < 1:
            raise InvalidOptionError(f"ema={self.ema} must be at least 0 and below 1.")
        if self.max_kl is not None and not self.max_kl > 0:
            raise InvalidOptionError(f"max_kl={self.max_kl} must be positive, or None to keep every update.")


ADDED: dict[str, Any] = {
    "warmup_steps": 0, "max_kl": None, "ema": 0.0, "baseline": "mean", "importance_sampling_level": "token",
    "decayed": "all", "reflector": "", "reflector_threshold": None, "reflector_patience": 1, "lora_rank": 0,
    "dtype": None, "unnorm_key": None, "gradient_checkpointing": False, "parallel": "none", "offload_world_model": False,
}  # fmt: skip
"""What runs were made with before these options existed."""
_FORMER = {"trajectory": "grpo", "token": "dapo"}


def as_begun(config: GRPOConfig) -> GRPOConfig:
    """``config`` for the run in its folder: of ``ADDED``, what the run was begun without and has its default stays off."""
    path = Path(config.run_dir) / "config.json"
    if not path.exists():
        return config
    stored = files.read_json(path, "restore it from a copy, or choose another folder", RunDirError)
    default = {f.name: f.default for f in fields(GRPOConfig)}
    off = {
        name: value for name, value in ADDED.items() if name not in stored and getattr(config, name) == default[name]
    }
    if _FORMER.get(stored.get("loss_type", "")) == config.loss_type:
        off["loss_type"] = stored["loss_type"]
    return replace(config, **off)
