"""The stages that train the judge: imagined clips of other play and of policies in training, then the judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rawdream_env.data.collect import CollectConfig
from rawdream_env.judges.embedded_network import EmbeddedJudgeConfig
from rawdream_env.piper.relations import NON_TASK_RELATIONS
from rawdream_env.recipes.folders import Paths, collect_stage, settings_of
from rawdream_env.recipes.presets import Scale, SceneScale
from rawdream_env.trainers.common.stages import Stage
from rawdream_env.trainers.judge.config import JudgeTrainConfig
from rawdream_env.trainers.judge.dream_clips import DreamClipsConfig, make_dream_clips
from rawdream_env.trainers.judge.train import train_judge


def judge_stages(scale: Scale, paths: Paths, *, device: str, seed: int, workers: int, progress: bool) -> list[Stage]:
    """The stages, in order; they need the world model's and the data of play.

    A policy that is trained against a judge looks for its errors, so the judge also sees what policies do that were
    trained in the first world model, here asked for relations that are no task. That model paints like the last one. Such
    policies seldom succeed at what they were not trained on, so a scripted expert shows the same relations done, and a shaky
    one nearly done.
    """
    scene = scale.world_model if isinstance(scale.world_model, SceneScale) else None
    painted, model = (
        ("first_world_model", paths.first_scene / "world_model") if scene else ("world_model", paths.world_model)
    )
    stages: list[Stage] = []

    def dreams(name: str, data: Path, clips: int, seed: int) -> Path:
        folder = paths.out / name
        wanted = DreamClipsConfig(
            data=str(data), out=str(folder), world_model=str(model), clips=clips, seed=seed, device=device,
            progress=progress,
        )  # fmt: skip

        def imagine() -> None:
            make_dream_clips(wanted)

        stages.append(Stage(name, settings_of(wanted), (folder,), imagine, (data.name, painted)))
        return folder

    imagined = [dreams("dreams", paths.other_play, scale.dream_clips, seed)]
    rollouts = []
    for i, (name, noise) in enumerate((("placed", 0.2), ("fumbled", 0.7))):  # with much noise it often never lets go
        out = paths.out / "data" / name
        expert = CollectConfig(
            out=str(out), kind="expert", episodes=scale.expert_episodes, action_noise=noise, tasks=NON_TASK_RELATIONS,
            workers=workers, seed=seed + 20 + i, progress=progress,
        )  # fmt: skip
        stages.append(collect_stage(name, expert))
        rollouts.append(out)
        imagined.append(dreams(f"{name}_dreams", out, scale.expert_clips, seed + 20 + i))
    for i in range(scene.dreamers if scene else 0):
        name, out = f"dreamer_rollouts_{i}", paths.out / "data" / f"dreamer_rollouts_{i}"
        collected = CollectConfig(
            out=str(out), kind="policy", policy=str(paths.dreamer(i)), episodes=scale.dreamer_episodes, temperature=0.7,
            action_noise=0.05, tasks=NON_TASK_RELATIONS, workers=workers, seed=seed + 5 + i,
            progress=progress,
        )  # fmt: skip
        stages.append(collect_stage(name, collected, ("dreamers",)))
        rollouts.append(out)
        imagined.append(dreams(f"dreamer_dreams_{i}", out, scale.dreamer_clips, seed + 1 + i))
    train = JudgeTrainConfig(
        data=tuple(map(str, (paths.play, paths.rollouts, *rollouts))),
        run_dir=str(paths.judge.parent),
        imagined=tuple(map(str, imagined)) if scale.judge_on_dreams else (),
        imagined_share=scale.imagined_share,
        steps=scale.judge_steps,
        batch_size=scale.judge_batch,
        validation_share=scale.judge_validation,
        seed=seed,
        device=device,
        model=EmbeddedJudgeConfig(hold=4),
    )

    def run() -> dict[str, Any]:
        report = train_judge(train, progress=progress).report.as_dict()["groups"]
        return {"validation": report}

    needs = ("play", "rollouts", *(folder.name for folder in rollouts), *(folder.name for folder in imagined))
    return [*stages, Stage("judge", settings_of(train), (paths.judge / "config.json",), run, needs)]
