"""The real Piper as an environment: the dream's and the simulator's spaces and infos, on hardware."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from rawdream_env.config import SeedLike, parse_autoreset_mode, parse_choice, parse_positive_int
from rawdream_env.envs.base import _UNSTARTED, ChunkResult, ChunkVectorEnv, Rows
from rawdream_env.envs.infos import Infos, objects, put
from rawdream_env.envs.reflector import Reflector
from rawdream_env.envs.single import SingleEnv
from rawdream_env.errors import ArmFaultError, CameraError, ClosedEnvironmentError, InvalidOptionError
from rawdream_env.judges import load_judge
from rawdream_env.judges.base import ask
from rawdream_env.piper import geometry as geo
from rawdream_env.piper.arm.camera import CameraView, read_frame
from rawdream_env.piper.arm.faults import DriverConfig, FaultKind
from rawdream_env.piper.arm.operator import Operator, TerminalOperator, TwinOperator, ask_operator
from rawdream_env.piper.arm.recording import ArmEpisode, ArmRecorder, Outcome
from rawdream_env.piper.envs import CHUNK_LEN, FPS
from rawdream_env.piper.starts import INSTRUCTIONS, TASK_LIST, TASK_NAMES, piper_task
from rawdream_env.seeding import NoiseKey
from rawdream_env.starts.base import TaskLike, seed_for
from rawdream_env.types import Float32Array, Judge, Start, SupportsClose, UInt8Array, Video

if TYPE_CHECKING:
    from rawdream_env.piper.arm.guard import Limits

PERIOD = 1.0 / FPS


class PiperRealVectorEnv(ChunkVectorEnv):
    """One Piper and its table: ``gym.make_vec("rawdream/PiperReal-v0", camera=...)``. Spaces and infos are those of
    ``PiperDreamVectorEnv`` and ``PiperSimVectorEnv``; docs/hardware.md has wiring, limits and faults.

    ``reset`` moves the arm home, asks the operator to arrange the scene and returns the first frame. ``step`` sends 8 actions
    at 10 Hz, each through the guard; between two steps the arm holds. Success is what ``success`` names: "operator" (asked at
    the end, or at once with a key), "judge" (at the end), or "both", where the operator decides and the judge is recorded
    beside. ``infos`` have both apart at the end of an episode, ``operator_verdict`` and ``judge_verdict`` (int8).

    A fault makes the arm hold and ends the episode: ``valid`` False, truncated, ``infos["fault"]`` has the sentence. The next
    ``reset`` asks the operator to remove its cause. Every episode is recorded, those with a fault as well
    (:mod:`rawdream_env.piper.arm.recording`).

    What the arm has done cannot be undone: after an error or Ctrl-C in a step or reset the arm holds, and the environment
    needs a reset. There is no replay, so dual-noise verification refuses this environment.

    ``fake=True`` puts the MuJoCo twin behind the manufacturer's SDK and a virtual CAN bus instead: no hardware, and by default
    no real time; the same seed gives the same frames.

    Raises on construction:
        InvalidOptionError: an option is out of its range. CanBusError: no CAN bus. MissingDependencyError: extra ``piper``.
    Raises at a reset:
        ArmFaultError: the arm is not ready, not home, or a fault remains.
    """

    robot = "piper"
    tasks = TASK_LIST

    def __init__(
        self,
        num_envs: int = 1,
        *,
        task: TaskLike = None,
        camera: Any = None,
        crop: str | Sequence[int] | None = None,
        channel: str = "can0",
        fake: bool = False,
        realtime: bool = False,
        layout: str = "narrow",
        operator: Operator | None = None,
        success: str = "operator",
        judge: Any = None,
        record: str | Path | None = "runs/piper_real",
        max_episode_steps: int = 8,
        max_frame_age: float = 0.25,
        autoreset_mode: str | AutoresetMode = "Disabled",
        image_size: int = 64,
        limits: Limits | None = None,
        driver: DriverConfig | None = None,
        device: str = "cpu",
        output: str = "numpy",
        render_mode: str | None = None,
        return_frames: bool = False,
        end_on_success: bool = True,
        reflector: Mapping[str, Any] | Reflector | None = None,
    ) -> None:
        """Connect to the arm. It is powered and moved by the first reset.

        Args:
            num_envs: 1; there is one arm.
            task: name, instruction or id of the task; None draws one per episode.
            camera: a name for ``rawdream_env.piper.arm.camera.open_camera``, whose frames are cropped and resized to
                ``image_size``; or a frame source: ``read() -> (frame (H, W, 3) uint8, time.monotonic() when it was taken)``
                and ``close()``, with frames of that size. It is closed with the environment.
            crop: left, top and side in pixels of the square of a named camera's picture, also as "80,0,480"; None: the largest
                square in the middle.
            channel: CAN interface.
            fake: the twin instead of arm and camera; ``channel`` and ``camera`` are not used.
            realtime: run a fake arm in real time, in a thread.
            layout: of the twin's scenes.
            operator: whom to ask; None: the terminal, or with ``fake`` the twin.
            success: "operator", "judge" or "both".
            judge: a judge, its name or its folder, for "judge" and "both".
            record: folder of the data set that gets every episode; None: nothing is recorded.
            max_episode_steps: time limit in chunks of 0.8 s.
            max_frame_age: age of a frame at which the arm stops (s).
            autoreset_mode: "Disabled"; an arm cannot reset itself.
            image_size: side of the frames in pixels.
            limits: of the guard.
            driver: speed, times and thresholds of the driver.
            device: device of torch observations.
            output: "numpy" or "torch" observations.
            render_mode: None, "rgb_array" or "rgb_tiles".
            return_frames: put every chunk's frames into ``infos["frames"]``.
            end_on_success: False continues episodes to their horizon.
            reflector: options of a ``Reflector`` (rewards at every chunk, predicted ends), or one; None: none.
        """
        if num_envs != 1:
            raise InvalidOptionError(f"num_envs={num_envs!r} must be 1: there is one arm.")
        if parse_autoreset_mode(autoreset_mode) != AutoresetMode.DISABLED:
            raise InvalidOptionError(
                f"autoreset_mode={autoreset_mode!r} must be 'Disabled': an arm cannot reset itself."
            )
        size = parse_positive_int("image_size", image_size)
        if not (fake or isinstance(camera, str) or callable(getattr(camera, "read", None))):
            raise InvalidOptionError(
                f"camera={camera!r} must be a name (/dev/video0, realsense, ...) or have read() and close(); or pass fake=True."
            )
        self.success = parse_choice("success", success, ("operator", "judge", "both"))
        if (judge is None) != (success == "operator"):
            raise InvalidOptionError(
                f"success={success!r} with judge={judge!r}: pass a judge with 'judge' and 'both' only."
            )
        super().__init__(
            1,
            frame_shape=(size, size, 3),
            chunk_len=CHUNK_LEN,
            fps=FPS,
            max_episode_steps=max_episode_steps,
            autoreset_mode=autoreset_mode,
            output=output,
            device=device,
            render_mode=render_mode,
            return_frames=return_frames,
            end_on_success=end_on_success,
            reflector=reflector,
        )
        self.task, self.layout = task, parse_choice("layout", layout, ("narrow", "wide"))
        self.max_frame_age = float(max_frame_age)
        if task is not None:
            piper_task(NoiseKey(0), task)
        from rawdream_env.piper.arm.station import Station

        self.judge: Judge | None = None if judge is None else load_judge(judge, device=device)
        self._owns_judge = isinstance(judge, str | Path)
        view = CameraView.of(size, crop)
        with ExitStack() as opened:
            self._recorder = None if record is None else ArmRecorder(record, FPS, size)
            if self._recorder is not None:
                opened.callback(self._recorder.close)
            self._station = Station(
                channel, camera, view, fake=fake, realtime=realtime, max_age=self.max_frame_age, limits=limits, config=driver
            )  # fmt: skip
            opened.pop_all()
        self.clock, self.driver, self.camera = self._station.clock, self._station.driver, self._station.camera
        self._bus: Any = self._station.bus
        if operator is None:
            operator = TwinOperator(self._bus.arm, TASK_NAMES, self.layout) if fake else TerminalOperator()
        self.operator: Operator = operator
        self.driver.add_check(FaultKind.CAMERA, self._camera_problem)
        self.driver.add_check(
            FaultKind.STOP, lambda: "An operator pressed the stop key." if self.operator.stop_requested() else None
        )
        self._episode: ArmEpisode | None = None
        self._frame_at: float | None = None
        self._verdicts: tuple[int, int] | None = None
        self._probability: float | None = None
        self._enabled = self._moved = self._closing = False
        self._fault, self._busy = "", threading.Lock()

    # ---- one call at a time --------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: SeedLike = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As :meth:`ChunkVectorEnv.reset`; ``ArmFaultError`` while a step or another reset is running."""
        with self._alone("reset"):
            return super().reset(seed=seed, options=options)

    def step(self, actions: Any) -> tuple[dict[str, Any], NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """As :meth:`ChunkVectorEnv.step`; ``ArmFaultError`` while a reset or another step is running."""
        with self._alone("step"):
            return super().step(actions)

    @contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise ArmFaultError(f"{what}() was called while the arm moves; wait until step() or reset() has returned.")
        try:
            yield
        except Exception as error:
            if self._closing and not isinstance(error, ClosedEnvironmentError):
                raise ClosedEnvironmentError(f"the environment was closed during {what}(); the arm holds.") from error
            raise
        finally:
            self._busy.release()

    # ---- episodes ------------------------------------------------------------------------------------------------------

    def _begin(self, rows: Rows, keys: Sequence[NoiseKey], given: Sequence[Start | None]) -> list[Start]:
        start, key = given[0], keys[0]
        seed, task = seed_for(key.seed, key.episode), piper_task(key, self.task)
        if start is not None:
            if not 0 <= start.task_id < len(TASK_NAMES):
                raise InvalidOptionError(
                    f"options['starts'][0] has task_id {start.task_id}; the arm has 4 tasks, 0 to 3."
                )
            seed, task = seed if start.seed is None else start.seed, start.task_id
        instruction = INSTRUCTIONS[task] if start is None else start.instruction
        self._abandon("reset was called")
        self._moved = True
        if not self._enabled:
            self.driver.enable()
            self._enabled = True
        if self.driver.fault is not None:
            ask_operator(self.operator, "clear", self.driver.fault.message)
            self.driver.clear_fault()
        home = self._home(seed, task, start)
        self._watched(lambda: self.driver.move_over(home))
        ask_operator(self.operator, "arrange", instruction, task, seed)
        self.clock.sleep(PERIOD)
        self._watched(lambda: self.driver.move_to(home))  # confirms that nobody has moved it
        self.clock.sleep(self.max_frame_age)  # frames from now on show the scene as it was arranged
        self._fault, self._verdicts, self._probability = "", None, None
        self._episode = ArmEpisode(instruction, task)
        frame, self._frame_at = self._see(), None  # nothing is watched until the arm moves again
        return [Start(frame.copy(), instruction, task, self.driver.pose.astype(np.float32), seed)]

    def _home(self, seed: int, task: int, start: Start | None) -> Any:
        """The commanded pose in which an episode begins."""
        if start is not None and start.proprio is not None:
            return start.proprio
        return self._bus.arm.home(seed, TASK_NAMES[task], self.layout) if self._bus is not None else geo.HOME_POSE

    def _advance(self, rows: Rows, actions: Float32Array, last: NDArray[np.bool_]) -> ChunkResult:
        assert self._episode is not None
        self._moved = True
        frames, verdict, judged = list[UInt8Array](), -1, bool(self._judged[0])
        try:
            self._watched(lambda: frames.extend(self._control(actions[0])))
            done = judged and self.success != "judge" and bool(ask_operator(self.operator, "done"))
            if judged and (last[0] or (done and self.end_on_success)):
                verdict = self._ask_success()
            elif done:
                verdict = 1
        except ArmFaultError as error:
            self._fault = str(error)
        except BaseException as error:
            self._end_episode(f"interrupted: {type(error).__name__}")
            raise
        if self._fault:
            frames = self._episode.frames[-CHUNK_LEN:]
            frames = [*frames, *frames[-1:] * (CHUNK_LEN - len(frames))]
            one = np.ones(1, bool)
            return ChunkResult(np.stack(frames)[None], np.full(1, -1, np.int8), ~one, one)
        return ChunkResult(np.stack(frames)[None], np.full(1, verdict, np.int8), np.ones(1, bool), np.zeros(1, bool))

    def _control(self, actions: Float32Array) -> list[UInt8Array]:
        """Send a chunk at 10 Hz; the frame after each action.

        Actions add up as in the simulator: what the guard cuts off one of them (a reversal takes it two commands) is asked for
        again with the next one of the chunk.
        """
        assert self._episode is not None
        frames, due = list[UInt8Array](), self.clock.now()
        wanted = self.driver.pose
        for action in actions:
            wanted = geo.integrate_action(wanted, action)
            sent = self.driver.send_action(geo.action_between(self.driver.pose, wanted))
            self._episode.act(action, sent.action, self.clock.now())
            if not frames:
                due = self.clock.now()  # the first action may have waited for the last hold
            due = max(due + PERIOD, self.clock.now() + 0.8 * PERIOD)
            self.clock.sleep(due - self.clock.now())
            frames.append(self._see())
            self._raise_fault()
        return frames

    def _raise_fault(self) -> None:
        if self.driver.fault is not None:
            raise ArmFaultError(self.driver.fault.message)

    def _watched(self, move: Any) -> None:
        """Move while keys and camera are watched; hold afterwards, whatever happens. Keys are watched while it holds, too."""
        ask_operator(self.operator, "watch", True)
        try:
            move()
        finally:
            self._frame_at = None
            self.driver.hold()

    def _see(self) -> UInt8Array:
        """The newest frame, recorded with the poses at its time; ``ArmFaultError`` without one."""
        assert self._episode is not None
        try:
            frame, taken = read_frame(self.camera, self._images.shape[1:])
            self._frame_at = taken
            problem = self._camera_problem()
        except CameraError as error:
            problem = str(error)
        if problem:
            self.driver.latch(FaultKind.CAMERA, problem)
            self._raise_fault()
        self._episode.see(frame, taken, self.driver.pose, self.driver.measured_pose)
        return frame

    def _camera_problem(self) -> str | None:
        """What the watchdog says about the camera while the arm moves."""
        taken = self._frame_at
        if taken is None or (age := self.clock.now() - taken) <= self.max_frame_age:
            return None
        return f"The newest frame of the camera is {age:.2f} s old: it is frozen or gone."

    def _ask_success(self) -> int:
        """The verdict at the end of an episode; operator and judge are recorded apart."""
        assert self._episode is not None
        operator, judge, instruction = -1, -1, self._episode.instruction
        if self.success != "judge":
            answer = ask_operator(self.operator, "success", instruction)
            operator = -1 if answer is None else int(answer)
            self._verdicts = operator, judge
        if self.judge is not None:
            [verdict] = ask(self.judge, [Video(np.stack(self._episode.frames), self.fps)], [instruction])
            judge, self._probability = int(verdict.outcome), verdict.probability
        self._verdicts = operator, judge
        return judge if self.success == "judge" else operator

    def _end_episode(self, fault: str) -> None:
        """Record the running episode, if there is one."""
        episode, self._episode = self._episode, None
        if episode is None:
            return
        try:
            if self._recorder is not None:
                operator, judge = self._verdicts or (-1, -1)
                steps, chance = len(episode.sent), self._probability
                outcome = Outcome(episode.instruction, episode.task_id, steps, operator, judge, chance, fault)
                self._recorder.write(episode, outcome)
        finally:
            ask_operator(self.operator, "watch", False)

    def _abandon(self, how: str) -> None:
        """Record an episode that will not be finished, and what could not be recorded before."""
        latched = "" if self.driver.fault is None else f"{self.driver.fault.message} "
        self._end_episode(f"{latched}abandoned: {how} before the episode was over")
        if self._recorder is not None:
            self._recorder.flush()

    # ---- the base's hooks ----------------------------------------------------------------------------------------------

    def _finish(self, rows: Rows) -> None:
        if len(rows):
            self._end_episode(self._fault)

    def _put_info(self, infos: Infos, rows: Rows, verdict: NDArray[np.int8], valid: NDArray[np.bool_]) -> None:
        super()._put_info(infos, rows, verdict, valid)
        if self._fault:
            put(infos, 1, "fault", rows, objects([self._fault]))
        if self._verdicts is not None:
            for name, value in zip(("operator_verdict", "judge_verdict"), self._verdicts, strict=True):
                put(infos, 1, name, rows, np.full(len(rows), value, np.int8))

    def _save(self) -> dict[str, Any]:
        self._moved = False
        return super()._save()

    def _restore(self, saved: dict[str, Any]) -> None:
        super()._restore(saved)
        if self._moved:  # the arm is not where it was: only a reset leads to a known state
            self._phase[:] = _UNSTARTED

    def close_extras(self, **kwargs: Any) -> None:
        """Record an unfinished episode, hold the arm, and let go of bus, camera and judge. The motors keep their power."""
        self._closing = True
        parts = [getattr(self, name, None) for name in ("_recorder", "reflector", "_station")]
        if getattr(self, "_owns_judge", False):
            parts.insert(0, self.judge)
        with ExitStack() as closing:  # each of them, whatever the others raise
            for part in parts:
                if isinstance(part, SupportsClose):
                    closing.callback(part.close)
            if getattr(self, "_episode", None) is not None:
                self._abandon("the environment was closed")


class PiperRealEnv(SingleEnv):
    """The real Piper; options of :class:`PiperRealVectorEnv`."""

    def _make(self, **kwargs: Any) -> ChunkVectorEnv:
        return PiperRealVectorEnv(**kwargs)
