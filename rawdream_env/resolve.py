"""How a world model, a judge, a policy or a start source is named.

======================  ============================================================================================
``"embedded"``          the bundled one
a folder                a checkpoint, as ``save_pretrained`` writes it; an existing folder comes before all that follows
``"module:factory"``    your own code: ``factory`` is called and its result is used
``"owner/name"``        a repository of the Hugging Face hub: from the local cache, else downloaded
an object               used as it is
======================  ============================================================================================

``load_world_model``, ``load_judge``, ``load_policy`` and ``load_starts`` share these rules and add their own names.
Only tensors, JSON and text are downloaded from the hub, never code. ``HF_HUB_OFFLINE=1`` allows no download.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
from collections.abc import Sequence
from importlib import import_module, resources
from operator import attrgetter
from pathlib import Path
from typing import Any

from rawdream_env.config import parse_device, parse_dtype
from rawdream_env.errors import CheckpointError, InvalidOptionError
from rawdream_env.files import json_sha256, tensors_sha256

EMBEDDED = "embedded"
_FACTORY = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*):([A-Za-z_]\w*(?:\.\w+)*)")
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "action_head*.pt")


def bundled_folder(name: str) -> Path:
    """The folder ``name`` of the bundled models."""
    return Path(str(resources.files("rawdream_env.assets") / name))


def resolve(
    spec: Any, part: str, protocol: type, *, bundled: Path, device: Any = "cpu", dtype: Any = None, **options: Any
) -> Any:
    """The folder to load ``spec`` from (a ``Path``, which may not exist), or the object that it names.

    Args:
        spec: a name as described above, or an object.
        part: the kind of object, for messages: "policy".
        protocol: what an object has to satisfy.
        bundled: the folder of "embedded".
        device: passed to a factory that takes it.
        dtype: passed to a factory when set, as are ``options``; it must take those that are set.

    Raises:
        InvalidOptionError: the object or factory does not fit, or there is no such device or dtype.
        CheckpointError: the hub's repository cannot be fetched.
    """
    device, dtype = parse_device(device), parse_dtype(dtype)
    options = {name: value for name, value in {"dtype": dtype, **options}.items() if value}
    if not isinstance(spec, str | os.PathLike):
        _require(spec, type(spec).__name__, part, protocol)
        if options:
            raise InvalidOptionError(
                f"{', '.join(options)} cannot be applied to a {part} that is already loaded; set them on the object."
            )
        return spec
    if spec == EMBEDDED:
        return bundled
    path = Path(spec)
    if isinstance(spec, str) and not path.exists():
        if match := _FACTORY.fullmatch(spec):
            made = _call(spec, match[1], match[2], {"device": device, **options})
            return _require(made, f"{type(made).__name__} of {spec!r}", part, protocol)
        if is_hub_id(spec):
            return hub_folder(spec)
    return path


def fingerprint(part: Any) -> str:
    """A short text that tells ``part`` from others that had its name before: its type, and a hash of its ``config`` (a
    dataclass) and of the tensors of its torch modules; or its own ``fingerprint``, a string or a method that returns one.
    """
    own = getattr(part, "fingerprint", None)
    if own is not None:
        return str(own() if callable(own) else own)
    from torch import nn

    members = {"": part, **getattr(part, "__dict__", {})}
    modules = {name: member for name, member in members.items() if isinstance(member, nn.Module)}
    tensors = {f"{name}/{key}": tensor for name, m in modules.items() for key, tensor in m.state_dict().items()}
    config = getattr(part, "config", None)
    settings = dataclasses.asdict(config) if dataclasses.is_dataclass(config) and not isinstance(config, type) else {}
    kind = type(part).__qualname__
    return f"{kind} {json_sha256([repr(sorted(settings.items())), tensors_sha256(tensors)])[:16]}"


def is_hub_id(spec: str) -> bool:
    """Whether ``spec`` reads ``owner/name`` and is no path: neither it nor a local folder ``owner`` exists."""
    return _HUB_ID.fullmatch(spec) is not None and not Path(spec).exists() and not Path(spec).parent.is_dir()


def hub_folder(
    spec: str,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    allow_patterns: Sequence[str] = _HUB_FILES,
) -> Path:
    """The local folder of the hub's repository ``spec``; what the cache has is not downloaded again.

    Raises:
        CheckpointError: it is neither in the cache nor can it be downloaded.
    """
    from huggingface_hub import snapshot_download

    reason = ""
    for cached in (True,) if local_files_only else (True, False):
        try:
            found = snapshot_download(
                spec, revision=revision, local_files_only=cached, allow_patterns=list(allow_patterns)
            )
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0][:120]
        else:
            return Path(found)
    raise CheckpointError(
        f"there is no folder {spec}, and the Hugging Face hub has no such repository that can be fetched ({reason}). "
        "Check the path or the name; HF_HUB_OFFLINE=1 allows no download."
    )


def _call(spec: str, module_name: str, name: str, options: dict[str, Any]) -> Any:
    """What the factory returns, called with those ``options`` that it takes."""
    try:
        factory = attrgetter(name)(import_module(module_name))
    except (ImportError, AttributeError) as error:
        raise InvalidOptionError(f"{spec!r} cannot be imported: {error}.") from error
    if not callable(factory):
        return factory
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # of C code
        return factory()
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    taken = {key: value for key, value in options.items() if takes_all or key in parameters}
    if refused := sorted(options.keys() - taken.keys() - {"device"}):
        raise InvalidOptionError(
            f"{spec!r} does not accept {', '.join(refused)}; add the argument, or omit the option."
        )
    needed = [
        key
        for key, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and key not in taken
    ]
    if needed:
        raise InvalidOptionError(
            f"{spec!r} needs {', '.join(needed)}; a factory is called with device= if it accepts it, and "
            "with no other argument."
        )
    return factory(**taken)


def _require(thing: Any, name: str, part: str, protocol: type) -> Any:
    """``thing``, when it has every member of ``protocol``."""
    methods = [key for key in vars(protocol) if key == "__call__" or not key.startswith("_")]
    members = [*methods, *protocol.__annotations__]
    missing = [key for key in members if not hasattr(thing, key)]
    if missing:
        raise InvalidOptionError(
            f"{name} is not a {part}: it lacks {', '.join(missing)}. Pass an object that has them, a folder or 'embedded'."
        )
    if isinstance(thing, type):
        raise InvalidOptionError(f"{thing.__name__} is a class, not a {part}; pass an instance, or 'module:class'.")
    return thing
