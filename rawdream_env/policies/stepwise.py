"""A policy of chunks, one action at a time."""

from __future__ import annotations

import numpy as np

from rawdream_env.seeding import NoiseKey
from rawdream_env.types import Float32Array, Policy, UInt8Array


class StepwisePolicy:
    """Looks at the frame at the first step of every chunk and gives out its actions one by one."""

    def __init__(self, policy: Policy, instruction: str, key: NoiseKey, temperature: float) -> None:
        self.policy, self.instruction, self.key, self.temperature = policy, instruction, key, temperature
        self.queue: list[Float32Array] = []
        self.chunk = 0

    def __call__(self, frame: UInt8Array) -> Float32Array:
        """The next action, float32 (A,)."""
        if not self.queue:
            keys = [self.key.at(chunk=self.chunk)]
            out = self.policy.act(frame[None], [self.instruction], temperature=self.temperature, keys=keys)
            self.queue = list(np.asarray(out.actions.detach().cpu(), np.float32)[0])
            self.chunk += 1
        return self.queue.pop(0)
