"""The world model as one object: frame codec, transformer, keyed noise, autoregressive rollout (paper, section 3.1 and
appendix A.1).

Each call of ``imagine`` generates G latent frames from the anchor and the most recent ones, in latent space; frames are
decoded as a stream, each latent once. Recent context frames have noise level 0.05 (t = 50 of 1000). The anchor's noise level
t(s) = min(10 * max(s - 3, 0), 300) prevents first-frame ghosting.

Where the paper leaves the reading open, this implementation chooses:

- Step s counts from 0. The anchor is clean in chunks 0 to 3, and chunk 3 is the first with a whole context (2 s = 6 recent
  latents). Counting from 1 is ``anchor_noise_start=2``.
- Context and anchor noise are drawn once per step and held for all evaluations of the sampler. The context's keys and
  values are then the same at every evaluation and are computed once (``chunk.py``).
- All noise is drawn afresh at every step. Noise of recent frames and new latents belongs to the episode; noise of the anchor
  is keyed by start frame, chunk and draw, so that episodes from one start (a group of GRPO) share it and the anchor's keys
  and values. The second dream of dual-noise verification (section 3.2) is draw 1: it redraws all three at every step.

Shape letters: B rows, K actions in a chunk, A action dims, R recent latent frames, G new ones, C H W latent frame.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn

from rawdream_env.errors import CheckpointError, InvalidOptionError
from rawdream_env.robots import ArmMapConfig
from rawdream_env.seeding import NoiseKey, keyed_normal
from rawdream_env.world_models.autoencoders import FRAMES_PER_LATENT, FrameCodec
from rawdream_env.world_models.memory import module_bytes, require_memory, rollout_memory, rows_that_fit
from rawdream_env.world_models.row_state import check_start, checked_actions
from rawdream_env.world_models.sampler import sample_flow
from rawdream_env.world_models.wan.chunk import ChunkDenoiser, ConditionCache, Context, ContextCache
from rawdream_env.world_models.wan.dream_state import DreamState
from rawdream_env.world_models.wan.kinematics import draw_maps, load_kinematics
from rawdream_env.world_models.wan.transformer import WanWorldModelTransformer

LATENT_STREAM, CONTEXT_STREAM, ANCHOR_STREAM = 0, 1, 2


@dataclass(frozen=True)
class RolloutConfig:
    """How the world model is rolled out; saved with the checkpoint."""

    fps: float = 10.0
    """Frames per second of the imagined video."""
    num_inference_steps: int = 5
    """Evaluations of the sampler per chunk; 1 is the fast option, which returns the conditional mean."""
    shift: float = 1.0
    """Flow shift of the sampler's noise levels."""
    context_noise: float = 0.05
    """Noise level of the recent context (t = 50 of 1000)."""
    anchor_noise_step: float = 0.01
    """Increase of the anchor's noise level per chunk after ``anchor_noise_start``."""
    anchor_noise_start: int = 3
    """Last chunk, counted from 0, in which the anchor is clean."""
    anchor_noise_max: float = 0.3
    """Maximum noise level of the anchor."""
    max_time: int = 15
    """Maximum position of the first new latent frame; the anchor's position is 0. Later chunks keep this position."""
    action_low: tuple[float, ...] = (-1.0,) * 7
    """q01 of the training actions; conditions are (action - low) / (high - low) * 2 - 1, clipped to [-1, 1]."""
    action_high: tuple[float, ...] = (1.0,) * 7
    """q99 of the training actions."""
    arm_map: ArmMapConfig | None = field(default_factory=ArmMapConfig)
    """Settings of the arm map; None: no arm map."""

    def check(self) -> None:
        """Raise ``InvalidOptionError`` for settings that no rollout can have."""
        levels = (self.context_noise, self.anchor_noise_step, self.anchor_noise_max)
        if not (0 < self.fps <= 1000 and 1 <= self.num_inference_steps <= 1000 and 0 < self.shift <= 1000):
            raise InvalidOptionError(
                f"fps {self.fps}, num_inference_steps {self.num_inference_steps} and shift {self.shift} must be above 0 and at "
                "most 1000; the paper evaluates the sampler 5 times."
            )
        if not all(0 <= level <= 1 for level in levels):
            raise InvalidOptionError(
                f"the noise levels of context and anchor are {levels}; they must be between 0 and 1."
            )
        pairs = list(zip(self.action_low, self.action_high, strict=False))
        if len(self.action_low) != len(self.action_high) or not all(low < high for low, high in pairs):
            raise InvalidOptionError(
                f"action_low {self.action_low} and action_high {self.action_high} must be equally long, each low below "
                "its high."
            )
        if self.arm_map is not None and not 1 <= self.arm_map.resolution <= 1024:
            raise InvalidOptionError(f"the arm map's resolution {self.arm_map.resolution} must be between 1 and 1024.")

    def anchor_noise(self, chunk: int) -> float:
        """Noise level of the anchor at autoregressive step ``chunk``."""
        return min(self.anchor_noise_step * max(chunk - self.anchor_noise_start, 0), self.anchor_noise_max)


WAN_ROLLOUT = RolloutConfig(shift=3.0, max_time=7, arm_map=None)
"""Settings for a model initialized from Wan 2.1: nine latents at positions 0 to 8, Wan's flow shift for this size."""


class WanWorldModel:
    """Batched, keyed, autoregressive imagination behind the ``WorldModel`` protocol.

    On a CPU in fp32 row i is bit-identical whatever the other rows are; bf16 gives up that guarantee for speed.

    Args:
        transformer: the denoiser.
        autoencoder: frames to latents and back.
        config: rollout settings.
        robot: name of the robot whose kinematics turn actions into poses and maps; empty: the default robot.
        context_cache: which keys and values of the context are kept, see ``chunk.py``: "step" is exact, "none" has the same
            result and is slower, "rolling" is an approximation.
        micro_batch_size: rows that are denoised, encoded or decoded at once, to bound the memory for activations; 0: all,
            or after ``prepare`` as many as fit.
    """

    def __init__(
        self,
        transformer: WanWorldModelTransformer,
        autoencoder: FrameCodec,
        config: RolloutConfig = RolloutConfig(),
        *,
        robot: str = "",
        context_cache: ContextCache = "step",
        micro_batch_size: int = 0,
    ) -> None:
        config.check()
        transformer.eval().requires_grad_(False)
        self.transformer = transformer
        cast(nn.Module, autoencoder).eval().requires_grad_(False)
        self.autoencoder = autoencoder
        self.config = config
        self.context_cache: ContextCache = context_cache
        self.micro_batch_size = micro_batch_size
        self._fitting = 0
        arch = transformer.arch
        self.chunk_len = arch.chunk_len
        self.frame_shape = autoencoder.frame_shape
        self.fps = config.fps
        if autoencoder.latent_shape != arch.latent_shape:
            raise CheckpointError(
                f"the frame codec makes latents {autoencoder.latent_shape}, the transformer takes {arch.latent_shape}; use "
                "the codec it was trained with, at the same image size."
            )
        if config.max_time <= arch.context_latents:
            raise CheckpointError(f"max_time {config.max_time} must exceed context_latents {arch.context_latents}.")
        self.robot = robot
        self._arm_map = load_kinematics(robot, config.arm_map)
        if self._arm_map is not None and arch.pose_dim not in (0, self._arm_map.state_dim):
            raise CheckpointError(
                f"the transformer takes {arch.pose_dim} pose dimensions, robot {robot!r} has {self._arm_map.state_dim}"
            )
        self._condition_cache = ConditionCache(transformer)
        self._rowwise: set[str] = set()
        self._verified: set[tuple[str, int]] = set()
        low, high = torch.tensor(config.action_low), torch.tensor(config.action_high)
        self._action_mid, self._action_half = (low + high) / 2, (high - low) / 2

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.transformer.patch_embedding.weight.device

    def to(self, device: str | torch.device, dtype: torch.dtype = torch.float32) -> WanWorldModel:
        """Move to a device and precision (in place); bf16 is faster on GPUs and on CPUs with AVX512-BF16.

        Raises:
            NotEnoughMemoryError: the weights do not fit; nothing has been moved.
        """
        if torch.device(device) != self.device:
            weights = module_bytes((self.transformer, cast(nn.Module, self.autoencoder)), dtype)
            require_memory({"weights": weights}, device, "The world model", "use dtype='bfloat16' or a larger device")
        self.transformer.to(device, dtype)
        cast(nn.Module, self.autoencoder).to(device, dtype)
        self._condition_cache = ConditionCache(self.transformer)
        return self

    def prepare(self, num_envs: int) -> None:
        """Check that ``num_envs`` episodes fit into the free memory, before the first of them begins.

        With ``micro_batch_size`` 0, as many rows as fit are computed at once.

        Raises:
            NotEnoughMemoryError: they do not fit.
        """
        arch, dtype, cache = self.transformer.arch, self.transformer.proj_out.weight.dtype, self.context_cache
        rows = self.micro_batch_size or rows_that_fit(arch, self.autoencoder, num_envs, dtype, cache, self.device)
        parts = rollout_memory(arch, self.autoencoder, num_envs, rows, dtype, cache)
        advice = "use fewer environments, a smaller micro_batch_size or dtype='bfloat16'"
        require_memory(parts, self.device, f"Imagining {num_envs} episodes, {rows} at a time,", advice)
        self._fitting = rows if rows < num_envs else 0

    @torch.no_grad()
    def start(self, frames: Tensor, keys: Sequence[NoiseKey], proprio: Tensor | None = None) -> DreamState:
        """Start B episodes. ``frames`` uint8 (B, H, W, 3); ``proprio`` (B, P) commanded pose, required with an arm map."""
        frames = torch.as_tensor(frames)
        check_start(frames, keys, self.frame_shape)
        arch = self.transformer.arch
        # Without an arm map the pose is zeros, which are part of the key of the anchor's noise.
        width = 7 if self._arm_map is None else self._arm_map.state_dim
        if proprio is None and not arch.pose_dim:
            proprio = torch.zeros(len(frames), width)
        if proprio is None or (self._arm_map is not None and tuple(proprio.shape) != (len(frames), width)):
            raise ValueError(
                f"this world model draws the arm from its pose: give proprio {(len(frames), width)} with the start "
                f"frames, got {None if proprio is None else tuple(proprio.shape)}"
            )
        pose = torch.as_tensor(proprio, dtype=torch.float32).cpu()
        frames = frames.to(self.device)
        codec, (b, r) = self.autoencoder, (len(frames), arch.context_latents)
        anchor = self._by_rows("encode", b, lambda rows: (codec.encode_image(frames[rows]),))[0]
        decoder = self._by_rows("start decoding", b, lambda rows: codec.start_decoding(anchor[rows]))
        rolling = (b, arch.num_attention_heads, r * arch.tokens_per_frame, arch.attention_head_dim)
        dtype = self.transformer.proj_out.weight.dtype
        cache = [torch.zeros(rolling, dtype=dtype, device=self.device) for _ in range(2 * arch.num_layers)]
        still = torch.zeros(b, 1, FRAMES_PER_LATENT, arch.action_dim)
        held = pose[:, None, None].expand(-1, 1, FRAMES_PER_LATENT, -1)
        conditions, maps = self._conditions(still, held), self._maps(held, pose)
        return DreamState(
            anchor=anchor,
            recent=anchor.new_zeros(b, r, *anchor.shape[1:]),
            conditions=torch.cat([conditions, conditions.new_zeros(b, r, conditions.shape[-1])], 1),
            arm_maps=torch.cat([maps, maps.new_zeros(b, r, *maps.shape[2:])], 1),
            pose=pose,
            keys=tuple(keys),
            chunks=(0,) * b,
            anchors=tuple(_name(frame, own) for frame, own in zip(frames.cpu(), pose, strict=True)),
            decoder=decoder,
            cache=tuple(cache) if self.context_cache == "rolling" else (),
        )

    @torch.no_grad()
    def imagine(self, state: DreamState, actions: Tensor) -> tuple[DreamState, Tensor]:
        """One chunk for every row: ``actions`` (B, K, A) in [-1, 1] -> next state, frames uint8 (B, K, H, W, 3)."""
        arch = self.transformer.arch
        actions = checked_actions(actions, (len(state), self.chunk_len, arch.action_dim))
        poses = self._integrate(state.pose, actions)
        split = (arch.chunk_latents, FRAMES_PER_LATENT)
        new_conditions = self._conditions(actions.unflatten(1, split), poses.unflatten(1, split))
        new_maps = self._maps(poses.unflatten(1, split), state.pose)
        new = state.anchor.new_empty(len(state), arch.chunk_latents, *state.anchor.shape[1:])
        cache = [torch.empty_like(x) for x in state.cache]
        light = replace(state, decoder=())  # large, and not needed to denoise
        lengths = [min(arch.context_latents, self._time(chunk) - 1) for chunk in state.chunks]
        for length in sorted(set(lengths)):  # rows whose contexts are equally long are denoised together
            rows = [i for i, n in enumerate(lengths) if n == length]
            index = torch.tensor(rows, device=new.device)
            part, conditions, maps = light[rows], new_conditions[index], new_maps[index]

            def denoise(
                some: slice, part: DreamState = part, c: Tensor = conditions, m: Tensor = maps, length: int = length
            ) -> tuple[Tensor, ...]:
                return self._denoise(part[some], c[some], m[some], length)

            new[index], *changed = self._by_rows(f"denoise after {length}", len(rows), denoise)
            for whole, some in zip(cache, changed, strict=True):
                whole[index] = some
        r = arch.context_latents
        nxt = replace(
            state,
            recent=torch.cat([state.recent, new], 1)[:, -r:],
            conditions=torch.cat(
                [state.conditions[:, :1], torch.cat([state.conditions[:, 1:], new_conditions], 1)[:, -r:]], 1
            ),
            arm_maps=torch.cat([state.arm_maps[:, :1], torch.cat([state.arm_maps[:, 1:], new_maps], 1)[:, -r:]], 1),
            pose=poses[:, -1],
            chunks=tuple(c + 1 for c in state.chunks),
            cache=tuple(cache),
        )

        def decode(rows: slice) -> tuple[Tensor, ...]:
            decoder, frames = self.autoencoder.decode_next(tuple(x[rows] for x in state.decoder), new[rows])
            return (frames, *decoder)

        frames, *decoder = self._by_rows("decode", len(state), decode)
        return replace(nxt, decoder=tuple(decoder)), frames

    def _by_rows(self, what: str, n: int, compute: Callable[[slice], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """``compute`` for all ``n`` rows. On a CPU in fp32, each row is bit-identical to the same row computed alone.

        CPU kernels may sum in another order for another batch size. At the first use of a batch size, the first and last
        row are compared with the same rows computed alone; if they differ on this machine, ``what`` is computed row by row
        from then on.
        """
        at_once = self.micro_batch_size or self._fitting
        if 0 < at_once < n:
            whole: tuple[Tensor, ...] = ()
            for first in range(0, n, at_once):
                size = min(at_once, n - first)

                def some(rows: slice, first: int = first, size: int = size) -> tuple[Tensor, ...]:
                    begin, end, _ = rows.indices(size)
                    return compute(slice(first + begin, first + end))

                parts = self._by_rows(what, size, some)
                whole = whole or tuple(part.new_empty(n, *part.shape[1:]) for part in parts)
                for i, target in enumerate(whole):
                    target[first : first + size] = parts[i]
                del parts  # before the next ones are allocated
            return whole
        everything = slice(None)
        weight = self.transformer.patch_embedding.weight
        if n == 1 or weight.device.type != "cpu" or weight.dtype != torch.float32:
            return compute(everything)
        if what not in self._rowwise:
            out = compute(everything)
            if (what, n) in self._verified:
                return out
            if all(
                torch.equal(batched[i : i + 1], alone)
                for i in (0, n - 1)
                for batched, alone in zip(out, compute(slice(i, i + 1)), strict=True)
            ):
                self._verified.add((what, n))
                return out
            self._rowwise.add(what)
        return tuple(torch.cat(rows) for rows in zip(*(compute(slice(i, i + 1)) for i in range(n)), strict=True))

    def _time(self, chunk: int) -> int:
        """Position of the first new latent frame at autoregressive step ``chunk``; the anchor's is 0."""
        return min(self.transformer.arch.chunk_latents * chunk + 1, self.config.max_time)

    def _denoise(self, state: DreamState, conditions: Tensor, maps: Tensor, valid: int) -> tuple[Tensor, ...]:
        """New latents (B, G, C, H, W) for rows that have ``valid`` recent frames, and the new rolling cache."""
        arch, c, device = self.transformer.arch, self.config, self.device
        r, shape = arch.context_latents, tuple(state.anchor.shape[1:])
        keys = [key.at(chunk=chunk) for key, chunk in zip(state.keys, state.chunks, strict=True)]
        names = [NoiseKey(a, chunk=k.chunk, draw=k.draw) for a, k in zip(state.anchors, keys, strict=True)]
        anchor_level = [c.anchor_noise(chunk) for chunk in state.chunks]
        level = torch.tensor(anchor_level, device=device).view(-1, 1, 1, 1)
        anchor = (1 - level) * state.anchor + level * keyed_normal(names, shape, ANCHOR_STREAM).to(device)
        recent = state.recent[:, r - valid :]
        eps = keyed_normal(keys, (r, *shape), CONTEXT_STREAM)[:, r - valid :].to(device)
        recent = (1 - c.context_noise) * recent + c.context_noise * eps
        rest = [0, *range(1 + r - valid, 1 + r)]
        context = Context(
            torch.cat([anchor[:, None], recent], 1),
            c.context_noise,
            anchor_level,
            names,
            state.conditions[:, rest],
            state.arm_maps[:, rest],
            [self._time(chunk) for chunk in state.chunks],
            state.cache,
        )
        evaluate = ChunkDenoiser(self.transformer, self._condition_cache, context, conditions, maps, self.context_cache)
        noise = keyed_normal(keys, (arch.chunk_latents, *shape), LATENT_STREAM).to(device)
        return sample_flow(evaluate, noise, c.num_inference_steps, c.shift), *evaluate.cache

    def _integrate(self, pose: Tensor, actions: Tensor) -> Tensor:
        """Commanded poses after each action: (B, P), (B, K, A) -> (B, K, P)."""
        if self._arm_map is None:
            return pose[:, None].expand(-1, actions.shape[1], -1)
        return self._arm_map.integrate(pose, actions)

    def _conditions(self, actions: Tensor, poses: Tensor) -> Tensor:
        """(B, F, 4, A), (B, F, 4, P) -> (B, F, D_c) on the model's device."""
        parts = [((actions - self._action_mid) / self._action_half).clamp(-1, 1)]  # as in training
        if self.transformer.arch.pose_dim:
            assert self._arm_map is not None
            parts.append(self._arm_map.normalise(poses))
        return torch.cat(parts, -1).flatten(2).to(self.device)

    def _maps(self, poses: Tensor, reference: Tensor) -> Tensor:
        """(B, F, 4, P) and the pose before the chunk (B, P) -> maps (B, F, C_m, H, W) on the model's device; C_m = 0
        without an arm map.
        """
        arch = self.transformer.arch
        _, h, w = arch.latent_shape
        if self._arm_map is None:
            return torch.zeros(*poses.shape[:2], 0, h, w, device=self.device)
        before = reference[:, None].expand(-1, poses.shape[1], -1)
        return draw_maps(self._arm_map, poses, before, (h, w), motion=arch.warp_last_frame).to(self.device)


def _name(frame: Tensor, pose: Tensor) -> int:
    """A 63-bit key of a start: equal for equal frames and poses."""
    digest = hashlib.sha256(frame.numpy().tobytes() + pose.numpy().tobytes()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
