"""The bundled judge behind the ``Judge`` protocol: checks, frame sampling, batches, decisions, saving and loading.

The network is in ``embedded_network``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rawdream_env.errors import CheckpointError
from rawdream_env.files import atomic_write_json, load_module, save_safetensors, sealed_folder
from rawdream_env.judges.base import (
    Timer,
    check_pairs,
    checked_fields,
    checked_frames,
    checked_instruction,
    invalid,
    read_config,
)
from rawdream_env.judges.embedded_network import EmbeddedJudgeConfig, JudgeNetwork, frame_indices
from rawdream_env.text import clean_instruction, tokenize
from rawdream_env.types import Outcome, UInt8Array, Verdict, Video

KIND = "rawdream.judge.embedded"
FORMAT = 1


class EmbeddedJudge:
    """The bundled classifier behind the ``Judge`` protocol. Deterministic; runs on the CPU in float32 by default.

    Args:
        network: the network, moved to ``device`` and put in evaluation mode.
        metadata: further content of config.json (data, steps, metrics).
        device: torch device.
        batch_size: videos per pass. Default: 32 on a GPU, and 1 on a CPU, where it is as fast and a verdict does not
            depend on what else is judged (CPU kernels sum in another order for another batch size).
        bf16: compute in bfloat16 autocast: nearly twice as fast on CPUs that support it, with probabilities that differ in
            the third decimal. Off by default, so that every machine gives the same verdicts.
    """

    def __init__(
        self,
        network: JudgeNetwork,
        *,
        metadata: Mapping[str, Any] | None = None,
        device: str | torch.device = "cpu",
        batch_size: int | None = None,
        bf16: bool = False,
    ) -> None:
        self.network = network.to(device).eval().requires_grad_(False)
        self.metadata = dict(metadata or {})
        self.device = torch.device(device)
        self.batch_size = batch_size or (1 if self.device.type == "cpu" else 32)
        self.bf16 = bf16

    @property
    def threshold(self) -> float:
        """Probability from which a clip counts as a success."""
        return self.network.config.threshold

    def __call__(self, videos: Sequence[Video], instructions: Sequence[str]) -> list[Verdict]:
        """One verdict per video, in order.

        A video with fewer than 2 frames, of the wrong dtype or shape or with values that are not finite, and an empty
        instruction, are INVALID with their reason. Only unequal lengths raise (``ValueError``).
        """
        check_pairs(videos, instructions)
        timer = Timer()
        verdicts: list[Verdict | None] = [None] * len(videos)
        chosen: list[tuple[int, UInt8Array, str]] = []
        for row, (video, instruction) in enumerate(zip(videos, instructions, strict=True)):
            frames, reason = checked_frames(video)
            reason = reason or checked_instruction(instruction)
            if frames is None or reason:
                verdicts[row] = invalid(reason, timer.seconds())
                continue
            chosen.append((row, frames, clean_instruction(instruction)))
        probabilities: list[float] = []
        for begin in range(0, len(chosen), self.batch_size):
            part = chosen[begin : begin + self.batch_size]
            probabilities += self._probabilities([frames for _, frames, _ in part], [text for _, _, text in part])
        for (row, _, _), probability in zip(chosen, probabilities, strict=True):
            verdicts[row] = self._verdict(probability, timer.seconds())
        return [verdict if verdict is not None else invalid("not judged") for verdict in verdicts]

    def frames_seen(self, total: int, fps: float) -> set[int]:
        """Six frames (``embedded_network``), and six of the video that ends ``hold`` frames earlier."""
        return {index for clip in self._clips(total) for index in clip}

    def _clips(self, total: int) -> list[list[int]]:
        """The frames of the clips that must look like a success: at the end of a video, and ``hold`` frames earlier."""
        hold = self.network.config.hold
        lengths = [total, total - hold] if hold and total - hold >= 2 else [total]
        return [frame_indices(length) for length in lengths]

    @torch.inference_mode()
    def _probabilities(self, videos: Sequence[UInt8Array], texts: Sequence[str]) -> list[float]:
        """The lowest probability of each video's clips, in one pass; frames that clips share are looked at once."""
        config = self.network.config
        pictures: list[Tensor] = []
        which: list[list[int]] = []
        owner: list[int] = []
        count = 0
        for number, video in enumerate(videos):
            clips = self._clips(len(video))
            seen = sorted({index for clip in clips for index in clip})
            which += [[count + seen.index(index) for index in clip] for clip in clips]
            owner += [number] * len(clips)
            pictures.append(resize_frames(video[seen], config.frame_size))
            count += len(seen)
        tokens = np.stack([tokenize(texts[number], max_len=config.text_len) for number in owner])[:, None]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            features = self.network.look_at(torch.cat(pictures)[None].to(self.device))
            logits, _ = self.network.answer(features, *(torch.as_tensor(x).to(self.device) for x in (tokens, which)))
        lowest = [1.0] * len(videos)
        for number, chance in zip(owner, torch.sigmoid(logits[:, 0].double()).tolist(), strict=True):
            lowest[number] = float(np.minimum(lowest[number], chance))  # NaN stays NaN
        return lowest

    def _verdict(self, probability: float, latency_s: float) -> Verdict:
        if not np.isfinite(probability):
            return invalid("the network's output is not finite", latency_s)
        success = probability >= self.threshold
        sign = ">=" if success else "<"
        reason = f"success probability {probability:.3f} {sign} threshold {self.threshold:.3f}"
        outcome = Outcome.SUCCESS if success else Outcome.FAILURE
        return Verdict(outcome, reason=reason, probability=probability, latency_s=latency_s)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write ``config.json`` and ``model.safetensors`` (each atomically) and return the folder."""
        path = Path(folder)
        tensors = {name: tensor.contiguous().cpu() for name, tensor in self.network.state_dict().items()}
        config = {"kind": KIND, "format": FORMAT, "model": asdict(self.network.config), "metadata": self.metadata}
        with sealed_folder(path):
            save_safetensors(path / "model.safetensors", tensors, {"kind": KIND, "format": str(FORMAT)})
            atomic_write_json(path / "config.json", config)
        return path

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str | torch.device = "cpu") -> EmbeddedJudge:
        """Load a folder written by ``save_pretrained``.

        Raises:
            CheckpointError: a file is missing or damaged, the kind or a field is unknown, or a tensor's name, shape or
                values do not fit.
        """
        path = Path(folder)
        content = read_config(path / "config.json", KIND, FORMAT)
        config = _model_config(content.get("model"), path / "config.json")
        network = load_module(lambda: JudgeNetwork(config), path / "model.safetensors")
        metadata = content.get("metadata")
        return cls(network, metadata=metadata if isinstance(metadata, dict) else {}, device=device)


def resize_frames(frames: UInt8Array, size: int) -> Tensor:
    """Frames (F, H, W, 3) uint8 -> (F, size, size, 3) uint8 by area interpolation, one at a time to save memory."""
    tensor = torch.from_numpy(np.ascontiguousarray(frames))
    if tensor.shape[1:3] == (size, size):
        return tensor
    scaled = [F.interpolate(frame.permute(2, 0, 1)[None].float(), size=(size, size), mode="area") for frame in tensor]
    return torch.cat(scaled).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def _model_config(content: Any, path: Path) -> EmbeddedJudgeConfig:
    if isinstance(content, dict):
        if content.get("pointers") is False:  # folders of an early version
            content = {name: value for name, value in content.items() if name != "pointers"}
        content = {"hold": 0} | content  # folders of earlier versions lack it
        if type(content["hold"]) is not int or not 0 <= content["hold"] <= 4096:
            raise CheckpointError(f"{path}: hold is {content['hold']!r}, expected a number of frames, at most 4096")
    return EmbeddedJudgeConfig(**checked_fields(content, EmbeddedJudgeConfig, path, but=("hold",)))
