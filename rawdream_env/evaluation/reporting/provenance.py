"""Command, versions and hardware: what a reader needs to reproduce a report."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("rawdream-env", "torch", "numpy", "gymnasium", "mujoco", "transformers", "diffusers")


def command_line() -> str:
    """The command as typed, without the folders of the interpreter or of the script."""
    name = Path(sys.argv[0]).name
    if name == "__main__.py":
        name = f"python -m {Path(sys.argv[0]).parent.name}"
    return " ".join([name, *map(shlex.quote, sys.argv[1:])])


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine() or "unknown processor"


def usable_cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def provenance(**more: Any) -> dict[str, Any]:
    """Command, time (UTC), package versions and hardware; ``more`` is added unchanged."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    hardware: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    torch = sys.modules.get("torch")  # described only if it was imported
    if torch is not None:
        hardware["torch_threads"] = torch.get_num_threads()
        hardware["gpu"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    time = datetime.now(UTC).isoformat(timespec="seconds")
    return {"command": command_line(), "time": time, "versions": versions, "hardware": hardware, **more}
