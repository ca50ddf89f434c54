"""Error and speed of the opt-in approximations on the bundled world model: drift from the exact dream, and changed verdicts.

The bundled policy acts in the exact dream from bundled starts (wide layout) for 25 chunks, three times the length of an
episode, so that drift becomes visible. Each option then imagines the same actions with the same noise. At chunks 1, 10 and
25: relative error of the newest latents, PSNR of the newest frames against the exact ones, and how often the judge's verdict
on the video so far changes. Reference: the difference between the exact dream and a second one with fresh noise. Speed: one
step with a full context, 8 rows, interleaved.
"""

from __future__ import annotations

import contextlib
from typing import Any

from benchmarks.common import ROUNDS, Result, embedded_models, interleave, ratio

MARKS = (1, 10, 25)
OPTIONS: dict[str, dict[str, Any]] = {
    "another draw": {"draw": 1},
    "rolling cache": {"approximations": ("rolling_cache",)},
    "3 evaluations": {"num_inference_steps": 3},
    "2 evaluations": {"num_inference_steps": 2},
    "1 evaluation": {"num_inference_steps": 1},
    "bfloat16": {"dtype": "bfloat16"},
}


def build(option: dict[str, Any]) -> Any:
    """The bundled world model with an option's settings; random weights if none is bundled."""
    import torch

    from rawdream_env.errors import CheckpointError
    from rawdream_env.world_models import load_world_model

    kept = {name: value for name, value in option.items() if name != "draw"}
    with contextlib.suppress(CheckpointError):
        return load_world_model("embedded-video", **kept)
    from dataclasses import replace

    from benchmarks.common import random_world_model

    model = random_world_model()
    model.context_cache = "rolling" if "rolling_cache" in kept.get("approximations", ()) else "step"
    model.config = replace(model.config, num_inference_steps=kept.get("num_inference_steps", 5))
    return model.to("cpu", getattr(torch, kept.get("dtype", "float32")))


def sample_starts(episodes: int) -> list[Any]:
    """Starts of the bundled wide pack, cycling through the tasks."""
    from rawdream_env.piper.starts import bundled_pack
    from rawdream_env.starts.pack import PackStarts

    pack = PackStarts(bundled_pack("wide"))
    by_task = [[i for i in range(len(pack)) if pack.task_ids[i] == t] for t in range(len(pack.task_names))]
    return [pack[by_task[e % len(by_task)][e // len(by_task)]] for e in range(episodes)]


def dream(model: Any, starts: list[Any], chunks: int, draw: int, actions: Any = None, policy: Any = None) -> Any:
    """(frames (B, 1 + 8 T, H, W, 3) uint8, the newest latents at each mark, actions (B, T, K, A))."""
    import numpy as np
    import torch

    from rawdream_env.seeding import NoiseKey

    keys = [NoiseKey(i, draw=draw) for i in range(len(starts))]
    first = torch.from_numpy(np.stack([s.frame for s in starts]))
    state = model.start(first, keys, torch.from_numpy(np.stack([s.proprio for s in starts])))
    videos, latents, taken = [first[:, None]], {}, []
    for chunk in range(chunks):
        if policy is not None:
            own = [key.at(chunk=chunk) for key in keys]
            chosen = policy.act(videos[-1][:, -1], [s.instruction for s in starts], temperature=0.5, keys=own).actions
        else:
            chosen = actions[:, chunk]
        taken.append(chosen)
        state, frames = model.imagine(state, chosen)
        videos.append(frames)
        if chunk + 1 in MARKS:
            latents[chunk + 1] = state.recent[:, -model.transformer.arch.chunk_latents :].float()
    return torch.cat(videos, 1).numpy(), latents, torch.stack(taken, 1)


def outcomes(judge: Any, videos: Any, starts: list[Any], chunk: int) -> list[int]:
    """The judge's verdicts on the videos up to ``chunk``."""
    from rawdream_env.types import Video

    seen = [Video(video[: 1 + 8 * chunk], 10.0) for video in videos]
    return [int(v.outcome) for v in judge(seen, [s.instruction for s in starts])]


def speeds(starts: list[Any], actions: Any) -> dict[str, dict[str, float]]:
    """Speed-up of a step with a full context for each option."""
    import numpy as np
    import torch

    from rawdream_env.seeding import NoiseKey

    def step_of(option: dict[str, Any]) -> Any:
        model = build(option)
        frames = torch.from_numpy(np.stack([s.frame for s in starts]))
        proprio = torch.from_numpy(np.stack([s.proprio for s in starts]))
        state = model.start(frames, [NoiseKey(i) for i in range(len(starts))], proprio)
        for chunk in range(4):
            state, _ = model.imagine(state, actions[:, chunk])
        return lambda: model.imagine(state, actions[:, 0])

    sides = {"exact": step_of({})} | {name: step_of(o) for name, o in OPTIONS.items() if "draw" not in o}
    times = interleave(sides, ROUNDS)
    return {name: ratio(times["exact"], side) for name, side in times.items() if name != "exact"}


def run(quick: bool = False) -> Result:
    """32 episodes of 25 chunks; when ``quick`` 4 episodes of 10."""
    import numpy as np
    import torch

    from rawdream_env.evaluation.world_model.metrics import PSNR_CAP_DB, psnr
    from rawdream_env.statistics import Rate

    _, judge, policy, trained = embedded_models()
    starts = sample_starts(4 if quick else 32)
    marks = [mark for mark in MARKS if not quick or mark <= 10]
    exact_videos, exact_latents, actions = dream(build({}), starts, marks[-1], 0, policy=policy)
    verdicts = {mark: outcomes(judge, exact_videos, starts, mark) for mark in marks}
    gains = speeds([starts[i % len(starts)] for i in range(8)], actions[[i % len(starts) for i in range(8)]])
    numbers: dict[str, Any] = {"trained_weights": trained, "threads": torch.get_num_threads(), "episodes": len(starts)}
    numbers["successes of the exact dream"] = {mark: sum(v == 1 for v in verdicts[mark]) for mark in marks}
    lines = [f"{len(starts)} episodes; relative latent error, PSNR, verdicts that change [Wilson 95 %]"]
    for name, option in OPTIONS.items():
        videos, latents, _ = dream(build(option), starts, marks[-1], option.get("draw", 0), actions=actions)
        found, said = {}, []
        for mark in marks:
            error = (latents[mark] - exact_latents[mark]).flatten(1).norm(dim=1)
            relative = float((error / exact_latents[mark].flatten(1).norm(dim=1)).mean())
            newest = slice(1 + 8 * (mark - 1), 1 + 8 * mark)
            decibel = float(np.minimum(psnr(videos[:, newest], exact_videos[:, newest]), PSNR_CAP_DB).mean())
            pairs = zip(verdicts[mark], outcomes(judge, videos, starts, mark), strict=True)
            flips = Rate.over(a != b for a, b in pairs)
            found[mark] = {"latent_error": relative, "psnr_db": decibel, "flips": flips.as_dict()}
            said.append(f"step {mark}: {relative:.3f}, {decibel:.1f} dB, {flips}")
        gain = gains.get(name)
        faster = f"{gain['median']:.2f}x, processor time {gain['processor_median']:.2f}x" if gain else "as fast"
        numbers[name] = {"speed": gain, "at": found}
        lines.append(f"{name} ({faster}): " + "; ".join(said))
    return Result("approximations", "report", None, lines, numbers)
