"""RAW-Dream as Gymnasium environments: train robot policies inside a video world model.

Importing this package registers the environments and imports neither torch nor mujoco. Everything named in ``__all__``
is imported on first use.

    rawdream/PiperDream-v0   the Piper tabletop, imagined by the bundled world model and decided by the bundled judge
    rawdream/PiperSim-v0     the same tabletop in the simulator: same spaces, same infos, ground truth
    rawdream/PiperReal-v0    the real arm (extra ``piper``), or with ``fake=True`` a fake one: same spaces, same infos
    rawdream/Dream-v0        your own ``world_model=``, ``judge=`` and ``starts=``
    rawdream/LiberoGoalSim-v0, rawdream/LiberoGoalDream-v0, and Spatial, Object, Long, 90: the LIBERO suites
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import gymnasium as gym

import rawdream_env.libero  # (registers a robot and environments, like the next)
import rawdream_env.piper  # noqa: F401

if TYPE_CHECKING:
    from rawdream_env.envs.base import ChunkVectorEnv
    from rawdream_env.envs.dream import DreamVectorEnv
    from rawdream_env.envs.imagination import Replay
    from rawdream_env.envs.single import DreamEnv
    from rawdream_env.errors import RawDreamError
    from rawdream_env.piper.envs import PiperDreamEnv, PiperDreamVectorEnv, PiperSimEnv, PiperSimVectorEnv
    from rawdream_env.piper.real import PiperRealEnv, PiperRealVectorEnv
    from rawdream_env.robots import Robot, register_robot
    from rawdream_env.seeding import NoiseKey
    from rawdream_env.testing.check_vector_env import check_vector_env
    from rawdream_env.types import Outcome, Start, Trajectory, Verdict, Video

__all__ = [
    "ChunkVectorEnv",
    "DreamEnv",
    "DreamVectorEnv",
    "NoiseKey",
    "Outcome",
    "PiperDreamEnv",
    "PiperDreamVectorEnv",
    "PiperRealEnv",
    "PiperRealVectorEnv",
    "PiperSimEnv",
    "PiperSimVectorEnv",
    "RawDreamError",
    "Replay",
    "Robot",
    "Start",
    "Trajectory",
    "Verdict",
    "Video",
    "__version__",
    "check_vector_env",
    "register_robot",
]

_HOMES = {
    "ChunkVectorEnv": "envs.base",
    "DreamEnv": "envs.single",
    "DreamVectorEnv": "envs.dream",
    "NoiseKey": "seeding",
    "Outcome": "types",
    "PiperDreamEnv": "piper.envs",
    "PiperDreamVectorEnv": "piper.envs",
    "PiperRealEnv": "piper.real",
    "PiperRealVectorEnv": "piper.real",
    "PiperSimEnv": "piper.envs",
    "PiperSimVectorEnv": "piper.envs",
    "RawDreamError": "errors",
    "Replay": "envs.imagination",
    "Robot": "robots",
    "Start": "types",
    "Trajectory": "types",
    "Verdict": "types",
    "Video": "types",
    "check_vector_env": "testing.check_vector_env",
    "register_robot": "robots",
}

# No max_episode_steps here: gym.make would add a TimeLimit on top of the environments' own horizon, and a success
# at the horizon would then count as truncated too. The environments truncate themselves.
gym.register(
    id="rawdream/Dream-v0",
    entry_point="rawdream_env.envs.single:DreamEnv",
    vector_entry_point="rawdream_env.envs.dream:DreamVectorEnv",
)


def __getattr__(name: str) -> Any:
    """Public names, imported when first asked for."""
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("rawdream-env")
    elif name in _HOMES:
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Submodules already imported and all public names."""
    return sorted({*globals(), *__all__})
