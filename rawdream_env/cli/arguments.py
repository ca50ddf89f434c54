"""Parse the command line into the configuration of a subcommand.

Former options are renamed, ``--config FILE`` is read, tyro parses the rest, and device, precision and number of processes are
checked. All this happens before the subcommand runs, so that a mistake creates no folder.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints

from rawdream_env.cli.commands import Command
from rawdream_env.config import parse_device, parse_dtype, parse_workers
from rawdream_env.errors import InvalidOptionError


def parse(name: str, command: Command, words: Sequence[str]) -> tuple[Any, list[str]]:
    """The configuration for ``words``, and a notice for each former option in them.

    Raises:
        InvalidOptionError: wrong usage. SystemExit: after ``--help``.
    """
    import tyro

    kind = getattr(import_module(command.module), command.config)
    words, file = _split_config(words)
    words, notices = current_options(words, command)
    if file is not None:
        first, last = words_of_file(file, kind, command)
        words = [*first, *words, *last]
    problem = io.StringIO()
    try:
        with contextlib.redirect_stderr(problem):
            config = tyro.cli(
                kind,
                args=words,
                prog=f"rawdream {name}",
                config=(tyro.conf.PositionalMetavarFromFieldName,),
                description=f"{command.help[0].upper()}{command.help[1:]}.\n\n"
                "--config FILE reads options from a run's config.json or a YAML file.",
            )
    except SystemExit as exit_:
        if exit_.code:
            raise InvalidOptionError(f"{_sentence(problem.getvalue())}; see `rawdream {name} --help`.") from None
        raise
    return checked(config), notices


def checked(config: Any) -> Any:
    """``config`` with its ``device``, ``dtype`` and ``workers`` checked; -1 workers become one per core."""
    defaults = {field.name: field.default for field in fields(config)}
    if "device" in defaults and config.device != defaults["device"]:
        parse_device(config.device)
    if "dtype" in defaults:
        parse_dtype(config.dtype)
    if "workers" in defaults and (workers := parse_workers(config.workers)) != config.workers:
        config = replace(config, workers=workers)
    return config


# -- former options ----------------------------------------------------------------------------------------------------


def current_options(words: Sequence[str], command: Command) -> tuple[list[str], list[str]]:
    """``words`` with former options replaced by the current ones, and a notice for each."""
    out, notices = [], []
    for word in words:
        option, equals, value = word.partition("=")
        match = re.fullmatch(r"--((?:[\w-]+\.)*)(no-)?([\w.-]+)", option)
        key = f"{match[1]}{match[3]}".replace("-", "_") if match else ""
        if match and key in command.dropped:
            notices.append(f"{option} has no effect")
        elif match and key in command.renamed:
            *path, last = command.renamed[key].replace("_", "-").split(".")
            new = f"--{'.'.join([*path, (match[2] or '') + last])}"
            notices.append(f"{option} is now {new}")
            out.append(f"{new}{equals}{value}")
        else:
            out.append(word)
    if command.second and len(out) > 1 and not out[0].startswith("-") and not out[1].startswith("-"):
        out.insert(1, f"--{command.second}")
        notices.append(f"the second argument is now --{command.second}")
    return out, notices


# -- --config ----------------------------------------------------------------------------------------------------------


def _split_config(words: Sequence[str]) -> tuple[list[str], Path | None]:
    """``words`` without ``--config FILE``, and FILE."""
    rest, file = [], None
    iterator = iter(words)
    for word in iterator:
        if word == "--config" or word.startswith("--config="):
            file = word.partition("=")[2] or next(iterator, "")
            if not file:
                raise InvalidOptionError("--config needs a file: the config.json of a run or a YAML file.")
        else:
            rest.append(word)
    return rest, None if file is None else Path(file)


def words_of_file(path: Path, kind: type, command: Command) -> tuple[list[str], list[str]]:
    """The options of a JSON or YAML file, or of the ``config.json`` in a folder. Two lists: the first goes before the words
    of the command line, the second (parts that may be None, which tyro reads last) after them.

    Raises:
        InvalidOptionError: the file cannot be read, or has an unknown option.
    """
    path = path / "config.json" if path.is_dir() else path
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InvalidOptionError(f"--config {path} cannot be read ({' '.join(str(error).split())}).") from error
    if not isinstance(values, Mapping):
        raise InvalidOptionError(f"--config {path} contains a {type(values).__name__}; expected a mapping of options.")
    unknown: list[str] = []
    last: list[str] = []
    words = _words(values, kind, "", command, unknown, last)
    if unknown:
        raise InvalidOptionError(
            f"--config {path} has unknown options: {', '.join(unknown)}; remove them or use the file of the same command."
        )
    return words, last


def _words(
    values: Mapping[Any, Any],
    kind: Any,
    prefix: str,
    command: Command,
    unknown: list[str],
    last: list[str],
) -> list[str]:
    """``values`` of the dataclass ``kind`` as words; unknown keys are added to ``unknown``, optional parts to ``last``."""
    hints, words = get_type_hints(kind), list[str]()
    for given, value in values.items():
        key = f"{prefix}{given}".replace("-", "_")
        key = command.renamed.get(key, key)
        name = key.removeprefix(prefix)
        if name not in hints:
            unknown += [] if key in command.dropped else [key]
        elif is_dataclass(hints[name]) and isinstance(value, Mapping):
            words += _words(value, hints[name], f"{key}.", command, unknown, last)
        elif part := next(
            (hint for hint in get_args(hints[name]) if isinstance(hint, type) and is_dataclass(hint)), None
        ):
            chosen = "none" if value is None else re.sub(r"(?<!^)(?=[A-Z])", "-", part.__name__).lower()
            last.append(f"{key.replace('_', '-')}:{chosen}")
            last += _words(value or {}, part, f"{key}.", command, unknown, last)
        else:
            words += _option(prefix, name, value, flag=hints[name] is bool)
    return words


def _option(prefix: str, name: str, value: Any, *, flag: bool) -> list[str]:
    prefix, name = prefix.replace("_", "-"), name.replace("_", "-")
    if flag and isinstance(value, bool):
        return [f"--{prefix}{'' if value else 'no-'}{name}"]
    if isinstance(value, Mapping):
        return [f"--{prefix}{name}", *(str(word) for pair in value.items() for word in pair)]
    if isinstance(value, list):
        return [f"--{prefix}{name}", *map(str, _flat(value))]
    return [f"--{prefix}{name}={value}"]


def _flat(values: Sequence[Any]) -> list[Any]:
    return [item for value in values for item in (_flat(value) if isinstance(value, list) else [value])]


# -- wrong usage -------------------------------------------------------------------------------------------------------


def _sentence(box: str) -> str:
    """tyro's framed usage error as one sentence."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box).translate(str.maketrans("│╭╮╰╯─", "     -"))
    rows = [line.rstrip() for line in plain.splitlines() if line.strip()][1:]  # the first is the title
    said = []
    for section in re.split(r"^ +-{4,}$", "\n".join(rows), flags=re.MULTILINE):
        text = " ".join(section.split())
        if text.startswith("Missing from"):
            named = re.findall(r"^ {6}(\S+)", section, flags=re.MULTILINE)
            said.append(f"missing {', '.join(named)}")
        elif text.startswith(("Perhaps you meant", "Arguments similar to")):
            near = re.findall(r"^ {6}(--[a-z][a-z0-9.-]*)", section, flags=re.MULTILINE)
            said.append(f"perhaps you meant {' or '.join(near[:3])}")
        elif text and not text.startswith(("Argument helptext", "For full helptext")):
            said.append(f"{text[0].lower()}{text[1:].rstrip('.')}")
    return "; ".join(said)
