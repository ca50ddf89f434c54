"""The scene world model's contact, dynamics, state and folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rawdream_env.errors import CheckpointError, InvalidOptionError
from rawdream_env.piper import geometry
from rawdream_env.piper.relations import OBJECTS, TASKS
from rawdream_env.piper.scene import SCENE
from rawdream_env.robots import Box, Ring
from rawdream_env.seeding import NoiseKey
from rawdream_env.world_models import load_world_model
from rawdream_env.world_models.scene.dynamics import DynamicsConfig, SceneDynamics, SceneFrame
from rawdream_env.world_models.scene.loading import new_dynamics, read_scene_world_model, save_scene_world_model
from rawdream_env.world_models.scene.maps import SceneMaps
from rawdream_env.world_models.scene.painter import PainterConfig, ScenePainter
from rawdream_env.world_models.scene.reader import ReaderConfig, SceneReader
from rawdream_env.world_models.scene.rollout import SceneWorldModel
from rawdream_env.world_models.scene.rotations import rotate
from rawdream_env.world_models.scene.state import SceneState

BLUE, RED, POT, STOVE, SPOON, CUP = (
    OBJECTS.index(name) for name in ("blue_block", "red_block", "pot", "stove", "spoon", "cup")
)


def awake(module: Any) -> Any:
    """Random weights, also where a new network starts at zero."""
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return module.eval()


@pytest.fixture(scope="module")
def dynamics() -> SceneDynamics:
    torch.manual_seed(0)
    network: SceneDynamics = awake(new_dynamics(DynamicsConfig(0, width=32, layers=1)))
    return network


@pytest.fixture(scope="module")
def model() -> SceneWorldModel:
    torch.manual_seed(0)
    reader = SceneReader(ReaderConfig(widths=(8, 8), window=4, window_width=8, hidden=8))
    painter = ScenePainter(PainterConfig(map_channels=SceneMaps().channels, widths=(8, 8), blocks=(1, 1)))
    return SceneWorldModel(awake(reader), awake(new_dynamics(DynamicsConfig(0, width=16, layers=1))), awake(painter))


# -- contact -------------------------------------------------------------------------------------------------------------


def distance(dynamics: SceneDynamics, which: int, points: Tensor) -> tuple[Tensor, Tensor]:
    """Of points (P, 3) in the frame of an object: signed distance (P,) and direction (P, 3)."""
    gap, normal = dynamics.contact.distance(torch.tensor([[which, which]]), points.expand(1, 2, -1, 3))
    assert torch.equal(gap[0, 0], gap[0, 1])
    return gap[0, 0], normal[0, 0]


def simulated(parts: list[Box | Ring], points: np.ndarray) -> np.ndarray:
    """Signed distances (P,) of points to boxes and cylinders, by the simulator's collision detection."""
    radius = 1e-3
    geoms = "".join(
        f'<geom type="box" pos="{p.center[0]} {p.center[1]} {p.center[2]}" size="{p.half[0]} {p.half[1]} {p.half[2]}"/>'
        if isinstance(p, Box)
        else f'<geom type="cylinder" pos="0 0 {p.z}" size="{p.outer} {p.half_height}"/>'
        for p in parts
    )
    probe = f'<body name="probe" mocap="true"><geom type="sphere" size="{radius}"/></body>'
    world = mujoco.MjModel.from_xml_string(f"<mujoco><worldbody>{geoms}{probe}</worldbody></mujoco>")
    data, out = mujoco.MjData(world), []
    for point in points:
        data.mocap_pos[0] = point
        mujoco.mj_kinematics(world, data)
        out.append(min(mujoco.mj_geomDistance(world, data, i, len(parts), 1.0, None) for i in range(len(parts))))
    return np.array(out) + radius


def tube(ring: Ring, step: float = 5e-4) -> np.ndarray:
    """Points all over a tube's surface."""
    angle = np.arange(0, 2 * np.pi, step / ring.outer)
    across = np.linspace(ring.inner, ring.outer, int((ring.outer - ring.inner) / step) + 2)
    along = np.linspace(-ring.half_height, ring.half_height, int(2 * ring.half_height / step) + 2) + ring.z
    outline = [(r, z) for r in across for z in along[[0, -1]]] + [(r, z) for r in across[[0, -1]] for z in along]
    r, z = np.array(outline).T[:, :, None]
    return np.stack(np.broadcast_arrays(r * np.cos(angle), r * np.sin(angle), z), -1).reshape(-1, 3)


@pytest.mark.parametrize("which", range(7))
def test_distances_are_those_of_the_shapes(dynamics: SceneDynamics, which: int) -> None:
    points = np.random.default_rng(which).uniform(-0.09, 0.09, (60, 3))
    parts = SCENE.shapes[which]
    solid = [part for part in parts if isinstance(part, Box) or part.inner == 0]
    tubes = [part for part in parts if isinstance(part, Ring) and part.inner > 0]
    want = simulated(solid, points)
    for ring in tubes:
        near = np.linalg.norm(points[:, None] - tube(ring), axis=-1).min(1)
        r, z = np.hypot(points[:, 0], points[:, 1]), abs(points[:, 2] - ring.z)
        inside = (r > ring.inner) & (r < ring.outer) & (z < ring.half_height)
        want = np.minimum(want, np.where(inside, -near, near))
    gap, normal = distance(dynamics, which, torch.tensor(points, dtype=torch.float32))
    outside = want > 1e-3
    assert outside.sum() > 20 and ((gap.numpy() < 0) == (want < 0))[abs(want) > 1e-3].all()
    np.testing.assert_allclose(gap.numpy()[outside], want[outside], atol=2e-4 if tubes else 1e-5)
    nearer = torch.tensor(points, dtype=torch.float32)[outside] - 5e-4 * normal[outside]
    torch.testing.assert_close(distance(dynamics, which, nearer)[0], gap[outside] - 5e-4, atol=1e-6, rtol=0)


def test_distances_by_hand(dynamics: SceneDynamics) -> None:
    points = torch.tensor([[0.025, 0, 0], [0.018, 0.019, 0], [0.012, 0, 0.001]])
    gap, normal = distance(dynamics, BLUE, points)  # 15 mm from its middle to each face
    torch.testing.assert_close(gap, torch.tensor([0.010, 0.005, -0.003]))
    torch.testing.assert_close(normal, torch.tensor([[1.0, 0, 0], [0.6, 0.8, 0], [1, 0, 0]]))
    points = torch.tensor([[0, 0, 0.010], [0.030, 0, 0.010], [0.058, 0, 0.020]])
    gap, normal = distance(dynamics, POT, points)  # above the floor, inside at the wall, above the handle
    torch.testing.assert_close(gap, torch.tensor([0.022, 0.003, 0.004]))
    torch.testing.assert_close(normal, torch.tensor([[0.0, 0, 1], [-1, 0, 0], [0, 0, 1]]), atol=1e-5, rtol=0)


# -- dynamics ------------------------------------------------------------------------------------------------------------


def turn(*rpy: float) -> Tensor:
    return torch.from_numpy(geometry.rotation_from_rpy(np.array(rpy))).float()


def scene() -> tuple[Tensor, SceneFrame]:
    """A blue block on a red one, a cup beside them, a spoon and a stove; the gripper is at the blocks."""
    which = torch.tensor([[BLUE, RED, STOVE, SPOON, CUP]])
    places = [[0.30, 0.02, 0.051], [0.30, 0.02, 0.018], [0.28, -0.08, 0.006], [0.30, 0.056, 0.006], [0.265, 0.02, 0.02]]
    rotations = [turn(0.02, 0, 0.3), turn(0, 0.01, 0.2), turn(0, 0, 0), turn(0.1, 0, 0.7), turn(0, 0.02, 0.4)]
    arm = torch.tensor([[0.30, 0.015, 0.06, 0.02, 0.01, 0.2, 0.016, 0.017]])
    command = torch.tensor([[0.305, 0.015, 0.07, 0.02, 0.01, 0.25, 1.0]])
    velocity = torch.randn(1, 5, 6, generator=torch.Generator().manual_seed(1)) * 0.05
    frame = SceneFrame(torch.tensor([places]), torch.stack(rotations)[None], velocity, arm, arm, command)
    return which, frame


@torch.no_grad()
def moved(dynamics: SceneDynamics, frame: SceneFrame) -> SceneFrame:
    noise = torch.randn(1, 8, generator=torch.Generator().manual_seed(0))
    return dynamics(scene()[0], frame, frame.command, noise)


TURNS = [
    *[(name, axis, 90.0) for name in (BLUE, RED) for axis in range(3)],
    (SPOON, 0, 180.0),
    (CUP, 0, 180.0),
    (CUP, 2, 36.0),
]


@pytest.mark.parametrize(("name", "axis", "degrees"), TURNS)
def test_an_object_that_looks_the_same_moves_the_same(
    dynamics: SceneDynamics, name: int, axis: int, degrees: float
) -> None:
    which, frame = scene()
    at = which[0].tolist().index(name)
    own = rotate(torch.eye(3)[axis] * np.deg2rad(degrees))
    rotation = frame.rotation.clone()
    rotation[0, at] = rotation[0, at] @ own
    want, got = moved(dynamics, frame), moved(dynamics, frame._replace(rotation=rotation))
    expected = want.rotation.clone()
    expected[0, at] = expected[0, at] @ own
    torch.testing.assert_close(got.position, want.position, atol=1e-6, rtol=0)
    torch.testing.assert_close(got.rotation, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(got.velocity, want.velocity, atol=1e-4, rtol=0)
    torch.testing.assert_close(got.arm, want.arm, atol=1e-5, rtol=0)
    assert (want.position - frame.position).norm(dim=-1)[0, at] > 1e-4
    if (name, axis) == (SPOON, 0):  # a quarter is not enough for a flat spoon's bowl
        rotation[0, at] = frame.rotation[0, at] @ rotate(torch.tensor([np.pi / 2, 0, 0], dtype=torch.float32))
        other = moved(dynamics, frame._replace(rotation=rotation))
        assert not torch.allclose(other.position, want.position, atol=1e-6, rtol=0)


def test_fixed_objects_never_move(dynamics: SceneDynamics) -> None:
    which, frame = scene()
    after = moved(dynamics, frame)
    stove = which[0] == STOVE
    assert torch.equal(after.position[0, stove], frame.position[0, stove])
    assert torch.equal(after.rotation[0, stove], frame.rotation[0, stove]) and not after.velocity[0, stove].any()
    assert ((after.position - frame.position).norm(dim=-1)[0, ~stove] > 0).all()


@torch.no_grad()
def test_training_skips_only_what_is_out_of_reach(dynamics: SceneDynamics) -> None:
    which, frame = scene()
    inputs = which, frame.position, frame.rotation, frame.velocity
    want = dynamics.contact(*inputs)
    dynamics.contact.train()
    got = dynamics.contact(*inputs)
    dynamics.contact.eval()
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    apart = frame.position + torch.arange(5)[None, :, None] * 0.5
    assert not torch.allclose(dynamics.contact(which, apart, *inputs[2:]), want, atol=1e-6)


@pytest.mark.parametrize(("spacing", "seen"), [(0.015, False), (0.006, True)])
def test_a_wall_between_two_points_of_a_spoon_is_seen(spacing: float, seen: bool) -> None:
    dynamics = new_dynamics(DynamicsConfig(0, slender_spacing=spacing))
    spoon, bowl = OBJECTS.index("spoon"), OBJECTS.index("bowl")
    # The spoon points away from the bowl's axis, at the height of its wall, which is 5 mm thick.
    own = dynamics.contact.points[spoon][dynamics.contact.real[spoon]]
    shifts = torch.linspace(0.02, 0.08, 200)
    along = own + torch.stack([shifts, torch.zeros(200), torch.zeros(200)], -1)[:, None]
    crossing = (along[..., 0].amin(1) < 0.047) & (along[..., 0].amax(1) > 0.052)
    nearest = torch.stack([distance(dynamics, bowl, points)[0].min() for points in along[crossing]])
    assert len(nearest) > 100 and bool((nearest < 0.001).all()) == seen


# -- the world model -----------------------------------------------------------------------------------------------------


def begin(model: SceneWorldModel, rows: int = 2) -> SceneState:
    frames = torch.randint(0, 256, (rows, 64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    poses = torch.tensor(np.stack([geometry.HOME_POSE] * rows), dtype=torch.float32)
    return model.start(frames, [NoiseKey(i) for i in range(rows)], poses)


def test_equal_start_pictures_are_read_once(model: SceneWorldModel, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = torch.randint(0, 256, (2, 64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    read, rows = model.reader.forward, []
    monkeypatch.setattr(model.reader, "forward", lambda some: rows.append(len(some)) or read(some))
    pose = torch.tensor(geometry.HOME_POSE, dtype=torch.float32)
    state = model.start(frames[[1, 0, 1]], [NoiseKey(i) for i in range(3)], pose.expand(3, -1))
    assert rows == [2]
    for name in ("position", "rotation", "present", "canvas"):
        assert torch.equal(getattr(state, name)[[1, 2]], getattr(begin(model), name))


def test_success_is_the_task_of_the_instruction_in_the_state(model: SceneWorldModel) -> None:
    state = begin(model, 5)
    position = state.position.clone()
    position[:, RED], position[:, BLUE] = torch.tensor([0.3, 0, 0.018]), torch.tensor([0.3, 0, 0.051])
    position[1, BLUE, 0] = 0.4
    position[3, BLUE] = torch.nan
    here = torch.zeros_like(state.present)
    here[:, [BLUE, RED]] = True
    here[4, BLUE] = False
    state = replace(state, position=position, rotation=torch.eye(3).expand(5, 7, 3, 3).clone(), present=here)
    stack = TASKS[0].instruction
    assert model.success(state, [stack, stack, "sing a song", stack, stack]).tolist() == [1, 0, -1, -1, 0]
    assert model.success(state, [TASKS[1].instruction] * 5).tolist() == [0, 0, 0, -1, 0]


def test_a_lift_is_of_the_object_that_the_task_moves_and_is_remembered(model: SceneWorldModel) -> None:
    state = begin(model, 3)
    assert model.lifted(state, [TASKS[0].instruction] * 3).tolist() == [0, 0, 0]
    heights = state.heights.clone()
    heights[0, BLUE, 1] += 0.021
    heights[1, BLUE, 1] += 0.019
    heights[2, RED, 1] += 0.021
    state = replace(state, heights=heights)
    assert model.lifted(state, [TASKS[0].instruction] * 3).tolist() == [1, 0, 0]
    assert model.lifted(state, ["sing a song"] * 3).tolist() == [-1, -1, -1]
    after, _ = model.imagine(state, torch.zeros(3, 8, 7))
    assert model.lifted(after, [TASKS[0].instruction] * 3)[0] == 1
    assert (after.heights[..., 0] == state.heights[..., 0]).all()
    assert (after.heights[..., 1] >= torch.maximum(state.heights[..., 1], after.position[..., 2])).all()


@pytest.fixture
def folder(model: SceneWorldModel, tmp_path: Path) -> Path:
    save_scene_world_model(model, tmp_path)
    return tmp_path


def test_a_saved_model_dreams_the_same(model: SceneWorldModel, folder: Path, tmp_path: Path) -> None:
    actions = torch.rand(2, 8, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    state, frames = model.imagine(begin(model), actions)
    loaded: Any = load_world_model(folder)
    again, same = loaded.imagine(begin(loaded), actions)
    assert torch.equal(frames, same) and torch.equal(state.position, again.position)
    save_scene_world_model(model, tmp_path / "half", half=True)
    half = read_scene_world_model(tmp_path / "half", start_noise=0.5)
    assert half.config.start_noise == 0.5
    for name, value in model.dynamics.state_dict().items():  # motions add up: never rounded
        assert torch.equal(half.dynamics.state_dict()[name], value)
    rounded = model.painter.state_dict()["out.weight"]
    assert torch.equal(half.painter.state_dict()["out.weight"], rounded.half().float())


def test_bfloat16_paints_alike_and_moves_the_same(model: SceneWorldModel, folder: Path) -> None:
    actions = torch.rand(2, 8, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    state, frames = model.imagine(begin(model), actions)
    fast: Any = load_world_model(folder, dtype="bfloat16")
    other, painted = fast.imagine(begin(fast), actions)
    assert torch.equal(state.position, other.position) and fast.painter.place.dtype == torch.bfloat16
    assert not torch.equal(frames, painted) and (frames.float() - painted.float()).abs().mean() < 4


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: flip(f / "dynamics" / "model.safetensors"), "dynamics.model.safetensors"),
        (lambda f: (f / "painter" / "config.json").unlink(), "painter.config.json"),
        (lambda f: change(f / "config.json", rollout={"fps": -1.0}), "cannot be used: fps -1.0"),
        (lambda f: change(f / "config.json", rollout={"speed": 2}), "speed"),
        (lambda f: change(f / "dynamics" / "config.json", width=0), "width"),
    ],
)
def test_a_damaged_folder_is_named(folder: Path, damage: Any, message: str) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        load_world_model(folder)


def test_options_of_the_video_model_are_refused(folder: Path) -> None:
    for options in ({"num_inference_steps": 5}, {"approximations": ["rolling_cache"]}):
        with pytest.raises(InvalidOptionError, match=r"scene world model.*leave out num_inference_steps and"):
            load_world_model(folder, **options)
    assert load_world_model(folder, num_inference_steps=1).chunk_len == 8
    change(folder / "config.json", robot="nobody")
    with pytest.raises(InvalidOptionError, match="'nobody' is not registered"):
        load_world_model(folder)
