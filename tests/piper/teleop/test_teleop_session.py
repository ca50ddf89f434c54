"""Episodes driven by key presses: recorded, replayed in the twin, and trained on."""

from __future__ import annotations

import io
import json
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from rawdream_env import cli
from rawdream_env.data.lerobot import LeRobotReader
from rawdream_env.errors import CameraError, DatasetError, InvalidOptionError, RendererError, RunDirError
from rawdream_env.piper import geometry as geo
from rawdream_env.piper.arm.clock import LockstepClock
from rawdream_env.piper.relations import TASKS
from rawdream_env.piper.starts import SimStarts
from rawdream_env.piper.teleop.arm_target import ArmTarget
from rawdream_env.piper.teleop.session import Pace, Screen, TeleopConfig, scene_seed, teleoperate
from rawdream_env.seeding import NoiseKey

KEEP = "10 s r\n4 2 d space\n10 w e f\n1 enter\n"
DISCARD = "5 a\n1 backspace\n"


class Arm:
    """A target that is no twin: no truth about objects."""

    def __init__(self):
        self.pose, self.resets = geo.HOME_POSE, []

    def reset(self, seed, *, task=None, layout="narrow"):
        self.resets.append((seed, task))
        self.pose = geo.HOME_POSE
        return self.frame()

    def step(self, action):
        self.pose = geo.integrate_action(self.pose, action)
        return self.frame()

    def frame(self):
        return np.full((16, 16, 3), int(400 * self.pose[0]), np.uint8)

    def proprio(self):
        return self.pose.astype(np.float32)

    def close(self):
        pass


def run(tmp_path, keys, driven=None, **changes):
    (tmp_path / "keys.txt").write_text(keys)
    config = TeleopConfig(str(tmp_path / "data"), str(tmp_path / "keys.txt"), episodes=2, image_size=16)
    return teleoperate(replace(config, **changes), target=driven)


def test_keep_discard_and_resume(tmp_path):
    arm = Arm()
    root = run(tmp_path, DISCARD + "1 enter\n" + KEEP + "3 w", arm)  # the empty one and the unfinished one are not kept
    reader = LeRobotReader(root)
    assert len(reader) == 1 and len(reader.episode(0)) == 24 and not reader.episode(0).privileged
    assert len(arm.resets) == 4 and arm.resets[0] == arm.resets[2] == (scene_seed(0, 0), None)
    assert arm.resets[3] == (scene_seed(0, 1), None)
    assert len(LeRobotReader(run(tmp_path, KEEP * 3, arm))) == 2
    assert len(arm.resets) == 5  # one was missing
    with pytest.raises(DatasetError, match="with seed=0, now it is 1"):
        run(tmp_path, KEEP, arm, seed=1, episodes=3)
    with pytest.raises(InvalidOptionError, match="demonstrations"):
        run(tmp_path, KEEP, arm, tasks=("place_cup",))


def test_demonstrations_have_their_instruction_and_end_in_time(tmp_path):
    arm = Arm()
    root = run(
        tmp_path, ("20 w\n" + KEEP) * 2, arm, kind="demonstrations", tasks=("place_cup", "put_spoon"), max_steps=8
    )
    reader = LeRobotReader(root)
    words = {task.name: task.instruction for task in TASKS}
    assert [reader.task(i) for i in range(2)] == [words["place_cup"], words["put_spoon"]]
    assert [len(episode) for episode in reader] == [8, 8]
    assert [task for _, task in arm.resets] == ["place_cup", "put_spoon"]


class Driver:
    """An arm whose guard halves every motion."""

    def __init__(self):
        self.pose, self.log, self.clock = geo.HOME_POSE + 0.01, [], LockstepClock()

    def send_action(self, action, *, late_is_fault=True):
        assert not late_is_fault
        action = np.append(np.asarray(action)[:6] / 2, action[6])
        self.pose = geo.integrate_action(self.pose, action)
        self.log.append("send")
        return SimpleNamespace(action=action)

    def move_over(self, pose):
        self.pose = np.array(pose)
        self.log.append("home")

    def hold(self):
        self.log.append("hold")

    def close(self):
        self.log.append("close")


class Camera:
    def __init__(self, frames=10**9):
        self.left = frames

    def read(self):
        if not self.left:
            raise CameraError("unplugged.")
        self.left -= 1
        return np.full((16, 16, 3), 100, np.uint8), time.monotonic()

    def close(self):
        pass


def test_an_arm_records_what_was_sent_and_holds_while_nobody_commands(tmp_path):
    driver = Driver()
    root = run(tmp_path, "3\n2 s space\n1 enter\n", ArmTarget(driver, Camera()), episodes=1)
    assert driver.log == ["home", *["hold"] * 3, "send", "send", "hold"]  # nothing is sent before the first command
    episode = LeRobotReader(root).episode(0)
    assert episode.actions.tolist() == [[0.5, 0, 0, 0, 0, 0, 1]] * 2
    np.testing.assert_allclose(episode.state[0], geo.HOME_POSE, atol=1e-6)
    poses = geo.integrate_actions(geo.HOME_POSE, episode.actions.astype(float))
    np.testing.assert_allclose(episode.state[1:], poses, atol=1e-6)


def test_without_pictures_the_arm_holds_and_what_was_kept_stays(tmp_path):
    driver = Driver()
    with pytest.raises(CameraError, match="unplugged"):
        run(tmp_path, "1 s\n1 enter\n5 s\n", ArmTarget(driver, Camera(frames=8)))
    assert driver.log[-2:] == ["send", "hold"] and len(LeRobotReader(tmp_path / "data")) == 1


def test_the_fake_arm_is_driven_over_its_bus_and_a_missing_bus_has_a_name(tmp_path, capsys):
    pytest.importorskip("piper_sdk", reason="needs the extra piper")
    from rawdream_env.piper.simulator.twin import PiperTwin

    root = run(tmp_path, "4 s\n2 r space\n1 enter\n", episodes=1, target="arm:fake")
    episode = LeRobotReader(root).episode(0)
    assert len(episode) == 6 and not episode.privileged and len(np.unique(episode.frames.reshape(7, -1), axis=0)) > 4
    np.testing.assert_allclose(episode.state[4, 0] - episode.state[0, 0], 4 * geo.DPOS, atol=1e-6)
    twin = PiperTwin(render=False)
    twin.reset(scene_seed(0, 0))
    for action, pose in zip(episode.actions, episode.state[1:], strict=True):
        twin.step(action, render=False)
        np.testing.assert_allclose(twin.proprio(), pose, atol=1e-5)
    keys = ["--source", str(tmp_path / "keys.txt"), "--out", str(tmp_path / "other")]
    assert cli.main(["data", "teleop", "--target", "arm:can7", *keys]) == 2
    assert "needs a camera: add --camera" in capsys.readouterr().err
    assert cli.main(["data", "teleop", "--target", "arm:can7", "--camera", "twin", *keys]) == 2
    assert "CAN bus can7 cannot be opened" in capsys.readouterr().err


def test_the_terminal_shows_the_picture_at_ten_frames_a_second(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdout", terminal)
    picture = np.zeros((128, 128, 3), np.uint8)
    picture[:64] = (255, 0, 7)
    Screen(live=True).show(picture, "episode 1")
    drawn = terminal.getvalue()
    assert drawn.count("\u2580") == 32 * 64 and drawn.count("\x1b[48;2;255;0;7m") == 16 * 64 and "episode 1" in drawn
    before, pace = time.monotonic(), Pace(live=True)
    for _ in range(3):
        pace.wait()
    assert time.monotonic() - before >= 0.29


def test_recorded_replayed_and_trained_on(tmp_path, capsys):
    try:
        SimStarts().sample(NoiseKey(0))
    except RendererError as error:
        pytest.skip(f"no OpenGL here: {error}")
    from rawdream_env.piper.simulator.twin import PiperTwin
    from rawdream_env.trainers.world_model.config import StageConfig, WorldModelTrainConfig
    from rawdream_env.trainers.world_model.train import train_world_model
    from rawdream_env.world_models.autoencoders import AutoencoderConfig
    from rawdream_env.world_models.loading import read_world_model
    from rawdream_env.world_models.wan.config import WanConfig

    (tmp_path / "keys.txt").write_text(KEEP)
    out = tmp_path / "data"
    assert (
        cli.main(["data", "teleop", "--source", str(tmp_path / "keys.txt"), "--out", str(out), "--episodes", "1"]) == 0
    )
    assert f"Written to {out}" in capsys.readouterr().out
    episode = LeRobotReader(out).episode(0)
    twin = PiperTwin(render=False)
    twin.reset(scene_seed(0, 0))
    for t, action in enumerate(episode.actions):
        np.testing.assert_array_equal(twin.proprio(), episode.state[t])
        np.testing.assert_array_equal(np.float32(twin.object_poses()).ravel(), episode.privileged["object_poses"][t])
        twin.step(action, render=False)
    np.testing.assert_array_equal(twin.proprio(), episode.state[-1])
    assert np.abs(episode.state[-1] - episode.state[0]).max() > 0.05

    stage = StageConfig(steps=1, batch_size=1, lr=1e-3, warmup=1)
    model = WanConfig(
        num_layers=1, num_attention_heads=2, attention_head_dim=24, ffn_dim=64, stem_channels=16,
        stem_blocks=1, head_blocks=1, arm_map_channels=384, warp_last_frame=True,
    )  # fmt: skip
    camera = [0.7, 0.1, 0.5, 1.2, 1.2, 1.2, 40.0, 0.5, 0.5]
    (tmp_path / "camera.json").write_text(json.dumps({"camera": camera}))
    config = WorldModelTrainConfig(
        data=(str(out),), run_dir=str(tmp_path / "run"), bf16=False, episode_chunks=3, autoencoder=stage, transformer=stage,
        model=model, autoencoder_model=AutoencoderConfig(widths=(16, 16)),
        camera=str(tmp_path / "camera.json"),
    )  # fmt: skip
    trained = read_world_model(train_world_model(config))
    assert trained.config.arm_map.camera == tuple(camera) and trained.robot == "piper"
    train_world_model(config)  # the finished run
    with pytest.raises(RunDirError, match="another configuration"):
        train_world_model(replace(config, camera=""))
