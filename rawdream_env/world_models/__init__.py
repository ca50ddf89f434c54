"""World models predict what the camera sees. ``load_world_model`` resolves one by name and imports torch only when called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rawdream_env.config import parse_dtype
from rawdream_env.errors import InvalidOptionError
from rawdream_env.resolve import bundled_folder, resolve

if TYPE_CHECKING:
    from rawdream_env.types import WorldModel

EMBEDDED_VIDEO = "embedded-video"
APPROXIMATIONS = ("rolling_cache", "tiny_decoder", "fp8")


def load_world_model(
    spec: str | Path | WorldModel,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    num_inference_steps: int | None = None,
    approximations: Sequence[str] = (),
    micro_batch_size: int = 0,
) -> WorldModel:
    """The world model that ``spec`` names: "embedded" (the bundled one, of object states), "embedded-video" (the bundled video
    diffusion transformer), "null" (the small twin, for tests), a folder, "owner/name" of the Hugging Face hub,
    "module:factory", or an object with the ``WorldModel`` protocol.

    Args:
        spec: see above.
        device: device to compute on.
        dtype: precision of its weights; None: float32.
        num_inference_steps: evaluations of the sampler per chunk; None: the checkpoint's own.
        approximations: opt-in, at a cost in accuracy (docs/world_model.md): "rolling_cache" keeps the context's keys and
            values across chunks, "tiny_decoder" decodes Wan's latents with TAEHV's decoder, "fp8" rounds the factors of
            the blocks' matrix products to eight bits.
        micro_batch_size: rows computed at once, to bound memory; 0: as many as fit.

    Raises:
        InvalidOptionError: an option, object or factory is not usable.
        CheckpointError: the folder is missing or damaged.
    """
    from rawdream_env.types import WorldModel

    if unknown := sorted(set(approximations) - set(APPROXIMATIONS)):
        raise InvalidOptionError(f"there is no approximation {unknown}; choose among {', '.join(APPROXIMATIONS)}.")
    if isinstance(spec, str) and spec == "null":
        from rawdream_env.world_models.null import NullWorldModel

        return NullWorldModel()
    found: Path | WorldModel = resolve(
        bundled_folder("video_world_model") if spec == EMBEDDED_VIDEO else spec,
        "world model",
        WorldModel,
        bundled=bundled_folder("world_model"),
        device=device,
        dtype=dtype,
        num_inference_steps=num_inference_steps,
        approximations=approximations,
        micro_batch_size=micro_batch_size,
    )
    if not isinstance(found, Path):
        return found
    import torch

    from rawdream_env.world_models.loading import read_world_model
    from rawdream_env.world_models.scene.loading import is_scene_world_model, read_scene_world_model

    precision = getattr(torch, parse_dtype(dtype) or "float32")
    if is_scene_world_model(found):
        if num_inference_steps not in (None, 1) or approximations:
            raise InvalidOptionError(
                f"{found} is a scene world model, which evaluates its dynamics once a frame: leave out num_inference_steps and "
                "approximations."
            )
        return read_scene_world_model(found, micro_batch_size=micro_batch_size).to(device, precision)

    overrides = {} if num_inference_steps is None else {"num_inference_steps": num_inference_steps}
    context_cache: Literal["rolling", "step"] = "rolling" if "rolling_cache" in approximations else "step"
    tiny = "tiny_decoder" in approximations
    model = read_world_model(
        found, context_cache=context_cache, tiny_decoder=tiny, micro_batch_size=micro_batch_size, **overrides
    )
    model.to(device, precision)
    if "fp8" in approximations:
        from rawdream_env.world_models.wan.fp8 import use_fp8

        use_fp8(model.transformer)
    return model
