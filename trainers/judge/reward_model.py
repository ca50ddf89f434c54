"""Train the one-shot reward model: a VideoMAE classifier of success windows, from a few demonstrations a task.

    rawdream train-reward-model --data DEMONSTRATIONS --out RUN --demos-per-task 3

RAW-Dream appendix A.6. Windows of 8 frames: *positives* are the ends of demonstrations asked about their own task;
*negatives* are their beginnings, and any window asked about another task. Half of each batch is positive; of the
negatives half are beginnings and half are other tasks. Kept of the paper: that, the task embedding and the thresholds. Added:
random light, colours and dream-like softness, without which twelve videos are learnt by heart at once.

Nothing says whether a demonstration ended before its last frames, so ``ending`` and ``beginning`` are shares of the
episode: what lies between them is not used. Every batch is a function of (seed, step): a killed run, started again with
the same command, ends with the same weights on the same machine in float32.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from rawdream_env.data.lerobot import LeRobotReader
from rawdream_env.errors import DatasetError, InvalidOptionError
from rawdream_env.files import atomic_write_json
from rawdream_env.judges.embedded import resize_frames
from rawdream_env.judges.videomae import WINDOW, VideoMAEJudge, VideoMAEJudgeConfig, VideoMAENetwork, from_transformers
from rawdream_env.seeding import mix
from rawdream_env.trainers.common.run_dir import RunDir, pack_optimizer, unpack_optimizer
from rawdream_env.trainers.judge.losses import look_imagined

Int64Array = NDArray[np.int64]


@dataclass(frozen=True)
class RewardModelSize:
    """Size of a network made from nothing (a folder given by ``init`` brings its own)."""

    image_size: int = 64
    patch_size: int = 16
    hidden_size: int = 128
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 4


@dataclass(frozen=True)
class RewardModelConfig:
    """Everything a run depends on."""

    data: tuple[str, ...]
    """LeRobotDataset v3.0 folders of successful demonstrations."""
    out: str
    """Run folder; the same command continues an interrupted run. The judge is written to its folder ``judge``."""
    demos_per_task: int = 3
    """The first so many episodes of every instruction (paper: 1, ten tasks to a model)."""
    init: str = ""
    """Local transformers folder of a VideoMAE encoder to fine-tune; empty: random weights."""
    ending: float = 0.25
    """Windows within this share of the episode at its end are positives."""
    beginning: float = 0.4
    """Windows within this share at its beginning are negatives."""
    steps: int = 800
    """Optimiser steps."""
    batch_size: int = 16
    """Windows in a batch."""
    lr: float = 5e-4
    """Of AdamW, falling to nothing as a cosine after ``warmup`` steps. A pre-trained encoder wants 5e-5."""
    warmup: int = 20
    """Steps of warm-up."""
    weight_decay: float = 0.05
    """Of AdamW."""
    augment: float = 0.5
    """Share of windows whose frames are softened as dreams are."""
    threshold: float = 0.5
    """Success from here (paper: 0.9, which nearly nothing passed; then 0.5)."""
    seed: int = 0
    """Of initialisation, batches and perturbations."""
    device: str = "cpu"
    """Device to train on."""
    save_every: int = 100
    """Steps between checkpoints."""
    progress: bool = True
    """Show a progress bar."""
    model: RewardModelSize = field(default_factory=RewardModelSize)
    """Size of the network."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        shares = (self.ending, self.beginning)
        if min(shares) <= 0 or sum(shares) > 1 or min(self.steps, self.demos_per_task, self.save_every) < 1:
            raise InvalidOptionError(
                f"ending {self.ending} and beginning {self.beginning} must be positive and sum to at most 1; steps "
                f"{self.steps}, demos_per_task {self.demos_per_task} and save_every {self.save_every} at least 1."
            )
        if self.batch_size < 4 or not self.lr > 0 or not 0 < self.threshold < 1:
            raise InvalidOptionError(
                f"batch_size={self.batch_size} must be at least 4, lr={self.lr} positive and "
                f"threshold={self.threshold} between 0 and 1."
            )


@dataclass(frozen=True)
class Windows:
    """``frames`` uint8 (R, H, W, 3) of all demonstrations; ``ends`` and ``beginnings`` (n, 2): first row and task."""

    frames: Tensor
    ends: Int64Array
    beginnings: Int64Array
    tasks: tuple[str, ...]
    demonstrations: int


@dataclass(frozen=True)
class RewardModelResult:
    """The trained judge, its folder, and how it does on the windows it was trained on."""

    judge: VideoMAEJudge
    folder: Path
    metrics: dict[str, float]

    def __str__(self) -> str:
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in self.metrics.items())
        return f"{numbers} (on its own demonstrations).\nThe judge is in {self.folder}."


def load_windows(config: RewardModelConfig, image_size: int) -> Windows:
    """Windows of the demonstrations.

    Raises:
        DatasetError: fewer demonstrations of a task than asked for, fewer than 2 tasks, or episodes that are too short.
    """
    frames: list[Tensor] = []
    ends: list[tuple[int, int]] = []
    beginnings: list[tuple[int, int]] = []
    readers = [LeRobotReader(folder) for folder in config.data]
    tasks = tuple(dict.fromkeys(task for reader in readers for task in reader.tasks))
    if len(tasks) < 2:
        raise DatasetError(f"the demonstrations are of {len(tasks)} tasks; negatives need at least 2.")
    taken, row = dict.fromkeys(tasks, 0), 0
    for reader in readers:
        for index in range(len(reader)):
            task = reader.task(index)
            if taken[task] == config.demos_per_task:
                continue
            taken[task] += 1
            clip = resize_frames(reader.episode(index).frames, image_size)
            last = len(clip) - WINDOW  # first frame of the last window
            early, late = int(config.beginning * len(clip)) - WINDOW, int((1 - config.ending) * len(clip))
            if early < 0 or late > last:
                raise DatasetError(
                    f"{reader.root}: episode {index} has {len(clip)} frames, so that no window of {WINDOW} fits into its "
                    f"first {config.beginning:g} or its last {config.ending:g}; use longer shares."
                )
            number = tasks.index(task)
            beginnings += [(row + start, number) for start in range(early + 1)]
            ends += [(row + start, number) for start in range(late, last + 1)]
            frames.append(clip)
            row += len(clip)
    few = {task: count for task, count in taken.items() if count < config.demos_per_task}
    if few:
        task, count = next(iter(few.items()))
        raise DatasetError(f"{count} demonstrations of {task!r}, {config.demos_per_task} asked for.")
    return Windows(torch.cat(frames), np.array(ends), np.array(beginnings), tasks, sum(taken.values()))


def train_reward_model(config: RewardModelConfig) -> RewardModelResult:
    """Train and save; see the module's text. Writes ``judge/`` and ``metrics.json`` into the run folder.

    Raises:
        DatasetError: see ``load_windows``. CheckpointError: ``init`` is no VideoMAE. RunDirError: another run's folder.
    """
    network = _initial(config)
    windows = load_windows(config, network.config.image_size)
    with RunDir(config.out, asdict(config), may_change=("save_every", "progress")) as run:
        seconds = _fit(config, run, network, windows)
    facts = {
        "steps": config.steps,
        "seed": config.seed,
        "demonstrations": windows.demonstrations,
        "data": [Path(folder).name for folder in config.data],
        "train_minutes": round(seconds / 60, 2),
    }
    judge = VideoMAEJudge(network, metadata=facts, device=config.device)
    metrics = _measure(judge, windows)
    judge.metadata["own_windows"] = metrics
    folder = judge.save_pretrained(Path(config.out) / "judge")
    atomic_write_json(Path(config.out) / "metrics.json", {**facts, **metrics})
    return RewardModelResult(judge, folder, metrics)


def _initial(config: RewardModelConfig) -> VideoMAENetwork:
    tasks = tuple(dict.fromkeys(task for folder in config.data for task in LeRobotReader(folder).tasks))
    with torch.random.fork_rng(devices=[]):  # modules draw their weights from the global generator: borrow, return it
        torch.manual_seed(mix(config.seed, 31))
        if config.init:
            network = from_transformers(config.init, tasks)
        else:
            network = VideoMAENetwork(VideoMAEJudgeConfig(tasks=tasks, **asdict(config.model)))
    network.config = VideoMAEJudgeConfig(**{**asdict(network.config), "threshold": config.threshold})
    return network.to(config.device)


def _fit(config: RewardModelConfig, run: RunDir, network: VideoMAENetwork, windows: Windows) -> float:
    """The training loop; returns the seconds it took, earlier runs included."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    step, spent = 0, 0.0
    checkpoint = run.load_latest()
    if checkpoint is not None:
        weights = {name.removeprefix("network."): t for name, t in checkpoint.tensors.items() if "network." in name[:8]}
        network.load_state_dict(weights)
        unpack_optimizer(optimizer, checkpoint.tensors)
        step, spent = checkpoint.step, float(checkpoint.state["seconds"])
    begun = perf_counter() - spent
    network.train()
    with tqdm(total=config.steps, initial=step, desc="reward model", unit="step", disable=not config.progress) as bar:
        while step < config.steps:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            clips, tasks, labels = batch(config, windows, step)
            logits = network(clips.to(config.device), tasks.to(config.device))
            loss = F.binary_cross_entropy_with_logits(logits, labels.to(config.device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            step += 1
            bar.update()
            if step % 20 == 0 or step == config.steps:
                accuracy = float(((logits > 0) == (labels.to(config.device) > 0.5)).float().mean())
                run.log(step, loss=float(loss.detach()), accuracy=accuracy)
                bar.set_postfix(loss=f"{float(loss.detach()):.3f}", accuracy=f"{accuracy:.2f}")
            if step % config.save_every == 0 or step == config.steps:
                tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
                run.save(step, {**tensors, **pack_optimizer(optimizer)}, {"seconds": perf_counter() - begun})
    return perf_counter() - begun


def learning_rate(config: RewardModelConfig, step: int) -> float:
    """Linear warm-up, then a cosine to nothing."""
    return config.lr * min(1.0, (step + 1) / config.warmup) * 0.5 * float(1 + np.cos(np.pi * step / config.steps))


def batch(config: RewardModelConfig, windows: Windows, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """The batch of a step: windows float32 (N, 8, H, W, 3) in [0, 255], tasks (N,), labels float32 (N,)."""
    rng = np.random.default_rng(mix(config.seed, step, 32))
    half = config.batch_size // 2
    quarter = (config.batch_size - half) // 2
    own = windows.ends[rng.integers(len(windows.ends), size=half)]
    early = windows.beginnings[rng.integers(len(windows.beginnings), size=quarter)]
    # Ends of other tasks and now and then their beginnings: "something was finished" must not be enough.
    pool = np.concatenate(
        [windows.ends, windows.beginnings[:: max(1, len(windows.beginnings) // len(windows.ends) * 4)]]
    )
    other = pool[rng.integers(len(pool), size=config.batch_size - half - quarter)].copy()
    other[:, 1] = (other[:, 1] + rng.integers(1, len(windows.tasks), len(other))) % len(windows.tasks)
    rows = np.concatenate([own, early, other])
    clips = torch.stack([windows.frames[first : first + WINDOW] for first in rows[:, 0]])
    clips = look_imagined(clips, config.augment, torch.Generator().manual_seed(mix(config.seed, step, 33)))
    labels = torch.zeros(len(rows))
    labels[:half] = 1.0
    return clips, torch.from_numpy(rows[:, 1].copy()), labels


def _measure(judge: VideoMAEJudge, windows: Windows) -> dict[str, float]:
    """Share of the demonstrations' own windows on the right side of the threshold."""

    def passed(rows: Int64Array, shift: int) -> float:
        hits = []
        for task in range(len(windows.tasks)):
            for first in rows[rows[:, 1] == task, 0][::3]:
                clip = windows.frames[first : first + WINDOW].numpy()
                asked = (task + shift) % len(windows.tasks)
                hits.append(judge.window_probabilities(clip, asked, [0])[0] >= judge.threshold)
        return float(np.mean(hits))

    return {
        "ends_passed": passed(windows.ends, 0),
        "beginnings_passed": passed(windows.beginnings, 0),
        "other_tasks_passed": passed(windows.ends, 1),
    }
