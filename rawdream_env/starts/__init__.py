"""Where episodes begin: start packs, folders of images, the simulator, plain lists."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rawdream_env.errors import InvalidOptionError
from rawdream_env.robots import find_robot
from rawdream_env.starts.base import StartSource, seed_for
from rawdream_env.starts.memory import ListStarts, NullStarts

__all__ = ["ListStarts", "NullStarts", "StartSource", "load_starts", "seed_for"]


def load_starts(
    starts: Any, *, frame_shape: tuple[int, int, int] = (64, 64, 3), layout: str = "narrow", robot: str = ""
) -> StartSource:
    """Turn the ``starts`` option of an environment into a source.

    Args:
        starts: "pack" (the robot's start pack), "sim" (rendered by the robot's simulator as they are needed), "null"
            (random frames), a path to a ``.safetensors`` pack or to a folder of images, a list of ``Start``, or
            an object with a ``sample`` method.
        frame_shape: (H, W, 3) wanted; images of a folder are resized to it.
        layout: "narrow" or "wide": how far the objects are scattered ("pack" and "sim").
        robot: whose pack and simulator; the default robot when empty.

    Raises:
        InvalidOptionError: none of these, or the robot has no pack or no simulator.
        CheckpointError: the pack is missing or damaged.
    """
    if isinstance(starts, str | Path):
        return _from_name(str(starts), frame_shape, layout, robot)
    if isinstance(starts, StartSource):
        return starts
    if isinstance(starts, Sequence):
        return ListStarts(starts)
    raise InvalidOptionError(
        f"starts is a {type(starts).__name__}; give 'pack', 'sim', a path, a list of Start or an object with sample()."
    )


def _from_name(name: str, frame_shape: tuple[int, int, int], layout: str, robot: str) -> StartSource:
    if name == "null":
        return NullStarts(frame_shape)
    if name == "sim":
        source: StartSource = find_robot(robot).load("sim_starts")(image_size=frame_shape[0], layout=layout)
        return source
    from rawdream_env.starts.pack import PackStarts

    if name == "pack":
        return PackStarts(find_robot(robot).load("start_pack")(layout))
    path = Path(name)
    if path.suffix == ".safetensors":
        return PackStarts(path)
    if path.is_dir():
        from rawdream_env.starts.folder import FolderStarts

        return FolderStarts(path, frame_shape=frame_shape)
    raise InvalidOptionError(
        f"starts={name!r} is neither 'pack', 'sim' nor 'null', nor an existing folder of images or a .safetensors pack."
    )
