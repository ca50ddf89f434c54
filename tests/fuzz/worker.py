"""One process that mutates, opens and judges cases: ``worker.py SEEDS BASE`` reads case numbers, writes a JSON line each.

A case passes when it works or raises one short ``RawDreamError``. The process has a memory limit, an audit hook that
notes what is opened outside of the case's folder, and decoys whose access times show reads by C libraries.
"""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

BASE = Path(sys.argv[2]).resolve() / str(os.getpid())
REPOSITORY = Path(__file__).resolve().parents[2]
ALLOWED = (
    "/proc",
    "/dev",
    "/sys",
    "/usr",
    "/lib",
    "/etc/localtime",
    "/etc/mime.types",
    sys.prefix,
    sys.base_prefix,
    *sys.path[1:],
)
GIB = 1 << 30
MAX_CHARS, MAX_LINES = 600, 3

_armed: Path | None = None
_outside: list[str] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _armed is None or event not in (
        "open",
        "os.listdir",
        "os.scandir",
        "socket.connect",
        "subprocess.Popen",
        "os.remove",
        "os.rename",
    ):
        return
    if event in ("socket.connect", "subprocess.Popen"):
        _outside.append(f"{event} {arguments[:2]!r:.200}")
        return
    name = arguments[0]
    if not isinstance(name, str | bytes | os.PathLike):
        return
    path = os.path.abspath(os.fsdecode(name))
    inside = (str(_armed), str(BASE / "tmp"), str(REPOSITORY), *map(os.path.realpath, ALLOWED), *ALLOWED)
    if not any(path == folder or path.startswith(folder.rstrip("/") + "/") for folder in inside if folder):
        _outside.append(f"{event} {path}")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def run(number: int, seeds: Path) -> dict[str, Any]:
    from mutations import mutate
    from seeds import KINDS

    from rawdream_env.errors import RawDreamError

    global _armed
    rng = random.Random(number)
    kind = rng.choices(list(KINDS), [weight for _, _, weight in KINDS.values()])[0]
    seed, opener, _ = KINDS[kind]
    place = BASE / str(number)
    case, decoy = place / "case", place / "decoy"
    shutil.copytree(seeds / seed, case)
    shutil.copytree(seeds / seed, decoy)
    (decoy / "secret").write_bytes(bytes(1 << 16))
    begun = time.monotonic()
    result: dict[str, Any] = {"number": number, "kind": kind, "faults": []}
    faults: list[str] = result["faults"]
    try:
        result["mutation"] = mutate(case, rng, decoy)
        decoys = [path for path in decoy.rglob("*") if path.is_file() and path.name != "linked"]
        for path in decoys:
            os.utime(path, (1, 2))
        gc.collect()  # short: what was there before the first case is frozen
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        _outside.clear()
        _armed = case
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                opener(case)
            result["outcome"] = "works"
        except RawDreamError as error:
            said = str(error).replace(str(case), ".")
            result["outcome"], result["said"] = type(error).__name__, said
            if len(said) > MAX_CHARS or said.count("\n") >= MAX_LINES:
                faults.append(f"message of {len(said)} characters, {said.count(chr(10)) + 1} lines: {said[:200]!r}...")
            if any((ord(c) < 32 and c != "\n") or ord(c) == 127 for c in said):
                faults.append(f"control characters in {said!r:.300}")
        except BaseException as error:  # noqa: BLE001 - it is the finding
            result["outcome"] = "fault"
            frames = traceback.extract_tb(error.__traceback__)
            ours = [
                f"{Path(f.filename).name}:{f.lineno}"
                for f in frames
                if "/rawdream_env/" in f.filename or "/trainers/" in f.filename
            ]
            faults.append(f"{type(error).__name__}: {str(error)[:300]} at {' '.join(ours[-3:])}")
            result["traceback"] = traceback.format_exc()[-3000:]
        finally:
            _armed = None
        if (growth := _status("VmHWM") - before) > GIB:
            faults.append(f"memory grew by {growth / GIB:.2f} GiB")
        faults += [f"outside: {what}" for what in sorted(set(_outside))]
        faults += [
            f"outside: read {path.name} of the decoy" for path in decoys if path.exists() and path.stat().st_atime != 1
        ]
    finally:
        _armed = None
        result["seconds"] = round(time.monotonic() - begun, 2)
        shutil.rmtree(place, ignore_errors=True)
    return result


def main() -> None:
    (BASE / "tmp").mkdir(parents=True)
    tempfile.tempdir = str(BASE / "tmp")
    sys.path.insert(0, str(Path(__file__).parent))
    import logging

    import torch

    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    answers = os.fdopen(os.dup(1), "w")
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    sys.stdin.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    import seeds

    for name in {seed for seed, _, _ in seeds.KINDS.values()}:  # what is imported late, and first allocations
        warm = BASE / "warm" / name
        shutil.copytree(Path(sys.argv[1]) / name, warm)
        for seed, opener, _ in seeds.KINDS.values():
            if seed == name:
                opener(warm)
                shutil.rmtree(warm)
                shutil.copytree(Path(sys.argv[1]) / name, warm)
    limit = _status("VmSize") + 3 * GIB
    import PIL.Image

    PIL.Image.init()
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    gc.collect()
    gc.freeze()
    sys.addaudithook(_audit)
    os.dup2(quiet, 2)
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        result = run(int(line), Path(sys.argv[1]))
        answers.write(json.dumps(result) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
