"""``rawdream doctor``: check this machine and suggest fixes.

Every check is a function that returns a :class:`Check`; a check never raises. The renderer runs in a subprocess, because a
broken OpenGL driver can kill the process.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from rawdream_env.files import sha256_file

ASSETS = Path(__file__).resolve().parent / "assets"
DEBIAN_PACKAGES = ("libegl1", "libgles2", "libosmesa6", "ffmpeg")
_MARKS = {"ok": "ok     ", "note": "note   ", "broken": "BROKEN "}
_RENDER_S = 180
# The alarm ends a renderer that hangs, even when this process is gone.
_RENDER = f"""
import signal
getattr(signal, "alarm", id)({_RENDER_S})
from rawdream_env.piper.simulator.twin import PiperTwin
twin = PiperTwin(image_size=64)
frame = twin.reset(0, task="stack_block")
twin.close()
assert frame.std() > 5, "the picture is empty"
print("rendered a frame")
"""
_LIBERO = f"""
import signal, time
getattr(signal, "alarm", id)({_RENDER_S})
import numpy as np
from rawdream_env.libero.protocols import SETTLE_ACTION
from rawdream_env.libero.scene import LiberoScene
begun = time.perf_counter()
scene = LiberoScene("libero_goal", 0, 256, 0)
start = scene.begin(0, 0, 1)
built = time.perf_counter()
frames = scene.step(start.state, np.array([SETTLE_ACTION] * 4, np.float32), True).frames
step_ms = 250 * (time.perf_counter() - built)
scene.close()
assert frames.std() > 5, "the picture is empty"
print(f"built a scene in {{built - begun:.1f}} s, a control step with a 256 px frame takes {{step_ms:.0f}} ms")
"""


@dataclass(frozen=True)
class DoctorConfig:
    """Options of ``rawdream doctor``."""

    render: bool = True
    """Render a frame in a subprocess (a few seconds), and step LIBERO if it is installed."""
    folder: Path = Path()
    """Folder for run folders; its disk is checked for free space."""


@dataclass(frozen=True)
class Check:
    """``state``: "ok", "note" (works, with a limitation) or "broken" (something required does not work)."""

    name: str
    state: Literal["ok", "note", "broken"]
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All checks; ``str()`` is the table."""

    checks: tuple[Check, ...]

    @property
    def healthy(self) -> bool:
        """Whether no check is broken."""
        return all(check.state != "broken" for check in self.checks)

    def __str__(self) -> str:
        width = max(len(check.name) for check in self.checks)
        lines = []
        for check in self.checks:
            lines.append(f"{_MARKS[check.state]}{check.name:<{width}}  {check.found}")
            if check.fix and check.state != "ok":
                lines.append(f"{'':7}{'':<{width}}  -> {check.fix}")
        broken = sum(check.state == "broken" for check in self.checks)
        lines.append(f"{broken} broken." if broken else "Everything required works.")
        return "\n".join(lines)


def run_doctor(config: DoctorConfig) -> Diagnosis:
    """Run every check."""
    checks: list[Check] = [_python(), *_packages(), _torch()]
    if config.render:
        checks.append(_renderer())
    checks += [*_models(ASSETS), _video(), _disk(config.folder), _memory(), *_libero(config.render), *_optional()]
    return Diagnosis(tuple(checks))


def _python() -> Check:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if not sys.platform.startswith("linux"):
        return Check("python", "note", found, "Only Linux is tested; set MUJOCO_GL for your system's OpenGL.")
    return Check("python", "ok", found)


def _packages() -> Iterator[Check]:
    """The required packages: one check if all versions fit, else one per package that does not."""
    fix = "Run `make install`, or `pip install -c constraints.txt -e .` in the clone."
    try:
        from packaging.requirements import Requirement

        wanted = [Requirement(text) for text in requires("rawdream-env") or []]
    except (ImportError, PackageNotFoundError) as error:
        yield Check("packages", "broken", f"rawdream-env is not installed properly ({error})", fix)
        return
    needed = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    bad = 0
    for requirement in needed:
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = ""
        if not found or not requirement.specifier.contains(found, prereleases=True):
            bad += 1
            yield Check(requirement.name, "broken", f"{found or 'missing'}, needs {requirement.specifier}", fix)
    if not bad:
        yield Check("packages", "ok", f"all {len(needed)} required packages have the right version")


def _torch() -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check("torch", "broken", f"cannot be imported: {error}", "Reinstall it: pip install torch==2.13.0")
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none (the bundled models need none)"
    return Check("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads, GPU: {gpu}")


def _renderer() -> Check:
    fix = (
        f"Install an OpenGL library: apt-get install {' '.join(DEBIAN_PACKAGES[:3])}; then MUJOCO_GL=egl (or osmesa). "
        "Only the simulator needs a renderer."
    )
    return _in_subprocess("renderer", _RENDER, fix)


def _libero(render: bool) -> Iterator[Check]:
    """The optional LIBERO simulator: installed, its assets, and a timed step."""
    from rawdream_env.errors import MissingAssetsError, MissingDependencyError
    from rawdream_env.libero.install import find_assets, find_package

    extra = "To use it: pip install 'rawdream-env[libero]'; docs/libero.md has a smaller install."
    try:
        assets = find_assets(find_package())
    except MissingDependencyError:
        yield Check("LIBERO", "note", "not installed (optional)", extra)
        return
    except MissingAssetsError as error:
        found, _, fix = str(error).partition(". ")
        yield Check("LIBERO assets", "note", found, fix)
        return
    yield Check("LIBERO assets", "ok", str(assets))
    if render:
        yield _in_subprocess("LIBERO simulator", _LIBERO, f"docs/libero.md lists what it needs. {extra}")


def _in_subprocess(name: str, code: str, fix: str) -> Check:
    """Run ``code``; its last line of output is what was found."""
    backend = os.environ.get("MUJOCO_GL") or "chosen automatically"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=_RENDER_S, check=False
        )
    except subprocess.TimeoutExpired:
        return Check(name, "broken", f"no frame after {_RENDER_S} s (MUJOCO_GL {backend})", fix)
    if done.returncode == 0:
        return Check(name, "ok", f"{done.stdout.strip().splitlines()[-1]} (MUJOCO_GL {backend})")
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return Check(name, "broken", f"{last[:300]} (MUJOCO_GL {backend})", fix)


def _models(assets: Path) -> Iterator[Check]:
    """The bundled models: present and undamaged, with a model card."""
    fix = "Reinstall the package (git clone, or pip install), or train the models: rawdream models train."
    parts = ("world_model", "judge", "policy", "starts_narrow.safetensors")
    missing = [part for part in parts if not (assets / part).exists()]
    if missing:
        yield Check("bundled models", "broken", f"missing in {assets}: {', '.join(missing)}", fix)
        return
    manifest = assets / "manifest.json"
    try:
        hashes: dict[str, str] = json.loads(manifest.read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield Check("bundled models", "note", f"present, but {manifest.name} cannot be read ({error})", fix)
        return
    wrong = [name for name, digest in hashes.items() if not _is(assets / name, digest)]
    if wrong:
        yield Check("bundled models", "broken", f"altered or damaged: {', '.join(wrong)}", fix)
        return
    size = sum((assets / name).stat().st_size for name in hashes) / 1e6
    card = "with" if (assets / "README.md").is_file() else "without"
    yield Check("bundled models", "ok", f"{len(hashes)} files, {size:.0f} MB, hashes match, {card} model card")


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and sha256_file(path) == digest


def _video() -> Check:
    try:
        from rawdream_env.media import has_h264
    except (ImportError, OSError) as error:
        return Check("video", "broken", f"PyAV cannot be imported: {error}", "Reinstall it: pip install av")
    if has_h264():
        return Check("video", "ok", f"PyAV {version('av')} with H.264")
    return Check(
        "video",
        "note",
        "PyAV has no H.264 encoder; videos are written as GIF",
        "Reinstall it: pip install --force-reinstall av",
    )


def _disk(folder: Path) -> Check:
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 1e9
    found = f"{free:.1f} GB free at {place}"
    if free < 1:
        return Check("disk", "broken", found, "Free at least 1 GB, or use another folder.")
    if free < 5:
        return Check(
            "disk", "note", found, "This is enough for the demo; training the bundled models needs about 5 GB."
        )
    return Check("disk", "ok", found)


def _memory() -> Check:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (ValueError, OSError, AttributeError):
        return Check("memory", "note", "cannot be measured on this system")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if total < 4:
        return Check("memory", "note", f"{total:.1f} GB, {cores} cores", "The demo needs about 4 GB; use --num-envs 8.")
    return Check("memory", "ok", f"{total:.1f} GB, {cores} cores")


def _optional() -> Iterator[Check]:
    for package, extra in (
        ("stable-baselines3", "sb3"),
        ("torchrl", "torchrl"),
        ("skrl", "skrl"),
        ("rsl-rl-lib", "rsl_rl"),
    ):
        try:
            yield Check(package, "ok", f"{version(package)} (optional)")
        except PackageNotFoundError:
            yield Check(package, "note", "not installed (optional)", f"To use it: pip install 'rawdream-env[{extra}]'")
