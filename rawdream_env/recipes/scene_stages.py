"""The stages that train the scene world model: data from the simulator, its three parts, the assembled model.

The policies' own rollouts are among the data, so the policies are trained first. No episode of the data shows a task done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from rawdream_env.files import load_safetensors
from rawdream_env.piper.scene_pictures import FRAMES, collect_pictures, collect_starts, shard_paths
from rawdream_env.piper.scene_states import collect_states, shard_path
from rawdream_env.recipes.folders import Paths, settings_of
from rawdream_env.recipes.presets import SceneScale
from rawdream_env.trainers.common.stages import Stage
from rawdream_env.trainers.scene.dynamics import DynamicsTrainConfig, train_dynamics
from rawdream_env.trainers.scene.painter import PainterTrainConfig, train_painter
from rawdream_env.trainers.scene.reader import ReaderTrainConfig, train_reader
from rawdream_env.world_models.scene.loading import (
    read_dynamics,
    read_painter,
    read_reader,
    save_part,
    save_scene_world_model,
)
from rawdream_env.world_models.scene.rollout import SceneWorldModel


def scene_stages(scale: SceneScale, paths: Paths, *, seed: int, workers: int, progress: bool) -> list[Stage]:
    """The stages, in order; they need ``pretrained`` and ``policy``."""
    return [*_data_stages(scale, paths, seed, workers, progress), *_part_stages(scale, paths, seed, progress)]


def _data_stages(scale: SceneScale, paths: Paths, seed: int, workers: int, progress: bool) -> list[Stage]:
    policies = (str(paths.generalist), str(paths.policy))

    def states() -> dict[str, Any]:
        collect_states(paths.states, scale.shards, policies=policies, seed=seed, workers=workers, size=scale.shard,
                       progress=progress)  # fmt: skip
        rows = [load_safetensors(shard_path(paths.states, i))["length"] for i in range(scale.shards)]
        episodes = sum(map(len, rows))
        return {"episodes": episodes, "transitions": sum(int(x.sum()) for x in rows) - episodes}

    def pictures() -> dict[str, Any]:
        collect_pictures(paths.pictures, scale.pictures, seed=seed)
        return {"episodes": scale.pictures, "pictures": scale.pictures * FRAMES}

    def starts() -> dict[str, Any]:
        collect_starts(paths.pictures, scale.start_pictures, seed=seed)
        return {"pictures": scale.start_pictures}

    size = {"shards": scale.shards, "size": asdict(scale.shard), "seed": seed}
    made = tuple(shard_path(paths.states, i) for i in range(scale.shards))
    painted, begun = (
        shard_paths(paths.pictures, kind, count)
        for kind, count in (("pictures", scale.pictures), ("starts", scale.start_pictures))
    )
    return [
        Stage("states", size, made, states, ("pretrained", "policy")),
        Stage("pictures", {"count": scale.pictures, "seed": seed}, painted, pictures),
        Stage("start_pictures", {"count": scale.start_pictures, "seed": seed}, begun, starts),
    ]


def _part_stages(scale: SceneScale, paths: Paths, seed: int, progress: bool) -> list[Stage]:
    states, pictures = (str(paths.states),), (str(paths.pictures),)

    def run_dir(name: str) -> str:
        return str(paths.scene / f"{name}_run")

    reader = ReaderTrainConfig(pictures, run_dir("reader"), steps=scale.steps, minutes=scale.reader_minutes, seed=seed)
    dynamics = DynamicsTrainConfig(
        states, run_dir("dynamics"), steps=scale.steps, minutes=scale.dynamics_minutes, seed=seed
    )
    painter = PainterTrainConfig(
        pictures, run_dir("painter"), steps=scale.steps, minutes=scale.painter_minutes, seed=seed
    )

    def part(name: str, config: Any, train: Callable[[], Any], needs: tuple[str, ...]) -> Stage:
        def run() -> None:
            save_part(train(), paths.scene, half=False)

        return Stage(name, settings_of(config), (paths.scene / name / "config.json",), run, needs)

    def assemble() -> None:
        model = SceneWorldModel(read_reader(paths.scene), read_dynamics(paths.scene), read_painter(paths.scene))
        save_scene_world_model(model, paths.world_model, half=True)

    return [
        part("reader", reader, lambda: train_reader(reader, progress=progress), ("start_pictures",)),
        part("dynamics", dynamics, lambda: train_dynamics(dynamics, progress=progress), ("states",)),
        part("painter", painter, lambda: train_painter(painter, progress=progress), ("pictures",)),
        Stage(
            "world_model",
            {"kind": "scene", "half": True},
            (paths.world_model / "config.json",),
            assemble,
            ("reader", "dynamics", "painter"),
        ),
    ]
