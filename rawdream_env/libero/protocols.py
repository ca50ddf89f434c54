"""Evaluation protocols of LIBERO by name. Success rates of different protocols are not comparable.

They differ in how long an episode may last, how long objects settle before it, and which initial states are used. Results
record the protocol (``as_dict``); ``rawdream policy compare`` refuses to compare different ones.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from rawdream_env.config import parse_choice, parse_positive_int
from rawdream_env.errors import InvalidOptionError
from rawdream_env.libero import SUITES
from rawdream_env.seeding import mix

Split = Literal["train", "eval"]
_STATES = 1000
"""More than a task has initial states."""
SETTLE_ACTION = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
"""Carried out while objects settle: stand still, gripper open."""


@dataclass(frozen=True)
class Protocol:
    """How a policy is evaluated on one suite. An episode is a success if the goal holds after any of its control steps."""

    name: str
    suite: str
    horizon: int
    """Control steps of an episode (20 Hz), those of settling apart."""
    settle_steps: int = 10
    """Control steps before the first observation, in which the robot stands still."""
    trials: int = 50
    """Episodes of a task."""
    seed: int = 7
    """Seed of the policy's sampling."""
    scene_seed: int = 0
    """Seed of the simulator, which places what the initial states leave out: the furniture."""
    train_states: tuple[int, int] = (0, 25)
    """Initial states for training: the first, and the one after the last."""
    eval_states: tuple[int, int] = (0, 50)
    """Initial states for evaluation."""

    def chunks(self, chunk_len: int) -> int:
        """The horizon in chunks, rounded up; of the last chunk only the steps up to the horizon are carried out."""
        return -(-self.horizon // chunk_len)

    def scene(self, seed: int, split: Split) -> int:
        """The scene seed of an episode drawn with ``seed``: its last three digits are the number of the initial state."""
        first, end = self.eval_states if split == "eval" else self.train_states
        return seed // _STATES * _STATES + first + seed % (end - first)

    def trial(self, seed: int, task_id: int, index: int, split: Split) -> int:
        """The scene seed of episode ``index`` of a task in an evaluation: the initial states in order, each equally often."""
        first, end = self.eval_states if split == "eval" else self.train_states
        return mix(self.seed, seed, task_id, index) // _STATES * _STATES + first + index % (end - first)

    def changed(self, **changes: int | None) -> Protocol:
        """The protocol with other values, which is another one and says so in its name; None keeps a value."""
        new = {
            key: parse_positive_int(key, value, minimum=key == "horizon")
            for key, value in changes.items()
            if value is not None and value != getattr(self, key)
        }
        said = ", ".join(f"{key} {value}" for key, value in new.items())
        return replace(self, name=f"{self.name} with {said}", **new) if new else self  # type: ignore[arg-type]

    def as_dict(self) -> dict[str, Any]:
        """JSON, for results."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def state_number(scene_seed: int) -> int:
    """The number of the initial state of a scene, which its seed ends with."""
    return scene_seed % _STATES


_Horizons = tuple[int, int, int, int, int]
"""In the order of ``SUITES``: Spatial, Object, Goal, Long, 90."""
_PROTOCOLS: dict[str, tuple[_Horizons, dict[str, Any]]] = {
    # 50 episodes a task; the rest as OpenVLA-OFT, whose policy it trains. States 25 to 49 are never trained on.
    "raw-dream": ((220, 280, 300, 520, 400), {}),
    # The horizons are a little longer than the longest demonstrations.
    "openvla-oft": ((220, 280, 300, 520, 400), {}),
    # SimpleVLA-RL, verl/workers/rollout/rob_rollout.py. Trains in the simulator on the very states that it evaluates on.
    "simplevla": ((512, 512, 512, 512, 512), {"train_states": (0, 50)}),
    # RLinf, examples/embodiment/config/env/libero_*.yaml and rlinf/envs/libero/libero_env.py. Its configurations for
    # OpenVLA-OFT have 512 everywhere, those for pi0 480 on Long.
    "rlinf": ((240, 240, 320, 512, 512), {"settle_steps": 15, "seed": 0, "train_states": (0, 50)}),
    # LeRobot, src/lerobot/envs/libero.py and docs/source/libero.mdx; the seed is that of lerobot-eval.
    "lerobot": ((280, 280, 300, 520, 400), {"trials": 10, "seed": 1000}),
}
PROTOCOLS = tuple(_PROTOCOLS)
"""Names of the protocols."""


def find_protocol(name: str | Protocol, suite: str) -> Protocol:
    """The protocol called ``name`` for a suite; a ``Protocol`` of that suite is returned as it is.

    Raises:
        InvalidOptionError: no such protocol or suite, or the protocol is of another suite.
    """
    parse_choice("suite", suite, tuple(SUITES))
    if isinstance(name, Protocol):
        if name.suite != suite:
            raise InvalidOptionError(f"protocol {name.name!r} is of {name.suite}, the environment is of {suite}.")
        return name
    horizons, others = _PROTOCOLS[parse_choice("protocol", name, PROTOCOLS)]
    return Protocol(name, suite, horizons[list(SUITES).index(suite)], **others)
