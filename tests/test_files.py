"""Files are whole or absent, and safetensors files are what they say."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from rawdream_env import files
from rawdream_env.errors import CheckpointError


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
