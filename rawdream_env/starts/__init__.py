"""Start states of episodes: start packs, folders of images, the simulator, lists. ``load_starts`` finds one by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rawdream_env.config import parse_device
from rawdream_env.errors import InvalidOptionError
from rawdream_env.resolve import EMBEDDED, resolve
from rawdream_env.robots import find_robot
from rawdream_env.starts.base import StartSource, seed_for
from rawdream_env.starts.memory import ListStarts, NullStarts
from rawdream_env.types import Start

__all__ = ["ListStarts", "NullStarts", "StartSource", "load_starts", "seed_for"]


def load_starts(
    spec: str | Path | Sequence[Start] | StartSource,
    *,
    device: str = "cpu",
    frame_shape: tuple[int, int, int] = (64, 64, 3),
    layout: str = "narrow",
    robot: str = "",
) -> StartSource:
    """The start source that ``spec`` names.

    Args:
        spec: "pack" or "embedded" (the robot's start pack), "sim" (rendered by the robot's simulator on demand), "null"
            (random frames), a ``.safetensors`` pack, a folder with images or a pack, "owner/name" of the Hugging Face hub,
            "module:factory", a list of ``Start``, or an object with a ``sample`` method.
        device: passed to a factory that accepts it.
        frame_shape: (H, W, 3); images of a folder are resized to it.
        layout: "narrow" or "wide": how far the objects are scattered ("pack" and "sim").
        robot: the robot whose pack and simulator are used; the default robot when empty.

    Raises:
        InvalidOptionError: ``spec`` is none of these, or the robot has no pack or no simulator.
        CheckpointError: the pack is missing or damaged.
    """
    device = parse_device(device)
    if isinstance(spec, str) and spec == "null":
        return NullStarts(frame_shape)
    if isinstance(spec, str) and spec == "sim":
        source: StartSource = find_robot(robot).load("sim_starts")(image_size=frame_shape[0], layout=layout)
        return source
    if isinstance(spec, Sequence) and not isinstance(spec, str | StartSource):
        return ListStarts(spec)
    from rawdream_env.starts.pack import PackStarts

    if isinstance(spec, str) and spec in ("pack", EMBEDDED):
        return PackStarts(find_robot(robot).load("start_pack")(layout))
    found: Path | StartSource = resolve(spec, "start source", StartSource, bundled=Path(), device=device)
    if not isinstance(found, Path):
        return found
    if found.suffix == ".safetensors":
        return PackStarts(found)
    if found.is_dir():
        packs = sorted(found.glob("*.safetensors"))
        if packs:
            fitting = found / f"starts_{layout}.safetensors"
            return PackStarts(fitting if fitting in packs else packs[0])
        from rawdream_env.starts.folder import FolderStarts

        return FolderStarts(found, frame_shape=frame_shape)
    raise InvalidOptionError(
        f"starts={str(spec)!r} is neither 'pack', 'sim' nor 'null', nor an existing folder of images or a .safetensors "
        "pack, nor 'module:factory'."
    )
