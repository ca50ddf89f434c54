"""The ``rawdream`` command. Each subcommand is a function with a frozen dataclass of options.

    rawdream demo                        train a policy in the dream, then evaluate it in the simulator
    rawdream world-model train --help    every option with its default
    rawdream policy grpo --run-dir runs/grpo --minutes 10

``commands.py`` has the table of subcommands and ``arguments.py`` parses the command line. Heavy modules are imported after a
subcommand is chosen, so that ``rawdream --help`` is fast.

Exit codes: 0 done; 1 a check failed (``doctor``, ``bench``, ``judge watch``); 2 wrong usage, or an error that the user can
fix, with one sentence on stderr (``--debug`` shows the traceback); 3 the judge is unavailable (rerun the same command to
resume); 130 interrupted.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib import import_module

from rawdream_env.cli.arguments import parse
from rawdream_env.cli.commands import COMMANDS, OLD_NAMES, TITLES
from rawdream_env.errors import InvalidOptionError, JudgeUnavailableError, MissingDependencyError, RawDreamError

__all__ = ["COMMANDS", "explain", "main", "run", "usage"]

_HELP = ("-h", "--help", "help")
_DISK_FULL = {errno.ENOSPC: "no space left on the disk", errno.EDQUOT: "no space left in the disk quota"}


def usage(noun: str = "") -> str:
    """The text of ``rawdream --help``, or of ``rawdream NOUN --help``."""
    width = max(map(len, COMMANDS))
    lines, title = [], ""
    for name, command in COMMANDS.items():
        first = name.split()[0]
        if noun and first != noun:
            continue
        if (now := TITLES.get(first, title)) != title:
            lines += ["", now]
            title = now
        lines.append(f"  {name:<{width}}  {command.help}")
    return "\n".join(
        [
            f"usage: rawdream {f'{noun} VERB' if noun else 'COMMAND'} [options] [--config FILE] [--debug]",
            *([] if noun else ["", "RL post-training of robot policies inside a video world model."]),
            *lines,
            "",
            "rawdream COMMAND --help lists every option. --config FILE reads options from a run's config.json or a YAML",
            "file; options on the command line override it. --debug shows tracebacks. rawdream --version.",
            "",
            "Exit codes: 0 done, 1 a check failed, 2 wrong usage or an error you can fix, 3 the judge is unavailable (rerun",
            "the same command to resume), 130 interrupted.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit code (listed in the module docstring)."""
    # torch reads this when it is imported, later. Spinning OpenMP threads slow a step down many times while another program
    # uses the cores (benchmarks/busy_neighbour.py).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # text that the locale cannot write, as with LANG=C, is escaped
            stream.reconfigure(errors="backslashreplace")
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    words = [word for word in given if word != "--debug"]
    if words[:1] == ["help"]:  # `rawdream help policy sft` is `rawdream policy sft --help`
        words = [*words[1:], "--help"]
    if not words or words[0] in _HELP:
        print(usage(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"rawdream-env {version('rawdream-env')}")
        return 0
    nouns = {name.split()[0] for name in COMMANDS if " " in name}
    if words[0] in nouns and (not words[1:] or words[1] in _HELP):
        print(usage(words[0]), file=sys.stdout if words[1:] else sys.stderr)
        return 0 if words[1:] else 2
    logging.basicConfig(format="%(message)s")
    logging.getLogger("rawdream_env").setLevel(logging.INFO)
    if os.getcwd() not in sys.path:  # for `--policy my_module:make`; last, so that it does not hide other modules
        sys.path.append(os.getcwd())
    count = 2 if words[0] in nouns else 1
    name = " ".join(words[:count])
    try:
        with _no_lost_interrupt():
            return run(name, words[count:])
    except KeyboardInterrupt:
        print("\nInterrupted. Saved work is kept; rerun the same command to resume.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has closed the pipe, as in `rawdream doctor | head -3`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        message = explain(error)
        if debug or message is None:
            raise
        print(f"rawdream {name}: {message}", file=sys.stderr)
        return 3 if isinstance(error, JudgeUnavailableError) else 2


@contextlib.contextmanager
def _no_lost_interrupt() -> Iterator[None]:
    """Repeat a Ctrl-C that arrived inside a destructor or a weak reference's callback, where Python ignores exceptions."""
    hook = sys.unraisablehook

    def repeat(unraisable: sys.UnraisableHookArgs) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            hook(unraisable)
        elif (main_thread := threading.main_thread().ident) is not None:
            # After a while: at once, it would arrive in this function and be ignored again.
            threading.Timer(0.1, signal.pthread_kill, (main_thread, signal.SIGINT)).start()

    sys.unraisablehook = repeat
    try:
        yield
    finally:
        sys.unraisablehook = hook


def run(name: str, words: Sequence[str]) -> int:
    """Parse the options of a subcommand, run it, print its result. Raises whatever the subcommand raises."""
    current = OLD_NAMES.get(name, name)
    command = COMMANDS.get(current)
    if command is None:
        known = [*COMMANDS, *OLD_NAMES]
        near = difflib.get_close_matches(" ".join([name, *words[:1]]), known, n=1)
        near = near or difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose among {', '.join(COMMANDS)}."
        raise InvalidOptionError(f"there is no command {name!r}; {hint}")
    notices = [f"`rawdream {name}` is now `rawdream {current}`"] if current != name else []
    from rawdream_env.processes import interrupts_held

    with interrupts_held():  # an exception in the middle of torch's import aborts the process
        module = import_module(command.module)
    try:
        config, renamed = parse(current, command, words)
    except SystemExit as exit_:  # --help, which has been printed
        return int(exit_.code or 0)
    if notices := notices + renamed:
        print(f"rawdream: {', '.join(notices)}; the old spelling still works.", file=sys.stderr)
    result = getattr(module, command.function)(config)
    if command.show is None:
        return 0
    text, code = command.show(result)
    if text:
        print(text)
    return code


def explain(error: Exception) -> str | None:
    """One sentence for an error that the user can fix; None for a probable bug."""
    if isinstance(error, RawDreamError) and not isinstance(error, MissingDependencyError):
        return str(error)
    if isinstance(error, ImportError):
        return f"{error}. A package is missing or has the wrong version; `rawdream doctor` lists them."
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        where = f" at {error.filename}" if error.filename else ""
        return f"{_DISK_FULL[error.errno]}{where}; free space or write to another folder. Saved work is intact."
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {error.filename}."
    gym_error = sys.modules.get("gymnasium.error")
    if gym_error is not None and isinstance(error, gym_error.Error):
        return str(error)
    return None
