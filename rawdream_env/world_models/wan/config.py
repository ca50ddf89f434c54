"""Sizes of the world-model transformer: one frozen dataclass, two named configurations.

``embedded`` is the bundled model, ``wan2.1-1.3b`` the paper's (Wan2.1-T2V-1.3B at 256 x 256 pixels).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from rawdream_env.errors import CheckpointError, InvalidOptionError

MOTION_CHANNELS = 4
"""The tool's motion since the last context frame: u, v in latent cells at a latent's first and last video frame."""
PROMPT_ROWS = 512
"""Rows to which Wan pads a prompt's embedding. The padding is not masked, so attention sees it."""

_COUNTS = ("num_layers", "stem_blocks", "head_blocks")
_MAY_BE_ZERO = ("text_dim", "pose_dim", "arm_map_channels", "stem_channels", "context_latents")


@dataclass(frozen=True)
class WanConfig:
    """Architecture of the world-model transformer; the defaults are the ``embedded`` size."""

    latent_shape: tuple[int, int, int] = (16, 8, 8)
    """C, H, W of a latent frame."""
    num_layers: int = 6
    """Transformer blocks."""
    num_attention_heads: int = 4
    """Attention heads N."""
    attention_head_dim: int = 64
    """Width of a head; D = heads * head width."""
    ffn_dim: int = 1024
    """Hidden width of the feed-forward layers."""
    patch_size: int = 2
    """Spatial patch; the temporal patch is always 1."""
    freq_dim: int = 256
    """Width of the sinusoidal timestep embedding."""
    text_dim: int = 0
    """Width of the prompt embedding that Wan's cross-attention reads; 0 for a model without cross-attention."""
    text_rows: int = 1
    """Number of different rows of the prompt embedding: 1 for an all-zero prompt, 2 for Wan's empty prompt and its
    padding."""
    action_dim: int = 7
    """Action dimensions A."""
    actions_per_latent: int = 4
    """Actions, and video frames, that one latent frame covers."""
    pose_dim: int = 7
    """Commanded-pose dimensions added to the action condition; 0 for actions alone, as in the paper."""
    arm_map_channels: int = 0
    """Channels of the arm map at latent resolution, per latent frame; 0 for none."""
    warp_last_frame: bool = False
    """Give each new frame, as extra input channels, the last context frame shifted by the tool's motion up to its first and
    up to its last video frame (2 C channels), and the motion itself (4 map channels); needs the arm map and ``residual``."""
    stem_channels: int = 96
    """Width of the convolutional stem and head; 0 for Wan's plain patch embedding."""
    stem_blocks: int = 2
    """Residual blocks of the stem."""
    head_blocks: int = 3
    """Residual blocks of the head."""
    context_latents: int = 6
    """Number of recent latent frames in the context, in addition to the anchor."""
    chunk_latents: int = 2
    """Latent frames imagined per action chunk (G in the paper)."""
    residual: bool = True
    """Predict the clean sample as a residual over the last context frame, which is also given as input channels;
    False predicts the velocity, as Wan does."""
    eps: float = 1e-6
    """Epsilon of the normalisations."""

    @property
    def width(self) -> int:
        """D."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def condition_dim(self) -> int:
        """Numbers in a latent frame's action condition."""
        return self.actions_per_latent * (self.action_dim + self.pose_dim)

    @property
    def map_channels(self) -> int:
        """Channels of the map tensor: the arm map and, with ``warp_last_frame``, the tool's motion."""
        return self.arm_map_channels + (MOTION_CHANNELS if self.warp_last_frame else 0)

    @property
    def chunk_len(self) -> int:
        """Actions in a chunk K."""
        return self.chunk_latents * self.actions_per_latent

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens in a latent frame."""
        return self.latent_shape[1] // self.patch_size, self.latent_shape[2] // self.patch_size

    @property
    def tokens_per_frame(self) -> int:
        """P."""
        return self.grid[0] * self.grid[1]

    def check(self) -> None:
        """Raise ``InvalidOptionError`` for sizes out of range and for settings that do not fit each other."""
        for name, value in asdict(self).items():
            least, most = (0, 1000) if name in _COUNTS else (0 if name in _MAY_BE_ZERO else 1, 65_536)
            sizes = value if isinstance(value, tuple) else () if isinstance(value, (bool, float)) else (value,)
            if any(not least <= size <= most for size in sizes):
                raise InvalidOptionError(f"{name} is {value}; it must be between {least} and {most}.")
        if self.latent_shape[1] % self.patch_size or self.latent_shape[2] % self.patch_size:
            raise InvalidOptionError(
                f"latent_shape {self.latent_shape} is not a multiple of patch_size {self.patch_size}"
            )
        if self.attention_head_dim % 2:
            raise InvalidOptionError(
                f"attention_head_dim {self.attention_head_dim} is odd: rotary positions need pairs"
            )
        if self.warp_last_frame and not (self.residual and self.arm_map_channels):
            raise InvalidOptionError(
                "warp_last_frame needs residual and arm_map_channels: it shifts the last context frame with the arm"
            )


WAN_CONFIGS: dict[str, WanConfig] = {
    "embedded": WanConfig(arm_map_channels=384, warp_last_frame=True),
    "wan2.1-1.3b": WanConfig(
        latent_shape=(16, 32, 32),
        num_layers=30,
        num_attention_heads=12,
        attention_head_dim=128,
        ffn_dim=8960,
        text_dim=4096,
        pose_dim=0,
        stem_channels=0,
        stem_blocks=0,
        head_blocks=0,
        residual=False,
    ),
}


def wan_config(name: str) -> WanConfig:
    """The configuration called ``name``; for an unknown name, ``CheckpointError`` lists the available ones."""
    if name not in WAN_CONFIGS:
        raise CheckpointError(
            f"there is no world-model configuration {name!r}; choose among {', '.join(map(repr, WAN_CONFIGS))}."
        )
    return WAN_CONFIGS[name]
