"""What a run sends to experiment trackers, with stand-ins for the packages; and evaluation during training."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import pytest
import torch
from test_grpo import TinyPolicy, toy_env, train, weights

from rawdream_env.envs.dream import DreamVectorEnv
from rawdream_env.errors import MissingDependencyError
from rawdream_env.media import read_video
from rawdream_env.trainers.common.run_dir import read_jsonl


def simulator(num_envs: int, **kwargs: Any) -> DreamVectorEnv:
    del kwargs["task"], kwargs["layout"]
    return toy_env(num_envs, **kwargs)


gym.register("test/Toy-v0", entry_point=simulator, vector_entry_point=simulator)


def stand_in(name: str) -> Any:
    module: Any = ModuleType(name)
    module.calls = []
    module.init = lambda **options: module.calls.append(("init", options))
    module.log = lambda values, step: module.calls.append(("log", step, values))
    module.finish = lambda: module.calls.append(("finish",))
    return module


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_what_the_log_has_and_its_run_continues(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = stand_in(name)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv(f"{name.upper()}_PROJECT", raising=False)
    train(tmp_path / "run", steps=1, report_to=(name,))
    train(tmp_path / "run", steps=2, report_to=(name,))
    (first, second) = (call[1] for call in module.calls if call[0] == "init")
    assert first["name"] == second["name"] and first["name"].startswith("run-") and first["resume"] == "allow"
    assert first["project"] == "rawdream" and first["config"]["steps"] == 1 and ("id" in first) == (name == "wandb")
    assert [call[0] for call in module.calls].count("finish") == 2
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl") + read_jsonl(tmp_path / "run" / "timings.jsonl")
    sent = [(call[1], key, value) for call in module.calls if call[0] == "log" for key, value in call[2].items()]
    expected = [(line.pop("step"), line) for line in lines]
    assert sorted(sent) == sorted((s, k, v) for s, line in expected for k, v in line.items() if v is not None)


def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingDependencyError, match=r"needs wandb: pip install 'rawdream-env\[wandb\]'"):
        train(tmp_path, report_to=("wandb",))


def test_the_averaged_policy_is_evaluated_in_the_simulator_and_training_is_unchanged(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 4, "ema": 0.9}
    plain = train(tmp_path / "plain", **options)
    seen: list[Any] = []

    class Watched(TinyPolicy):
        def act(self, images: Any, instructions: Any, **kwargs: Any) -> Any:
            if kwargs["temperature"] == 0.25:
                seen.append(self.linear.weight.detach().clone())
            return super().act(images, instructions, **kwargs)

    evaluation: dict[str, Any] = {
        "eval_every": 2, "eval_env_id": "test/Toy-v0", "eval_episodes": 6, "eval_temperature": 0.25, "eval_videos": 2,
    }  # fmt: skip
    watched = train(tmp_path / "watched", toy_env(), Watched(), **options, **evaluation)
    assert torch.equal(weights(plain), weights(watched))
    assert torch.equal(seen[-1], watched.policy.linear.weight)  # step 4, averaged
    lines = read_jsonl(tmp_path / "watched" / "metrics.jsonl")
    rates = [line.get("eval_success_rate") for line in lines]
    assert rates[0] is rates[2] is None and all(0 <= rates[i] <= 1 and lines[i]["eval_n"] == 6 for i in (1, 3))
    assert lines[1]["eval_success_low"] <= rates[1] <= lines[1]["eval_success_high"]
    videos = sorted((tmp_path / "watched" / "videos").iterdir())
    assert [video.name for video in videos] == ["step_00000002.mp4", "step_00000004.mp4"]
    assert len(read_video(videos[0])[0]) == 2 * (1 + 2 * 2)
    assert [{k: v for k, v in line.items() if not k.startswith("eval_")} for line in lines] == read_jsonl(
        tmp_path / "plain" / "metrics.jsonl"
    )
