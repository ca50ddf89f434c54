"""Trials on the arm, with a stand-in for it: order, blindness, resuming, INVALID trials, the third column."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
from test_side_by_side import CONFIG, ToyPolicy, ToySimulator, make_dream

from rawdream_env.errors import DatasetError, InvalidOptionError
from rawdream_env.evaluation.side_by_side import trials as trials_module
from rawdream_env.evaluation.side_by_side.evaluate import EvaluateConfig, evaluate
from rawdream_env.evaluation.side_by_side.table import table
from rawdream_env.evaluation.side_by_side.trials import Trial, add_trials, plan_trials, run_trials
from rawdream_env.robots import Robot

FORCES = {"weak": 0.3, "strong": 0.9}


class Arm(ToySimulator):
    """One arm; the operator leaves after ``shift`` trials, and does not know the outcome of trial ``unknown``."""

    def __init__(self, shift=10**9, unknown=-1):
        super().__init__(1)
        self.shift, self.unknown = shift, unknown

    def reset(self, **kwargs):
        if len(self.resets) == self.shift:
            raise KeyboardInterrupt
        return super().reset(**kwargs)

    def infos(self, verdict):
        infos = super().infos(verdict)
        if len(self.resets) == self.unknown + 1:
            infos |= {"verdict": np.full(1, -1), "valid": np.zeros(1, bool)}
        return infos


def config(tmp_path, **changes):
    return replace(CONFIG, real=True, real_trials=3, episodes_per_task=4, out=tmp_path, **changes)


def policies():
    return {name: ToyPolicy(force) for name, force in FORCES.items()}


def trials(tmp_path, arm, **changes):
    return run_trials(config(tmp_path, **changes), policies(), arm, progress=False)


def test_every_policy_meets_every_start_in_an_order_of_its_own():
    plan = plan_trials(["a", "b", "c"], ["x", "y"], 30, seed=0)
    assert len(set(plan)) == len(plan) == 180
    blocks = [plan[i : i + 3] for i in range(0, 180, 3)]
    assert all(len({(t.task, t.index) for t in block}) == 1 for block in blocks)
    orders = [tuple(t.policy for t in block) for block in blocks]
    assert len(set(orders)) == 6 and 10 < sum(order[0] == "a" for order in orders) < 30
    assert {block[0].task for block in blocks[::2]} == {"x", "y"}
    assert plan_trials(["a", "b", "c"], ["x", "y"], 10, seed=0) == plan[:60] != plan_trials("abc", "xy", 10, seed=1)


def test_interrupted_trials_resume_and_give_the_same_outcomes(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    whole = trials(tmp_path / "whole", Arm())
    with pytest.raises(KeyboardInterrupt):
        trials(tmp_path / "parts", Arm(shift=5))
    assert len((tmp_path / "parts/real/trials.jsonl").read_text().splitlines()) == 5
    rest = Arm()
    assert trials(tmp_path / "parts", rest) == whole and len(rest.resets) == 12 - 5
    assert trials(tmp_path / "parts", idle := Arm()) == whole and not idle.resets
    longer = replace(config(tmp_path / "parts"), real_trials=4)
    longer = run_trials(longer, policies(), more := Arm(), progress=False)
    assert longer[:12] == whole and len(more.resets) == 4
    assert {outcome for _, outcome in whole} == {0, 1}
    said = caplog.text + (tmp_path / "whole/real/trials.jsonl").read_text()
    assert "trial 12 of 12" in said and not any(name in said for name in FORCES)  # nobody is told who acts


def test_an_invalid_trial_is_no_failure_and_is_repeated_by_the_next_run(tmp_path):
    first = trials(tmp_path, Arm(unknown=2))
    assert [number for number, (_, outcome) in enumerate(first) if outcome == -1] == [2]
    arm = Arm()
    assert trials(tmp_path, arm) == trials(tmp_path / "whole", Arm()) and len(arm.resets) == 1


def test_a_ledger_of_something_else_or_a_damaged_one_is_refused(tmp_path):
    trials(tmp_path, Arm())
    with pytest.raises(DatasetError, match="seed"):
        trials(tmp_path, Arm(), seed=1)
    with pytest.raises(DatasetError, match="policies"):
        run_trials(config(tmp_path), {"weak": ToyPolicy(0.3)}, Arm(), progress=False)
    ledger = tmp_path / "real/trials.jsonl"
    lines = ledger.read_text().splitlines()
    for bad in ("{", "7", json.dumps({**json.loads(lines[3]), "outcome": 2}), lines[3].replace("_", " ")):
        ledger.write_text("\n".join([*lines[:3], bad]))
        with pytest.raises(DatasetError, match="line 4 is damaged"):
            trials(tmp_path, Arm())
    with pytest.raises(InvalidOptionError, match="8 rows"):
        trials(tmp_path, ToySimulator(8))


def test_the_arm_is_the_third_column_of_the_report(tmp_path):
    def run(arm):
        return evaluate(
            config(tmp_path),
            policies=policies(),
            dream=make_dream(),
            simulator=ToySimulator(),
            real=arm,
            progress=False,
        )

    with pytest.raises(KeyboardInterrupt):
        run(Arm(shift=7))  # trials come first
    arm = Arm(unknown=4)
    result = run(arm)
    assert len(arm.resets) == 5
    weak, strong = result.report["policies"]
    # The stand-in is the simulator: the first three starts of each task have its outcomes.
    same = [r.simulator for r in result.records if r.policy == "strong" and r.index < 3]
    real = strong["all"]["real"]
    assert (real["n"], strong["all"]["real_invalid"]) in ((6, 0), (5, 1)) and real["n"] + weak["all"]["real"]["n"] == 11
    assert real["successes"] in (sum(same), sum(same) - 1)
    assert strong["gain"]["real"]["n"] == 5 and strong["gain"]["real"]["value"] > 0
    assert result.report["trials"] == {"trials": 12, "invalid": 1}
    printed = table(result.report)
    assert printed.splitlines()[0].split()[-2:] == ["simulator", "real"] and "'weak', real: +" in printed
    page = (tmp_path / "report.html").read_text()
    assert "Gain on the arm" in page and "12 trials (1 INVALID)" in page
    assert json.loads((tmp_path / "report.json").read_text())["policies"][0]["tasks"]["place_cup"]["real"]["n"] in (
        2,
        3,
    )


def test_rates_by_hand():
    report = {"reference": "a", "policies": [{"name": n, "all": {}, "tasks": {"x": {}}} for n in "ab"]}
    report["policies"][1]["gain"] = {}
    outcomes = {("a", 0): 0, ("b", 0): 1, ("a", 1): -1, ("b", 1): 1, ("a", 2): 1, ("b", 2): 1}
    add_trials(report, [(Trial(name, "x", index), outcome) for (name, index), outcome in outcomes.items()])
    a, b = report["policies"]
    assert (a["all"]["real"]["successes"], a["all"]["real"]["n"], a["all"]["real_invalid"]) == (1, 2, 1)
    assert b["tasks"]["x"]["real"]["value"] == 1.0
    assert b["gain"]["real"]["value"] == 0.5 and b["gain"]["real"]["n"] == 2


def test_options(tmp_path, monkeypatch):
    with pytest.raises(InvalidOptionError, match="folder"):
        EvaluateConfig(real=True, out=None)
    nothing = Robot("toy", dream_env="", sim_env="")
    monkeypatch.setattr(trials_module, "find_robot", lambda name: nothing)
    with pytest.raises(InvalidOptionError, match="pass the id of one with --real-env"):
        evaluate(config(tmp_path), policies=policies(), dream=make_dream(), simulator=ToySimulator(), progress=False)
