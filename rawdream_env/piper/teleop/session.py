"""``rawdream data teleop``: a person drives the arm, and the episodes that are kept become a data set.

The data set has the columns, rates and units of ``rawdream data collect``, so that it trains world model, judge and policy. On
the twin it also has the truth about the objects.
"""

from __future__ import annotations

import logging
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from rawdream_env.config import parse_choice, parse_positive_int
from rawdream_env.data import schema
from rawdream_env.data.lerobot import LeRobotWriter
from rawdream_env.data.recording import claim_folder, only_writer
from rawdream_env.errors import InvalidOptionError
from rawdream_env.piper.arm.camera import CameraView
from rawdream_env.piper.collect import PLAY_TASK, PiperSource, Recording, knows_objects
from rawdream_env.piper.geometry import CONTROL_HZ, check_image_size
from rawdream_env.piper.relations import TASKS, find_task
from rawdream_env.piper.teleop.controls import HELP, Event, Gamepad, Keyboard, Operator, ScriptedKeys, hold
from rawdream_env.piper.teleop.master import CanReceiver, MasterArm
from rawdream_env.resolve import resolve
from rawdream_env.seeding import mix
from rawdream_env.types import Float32Array, UInt8Array

CONFIG_PATH = "meta/teleop.json"
_STREAM = 77
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TeleopConfig:
    """Options of ``rawdream data teleop``."""

    out: str
    """Folder of the data set. Rerun the same command to add the missing episodes."""
    source: str = "keyboard"
    """"keyboard", "gamepad", "master:can1" (Piper's master arm on that CAN bus; the keyboard ends episodes), or a file of key
    presses: lines such as "12 w r", a number of steps and the keys pressed in each."""
    target: str = "twin"
    """What is driven: "twin" (the simulator), "arm:can0" (the arm on that CAN bus), "arm:fake" (a fake arm), or module:factory
    of an object with the twin's reset, step, frame, proprio and close."""
    camera: str = ""
    """Camera of the arm: "/dev/video0", "realsense" (or "realsense:SERIAL") or module:factory."""
    crop: tuple[int, int, int] | None = None
    """Left, top and side in pixels of the square of the camera's picture; default: the largest in the middle."""
    kind: Literal["play", "demonstrations"] = "play"
    """play: anything goes, without an instruction. demonstrations: the tasks, in turn."""
    tasks: tuple[str, ...] = ()
    """Tasks (or goals) of demonstrations; empty: all tasks."""
    episodes: int = 10
    """Episodes in the finished data set."""
    max_steps: int = 600
    """Control steps (0.1 s) after which an episode is over; it is then kept or discarded."""
    layout: Literal["narrow", "wide"] = "narrow"
    """narrow: objects within 3 cm of their usual place in a task. wide: the whole workspace."""
    seed: int = 0
    """Seed of the scenes."""
    image_size: int = 64
    """Height and width of the frames in pixels."""


class Target(Protocol):
    """What can be driven: the twin's interface. A target that changes actions has ``sent_action`` (7,), the last one as it was
    really carried out.
    """

    def reset(self, seed: int, *, task: str | None = None, layout: str = "narrow") -> UInt8Array:
        """Begin an episode; the first frame (H, W, 3)."""
        ...

    def step(self, action: Float32Array) -> UInt8Array | None:
        """One control step with ``action`` (7,) in [-1, 1]; the frame after it."""
        ...

    def frame(self) -> UInt8Array:
        """The picture now."""
        ...

    def proprio(self) -> Float32Array:
        """The commanded pose (7,)."""
        ...

    def close(self) -> None:
        """Free it."""
        ...


@runtime_checkable
class SupportsHold(Protocol):
    """A target that has to be told when no more actions come for a while."""

    def hold(self) -> None:
        """Stay where it is until the next action."""
        ...


def scene_seed(seed: int, episode: int) -> int:
    """What ``Target.reset`` gets for an episode: a discarded one is tried again in the same scene."""
    return mix(seed, _STREAM, episode)


def teleoperate(config: TeleopConfig, *, operator: Operator | None = None, target: Target | None = None) -> Path:
    """Record episodes until there are ``config.episodes``, or the person quits; returns the folder.

    ``operator`` and ``target``: instead of those of ``config``; they stay open.

    Raises:
        InvalidOptionError: an option does not fit. DatasetError: the folder holds other data.
        MissingDependencyError: source or target needs a package that is not installed.
        CanBusError, CameraError, ArmFaultError: the arm or its camera does not work.
    """
    parse_positive_int("episodes", config.episodes)
    parse_positive_int("max_steps", config.max_steps)
    parse_choice("kind", config.kind, ("play", "demonstrations"))
    check_image_size(config.image_size)
    tasks = tuple(find_task(name) for name in dict.fromkeys(config.tasks)) or TASKS
    if config.kind == "play" and config.tasks:
        raise InvalidOptionError(f"tasks {', '.join(config.tasks)} need --kind demonstrations; play has no tasks.")
    settings = {name: asdict(config)[name] for name in ("target", "kind", "layout", "seed", "image_size")}
    claim_folder(
        config.out, CONFIG_PATH, settings | {"tasks": [task.name for task in tasks]}, "recorded by tele-operation"
    )
    with ExitStack() as opened:
        opened.enter_context(only_writer(config.out))
        if operator is None:
            operator = make_operator(config.source)
            opened.callback(operator.close)
        screen = Screen(live=not isinstance(operator, ScriptedKeys))
        if target is None:
            target = make_target(config, live=screen.live)
            opened.callback(target.close)
        writer = _writer(config, target)
        opened.callback(writer.finalize)
        while writer.num_episodes < config.episodes:
            index = writer.num_episodes
            task = None if config.kind == "play" else tasks[index % len(tasks)]
            words = PLAY_TASK if task is None else task.instruction
            name = None if task is None else task.name
            frame = target.reset(scene_seed(config.seed, index), task=name, layout=config.layout)
            recording = Recording(target, frame)
            event = drive(recording, operator, screen, config.max_steps, f"episode {index + 1}: {words}")
            if event is Event.QUIT:
                break
            if event is Event.KEEP and recording.actions:
                episode = recording.episode(words)
                writer.add_episode(episode.frames, episode.actions, episode.state, words, episode.privileged)
            _log.info("episode %d: %d steps, %s", index + 1, len(recording.actions), event.value)
    return Path(config.out)


def drive(recording: Recording, operator: Operator, screen: Screen, max_steps: int, title: str) -> Event:
    """One episode: control steps from the first command that moves until the person ends it. After ``max_steps`` the arm waits
    for that.
    """
    pace, target = Pace(screen.live), recording.twin
    while True:
        steps = len(recording.actions)
        if not steps:  # somebody may still arrange the scene
            recording.frames[0] = target.frame()
        screen.show(recording.frames[-1], f"{title}; step {steps}{', over' if steps >= max_steps else ''}")
        command = operator.command(target.proprio())
        waits = steps >= max_steps or (not steps and np.array_equal(command.action, hold(target.proprio())))
        if (waits or command.event is not None) and isinstance(target, SupportsHold):
            target.hold()
        if command.event is not None:
            return command.event
        if not waits:
            recording.step(np.clip(command.action, -1.0, 1.0))
        pace.wait()


def make_operator(source: str) -> Operator:
    """The operator that ``TeleopConfig.source`` names."""
    kind, _, channel = source.partition(":")
    if source == "keyboard":
        return Keyboard()
    if source == "gamepad":
        return Gamepad()
    if kind == "master":
        return MasterArm(CanReceiver(channel or "can0"), Keyboard())
    if Path(source).is_file():
        return ScriptedKeys(Path(source))
    raise InvalidOptionError(
        f"source {source!r} is none of keyboard, gamepad, master:CHANNEL, and no file of key presses."
    )


def make_target(config: TeleopConfig, live: bool) -> Target:
    """What ``TeleopConfig.target`` names. ``live``: a person drives it, so that it runs in real time."""
    kind, _, channel = config.target.partition(":")
    if config.target == "twin":
        from rawdream_env.piper.simulator.twin import PiperTwin

        return PiperTwin(image_size=config.image_size)
    if kind == "arm":
        from rawdream_env.piper.teleop.arm_target import open_arm

        return open_arm(channel, config.camera, CameraView(config.image_size, config.crop), live=live)
    target: Target | Path = resolve(config.target, "target of tele-operation", Target, bundled=Path())
    if isinstance(target, Path):
        raise InvalidOptionError(f"target {config.target!r} is none of twin, arm:CHANNEL, arm:fake and module:factory.")
    return target


def _writer(config: TeleopConfig, target: Target) -> LeRobotWriter:
    features: dict[str, Any] = dict(PiperSource.features)
    if not knows_objects(target):
        features = {name: value for name, value in features.items() if not name.startswith(schema.PRIVILEGED_PREFIX)}
    return LeRobotWriter(
        config.out,
        fps=CONTROL_HZ,
        image_shape=(config.image_size, config.image_size, 3),
        features=features,
        episodes_per_shard=1,  # what a person made is on disk at once
        robot_type=PiperSource.robot_type,
    )


class Pace:
    """Waits for the next tick of ``CONTROL_HZ``; after a delay it goes on from there. Without ``live``, no waiting."""

    def __init__(self, live: bool) -> None:
        self.live, self._next = live, time.monotonic()

    def wait(self) -> None:
        """Until the next tick."""
        if self.live:
            self._next = max(self._next + 1.0 / CONTROL_HZ, time.monotonic())
            time.sleep(max(0.0, self._next - time.monotonic()))


class Screen:
    """The picture in the terminal, two pixels a character, so that it works over SSH. Without ``live``, nothing."""

    _SIDE = 64

    def __init__(self, live: bool) -> None:
        self.live = live
        self._drawn = live and sys.stdout.isatty()
        if self._drawn:
            sys.stdout.write("\x1b[2J")

    def show(self, frame: UInt8Array, title: str) -> None:
        """Draw a frame (H, W, 3)."""
        if not self._drawn:
            return
        step = max(1, -(-max(frame.shape[:2]) // self._SIDE))
        small = frame[::step, ::step]
        lines = []
        for upper, lower in zip(small[0::2], small[1::2], strict=False):
            pairs = zip(upper.tolist(), lower.tolist(), strict=True)
            lines.append("".join(f"{_colour(38, a)}{_colour(48, b)}\u2580" for a, b in pairs) + "\x1b[0m")
        sys.stdout.write("\x1b[H" + "\n".join([*lines, f"{title}\x1b[K", HELP]) + "\n")
        sys.stdout.flush()


def _colour(code: int, rgb: list[int]) -> str:
    return f"\x1b[{code};2;{rgb[0]};{rgb[1]};{rgb[2]}m"
