"""Settings every test shares: a headless renderer, one thread, reproducible hypothesis runs, Ctrl-C as in a terminal."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "rawdream",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell's background jobs ignore it, and so do their children
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "rawdream"))


@pytest.fixture(autouse=True, scope="session")
def _one_torch_thread() -> None:
    """Small tensors on shared machines: more threads only slow the tests down."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def opengl():
    """Skips the test where the simulator cannot be drawn."""
    from rawdream_env.errors import RendererError
    from rawdream_env.piper.starts import SimStarts
    from rawdream_env.seeding import NoiseKey

    try:
        SimStarts().sample(NoiseKey(0))
    except RendererError as error:
        pytest.skip(f"no OpenGL here: {error}")
