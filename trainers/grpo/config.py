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
    """A task's name, instruction or id; by default every start draws one."""
    layout: Literal["narrow", "wide"] = "narrow"
    """How far the objects of the starts are scattered."""
    policy: str = "embedded"
    """"embedded" or a checkpoint folder: the policy to improve, after supervised fine-tuning."""
    device: str = "cpu"
    """Where policy and environment run."""
    num_envs: int = 64
    """Episodes imagined side by side. Results do not depend on it."""

    steps: int = 50
    """Policy updates in all (paper: 50, on LIBERO-Object 20). May be raised when resuming."""
    minutes: float | None = None
    """Stop after the first step that ends later than this, counted from the start of this process."""
    group_size: int = 8
    """Rollouts that share a start."""
    groups_per_step: int = 8
    """Groups trained on in one step, dropped ones aside (times group_size: trajectories; peers use 512-1024)."""
    max_groups_per_step: int = 64
    """Most groups rolled out for one step, dropped ones included; a step may then be smaller."""
    temperature: float = 1.6
    """Of sampling and of the log-probabilities. 1.6 suits a large pre-trained policy, 0.3 to 1 the embedded one."""
    dual_noise_verification: bool = True
    """Dream every success again and leave out what does not repeat. Ignored in a simulator, which has no noise."""
    held_out_judge: str = ""
    """A judge that watches the same videos and never rewards; the gap between the two is logged and alarmed."""
    overlap_judge: Literal["auto", "on", "off"] = "auto"
    """Judge ended episodes while the next are imagined; "auto": where the judge is a server. Same results."""
    max_flagged: int = 2
    """A group with more flagged or invalid members than this is dropped."""

    lr: float = 5e-6
    """Of AdamW, constant. 5e-6 suits a 7B policy; a small one needs 1e-4 or so."""
    weight_decay: float = 0.0
    """Of AdamW."""
    clip_eps_low: float = 0.2
    """Ratios below 1 - clip_eps_low no longer push a bad action's probability down."""
    clip_eps_high: float = 0.28
    """Ratios above 1 + clip_eps_high no longer push a good action's probability up."""
    loss_type: Literal["trajectory", "token"] = "trajectory"
    """"trajectory": mean over each trajectory, then over the group (paper); "token": every token counts alike."""
    scale_rewards: Literal["group", "none"] = "group"
    """Whether advantages are divided by the group's standard deviation."""
    epochs: int = 1
    """Passes over a step's trajectories."""
    minibatches: int = 2
    """Updates per pass; each takes whole trajectories."""
    microbatch_size: int = 256
    """Most chunks in one forward pass (memory only; gradients are accumulated)."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""

    seed: int = 0
    """Names every random draw of the run."""
    save_every: int = 5
    """Steps between checkpoints."""
    tensorboard: bool = True
    """Write curves as well."""
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
