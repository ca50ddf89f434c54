"""The paper's LIBERO recipe from data to success rates: ``python examples/libero/recipe.py --setting tiny``.

Needs the LIBERO simulator and its assets (docs/libero.md). Rerun the same command to resume; ``--stages`` runs some of them.

1. rollouts      noisy episodes on LIBERO-90, none of them on a target task
2. world_model   trained on the rollouts, then frozen
3. sft           one demonstration per target task
4. grpo          reinforcement learning in the world model, with a judge's verdict as the reward and dual-noise verification
5. evaluate      50 episodes a task, in the simulator and in the dream

``tiny`` shows that every stage runs: random rollouts, a world model of the bundled size and a policy of 0.6 M parameters, each
trained for a few steps, and a judge that tosses coins. Measured: 53 s of CPU time. Its success rates mean nothing.

``paper`` has the paper's numbers, where the paper gives them. It was never run by this project. Hours, all ESTIMATED:

    rollouts      50 core hours of simulation (4500 episodes of 400 steps at 10 steps/s), the policy's forward passes apart
    world_model   29 GPU hours on H200 (examples/world_model/libero_zero_shot.sh has the arithmetic)
    sft           22 GPU hours on one H200 (50,000 steps of 64 samples at 1.6 s, docs/openvla_oft.md has the arithmetic)
    grpo          384 GPU hours (the paper: 2 days on 8 H200)
    evaluate      5 core hours of simulation per suite, the policy's forward passes apart

It expects ``models/wan`` (rawdream world-model convert), ``models/openvla_oft_libero_90`` (OpenVLA-OFT after the paper's
150,000 steps on LIBERO-90, or the public RLinf/RLinf-OpenVLAOFT-LIBERO-90-Base-Lora), ``datasets/libero_goal`` (LIBERO's own
HDF5 files) and a vLLM server with Qwen3-VL-32B-Instruct. Several GPUs (sft and grpo also need "parallel": "ddp" in their
settings): ``torchrun --nproc-per-node 8 examples/libero/recipe.py --setting paper --stages world_model``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from rawdream_env.data.collect import CollectConfig, collect
from rawdream_env.data.import_hdf5 import ImportConfig, import_hdf5
from rawdream_env.evaluation.side_by_side.evaluate import EvaluateConfig, evaluate
from rawdream_env.evaluation.side_by_side.table import table
from rawdream_env.policies.tiny_vla import TinyVLAConfig
from rawdream_env.trainers.grpo.config import GRPOConfig
from rawdream_env.trainers.grpo.grpo import train_grpo
from rawdream_env.trainers.policy.config import SFTConfig
from rawdream_env.trainers.policy.sft import train_sft
from rawdream_env.trainers.world_model.config import StageConfig, WorldModelTrainConfig
from rawdream_env.trainers.world_model.train import train_world_model
from rawdream_env.world_models.wan.config import WanConfig

Stage = Literal["rollouts", "world_model", "sft", "grpo", "evaluate"]
STAGES: tuple[Stage, ...] = ("rollouts", "world_model", "sft", "grpo", "evaluate")
DREAM = "rawdream/LiberoGoalDream-v0"


@dataclass(frozen=True)
class Setting:
    """What differs between the settings; the values are keyword arguments of the stages' configurations."""

    rollouts: Mapping[str, Any]
    world_model: Mapping[str, Any]
    demos: Mapping[str, Any]
    """Of ``ImportConfig`` if there is ``src``, else of ``CollectConfig``: the scripted expert."""
    sft: Mapping[str, Any]
    grpo: Mapping[str, Any]
    evaluate: Mapping[str, Any]
    judge: str
    horizon: int | None = None
    """Chunks of an episode; None: the protocol's."""
    tasks: tuple[str, ...] = ()
    """Target tasks of LIBERO-Goal; empty: all ten."""


_ONE_TASK = ("turn_on_the_stove",)
SETTINGS = {
    "tiny": Setting(
        rollouts={
            "kind": "random",
            "tasks": ("KITCHEN_SCENE1_open_the_bottom_drawer_of_the_cabinet", "KITCHEN_SCENE1_put_the_black_bowl_on_the_plate"),
            "episodes": 4,
            "steps_per_episode": 40,
            "episodes_per_shard": 2,
        },
        world_model={
            "codec": "embedded",
            "model": WanConfig(pose_dim=0),
            "transformer": StageConfig(steps=4, batch_size=2, lr=1e-3, warmup=1),
            "save_every": 2,
        },
        demos={"tasks": _ONE_TASK, "episodes": 1, "steps_per_episode": 160, "successes_only": True},
        sft={"model": TinyVLAConfig(), "demos_per_task": 1, "steps": 20, "batch_size": 16, "warmup": 5, "save_every": 10},
        grpo={
            "steps": 2, "num_envs": 8, "group_size": 4, "groups_per_step": 2, "max_groups_per_step": 4, "lr": 1e-4,
            "temperature": 1.0, "save_every": 1, "task": _ONE_TASK[0],
        },
        evaluate={"episodes_per_task": 2, "num_envs": 2, "workers": 0, "diagnose": False, "videos": 0},
        judge="scripted",
        horizon=2,
        tasks=_ONE_TASK,
    ),
    "paper": Setting(
        rollouts={
            "kind": "policy",
            "policy": "models/openvla_oft_libero_90",
            "action_noise": 0.1,  # the paper gives no number
            "episodes": 4500,  # 50 a task; the paper gives no number
            "image_size": 256,
            "workers": 16,
        },
        world_model={
            "init": "models/wan",
            "model_name": "wan2.1-1.3b",
            "parallel": "fsdp2",
            "device": "cuda",
            "checkpointing": True,
            "transformer": StageConfig(steps=100_000, batch_size=12, lr=7.5e-5, warmup=1000, decay=1.0, ema=0.9999),
            "save_every": 2000,
        },
        demos={"src": "datasets/libero_goal", "per_task": 1},
        sft={
            "init": "models/openvla_oft_libero_90", "demos_per_task": 1, "steps": 50_000, "dtype": "bfloat16",
            "batch_size": 64, "microbatch_size": 8, "save_every": 1000, "device": "cuda",  # the paper gives no batch size
        },
        grpo={
            "steps": 50, "num_envs": 64, "group_size": 8, "groups_per_step": 64, "max_groups_per_step": 256, "lr": 5e-6,
            "temperature": 1.6, "warmup_steps": 0, "max_kl": None, "ema": 0.0, "microbatch_size": 8, "device": "cuda",
        },
        evaluate={"episodes_per_task": 50, "workers": 16, "device": "cuda"},
        judge="vlm_server:http://localhost:8000/v1",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Which setting, where to, and which stages."""

    setting: Literal["tiny", "paper"] = "tiny"
    """tiny: every stage in a few minutes on a CPU. paper: the paper's numbers, for several GPUs."""
    out: Path = Path("runs/libero")
    """Folder of everything that is made."""
    stages: tuple[Stage, ...] = field(default=STAGES)
    """Stages to run, in this order."""


def main(options: Options) -> None:
    """Run the stages; each reads what the ones before it wrote."""
    setting, out = SETTINGS[options.setting], options.out / options.setting
    policy = f"{out}/sft/policy"
    parts: dict[str, Any] = {"world_model": f"{out}/world_model/world_model", "judge": setting.judge}
    horizon = {} if setting.horizon is None else {"max_episode_steps": setting.horizon}
    for stage in options.stages:
        print(f"== {stage}")
        if stage == "rollouts":
            collect(CollectConfig(f"{out}/rollouts", robot="libero_90", **setting.rollouts))
        elif stage == "world_model":
            data, run = (f"{out}/rollouts",), f"{out}/world_model"
            train_world_model(WorldModelTrainConfig(data, run, objective="window", **setting.world_model))
        elif stage == "sft":
            demos = f"{out}/demos"
            if "src" in setting.demos:
                import_hdf5(ImportConfig(out=demos, **setting.demos))
            else:
                collect(CollectConfig(demos, robot="libero_goal", kind="expert", **setting.demos))
            train_sft(SFTConfig((demos,), f"{out}/sft", stage="fewshot", **setting.sft))
        elif stage == "grpo":
            dream = {**parts, **horizon}
            train_grpo(GRPOConfig(out / "grpo", env_id=DREAM, env_kwargs=dream, policy=policy, **setting.grpo))
        else:
            result = evaluate(
                EvaluateConfig(
                    policies=(f"sft={policy}", f"grpo={out}/grpo/policy"),
                    tasks=setting.tasks,
                    out=out / "evaluate",
                    dream_env=DREAM,
                    **parts,
                    **horizon,
                    **setting.evaluate,
                )
            )
            print(table(result.report))


if __name__ == "__main__":  # the workers are spawned processes
    main(tyro.cli(Options))
