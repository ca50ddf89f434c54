"""Supervised fine-tuning of the policy: pre-training on play, then a few demonstrations (paper section 4.1).

    rawdream sft --stage pretrain --data PLAY --out RUN1
    rawdream sft --stage fewshot --data EXPERT --init RUN1/policy --replay PLAY --out RUN2

Kept of the paper: a generalist that knows the robot but none of the target tasks (the paper: LIBERO-90, or the arm's
own pre-training; here: stretches of play named in hindsight, target object pairs left out), anchored by a handful of
demonstrations of each target (1 on LIBERO, 3 on the arm) with cross-entropy on the action tokens. Added for a small
model: labels smoothed over neighbouring bins, an auxiliary position read-out, EMA, and an optional share of play in the
few-shot batches against forgetting.

Every batch is a function of (seed, step): a killed run continues to bit-identical weights (CPU, float32; with a budget
in ``steps``). Shape letters: B rows, H W image, K actions in a chunk, A action dimensions, L = K*A tokens.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from rawdream_env.errors import InvalidOptionError
from rawdream_env.piper.relations import TASKS, find_task
from rawdream_env.policies import load_policy
from rawdream_env.policies.action_tokens import decode, encode, log_distribution, smoothed_targets
from rawdream_env.policies.tiny_vla import TinyVLA, TinyVLAConfig
from rawdream_env.seeding import NoiseKey, mix
from rawdream_env.statistics import Rate
from rawdream_env.trainers.common.run_dir import RunDir, pack_optimizer, unpack_optimizer
from rawdream_env.trainers.policy.demonstrations import Demonstrations, load_experts, load_play
from rawdream_env.types import Policy

_READOUT_SCALE = (0.1, 0.1, 0.1, 0.5, 0.5, 0.5, 1.0) + (0.1,) * 6
"""Metres, radians and gripper command of the auxiliary read-out per unit of the head's output."""


@dataclass(frozen=True)
class SFTConfig:
    """Everything a supervised run depends on."""

    data: tuple[str, ...]
    """LeRobotDataset v3 folders: play (stage pretrain) or expert episodes (stage fewshot)."""
    out: str
    """Run folder; the same command continues an interrupted run. The policy is written to ``out/policy``."""
    stage: Literal["pretrain", "fewshot"] = "fewshot"
    """"pretrain": hindsight-labelled play; "fewshot": ``demos_per_task`` whole expert episodes per task."""
    init: str | None = None
    """Policy to start from ("embedded" or a folder); None starts from random weights."""
    demos_per_task: int = 3
    """Expert episodes per task; the paper uses 1 (LIBERO) and 3 (Piper)."""
    replay: tuple[str, ...] = ()
    """Play folders mixed into few-shot batches so that the policy does not forget the robot."""
    replay_share: float = 0.5
    """Share of each few-shot batch that comes from ``replay``."""
    steps: int = 3000
    """Optimiser steps."""
    minutes: float | None = None
    """Stop (and finish the learning-rate schedule) after so many minutes, if that is sooner than ``steps``."""
    batch_size: int = 64
    """Samples per step."""
    lr: float = 1e-3
    """Peak learning rate of AdamW; warm-up, then cosine to 2 %."""
    warmup: int = 100
    """Steps of linear warm-up."""
    weight_decay: float = 0.02
    """AdamW weight decay."""
    ema: float = 0.998
    """Decay of the averaged weights, which are the ones saved and evaluated; ramps up from 0."""
    label_sigma: float = 2.0
    """Standard deviation of the smoothed labels in bins; 0 is one-hot."""
    readout_weight: float = 1.0
    """Weight of the auxiliary position read-out, on whatever positions the data hold; 0 turns it off."""
    jitter: float = 0.08
    """Colour augmentation: per-image gain and offset per channel, standard deviation as a share of full scale."""
    blur_share: float = 0.2
    """Share of images softened a little, towards the look of imagined frames."""
    held_out: float = 0.04
    """Share of episodes kept for validation (at least one; the few-shot stage trains on all and validates on replay)."""
    model: TinyVLAConfig = field(default_factory=TinyVLAConfig)
    """Architecture when ``init`` is None."""
    sim_episodes: int = 0
    """Simulator episodes per task at the end; 0 skips the simulator."""
    layout: str = "narrow"
    """Layout level of those episodes."""
    bf16: bool = True
    """Train in bfloat16 autocast; the saved weights are float32 either way."""
    device: str = "cpu"
    """Device to train on."""
    seed: int = 0
    """Seed of initialisation, batches and augmentation."""
    log_every: int = 25
    """Steps between log lines."""
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


@dataclass(frozen=True)
class SFTResult:
    """The trained (averaged) policy, the steps done, the last validation and the simulator's success per task."""

    policy: TinyVLA
    steps: int
    validation: dict[str, float]
    success: dict[str, Rate]


# -- losses: pure functions ----------------------------------------------------------------------------------------


def token_loss(logits: Tensor, actions: Tensor, label_sigma: float) -> Tensor:
    """Mean cross-entropy in nats of ``logits`` (B, L, 256) against smoothed labels of ``actions`` (B, K, A)."""
    targets = smoothed_targets(encode(actions).flatten(1), label_sigma)
    return -(targets * log_distribution(logits, 1.0)).sum(-1).mean()


def readout_loss(readout: Tensor, target: Tensor) -> Tensor:
    """Huber loss of the scaled positions, over what the data hold: ``target`` (B, 13) in SI units, NaN where unknown."""
    known = ~torch.isnan(target)
    scaled = torch.nan_to_num(target) / target.new_tensor(_READOUT_SCALE)
    loss = F.smooth_l1_loss(readout.float(), scaled, beta=0.2, reduction="none")
    return (loss * known).sum() / known.sum().clamp(min=1)


def learning_rate(config: SFTConfig, step: int, progress: float) -> float:
    """Linear warm-up over ``warmup`` steps times a cosine of ``progress`` in [0, 1] down to 2 % of the peak."""
    cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * min(1.0, (step + 1) / max(1, config.warmup)) * cosine


def augment(frames: Tensor, jitter: float, blur_share: float, rng: np.random.Generator) -> Tensor:
    """Colour gain and offset, and a slight blur of some, on uint8 frames (B, H, W, 3). Geometry is left alone.

    Shifting or cropping would move the gripper and the objects without moving the actions' meaning.
    """
    b = len(frames)
    image = frames.permute(0, 3, 1, 2).float()
    if jitter > 0:
        gain = torch.from_numpy(1 + jitter * rng.standard_normal((b, 3, 1, 1), dtype=np.float32)).to(image)
        offset = torch.from_numpy(127 * jitter * rng.standard_normal((b, 3, 1, 1), dtype=np.float32)).to(image)
        image = image * gain + offset
    if blur_share > 0:
        chosen = torch.from_numpy(rng.random(b) < blur_share).to(image.device)
        if chosen.any():
            padded = F.pad(image[chosen], (1, 1, 1, 1), mode="replicate")
            image[chosen] = F.avg_pool2d(padded, 3, stride=1)
    return image.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


# -- data ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """Demonstrations drawn from for ``share`` of every batch, evenly over their samples."""

    demos: Demonstrations
    share: float


def _load_sources(config: SFTConfig, chunk_len: int) -> tuple[list[_Source], Demonstrations]:
    """Training sources and the held-out samples (play where there is any, else the demonstrations themselves)."""
    if config.stage == "pretrain":
        play = load_play(config.data, chunk_len)
        total = sum(len(d) for d in play)
        split = [d.split(config.held_out, config.seed) for d in play]
        return [_Source(s[0], len(d) / total) for s, d in zip(split, play, strict=True)], split[0][1]
    experts = load_experts(config.data, chunk_len, demos_per_task=config.demos_per_task)
    replay = load_play(config.replay, chunk_len) if config.replay_share > 0 else []
    own = 1.0 - (config.replay_share if replay else 0.0)
    sources = [_Source(d, own / len(experts)) for d in experts]
    split = [d.split(config.held_out, config.seed) for d in replay]
    sources += [_Source(s[0], config.replay_share / len(replay)) for s in split]
    return sources, split[0][1] if split else experts[0]


@dataclass(frozen=True)
class _Batch:
    frames: Tensor
    instructions: list[str]
    actions: Tensor
    readout: Tensor


def _gather(parts: Sequence[tuple[Demonstrations, NDArray[np.int64]]], rng: np.random.Generator, device: str) -> _Batch:
    def cat(arrays: list[NDArray[Any]]) -> Tensor:
        return torch.from_numpy(np.concatenate(arrays)).to(device)

    return _Batch(
        frames=cat([d.frames[d.rows[i]] for d, i in parts]),
        instructions=[d.instruction(int(s), rng) for d, i in parts for s in i],
        actions=cat([d.actions[i] for d, i in parts]),
        readout=cat([d.readout[i] for d, i in parts]),
    )


def _draw_batch(sources: Sequence[_Source], config: SFTConfig, step: int) -> _Batch:
    """The batch of ``step``: a function of (seed, step) alone."""
    rng = np.random.default_rng(mix(config.seed, 0xBA7C, step))
    counts = np.diff(np.round(np.cumsum([0.0] + [s.share for s in sources]) * config.batch_size)).astype(int)
    parts = [(s.demos, rng.integers(0, len(s.demos), n)) for s, n in zip(sources, counts, strict=True) if n]
    batch = _gather(parts, rng, config.device)
    frames = augment(batch.frames, config.jitter, config.blur_share, rng)
    return _Batch(frames, batch.instructions, batch.actions, batch.readout)


# -- the trainer ---------------------------------------------------------------------------------------------------


def train_sft(config: SFTConfig, *, progress: bool = True) -> SFTResult:
    """Train (or continue) the run described by ``config``; see the module's docstring.

    Raises ``DatasetError`` for unusable data, ``CheckpointError`` for a bad ``init`` and ``RunDirError`` when ``out``
    holds another run.
    """
    policy = _initial_policy(config)
    ema = copy.deepcopy(policy).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(
        _parameter_groups(policy, config.weight_decay), lr=config.lr, betas=(0.9, 0.98), fused=True
    )
    with RunDir(config.out, asdict(config), may_change=("minutes", "sim_episodes", "layout")) as run:
        first, elapsed = _resume(run, policy, ema, optimizer)
        sources, held_out = _load_sources(config, policy.chunk_len)
        began = time.monotonic() - elapsed
        step, validation = first, dict[str, float]()
        bar = tqdm(total=config.steps, initial=first, desc=config.stage, unit="step", disable=not progress)
        while step < config.steps:
            done = step / config.steps
            if config.minutes is not None:
                done = max(done, (time.monotonic() - began) / 60 / config.minutes)
                if done >= 1:
                    break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step, done)
            losses = _update(policy, optimizer, _draw_batch(sources, config, step), config)
            _average(ema, policy, min(config.ema, (step + 1) / (step + 10)))
            step += 1
            bar.update()
            if step % config.log_every == 0:
                scalars = {name: float(value) for name, value in losses.items()}
                bar.set_postfix({name: f"{value:.3f}" for name, value in scalars.items()}, refresh=False)
                run.log(step, lr=optimizer.param_groups[0]["lr"], **scalars)
                run.log_timings(
                    step, samples_per_s=(step - first) * config.batch_size / (time.monotonic() - began - elapsed)
                )
            if step % config.save_every == 0:
                validation = validate(ema, held_out, config)
                run.log(step, **validation)
                _save(run, step, policy, ema, optimizer, time.monotonic() - began)
        bar.close()
        validation = validate(ema, held_out, config)
        _save(run, step, policy, ema, optimizer, time.monotonic() - began)
        success = {}
        if config.sim_episodes:
            success = {t.name: evaluate_in_sim(ema, t.name, config.sim_episodes, layout=config.layout) for t in TASKS}
            run.log(step, **{f"sim_success/{name}": rate.value for name, rate in success.items()})
        described = {"stage": config.stage, "steps": step, "validation": validation}
        ema.save_pretrained(Path(config.out) / "policy", metadata=described)
    return SFTResult(ema, step, validation, success)


def _initial_policy(config: SFTConfig) -> TinyVLA:
    if config.init is None:
        return TinyVLA(config.model, seed=config.seed).to(config.device)
    policy = load_policy(config.init, device=config.device)
    if not isinstance(policy, TinyVLA):
        raise InvalidOptionError(f"init={config.init!r} is a {type(policy).__name__}; this trainer trains TinyVLA.")
    return policy


def _parameter_groups(policy: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Weight decay on matrices and kernels only."""
    parameters = list(policy.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _update(policy: TinyVLA, optimizer: torch.optim.Optimizer, batch: _Batch, config: SFTConfig) -> dict[str, Tensor]:
    policy.train()
    with torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.bf16):
        logits, readout = policy.forward_train(batch.frames, policy.word_ids(batch.instructions))
    losses = {"loss": token_loss(logits, batch.actions, config.label_sigma)}
    total = losses["loss"]
    if config.readout_weight > 0:
        losses["readout_loss"] = readout_loss(readout, batch.readout)
        total = total + config.readout_weight * losses["readout_loss"]
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    losses["grad_norm"] = nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    return {name: value.detach() for name, value in losses.items()}


@torch.no_grad()
def _average(ema: nn.Module, policy: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(ema.parameters()), list(policy.parameters()), 1.0 - decay)


def _save(
    run: RunDir, step: int, policy: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, elapsed: float
) -> None:
    tensors = {f"model/{name}": t for name, t in policy.state_dict().items()}
    tensors |= {f"ema/{name}": t for name, t in ema.state_dict().items()} | pack_optimizer(optimizer)
    run.save(step, tensors, {"elapsed_s": elapsed})


def _resume(run: RunDir, policy: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Restore the newest checkpoint; returns the steps done and the seconds they took."""
    checkpoint = run.load_latest()
    if checkpoint is None:
        return 0, 0.0
    for prefix, module in (("model/", policy), ("ema/", ema)):
        own = {k.removeprefix(prefix): v for k, v in checkpoint.tensors.items() if k.startswith(prefix)}
        module.load_state_dict(own)
    unpack_optimizer(optimizer, checkpoint.tensors)
    return checkpoint.step, float(checkpoint.state["elapsed_s"])


# -- measuring -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def validate(policy: TinyVLA, held_out: Demonstrations, config: SFTConfig, *, samples: int = 512) -> dict[str, float]:
    """Held-out numbers of a policy, greedy, on ``samples`` samples that are the same at every call.

    ``val_loss`` (nats a token), ``val_token_accuracy`` (exact bin), ``val_action_error`` (mean |a - a*|, action units),
    ``val_gripper_accuracy`` (sign), and where the data hold them ``val_tool_mm``, ``val_object_mm``, ``val_goal_mm``:
    median distance of the read-out positions in millimetres.
    """
    rng = np.random.default_rng(mix(config.seed, 0x7E57))
    chosen = rng.permutation(len(held_out))[:samples]
    batch = _gather([(held_out, chosen)], rng, config.device)
    outputs = [
        policy.forward_train(batch.frames[i : i + 64], policy.word_ids(batch.instructions[i : i + 64]))
        for i in range(0, len(chosen), 64)
    ]
    logits, readout = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    tokens, predicted = encode(batch.actions), logits.argmax(-1).view(batch.actions.shape)
    numbers = {
        "val_loss": float(token_loss(logits, batch.actions, config.label_sigma)),
        "val_token_accuracy": float((tokens == predicted).float().mean()),
        "val_action_error": float((decode(predicted) - batch.actions).abs().mean()),
        "val_gripper_accuracy": float(
            ((decode(predicted)[..., -1] > 0) == (batch.actions[..., -1] > 0)).float().mean()
        ),
    }
    off = readout.float() * readout.new_tensor(_READOUT_SCALE) - batch.readout
    for name, first in (("tool", 0), ("object", 7), ("goal", 10)):
        distance = off[:, first : first + 3].norm(dim=-1)
        if not torch.isnan(distance).all():
            numbers[f"val_{name}_mm"] = float(distance.nanmedian()) * 1e3
    return numbers


def evaluate_in_sim(
    policy: Policy,
    task: str,
    episodes: int,
    layout: str = "narrow",
    seed: int = 1_000_000,
    temperature: float = 0.0,
    *,
    num_workers: int = 0,
    batch: int = 32,
    max_episode_steps: int = 8,
) -> Rate:
    """Success of ``policy`` on ``task`` in the MuJoCo twin, with its Wilson interval.

    Episode i starts from simulator seed ``seed + i`` and acts from noise key ``NoiseKey(seed + i)``, so the result does
    not depend on ``batch`` (episodes stepped together) or ``num_workers`` (simulator processes). ``temperature`` 0 is
    greedy. An episode succeeds at the end of the first of at most ``max_episode_steps`` chunks at which the task's
    relation holds.
    """
    from rawdream_env.piper.workers import PiperWorkers

    goal = find_task(task)
    outcomes = np.zeros(episodes, dtype=bool)
    with PiperWorkers(min(batch, episodes), num_workers=num_workers, layout=layout) as workers:
        for first in range(0, episodes, batch):
            count = min(batch, episodes - first)
            rows = np.arange(count)
            seeds = [seed + first + int(r) for r in rows]
            frames = workers.reset(rows.tolist(), seeds, [goal.name] * count)
            for chunk in range(max_episode_steps):
                keys = [NoiseKey(seeds[r], chunk=chunk) for r in rows]
                output = policy.act(frames, [goal.instruction] * len(rows), temperature=temperature, keys=keys)
                result = workers.step(rows.tolist(), output.actions.cpu().numpy(), every_frame=False)
                outcomes[first + rows] |= result.success
                alive = ~result.success
                rows, frames = rows[alive], result.frames[alive][:, -1]
                if not len(rows):
                    break
    return Rate.over(outcomes.tolist())
