"""Robots by name: where each robot's parts are, and the protocols those parts follow.

Generic code (world models, data, environments, evaluation, trainers) names no robot. It gets a name from a data set
(``robot_type`` in ``info.json``), a checkpoint or an environment, and asks :func:`find_robot` for the part it needs.
Parts are named as ``"module:attribute"`` and imported on first use, so registering a robot imports nothing.

>>> robot = find_robot("piper")
>>> robot.dream_env
'rawdream/PiperDream-v0'
>>> arm_map = robot.load("kinematics")(ArmMapConfig())  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from rawdream_env.errors import InvalidOptionError
from rawdream_env.files import read_json
from rawdream_env.types import Start, UInt8Array

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_ROBOT = "piper"
"""The robot of checkpoints, data sets and options without a robot name."""
ENTRY_POINTS = "rawdream.robots"
"""Entry-point group of installed packages that register robots: ``name = "module that calls register_robot"``."""

LIFT_RISE = 0.02
"""An object is picked up once its origin is this much (m) above where it was at the episode's start."""

FloatArray = NDArray[np.floating[Any]]
BoolArray = NDArray[np.bool_]
Part = Literal["kinematics", "scene", "view", "goals", "episode_source", "sim_starts", "start_pack"]


@dataclass(frozen=True)
class Robot:
    """A robot and its scene. Every part is optional; code that needs a missing part raises an error."""

    name: str
    """What ``info.json`` of its data sets has as ``robot_type``."""
    dream_env: str = ""
    """Id of its dream environment."""
    sim_env: str = ""
    """Id of its simulator environment, with the same spaces and infos."""
    sim_options: tuple[str, ...] = ()
    """Names of the options that the simulator takes besides those of every environment: "num_workers", "image_size", ..."""
    real_env: str = ""
    """Id of its hardware environment of one row, with the same spaces and infos."""
    kinematics: str = ""
    """``(ArmMapConfig) -> Kinematics``, for world models that take poses and arm maps."""
    scene: str = ""
    """A :class:`Scene`, for world models of object states."""
    view: str = ""
    """``(image_size) -> SceneView``, for films that people look at."""
    goals: str = ""
    """A :class:`GoalGrammar`, for training a judge and a policy on play."""
    episode_source: str = ""
    """``(CollectConfig) -> EpisodeSource`` (``rawdream_env.data.recording``), for ``rawdream data collect``."""
    sim_starts: str = ""
    """``(image_size, layout) -> StartSource``, for ``starts="sim"``."""
    start_pack: str = ""
    """``(layout) -> Path`` of a start pack, for ``starts="pack"``."""

    def load(self, part: Part) -> Any:
        """Import a part.

        Raises:
            InvalidOptionError: the robot has no such part.
        """
        where: str = getattr(self, part)
        if not where:
            raise InvalidOptionError(f"robot {self.name!r} has no {part}; set Robot.{part} where it is registered.")
        module, _, attribute = where.partition(":")
        return getattr(import_module(module), attribute)


_ROBOTS: dict[str, Robot] = {}


def register_robot(robot: Robot) -> None:
    """Make a robot known under its name; a later registration of the same name replaces the earlier one."""
    _ROBOTS[robot.name] = robot


def find_robot(name: str = "") -> Robot:
    """The robot called ``name``; the default robot when empty.

    A name that is not registered is looked up among the entry points of installed packages.

    Raises:
        InvalidOptionError: no such robot.
    """
    if not is_registered(name):
        raise InvalidOptionError(
            f"robot {name!r} is not registered (registered: {', '.join(map(repr, sorted(_ROBOTS)))}). Import the module "
            f"that registers it, or install it with an entry point in the group {ENTRY_POINTS!r}."
        )
    return _ROBOTS[name or DEFAULT_ROBOT]


def sim_options(env_id: str, **options: Any) -> dict[str, Any]:
    """Those of ``options`` that the simulator environment ``env_id`` takes, by its robot's ``sim_options``."""
    taken = {name for robot in _ROBOTS.values() if robot.sim_env == env_id for name in robot.sim_options}
    return {name: value for name, value in options.items() if name in taken}


def is_registered(name: str) -> bool:
    """Whether :func:`find_robot` knows the name."""
    name = name or DEFAULT_ROBOT
    if name not in _ROBOTS:
        for found in entry_points(group=ENTRY_POINTS, name=name):
            found.load()
    return name in _ROBOTS


@dataclass(frozen=True)
class ArmMapConfig:
    """How the arm map is drawn."""

    resolution: int = 32
    """Pixels of the drawing; folded into channels at latent resolution."""
    softness: float = 0.5
    """Width of the edges in pixels of the drawing."""
    camera: tuple[float, ...] = ()
    """Numbers of a calibrated camera (:func:`read_camera`); empty: the simulator's."""


def read_camera(path: str | Path) -> tuple[float, ...]:
    """The numbers of a camera file, as ``rawdream camera calibrate`` writes it.

    Raises:
        InvalidOptionError: the file is missing or has no camera.
    """
    numbers = read_json(path, "write one with `rawdream camera calibrate`", InvalidOptionError).get("camera")
    if not isinstance(numbers, list) or not all(type(number) in (int, float) for number in numbers):
        raise InvalidOptionError(f"{path} has no list of numbers 'camera'; write one with `rawdream camera calibrate`.")
    return tuple(map(float, numbers))


class Kinematics(Protocol):
    """How commanded poses follow actions, and where they are in the picture.

    Shape letters: B rows, K actions, A action dims, P = ``state_dim``, F latent frames of 4 video frames, H W latent.
    """

    state_dim: int
    """Numbers in a commanded pose, P: the data's ``observation.state`` and a start's ``proprio``."""

    def integrate(self, pose: Tensor, actions: Tensor) -> Tensor:
        """Pose (B, P) and actions (B, K, A) in [-1, 1] -> poses after each action (B, K, P)."""
        ...

    def normalise(self, poses: Tensor) -> Tensor:
        """Poses (..., P) scaled to about [-1, 1] over the workspace."""
        ...

    def draw(self, poses: Tensor, latent_size: tuple[int, int]) -> Tensor:
        """Poses (B, F, 4, P) -> maps (B, F, C, H, W) in [0, 1]; C is ``arm_map_channels`` of the architecture."""
        ...

    def motion(self, poses: Tensor, reference: Tensor, latent_size: tuple[int, int]) -> Tensor:
        """Motion of the tool in the picture since ``reference`` (B, F, P), in latent cells: (B, F, 4), u and v at the
        first and at the last video frame of a latent.
        """
        ...

    def tool(self, poses: FloatArray) -> FloatArray:
        """Tool position (..., 3) in metres, in the frame of ``privileged.object_poses``."""
        ...

    def project(self, points: FloatArray, image_size: int) -> FloatArray:
        """Points (..., 3) in metres -> pixels (..., 2), u and v, in a square picture of ``image_size``."""
        ...


@dataclass(frozen=True)
class Box:
    """A part of an object's shape: centre and half extents (3,) in metres, in the object's frame."""

    center: tuple[float, float, float]
    half: tuple[float, float, float]


@dataclass(frozen=True)
class Ring:
    """A part of an object's shape about its z axis, in metres: a tube, or a cylinder with ``inner`` 0."""

    z: float
    """Height of its middle."""
    inner: float
    outer: float
    half_height: float


class Scene(Protocol):
    """What can be in a robot's scene and how the camera sees it, for world models of object states.

    World frame, metres and radians. Shape letters: O objects, P surface points of an object.
    """

    @property
    def objects(self) -> Sequence[str]:
        """Order of object states."""
        ...

    @property
    def fixed(self) -> Sequence[str]:
        """The objects that never move."""
        ...

    @property
    def surface(self) -> FloatArray:
        """(O, P, 3): points on the surface of every object, in its own frame (z up)."""
        ...

    @property
    def shapes(self) -> Sequence[Sequence[Box | Ring]]:
        """For every object the boxes and rings that it is made of, for contact with other objects."""
        ...

    @property
    def symmetry(self) -> Sequence[int]:
        """For every object: the number of turns about its z axis under which it looks the same; 0: any turn."""
        ...

    @property
    def rotations(self) -> Sequence[FloatArray]:
        """For every object: rotations (G, 3, 3) about its own axes, the identity first, after which it moves as before. With
        ``symmetry`` 0, any turn about its z axis as well.
        """
        ...

    @property
    def camera(self) -> FloatArray:
        """(3, 4): homogeneous world points to (u w, v w, w): u right and v down from the picture's top left corner, in picture
        widths; w is the depth in metres.
        """
        ...

    def truth(self, position: Tensor, rotation: Tensor, present: Tensor, arm: Tensor) -> tuple[FloatArray, BoolArray]:
        """What data sets record of B scenes: object poses (B, O, 7), NaN for absent ones, and which relations hold (B, R), in
        the order of ``GoalGrammar.relations``. From positions (B, O, 3), rotations (B, O, 3, 3), ``present`` (B, O) and arm
        states (B, 8), on the CPU.
        """
        ...

    def arm_at_rest(self, command: Tensor) -> Tensor:
        """Commanded poses (..., P) -> states (..., 8) of an arm that has settled there: measured tool xyz, roll pitch yaw,
        positions of the left and the right finger in metres, whose sum is the opening.
        """
        ...

    def arm_pose(self, arm: Tensor) -> Tensor:
        """Arm states (..., 7): measured tool xyz, roll pitch yaw, finger opening in metres -> poses (..., P) that
        ``Kinematics.draw`` draws like that.
        """
        ...


class SceneView(Protocol):
    """Draws a robot's scene for people, larger than the models see it: square pictures of the size it was made with.

    Shape letters: F frames, O objects, T chunks, K actions of a chunk, H W picture.
    """

    def simulate(self, start: Start, actions: FloatArray) -> tuple[UInt8Array, BoolArray]:
        """The simulator's episode of ``start`` (its seed and task) under ``actions`` (T, K, A): pictures uint8
        (1 + T K, H, W, 3), the start first, and whether the task is done after each chunk, (T,).
        """
        ...

    def draw(self, poses: FloatArray, arm: FloatArray) -> UInt8Array:
        """Pictures uint8 (F, H, W, 3) of states: object poses (F, O, 7), NaN for absent ones, as ``Scene.truth`` gives them,
        and arm states (F, 8).
        """
        ...

    def close(self) -> None:
        """Free what draws."""
        ...


@dataclass(frozen=True)
class ClipLabels:
    """``reached`` bool (M, G); ``askable`` bool (M, G): where that means something; ``moved`` (M, O) in metres."""

    reached: BoolArray
    askable: BoolArray
    moved: FloatArray


@dataclass(frozen=True)
class Segment:
    """A demonstration inside an episode of play: frames ``start`` .. ``end`` (inclusive) in which ``goal`` is reached."""

    start: int
    end: int
    goal: str


class GoalGrammar(Protocol):
    """What can be asked for in a robot's scene: goals by name, their words, and hindsight labels for recorded play.

    Data sets hold the truth as ``privileged.object_poses`` (O objects, xyz in metres and quaternion) and
    ``privileged.relations``. Shape letters: M clips, O objects, R relations, G goals.
    """

    @property
    def objects(self) -> Sequence[str]:
        """Order of ``privileged.object_poses``."""
        ...

    @property
    def relations(self) -> Sequence[str]:
        """Order of ``privileged.relations``."""
        ...

    @property
    def place_relations(self) -> Sequence[str]:
        """The first of them: relations that placing an object establishes. Clips are sampled around them."""
        ...

    @property
    def goals(self) -> tuple[str, ...]:
        """Names of all goals: columns of the labels. A relation that can be asked for is a goal of the same name."""
        ...

    @property
    def tasks(self) -> Sequence[tuple[str, str, str]]:
        """(name, instruction, goal) of every task, in the order of the task ids."""
        ...

    @property
    def task_pairs(self) -> Collection[tuple[str, str]]:
        """Ordered object pairs of the tasks: a generalist policy is pre-trained without them."""
        ...

    @property
    def held_out_pairs(self) -> Collection[tuple[str, str]]:
        """Ordered object pairs the judge is tested on and never trained on."""
        ...

    def goal_objects(self, goal: str) -> tuple[str, ...]:
        """The objects a goal is about: what is moved, then where to."""
        ...

    def paraphrase(self, goal: str, rng: np.random.Generator) -> str:
        """One of a goal's instructions."""
        ...

    def goal_mask(self, *, exclude_pairs: Collection[tuple[str, str]] = ()) -> BoolArray:
        """(G,): the goals that are about none of these ordered pairs."""
        ...

    def label_clips(
        self, poses_start: FloatArray, poses_end: FloatArray, relations_start: BoolArray, relations_end: BoolArray
    ) -> ClipLabels:
        """Label clips by the truth at their first and last frame: poses (M, O, 7), relations (M, R)."""
        ...

    def label_windows(self, data: Any, first: NDArray[np.int64], last: NDArray[np.int64]) -> ClipLabels:
        """Label the clips from row ``first[m]`` to row ``last[m]`` of an ``EpisodeArrays``."""
        ...

    def sample_goals(
        self, labels: ClipLabels, rng: np.random.Generator, *, allowed: BoolArray | None = None
    ) -> NDArray[np.int64]:
        """One askable goal for each clip, (M,); -1 where there is none."""
        ...

    def pick_place_segments(
        self, episode: Any, *, exclude_pairs: Collection[tuple[str, str]] = ()
    ) -> Sequence[Segment]:
        """Demonstrations in an ``Episode`` of play."""
        ...


def find_goals(name: str) -> GoalGrammar | None:
    """The goals of a robot (empty: the default robot); None where it is not registered or has none."""
    robot = find_robot(name) if is_registered(name) else None
    grammar: GoalGrammar | None = robot.load("goals") if robot and robot.goals else None
    return grammar
