"""Train the embedded judge on play data with hindsight labels, and on imagined clips once there are some.

    rawdream train-judge --data PLAY EXPERT --out RUN

The paper takes an off-the-shelf vision-language model as its judge (section 3.2); at the embedded size we train a
classifier of 1.6 M parameters instead, on the world model's own task-agnostic play: every window of an episode is a
clip about which every goal of the grammar can be asked, true or not. The four tasks are treated like any other pair,
and whole object pairs (``HELD_OUT_JUDGE_PAIRS``) are never asked about in training, so that the report shows what it
knows of pairs it was not trained on.

The loop reads top to bottom: draw clips and questions in balance, make the frames look a little like dreams, ask,
compare (answer, and where the named objects are), step, average. Every batch and every perturbation is a function of
(seed, step): a killed run continues to bit-identical weights when its budget is in steps. At the end the threshold is
calibrated for precision on one half of the held-out episodes and everything is measured on the other half.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from rawdream_env.errors import DatasetError
from rawdream_env.evaluation.judge_report import JudgeClip, JudgeReport, evaluate
from rawdream_env.files import atomic_write_json
from rawdream_env.judges.embedded import EmbeddedJudge
from rawdream_env.judges.embedded_network import EmbeddedJudgeConfig, JudgeNetwork
from rawdream_env.seeding import mix
from rawdream_env.text import tokenize
from rawdream_env.trainers.judge_clips import (
    ClipSet,
    Questions,
    QuestionSampler,
    examination,
    imagined_clips,
    instruction_for,
    merge,
    positions_of,
    recorded_clips,
    split,
)
from rawdream_env.trainers.run_dir import RunDir, pack_optimizer, unpack_optimizer

_POSITION_SCALE = 20.0
"""Makes an error of 5 cm count 1 in the localisation loss."""


@dataclass(frozen=True)
class JudgeTrainConfig:
    """Everything a judge run depends on."""

    data: tuple[str, ...]
    """LeRobotDataset v3 folders with privileged poses and relations: play, and expert-like episodes."""
    out: str
    """Run folder; the same command continues an interrupted run. The judge is written to its folder ``judge``."""
    imagined: tuple[str, ...] = ()
    """Folders of imagined clips (format: ``rawdream_env.trainers.judge_clips``)."""
    imagined_share: float = 0.3
    """Share of each batch that is imagined, when there are imagined clips."""
    init: str = ""
    """Judge folder to start from (to go on with imagined clips, say); empty: from nothing."""
    steps: int = 1600
    """Optimiser steps; with ``minutes`` an upper limit."""
    minutes: float = 0.0
    """Budget of training time; 0: by steps alone (only then are resumed runs bit-identical)."""
    batch_size: int = 32
    """Clips in a batch."""
    questions: int = 6
    """Questions asked about each clip; the trunk sees a clip once whatever their number."""
    lr: float = 1.5e-3
    """Peak learning rate of AdamW: linear warm-up, then a cosine to 2 %."""
    warmup: int = 100
    """Steps of warm-up."""
    weight_decay: float = 0.03
    """AdamW weight decay."""
    ema: float = 0.995
    """Decay of the averaged weights that are saved; ramps up from 0."""
    position_weight: float = 0.5
    """Weight of the localisation loss, which ties the words for objects to their pixels."""
    augment: float = 0.6
    """Share of clips whose frames are made to look imagined: smoothed, blurred, noisy, colours shifted."""
    validation_share: float = 0.1
    """Share of the episodes kept out of training: half calibrates the threshold, half is reported."""
    per_goal: int = 40
    """Successes and failures per goal in the report, where there are as many."""
    target_precision: float = 0.95
    """The threshold is the lowest that reaches this on the calibration clips."""
    stride: int = 4
    """Rows between the ends of windows."""
    seed: int = 0
    """Seed of initialisation, windows, batches and perturbations."""
    device: str = "cpu"
    """Device to train on."""
    bf16: bool = True
    """Train in bfloat16 autocast."""
    save_every: int = 200
    """Steps between checkpoints."""
    model: EmbeddedJudgeConfig = field(default_factory=EmbeddedJudgeConfig)
    """Size of the network."""


@dataclass(frozen=True)
class JudgeResult:
    """The trained judge, where it was written, and its report on held-out episodes."""

    judge: EmbeddedJudge
    folder: Path
    report: JudgeReport


def train_judge(config: JudgeTrainConfig, *, progress: bool = True) -> JudgeResult:
    """Train, calibrate, measure and save; see the module's text.

    Writes ``judge/`` (config.json, model.safetensors), ``metrics.json``, ``judge_report.json`` and ``mistakes.png``
    into the run folder.

    Raises:
        DatasetError: the data cannot be read, or hold no goal with both successes and failures.
        RunDirError: the run folder belongs to another configuration.
    """
    sets = _load(config, progress)
    with RunDir(config.out, asdict(config), may_change=("steps", "minutes", "save_every")) as run:
        ema, steps, seconds = _fit(config, run, [train for train, _ in sets], progress)
    calibration, test = _examinations(config, [held for _, held in sets])
    facts = {"steps": steps, "train_minutes": round(seconds / 60, 2), "seed": config.seed, "data": list(config.data)}
    judge = EmbeddedJudge(ema, metadata=facts, device=config.device)
    threshold = calibrate(judge, calibration, config.target_precision)
    ema.config = replace(ema.config, threshold=threshold)
    report = evaluate(judge, test)
    overall = report.rows["all"].as_dict()
    judge.metadata["validation"] = {key: overall[key] for key in ("precision", "recall", "false_positive_rate", "n")}
    folder = judge.save_pretrained(Path(config.out) / "judge")
    report.write(config.out)
    windows = {train.source: {"train": len(train), "held_out": len(held)} for train, held in sets}
    atomic_write_json(
        Path(config.out) / "metrics.json",
        {"threshold": threshold, "windows": windows, **facts, "config": asdict(config), **report.as_dict()},
    )
    return JudgeResult(judge, folder, report)


def _load(config: JudgeTrainConfig, progress: bool) -> list[tuple[ClipSet, ClipSet]]:
    """(training windows, held-out windows) of the recorded and, if any, the imagined clips."""
    whole = [recorded_clips(config.data, seed=config.seed, stride=config.stride, progress=progress)]
    if config.imagined:
        whole.append(merge([imagined_clips(folder) for folder in config.imagined]))
    sets = [split(clips, config.validation_share, seed=config.seed, salt=7) for clips in whole]
    for train, held in sets:
        if not len(train) or not len(held):
            raise DatasetError(
                f"{len(train)} training and {len(held)} held-out {train.source} clips: collect more episodes or change "
                f"validation_share ({config.validation_share})"
            )
    return sets


def _fit(
    config: JudgeTrainConfig, run: RunDir, clips: list[ClipSet], progress: bool
) -> tuple[JudgeNetwork, int, float]:
    """The training loop; returns the averaged network, the steps taken and the seconds they took."""
    samplers = [QuestionSampler(part, config.questions) for part in clips]
    for number, sampler in enumerate(samplers):
        sampler.balance(mix(config.seed, number, 3))
    network = _initial(config).to(device=torch.device(config.device), memory_format=torch.channels_last)
    ema = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay, fused=True
    )
    step, spent = _resume(run, network, ema, optimizer)
    begun = perf_counter() - spent
    with tqdm(total=config.steps, initial=step, desc="judge", unit="step", mininterval=2, disable=not progress) as bar:
        while step < config.steps and not _out_of_time(config, perf_counter() - begun):
            rate = learning_rate(config, step, perf_counter() - begun)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss, numbers = _loss(config, network, clips, samplers, step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            numbers["grad_norm"] = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            decay = min(config.ema, (step + 1) / (step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(network.parameters()), 1 - decay)
            step += 1
            bar.update()
            if step % 20 == 0:
                values = {name: float(value) for name, value in numbers.items()}
                run.log(step, lr=rate, **values)
                bar.set_postfix({"loss": f"{values['loss']:.3f}", "accuracy": f"{values['accuracy']:.3f}"})
            if step % config.save_every == 0:
                _save(run, step, perf_counter() - begun, network, ema, optimizer)
    seconds = perf_counter() - begun
    _save(run, step, seconds, network, ema, optimizer)
    return ema, step, seconds


def _initial(config: JudgeTrainConfig) -> JudgeNetwork:
    if config.init:
        return copy.deepcopy(EmbeddedJudge.from_pretrained(config.init).network).requires_grad_(True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(config.seed, 11))
        return JudgeNetwork(config.model)


def learning_rate(config: JudgeTrainConfig, step: int, seconds: float) -> float:
    """Linear warm-up, then a cosine to 2 % over the budget, whichever of steps and minutes is further spent."""
    done = max(step / config.steps, seconds / (60 * config.minutes) if config.minutes else 0.0)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return config.lr * min(1.0, (step + 1) / config.warmup) * (0.02 + 0.98 * cosine)


def _out_of_time(config: JudgeTrainConfig, seconds: float) -> bool:
    return bool(config.minutes) and seconds >= 60 * config.minutes


def _loss(
    config: JudgeTrainConfig, network: JudgeNetwork, clips: list[ClipSet], samplers: list[QuestionSampler], step: int
) -> tuple[Tensor, dict[str, Any]]:
    """Loss of the batch of a step: weighted cross-entropy of the answers, and localisation of the named objects."""
    rng = np.random.default_rng(mix(config.seed, step, 5))
    dreams = round(config.batch_size * config.imagined_share) if len(clips) > 1 else 0
    batches = [
        _batch(part, sampler, sampler.draw(rng, size), rng, config.model.text_len)
        for part, sampler, size in zip(clips, samplers, (config.batch_size - dreams, dreams), strict=False)
        if size
    ]
    frames, tokens, labels, weights, places = (
        torch.cat([batch[i] for batch in batches]).to(config.device) for i in range(5)
    )
    generator = torch.Generator().manual_seed(mix(config.seed, step, 6))
    seen = look_imagined(frames, config.augment, generator)
    with torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.bf16):
        logits, found = network(seen, tokens)
    logits, found = logits.float(), found.float()
    answer = F.binary_cross_entropy_with_logits(logits, labels, weight=weights)
    known = ~torch.isnan(places)
    error = F.smooth_l1_loss(found * _POSITION_SCALE, torch.nan_to_num(places) * _POSITION_SCALE, reduction="none")
    where = (error * known).sum() / known.sum().clamp(min=1)
    loss = answer + config.position_weight * where
    right = ((logits > 0) == (labels > 0.5)).float().mean()
    return loss, {"loss": loss.detach(), "answer": answer.detach(), "place": where.detach(), "accuracy": right}


def _batch(
    clips: ClipSet, sampler: QuestionSampler, asked: Questions, rng: np.random.Generator, text_len: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Frames (B, F, H, W, 3), tokens (B, Q, L), labels and weights (B, Q), places (B, Q, F, 2, 3)."""
    rows = clips.rows(asked.windows)
    texts = [[instruction_for(clips.goals[goal], rng) for goal in row] for row in asked.goals]
    tokens = np.array([[tokenize(text, max_len=text_len) for text in row] for row in texts])
    weights = sampler.weights[asked.labels.astype(np.int64), asked.goals]
    arrays = (clips.frames[rows], tokens, asked.labels, weights, positions_of(clips, rows, asked.goals))
    frames, words, labels, balance, places = (torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)
    return frames, words, labels, balance, places


def look_imagined(frames: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Make part of the clips look as if a world model had drawn them.

    ``frames`` uint8 (B, F, H, W, 3) -> float32 in [0, 255] of the same shape. Every clip gets a small change of light
    and colour; in a ``share`` of them the frames after the first are smoothed as by an autoencoder (down and up again),
    blurred and noisy, each to its own extent. The start frame stays sharp there: it is real in a dream too.
    """
    b, f, h, w, _ = frames.shape
    device = frames.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return (low + (high - low) * torch.rand(shape, generator=generator)).to(device)

    x = frames.float().permute(0, 1, 4, 2, 3)  # (B, F, 3, H, W)
    changed = (torch.rand(b, 1, generator=generator) < share).to(device) & (torch.arange(f, device=device) > 0)
    flat = x.flatten(0, 1)
    small = F.avg_pool2d(flat, 2)
    smooth = F.interpolate(small, size=(h, w), mode="bilinear", align_corners=False).view_as(x)
    blurred = F.avg_pool2d(F.pad(flat, (1, 1, 1, 1), mode="replicate"), 3, stride=1).view_as(x)
    amount = uniform(0.0, 1.0, 2, b, f, 1, 1, 1) * changed[None, :, :, None, None, None]
    x = x + 0.7 * amount[0] * (smooth - x) + 0.6 * amount[1] * (blurred - x)
    noise = torch.randn(x.shape, generator=generator).to(device)
    x = x + noise * uniform(0.0, 8.0, b, 1, 1, 1, 1) * changed[:, :, None, None, None]
    gain, shift = uniform(0.93, 1.07, b, 1, 3, 1, 1), uniform(-8.0, 8.0, b, 1, 3, 1, 1)
    return (x * gain + shift).clamp(0, 255).permute(0, 1, 3, 4, 2)


def _examinations(config: JudgeTrainConfig, held: list[ClipSet]) -> tuple[list[JudgeClip], list[JudgeClip]]:
    """(calibration, test) questions from disjoint held-out episodes."""
    calibration: list[JudgeClip] = []
    test: list[JudgeClip] = []
    for part in held:
        for clips, chosen in zip(split(part, 0.5, seed=config.seed, salt=8), (test, calibration), strict=True):
            if len(clips):
                chosen += examination(clips, config.per_goal, seed=config.seed)
    return calibration or test, test or calibration


def calibrate(judge: EmbeddedJudge, clips: list[JudgeClip], target_precision: float) -> float:
    """The lowest threshold in [0.05, 0.99] whose precision on ``clips`` reaches the target.

    Where none does: the one with the best F0.5, which counts precision twice as heavily as recall. Held-out pairs take
    no part.
    """
    trained = [clip for clip in clips if not clip.held_out]
    verdicts = judge([clip.video for clip in trained], [clip.instruction for clip in trained])
    chances = np.array([math.nan if v.probability is None else v.probability for v in verdicts])
    labels = np.array([clip.label for clip in trained])
    scores = []
    for threshold in np.round(np.arange(0.05, 0.995, 0.01), 2):
        yes = chances >= threshold
        hits, wrong, missed = (yes & labels).sum(), (yes & ~labels).sum(), (~yes & labels).sum()
        if hits and hits / (hits + wrong) >= target_precision:
            return float(threshold)
        scores.append((1.25 * hits / max(1.25 * hits + 0.25 * missed + wrong, 1), float(threshold)))
    return max(scores)[1]


def _save(
    run: RunDir, step: int, seconds: float, network: JudgeNetwork, ema: JudgeNetwork, optimizer: torch.optim.Optimizer
) -> None:
    tensors = {f"network/{name}": value for name, value in network.state_dict().items()}
    tensors |= {f"ema/{name}": value for name, value in ema.state_dict().items()}
    tensors |= pack_optimizer(optimizer)
    run.save(step, tensors, {"seconds": seconds})


def _resume(
    run: RunDir, network: JudgeNetwork, ema: JudgeNetwork, optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    """Continue from the newest checkpoint, if any: (step, seconds spent)."""
    checkpoint = run.load_latest()
    if checkpoint is None:
        return 0, 0.0
    for prefix, module in (("network/", network), ("ema/", ema)):
        kept = {key.removeprefix(prefix): value for key, value in checkpoint.tensors.items() if key.startswith(prefix)}
        module.load_state_dict(kept)
    unpack_optimizer(optimizer, checkpoint.tensors)
    return checkpoint.step, float(checkpoint.state["seconds"])
