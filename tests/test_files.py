"""Files are whole or absent, and safetensors files are what they say."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rawdream_env import files
from rawdream_env.errors import CheckpointError, InvalidOptionError, RawDreamError


def test_round_trip(tmp_path: Path) -> None:
    files.atomic_write_bytes(tmp_path / "a", b"one")
    files.atomic_write_text(tmp_path / "a", "zwei: ü")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "zwei: ü"
    files.atomic_write_json(tmp_path / "j.json", {"a": [1, 2.5, None]})
    assert json.loads((tmp_path / "j.json").read_text()) == {"a": [1, 2.5, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.atomic_write_json(tmp_path / "j.json", {"a": float("nan")})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "j.json"]
    assert files.sha256_file(tmp_path / "j.json") == files.sha256_file(tmp_path / "j.json")


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    files.atomic_write_bytes(tmp_path / "a", b"")
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize("operation", ["open", "write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_content_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    target = tmp_path / "a"
    files.atomic_write_bytes(target, b"old")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, operation, fail)
    with pytest.raises(OSError, match="No space left"):
        files.atomic_write_bytes(target, b"new content")
    monkeypatch.undo()
    assert target.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data[:3])))
    files.atomic_write_bytes(tmp_path / "a", b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"


def test_safetensors_round_trip_with_shared_and_strided_tensors(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "base": base,
        "again": base,
        "row": base[1],
        "columns": base.T,
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.zeros(0, 4),
        "half": base.bfloat16(),
        "flag": torch.tensor([True, False]),
        "parameter": torch.nn.Parameter(base.clone()),
    }
    files.save_safetensors(tmp_path / "t.safetensors", tensors, {"kind": "test"})
    loaded = files.load_safetensors(tmp_path / "t.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name
    assert files.load_safetensors_metadata(tmp_path / "t.safetensors") == {"kind": "test"}


def test_non_finite_values_are_refused_both_ways(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    bad = {"good": torch.zeros(2), "weight": torch.tensor([1.0, float("nan"), float("inf")])}
    path = tmp_path / "t.safetensors"
    with pytest.raises(CheckpointError, match="'weight' holds 2 non-finite of 3"):
        files.save_safetensors(path, bad)
    assert not path.exists()
    save_file(bad, path)
    with pytest.raises(CheckpointError, match=rf"{path.name}: tensor 'weight' holds 2 non-finite"):
        files.load_safetensors(path)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    with pytest.raises(CheckpointError, match=f"no file .*{path.name}"):
        files.load_safetensors(path)
    files.save_safetensors(path, {"a": torch.arange(100.0)})
    whole = path.read_bytes()
    for damaged in (whole[:-7], whole[:20], b"", b"\x80\x04pickle", b"\xff" * 64, whole[:8] + b"[" + whole[9:]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"{path.name} is damaged"):
            files.load_safetensors(path)
        with pytest.raises(CheckpointError, match=path.name):
            files.load_safetensors_metadata(path)


def flip_a_value(path: Path) -> None:
    """One bit of the last tensor value: the file still parses and stays finite."""
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


def saved_models(folder: Path) -> dict[str, tuple[Path, Callable[[], Any]]]:
    """Every kind of saved folder: the file to damage, and how the folder is loaded."""
    from rawdream_env.judges.embedded import EmbeddedJudge
    from rawdream_env.judges.embedded_network import EmbeddedJudgeConfig, JudgeNetwork
    from rawdream_env.policies.tiny_vla import TinyVLA, TinyVLAConfig
    from rawdream_env.world_models.autoencoders import AutoencoderConfig, PackedFrameAutoencoder
    from rawdream_env.world_models.loading import read_codec, save_codec
    from rawdream_env.world_models.pretrained import WEIGHTS
    from rawdream_env.world_models.wan.config import WanConfig
    from rawdream_env.world_models.wan.transformer import WanWorldModelTransformer

    sizes = EmbeddedJudgeConfig(frame_size=32, stem=8, mid=8, deep=16, width=16, heads=2, layers=1, text_layers=1)
    EmbeddedJudge(JudgeNetwork(sizes)).save_pretrained(folder / "judge")
    TinyVLA(TinyVLAConfig(width=16, heads=2)).save_pretrained(folder / "policy")
    save_codec(PackedFrameAutoencoder(AutoencoderConfig(16, 4, (8, 8), (1, 1), (1, 1))), folder)
    WanWorldModelTransformer(
        WanConfig(latent_shape=(2, 2, 2), num_layers=1, num_attention_heads=2, attention_head_dim=24, ffn_dim=16)
    ).save_pretrained(folder / "transformer")
    return {
        "judge": (folder / "judge/model.safetensors", lambda: EmbeddedJudge.from_pretrained(folder / "judge")),
        "policy": (folder / "policy/model.safetensors", lambda: TinyVLA.from_pretrained(folder / "policy")),
        "autoencoder": (folder / "autoencoder/model.safetensors", lambda: read_codec(folder, 4)),
        "transformer": (
            folder / "transformer" / WEIGHTS,
            lambda: WanWorldModelTransformer.from_pretrained(folder / "transformer"),
        ),
    }


def test_a_flipped_bit_in_saved_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, load in saved_models(tmp_path).values():
        manifest = path.parent / files.MANIFEST
        assert json.loads(manifest.read_text()) == {"sha256": {path.name: files.sha256_file(path)}}
        load()
        flip_a_value(path)
        with pytest.raises(CheckpointError, match=rf"{path.name} is altered or damaged: .*{files.SKIP_CHECKSUMS}=1"):
            load()
        with monkeypatch.context() as patch:
            patch.setenv(files.SKIP_CHECKSUMS, "1")
            load()
        manifest.unlink()  # as saved by an earlier version
        load()


def test_the_manifest_above_a_folder_counts_and_a_foreign_one_does_not(tmp_path: Path) -> None:
    path = tmp_path / "model" / "part" / "a.safetensors"
    path.parent.mkdir(parents=True)
    files.save_safetensors(path, {"a": torch.arange(4.0)})
    for foreign in ("[1", "[]", "{}", '{"sha256": "x"}', '{"sha256": {"other": "x"}}'):
        (tmp_path / files.MANIFEST).write_text(foreign)
        assert files.load_safetensors(path).keys() == {"a"}
    (tmp_path / files.MANIFEST).write_text(
        json.dumps({"sha256": {"model/part/a.safetensors": files.sha256_file(path)}})
    )
    assert files.load_safetensors(path).keys() == {"a"}
    flip_a_value(path)
    with pytest.raises(CheckpointError, match="altered or damaged"):
        files.load_safetensors(path)
    (path.parent / files.MANIFEST).write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"manifest.json cannot be read as JSON"):
        files.load_safetensors(path)


def test_a_save_that_fails_leaves_no_wrong_checksum(tmp_path: Path) -> None:
    def save(value: float, fail: bool) -> None:
        with files.sealed_folder(tmp_path):
            files.save_safetensors(tmp_path / "a.safetensors", {"a": torch.tensor([value])})
            if fail:
                raise OSError(errno.EDQUOT, "Disk quota exceeded")

    save(1.0, False)
    with pytest.raises(OSError, match="quota"):
        save(2.0, True)
    assert files.load_safetensors(tmp_path / "a.safetensors")["a"] == 2.0
    assert not (tmp_path / files.MANIFEST).exists()


def test_every_bundled_file_is_verified_on_load(tmp_path: Path) -> None:
    import shutil

    from rawdream_env import assets as bundled
    from rawdream_env.judges import load_judge
    from rawdream_env.policies import load_policy
    from rawdream_env.starts.pack import PackStarts
    from rawdream_env.world_models import load_world_model
    from rawdream_env.world_models.loading import read_world_model

    shutil.copytree(Path(bundled.__file__).parent, tmp_path / "assets")
    root = tmp_path / "assets"
    video, parts = root / "video_world_model", ("reader", "dynamics", "painter")
    loaders: dict[str, Callable[[], Any]] = {
        "judge/model.safetensors": lambda: load_judge(root / "judge"),
        "policy/model.safetensors": lambda: load_policy(root / "policy"),
        "starts_narrow.safetensors": lambda: PackStarts(root / "starts_narrow.safetensors"),
        "starts_wide.safetensors": lambda: PackStarts(root / "starts_wide.safetensors"),
        "video_world_model/autoencoder/model.safetensors": lambda: read_world_model(video),
        "video_world_model/transformer/diffusion_pytorch_model.safetensors": lambda: read_world_model(video),
        **{f"world_model/{part}/model.safetensors": lambda: load_world_model(root / "world_model") for part in parts},
    }
    assert loaders.keys() == {path.relative_to(root).as_posix() for path in root.rglob("*.safetensors")}
    for name, load in loaders.items():
        whole = (root / name).read_bytes()
        flip_a_value(root / name)
        with pytest.raises(CheckpointError, match=f"{Path(name).name} is altered or damaged"):
            load()
        (root / name).write_bytes(whole)
        load()


def sealed_data(folder: Path) -> dict[Path, Callable[[Path], Any]]:
    """Every kind of data file that carries its own checksum, and how it is read."""
    import numpy as np

    from rawdream_env.starts.pack import PackStarts, save_start_pack
    from rawdream_env.trainers.judge.clips import imagined_clips
    from rawdream_env.trainers.world_model.latent_episodes import encode_episodes
    from rawdream_env.types import Start

    start = Start(np.zeros((8, 8, 3), np.uint8), "lift the cube", 0, np.zeros(3, np.float32), 5)
    save_start_pack(folder / "pack.safetensors", [start], [("lift", "lift the cube")])
    clips = {"frames": torch.zeros(1, 9, 8, 8, 3, dtype=torch.uint8), "labels": torch.ones(1, dtype=torch.uint8)}
    (folder / "clips").mkdir()
    files.save_sealed(folder / "clips" / "a.safetensors", clips, {"instructions": '["lift the cube"]'})
    latents = {name: torch.zeros(2, 3) for name in ("chunks", "latents", "stills", "actions", "poses")}
    files.save_sealed(folder / "latents.safetensors", latents)
    return {
        folder / "pack.safetensors": PackStarts,
        folder / "clips" / "a.safetensors": lambda path: imagined_clips(path.parent),
        folder / "latents.safetensors": lambda path: encode_episodes(None, [], [], [], path, chunk_len=8, bf16=False),  # type: ignore[arg-type]
    }


def test_a_flipped_bit_in_a_data_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, load in sealed_data(tmp_path).items():
        load(path)
        whole = path.read_bytes()
        flip_a_value(path)
        with pytest.raises(RawDreamError, match=f"{path.name} is altered or damaged: it does not match the SHA-256"):
            load(path)
        if b"lift the cube" in whole:  # a text in the metadata
            path.write_bytes(whole.replace(b"lift the cube", b"lift the cuba"))
            with pytest.raises(RawDreamError, match="is altered or damaged"):
                load(path)
        monkeypatch.setenv(files.SKIP_CHECKSUMS, "1")
        load(path)
        monkeypatch.delenv(files.SKIP_CHECKSUMS)
        path.write_bytes(whole)
        tensors, metadata = files.load_sealed(path)
        files.save_safetensors(path, tensors, metadata)  # as earlier versions wrote it
        load(path)


def test_a_message_is_short_and_printable_whatever_it_quotes() -> None:
    error = CheckpointError(f"a.json has {'x' * 100_000}\x1b[31m; restore it from a copy.")
    assert len(str(error)) < 600 and str(error).startswith("a.json has xxx")
    assert str(error).endswith(r"x\x1b[31m; restore it from a copy.") and len(error.args[0]) > 100_000
    assert str(CheckpointError("short\nand long")) == "short\nand long"
    assert str(CheckpointError("1\n2\n3\n4")) == "1 2 3 4"


def test_a_weights_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with files.sealed_folder(tmp_path):
        files.save_safetensors(tmp_path / "a.safetensors", {"w": torch.zeros(2)})
    (tmp_path / "a.safetensors").unlink()
    (tmp_path / "a.safetensors").symlink_to("/proc/self/mem")
    with pytest.raises(CheckpointError, match=r"a\.safetensors cannot be read \(.*Input/output error"):
        files.load_safetensors(tmp_path / "a.safetensors")


def test_a_huge_file_is_not_read_as_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    os.truncate(tmp_path / "a.json", 2**31)
    with pytest.raises(CheckpointError, match="has 2147483648 bytes, expected at most 67108864"):
        files.read_json(tmp_path / "a.json")


def test_names_from_a_file_cannot_control_the_terminal(tmp_path: Path) -> None:
    wanted = {"weight": torch.zeros(2)}
    named = {"\x1b[2J\x1b]0;owned\x07": torch.zeros(1), "a\nb" * 10_000: torch.zeros(1), **wanted}
    with pytest.raises(CheckpointError) as caught:
        files.check_weights(named, wanted, tmp_path)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 500 and r"\x1b[2J\x1b]0;owned\x07 is unknown" in message
    with pytest.raises(CheckpointError, match=r"tensor '.x1b.K' holds 1 non-finite") as caught:
        files.save_safetensors(tmp_path / "a", {"\x1b[K": torch.tensor([float("nan")])})
    assert str(caught.value).isprintable()


def test_an_output_folder_that_cannot_be_written_is_known_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.check_output(tmp_path / "new" / "folder")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(InvalidOptionError, match=r"output folder .*file/out: .*Not a directory. Give another folder"):
        files.check_output(tmp_path / "file" / "out")

    def full(*args: Any) -> int:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(InvalidOptionError, match="Disk quota exceeded"):
        files.check_output(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_every_evaluation_checks_its_output_folder_first(tmp_path: Path) -> None:
    from rawdream_env.evaluation.judges.evaluate import EvaluateJudgeConfig, evaluate_judge
    from rawdream_env.evaluation.side_by_side.evaluate import EvaluateConfig, evaluate
    from rawdream_env.evaluation.world_model.evaluate import EvaluateWorldModelConfig, evaluate_world_model

    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    calls: list[Callable[[], Any]] = [
        lambda: evaluate(EvaluateConfig(policies=("a=missing",), out=out)),
        lambda: evaluate_judge(EvaluateJudgeConfig(judge="missing", out=str(out))),
        lambda: evaluate_world_model(EvaluateWorldModelConfig(data=("missing",), world_model="missing", out=str(out))),
    ]
    for call in calls:
        with pytest.raises(InvalidOptionError, match="cannot write to the output folder"):
            call()


def test_equal_models_are_equal_files(tmp_path: Path) -> None:
    tensors, metadata = {"a": torch.arange(3.0), "b": torch.ones(2, dtype=torch.bool)}, dict.fromkeys("fedcba", "x")
    contents = {files.serialize_safetensors(tensors, metadata) for _ in range(20)}
    assert len(contents) == 1
    files.save_safetensors(tmp_path / "a", tensors, metadata)
    assert {(tmp_path / "a").read_bytes()} == contents and files.load_safetensors_metadata(tmp_path / "a") == metadata
    assert all(torch.equal(files.load_safetensors(tmp_path / "a")[name], tensors[name]) for name in tensors)
