"""A tiny OpenVLA-OFT's run that is killed, interrupted or left without its judge ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import test_grpo_openvla as toy

from rawdream_env import cli
from rawdream_env.judges.scripted import ScriptedJudge
from rawdream_env.policies import load_policy
from rawdream_env.testing.openvla_oft import write_tiny_openvla
from rawdream_env.trainers.common.run_dir import read_jsonl
from rawdream_env.trainers.grpo.grpo import GRPOResult, train_grpo
from rawdream_env.types import Outcome, Verdict
from tests.killing import kill_at_random_moments

pytest.importorskip("peft")
STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_openvla(tmp_path_factory.mktemp("tiny"))


def train(folder: Path, run_dir: Path, env: Any = None, **options: Any) -> GRPOResult:
    policy: Any = load_policy(folder)
    policy.add_lora(4)
    options = {"steps": STEPS, "save_every": 1, "epochs": 2, "max_kl": 0.2, **options}
    return train_grpo(toy.config(run_dir, **options), env=env or toy.toy_env(8), policy=policy)


def train_from(run_dir: Path, folder: str) -> None:
    train(Path(folder), run_dir)


def files_of(run_dir: Path) -> tuple[bytes, Any, Any]:
    manifests = [run_dir / "checkpoints" / f"step_{STEPS:08d}" / "manifest.json", run_dir / "policy" / "manifest.json"]
    hashes = [json.loads(path.read_text()) for path in manifests]
    return (run_dir / "metrics.jsonl").read_bytes(), hashes[0]["files"], hashes[1]


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_bit_identical(folder: Path, tmp_path: Path) -> None:
    unbroken, killed = kill_at_random_moments("test_grpo_killed:train_from", tmp_path, folder)
    assert all(files_of(run) == files_of(unbroken) for run in killed)


def test_ctrl_c_stops_soon_after_the_running_chunk(folder: Path, tmp_path: Path) -> None:
    env, ended = toy.toy_env(8), list[float]()
    step = env.step

    def stepping(actions: Any) -> Any:
        result = step(actions)
        if len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) == 1 and not ended:
            os.kill(os.getpid(), signal.SIGINT)
            ended.append(time.process_time())
        return result

    env.step = stepping  # type: ignore[method-assign]
    result = train(folder, tmp_path / "run", env, save_every=100)
    assert (result.stopped, result.step) == ("interrupted", 1)
    assert time.process_time() - ended[0] < 2.0
    assert (tmp_path / "run" / "policy" / "model.safetensors").is_file()


def moody_judge() -> ScriptedJudge:
    """No verdict while the file that MOODY_JUDGE names exists, else one by the last frame's brightness."""

    def answer(video: Any, instruction: str) -> Any:
        if Path(os.environ["MOODY_JUDGE"]).exists():
            return Verdict(Outcome.INVALID, "connection refused")
        return toy.often_open(video, instruction)

    return ScriptedJudge(answer)


def moody_world() -> Any:
    return toy.ShowGripper()


def test_an_outage_of_the_judge_parks_the_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outage = tmp_path / "outage"
    monkeypatch.setenv("MOODY_JUDGE", str(outage))
    words = ["policy", "grpo", "--policy", str(folder), "--lora-rank", "4", "--env-id", "rawdream/Dream-v0"]
    words += ["--group-size", "4", "--groups-per-step", "2", "--num-envs", "8", "--no-dual-noise-verification"]
    words += [
        "--no-tensorboard",
        "--no-progress",
        "--steps",
        "2",
        "--env-kwargs",
        "judge",
        "test_grpo_killed:moody_judge",
    ]
    words += ["world_model", "test_grpo_killed:moody_world", "starts", "null", "max_episode_steps", "2"]
    run = [*words[:2], "--run-dir", str(tmp_path / "run"), *words[2:]]
    outage.touch()
    assert cli.main(run) == 3
    assert "None of the last 16 episodes could be judged (connection refused)" in capsys.readouterr().err
    outage.unlink()
    assert cli.main(run) == 0
    assert cli.main([*words[:2], "--run-dir", str(tmp_path / "unbroken"), *words[2:]]) == 0
    logs = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("run", "unbroken")]
    assert logs[0] == logs[1] and logs[0].count(b"\n") == 2
