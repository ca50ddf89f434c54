"""``rawdream completion``: a script with every subcommand and option, for the shell to complete.

rawdream completion bash > ~/.local/share/bash-completion/completions/rawdream
rawdream completion zsh > ~/.zfunc/_rawdream          with `fpath+=~/.zfunc; compinit` in .zshrc
rawdream completion fish > ~/.config/fish/completions/rawdream.fish
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any, Literal, Union

import tyro

from rawdream_env.cli.commands import COMMANDS


@dataclass(frozen=True)
class CompletionConfig:
    """Options of ``rawdream completion``."""

    shell: Annotated[Literal["bash", "zsh", "fish"], tyro.conf.Positional]
    """The shell that reads the script."""


@dataclass(frozen=True)
class _Help:
    """List the verbs."""


def completion(config: CompletionConfig) -> str:
    """The script, made by tyro from the configurations of all commands."""
    nouns: dict[str, list[Any]] = {}
    for name, command in COMMANDS.items():
        noun, _, verb = name.partition(" ")
        options = getattr(import_module(command.module), command.config)
        described = tyro.conf.subcommand(verb or noun, description=command.help)
        nouns.setdefault(noun, []).append(Annotated[options, described])
    branches = []
    for noun, verbs in nouns.items():
        if noun in COMMANDS:
            branches += verbs
        else:
            verbs.append(Annotated[_Help, tyro.conf.subcommand("help", description=f"list the verbs of {noun}")])
            branches.append(Annotated[Union[tuple(verbs)], tyro.conf.subcommand(noun, description=noun)])  # noqa: UP007
    script = io.StringIO()
    with contextlib.redirect_stdout(script), contextlib.suppress(SystemExit):
        tyro.cli(Union[tuple(branches)], prog="rawdream", args=["--tyro-print-completion", config.shell])  # type: ignore[call-overload]  # noqa: UP007
    return script.getvalue()
