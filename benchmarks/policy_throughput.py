"""Chunks per second that both policies act and learn on this machine: the bundled TinyVLA, and a tiny OpenVLA-OFT with LoRA.

The four sides take turns in every round. The tiny OpenVLA-OFT has the real one's tokens, sequence and image pipeline, and three
layers of width 64; its speed says nothing about the 7B model. It acts on frames that it has not seen, and learns on the same
frames, of which the features are kept.
"""

from __future__ import annotations

import tempfile
from typing import Any

from benchmarks.common import Result, embedded_models, interleave, ratio

ROWS = 16


def run(quick: bool = False) -> Result:
    """16 chunks per call (8 when ``quick``)."""
    import torch

    from rawdream_env.policies import load_policy
    from rawdream_env.seeding import NoiseKey
    from rawdream_env.testing.openvla_oft import write_tiny_openvla

    rows = ROWS // 2 if quick else ROWS
    with tempfile.TemporaryDirectory() as folder:
        openvla: Any = load_policy(write_tiny_openvla(folder))
    openvla.add_lora(32)
    texts, keys = ["put the cup into the pot"] * rows, [NoiseKey(i) for i in range(rows)]
    generator = torch.Generator().manual_seed(0)
    sides = {}
    for name, policy in (("TinyVLA", embedded_models()[2]), ("OpenVLA-OFT, tiny", openvla)):
        images = torch.randint(0, 256, (rows, 64, 64, 3), generator=generator, dtype=torch.uint8)
        tokens = policy.act(images, texts, temperature=1.0, keys=keys).tokens

        def act(policy: Any = policy, images: Any = images) -> None:
            for cache in ("feature_cache", "image_cache"):
                if hasattr(policy, cache):
                    getattr(policy, cache).clear()
            policy.act(images, texts, temperature=1.0, keys=keys)

        def learn(policy: Any = policy, images: Any = images, tokens: Any = tokens) -> None:
            policy.zero_grad(set_to_none=True)
            policy.logprobs(images, texts, tokens, temperature=1.0).sum().backward()

        sides |= {f"{name}, act": act, f"{name}, update": learn}
    times = interleave(sides)
    lines = [
        f"{name}: {rows / spent.median:.1f} chunks/s, {56 * rows / spent.median:.0f} tokens/s"
        for name, spent in times.items()
    ]
    shares = {name: ratio(times[f"{name}, update"], times[f"{name}, act"]) for name in ("TinyVLA", "OpenVLA-OFT, tiny")}
    lines += [f"{name}: an update takes {share['median']:.2f}x as long as acting" for name, share in shares.items()]
    return Result(
        "policy_throughput", "", None, lines, {"update_over_act": shares, **{n: t.as_dict() for n, t in times.items()}}
    )
