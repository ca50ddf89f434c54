"""The paper's baseline reward model: a VideoMAE classifier of 8-frame windows (appendix A.6).

A window of 8 frames and a task give a success probability. A video is scanned from its start, and the first window that
reaches the threshold makes it a success; as in the paper, the later frames do not count. Each task has a learned
embedding, so an instruction outside the training data is INVALID, never a guess.
``rawdream_env.trainers.judge.reward_model`` trains it on one to three demonstrations per task. The paper found such a
model far worse than a vision-language judge; it is included to reproduce that comparison.

The network is the ``VideoMAEModel`` of transformers, randomly initialized at a size that trains on a CPU in minutes, or
loaded from a local folder (such as a download of ``videomae-base``) and fine-tuned.

Shape letters: N windows, F frames of a video, H W image, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

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
from rawdream_env.judges.embedded import resize_frames
from rawdream_env.text import clean_instruction
from rawdream_env.types import Outcome, UInt8Array, Verdict, Video

KIND = "rawdream.judge.videomae"
FORMAT = 1
WINDOW = 8
"""Frames per window."""
STRICT_THRESHOLD, THRESHOLD = 0.9, 0.5
"""The paper's threshold on its demonstrations, and the one it used in reinforcement learning."""
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of VideoMAE's own preprocessing


@dataclass(frozen=True)
class VideoMAEJudgeConfig:
    """Size of the network, its tasks and the scan; stored in config.json."""

    tasks: tuple[str, ...]
    """Instructions of the tasks, in the order of the embedding."""
    image_size: int = 64
    """Frame size in pixels; other frames are resized by area interpolation."""
    patch_size: int = 16
    tubelet_size: int = 2
    hidden_size: int = 128
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    scan_stride: int = 4
    """Frames between windows; the last window is always included."""
    threshold: float = THRESHOLD
    """Probability from which a window is a success."""

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be built."""
        tasks = [clean_instruction(task).lower() for task in self.tasks]
        if not tasks or len(set(tasks)) != len(tasks) or not all(tasks):
            raise CheckpointError(f"tasks must be different instructions, at least one; got {list(self.tasks)}")
        if self.image_size % self.patch_size or WINDOW % self.tubelet_size or not 0 < self.threshold < 1:
            raise CheckpointError(
                f"inconsistent reward model: image_size {self.image_size} must be a multiple of patch_size "
                f"{self.patch_size}, {WINDOW} of tubelet_size {self.tubelet_size}; threshold {self.threshold} in (0, 1)"
            )
        if self.hidden_size % self.num_attention_heads:
            raise CheckpointError(
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {self.num_attention_heads}"
            )


class VideoMAENetwork(nn.Module):
    """Windows and task numbers to success logits.

    ``forward(windows (N, 8, H, W, 3) in [0, 255], tasks int64 (N,))`` returns (N,): the encoder's mean token,
    multiplied by the task's embedding, through one hidden layer.
    """

    def __init__(self, config: VideoMAEJudgeConfig, encoder: nn.Module | None = None) -> None:
        """``encoder``: a ``VideoMAEModel`` to use; None creates one with random weights."""
        super().__init__()
        if encoder is None:
            from transformers import VideoMAEModel

            encoder = VideoMAEModel(_transformers_config(config))
        self.config = config
        self.videomae = encoder
        self.norm = nn.LayerNorm(config.hidden_size)
        self.task = nn.Embedding(len(config.tasks), config.hidden_size)
        self.head = nn.Sequential(
            nn.Linear(2 * config.hidden_size, config.hidden_size), nn.GELU(), nn.Linear(config.hidden_size, 1)
        )

    def forward(self, windows: Tensor, tasks: Tensor) -> Tensor:
        """See the class."""
        pixels = windows.permute(0, 1, 4, 2, 3).float() / 255
        mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (_MEAN, _STD))
        tokens = self.videomae(pixel_values=(pixels - mean) / std).last_hidden_state
        seen, task = self.norm(tokens.mean(1)), self.task(tasks)
        # The product lets a task select features; from a concatenation alone this is learned slowly.
        out: Tensor = self.head(torch.cat([seen * task, task], dim=1))[:, 0]
        return out


def _transformers_config(config: VideoMAEJudgeConfig) -> Any:
    from transformers import VideoMAEConfig

    shared = ("image_size", "patch_size", "tubelet_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    sizes = {name: getattr(config, name) for name in (*shared, "num_attention_heads")}
    return VideoMAEConfig(**sizes, num_frames=WINDOW, use_mean_pooling=True)


def from_transformers(folder: str | Path, tasks: Sequence[str]) -> VideoMAENetwork:
    """A network around the encoder of a local transformers folder (config.json, model.safetensors); the head is new.

    Nothing is downloaded, and only safetensors are read. The window has 8 frames whatever the folder's configuration: the
    position embedding is a fixed table.

    Raises:
        CheckpointError: the folder does not contain a VideoMAE encoder that this judge supports.
    """
    from transformers import VideoMAEConfig, VideoMAEModel

    try:
        theirs = VideoMAEConfig.from_pretrained(str(folder), local_files_only=True)
        if theirs.model_type != "videomae" or not Path(folder, "model.safetensors").is_file():
            raise OSError("it needs a config.json of VideoMAE and a model.safetensors")
        names = [
            field.name for field in fields(VideoMAEJudgeConfig) if field.name.endswith(("size", "layers", "heads"))
        ]
        config = VideoMAEJudgeConfig(tasks=tuple(tasks), **{name: getattr(theirs, name) for name in names})
        load: Any = VideoMAEModel.from_pretrained  # its annotation does not know output_loading_info
        encoder, loading = load(
            str(folder), config=_transformers_config(config), local_files_only=True, use_safetensors=True,
            output_loading_info=True,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{folder} is no VideoMAE folder of transformers ({reason}); give one with config.json and model.safetensors."
        ) from error
    # A checkpoint made for fine-tuning pools in its classifier, so the encoder's own last norm may be absent there.
    missing = sorted(name for name in loading["missing_keys"] if not name.startswith("layernorm"))
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} tensors of the VideoMAE encoder, first {missing[0]}.")
    return VideoMAENetwork(config, encoder.float())


def scan_starts(num_frames: int, stride: int) -> list[int]:
    """First frames of the windows of a video, in order; the last window ends with the video."""
    last = max(0, num_frames - WINDOW)
    return sorted({*range(0, last + 1, stride), last})


class VideoMAEJudge:
    """The reward model behind the ``Judge`` protocol; deterministic.

    A verdict's ``probability`` is the highest among the windows; its ``reason`` names the frames of the first success.
    Videos shorter than 8 frames repeat their first frame.

    Args:
        network: the network, moved to ``device`` and put in evaluation mode.
        metadata: further content of config.json.
        device: torch device.
        batch_size: windows per pass.

    Attributes:
        scanning: True: a success ends the video, so a dream asks after every chunk by default.
    """

    scanning = True

    def __init__(
        self,
        network: VideoMAENetwork,
        *,
        metadata: Mapping[str, Any] | None = None,
        device: str | torch.device = "cpu",
        batch_size: int = 16,
    ) -> None:
        self.network = network.to(device).eval().requires_grad_(False)
        self.metadata = dict(metadata or {})
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.threshold = network.config.threshold
        self._tasks = {clean_instruction(task).lower(): i for i, task in enumerate(network.config.tasks)}

    def __call__(self, videos: Sequence[Video], instructions: Sequence[str]) -> list[Verdict]:
        """One verdict per video, in order. Only unequal lengths raise (``ValueError``)."""
        check_pairs(videos, instructions)
        return [self._judge(video, instruction) for video, instruction in zip(videos, instructions, strict=True)]

    def _judge(self, video: Video, instruction: str) -> Verdict:
        timer = Timer()
        frames, reason = checked_frames(video)
        reason = reason or checked_instruction(instruction)
        if frames is None or reason:
            return invalid(reason, timer.seconds())
        task = self._tasks.get(clean_instruction(instruction).lower())
        if task is None:
            return invalid(f"the reward model was not trained on {clean_instruction(instruction)!r}", timer.seconds())
        starts = scan_starts(len(frames), self.network.config.scan_stride)
        chances = self.window_probabilities(frames, task, starts)
        if not np.isfinite(chances).all():
            return invalid("the network's output is not finite", timer.seconds())
        best, passed = float(chances.max()), np.flatnonzero(chances >= self.threshold)
        if len(passed):
            first = starts[int(passed[0])]
            reason = f"frames {first} to {min(first + WINDOW, len(frames)) - 1} reach {chances[passed[0]]:.3f}"
            return Verdict(Outcome.SUCCESS, f"{reason} >= {self.threshold:.3f}", best, latency_s=timer.seconds())
        reason = f"no window of {WINDOW} frames reaches {self.threshold:.3f}, the best has {best:.3f}"
        return Verdict(Outcome.FAILURE, reason, best, latency_s=timer.seconds())

    @torch.inference_mode()
    def window_probabilities(self, frames: UInt8Array, task: int, starts: Sequence[int]) -> np.ndarray:
        """Success probability float64 (N,) of the windows of a video (F, H, W, 3) that begin at ``starts``."""
        if len(frames) < WINDOW:
            frames = np.concatenate([frames[:1].repeat(WINDOW - len(frames), axis=0), frames])
        small = resize_frames(frames, self.network.config.image_size)
        found = []
        for begin in range(0, len(starts), self.batch_size):
            part = starts[begin : begin + self.batch_size]
            windows = torch.stack([small[start : start + WINDOW] for start in part]).to(self.device)
            logits = self.network(windows, torch.full((len(part),), task, device=self.device))
            found.append(torch.sigmoid(logits.double()).cpu())
        return np.asarray(torch.cat(found).numpy(), dtype=np.float64)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write ``config.json`` and ``model.safetensors`` (each atomically) and return the folder."""
        path = Path(folder)
        model = {**asdict(self.network.config), "threshold": self.threshold}
        config = {"kind": KIND, "format": FORMAT, "model": model, "metadata": self.metadata}
        with sealed_folder(path):
            save_safetensors(
                path / "model.safetensors", self.network.state_dict(), {"kind": KIND, "format": str(FORMAT)}
            )
            atomic_write_json(path / "config.json", config)
        return path

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str | torch.device = "cpu") -> VideoMAEJudge:
        """Load a folder written by ``save_pretrained``.

        Raises:
            CheckpointError: a file is missing or damaged, the kind or a field is unknown, or a tensor does not fit.
        """
        path = Path(folder)
        content = read_config(path / "config.json", KIND, FORMAT)
        config = _model_config(content.get("model"), path / "config.json")
        network = load_module(lambda: VideoMAENetwork(config), path / "model.safetensors")
        metadata = content.get("metadata")
        return cls(network, metadata=metadata if isinstance(metadata, dict) else {}, device=device)


def _model_config(content: Any, path: Path) -> VideoMAEJudgeConfig:
    content = checked_fields(content, VideoMAEJudgeConfig, path, but=("tasks",))
    tasks = content["tasks"]
    if not isinstance(tasks, list) or len(tasks) > 4096 or not all(isinstance(task, str) for task in tasks):
        raise CheckpointError(f"{path}: tasks must be a list of at most 4096 instructions")
    return VideoMAEJudgeConfig(**{**content, "tasks": tuple(tasks)})
