"""The ``rawdream`` command: one subcommand per job, each configured by the frozen dataclass of its function.

    rawdream demo                     let a policy practise in a dream, and ask the simulator
    rawdream train-world-model --help every option with its default
    rawdream grpo --run-dir runs/grpo --minutes 10

The table below is all there is to a subcommand. Nothing is imported before a subcommand is chosen, so that
``rawdream --help`` answers at once. Exit codes: 0 done, 1 something is not as it should be (``doctor``, ``bench``),
2 an error that can be mended (one sentence on stderr; ``--debug`` shows the traceback), 3 the judge is away: the same
command goes on when it is back, 130 interrupted.
"""

from __future__ import annotations

import difflib
import errno
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from rawdream_env.errors import InvalidOptionError, JudgeUnavailableError, MissingDependencyError, RawDreamError


@dataclass(frozen=True)
class Command:
    """A subcommand: ``function(config)`` of ``module``, and how to ``show`` what it returns (None: print nothing).

    ``show`` returns the text to print and the exit code.
    """

    help: str
    module: str
    config: str
    function: str
    show: Callable[[Any], tuple[str, int]] | None = None


def _folder(result: Any) -> tuple[str, int]:
    return f"Written to {result}.", 0


def _judge(result: Any) -> tuple[str, int]:
    return f"{result.report.table()}\nThe judge is in {result.folder}.", 0


def _sft(result: Any) -> tuple[str, int]:
    numbers = [f"{name} {value:.4g}" for name, value in result.validation.items()]
    numbers += [f"simulator, {task}: {rate}" for task, rate in result.success.items()]
    return "\n".join([f"{result.steps} steps done.", *numbers]), 0


def _grpo(result: Any) -> tuple[str, int]:
    said = f"{result.message}\n" if result.stopped == "steps" else ""  # any other end has been logged
    return f"{said}The policy is in {result.run_dir}/policy.", 130 if result.stopped == "interrupted" else 0


def _evaluation(result: Any) -> tuple[str, int]:
    from rawdream_env.demo import table

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


_TRAINERS, _EVALUATION = "rawdream_env.trainers", "rawdream_env.evaluation"
COMMANDS: dict[str, Command] = {
    "demo": Command(
        "let the shipped policy practise in the shipped dream; did it get better in the simulator? (10 minutes)",
        "rawdream_env.demo", "DemoConfig", "run_demo", _text,
    ),
    "doctor": Command(
        "check that this machine has what is needed, and say how to mend what is not",
        "rawdream_env.doctor", "DoctorConfig", "run_doctor", _report,
    ),
    "collect": Command(
        "record play, demonstrations or a policy in the simulator (LeRobotDataset v3.0)",
        "rawdream_env.data.collect", "CollectConfig", "collect", _folder,
    ),
    "import-hdf5": Command(
        "turn LIBERO or robomimic demonstration files into a data set (LeRobotDataset v3.0)",
        "rawdream_env.data.import_hdf5", "ImportConfig", "import_hdf5", _folder,
    ),
    "convert-wan": Command(
        "make a world model of Wan 2.1's weights: a folder of diffusers or of Wan's release",
        "rawdream_env.world_models.wan.convert", "ConvertWanConfig", "convert_wan", _folder,
    ),
    "train-world-model": Command(
        "train the dream: autoencoder and video transformer, from play data",
        f"{_TRAINERS}.world_model.train", "WorldModelTrainConfig", "train_world_model", _folder,
    ),
    "train-judge": Command(
        "train the judge that says whether an instruction was carried out in a video",
        f"{_TRAINERS}.judge.train", "JudgeTrainConfig", "train_judge", _judge,
    ),
    "train-reward-model": Command(
        "train the paper's one-shot reward model (VideoMAE) on a few demonstrations a task",
        f"{_TRAINERS}.judge.reward_model", "RewardModelConfig", "train_reward_model", _text,
    ),
    "sft": Command(
        "pre-train a policy on play, or adapt it with a few demonstrations",
        f"{_TRAINERS}.policy.sft", "SFTConfig", "train_sft", _sft,
    ),
    "grpo": Command(
        "improve a policy by reinforcement learning in the dream",
        f"{_TRAINERS}.grpo.grpo", "GRPOConfig", "train_grpo", _grpo,
    ),
    "evaluate": Command(
        "the same policy and the same starts in the dream and in the simulator, with a report",
        f"{_EVALUATION}.side_by_side.evaluate", "EvaluateConfig", "evaluate", _evaluation,
    ),
    "evaluate-world-model": Command(
        "how far a world model's imagined frames follow recorded ones, with a report",
        f"{_EVALUATION}.world_model.evaluate", "EvaluateWorldModelConfig", "evaluate_world_model", _world_model,
    ),
    "judge evaluate": Command(
        "a judge against the truth of simulator episodes: precision, recall, false positives, and its worst mistakes",
        f"{_EVALUATION}.judges.evaluate", "EvaluateJudgeConfig", "evaluate_judge", _text,
    ),
    "judge watch": Command(
        "judge one video file",
        f"{_EVALUATION}.judges.watch", "WatchConfig", "watch", _watched,
    ),
    "train-embedded": Command(
        "make the shipped models again from nothing, stage by stage",
        "rawdream_env.recipes.piper_bundled", "EmbeddedConfig", "train_embedded", _text,
    ),
    "bench": Command(
        "run the benchmarks (in a clone of the repository)",
        "rawdream_env.cli", "BenchConfig", "run_bench", _code,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class BenchConfig:
    """Options of ``rawdream bench``."""

    only: tuple[str, ...] = ()
    """Names of benchmarks; empty: all of them."""
    quick: bool = False
    """Fewer episodes."""
    json: str = ""
    """Write the numbers to this file."""


def run_bench(config: BenchConfig) -> int:
    """Run ``benchmarks/`` of the clone this package is installed from; 1 when a goal was missed."""
    from pathlib import Path

    for folder in (Path.cwd(), Path(__file__).resolve().parents[1]):
        if (folder / "benchmarks" / "run.py").is_file():
            sys.path.insert(0, str(folder))
            break
    else:
        raise InvalidOptionError("the benchmarks are not part of the installed package; run this in a clone.")
    arguments = ["--only", *config.only] if config.only else []
    arguments += ["--quick"] if config.quick else []
    arguments += ["--json", config.json] if config.json else []
    return int(import_module("benchmarks.run").main(arguments))


def usage() -> str:
    """The text of ``rawdream --help``."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: rawdream COMMAND [options] [--debug]",
            "",
            "Train robot policies inside a video world model.",
            "",
            *lines,
            "",
            "rawdream COMMAND --help lists every option; --debug shows tracebacks; rawdream --version.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit code (see the module's text)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    words = [word for word in given if word != "--debug"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"rawdream-env {version('rawdream-env')}")
        return 0
    logging.basicConfig(format="%(message)s")
    logging.getLogger("rawdream_env").setLevel(logging.INFO)
    count = 2 if " ".join(words[:2]) in COMMANDS else 1  # some names are two words
    name = " ".join(words[:count])
    try:
        return run(name, words[count:])
    except KeyboardInterrupt:
        print("\nInterrupted. What was saved is kept; the same command goes on from there.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left, as in `rawdream doctor | head -3`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        message = explain(error)
        if debug or message is None:
            raise
        print(f"rawdream {name}: {message}", file=sys.stderr)
        return 3 if isinstance(error, JudgeUnavailableError) else 2


def run(name: str, arguments: Sequence[str]) -> int:
    """Parse the options of a subcommand, run it, print what it says. Raises whatever the subcommand raises."""
    command = COMMANDS.get(name)
    if command is None:
        if family := [other for other in COMMANDS if other.startswith(f"{name} ")]:
            raise InvalidOptionError(f"{name!r} is followed by a second word: {', '.join(family)}.")
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose among {', '.join(COMMANDS)}."
        raise InvalidOptionError(f"there is no command {name!r}; {hint}")
    module = import_module(command.module)
    import tyro

    try:
        config = tyro.cli(
            getattr(module, command.config),
            args=list(arguments),
            prog=f"rawdream {name}",
            description=f"{command.help[0].upper()}{command.help[1:]}.",
        )
    except SystemExit as exit_:  # --help (0) and options that cannot be parsed (2); both have been printed
        return int(exit_.code or 0)
    result = getattr(module, command.function)(config)
    if command.show is None:
        return 0
    text, code = command.show(result)
    if text:
        print(text)
    return code


def explain(error: Exception) -> str | None:
    """One sentence for an error its user can mend; None for what is probably our mistake."""
    if isinstance(error, RawDreamError) and not isinstance(error, MissingDependencyError):
        return str(error)
    if isinstance(error, ImportError):
        return f"{error}. A package is missing or of a version that does not fit: `rawdream doctor` says which."
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" at {error.filename}" if error.filename else ""
        return (
            f"no space left on the disk{where}; free some, or write to another folder. What was saved before is intact."
        )
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {error.filename}."
    gym_error = sys.modules.get("gymnasium.error")
    if gym_error is not None and isinstance(error, gym_error.Error):
        return str(error)
    return None


if __name__ == "__main__":
    sys.exit(main())
