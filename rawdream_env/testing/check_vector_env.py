"""A checker for vector environments, like ``gymnasium.utils.env_checker.check_env`` for single environments."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from rawdream_env.config import parse_autoreset_mode, parse_positive_int
from rawdream_env.errors import InvalidOptionError
from rawdream_env.testing import strict_checks, vector_checks
from rawdream_env.testing.probe import FailedCheckError, MakeEnv, Probe, SkippedCheckError

GENERIC_CHECKS = {
    "spaces": vector_checks.check_spaces,
    "metadata": vector_checks.check_metadata,
    "results": vector_checks.check_results,
    "infos": vector_checks.check_infos,
    "seeding": vector_checks.check_seeding,
    "aliasing": vector_checks.check_aliasing,
    "actions_untouched": vector_checks.check_actions_untouched,
    "autoreset": vector_checks.check_autoreset,
    "closing": vector_checks.check_closing,
}
STRICT_CHECKS = {
    "row_independence": strict_checks.check_row_independence,
    "neighbours": strict_checks.check_neighbours,
    "row_seeds": strict_checks.check_row_seeds,
    "partial_reset": strict_checks.check_partial_reset,
    "invalid_actions": strict_checks.check_invalid_actions,
    "order": strict_checks.check_order,
    "attributes": strict_checks.check_attributes,
    "global_rng": strict_checks.check_global_rng,
}


class VectorEnvCheckError(AssertionError):
    """Some checks failed; the message lists each with its advice. ``failed`` has their names."""

    def __init__(self, message: str, failed: tuple[str, ...]) -> None:
        """Keep the names of the failed checks."""
        super().__init__(message)
        self.failed = failed


@dataclass
class CheckReport:
    """Names of checks, followed by ``[autoreset mode]`` if modes were given; ``skipped`` and ``failed`` have the reasons."""

    passed: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, FailedCheckError] = field(default_factory=dict)


def check_vector_env(
    make: MakeEnv,
    *,
    num_envs: Sequence[int] = (1, 2, 4, 8),
    chunks: int = 30,
    seed: int = 0,
    modes: Sequence[str] | None = None,
    strict: bool = False,
    skip: Collection[str] = (),
) -> CheckReport:
    """Check that a vector environment follows its contract.

    The generic checks hold for any environment that follows Gymnasium's documentation: spaces, types and dtypes, infos
    with masks, seeding, no aliasing, the autoreset mode that is declared. ``strict`` adds what the environments of this
    package guarantee in addition: row i depends neither on ``num_envs`` nor on its neighbours (bit-identical), seeds per row,
    partial resets, errors for invalid actions and for calls in the wrong order.

    Args:
        make: called as ``make(num_envs=n)``, or ``make(num_envs=n, autoreset_mode="SameStep")`` when ``modes`` are
            given. Every call must give a new, equal environment.
        num_envs: batch sizes that ``row_independence`` compares; the other checks use the largest up to 4.
        chunks: steps per rollout; episodes should end within them, or the autoreset checks are skipped.
        seed: seed of the rollouts and their random actions.
        modes: autoreset modes to create and check; None: the mode that the environment declares.
        strict: also run the checks of this package.
        skip: names of checks to leave out.

    Returns:
        What passed and what was skipped, and why.

    Raises:
        VectorEnvCheckError: some checks failed; the message lists each finding with advice.
        InvalidOptionError: bad arguments.

    Example:
        >>> import gymnasium as gym
        >>> from rawdream_env.testing.check_vector_env import check_vector_env
        >>> report = check_vector_env(lambda num_envs: gym.make_vec("CartPole-v1", num_envs=num_envs), chunks=60)
        >>> "autoreset" in report.passed
        True
    """
    checks = {**GENERIC_CHECKS, **(STRICT_CHECKS if strict else {})}
    unknown = set(skip) - set(GENERIC_CHECKS) - set(STRICT_CHECKS)
    if unknown:
        raise InvalidOptionError(
            f"skip has unknown checks {sorted(unknown)}; known: {', '.join(GENERIC_CHECKS | STRICT_CHECKS)}."
        )
    if not num_envs:
        raise InvalidOptionError(f"num_envs={num_envs!r} has no batch size to check; pass at least one.")
    sizes = tuple(sorted({parse_positive_int("num_envs", size) for size in num_envs}))
    size = max((s for s in sizes if s <= 4), default=sizes[0])
    report = CheckReport()
    for mode in modes if modes is not None else (None,):
        value = None if mode is None else parse_autoreset_mode(mode).value
        probe = Probe(make, value, size, sizes, parse_positive_int("chunks", chunks), seed, strict)
        for name, check in checks.items():
            if name not in skip:
                _run(check, name if value is None else f"{name}[{value}]", probe, report)
    if report.failed:
        raise VectorEnvCheckError(_message(report), tuple(report.failed))
    return report


def _run(check: object, label: str, probe: Probe, report: CheckReport) -> None:
    assert callable(check)
    try:
        check(probe)
    except SkippedCheckError as reason:
        report.skipped[label] = str(reason)
    except FailedCheckError as failure:
        report.failed[label] = failure
    except Exception as error:  # noqa: BLE001 (an environment that raises where it should not is a finding, not a crash)
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        where = "" if place is None else f" at {place.tb_frame.f_code.co_filename}:{place.tb_lineno}"
        crash = FailedCheckError(
            f"raised {type(error).__name__}: {error}{where}", "This call should work; see its docs."
        )
        crash.__cause__ = error
        report.failed[label] = crash
    else:
        report.passed.append(label)


def _message(report: CheckReport) -> str:
    total = len(report.passed) + len(report.failed)
    lines = [f"{len(report.failed)} of {total} checks failed:"]
    for name, failure in report.failed.items():
        lines.append(f"  {name}: {failure.message}")
        lines.append(f"    -> {failure.advice}")
    return "\n".join(lines)
