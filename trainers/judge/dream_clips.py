"""Imagined clips for the judge: replays of recorded actions, with labels.

The judge is used on imagined videos, so it is also trained on them: windows of play data that the world model has not
been trained on are imagined from their first frame with the recorded actions. A world model that imagines states says itself
what its clips show, and they are labeled by that; clips of other world models are labeled by the simulator's relations.
The format is that of ``rawdream_env.trainers.judge.clips``. Each file is a function of the configuration and its number,
and an existing file is skipped: rerun the same command to resume.

The simulator's label may be wrong about an imagined video. A judge trained on such clips, for example with a
vanished object labeled as a success, becomes less certain about them, which is intended.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from rawdream_env.data.reader import EpisodeArrays, LeRobotReader
from rawdream_env.data.recorded import RecordedEpisode
from rawdream_env.data.recording import claim_folder
from rawdream_env.errors import DatasetError
from rawdream_env.evaluation.world_model.replay import dream_episodes
from rawdream_env.files import save_sealed
from rawdream_env.resolve import fingerprint
from rawdream_env.seeding import mix
from rawdream_env.trainers.judge.clips import CHUNK, episode_windows, grammar_of
from rawdream_env.types import SupportsState, WorldModel
from rawdream_env.world_models import load_world_model


@dataclass(frozen=True)
class DreamClipsConfig:
    """What to imagine."""

    data: str
    """LeRobotDataset v3 folder with privileged poses and relations, not used to train the world model."""
    out: str
    """Folder for the clips."""
    world_model: str = "embedded"
    """Name or folder of the world model."""
    clips: int = 1200
    """Number of clips, over all lengths."""
    clips_per_file: int = 32
    """Number of clips in a file, all of one length (a clip of 65 frames is 0.8 MB)."""
    stride: int = 4
    """Rows between the ends of candidate windows."""
    seed: int = 0
    """Seed of windows, instructions and noise."""
    device: str = "cpu"
    """Device of the world model."""
    progress: bool = True
    """Show a progress bar."""


@dataclass(frozen=True)
class _File:
    """Windows (n, 2) of one length, and the goal asked about each."""

    number: int
    windows: NDArray[np.int64]
    goals: NDArray[np.int64]


def make_dream_clips(config: DreamClipsConfig, *, world_model: WorldModel | None = None) -> Path:
    """Imagine the missing clips; returns the folder.

    Raises:
        DatasetError: the data lack the privileged columns, or contain no window with an askable goal; or the folder
            contains clips of another configuration or of another world model of that name.
        CheckpointError: the world model is missing or damaged.
    """
    model = load_world_model(config.world_model, device=config.device) if world_model is None else world_model
    arrays = LeRobotReader(config.data).load_all(workers=2, progress=config.progress)
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in asdict(config).items() if key not in ("out", "device", "progress")}
    settings["world_model_fingerprint"] = fingerprint(model)
    claim_folder(folder, "config.json", settings, "imagined", added=("world_model_fingerprint",))
    files = plan(arrays, config)
    todo = [file for file in files if not _path(folder, file).exists()]
    done = sum(len(file.windows) for file in files) - sum(len(file.windows) for file in todo)
    with tqdm(total=config.clips, initial=done, desc="dreams", unit="clip", disable=not config.progress) as bar:
        for file in todo:
            _write(_path(folder, file), arrays, file, model, config)
            bar.update(len(file.windows))
    return folder


def _path(folder: Path, file: _File) -> Path:
    return folder / f"clips-{file.number:04d}.safetensors"


def plan(arrays: EpisodeArrays, config: DreamClipsConfig) -> list[_File]:
    """The windows to imagine and their goals: half are successes if there are enough, held-out pairs are excluded."""
    rng = np.random.default_rng(mix(config.seed, 0xD12E))
    grammar = grammar_of(arrays.robot_type)
    truth = arrays.privileged.get("relations")
    if truth is None:
        raise DatasetError(f"{config.data} has no privileged.relations: only data from the simulator have them.")
    windows = [
        begin + episode_windows(truth[begin:end, : len(grammar.place_relations)] > 0.5, rng, config.stride)
        for begin, end in zip(arrays.offsets[:-1], arrays.offsets[1:], strict=True)
    ]
    spans = np.concatenate(windows)
    labels = grammar.label_windows(arrays, spans[:, 0], spans[:, 1])
    goals = grammar.sample_goals(labels, rng, allowed=grammar.goal_mask(exclude_pairs=grammar.held_out_pairs))
    # Few windows end in a success: take those first, and an equal number of others.
    reached = (goals >= 0) & labels.reached[np.arange(len(spans)), goals]
    successes, failures = (rng.permutation(np.flatnonzero(mask)) for mask in (reached, (goals >= 0) & ~reached))
    half = min(config.clips // 2, len(successes))
    chosen = np.concatenate([successes[:half], failures[: config.clips - half]])
    if not len(chosen):
        raise DatasetError(
            f"{config.data}: none of its {len(spans)} windows has a goal to ask about; collect more data."
        )
    lengths = spans[chosen, 1] - spans[chosen, 0]
    files: list[_File] = []
    for length in np.unique(lengths):
        same = rng.permutation(chosen[lengths == length])
        for first in range(0, len(same), config.clips_per_file):
            part = same[first : first + config.clips_per_file]
            files.append(_File(len(files), spans[part], goals[part]))
    return files


def _write(path: Path, arrays: EpisodeArrays, file: _File, model: WorldModel, config: DreamClipsConfig) -> None:
    rng = np.random.default_rng(mix(config.seed, 0xD12E, file.number))
    grammar = grammar_of(arrays.robot_type)
    texts = [grammar.paraphrase(grammar.goals[goal], rng) for goal in file.goals]
    episodes = [
        RecordedEpisode(arrays.frames[first : last + 1], arrays.actions[first:last], arrays.state[first], text)
        for (first, last), text in zip(file.windows, texts, strict=True)
    ]
    assert all(len(episode.actions) % CHUNK == 0 for episode in episodes)
    rows = file.windows
    poses = arrays.privileged["object_poses"].reshape(-1, len(grammar.objects), 7)[rows].astype(np.float64)
    relations = arrays.privileged["relations"][rows] > 0.5
    knows = isinstance(model, SupportsState)

    def ended(i: int, state: Any) -> None:
        (poses[i, 1],), (relations[i, 1],) = model.belief(state)  # type: ignore[attr-defined]

    dreams = dream_episodes(
        model,
        episodes,
        seed=mix(config.seed, file.number),
        batch_size=config.clips_per_file,
        ended=ended if knows else None,
    )
    frames = np.stack([np.concatenate([e.frames[:1], dream]) for e, dream in zip(episodes, dreams, strict=True)])
    labels = (
        grammar.label_clips(poses[:, 0], poses[:, 1], relations[:, 0], relations[:, 1])
        if knows
        else grammar.label_windows(arrays, rows[:, 0], rows[:, 1])
    )
    reached = labels.reached[np.arange(len(rows)), file.goals]
    tensors = {
        "frames": torch.from_numpy(frames),
        "labels": torch.from_numpy(reached.astype(np.uint8)),
        "object_poses": torch.from_numpy(np.nan_to_num(poses).astype(np.float32)),
        "relations": torch.from_numpy(relations.astype(np.uint8)),
    }
    named = {"robot": arrays.robot_type} if arrays.robot_type else {}
    save_sealed(path, tensors, {"instructions": json.dumps(texts), **named})
