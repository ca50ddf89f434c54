"""Data sets on disk: what is written comes back, and what is broken is named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rawdream_env.data import schema
from rawdream_env.data.collect import CollectConfig, collect
from rawdream_env.data.lerobot import EpisodeData, LeRobotReader, LeRobotWriter
from rawdream_env.errors import DatasetError, InvalidOptionError, SimulatorError
from rawdream_env.piper.collect import PLAY_TASK, PiperSource
from rawdream_env.piper.goals import GOAL_NAMES, phrases
from rawdream_env.piper.relations import RELATION_NAMES
from rawdream_env.seeding import NoiseKey, mix
from rawdream_env.text import MAX_INSTRUCTION_LENGTH, PAD_ID, VOCAB_SIZE, clean_instruction, tokenize, word_id
from tests.killing import kill_at_random_moments

FEATURES = {
    "action": schema.numeric_feature(7),
    "observation.state": schema.numeric_feature(7),
    "privileged.object_poses": schema.numeric_feature(49),
}


def fake_episode(seed: int, steps: int, task: str = "stack", relations: bool = False) -> EpisodeData:
    """Five-pixel coloured squares that wander over a shaded table, with an absent (NaN) object."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:64, :64]
    frames = np.repeat(np.stack([150 + y / 2, 130 + y / 2, 100 + x / 2], -1)[None], steps + 1, 0)
    for color in ((30, 60, 220), (220, 40, 40), (40, 180, 60)):
        at = rng.integers(5, 50, 2)
        for frame in frames:
            at = np.clip(at + rng.integers(-1, 2, 2), 0, 58)
            frame[at[0] : at[0] + 5, at[1] : at[1] + 5] = color
    poses = rng.normal(size=(steps + 1, 49)).astype(np.float32)
    poses[:, :7] = np.nan
    privileged = {"object_poses": poses}
    if relations:
        privileged["relations"] = np.zeros((steps + 1, len(RELATION_NAMES)), np.float32)
        privileged["gripper"] = np.full((steps + 1, 1), 0.05, np.float32)
    actions = rng.uniform(-1, 1, (steps, 7)).astype(np.float32)
    state = rng.normal(size=(steps + 1, 7)).astype(np.float32)
    return EpisodeData(frames.astype(np.uint8), actions, state, task, privileged)


def write(root: Path, episodes: list[EpisodeData], *, per_shard: int = 2, features: schema.Features = FEATURES) -> None:
    writer = LeRobotWriter(root, fps=10, image_shape=(64, 64, 3), features=features, episodes_per_shard=per_shard)
    for e in episodes:
        writer.add_episode(e.frames, e.actions, e.state, e.task, e.privileged)
    writer.finalize()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255.0**2 / np.mean((a.astype(float) - b) ** 2)))


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[EpisodeData]]:
    root = tmp_path_factory.mktemp("data") / "set"
    episodes = [fake_episode(i, steps=6 + i, task="stack" if i % 2 else "place") for i in range(5)]
    write(root, episodes)
    return root, episodes


@pytest.fixture
def broken(dataset: tuple[Path, list[EpisodeData]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset[0], tmp_path / "copy"))


class TestRoundTrip:
    def test_numbers_are_exact_and_small_objects_keep_their_colour(self, dataset) -> None:
        reader = LeRobotReader(dataset[0])
        assert len(reader) == 5
        assert reader.fps == 10
        assert reader.lengths.tolist() == [6, 7, 8, 9, 10]
        for got, expected in zip(reader, dataset[1], strict=True):
            np.testing.assert_array_equal(got.actions, expected.actions)
            np.testing.assert_array_equal(got.state, expected.state)
            np.testing.assert_array_equal(got.privileged["object_poses"], expected.privileged["object_poses"])
            assert got.instruction == expected.task
            assert got.frames.shape == (len(got) + 1, 64, 64, 3)
            assert psnr(got.frames, expected.frames) > 40
            coloured = np.ptp(expected.frames.astype(int), axis=-1) > 120
            assert psnr(got.frames[coloured], expected.frames[coloured]) > 32

    def test_load_all_equals_episode_by_episode(self, dataset) -> None:
        reader = LeRobotReader(dataset[0])
        arrays = reader.load_all([3, 0, 4], workers=2)
        assert arrays.episodes.tolist() == [3, 0, 4]
        assert arrays.offsets.tolist() == [0, 10, 17, 28]
        for position, index in enumerate(arrays.episodes):
            one, other = arrays.episode(position), reader.episode(int(index))
            np.testing.assert_array_equal(one.frames, other.frames)
            np.testing.assert_array_equal(one.actions, other.actions)
            assert (one.index, one.task) == (other.index, other.task)
        assert not arrays.actions[arrays.offsets[1:] - 1].any()  # the last row of an episode has no action

    def test_windows_never_cross_episodes(self, dataset) -> None:
        reader = LeRobotReader(dataset[0])
        arrays = reader.load_all(frames=False)
        assert arrays.frames.shape == (0, 64, 64, 3)
        rows = arrays.windows(8, stride=2)
        first, last = (np.searchsorted(arrays.offsets, r, side="right") for r in (rows, rows + 7))
        np.testing.assert_array_equal(first, last)
        pairs = reader.windows(8, stride=2)
        np.testing.assert_array_equal(arrays.offsets[pairs[:, 0]] + pairs[:, 1], rows)
        assert len(reader.windows(100)) == 0

    def test_statistics(self, dataset) -> None:
        root, episodes = dataset
        stats = LeRobotReader(root).stats
        actions = np.concatenate([e.actions for e in episodes])  # the padding rows count nowhere
        assert {int(entry["count"][0]) for entry in stats.values()} == {len(actions)}
        np.testing.assert_allclose(stats["action"]["q01"], np.quantile(actions, 0.01, axis=0), rtol=1e-6)
        np.testing.assert_allclose(stats["action"]["std"], actions.std(0), rtol=1e-6)
        np.testing.assert_allclose(
            stats["observation.state"]["mean"], np.concatenate([e.state[:-1] for e in episodes]).mean(0), rtol=1e-6
        )
        pixels = np.concatenate([e.frames[:-1] for e in episodes]) / 255.0
        np.testing.assert_allclose(stats["observation.image"]["mean"].ravel(), pixels.mean((0, 1, 2)), rtol=1e-9)
        np.testing.assert_allclose(stats["observation.image"]["std"].ravel(), pixels.std((0, 1, 2)), rtol=1e-9)
        assert stats["privileged.object_poses"]["mean"][:7].tolist() == [0.0] * 7  # absent everywhere
        assert np.isfinite(stats["privileged.object_poses"]["q99"]).all()

    def test_layout_is_lerobots(self, dataset) -> None:
        root = dataset[0]
        info = json.loads((root / "meta/info.json").read_text())
        assert info["codebase_version"] == "v3.0"
        assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (5, 45, 2)
        assert info["features"]["observation.image"]["info"]["video.pix_fmt"] == "yuv444p"
        tasks = pq.read_table(root / "meta/tasks.parquet")
        assert tasks.to_pydict() == {"task_index": [0, 1], "task": ["place", "stack"]}
        assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["task"]
        rows = pq.read_table(root / "meta/episodes/chunk-000/file-001.parquet").to_pylist()
        row = rows[0]
        assert row["episode_index"] == 2
        assert (row["dataset_from_index"], row["dataset_to_index"]) == (15, 24)
        assert row["videos/observation.image/from_timestamp"] == 0.0
        assert rows[1]["videos/observation.image/from_timestamp"] == pytest.approx(0.9)
        data = pq.read_table(root / "data/chunk-000/file-001.parquet")
        assert data["index"].to_pylist() == list(range(15, 34))
        assert data["timestamp"].to_pylist()[:3] == pytest.approx([0.0, 0.1, 0.2])
        assert data.schema.field("action").type == pa.list_(pa.float32(), 7)

    def test_the_row_without_an_action_is_marked(self, dataset) -> None:
        table = pq.read_table(dataset[0] / "data/chunk-000/file-001.parquet")
        rows = zip(table["episode_index"].to_pylist(), table["frame_index"].to_pylist(), strict=True)
        assert table["is_padding"].to_pylist() == [frame == {2: 8, 3: 9}[episode] for episode, frame in rows]
        kept = table.filter(pc.invert(table["is_padding"]))["action"]
        expected = np.concatenate([e.actions for e in dataset[1][2:4]])
        np.testing.assert_array_equal(schema.from_column(kept, len(kept)), expected)
        assert json.loads((dataset[0] / "meta/info.json").read_text())["features"]["is_padding"]["dtype"] == "bool"

    def test_a_folder_begun_by_an_earlier_version_keeps_its_columns(self, dataset, tmp_path: Path) -> None:
        write(tmp_path, dataset[1][:2])
        path = tmp_path / "data/chunk-000/file-000.parquet"
        pq.write_table(pq.read_table(path).drop(["is_padding"]), path)
        write(tmp_path, dataset[1][2:])
        tables = [pq.read_table(path) for path in sorted(tmp_path.glob("data/*/*.parquet"))]
        assert [table.column_names for table in tables] == [tables[0].column_names] * 3
        features = json.loads((tmp_path / "meta/info.json").read_text())["features"]
        assert "is_padding" not in features and "is_padding" not in tables[0].column_names
        assert LeRobotReader(tmp_path).lengths.tolist() == [6, 7, 8, 9, 10]

    def test_pandas_sees_the_task_as_index(self, dataset) -> None:
        pandas = pytest.importorskip("pandas")
        assert pandas.read_parquet(dataset[0] / "meta/tasks.parquet").index.tolist() == ["place", "stack"]


class TestWriter:
    def test_resumed_writing_gives_the_same_files(self, dataset, tmp_path: Path) -> None:
        write(tmp_path, dataset[1][:2])
        write(tmp_path, dataset[1][2:])
        assert contents(tmp_path) == contents(dataset[0])

    @pytest.mark.parametrize("lost", ["meta/episodes", "data", "videos/observation.image"])
    def test_a_crash_inside_a_shard_leaves_the_shards_before_it(self, broken: Path, dataset, lost: str) -> None:
        (broken / lost / "chunk-000/file-001.parquet").with_suffix(".mp4" if "videos" in lost else ".parquet").unlink()
        (broken / lost / "chunk-000/file-002.parquet").with_suffix(".mp4" if "videos" in lost else ".parquet").unlink()
        for name in ("info.json", "tasks.parquet", "stats.json"):
            (broken / "meta" / name).unlink()
        write(broken, dataset[1][2:])
        reader = LeRobotReader(broken)
        assert reader.lengths.tolist() == [6, 7, 8, 9, 10]
        assert [reader.task(i) for i in range(5)] == [e.task for e in dataset[1]]
        np.testing.assert_array_equal(reader.episode(2).actions, dataset[1][2].actions)

    @pytest.mark.parametrize(
        ("table", "column", "value", "said"),
        [
            ("meta/episodes", "length", None, "TypeError"),
            ("meta/episodes", "length", 10**12, "shard 1 has .* rows, its episode table another number"),
            ("meta/episodes", "tasks", None, "TypeError"),
            ("data", "task_index", 10**12, "has task_index 1000000000000 and task"),
            ("data", "action", None, "action has 1 null values"),
        ],
    )
    def test_damaged_shards_are_not_continued(self, broken: Path, table: str, column: str, value, said: str) -> None:
        path = broken / table / "chunk-000/file-001.parquet"
        rows = pq.read_table(path).to_pylist()
        pq.write_table(pa.Table.from_pylist([{**row, column: value} for row in rows]), path)
        with pytest.raises(DatasetError, match=said):
            LeRobotWriter(broken, fps=10, image_shape=(64, 64, 3), features=FEATURES)

    def test_refuses_what_does_not_fit(self, broken: Path) -> None:
        writer = LeRobotWriter(broken, fps=10, image_shape=(64, 64, 3), features=FEATURES)
        good = fake_episode(0, 4)
        with pytest.raises(DatasetError, match=r"episode 5: state has shape \(4, 7\), expected \(5, 7\)"):
            writer.add_episode(good.frames, good.actions, good.state[1:], "x", good.privileged)
        with pytest.raises(DatasetError, match=r"privileged columns \[\], declared \['object_poses'\]"):
            writer.add_episode(good.frames, good.actions, good.state, "x")
        with pytest.raises(DatasetError, match="non-finite"):
            writer.add_episode(good.frames, good.actions * np.nan, good.state, "x", good.privileged)
        with pytest.raises(DatasetError, match="already holds a data set"):
            LeRobotWriter(broken, fps=10, image_shape=(64, 64, 3), features=FEATURES, resume=False)
        wide = FEATURES | {"action": schema.numeric_feature(8)}
        with pytest.raises(DatasetError, match="action is 7 wide there and 8 here"):
            LeRobotWriter(broken, fps=10, image_shape=(64, 64, 3), features=wide)
        with pytest.raises(DatasetError, match=r"fps 10 .* 20"):
            LeRobotWriter(broken, fps=20, image_shape=(64, 64, 3), features=FEATURES)
        with pytest.raises(DatasetError, match="even H and W"):
            LeRobotWriter(broken / "new", fps=10, image_shape=(63, 64, 3), features=FEATURES)


class TestBrokenFolders:
    def test_no_data_set(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match=r"info\.json is missing; .* LeRobotDataset v3\.0 folder"):
            LeRobotReader(tmp_path)

    def test_old_version(self, broken: Path) -> None:
        info = json.loads((broken / "meta/info.json").read_text())
        (broken / "meta/info.json").write_text(json.dumps(info | {"codebase_version": "v2.1"}))
        with pytest.raises(DatasetError, match=r"v2\.1, this reads v3\.0\. Convert"):
            LeRobotReader(broken)

    def test_missing_episodes(self, broken: Path) -> None:
        (broken / "meta/episodes/chunk-000/file-001.parquet").unlink()
        with pytest.raises(DatasetError, match=r"2 of the 5 episodes of info\.json are missing, the first is 2"):
            LeRobotReader(broken)

    def test_damaged_data(self, broken: Path) -> None:
        path = broken / "data/chunk-000/file-000.parquet"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(DatasetError, match=r"file-000\.parquet: is damaged"):
            LeRobotReader(broken).episode(0)

    @pytest.mark.parametrize("content", [b"", b"not a video at all"])
    def test_damaged_video(self, broken: Path, content: bytes) -> None:
        (broken / "videos/observation.image/chunk-000/file-000.mp4").write_bytes(content)
        with pytest.raises(DatasetError, match=r"file-000\.mp4: cannot be read as a video"):
            LeRobotReader(broken).episode(1)

    def test_video_of_another_version(self, broken: Path) -> None:
        folder = broken / "videos/observation.image/chunk-000"
        shutil.copy(folder / "file-000.mp4", folder / "file-001.mp4")
        with pytest.raises(
            DatasetError, match=r"no frame at 1\.500 s, where row 6 of 10 .* the nearest is at 1\.400 s"
        ):
            LeRobotReader(broken).episode(3)

    def test_unknown_camera(self, dataset) -> None:
        with pytest.raises(DatasetError, match=r"no camera 'wrist'; it has \['observation.image'\]"):
            LeRobotReader(dataset[0], image_key="wrist")


@pytest.mark.parametrize("name", [schema.STATS_PATH, schema.INFO_PATH, schema.TASKS_PATH])
def test_a_folder_in_the_place_of_a_file_is_named(tmp_path: Path, name: str) -> None:
    writer = LeRobotWriter(tmp_path, fps=10, image_shape=(64, 64, 3), features=FEATURES)
    episode = fake_episode(0, 16)
    writer.add_episode(episode.frames, episode.actions, episode.state, "x", episode.privileged)
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(DatasetError, match=f"{Path(name).name} is a folder"):
        writer.finalize()


def test_reads_other_peoples_folders(broken: Path) -> None:
    """Plain list columns, no privileged columns, no statistics, channel-first shape, another camera name, v3.1."""
    info = json.loads((broken / "meta/info.json").read_text())
    features = {name: f for name, f in info["features"].items() if not name.startswith(("privileged", "observation.i"))}
    features["observation.images.top"] = {"dtype": "video", "shape": [3, 64, 64], "names": ["c", "h", "w"]}
    (broken / "meta/info.json").write_text(json.dumps(info | {"features": features}))
    (broken / "meta/stats.json").unlink()
    (broken / "videos/observation.image").rename(broken / "videos/observation.images.top")
    for path in (broken / "meta/episodes").rglob("*.parquet"):
        table = pq.read_table(path)
        names = [n.replace("observation.image/", "observation.images.top/") for n in table.column_names]
        pq.write_table(table.rename_columns(names), path)
    for path in (broken / "data").rglob("*.parquet"):
        table = pq.read_table(path)
        plain = {n: table[n].to_pylist() for n in table.column_names if not n.startswith("privileged")}
        pq.write_table(pa.table(plain), path)
    reader = LeRobotReader(broken)
    assert (reader.image_key, reader.frame_shape, reader.stats) == ("observation.images.top", (64, 64, 3), {})
    episode = reader.episode(3)
    assert episode.actions.shape == (9, 7)
    assert episode.frames.shape == (10, 64, 64, 3)
    assert episode.privileged == {}


class TestText:
    def test_words_of_the_grammar_have_their_own_ids(self) -> None:
        words = {word for name in GOAL_NAMES for phrase in phrases(name) for word in phrase.split()}
        assert len({word_id(word) for word in words}) == len(words) > 30

    def test_rows(self) -> None:
        row = tokenize("Put the CUP, into the pot!", max_len=8)
        assert row.tolist() == [*map(word_id, ["put", "the", "cup", "into", "the", "pot"]), PAD_ID, PAD_ID]
        assert tokenize("one two three", max_len=2).shape == (2,)
        assert not tokenize("").any()

    @given(st.text())
    def test_any_text_is_safe(self, text: str) -> None:
        clean = clean_instruction(text)
        assert len(clean) <= MAX_INSTRUCTION_LENGTH
        assert clean == clean_instruction(clean)
        assert clean.isprintable()
        row = tokenize(text)
        assert ((row >= 0) & (row < VOCAB_SIZE) & (row != 1)).all()
        np.testing.assert_array_equal(row, tokenize(clean))


class FakeSource(PiperSource):
    """Stands in for the twin: an episode that depends on seed and index alone. ``fail_at`` breaks one of them."""

    fail_at: int | None = None

    def __call__(self, index: int) -> EpisodeData:
        if index == self.fail_at:
            self.fail()
        return fake_episode(mix(self.config.seed, index), self.config.steps, PLAY_TASK, relations=True)

    def fail(self) -> None:
        raise KeyboardInterrupt


def collect_fakes(out: Path) -> None:
    collect(replace(TestCollect.config, out=str(out)), source=FakeSource)


class InterruptedSource(FakeSource):
    fail_at = 5


class DyingSource(FakeSource):
    fail_at = 5

    def fail(self) -> None:
        import os

        os._exit(9)


class RefusingSource(FakeSource):
    fail_at = 0

    def fail(self) -> None:
        raise SimulatorError("no renderer here")


class TestCollect:
    config = CollectConfig(out="", episodes=7, steps_per_episode=4, episodes_per_shard=2, progress=False)

    def test_same_files_whatever_the_workers(self, tmp_path: Path) -> None:
        for workers in (0, 2):
            collect(replace(self.config, out=str(tmp_path / str(workers)), workers=workers), source=FakeSource)
        assert contents(tmp_path / "0") == contents(tmp_path / "2")
        assert LeRobotReader(tmp_path / "0").lengths.tolist() == [4] * 7

    def test_interrupt_then_continue_then_extend(self, tmp_path: Path) -> None:
        whole, parts = (replace(self.config, out=str(tmp_path / n)) for n in ("whole", "parts"))
        collect(whole, source=FakeSource)
        with pytest.raises(KeyboardInterrupt):
            collect(parts, source=InterruptedSource)
        assert len(LeRobotReader(parts.out)) == 4
        collect(replace(parts, episodes=3), source=InterruptedSource)  # nothing to do
        assert len(LeRobotReader(parts.out)) == 4
        collect(replace(parts, episodes=5), source=FakeSource)
        assert len(LeRobotReader(parts.out)) == 5
        collect(parts, source=FakeSource)
        assert contents(tmp_path / "parts") == contents(tmp_path / "whole")

    @pytest.mark.slow
    def test_killed_at_random_moments_it_ends_with_the_same_files(self, tmp_path: Path) -> None:
        unbroken, killed = kill_at_random_moments("test_data:collect_fakes", tmp_path)
        assert all(contents(folder) == contents(unbroken) for folder in killed)

    def test_a_dead_worker_costs_only_its_shard(self, tmp_path: Path) -> None:
        config = replace(self.config, out=str(tmp_path), workers=1)
        with pytest.raises(SimulatorError, match="a collection worker died"):
            collect(config, source=DyingSource)
        assert len(LeRobotReader(tmp_path)) == 4

    def test_a_workers_own_error_arrives(self, tmp_path: Path) -> None:
        with pytest.raises(SimulatorError, match="no renderer here"):
            collect(replace(self.config, out=str(tmp_path), workers=1), source=RefusingSource)

    def test_refuses_to_mix(self, tmp_path: Path) -> None:
        collect(replace(self.config, out=str(tmp_path), episodes=1), source=FakeSource)
        with pytest.raises(DatasetError, match="was collected with seed=0, now it is 1"):
            collect(replace(self.config, out=str(tmp_path), seed=1), source=FakeSource)
        with pytest.raises(InvalidOptionError, match="fold_towel"):
            collect(replace(self.config, out=str(tmp_path / "x"), kind="expert", tasks=("fold_towel",)))
        with pytest.raises(DatasetError, match="episodes 0"):
            collect(replace(self.config, out=str(tmp_path / "x"), episodes=0))


def test_another_policy_behind_the_same_name_is_refused(tmp_path: Path) -> None:
    import torch

    from rawdream_env.policies.tiny_vla import TinyVLA, TinyVLAConfig

    class Source(FakeSource):
        def __call__(self, index: int) -> EpisodeData:
            return fake_episode(mix(self.config.seed, index), self.config.steps, self.instructions[0], relations=True)

    policy = TinyVLA(TinyVLAConfig(stem_channels=8, trunk_channels=8, trunk_blocks=1, width=16, heads=2))
    policy.save_pretrained(tmp_path / "policy")
    config = replace(TestCollect.config, out=str(tmp_path / "out"), kind="policy", policy=str(tmp_path / "policy"))
    collect(replace(config, episodes=2), source=Source)
    collect(replace(config, episodes=3), source=Source)
    with torch.no_grad():
        next(policy.parameters()).add_(1e-3)
    policy.save_pretrained(tmp_path / "policy")
    with pytest.raises(
        DatasetError, match=r"was collected with policy_fingerprint='TinyVLA \w+', now it is 'TinyVLA \w+'"
    ):
        collect(config, source=Source)
    stored = tmp_path / "out/meta/collect.json"
    earlier = {name: value for name, value in json.loads(stored.read_text()).items() if name != "policy_fingerprint"}
    stored.write_text(json.dumps(earlier))
    collect(config, source=Source)  # of a version that did not store it
    assert len(LeRobotReader(config.out)) == 7


class ChunkPolicy:
    """Counts its calls and keeps the keys it was asked with."""

    def __init__(self) -> None:
        self.keys: list[NoiseKey] = []

    def act(self, images, instructions, *, temperature, keys):
        import torch

        from rawdream_env.types import PolicyOutput

        assert images.shape == (1, 16, 16, 3) and instructions == ["place the cup into the pot"]
        self.keys += keys
        actions = torch.full((1, 8, 7), len(self.keys) / 10) + torch.arange(8)[None, :, None] / 100
        return PolicyOutput(actions, torch.zeros(1, 56), torch.zeros(1, 56))


def test_a_policy_is_asked_once_a_chunk() -> None:
    pytest.importorskip("mujoco")
    config = CollectConfig(out="", kind="policy", tasks=("place_cup",), steps_per_episode=17, image_size=16)
    source = PiperSource(config)
    policy = source._policy = ChunkPolicy()
    episode, _ = source.attempt(0, 3)
    source.close()
    expected = [i / 10 + k / 100 for i in (1, 2, 3) for k in range(8)][:17]
    np.testing.assert_allclose(episode.actions[:, 0], expected, atol=1e-6)
    assert len(episode.frames) == 18 and policy.keys == [NoiseKey(3, chunk=i) for i in range(3)]


@pytest.mark.parametrize("kind", ["play", "expert"])
def test_real_twin(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("mujoco")
    config = CollectConfig(
        out=str(tmp_path / "a"),
        kind=kind,  # type: ignore[arg-type]
        tasks=("place_cup",),
        episodes=2,
        steps_per_episode=6,
        episodes_per_shard=1,
        progress=False,
    )
    collect(config)
    collect(replace(config, out=str(tmp_path / "b"), workers=1))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    episode = LeRobotReader(tmp_path / "a").episode(1)
    assert episode.task == (PLAY_TASK if kind == "play" else "place the cup into the pot")
    assert np.abs(episode.actions).max() <= 1
    assert (episode.frames[0] != episode.frames[-1]).any()
    # The state is the commanded pose before the action: it moves by 15 mm per unit of action.
    moved = np.diff(episode.state[:, :3], axis=0)
    assert np.abs(moved - 0.015 * episode.actions[:, :3]).max() < 1e-4
