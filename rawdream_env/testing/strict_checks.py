"""Further guarantees of this package's environments: independent rows, partial resets, invalid actions refused."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode

from rawdream_env.testing.probe import Call, FailedCheckError, Probe, SkippedCheckError, mode_of, reset, step
from rawdream_env.testing.trees import difference
from rawdream_env.testing.vector_checks import compare

_OWN_ROW = "Let a row's draws depend on its own seed and episode alone, and its arithmetic on its own data alone."


def check_row_independence(probe: Probe) -> None:
    """Row i does not depend on ``num_envs``."""
    largest = max(probe.sizes)
    if largest == 1:
        raise SkippedCheckError("only num_envs=1 is checked")
    with probe.env(largest) as env:
        reference = probe.rollout(env)
    for size in probe.sizes:
        if size == largest:
            continue
        with probe.env(size) as env:
            calls = probe.rollout(env)
        compare(
            calls, reference, f"between num_envs={size} and num_envs={largest}", _OWN_ROW, [(r, r) for r in range(size)]
        )


def check_neighbours(probe: Probe) -> None:
    """Other actions or seeds of the other rows leave row 0 alone."""
    _need_rows(probe)
    with probe.env() as env, probe.env() as twin:
        n = env.num_envs
        calls = probe.rollout(env)
        seeds = [probe.seed, *(probe.seed + 1000 + row for row in range(1, n))]
        others = probe.rollout(twin, seed=seeds, rows=[0, *range(n, 2 * n - 1)])
        compare(calls, others, "when the other rows have other seeds and actions", _OWN_ROW, [(0, 0)])


def check_row_seeds(probe: Probe) -> None:
    """An integer seed s means s + i for row i, and a list gives each row its own."""
    with probe.env() as env, probe.env() as twin:
        n = env.num_envs
        advice = "reset(seed=s) gives row i the seed s + i; reset(seed=[...]) gives each row its own."
        calls = probe.rollout(env)
        compare(
            calls,
            probe.rollout(twin, seed=[probe.seed + row for row in range(n)]),
            "between seed=s and seed=[s, s+1, ...]",
            advice,
        )
        order = list(reversed(range(n)))
        swapped = probe.rollout(twin, seed=[probe.seed + row for row in order], rows=order)
        compare(
            calls,
            swapped,
            "when seeds and actions of the rows are reversed",
            advice,
            list(zip(range(n), order, strict=True)),
        )


def check_partial_reset(probe: Probe) -> None:
    """``options={"reset_mask": ...}`` resets the rows named, only those, and does not change the caller's options."""
    _need_rows(probe)
    with probe.env() as env, probe.env() as twin:
        n, script = env.num_envs, probe.script(env)
        before = reset(env, seed=probe.seed)
        reset(twin, seed=probe.seed)
        steps = 0
        for t in range(2):
            before = step(env, script.batch(range(n), t))
            step(twin, script.batch(range(n), t))
            steps = t + 1
            if before.done.any():
                break
        mask = np.zeros(n, dtype=np.bool_)
        mask[1::2] = True
        mask |= before.done if mode_of(env) == AutoresetMode.DISABLED else False
        options = {"reset_mask": mask.copy()}
        call = reset(env, seed=probe.seed + 50, options=options)
        if difference(options, {"reset_mask": mask}):
            raise FailedCheckError(
                "reset() changed the options it was given.", "Read options['reset_mask'], do not pop it."
            )
        _check_masked(call, before, mask)
        with probe.env() as fresh:
            first = reset(fresh, seed=probe.seed + 50)
        for row in np.flatnonzero(mask):
            found = difference(first.observations[row], call.observations[row])
            if found:
                raise FailedCheckError(
                    f"row {row} reset by mask with a seed begins differently than in a full reset: {found}.",
                    "A partial reset with seed s gives row i the seed s + i, as a full one does.",
                )
        if before.done[~mask].any() or mask.all():
            return
        after, other = (step(e, script.batch(range(n), steps)) for e in (env, twin))
        for index in np.flatnonzero(~mask).tolist():
            found = difference(after.row(index), other.row(index))
            if found:
                raise FailedCheckError(f"row {index} was not reset, but continued differently: {found}.", _OWN_ROW)


def _check_masked(call: Call, before: Call, mask: Any) -> None:
    for row in np.flatnonzero(~mask):
        found = difference(before.observations[row], call.observations[row])
        if found:
            raise FailedCheckError(
                f"reset_mask was False for row {row}, but its observation changed: {found}.",
                "Reset only the rows named, and return the last observation of the others.",
            )
        marked = [
            key
            for key, value in call.infos.items()
            if key.startswith("_") and not isinstance(value, dict) and value[row]
        ]
        if marked:
            raise FailedCheckError(
                f"reset_mask was False for row {row}, but the masks of {marked} are True for it.",
                "Masks are True for rows reset, only.",
            )


def check_invalid_actions(probe: Probe) -> None:
    """Invalid actions raise an error, and the refused call changes nothing."""
    with probe.env() as env, probe.env() as twin:
        n, script = env.num_envs, probe.script(env)
        reset(env, seed=probe.seed)
        reset(twin, seed=probe.seed)
        for name, bad in _nonsense(env, script.batch(range(n), 0)):
            try:
                env.step(bad)
            except Exception:  # noqa: BLE001 (any error is a refusal)
                continue
            raise FailedCheckError(
                f"step() accepted actions with {name}.",
                "Check shape, dtype, finiteness and range first, and raise a ValueError.",
            )
        expected = step(twin, script.batch(range(n), 0)).row(n - 1)
        advice = "Check all rows before any row acts: a refused call must leave the environment as it was."
        try:
            found = difference(step(env, script.batch(range(n), 0)).row(n - 1), expected)
        except Exception as error:
            raise FailedCheckError(
                f"after refused actions a good step raised {type(error).__name__}: {error}.", advice
            ) from error
        if found:
            raise FailedCheckError(f"after refused actions the environment continues differently: {found}.", advice)


def _nonsense(env: Any, good: Any) -> list[tuple[str, Any]]:
    out: list[tuple[str, Any]] = [("the type None", None), ("text for numbers", "left")]
    space = env.single_action_space
    if not isinstance(good, np.ndarray):
        return out
    out.append(("a row too many", np.concatenate([good, good[:1]])))
    out.append(("one dimension too many", good[None]))
    if not isinstance(space, Box) or good.dtype.kind != "f":
        return out
    for name, value in (("a NaN", np.nan), ("an infinite value", np.inf)):
        bad = copy.deepcopy(good)
        bad.flat[-1] = value
        out.append((name, bad))
    if np.isfinite(space.high).all():
        bad = copy.deepcopy(good)
        bad.flat[-1] = float(space.high.flat[-1]) * 2 + 1
        out.append(("a value far above the bound", bad))
    out.append(("complex numbers", good.astype(np.complex64)))
    return out


def check_order(probe: Probe) -> None:
    """``step`` before ``reset`` and any use after ``close`` raise."""
    with probe.env() as env:
        actions = probe.script(env).batch(range(env.num_envs), 0)
        _must_raise("step() before reset()", lambda: env.step(actions), "Raise an error that asks for reset() first.")
        reset(env, seed=probe.seed)
        env.close()
        advice = "Raise an error that names the closed environment."
        _must_raise("step() after close()", lambda: env.step(actions), advice)
        _must_raise("reset() after close()", lambda: env.reset(seed=probe.seed), advice)


def _must_raise(what: str, action: Any, advice: str) -> None:
    try:
        action()
    except Exception:  # noqa: BLE001 (any error is right)
        return
    raise FailedCheckError(f"{what} was accepted.", advice)


def check_attributes(probe: Probe) -> None:
    """``call``, ``get_attr`` and ``set_attr`` exist and answer for every row."""
    with probe.env() as env:
        missing = [name for name in ("call", "get_attr", "set_attr") if not hasattr(env, name)]
        if missing:
            raise FailedCheckError(
                f"{', '.join(missing)} missing.", "SyncVectorEnv has them; skrl and LeRobot call them."
            )
        reset(env, seed=probe.seed)
        values = env.get_attr("metadata")  # type: ignore[attr-defined]
        if not isinstance(values, tuple) or len(values) != env.num_envs:
            raise FailedCheckError(
                f"get_attr('metadata') gave {values!r}.", f"Return a tuple of {env.num_envs} values."
            )


def check_global_rng(probe: Probe) -> None:
    """No draw from numpy's or Python's global generator."""
    with probe.env() as env:
        before = _global_states()
        probe.rollout(env, steps=min(probe.chunks, 10))
        if before != _global_states():
            raise FailedCheckError("a global random generator was used.", "Give every row generators of its own.")


def _global_states() -> tuple[str, object]:
    return repr(np.random.get_state(legacy=False)), random.getstate()  # noqa: NPY002 (looking, not drawing)


def _need_rows(probe: Probe) -> None:
    if probe.num_envs < 2:
        raise SkippedCheckError("needs two rows; pass a num_envs of at least 2")
