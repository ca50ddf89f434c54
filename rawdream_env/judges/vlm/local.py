"""The same vision-language judge in this process: Qwen3-VL through transformers, without torchvision.

    judge = VLMLocalJudge.from_pretrained(VLMLocalConfig(model="models/Qwen3-VL-8B-Instruct"), device="cuda")

Prompt, frames and reader are those of ``vlm_server``, but the replies are not constrained, so a model that does not
follow the prompt gives INVALID verdicts. It judges one video at a time: the prompt is computed once, then ``votes``
replies are sampled from it in one batch. Every vote has its own generator, seeded by the judge's seed and the question,
so a verdict does not depend on what else is judged.

The video processor of transformers needs torchvision. For frames that are already chosen it only resizes to whole
patches, normalizes and cuts into patches; ``qwen_video`` does the same.

Shape letters: N frames (even), H W image size, P patches, L tokens, V votes.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rawdream_env.errors import CheckpointError, MissingDependencyError
from rawdream_env.files import read_json
from rawdream_env.judges.base import Timer, check_pairs, invalid
from rawdream_env.judges.verdict import verdict_of
from rawdream_env.judges.vlm import prompt
from rawdream_env.judges.vlm.config import VLMLocalConfig
from rawdream_env.resolve import hub_folder, is_hub_id
from rawdream_env.types import UInt8Array, Verdict, Video

MERGE = 2
PATCH = 16
_SIDE = PATCH * MERGE
_PIXELS = (4096, 25_165_824)
"""Minimum and maximum number of pixels of a video, if the checkpoint does not specify them."""
_MAX_ASPECT = 200


class VLMLocalJudge:
    """A loaded model behind the ``Judge`` protocol; see the module's docstring and :class:`VLMLocalConfig`.

    Args:
        model: a ``Qwen3VLForConditionalGeneration``.
        tokenizer: its tokenizer.
        config: votes, sampling, prompt and frames.
        pixels: minimum and maximum number of pixels of a video.
    """

    def __init__(self, model: Any, tokenizer: Any, config: VLMLocalConfig, pixels: tuple[int, int] = _PIXELS) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.config = config
        self.pixels = pixels
        self.prompt = prompt.load_prompt(config.prompt)
        ends = model.generation_config.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}
        self._lock = threading.Lock()  # the model stores position offsets between prompt and reply

    @classmethod
    def from_pretrained(cls, config: VLMLocalConfig, device: str = "cpu") -> VLMLocalJudge:
        """Load ``config.model``, a folder or "owner/name" of a Qwen3-VL checkpoint (safetensors; its code is not run).

        Raises:
            CheckpointError: the folder is missing, damaged, or of another architecture.
            MissingDependencyError: this transformers has no Qwen3-VL.
        """
        try:
            from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration
        except ImportError as error:
            raise MissingDependencyError(f"vlm_local needs transformers with Qwen3-VL ({error})") from error
        folder = hub_folder(config.model) if is_hub_id(config.model) else Path(config.model)
        kind = _json(folder / "config.json").get("model_type")
        if kind != "qwen3_vl":
            raise CheckpointError(f"{folder} is a checkpoint of {kind!r}; vlm_local reads 'qwen3_vl'.")
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            loaded: Any = Qwen3VLForConditionalGeneration.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=config.dtype, output_loading_info=True
            )
            model, loading = loaded
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder} cannot be loaded: {str(error).splitlines()[0][:300]}") from error
        if missing := sorted(loading["missing_keys"]):
            raise CheckpointError(f"{folder} lacks {len(missing)} tensors, {missing[0]} first; copy it again.")
        size = {}
        if (path := folder / "video_preprocessor_config.json").is_file():
            size = _json(path).get("size", {})
        pixels = (int(size.get("shortest_edge", _PIXELS[0])), int(size.get("longest_edge", _PIXELS[1])))
        return cls(model.to(config.device or device), tokenizer, config, pixels)

    def __call__(self, videos: Sequence[Video], instructions: Sequence[str]) -> list[Verdict]:
        """See :class:`Judge`."""
        check_pairs(videos, instructions)
        return [self._judge(video, text) for video, text in zip(videos, instructions, strict=True)]

    def frames_seen(self, total: int, fps: float) -> tuple[int, ...]:
        """``sample_fps`` a second, at most ``max_frames``."""
        return prompt.choose_indices(total, fps, self.config.sample_fps, self.config.max_frames)

    def _judge(self, video: Video, instruction: str) -> Verdict:
        timer = Timer()
        if reason := prompt.why_not_askable(instruction):
            return invalid(reason, timer.seconds())
        config = self.config
        sample, reason = prompt.sample_video(
            video, sample_fps=config.sample_fps, max_frames=config.max_frames, min_side=config.min_side
        )
        if sample is None:
            return invalid(reason, timer.seconds())
        try:
            with self._lock, torch.inference_mode():
                replies = self._replies(sample, instruction)
        except (RuntimeError, ValueError) as error:  # out of memory, an impossible aspect ratio
            return invalid(f"the model failed: {str(error).splitlines()[0][:300]}", timer.seconds())
        return verdict_of(replies, config.votes, config.need, timer.seconds())

    def _replies(self, sample: prompt.Sample, instruction: str) -> list[tuple[object, str]]:
        """``votes`` sampled replies with their finish reasons: "stop" or "length"."""
        config, device = self.config, self.model.device
        patches, grid = qwen_video(sample.frames, self.pixels)
        text = qwen_text(sample.timestamps, grid, instruction, self.prompt)
        tokens = self.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        logits, cache = self._read(tokens.to(device), patches.to(device), grid)
        seed = hashlib.sha256(f"{config.seed} {text}".encode() + sample.frames.tobytes()).digest()
        generators = [
            torch.Generator().manual_seed(
                int.from_bytes(hashlib.sha256(seed + bytes([vote % 256, vote // 256])).digest()[:7])
            )
            for vote in range(config.votes)
        ]
        cache.batch_repeat_interleave(config.votes)
        logits = logits.expand(config.votes, -1)
        written: list[list[int]] = [[] for _ in generators]
        open_votes = set(range(config.votes))
        for _ in range(config.max_tokens):
            chosen = self._sample(logits, generators)
            for vote in sorted(open_votes):
                if chosen[vote] in self._ends:
                    open_votes.remove(vote)
                else:
                    written[vote].append(chosen[vote])
            if not open_votes:
                break
            step = torch.tensor(chosen, device=device)[:, None]
            logits = self.model(input_ids=step, past_key_values=cache, use_cache=True).logits[:, -1]
        texts = self.tokenizer.batch_decode(written, skip_special_tokens=False)
        return [(text, "length" if vote in open_votes else "stop") for vote, text in enumerate(texts)]

    def _read(self, tokens: Tensor, patches: Tensor, grid: tuple[int, int, int]) -> tuple[Tensor, Any]:
        """Compute the prompt: logits (1, vocabulary) of the first token, and the key-value cache."""
        kinds = torch.zeros_like(tokens)
        kinds[tokens == self.model.config.video_token_id] = 2
        if int((kinds == 2).sum()) != math.prod(grid) // MERGE**2:
            raise ValueError(
                "the tokenizer lacks Qwen3-VL's <|video_pad|>; the checkpoint's files do not belong together"
            )
        output = self.model(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            pixel_values_videos=patches.to(self.model.dtype),
            video_grid_thw=torch.tensor([grid], device=tokens.device),
            mm_token_type_ids=kinds,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1], output.past_key_values

    def _sample(self, logits: Tensor, generators: Sequence[torch.Generator]) -> list[int]:
        """One token per vote."""
        values = logits.float().cpu()
        if self.config.temperature == 0:
            return [int(token) for token in values.argmax(dim=-1)]
        chances = torch.softmax(values / self.config.temperature, dim=-1)
        pairs = zip(chances, generators, strict=True)
        return [int(torch.multinomial(row, 1, generator=generator)) for row, generator in pairs]


def qwen_text(
    timestamps: Sequence[float],
    grid: tuple[int, int, int],
    instruction: str,
    template: prompt.Prompt = prompt.PLAIN,
) -> str:
    """The chat as Qwen3-VL reads it: the mean time of each pair of frames and the pair, then the question."""
    system = f"<|im_start|>system\n{template.system}<|im_end|>\n" if template.system else ""
    pads = "<|video_pad|>" * (grid[1] * grid[2] // MERGE**2)
    frames = "".join(
        f"<{(timestamps[i] + timestamps[i + 1]) / 2:.1f} seconds><|vision_start|>{pads}<|vision_end|>"
        for i in range(0, len(timestamps), 2)
    )
    return (
        f"{system}<|im_start|>user\n{frames}{prompt.question(instruction, template)}<|im_end|>\n<|im_start|>assistant\n"
    )


def qwen_video(frames: UInt8Array, pixels: tuple[int, int] = _PIXELS) -> tuple[Tensor, tuple[int, int, int]]:
    """Frames uint8 (N, H, W, 3) as patches float32 (P, 3 * 2 * 16 * 16) and their grid (N / 2, rows, columns).

    Patches are in the order in which the model merges them: 2 x 2 neighbors together. ``ValueError`` for an aspect ratio
    above 200.
    """
    count, height, width = frames.shape[:3]
    size = fitted_size(count, height, width, pixels)
    video = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
    if size != (height, width):
        video = F.interpolate(video, size=size, mode="bicubic", antialias=True, align_corners=False)
    values = (video.float() / 255.0 - 0.5) / 0.5
    t, h, w = count // 2, size[0] // PATCH, size[1] // PATCH
    cut = values.view(t, 2, 3, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH)
    return cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1), (t, h, w)


def fitted_size(count: int, height: int, width: int, pixels: tuple[int, int] = _PIXELS) -> tuple[int, int]:
    """Height and width as multiples of 32 pixels, so that the number of pixels of the video is within ``pixels``."""
    if max(height, width) > _MAX_ASPECT * min(height, width):
        raise ValueError(f"frames of {height}x{width} pixels are too long; at most {_MAX_ASPECT} to 1")
    if min(height, width) < _SIDE:
        scale = _SIDE / min(height, width)
        height, width = int(height * scale), int(width * scale)
    fitted = [round(side / _SIDE) * _SIDE for side in (height, width)]
    area, (least, most) = count * fitted[0] * fitted[1], pixels
    if area > most:
        beta = math.sqrt(count * height * width / most)
        fitted = [max(_SIDE, math.floor(side / beta / _SIDE) * _SIDE) for side in (height, width)]
    elif area < least:
        beta = math.sqrt(least / (count * height * width))
        fitted = [math.ceil(side * beta / _SIDE) * _SIDE for side in (height, width)]
    return fitted[0], fitted[1]


def _json(path: Path) -> dict[str, Any]:
    return read_json(path, "give the folder of a Qwen3-VL checkpoint")
