"""Options of GRPO."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rawdream_env.errors import InvalidOptionError
from rawdream_env.robots import find_robot


@dataclass(frozen=True)
class GRPOConfig:
    """Options of :func:`train_grpo`. In TRL's names: ``num_generations`` = ``group_size``, ``epsilon`` =
    ``clip_eps_low``, ``epsilon_high`` = ``clip_eps_high``, ``num_iterations`` = ``epochs``, ``beta`` = 0.
    """

    run_dir: Path
    """Where configuration, metrics and checkpoints go. The same command on the same folder resumes."""
    env_id: str = find_robot().dream_env
    """A dream, or a simulator to train in the ground truth (then without dual-noise verification)."""
    env_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Further keyword arguments of the environment, such as world_model, judge, starts, judge_every."""
    task: str | int | None = None
    """A task's name, instruction or id; None: every start draws a task."""
    layout: Literal["narrow", "wide"] = "narrow"
    """How widely the objects of the starts are spread."""
    policy: str = "embedded"
    """The policy to improve: "embedded" (the bundled one) or a checkpoint folder, after supervised fine-tuning."""
    device: str = "cpu"
    """Device of policy and environment."""
    num_envs: int = 64
    """Number of episodes imagined in parallel. Results do not depend on it."""

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
    """A judge that sees the same videos and never rewards. The gap is logged; a large one is a warning."""
    overlap_judge: Literal["auto", "on", "off"] = "auto"
    """Judge finished episodes while the next are imagined; "auto": if the judge is a server. Same results."""
    max_flagged: int = 2
    """A group with more flagged or invalid members than this is dropped."""

    lr: float = 5e-6
    """AdamW learning rate (constant). 5e-6 suits a 7B policy; a small one needs about 1e-4."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    clip_eps_low: float = 0.2
    """Ratios below 1 - clip_eps_low no longer push a bad action's probability down."""
    clip_eps_high: float = 0.28
    """Ratios above 1 + clip_eps_high no longer push a good action's probability up."""
    loss_type: Literal["trajectory", "token"] = "trajectory"
    """"trajectory": mean over each trajectory, then over the group (paper); "token": every token counts equally."""
    scale_rewards: Literal["group", "none"] = "group"
    """"group" divides advantages by the group's standard deviation (paper), "none" does not."""
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
    tensorboard: bool = True
    """Write TensorBoard logs."""
    progress: bool = True
    """Show a progress bar with the current success rate."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        lowest = {"num_envs": 1, "steps": 1, "group_size": 2, "groups_per_step": 1, "epochs": 1, "minibatches": 1}
        lowest |= {"microbatch_size": 1, "save_every": 1, "max_flagged": 0, "max_groups_per_step": self.groups_per_step}
        for name, minimum in lowest.items():
            if getattr(self, name) < minimum:
                raise InvalidOptionError(f"{name}={getattr(self, name)} must be at least {minimum}.")
        for name in ("temperature", "lr", "max_grad_norm", "clip_eps_high"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise InvalidOptionError(f"{name}={getattr(self, name)} must be positive.")
        if not 0 < self.clip_eps_low < 1:
            raise InvalidOptionError(f"clip_eps_low={self.clip_eps_low} must lie between 0 and 1.")
