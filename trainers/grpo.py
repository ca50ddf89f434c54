"""GRPO in imagination: improve a policy inside a world model, with a judge's verdicts as the only reward.

RAW-Dream sections 3.2 and 3.3, Eq. 2 and 3, appendix A.2 and A.4. One step:

1. *Roll out* groups of episodes that share a start (``rollout.py``), sampling at ``temperature``.
2. *Verify* each success by dreaming it again with fresh noise; what does not repeat gets advantage 0 (DNV).
3. *Drop* groups that are all success or all failure, or have more than ``max_flagged`` doubtful members; open others.
4. *Advantages* relative to the group, over its trustworthy members (``losses.group_advantages``).
5. *Update* by the clipped objective (``losses.clipped_loss``): mean over each trajectory, then over the group.

Kept of the paper: all of that, and its numbers as defaults (group of 8, T = 1.6, lr 5e-6, 50 steps, no KL term). Open in
the paper and chosen here: clip range 0.2 / 0.28 (as the published peers), groups per step, unreadable verdicts (left out
like flagged rollouts, never a 0). Not kept: many GPUs; this is one process.

Nothing is drawn from a generator that would have to be saved: every start, every sampled token and every minibatch is
named by (seed, step, ...). So a run killed at any moment and started again with the same command writes, on the same
machine in float32, the same weights and the same ``metrics.jsonl`` as one that was never interrupted.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import gymnasium as gym
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor, nn
from tqdm import tqdm

from rawdream_env.errors import CheckpointError, InvalidOptionError, RawDreamError
from rawdream_env.evaluation.statistics import wilson_interval
from rawdream_env.policies import load_policy
from rawdream_env.seeding import mix
from rawdream_env.trainers.losses import DROP_REASONS, clipped_loss, merge_metrics, token_weights
from rawdream_env.trainers.rollout import (
    GroupCollector,
    NoUsableGroupError,
    RolloutCounts,
    RolloutInterrupted,
    Rollouts,
)
from rawdream_env.trainers.run_dir import RunDir, pack_optimizer, unpack_optimizer
from rawdream_env.wrappers.base import find_wrapper
from rawdream_env.wrappers.dual_noise import DualNoiseVerification

_STREAM_ENV, _STREAM_SHUFFLE = 21, 22
_logger = logging.getLogger(__name__)


class TrainingDivergedError(RawDreamError, RuntimeError):
    """The loss or its gradient is not finite, or the policy that learns is not the one that sampled."""


@dataclass(frozen=True)
class GRPOConfig:
    """Options of :func:`train_grpo`. In TRL's names: ``num_generations`` = ``group_size``, ``epsilon`` =
    ``clip_eps_low``, ``epsilon_high`` = ``clip_eps_high``, ``num_iterations`` = ``epochs``, ``beta`` = 0."""

    run_dir: Path
    """Where configuration, metrics and checkpoints go. The same command on the same folder resumes."""
    env_id: str = "rawdream/PiperDream-v0"
    """A dream, or ``rawdream/PiperSim-v0`` to train in the simulator (then without dual-noise verification)."""
    env_kwargs: dict[str, str | int | float | bool] = field(default_factory=dict)
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
    """Groups with something to learn from that make up one step (times group_size: trajectories; peers use 512-1024)."""
    max_groups_per_step: int = 64
    """Most groups rolled out for one step, dropped ones included; a step may then be smaller."""
    temperature: float = 1.6
    """Of sampling and of the log-probabilities. 1.6 suits a large pre-trained policy; the embedded one prefers 0.3 to 1."""
    dual_noise_verification: bool = True
    """Dream every success again and leave out what does not repeat. Ignored in a simulator, which has no noise."""
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


@dataclass(frozen=True)
class GRPOResult:
    """How a run ended: ``stopped`` by its "steps", its "minutes", "interrupted", or "solved" (every group a success);
    ``step`` updates are done; ``message`` is one sentence for people; ``policy`` the trained one, in memory."""

    step: int
    stopped: Literal["steps", "minutes", "interrupted", "solved"]
    message: str
    policy: Any
    run_dir: Path


def train_grpo(config: GRPOConfig, *, env: VectorEnv[Any, Any, Any] | None = None, policy: Any = None) -> GRPOResult:
    """Train, or go on training, the run in ``config.run_dir``.

    Args:
        config: every option.
        env: use this vector environment (DISABLED autoreset) instead of making ``config.env_id``; it is left open.
        policy: use this policy (a ``torch.nn.Module`` with ``act`` and ``logprobs``) instead of ``config.policy``.

    Ctrl-C ends the run in good order: the last finished step is saved. A second Ctrl-C does not wait.

    Raises:
        RunDirError: the folder holds another run, or cannot be written. CheckpointError: damaged or of another policy.
        NoUsableGroupError: every group of a step was dropped; the message says why and which option to change.
        TrainingDivergedError: a non-finite update, or sampling and training disagree about the log-probabilities.
        InvalidOptionError: options that do not fit. JudgeUnavailableError: run the same command again to go on.
    """
    begun = time.monotonic()
    policy = load_policy(config.policy if policy is None else policy, config.device)
    if not isinstance(policy, nn.Module):
        raise InvalidOptionError(f"GRPO trains torch modules, but the policy is a {type(policy).__name__}.")
    policy.eval()  # dropout would make the policy that learns another one than the policy that sampled
    parameters = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.lr, weight_decay=config.weight_decay)
    ours = env is None
    vector_env = make_env(config) if env is None else env
    if config.dual_noise_verification and find_wrapper(vector_env, DualNoiseVerification) is None:
        vector_env = _verified(vector_env)
    may_change = ("run_dir", "steps", "minutes", "save_every", "tensorboard", "progress", "num_envs")
    try:
        with (
            RunDir(config.run_dir, config, may_change=may_change, tensorboard=config.tensorboard) as run,
            _deferred_interrupt() as interrupted,
        ):
            step = _restore(run, parameters, optimizer)
            stopped: Literal["steps", "minutes", "interrupted", "solved"] = "steps"
            saved, whole = step, True
            bar = tqdm(total=config.steps, initial=step, desc="GRPO", unit="step", disable=not config.progress)
            collector = GroupCollector(
                vector_env,
                policy,
                group_size=config.group_size,
                num_groups=config.groups_per_step,
                max_groups=config.max_groups_per_step,
                temperature=config.temperature,
                max_flagged=config.max_flagged,
                scale_rewards=config.scale_rewards,
                seed=config.seed,
                should_stop=interrupted.is_set,
                on_group=lambda counts: bar.set_postfix_str(_postfix(counts)),
            )
            try:
                while step < config.steps:
                    timer = _Timer(vector_env)
                    rollouts = collector.collect(step)
                    timer.lap("rollout")
                    whole = False
                    metrics = update(config, policy, parameters, optimizer, rollouts, step)
                    timer.lap("update")
                    step, whole = step + 1, True
                    run.log(step, **summarize(rollouts), **metrics)
                    run.log_timings(step, **timer.summary(rollouts, vector_env))
                    bar.update()
                    out_of_time = config.minutes is not None and time.monotonic() - begun > config.minutes * 60
                    if step % config.save_every == 0 or step == config.steps or out_of_time or interrupted.is_set():
                        _save(run, step, parameters, optimizer)
                        saved = step
                    if interrupted.is_set():
                        raise RolloutInterrupted("stopped after an update")
                    if out_of_time and step < config.steps:
                        stopped = "minutes"
                        break
            except RolloutInterrupted:
                stopped = "interrupted"
            except NoUsableGroupError as error:
                if set(error.dropped) != {"all_success"}:
                    raise
                stopped = "solved"
            finally:
                bar.close()
                if step > saved and whole:  # no update was cut in two: the weights are those of the last finished step
                    _save(run, step, parameters, optimizer)
            message = _farewell(stopped, step, config)
            _export(policy, run.path)
    finally:
        if ours:
            vector_env.close()
    if stopped != "steps":
        _logger.warning(message)
    return GRPOResult(step, stopped, message, policy, Path(config.run_dir))


def make_env(config: GRPOConfig) -> VectorEnv[Any, Any, Any]:
    """The environment of ``config``, no wider than one step's rollouts."""
    num_envs = min(config.num_envs, config.groups_per_step * config.group_size)
    kwargs: dict[str, Any] = {
        "task": config.task,
        "layout": config.layout,
        "device": config.device,
        **config.env_kwargs,
    }
    return gym.make_vec(config.env_id, num_envs=num_envs, autoreset_mode="Disabled", **kwargs)


def _verified(env: VectorEnv[Any, Any, Any]) -> VectorEnv[Any, Any, Any]:
    """``env`` with dual-noise verification, where there is noise to draw again."""
    return DualNoiseVerification(env) if callable(getattr(env.unwrapped, "replay", None)) else env


# -- the update ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """A step's training data: N trajectories cut into M chunks of L tokens; ``trajectory`` (M,) says whose."""

    images: Tensor  # uint8 (M, H, W, 3)
    instructions: list[str]
    tokens: Tensor  # int64 (M, L)
    old_logprobs: Tensor  # fp32 (M, L)
    trajectory: Tensor  # int64 (M,)
    advantages: Tensor  # fp32 (N,)
    row_weights: Tensor  # fp32 (N,), 1/G_R of the trajectory's group

    @classmethod
    def of(cls, rollouts: Rollouts) -> Batch:
        """The trustworthy members of the kept groups; the others have advantage 0 and weight 0 (Eq. 2) and stay out."""
        chosen = [
            (group, member, float(advantage), 1.0 / int(group.result.trustworthy.sum()))
            for group in rollouts.groups
            for member, advantage, trusted in zip(
                group.members, group.result.advantages, group.result.trustworthy, strict=True
            )
            if trusted
        ]
        lengths = torch.tensor([len(member) for _, member, _, _ in chosen])
        return cls(
            images=torch.cat([torch.from_numpy(member.images) for _, member, _, _ in chosen]),
            instructions=[group.start.instruction for group, member, _, _ in chosen for _ in range(len(member))],
            tokens=torch.cat([member.tokens for _, member, _, _ in chosen]),
            old_logprobs=torch.cat([member.logprobs for _, member, _, _ in chosen]),
            trajectory=torch.repeat_interleave(torch.arange(len(chosen)), lengths),
            advantages=torch.tensor([advantage for _, _, advantage, _ in chosen]),
            row_weights=torch.tensor([weight for _, _, _, weight in chosen]),
        )

    def weights(self, trajectories: Tensor, loss_type: Literal["trajectory", "token"]) -> tuple[Tensor, Tensor]:
        """Chunks (m,) of the given trajectories and the weight (m,) of each of their tokens; all tokens sum to 1."""
        chunks = torch.isin(self.trajectory, trajectories).nonzero().squeeze(1)
        owner = self.trajectory[chunks]
        counts = torch.bincount(owner, minlength=len(self.advantages))
        mask = torch.arange(int(counts.max())) < counts[:, None]  # every chunk has L tokens: weigh chunks, share out
        per_chunk = token_weights(mask, loss_type, self.row_weights).amax(1)
        return chunks, per_chunk[owner] / self.tokens.shape[1]


def update(
    config: GRPOConfig,
    policy: Any,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    step: int,
) -> dict[str, float]:
    """``epochs`` x ``minibatches`` updates on the kept groups; returns metrics averaged over them.

    Raises ``TrainingDivergedError``, before the weights are touched, when the first ratio is not 1 or a gradient is not
    finite.
    """
    batch = Batch.of(rollouts)
    parts: list[dict[str, Tensor]] = []
    norms: list[float] = []
    losses: list[float] = []
    first_deviation = math.nan
    for epoch in range(config.epochs):
        generator = torch.Generator().manual_seed(mix(config.seed, step, epoch, _STREAM_SHUFFLE))
        order = torch.randperm(len(batch.advantages), generator=generator)
        for trajectories in order.tensor_split(min(config.minibatches, len(order))):
            chunks, weights = batch.weights(trajectories, config.loss_type)
            optimizer.zero_grad(set_to_none=True)
            loss, pieces = _backward(config, policy, batch, chunks, weights)
            if not norms:
                first_deviation = merge_metrics(pieces)["ratio_deviation"]
                _check_on_policy(first_deviation, parameters, step)
            norm = float(nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm))
            if not (math.isfinite(norm) and math.isfinite(loss)):
                raise TrainingDivergedError(
                    f"Step {step + 1}: the loss is {loss:.4g} and the gradient norm {norm:.4g}; nothing of this step is "
                    f"saved. Start a new run with a lower lr (now {config.lr:g}) or more groups_per_step."
                )
            optimizer.step()
            norms.append(norm)
            losses.append(loss)
            parts.extend(pieces)
    merged = merge_metrics(parts)
    names = ("approx_kl", "clip_frac", "entropy", "ratio_mean", "ratio_max")
    return {
        "loss": sum(losses) / len(losses),
        "grad_norm": sum(norms) / len(norms),
        "first_ratio_deviation": first_deviation,
        **{name: merged[name] for name in names},
    }


def _backward(
    config: GRPOConfig, policy: Any, batch: Batch, chunks: Tensor, weights: Tensor
) -> tuple[float, list[dict[str, Tensor]]]:
    """Accumulate the gradient of one minibatch, ``microbatch_size`` chunks at a time."""
    total, metrics = 0.0, []
    for rows, weight in zip(chunks.split(config.microbatch_size), weights.split(config.microbatch_size), strict=True):
        instructions = [batch.instructions[row] for row in rows.tolist()]
        arguments = (batch.images[rows], instructions, batch.tokens[rows])
        entropy: Tensor | None = None
        if hasattr(policy, "logprobs_and_entropy"):
            logprobs, entropy = policy.logprobs_and_entropy(*arguments, temperature=config.temperature)
        else:
            logprobs = policy.logprobs(*arguments, temperature=config.temperature)
        loss, part = clipped_loss(
            logprobs,
            batch.old_logprobs[rows].to(logprobs.device),
            batch.advantages[batch.trajectory[rows]].to(logprobs.device),
            weight[:, None].expand(-1, logprobs.shape[1]).to(logprobs.device),
            clip_eps_low=config.clip_eps_low,
            clip_eps_high=config.clip_eps_high,
            entropy=entropy,
        )
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
        metrics.append(part)
    return total, metrics


def _check_on_policy(deviation: float, parameters: Mapping[str, Tensor], step: int) -> None:
    """Before any update the ratio is 1; float32 rounding leaves 1e-5, half precision far more."""
    exact = all(p.dtype in (torch.float32, torch.float64) for p in parameters.values())
    on_cpu = all(p.device.type == "cpu" for p in parameters.values())
    limit = 1e-5 if exact and on_cpu else 1e-2 if exact else 0.5
    if not deviation <= limit:
        raise TrainingDivergedError(
            f"Step {step + 1}: before the first update the probability ratio is off 1 by {deviation:.3g} (limit {limit:g}): "
            "act() and logprobs() disagree. Look for dropout left on, another temperature, or other image processing."
        )


# -- bookkeeping -----------------------------------------------------------------------------------------------------


def summarize(rollouts: Rollouts) -> dict[str, float]:
    """Metrics of what was rolled out. Rates are over all rollouts of the step, those of dropped groups included."""
    counts, groups = rollouts.counts, rollouts.groups
    low, high = wilson_interval(counts.successes, counts.rollouts)
    rewards = [m.reward for g in groups for m, ok in zip(g.members, g.result.trustworthy, strict=True) if ok]
    return {
        "n": counts.rollouts,
        "success_rate": counts.successes / counts.rollouts,
        "success_low": low,
        "success_high": high,
        "flagged_rate": counts.flagged / counts.successes if counts.successes else 0.0,
        "invalid_rate": counts.invalid / counts.rollouts,
        "reward": sum(rewards) / len(rewards),
        "chunks_per_rollout": counts.chunks / counts.rollouts,
        "groups": counts.groups,
        "groups_kept": len(groups),
        **{f"dropped_{reason}": counts.dropped[reason] for reason in DROP_REASONS},
        **{
            f"success_rate/task_{task}": counts.task_successes[task] / n
            for task, n in sorted(counts.task_rollouts.items())
        },
    }


class _Timer:
    """Seconds per stage of a step, and the world model's work."""

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        self._last = self._begun = time.perf_counter()
        self._replayed = _replayed_chunks(env)
        self._stages: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self._stages[stage] = now - self._last
        self._last = now

    def summary(self, rollouts: Rollouts, env: VectorEnv[Any, Any, Any]) -> dict[str, float]:
        shape = env.single_action_space.shape
        chunk_len = shape[0] if shape else 1
        imagined = (rollouts.counts.chunks + _replayed_chunks(env) - self._replayed) * chunk_len
        kept = sum(len(member) for group in rollouts.groups for member in group.members) * chunk_len
        seconds = time.perf_counter() - self._begun
        return {
            **{f"{stage}_s": value for stage, value in self._stages.items()},
            "step_s": seconds,
            "frames": imagined,
            "frames_per_s": imagined / self._stages["rollout"],
            "kept_frames_per_s": kept / seconds,
        }


def _replayed_chunks(env: VectorEnv[Any, Any, Any]) -> int:
    wrapper = find_wrapper(env, DualNoiseVerification)
    return 0 if wrapper is None else wrapper.statistics.replayed_chunks


def _save(run: RunDir, step: int, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    tensors = {f"policy.{name}": parameter.detach() for name, parameter in parameters.items()}
    run.save(step, {**tensors, **pack_optimizer(optimizer)}, {"step": step})


def _restore(run: RunDir, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Weights and optimiser of the last checkpoint; returns the number of steps done."""
    checkpoint = run.load_latest()
    if checkpoint is None:
        return 0
    stored = {n.removeprefix("policy."): t for n, t in checkpoint.tensors.items() if n.startswith("policy.")}
    wrong = sorted({*stored} ^ {*parameters}) or [n for n, p in parameters.items() if p.shape != stored[n].shape]
    if wrong:
        raise CheckpointError(
            f"{checkpoint.path} belongs to another policy: {len(wrong)} parameters differ in name or shape, first {wrong[0]!r}."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(stored[name])
    unpack_optimizer(optimizer, checkpoint.tensors)
    return checkpoint.step


def _export(policy: Any, folder: Path) -> None:
    """The trained policy as an ordinary checkpoint folder, for policies that can be saved as one."""
    if callable(getattr(policy, "save_pretrained", None)):
        policy.save_pretrained(folder / "policy")


def _postfix(counts: RolloutCounts) -> str:
    rate = 100 * counts.successes / counts.rollouts
    return f"success {rate:.0f} % (n={counts.rollouts}), {counts.groups - counts.dropped.total()} of {counts.groups} groups kept"


def _farewell(stopped: str, step: int, config: GRPOConfig) -> str:
    where = f"{step} of {config.steps} steps are done and saved in {config.run_dir}"
    return {
        "steps": f"All {where}.",
        "minutes": f"The {config.minutes} minutes are up: {where}; the same command with more minutes goes on.",
        "interrupted": f"Stopped on request: {where}; the same command goes on.",
        "solved": f"Every rollout succeeds, so there is nothing left to learn here: {where}.",
    }[stopped]


@contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event, so that no update is cut in two; a second one interrupts as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield event
        return

    def handle(number: int, frame: FrameType | None) -> None:
        event.set()
        signal.signal(signal.SIGINT, previous)
        _logger.warning("Stopping after the current update or chunk, then saving; press Ctrl-C again not to wait.")

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
