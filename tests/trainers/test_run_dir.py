"""A run directory survives kills, full disks and flipped bits, and says what is wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import errno
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rawdream_env.errors import CheckpointError, RunDirError
from rawdream_env.trainers.common.optimizer_state import pack_optimizer, unpack_optimizer
from rawdream_env.trainers.common.run_dir import RunDir, read_jsonl


class _Full(Exception):
    """The error a user would read was as it should be."""


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Turns a ``RunDirError`` that says what happened and what is left into ``_Full``."""
    try:
        yield
    except RunDirError as error:
        if "No space left" in str(error) and "intact" in str(error):
            raise _Full from error
        raise


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass(frozen=True)
class Config:
    folder: Path = Path("a/b")
    sizes: tuple[int, ...] = (1, 2)
    colour: Colour = Colour.RED
    steps: int = 3


def make(path: Path, config: Any = None, **kwargs: Any) -> RunDir:
    return RunDir(path, {"lr": 0.1} if config is None else config, tensorboard=False, **kwargs)


def fill(run: RunDir, steps: range) -> None:
    """A run of which every line and weight follows from the step."""
    for step in steps:
        run.log(step, loss=1 / step)
        run.save(step, {"w": torch.full((3,), float(step))}, {"step": step})


def test_keys_of_earlier_versions_are_read(tmp_path: Path) -> None:
    stored = {"out": "x", "model": {"carry": True, "width": 2}, "out_of": {"out": 1}}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    given = {"run_dir": "x", "model": {"warp_last_frame": True, "width": 2}, "out_of": {"out": 1}}
    make(tmp_path, given).close()
    with pytest.raises(RunDirError, match=r'run_dir: "x" -> "y"'):
        make(tmp_path, given | {"run_dir": "y"})


def test_config_is_resolved_stored_and_compared(tmp_path: Path) -> None:
    make(tmp_path, Config()).close()
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored == {"folder": "a/b", "sizes": [1, 2], "colour": "red", "steps": 3}
    make(tmp_path, Config()).close()
    with pytest.raises(RunDirError, match=r"steps: 3 -> 5; stored -> given.*choose another folder"):
        make(tmp_path, Config(steps=5))
    with pytest.raises(RunDirError, match=r"lr: \(absent\) -> 0.1"):
        make(tmp_path)
    make(tmp_path, Config(steps=5), may_change=("steps",)).close()
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 5
    with pytest.raises(RunDirError, match="already holds a run"):
        make(tmp_path, Config(steps=5), resume=False)


def test_another_process_is_kept_out(tmp_path: Path) -> None:
    code = "import sys; from rawdream_env.trainers.common.run_dir import RunDir; RunDir(sys.argv[1], {}, tensorboard=False)"
    with make(tmp_path, {}):
        result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
        assert result.returncode == 1 and "in use by another run" in result.stderr
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_a_second_run_in_the_same_process_is_kept_out(tmp_path: Path) -> None:
    with make(tmp_path):
        for _ in range(2):  # a refused attempt does not give the lock away
            with pytest.raises(RunDirError, match="in use by another run"):
                make(tmp_path)
    make(tmp_path).close()
    with pytest.raises(RunDirError, match="another configuration"):
        make(tmp_path, {"lr": 0.2})
    make(tmp_path).close()


def test_temporary_files_of_killed_writers_are_removed(tmp_path: Path) -> None:
    litter = [
        tmp_path / ".config.json.1.ab.tmp",
        tmp_path / "policy" / ".model.safetensors.7.cd.tmp",
        tmp_path / ".p.x.tmp",
    ]
    (tmp_path / "policy").mkdir()
    litter[2].mkdir()
    for path in (*litter[:2], litter[2] / "part", tmp_path / "policy" / "model.tmp"):
        path.write_bytes(b"half")
    make(tmp_path).close()
    assert not any(path.exists() for path in litter) and (tmp_path / "policy" / "model.tmp").exists()


def test_logs_hold_plain_json(tmp_path: Path) -> None:
    with make(tmp_path) as run:
        run.log(1, a=torch.tensor(0.5), b=np.float32(0.25), c=float("nan"), d=True, e="x", **{"rate/task_1": 3})
        run.log_timings(1, seconds=1.5)
        with pytest.raises(TypeError, match="a metric must be a number"):
            run.log(2, a=[1])  # type: ignore[arg-type]
        assert run.read_metrics() == [
            {"step": 1, "a": 0.5, "b": 0.25, "c": None, "d": True, "e": "x", "rate/task_1": 3}
        ]
    assert read_jsonl(tmp_path / "timings.jsonl") == [{"step": 1, "seconds": 1.5}]
    assert read_jsonl(tmp_path / "absent.jsonl") == []


def test_tensorboard_curves_when_installed(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with RunDir(tmp_path, {}) as run:
        assert not (tmp_path / "tensorboard").exists()  # made at the first log
        run.log(1, loss=0.5, word="x", missing=None)
    assert any((tmp_path / "tensorboard").iterdir())


def test_resume_gives_back_everything_and_cuts_the_logs(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    torch_generator = torch.Generator().manual_seed(2)
    with make(tmp_path) as run:
        assert run.load_latest() is None
        run.log(1, loss=1.0)
        state = {"numpy": generator.bit_generator.state, "x": np.int64(3)}
        run.save(1, {"w": torch.arange(3.0), "torch_generator": torch_generator.get_state()}, state)
        expected = generator.normal(), torch.randn((), generator=torch_generator)
        run.log(1, evaluation=0.5)  # after the checkpoint: will be written again
        run.log(2, loss=0.5)
        run.log_timings(2, seconds=1)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')  # killed in mid-write
    with make(tmp_path) as run:
        checkpoint = run.load_latest()
        assert checkpoint is not None and checkpoint.step == 1 and checkpoint.state["x"] == 3
        assert run.read_metrics() == [{"step": 1, "loss": 1.0}]
        assert read_jsonl(tmp_path / "timings.jsonl") == []
        generator.bit_generator.state = checkpoint.state["numpy"]
        torch_generator.set_state(checkpoint.tensors["torch_generator"])
        assert (generator.normal(), torch.randn((), generator=torch_generator)) == expected
        run.log(2, loss=0.25)
    assert read_jsonl(tmp_path / "metrics.jsonl")[-1] == {"step": 2, "loss": 0.25}


def test_the_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    with make(tmp_path) as run:
        fill(run, range(1, 6))
        run.save(5, {"w": torch.full((3,), -1.0)})  # the same step again
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000004", "step_00000005"]
    with make(tmp_path) as run:
        checkpoint = run.load_latest()
        assert checkpoint is not None and float(checkpoint.tensors["w"][0]) == -1


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip, halve, Path.unlink, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_named_and_the_previous_one_is_used(
    tmp_path: Path, damage: Callable[[Path], Any], name: str
) -> None:
    with make(tmp_path) as run:
        fill(run, range(1, 4))
    damage(tmp_path / "checkpoints" / "step_00000003" / name)
    with make(tmp_path) as run:
        with pytest.warns(RuntimeWarning, match="step_00000003 is damaged and is skipped"):
            checkpoint = run.load_latest()
        assert checkpoint is not None and checkpoint.step == 2 and checkpoint.state == {"step": 2}
        assert [line["step"] for line in run.read_metrics()] == [1, 2]
        fill(run, range(3, 5))  # goes over the damaged folder
        checkpoint = run.load_latest()
        assert checkpoint is not None and checkpoint.step == 4
    for folder in (tmp_path / "checkpoints").iterdir():
        flip(folder / "tensors.safetensors")
    damaged = pytest.raises(CheckpointError, match=r"All 2 checkpoints .* are damaged")
    with make(tmp_path) as run, pytest.warns(RuntimeWarning), damaged:
        run.load_latest()


def test_a_flipped_bit_in_a_manifest_is_seen_or_changes_nothing(tmp_path: Path) -> None:
    with make(tmp_path) as run:
        fill(run, range(1, 3))
        path = tmp_path / "checkpoints" / "step_00000002" / "manifest.json"
        whole, logs = path.read_bytes(), (tmp_path / "metrics.jsonl").read_bytes()
        for index in range(0, len(whole), 3):
            path.write_bytes(whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                checkpoint = run.load_latest()
            assert checkpoint is not None
            assert float(checkpoint.tensors["w"][0]) == checkpoint.step
            assert [line["step"] for line in run.read_metrics()] == list(range(1, checkpoint.step + 1))
            (tmp_path / "metrics.jsonl").write_bytes(logs)


def test_the_manifest_is_checked_before_it_is_believed(tmp_path: Path) -> None:
    with make(tmp_path) as run:
        fill(run, range(1, 3))
    newest = tmp_path / "checkpoints" / "step_00000002" / "manifest.json"
    manifest, logs = json.loads(newest.read_text()), (tmp_path / "metrics.jsonl").read_bytes()
    assert manifest["format"] == 2 and manifest["logs"] == {"metrics.jsonl": len(logs), "timings.jsonl": 0}
    unsigned = {key: value for key, value in manifest.items() if key != "checksum"}
    old = {**unsigned, "format": 1}
    for content, reason in [
        ({**manifest, "logs": {"metrics.jsonl": 0, "timings.jsonl": 0}}, "does not match its own checksum"),
        (unsigned, "does not match its own checksum"),
        ({**manifest, "format": 3}, "has format 3, expected one of"),
        ({**old, "logs": {}}, "'metrics.jsonl'"),
        ({**old, "logs": {**old["logs"], "metrics.jsonl": -5}}, "records -5 as the length of metrics.jsonl"),
        ({**old, "logs": {**old["logs"], "metrics.jsonl": 10**9}}, "had 1000000000 when this checkpoint was saved"),
    ]:
        newest.write_text(json.dumps(content))
        with make(tmp_path) as run:
            with pytest.warns(RuntimeWarning, match=f"step_00000002 is damaged and is skipped: .*{reason}"):
                checkpoint = run.load_latest()
            assert checkpoint is not None and checkpoint.step == 1
        (tmp_path / "metrics.jsonl").write_bytes(logs)
    for name in ("manifest.json", "state.json"):
        (newest.parent / name).write_text("[" * 100_000)
        with make(tmp_path) as run, pytest.warns(RuntimeWarning, match="cannot be read as JSON"):
            checkpoint = run.load_latest()
        assert checkpoint is not None and checkpoint.step == 1
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(RunDirError, match=r"config.json cannot be read as JSON.*choose another folder"):
        make(tmp_path)


def test_a_checkpoint_of_format_1_is_read(tmp_path: Path) -> None:
    with make(tmp_path) as run:
        fill(run, range(1, 3))
    path = tmp_path / "checkpoints" / "step_00000002" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**{k: v for k, v in manifest.items() if k != "checksum"}, "format": 1}))
    with make(tmp_path) as run:
        checkpoint = run.load_latest()
        assert checkpoint is not None and checkpoint.step == 2 and checkpoint.logs == manifest["logs"]


def test_a_log_shorter_than_its_checkpoint_is_refused(tmp_path: Path) -> None:
    with make(tmp_path) as run:
        fill(run, range(1, 3))
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    first = whole.index(b"\n") + 1
    (tmp_path / "metrics.jsonl").write_bytes(whole[: first + 4])
    with make(tmp_path) as run:
        with pytest.warns(RuntimeWarning, match=rf"metrics.jsonl has {first + 4} bytes, but had {len(whole)} when"):
            checkpoint = run.load_latest()
        assert checkpoint is not None and checkpoint.step == 1
        fill(run, range(2, 3))
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole
    (tmp_path / "metrics.jsonl").unlink()
    with (
        make(tmp_path) as run,
        pytest.warns(RuntimeWarning),
        pytest.raises(CheckpointError, match=r"All 2 .* and the logs"),
    ):
        run.load_latest()


@pytest.mark.parametrize("written", [0, 7])
def test_a_refused_log_line_is_written_before_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    real = os.write

    def fail(descriptor: int, data: Any) -> int:
        if written and len(data) > written and not cut:
            cut.append(1)
            return real(descriptor, bytes(data[:written]))
        raise OSError(errno.ENOSPC, "No space left on device")

    with make(tmp_path) as run:
        fill(run, range(1, 2))
        one, cut = (tmp_path / "metrics.jsonl").read_bytes(), list[int]()
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", fail)
            with pytest.raises(RunDirError, match="No space left"):
                run.log(2, loss=0.5)
            assert (tmp_path / "metrics.jsonl").read_bytes() == one  # no partial line
            with pytest.raises(RunDirError, match="No space left"):
                run.save(2, {"w": torch.zeros(3)})
        assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000001"]
        run.save(2, {"w": torch.zeros(3)})
    with make(tmp_path) as run:
        checkpoint = run.load_latest()
        assert checkpoint is not None and checkpoint.step == 2
        assert run.read_metrics() == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]


def test_partial_lines_of_earlier_versions_are_repaired(tmp_path: Path) -> None:
    with make(tmp_path) as run:
        run.log(1, loss=1.0)
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write('{"step": 2, "lo{"step": 3, "loss": 0.25}\n{"step": 4, "loss": 0.1}\n{"step": 5}')
        run.save(5, {"w": torch.zeros(3)})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    with make(tmp_path) as run:
        with pytest.warns(RuntimeWarning, match=r"metrics.jsonl had 2 lines that are no JSON \(line 2, 4\)"):
            checkpoint = run.load_latest()
        assert checkpoint is not None and checkpoint.step == 5
        assert (tmp_path / "metrics.jsonl").stat().st_size == size
        run.log(6, loss=0.0)
        assert [line["step"] for line in run.read_metrics()] == [1, 4, 6]
        checkpoint = run.load_latest()
        assert checkpoint is not None and checkpoint.step == 5


def test_non_finite_weights_are_not_saved(tmp_path: Path) -> None:
    with make(tmp_path) as run:
        fill(run, range(1, 2))
        with pytest.raises(CheckpointError, match=r"step_00000002.*tensor 'w' holds 1 non-finite"):
            run.save(2, {"w": torch.tensor([1.0, float("nan")])})
        checkpoint = run.load_latest()
        assert checkpoint is not None and checkpoint.step == 1


OPERATIONS = ("open", "write", "fsync", "rename", "replace", "mkdir", "truncate", "close")


def counted(monkeypatch: pytest.MonkeyPatch, at: int, act: Callable[[], None]) -> list[int]:
    """Call ``act`` before the ``at``-th file operation; returns a list holding the count."""
    count = [0]

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == at:
                act()
            return real(*args, **kwargs)

        return call

    for name in OPERATIONS:
        monkeypatch.setattr(os, name, wrap(getattr(os, name)))
    return count


@pytest.fixture
def quick_disk(tmp_path: Path) -> Iterator[Path]:
    """Memory where there is such a folder: hundreds of fsyncs on a busy disk take minutes."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else tmp_path) as folder:
        yield Path(folder)


def test_a_full_disk_at_any_operation_leaves_a_checkpoint(quick_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with make(quick_disk) as run:
        fill(run, range(1, 3))
        with monkeypatch.context() as patch:
            total = counted(patch, -1, full)
            fill(run, range(3, 4))
        assert total[0] > 10
        for at in range(1, total[0] + 1):
            with monkeypatch.context() as patch:
                counted(patch, at, full)
                with contextlib.suppress(_Full), _named():
                    fill(run, range(4, 5))
            checkpoint = run.load_latest()
            assert checkpoint is not None and checkpoint.step in (3, 4)
            assert float(checkpoint.tensors["w"][0]) == checkpoint.step
    assert not [p for p in (quick_disk / "checkpoints").iterdir() if p.name.startswith(".tmp")]


def test_a_kill_at_any_operation_leaves_a_run_that_goes_on(quick_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_all(path: Path) -> None:
        with make(path, keep=1) as run:
            checkpoint = run.load_latest()
            fill(run, range(1 if checkpoint is None else checkpoint.step + 1, 3))

    run_all(quick_disk / "unbroken")
    unbroken = (quick_disk / "unbroken" / "metrics.jsonl").read_bytes()
    at, killed = 0, True
    while killed:
        at += 1
        path = quick_disk / f"killed_{at}"
        child = os.fork()
        if child == 0:
            counted(monkeypatch, at, lambda: os._exit(9))
            run_all(path)
            os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        run_all(path)
        assert (path / "metrics.jsonl").read_bytes() == unbroken, f"killed at operation {at}"
        found = sorted(p.name for p in (path / "checkpoints").iterdir())
        assert found[-1] == "step_00000002" and not [name for name in found if name.startswith(".")]
    assert at > 40


def test_optimiser_round_trip(tmp_path: Path) -> None:
    def trained(steps: int) -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
        model = torch.nn.Linear(3, 2)
        torch.nn.init.ones_(model.weight), torch.nn.init.zeros_(model.bias)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for step in range(steps):
            step_once(model, optimizer, step)
        return model, optimizer

    def step_once(model: torch.nn.Linear, optimizer: torch.optim.Optimizer, step: int) -> None:
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        optimizer.zero_grad()
        model(torch.tensor([[1.0, float(step), -1.0]])).pow(2).sum().backward()
        optimizer.step()

    model, optimizer = trained(3)
    with make(tmp_path) as run:
        run.save(3, {**{f"m.{k}": v for k, v in model.state_dict().items()}, **pack_optimizer(optimizer)})
        checkpoint = run.load_latest()
    assert checkpoint is not None
    other, other_optimizer = trained(0)
    other.load_state_dict({k[2:]: v for k, v in checkpoint.tensors.items() if k.startswith("m.")})
    unpack_optimizer(other_optimizer, checkpoint.tensors)
    assert other_optimizer.param_groups[0]["lr"] == 0.1 / 3
    for step in (3, 4):
        step_once(model, optimizer, step)
        step_once(other, other_optimizer, step)
    assert torch.equal(model.weight, other.weight) and torch.equal(model.bias, other.bias)
    wrong = torch.optim.AdamW(torch.nn.Linear(4, 2).parameters())
    with pytest.raises(CheckpointError, match=r"shape \(2, 3\), its parameter \(2, 4\)"):
        unpack_optimizer(wrong, checkpoint.tensors)
    with pytest.raises(CheckpointError, match="has 1 state entries"):
        unpack_optimizer(torch.optim.AdamW([torch.nn.Parameter(torch.ones(2, 3))]), checkpoint.tensors)
    lost = {name: value for name, value in checkpoint.tensors.items() if "state.1.exp_avg_sq" not in name}
    several = checkpoint.tensors | {"optimizer.group.0.lr": torch.zeros(6)}
    with pytest.raises(CheckpointError, match=r"'optimizer\.group\.0\.lr' has 6 values, expected one"):
        unpack_optimizer(trained(0)[1], several)
    with pytest.raises(CheckpointError, match="lacks tensors of some parameters"):
        unpack_optimizer(trained(0)[1], lost)


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "checkpoints/step_00000001/state.json"])
def test_named_pipes_in_a_run_folder_do_not_block(tmp_path: Path, name: str) -> None:
    with RunDir(tmp_path, {"a": 1}) as run:
        run.log(1, loss=0.5)
        run.save(1, {"weight": torch.zeros(3)})
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.warns() if "state" in name else contextlib.nullcontext():  # noqa: SIM117
        with pytest.raises((RunDirError, CheckpointError), match=r"no regular file|are damaged"):
            RunDir(tmp_path, {"a": 1}).load_latest()


def test_a_log_that_is_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with RunDir(tmp_path, {"a": 1}) as run, pytest.raises(RunDirError, match=r"Cannot use the logs .*metrics\.jsonl"):
        run.load_latest()


def test_settings_stored_under_old_names_are_read(tmp_path: Path) -> None:
    old = {"out": "a", "steps": 3, "model": {"carry": True, "layers": 2}}
    (tmp_path / "config.json").write_text(json.dumps(old))
    now = {"run_dir": "a", "steps": 3, "model": {"warp_last_frame": True, "layers": 2}}
    RunDir(tmp_path, now).close()
    with pytest.raises(RunDirError, match="model"):
        RunDir(tmp_path, {**now, "model": {"warp_last_frame": False, "layers": 2}})
    (tmp_path / "config.json").write_text(json.dumps({"out": "a"}))
    RunDir(tmp_path, {"out": "a"}).close()
