"""One report of a small policy in the simulator and in a dream, and recorded episodes of the simulator imagined again."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rawdream_env.cli import main
from rawdream_env.data import schema
from rawdream_env.data.lerobot import EpisodeData, ShardWriter
from rawdream_env.evaluation.world_model.evaluate import EvaluateWorldModelConfig, evaluate_world_model
from rawdream_env.libero.envs import LiberoSimVectorEnv
from rawdream_env.policies.tiny_vla import TinyVLA, TinyVLAConfig
from rawdream_env.world_models.null import NullWorldModel
from tests.libero.conftest import SIDE

TASKS = ("turn_on_the_stove", "put_the_bowl_on_the_stove", "push_the_plate_to_the_front_of_the_stove")


@pytest.mark.slow
def test_the_report_of_a_small_policy_in_both_worlds(group, tmp_path, capsys) -> None:
    small = TinyVLAConfig(stem_channels=8, trunk_channels=8, width=16, heads=2, decoder_layers=1, bin_rank=8)
    TinyVLA(small, seed=0).save_pretrained(tmp_path / "policy")
    arguments = [
        "policy", "evaluate", "--policies", f"small={tmp_path}/policy",
        "--dream-env", "rawdream/LiberoGoalDream-v0", "--world-model", "null", "--judge", "scripted",
        "--tasks", *TASKS, "--episodes-per-task", "2", "--num-envs", "3", "--max-episode-steps", "1",
        "--workers", "0", "--temperature", "1", "--videos", "1", "--out", str(tmp_path / "report"),
    ]  # fmt: skip
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "protocol raw-dream with horizon 8: suite libero_goal" in out and "turn_on_the_stove" in out
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    (policy,) = report["policies"]
    assert set(policy["tasks"]) == set(TASKS) and policy["all"]["simulator"]["n"] == 6
    for name in ("closed_loop", "dreamed_actions", "simulator_actions", "judge_on_simulator"):
        assert policy["all"][name]["n"] == 6 and 0 <= policy["all"][name]["agreement"]["value"] <= 1
    assert policy["all"]["verification"]["flagged"]["n"] == policy["all"]["dream"]["successes"] > 0
    assert set(policy["horizon"]) == {"dreamed_actions", "simulator_actions"}
    assert report["ranking"]["cells"]["n"] == 3
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Protocol <b>raw-dream with horizon 8</b>" in page and "<video" in page


@pytest.mark.slow
def test_recorded_episodes_are_imagined_again(group, tmp_path) -> None:
    env = LiberoSimVectorEnv(
        2, suite="libero_goal", image_size=SIDE, return_frames=True, max_episode_steps=3, autoreset_mode="Disabled"
    )
    rng = np.random.default_rng(0)
    observation, infos = env.reset(seed=0)
    frames, chunks = [observation["image"][:, None]], rng.uniform(-1, 1, (3, 2, 8, 7)).astype(np.float32)
    states = np.stack([env.start_of(row).proprio for row in range(2)])
    for chunk in chunks:
        frames.append(env.step(chunk)[4]["frames"])
    env.close()
    features = {
        schema.STATE_KEY: schema.numeric_feature(8, list("abcdefgh")),
        schema.ACTION_KEY: schema.numeric_feature(7, list("abcdefg")),
    }
    writer = ShardWriter(str(tmp_path / "data"), fps=20.0, image_shape=(SIDE, SIDE, 3), features=features)
    episodes = [
        EpisodeData(
            frames=np.concatenate(frames, axis=1)[row],
            actions=chunks[:, row].reshape(-1, 7),
            state=np.repeat(states[row][None], 25, axis=0),
            task=infos["instruction"][row],
        )
        for row in range(2)
    ]
    texts = tuple(dict.fromkeys(infos["instruction"]))
    writer.write(0, episodes, first_episode=0, first_row=0, tasks=texts)
    writer.finalize(texts, robot_type="libero_goal")
    config = EvaluateWorldModelConfig(data=(str(tmp_path / "data"),), out=str(tmp_path / "out"), videos=1)
    report = evaluate_world_model(config, world_model=NullWorldModel((SIDE, SIDE, 3), fps=20.0), progress=False).report
    assert [row["frames"] for row in report["horizon"]] == [[0, 8], [8, 16], [16, 24]]
    for row in report["horizon"]:
        for metric in ("psnr", "ssim", "psnr_moving", "ssim_moving"):
            assert row["dream"][metric]["n"] == 2 and np.isfinite(row["dream"][metric]["value"])
    near, far = (report["horizon"][i]["copy_first"]["psnr"]["value"] for i in (0, -1))
    assert near > far, "the arm leaves its start"
