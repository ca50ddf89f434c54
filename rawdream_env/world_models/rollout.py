"""The world model as one object: autoencoder, transformer, keyed noise, autoregressive rollout (paper section 3.1,
A.3).

Each call of ``imagine`` makes G latent frames from the anchor and the most recent ones, wholly in latent space. The
context gets noise level 0.05 (t = 50 of 1000), drawn once per chunk, so its keys and values are the same at every
evaluation and are computed once. The anchor's level follows t(s) = min(10 * max(s - 3, 0), 300), which cures
first-frame ghosting.

Shape letters: B rows, K actions in a chunk, A action dims, R recent latent frames, G new ones, C H W latent frame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from rawdream_env.errors import InvalidActionError
from rawdream_env.seeding import NoiseKey, keyed_normal
from rawdream_env.world_models.arm_map import ArmMap, ArmMapConfig, draw_maps
from rawdream_env.world_models.autoencoders import FRAMES_PER_LATENT, PackedFrameAutoencoder
from rawdream_env.world_models.sampler import sample_flow
from rawdream_env.world_models.wan import KeyValues, WanWorldModelTransformer, frame_mask, rope_tables

LATENT_STREAM, CONTEXT_STREAM = 0, 1


@dataclass(frozen=True)
class RolloutConfig:
    """How the world model is rolled out; saved with the checkpoint."""

    fps: float = 10.0
    """Frames per second of the imagined video."""
    num_inference_steps: int = 5
    """Evaluations of the sampler per chunk; 1 is the named fast option (it returns the conditional mean)."""
    shift: float = 1.0
    """Flow shift of the sampler's noise levels."""
    context_noise: float = 0.05
    """Noise level of the recent context (t = 50 of 1000)."""
    anchor_noise_step: float = 0.01
    """Growth of the anchor's noise level per chunk after ``anchor_noise_start``."""
    anchor_noise_start: int = 3
    """Chunk index up to which the anchor is clean."""
    anchor_noise_max: float = 0.3
    """Largest noise level of the anchor."""
    max_time: int = 15
    """Largest distance in latent frames between the anchor and the first new frame that the positions express."""
    action_low: tuple[float, ...] = (-1.0,) * 7
    """q01 of the training actions; conditions are (action - low) / (high - low) * 2 - 1."""
    action_high: tuple[float, ...] = (1.0,) * 7
    """q99 of the training actions."""
    arm_map: ArmMapConfig | None = field(default_factory=ArmMapConfig)
    """The arm map, or None."""

    def anchor_noise(self, chunk: int) -> float:
        """Noise level of the anchor at autoregressive step ``chunk``."""
        return min(self.anchor_noise_step * max(chunk - self.anchor_noise_start, 0), self.anchor_noise_max)


@dataclass(frozen=True)
class DreamState:
    """B episodes in latent space. ``recent`` is right-aligned: only the last min(R, G * chunk) frames are valid."""

    anchor: Tensor  # (B, C, H, W)
    recent: Tensor  # (B, R, C, H, W)
    conditions: Tensor  # (B, R + 1, D_c): the anchor's first
    arm_maps: Tensor  # (B, R + 1, C_m, H, W): the anchor's first
    pose: Tensor  # (B, P) commanded pose, on the CPU
    keys: tuple[NoiseKey, ...]
    chunks: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, rows: Sequence[int] | np.ndarray | Tensor | slice) -> DreamState:
        """The chosen rows (indices, slice or boolean mask) as a state of their own."""
        index = np.arange(len(self))[rows.numpy() if isinstance(rows, Tensor) else rows]
        picked = torch.as_tensor(np.atleast_1d(index))
        return DreamState(
            **{name: getattr(self, name)[picked.to(getattr(self, name).device)] for name in _TENSORS},
            keys=tuple(self.keys[i] for i in picked.tolist()),
            chunks=tuple(self.chunks[i] for i in picked.tolist()),
        )

    @staticmethod
    def where(mask: Sequence[bool] | np.ndarray | Tensor, a: DreamState, b: DreamState) -> DreamState:
        """Row by row ``a`` where ``mask`` (B,) is true, else ``b``."""
        chosen = [bool(m) for m in mask]
        pick = torch.tensor(chosen)

        def mix(x: Tensor, y: Tensor) -> Tensor:
            return torch.where(pick.to(x.device).view(-1, *[1] * (x.dim() - 1)), x, y)

        return DreamState(
            **{name: mix(getattr(a, name), getattr(b, name)) for name in _TENSORS},
            keys=tuple(x if m else y for m, x, y in zip(chosen, a.keys, b.keys, strict=True)),
            chunks=tuple(x if m else y for m, x, y in zip(chosen, a.chunks, b.chunks, strict=True)),
        )

    @staticmethod
    def cat(states: Sequence[DreamState]) -> DreamState:
        """Join states along the rows."""
        return DreamState(
            **{name: torch.cat([getattr(s, name) for s in states]) for name in _TENSORS},
            keys=sum((s.keys for s in states), ()),
            chunks=sum((s.chunks for s in states), ()),
        )


_TENSORS = ("anchor", "recent", "conditions", "arm_maps", "pose")


class WanWorldModel:
    """Batched, keyed, autoregressive imagination behind the ``WorldModel`` protocol.

    On a CPU in fp32 row i is bit-identical whatever the other rows are; bf16 gives up that guarantee for speed.

    Args:
        transformer: the denoiser.
        autoencoder: frames to latents and back.
        config: rollout settings.
        reuse_context: compute the context's keys and values once per chunk; False recomputes all frames at each
            evaluation (same output; for benchmarks and tests).
    """

    def __init__(
        self,
        transformer: WanWorldModelTransformer,
        autoencoder: PackedFrameAutoencoder,
        config: RolloutConfig = RolloutConfig(),
        *,
        reuse_context: bool = True,
    ) -> None:
        self.transformer = transformer.eval().requires_grad_(False)
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.config = config
        self.reuse_context = reuse_context
        self.chunk_len = transformer.config.chunk_len
        size = autoencoder.config.image_size
        self.frame_shape = (size, size, 3)
        self.fps = config.fps
        if config.max_time <= transformer.config.context_latents:
            raise ValueError(
                f"max_time {config.max_time} must exceed context_latents {transformer.config.context_latents}"
            )
        self._arm_map = ArmMap(config.arm_map) if config.arm_map is not None else None
        self._rowwise = False
        self._verified: set[tuple[str, int]] = set()
        low, high = torch.tensor(config.action_low), torch.tensor(config.action_high)
        self._action_mid, self._action_half = (low + high) / 2, (high - low) / 2

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.transformer.patch_embedding.weight.device

    def to(self, device: str | torch.device, dtype: torch.dtype = torch.float32) -> WanWorldModel:
        """Move to a device and precision (in place); bf16 is the fast option on CPUs with AVX512-BF16 and on GPUs."""
        self.transformer.to(device, dtype)
        self.autoencoder.to(device, dtype)
        return self

    @torch.no_grad()
    def start(self, frames: Tensor, keys: Sequence[NoiseKey], proprio: Tensor | None = None) -> DreamState:
        """Begin B episodes. ``frames`` uint8 (B, H, W, 3); ``proprio`` (B, 7) commanded pose, needed with an arm
        map.
        """
        frames = torch.as_tensor(frames)
        if frames.shape[1:] != self.frame_shape or frames.dtype != torch.uint8:
            raise ValueError(
                f"start frames must be uint8 {('B', *self.frame_shape)}, got {frames.dtype} {tuple(frames.shape)}; "
                "resize them to the world model's frame_shape"
            )
        if len(keys) != len(frames):
            raise ValueError(f"{len(frames)} start frames but {len(keys)} noise keys")
        cfg = self.transformer.config
        if proprio is None:
            if cfg.pose_dim:
                raise ValueError(
                    "this world model draws the arm from its pose: give proprio (B, 7) with the start frames"
                )
            proprio = torch.zeros(len(frames), 7)
        pose = torch.as_tensor(proprio, dtype=torch.float32).cpu()
        frames = frames.to(self.device)
        anchor = self._by_rows("encode", len(frames), lambda rows: self.autoencoder.encode_image(frames[rows]))
        b, r = len(frames), cfg.context_latents
        still = torch.zeros(b, 1, FRAMES_PER_LATENT, cfg.action_dim)
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
        )

    @torch.no_grad()
    def imagine(self, state: DreamState, actions: Tensor) -> tuple[DreamState, Tensor]:
        """One chunk for every row: ``actions`` (B, K, A) in [-1, 1] -> next state, frames uint8 (B, K, H, W, 3)."""
        cfg = self.transformer.config
        actions = torch.as_tensor(actions, dtype=torch.float32).cpu()
        if actions.shape != (len(state), self.chunk_len, cfg.action_dim):
            raise InvalidActionError(
                f"actions must have shape {(len(state), self.chunk_len, cfg.action_dim)}, got {tuple(actions.shape)}"
            )
        if not torch.isfinite(actions).all():
            raise InvalidActionError("actions contain NaN or infinity; check the policy before stepping")
        poses = self._integrate(state.pose, actions)
        split = (cfg.chunk_latents, FRAMES_PER_LATENT)
        new_conditions = self._conditions(actions.unflatten(1, split), poses.unflatten(1, split))
        new_maps = self._maps(poses.unflatten(1, split), state.pose)
        new = state.anchor.new_empty(len(state), cfg.chunk_latents, *state.anchor.shape[1:])
        times = [self._time(chunk) for chunk in state.chunks]
        for time in sorted(set(times)):  # rows whose context has the same length and positions are denoised together
            rows = [i for i, t in enumerate(times) if t == time]
            index = torch.tensor(rows, device=new.device)
            part, conditions, maps = state[rows], new_conditions[index], new_maps[index]

            def denoise(
                some: slice, part: DreamState = part, c: Tensor = conditions, m: Tensor = maps, time: int = time
            ) -> Tensor:
                return self._denoise(part[some], c[some], m[some], time)

            new[index] = self._by_rows(f"denoise {time}", len(rows), denoise)
        r = cfg.context_latents
        nxt = replace(
            state,
            recent=torch.cat([state.recent, new], 1)[:, -r:],
            conditions=torch.cat(
                [state.conditions[:, :1], torch.cat([state.conditions[:, 1:], new_conditions], 1)[:, -r:]], 1
            ),
            arm_maps=torch.cat([state.arm_maps[:, :1], torch.cat([state.arm_maps[:, 1:], new_maps], 1)[:, -r:]], 1),
            pose=poses[:, -1],
            chunks=tuple(c + 1 for c in state.chunks),
        )
        frames = self._by_rows(
            "decode", len(state), lambda rows: self.autoencoder.decode_frames(new[rows].flatten(0, 1))
        )
        return nxt, frames.reshape(len(state), self.chunk_len, *self.frame_shape)

    def _by_rows(self, what: str, n: int, compute: Callable[[slice], Tensor]) -> Tensor:
        """``compute`` over all ``n`` rows such that, on a CPU in fp32, each row is what it would be alone.

        CPU kernels may sum in another order for another batch size. The first time a batch size is met its first and
        last rows are compared with those rows computed alone; if they differ on this machine, rows are computed one by
        one from then on.
        """
        everything = slice(None)
        weight = self.transformer.patch_embedding.weight
        if n == 1 or weight.device.type != "cpu" or weight.dtype != torch.float32:
            return compute(everything)
        if not self._rowwise:
            out = compute(everything)
            if (what, n) in self._verified:
                return out
            per_row = len(out) // n
            alone = all(torch.equal(out[i * per_row : (i + 1) * per_row], compute(slice(i, i + 1))) for i in (0, n - 1))
            if alone:
                self._verified.add((what, n))
                return out
            self._rowwise = True
        return torch.cat([compute(slice(i, i + 1)) for i in range(n)])

    def _time(self, chunk: int) -> int:
        """Position of the first new latent frame at autoregressive step ``chunk``; the anchor's is 0."""
        return min(self.transformer.config.chunk_latents * chunk + 1, self.config.max_time)

    def _denoise(self, state: DreamState, conditions: Tensor, maps: Tensor, time: int) -> Tensor:
        """New latents (B, G, C, H, W) at position ``time`` for rows whose context is equally long."""
        model, cfg, c = self.transformer, self.transformer.config, self.config
        b, device = len(state), self.device
        valid = min(cfg.context_latents, time - 1)
        keys = [key.at(chunk=chunk) for key, chunk in zip(state.keys, state.chunks, strict=True)]
        shape = tuple(state.anchor.shape[1:])
        keep = slice(cfg.context_latents - valid, None)
        context = torch.cat([state.anchor[:, None], state.recent[:, keep]], 1)
        level = torch.full((b, 1 + valid), c.context_noise)
        level[:, 0] = torch.tensor([c.anchor_noise(chunk) for chunk in state.chunks])
        level = level.to(device)
        mixed = level[..., None, None, None]
        eps = keyed_normal(keys, (cfg.context_latents + 1, *shape), CONTEXT_STREAM)
        eps = torch.cat([eps[:, :1], eps[:, 1:][:, keep]], 1).to(device)
        context = (1 - mixed) * context + mixed * eps
        noise = keyed_normal(keys, (cfg.chunk_latents, *shape), LATENT_STREAM).to(device)
        last = context[:, -1:].expand(-1, cfg.chunk_latents, -1, -1, -1)
        rest = [0, *range(1 + cfg.context_latents - valid, 1 + cfg.context_latents)]
        evaluate = _ChunkDenoiser(
            model, context, level, state.conditions[:, rest], state.arm_maps[:, rest], last, conditions, maps,
            time, self.reuse_context,
        )  # fmt: skip
        return sample_flow(evaluate, noise, c.num_inference_steps, c.shift)

    def _integrate(self, pose: Tensor, actions: Tensor) -> Tensor:
        """Commanded poses after each action: (B, P), (B, K, A) -> (B, K, P)."""
        if self._arm_map is None:
            return pose[:, None].expand(-1, actions.shape[1], -1)
        return self._arm_map.integrate(pose, actions)

    def _conditions(self, actions: Tensor, poses: Tensor) -> Tensor:
        """(B, F, 4, A), (B, F, 4, P) -> (B, F, D_c) on the model's device."""
        parts = [(actions - self._action_mid) / self._action_half]
        if self.transformer.config.pose_dim:
            assert self._arm_map is not None
            parts.append(self._arm_map.normalise(poses))
        return torch.cat(parts, -1).flatten(2).to(self.device)

    def _maps(self, poses: Tensor, reference: Tensor) -> Tensor:
        """(B, F, 4, P) and the pose before the chunk (B, P) -> maps (B, F, C_m, H, W) on the model's device; C_m = 0
        without an arm map.
        """
        cfg = self.transformer.config
        _, h, w = cfg.latent_shape
        if self._arm_map is None:
            return torch.zeros(*poses.shape[:2], 0, h, w, device=self.device)
        before = reference[:, None].expand(-1, poses.shape[1], -1)
        return draw_maps(self._arm_map, poses, before, (h, w), carry=cfg.carry).to(self.device)


class _ChunkDenoiser:
    """Clean-sample estimate of one chunk at a noise level, with the context computed once (or, to compare, each
    time).
    """

    def __init__(
        self, model: WanWorldModelTransformer, context: Tensor, context_level: Tensor, context_conditions: Tensor,
        context_maps: Tensor, last: Tensor, conditions: Tensor, maps: Tensor, time: int, reuse: bool,
    ) -> None:  # fmt: skip
        cfg = model.config
        self.model, self.last, self.conditions, self.maps, self.reuse = model, last, conditions, maps, reuse
        self.context = (context, None, context_maps, context_level, context_conditions)
        n, g = context.shape[1], cfg.chunk_latents
        grid = (cfg.latent_shape[1] // cfg.patch_size, cfg.latent_shape[2] // cfg.patch_size)
        times = torch.cat([torch.zeros(1), torch.arange(time - n + 1, time + g)]).long().to(context.device)
        rope = rope_tables(times, grid, cfg.attention_head_dim)
        split = n * cfg.tokens_per_frame
        self.rope_all = rope
        self.rope_context = (rope[0][:split], rope[1][:split])
        self.rope_new = (rope[0][split:], rope[1][split:])
        causal = torch.ones(n + g, n + g, dtype=torch.bool, device=context.device).tril()
        self.mask_all = frame_mask(causal, cfg.tokens_per_frame)
        self.mask_context = self.mask_all[:split, :split]
        self.mask_new = self.mask_all[split:]
        self.keys_values: KeyValues | None = None
        if reuse:
            tokens, _, _, modulation = model.embed(*self.context)
            _, self.keys_values = model.run_blocks(tokens, modulation, self.rope_context, self.mask_context)

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        level = torch.full(x.shape[:2], sigma, device=x.device)
        tokens, stem, vector, modulation = self.model.embed(x, self.last, self.maps, level, self.conditions)
        if self.reuse:
            tokens, _ = self.model.run_blocks(tokens, modulation, self.rope_new, self.mask_new, self.keys_values)
        else:
            before, _, _, before_modulation = self.model.embed(*self.context)
            joint, joint_modulation = torch.cat([before, tokens], 1), torch.cat([before_modulation, modulation], 1)
            joint, _ = self.model.run_blocks(joint, joint_modulation, self.rope_all, self.mask_all)
            tokens = joint[:, before.shape[1] :]
        out = self.model.predict(tokens, stem, vector, self.last)
        return out if self.model.config.residual else x - sigma * out
