"""``rawdream demo``: train a policy in the dream, then evaluate it in the simulator.

1. Train the bundled few-shot policy with GRPO in the dream (paper section 3): at most 60 updates or 15 minutes; with ``long``
   120 updates or 30 minutes.
2. Evaluate the policy before and after training, from the same starts, in the dream and in the simulator.
3. Print a table with intervals, and write ``report.html`` (with dreamed success over the updates) and ``dream.gif``.

Nothing is downloaded. Rerun the same command to resume an interrupted demo; with ``long``, to go on from a short one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rawdream_env.errors import InvalidOptionError

if TYPE_CHECKING:
    from rawdream_env.evaluation.side_by_side.evaluate import EvaluateConfig
    from rawdream_env.evaluation.side_by_side.records import SideBySide
    from rawdream_env.trainers.grpo import GRPOConfig

BEFORE, AFTER = "before", "after dreaming"
SECONDS_PER_EPISODE = 0.45
"""Time of one start per policy on two cores, dream and simulator together, for the printed estimate."""


@dataclass(frozen=True)
class DemoConfig:
    """Options of ``rawdream demo``."""

    out: Path = Path("runs/demo")
    """Folder for report.html, dream.gif, report.json and the training run."""
    long: bool = False
    """Train longer: at most 120 updates or 30 minutes, whichever ends first, instead of 60 updates or 15 minutes."""
    minutes: float | None = None
    """Maximum training time in the dream; default: 15, or 30 with --long. Rerunning the command adds this time again."""
    episodes: int = 25
    """Starts per task in the evaluation (four tasks, two policies, dream and simulator)."""
    steps: int | None = None
    """Maximum number of policy updates; default: 60, or 120 with --long."""
    num_envs: int = 64
    """Number of episodes imagined in parallel in training; fewer need less memory."""
    lr: float = 2e-4
    """AdamW learning rate, after a warm-up of a few steps."""
    temperature: float = 0.7
    """Sampling temperature in training and in the evaluation: the policy learns to act with this much noise."""
    policy: str = "embedded"
    """Policy to improve: "embedded", a folder, a hub id, or module:factory."""
    world_model: str = "embedded"
    """World model: "embedded", a folder, a hub id, or module:factory."""
    judge: str = "state"
    """Judge: "state" (whether the task is done in the state that the world model imagines), "embedded" (the bundled judge of
    videos), a folder, a server, a hub id, or module:factory."""
    dtype: str = "bfloat16"
    """Precision of the world model: "bfloat16" is faster, "float32" is bit-reproducible."""
    num_inference_steps: int = 1
    """Denoising steps per chunk: 5 as in the paper, 1 is faster."""
    starts: str = "pack"
    """Start frames for training: "pack" (bundled), "sim" (rendered), or a .safetensors file or folder of images."""
    workers: int = 2
    """Simulator processes; 0: none besides this one, -1: one per core."""
    seed: int = 0
    """Seed of training and evaluation."""
    progress: bool = True
    """Show progress bars and messages."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        steps, minutes = self.budget
        if minutes <= 0 or self.episodes < 1 or steps < 1:
            raise InvalidOptionError(f"minutes={minutes}, episodes={self.episodes} and steps={steps} must be above 0.")

    @property
    def budget(self) -> tuple[int, float]:
        """Maximum number of updates and of minutes of training."""
        steps, minutes = (120, 30.0) if self.long else (60, 15.0)
        return steps if self.steps is None else self.steps, minutes if self.minutes is None else self.minutes


@dataclass(frozen=True)
class DemoResult:
    """``report`` as in report.json, and the written files; ``str()`` is the printed summary."""

    report: dict[str, Any]
    page: Path
    film: Path
    training: str

    def __str__(self) -> str:
        from rawdream_env.evaluation.side_by_side.table import table

        return f"{self.training}\n\n{curve_text(self.report)}{table(self.report)}\n\nreport  {self.page}\nfilm    {self.film}"


def run_demo(config: DemoConfig) -> DemoResult:
    """Train, evaluate, and write the report and the film.

    Raises:
        CheckpointError: the bundled models are missing or damaged (see `rawdream doctor`).
        RendererError: the simulator cannot render; the training run is kept.
        RunDirError: ``out`` holds a demo with other options.
    """
    from rawdream_env.evaluation.side_by_side.evaluate import evaluate
    from rawdream_env.trainers.common.run_dir import read_jsonl
    from rawdream_env.trainers.grpo import train_grpo

    begun = time.monotonic()
    steps, minutes = config.budget
    about = config.episodes * 4 * 2 * SECONDS_PER_EPISODE / 60
    _say(
        config,
        f"1/3  GRPO in the dream: at most {steps} updates or {minutes:g} minutes (Ctrl-C stops; rerun to resume)",
    )
    training = train_grpo(grpo_config(config))
    if training.stopped == "interrupted":
        raise KeyboardInterrupt
    _say(
        config,
        f"2/3  evaluation before and after, in dream and simulator: {config.episodes} starts per task, ~{about:.0f} minutes",
    )
    curve = training_curve(read_jsonl(config.out / "grpo" / "metrics.jsonl"), config.temperature)
    result = evaluate(evaluate_config(config), training=curve, progress=config.progress)
    _say(config, "3/3  film")
    film = _write_film(config, result)
    said = f"{training.message} The demo took {(time.monotonic() - begun) / 60:.1f} minutes."
    return DemoResult(result.report, config.out / "report.html", film, said)


def grpo_config(config: DemoConfig) -> GRPOConfig:
    """Options of the demo's training run."""
    from rawdream_env.trainers.grpo import GRPOConfig

    steps, minutes = config.budget
    return GRPOConfig(
        run_dir=config.out / "grpo",
        policy=config.policy,
        env_kwargs={
            "world_model": config.world_model,
            "judge": config.judge,
            "starts": config.starts,
            "dtype": config.dtype,
            "num_inference_steps": config.num_inference_steps,
        },
        num_envs=config.num_envs,
        steps=steps,
        minutes=minutes,
        lr=config.lr,
        temperature=config.temperature,
        save_every=1,
        seed=config.seed,
        progress=config.progress,
    )


def evaluate_config(config: DemoConfig) -> EvaluateConfig:
    """Options of the demo's evaluation. Its starts differ from those of the training."""
    from rawdream_env.evaluation.side_by_side.evaluate import EvaluateConfig

    return EvaluateConfig(
        policies=(f"{BEFORE}={config.policy}", f"{AFTER}={config.out / 'grpo' / 'policy'}"),
        episodes_per_task=config.episodes,
        out=config.out,
        world_model=config.world_model,
        judge=config.judge,
        dtype=config.dtype,
        num_inference_steps=config.num_inference_steps,
        temperature=config.temperature,
        diagnose=False,
        workers=config.workers,
        seed=config.seed + 1,
    )


# -- output -----------------------------------------------------------------------------------------------------------


def training_curve(rows: Sequence[Mapping[str, Any]], temperature: float) -> dict[str, Any]:
    """Dreamed success over training, from the lines of ``metrics.jsonl``: windows of about five updates (more in long runs),
    each with its first and last update, and the rates over all rollouts and per task id, without flagged and INVALID ones.
    """
    count = max(1, len(rows) // (5 * -(-len(rows) // 80))) if rows else 0
    windows = []
    for i in range(count):
        first, last = len(rows) * i // count, len(rows) * (i + 1) // count
        some = rows[first:last]
        ids = sorted({key.rpartition("_")[2] for row in some for key in row if key.startswith("n/task_")})
        tasks = {task: _dreamed(some, f"/task_{task}") for task in ids}
        windows.append({"updates": [first + 1, last], "all": _dreamed(some, ""), "tasks": tasks})
    return {"temperature": temperature, "windows": windows}


def _dreamed(rows: Sequence[Mapping[str, Any]], suffix: str) -> dict[str, Any]:
    from rawdream_env.statistics import Rate

    counts = [(row.get(f"trusted{suffix}", 0), row.get(f"trusted_success_rate{suffix}") or 0.0) for row in rows]
    return Rate.of(sum(round(n * rate) for n, rate in counts), sum(n for n, _ in counts)).as_dict()


def curve_text(report: Mapping[str, Any]) -> str:
    """Dreamed success in the first and the last updates, per task; empty without an update."""
    from rawdream_env.evaluation.reporting.numbers import aligned, rate_text

    training = report["training"]
    windows = training["windows"]
    if not windows:
        return ""
    ends = windows if len(windows) == 1 else [windows[0], windows[-1]]
    columns = [f"updates {first}-{last}" for first, last in (window["updates"] for window in ends)]
    lines = [[f"dream, training at T = {training['temperature']:g}", *columns]]
    lines.append(["all tasks", *(rate_text(window["all"]) for window in ends)])
    for number, task in enumerate(report["policies"][0]["tasks"]):
        rates = [window["tasks"].get(str(number)) for window in ends]
        lines.append([task, *("-" if rate is None else rate_text(rate) for rate in rates)])
    return "\n".join(aligned(lines)) + "\n\n"


def _write_film(config: DemoConfig, result: SideBySide) -> Path:
    """Dream and simulator side by side, one episode per task."""
    from rawdream_env.evaluation.side_by_side.film import chosen_clips, write_film
    from rawdream_env.robots import find_robot
    from rawdream_env.world_models import load_world_model

    model = load_world_model(config.world_model, dtype=config.dtype, num_inference_steps=config.num_inference_steps)
    robot = find_robot(getattr(model, "robot", ""))
    return write_film(chosen_clips(result.clips, AFTER), config.out / "dream.gif", model, robot)


def _say(config: DemoConfig, text: str) -> None:
    if config.progress:
        print(text, flush=True)
