"""The frames of one chunk decoded from the decoder's state, against decoding the whole window again.

A window is the anchor and eight latents, 33 frames; a chunk is its last two, 8 frames. Wan's VAE at a small width with
random weights (speed does not depend on them) on the CPU; the last 8 frames must be equal to 1e-5 before rounding. A
window costs as much as 4 chunks and the anchor, so the speed-up is at most slightly above 4x.
"""

from __future__ import annotations

from typing import Any

from benchmarks.common import ROUNDS, Result, interleave, milliseconds, ratio

GOAL = 3.3
WINDOW, CHUNK, BATCH, SIZE, BASE_DIM = 9, 2, 2, 64, 16


def run(quick: bool = False) -> Result:
    """Time two rows. ``quick`` changes nothing: seven rounds take seconds."""
    import torch
    from diffusers import AutoencoderKLWan

    from rawdream_env.world_models.wan.vae import WanVAE

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        codec = WanVAE(AutoencoderKLWan(base_dim=BASE_DIM), SIZE)
        latents = torch.randn(BATCH, WINDOW, *codec.latent_shape)
    mean, std = (torch.tensor(codec.vae.config[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    window = latents.transpose(1, 2) * std + mean
    state, _ = codec.decode_pixels(codec.start_decoding(latents[:, 0]), latents[:, 1:-CHUNK])

    def streamed() -> Any:
        return codec.decode_pixels(state, latents[:, -CHUNK:])[1]

    def whole() -> Any:
        with torch.no_grad():
            return codec.vae.decode(window).sample

    difference = float((streamed() - whole()[:, :, -4 * CHUNK :]).abs().max())
    times = interleave({"streamed": streamed, "whole": whole}, ROUNDS)
    gain = ratio(times["whole"], times["streamed"])
    numbers: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "largest_difference": difference,
        "ratio": gain,
        "state_bytes_per_row": sum(tensor.nbytes for tensor in state) // BATCH,
        **{name: value.as_dict() for name, value in times.items()},
    }
    line = (
        f"B={BATCH}: {gain['min']:.2f}x min, {gain['median']:.2f}x median "
        f"(rounds {gain['lowest_round']:.2f} to {gain['highest_round']:.2f}; "
        f"processor time {gain['processor_median']:.2f}x): "
        f"{milliseconds(times['whole'])} -> {milliseconds(times['streamed'])}; largest difference {difference:.1g}"
    )
    goal = f"a chunk streamed >= {GOAL}x decoding its window, equal to 1e-5"
    return Result("streamed_decode", goal, difference <= 1e-5 and gain["median"] >= GOAL, [line], numbers)
