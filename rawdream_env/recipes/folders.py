"""Where a recipe keeps its files, what the marker of a stage records, and the stage that collects a data set."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rawdream_env.data.collect import CollectConfig, collect
from rawdream_env.trainers.common.stages import Stage


class Paths:
    """Folders under ``out``."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.play, self.held_out = out / "data" / "play", out / "data" / "held_out_play"
        self.rollouts, self.other_play = out / "data" / "rollouts", out / "data" / "other_play"
        self.demonstrations = out / "data" / "demonstrations"
        self.states, self.pictures = out / "data" / "states", out / "data" / "pictures"
        self.more_states = out / "data" / "more_states"
        self.first_scene, self.scene = out / "scene_1", out / "scene"
        self.dreamers = out / "dreamers"
        self.world_model = out / "world_model" / "world_model"
        self.judge = out / "judge" / "judge"
        self.generalist = out / "policy_pretrained" / "policy"
        self.policy = out / "policy" / "policy"
        self.assets = out / "assets"

    def dreamer(self, number: int) -> Path:
        """A policy that was trained in the first world model."""
        return self.dreamers / f"{number}" / "policy"


def settings_of(config: Any) -> dict[str, Any]:
    """The settings of a stage: its configuration without folders (covered by ``Stage.needs``) and without the progress bar."""
    left_out = ("data", "out", "run_dir", "robot", "world_model", "imagined", "init", "replay", "progress")
    return {key: value for key, value in asdict(config).items() if key not in left_out}


def collect_stage(name: str, config: CollectConfig, needs: tuple[str, ...] = ()) -> Stage:
    """A stage that collects a LeRobotDataset."""
    free = ("out", "robot", "policy", "workers", "progress")
    settings = {key: value for key, value in asdict(config).items() if key not in free}

    def run() -> dict[str, Any]:
        collect(config)
        return {"episodes": config.episodes, "transitions": config.episodes * config.steps}

    return Stage(name, settings, (Path(config.out) / "meta" / "info.json",), run, needs)
