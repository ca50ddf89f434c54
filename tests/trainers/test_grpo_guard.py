"""What keeps GRPO from wrecking the policy: warm-up, updates that are undone, counts per task, and the alarm."""

from __future__ import annotations

import json
import math
import re
import warnings
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_grpo import TinyPolicy, bright, collector, toy_env, train, weights

from rawdream_env.errors import InvalidOptionError, RunDirError
from rawdream_env.judges.ensemble import JudgeGap, JudgeGapWarning
from rawdream_env.judges.scripted import ScriptedJudge
from rawdream_env.trainers.common.run_dir import read_jsonl
from rawdream_env.trainers.grpo import GRPOConfig
from rawdream_env.trainers.grpo.alarm import GapAlarm
from rawdream_env.trainers.grpo.counts import RolloutCounts, table
from rawdream_env.types import Video
from rawdream_env.wrappers import DualNoiseVerification

MAX_KL = 0.5
"""Above what the toy policy's updates need, which are large."""


def log(run: Path) -> list[dict[str, Any]]:
    return read_jsonl(run / "metrics.jsonl")


def sabotage(patch: pytest.MonkeyPatch, at: int, factor: float) -> None:
    """AdamW's ``at``-th update has ``factor`` times the learning rate; with 0 it is left out, state included."""
    real, calls = torch.optim.AdamW.step, count(1)

    def step(self: torch.optim.AdamW, closure: Any = None) -> Any:
        if next(calls) != at:
            return real(self)
        if not factor:
            return None
        (group,) = self.param_groups
        group["lr"] *= factor
        real(self)
        group["lr"] /= factor

    patch.setattr(torch.optim.AdamW, "step", step)


# -- the guard -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [100.0, 1e38])  # the second leaves weights and log-probabilities that are not finite
def test_a_bad_update_is_undone_bit_by_bit_and_the_run_goes_on(
    tmp_path: Path, factor: float, caplog: pytest.LogCaptureFixture
) -> None:
    runs = {"bad": factor, "left out": 0.0}
    for name, times in runs.items():
        with pytest.MonkeyPatch.context() as patch:
            sabotage(patch, 5, times)
            assert train(tmp_path / name, max_kl=MAX_KL).step == 4
    lines, expected = log(tmp_path / "bad"), log(tmp_path / "left out")
    assert [line["updates_undone"] for line in lines] == [0, 0, 1, 0]
    far = lines[2]["max_kl_after"]
    assert far is None or far > MAX_KL
    assert max(line["max_kl_after"] for line in expected) < MAX_KL
    for line in (*lines, *expected):
        del line["updates_undone"], line["max_kl_after"]
    assert lines == expected
    tensors = "checkpoints/step_00000004/tensors.safetensors"  # weights and optimizer
    assert (tmp_path / "bad" / tensors).read_bytes() == (tmp_path / "left out" / tensors).read_bytes()
    assert [
        m for m in caplog.messages if re.search(r"Step 3: 1 of 2 updates undone: approx_kl .* exceeds max_kl=0.5", m)
    ]


def test_the_saved_policy_has_averaged_weights_and_rollouts_the_latest(tmp_path: Path) -> None:
    expected = torch.cat([p.detach().flatten() for p in TinyPolicy().parameters()])
    for step in range(3):
        latest = weights(train(tmp_path / f"{step}", steps=step + 1))
        decay = min(0.25, (step + 1) / (step + 6))  # 1/6, 1/4, 1/4
        expected = decay * expected + (1 - decay) * latest
    run = tmp_path / "averaged"
    train(run, steps=2, ema=0.25)
    averaged = train(run, steps=3, ema=0.25)  # resumed
    assert torch.allclose(weights(averaged), expected, atol=1e-6)
    assert not torch.allclose(weights(averaged), latest, atol=1e-3)
    assert (run / "metrics.jsonl").read_bytes() == (tmp_path / "2" / "metrics.jsonl").read_bytes()


def test_without_the_guard_the_same_update_moves_the_policy(tmp_path: Path) -> None:
    clean = weights(train(tmp_path / "clean", steps=3))
    with pytest.MonkeyPatch.context() as patch:
        sabotage(patch, 5, 100.0)
        bad = weights(train(tmp_path / "bad", steps=3))
    assert float((bad - clean).abs().max()) > 1
    assert "updates_undone" not in log(tmp_path / "bad")[0]


def test_the_learning_rate_rises_over_the_first_steps_and_guarded_runs_resume_bit_identically(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 5, "warmup_steps": 4, "max_kl": 0.02, "epochs": 2, "lr": 0.1}
    unbroken = train(tmp_path / "unbroken", **options)
    train(tmp_path / "resumed", **{**options, "steps": 2})
    resumed = train(tmp_path / "resumed", **options)
    assert torch.equal(weights(unbroken), weights(resumed))
    logs = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("unbroken", "resumed")]
    assert logs[0] == logs[1]
    lines = log(tmp_path / "resumed")
    assert [line["lr"] for line in lines] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])
    assert sum(line["updates_undone"] for line in lines) > 0


def test_a_run_of_an_earlier_version_goes_on_without_warm_up_and_guard(tmp_path: Path) -> None:
    """Its folder does not have the options; their defaults of today must not change it."""
    unbroken = train(tmp_path / "unbroken")
    train(tmp_path / "old", steps=2)
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    new = (
        "warmup_steps",
        "max_kl",
        "alarm_margin",
        "alarm_window",
        "stop_on_alarm",
        "baseline",
        "decayed",
        "lora_rank",
    )
    old = {k: v for k, v in config.items() if k not in new} | {"loss_type": "trajectory"}
    (tmp_path / "old" / "config.json").write_text(json.dumps(old))
    today = {"warmup_steps": GRPOConfig.warmup_steps, "max_kl": GRPOConfig.max_kl}
    assert today == {"warmup_steps": 5, "max_kl": 0.05}
    train(tmp_path / "old", steps=3, **today)
    assert torch.equal(weights(train(tmp_path / "old", **today)), weights(unbroken))
    assert log(tmp_path / "old") == log(tmp_path / "unbroken")
    with pytest.raises(RunDirError, match=r"max_kl: null -> 0\.01"):
        train(tmp_path / "old", **{**today, "max_kl": 0.01})


def test_options_that_cannot_work_are_refused(tmp_path: Path) -> None:
    for options, words in (
        ({"max_kl": 0.0}, "max_kl=0.0 must be positive, or None"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must be at least 0"),
        ({"alarm_margin": 1.0}, "alarm_margin=1.0 must lie between 0 and 1"),
        ({"alarm_window": 0}, "alarm_window=0 must be at least 1"),
    ):
        with pytest.raises(InvalidOptionError, match=words):
            train(tmp_path, **options)


# -- counts per task -------------------------------------------------------------------------------------------------


def test_the_log_tells_the_tasks_apart() -> None:
    """ "left" always succeeds, "right" never, "up" is hallucinated at times, "down" is as the policy does it."""

    def judge(video: Video, instruction: str) -> Any:
        return {"left": True, "right": False}.get(instruction.split()[-1], bright(video, instruction))

    env = DualNoiseVerification(toy_env(12, judge=judge, hallucinate=0.15))
    collected = collector(12, env=env, num_groups=40, max_groups=40, max_flagged=4).collect(0)
    log, counts = collected.metrics(), collected.counts
    for key in ("n", "judged", "flagged", "invalid", "trusted", "groups"):
        assert log[key] == sum(log[f"{key}/task_{task}"] for task in range(4))
    assert (log["all_success_rate/task_0"], log["all_failure_rate/task_0"]) == (1.0, 0.0)
    assert (log["all_success_rate/task_1"], log["all_failure_rate/task_1"]) == (0.0, 1.0)
    assert log["all_failure_rate"] == counts.dropped["all_failure"] / 40
    assert log["trusted_success_rate/task_0"] == 1.0 and log["flagged/task_1"] == 0 < log["flagged/task_2"]
    assert log["trusted_rate/task_2"] == 1 - log["flagged/task_2"] / log["n/task_2"]
    assert 0 < log["trusted_success_rate/task_2"] < log["success_rate/task_2"]
    lines = table(counts, {0: "left", 1: "right", 2: "up"}).splitlines()
    assert [line.split()[0] for line in lines] == ["task", "left", "right", "up", "3", "all"]
    assert lines[1].split()[-4:] == ["100", "%", "0", "%"] and lines[2].split()[-4:] == ["0", "%", "100", "%"]
    assert f"n={counts.trusted}" in lines[-1]
    twice = RolloutCounts()
    twice += counts
    twice += counts
    assert (
        twice.tasks[2].trusted == 2 * counts.tasks[2].trusted
        and twice.rates()["all_success_rate"] == log["all_success_rate"]
    )


# -- the alarm -------------------------------------------------------------------------------------------------------


def test_the_alarm_needs_a_margin_an_interval_and_a_window() -> None:
    alarm = GapAlarm(0.1, window=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert alarm.look({}) == {}
        seen = alarm.look({"state": JudgeGap(64, 40, 35, 6, 1)})  # 8 points, one step
        assert seen["state_gap"] == pytest.approx(5 / 64) and seen["state_alarm"] == 0
        assert alarm.look({"state": JudgeGap(10, 8, 5, 3, 0)})["state_gap_n"] == 74  # 30 points, but 10 episodes
    with pytest.warns(
        JudgeGapWarning, match="than the world model's own state .* over 138 episodes of the last 3 steps"
    ):
        seen = alarm.look({"state": JudgeGap(64, 64, 32, 32, 0)})
    assert seen["state_alarm"] == 1 and seen["state_gap_low"] > 0.1 and alarm.raised == {"state"}
    again = GapAlarm(0.1, 3, json.loads(json.dumps(alarm.state())))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one warning per crossing, in a resumed run too
        for watch in (alarm, again):
            assert watch.look({"state": JudgeGap(64, 40, 40, 3, 3)})["state_alarm"] == 1
            watch.look({"state": JudgeGap(64, 40, 40, 3, 3)})
            assert watch.look({"state": JudgeGap(64, 40, 40, 3, 3)})["state_alarm"] == 0
        assert alarm.state() == again.state()


def lenient(video: Video, instruction: str) -> bool:
    return bool(video.frames[-1].mean() > 100)


def watched_env() -> Any:
    """The judge that rewards calls every second video a success, the hold-out judge hardly any."""
    return toy_env(judge=lenient, held_out_judge=ScriptedJudge(lambda v, i: v.frames[-1].mean() > 240))


def test_a_run_warns_once_stops_where_it_is_told_to_and_resumes(tmp_path: Path) -> None:
    with pytest.warns(JudgeGapWarning, match="than the hold-out judge") as caught:
        train(tmp_path / "unbroken", watched_env(), lr=1e-4)
    assert len([w for w in caught if w.category is JudgeGapWarning]) == 1
    lines = log(tmp_path / "unbroken")
    first = next(i for i, line in enumerate(lines) if line["held_out_alarm"]) + 1
    assert first < 4 and lines[0]["held_out_success_rate"] < 0.2 < lines[0]["trusted_success_rate"]
    assert lines[0]["held_out_gap_n"] == lines[0]["trusted"]
    with pytest.warns(JudgeGapWarning):
        stopped = train(tmp_path / "run", watched_env(), lr=1e-4, stop_on_alarm=True, overlap_judge="on")
    assert (stopped.stopped, stopped.step) == ("alarm", first) and "stop_on_alarm off" in stopped.message
    assert train(tmp_path / "run", watched_env(), lr=1e-4, stop_on_alarm=True).step == first
    assert train(tmp_path / "run", watched_env(), lr=1e-4, overlap_judge="on").step == 4
    assert log(tmp_path / "run") == lines


def test_a_world_model_that_knows_its_state_is_compared_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    env = toy_env(judge=lenient)
    step = env.step

    def stepping(actions: Any) -> Any:
        observation, rewards, terminations, truncations, infos = step(actions)
        over = terminations | truncations
        infos |= {"state_success": np.zeros(env.num_envs, bool), "_state_success": over & infos["_verdict"]}
        return observation, rewards, terminations, truncations, infos

    env.step = stepping  # type: ignore[method-assign]
    with pytest.warns(JudgeGapWarning, match="own state"):
        train(tmp_path, env, progress=True)
    line = log(tmp_path)[-1]
    assert line["state_success_rate"] == 0 < line["state_gap_low"] and line["state_alarm"] == 1
    assert not math.isnan(line["state_gap"]) and "held_out_gap" not in line
    printed = capsys.readouterr().err
    assert re.search(r"after step 4:\ntask +success, judged and trusted +state +flagged", printed)
    assert re.search(r"\nnull_left +\d", printed)
