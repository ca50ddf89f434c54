"""Train the one-shot reward model: a VideoMAE classifier of success windows, from a few demonstrations per task.

    rawdream judge train-reward-model --data DEMONSTRATIONS --run-dir RUN --demos-per-task 3

RAW-Dream appendix A.6. Windows of 8 frames: *positives* are the ends of demonstrations with the instruction of their own
task; *negatives* are their beginnings, and any window with the instruction of another task. Half of each batch is
positive; half of the negatives are beginnings and half are other tasks. Kept from the paper: these windows, the task
embedding and the thresholds. Added: random brightness, color and smoothness as in imagined frames, without which the
network memorizes a dozen videos.

The data do not say at which frame a demonstration succeeds, so ``ending`` and ``beginning`` are shares of the episode:
the part between them is not used. Every batch is a function of (seed, step): an interrupted run, resumed with the same
command, ends with the same weights on the same machine in float32.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from rawdream_env.data.lerobot import LeRobotReader
from rawdream_env.errors import DatasetError
from rawdream_env.files import atomic_write_json
from rawdream_env.judges.embedded import resize_frames
from rawdream_env.judges.videomae import WINDOW, VideoMAEJudge, VideoMAEJudgeConfig, VideoMAENetwork, from_transformers
from rawdream_env.seeding import mix
from rawdream_env.trainers.common.schedule import Schedule
from rawdream_env.trainers.common.training_loop import TrainingLoop
from rawdream_env.trainers.judge.config import RewardModelConfig
from rawdream_env.trainers.judge.losses import look_imagined

LOG_EVERY = 20
"""Steps between lines of metrics."""

Int64Array = NDArray[np.int64]


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
    """The trained judge, its folder, and its rates on its training windows."""

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
    readers = [LeRobotReader(folder, raw_actions=True) for folder in config.data]
    tasks = tuple(dict.fromkeys(task for reader in readers for task in reader.tasks))
    if len(tasks) < 2:
        raise DatasetError(f"the demonstrations have {len(tasks)} tasks; negatives need at least 2.")
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
                    f"{reader.root}: episode {index} has {len(clip)} frames, and no window of {WINDOW} fits into the first "
                    f"{config.beginning:g} or the last {config.ending:g} of it; increase beginning or ending."
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
    """Train and save; see the module's docstring. Writes ``judge/`` and ``metrics.json`` into the run folder.

    Raises:
        DatasetError: see ``load_windows``. CheckpointError: ``init`` is not a VideoMAE folder. RunDirError: the folder
            belongs to another run.
    """
    network = _initial(config)
    windows = load_windows(config, network.config.image_size)
    seconds = _fit(config, network, windows)
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
    folder = judge.save_pretrained(Path(config.run_dir) / "judge")
    atomic_write_json(Path(config.run_dir) / "metrics.json", {**facts, **metrics})
    return RewardModelResult(judge, folder, metrics)


def _initial(config: RewardModelConfig) -> VideoMAENetwork:
    tasks = tuple(
        dict.fromkeys(task for folder in config.data for task in LeRobotReader(folder, raw_actions=True).tasks)
    )
    with torch.random.fork_rng(
        devices=[]
    ):  # modules draw their weights from the global generator; restore it afterwards
        torch.manual_seed(mix(config.seed, 31))
        if config.init:
            network = from_transformers(config.init, tasks)
        else:
            network = VideoMAENetwork(VideoMAEJudgeConfig(tasks=tasks, **asdict(config.model)))
    network.config = VideoMAEJudgeConfig(**{**asdict(network.config), "threshold": config.threshold})
    return network.to(config.device)


def _fit(config: RewardModelConfig, network: VideoMAENetwork, windows: Windows) -> float:
    """The training loop; returns the seconds it took, earlier runs included."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    with TrainingLoop(
        config.run_dir,
        asdict(config),
        network,
        optimizer,
        Schedule(config.lr, config.steps, config.warmup, floor=0.0),
        save_every=config.save_every,
        may_change=("save_every", "progress"),
        timed=True,
        name="reward model",
        progress=config.progress,
        old_names={"network.": "model/"},
    ) as loop:
        network.train()
        for step in loop:
            clips, tasks, labels = (x.to(config.device) for x in batch(config, windows, step))
            logits = network(clips, tasks)
            loss = F.binary_cross_entropy_with_logits(logits, labels)
            loss.backward()
            loop.update()
            if loop.every(LOG_EVERY) or loop.last:
                loop.log(loss=loss, accuracy=((logits > 0) == (labels > 0.5)).float().mean())
        return loop.seconds


def batch(config: RewardModelConfig, windows: Windows, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """The batch of a step: windows float32 (N, 8, H, W, 3) in [0, 255], tasks (N,), labels float32 (N,)."""
    rng = np.random.default_rng(mix(config.seed, step, 32))
    half = config.batch_size // 2
    quarter = (config.batch_size - half) // 2
    own = windows.ends[rng.integers(len(windows.ends), size=half)]
    early = windows.beginnings[rng.integers(len(windows.beginnings), size=quarter)]
    # Ends of other tasks and some of their beginnings: a finished motion of another task must not be enough.
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
    """Share of the training windows above the threshold, by kind."""

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
