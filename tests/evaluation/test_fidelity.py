"""Metrics against scikit-image, and the open-loop replay against worlds whose fidelity is known."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from rawdream_env import media
from rawdream_env.data.recorded import RecordedEpisode
from rawdream_env.errors import DatasetError
from rawdream_env.evaluation.reporting import pictures
from rawdream_env.evaluation.world_model import fidelity, metrics
from rawdream_env.evaluation.world_model.horizon import HorizonScores
from rawdream_env.seeding import NoiseKey
from rawdream_env.wrappers.drawing import COLOURS

SIZE, K = 16, 4


class SlidingState:
    """Position of a bright square; supports what the replay needs."""

    def __init__(self, x: torch.Tensor, keys: list[NoiseKey]) -> None:
        self.x, self.keys = x, keys

    def __getitem__(self, rows: Any) -> SlidingState:
        return SlidingState(self.x[rows], [self.keys[int(r)] for r in rows])


def draw(x: np.ndarray) -> np.ndarray:
    """Columns of brightness: a square whose left edge is at round(x)."""
    frames = np.full((*x.shape, SIZE, SIZE, 3), 20, np.uint8)
    for index in np.ndindex(x.shape):
        left = round(float(x[index])) % (SIZE - 4)
        frames[index][4:8, left : left + 4] = 200
    return frames


class SlidingWorld:
    """The true world of these tests: action 0 moves the square right by ``gain`` pixels; plus keyed noise."""

    chunk_len, frame_shape, fps = K, (SIZE, SIZE, 3), 10.0

    def __init__(self, gain: float = 1.0, noise: int = 0) -> None:
        self.gain, self.noise = gain, noise
        self.batches: list[int] = []

    def start(self, frames: torch.Tensor, keys: list[NoiseKey], proprio: torch.Tensor | None = None) -> SlidingState:
        return SlidingState(torch.zeros(len(frames)), list(keys))

    def imagine(self, state: SlidingState, actions: torch.Tensor) -> tuple[SlidingState, torch.Tensor]:
        self.batches.append(len(actions))
        x = state.x[:, None] + self.gain * actions[..., 0].cumsum(1)
        frames = draw(x.numpy()).astype(int)
        for row, key in enumerate(state.keys):
            if self.noise:
                frames[row] += key.numpy(int(state.x[row])).integers(0, self.noise, frames[row].shape)
        return SlidingState(x[:, -1], state.keys), torch.from_numpy(frames.clip(0, 255).astype(np.uint8))


def actions_of(x: np.ndarray) -> np.ndarray:
    actions = np.zeros((len(x) - 1, 7), np.float32)
    actions[:, 0] = np.diff(x)
    return actions


def record(steps: int, seed: int) -> RecordedEpisode:
    actions = np.zeros((steps, 7), np.float32)
    actions[:, 0] = np.random.default_rng(seed).integers(0, 2, steps)
    x = np.concatenate([[0.0], actions[:, 0].cumsum()])
    return RecordedEpisode(draw(x), actions, np.zeros(7, np.float32), str(seed))


def test_psnr_and_ssim_are_scikit_images() -> None:
    skimage_metrics = pytest.importorskip("skimage.metrics")
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 256, (3, 23, 31, 3), dtype=np.uint8)
    noisy = (truth.astype(int) + rng.integers(-40, 40, truth.shape)).clip(0, 255).astype(np.uint8)
    flat = np.full_like(truth, 100)
    for prediction in (noisy, flat, truth[::-1].copy()):
        ours_psnr, ours_ssim = metrics.psnr(prediction, truth), metrics.ssim(prediction, truth)
        for i in range(len(truth)):
            pair = (truth[i], prediction[i])
            if not np.array_equal(*pair):
                assert ours_psnr[i] == pytest.approx(
                    skimage_metrics.peak_signal_noise_ratio(*pair, data_range=255), abs=1e-6
                )
            reference = skimage_metrics.structural_similarity(*pair, data_range=255, channel_axis=-1)
            assert ours_ssim[i] == pytest.approx(reference, abs=1e-6)
    assert np.isinf(metrics.psnr(truth, truth)).all() and metrics.ssim(truth, truth) == pytest.approx(1.0)


def test_masked_metrics_look_only_at_the_mask() -> None:
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 256, (2, 20, 20, 3), dtype=np.uint8)
    wrong = truth.copy()
    wrong[:, :5] = 255 - wrong[:, :5]
    mask = np.zeros((2, 20, 20), bool)
    mask[0, 12:] = True
    values = metrics.psnr(wrong, truth, mask)
    assert np.isinf(values[0]) and np.isnan(values[1])  # nothing wrong there; nothing there at all
    assert metrics.ssim(wrong, truth, mask)[0] == pytest.approx(1.0)
    mask[1, :5] = True
    by_hand = 10 * np.log10(255**2 / ((wrong[1, :5].astype(float) - truth[1, :5]) ** 2).mean())
    assert metrics.psnr(wrong, truth, mask)[1] == pytest.approx(by_hand)


def test_moving_region_is_where_the_square_came_and_left() -> None:
    region = metrics.moving_region(draw(np.array([0.0, 2.0])), draw(np.array(0.0)))
    assert region[0].sum() == 0
    assert sorted(set(np.nonzero(region[1])[1])) == [0, 1, 4, 5]


def test_buckets_double() -> None:
    assert metrics.buckets(64, 8) == [(0, 8), (8, 16), (16, 32), (32, 64)]
    assert metrics.buckets(20, 8) == [(0, 8), (8, 16), (16, 20)]
    assert metrics.buckets(0, 8) == []


def test_a_perfect_model_scores_the_cap_and_beats_both_copies() -> None:
    result = fidelity.evaluate_fidelity(SlidingWorld(), [record(16, s) for s in range(6)])
    assert [row["frames"] for row in result.table] == [[0, 4], [4, 8], [8, 16]]
    for row in result.table:
        assert row["dream"]["psnr"]["value"] == metrics.PSNR_CAP_DB and row["dream"]["psnr"]["n"] == 6
        assert row["dream"]["ssim"]["value"] == pytest.approx(1.0)
        assert row["copy_first"]["psnr_moving"]["value"] < 15
    late = result.table[-1]
    assert late["copy_first"]["psnr"]["value"] < late["copy_last"]["psnr"]["value"]  # copy_last is told the truth
    assert result.table[0]["copy_first"] == result.table[0]["copy_last"]  # both know the same in the first chunk


def test_a_wrong_model_falls_off_with_the_horizon() -> None:
    episodes = [RecordedEpisode(draw(x), actions_of(x)) for x in (np.arange(9.0), np.repeat(np.arange(5.0), 2)[:9])]
    result = fidelity.evaluate_fidelity(SlidingWorld(gain=0.5), episodes, sensitivity_episodes=0)
    early, late = (row["dream"]["psnr"]["value"] for row in result.table)
    assert early > late + 1.0 and result.table[0]["dream"]["psnr"]["high"] < metrics.PSNR_CAP_DB


def test_the_model_never_sees_recorded_frames_after_the_first() -> None:
    episode = record(8, 0)
    blank = RecordedEpisode(np.concatenate([episode.frames[:1], np.zeros_like(episode.frames[1:])]), episode.actions)
    dreams = [next(fidelity.dream_episodes(SlidingWorld(noise=9), [e])) for e in (episode, blank)]
    assert np.array_equal(*dreams)


def test_batching_does_not_change_dreams_and_short_episodes_leave() -> None:
    episodes = [record(n, n) for n in (8, 16, 4, 13)]
    world = SlidingWorld(noise=9)
    together = list(fidelity.dream_episodes(world, episodes, batch_size=4))
    assert world.batches == [4, 3, 2, 1]
    apart = list(fidelity.dream_episodes(SlidingWorld(noise=9), episodes, batch_size=1))
    assert [len(d) for d in together] == [8, 16, 4, 12]
    assert all(np.array_equal(a, b) for a, b in zip(together, apart, strict=True))


def test_action_sensitivity_tells_listening_from_noise() -> None:
    episodes = [record(16, s) for s in range(8)]
    listening = fidelity.action_sensitivity(SlidingWorld(noise=3), episodes)
    deaf = fidelity.action_sensitivity(SlidingWorld(gain=0.0, noise=3), episodes)
    silent = fidelity.action_sensitivity(SlidingWorld(), episodes)
    assert listening["swapped"]["ratio"]["low"] > 2 and listening["zeroed"]["ratio"]["low"] > 2
    assert deaf["swapped"]["change"] == 0.0
    assert silent["swapped"]["ratio"] is None and silent["swapped"]["change"] > 0
    with pytest.raises(DatasetError, match="at least 2, got 1"):
        fidelity.action_sensitivity(SlidingWorld(), episodes[:1])


def test_the_background_of_many_episodes_reads_some_of_them() -> None:
    class Counted(SimpleNamespace):
        read: ClassVar[list[int]] = []

        @property
        def frames(self) -> Any:
            self.read.append(1)
            return np.full((9, 8, 8, 3), 20, np.uint8)

    episodes = [Counted(actions=np.zeros((8, 7))) for _ in range(1000)]
    assert fidelity.background(episodes).mean() == 20 and len(Counted.read) == 200  # type: ignore[arg-type]


def test_little_is_kept_of_an_episode() -> None:
    seen: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def watched(value: Any) -> Any:
        seen.append(weakref.ref(value))
        alive.append(sum(ref() is not None for ref in seen))
        return value

    class Stored(SimpleNamespace):
        @property
        def frames(self) -> Any:
            return watched(record(8, self.seed).frames)

    class WatchedWorld(SlidingWorld):
        def imagine(self, *given: Any) -> Any:
            state, frames = super().imagine(*given)
            return state, watched(frames)

    episodes = [Stored(seed=s, actions=record(8, s).actions, proprio=None, camera="") for s in range(60)]
    result = fidelity.evaluate_fidelity(WatchedWorld(), episodes, batch_size=4, samples=2, sensitivity_episodes=2)  # type: ignore[arg-type]
    assert result.episodes == 60 and len(seen) > 150 and max(alive) <= 2 + 2 * 4

    scores, rng = HorizonScores(8), np.random.default_rng(0)
    for _ in range(20):  # 21 kB each
        scores.add({source: rng.random((220, 4)) for source in ("dream", "copy_first", "copy_last")})
    assert len(pickle.dumps(scores)) < 20 * 1500


_PEAK = """
import resource, sys
import numpy as np
from types import SimpleNamespace
from rawdream_env.evaluation.world_model.fidelity import evaluate_fidelity
from rawdream_env.world_models.null import NullWorldModel

class Stored(SimpleNamespace):
    frames = property(lambda self: np.random.default_rng(self.seed).integers(0, 255, (17, 64, 64, 3), np.uint8))

episodes = [Stored(seed=i, actions=np.zeros((16, 7), np.float32), proprio=None, camera="") for i in range(int(sys.argv[1]))]
evaluate_fidelity(NullWorldModel((64, 64, 3)), episodes)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_the_memory_of_fidelity_does_not_grow_with_the_episodes() -> None:
    """The recorded frames of 500 episodes take 104 MB, and the imagined ones as much."""
    few, many = (
        int(subprocess.run([sys.executable, "-c", _PEAK, str(n)], capture_output=True, check=True).stdout)
        for n in (50, 500)
    )
    assert many < 1.2 * few


def test_scores_are_means_over_frames_then_over_episodes() -> None:
    scores = HorizonScores(2)
    for values in ([1, 3, 5, np.nan, 9], [3, 5], [np.nan, 7, 7]):
        scores.add({"dream": np.array(values, float)[:, None]})
    rows = [*scores.rows(), scores.overall()]
    assert [row["frames"] for row in rows] == [[0, 2], [2, 4], [4, 5], [0, 5]]
    found = [(row["dream"]["psnr"]["value"], row["dream"]["psnr"]["n"]) for row in rows]
    assert found == [((2 + 4 + 7) / 3, 3), ((5 + 7) / 2, 2), (9, 1), ((4.5 + 4 + 7) / 3, 3)]


def test_background_region_and_errors() -> None:
    episodes = [record(16, s) for s in range(4)]
    assert fidelity.background(episodes)[0, 0].tolist() == [20, 20, 20]
    result = fidelity.evaluate_fidelity(SlidingWorld(), episodes, region="background", sensitivity_episodes=0)
    assert result.sensitivity is None
    with pytest.raises(ValueError, match="'middle'"):
        fidelity.evaluate_fidelity(SlidingWorld(), episodes, region="middle")
    with pytest.raises(DatasetError, match="4 actions"):
        fidelity.evaluate_fidelity(SlidingWorld(), [record(3, 0)])


def test_save_writes_json_and_pictures(tmp_path: Path) -> None:
    pytest.importorskip("rawdream_env.files")
    result = fidelity.evaluate_fidelity(SlidingWorld(), [record(8, s) for s in range(3)], samples=2)
    result.save(tmp_path / "out")
    loaded = json.loads((tmp_path / "out" / "fidelity.json").read_text())
    assert loaded["episodes"] == 3 and loaded["horizon"][0]["dream"]["psnr"]["value"] == 60.0
    from PIL import Image

    with Image.open(tmp_path / "out" / "fidelity.gif") as gif:
        # Pillow joins equal frames into one of longer duration.
        times = []
        for frame in range(gif.n_frames):
            gif.seek(frame)
            times.append(gif.info["duration"])
        assert sum(times) == 8 * 100 and gif.size == (2 * 2 * SIZE + 2, 2 * 2 * SIZE + 2)
    with Image.open(tmp_path / "out" / "fidelity.png") as png:
        assert png.size[1] == 4 * 2 * SIZE + 3 * 2


def test_pictures_survive_encoding(tmp_path: Path) -> None:
    clip = draw(np.arange(12.0))
    framed = pictures.border(pictures.upscale(clip, 2), COLOURS["success"], 3)
    assert framed.shape == (12, 2 * SIZE + 6, 2 * SIZE + 6, 3) and framed[0, 0, 0].tolist() == list(COLOURS["success"])
    both = pictures.beside(framed, framed[:5])
    assert both.shape == (12, 38, 2 * 38 + 4, 3) and np.array_equal(both[11, :, 42:], framed[4])
    (tmp_path / "a.mp4").write_bytes(media.encode_video([both], 10.0))
    decoded, fps = media.read_video(tmp_path / "a.mp4")
    assert fps == 10.0 and len(decoded) == 12 and np.abs(decoded[3].astype(int) - both[3]).mean() < 12
