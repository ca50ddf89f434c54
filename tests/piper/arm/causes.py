"""What goes wrong with an arm: each cause takes something with ``bus`` (a ``FakeArmBus``) and ``driver``."""

from __future__ import annotations

import random
from collections import deque

import can

from rawdream_env.piper.arm import frames as fr
from rawdream_env.piper.arm.faults import FaultKind


def silent(r):
    r.bus.feedback = lambda frames: []


def frozen(r):
    held = r.bus.arm.feedback()
    r.bus.feedback = lambda frames: held


def jumping(r):
    def jumped(frames):
        joints = [f for f in frames if f.can_id in fr.FEEDBACK_JOINT_IDS]
        moved = iter(fr.encode_joints(fr.decode_joints(joints) + 0.2))
        return [fr.Frame(f.can_id, next(moved).data) if f in joints else f for f in frames]

    r.bus.feedback = jumped


def bus_off(r):
    r.bus._bus.send(can.Message(arbitration_id=0x40, is_error_frame=True, data=bytes(8)))


def unplugged(r):
    r.driver.link._bus.send_bus.shutdown()


def lossy(r):
    rng = random.Random(0)
    r.bus.feedback = lambda frames: [f for f in frames if rng.random() > 0.3]
    see = r.bus.commands
    r.bus.commands = lambda frame: see(frame) and rng.random() > 0.3


def delayed(r):
    late = deque()
    r.bus.feedback = lambda frames: (late.append(frames), late.popleft() if len(late) > 60 else [])[1]


def motor_off(r):
    r.bus.feedback = lambda frames: [f if f.can_id != 0x265 else fr.Frame(f.can_id, bytes(8)) for f in frames]


def collision(r):
    r.bus.arm.status = 7
    r.bus.arm._aim = lambda parts: None


def blocked(r):
    r.bus.arm.advance = lambda seconds: setattr(r.bus.arm, "joints", r.bus.arm.joints + 1e-5)


FAULTS = [  # name, cause, kind, when it can be known (s after its beginning)
    ("silent", silent, FaultKind.SILENT, 0.05),
    ("frozen", frozen, FaultKind.FROZEN, 0.15 + 0.1),  # after the arm was first sent 5 mm away
    ("jumping", jumping, FaultKind.JUMP, 0.0),
    ("bus off", bus_off, FaultKind.BUS, 0.0),
    ("unplugged", unplugged, FaultKind.BUS, 0.1),  # at the next frame to be sent
    ("30 % of frames lost", lossy, FaultKind.LOSS, 0.05),
    ("delayed by 0.3 s", delayed, FaultKind.SILENT, 0.05),
    ("motor without power", motor_off, FaultKind.ARM, 0.0),
    ("controller fault", collision, FaultKind.ARM, 0.0),
    ("blocked", blocked, FaultKind.LAG, 0.6),  # 40 mm at 6 mm a step
]
