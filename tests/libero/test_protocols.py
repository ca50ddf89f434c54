from __future__ import annotations

import json
from dataclasses import replace

import pytest

from rawdream_env.errors import DatasetError, InvalidOptionError, ProtocolMismatchError
from rawdream_env.evaluation.side_by_side.compare import CompareConfig, compare, require_same_protocol
from rawdream_env.libero import SUITES
from rawdream_env.libero.protocols import PROTOCOLS, find_protocol, state_number


def test_named_protocols() -> None:
    assert PROTOCOLS == ("raw-dream", "openvla-oft", "simplevla", "rlinf", "lerobot")
    official = [find_protocol("openvla-oft", suite) for suite in SUITES]
    assert [p.horizon for p in official] == [220, 280, 300, 520, 400]
    assert {(p.settle_steps, p.seed, p.trials, p.eval_states) for p in official} == {(10, 7, 50, (0, 50))}
    assert {find_protocol("simplevla", suite).horizon for suite in SUITES} == {512}
    others = {name: [find_protocol(name, suite) for suite in SUITES] for name in ("rlinf", "lerobot")}
    assert [p.horizon for p in others["rlinf"]] == [240, 240, 320, 512, 512]
    assert [p.horizon for p in others["lerobot"]] == [280, 280, 300, 520, 400]
    assert {(p.settle_steps, p.seed, p.trials) for p in others["rlinf"]} == {(15, 0, 50)}
    assert {(p.settle_steps, p.seed, p.trials) for p in others["lerobot"]} == {(10, 1000, 10)}
    assert official[0].chunks(8) == 28  # of the last one 4 steps


def test_scenes_end_with_the_number_of_the_initial_state() -> None:
    protocol = find_protocol("raw-dream", "libero_goal")
    trials = [protocol.trial(0, 3, index, "eval") for index in range(100)]
    assert [state_number(seed) for seed in trials] == 2 * list(range(50))
    assert len(set(trials)) == 100
    drawn = {state_number(protocol.scene(seed, "train")) for seed in range(1000, 1100)}
    assert drawn == set(range(25))
    assert protocol.trial(1, 3, 0, "eval") != trials[0] != protocol.trial(0, 4, 0, "eval")


def test_a_changed_protocol_is_another_one() -> None:
    protocol = find_protocol("raw-dream", "libero_goal")
    assert protocol.changed(horizon=300, settle_steps=None) is protocol
    short = protocol.changed(horizon=16, settle_steps=0)
    assert (short.name, short.horizon, short.settle_steps) == ("raw-dream with horizon 16, settle_steps 0", 16, 0)
    assert find_protocol(short, "libero_goal") is short
    with pytest.raises(InvalidOptionError, match="settle_steps=-1"):
        protocol.changed(settle_steps=-1)
    with pytest.raises(InvalidOptionError, match="'openvla'.*'openvla-oft'"):
        find_protocol("openvla", "libero_goal")
    with pytest.raises(InvalidOptionError, match="is of libero_goal, the environment is of libero_10"):
        find_protocol(short, "libero_10")


def test_different_protocols_refuse_to_be_compared() -> None:
    a, b = (find_protocol(name, "libero_spatial").as_dict() for name in ("openvla-oft", "rlinf"))
    require_same_protocol({"a": a, "again": json.loads(json.dumps(a))})
    require_same_protocol({"a": None, "b": None})
    with pytest.raises(ProtocolMismatchError, match="name openvla-oft and rlinf, horizon 220 and 240, settle_steps 10"):
        require_same_protocol({"a": a, "again": a, "b": b})
    with pytest.raises(ProtocolMismatchError, match="none and openvla-oft"):
        require_same_protocol({"piper": None, "a": a})


def test_reports_are_compared_if_they_follow_one_protocol(tmp_path) -> None:
    protocol = find_protocol("raw-dream", "libero_goal")
    rate = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 50, "successes": 25}
    policy = {"name": "sft", "all": {"simulator": rate, "dream_trusted": rate}}
    folders = []
    for number, recorded in enumerate((protocol, protocol, replace(protocol, trials=10))):
        folders.append(tmp_path / str(number))
        folders[-1].mkdir()
        (folders[-1] / "report.json").write_text(json.dumps({"policies": [policy], "protocol": recorded.as_dict()}))
    text = compare(CompareConfig(tuple(folders[:2])))
    assert text.count("sft") == 2 and "50.0" in text and "protocol raw-dream: suite libero_goal, horizon 300" in text
    with pytest.raises(ProtocolMismatchError, match="trials 50 and 10"):
        compare(CompareConfig(tuple(folders)))
    with pytest.raises(DatasetError, match="report.json is missing"):
        compare(CompareConfig((folders[0], tmp_path)))
    with pytest.raises(InvalidOptionError, match="1 reports"):
        compare(CompareConfig(folders[0:1]))
