"""Checks for any Gymnasium ``VectorEnv``, one function each; see ``check_vector_env``."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from rawdream_env.testing.probe import (
    Call,
    FailedCheckError,
    Probe,
    SkippedCheckError,
    describe,
    mode_of,
    reset,
    stack_actions,
    step,
)
from rawdream_env.testing.trees import arrays, difference, observation_rows, to_numpy


def check_spaces(probe: Probe) -> None:
    """Batched spaces are the single ones, num_envs times."""
    with probe.env() as env:
        if env.num_envs != probe.num_envs:
            raise FailedCheckError(
                f"num_envs is {env.num_envs}, asked for {probe.num_envs}.", "Keep the num_envs argument."
            )
        for kind in ("observation_space", "action_space"):
            single, batched = getattr(env, "single_" + kind, None), getattr(env, kind, None)
            if single is None or batched is None:
                raise FailedCheckError(f"single_{kind} or {kind} is missing.", "Set both in __init__.")
            if batched != batch_space(single, env.num_envs):
                raise FailedCheckError(
                    f"{kind} is not single_{kind} batched {env.num_envs} times.",
                    f"self.{kind} = gymnasium.vector.utils.batch_space(self.single_{kind}, num_envs)",
                )


def check_metadata(probe: Probe) -> None:
    """The autoreset mode is declared, and is the one asked for."""
    with probe.env() as env:
        mode = env.metadata.get("autoreset_mode")
        if not isinstance(mode, AutoresetMode):
            raise FailedCheckError(
                f"metadata['autoreset_mode'] is {mode!r}.",
                "Put a gymnasium.vector.AutoresetMode there; libraries read it.",
            )
        if probe.mode is not None and mode.value != probe.mode:
            raise FailedCheckError(
                f"made with autoreset_mode={probe.mode!r}, but metadata['autoreset_mode'] is {mode}.",
                "Set self.metadata = {**type(self).metadata, 'autoreset_mode': mode} in __init__.",
            )
        own = getattr(env.unwrapped, "autoreset_mode", mode)
        if own != mode:
            raise FailedCheckError(
                f"self.autoreset_mode is {own!r}, but metadata has {mode}.",
                "Set both to one AutoresetMode; TorchRL reads the first.",
            )


def check_results(probe: Probe) -> None:
    """Everything returned has the promised type, shape and dtype."""
    with probe.env() as env:

        def each(call: Call) -> None:
            for row, observation in enumerate(call.observations):
                if observation not in env.single_observation_space:
                    raise FailedCheckError(
                        f"{call.name}: observation of row {row} ({_summary(observation)}) "
                        "is not in single_observation_space.",
                        "Check shape, dtype (exactly that of the space) and bounds.",
                    )
            if call.rewards is not None:
                _check_flags(call, env.num_envs)
            if not isinstance(call.infos, dict):
                raise FailedCheckError(f"{call.name}: infos are {describe(call.infos)}.", "Return a dict of arrays.")

        probe.rollout(env, each=each)


def _check_flags(call: Call, num_envs: int) -> None:
    for name, kinds in (("rewards", "fiu"), ("terminations", "b"), ("truncations", "b")):
        value = getattr(call, name)
        if not isinstance(value, np.ndarray) or value.shape != (num_envs,) or value.dtype.kind not in kinds:
            wanted = "floats" if name == "rewards" else "bools"
            raise FailedCheckError(
                f"{call.name}: {name} are {describe(value)}.", f"Return a ({num_envs},) array of {wanted}."
            )
    if not np.isfinite(call.rewards).all():
        raise FailedCheckError(
            f"{call.name}: rewards are {call.rewards}.", "Rewards must be finite; mask what is unknown."
        )


def check_infos(probe: Probe) -> None:
    """Infos are arrays over rows, each with a boolean mask."""
    with probe.env() as env:
        probe.rollout(env, each=lambda call: _check_info_dict(call.infos, env.num_envs, f"{call.name}: infos"))


def _check_info_dict(infos: dict[str, Any], num_envs: int, where: str) -> None:
    for key, value in infos.items():
        if key.startswith("_") and key[1:] in infos:
            continue
        mask = infos.get("_" + key)
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.shape != (num_envs,):
            got = "missing" if mask is None else describe(mask)
            raise FailedCheckError(
                f"{where}['_{key}'] is {got}.",
                f"Beside every key put a boolean ({num_envs},) mask '_key' of its rows, as VectorEnv._add_info does.",
            )
        if isinstance(value, dict):
            _check_info_dict(value, num_envs, f"{where}['{key}']")
        elif not isinstance(value, np.ndarray) or value.shape[:1] != (num_envs,):
            raise FailedCheckError(
                f"{where}['{key}'] is {describe(value)}.",
                f"Infos are numpy arrays with {num_envs} rows, not lists or tensors.",
            )


def check_seeding(probe: Probe) -> None:
    """The same seed gives the same rollout: in another environment, and again in this one."""
    advice = (
        "Draw from generators made of the seed (self.np_random), never from numpy's, torch's or random's global one."
    )
    with probe.env() as first, probe.env() as second:
        before = probe.rollout(first)
        np.random.random(17)  # noqa: NPY002 (moves the global generator, which must have no effect)
        compare(before, probe.rollout(second), "between two environments reset with the same seed", advice)
        compare(before, probe.rollout(first), "when one environment is reset with the same seed again", advice)


def compare(a: list[Call], b: list[Call], what: str, advice: str, rows: list[tuple[int, int]] | None = None) -> None:
    """Row by row equality of two rollouts; ``rows`` pairs rows of ``a`` with rows of ``b``."""
    pairs = rows if rows is not None else [(row, row) for row in range(len(a[0].observations))]
    for here, there in pairs:
        # With autoreset disabled, a neighbour's end puts additional resets, empty for this row, between the steps.
        mine, other = _of_row(a, here), _of_row(b, there)
        for index, (x, y) in enumerate(zip(mine, other, strict=False)):
            found = difference(x, y)
            if found:
                raise FailedCheckError(f"row {here}, call {index} of its own: {found}, {what}.", advice)


def _of_row(calls: list[Call], row: int) -> list[dict[str, Any]]:
    return [
        call.row(row)
        for index, call in enumerate(calls)
        if call.rewards is not None or index == 0 or calls[index - 1].done[row]
    ]


def check_aliasing(probe: Probe) -> None:
    """What was returned never changes afterwards, shares no memory between calls, and may be written to."""
    advice = "Return copies: users keep observations and infos in buffers."
    with probe.env() as env:
        calls = probe.rollout(env)
        kept: list[tuple[str, Any]] = []
        for index, call in enumerate(calls):
            names = ("observations", "rewards", "terminations", "truncations", "infos")
            labels = names if len(call.raw) == 5 else ("observations", "infos")
            for label, part in zip(labels, call.raw, strict=True):
                for place, array in arrays(part):
                    for other, old in kept:
                        if array.size and np.shares_memory(array, old):
                            raise FailedCheckError(
                                f"{label}{place} of call {index} shares memory with {other}.", advice
                            )
                    if index < 6:  # buffers reused at all are reused at once
                        kept.append((f"{label}{place} of call {index}", array))
            recorded = to_numpy(call.raw[0])
            rows = [to_numpy(row) for row in call.observations]
            found = difference(rows, observation_rows(env.observation_space, recorded))
            if found:
                raise FailedCheckError(
                    f"observations of call {index} changed after they were returned: {found}.", advice
                )
    with probe.env() as clean, probe.env() as scribbled:
        compare(
            probe.rollout(clean),
            probe.rollout(scribbled, each=_scribble),
            "when the caller overwrites the arrays it was given",
            advice,
        )


def _scribble(call: Call) -> None:
    for part in call.raw:
        for _, array in arrays(part):
            if array.flags.writeable and array.ndim:
                array[...] = np.zeros((), dtype=array.dtype) if array.dtype.kind in "OSU" else 1


def check_actions_untouched(probe: Probe) -> None:
    """``step`` does not write into the caller's actions."""
    with probe.env() as env:
        script = probe.script(env)
        reset(env, seed=probe.seed)
        actions = script.batch(range(env.num_envs), 0)
        before = copy.deepcopy(actions)
        step(env, actions)
        found = difference(to_numpy(before), to_numpy(actions))
        if found:
            raise FailedCheckError(
                f"step() changed the actions it was given: {found}.", "Copy before clipping or scaling."
            )


def check_closing(probe: Probe) -> None:
    """``close`` may be called twice, also before any reset."""
    for resets in (False, True):
        with probe.env() as env:
            if resets:
                reset(env, seed=probe.seed)
            env.close()
            try:
                env.close()
            except Exception as error:
                raise FailedCheckError(
                    f"the second close() raised {type(error).__name__}: {error}.", "Return at once when self.closed."
                ) from error


def check_autoreset(probe: Probe) -> None:
    """Episodes end and begin as the declared mode requires."""
    with probe.env() as env:
        mode = mode_of(env)
    if mode is None:
        raise SkippedCheckError("no autoreset mode is declared")
    {
        AutoresetMode.NEXT_STEP: _check_next_step,
        AutoresetMode.SAME_STEP: _check_same_step,
        AutoresetMode.DISABLED: _check_disabled,
    }[mode](probe)


def _run_to_end(probe: Probe, env: Any, script: Any) -> tuple[int, Call]:
    """Step until some episode ends: (number of steps, that call)."""
    reset(env, seed=probe.seed)
    for t in range(probe.chunks):
        call = step(env, script.batch(range(env.num_envs), t))
        if call.done.any():
            return t + 1, call
    raise SkippedCheckError(f"no episode ended within {probe.chunks} steps; pass more chunks=")


def _check_next_step(probe: Probe) -> None:
    with probe.env() as env, probe.env() as twin:
        script, others = probe.script(env), probe.script(env, salt=1)
        steps, call = _run_to_end(probe, env, script)
        _run_to_end(probe, twin, script)
        rows = np.flatnonzero(call.done).tolist()
        after = step(env, script.batch(range(env.num_envs), steps))
        for row in rows:
            if after.rewards[row] != 0 or after.done[row]:
                raise FailedCheckError(
                    f"row {row} ended at step {steps}; the next step gave reward {after.rewards[row]}, "
                    f"terminated {after.terminations[row]}, truncated {after.truncations[row]}.",
                    "NextStep: that step ignores the action, returns the next episode's first observation, reward 0.",
                )
        mixed = [others.row(r, steps) if r in rows else script.row(r, steps) for r in range(env.num_envs)]
        same = step(twin, stack_actions(env.single_action_space, mixed))
        for row in rows:
            found = difference(after.row(row), same.row(row))
            if found:
                raise FailedCheckError(
                    f"row {row} ended at step {steps}; its action in the next step had an effect: {found}.",
                    "NextStep: the step after an end resets that row instead of acting. Is this SameStep?",
                )


def _check_same_step(probe: Probe) -> None:
    ended = moved = 0
    with probe.env() as env:
        for index, call in enumerate(probe.rollout(env)):
            done = call.done
            mask = call.infos.get("_final_obs", np.zeros(env.num_envs, dtype=np.bool_))
            if not np.array_equal(mask, done):
                raise FailedCheckError(
                    f"call {index}: episodes ended in {done}, but infos['_final_obs'] is {mask}.",
                    "SameStep: put the last observation of rows that ended into infos['final_obs'], with its mask.",
                )
            if not np.array_equal(call.infos.get("_final_info", np.zeros_like(done)), done):
                raise FailedCheckError(
                    f"call {index}: infos['_final_info'] does not mark the rows that ended ({done}).",
                    "SameStep: put the ended step's infos into infos['final_info'], a dict of arrays with masks.",
                )
            for row in np.flatnonzero(done):
                final = to_numpy(call.infos["final_obs"][row])
                if final not in env.single_observation_space:
                    raise FailedCheckError(
                        f"call {index}: final_obs of row {row} ({_summary(final)}) is not in single_observation_space.",
                        "final_obs is an object array of single observations.",
                    )
                ended += 1
                moved += difference(final, call.observations[row]) is not None
    if not ended:
        raise SkippedCheckError(f"no episode ended within {probe.chunks} steps; pass more chunks=")
    if not moved:
        raise FailedCheckError(
            f"in all {ended} ends the returned observation equals final_obs.",
            "SameStep: the step that ends an episode returns the next episode's first observation.",
        )


def _check_disabled(probe: Probe) -> None:
    with probe.env() as env:
        script = probe.script(env)
        steps, call = _run_to_end(probe, env, script)
        rows = np.flatnonzero(call.done)
        try:
            after = step(env, script.batch(range(env.num_envs), steps))
        except FailedCheckError:
            raise
        except Exception:  # noqa: BLE001 (refusing, with whatever error, is one of the two right answers)
            after = None
        if after is not None and not after.done[rows].all():
            raise FailedCheckError(
                f"row {rows[0]} ended at step {steps} and ran again in the next, without a reset.",
                "Disabled: raise, or keep the row's flags and let it idle, until it is reset by reset_mask.",
            )
        if after is not None and after.rewards[rows].any():
            raise FailedCheckError(
                f"rows {rows.tolist()} were over and still got rewards {after.rewards[rows]}.",
                "A row that is over earns 0.",
            )
        done = call.done if after is None else after.done
        reset(env, options={"reset_mask": done.copy()})
        step(env, script.batch(range(env.num_envs), steps + 1))


def _summary(observation: Any) -> str:
    parts = [f"{place} {array.dtype}{array.shape}".strip() for place, array in arrays(observation)]
    return ", ".join(parts) or repr(observation)
