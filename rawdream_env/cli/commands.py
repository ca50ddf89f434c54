"""The table of subcommands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Command:
    """A subcommand: ``function(config)`` of ``module``.

    ``show`` turns the result into printed text and an exit code (None: print nothing). ``old`` is the former name of the
    subcommand; ``renamed`` maps former options to current ones, with dots for nested options; ``dropped`` lists former flags
    without effect; ``second`` is the option that was the second positional argument.
    """

    help: str
    module: str
    config: str
    function: str
    show: Callable[[Any], tuple[str, int]] | None = None
    old: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    second: str = ""


def _folder(result: Any) -> tuple[str, int]:
    return f"Written to {result}.", 0


def _judge(result: Any) -> tuple[str, int]:
    return f"{result.report.table()}\nThe judge is in {result.folder}.", 0


def _sft(result: Any) -> tuple[str, int]:
    numbers = [f"{name} {value:.4g}" for name, value in result.validation.items()]
    numbers += [f"simulator, {task}: {rate}" for task, rate in result.success.items()]
    return "\n".join([f"{result.steps} steps done.", *numbers]), 0


def _grpo(result: Any) -> tuple[str, int]:
    said = f"{result.message}\n" if result.stopped == "steps" else ""  # other endings are logged
    return f"{said}The policy is in {result.run_dir}/policy.", 130 if result.stopped == "interrupted" else 0


def _evaluation(result: Any) -> tuple[str, int]:
    from rawdream_env.evaluation.side_by_side.table import table

    return table(result.report), 0


def _world_model(result: Any) -> tuple[str, int]:
    return f"{result.table()}\nThe report is {result.folder}/report.html.", 0


def _watched(result: Any) -> tuple[str, int]:
    from rawdream_env.evaluation.judges.watch import summary

    return summary(result)


def _text(result: Any) -> tuple[str, int]:
    return str(result), 0


def _report(result: Any) -> tuple[str, int]:
    return str(result), 0 if result.healthy else 1


def _code(result: Any) -> tuple[str, int]:
    return "", int(result)


TITLES = {
    "demo": "Start here",
    "data": "Data",
    "world-model": "World model",
    "judge": "Judge",
    "policy": "Policy",
    "camera": "Hardware",
    "models": "More",
}
"""Headings of ``rawdream --help``, by the first word of the first command below them."""

_TRAINERS, _EVALUATION = "rawdream_env.trainers", "rawdream_env.evaluation"
COMMANDS: dict[str, Command] = {
    "demo": Command(
        "train the bundled policy in the world model, then evaluate it in the simulator (10 minutes; --long: 20)",
        "rawdream_env.demo", "DemoConfig", "run_demo", _text,
        renamed={"sim_workers": "workers"},
    ),
    "doctor": Command(
        "check this machine and suggest fixes",
        "rawdream_env.doctor", "DoctorConfig", "run_doctor", _report,
    ),
    "data collect": Command(
        "record play, demonstrations or policy rollouts in the simulator as a LeRobotDataset v3.0",
        "rawdream_env.data.collect", "CollectConfig", "collect", _folder,
        old="collect", renamed={"root": "out"},
    ),
    "data teleop": Command(
        "record episodes that a person drives (keyboard, gamepad, master arm) as a LeRobotDataset v3.0",
        "rawdream_env.piper.teleop.session", "TeleopConfig", "teleoperate", _folder,
    ),
    "data import-hdf5": Command(
        "convert LIBERO or robomimic demonstrations to a LeRobotDataset v3.0",
        "rawdream_env.data.import_hdf5", "ImportConfig", "import_hdf5", _folder,
        old="import-hdf5", renamed={"root": "out"},
    ),
    "starts export": Command(
        "render starts in the simulator and write them to a start pack, for dreams without the simulator",
        "rawdream_env.starts.export", "ExportStartsConfig", "export_starts", _folder,
    ),
    "world-model train": Command(
        "train the frame codec and the video transformer on recorded episodes",
        f"{_TRAINERS}.world_model.train", "WorldModelTrainConfig", "train_world_model", _folder,
        old="train-world-model", renamed={"out": "run_dir", "model.carry": "model.warp_last_frame"},
        dropped=("fit_memory",),
    ),
    "world-model convert": Command(
        "convert Wan 2.1 weights to a world model (diffusers folder or original release)",
        "rawdream_env.world_models.wan.convert", "ConvertWanConfig", "convert_wan", _folder,
        old="convert-wan", second="out",
    ),
    "world-model evaluate": Command(
        "compare imagined frames with recorded frames and write a report",
        f"{_EVALUATION}.world_model.evaluate", "EvaluateWorldModelConfig", "evaluate_world_model", _world_model,
        old="evaluate-world-model",
    ),
    "judge train": Command(
        "train the classifier that decides whether an instruction was completed",
        f"{_TRAINERS}.judge.train", "JudgeTrainConfig", "train_judge", _judge,
        old="train-judge", renamed={"out": "run_dir"},
    ),
    "judge train-reward-model": Command(
        "train the paper's one-shot reward model (VideoMAE) on a few demonstrations per task",
        f"{_TRAINERS}.judge.reward_model", "RewardModelConfig", "train_reward_model", _text,
        old="train-reward-model", renamed={"out": "run_dir"},
    ),
    "judge evaluate": Command(
        "measure a judge against the simulator (precision, recall, false positives) and write a report",
        f"{_EVALUATION}.judges.evaluate", "EvaluateJudgeConfig", "evaluate_judge", _text,
    ),
    "judge watch": Command(
        "judge one video file",
        f"{_EVALUATION}.judges.watch", "WatchConfig", "watch", _watched,
    ),
    "policy sft": Command(
        "pre-train a policy on play, or fine-tune it on a few demonstrations",
        f"{_TRAINERS}.policy.sft", "SFTConfig", "train_sft", _sft,
        old="sft", renamed={"out": "run_dir"},
    ),
    "policy grpo": Command(
        "improve a policy by reinforcement learning (GRPO) in the world model",
        f"{_TRAINERS}.grpo.grpo", "GRPOConfig", "train_grpo", _grpo,
        old="grpo",
    ),
    "plan": Command(
        "estimate memory and time of a GRPO step on given GPUs, before anything starts",
        f"{_TRAINERS}.grpo.plan", "PlanConfig", "plan", _text,
    ),
    "policy evaluate": Command(
        "evaluate policies in the dream and in the simulator from the same starts; write a report",
        f"{_EVALUATION}.side_by_side.evaluate", "EvaluateConfig", "evaluate", _evaluation,
        old="evaluate", renamed={"output": "out", "sim_workers": "workers"},
    ),
    "policy compare": Command(
        "compare the success rates of several evaluations of the same protocol",
        f"{_EVALUATION}.side_by_side.compare", "CompareConfig", "compare", _text,
    ),
    "camera check": Command(
        "show what the policy will see beside what the world model was trained on",
        f"{_EVALUATION}.camera", "CameraCheckConfig", "check_camera", _text,
    ),
    "camera calibrate": Command(
        "find where the camera stands, from points or AprilTags, for the arm map",
        "rawdream_env.piper.calibration", "CalibrateConfig", "calibrate", _text,
    ),
    "models train": Command(
        "train the bundled models from scratch, stage by stage",
        "rawdream_env.recipes.piper_bundled", "EmbeddedConfig", "train_embedded", _text,
        old="train-embedded",
    ),
    "bench": Command(
        "run the benchmarks (needs a clone of the repository)",
        "rawdream_env.cli.bench", "BenchConfig", "run_bench", _code,
    ),
    "completion": Command(
        "print a completion script for bash, zsh or fish",
        "rawdream_env.cli.completion", "CompletionConfig", "completion", _text,
    ),
}  # fmt: skip

OLD_NAMES = {command.old: name for name, command in COMMANDS.items() if command.old}
"""Former name -> name."""
