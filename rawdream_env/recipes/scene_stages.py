"""The stages that train the scene world model: data from the simulator, its three parts, the assembled model.

The policies' own rollouts are among the data, so the policies are trained first. A policy that is trained in a dream acts
differently, and looks for what the dream gets wrong. So the dynamics learn twice: a first world model is made, policies are
trained in it by its own state, and the dynamics go on learning with the states that those policies visit in the simulator.
No episode of the data shows a task done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rawdream_env.files import load_safetensors
from rawdream_env.piper.scene_pictures import FRAMES, collect_pictures, collect_starts, shard_paths
from rawdream_env.piper.scene_states import collect_states, shard_path
from rawdream_env.recipes.folders import Paths, settings_of
from rawdream_env.recipes.presets import SceneScale
from rawdream_env.trainers.common.stages import Stage
from rawdream_env.trainers.grpo import GRPOConfig, train_grpo
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
from rawdream_env.world_models.scene.rollout import SceneRolloutConfig, SceneWorldModel

SINGLE_FRAMES = 1.0
"""Share of the dynamics' training on single frames: all of it."""
START_NOISE = 0.65
"""Brings the reader's expected errors, which it overestimates, to the size of its real ones."""
ALLOWED_OVERLAP = 0.001
"""Metres that resting objects overlap by in the simulator, whose contacts are soft."""


def scene_stages(scale: SceneScale, paths: Paths, *, seed: int, workers: int, progress: bool) -> list[Stage]:
    """The stages, in order; they need ``pretrained`` and ``policy``."""
    policies = (str(paths.generalist), str(paths.policy))
    dreamers = tuple(str(paths.dreamer(i)) for i in range(scale.dreamers))

    def states(folder: Path, shards: int, policies: tuple[str, ...], seed: int) -> Callable[[], dict[str, Any]]:
        def run() -> dict[str, Any]:
            collect_states(folder, shards, policies=policies, seed=seed, workers=workers, size=scale.shard,
                           progress=progress)  # fmt: skip
            rows = [load_safetensors(shard_path(folder, i))["length"] for i in range(shards)]
            episodes = sum(map(len, rows))
            return {"episodes": episodes, "transitions": sum(int(x.sum()) for x in rows) - episodes}

        return run

    def made(folder: Path, shards: int) -> tuple[Path, ...]:
        return tuple(shard_path(folder, i) for i in range(shards))

    def size(shards: int, seed: int) -> dict[str, Any]:
        return {"shards": shards, "size": asdict(scale.shard), "seed": seed}

    first = DynamicsTrainConfig(
        (str(paths.states),), str(paths.first_scene / "dynamics_run"), single_frames=SINGLE_FRAMES, steps=scale.steps,
        minutes=scale.first_dynamics_minutes, seed=seed,
    )  # fmt: skip
    second = replace(
        first, data=(str(paths.states), str(paths.more_states)), run_dir=str(paths.scene / "dynamics_run"),
        init=str(paths.first_scene), minutes=scale.dynamics_minutes, seed=seed + 1,
    )  # fmt: skip
    return [
        Stage("states", size(scale.shards, seed), made(paths.states, scale.shards),
              states(paths.states, scale.shards, policies, seed), ("pretrained", "policy")),
        *_picture_stages(scale, paths, seed),
        *_picture_parts(scale, paths, seed, progress),
        _part("first_dynamics", first, paths.first_scene, lambda: train_dynamics(first, progress=progress), ("states",)),
        _assembled("first_world_model", paths, paths.first_scene, paths.first_scene / "world_model", ("first_dynamics",)),
        Stage(
            "dreamers",
            {"dreamers": scale.dreamers, "grpo_steps": scale.dreamer_steps, "seed": seed},
            tuple(Path(path) / "config.json" for path in dreamers),
            lambda: _train_dreamers(scale, paths, seed, progress),
            ("first_world_model", "policy"),
        ),
        Stage("more_states", size(scale.more_shards, seed + 1), made(paths.more_states, scale.more_shards),
              states(paths.more_states, scale.more_shards, (policies[1], *dreamers), seed + 1), ("dreamers",)),
        _part("dynamics", second, paths.scene, lambda: train_dynamics(second, progress=progress),
              ("states", "more_states", "first_dynamics")),
        _assembled("world_model", paths, paths.scene, paths.world_model, ("dynamics",)),
    ]  # fmt: skip


def _train_dreamers(scale: SceneScale, paths: Paths, seed: int, progress: bool) -> None:
    """Policies trained in the first world model, by its own state."""
    env = {
        "world_model": str(paths.first_scene / "world_model"), "judge": "state", "judge_every": "chunk", "dtype": "bfloat16",
    }  # fmt: skip
    for i in range(scale.dreamers):
        train_grpo(
            GRPOConfig(
                paths.dreamers / str(i), policy=str(paths.policy), env_kwargs=dict(env), steps=scale.dreamer_steps, lr=2e-4,
                temperature=0.7, dual_noise_verification=False, seed=seed + i, tensorboard=False, progress=progress,
            )
        )  # fmt: skip


def _picture_stages(scale: SceneScale, paths: Paths, seed: int) -> list[Stage]:
    def pictures() -> dict[str, Any]:
        collect_pictures(paths.pictures, scale.pictures, seed=seed)
        return {"episodes": scale.pictures, "pictures": scale.pictures * FRAMES}

    def starts() -> dict[str, Any]:
        collect_starts(paths.pictures, scale.start_pictures, seed=seed)
        return {"pictures": scale.start_pictures}

    painted, begun = (
        shard_paths(paths.pictures, kind, count)
        for kind, count in (("pictures", scale.pictures), ("starts", scale.start_pictures))
    )
    return [
        Stage("pictures", {"count": scale.pictures, "seed": seed}, painted, pictures),
        Stage("start_pictures", {"count": scale.start_pictures, "seed": seed}, begun, starts),
    ]


def _picture_parts(scale: SceneScale, paths: Paths, seed: int, progress: bool) -> list[Stage]:
    """Reader and painter."""
    pictures = (str(paths.pictures),)
    reader = ReaderTrainConfig(
        pictures, str(paths.scene / "reader_run"), steps=scale.steps, minutes=scale.reader_minutes, seed=seed
    )
    painter = PainterTrainConfig(
        pictures, str(paths.scene / "painter_run"), steps=scale.steps, minutes=scale.painter_minutes, seed=seed
    )
    return [
        _part("reader", reader, paths.scene, lambda: train_reader(reader, progress=progress), ("start_pictures",)),
        _part("painter", painter, paths.scene, lambda: train_painter(painter, progress=progress), ("pictures",)),
    ]


def _part(name: str, config: Any, folder: Path, train: Callable[[], Any], needs: tuple[str, ...]) -> Stage:
    """Train a part and save it in ``folder``."""
    made = folder / name.removeprefix("first_") / "config.json"
    return Stage(name, settings_of(config), (made,), lambda: save_part(train(), folder, half=False), needs)


def _assembled(name: str, paths: Paths, dynamics: Path, folder: Path, needs: tuple[str, ...]) -> Stage:
    """Reader, painter and the dynamics of a folder as one world model."""
    rollout = SceneRolloutConfig(start_noise=START_NOISE, allowed_overlap=ALLOWED_OVERLAP)

    def assemble() -> None:
        parts = read_reader(paths.scene), read_dynamics(dynamics), read_painter(paths.scene)
        save_scene_world_model(SceneWorldModel(*parts, rollout), folder, half=True)

    settings = {"kind": "scene", "half": True, "rollout": asdict(rollout)}
    return Stage(name, settings, (folder / "config.json",), assemble, ("reader", "painter", *needs))
