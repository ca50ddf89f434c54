"""Convert Wan 2.1 weights into a world model (``rawdream world-model convert``).

Two layouts are read: the diffusers folder (``transformer/``, ``vae/``) and Wan's original release (one file for the
transformer, ``Wan2.1_VAE.pth`` for the VAE). The world model uses the parameter names of diffusers; ``ORIGINAL_NAMES``
maps Wan's own names to them. The action modules, which Wan lacks, are new and start at zero, so that the converted model
computes exactly what Wan 2.1 does.

Wan's empty prompt is one row of text embedding and 511 rows of padding. The prompt of a converted model is all zero, which
is the padding alone, unless an embedding is given.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from tyro.conf import Positional

from rawdream_env.errors import CheckpointError, shorten
from rawdream_env.files import check_weights, load_tensors, read_json
from rawdream_env.world_models.loading import save_world_model
from rawdream_env.world_models.pretrained import read_folder
from rawdream_env.world_models.wan.config import PROMPT_ROWS, WanConfig, wan_config
from rawdream_env.world_models.wan.rollout import WAN_ROLLOUT, WanWorldModel
from rawdream_env.world_models.wan.transformer import WanWorldModelTransformer
from rawdream_env.world_models.wan.vae import WanVAE

Tensors = Mapping[str, Tensor]

ORIGINAL_NAMES: tuple[tuple[str, str], ...] = (
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("proj_out", "head.head"),
    (".attn1.", ".self_attn."),
    (".attn2.", ".cross_attn."),
    (".to_q.", ".q."),
    (".to_k.", ".k."),
    (".to_v.", ".v."),
    (".to_out.0.", ".o."),
    (".ffn.net.0.proj.", ".ffn.0."),
    (".ffn.net.2.", ".ffn.2."),
    (".norm2.", ".norm3."),  # the norm before the attention to the prompt: third in Wan's code, second in diffusers'
)
"""Parts of parameter names: those of diffusers and those of Wan."""

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PREFIXES = re.compile(r"^(?:module\.|model\.|diffusion_model\.)+")
"""Prefixes of DDP, FSDP, ``torch.compile`` and of files that hold a whole pipeline."""

_EXPERTS = (("transformer", "transformer_2"), ("high_noise_model", "low_noise_model"))
"""Folders of the two transformers of Wan 2.2: in diffusers' layout and in the original release."""


def _added(name: str) -> bool:
    """Whether a tensor is one that Wan does not have."""
    return name.startswith(("condition_embedder.action_", "prompt_"))


def from_original(tensors: Tensors) -> dict[str, Tensor]:
    """Wan's own names -> diffusers' names; unknown names are kept, for the error message."""
    out = {}
    for name, tensor in plain_names(tensors).items():
        new = "scale_shift_table" if name == "head.modulation" else re.sub(r"\.modulation$", ".scale_shift_table", name)
        for ours, theirs in ORIGINAL_NAMES:
            new = new.replace(theirs, ours)
        out[new] = tensor
    return out


def plain_names(tensors: Tensors) -> dict[str, Tensor]:
    """Names without the prefixes of wrappers (``module.``, ``_orig_mod.``, ``model.diffusion_model.``, ...)."""
    out = {_PREFIXES.sub("", _WRAPPERS.sub("", name)): tensor for name, tensor in tensors.items()}
    if len(out) < len(tensors):
        raise CheckpointError(
            f"{len(tensors)} tensors have {len(out)} names without their prefixes: the file holds several models. Save the "
            "transformer alone."
        )
    return out


def is_original(tensors: Tensors) -> bool:
    """Whether the names are Wan's own."""
    return any(".self_attn." in name for name in tensors)


def build_transformer(tensors: Tensors, config: WanConfig, where: str | Path) -> WanWorldModelTransformer:
    """A world model with Wan's weights (diffusers' names) and a new action path at zero.

    ``CheckpointError`` names the tensors that are missing, unknown, of the wrong shape or not finite.
    """
    given = dict(tensors)
    patch = given.get("patch_embedding.weight")
    if patch is not None and patch.dim() == 5 and patch.shape[2] == 1:
        given["patch_embedding.weight"] = patch.squeeze(2)
    with torch.device("meta"):
        model = WanWorldModelTransformer(config)
    wanted = model.state_dict()
    size = f"size, {config.num_layers} layers of width {config.width} with a prompt"
    check_weights(given, {name: tensor for name, tensor in wanted.items() if not _added(name)}, where, size)
    own = {name: given[name].to(tensor.dtype, copy=True) for name, tensor in wanted.items() if not _added(name)}
    model.load_state_dict(own | _new_tensors(config), assign=True)
    model.eval()
    return model


def _new_tensors(config: WanConfig) -> dict[str, Tensor]:
    """Tensors that Wan does not have: the action path, random except for its last layer, which is zero, and a zero prompt."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small = WanWorldModelTransformer(replace(config, num_layers=0))
    return {name: tensor for name, tensor in small.state_dict().items() if _added(name)}


def config_from_diffusers(values: Mapping[str, Any], latent_size: int, base: WanConfig) -> WanConfig:
    """``config.json`` of diffusers' ``WanTransformer3DModel`` -> ``WanConfig``, other settings from ``base``."""
    if (found := values.get("_class_name", "WanTransformer3DModel")) != "WanTransformer3DModel":
        raise CheckpointError(f"the source holds a {shorten(found)}, expected a WanTransformer3DModel.")
    if values.get("image_dim") or values.get("added_kv_proj_dim"):
        raise CheckpointError("this is an image-to-video Wan; the world model starts from the text-to-video one.")
    values = {"in_channels": 16, "freq_dim": 256, "text_dim": 4096, "patch_size": (1, 2, 2), "eps": 1e-6, **values}
    sizes = (
        "num_layers",
        "num_attention_heads",
        "attention_head_dim",
        "ffn_dim",
        "in_channels",
        "freq_dim",
        "text_dim",
    )
    if missing := [name for name in sizes if type(values.get(name)) is not int or values[name] < 1]:
        raise CheckpointError(
            f"the transformer's config.json lacks {', '.join(missing)} (positive whole numbers); copy the checkpoint again."
        )
    patch, channels = values["patch_size"], values["in_channels"]
    patch_fits = isinstance(patch, list | tuple) and len(patch) == 3 and patch[0] == 1 and patch[1] == patch[2]
    if not patch_fits or type(patch[1]) is not int or channels != (values.get("out_channels") or channels):
        raise CheckpointError(
            f"patches {shorten(patch)} or {channels} input channels are not those of Wan 2.1 text-to-video."
        )
    if not isinstance(values["eps"], float) or not 0 < values["eps"] < 1:
        raise CheckpointError(f"the transformer's config.json has eps {shorten(values['eps'])}; copy the file again.")
    return replace(
        base,
        latent_shape=(channels, latent_size, latent_size),
        num_layers=values["num_layers"],
        num_attention_heads=values["num_attention_heads"],
        attention_head_dim=values["attention_head_dim"],
        ffn_dim=values["ffn_dim"],
        freq_dim=values["freq_dim"],
        text_dim=values["text_dim"],
        patch_size=patch[1],
        eps=values["eps"],
    )


def config_from_original(tensors: Tensors, latent_size: int, base: WanConfig) -> WanConfig:
    """Sizes from the shapes of tensors with diffusers' names; heads are 128 wide, as in every Wan, if the width allows."""
    layers = {int(m[1]) for name in tensors if (m := re.match(r"blocks\.(\d+)\.", name))}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    needed = {
        "patch_embedding.weight": 5, "blocks.0.ffn.net.0.proj.weight": 2,
        "condition_embedder.text_embedder.linear_1.weight": 2, "condition_embedder.time_embedder.linear_1.weight": 2,
    }  # fmt: skip
    if bad := [name for name, dims in needed.items() if len(shapes.get(name, ())) != dims]:
        raise CheckpointError(
            f"not a Wan 2.1 transformer: {', '.join(bad)} missing or of another kind. The file holds {len(tensors)} tensors, "
            f"the first are {shorten(sorted(tensors)[:3], 300)}."
        )
    width, channels, _, patch, _ = shapes["patch_embedding.weight"]
    head = base.attention_head_dim if width % base.attention_head_dim == 0 else width
    return replace(
        base,
        latent_shape=(channels, latent_size, latent_size),
        num_layers=len(layers),
        num_attention_heads=width // head,
        attention_head_dim=head,
        ffn_dim=shapes["blocks.0.ffn.net.0.proj.weight"][0],
        freq_dim=shapes["condition_embedder.time_embedder.linear_1.weight"][1],
        text_dim=shapes["condition_embedder.text_embedder.linear_1.weight"][1],
        patch_size=patch,
    )


def read_wan_transformer(
    source: str | os.PathLike[str], latent_size: int, prompt: Tensor | None = None, base: WanConfig | None = None
) -> WanWorldModelTransformer:
    """Wan's transformer as a world model, from a diffusers folder, a folder of Wan's release or one file.

    ``latent_size``: rows and columns of a latent frame (pixels / 8). ``prompt`` (L, text_dim): the fixed text embedding
    of the model; all zero when None. A folder with the two experts of Wan 2.2 is a ``CheckpointError``.
    """
    base = wan_config("wan2.1-1.3b") if base is None else base
    path = Path(source)
    for pair in _EXPERTS:
        if all((path / name).is_dir() for name in pair):
            raise CheckpointError(
                f"{path} is a Wan 2.2 with two experts, {' and '.join(pair)}, each for one part of the noise range; the world "
                "model has one transformer. Use Wan-AI/Wan2.1-T2V-1.3B-Diffusers."
            )
    if path.is_dir() and (path / "transformer").is_dir():
        path = path / "transformer"
    if path.is_dir():
        names = read_json(path / "config.json") if (path / "config.json").is_file() else {}
        tensors, where = read_folder(path)
        original = is_original(tensors)
        tensors = from_original(tensors) if original else plain_names(tensors)
        if original:
            config = config_from_original(tensors, latent_size, base)
            if heads := names.get("num_heads"):
                if type(heads) is not int or heads < 1 or config.width % heads:
                    raise CheckpointError(f"{path}: num_heads {shorten(heads)} does not divide width {config.width}.")
                config = replace(config, num_attention_heads=heads, attention_head_dim=config.width // heads)
        else:
            config = config_from_diffusers(names, latent_size, base)
    elif path.is_file():
        tensors, where = load_tensors(path), path
        tensors = from_original(tensors) if is_original(tensors) else plain_names(tensors)
        config = config_from_original(tensors, latent_size, base)
    else:
        raise CheckpointError(
            f"there is neither a folder nor a file {path}; check the path, or download Wan-AI/Wan2.1-T2V-1.3B-Diffusers."
        )
    rows = 1 if prompt is None else len(torch.unique(prompt, dim=0))
    model = build_transformer(tensors, replace(config, text_rows=rows), where)
    if prompt is not None:
        model.set_prompt(prompt)
    return model


def empty_prompt(text_encoder: Path) -> Tensor:
    """Wan's empty prompt (512, text_dim): the embedding of the end-of-text token, and rows of padding.

    ``text_encoder``: folder of Wan's UMT5 encoder in the layout of transformers.
    """
    if not (text_encoder / "config.json").is_file():
        raise CheckpointError(
            f"there is no text encoder in {text_encoder}; download it, or convert with --prompt zero."
        )
    from transformers import UMT5EncoderModel

    encoder: Any = UMT5EncoderModel.from_pretrained(text_encoder, local_files_only=True)
    encoder.eval()
    with torch.no_grad():
        row = encoder(torch.tensor([[encoder.config.eos_token_id]])).last_hidden_state[0].float()
    return torch.cat([row, torch.zeros(PROMPT_ROWS - 1, row.shape[1])])


@dataclass(frozen=True)
class ConvertWanConfig:
    """Options of ``rawdream world-model convert``."""

    src: Annotated[str, Positional]
    """Folder of Wan2.1-T2V-1.3B in diffusers' layout or of Wan's own release, or the file of its transformer."""
    out: str
    """Folder to write the world model to; must not contain one."""
    vae: str = ""
    """Folder or file of the VAE; by default vae/ or Wan2.1_VAE.pth in SRC."""
    image_size: int = 256
    """Height and width of the frames in pixels; a multiple of 16."""
    prompt: Literal["zero", "empty"] = "zero"
    """The fixed prompt of the model: all zero, or Wan's empty prompt, which needs SRC/text_encoder."""
    fps: float = 10.0
    """Frames per second of the training data."""


def convert_wan(config: ConvertWanConfig) -> Path:
    """Write a world model folder whose transformer is Wan 2.1 with an action path at zero; returns the folder.

    Everything is read and checked before anything is written.
    """
    source, target = Path(config.src), Path(config.out)
    if (target / "config.json").exists():
        raise CheckpointError(f"{target} already holds a model; choose another folder.")
    vae = Path(config.vae) if config.vae else _find_vae(source)
    codec = WanVAE.from_pretrained(vae, config.image_size)
    prompt = empty_prompt(source / "text_encoder") if config.prompt == "empty" else None
    transformer = read_wan_transformer(source, codec.latent_shape[1], prompt)
    save_world_model(WanWorldModel(transformer, codec, replace(WAN_ROLLOUT, fps=config.fps)), target)
    return target


def _find_vae(source: Path) -> Path:
    folder = source if source.is_dir() else source.parent
    for place in (folder / "vae", folder / "Wan2.1_VAE.pth", folder / "Wan2.1_VAE.safetensors"):
        if place.exists():
            return place
    raise CheckpointError(f"there is neither vae/ nor Wan2.1_VAE.pth in {folder}; give the VAE's path with --vae.")
