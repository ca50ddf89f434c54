"""Train the embedded judge on play data with hindsight labels, and on imagined clips once there are some.

    rawdream train-judge --data PLAY EXPERT --out RUN

The paper takes an off-the-shelf vision-language model as its judge (section 3.2); at the embedded size we train a
classifier of 1.6 M parameters instead, on the world model's own task-agnostic play: every window of an episode is a
clip about which every goal of the robot's grammar can be asked, true or not. The tasks are treated like any other pair,
and whole object pairs (the grammar's ``held_out_pairs``) are never asked about in training, so that the report shows
what it knows of pairs it was not trained on.

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

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from rawdream_env.errors import DatasetError
from rawdream_env.evaluation.judges.report import JudgeClip, JudgeReport, evaluate
from rawdream_env.files import atomic_write_json
from rawdream_env.judges.embedded import EmbeddedJudge
from rawdream_env.judges.embedded_network import EmbeddedJudgeConfig, JudgeNetwork
from rawdream_env.seeding import mix
from rawdream_env.text import tokenize
from rawdream_env.trainers.common.run_dir import RunDir, pack_optimizer, unpack_optimizer
from rawdream_env.trainers.judge.clips import (
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
from rawdream_env.trainers.judge.losses import Locator, answer_loss, look_imagined, place_loss


@dataclass(frozen=True)
class JudgeTrainConfig:
    """Everything a judge run depends on."""

    data: tuple[str, ...]
    """LeRobotDataset v3 folders with privileged poses and relations: play, and expert-like episodes."""
    out: str
    """Run folder; the same command continues an interrupted run. The judge is written to its folder ``judge``."""
    imagined: tuple[str, ...] = ()
    """Folders of imagined clips (format: ``rawdream_env.trainers.judge.clips``)."""
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
    """Weight of the localisation losses, which tie pixels to objects and the words to them."""
    augment: float = 0.6
    """Share of clips whose frames are made to look imagined: smoothed, blurred, noisy, colours shifted."""
    validation_share: float = 0.1
    """Share of the episodes kept out of training: half calibrates the threshold, half is reported."""
    per_goal: int = 40
    """Successes and failures per goal in the report, where there are as many."""
    target_precision: float = 0.95
    """The threshold is the lowest that reaches this on the calibration clips ..."""
    calibrate_on: tuple[str, ...] = ("on", "in", "text")
    """... of these kinds of goals: what environments ask for."""
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
    facts = {
        "steps": steps,
        "train_minutes": round(seconds / 60, 2),
        "seed": config.seed,
        "data": [Path(folder).name for folder in config.data],
    }
    judge = EmbeddedJudge(ema, metadata=facts, device=config.device)
    threshold = calibrate(judge, calibration, config.target_precision, config.calibrate_on)
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
    network = _initial(config).to(torch.device(config.device))
    ema = copy.deepcopy(network).requires_grad_(False)
    with torch.random.fork_rng(devices=[]):  # modules draw their weights from the global generator: borrow, return it
        torch.manual_seed(mix(config.seed, 12))
        locator = Locator(network.config.width, len(clips[0].grammar.objects)).to(config.device)
    parts = nn.ModuleDict({"network": network, "locator": locator, "ema": ema})
    trained = [*network.parameters(), *locator.parameters()]
    optimizer = torch.optim.AdamW(
        trained, lr=config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay, fused=True
    )
    step, spent = _resume(run, parts, optimizer)
    begun = perf_counter() - spent
    recent: list[dict[str, Tensor]] = []
    with tqdm(total=config.steps, initial=step, desc="judge", unit="step", mininterval=2, disable=not progress) as bar:
        while step < config.steps and not _out_of_time(config, perf_counter() - begun):
            rate = learning_rate(config, step, perf_counter() - begun)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss, numbers = _loss(config, network, locator, clips, samplers, step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            numbers["grad_norm"] = torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            decay = min(config.ema, (step + 1) / (step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(network.parameters()), 1 - decay)
            step += 1
            bar.update()
            recent.append(numbers)
            if step % 20 == 0:
                values = {name: float(torch.stack([entry[name] for entry in recent]).mean()) for name in numbers}
                recent.clear()
                run.log(step, lr=rate, **values)
                bar.set_postfix({"loss": f"{values['loss']:.3f}", "accuracy": f"{values['accuracy']:.3f}"})
            if step % config.save_every == 0:
                recent.clear()  # a resumed run has none either: its log lines stay the same
                _save(run, step, perf_counter() - begun, parts, optimizer)
    seconds = perf_counter() - begun
    _save(run, step, seconds, parts, optimizer)
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
    config: JudgeTrainConfig,
    network: JudgeNetwork,
    locator: Locator,
    clips: list[ClipSet],
    samplers: list[QuestionSampler],
    step: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of the batch of a step: the answers, where the named objects are, and where all objects are."""
    rng = np.random.default_rng(mix(config.seed, step, 5))
    dreams = round(config.batch_size * config.imagined_share) if len(clips) > 1 else 0
    batches = [
        _batch(part, sampler, sampler.draw(rng, size), rng, network.config.text_len)
        for part, sampler, size in zip(clips, samplers, (config.batch_size - dreams, dreams), strict=False)
        if size
    ]
    frames, tokens, labels, weights, named, everything = (
        torch.cat([batch[i] for batch in batches]).to(config.device) for i in range(6)
    )
    seen = look_imagined(frames, config.augment, torch.Generator().manual_seed(mix(config.seed, step, 6)))
    with torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.bf16):
        features = network.look_at(seen)
        logits, found = network.answer(features, tokens)
        located = locator(features)
    answer, where = answer_loss(logits, labels, weights), place_loss(found, named)
    objects = place_loss(located, everything.flatten(0, 1))
    loss = answer + config.position_weight * (where + objects)
    right = ((logits > 0) == (labels > 0.5)).float().mean()
    numbers = {"loss": loss, "answer": answer, "place": where, "objects": objects, "accuracy": right}
    return loss, {name: value.detach() for name, value in numbers.items()}


def _batch(
    clips: ClipSet, sampler: QuestionSampler, asked: Questions, rng: np.random.Generator, text_len: int
) -> tuple[Tensor, ...]:
    """A batch's frames (B, F, H, W, 3), tokens (B, Q, L), labels and weights (B, Q), and places in metres.

    The places are those of the objects named (B, Q, F, 2, 3), and of all objects (B, F, O, 3).
    """
    rows = clips.rows(asked.windows)
    grammar = clips.grammar
    texts = [[instruction_for(clips.goals[goal], grammar, rng) for goal in row] for row in asked.goals]
    tokens = np.array([[tokenize(text, max_len=text_len) for text in row] for row in texts])
    weights = sampler.weights[asked.labels.astype(np.int64), asked.goals]
    named = positions_of(clips, rows, asked.goals)
    arrays = (clips.frames[rows], tokens, asked.labels, weights, named, clips.positions[rows])
    return tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)


def _examinations(config: JudgeTrainConfig, held: list[ClipSet]) -> tuple[list[JudgeClip], list[JudgeClip]]:
    """(calibration, test) questions from disjoint held-out episodes."""
    calibration: list[JudgeClip] = []
    test: list[JudgeClip] = []
    for part in held:
        for clips, chosen in zip(split(part, 0.5, seed=config.seed, salt=8), (test, calibration), strict=True):
            if len(clips):
                chosen += examination(clips, config.per_goal, seed=config.seed)
    return calibration or test, test or calibration


def calibrate(judge: EmbeddedJudge, clips: list[JudgeClip], target_precision: float, kinds: tuple[str, ...]) -> float:
    """The lowest threshold in [0.05, 0.99] whose precision on ``clips`` reaches the target.

    Where none does: the one with the best F0.5, which counts precision twice as heavily as recall. Only goals of
    ``kinds`` count (all, when there is none of them); held-out pairs take no part.
    """
    trained = [clip for clip in clips if not clip.held_out]
    trained = [clip for clip in trained if clip.relation.split(":", 1)[0] in kinds] or trained
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


def _save(run: RunDir, step: int, seconds: float, parts: nn.ModuleDict, optimizer: torch.optim.Optimizer) -> None:
    run.save(step, {**parts.state_dict(), **pack_optimizer(optimizer)}, {"seconds": seconds})


def _resume(run: RunDir, parts: nn.ModuleDict, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Continue from the newest checkpoint, if any: (step, seconds spent)."""
    checkpoint = run.load_latest()
    if checkpoint is None:
        return 0, 0.0
    parts.load_state_dict({name: value for name, value in checkpoint.tensors.items() if name.split(".")[0] in parts})
    unpack_optimizer(optimizer, checkpoint.tensors)
    return checkpoint.step, float(checkpoint.state["seconds"])
