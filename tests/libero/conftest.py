"""Tests of LIBERO need hf-libero, its assets (in RAWDREAM_LIBERO_ASSETS or in the package) and OpenGL."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rawdream_env.errors import MissingAssetsError, MissingDependencyError, RendererError
from rawdream_env.libero.install import find_assets, find_package, import_simulator
from rawdream_env.libero.workers import LiberoRows, SceneOptions

SIDE = 64
TASK = 7  # turn on the stove
SETTLE = 2


@pytest.fixture(scope="session")
def libero() -> object:
    """hf-libero's module of environments."""
    try:
        find_assets(find_package())
        return import_simulator()
    except (MissingDependencyError, MissingAssetsError) as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def group(libero) -> Iterator[LiberoRows]:
    """An open group: the scenes that it and other environments of this process build stay built."""
    rows = LiberoRows(SceneOptions("libero_goal", SIDE, 0, SETTLE, 2))
    try:
        rows.reset([0], [TASK], [0])
    except RendererError as error:
        pytest.skip(str(error))
    yield rows
    rows.close()
