"""Reader, painter and maps of the scene world model, and their training on a few pictures of the twin."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import pytest
import torch
from torch import Tensor

from rawdream_env import robots
from rawdream_env.errors import CheckpointError, DatasetError, InvalidOptionError
from rawdream_env.files import load_safetensors
from rawdream_env.piper import geometry, scene_pictures
from rawdream_env.piper.relations import OBJECTS, TASKS, relation_index, relations
from rawdream_env.piper.scene import SCENE, arm_state
from rawdream_env.piper.simulator import practice
from rawdream_env.piper.simulator.twin import PiperTwin
from rawdream_env.robots import Robot
from rawdream_env.trainers.scene.data import STARTS, load_shards
from rawdream_env.trainers.scene.painter import PainterTrainConfig, train_painter
from rawdream_env.trainers.scene.reader import ReaderTrainConfig, reader_losses, train_reader
from rawdream_env.world_models.scene.loading import read_painter, read_reader, save_part
from rawdream_env.world_models.scene.maps import SceneMaps, canonical_rotation, project, unproject
from rawdream_env.world_models.scene.painter import PainterConfig, ScenePainter
from rawdream_env.world_models.scene.reader import ReaderConfig, Reading, SceneReader

SIZE = 32


class Dots:
    """Two objects of one point each; the camera looks straight down from 1 m and sees 1 m x 1 m."""

    objects = ("a", "b")
    fixed = ()
    symmetry = (1, 0)
    surface = np.zeros((2, 1, 3))
    camera = np.array([[1, 0, -0.5, 0.5], [0, 1, -0.5, 0.5], [0, 0, -1, 1.0]])

    def arm_pose(self, arm: Tensor) -> Tensor:
        return arm


DOTS = Dots()


@pytest.fixture(autouse=True)
def dots(monkeypatch):
    """A robot of these tests alone."""
    monkeypatch.setitem(
        robots._ROBOTS, "dots", Robot("dots", scene=f"{__name__}:DOTS", kinematics="rawdream_env.piper.arm_map:ArmMap")
    )


def seeded(make: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make().eval()
        for weight in module.parameters():
            if not weight.any():  # what starts at zero would hide differences
                torch.nn.init.normal_(weight, std=0.05)
    return module


def tiny_reader(**options: Any) -> SceneReader:
    config = ReaderConfig(SIZE, widths=(8, 8), window=8, window_width=8, hidden=16)
    reader: SceneReader = seeded(lambda: SceneReader(replace(config, **options)))
    return reader


def tiny_painter() -> ScenePainter:
    painter: ScenePainter = seeded(lambda: ScenePainter(PainterConfig(SIZE, 62, widths=(16, 16), blocks=(1, 1))))
    return painter


def states(rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Position, rotation, present, arm of random scenes."""
    rng = np.random.default_rng(0)
    position = rng.uniform([0.2, -0.14, 0.0], [0.36, 0.14, 0.1], (rows, 7, 3))
    rotation = geometry.rotation_from_rpy(rng.uniform(-2, 2, (rows, 7, 3)))
    arm = rng.uniform([0.2, -0.1, 0.02, -0.2, -0.2, -1, 0], [0.36, 0.1, 0.16, 0.2, 0.2, 1, 0.07], (rows, 7))
    present = torch.from_numpy(rng.random((rows, 7)) < 0.5)
    return (
        *(torch.from_numpy(x.astype(np.float32)) for x in (position, rotation)),
        present,
        torch.from_numpy(arm).float(),
    )


def frames(rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (rows, SIZE, SIZE, 3), generator=generator, dtype=torch.uint8)


# --- scene and maps ----------------------------------------------------------------------------------------------------


def test_the_camera_is_that_of_the_geometry_and_rays_come_back():
    points = torch.from_numpy(np.random.default_rng(0).uniform([0.2, -0.2, 0], [0.4, 0.2, 0.2], (50, 3)))
    camera = torch.from_numpy(SCENE.camera)
    uv = project(camera, points)
    np.testing.assert_allclose(uv * 64, geometry.project(points.numpy(), 64)[0], atol=1e-9)
    torch.testing.assert_close(unproject(camera, uv, points[:, 2]), points)


def test_a_point_is_spread_over_four_pixels_with_its_height():
    maps = SceneMaps("dots", 16)
    position = torch.tensor([[[0.0, 0.0, 0.0], [0.2, -0.1, 0.5]]])  # b is seen at (0.9, 0.3) of the picture
    drawn = maps.draw(position, torch.eye(3).expand(1, 2, 3, 3), torch.tensor([[False, True]]), torch.zeros(1, 7))
    unfolded = torch.nn.functional.pixel_shuffle(drawn[:, :16], 2)[0]  # a: cover, height; b: cover, height
    want = torch.zeros(16, 16)  # b is at pixel (14.4, 4.8), between the centres (13.5, 4.5) and (14.5, 4.5)
    want[4, 13], want[4, 14], want[5, 13], want[5, 14] = 0.1 * 0.7, 0.9 * 0.7, 0.1 * 0.3, 0.9 * 0.3
    assert not unfolded[:2].any()
    torch.testing.assert_close(unfolded[2], want)
    torch.testing.assert_close(unfolded[3], want * 0.5 * 8)
    torch.testing.assert_close(maps.cover(drawn)[0, 0], want)


def test_maps_show_objects_and_arm_where_the_simulator_draws_them():
    twin = PiperTwin(64)
    first = twin.set_scene({"red_block": (0.30, -0.06, 0.4)}, geometry.HOME_POSE)
    state = scene_pictures._state(twin)
    twin.close()
    tensors = {name: torch.from_numpy(value)[None] for name, value in state.items()}
    present = torch.tensor([[name == "red_block" for name in OBJECTS]])
    maps = SceneMaps("piper", 64)
    cover = maps.cover(maps.draw(tensors["position"], tensors["rotation"], present, tensors["arm"]))[0, 0]
    red = (first[..., 0].astype(int) - first[..., 1] > 30) & (first[..., 2] < 80)  # the fingers are orange
    red[:24] = False
    covered = (cover > 0.4).numpy()
    around = sum(np.roll(red, shift, (0, 1)) for shift in ((y, x) for y in (-1, 0, 1) for x in (-1, 0, 1))) > 0
    assert (red & covered).sum() / red.sum() > 0.95  # a surface point also covers the pixels beside its own
    assert not (covered & ~around).any()


def test_arm_states_are_measured_poses():
    twin = PiperTwin(render=False)
    twin.reset(5)
    for _ in range(10):
        twin.step(np.array([0.1, 0.05, -0.2, 0.1, -0.1, 0.3, 0.2]), render=False)
    for _ in range(8):
        twin.step(np.array([0, 0, 0, 0, 0, 0, 0.2]), render=False)
    arm = arm_state(twin.tool_pose(), twin.gripper_opening())
    np.testing.assert_allclose(arm[:6], twin.pose[:6], atol=0.01)
    np.testing.assert_allclose(SCENE.arm_pose(torch.from_numpy(arm))[6], 0.2, atol=0.02)


def test_equal_looking_rotations_have_one_representative():
    symmetry = torch.tensor(SCENE.symmetry)
    yaw = torch.full((7,), 0.3)

    def about_z(angle: Tensor) -> Tensor:
        rpy = np.stack([np.zeros(7), np.zeros(7), angle.numpy()], -1)
        return torch.from_numpy(geometry.rotation_from_rpy(rpy)).float()

    plain = canonical_rotation(about_z(yaw), symmetry)
    quarter = canonical_rotation(about_z(yaw + torch.pi / 2), symmetry)
    block, pot, cup = (OBJECTS.index(name) for name in ("red_block", "pot", "cup"))
    torch.testing.assert_close(plain[[block, pot]], about_z(yaw)[[block, pot]])
    torch.testing.assert_close(quarter[block], plain[block], atol=1e-5, rtol=0)
    torch.testing.assert_close(quarter[cup], torch.eye(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(quarter[pot], about_z(yaw + torch.pi / 2)[pot])


# --- contracts of the networks -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_row_does_not_depend_on_the_others():
    maps, reader, painter = SceneMaps("piper", SIZE), tiny_reader(), tiny_painter()
    state, pictures = states(5), frames(5)
    drawn = maps.draw(*state)
    canvas = painter.start(pictures, drawn)
    painted, reading = painter(canvas, drawn.flip(0)), vars(reader(pictures))
    for rows in (slice(0, 1), slice(4, 5), slice(1, 4)):
        some = maps.draw(*(x[rows] for x in state))
        assert torch.equal(some, drawn[rows])
        assert torch.equal(painter.start(pictures[rows], some), canvas[rows])
        assert torch.equal(painter(canvas[rows], drawn.flip(0)[rows].contiguous()), painted[rows])
        assert all(torch.equal(value, reading[name][rows]) for name, value in vars(reader(pictures[rows])).items())


@torch.no_grad()
def test_reading_and_painting_have_the_promised_shapes():
    reading = tiny_reader()(frames(2))
    assert reading.present.shape == reading.rotation_std.shape == (2, 7)
    assert reading.position.shape == reading.position_std.shape == (2, 7, 3)
    eye = reading.rotation @ reading.rotation.transpose(-1, -2)
    torch.testing.assert_close(eye, torch.eye(3).expand(2, 7, 3, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(reading.heat.exp().sum((-1, -2)), torch.ones(2, 7))
    painter, drawn = tiny_painter(), SceneMaps("piper", SIZE).draw(*states(2))
    painted = painter.paint(painter.start(frames(2), drawn), drawn)
    assert painted.shape == (2, SIZE, SIZE, 3) and painted.dtype == torch.uint8


def test_a_state_that_is_not_finite_draws_nothing_for_that_object():
    position, rotation, present, arm = states(2)
    present[:] = True
    position[0, 2] = torch.nan
    maps = SceneMaps("piper", SIZE)
    without = present.clone()
    without[0, 2] = False
    assert torch.equal(maps.draw(position, rotation, present, arm), maps.draw(position, rotation, without, arm))


def test_wrong_inputs_and_sizes_are_named():
    painter = tiny_painter()
    with pytest.raises(ValueError, match=r"uint8 \(B, 32, 32, 3\), got torch.float32 \(1, 32, 32, 3\)"):
        tiny_reader()(torch.zeros(1, SIZE, SIZE, 3))
    with pytest.raises(ValueError, match=r"maps must have shape \(2, 62, 16, 16\), got \(1, 62, 16, 16\)"):
        painter.start(frames(2), torch.zeros(1, 62, 16, 16))
    with pytest.raises(InvalidOptionError, match="image_size 30"):
        ScenePainter(PainterConfig(30))
    with pytest.raises(InvalidOptionError, match="window 7"):
        tiny_reader(window=7)


def test_parts_come_back_from_their_folders(tmp_path: Path):
    reader, painter = tiny_reader(), tiny_painter()
    for part in (reader, painter):
        save_part(part, tmp_path)
    loaded = read_reader(tmp_path), read_painter(tmp_path)
    for ours, theirs in zip((reader, painter), loaded, strict=True):
        assert theirs.config == ours.config
        for name, value in ours.state_dict().items():
            assert torch.equal(theirs.state_dict()[name], value.half().float())
    path = tmp_path / "painter" / "config.json"
    path.write_text(path.read_text().replace('"image_size": 32', '"image_size": 30'))
    with pytest.raises(CheckpointError, match=r"painter.config.json cannot be used: image_size 30"):
        read_painter(tmp_path)
    (tmp_path / "reader" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no file .*reader.model.safetensors"):
        read_reader(tmp_path)


# --- data and training -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    scene_pictures.collect_pictures(folder, 8, frames=6, seed=3, image_size=SIZE)
    scene_pictures.collect_starts(folder, 200, seed=3, image_size=SIZE)
    return folder


def holding_tasks(shard: dict[str, Tensor]) -> int:
    """In how many frames the relation of a task is true, from the stored states."""
    count = 0
    for present, *episode in zip(
        *(shard[name].numpy() for name in ("present", "position", "rotation", "arm")), strict=True
    ):
        for position, rotation, arm in zip(*episode, strict=True):
            poses = np.full((7, 7), np.nan)
            for i in np.flatnonzero(present):
                poses[i, :3] = position[i]
                quaternion = np.zeros(4)
                mujoco.mju_mat2Quat(quaternion, rotation[i].astype(np.float64).ravel())
                poses[i, 3:] = quaternion
            true = relations(poses, float(arm[6]), arm[:3])
            count += bool(true[[relation_index(task.relation) for task in TASKS]].any())
    return count


def test_no_picture_shows_a_task_done(data: Path):
    shard = load_safetensors(data / "pictures-00000.safetensors")
    assert shard["frame"].shape == (8, 6, SIZE, SIZE, 3) and holding_tasks(shard) == 0
    moved = (shard["position"] - shard["start_position"][:, None]).norm(dim=-1).amax((1, 2))
    assert (moved > 0.01).sum() >= 3  # the drivers do something
    assert not shard["position"][~shard["present"][:, None].expand(-1, 6, -1)].any()


def test_an_episode_ends_before_a_task_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(practice, "NON_TASK_RELATIONS", ["on:blue_block:red_block"])
    for name, cut in (("cut", scene_pictures.TASK_RELATIONS), ("uncut", [])):
        monkeypatch.setattr(scene_pictures, "TASK_RELATIONS", cut)
        monkeypatch.setattr(practice, "_KINDS", {"expert": 1.0})
        scene_pictures.collect_pictures(tmp_path / name, 3, frames=8, image_size=SIZE)
    shards = {name: load_safetensors(tmp_path / name / "pictures-00000.safetensors") for name in ("cut", "uncut")}
    assert holding_tasks(shards["cut"]) == 0 < holding_tasks(shards["uncut"])


def test_shards_are_made_once_and_equal_seeds_make_equal_ones(data: Path, tmp_path: Path):
    path = data / "starts-00000.safetensors"
    before = path.stat().st_mtime_ns
    scene_pictures.collect_starts(data, 200, seed=3, image_size=SIZE)
    scene_pictures.collect_starts(tmp_path, 5, seed=3, image_size=SIZE)
    assert path.stat().st_mtime_ns == before
    few, many = load_safetensors(tmp_path / path.name), load_safetensors(path)
    assert all(torch.equal(value, many[name][:5]) for name, value in few.items())


def test_missing_data_is_named(data: Path, tmp_path: Path):
    with pytest.raises(DatasetError, match=r"no starts-\*.safetensors in .*; collect them first"):
        load_shards([tmp_path], "starts", STARTS)
    with pytest.raises(DatasetError, match="lacks frame"):
        load_shards([data], "starts", (*STARTS, "frame"))


def test_reader_losses_by_hand():
    present = torch.tensor([[True, False]])
    position = torch.tensor([[[0.3, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    rotation = torch.eye(3).expand(1, 2, 3, 3)
    turned = torch.from_numpy(geometry.rotation_from_rpy(np.array([0, 0, 0.2]))).float().expand(1, 2, 3, 3)
    reading = Reading(
        present=torch.tensor([[0.0, 0.0]]),
        position=position + torch.tensor([0.004, 0.0, 0.0]),
        rotation=turned,
        position_std=torch.full((1, 2, 3), 0.004),
        rotation_std=torch.full((1, 2), 0.2),
        heat=torch.full((1, 2, 4, 4), -float(np.log(16))),
    )
    losses = reader_losses(reading, position, rotation, present, torch.tensor(DOTS.camera))
    assert losses["present"] == pytest.approx(np.log(2))
    assert losses["position"] == pytest.approx(np.hypot(4, 0.3) - 0.3, abs=1e-4)
    angle = 2 * np.sin(0.1)  # the chord of 0.2 radians
    assert losses["rotation"] == pytest.approx(15 * (np.hypot(angle, 0.02) - 0.02), abs=1e-3)
    assert losses["heat"] == pytest.approx(0.3 * np.log(16), abs=1e-5)
    doubt = 0.5 + 3 * np.log(0.004) + 0.5 * (angle / 0.2) ** 2 + np.log(0.2)
    assert losses["doubt"] == pytest.approx(0.1 * doubt, abs=1e-3)


def metrics(run: Path) -> list[dict[str, float]]:
    import json

    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_training_reads_and_paints_better(data: Path, tmp_path: Path):
    model = tiny_reader().config
    reader = ReaderTrainConfig(
        (str(data),),
        str(tmp_path / "reader"),
        replace(model, objects=1),
        steps=60,
        warmup=5,
        batch_size=16,
        save_every=10,
    )
    trained = train_reader(reader, progress=False)
    held = [line["held_out/mm_median"] for line in metrics(tmp_path / "reader") if "held_out/mm_median" in line]
    assert trained.config == model  # picture size and objects are those of the data
    assert held[-1] < 0.8 * held[0]
    again = train_reader(reader, progress=False)  # the run is complete: nothing changes
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in trained.state_dict().items())

    painter = PainterTrainConfig(
        (str(data),),
        str(tmp_path / "painter"),
        model=PainterConfig(widths=(16, 16), blocks=(1, 1)),
        steps=40,
        warmup=5,
        batch_size=8,
        save_every=10,
        held_out=2,
        ema=0.9,
    )
    train_painter(painter, progress=False)
    decibels = [line["held_out/psnr_all"] for line in metrics(tmp_path / "painter") if "held_out/psnr_all" in line]
    assert decibels[-1] > decibels[0] + 1
