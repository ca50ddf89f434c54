"""Folders of other people: every frame belongs to its row, and what is wrong is named when the folder is opened."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rawdream_env import media
from rawdream_env.data import schema
from rawdream_env.data.lerobot import LeRobotReader, LeRobotWriter
from rawdream_env.errors import DatasetError

FPS, LENGTHS = 10, (5, 7, 4)
FEATURES = {"action": schema.numeric_feature(2), "observation.state": schema.numeric_feature(3)}
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
DATA = "data/chunk-000/file-000.parquet"
VIDEO = "videos/observation.image/chunk-000/file-000.mp4"


def gray(value: int) -> np.ndarray:
    return np.full((16, 16, 3), value, np.uint8)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three episodes in one shard; row t of episode e has grey level 60 e + 5 t."""
    root = tmp_path_factory.mktemp("foreign") / "set"
    writer = LeRobotWriter(root, fps=FPS, image_shape=(16, 16, 3), features=FEATURES)
    for e, rows in enumerate(LENGTHS):
        frames = np.stack([gray(60 * e + 5 * t) for t in range(rows)])
        actions = np.full((rows - 1, 2), e / 10, np.float32)
        writer.add_episode(frames, actions, np.zeros((rows, 3), np.float32), f"task {e}")
    writer.finalize()
    return root


@pytest.fixture
def root(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "set"))


def edit_info(root: Path, **values: Any) -> None:
    path = root / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_table(root: Path, name: str, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    rows = pq.read_table(root / name).to_pylist()
    rows = change(rows) or rows
    pq.write_table(pa.Table.from_pylist(rows), root / name)


def levels(root: Path, index: int) -> list[int]:
    return [round(float(frame.mean()) / 5) * 5 for frame in LeRobotReader(root).episode(index).frames]


def expected(index: int) -> list[int]:
    return [60 * index + 5 * t for t in range(LENGTHS[index])]


def write_video(root: Path, values: list[int], fps: float) -> None:
    (root / VIDEO).write_bytes(media.encode_video([np.stack([gray(v) for v in values])], fps, crf=8))


class TestVideoTiming:
    def test_a_faster_video_is_read_at_the_rows_times(self, root: Path) -> None:
        every = [v for e in range(3) for v in expected(e)]
        write_video(root, [v for v in every for _ in range(3)], 3 * FPS)
        assert [levels(root, e) for e in range(3)] == [expected(e) for e in range(3)]

    def test_a_slower_video_is_refused(self, root: Path) -> None:
        write_video(root, [v for e in range(3) for v in expected(e)], FPS / 2)
        with pytest.raises(
            DatasetError, match=r"file-000\.mp4: no frame at 0\.100 s, where row 1 of 5 .* another frame"
        ):
            LeRobotReader(root).episode(0)

    def test_a_lost_frame_is_refused(self, root: Path) -> None:
        every = [v for e in range(3) for v in expected(e)]
        write_video(root, every[:-1], FPS)
        assert levels(root, 1) == expected(1)
        with pytest.raises(DatasetError, match=r"no frame at 1\.500 s, where row 3 of 4 .* the nearest is at 1\.400 s"):
            LeRobotReader(root).episode(2)

    def test_an_episode_does_not_borrow_the_next_ones_frame(self, root: Path) -> None:
        """The video of episode 0 lacks a frame, and the table counts its frames: it ends one frame early."""

        def shift(rows):
            for row in rows:
                for name, first in (("from", row["episode_index"] == 0), ("to", False)):
                    if not first:
                        row[f"videos/observation.image/{name}_timestamp"] -= 1 / FPS

        edit_table(root, EPISODES, shift)
        write_video(root, [v for e in range(3) for v in expected(e)][1:], FPS)
        assert levels(root, 1) == expected(1)
        with pytest.raises(DatasetError, match=r"episode 0 has 5 rows at 10 .* up to 0\.400 s, .* ends at 0\.400 s"):
            LeRobotReader(root).episode(0)
        with pytest.raises(DatasetError, match="episode 0 has 5 rows"):
            LeRobotReader(root).load_all()

    def test_rows_of_another_rate_are_refused(self, root: Path) -> None:
        edit_info(root, fps=5)
        with pytest.raises(
            DatasetError, match=r"episode 0: rows 0 and 1 are 0\.1 s apart, but info\.json has 5 frames"
        ):
            LeRobotReader(root).episode(0, frames=False)

    def test_a_missing_row_is_refused(self, root: Path) -> None:
        edit_table(
            root, DATA, lambda rows: [{**r, "timestamp": r["timestamp"] + (r["frame_index"] > 1) / FPS} for r in rows]
        )
        with pytest.raises(DatasetError, match=r"rows 1 and 2 are 0\.2 s apart"):
            LeRobotReader(root).episode(0)


class TestTasks:
    def test_text_instead_of_a_list(self, root: Path) -> None:
        edit_table(root, EPISODES, lambda rows: [{**r, "tasks": r["tasks"][0]} for r in rows])
        assert LeRobotReader(root).tasks == ("task 0", "task 1", "task 2")

    def test_of_several_the_rows_own(self, root: Path) -> None:
        edit_table(root, EPISODES, lambda rows: [{**r, "tasks": ["task 2", "task 0", "task 1"]} for r in rows])
        reader = LeRobotReader(root)
        assert (
            [reader.task(e) for e in range(3)]
            == [reader.episode(e).task for e in range(3)]
            == [f"task {e}" for e in range(3)]
        )
        edit_table(root, DATA, lambda rows: [{**r, "task_index": 7} for r in rows])
        with pytest.raises(DatasetError, match="episode 0 has task_index 7, which .*tasks.parquet does not name"):
            LeRobotReader(root)


def test_two_columns_of_one_name_are_refused(root: Path) -> None:
    for name in (DATA, EPISODES):
        table = pq.read_table(root / name)
        pq.write_table(table.append_column("episode_index", table["episode_index"]), root / name)
        with pytest.raises(DatasetError, match=rf"{Path(name).name}.*\(two columns of \d+ have the same name\)"):
            LeRobotReader(root).episode(0)
        pq.write_table(table, root / name)


def test_actions_outside_the_range_are_refused(root: Path) -> None:
    edit_table(root, DATA, lambda rows: [{**r, "action": [57.3 * a for a in r["action"]]} for r in rows])
    reader = LeRobotReader(root)
    np.testing.assert_array_equal(reader.episode(0).actions, 0)
    with pytest.raises(DatasetError, match=r"episode 1: actions reach 5\.73, but delta actions lie in \[-1, 1\]"):
        reader.episode(1)
    with pytest.raises(DatasetError, match=r"episode 1: actions reach 5\.73"):
        reader.load_all()
    assert LeRobotReader(root, raw_actions=True).episode(1).actions.max() == np.float32(5.73)


def test_rows_in_another_file_than_the_table_names(root: Path) -> None:
    before = LeRobotReader(root).load_all()
    edit_table(root, EPISODES, lambda rows: [{**r, "data/file_index": 3} for r in rows])
    np.testing.assert_array_equal(LeRobotReader(root).load_all().actions, before.actions)
    other = pq.read_table(root / DATA).slice(0, LENGTHS[0])
    pq.write_table(other, root / DATA.replace("file-000", "file-003"))
    pq.write_table(pq.read_table(root / DATA).slice(LENGTHS[0]), root / DATA)
    np.testing.assert_array_equal(LeRobotReader(root).load_all().actions, before.actions)


def _features(**values: Any) -> dict[str, Any]:
    image = {"dtype": "video", "shape": [16, 16, 3], "names": None}
    return {"observation.image": image, **FEATURES, **values}


HUGE = "x" * 100_000
INFO: list[tuple[dict[str, Any], str]] = [
    ({"data_path": "../other/{chunk_index}/{file_index}.parquet"}, "leaves the data set's folder"),
    ({"data_path": "/etc/{chunk_index}/{file_index}"}, "leaves the data set's folder"),
    ({"video_path": "a/../../{file_index}.mp4"}, "leaves the data set's folder"),
    ({"data_path": "data/{chunk_index:0999999999d}"}, "unknown field 'chunk_index'"),
    ({"data_path": "data/{chunk_index.__class__}"}, "unknown field 'chunk_index.__class__'"),
    ({"data_path": "data/{chunk_index!r}"}, "unknown field"),
    ({"data_path": "data/{"}, "Expected a template like"),
    ({"data_path": 7}, "data_path is 7"),
    ({"data_path": HUGE}, r"data_path is 'xxx.*\.\.\."),
    (
        {"data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"},
        "the v2.1 template .* convert_dataset_v21_to_v30",
    ),
    ({"total_episodes": -1}, "total_episodes is -1, expected a positive whole number; the tables hold 3"),
    ({"total_episodes": None}, "total_episodes is None"),
    ({"total_episodes": 10**12}, "999999999997 of the 1000000000000 episodes of info.json are missing, the first is 3"),
    ({"total_episodes": "3"}, "total_episodes is '3'"),
    ({"fps": None}, r"fps is None, expected Hz in \(0, 10000\]"),
    ({"fps": 0}, "fps is 0"),
    ({"fps": float("nan")}, "fps is nan"),
    ({"fps": [10]}, r"fps is \[10\]"),
    ({"features": None}, "features is None, expected an object"),
    ({"features": _features(action={"dtype": "float32"})}, "feature 'action' is .*, expected a dtype and a shape"),
    ({"features": _features(action=[1])}, r"feature 'action' is \[1\]"),
    ({"features": _features(action={"dtype": "float32", "shape": [-2]})}, "feature 'action' is"),
    ({"features": _features(action={"dtype": "float32", "shape": [2.0]})}, "feature 'action' is"),
    ({"features": {"action": FEATURES["action"]}}, r"no camera ''; it has \[\]"),
    (
        {"features": _features(**{"observation.image": {"dtype": "video", "shape": [16, 16, 1]}})},
        r"have shape \[16, 16, 1\]",
    ),
    (
        {"features": _features(**{"observation.image": {"dtype": "video", "shape": [3, 10**6, 16]}})},
        "at most 16384 pixels",
    ),
    (
        {"features": {"action": FEATURES["action"], "../x": {"dtype": "video", "shape": [16, 16, 3]}}},
        "no name of a folder",
    ),
    ({"codebase_version": HUGE}, "this reads v3.0"),
    ({"features": {HUGE + str(i): FEATURES["action"] for i in range(9)}}, r"no feature action; found .*\(9 in all\)"),
]


@pytest.mark.parametrize(("values", "said"), INFO, ids=range(len(INFO)))
def test_info_is_validated_when_the_folder_is_opened(root: Path, values: dict[str, Any], said: str) -> None:
    edit_info(root, **values)
    with pytest.raises(DatasetError, match=said) as error:
        LeRobotReader(root)
    assert len(str(error.value)) < 1000 + len(str(root)) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["total_episodes", "fps", "features", "codebase_version"])
def test_a_missing_entry_of_info(root: Path, name: str) -> None:
    path = root / "meta/info.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != name}))
    with pytest.raises(DatasetError, match=f"{name} is None"):
        LeRobotReader(root)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("length", None, "length None, expected a whole number in"),
        ("length", -4, "length -4"),
        ("length", 10**12, "length 1000000000000"),
        ("length", 5.0, "length 5.0"),
        ("episode_index", None, "the row of episode None has episode_index None"),
        ("data/file_index", -1, "data/file_index -1"),
        ("data/chunk_index", 10**9, "data/chunk_index 1000000000"),
        ("videos/observation.image/from_timestamp", None, "from_timestamp None, expected seconds"),
        ("videos/observation.image/from_timestamp", float("nan"), "from_timestamp nan"),
        ("videos/observation.image/to_timestamp", -1.0, "to_timestamp -1.0"),
    ],
)
def test_episode_rows_are_validated_when_the_folder_is_opened(root: Path, name: str, value: Any, said: str) -> None:
    edit_table(root, EPISODES, lambda rows: [{**r, name: value if r["episode_index"] == 1 else r[name]} for r in rows])
    with pytest.raises(DatasetError, match=said):
        LeRobotReader(root)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: {"action": None}, "action has 7 null values"),
        (lambda r: {"action": [0.1, None]}, "action has 7 null values"),
        (
            lambda r: {"action": [0.1, float("nan")]},
            "episode 1: action of 6 of 6 rows are not finite, the first in row 0",
        ),
        (lambda r: {"action": [0.1] * (1 + r["frame_index"] % 2 * 2)}, "rows of different lengths"),
        (lambda r: {"action": [0.1] * 3}, "action is 3 wide in the data"),
        (lambda r: {"timestamp": None}, "timestamp has 7 null values"),
        (lambda r: {"observation.state": [float("inf")] * 3}, "observation.state of 7 of 7 rows are not finite"),
    ],
)
def test_rows_are_validated_when_they_are_read(root: Path, change, said: str) -> None:
    edit_table(root, DATA, lambda rows: [r | change(r) if r["episode_index"] == 1 else r for r in rows])
    with pytest.raises(DatasetError, match=said):
        LeRobotReader(root).episode(1)


def test_text_instead_of_numbers(root: Path) -> None:
    edit_table(root, DATA, lambda rows: [r | {"action": ["a", "b"]} for r in rows])
    with pytest.raises(DatasetError, match=r"action has 0 null values of type 'list<.*: string>' in 7 rows"):
        LeRobotReader(root).episode(1)


def test_a_video_of_another_size_than_info_says(root: Path) -> None:
    edit_info(root, features=_features(**{"observation.image": {"dtype": "video", "shape": [32, 16, 3]}}))
    with pytest.raises(
        DatasetError, match=r"frames are \(16, 16, 3\), but info\.json has \(32, 16, 3\)\. Set image_size"
    ):
        LeRobotReader(root).load_all()
    assert LeRobotReader(root, image_size=(8, 8)).load_all().frames.shape == (16, 8, 8, 3)


@pytest.mark.parametrize("name", ["meta/info.json", EPISODES, DATA, VIDEO])
def test_a_named_pipe_is_refused_at_once(root: Path, name: str) -> None:
    (root / name).unlink()
    os.mkfifo(root / name)
    with pytest.raises(DatasetError, match=f"{Path(name).name}.* is no regular file"):
        LeRobotReader(root).episode(0)


def test_pictures_outside_the_folder_are_refused(root: Path) -> None:
    secret = root.parent / "secret.png"
    secret.write_bytes(media.encode_picture(gray(9)))
    (root / "inside.png").write_bytes(media.encode_picture(gray(30)))
    edit_info(root, features=_features(**{"observation.image": {"dtype": "image", "shape": [16, 16, 3]}}))
    for name in ("inside.png", "../secret.png", str(secret), None):
        cell = {"observation.image": {"bytes": None, "path": name}}
        edit_table(root, DATA, lambda rows, cell=cell: [r | cell for r in rows])
        if name == "inside.png":
            assert (LeRobotReader(root).episode(0).frames == 30).all()
            continue
        with pytest.raises(DatasetError, match="a picture has the path .*, expected one inside the folder"):
            LeRobotReader(root).episode(0)


@pytest.mark.parametrize(
    "content", ["[]", '{"action": 3}', '{"action": {"min": ["x"]}}', '{"action": {"min": [[1], [1, 2]]}}']
)
def test_statistics_that_are_no_numbers(root: Path, content: str) -> None:
    (root / "meta/stats.json").write_text(content)
    with pytest.raises(DatasetError, match=r"stats\.json"):
        LeRobotReader(root)


def test_a_flipped_bit_in_a_page_is_noticed(root: Path) -> None:
    values = np.random.default_rng(0).random(3000, np.float32)
    content = schema.parquet_bytes(pa.table({"x": values}))
    at = content.index(values.tobytes()[400:420]) if values.tobytes()[400:420] in content else 2000
    path = root / "page.parquet"
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(DatasetError, match=r"page\.parquet: is damaged"):
        schema.read_parquet(path)
