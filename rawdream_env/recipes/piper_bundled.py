"""Train the bundled models from scratch with one command: world model, judge, policy, starts, numbers, model card.

    rawdream models train --preset cpu     takes hours on 2 cores; the model card lists them
    rawdream models train --preset gpu     the same recipe with more data and more steps, on a CUDA device

The stages, in order: collect play -> pre-train the policy on it -> run that policy on instructions that are not
tasks -> collect 3 demonstrations per task -> fine-tune the policy on them -> train the world model -> imagine clips of other
play, and of scripted experts and policies that were trained in a dream, on instructions that are not tasks -> train the judge
on all of it -> render the starts -> copy the checkpoints -> evaluate everything -> write the model card.

The presets cpu and smoke train the scene world model (``scene_stages.py``): collect object states and pictures, in which no
relation of a task ever comes true, then train reader, dynamics and painter. The preset gpu trains the video world model on
play and rollouts. Only the demonstrations and the final evaluation show the four tasks done (paper section 3:
task-agnostic).

Rollouts of policies are training data because RL acts in the dream with sampled action tokens, which jitter unlike scripted
play, and a world model is only accurate near its data.

A complete stage writes a marker to ``out/stages`` with its settings and duration, and is skipped from then on. An
interrupted stage resumes from its trainer's last checkpoint. A marker with other settings, of this stage or of one that it
depends on, stops the command: choose another ``out``, or delete the marker and the folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from rawdream_env.data.collect import CollectConfig
from rawdream_env.data.reader import LeRobotReader
from rawdream_env.data.recorded import episodes_from_dataset
from rawdream_env.errors import InvalidOptionError
from rawdream_env.evaluation.reporting.provenance import provenance
from rawdream_env.evaluation.side_by_side.evaluate import EvaluateConfig, evaluate
from rawdream_env.evaluation.world_model.fidelity import evaluate_fidelity
from rawdream_env.files import atomic_write_json
from rawdream_env.piper.goals import OTHER_RELATIONS
from rawdream_env.piper.starts import make_start_pack
from rawdream_env.recipes.card import write_card, write_manifest
from rawdream_env.recipes.folders import Paths, collect_stage, settings_of
from rawdream_env.recipes.judge_stages import judge_stages
from rawdream_env.recipes.presets import PRESETS, Scale, VideoScale
from rawdream_env.recipes.scene_stages import scene_stages
from rawdream_env.resolve import bundled_folder
from rawdream_env.trainers.common.stages import Stage, run_stages
from rawdream_env.trainers.policy.config import ADDED, TINY_VLA_DEFAULTS, SFTConfig
from rawdream_env.trainers.policy.sft import train_sft
from rawdream_env.trainers.world_model.config import WorldModelTrainConfig
from rawdream_env.trainers.world_model.train import train_world_model
from rawdream_env.world_models import load_world_model
from rawdream_env.world_models.loading import read_world_model, save_world_model
from rawdream_env.world_models.scene.loading import is_scene_world_model


@dataclass(frozen=True)
class EmbeddedConfig:
    """Options of ``rawdream models train``."""

    out: Path = Path("runs/embedded")
    """Folder for data, runs and, in ``assets``, the finished models. Rerun the same command to resume."""
    preset: Literal["cpu", "gpu", "smoke"] = "cpu"
    """Amount of data and training. smoke: a quick test of all stages; its models are useless."""
    device: str = ""
    """Torch device; default: cuda for the gpu preset, else cpu."""
    workers: int = 2
    """Simulator processes; 0: none besides this one, -1: one per core."""
    seed: int = 0
    """Seed of all random draws."""
    until: str = ""
    """Stop after this stage; default: run all."""
    only: str = ""
    """Run this stage alone; the stages it needs must be complete. Stages that do not need each other can run side by side."""
    install: bool = False
    """Replace the models of the installed package with the finished ones; the gpu preset's world model replaces
    "embedded-video"."""
    progress: bool = True
    """Show progress bars."""


@dataclass(frozen=True)
class EmbeddedResult:
    """``assets``: the folder of the models (None when ``until`` stopped earlier); ``hours``: hours of each stage."""

    assets: Path | None
    hours: dict[str, float]

    def __str__(self) -> str:
        width = max(map(len, self.hours))
        lines = [f"{name:<{width}}  {60 * hours:8.1f} min" for name, hours in self.hours.items()]
        return "\n".join([*lines, f"The models are in {self.assets}." if self.assets else "Stopped on request."])


def train_embedded(config: EmbeddedConfig) -> EmbeddedResult:
    """Run the stages that are not complete yet.

    Raises:
        InvalidOptionError: unknown stage, or no such device.
        RunDirError: ``out`` holds stages made with other settings.
    """
    device = config.device or ("cuda" if config.preset == "gpu" else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InvalidOptionError(f"device {device!r} needs a CUDA build of torch and a GPU; use --preset cpu.")
    stages = recipe(replace(config, device=device), PRESETS[config.preset])
    names = [stage.name for stage in stages]
    for option, name in (("until", config.until), ("only", config.only)):
        if name and name not in names:
            raise InvalidOptionError(f"{option}={name!r} is no stage; choose among {', '.join(names)}.")
    if config.until and config.only:
        raise InvalidOptionError(
            f"until={config.until!r} and only={config.only!r} exclude each other; give one of them."
        )
    last = names.index(config.until or config.only or names[-1])
    hours = run_stages(stages[: last + 1], config.out / "stages", only=config.only)
    assets = config.out / "assets" if last == len(stages) - 1 else None
    if assets is not None and config.install:
        install_models(assets, bundled_folder("judge").parent)
    return EmbeddedResult(assets, hours)


# -- the recipe --------------------------------------------------------------------------------------------------------


def recipe(config: EmbeddedConfig, scale: Scale) -> list[Stage]:
    """All stages, in order; ``config.device`` is filled in."""
    parts = (_play_stages, _policy_stages, _world_model_stages, _judge_stages, _finish_stages)
    return [stage for part in parts for stage in part(config, scale, Paths(config.out))]


def _play_stages(config: EmbeddedConfig, scale: Scale, paths: Paths) -> list[Stage]:
    def play(out: Path, episodes: int, seed: int) -> CollectConfig:
        return CollectConfig(
            out=str(out), kind="play", episodes=episodes, workers=config.workers, seed=seed, progress=config.progress
        )

    def rollouts(out: Path, episodes: int, seed: int) -> CollectConfig:
        source = replace(play(out, episodes, seed), kind="policy", policy=str(paths.generalist))
        return replace(source, tasks=OTHER_RELATIONS, action_noise=0.1)

    pretrain = _pretrain(config, scale, paths)
    # Different seeds give different scenes: the world model is tested, and imagines clips, on scenes it was not trained on.
    return [
        collect_stage("play", play(paths.play, scale.play, config.seed)),
        collect_stage("other_play", play(paths.other_play, scale.other_play, config.seed + 1)),
        collect_stage("held_out_play", play(paths.held_out, scale.held_out, config.seed + 2)),
        Stage(
            "pretrained",
            _sft_settings(pretrain),
            (paths.generalist / "config.json",),
            _trained(pretrain, config.progress),
            ("play",),
        ),
        collect_stage("rollouts", rollouts(paths.rollouts, scale.rollouts, config.seed), ("pretrained",)),
    ]


def _world_model_stages(config: EmbeddedConfig, scale: Scale, paths: Paths) -> list[Stage]:
    if not isinstance(scale.world_model, VideoScale):
        options: Any = {"seed": config.seed, "workers": config.workers, "progress": config.progress}
        return scene_stages(scale.world_model, paths, **options)
    train = WorldModelTrainConfig(
        data=(str(paths.play), str(paths.rollouts)),
        run_dir=str(paths.world_model.parent),
        seed=config.seed,
        device=config.device,
        autoencoder=scale.world_model.autoencoder,
        transformer=scale.world_model.transformer,
    )

    def run() -> None:
        train_world_model(train)

    return [Stage("world_model", settings_of(train), (paths.world_model / "config.json",), run, ("play", "rollouts"))]


def _judge_stages(config: EmbeddedConfig, scale: Scale, paths: Paths) -> list[Stage]:
    options: Any = {"device": config.device, "workers": config.workers, "progress": config.progress}
    return judge_stages(scale, paths, seed=config.seed, **options)


def _pretrain(config: EmbeddedConfig, scale: Scale, paths: Paths) -> SFTConfig:
    return SFTConfig(
        data=(str(paths.play),),
        run_dir=str(paths.generalist.parent),
        stage="pretrain",
        steps=scale.pretrain_steps,
        batch_size=scale.pretrain_batch,
        label_sigma=3.0,
        readout_weight=3.0,
        jitter=0.05,
        blur_share=0.15,
        device=config.device,
        seed=config.seed,
    )


def _sft_settings(config: SFTConfig) -> dict[str, Any]:
    """Settings of a stage, as they were before options for other policies existed."""
    return {key: value for key, value in settings_of(config.filled(TINY_VLA_DEFAULTS)).items() if key not in ADDED}


def _trained(sft: SFTConfig, progress: bool) -> Callable[[], dict[str, Any]]:
    return lambda: {"validation": train_sft(sft, progress=progress).validation}


def _policy_stages(config: EmbeddedConfig, scale: Scale, paths: Paths) -> list[Stage]:
    demonstrations = CollectConfig(
        out=str(paths.demonstrations),
        kind="expert",
        episodes=12,
        action_noise=0.1,
        successes_only=True,
        workers=0,
        seed=config.seed,
        progress=config.progress,
    )
    pretrain = _pretrain(config, scale, paths)
    fewshot = replace(
        pretrain,
        data=(str(paths.demonstrations),),
        run_dir=str(paths.policy.parent),
        stage="fewshot",
        init=str(paths.generalist),
        replay=(str(paths.play),),
        steps=scale.fewshot_steps,
        lr=3e-4,
        demos_per_task=3,
    )

    return [
        collect_stage("demonstrations", demonstrations),
        Stage(
            "policy",
            _sft_settings(fewshot),
            (paths.policy / "config.json",),
            _trained(fewshot, config.progress),
            ("pretrained", "demonstrations"),
        ),
    ]


def _finish_stages(config: EmbeddedConfig, scale: Scale, paths: Paths) -> list[Stage]:
    assets = paths.assets
    packs = {layout: assets / f"starts_{layout}.safetensors" for layout in ("narrow", "wide")}

    def starts() -> None:
        assets.mkdir(parents=True, exist_ok=True)
        for layout, path in packs.items():
            make_start_pack(path, scale.starts, layout, config.seed + 3)

    def assemble() -> None:
        copied = [paths.world_model, paths.judge, paths.policy]
        if isinstance(scale.world_model, VideoScale):
            save_world_model(read_world_model(paths.world_model), assets / "world_model", half=True)
            copied.remove(paths.world_model)
        for source in copied:
            shutil.copytree(source, assets / source.name, dirs_exist_ok=True)
        _forget_folders(assets / "judge" / "config.json")

    models = ("world_model", "judge", "policy")
    measured = assets / "metrics.json"
    return [
        Stage("starts", {"per_task": scale.starts, "seed": config.seed + 3}, tuple(packs.values()), starts),
        Stage("assets", {"half": True}, tuple(assets / name / "config.json" for name in models), assemble, models),
        Stage(
            "metrics",
            {"episodes": scale.episodes, "seed": config.seed + 4},
            (measured,),
            lambda: atomic_write_json(measured, measure(config, scale, paths)),
            ("assets", "held_out_play"),
        ),
        Stage(
            "card",
            {},
            (assets / "README.md", assets / "manifest.json"),
            lambda: write_card(assets, paths.out / "stages"),
            ("metrics", "starts"),
        ),
    ]


def measure(config: EmbeddedConfig, scale: Scale, paths: Paths) -> dict[str, Any]:
    """Measure the world model on held-out play, the policy in dream and simulator, and the judge on held-out clips."""
    model = load_world_model(paths.assets / "world_model", device=config.device)
    reader = LeRobotReader(paths.held_out)
    fidelity = evaluate_fidelity(model, episodes_from_dataset(reader), progress=config.progress)
    fidelity.save(paths.out / "metrics")
    side_by_side = evaluate(
        EvaluateConfig(
            policies=(f"few-shot={paths.assets / 'policy'}",),
            episodes_per_task=scale.episodes,
            out=paths.out / "metrics",
            world_model=str(paths.assets / "world_model"),
            judge=str(paths.assets / "judge"),
            workers=config.workers,
            seed=config.seed + 4,
            device=config.device,
        ),
        progress=config.progress,
    )
    judge = json.loads((paths.judge.parent / "judge_report.json").read_text(encoding="utf-8"))
    return {
        "world_model": fidelity.as_dict(),
        "judge": judge["groups"],
        "policy": side_by_side.report["policies"],
        "run": {key: value for key, value in provenance(seed=config.seed).items() if key != "command"},
    }


def _forget_folders(path: Path) -> None:
    """Keep only the names of the data folders in a checkpoint that is published."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content["metadata"]["data"] = [Path(folder).name for folder in content["metadata"].get("data", [])]
    atomic_write_json(path, content)


def install_models(assets: Path, target: Path) -> None:
    """Replace the models in ``target``; a video world model replaces the video model there, not the scene world model."""
    for source in assets.iterdir():
        video = source.name == "world_model" and not is_scene_world_model(source)
        made = target / ("video_world_model" if video else source.name)
        if source.is_dir():
            shutil.rmtree(made, ignore_errors=True)  # another kind of model has other files
            shutil.copytree(source, made)
        else:
            shutil.copy2(source, made)
    write_manifest(target)  # of all files there
