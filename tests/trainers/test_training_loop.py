"""The loop of the supervised trainers: schedule by hand, averaged weights, logs, and resuming old and new checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rawdream_env.errors import CheckpointError, RunDirError
from rawdream_env.files import load_safetensors
from rawdream_env.trainers.common import training_loop
from rawdream_env.trainers.common.run_dir import RunDir, read_jsonl
from rawdream_env.trainers.common.schedule import Schedule
from rawdream_env.trainers.common.training_loop import TrainingLoop


def test_a_schedule_warms_up_holds_and_decays() -> None:
    whole = Schedule(lr=1.0, steps=100, warmup=10)
    assert whole.learning_rate(0) == pytest.approx(0.1)
    assert whole.learning_rate(50) == pytest.approx(0.02 + 0.98 / 2)
    assert 0.02 < whole.learning_rate(99) < 0.03 and whole.learning_rate(170) == pytest.approx(0.02)
    late = Schedule(lr=2.0, steps=100, warmup=10, decay=0.4)
    assert [late.learning_rate(step) for step in (9, 59, 80)] == pytest.approx([2.0, 2.0, 2 * (0.02 + 0.98 / 2)])
    to_zero = Schedule(lr=1.0, steps=100, warmup=1, floor=0.0)
    assert to_zero.learning_rate(75) == pytest.approx(0.5 * (1 + math.cos(0.75 * math.pi)))
    assert Schedule(lr=1.0, steps=0, warmup=0).done(0) == 1.0


def test_minutes_and_steps_share_one_budget() -> None:
    timed = Schedule(lr=1.0, steps=100, warmup=10, minutes=1.0)
    assert (timed.done(50, 0.0), timed.done(50, 45.0), timed.done(5, 60.0)) == (0.5, 0.75, 1.0)
    assert timed.learning_rate(50, 0.0) == pytest.approx(0.02 + 0.98 * 0.5)
    assert timed.learning_rate(50, 60.0) == pytest.approx(0.02)


def seeded(width: int = 2) -> nn.ModuleDict:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.ModuleDict({"network": nn.Linear(3, width), "helper": nn.Linear(3, 1)})


def loop_of(folder: Path, model: nn.ModuleDict, steps: int = 8, **options: Any) -> TrainingLoop:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    defaults: dict[str, Any] = {"ema": 0.9, "averaged": model["network"], "save_every": 3, "may_change": ("steps",)}
    settings = {"run_dir": "x", "steps": steps}
    schedule = Schedule(lr=0.1, steps=steps, warmup=2)
    return TrainingLoop(
        folder, settings, model, optimizer, schedule, name="test", progress=False, **(defaults | options)
    )


def train(loop: TrainingLoop, stop_before: int = -1) -> dict[str, torch.Tensor]:
    with loop:
        for step in loop:
            if step == stop_before:
                raise KeyboardInterrupt
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            loss = sum((part(x) ** 2).mean() for part in loop.model.values())
            loss.backward()
            norm = loop.update()
            loop.log(loss=loss, grad_norm=norm)
        return loop.averaged()


def test_the_average_is_that_of_the_part_and_ramps_up(tmp_path: Path) -> None:
    model = seeded()
    expected = {name: value.clone() for name, value in model["network"].state_dict().items()}
    with loop_of(tmp_path, model, steps=40, ema=0.5, save_every=100) as loop:
        for step in loop:
            model["network"](torch.ones(1, 3)).sum().backward()
            loop.update()
            decay = min(0.5, (step + 1) / (step + 10))
            expected = {n: torch.lerp(e, model["network"].state_dict()[n], 1 - decay) for n, e in expected.items()}
        averaged = loop.averaged()
    assert averaged.keys() == expected.keys() == {"weight", "bias"}
    for name, value in expected.items():
        torch.testing.assert_close(averaged[name], value)


def test_an_interrupted_run_resumes_bit_identically(tmp_path: Path) -> None:
    whole = train(loop_of(tmp_path / "whole", seeded()))
    with pytest.raises(KeyboardInterrupt):
        train(loop_of(tmp_path / "cut", seeded()), stop_before=5)
    loop = loop_of(tmp_path / "cut", seeded())
    assert loop.step == 3  # saved every 3 steps; the log lines of steps 4 and 5 are cut back
    resumed = train(loop)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "cut/metrics.jsonl").read_bytes()
    assert [line["step"] for line in read_jsonl(tmp_path / "cut/metrics.jsonl")] == list(range(1, 9))
    steps = [int(path.name[5:]) for path in sorted((tmp_path / "cut/checkpoints").iterdir())]
    assert steps == [6, 8]  # the end is saved, whatever save_every
    with loop_of(tmp_path / "cut", seeded()) as again:
        assert list(again) == []


def test_a_budget_of_minutes_ends_the_run_and_counts_earlier_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]

    def tick() -> float:
        clock[0] += 1.0
        return clock[0]

    monkeypatch.setattr(training_loop, "perf_counter", tick)
    timed = Schedule(lr=0.1, steps=1000, warmup=1, minutes=0.5)

    def run() -> TrainingLoop:
        model = seeded()
        optimizer = torch.optim.AdamW(model.parameters())
        return TrainingLoop(tmp_path, {}, model, optimizer, timed, save_every=9, name="", progress=False, timed=True)

    with pytest.raises(KeyboardInterrupt):
        train(run(), stop_before=10)
    loop = run()
    assert loop.step == 9 and 5 < loop.seconds < 20
    train(loop)
    assert 20 < loop.step < 40
    with run() as ended:
        assert ended.step == loop.step and list(ended) == []


def stored_as(folder: Path, tensors: Mapping[str, torch.Tensor], config: dict[str, Any], state: dict[str, Any]) -> None:
    with RunDir(folder, config, tensorboard=False) as run:
        run.save(3, dict(tensors), state)


@pytest.mark.parametrize("form", ["judge", "sft", "world model"])
def test_checkpoints_of_earlier_versions_resume(tmp_path: Path, form: str) -> None:
    """Other tensor names, the option ``out`` in the configuration, and ``elapsed_s``."""
    whole = train(loop_of(tmp_path / "whole", seeded()))
    with pytest.raises(KeyboardInterrupt):
        train(loop_of(tmp_path / "cut", seeded()), stop_before=3)
    tensors = load_safetensors(tmp_path / "cut/checkpoints/step_00000003/tensors.safetensors")
    prefixes = {
        "judge": {"model/": "", "ema/": "ema.", "optimizer/": "optimizer."},
        "sft": {"model/": "model/", "ema/": "ema/", "optimizer/": "optimizer."},
        "world model": {"model/": "model/", "ema/": "ema/", "optimizer/": "optimizer/optimizer."},
    }[form]
    old = {
        before + name.removeprefix(now): value
        for name, value in tensors.items()
        for now, before in prefixes.items()
        if name.startswith(now)
    }
    assert len(old) == len(tensors)
    stored_as(tmp_path / "old", old, {"out": "x", "steps": 8}, {"elapsed_s": 7.0} if form == "sft" else {})
    names = {"network.": "model/network.", "helper.": "model/helper.", "ema.": "ema/"} if form == "judge" else {}
    loop = loop_of(tmp_path / "old", seeded(), old_names=names)
    assert loop.step == 3 and (loop.seconds > 7.0) == (form == "sft")
    resumed = train(loop)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_other_models_and_other_settings_are_refused(tmp_path: Path) -> None:
    train(loop_of(tmp_path, seeded()))
    with pytest.raises(CheckpointError, match=r"step 8 in .* lacks 4 of 6 tensors.*'ema/bias'.*another model"):
        loop_of(tmp_path, seeded(width=5))
    model = seeded()
    with pytest.raises(RunDirError, match="another configuration"):
        TrainingLoop(
            tmp_path, {"run_dir": "y"}, model, torch.optim.SGD(model.parameters()), Schedule(1.0, 1, 1),
            save_every=1, name="",
        )  # fmt: skip
