"""Latents are cached once and read back by the row; mixtures draw what they say, again and again."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from rawdream_env import files
from rawdream_env.data import schema
from rawdream_env.data.lerobot import LeRobotReader, LeRobotWriter
from rawdream_env.data.video import encode_video
from rawdream_env.errors import DatasetError
from rawdream_env.trainers.world_model.latent_cache import CacheConfig, cache_latents, codec_fingerprint
from rawdream_env.trainers.world_model.latent_dataset import LatentDataset
from rawdream_env.trainers.world_model.latent_windows import DataEntry
from rawdream_env.trainers.world_model.mixture import Mixture, MixtureEntry, normalise_actions
from rawdream_env.world_models.autoencoders import AutoencoderConfig, PackedFrameAutoencoder

CONFIG = CacheConfig(shard_bytes=2000, still_batch=3, progress=False)
LENGTHS = (16, 25, 5, 40, 33)  # 2, 3, 0, 5 and 4 chunks


class MeanCodec(nn.Module):
    """Latents that can be worked out by hand: means of 8x8 pixels, of four frames, times a weight."""

    def __init__(self, weight: float = 0.01) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.videos = 0

    def encode_image(self, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images.movedim(-1, 1).float(), 8) * self.weight

    def encode_video(self, frames: Tensor) -> Tensor:
        self.videos += 1
        later = self.encode_image(frames[:, 1:].flatten(0, 1)).unflatten(0, (len(frames), -1, 4)).mean(2)
        return torch.cat([self.encode_image(frames[:, 0])[:, None], later], 1)


class MemoryCodec(MeanCodec):
    """Every latent is the mean of all latents since the start of the video, as a causal codec remembers its past."""

    def encode_video(self, frames: Tensor) -> Tensor:
        latents = super().encode_video(frames)
        return latents.cumsum(1) / torch.arange(1, latents.shape[1] + 1)[:, None, None, None]


def write_data(root: Path, *, action_dim: int = 7, scale: float = 1.0, lengths=LENGTHS) -> LeRobotReader:
    features = {"action": schema.numeric_feature(action_dim), "observation.state": schema.numeric_feature(3)}
    writer = LeRobotWriter(root, fps=10, image_shape=(16, 16, 3), features=features)
    rng = np.random.default_rng(len(lengths))
    for n in lengths:
        frames = np.repeat(rng.integers(0, 255, (n + 1, 1, 1, 3)), 16, 1).repeat(16, 2).astype(np.uint8)
        actions = (scale * rng.uniform(-1, 1, (n, action_dim))).astype(np.float32)
        actions[:, -1] = 0.5  # a dimension that never moves
        writer.add_episode(frames, actions, rng.normal(size=(n + 1, 3)).astype(np.float32), "play")
    writer.finalize()
    return LeRobotReader(root, raw_actions=scale > 1)


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LeRobotReader]:
    """Cache ``a`` (7 actions, with focus) and ``b`` (5 actions ten times as large, without)."""
    base = tmp_path_factory.mktemp("latent")
    a, b = write_data(base / "data-a"), write_data(base / "data-b", action_dim=5, scale=10, lengths=(24, 24))
    focus = lambda e: np.full((len(e) // 4, 2, 2), e.index, np.uint8)  # noqa: E731
    cache_latents(a, MeanCodec(), base / "a", CONFIG, focus=focus)
    cache_latents(b, MeanCodec(), base / "b", CONFIG)
    return base, a


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


class TestCache:
    def test_windows_are_the_rows_of_the_episodes(self, cached) -> None:
        base, reader = cached
        dataset, codec = LatentDataset(base / "a"), MeanCodec()
        assert len(dataset.index["shards"]) > 1
        assert (dataset.chunks.tolist(), dataset.episodes.tolist()) == ([2, 3, 5, 4], [0, 1, 3, 4])
        assert dataset.index["skipped"] == [2]
        for position, index in enumerate(dataset.episodes):
            episode = reader.episode(int(index))
            n = int(dataset.chunks[position]) * 8
            frames = torch.from_numpy(episode.frames[: n + 1])
            latents, stills = codec.encode_video(frames[None])[0, 1:].half(), codec.encode_image(frames[::8]).half()
            for first in range(n // 8):
                for count in range(1, n // 8 - first + 1):
                    got = dataset.window(position, first, count)
                    rows = slice(8 * first, 8 * (first + count))
                    assert torch.equal(got.latents, latents[2 * first : 2 * (first + count)])
                    assert torch.equal(got.anchor, stills[first])
                    np.testing.assert_array_equal(got.actions, episode.actions[rows])
                    np.testing.assert_array_equal(got.poses, episode.state[rows.start : rows.stop + 1])
                    assert got.focus is not None and (got.focus == index).all() and len(got.focus) == 2 * count
            assert torch.equal(dataset.still(position, n // 8), stills[-1])
        with pytest.raises(IndexError, match="chunks 1 to 2 of an episode of 2"):
            dataset.window(0, 1, 2)
        assert torch.equal(pickle.loads(pickle.dumps(dataset)).still(2, 1), dataset.still(2, 1))
        actions = np.concatenate(
            [reader.episode(int(e)).actions[: 8 * c] for e, c in zip(dataset.episodes, dataset.chunks, strict=True)]
        )
        np.testing.assert_allclose(dataset.bounds, np.quantile(actions, (0.01, 0.99), 0), rtol=1e-5)

    def test_an_interrupted_cache_goes_on_to_the_same_bytes(self, cached, tmp_path: Path, monkeypatch) -> None:
        base, _ = cached
        reader = LeRobotReader(base / "data-b", raw_actions=True)
        real, count = LeRobotReader.episode, iter(range(9))
        monkeypatch.setattr(LeRobotReader, "episode", lambda *a: real(*a) if next(count) != 1 else 1 / 0)
        config, codec = replace(CONFIG, shard_bytes=1), MeanCodec()
        with pytest.raises(ZeroDivisionError):
            cache_latents(reader, MeanCodec(), tmp_path / "parts", config)
        monkeypatch.undo()
        with pytest.raises(DatasetError, match=r"unfinished latent cache \(1 episodes so far\)"):
            LatentDataset(tmp_path / "parts")
        with pytest.raises(DatasetError, match="not finished by rank 0 within 0 s"):
            cache_latents(reader, codec, tmp_path / "parts", config, rank=1, patience_s=0.01)
        (tmp_path / "parts/.shard-00001.safetensors.1.abc.tmp").write_bytes(b"of a killed process")
        cache_latents(reader, codec, tmp_path / "parts", config)
        assert codec.videos == 1  # the first episode was not encoded again
        cache_latents(reader, codec, tmp_path / "whole", config)
        assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
        assert cache_latents(reader, codec, tmp_path / "whole", config, rank=1) == tmp_path / "whole"
        assert codec.videos == 3

    def test_a_cache_of_something_else_is_refused(self, cached, tmp_path: Path) -> None:
        base, reader = cached
        other = LeRobotReader(base / "data-b", raw_actions=True)
        for rank in (0, 1):
            with pytest.raises(DatasetError, match="b is a latent cache of another codec .* Delete the folder"):
                cache_latents(other, MeanCodec(0.02), base / "b", CONFIG, rank=rank)
        with pytest.raises(DatasetError, match="of other data"):
            cache_latents(reader, MeanCodec(), base / "b", CONFIG)
        with pytest.raises(DatasetError, match="of other data"):
            cache_latents(other, MeanCodec(), base / "b", CONFIG, episodes=[1])
        with pytest.raises(DatasetError, match="of another chunk_len .chunk_len 8, now 4"):
            cache_latents(other, MeanCodec(), base / "b", replace(CONFIG, chunk_len=4))
        with pytest.raises(DatasetError, match="chunk_len 6 has to be a multiple of 4"):
            cache_latents(other, MeanCodec(), tmp_path, replace(CONFIG, chunk_len=6))
        with pytest.raises(DatasetError, match="none of 5 episodes is 48 steps long"):
            cache_latents(reader, MeanCodec(), tmp_path, replace(CONFIG, chunk_len=48))
        with pytest.raises(DatasetError, match=r"episode 0: \d+ of 48 latents are not finite. The codec overflows"):
            cache_latents(reader, MeanCodec(1e6), tmp_path / "x", CONFIG)
        with pytest.raises(DatasetError, match="is no latent cache"):
            LatentDataset(tmp_path / "nowhere")

    def test_a_damaged_shard_is_named(self, cached, tmp_path: Path) -> None:
        base, _ = cached
        cache_latents(LeRobotReader(base / "data-b", raw_actions=True), MeanCodec(), tmp_path, CONFIG)
        path = tmp_path / "shard-00000.safetensors"
        content = path.read_bytes()
        for damaged, said in (
            (content[:-1] + b"x", "another SHA-256"),
            (content[:-9], f"{len(content) - 9} bytes instead of {len(content)}"),
            (None, "is missing"),
        ):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with pytest.raises(DatasetError, match=f"shard-00000.safetensors .*{said}"):
                LatentDataset(tmp_path).still(0, 0)
        with pytest.raises(DatasetError, match="shard-00000.safetensors is missing or damaged"):
            LatentDataset(tmp_path, verify=False).still(0, 0)

    def test_a_flipped_digit_of_the_index_is_refused(self, cached, tmp_path: Path) -> None:
        folder = shutil.copytree(cached[0] / "a", tmp_path / "a")
        text = (folder / "index.json").read_text()
        changed = re.sub(r'("q01": \[\s*-?\d\.)\d', r"\g<1>0", text)
        assert changed != text
        (folder / "index.json").write_text(changed)
        with pytest.raises(DatasetError, match=r"index\.json does not match the SHA-256 inside it"):
            LatentDataset(folder)

    def test_one_writer_at_a_time_and_fingerprints(self, cached) -> None:
        with files.lock_file(cached[0] / "a" / ".lock"), pytest.raises(DatasetError, match="being written by another"):
            cache_latents(cached[1], MeanCodec(), cached[0] / "a", CONFIG)
        assert codec_fingerprint(MeanCodec()) == codec_fingerprint(MeanCodec()) != codec_fingerprint(MeanCodec(2.0))
        with pytest.raises(TypeError, match="fingerprint"):
            codec_fingerprint(object())  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        "change",
        [
            {"shards": None}, {"latent_shape": [1, 2]}, {"latent_shape": "abc"}, {"chunk_len": -8}, {"chunk_len": 2.5},
            {"action_dim": 10**20}, {"statistics": {"q01": ["x"], "q99": [1]}}, {"statistics": None},
            {"file": "../a/shard-00000.safetensors"}, {"file": 3}, {"chunks": [-1]}, {"chunks": []}, {"episodes": None},
        ],
    )  # fmt: skip
    def test_an_index_with_other_values_is_refused(self, cached, tmp_path: Path, change: dict) -> None:
        folder = shutil.copytree(cached[0] / "a", tmp_path / "a")
        index = json.loads((folder / "index.json").read_text())
        index.pop("sha256")  # earlier versions wrote none
        if {"file", "chunks", "episodes"} & change.keys():
            index["shards"][0] |= change
        else:
            index |= change
        (folder / "index.json").write_text(json.dumps(index))
        with pytest.raises(DatasetError, match=r"index\.json has values that no latent cache has"):
            LatentDataset(folder)

    def test_the_embedded_autoencoder_fits(self, cached, tmp_path: Path) -> None:
        reader = LeRobotReader(cached[0] / "data-b", raw_actions=True)
        codec = PackedFrameAutoencoder(AutoencoderConfig(16, 4, (8, 8), (1, 1), (1, 1))).eval()
        dataset = LatentDataset(cache_latents(reader, codec, tmp_path, CONFIG))
        frames = torch.from_numpy(reader.episode(1).frames)
        with torch.no_grad():
            assert torch.equal(dataset.still(1, 2), codec.encode_image(frames[16:17])[0].half())
            assert torch.equal(dataset.window(1, 1, 2).latents, codec.encode_video(frames[None])[0, 3:].half())
        codec = PackedFrameAutoencoder(AutoencoderConfig(32, 4, (8, 8), (1, 1), (1, 1)))
        with pytest.raises(DatasetError, match=r"read as frames \(16, 16, 3\), .* image_size=\(32, 32\)"):
            cache_latents(reader, codec, tmp_path / "x", CONFIG)


class TestMixture:
    def mixture(self, base: Path) -> Mixture:
        return Mixture(
            [MixtureEntry(str(base / "a"), 3.0, embodiment="7d"), MixtureEntry(str(base / "b"), 1.0, embodiment="5d")]
        )

    def test_shares_are_the_weights_and_windows_equally_likely(self, cached) -> None:
        batch = self.mixture(cached[0]).draw(np.random.default_rng(0), 2000, 2)
        source = batch.source.numpy()
        bound = 4 * np.sqrt(0.75 * 0.25 / len(source))
        assert abs((source == 0).mean() - 0.75) < bound
        places = batch.places.numpy()[source == 0]
        windows, counts = np.unique(places[:, :2], axis=0, return_counts=True)
        assert len(windows) == 1 + 2 + 4 + 3
        assert np.abs(counts / len(places) - 0.1).max() < 4 * np.sqrt(0.1 * 0.9 / len(places))
        assert (places[:, 1] == places[:, 2]).all() and (batch.times == torch.arange(5)).all()

    def test_every_embodiment_has_its_own_statistics(self, cached, tmp_path: Path) -> None:
        mixture = self.mixture(cached[0])
        batch = mixture.draw(np.random.default_rng(1), 64, 2)
        for s, dim in ((0, 7), (1, 5)):
            actions = batch.actions[batch.source == s]
            assert actions[:, 1:, :, : dim - 1].abs().amax((0, 1, 2)).tolist() == [1.0] * (dim - 1)
            assert not actions[..., dim - 1 :].any() and not actions[:, 0].any()
        mixture.save_statistics(tmp_path / "actions.json")
        written = json.loads((tmp_path / "actions.json").read_text())
        for name, dataset in zip("ab", mixture.datasets, strict=True):
            np.testing.assert_array_equal([written[name]["q01"], written[name]["q99"]], dataset.bounds)
            np.testing.assert_array_equal([written[name]["action_low"], written[name]["action_high"]], dataset.bounds)
        assert (written["a"]["embodiment"], written["b"]["embodiment"]) == ("7d", "5d")
        low, high = np.array([0.0, 1.0]), np.array([4.0, 1.0])
        np.testing.assert_array_equal(
            normalise_actions(np.array([[3.0, 1.0], [9.0, 2.0]]), low, high), [[0.5, 0], [1, 0]]
        )

    def test_data_sets_of_one_embodiment_share_their_bounds(self, cached, tmp_path: Path) -> None:
        """One raw action is one condition in every data set; the bounds are those of all actions together."""
        base, reader = cached
        large = write_data(tmp_path / "data", scale=3.0, lengths=(24, 16))
        cache_latents(large, MeanCodec(), tmp_path / "c", CONFIG)
        entries = [MixtureEntry(str(base / "a"), 3.0), MixtureEntry(str(tmp_path / "c"))]
        mixture = Mixture(entries)
        whole = [reader.episode(int(e)).actions[: 8 * c] for e, c in zip((0, 1, 3, 4), (2, 3, 5, 4), strict=True)]
        whole += [large.episode(0).actions, large.episode(1).actions]
        low, high = np.quantile(np.concatenate(whole).astype(np.float64), (0.01, 0.99), 0)
        for bounds in mixture.bounds:
            np.testing.assert_allclose(bounds, (low, high), rtol=1e-12)
        batch, seen = mixture.draw(np.random.default_rng(0), 64, 1), set()
        for source, (episode, first, _), actions in zip(batch.source, batch.places, batch.actions, strict=True):
            raw = mixture.datasets[source].window(int(episode), int(first), 1).actions[:, :-1].numpy()
            expected = ((raw - low[:-1]) / (high - low)[:-1] * 2 - 1).clip(-1, 1)
            np.testing.assert_allclose(actions[1:].flatten(0, 1)[:, :-1], expected, atol=1e-6)
            seen.add(int(source))
        assert seen == {0, 1}
        own = Mixture([entries[0], replace(entries[1], embodiment="large")])
        np.testing.assert_array_equal(own.bounds[0], own.datasets[0].bounds)
        np.testing.assert_array_equal(own.bounds[1], own.datasets[1].bounds)
        given = np.full(7, -2.0), np.full(7, 4.0)
        kept = Mixture(entries, bounds={"": given})
        assert all(np.array_equal(bounds, given) for bounds in kept.bounds)

    def test_far_anchors_against_the_source(self, cached) -> None:
        base, reader = cached
        mixture, codec = self.mixture(base), MeanCodec()
        batch = mixture.draw(np.random.default_rng(2), 400, 1, far_anchor=0.5, max_offset=5)
        seen = set()
        for row in range(400):
            if batch.source[row] != 0:
                assert not batch.focus[row].any()
                continue
            position, first, anchor = batch.places[row].tolist()
            episode = reader.episode(int(mixture.datasets[0].episodes[position]))
            frames = torch.from_numpy(episode.frames)
            with torch.no_grad():
                still = codec.encode_image(frames[8 * anchor][None])
                later = codec.encode_video(frames[None, : len(episode) // 8 * 8 + 1])[0, 1:][2 * first : 2 * first + 2]
            assert torch.equal(batch.latents[row], torch.cat([still, later]).half().float())
            poses = np.concatenate([episode.state[[8 * anchor] * 4], episode.state[8 * first + 1 : 8 * first + 9]])
            np.testing.assert_array_equal(batch.poses[row].flatten(0, 1), poses)
            offset = min(2 * (first - anchor), 5)
            assert batch.times[row].tolist() == [0, 1 + offset, 2 + offset]
            assert (batch.focus[row] == episode.index).all()
            seen.add((first, anchor))
        assert seen == {(f, a) for f in range(5) for a in range(f + 1)}
        later_ones = batch.places[batch.places[:, 1] > 0]
        far = (later_ones[:, 2] < later_ones[:, 1]).float().mean()
        assert abs(float(far) - 0.5) < 4 * np.sqrt(0.25 / len(later_ones))

    def test_windows_have_the_latents_of_a_video_that_starts_at_their_anchor(self, tmp_path: Path) -> None:
        reader, codec = write_data(tmp_path / "data"), MemoryCodec()
        separate = replace(CONFIG, window_chunks=3)
        folder = cache_latents(reader, codec, tmp_path / "cache", separate)
        mixture, seen = Mixture([MixtureEntry(str(folder))]), set()
        batch = mixture.draw(np.random.default_rng(2), 200, 3, far_anchor=0.5)
        for latents, (position, first, anchor) in zip(batch.latents, batch.places.tolist(), strict=True):
            frames = torch.from_numpy(reader.episode(int(mixture.datasets[0].episodes[position])).frames)
            with torch.no_grad():
                video = codec.encode_video(frames[None, 8 * anchor : 8 * (first + 3) + 1])[0]
            assert torch.equal(latents, torch.cat([video[:1], video[-6:]]).half().float())
            seen.add((position, first, anchor))
        near = {(1, 0, 0), *((2, f, f) for f in range(3)), *((3, f, f) for f in range(2))}
        assert seen == near | {(2, 1, 0), (2, 2, 0), (3, 1, 0)}
        with pytest.raises(DatasetError, match="has windows of 3 chunks, asked for 2"):
            mixture.draw(np.random.default_rng(0), 1, 2)
        with pytest.raises(DatasetError, match=r"of other windows \(option window_latents\) \(window_chunks 3, now 0"):
            cache_latents(reader, codec, folder, CONFIG)
        index = json.loads((cache_latents(reader, codec, tmp_path / "old", CONFIG) / "index.json").read_text())
        (tmp_path / "old/index.json").write_text(
            json.dumps({k: v for k, v in index.items() if k not in ("window_chunks", "sha256")})
        )
        assert LatentDataset(cache_latents(reader, codec, tmp_path / "old", CONFIG)).window_chunks == 0

    def test_a_batch_is_a_function_of_its_generator(self, cached) -> None:
        one, other = self.mixture(cached[0]), self.mixture(cached[0])
        other.draw(np.random.default_rng(9), 5, 1)
        draw = {"batch_size": 6, "num_chunks": 2, "far_anchor": 0.5}
        a, b = (m.draw(np.random.default_rng(3), **draw).to("cpu") for m in (one, other))
        assert all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))
        near = one.draw(np.random.default_rng(3), 6, 2)
        assert torch.equal(near.places[:, :2], a.places[:, :2]) and torch.equal(near.actions, a.actions)

    def test_refuses_what_does_not_fit(self, cached, tmp_path: Path) -> None:
        base = cached[0]
        a, b = MixtureEntry(str(base / "a")), MixtureEntry(str(base / "b"), embodiment="5d")
        with pytest.raises(DatasetError, match=r"a': 7, .*b': 5}. Name the embodiments: embodiment=NAME"):
            Mixture([a, replace(b, embodiment="")])
        with pytest.raises(DatasetError, match=r"b has 5 action dimensions, .* bounds of 7 for embodiment '5d'"):
            Mixture([b], bounds={"5d": (np.zeros(7), np.ones(7))})
        with pytest.raises(DatasetError, match="no episode has 4 chunks of 8 steps .the longest has 3"):
            Mixture([a, b]).draw(np.random.default_rng(0), 1, 4)
        with pytest.raises(DatasetError, match="a has 7 action dimensions, the model 6"):
            Mixture([b, a], action_dim=6)
        with pytest.raises(DatasetError, match="positive weight"):
            Mixture([replace(a, weight=0.0)])
        with pytest.raises(DatasetError, match=r"have one name: \['a', 'a'\]"):
            Mixture([a, replace(b, name="a")])
        cache_latents(LeRobotReader(base / "data-b", raw_actions=True), MeanCodec(0.5), tmp_path / "c", CONFIG)
        with pytest.raises(DatasetError, match="c has codec .*: they cannot be mixed"):
            Mixture([a, MixtureEntry(str(tmp_path / "c"))])


@pytest.mark.parametrize("storage", ["video", "image"])
def test_public_folders_can_be_read_and_cached(tmp_path: Path, storage: str) -> None:
    """As published: two cameras and a depth map, pictures wider than high, no state, 3 Hz, one file for all episodes."""
    rng = np.random.default_rng(0)
    clips = [np.repeat(rng.integers(0, 255, (n, 1, 1, 3)), 24, 1).repeat(48, 2).astype(np.uint8) for n in (9, 17)]
    key, rows = "observation.images.image", np.concatenate([np.full(9, 0), np.full(17, 1)])
    camera = {"dtype": storage, "shape": [24, 48, 3], "names": ["height", "width", "channels"]}
    features = {
        "observation.images.depth": {"dtype": "video", "shape": [24, 48, 3], "info": {"video.is_depth_map": True}},
        key: camera,
        "observation.images.wrist": camera,
        "action": {"dtype": "float32", "shape": [10], "names": {"motors": ["x"] * 10}},
        **schema.DEFAULT_FEATURES,
    }
    info = {"codebase_version": "v3.0", "fps": 3, "total_episodes": 2, "features": features}
    for folder in ("meta/episodes/chunk-000", "data/chunk-000", f"videos/{key}/chunk-000"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "meta/info.json").write_text(json.dumps(info))
    table = {"action": rng.normal(size=(26, 10)).astype(np.float32).tolist(), "episode_index": rows}
    where = {"data/chunk_index": [0, 0], "data/file_index": [0, 0]}
    if storage == "video":
        (tmp_path / f"videos/{key}/chunk-000/file-000.mp4").write_bytes(encode_video(clips, 3))
        stamps = {"chunk_index": [0, 0], "file_index": [0, 0], "from_timestamp": [0.0, 3.0]}
        where |= {f"videos/{key}/{name}": value for name, value in stamps.items()}
    else:
        import io

        from PIL import Image

        table[key] = []
        for frame in np.concatenate(clips):
            Image.fromarray(frame).save(buffer := io.BytesIO(), format="png")
            table[key].append({"bytes": buffer.getvalue(), "path": None})
    pq.write_table(pa.table(table), tmp_path / "data/chunk-000/file-000.parquet", row_group_size=5)
    rows_of = {"episode_index": [0, 1], "length": [9, 17], "tasks": [["pick"], ["place"]]}
    pq.write_table(pa.table(rows_of | where), tmp_path / "meta/episodes/chunk-000/file-000.parquet")
    reader = LeRobotReader(tmp_path, image_size=(16, 16), raw_actions=True)
    assert (reader.image_key, reader.frame_shape, reader.lengths.tolist()) == (key, (16, 16, 3), [8, 16])
    for episode, clip in zip(reader, clips, strict=True):
        assert (episode.actions.shape[1], episode.state.shape) == (10, (len(clip), 0))
        assert np.abs(episode.frames[:, 5, 5].astype(int) - clip[:, 5, 5]).max() <= (8 if storage == "video" else 0)
    np.testing.assert_array_equal(reader.load_all([1]).frames, reader.episode(1).frames)
    with pytest.raises(DatasetError, match=r"no camera 'top'; it has \['observation.images.image', 'obs"):
        LeRobotReader(tmp_path, image_key="top")
    assert LeRobotReader(tmp_path, image_key="image").image_key == key
    dataset = LatentDataset(cache_latents(reader, MeanCodec(), tmp_path / "cache", CONFIG))
    batch = Mixture([MixtureEntry(str(dataset.folder))]).draw(np.random.default_rng(0), 3, 1)
    assert (dataset.chunks.tolist(), batch.poses.shape, batch.actions.shape) == ([1, 2], (3, 3, 4, 0), (3, 3, 4, 10))


def test_actions_in_other_units_need_a_named_embodiment(tmp_path: Path) -> None:
    actions = write_data(tmp_path, scale=10, lengths=(16,)).episode(0).actions
    np.testing.assert_array_equal(DataEntry.parse(f"{tmp_path},embodiment=widow").reader().episode(0).actions, actions)
    with pytest.raises(DatasetError, match=r"episode 0: actions reach 9\.\d+, but delta actions lie in \[-1, 1\]"):
        DataEntry.parse(str(tmp_path)).reader().episode(0)
