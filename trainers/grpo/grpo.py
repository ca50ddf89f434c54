"""GRPO in imagination: improve a policy inside a world model, with a judge's verdicts as the only reward.

RAW-Dream section 3.2, Eq. 2 and 3, appendix A.2 and A.4. One step:

1. *Roll out* groups of episodes that share a start (``rollout.py``), sampling at ``temperature``.
2. *Verify* each success by imagining it again with fresh noise; a flagged episode gets advantage 0 (dual-noise
   verification).
3. *Drop* groups that are all success or all failure, or have more than ``max_flagged`` flagged or invalid members, and
   open others.
4. *Advantages* relative to the group, over its valid members (``losses.group_advantages``).
5. *Update* by the clipped objective (``losses.clipped_loss``, ``gradients.py``): mean over each trajectory, then over the
   group.

Kept from the paper: all of that, and its numbers as defaults (group of 8, T = 1.6, lr 5e-6, 50 steps, no KL term).
Where the paper leaves a choice, this is the reading taken here:

- *Ratio per token (open).* Eq. 3 has the ratio of an action a_{i,t} and does not say whether that is a chunk, a step or a
  token. Here it is one action token: ratio and clip are per token, and the mean over t is over all tokens of a
  trajectory. ``importance_sampling_level="chunk"`` takes the chunk, whose ratio is the product over its tokens.
- *Standard deviation.* Over the trusted members only, unbiased, plus 1e-6 (``losses.STD_EPS``). Eq. 3 divides by
  std(R).
- *Minibatches.* ``minibatches`` (2) updates per pass over whole trajectories, ``epochs`` (1) passes. From the second
  update on the ratio is not 1 and the clip has an effect; with one of each it never has.
- *Clip range* 0.2 / 0.28, as the published peers; *groups per step* 8.
- *INVALID verdicts* are left out like flagged rollouts, never a 0.

Added to the paper, each off by a value of its option: a warm-up of the learning rate (``warmup_steps=0``); an update that
moves the policy too far is undone (``max_kl=None``); the saved policy has weights averaged over the last steps (``ema=0``);
an alarm when the judge leaves other verdicts of the same episodes (``alarm.py``; docs/grpo.md). From World-Env (arXiv
2509.24948): the leave-one-out baseline (``baseline``), rewards at every chunk and predicted ends (``reflector``), and
continuous policies (``policies/laplace.py``), whose "tokens" are actions.

Many GPUs: under torchrun every process has its own environments and rolls out whole groups; the kept episodes are exchanged,
and each process computes its share of every minibatch. Process 0 writes. One process and several train the same, but for
rounding.

No generator has a state that must be saved: every start, every sampled token and every minibatch is derived from (seed,
step, ...). A run that is killed at any moment and rerun with the same command writes, on the same machine in float32,
the same weights and the same ``metrics.jsonl`` as one that was never interrupted.
"""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from gymnasium.vector import VectorEnv
from torch import Tensor, nn
from tqdm import tqdm

from rawdream_env.errors import InvalidOptionError, JudgeUnavailableError
from rawdream_env.seeding import mix
from rawdream_env.trainers.common.distributed import ProcessGroup, gathered, join, whole
from rawdream_env.trainers.common.interrupt import deferred_interrupt
from rawdream_env.trainers.common.run_dir import RunDir
from rawdream_env.trainers.grpo.alarm import GapAlarm
from rawdream_env.trainers.grpo.batch import Batch, Rollouts
from rawdream_env.trainers.grpo.config import ADDED, GRPOConfig, as_begun
from rawdream_env.trainers.grpo.counts import RolloutCounts, table
from rawdream_env.trainers.grpo.environment import offloaded, replayed_chunks, rollout_env, timings, verified, watched
from rawdream_env.trainers.grpo.gradients import TrainingDivergedError, add_gradients, check_on_policy, distance
from rawdream_env.trainers.grpo.learner import Learner, loaded_policy
from rawdream_env.trainers.grpo.losses import merge_metrics
from rawdream_env.trainers.grpo.rollout import GroupCollector, NoUsableGroupError, RolloutInterrupted
from rawdream_env.trainers.grpo.simulation import Simulation

_STREAM_SHUFFLE = 21
_MAY_CHANGE = (
    "run_dir", "steps", "minutes", "parallel", "save_every", "tensorboard", "progress", "num_envs",
    "overlap_judge", "held_out_judge", "alarm_margin", "alarm_window", "stop_on_alarm",  # none changes a reward
    "eval_every", "eval_env_id", "eval_episodes", "eval_temperature", "eval_videos", "report_to",
    "offload_world_model",
)  # fmt: skip
_logger = logging.getLogger(__name__)


Stopped = Literal["steps", "minutes", "interrupted", "solved", "alarm"]
_TABLE_STEPS = 10
"""Steps per table of the tasks."""


@dataclass(frozen=True)
class GRPOResult:
    """How a run ended: ``stopped`` is "steps", "minutes", "interrupted", "solved" (every rollout a success) or "alarm";
    ``step`` steps are done; ``message`` is one sentence for the user; ``policy`` is the trained policy, in memory.
    """

    step: int
    stopped: Stopped
    message: str
    policy: Any
    run_dir: Path


def train_grpo(config: GRPOConfig, *, env: VectorEnv[Any, Any, Any] | None = None, policy: Any = None) -> GRPOResult:
    """Train, or resume, the run in ``config.run_dir``.

    Args:
        config: every option.
        env: use this vector environment (DISABLED autoreset) instead of making ``config.env_id``; it is left open.
        policy: use this policy (a ``torch.nn.Module`` with ``act`` and ``logprobs``) instead of ``config.policy``.

    Ctrl-C ends the run after saving the last finished step; a second Ctrl-C ends it at once.

    Raises:
        RunDirError: the folder holds another run, or cannot be written. CheckpointError: damaged or of another policy.
        NoUsableGroupError: every group of a step was dropped; the message says why and which option to change.
        TrainingDivergedError: a non-finite update, or sampling and training disagree about the log-probabilities.
        InvalidOptionError: options that do not fit. JudgeUnavailableError: rerun the same command to
            resume.
    """
    deadline = None if config.minutes is None else time.monotonic() + config.minutes * 60
    config = as_begun(config)
    if env is not None and config.held_out_judge:
        raise InvalidOptionError("give held_out_judge to the environment you pass, DreamVectorEnv(held_out_judge=...).")
    with join(config.parallel, config.device) as group:
        return _run(config, env, policy, group, deadline)


def _run(config: GRPOConfig, env: Any, policy: Any, group: ProcessGroup, deadline: float | None) -> GRPOResult:
    """One process's part of ``train_grpo``."""
    here = replace(config, device=group.device)
    learner = Learner.of(loaded_policy(here, policy), here, group)
    vector_env = watched(rollout_env(here, group.size) if env is None else env)
    if config.dual_noise_verification:
        vector_env = verified(vector_env)
    try:
        with (
            _run_dir(config) if group.first else nullcontext() as run,
            deferred_interrupt() as interrupted,
        ):
            step, stopped = _train(config, run, learner, vector_env, interrupted, deadline)
            learner.use_average()
            with gathered(learner.policy):
                if run is not None and callable(save := getattr(learner.policy, "save_pretrained", None)):
                    save(run.path / "policy")
    finally:
        if env is None:
            vector_env.close()
    message = _farewell(stopped, step, config)
    if stopped != "steps" and group.first:
        _logger.warning(message)
    return GRPOResult(step, stopped, message, learner.policy, Path(config.run_dir))


def _run_dir(config: GRPOConfig) -> RunDir:
    return RunDir(
        config.run_dir, config, may_change=_MAY_CHANGE, added=ADDED, tensorboard=config.tensorboard,
        report_to=config.report_to,
    )  # fmt: skip


def _train(
    config: GRPOConfig,
    run: RunDir | None,
    learner: Learner,
    env: VectorEnv[Any, Any, Any],
    interrupted: threading.Event,
    deadline: float | None,
) -> tuple[int, Stopped]:
    """The algorithm: roll out, update, log, save; returns the steps done and why it stopped."""
    group, (step, state) = learner.group, learner.restore(run)
    saved, alarm = step, GapAlarm(config.alarm_margin, config.alarm_window, state.get("alarm"))
    finished = True  # whether the weights are those of a finished step
    shown = RolloutCounts()  # since the last table
    simulation = Simulation(config)
    bar = tqdm(
        total=config.steps, initial=step, desc="GRPO", unit="step", disable=not (config.progress and group.first)
    )
    collector = GroupCollector(
        env,
        learner.policy,
        group_size=config.group_size,
        num_groups=config.groups_per_step,
        max_groups=config.max_groups_per_step,
        temperature=config.temperature,
        max_flagged=config.max_flagged,
        scale_rewards=config.scale_rewards,
        baseline=config.baseline,
        seed=config.seed,
        should_stop=interrupted.is_set,
        out_of_time=lambda: deadline is not None and time.monotonic() > deadline,
        on_group=lambda counts: bar.set_postfix_str(str(counts)),
        overlap={"auto": None, "on": True, "off": False}[config.overlap_judge],
        group=group,
    )
    try:
        while step < config.steps:
            if alarm.raised and config.stop_on_alarm:
                return step, "alarm"
            begun, replayed = time.perf_counter(), replayed_chunks(env)
            with gathered(learner.policy):
                rollouts = collector.collect(step)
            rolled_out = time.perf_counter()
            finished = False
            with offloaded(env, config):
                metrics = update(config, learner, rollouts, step)
            learner.follow(config.ema, step)
            metrics |= alarm.look(rollouts.counts.others)
            if simulation.due(step + 1):
                with learner.averaged(), gathered(learner.policy):
                    if group.first:  # the others wait for it at the next exchange
                        metrics |= simulation.evaluate(learner.policy, step + 1)
            replayed = sum(group.everyone(replayed_chunks(env) - replayed))
            if run is not None:
                run.log(step + 1, **rollouts.metrics(), **metrics)
                run.log_timings(step + 1, **timings(rollouts, env, replayed, begun, rolled_out))
            step, finished = step + 1, True  # a step without its log lines must not be saved
            bar.update()
            shown += rollouts.counts
            if step % _TABLE_STEPS == 0:
                show(bar, shown, step, env)
                shown = RolloutCounts()
            if step % config.save_every == 0:
                learner.save(run, step, {"alarm": alarm.state()})
                saved = step
            late = deadline is not None and time.monotonic() > deadline and step < config.steps
            if group.value_from_first(late):
                return step, "minutes"
        return step, "steps"
    except RolloutInterrupted as reason:
        if interrupted.is_set():
            return step, "interrupted"
        _logger.warning(str(reason))
        return step, "minutes"
    except NoUsableGroupError as error:
        if set(error.dropped) == {"all_success"}:
            return step, "solved"
        raise
    except JudgeUnavailableError:  # on all processes
        raise
    except BaseException:
        finished = finished and group.size == 1  # the others may not come to save
        raise
    finally:
        show(bar, shown, step, env)
        bar.close()
        collector.close()
        simulation.close()
        if step > saved and finished:
            learner.save(run, step, {"alarm": alarm.state()})


def show(bar: tqdm[Any], counts: RolloutCounts, step: int, env: VectorEnv[Any, Any, Any]) -> None:
    """Print the table of the tasks above the progress bar, if there is one."""
    if counts.rollouts and not bar.disable:
        names = {task: name for task, (name, _) in enumerate(getattr(env.unwrapped, "tasks", ()))}
        bar.write(f"after step {step}:\n{table(counts, names)}", file=sys.stderr)


# -- the update ------------------------------------------------------------------------------------------------------


def update(config: GRPOConfig, learner: Learner, rollouts: Rollouts, step: int) -> dict[str, float]:
    """``epochs`` x ``minibatches`` updates on the kept groups; an update that moves the policy too far is undone.

    Returns metrics for the log. ``loss``, ``grad_norm``, ``approx_kl``, ``clip_frac``, ``entropy`` and ``ratio_*`` are
    those *before* each update (so the first of a step has approx_kl 0), averaged over the updates. ``lr``: the learning
    rate. With ``max_kl`` also ``max_kl_after``, the largest approx_kl *after* an update on its own minibatch (null if it is
    not finite), and ``updates_undone``, how many updates exceeded ``max_kl``.

    Raises ``TrainingDivergedError``, before the weights are touched, when the first ratio is not 1 or a gradient is not
    finite.
    """
    batch, parameters, optimizer = Batch.of(rollouts), learner.parameters, learner.optimizer
    parts: list[dict[str, Tensor]] = []
    norms: list[float] = []
    losses: list[float] = []
    moved: list[float] = []
    undone: list[float] = []
    first_deviation = math.nan
    lr = config.lr * min(1.0, (step + 1) / max(1, config.warmup_steps))
    for settings in optimizer.param_groups:
        settings["lr"] = lr
    for epoch in range(config.epochs):
        generator = torch.Generator().manual_seed(mix(config.seed, step, epoch, _STREAM_SHUFFLE))
        order = torch.randperm(len(batch.advantages), generator=generator)
        for trajectories in order.tensor_split(min(config.minibatches, len(order))):
            chunks, weights = batch.weights(trajectories, config.loss_type)
            optimizer.zero_grad(set_to_none=True)
            loss, pieces = add_gradients(config, learner.policy, batch, chunks, weights, learner.group)
            learner.group.sum_gradients(parameters.values())
            if not norms:
                first = merge_metrics(pieces)
                first_deviation = first["ratio_deviation"]
                check_on_policy(first["ratio_error"], learner.policy, step, batch.tokens.is_floating_point())
            norm = float(whole(nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm)))
            if not (math.isfinite(norm) and math.isfinite(loss)):
                raise TrainingDivergedError(
                    f"Step {step + 1}: the loss is {loss:.4g} and the gradient norm {norm:.4g}; nothing of this step "
                    f"is saved. Start a new run with a lower lr (now {config.lr:g}) or more groups_per_step."
                )
            before = None if config.max_kl is None else learner.copy()
            optimizer.step()
            if config.max_kl is not None and before is not None:
                moved.append(distance(config, learner.policy, batch, chunks, learner.group))
                if moved[-1] > config.max_kl:
                    learner.put_back(before)
                    undone.append(moved[-1])
            norms.append(norm)
            losses.append(loss)
            parts.extend(pieces)
    if undone:
        _logger.warning(
            "Step %d: %d of %d updates undone: approx_kl %.3g exceeds max_kl=%g. If this happens often, use a lower lr or more "
            "warmup_steps.", step + 1, len(undone), len(norms), max(undone), config.max_kl,
        )  # fmt: skip
    merged = merge_metrics(parts)
    names = ("approx_kl", "clip_frac", "entropy", "ratio_mean", "ratio_max")
    return {
        "loss": sum(losses) / len(losses),
        "grad_norm": sum(norms) / len(norms),
        "lr": lr,
        "first_ratio_deviation": first_deviation,
        **{name: merged[name] for name in names},
        **({"max_kl_after": max(moved), "updates_undone": len(undone)} if moved else {}),
    }


def _farewell(stopped: Stopped, step: int, config: GRPOConfig) -> str:
    where = f"{step} of {config.steps} steps are done and saved in {config.run_dir}"
    return {
        "steps": f"All {where}.",
        "minutes": f"The {config.minutes} minutes have passed: {where}; rerun the same command with more minutes to resume.",
        "interrupted": f"Stopped on request: {where}; rerun the same command to resume.",
        "alarm": f"The judge reports more successes than it should (see the last warning): {where}; rerun the same command "
        "with stop_on_alarm off to go on.",
        "solved": f"Every rollout succeeds, so there is nothing left to learn here: {where}.",
    }[stopped]
