"""Wrappers around the vector environments, imported as ``rawdream_env.wrappers``.

| wrapper | what it does | needs |
|---|---|---|
| `DualNoiseVerification` | imagines every success again with fresh noise and flags those that do not repeat | a dream |
| `InstantReflector` | a reward at every chunk from a judge's probabilities, and an end when the task looks done | a judge |
| `Record` | one gif or mp4 per episode: dream, second dream, actions, verdict | - |
| `InstructionObservation` | puts the instruction into the observation, as text or word ids | - |
| `TokenActions` | the action space is the policy's action tokens | - |
| `FlatAction` | the action chunk is a vector | - |
| `ImageOnly` | the observation is the image alone | - |
| `TorchIO` | torch tensors in and out | torch |
| `SB3VecEnv` | a stable-baselines3 ``VecEnv`` | stable-baselines3 |
| `SB3TokenPolicy` | the bundled policy as a stable-baselines3 policy | stable-baselines3 |

The order matters once: `Record` goes outside `DualNoiseVerification` to see the second dream. Nothing heavy is
imported until a name is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rawdream_env.envs.verification import DualNoiseStatistics
    from rawdream_env.wrappers.dual_noise import DualNoiseVerification
    from rawdream_env.wrappers.instant_reflector import InstantReflector
    from rawdream_env.wrappers.instruction import InstructionObservation
    from rawdream_env.wrappers.record import Record
    from rawdream_env.wrappers.sb3 import SB3VecEnv
    from rawdream_env.wrappers.sb3_policy import SB3TokenPolicy
    from rawdream_env.wrappers.spaces import FlatAction, ImageOnly, TokenActions
    from rawdream_env.wrappers.torch_io import TorchIO

__all__ = [
    "DualNoiseStatistics",
    "DualNoiseVerification",
    "FlatAction",
    "ImageOnly",
    "InstantReflector",
    "InstructionObservation",
    "Record",
    "SB3TokenPolicy",
    "SB3VecEnv",
    "TokenActions",
    "TorchIO",
]

_HOME = {
    "DualNoiseStatistics": "dual_noise",
    "DualNoiseVerification": "dual_noise",
    "FlatAction": "spaces",
    "ImageOnly": "spaces",
    "InstantReflector": "instant_reflector",
    "InstructionObservation": "instruction",
    "Record": "record",
    "SB3TokenPolicy": "sb3_policy",
    "SB3VecEnv": "sb3",
    "TokenActions": "spaces",
    "TorchIO": "torch_io",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"rawdream_env.wrappers.{_HOME[name]}"), name)
    raise AttributeError(f"module 'rawdream_env.wrappers' has no attribute {name!r}; it has {', '.join(__all__)}.")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
