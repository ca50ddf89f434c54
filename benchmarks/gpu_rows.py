"""The rows of ``benchmarks.gpu``: each is a function of the bench that returns its numbers and the lines to print."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from typing import Any

from benchmarks.common import Times, ratio
from benchmarks.device import NOMINAL, counting_syncs, matmul_rate, peak_memory, synchronize, timed
from benchmarks.gpu_models import (
    DiffusersBaseline,
    Size,
    compiled,
    full_context,
    random_codec,
    random_transformer,
    without_decoder,
    world_model,
)
from benchmarks.gpu_policy import openvla
from rawdream_env.world_models import flops

Found = tuple[dict[str, Any], list[str]]


class Bench:
    """Models, built at first use, and the remaining time."""

    def __init__(self, size: Size, device: str, deadline: float) -> None:
        import torch

        self.size, self.device, self.deadline, self.dtype = size, device, deadline, torch.bfloat16
        self.seconds_per_row: dict[int, float] = {}
        torch.manual_seed(0)  # this process is the script's own; the weights are drawn on the device

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def run(self, name: str) -> dict[str, Any]:
        """A row's numbers and lines, or the reason why it has none; ``status`` is "done", "skipped" or "failed"."""
        from rawdream_env.errors import NotEnoughMemoryError

        begin, (function, needs) = time.monotonic(), ROWS[name]
        out: dict[str, Any]
        if self.size.name == "full" and self.left() < needs:
            return {
                "status": "skipped",
                "reason": f"needs {needs} s, {max(self.left(), 0):.0f} s are left",
                "seconds": 0.0,
            }
        try:
            numbers, lines = function(self)
            out = {"status": "done", "numbers": numbers, "lines": lines}
        except (TimeoutError, NotEnoughMemoryError) as error:
            out = {"status": "skipped", "reason": str(error)}
        except Exception as error:  # one broken row must not hide the others
            out = {"status": "failed", "reason": f"{type(error).__name__}: {str(error)[:400]}"}
        gc.collect()
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.empty_cache()
        return {**out, "seconds": time.monotonic() - begin}

    def timed(self, sides: dict[str, Callable[[], Any]]) -> dict[str, Times]:
        """Interleaved timing on the device's clock, within the remaining time."""
        return timed(sides, self.device, budget=self.left)

    @cached_property
    def transformer(self) -> Any:
        """The eager one."""
        return random_transformer(self.size, self.device, self.dtype)

    @cached_property
    def codec(self) -> Any:
        """Wan's VAE."""
        return random_codec(self.size, self.device, self.dtype)

    @cached_property
    def fast(self) -> Any:
        """The compiled transformer."""
        return compiled(self.transformer, self.size)

    @cached_property
    def diffusers(self) -> DiffusersBaseline:
        """diffusers' own transformer."""
        return DiffusersBaseline(self.size, self.device, self.dtype, self.codec)

    @cached_property
    def peak(self) -> float:
        """Measured operations per second of a matrix product."""
        return matmul_rate(self.size.matmul, self.dtype, self.device)

    def context(self, rows: int, context_cache: str = "step", codec: Any = None) -> tuple[Any, Any]:
        """A state whose context is full, and actions, made by the eager model."""
        return full_context(world_model(self.transformer, codec or self.codec, context_cache), rows)

    def seconds(self, function: Callable[[], Any]) -> float:
        """Wall-clock seconds of one call; for compilation."""
        begin = time.monotonic()
        function()
        synchronize(self.device)
        return time.monotonic() - begin


def _fps(rows: int, chunk: int, times: Times) -> float:
    return rows * chunk / times.median


def _says(gain: dict[str, float]) -> str:
    low, high = gain["lowest_round"], gain["highest_round"]
    return f"{gain['min']:.2f}x min, {gain['median']:.2f}x median (rounds {low:.2f} to {high:.2f})"


def exact(bench: Bench) -> Found:
    """The exact step with compiled blocks: denoiser alone and whole, frames/s, share of the roofline, memory."""
    from rawdream_env.errors import NotEnoughMemoryError
    from rawdream_env.world_models.memory import GIB, module_bytes, require_memory, rollout_memory

    arch, model = bench.size.arch, world_model(bench.fast, bench.codec)
    decode = flops.decode_flops(bench.codec)
    numbers: dict[str, Any] = {"matmul_peak": bench.peak}
    lines = [
        f"matrix product {bench.peak / 1e12:.3g} TFLOP/s (nominal {NOMINAL / 1e12:.0f}); decoder "
        f"{decode / 1e12:.3g} TFLOP a row"
    ]
    for rows in bench.size.batches:
        parts = rollout_memory(arch, bench.codec, rows, rows, bench.dtype)
        estimate = sum(parts.values()) + module_bytes((bench.transformer, bench.codec), bench.dtype)
        try:
            require_memory(parts, bench.device, f"the exact step at B={rows}", "lower the batch")
            state, actions = bench.context(rows)

            def step(state: Any = state, actions: Any = actions) -> Any:
                return model.imagine(state, actions)

            compile_s = bench.seconds(step)
            with without_decoder(model):
                denoiser = bench.timed({"denoiser": step})["denoiser"]
            whole = bench.timed({"whole": step})["whole"]
            used = peak_memory(step, bench.device)
        except (TimeoutError, NotEnoughMemoryError) as error:
            lines.append(f"B={rows} skipped: {error}")
            continue
        denoise = flops.denoiser_flops(arch, 5, shared=max(rows // 8, 1))
        rates = {"denoiser": rows * denoise / denoiser.median, "whole": rows * (denoise + decode) / whole.median}
        bench.seconds_per_row[rows] = whole.median / rows
        numbers[f"B={rows}"] = {
            "frames_per_s": _fps(rows, model.chunk_len, whole),
            "denoiser_frames_per_s": _fps(rows, model.chunk_len, denoiser),
            "flops_per_s": rates,
            "share_of_measured_peak": {name: rate / bench.peak for name, rate in rates.items()},
            "share_of_nominal": {name: rate / NOMINAL for name, rate in rates.items()},
            "compile_s": compile_s,
            "peak_bytes": used,
            "estimated_bytes": estimate,
            "whole": whole.as_dict(),
            "denoiser": denoiser.as_dict(),
        }
        memory = "not measured" if used is None else f"{used / GIB:.1f} GiB"
        lines.append(
            f"B={rows}: {_fps(rows, model.chunk_len, whole):.1f} frames/s whole, "
            f"{_fps(rows, model.chunk_len, denoiser):.1f} denoiser alone; "
            f"{100 * rates['whole'] / bench.peak:.0f} % / {100 * rates['denoiser'] / bench.peak:.0f} % of the measured peak; "
            f"memory {memory}, estimated {estimate / GIB:.1f} GiB; compilation {compile_s:.1f} s"
        )
    return numbers, lines


def naive(bench: Bench) -> Found:
    """Against the same model, compiled and batched, that recomputes all frames at every evaluation."""
    rows = bench.size.batch
    models = {
        "compiled": world_model(bench.fast, bench.codec),
        "eager": world_model(bench.transformer, bench.codec),
        "recomputed": world_model(bench.fast, bench.codec, "none"),
    }
    state, actions = bench.context(rows)
    steps = {name: (lambda model=model: model.imagine(state, actions)) for name, model in models.items()}
    compile_s = bench.seconds(steps["recomputed"])
    ours, theirs = (steps[name]()[0].recent[:, -2:] for name in ("compiled", "recomputed"))
    difference = float((ours - theirs).norm() / theirs.norm())
    numbers: dict[str, Any] = {"compile_s": compile_s, "relative_difference": difference}
    lines = [f"B={rows}; compilation of the recomputing step {compile_s:.1f} s; relative difference {difference:.2g}"]
    for what in ("denoiser", "whole step"):
        if what == "denoiser":
            with without_decoder(models["compiled"]):  # the codec is shared
                times = bench.timed(steps)
        else:
            times = bench.timed(steps)
        gains = {name: ratio(times["recomputed"], times[name]) for name in ("compiled", "eager")}
        numbers[what] = gains["compiled"]
        numbers[f"{what}, ours eager"] = gains["eager"]
        numbers[f"{what}, times"] = {name: side.as_dict() for name, side in times.items()}
        lines.append(f"{what}: {_says(gains['compiled'])}; ours eager {_says(gains['eager'])}")
    return numbers, lines


def loop(bench: Bench) -> Found:
    """Against an eager loop over environments: diffusers' transformer over 9 frames, the window decoded."""
    import torch

    rows = bench.size.batch
    model, baseline = world_model(bench.fast, bench.codec), bench.diffusers
    state, actions = bench.context(rows)
    context = torch.cat([state.anchor[:, None], state.recent], 1)
    times = bench.timed({"ours": lambda: model.imagine(state, actions), "loop": lambda: baseline.one_by_one(context)})
    gain = ratio(times["loop"], times["ours"])
    fps = {name: _fps(rows, model.chunk_len, side) for name, side in times.items()}
    line = f"B={rows}: {_says(gain)}; {fps['loop']:.1f} -> {fps['ours']:.1f} frames/s"
    return {"ratio": gain, "frames_per_s": fps}, [line]


def host(bench: Bench) -> Found:
    """Against a re-implementation of what RLinf's Wan environment does, where episodes last 60 % of the longest."""
    rows = bench.size.batch
    model, baseline = world_model(bench.fast, bench.codec), bench.diffusers
    state, actions = bench.context(rows)
    frames = model.imagine(state, actions)[1][:, -5:]
    times = bench.timed({"ours": lambda: model.imagine(state, actions), "host": lambda: baseline.host_path(frames)})
    gain = ratio(times["host"], times["ours"])
    fps = {name: _fps(rows, model.chunk_len, side) for name, side in times.items()}
    useful = 0.6 * fps["host"]
    lines = [
        f"B={rows}, re-implementation of what RLinf's Wan environment does: {_says(gain)}; {fps['host']:.1f} frames/s, of "
        f"which {useful:.1f} of running episodes when lengths have mean/max 0.6; ours {fps['ours']:.1f}"
    ]
    return {"ratio": gain, "frames_per_s": fps, "useful_frames_per_s_at_0.6": useful}, lines


def options(bench: Bench) -> Found:
    """Opt-in approximations against the exact step; what they cost in quality is measured by ``approximations``."""
    from rawdream_env.world_models.wan.tiny_decoder import TinyDecoder, TinyDecoderCodec

    rows = bench.size.batch
    decoder = TinyDecoder(bench.size.arch.latent_shape[0], bench.size.tiny_widths)
    tiny = TinyDecoderCodec(bench.codec, decoder).to(bench.device, bench.dtype)
    models = {
        "exact": world_model(bench.fast, bench.codec),
        "rolling": world_model(bench.fast, bench.codec, "rolling"),
        "tiny": world_model(bench.fast, tiny),
        "rolling + tiny": world_model(bench.fast, tiny, "rolling"),
        **{f"{n} evaluations": world_model(bench.fast, bench.codec, "step", n) for n in (3, 2, 1)},
    }
    sides: dict[str, Callable[[], Any]] = {}
    for name, model in models.items():
        state, actions = bench.context(rows, model.context_cache, model.autoencoder)
        sides[name] = lambda model=model, state=state, actions=actions: model.imagine(state, actions)
    times = bench.timed(sides)
    numbers, lines = {}, [f"B={rows}"]
    for name, side in times.items():
        fps = _fps(rows, models[name].chunk_len, side)
        numbers[name] = {"frames_per_s": fps, "ratio": ratio(times["exact"], side)}
        lines.append(f"{name}: {fps:.1f} frames/s, {_says(numbers[name]['ratio'])} of exact")
    return numbers, lines


def decode(bench: Bench) -> Found:
    """A chunk decoded from the decoder's state against decoding its window of 9 latents."""
    import torch

    rows, codec = bench.size.batch, bench.codec
    latents = torch.randn(rows, 9, *codec.latent_shape, device=bench.device)
    state = codec.start_decoding(latents[:, 0])
    for first in (1, 3, 5):
        state, _ = codec.decode_next(state, latents[:, first : first + 2])
    sides = {
        "streamed": lambda: codec.decode_next(state, latents[:, 7:])[1],
        "window": lambda: bench.diffusers.decode(latents, 8),
    }
    difference = int((sides["streamed"]().int() - sides["window"]().int()).abs().max())
    times = bench.timed(sides)
    gain = ratio(times["window"], times["streamed"])
    line = f"B={rows}: {_says(gain)}; largest difference {difference} of 255 levels"
    return {"ratio": gain, "largest_difference": difference}, [line]


def environment(bench: Bench) -> Found:
    """Time that the environment adds to a step, and where the host waits for the device within it."""
    import numpy as np
    import torch

    from benchmarks.env_layer import InstantWorldModel
    from rawdream_env.envs.dream import DreamVectorEnv

    rows, side = bench.size.batch, bench.size.image_size
    world = InstantWorldModel(rows)
    world.frame_shape = (side, side, 3)
    world.frames = torch.zeros(rows, world.chunk_len, side, side, 3, dtype=torch.uint8, device=bench.device)
    env = DreamVectorEnv(
        rows,
        world_model=world,
        judge="none",
        starts="null",
        autoreset_mode="SameStep",
        device=bench.device,
        output="torch",
    )
    actions = np.zeros((rows, 8, 7), np.float32)
    env.reset(seed=0)
    times = bench.timed({"env": lambda: [env.step(actions) for _ in range(8)]})["env"]
    env.close()
    each = times.median / (8 * rows)
    model = world_model(bench.fast, bench.codec)
    state, moves = bench.context(rows)
    step = (
        bench.seconds_per_row.get(rows)
        or bench.timed({"step": lambda: model.imagine(state, moves)})["step"].median / rows
    )
    with counting_syncs(bench.device) as places:
        model.imagine(state, moves)
    found = Counter(places)
    cuda = bench.device.startswith("cuda")
    numbers = {
        "ms_per_environment_and_chunk": 1e3 * each,
        "share": each / step,
        "synchronisations": len(places) if cuda else None,
        "places": dict(found),
    }
    waits = ", ".join(f"{place} {count}x" for place, count in found.most_common(8)) or "none"
    lines = [
        f"B={rows}: {1e3 * each:.3f} ms per environment and chunk, {100 * each / step:.2f} % of a step",
        f"synchronisations in a step: {len(places)} ({waits})" if cuda else "synchronisations: counted on CUDA only",
    ]
    return numbers, lines


def modes(bench: Bench) -> Found:
    """Another mode of torch.compile; CUDA graphs are not tried."""
    rows, mode = bench.size.batch, "max-autotune-no-cudagraphs"
    models = {
        "default": world_model(bench.fast, bench.codec),
        mode: world_model(compiled(bench.transformer, bench.size, mode), bench.codec),
    }
    state, actions = bench.context(rows)
    sides = {name: (lambda model=model: model.imagine(state, actions)) for name, model in models.items()}
    compile_s = bench.seconds(sides[mode])
    gain = ratio(*(bench.timed(sides)[name] for name in ("default", mode)))
    line = f"B={rows}, {mode}: {_says(gain)} of the default mode; compilation {compile_s:.0f} s"
    return {"ratio": gain, "compile_s": compile_s}, [line]


ROWS: dict[str, tuple[Callable[[Bench], Found], float]] = {
    "exact": (exact, 60),
    "naive": (naive, 40),
    "loop": (loop, 30),
    "host": (host, 20),
    "options": (options, 30),
    "decode": (decode, 10),
    "environment": (environment, 10),
    "openvla": (openvla, 120),
    "modes": (modes, 240),
}
"""Rows in order of importance, with the minimum remaining seconds to start each."""
