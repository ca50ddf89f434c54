"""Options: former spellings, ``--config``, and checks before a folder is made."""

from __future__ import annotations

import dataclasses
import json
import sys
from importlib import import_module
from pathlib import Path

import pytest

from rawdream_env import cli
from rawdream_env.cli import arguments
from rawdream_env.cli.commands import COMMANDS, OLD_NAMES, Command
from rawdream_env.config import parse_device, parse_workers
from rawdream_env.errors import InvalidOptionError
from rawdream_env.trainers.common.run_dir import to_json


@dataclasses.dataclass(frozen=True)
class Inner:
    width: int = 3
    warm: bool = True
    pairs: tuple[tuple[float, float], ...] = ((-1.0, 2.0),)


@dataclasses.dataclass(frozen=True)
class Options:
    data: tuple[str, ...]
    run_dir: Path
    env_kwargs: dict[str, bool | int | float | str] = dataclasses.field(default_factory=dict)
    minutes: float | None = None
    flag: bool = False
    text: str = ""
    lr: float = 1e-3
    device: str = "cpu"
    dtype: str | None = None
    workers: int = 0
    inner: Inner = dataclasses.field(default_factory=Inner)
    optional: Inner | None = None


COMMAND = Command(
    "try options", __name__, "Options", "run", renamed={"out": "run_dir", "inner.size": "inner.width"}, dropped=("fit",)
)


def parsed(*words: str) -> Options:
    return arguments.parse("try", COMMAND, words)[0]


def test_former_options_and_commands_work_with_one_line_of_notice(capsys, monkeypatch, tmp_path):
    config, notices = arguments.parse(
        "try", COMMAND, ["--data", "a", "--out=x", "--fit", "--no-fit", "--inner.size", "4"]
    )
    assert config.run_dir == Path("x") and config.inner.width == 4
    assert [notice.partition(" ")[0] for notice in notices] == ["--out", "--fit", "--no-fit", "--inner.size"]
    monkeypatch.setattr("rawdream_env.demo.run_demo", lambda config: config.workers)
    assert cli.main(["demo", "--sim-workers", "1"]) == 0
    out, err = capsys.readouterr()
    assert out == "1\n"
    assert err == "rawdream: --sim-workers is now --workers; the old spelling still works.\n"
    assert cli.main(["convert-wan", str(tmp_path / "none"), str(tmp_path / "run")]) == 2
    assert "`rawdream convert-wan` is now `rawdream world-model convert`, the second argument is now --out;" in (
        capsys.readouterr().err
    )


def test_every_former_name_leads_to_a_command():
    assert len(OLD_NAMES) == 11 and set(OLD_NAMES.values()) <= set(COMMANDS) and not set(OLD_NAMES) & set(COMMANDS)
    for command in COMMANDS.values():
        names = {field.name for field in dataclasses.fields(getattr(import_module(command.module), command.config))}
        assert not names & (set(command.renamed) | set(command.dropped))
        assert {new.split(".")[0] for new in command.renamed.values()} <= names


def test_a_file_gives_options_and_the_command_line_overrides_them(tmp_path):
    config = Options(
        ("a", "b"), Path("-run"), {"judge": "none", "horizon": 4, "record": True}, 2.5, True, "--text", 3e-5, inner=Inner(
            5, False, ((-0.5, 1e-5), (3.0, 4.0)))
    )  # fmt: skip
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_json(config)))
    assert parsed("--config", str(file)) == config
    assert parsed(f"--config={tmp_path}") == config, "the folder of a run"
    changed = parsed(
        "--lr", "1", "--config", str(file), "--data", "c", "--no-flag", "--env-kwargs", "--minutes", "None"
    )
    assert changed == dataclasses.replace(config, lr=1.0, data=("c",), flag=False, env_kwargs={}, minutes=None)
    (tmp_path / "run.yaml").write_text("data: [a]\nout: old/name\nlr: 1e-4\ninner:\n  size: 7\nfit: true\n")
    file.write_text(json.dumps({**to_json(config), "optional": to_json(Inner(7))}))
    assert parsed("--config", str(file)) == dataclasses.replace(config, optional=Inner(7))
    config = parsed("--config", str(tmp_path / "run.yaml"))
    assert (config.run_dir, config.lr, config.inner.width) == (Path("old/name"), 1e-4, 7)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_stored_configuration_of_every_command_is_read_back(name, tmp_path):
    command = COMMANDS[name]
    kind = getattr(import_module(command.module), command.config)
    required = [field for field in dataclasses.fields(kind) if field.default is field.default_factory]
    if any("Positional" in str(field.type) for field in required):
        pytest.skip("takes a bare word and stores no configuration")
    given = {field.name: ("a", "b") if "tuple" in str(field.type) else "folder" for field in required}
    stored = to_json(kind(**given))
    (tmp_path / "config.json").write_text(json.dumps(stored))
    config, notices = arguments.parse(name, command, ["--config", str(tmp_path)])
    assert {**to_json(config), "workers": None} == {**stored, "workers": None} and not notices


def test_what_a_file_cannot_be_is_one_sentence(tmp_path):
    for name, text, said in (
        ("a.json", "{", "cannot be read"),
        ("a.yaml", "a: [", "cannot be read"),
        ("b.json", "[1]", "contains a list; expected a mapping of options"),
        ("c.json", '{"dat": 1, "inner": {"widt": 2}}', "has unknown options: dat, inner.widt; remove them"),
        ("d.json", '{"lr": "much"}', "--lr: could not convert string to float"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(InvalidOptionError, match=said):
            parsed("--data", "a", "--run-dir", "x", "--config", str(tmp_path / name))
    for words in (["--config"], ["--config", str(tmp_path / "none.json")]):
        with pytest.raises(InvalidOptionError, match="--config .*(needs a file|cannot be read)"):
            parsed(*words)


def test_device_precision_and_workers_are_checked_in_one_place(monkeypatch):
    for words, said in (
        (["--device", "cuda:7"], "needs a GPU|does not exist"),
        (["--device", "tpu"], "is not known; choose 'cpu'"),
        (["--dtype", "half"], "choose one of 'float32', 'bfloat16'"),
        (["--workers", "-2"], "workers=-2 must be an integer of at least -1"),
    ):
        with pytest.raises(InvalidOptionError, match=said):
            parsed("--data", "a", "--run-dir", "x", *words)
    assert parsed("--data", "a", "--run-dir", "x", "--workers", "-1").workers == parse_workers(-1) >= 1
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert parse_device("cuda:1") == "cuda:1"
    with pytest.raises(InvalidOptionError, match="there are 2 GPUs, counted from 0"):
        parse_device("cuda:2")


@pytest.mark.parametrize(
    "line",
    [
        "demo --out RUN --policy no/such/policy",
        "demo --out RUN --device-does-not-exist 1",
        "data collect --out RUN --tasks nosuch --kind expert",
        "data collect --out RUN --episodes 0",
        "data collect --out RUN --image-size 0",
        "data collect --out RUN --kind policy --policy no/such/policy",
        "data import-hdf5 --src nosuch --out RUN",
        "world-model train --data nosuch --run-dir RUN --init no/such/model",
        "world-model train --data nosuch --run-dir RUN --device cuda:9",
        "world-model train --data nosuch --run-dir RUN",
        "world-model train --data nosuch --run-dir RUN --objective window",
        "world-model convert nosuch --out RUN",
        "world-model evaluate --data nosuch --out RUN",
        "world-model evaluate --data nosuch --out RUN --world-model no/such/model",
        "judge train --data nosuch --run-dir RUN",
        "judge train-reward-model --data nosuch --run-dir RUN",
        "judge evaluate --judge nosuch --out RUN",
        "judge evaluate --data nosuch --out RUN --no-progress",
        "policy sft --data nosuch --run-dir RUN",
        "policy sft --data nosuch --run-dir RUN --init no/such/policy",
        "policy grpo --run-dir RUN --env-kwargs judge nosuch",
        "policy grpo --run-dir RUN --held-out-judge nosuch",
        "policy grpo --run-dir RUN --task nosuch",
        "policy evaluate --out RUN --policies no/such/policy",
        "policy evaluate --out RUN --judge nosuch",
        "policy evaluate --out RUN --dtype half",
        "policy evaluate --out RUN --tasks nosuch",
        "models train --out RUN --until nosuch",
        "models train --out RUN --device cuda:9",
    ],
)
def test_mistakes_leave_no_folder(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(line.replace("RUN", "run").split()) == 2
    assert f"rawdream {' '.join(line.split()[:1])}" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_part_of_one_s_own_in_the_current_directory(tmp_path, monkeypatch, capsys):
    import numpy as np

    from rawdream_env.files import atomic_write_bytes
    from rawdream_env.wrappers.drawing import encode

    (tmp_path / "my_judge.py").write_text(
        "from rawdream_env.types import Outcome, Verdict\n"
        "class Judge:\n    def __call__(self, videos, instructions):\n"
        "        return [Verdict(Outcome.SUCCESS, reason='mine') for _ in videos]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    frames = [np.full((32, 32, 3), 40 * i, np.uint8) for i in range(4)]
    atomic_write_bytes(tmp_path / "clip.gif", encode(frames, 10.0, "gif"))
    assert cli.main(["judge", "watch", "clip.gif", "--instruction", "go", "--judge", "my_judge:Judge"]) == 0
    assert "reason: mine" in capsys.readouterr().out


def test_completion_knows_every_command_and_option():
    from rawdream_env.cli.completion import CompletionConfig, completion

    script = completion(CompletionConfig("bash"))
    assert "complete -F" in script and "--minutes" in script and "--num-inference-steps" in script
    for name in COMMANDS:
        assert all(word in script for word in name.split())
