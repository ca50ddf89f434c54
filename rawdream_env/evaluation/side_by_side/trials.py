"""Trials on the arm: the third column beside dream and simulator (paper section 4: 30 trials per task).

Every start (task, index) is tried with all policies, one after the other, so that they meet the same scene. The order of the
starts' tasks and of the policies at a start is drawn from the seed, and neither the environment nor the terminal nor the ledger
names the policy, so that the person who arranges the scene and tells success does not know it.

The ledger, ``real/trials.jsonl`` in the results' folder, has one line per trial and is written after each one. Rerun the same
command to resume with the next trial; a trial that was interrupted or INVALID (a fault, success not known) is repeated then.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from rawdream_env.data.recording import claim_folder, only_writer
from rawdream_env.envs.episodes import make_env, run_episodes
from rawdream_env.errors import DatasetError, InvalidOptionError
from rawdream_env.evaluation.side_by_side.tasks import make_starts, task_names
from rawdream_env.files import atomic_write_text, read_text
from rawdream_env.resolve import fingerprint
from rawdream_env.robots import find_robot
from rawdream_env.seeding import mix
from rawdream_env.statistics import Rate, paired_bootstrap
from rawdream_env.types import Outcome, Policy

if TYPE_CHECKING:
    from rawdream_env.evaluation.side_by_side.evaluate import EvaluateConfig

FOLDER, LEDGER = "real", "trials.jsonl"
_STREAM = 30
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """A planned trial: who acts, from which start."""

    policy: str
    task: str
    index: int


@dataclass(frozen=True)
class Entry:
    """A line of the ledger: trial ``trial`` of the plan ended after ``chunks`` chunks with ``outcome``: 1 success, 0 failure,
    -1 INVALID.
    """

    trial: int
    task: str
    index: int
    outcome: int
    chunks: int
    time: str


def plan_trials(policies: Sequence[str], tasks: Sequence[str], per_task: int, seed: int) -> list[Trial]:
    """All trials in their order. A plan with more trials per task begins with that of fewer."""
    plan = []
    for index in range(per_task):
        rng = np.random.default_rng(mix(seed, _STREAM, index))
        for task in rng.permutation(len(tasks)):
            plan += [Trial(policies[p], tasks[task], index) for p in rng.permutation(len(policies))]
    return plan


def run_trials(
    config: EvaluateConfig, policies: Mapping[str, Policy], real: Any, *, progress: bool = True
) -> list[tuple[Trial, int]]:
    """Run the trials that the ledger lacks; all trials with their outcomes (1, 0, -1).

    ``real``: an environment of one row in DISABLED autoreset mode, with the requirements of the simulator.

    Raises:
        InvalidOptionError: the environment does not fit. DatasetError: the ledger is of other policies, tasks or seeds, or
            damaged. Whatever the environment raises: the trial is then not in the ledger.
    """
    if real.num_envs != 1:
        raise InvalidOptionError(f"the arm's environment has {real.num_envs} rows; one arm is one row.")
    tasks = task_names(real, config.tasks)
    assert config.out is not None
    folder = config.out / FOLDER
    settings = {
        "policies": {name: fingerprint(policy) for name, policy in policies.items()},
        "tasks": list(tasks),
        "seed": config.seed,
        "temperature": config.temperature,
    }
    claim_folder(folder, "trials.json", settings, "evaluated")
    plan = plan_trials(sorted(policies), tasks, config.real_trials, config.seed)
    with only_writer(folder), tqdm(total=len(plan), desc="trials", unit="trial", disable=not progress) as bar:
        ledger = read_ledger(folder / LEDGER, plan)
        bar.update(sum(known(ledger, number) for number in range(len(plan))))
        for number, trial in enumerate(plan):
            if known(ledger, number):
                continue
            _log.info("trial %d of %d: %s, start %d", number + 1, len(plan), trial.task, trial.index)
            ledger[number] = _run(config, number, trial, policies[trial.policy], real)
            lines = [json.dumps(asdict(entry)) for _, entry in sorted(ledger.items())]
            atomic_write_text(folder / LEDGER, "\n".join(lines) + "\n")
            bar.update(known(ledger, number))
    return [(trial, ledger[number].outcome) for number, trial in enumerate(plan)]


def known(ledger: Mapping[int, Entry], number: int) -> bool:
    """Whether a trial has an outcome."""
    return number in ledger and ledger[number].outcome >= 0


def read_ledger(path: Path, plan: Sequence[Trial]) -> dict[int, Entry]:
    """The trials so far, by their number in the plan; none without a file.

    Raises:
        DatasetError: a line is damaged, or not of this plan.
    """
    ledger: dict[int, Entry] = {}
    for number, line in enumerate(read_text(path).splitlines() if path.exists() else (), start=1):
        try:
            entry = Entry(**json.loads(line))
            fits = entry.trial >= len(plan) or (plan[entry.trial].task, plan[entry.trial].index) == (
                entry.task,
                entry.index,
            )
            if not fits or entry.outcome not in (1, 0, -1) or type(entry.trial) is not int or entry.trial < 0:
                raise ValueError("it is not of this plan")
        except (ValueError, TypeError) as error:
            raise DatasetError(
                f"{path}, line {number} is damaged ({error}). Remove the line to repeat its trial, or give another --out."
            ) from error
        ledger[entry.trial] = entry
    return ledger


def _run(config: EvaluateConfig, number: int, trial: Trial, policy: Policy, real: Any) -> Entry:
    start = make_starts(real, [(trial.task, trial.index)], config.seed)
    (rollout,) = run_episodes(real, start, policy, temperature=config.temperature)
    outcome = Outcome.SUCCESS if rollout.success_any else rollout.verdict
    time = datetime.now(UTC).isoformat(timespec="seconds")
    return Entry(number, trial.task, trial.index, int(outcome) if rollout.valid else -1, len(rollout), time)


def add_trials(report: dict[str, Any], trials: Sequence[tuple[Trial, int]]) -> None:
    """Add the arm's rates to a report: ``real`` and ``real_invalid`` of every policy, for all tasks and each; gains over the
    reference at the starts where both outcomes are known; and ``trials`` with the numbers of trials.
    """
    outcomes = dict(trials)
    starts = list(dict.fromkeys((trial.task, trial.index) for trial in outcomes))
    for entry in report["policies"]:
        own = {trial: outcome for trial, outcome in outcomes.items() if trial.policy == entry["name"]}
        entry["all"] |= _rate(list(own.values()))
        for task, part in entry["tasks"].items():
            part |= _rate([outcome for trial, outcome in own.items() if trial.task == task])
        if "gain" in entry:
            pairs = [(outcomes[Trial(report["reference"], *s)], outcomes[Trial(entry["name"], *s)]) for s in starts]
            both = [(a, b) for a, b in pairs if min(a, b) >= 0]
            entry["gain"]["real"] = paired_bootstrap([a for a, _ in both], [b for _, b in both]).as_dict()
    report["trials"] = {"trials": len(outcomes), "invalid": sum(outcome < 0 for outcome in outcomes.values())}


def _rate(outcomes: Sequence[int]) -> dict[str, Any]:
    rate = Rate.over(outcome == 1 for outcome in outcomes if outcome >= 0)
    return {"real": rate.as_dict(), "real_invalid": sum(outcome < 0 for outcome in outcomes)}


def make_real(env_id: str, options: Mapping[str, Any], dream: Any) -> Any:
    """The arm's environment: ``env_id``, or that of the dream's robot, with the dream's horizon."""
    robot = find_robot(getattr(dream.unwrapped, "robot", ""))
    if not (env_id or robot.real_env):
        raise InvalidOptionError(
            f"robot {robot.name!r} has no hardware environment; pass the id of one with --real-env."
        )
    return make_env(
        env_id or robot.real_env, 1, **{"max_episode_steps": dream.unwrapped.max_episode_steps, **dict(options)}
    )
