"""``rawdream demo``: train a policy in the dream, then evaluate it in the simulator.

1. Train the bundled few-shot policy with GRPO in the dream (paper section 3) for ``minutes``.
2. Evaluate the policy before and after training, from the same starts, in the dream and in the simulator.
3. Print a table with intervals, and write ``report.html`` and ``dream.gif``.

Nothing is downloaded. Rerun the same command to resume an interrupted demo.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rawdream_env.errors import InvalidOptionError

if TYPE_CHECKING:
    from rawdream_env.evaluation.side_by_side.evaluate import EvaluateConfig
    from rawdream_env.evaluation.side_by_side.records import Clip, SideBySide
    from rawdream_env.trainers.grpo import GRPOConfig

BEFORE, AFTER = "before", "after dreaming"
SECONDS_PER_EPISODE = 0.45
"""Time of one start per policy on two cores, dream and simulator together, for the printed estimate."""


@dataclass(frozen=True)
class DemoConfig:
    """Options of ``rawdream demo``."""

    out: Path = Path("runs/demo")
    """Folder for report.html, dream.gif, report.json and the training run."""
    minutes: float = 6.0
    """Training time in the dream. Rerunning the command adds this time again."""
    episodes: int = 25
    """Starts per task in the evaluation (four tasks, two policies, dream and simulator)."""
    steps: int = 60
    """Maximum number of policy updates; usually ``minutes`` ends training first."""
    num_envs: int = 64
    """Number of episodes imagined in parallel in training; fewer need less memory."""
    lr: float = 2e-4
    """AdamW learning rate, after a warm-up of a few steps."""
    temperature: float = 0.7
    """Sampling temperature in training; the evaluation is greedy."""
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
        if self.minutes <= 0 or self.episodes < 1 or self.steps < 1:
            raise InvalidOptionError(
                f"minutes={self.minutes}, episodes={self.episodes} and steps={self.steps} must be above 0."
            )


@dataclass(frozen=True)
class DemoResult:
    """``report`` as in report.json, and the written files; ``str()`` is the printed summary."""

    report: dict[str, Any]
    page: Path
    film: Path
    training: str

    def __str__(self) -> str:
        from rawdream_env.evaluation.side_by_side.table import table

        return f"{self.training}\n\n{table(self.report)}\n\nreport  {self.page}\nfilm    {self.film}"


def run_demo(config: DemoConfig) -> DemoResult:
    """Train, evaluate, and write the report and the film.

    Raises:
        CheckpointError: the bundled models are missing or damaged (see `rawdream doctor`).
        RendererError: the simulator cannot render; the training run is kept.
        RunDirError: ``out`` holds a demo with other options.
    """
    from rawdream_env.evaluation.side_by_side.evaluate import evaluate
    from rawdream_env.trainers.grpo import train_grpo

    begun = time.monotonic()
    about = config.episodes * 4 * 2 * SECONDS_PER_EPISODE / 60
    _say(config, f"1/3  GRPO in the dream: {config.minutes:g} minutes (Ctrl-C stops; rerun to resume)")
    training = train_grpo(grpo_config(config))
    if training.stopped == "interrupted":
        raise KeyboardInterrupt
    _say(
        config,
        f"2/3  evaluation before and after, in dream and simulator: {config.episodes} starts per task, ~{about:.0f} minutes",
    )
    result = evaluate(evaluate_config(config), progress=config.progress)
    _say(config, "3/3  film")
    film = write_film(result, config.out / "dream.gif")
    minutes = (time.monotonic() - begun) / 60
    said = f"{training.message} The demo took {minutes:.1f} minutes."
    return DemoResult(result.report, config.out / "report.html", film, said)


def grpo_config(config: DemoConfig) -> GRPOConfig:
    """Options of the demo's training run."""
    from rawdream_env.trainers.grpo import GRPOConfig

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
        steps=config.steps,
        minutes=config.minutes,
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
        diagnose=False,
        workers=config.workers,
        seed=config.seed + 1,
    )


# -- output -----------------------------------------------------------------------------------------------------------


def chosen_clips(clips: list[Clip], policy: str = AFTER) -> list[Clip]:
    """One clip per task for the film; prefers clips of ``policy``, then clips where both worlds succeed."""
    order = ("both succeed", "only the dream succeeds", "only the simulator succeeds", "both fail")

    def rank(clip: Clip) -> tuple[bool, int]:
        return clip.record.policy != policy, order.index(clip.kind) if clip.kind in order else len(order)

    best: dict[str, Clip] = {}
    for clip in sorted(clips, key=rank):
        best.setdefault(clip.record.task, clip)
    return list(best.values())


def write_film(result: SideBySide, path: Path, *, every: int = 2) -> Path:
    """Dream and simulator side by side, one episode per task; every second frame at 10 Hz: twice the real speed."""
    from rawdream_env.files import atomic_write_bytes
    from rawdream_env.types import Outcome
    from rawdream_env.wrappers.drawing import Panel, compose, encode

    words = {Outcome.SUCCESS: "success", Outcome.FAILURE: "failure", Outcome.INVALID: "invalid"}
    pictures = []
    for clip in chosen_clips(result.clips):
        dreamt = words[Outcome(clip.record.dream)]
        happened = "success" if clip.happened else "failure"
        panels = [Panel("dream", clip.right[::every], dreamt), Panel("simulator", clip.left[::every], happened)]
        film = list(compose(panels, dreamt, clip.instruction))
        pictures += [*film, *film[-1:] * 6]  # time to read the verdict
    atomic_write_bytes(path, encode(pictures, 10.0, "gif"))
    return path


def _say(config: DemoConfig, text: str) -> None:
    if config.progress:
        print(text, flush=True)
