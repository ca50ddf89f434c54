"""Train the bundled judge on play data with hindsight labels, and optionally on imagined clips.

    rawdream judge train --data PLAY EXPERT --run-dir RUN

The paper uses an off-the-shelf vision-language model as its judge (section 3.2). The bundled judge is a classifier of
1.6 M parameters, trained on the task-agnostic play data of the world model: every window of an episode is a clip, and
every goal of the robot's grammar is a question about it, true or false. The evaluation tasks are treated like any other
pair of objects. Some pairs (the grammar's ``held_out_pairs``) are excluded from training; the report shows how well the
judge generalizes to them.

A step draws balanced clips and questions, augments the frames to look imagined, and computes the losses of the answers
and of the positions of the named objects. Every batch and every augmentation is a function of (seed, step): an
interrupted run resumes to bit-identical weights if its budget is in steps. At the end the threshold is calibrated for
precision on one half of the held-out episodes, and the report is measured on the other half.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from rawdream_env.errors import DatasetError
from rawdream_env.evaluation.judges.report import JudgeClip, JudgeReport, evaluate
from rawdream_env.files import atomic_write_json
from rawdream_env.judges.base import ask
from rawdream_env.judges.embedded import EmbeddedJudge
from rawdream_env.judges.embedded_network import JudgeNetwork
from rawdream_env.seeding import mix
from rawdream_env.text import tokenize
from rawdream_env.trainers.common.schedule import Schedule
from rawdream_env.trainers.common.training_loop import TrainingLoop
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
from rawdream_env.trainers.judge.config import JudgeTrainConfig
from rawdream_env.trainers.judge.losses import Locator, answer_loss, look_imagined, place_loss

LOG_EVERY = 20
"""Steps between lines of metrics, which are means over these steps."""


@dataclass(frozen=True)
class JudgeResult:
    """The trained judge, where it was written, and its report on held-out episodes."""

    judge: EmbeddedJudge
    folder: Path
    report: JudgeReport


def train_judge(config: JudgeTrainConfig, *, progress: bool = True) -> JudgeResult:
    """Train, calibrate, measure and save; see the module's docstring.

    Writes ``judge/`` (config.json, model.safetensors), ``metrics.json``, ``judge_report.json`` and ``mistakes.png``
    into the run folder.

    Raises:
        DatasetError: the data cannot be read, have frames of another size than the network, or contain no goal with both
            successes and failures.
        RunDirError: the run folder belongs to another configuration.
    """
    sets = _load(config, progress)
    network, steps, seconds = _fit(config, [train for train, _ in sets], progress)
    calibration, test = _examinations(config, [held for _, held in sets])
    facts = {
        "steps": steps,
        "train_minutes": round(seconds / 60, 2),
        "seed": config.seed,
        "data": [Path(folder).name for folder in config.data],
    }
    judge = EmbeddedJudge(network, metadata=facts, device=config.device)
    hold, network.config = network.config.hold, replace(network.config, hold=0)  # labels are those of the last frame
    threshold = calibrate(judge, calibration, config.target_precision, config.calibrate_on)
    network.config = replace(network.config, threshold=threshold)
    report = evaluate(judge, test)
    network.config = replace(network.config, hold=hold)
    overall = report.rows["all"].as_dict()
    judge.metadata["validation"] = {key: overall[key] for key in ("precision", "recall", "false_positive_rate", "n")}
    folder = judge.save_pretrained(Path(config.run_dir) / "judge")
    report.write(config.run_dir)
    windows = {train.source: {"train": len(train), "held_out": len(held)} for train, held in sets}
    atomic_write_json(
        Path(config.run_dir) / "metrics.json",
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


def _fit(config: JudgeTrainConfig, clips: list[ClipSet], progress: bool) -> tuple[JudgeNetwork, int, float]:
    """The training loop; returns the averaged network, the steps taken and the seconds they took."""
    samplers = [QuestionSampler(part, config.questions) for part in clips]
    for number, sampler in enumerate(samplers):
        sampler.balance(mix(config.seed, number, 3))
    network = _initial(config).to(torch.device(config.device))
    _check_frames(network.config.frame_size, clips)
    averaged = copy.deepcopy(network).requires_grad_(False)
    with torch.random.fork_rng(
        devices=[]
    ):  # modules draw their weights from the global generator; restore it afterwards
        torch.manual_seed(mix(config.seed, 12))
        locator = Locator(network.config.width, len(clips[0].grammar.objects)).to(config.device)
    trained = nn.ModuleDict({"network": network, "locator": locator})
    optimizer = torch.optim.AdamW(
        trained.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay, fused=True
    )
    recent: list[dict[str, Tensor]] = []
    with TrainingLoop(
        config.run_dir,
        asdict(config),
        trained,
        optimizer,
        Schedule(config.lr, config.steps, config.warmup, config.minutes),
        ema=config.ema,
        averaged=network,
        save_every=config.save_every,
        may_change=("steps", "minutes", "save_every"),
        timed=True,
        name="judge",
        progress=progress,
        old_names={"network.": "model/network.", "locator.": "model/locator.", "ema.": "ema/"},
    ) as loop:
        for step in loop:
            loss, numbers = _loss(config, network, locator, clips, samplers, step)
            loss.backward()
            recent.append({**numbers, "grad_norm": loop.update()})
            if loop.every(LOG_EVERY):
                means = {name: torch.stack([entry[name] for entry in recent]).mean() for name in recent[0]}
                loop.log(lr=loop.rate, **means)
                recent.clear()
            if loop.every(config.save_every):
                recent.clear()  # as in a resumed run, so that the log lines are the same
        seconds = loop.seconds
        averaged.load_state_dict(loop.averaged())
    return averaged, loop.step, seconds


def _check_frames(size: int, clips: list[ClipSet]) -> None:
    """``DatasetError`` unless the frames have the network's size: training looks at them as they are."""
    for part in clips:
        height, width = part.frames.shape[1:3]
        if (height, width) != (size, size):
            raise DatasetError(
                f"The {part.source} clips have frames of {height}x{width} pixels, the judge looks at {size}x{size}. Set "
                f"--model.frame-size {height}{'' if height == width else ' and give data with square frames'}."
            )


def _initial(config: JudgeTrainConfig) -> JudgeNetwork:
    if config.init:
        return copy.deepcopy(EmbeddedJudge.from_pretrained(config.init).network).requires_grad_(True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(config.seed, 11))
        return JudgeNetwork(config.model)


def _loss(
    config: JudgeTrainConfig,
    network: JudgeNetwork,
    locator: Locator,
    clips: list[ClipSet],
    samplers: list[QuestionSampler],
    step: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of a step's batch: answers, positions of the named objects, and positions of all objects."""
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
    """The lowest threshold in [0.5, 0.99] whose precision on ``clips`` reaches the target.

    If none does: the one with the best F0.5, which weighs precision twice as much as recall. Only goals of ``kinds``
    count (all goals, if there are none of these kinds); held-out pairs are excluded.
    """
    trained = [clip for clip in clips if not clip.held_out]
    trained = [clip for clip in trained if clip.relation.split(":", 1)[0] in kinds] or trained
    verdicts = ask(judge, [clip.video for clip in trained], [clip.instruction for clip in trained])
    chances = np.array([math.nan if v.probability is None else v.probability for v in verdicts])
    labels = np.array([clip.label for clip in trained])
    scores = []
    for threshold in np.round(np.arange(0.5, 0.995, 0.01), 2):
        yes = chances >= threshold
        hits, wrong, missed = (yes & labels).sum(), (yes & ~labels).sum(), (~yes & labels).sum()
        if hits and hits / (hits + wrong) >= target_precision:
            return float(threshold)
        scores.append((1.25 * hits / max(1.25 * hits + 0.25 * missed + wrong, 1), float(threshold)))
    return max(scores)[1]
