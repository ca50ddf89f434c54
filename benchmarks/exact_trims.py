"""Speed-up of each exact optimization of an autoregressive step: the step with and without it, interleaved.

- the anchor's keys and values once for rows that share a start (a group of GRPO), against once per row;
- the last block of the context pass stopped after its keys and values, against run to its end;
- the prompt's 512 rows collapsed to the two different ones, against all of them.

A small model of Wan's shape with random weights on the CPU, decoder left out; outputs must be equal (to rounding for the
prompt, whose sums are added in another order). The denoiser's rate is given as a share of the best matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from benchmarks.common import ROUNDS, Result, interleave, milliseconds, ratio
from benchmarks.device import matmul_rate
from rawdream_env.world_models import flops

BATCH, SIZE, STEPS = 8, 64, 5
TOLERANCE = 1e-5


def build(layers: int = 4, size: int = SIZE) -> Any:
    """A Wan of few layers and width 256, (size / 16)^2 tokens a frame, an empty prompt of 512 rows, ``size`` pixels."""
    import torch

    from rawdream_env.world_models.autoencoders import AutoencoderConfig, PackedFrameAutoencoder
    from rawdream_env.world_models.wan.config import WanConfig
    from rawdream_env.world_models.wan.rollout import RolloutConfig, WanWorldModel
    from rawdream_env.world_models.wan.transformer import WanWorldModelTransformer

    arch = WanConfig(
        latent_shape=(16, size // 8, size // 8), num_layers=layers, num_attention_heads=4, attention_head_dim=64,
        ffn_dim=1536, text_dim=64, text_rows=2, pose_dim=0, stem_channels=0, residual=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = WanWorldModelTransformer(arch)
        for parameter in transformer.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
        transformer.set_prompt(torch.cat([torch.randn(1, 64), torch.zeros(511, 64)]))
        codec = PackedFrameAutoencoder(AutoencoderConfig(image_size=size, widths=(16, 16)))
        return WanWorldModel(transformer, codec, RolloutConfig(num_inference_steps=STEPS, arm_map=None))


def whole_last_block(transformer: Any) -> Callable[..., Any]:
    """``run_blocks`` without stopping early."""
    run_blocks = transformer.run_blocks

    def run(*args: Any, keys_only: bool = False, **kwargs: Any) -> Any:
        return run_blocks(*args, **kwargs)

    return run


def every_prompt_row(transformer: Any) -> list[Any]:
    """Prompt keys and values of all 512 rows, as often as they occur."""
    import torch

    counts = transformer.prompt_counts.long()
    rows = transformer.condition_embedder.text_embedder(transformer.prompt_rows.repeat_interleave(counts, 0))
    return [block.attn2.prepare(rows, torch.ones(len(rows))) for block in transformer.blocks]


def run(quick: bool = False) -> Result:
    """Time 8 rows. ``quick`` changes nothing: seven rounds take seconds."""
    import torch

    from rawdream_env.seeding import NoiseKey

    model = build()
    generator = torch.Generator().manual_seed(0)
    frame = torch.randint(0, 256, (1, *model.frame_shape), generator=generator, dtype=torch.uint8)
    actions = torch.rand(BATCH, model.chunk_len, 7, generator=generator) * 2 - 1
    state = model.start(frame.expand(BATCH, -1, -1, -1), [NoiseKey(i) for i in range(BATCH)])
    for _ in range(3):  # a full context, the anchor still clean: its noise is keyed by the start
        state, _ = model.imagine(state, actions)
    apart = replace(state, anchors=tuple(range(BATCH)))
    frames = torch.zeros(BATCH, model.chunk_len, *model.frame_shape, dtype=torch.uint8)
    model.autoencoder.decode_next = lambda state, latents: (state, frames[: len(latents)])
    transformer, cache = model.transformer, model._condition_cache
    cache.time(0.0)
    whole, stopped = whole_last_block(transformer), transformer.run_blocks
    with torch.no_grad():
        collapsed, every_row = cache.prompt, every_prompt_row(transformer)

    def step(given: Any = state, blocks: Any = stopped, prompt: Any = collapsed) -> Any:
        transformer.run_blocks, cache._prompt = blocks, prompt
        return model.imagine(given, actions)[0].recent

    sides: dict[str, Callable[[], Any]] = {
        "trimmed": step,
        "an anchor per row": lambda: step(given=apart),
        "last block run to its end": lambda: step(blocks=whole),
        "512 prompt rows": lambda: step(prompt=every_row),
        "none of them": lambda: step(apart, whole, every_row),
    }
    reference = step()
    errors = {name: float((side() - reference).abs().max() / reference.abs().max()) for name, side in sides.items()}
    allowed = {"512 prompt rows": TOLERANCE, "none of them": TOLERANCE}
    equal = all(error <= allowed.get(name, 0.0) for name, error in errors.items())
    times = interleave(sides, ROUNDS)
    transformer.run_blocks, cache._prompt = stopped, collapsed

    lines, numbers = [], {"threads": torch.get_num_threads(), "errors": errors}
    for name, side in times.items():
        if name == "trimmed":
            continue
        gain = ratio(side, times["trimmed"])
        numbers[name] = {"ratio": gain, **side.as_dict()}
        lines.append(
            f"{name}: {gain['min']:.3f}x min, {gain['median']:.3f}x median of the trimmed step "
            f"(rounds {gain['lowest_round']:.2f} to {gain['highest_round']:.2f}); "
            + ("bit-identical" if errors[name] == 0 else f"relative difference {errors[name]:.1g}")
        )
    operations = BATCH * flops.denoiser_flops(transformer.arch, STEPS, dense=True, shared=BATCH)
    peak = matmul_rate(1024, torch.float32)
    rate = operations / times["trimmed"].best
    numbers |= {"trimmed": times["trimmed"].as_dict(), "flops": operations, "rate": rate, "matmul_peak": peak}
    lines.append(
        f"trimmed: {milliseconds(times['trimmed'])}, {rate / 1e9:.0f} GFLOP/s, {100 * rate / peak:.0f} % of the best "
        f"matrix product ({peak / 1e9:.0f} GFLOP/s)"
    )
    return Result("exact_trims", "equal outputs; report the gain of each", equal, lines, numbers)
