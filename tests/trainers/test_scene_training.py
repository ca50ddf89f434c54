"""Training the dynamics of a scene: windows of states, the energy score, and a run that resumes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rawdream_env.errors import DatasetError
from rawdream_env.files import save_safetensors
from rawdream_env.piper import geometry
from rawdream_env.piper.relations import OBJECTS
from rawdream_env.piper.scene_states import Recording
from rawdream_env.piper.simulator.practice import GraspPractice
from rawdream_env.piper.simulator.twin import PiperTwin
from rawdream_env.trainers.scene.dynamics import DynamicsTrainConfig, energy_score, train_dynamics
from rawdream_env.trainers.scene.states import SceneStates, Window
from rawdream_env.world_models.scene.dynamics import DynamicsConfig

RED = OBJECTS.index("red_block")


def episodes(*lengths: int, objects: tuple[int, ...] = (RED,)) -> dict[str, Tensor]:
    """A shard in which nothing moves and the arm is far away; its x is 1 mm more in every row."""
    rows = sum(lengths)
    shard = {
        "position": torch.zeros(rows, 7, 3),
        "rotation": torch.tensor([1.0, 0, 0, 0]).repeat(rows, 7, 1),
        "velocity": torch.zeros(rows, 7, 6),
        "arm": torch.tensor([0.0, 0, 0.3, 0, 0, 0, 0.03, 0.03]).repeat(rows, 1),
        "command": torch.tensor([0.0, 0, 0.3, 0, 0, 0, -1]).repeat(rows, 1),
        "length": torch.tensor(lengths),
        "present": torch.zeros(len(lengths), 7, dtype=torch.bool),
    }
    shard["present"][:, list(objects)] = True
    shard["arm"][:, 0] = torch.arange(rows) * 1e-3
    return shard


def write(folder: Path, shard: dict[str, Tensor]) -> Path:
    save_safetensors(folder / "states-00000.safetensors", shard, {})
    return folder


# -- windows -------------------------------------------------------------------------------------------------------------


def test_windows_with_motion_or_a_near_gripper_are_drawn_more_often(tmp_path: Path) -> None:
    shard = episodes(12, 12)
    shard["position"][6:12, RED, 0] = 0.001  # moves from row 5 to row 6
    shard["arm"][15, 2] = 0.05
    states = SceneStates([write(tmp_path, shard)], 1)
    window = states.draw(np.random.default_rng(0), 6000, 1)
    row = (window.first.arm[:, 0] * 1000).round().long()
    share = torch.bincount(row, minlength=24) / len(row)
    total = 3.15 + 1.15 + 20 * 0.15  # 11 windows an episode: one with motion, one near
    assert share[5] == pytest.approx(3.15 / total, abs=0.02) and share[15] == pytest.approx(1.15 / total, abs=0.02)
    assert share[3] == pytest.approx(0.15 / total, abs=0.01)
    assert not share[[11, 23]].any()  # no frame comes after
    assert len(states) == 22


def test_a_window_knows_the_frame_before_it_and_those_after(tmp_path: Path) -> None:
    window = SceneStates([write(tmp_path, episodes(12, 12))], 3).draw(np.random.default_rng(0), 500, 3)
    now = window.first.arm[:, 0]
    begins = torch.isclose(now, torch.tensor(0.0)) | torch.isclose(now, torch.tensor(0.012))
    assert begins.any()
    torch.testing.assert_close(window.first.arm_before[:, 0], torch.where(begins, now, now - 1e-3))
    for u in range(3):
        torch.testing.assert_close(window.after(u).arm[:, 0], now + (u + 1) * 1e-3)
    assert torch.equal(window.which, torch.full_like(window.which, RED))


def both(window: Window) -> tuple[Window, Window]:
    """One row as it was and one that was mirrored, of windows that are all the same: the arm is at positive y."""
    flipped = window.first.arm[:, 1] < 0
    assert flipped.any() and not flipped.all()

    def first(mask: Tensor) -> Window:
        i = int(mask.nonzero()[0])
        return Window(window.which[i], *(type(x)(*(t[i] for t in x)) for x in (window.first, window.rest)))

    return first(~flipped), first(flipped)


def test_half_of_the_windows_are_mirrored(tmp_path: Path) -> None:
    shard = episodes(2)
    shard["position"][:, RED] = torch.tensor([0.3, 0.05, 0.02])
    shard["rotation"][:, RED] = torch.tensor([math.cos(0.2), 0, 0, math.sin(0.2)])  # yaw 0.4
    shard["velocity"][:, RED] = torch.tensor([1.0, 2, 3, 4, 5, 6])
    shard["arm"][:] = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.01, 0.02])
    shard["command"][:] = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    drawn = SceneStates([write(tmp_path, shard)], 1).draw(np.random.default_rng(0), 40, 1)
    plain, mirrored = both(drawn)
    for frame, y, yaw in ((plain.first, 1, 0.4), (mirrored.first, -1, -0.4)):
        c, s = math.cos(yaw), math.sin(yaw)
        torch.testing.assert_close(frame.position[0], torch.tensor([0.3, y * 0.05, 0.02]))
        torch.testing.assert_close(frame.rotation[0], torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1.0]]))
        torch.testing.assert_close(frame.velocity[0], torch.tensor([1.0, y * 2, 3, y * 4, 5, y * 6]))
        left, right = (0.01, 0.02) if y == 1 else (0.02, 0.01)
        for arm in (frame.arm, frame.arm_before):
            torch.testing.assert_close(arm, torch.tensor([0.1, y * 0.2, 0.3, y * 0.4, 0.5, y * 0.6, left, right]))
        torch.testing.assert_close(frame.command, torch.tensor([0.1, y * 0.2, 0.3, y * 0.4, 0.5, y * 0.6, 0.7]))


def test_the_simulator_moves_alike_in_a_mirror(tmp_path: Path) -> None:
    """Grasps are recorded; the mirrored actions in the mirrored scene give the mirrored windows."""
    twin, flip = PiperTwin(render=False), np.array([1, -1, 1, -1, 1, -1, 1], np.float32)
    places = {"red_block": (0.28, 0.05, 0.3), "spoon": (0.3, -0.06, 0.5)}
    home = geometry.HOME_POSE + np.array([0, 0.02, 0, 0, 0, 0.1, 0])
    twin.set_scene(places, home)
    driver, recording, actions = GraspPractice(twin, np.random.default_rng(3)), Recording(twin, 0), []
    for _ in range(40):
        actions.append(driver.act())
        recording.step(actions[-1])
    twin.set_scene({name: (x, -y, -yaw) for name, (x, y, yaw) in places.items()}, home * flip)
    image = Recording(twin, 0)
    for action in actions:
        image.step(action * flip)
    seen = {name: torch.from_numpy(value) for name, value in image.arrays().items()}
    shard = {name: torch.from_numpy(value) for name, value in recording.arrays().items() if name != "kind"}
    moved = (shard["position"][-1] - shard["position"][0]).norm(dim=-1)
    assert moved.max() > 0.01  # something was pushed or carried
    drawn = SceneStates([write(tmp_path, shard)], 40).draw(np.random.default_rng(0), 20, 40)
    _, mirrored = both(drawn)
    torch.testing.assert_close(mirrored.rest.position, seen["position"][1:, mirrored.which], atol=1e-3, rtol=0)
    torch.testing.assert_close(mirrored.rest.arm, seen["arm"][1:], atol=2e-3, rtol=0)
    torch.testing.assert_close(mirrored.rest.command, seen["command"][1:], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda shard: shard.pop("velocity"), "lacks velocity; collect it again"),
        (lambda shard: shard.update(arm=torch.zeros(24, 7)), r"has arm of shape \(24, 7\), expected \(24, 8\)"),
        (lambda shard: shard.update(length=torch.tensor([12, 11])), r"has position of shape \(24, 7, 3\), expected"),
        (lambda shard: shard.update(episodes(4, 4)), "no episode in .* has more than 8 rows"),
    ],
)
def test_states_that_cannot_be_used_are_named(tmp_path: Path, damage: Any, message: str) -> None:
    with pytest.raises(DatasetError, match="collect them first"):
        SceneStates([tmp_path], 8)
    shard = episodes(12, 12)
    damage(shard)
    with pytest.raises(DatasetError, match=message):
        SceneStates([write(tmp_path, shard)], 8)


# -- the loss ------------------------------------------------------------------------------------------------------------


def soft(distance: float) -> float:
    return math.hypot(distance, 0.15) - 0.15


def test_the_energy_score_by_hand() -> None:
    truth = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    right, ahead = truth + torch.tensor([3.0, 0, 0]), truth + torch.tensor([0.0, 4, 0])
    assert energy_score(truth, truth, truth) == 0
    assert float(energy_score(right, ahead, truth)) == pytest.approx((soft(3) + soft(4) - soft(5)) / 2, abs=1e-12)
    assert float(energy_score(right, right, truth)) == pytest.approx(soft(3), abs=1e-12)
    together = energy_score(torch.cat([right, truth]), torch.cat([ahead, truth]), torch.cat([truth, truth]))
    assert float(together) == pytest.approx((soft(3) + soft(4) - soft(5)) / 4, abs=1e-12)


def test_a_sampler_of_both_outcomes_beats_their_mean() -> None:
    """A fair coin decides whether an object ends 10 mm to the left or to the right."""
    sides = torch.tensor([[-5.0], [5.0]], dtype=torch.float64)
    one, two, truth = (x.reshape(-1, 1) for x in torch.meshgrid(*[sides[:, 0]] * 3, indexing="ij"))
    sampler = float(energy_score(one, two, truth))  # all eight cases are equally likely
    assert sampler == pytest.approx(soft(10) / 4, abs=1e-12)
    mean = torch.zeros_like(truth)
    assert float(energy_score(mean, mean, truth)) == pytest.approx(soft(5), abs=1e-12)
    assert sampler < soft(5)
    always_left = torch.full_like(truth, -5)
    assert float(energy_score(always_left, always_left, truth)) == pytest.approx(soft(10) / 2, abs=1e-12)


# -- training ------------------------------------------------------------------------------------------------------------


def carried(rows: int) -> dict[str, Tensor]:
    """Two objects, one of which moves with the arm at 5 mm a frame."""
    shard = episodes(rows, rows, objects=(0, RED))
    shard["position"][:, 0] = torch.tensor([0.3, 0.1, 0.02])
    way = torch.arange(rows).repeat(2)[:, None] * torch.tensor([0.003, 0.0, 0.004])
    shard["arm"][:, :3] = torch.tensor([0.2, 0.05, 0.03]) + way
    shard["position"][:, RED] = shard["arm"][:, :3]
    shard["command"][:, :3] = shard["arm"][:, :3] + torch.tensor([0.003, 0.0, 0.004])
    return shard


def config(tmp_path: Path, **changes: Any) -> DynamicsTrainConfig:
    tiny = DynamicsTrainConfig(
        (str(tmp_path),),
        str(tmp_path / "run"),
        model=DynamicsConfig(0, width=16, layers=1),
        steps=6,
        single_frames=0.5,
        unroll=3,
        batch_size=16,
        unrolled_batch_size=4,
        warmup=1,
        save_every=3,
        log_every=1,
    )
    return replace(tiny, **changes)


def test_an_interrupted_run_resumes_bit_identically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, carried(14))
    unbroken = train_dynamics(config(tmp_path), progress=False)
    stopped, draw, calls = config(tmp_path, run_dir=str(tmp_path / "stopped")), SceneStates.draw, []

    def interrupted(self: SceneStates, *arguments: Any) -> Window:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return draw(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SceneStates, "draw", interrupted)
        train_dynamics(stopped, progress=False)
    resumed = train_dynamics(stopped, progress=False)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in unbroken.state_dict().items())
    logs = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("run", "stopped")]
    assert logs[0] == logs[1]
    lines = [json.loads(line) for line in logs[0].splitlines()]
    assert [line["unroll"] for line in lines] == [1, 1, 1, 3, 3, 3]


def test_training_learns_that_a_held_object_is_carried(tmp_path: Path) -> None:
    write(tmp_path, carried(14))
    train_dynamics(config(tmp_path, steps=80, single_frames=1.0, disturbance=0.0, ema=0.5), progress=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    position = [line["position_mm"] for line in lines]
    assert np.mean(position[-5:]) < 0.5 * np.mean(position[:3])
