"""The compiled scene, and the OpenGL contexts that draw it: one in each thread and process that asks for a picture."""

from __future__ import annotations

import atexit
import importlib
import os
import sys
import threading
import weakref
from copy import copy
from functools import lru_cache
from typing import Any, ClassVar

if sys.platform.startswith("linux") and not os.environ.get("DISPLAY") and "MUJOCO_GL" not in os.environ:
    os.environ["MUJOCO_GL"] = "egl"  # read once, when mujoco is imported
    if "mujoco" in sys.modules:  # another library was earlier
        importlib.reload(sys.modules[sys.modules["mujoco"].Renderer.__module__].gl_context)

import mujoco

from rawdream_env.errors import RendererError
from rawdream_env.piper.geometry import check_image_size
from rawdream_env.piper.simulator.model import scene_xml
from rawdream_env.types import UInt8Array


@lru_cache(maxsize=1)
def _compiled_model() -> Any:
    return mujoco.MjModel.from_xml_string(scene_xml())


def new_model() -> Any:
    """A private copy of the scene's ``mujoco.MjModel``."""
    return copy(_compiled_model())


_open_renderers: weakref.WeakSet[PiperRenderer] = weakref.WeakSet()


def _close_renderers() -> None:
    for renderer in list(_open_renderers):
        renderer.close()


@lru_cache(maxsize=1)
def _close_renderers_at_exit() -> None:
    """Contexts left open at exit would print tracebacks.

    mujoco ends OpenGL in an exit hook that it registers with the first context, and hooks run last in, first out: ours
    must be registered after that.
    """
    atexit.register(_close_renderers)


class PiperRenderer:
    """Draws the scene of any number of twins. OpenGL is opened at the first picture, once in each thread that draws: a context
    belongs to one thread, and a process forked from one that has opened OpenGL cannot use it.

    Copies and pickles carry the image size alone.
    """

    _opened_by: ClassVar[int | None] = None
    """The process that opened OpenGL first; a fork inherits its number."""

    def __init__(self, image_size: int = 64) -> None:
        check_image_size(image_size)
        self.image_size = image_size
        self._closed = False
        self._contexts = threading.local()  # a thread's context is freed when the thread ends

    def draw(self, data: Any) -> UInt8Array:
        """Picture uint8 (H, W, 3) of a twin's state.

        Raises:
            RendererError: no OpenGL on this machine, or it was opened before this process was forked.
        """
        if self._closed:
            raise RendererError("the renderer is closed; create a new PiperTwin or PiperWorkers.")
        if not hasattr(self._contexts, "renderer"):
            self._contexts.renderer = self._open()
        renderer = self._contexts.renderer
        renderer.update_scene(data, camera="camera")
        frame: UInt8Array = renderer.render().copy()
        return frame

    def _open(self) -> Any:
        opened_by = PiperRenderer._opened_by
        if opened_by not in (None, os.getpid()):
            raise RendererError(
                f"process {os.getpid()} was forked from process {opened_by} after that had opened OpenGL, which does not "
                "work in a fork; start it with spawn (AsyncVectorEnv: context='spawn'), or use num_workers."
            )
        try:
            renderer = mujoco.Renderer(new_model(), self.image_size, self.image_size)
        except Exception as error:  # each OpenGL backend fails in its own way
            raise RendererError(
                f"no OpenGL renderer with MUJOCO_GL={os.environ.get('MUJOCO_GL', 'unset')} "
                f"({type(error).__name__}: {str(error)[:200]}); install libegl1 (apt-get install libegl1 "
                "libgl1-mesa-dri) or libosmesa6, and set MUJOCO_GL=egl or osmesa before mujoco is imported."
            ) from error
        PiperRenderer._opened_by = os.getpid()
        _open_renderers.add(self)
        _close_renderers_at_exit()
        return renderer

    def close(self) -> None:
        """Free the OpenGL contexts. Closing again does nothing."""
        self._closed = True
        if PiperRenderer._opened_by in (None, os.getpid()):  # a fork must leave its parent's contexts alone
            self._contexts = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        """Without the contexts."""
        return {"image_size": self.image_size, "closed": self._closed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A renderer that has not drawn yet."""
        self.__init__(state["image_size"])  # type: ignore[misc]
        self._closed = state["closed"]
