"""``rawdream demo``: a policy practises in a dream, and the simulator says whether it got better.

1. GRPO in the dream (paper section 3), from the shipped few-shot policy, for ``minutes``.
2. Side by side: the policy before and after, the same starts, in the dream and in the simulator.
3. A table with intervals, ``report.html`` and ``dream.gif`` in the output folder.

Everything it uses ships with the package; nothing is downloaded. The same command on the same folder goes on where it
was interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
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
"""What one start costs per policy on two cores, dream and simulator together: only to say how long it will take."""


@dataclass(frozen=True)
class DemoConfig:
    """Options of ``rawdream demo``."""

    out: Path = Path("runs/demo")
    """Folder for report.html, dream.gif, report.json and the training run."""
    minutes: float = 5.0
    """Training time in the dream; the same command again trains for as long again."""
    episodes: int = 25
    """Starts per task in the comparison (four tasks, two policies, two worlds)."""
    steps: int = 50
    """Most policy updates; the minutes usually end first."""
    num_envs: int = 64
    """Episodes dreamt side by side in training; fewer need less memory."""
    lr: float = 1e-4
    """Learning rate of the policy."""
    temperature: float = 0.7
    """Sampling temperature in training; the comparison is greedy."""
    policy: str = "embedded"
    """Policy to improve: "embedded" or a folder."""
    world_model: str = "embedded"
    """The dream: "embedded" or a folder."""
    judge: str = "embedded"
    """Its judge: "embedded" or a folder."""
    dtype: str = "bfloat16"
    """Precision of the dream: "bfloat16" is the fast option, "float32" the bit-reproducible one."""
    num_inference_steps: int = 1
    """Evaluations of the world model's sampler per chunk; 5 is the paper's, 1 the fast option."""
    starts: str = "pack"
    """Where dreams begin in training: "pack" (shipped), "sim", or a start pack."""
    sim_workers: int = 2
    """Simulator processes; 0 runs it in this one."""
    seed: int = 0
    """Names every random draw, in training and comparison."""
    progress: bool = True
    """Show progress bars and say what happens."""

    def __post_init__(self) -> None:
        """Refuse budgets that leave nothing to show."""
        if self.minutes <= 0 or self.episodes < 1 or self.steps < 1:
            raise InvalidOptionError(
                f"minutes {self.minutes}, episodes {self.episodes}, steps {self.steps}: each must be above 0."
            )


@dataclass(frozen=True)
class DemoResult:
    """``report`` as in report.json; the files written; ``str()`` is what a newcomer reads at the end."""

    report: dict[str, Any]
    page: Path
    film: Path
    training: str

    def __str__(self) -> str:
        return f"{self.training}\n\n{table(self.report)}\n\nreport  {self.page}\nfilm    {self.film}"


def run_demo(config: DemoConfig) -> DemoResult:
    """Train, compare, and write the report and the film.

    Raises:
        CheckpointError: the embedded models are missing or damaged (`rawdream doctor` says more).
        RendererError: the simulator cannot draw; the training part is kept.
        RunDirError: ``out`` holds a demo with other options.
    """
    from rawdream_env.evaluation.side_by_side.evaluate import evaluate
    from rawdream_env.trainers.grpo import train_grpo

    begun = time.monotonic()
    about = config.episodes * 4 * 2 * SECONDS_PER_EPISODE / 60
    _say(config, f"1/3  GRPO in the dream: {config.minutes:g} minutes (Ctrl-C stops; the same command goes on)")
    training = train_grpo(grpo_config(config))
    if training.stopped == "interrupted":
        raise KeyboardInterrupt
    _say(config, f"2/3  before and after, in both worlds: {config.episodes} starts per task, about {about:.0f} minutes")
    result = evaluate(evaluate_config(config), progress=config.progress)
    _say(config, "3/3  film")
    film = write_film(result, config.out / "dream.gif")
    minutes = (time.monotonic() - begun) / 60
    said = f"{training.message} The demo took {minutes:.1f} minutes."
    return DemoResult(result.report, config.out / "report.html", film, said)


def grpo_config(config: DemoConfig) -> GRPOConfig:
    """The training run of the demo."""
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
    """The comparison of the demo. Its starts are others than those of the training."""
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
        workers=config.sim_workers,
        seed=config.seed + 1,
    )


# -- what is shown -----------------------------------------------------------------------------------------------------


def table(report: Mapping[str, Any]) -> str:
    """Success rates of a side-by-side report as text: a line per policy and task, dream beside simulator."""
    from rawdream_env.evaluation.reporting.numbers import rate_text

    lines = [("policy", "task", "dream", "simulator")]
    for entry in report["policies"]:
        parts = {"all tasks": entry["all"], **entry["tasks"]}
        for number, (task, part) in enumerate(parts.items()):
            name = "" if number else entry["name"]
            lines.append((name, task, rate_text(part["dream"]), rate_text(part["simulator"])))
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    text = ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "-" * max(map(len, text)))
    return "\n".join([*text, *_gains(report), *_conclusions(report)])


def _gains(report: Mapping[str, Any]) -> list[str]:
    lines = []
    for entry in report["policies"]:
        for world, gain in entry.get("gain", {}).items():
            if gain["value"] is None:
                number = f"not measured, n={gain['n']}"
            else:
                known = gain["low"] is not None and gain["high"] is not None
                ends = f"{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}" if known else "no interval"
                number = f"{100 * gain['value']:+.1f} points [{ends}], n={gain['n']} starts"
            lines.append(f"gain of {entry['name']!r} over {report['reference']!r}, {world}: {number}")
    return lines


def _conclusions(report: Mapping[str, Any]) -> list[str]:
    """What the gains mean, in words: a dreamed gain counts for nothing without the simulator's."""
    lines = []
    for entry in report["policies"]:
        gain = entry.get("gain")
        if not gain or any(gain[world]["low"] is None for world in ("dream", "simulator")):
            continue
        dream, simulator = gain["dream"], gain["simulator"]
        if simulator["low"] > 0:
            said = "really got better: the simulator confirms it."
        elif simulator["high"] < 0:
            said = "really got worse."
            if dream["low"] > 0:
                said = "got better in the dream and worse in the simulator: it learned where the dream is wrong."
        else:
            said = "neither gained nor lost clearly in the simulator; more starts would narrow the interval."
        lines.append(f"{entry['name']!r} {said}")
    return lines


def chosen_clips(clips: list[Clip], policy: str = AFTER) -> list[Clip]:
    """One clip per task for the film: of ``policy`` where there is one, an agreeing success where there is one."""
    order = ("both succeed", "only the dream succeeds", "only the simulator succeeds", "both fail")

    def rank(clip: Clip) -> tuple[bool, int]:
        return clip.record.policy != policy, order.index(clip.kind) if clip.kind in order else len(order)

    best: dict[str, Clip] = {}
    for clip in sorted(clips, key=rank):
        best.setdefault(clip.record.task, clip)
    return list(best.values())


def write_film(result: SideBySide, path: Path, *, every: int = 2) -> Path:
    """Dream beside simulator, one episode per task after the other; every second frame at 10 Hz, so twice as fast."""
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
        pictures += [*film, *film[-1:] * 6]  # a moment to read the verdict
    atomic_write_bytes(path, encode(pictures, 10.0, "gif"))
    return path


def _say(config: DemoConfig, text: str) -> None:
    if config.progress:
        print(text, flush=True)
