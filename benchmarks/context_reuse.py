"""One autoregressive step with the context's keys and values computed once, against recomputing them at each
evaluation.

The outputs must be bit-identical (fp32, CPU): the reuse is not an approximation. Two timings: the denoiser alone, and all of
``imagine`` with the decoder, which costs both sides the same. The state is far enough into an episode that the context is
full.
"""

from __future__ import annotations

from typing import Any

from benchmarks.common import ROUNDS, Result, embedded_models, interleave, milliseconds, ratio

GOALS = {8: 2.3, 1: 1.5}


class Adapter:
    """The operations that this benchmark needs from a world model; adapt it to another model here."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def reuse(self, on: bool) -> None:
        """Enable or disable the reuse of the context's keys and values."""
        self.model.context_cache = "step" if on else "none"

    def full_state(self, batch: int) -> tuple[Any, Any]:
        """A state whose context is full, and a chunk of actions."""
        import torch

        from rawdream_env.seeding import NoiseKey

        generator = torch.Generator().manual_seed(0)
        frames = torch.randint(0, 256, (batch, *self.model.frame_shape), generator=generator, dtype=torch.uint8)
        proprio = torch.tensor([[0.3, 0.0, 0.2, 0.0, 0.0, 0.0, -1.0]]).repeat(batch, 1)
        state = self.model.start(frames, [NoiseKey(i) for i in range(batch)], proprio)
        actions = torch.rand(batch, self.model.chunk_len, 7, generator=generator) * 2 - 1
        for _ in range(4):
            state, _ = self.model.imagine(state, actions)
        return state, actions

    def without_decoder(self, batch: int) -> Any:
        """A stand-in for the decoder; assign it to ``model.autoencoder.decode_next`` to time the denoiser alone."""
        import torch

        frames = torch.zeros(batch, self.model.chunk_len, *self.model.frame_shape, dtype=torch.uint8)
        return lambda state, latents: (state, frames[: len(latents)])


def run(quick: bool = False) -> Result:
    """Time B = 8 and B = 1. ``quick`` changes nothing: seven rounds take seconds."""
    import torch

    model, _, _, trained = embedded_models()
    adapter = Adapter(model)
    lines, numbers, passed = [], {"trained_weights": trained, "threads": torch.get_num_threads()}, True
    for batch, goal in GOALS.items():
        state, actions = adapter.full_state(batch)

        def step(reuse: bool, state: Any = state, actions: Any = actions) -> Any:
            adapter.reuse(reuse)
            return model.imagine(state, actions)

        (fast_state, fast_frames), (slow_state, slow_frames) = step(True), step(False)
        identical = torch.equal(fast_frames, slow_frames) and torch.equal(fast_state.recent, slow_state.recent)
        sides = {"reuse": lambda: step(True), "recompute": lambda: step(False)}
        whole = interleave(sides, ROUNDS)
        decode = model.autoencoder.decode_next
        model.autoencoder.decode_next = adapter.without_decoder(batch)
        try:
            denoiser = interleave(sides, ROUNDS)
        finally:
            model.autoencoder.decode_next = decode
        gain, whole_gain = ratio(denoiser["recompute"], denoiser["reuse"]), ratio(whole["recompute"], whole["reuse"])
        fps = batch * model.chunk_len / whole["reuse"].best
        ok = bool(identical and gain["median"] >= goal)
        passed &= ok
        lines.append(
            f"B={batch}: denoiser {gain['min']:.2f}x min, {gain['median']:.2f}x median, goal {goal}x "
            f"(rounds {gain['lowest_round']:.2f} to {gain['highest_round']:.2f}; "
            f"processor time {gain['processor_median']:.2f}x): "
            f"{milliseconds(denoiser['recompute'])} -> {milliseconds(denoiser['reuse'])}; "
            f"whole step {whole_gain['median']:.2f}x, {fps:.0f} frames/s; "
            f"{'bit-identical' if identical else 'NOT IDENTICAL'}"
        )
        numbers[f"B={batch}"] = {
            "bit_identical": identical,
            "denoiser_ratio": gain,
            "whole_step_ratio": whole_gain,
            "frames_per_s": fps,
            "denoiser": {name: times.as_dict() for name, times in denoiser.items()},
            "whole_step": {name: times.as_dict() for name, times in whole.items()},
        }
    adapter.reuse(True)
    return Result("context_reuse", "denoiser >= 2.3x at B=8, >= 1.5x at B=1, bit-identical", passed, lines, numbers)
