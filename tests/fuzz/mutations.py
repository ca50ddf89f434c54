"""Mutations of a folder: of bytes, of the file system, and of JSON, safetensors, Parquet, HDF5, videos and pictures.

``mutate(root, rng, decoy)`` changes ``root`` and returns what was done. Checksums are renewed in two of three cases, so
that the readers behind them are reached. ``decoy`` is a valid folder outside of ``root`` that must not be read.
"""

from __future__ import annotations

# ruff: noqa: E501 - tables of values
import hashlib
import json
import os
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rawdream_env import media
from rawdream_env.files import json_sha256

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, -7, 1.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"), -float("inf"), 2**31, 2**63, 10**12,
    -(10**12), 10**400, 65_536, 1_000_000, "", " ", "x", "0", "3", "nan", "x" * 100_000, "\x00", "\ud800", "\x1b[31m", "é", "../x",
    "/etc/passwd", "file:///etc/passwd", "{}", "{0}", "%s", [], {}, [[]], [None], [1, 2, 3], ["a"], [0.5] * 3000, {"a": 1}, {"": None},
    [[[[1]]]], "float64", "int8", "video", "image",
)  # fmt: skip
TEMPLATES = (
    "../other/{chunk_index}/{file_index}.parquet", "DECOY/data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
    "data/{chunk_index:0999999999d}.parquet", "data/{chunk_index.__class__}", "{video_key}/../../{file_index}", "{", "{}", "{0}",
    "{chunk_index!r}", "videos/{video_key:1000000000}/x", "/etc/passwd", "data", "/", ".", "", "{chunk_index:{file_index}}",
    "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet", "a\x00b", "~/{file_index}", "http://x/{file_index}",
    "../SEED/data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet", "**/{file_index}", "[", "data/" * 90 + "{file_index}",
)  # fmt: skip


def mutate(root: Path, rng: random.Random, decoy: Path) -> str:
    done = []
    for _ in range(rng.choices((1, 2, 3), (8, 2, 1))[0]):
        files = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
        files = [path for path in files if path.stat().st_size < 1 << 25]
        if not files:
            break
        path = rng.choice(files)
        changes = [_bytes, _bytes, _file_system]
        structured = {
            ".json": _json, ".jsonl": _jsonl, ".safetensors": _safetensors, ".parquet": _parquet, ".hdf5": _hdf5, ".mp4": _video,
            ".png": _picture, ".jpg": _picture,
        }.get(path.suffix)  # fmt: skip
        change = rng.choice([*changes, *([structured] * 7 if structured else [])])
        done.append(f"{path.relative_to(root)}: {change(path, rng, decoy)}")
    if rng.random() < 0.67:
        _reseal(root)
        done.append("resealed")
    return "; ".join(done)


# -- bytes and the file system -----------------------------------------------------------------------------------------


def _bytes(path: Path, rng: random.Random, decoy: Path) -> str:
    content = bytearray(path.read_bytes())
    kind = rng.choice(("flip", "flip", "flip", "cut", "run", "append", "shuffle", "empty", "huge"))
    where = rng.randrange(len(content)) if content else 0
    if kind == "flip":
        ends = rng.random() < 0.5  # headers and footers decide most
        for _ in range(rng.choice((1, 1, 2, 8, 64))):
            if content:
                at = rng.choice((rng.randrange(min(256, len(content))), -1 - rng.randrange(min(256, len(content)))))
                content[at if ends else rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        content = content[:where]
    elif kind == "run":
        size = rng.choice((4, 8, 64))
        content[where : where + size] = bytes([rng.choice((0, 0xFF, 0x7F, 0x80))]) * size
    elif kind == "append":
        content += rng.randbytes(rng.choice((1, 100, 10_000)))
    elif kind == "shuffle":
        other = rng.randrange(len(content)) if content else 0
        content[where : where + 32], content[other : other + 32] = (
            content[other : other + 32],
            content[where : where + 32],
        )
    elif kind == "empty":
        content = bytearray()
    path.write_bytes(content)
    if kind == "huge":
        os.truncate(path, 2 << 30)
    return kind


def _file_system(path: Path, rng: random.Random, decoy: Path) -> str:
    kind = rng.choice(
        ("missing", "folder", "fifo", "link", "dangling", "loop", "swap", "device", "folder link", "no folder")
    )
    content = path.read_bytes()
    if kind == "no folder":
        shutil.rmtree(path.parent) if path.parent.name not in ("case",) else path.unlink()
        return kind
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        target = decoy / "linked"
        target.write_bytes(content)
        path.symlink_to(target)
    elif kind == "dangling":
        path.symlink_to(path.parent / "nothing")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "device":
        path.symlink_to(rng.choice(("/dev/zero", "/dev/stdin", "/dev/null", "/proc/self/mem")))
    elif kind == "folder link":
        path.symlink_to(path.parent if path.suffix == ".hdf5" else "/")
    elif kind == "swap":
        others = [other for other in sorted(path.parent.rglob("*")) if other.is_file()]
        shutil.copy(rng.choice(others), path) if others else path.mkdir()
    return kind


def _reseal(root: Path) -> None:
    """Renew every manifest to what the files are now."""
    for manifest in root.rglob("manifest.json"):
        if not manifest.is_file() or manifest.is_symlink():
            continue
        try:
            content = json.loads(manifest.read_text())
        except (ValueError, RecursionError, MemoryError):
            continue
        if not isinstance(content, dict):
            continue
        files = content.get("files" if "files" in content else "sha256")
        for name in files if isinstance(files, dict) else ():
            path = manifest.parent / name
            # os.path.isfile is False for a name of thousands of characters; Path.is_file raises.
            if os.path.isfile(path) and not path.is_symlink() and path.stat().st_size < 1 << 25:
                files[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        if "checksum" in content:
            content.pop("checksum")
            content["checksum"] = json_sha256(content)
        manifest.write_text(json.dumps(content))


# -- JSON --------------------------------------------------------------------------------------------------------------


def value(rng: random.Random, decoy: Path) -> Any:
    if rng.random() < 0.15:
        return rng.choice(TEMPLATES).replace("DECOY", str(decoy)).replace("SEED", decoy.name)
    return rng.choice(VALUES)


def change_tree(tree: Any, rng: random.Random, decoy: Path) -> tuple[Any, str]:
    """A copy of ``tree`` with a value replaced, removed, renamed, added or nested deeply at a random place."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(tree)
    if not places or rng.random() < 0.04:
        return (new := value(rng, decoy)), f"all = {new!r:.60}"
    node, key = rng.choice(places)
    kind = rng.choice(("set", "set", "set", "set", "remove", "rename", "add", "scale", "copy"))
    if kind == "remove":
        del node[key]
        return tree, f"remove {key}"
    if kind == "rename" and isinstance(node, dict):
        node[f"{key}x"] = node.pop(key)
    elif kind == "add" and isinstance(node, dict):
        node[rng.choice(("x", "../x", "kind", "x" * 5000, "__class__", "sha256", "robot"))] = value(rng, decoy)
    elif kind == "scale" and isinstance(node[key], int | float):
        node[key] = node[key] * rng.choice((2, -1, 3, 16, 1000, 10**9)) + rng.choice((0, 1))
    elif kind == "copy":
        node[key] = rng.choice([n[k] for n, k in places])
    else:
        node[key] = value(rng, decoy)
    return tree, f"{kind} {key} = {node.get(key) if isinstance(node, dict) else node[key]!r:.60}"


def _json(path: Path, rng: random.Random, decoy: Path) -> str:
    text = path.read_text(errors="replace")
    kind = rng.random()
    if kind < 0.06:
        deep = rng.choice((500, 100_000))
        path.write_text(rng.choice(("[" * deep + "]" * deep, '{"a":' * deep + "1" + "}" * deep)))
        return "deep"
    if kind < 0.1:
        path.write_bytes(
            rng.choice((b"\xff\xfe{}", b"\xef\xbb\xbf" + text.encode(), b"{} {}", b"{'a': 1}", text.encode("utf-16")))
        )
        return "encoding"
    if kind < 0.13:
        path.write_text(text.rstrip().rstrip("}") + ', "x": ' + "9" * 5000 + "}")
        return "digits"
    try:
        tree, said = change_tree(json.loads(text), rng, decoy)
    except (ValueError, RecursionError):
        return "not JSON"
    try:
        path.write_text(json.dumps(tree))
    except (UnicodeEncodeError, ValueError):
        return "not written"
    return said


def _jsonl(path: Path, rng: random.Random, decoy: Path) -> str:
    lines = path.read_bytes().split(b"\n")
    lines[rng.randrange(len(lines))] = rng.choice(
        (b"null", b"[]", b"{", b"\xff", b"9" * 5000, b"[" * 100_000, b'"x"', b"\x00" * 10)
    )
    path.write_bytes(b"\n".join(lines))
    return "line"


# -- safetensors -------------------------------------------------------------------------------------------------------


def _safetensors(path: Path, rng: random.Random, decoy: Path) -> str:
    content = path.read_bytes()
    if len(content) < 8:
        return "no header"
    size = struct.unpack("<Q", content[:8])[0]
    try:
        header, body = json.loads(content[8 : 8 + size]), bytearray(content[8 + size :])
    except (ValueError, RecursionError, OverflowError):
        return "no header"
    entries = header.items() if isinstance(header, dict) else ()
    names = [name for name, entry in entries if name != "__metadata__" and isinstance(entry, dict) and len(entry) == 3]
    if not names:
        return "no tensors"
    name = rng.choice(names)
    kind = rng.choice(
        ("nan", "nan", "shape", "huge", "dtype", "rename", "remove", "length", "tree", "tree", "metadata", "refit")
    )
    said = kind
    if kind == "nan":
        begin, end = header[name]["data_offsets"]
        if end - begin >= 8:
            body[begin : begin + 8] = rng.choice(
                (b"\x00\x00\xc0\x7f" * 2, b"\x00\x7e" * 4, b"\xff" * 8, b"\x00\x00\x80\x7f" * 2)
            )
    elif kind == "shape":
        header[name]["shape"] = rng.choice(
            ([], [0], [1], [-1], header[name]["shape"][::-1], [1, *header[name]["shape"]])
        )
    elif kind == "huge":
        header[name]["shape"] = [10**9, 10**9]
        if rng.random() < 0.5:
            header[name]["data_offsets"] = [0, 4 * 10**18]
    elif kind == "dtype":
        header[name]["dtype"] = rng.choice(("F64", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "X", "F32"))
    elif kind == "rename":
        header[rng.choice((name + "x", "x\x1b[31m" * 100, "", "../x"))] = header.pop(name)
    elif kind == "remove":
        del header[name]
    elif kind == "length":
        size = rng.choice((0, 1, 2**63, 2**40, size + 1, size - 1))
        path.write_bytes(struct.pack("<Q", size) + content[8:])
        return said
    elif kind == "tree":
        header, said = change_tree(header, rng, decoy)
    elif kind == "metadata":
        header["__metadata__"], said = change_tree(header.get("__metadata__", {"format": "pt"}), rng, decoy)
        if rng.random() < 0.5 and isinstance(header["__metadata__"], dict):
            keys = sorted(header["__metadata__"])
            texts = (
                [v for v in VALUES if isinstance(v, str)]
                + [json.dumps(v) for v in VALUES[:18]]
                + ["[" * 100_000, '[{"name": 1}]']
            )
            header["__metadata__"] = {k: str(header["__metadata__"][k]) for k in keys}
            if keys:
                header["__metadata__"][rng.choice(keys)] = rng.choice(texts)
    else:  # a valid file in which one tensor has another type and size
        order = sorted(names, key=lambda n: header[n]["data_offsets"])
        parts, at = bytearray(), 0
        for n in order:
            begin, end = header[n]["data_offsets"]
            data = bytes(body[begin:end])
            if n == name:
                shape = rng.choice(([1], [0], [2, 3], [1, 1, 1, 1, 1], [3000], [0, 10**9]))
                count = int(np.prod(shape))
                code, width = rng.choice(
                    (("F32", 4), ("F64", 8), ("I64", 8), ("U8", 1), ("BOOL", 1), ("F16", 2), ("F8_E4M3", 1))
                )
                header[n] |= {"dtype": code, "shape": shape}
                data = bytes(count * width)
            header[n]["data_offsets"] = [at, at + len(data)]
            at += len(data)
            parts += data
        body = parts
    try:
        text = json.dumps(header).encode()
    except (UnicodeEncodeError, ValueError):
        return "not written"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(body))
    return f"{name}: {said}"


# -- Parquet -----------------------------------------------------------------------------------------------------------


def _parquet(path: Path, rng: random.Random, decoy: Path) -> str:
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException, ValueError, TypeError):
        return "not Parquet"
    if not table.num_columns:
        return "no columns"
    at = rng.randrange(table.num_columns)
    name, rows = table.column_names[at], len(table)
    keys = ["episode_index", "task_index", "length", "tasks", "timestamp", "action", "observation.image"]
    if rng.random() < 0.6 and (
        found := [k for k in table.column_names if k in keys or k.endswith(("_index", "timestamp"))]
    ):
        name = rng.choice(found)
        at = table.column_names.index(name)
    kind = rng.choice(
        (
            "value",
            "value",
            "value",
            "null",
            "type",
            "remove",
            "twice",
            "rows",
            "empty",
            "order",
            "nest",
            "many",
            "picture",
        )
    )
    column = table.column(at).to_pylist()
    row = rng.randrange(rows) if rows else 0
    if kind == "value" and rows:
        new = value(rng, decoy)
        if rng.random() < 0.5:
            new = rng.choice(
                (-1, 0, 1, 2, 10**6, 10**12, 2**62, 2**63, -(2**63), 0.5, float("nan"), float("inf"), -1e300, 1e-300)
            )
        column = [new] * rows if rng.random() < 0.4 else [new if i == row else v for i, v in enumerate(column)]
    elif kind == "null" and rows:
        column = [None if rng.random() < 0.5 or i == row else v for i, v in enumerate(column)]
    elif kind == "type":
        column = rng.choice(
            ([str(v) for v in column], [[v] for v in column], [{"a": v} for v in column], [float(i) for i in range(rows)],
             [b"\xff"] * rows, [True] * rows, [[]] * rows, [[1.0, None]] * rows, [None] * rows)
        )  # fmt: skip
    elif kind == "picture" and rows:
        big = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x01\x00\x00\x00\x01\x00\x00\x08\x02\x00\x00\x00" + bytes(16)
        cell = rng.choice(
            ({"bytes": big, "path": None}, {"bytes": None, "path": str(decoy / "picture.png")}, {"bytes": None, "path": "../x.png"},
             {"bytes": b"", "path": "picture.png"}, {"bytes": None, "path": "."}, {"bytes": None, "path": "meta/info.json"},
             {"bytes": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n", "path": None},
             {"bytes": media.encode_picture(np.zeros((8, 4, 3), np.uint8)), "path": None})
        )  # fmt: skip
        name = "observation.image" if "observation.image" in table.column_names else name
        at = table.column_names.index(name)
        column = [cell if i == row else v for i, v in enumerate(table.column(at).to_pylist())]
    new_table = table
    try:
        if kind == "remove":
            new_table = table.drop_columns([name])
        elif kind == "twice":
            new_table = table.append_column(name, table.column(at))
        elif kind == "rows":
            new_table = pa.concat_tables([table, table.slice(row, rng.randrange(1, 4))])
        elif kind == "empty":
            new_table = table.slice(0, 0)
        elif kind == "order":
            new_table = table.take(rng.sample(range(rows), rows))
        elif kind == "many":
            new_table = pa.concat_tables([table] * 200)
        elif kind == "nest":
            new_table = table.set_column(at, name, pa.array([[[[v]]] for v in column]))
        else:
            new_table = table.set_column(at, name, pa.array(column))
    except (pa.ArrowException, TypeError, ValueError, OverflowError, KeyError, UnicodeEncodeError):
        return "not written"
    pq.write_table(new_table, path)
    return f"{name}: {kind}"


# -- HDF5 --------------------------------------------------------------------------------------------------------------


def _hdf5(path: Path, rng: random.Random, decoy: Path) -> str:
    try:
        with h5py.File(path, "r+") as file:
            places: list[str] = ["/"]
            file.visit(places.append)
            name = rng.choice(places[1:] or places)
            if rng.random() < 0.35:
                named = [p for p in places if len(file[p].attrs)]
                owner = file[rng.choice(named)].attrs
                key = rng.choice(sorted(owner))
                new: Any = rng.choice([v for v in VALUES if isinstance(v, str | int | float)])
                if rng.random() < 0.5 and isinstance(owner[key], str) and owner[key].startswith("{"):
                    new = json.dumps(change_tree(json.loads(owner[key]), rng, decoy)[0])
                elif rng.random() < 0.2:
                    new = rng.choice(
                        (np.zeros(3), np.array([b"x", b"y"]), "[" * 50_000, h5py.Empty("f"), np.bytes_(b"\xff"))
                    )
                owner[key] = new
                return f"{name}@{key} = {new!r:.60}"
            kind = rng.choice(
                (
                    "remove",
                    "shape",
                    "shape",
                    "type",
                    "huge",
                    "huge",
                    "external",
                    "storage",
                    "soft",
                    "group",
                    "rename",
                    "nan",
                    "virtual",
                )
            )
            old = file[name]
            data = old[()] if isinstance(old, h5py.Dataset) and old.size < 1_000_000 else np.zeros((6, 7))
            if kind == "rename":
                file.move(name, f"{name}x")
                return f"{name}: rename"
            del file[name]
            if kind == "shape":
                file[name] = rng.choice(
                    (
                        data[:-1],
                        data[:1],
                        data[None],
                        data.reshape(-1),
                        np.zeros(()),
                        data[:0],
                        np.stack([data, data], -1),
                    )
                )
            elif kind == "type":
                file[name] = rng.choice((np.array(["a"] * 6, dtype=object), data.astype(np.complex64), data > 0, data.astype(">i8"), "text",
                                         np.zeros(6, dtype=[("a", "f4"), ("b", "i4")])))  # fmt: skip
            elif kind == "huge":
                shape = rng.choice(((2 * 10**9,), (6, 40_000, 40_000, 3), (6, 10**9), (10**6, 512, 512, 3), (10**9, 7)))
                kinds = ("u1",) if len(shape) == 4 else ("f4", "f8")
                file.create_dataset(name, shape, dtype=rng.choice(kinds), chunks=True, fillvalue=0)
            elif kind == "external":
                file[name] = h5py.ExternalLink(str(decoy / "demos.hdf5"), rng.choice((name, "/")))
            elif kind == "storage":
                file.create_dataset(
                    name, data.shape, dtype=data.dtype, external=[(str(decoy / "secret"), 0, max(data.nbytes, 1))]
                )
            elif kind == "soft":
                file[name] = h5py.SoftLink(rng.choice((f"/{name}", "/data", "/nothing", "/")))
            elif kind == "group":
                file.create_group(name)
            elif kind == "nan":
                new_data = np.array(data, np.float64)
                new_data.reshape(-1)[rng.randrange(max(new_data.size, 1)) :] = rng.choice((np.nan, np.inf, 5.0))
                file[name] = new_data
            elif kind == "virtual":
                layout = h5py.VirtualLayout(data.shape, data.dtype)
                layout[...] = h5py.VirtualSource(str(decoy / "demos.hdf5"), name, data.shape)
                file.create_virtual_dataset(name, layout)
            return f"{name}: {kind}"
    except (OSError, KeyError, ValueError, RuntimeError, TypeError, OverflowError, IndexError) as error:
        return f"not written ({error!r:.80})"


# -- videos and pictures -----------------------------------------------------------------------------------------------


def _video(path: Path, rng: random.Random, decoy: Path) -> str:
    kind = rng.choice(
        (
            "rate",
            "few",
            "one",
            "size",
            "large",
            "gif",
            "png",
            "text",
            "playlist",
            "concat",
            "tiny rate",
            "many",
            "sdp",
            "subtitle",
        )
    )
    frames = np.random.default_rng(0).integers(0, 256, (35, 16, 16, 3), dtype=np.uint8)
    if kind in ("rate", "tiny rate"):
        content = media.encode_video([frames], rng.choice((1, 5, 15, 30, 1000)) if kind == "rate" else 0.01)
    elif kind == "few":
        content = media.encode_video([frames[: rng.randrange(2, 30)]], 10)
    elif kind == "one":
        content = media.encode_video([frames[:1]], 10)
    elif kind == "size":
        content = media.encode_video([np.zeros((35, 32, 48, 3), np.uint8)], 10)
    elif kind == "large":
        content = media.encode_video([np.zeros((3, 4096, 4096, 3), np.uint8)], 10)
    elif kind == "many":
        content = media.encode_video([np.zeros((3000, 16, 16, 3), np.uint8)], 10)
    elif kind == "gif":
        content = media.encode_gif(frames, 10)
    elif kind == "png":
        content = media.encode_picture(frames[0])
    elif kind == "playlist":
        other = rng.choice(
            (
                f"file://{decoy}/episode.mp4",
                str(decoy / "episode.mp4"),
                "http://127.0.0.1:9/x.ts",
                "../decoy/episode.mp4",
            )
        )
        content = f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{other}\n#EXT-X-ENDLIST\n".encode()
    elif kind == "concat":
        content = f"ffconcat version 1.0\nfile {rng.choice((str(decoy / 'episode.mp4'), '../decoy/episode.mp4', 'episode.mp4', 'info.json'))}\n".encode()
    elif kind == "sdp":
        content = b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
    elif kind == "subtitle":
        content = b"1\n00:00:00,000 --> 00:00:10,000\nhello\n"
    else:
        content = b"not a video " * 100
    path.write_bytes(content)
    return kind


def _picture(path: Path, rng: random.Random, decoy: Path) -> str:
    big = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\xff\xff\x00\x00\xff\xff\x08\x02\x00\x00\x00" + bytes(16)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n"
    gif = media.encode_gif(np.zeros((3, 8, 8, 3), np.uint8), 10)
    ppm = b"P6 60000 60000 255\n"
    content, said = rng.choice(
        ((big, "large"), (eps, "eps"), (gif, "gif"), (ppm, "ppm"), (b"BM" + bytes(60), "bmp"), (b"<svg/>", "svg"))
    )
    path.write_bytes(content)
    return said
