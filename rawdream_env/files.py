"""Files that are either whole or absent: atomic writes, and safetensors without surprises.

A write goes to a temporary file in the same folder, is synced, renamed over its target, and the folder is synced: after
a crash or a full disk at any moment the target holds the old content or the new one, never a part.

Saved models carry a ``manifest.json`` with the SHA-256 of their weights, which every load compares
(``RAWDREAM_SKIP_CHECKSUMS=1`` skips this). Configurations are not in it, so that they can be edited; their readers are strict.
Files of data (clips, start packs, latents) carry their checksum inside (``save_sealed``).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from rawdream_env.errors import CheckpointError, InvalidOptionError, RawDreamError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

PathLike = str | os.PathLike[str]
M = TypeVar("M", bound="Module")
MANIFEST = "manifest.json"
SKIP_CHECKSUMS = "RAWDREAM_SKIP_CHECKSUMS"
MAX_JSON_BYTES = 64 * 2**20
"""Largest JSON file that is read."""


def require_regular(path: PathLike) -> None:
    """``OSError`` unless ``path`` is a regular file: opening a named pipe would wait for a writer."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{path} is no regular file")


def fsync_folder(path: PathLike) -> None:
    """Make renames and removals inside a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_file(path: PathLike) -> IO[str]:
    """Lock a file, created if missing, until the returned object is closed or the process ends; ``BlockingIOError`` when
    it is locked already, by another process or by this one.
    """
    if os.path.exists(path):
        require_regular(path)
    lock = open(path, "a", encoding="utf-8")  # noqa: SIM115 - held by the caller
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        lock.close()
        raise
    return lock


def remove_litter(folder: PathLike) -> None:
    """Remove the temporary files that killed writers left in a folder of this package and below. The caller must hold its
    lock.
    """
    for path in Path(folder).rglob(".*.tmp"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def check_output(path: PathLike) -> None:
    """Raise ``InvalidOptionError`` when the folder of a result could not be written. Leaves no trace of the attempt."""
    folder = Path(path).absolute()
    existing = next(entry for entry in (folder, *folder.parents) if entry.exists())
    probe = existing / f".{os.getpid()}.{secrets.token_hex(4)}.tmp"
    try:
        try:
            write_bytes_synced(probe, b"0")
        finally:
            with contextlib.suppress(OSError):
                probe.unlink()
    except OSError as error:
        raise InvalidOptionError(
            f"cannot write to the output folder {path}: {existing}: {error.strerror}. Give another folder."
        ) from error


def write_bytes_synced(path: PathLike, data: bytes) -> None:
    """Write a new file and sync it. Not atomic: for files in a folder that is renamed into place afterwards."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write_bytes(path: PathLike, data: bytes) -> None:
    """Replace the content of ``path`` atomically: after an ``OSError`` (disk full, ...) the target is unchanged."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        write_bytes_synced(temporary, data)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    fsync_folder(target.parent)


def atomic_write_text(path: PathLike, text: str) -> None:
    """``atomic_write_bytes`` in UTF-8."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: PathLike, value: Any) -> None:
    """Write indented JSON with a final newline; NaN and infinity are refused (``ValueError``)."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_text(path: PathLike) -> str:
    """The UTF-8 text of a small file; ``OSError`` for a named pipe or a file of more than ``MAX_JSON_BYTES``."""
    require_regular(path)
    if (size := os.stat(path).st_size) > MAX_JSON_BYTES:
        raise OSError(f"{path} has {size} bytes, expected at most {MAX_JSON_BYTES}")
    return Path(path).read_text(encoding="utf-8")


def read_json(
    path: PathLike, advice: str = "check the path, or copy the file again", error: type[RawDreamError] = CheckpointError
) -> dict[str, Any]:
    """The JSON object in a file. Raises ``error``, ending with ``advice``, when it is missing or holds anything else."""
    try:
        value = json.loads(read_text(path))
    except FileNotFoundError as reason:
        raise error(f"{path} is missing; {advice}.") from reason
    except (OSError, ValueError, RecursionError) as reason:  # RecursionError: deep nesting
        raise error(f"{path} cannot be read as JSON ({reason}); {advice}.") from reason
    if not isinstance(value, dict):
        raise error(f"{path} holds a JSON {type(value).__name__}, expected an object; {advice}.")
    return value


def sha256_file(path: PathLike) -> str:
    """Hex SHA-256 of a regular file."""
    require_regular(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def sealed_folder(folder: PathLike) -> Iterator[None]:
    """Create ``folder``; after the body has saved a model there, write the manifest of its safetensors files.

    The old manifest is removed first: a process killed in between leaves a folder without checksums, not a wrong one.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    (target / MANIFEST).unlink(missing_ok=True)
    yield
    weights = sorted(target.glob("*.safetensors"))
    atomic_write_json(target / MANIFEST, {"sha256": {path.name: sha256_file(path) for path in weights}})


def check_sha256(path: PathLike) -> None:
    """Raise ``CheckpointError`` when a file is not the one listed in the manifest of its folder or of the two above.

    Files that no manifest lists, such as those of earlier versions, are accepted.
    """
    if _unchecked():
        return
    file = Path(path).absolute()
    for folder in list(file.parents)[:3]:
        manifest = folder / MANIFEST
        if not manifest.is_file():
            continue
        try:
            listed = read_json(manifest).get("sha256")
        except CheckpointError:
            if folder == file.parent:
                raise
            continue  # not ours
        digest = listed.get(file.relative_to(folder).as_posix()) if isinstance(listed, dict) else None
        if digest is None:
            continue
        try:
            found = sha256_file(file)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error}). Restore it from a copy.") from error
        if digest != found:
            raise CheckpointError(
                f"{path} is altered or damaged: its SHA-256 is not the one in {manifest}. Restore it from a copy, or set "
                f"{SKIP_CHECKSUMS}=1 to load it as it is."
            )
        return


def _unchecked() -> bool:
    return os.environ.get(SKIP_CHECKSUMS, "0") not in ("", "0")


def json_sha256(value: Any) -> str:
    """Hex SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 of names, types, shapes and values."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def serialize_safetensors(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, *, where: PathLike = "the checkpoint"
) -> bytes:
    """The bytes of a safetensors file. ``CheckpointError`` names a non-finite tensor, which loading would refuse."""
    from safetensors.torch import save

    _refuse_non_finite(tensors.items(), f"Will not write {where}")
    storages: set[int] = set()
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != value.nbytes:  # safetensors refuses shared memory
            value = value.clone()
        storages.add(value.untyped_storage().data_ptr())
        plain[name] = value
    return _with_sorted_metadata(save(plain, metadata=dict(metadata) if metadata else None))


def _with_sorted_metadata(content: bytes) -> bytes:
    """A safetensors file with its metadata in order: the library writes them in random order, so equal models would differ."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    if len(header.get("__metadata__", {})) < 2:
        return content
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors stay aligned
    return b"".join([len(text).to_bytes(8, "little"), text, memoryview(content)[end:]])


def save_safetensors(path: PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors atomically. Any device; shared or non-contiguous tensors are copied. Values must be finite."""
    atomic_write_bytes(path, serialize_safetensors(tensors, metadata, where=path))


def save_sealed(path: PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """``save_safetensors`` of a file that ``load_sealed`` checks: its metadata has the SHA-256 of the tensors and the rest."""
    plain = dict(metadata or {})
    save_safetensors(path, tensors, {**plain, "sha256": json_sha256([tensors_sha256(tensors), plain])})


def load_sealed(path: PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file, checked against the SHA-256 that it carries; one without it is accepted.

    Raises ``CheckpointError`` as ``load_safetensors``, and when the file is altered.
    """
    tensors, metadata = load_safetensors(path), load_safetensors_metadata(path)
    seal = metadata.pop("sha256", None)
    if seal is not None and not _unchecked():
        digest = tensors_sha256(tensors)
        if seal not in (json_sha256([digest, metadata]), digest):  # earlier start packs: of the tensors alone
            raise CheckpointError(
                f"{path} is altered or damaged: it does not match the SHA-256 inside it. Restore it from a copy, make it "
                f"again, or set {SKIP_CHECKSUMS}=1 to load it as it is."
            )
    return tensors, metadata


def load_safetensors(path: PathLike) -> dict[str, Tensor]:
    """Read every tensor onto the CPU. ``CheckpointError`` names the file when it is missing, damaged or not finite."""
    tensors = _read_safetensors(path)
    _refuse_non_finite(tensors.items(), f"Will not load {path}")
    return tensors


def load_tensors(path: PathLike) -> dict[str, Tensor]:
    """Read a file of another project onto the CPU: PyTorch's format (.pth, .pt, .ckpt, .bin) or safetensors (any other
    suffix). Only tensors are unpickled. Values are not checked; ``check_weights`` does that.

    Raises ``CheckpointError`` when the file is missing, damaged, or holds anything but named tensors.
    """
    import torch

    if Path(path).suffix not in {".pth", ".pt", ".ckpt", ".bin"}:
        return _read_safetensors(path)
    _require(path)
    check_sha256(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise almost any exception
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{path} is damaged, or holds objects other than tensors, which are not loaded for safety ({printable(reason)}). "
            "Restore it from a copy."
        ) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
    ):
        raise CheckpointError(
            f"{path} holds no dictionary of named tensors. Use the file of weights, not a training state."
        )
    return tensors


def load_module(build: Callable[[], M], path: PathLike, config: str = "config.json") -> M:
    """``build()`` with all tensors of ``path``, or neither: names and shapes are compared on the meta device first, so that
    sizes that the file does not have allocate nothing.

    Raises ``CheckpointError`` as ``check_weights``, and when ``build`` refuses its sizes.
    """
    import torch

    tensors = _read_safetensors(path)
    try:
        with torch.device("meta"):
            wanted = build().state_dict()
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:  # of sizes that no layer can have
        raise CheckpointError(f"{config} of {path} has impossible sizes ({error}); restore it from a copy.") from error
    check_weights(tensors, wanted, path, config)
    module = build()
    module.load_state_dict({name: tensor.to(wanted[name].dtype) for name, tensor in tensors.items()})
    return module


def check_weights(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: PathLike, config: str = "config.json"
) -> None:
    """Raise one ``CheckpointError`` naming the tensors (at most 8) that are missing, unknown, not finite, of another shape
    than ``config`` asks for, or of a type that is no floating-point number where one is wanted.
    """
    problems = [f"{name} is missing" for name in wanted.keys() - tensors.keys()]
    problems += [f"{printable(name)} is unknown" for name in tensors.keys() - wanted.keys()]
    for name in wanted.keys() & tensors.keys():
        ours, theirs = wanted[name], tensors[name]
        if ours.shape != theirs.shape:
            problems.append(f"{name} has shape {tuple(theirs.shape)}, expected {tuple(ours.shape)}")
        elif ours.is_floating_point() != theirs.is_floating_point():
            problems.append(f"{name} has type {theirs.dtype}, expected {ours.dtype}")
        if bad := _non_finite(theirs):
            problems.append(f"{name} holds {bad} non-finite of {theirs.numel()} values")
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        shown = "; ".join(problem[:200] for problem in sorted(problems)[:8]) + more
        raise CheckpointError(
            f"{where} does not fit its {config}, {len(problems)} problems: {shown}. Use the file that was saved with it."
        )


def printable(name: str) -> str:
    """A name from a file, safe to print: characters that would control a terminal are escaped, long names are cut."""
    shown = name if name.isprintable() else repr(name)[1:-1]
    return shown if len(shown) <= 100 else f"{shown[:97]}..."


def load_safetensors_metadata(path: PathLike) -> dict[str, str]:
    """The string metadata of a safetensors file (empty when it has none); errors as ``load_safetensors``."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is missing, damaged or not a safetensors file ({error}).") from error


def _require(path: PathLike) -> None:
    if not Path(path).is_file():
        raise CheckpointError(f"There is no file {path}. Check the path, or save or download the checkpoint first.")


def _read_safetensors(path: PathLike) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _require(path)
    check_sha256(path)
    try:
        tensors: dict[str, Tensor] = load_file(os.fspath(path))
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is damaged or not a safetensors file ({error}). Restore it from a copy."
        ) from error
    return tensors


def _non_finite(tensor: Tensor) -> int:
    """Number of values that are NaN or infinite."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.numel() == 0:
        return 0
    values = tensor.detach()
    if values.element_size() == 1:  # float8 has no isfinite kernel
        values = values.float()
    return int((~values.isfinite()).sum())


def _refuse_non_finite(tensors: Iterable[tuple[str, Tensor]], what: str) -> None:
    for name, tensor in tensors:
        if bad := _non_finite(tensor):
            raise CheckpointError(
                f"{what}: tensor '{printable(name)}' holds {bad} non-finite of {tensor.numel()} values. "
                "The training diverged or the file was altered; use an earlier checkpoint."
            )
