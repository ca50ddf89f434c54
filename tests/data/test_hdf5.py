"""HDF5 demonstrations become episodes whose pictures and actions belong together; what is broken is named."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rawdream_env import cli
from rawdream_env.data import import_hdf5 as importing
from rawdream_env.data.hdf5 import list_demos, read_demo
from rawdream_env.data.import_hdf5 import ImportConfig, import_hdf5
from rawdream_env.data.lerobot import LeRobotReader
from rawdream_env.errors import DatasetError, MissingDependencyError
from rawdream_env.files import lock_file
from tests.killing import kill_at_random_moments

h5py = pytest.importorskip("h5py")
ROWS = 7


def write_file(
    path: Path, demos: int = 3, *, kind: str = "libero", rows: int = ROWS, size: int = 16, base: bool = False
) -> Path:
    """A file in the layout of LIBERO's own files (observed after the action), of a replay of them, or of robomimic.

    Moment t (0: before the first action) has joints t / 10 and pictures of grey level 10 * t with a bright corner that is
    top left in an upright picture; action t is t / 100. With ``base`` the joints of a mobile base, which drives backwards,
    come before those of the arm.
    """
    after = kind == "libero"
    names = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "robot0_joint_pos", "agentview_image")
    if kind != "robomimic":
        names = ("ee_pos", "ee_ori", "gripper_states", "joint_states", "agentview_rgb")
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        if kind == "libero":
            data.attrs["macros_image_convention"] = "opengl"
        if kind != "robomimic":
            data.attrs["problem_info"] = json.dumps({"language_instruction": f"open {path.stem}"})
        data.attrs["env_args"] = json.dumps({"env_kwargs": {"control_freq": 20}})
        for index in range(demos):
            group = data.create_group(f"demo_{index}")
            group.attrs["num_samples"] = str(rows)
            moments = np.arange(rows) + after
            images = np.full((rows, size, size, 3), 10, np.uint8) * moments[:, None, None, None].astype(np.uint8)
            images[:, : size // 2, : size // 2] += 100 + index
            upside_down = kind != "robomimic"
            widths = (3, 4 if kind == "robomimic" else 3, 2, 7)
            obs = group.create_group("obs")
            for name, width in zip(names, widths, strict=False):
                obs[name] = np.repeat(moments[:, None] / 10, width, 1)
            obs[names[4]] = images[:, ::-1, ::-1] if upside_down else images
            states = np.repeat(np.arange(rows)[:, None] / 10, 20, 1)
            if base:
                states[:, 1:4] = 5 - states[:, 1:4]
            group["states"] = states
            group["actions"] = np.repeat(np.arange(rows)[:, None] / 100, 7, 1)
            group["dones"] = group["rewards"] = np.zeros(rows, np.uint8)
    return path


@pytest.mark.parametrize(("kind", "state"), [("libero", 8), ("replay", 8), ("robomimic", 9)])
def test_a_picture_is_followed_by_its_action(tmp_path: Path, kind: str, state: int) -> None:
    demo = list_demos(write_file(tmp_path / "a.hdf5", kind=kind), task="lift")[1]
    episode = read_demo(demo, image_size=None)
    assert (demo.fps, demo.steps, episode.state.shape) == (20.0, ROWS - 1, (ROWS, state))
    assert demo.task == ("lift" if kind == "robomimic" else "open a")
    moments = episode.frames[:, -1, -1, 0] / 10
    np.testing.assert_allclose(episode.actions[:, 0], moments[:-1] / 100, atol=1e-6)
    np.testing.assert_allclose(episode.state[:, 0], moments / 10, atol=1e-6)
    assert (episode.frames[:, 0, 0, 0] - episode.frames[:, -1, -1, 0] == 101).all()  # upright


@pytest.mark.parametrize("kind", ["libero", "replay", "robomimic"])
def test_a_mobile_base_does_not_shift_the_actions(tmp_path: Path, kind: str) -> None:
    demos = list_demos(write_file(tmp_path / "a.hdf5", kind=kind, base=True), task="lift")
    assert [demo.timing for demo in demos] == ["after" if kind == "libero" else "before"] * 3
    for demo in demos:
        episode = read_demo(demo, image_size=None)
        np.testing.assert_allclose(episode.actions[:, 0], episode.frames[:-1, -1, -1, 0] / 1000, atol=1e-6)


class TestTiming:
    def test_a_file_has_one_convention(self, tmp_path: Path) -> None:
        path = write_file(tmp_path / "a.hdf5", kind="replay")
        with h5py.File(path, "a") as file:
            file["data/demo_1/obs/joint_states"][:] = file["data/demo_1/states"][:, 1:8] = 0.3  # it stands still
            file["data/demo_2/obs/joint_states"][:] += 0.05  # a replay that has drifted away
        assert [demo.timing for demo in list_demos(path)] == ["before"] * 3
        with h5py.File(path, "a") as file:
            file["data/demo_2/obs/joint_states"][:] += 0.05  # now equal to the next row
        with pytest.raises(DatasetError, match=r"demo_0 records before .*:demo_2 after it.* Set --timing before"):
            list_demos(path)
        assert [demo.timing for demo in list_demos(path, timing="after")] == ["after"] * 3

    @pytest.mark.parametrize("spoil", ["states", "obs/joint_states", "offset"])
    def test_asks_where_the_joints_do_not_tell(self, config: ImportConfig, spoil: str) -> None:
        with h5py.File(Path(config.src) / "b.hdf5", "a") as file:
            for demo in file["data"].values():
                if spoil == "offset":
                    demo["obs/joint_states"][:] += 0.04
                else:
                    del demo[spoil]
        with pytest.raises(DatasetError, match=r"b\.hdf5: in none of 3 demonstrations do .* Set --timing before"):
            import_hdf5(config)
        assert not Path(config.out).exists()
        assert len(LeRobotReader(import_hdf5(replace(config, timing="before")))) == 9


def test_every_demonstration_may_have_its_own_instruction(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.hdf5")
    with h5py.File(path, "a") as file:
        file["data/demo_1"].attrs["ep_meta"] = json.dumps({"lang": "close the drawer", "layout_id": 3})
    assert [demo.task for demo in list_demos(path, task="lift")] == ["open a", "close the drawer", "open a"]
    with h5py.File(path, "a") as file:
        file["data"].attrs["env_args"] = json.dumps({"env_kwargs": {"control_freq": -1}})
    with pytest.raises(DatasetError, match=r"control_freq in env_args is -1, expected a positive number"):
        list_demos(path)


def test_options_overrule_what_the_file_says(tmp_path: Path) -> None:
    demo = list_demos(write_file(tmp_path / "a.hdf5"), camera="agentview_rgb")[0]
    upright, stored = read_demo(demo, image_size=None), read_demo(demo, image_size=None, flip="none", timing="before")
    np.testing.assert_array_equal(stored.frames, upright.frames[:, ::-1, ::-1])
    mirrored = read_demo(demo, image_size=None, flip="vertical")
    np.testing.assert_array_equal(mirrored.frames, upright.frames[:, :, ::-1])
    np.testing.assert_array_equal(stored.actions[1:], upright.actions[:-1])


def test_the_instruction_may_be_in_the_file_name(tmp_path: Path) -> None:
    path = write_file(tmp_path / "KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5")
    with h5py.File(path, "a") as file:
        del file["data"].attrs["problem_info"]
    assert list_demos(path)[0].task == "turn on the stove"


@pytest.fixture
def config(tmp_path: Path) -> ImportConfig:
    for name in ("b", "a", "sub/c"):
        write_file(tmp_path / f"src/{name}.hdf5")
    return ImportConfig(
        str(tmp_path / "src"), str(tmp_path / "out"), image_size=32, episodes_per_shard=2, progress=False
    )


def test_import_through_the_command_line(config: ImportConfig, capsys) -> None:
    assert cli.main(["import-hdf5", "--src", config.src, "--out", config.out, "--image-size", "32"]) == 0
    reader = LeRobotReader(config.out)
    assert (len(reader), reader.fps, reader.frame_shape) == (9, 20.0, (32, 32, 3))
    assert [reader.task(i) for i in (0, 3, 6)] == ["open a", "open b", "open c"]
    episode = reader.episode(4)
    np.testing.assert_allclose(episode.actions[:, 0], np.arange(1, ROWS) / 100, atol=1e-6)
    assert np.abs(episode.frames[:, -1, -1, 0].astype(int) - 10 * np.arange(1, ROWS + 1)).max() <= 3


def test_k_per_task_are_drawn_with_a_seed(config: ImportConfig, tmp_path: Path) -> None:
    def drawn(seed: int, src: str = config.src) -> list[str]:
        return [demo.label for demo in importing.plan(replace(config, src=src, per_task=2, seed=seed))]

    labels = drawn(1)
    assert [label.rpartition(":")[0] for label in labels] == ["a.hdf5"] * 2 + ["b.hdf5"] * 2 + ["sub/c.hdf5"] * 2
    assert labels == sorted(labels) == drawn(1) and len({tuple(drawn(seed)) for seed in range(8)}) > 2
    alone = drawn(1, f"{config.src}/a.hdf5")
    assert alone == labels[:2]  # whatever the other tasks are
    assert len(LeRobotReader(import_hdf5(replace(config, per_task=2)))) == 6
    with pytest.raises(DatasetError, match="per_task is 4, but 'open a' has 3 demonstrations"):
        importing.plan(replace(config, per_task=4))
    with pytest.raises(DatasetError, match="per_task is 0"):
        import_hdf5(replace(config, per_task=0))


def files(root: str | Path) -> dict[str, str]:
    found = [path for path in Path(root).rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def import_from(out: Path, src: str) -> None:
    import_hdf5(ImportConfig(src=src, out=str(out), workers=1, episodes_per_shard=2, progress=False))


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(config: ImportConfig, tmp_path: Path) -> None:
    unbroken, killed = kill_at_random_moments("test_hdf5:import_from", tmp_path / "runs", config.src)
    assert all(files(folder) == files(unbroken) for folder in killed)


def test_an_interrupted_import_goes_on_to_the_same_bytes(config: ImportConfig, monkeypatch) -> None:
    whole = import_hdf5(replace(config, out=config.out + "-whole", workers=1))
    real, count = importing.read_demo, iter(range(100))

    def interrupted(*args, **kwargs):
        if next(count) == 5:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(importing, "read_demo", interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_hdf5(config)
    assert len(LeRobotReader(config.out)) == 4
    import_hdf5(config)
    assert next(count) == 11  # the four finished episodes were not read again
    assert files(config.out) == files(str(whole))
    with pytest.raises(DatasetError, match="was imported with flip='auto', now it is 'none'"):
        import_hdf5(replace(config, flip="none"))
    with pytest.raises(DatasetError, match="from 9 demonstrations, now there are 8"):
        import_hdf5(replace(config, skip=("sub/c.hdf5:demo_1",)))


def test_a_changed_source_is_another_import(config: ImportConfig) -> None:
    import_hdf5(config)
    import_hdf5(config)
    with h5py.File(Path(config.src) / "b.hdf5", "a") as file:
        file["data/demo_1/obs/agentview_rgb"][3, 0, 0, 0] += 1
    with pytest.raises(DatasetError, match=r"from 3 files, now there are 3 \(the first that differs: 'b\.hdf5 sha256:"):
        import_hdf5(config)
    stored = Path(config.out) / "meta/import.json"
    earlier = {name: value for name, value in json.loads(stored.read_text()).items() if name != "files"}
    stored.write_text(json.dumps(earlier))
    import_hdf5(config)  # of a version that did not store fingerprints


def test_an_import_begun_with_other_timing_rules_is_refused(config: ImportConfig) -> None:
    for timing in ("auto", "before"):
        begun = replace(config, timing=timing, out=f"{config.out}-{timing}")
        import_hdf5(begun)
        stored = Path(begun.out) / "meta/import.json"
        earlier = {name: value for name, value in json.loads(stored.read_text()).items() if name != "version"}
        stored.write_text(json.dumps(earlier))
        if timing == "before":
            import_hdf5(begun)  # nothing was measured
            continue
        with pytest.raises(DatasetError, match=r"another version \(rules 1, now 2\).*Import again into another folder"):
            import_hdf5(begun)


def _spoil_nan(data):
    data["demo_1/actions"][3, 2] = np.nan


def _spoil_large(data):
    data["demo_1/actions"][3, 2] = 4.0


def _spoil_missing(data):
    del data["demo_1/actions"]


def _spoil_length(data):
    del data["demo_1/actions"]
    data["demo_1/actions"] = np.zeros((ROWS - 2, 7))


def _spoil_state(data):
    del data["demo_1/obs/ee_pos"]


def _spoil_camera(data):
    del data["demo_1/obs/agentview_rgb"]
    data["demo_1/obs/agentview_rgb"] = np.zeros((ROWS, 16, 16, 3), np.float32)


def _spoil_json(data):
    data.attrs["env_args"] = "{"


def _spoil_instruction(data):
    data.attrs["problem_info"] = json.dumps({"language_instruction": 5})


def _spoil_no_instruction(data):
    data.attrs["problem_info"] = json.dumps({"language_instruction": None})


def _spoil_rate(data):
    data.attrs["env_args"] = json.dumps({"env_kwargs": {"control_freq": "fast"}})


def _spoil_demos(data):
    for name in list(data):
        del data[name]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            _spoil_nan,
            r"b\.hdf5, /data/demo_1: actions of 1 of 7 rows are not finite, the first in row 3.*b\.hdf5:demo_1",
        ),
        (_spoil_large, r"b\.hdf5, /data/demo_1: actions reach 4, .* absolute poses"),
        (
            _spoil_missing,
            r"b\.hdf5, /data/demo_1: lacks \['actions'\]; it holds \['dones', 'obs', .*--skip b.hdf5:demo_1",
        ),
        (_spoil_length, r"b\.hdf5, /data/demo_1: lengths {'actions': 5, 'obs/agentview_rgb': 7"),
        (_spoil_state, r"b\.hdf5, /data/demo_1: no end-effector pose; obs holds \['agentview_rgb', 'ee_ori'"),
        (_spoil_camera, r"obs/agentview_rgb is float32 \(7, 16, 16, 3\), not uint8"),
        (_spoil_json, r"b\.hdf5: attribute env_args is no JSON"),
        (_spoil_instruction, r"b\.hdf5: language_instruction in problem_info has type int, expected text"),
        (_spoil_no_instruction, r"b\.hdf5 holds no instruction \(ep_meta or problem_info\): set one with --task"),
        (_spoil_rate, r"b\.hdf5: control_freq in env_args is 'fast', expected a positive number"),
        (_spoil_demos, r"holds no demo_0, demo_1"),
    ],
)
def test_what_is_broken_is_named(config: ImportConfig, spoil, said: str) -> None:
    with h5py.File(Path(config.src) / "b.hdf5", "a") as file:
        spoil(file["data"])
    with pytest.raises(DatasetError, match=said):
        import_hdf5(config)
    if spoil in (_spoil_nan, _spoil_missing):
        import_hdf5(replace(config, skip=("b.hdf5:demo_1",), out=config.out + "-rest"))
        assert len(LeRobotReader(config.out + "-rest")) == 8


@pytest.mark.parametrize("kind", ["link", "storage", "virtual", "huge", "count"])
def test_a_file_cannot_name_other_files_or_huge_arrays(tmp_path: Path, kind: str) -> None:
    other, path = write_file(tmp_path / "other.hdf5"), write_file(tmp_path / "a.hdf5")
    name = "data/demo_1/obs/ee_pos"
    (tmp_path / "secret").write_bytes(bytes(4096))
    said = "is a link to .*other.hdf5" if kind == "link" else "ee_pos: its values are in another file"
    with h5py.File(path, "a") as file:
        if kind == "count":
            file["data/demo_1"].attrs["num_samples"] = "seven"
            said = "ValueError: invalid literal"
        else:
            del file[name]
        if kind == "link":
            file[name] = h5py.ExternalLink(str(other), name)
        elif kind == "storage":
            file.create_dataset(name, (ROWS, 3), "f8", external=[(str(tmp_path / "secret"), 0, 4096)])
        elif kind == "virtual":
            layout = h5py.VirtualLayout((ROWS, 3), "f8")
            layout[...] = h5py.VirtualSource(str(other), name, (ROWS, 3))
            file.create_virtual_dataset(name, layout)
        elif kind == "huge":
            file.create_dataset(name, (ROWS, 10**9), "f4", chunks=True)
            said = r"ee_pos: shape \(7, 1000000000\) of float32 needs more than 2048 MiB"
    with pytest.raises(DatasetError, match=said):
        read_demo(list_demos(path)[1])


def test_damaged_absent_and_unfitting_files(config: ImportConfig, tmp_path: Path, monkeypatch) -> None:
    path = Path(config.src) / "b.hdf5"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DatasetError, match=r"b\.hdf5 is missing, damaged or no HDF5 file"):
        import_hdf5(config)
    path.unlink()
    with pytest.raises(DatasetError, match=r"no camera 'side'; it has \['agentview_rgb'\]"):
        import_hdf5(replace(config, camera="side"))
    with pytest.raises(DatasetError, match=r"nowhere: no \.hdf5 or \.h5 file"):
        import_hdf5(replace(config, src=str(tmp_path / "nowhere")))
    write_file(path, kind="robomimic")
    with pytest.raises(DatasetError, match=r"b\.hdf5 holds no instruction .* --task"):
        import_hdf5(config)
    with pytest.raises(DatasetError, match=r"b\.hdf5:demo_0 has state_dim 9, a\.hdf5:demo_0 8"):
        import_hdf5(replace(config, task="lift"))
    with pytest.raises(DatasetError, match="image_size 31 has to be even"):
        import_hdf5(replace(config, image_size=31))
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingDependencyError, match=r"rawdream-env\[hdf5\]"):
        import_hdf5(config)


def test_one_import_at_a_time_and_no_litter_of_killed_ones(tmp_path: Path) -> None:
    write_file(tmp_path / "src" / "a.hdf5")
    config = ImportConfig(str(tmp_path / "src"), str(tmp_path / "out"), progress=False)
    (tmp_path / "out" / "data").mkdir(parents=True)
    litter = tmp_path / "out" / "data" / ".file-000.parquet.1.ab.tmp"
    litter.write_bytes(b"half")
    with lock_file(tmp_path / "out" / ".lock"), pytest.raises(DatasetError, match="being written by another process"):
        import_hdf5(config)
    assert litter.exists()
    import_hdf5(config)
    assert not litter.exists() and (tmp_path / "out" / "meta" / "info.json").exists()
