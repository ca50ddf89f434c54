"""Keyboard, key files, gamepad and master arm as actions."""

from __future__ import annotations

import os
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from rawdream_env.errors import InvalidOptionError, MissingDependencyError
from rawdream_env.piper import geometry as geo
from rawdream_env.piper.arm import frames as can_frames
from rawdream_env.piper.teleop.controls import Event, Gamepad, Keyboard, ScriptedKeys
from rawdream_env.piper.teleop.master import MasterArm, gripper_command

HOME = geo.HOME_POSE


def script(tmp_path, text):
    (tmp_path / "keys.txt").write_text(text)
    return ScriptedKeys(tmp_path / "keys.txt")


def test_key_files_step_by_step(tmp_path):
    keys = script(tmp_path, "2 w r   # away and up\n\n1 2 d space\n1\n1 enter\n")
    moves = [keys.command(HOME) for _ in range(5)]
    assert [move.event for move in moves] == [None] * 4 + [Event.KEEP]
    assert moves[0].action.tolist() == moves[1].action.tolist() == [-1, 0, 1, 0, 0, 0, -1]
    assert moves[2].action.tolist() == [0, 0.5, 0, 0, 0, 0, 1]
    closed = np.append(HOME[:6], 1.0)
    assert keys.command(closed).event is Event.QUIT and keys.command(closed).action[6] == 1.0
    for line in ("w 2", "1 enter now", "1.5 w", "9999999 w"):
        with pytest.raises(InvalidOptionError, match="line 2"):
            script(tmp_path, f"1 w\n{line}\n")


def test_the_keyboard_is_a_terminal_and_gives_it_back():
    import termios

    person, terminal = os.openpty()
    before = termios.tcgetattr(terminal)
    keyboard = Keyboard(terminal)
    assert keyboard.command(HOME).action.tolist() == [0, 0, 0, 0, 0, 0, -1]
    os.write(person, b"ww\x1b[C ")  # held away, arrow to the right, space
    assert keyboard.command(HOME).action.tolist() == [-1, 1, 0, 0, 0, 0, 1]
    for pressed, event in ((b"\r", Event.KEEP), (b"\x7f", Event.DISCARD), (b"\x1b", Event.QUIT), (b"x", None)):
        os.write(person, pressed)
        assert keyboard.command(HOME).event is event
    keyboard.close()
    keyboard.close()
    assert termios.tcgetattr(terminal) == before
    reading, writing = os.pipe()
    with pytest.raises(InvalidOptionError, match="needs a terminal"):
        Keyboard(reading)
    for fd in (person, terminal, reading, writing):
        os.close(fd)


def test_the_gamepad(monkeypatch):
    monkeypatch.setitem(sys.modules, "pygame", None)
    with pytest.raises(MissingDependencyError, match="pip install pygame"):
        Gamepad()
    axes, buttons, hat = {0: 0.05, 1: -1.0, 3: 0.5, 4: -0.25}, set(), [0, 1]
    pad = SimpleNamespace(
        get_axis=axes.get, get_button=lambda b: b in buttons, get_numhats=lambda: 1, get_hat=lambda _: tuple(hat)
    )
    count = [0]
    pygame = SimpleNamespace(
        init=lambda: None,
        quit=lambda: None,
        event=SimpleNamespace(pump=lambda: None),
        joystick=SimpleNamespace(get_count=lambda: count[0], Joystick=lambda _: pad),
    )
    monkeypatch.setitem(sys.modules, "pygame", pygame)
    with pytest.raises(InvalidOptionError, match="0 found"):
        Gamepad()
    count[0] = 1
    gamepad = Gamepad()
    assert gamepad.command(HOME).action.tolist() == [-1, 0, 0.25, 0, 1, 0.5, -1]
    buttons |= {0, 7}
    pressed, still = gamepad.command(HOME), gamepad.command(HOME)
    assert pressed.action[6] == 1.0 and pressed.event is Event.KEEP and still.event is None


class Bus:
    """Frames in a list."""

    def __init__(self):
        self.waiting = []

    def receive(self):
        return self.waiting.pop(0) if self.waiting else None

    def close(self):
        pass


def test_gripper_commands_invert_the_opening():
    for command in (-1.0, -0.3, 0.5):
        assert gripper_command(float(geo.finger_opening(np.float64(command)))) == pytest.approx(command)
    assert gripper_command(0.2) == -1.0 and gripper_command(-0.01) == 1.0


def test_the_master_arm_is_followed_at_the_speed_of_actions_and_never_when_silent(tmp_path):
    bus, now = Bus(), [0.0]
    master = MasterArm(bus, script(tmp_path, "100 w\n1 enter\n"), clock=lambda: now[0])
    goal = np.array([0.33, -0.06, 0.09, 0.05, 0.1, 0.4, 0.2])
    pose = HOME.copy()
    assert master.command(pose).action.tolist() == [0, 0, 0, 0, 0, 0, -1]  # nothing heard yet; keys do not move
    joints = can_frames.encode_joints(geo.joint_angles(goal))
    gripper = can_frames.encode_gripper(can_frames.Gripper(float(geo.finger_opening(goal[6])), 1.0, 1))
    bus.waiting = [*joints, gripper]
    first = master.command(pose).action
    assert np.abs(first).max() == 1.0
    for _ in range(12):
        bus.waiting = [*joints, gripper]
        pose = geo.integrate_action(pose, master.command(pose).action)
    np.testing.assert_allclose(pose, goal, atol=2e-4)
    bus.waiting = [joints[0], joints[2]]  # one of three was lost
    now[0] = 0.31
    held = master.command(HOME).action
    assert held.tolist() == [0, 0, 0, 0, 0, 0, -1]
    bus.waiting = list(joints)
    assert np.abs(master.command(HOME).action[:6]).max() > 0.5
    assert Event.KEEP in [master.command(HOME).event for _ in range(90)]


def test_master_and_fake_arm_on_one_bus():
    """As with two arms wired together: the fake arm follows the same frames that the receiver reads."""
    can = pytest.importorskip("can", reason="needs the extra piper")
    from rawdream_env.piper.arm.fake_bus import FakeArmBus
    from rawdream_env.piper.teleop.master import CanReceiver

    goal = np.array([0.30, 0.05, 0.12, 0.0, 0.0, 0.2, -1.0])
    joints = geo.joint_angles(goal)
    with pytest.raises(InvalidOptionError, match="no-such-can cannot be opened"):
        CanReceiver("no-such-can")
    nobody = SimpleNamespace(command=lambda pose: SimpleNamespace(event=None), close=lambda: None)
    with FakeArmBus("two arms") as fake, can.Bus("two arms", interface="virtual") as hand:
        master = MasterArm(CanReceiver("two arms", "virtual"), nobody)
        mode = can_frames.encode_mode(can_frames.Mode(True, can_frames.MoveMode.JOINT, 100))
        pose, tick = HOME.copy(), threading.Event()
        for _ in range(3000):
            for frame in (can_frames.encode_power(True), mode, *can_frames.encode_joints(joints)):
                hand.send(can.Message(arbitration_id=frame.can_id, data=frame.data, is_extended_id=False))
            tick.wait(0.02)
            pose = geo.integrate_action(pose, master.command(pose).action)
            if np.allclose(fake.arm.joints, joints, atol=1e-4) and np.allclose(pose, goal, atol=2e-4):
                break
        master.close()
    np.testing.assert_allclose(fake.arm.joints, joints, atol=1e-4)
    np.testing.assert_allclose(pose, goal, atol=2e-4)
