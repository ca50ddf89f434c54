"""From episode records to tables: rates with intervals, confusions, verification, gains, rank correlation, horizon.

Everything here is a pure function of the records, so that the tables can be recomputed from ``episodes.jsonl``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rawdream_env.evaluation.reporting.provenance import provenance
from rawdream_env.evaluation.side_by_side.ranking import rank_policies
from rawdream_env.evaluation.side_by_side.records import EpisodeRecord
from rawdream_env.evaluation.world_model.horizon import HorizonScores
from rawdream_env.statistics import Confusion, Rate, paired_bootstrap

ALL = "all"


def aggregate(
    records: Sequence[EpisodeRecord],
    scores: Mapping[str, Mapping[str, HorizonScores]],
    *,
    at_end: bool = True,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The report as JSON; :mod:`rawdream_env.evaluation.side_by_side.evaluate` explains the names.

    ``scores``: policy -> "dreamed_actions" or "simulator_actions" -> those of its episodes. ``at_end``: the records' verdicts
    are of the end of the episode, else of any chunk; they are compared with the same. The first policy is the reference.
    """
    names = list(dict.fromkeys(r.policy for r in records))
    tasks = list(dict.fromkeys(r.task for r in records))
    policies = []
    for name in names:
        own = [r for r in records if r.policy == name]
        horizon = {source: kept.rows() for source, kept in scores.get(name, {}).items()}
        per_task = {task: describe([r for r in own if r.task == task], at_end) for task in tasks}
        entry = {"name": name, ALL: describe(own, at_end), "tasks": per_task, "horizon": horizon}
        if name != names[0]:
            entry["gain"] = gain([r for r in records if r.policy == names[0]], own)
        policies.append(entry)
    config = dict(config or {})
    return {
        "conclusions": conclusions(policies),
        "policies": policies,
        "reference": names[0] if names else None,
        "ranking": rank_policies(records) if len(names) > 1 or len(tasks) > 2 else None,
        "truth": "success at the end of the video" if at_end else "success after any chunk",
        "config": config,
        "run": provenance(seed=config.get("seed")),
    }


def describe(records: Sequence[EpisodeRecord], at_end: bool) -> dict[str, Any]:
    """Rates and confusions of some episodes of one policy. ``dream`` is over the readable first verdicts, ``dream_trusted``
    over those that are known and not flagged: it is the success rate in the dream. What was not measured is left out.

    ``at_end``: compare verdicts with success at the end of the video, else with success after any chunk.
    """
    dreams = [r for r in records if r.dream >= 0]
    trusted = [r for r in records if r.trusted]
    out: dict[str, Any] = {
        "simulator": Rate.over(r.simulator for r in records).as_dict(),
        "simulator_end": Rate.over(r.simulator_end for r in records).as_dict(),
        "dream": Rate.over(r.dream == 1 for r in dreams).as_dict(),
        "dream_trusted": Rate.over(r.dream == 1 for r in trusted).as_dict(),
        "dream_minus_simulator": paired_bootstrap(_truth(trusted, at_end), [r.dream == 1 for r in trusted]).as_dict(),
        "verdicts": verdict_counts(records),
        "dream_invalid": sum(r.dream < 0 for r in records),
        "closed_loop": Confusion.over([r.dream == 1 for r in dreams], _truth(dreams, at_end)).as_dict(),
    }
    verified = verification(dreams, at_end)
    if verified is not None:
        out["verification"] = verified
    acted = [r for r in dreams if r.dreamed_actions is not None]
    if acted:
        out["dreamed_actions"] = Confusion.over([r.dream == 1 for r in acted], _acted_truth(acted, at_end)).as_dict()
        echoed = [r for r in records if (r.simulator_actions or 0) >= 0]
        out["simulator_actions"] = Confusion.over(
            [r.simulator_actions == 1 for r in echoed], _truth(echoed, at_end)
        ).as_dict()
        judged = [r for r in records if (r.judge_on_simulator or 0) >= 0]
        out["judge_on_simulator"] = Confusion.over(
            [r.judge_on_simulator == 1 for r in judged], _truth(judged, at_end)
        ).as_dict()
        out["judge_invalid"] = len(records) - len(judged)
    return out | by_state(records, at_end)


def by_state(records: Sequence[EpisodeRecord], at_end: bool) -> dict[str, Any]:
    """Confusions and rates with the dream's own state; empty for a world model without one.

    ``judge_against_state``: the judge's verdicts on the dream, the state as the truth; ``state_closed_loop``: the state against
    the outcome of the dreamed actions in the simulator; ``state_reimagined``: the state of the simulator's actions, imagined
    again, against the simulator; ``lifts_on_misses``: of those in which the simulator never picks up the task's object, the
    share in which the dream does.
    """
    out = {}
    if own := [r for r in records if r.dream_state >= 0]:
        both = [r for r in own if r.dream >= 0]
        out["judge_against_state"] = Confusion.over([r.dream == 1 for r in both], [r.dream_state == 1 for r in both])
        if acted := [r for r in own if r.dreamed_actions is not None]:
            out["state_closed_loop"] = Confusion.over([r.dream_state == 1 for r in acted], _acted_truth(acted, at_end))
    if echoed := [r for r in records if r.simulator_actions_state >= 0]:
        states = [r.simulator_actions_state == 1 for r in echoed]
        out["state_reimagined"] = Confusion.over(states, _truth(echoed, at_end))
    described = {name: confusion.as_dict() for name, confusion in out.items()}
    if any(r.simulator_lifted >= 0 and r.simulator_actions_lifted >= 0 for r in records):
        misses = [r for r in records if r.simulator_lifted == 0 and r.simulator_actions_lifted >= 0]
        described["lifts_on_misses"] = Rate.over(r.simulator_actions_lifted == 1 for r in misses).as_dict()
    return described


def verdict_counts(records: Sequence[EpisodeRecord]) -> dict[str, int]:
    """The dream's episodes apart, as GRPO counts its rollouts.

    ``judged``: the outcome is known, flagged ones included; ``invalid``: no first verdict, or no second one of a success;
    ``flagged``: a success that did not repeat; ``trusted``: judged and not flagged.
    """
    flagged, trusted = sum(r.flagged for r in records), sum(r.trusted for r in records)
    judged = flagged + trusted
    return {
        "episodes": len(records), "judged": judged, "invalid": len(records) - judged, "flagged": flagged, "trusted": trusted
    }  # fmt: skip


def _truth(records: Sequence[EpisodeRecord], at_end: bool) -> list[bool]:
    return [r.simulator_end if at_end else r.simulator for r in records]


def _acted_truth(records: Sequence[EpisodeRecord], at_end: bool) -> list[bool]:
    return [bool(r.dreamed_actions_end if at_end else r.dreamed_actions) for r in records]


def verification(dreams: Sequence[EpisodeRecord], at_end: bool) -> dict[str, Any] | None:
    """Effect of dual-noise verification: share flagged, and agreement with the simulator before and after.

    ``before`` counts every readable verdict, ``after`` only those that are not flagged (and whose second verdict was
    readable). The truth is the outcome of the dreamed actions in the simulator if it was measured, else that of the
    closed-loop episode. ``flagged_wrong``: share of flagged successes that are false. None when nothing was verified.
    """
    successes = [r for r in dreams if r.dream == 1]
    if not any(r.second is not None for r in successes):
        return None
    readable = [r for r in successes if r.result.verified or r.flagged]
    kept = [r for r in dreams if r.result.verified]
    acted = all(r.dreamed_actions is not None for r in dreams)

    def against(some: Sequence[EpisodeRecord]) -> Confusion:
        truth = _acted_truth(some, at_end) if acted else _truth(some, at_end)
        return Confusion.over([r.dream == 1 for r in some], truth)

    flagged = against([r for r in readable if r.flagged])
    return {
        "against": "dreamed actions in the simulator" if acted else "closed-loop episode in the simulator",
        "flagged": Rate.over(r.flagged for r in readable).as_dict(),
        "invalid": len(successes) - len(readable),
        "flagged_wrong": Rate.of(flagged.false_positive, flagged.n).as_dict(),
        "before": against(dreams).as_dict(),
        "after": against(kept).as_dict(),
    }


def conclusions(policies: Sequence[Mapping[str, Any]]) -> list[str]:
    """One sentence per policy with a gain: whether it improved, which only the simulator can confirm."""
    sentences = []
    for entry in policies:
        gains = entry.get("gain")
        if gains is None:
            continue
        dream, simulator = gains["dream"], gains["simulator"]
        if simulator["low"] is None:
            verdict = "was not measured in the simulator: nothing can be concluded."
        elif simulator["low"] > 0:
            verdict = "really got better: the simulator confirms it."
        elif simulator["high"] >= 0:
            verdict = "shows no clear change in the simulator; more starts narrow the interval."
        elif dream["low"] is not None and dream["low"] > 0:
            verdict = "got better in the dream and worse in the simulator: it learned where the dream is wrong."
        else:
            verdict = "really got worse."
        sentences.append(f"{entry['name']!r} {verdict}")
    return sentences


def gain(before: Sequence[EpisodeRecord], after: Sequence[EpisodeRecord]) -> dict[str, Any]:
    """Difference of success rates on the same starts with a paired interval; simulator and dream apart, the dream over the
    starts at which both outcomes are trusted.
    """
    known = {(r.task, r.index): r for r in before}
    pairs = [(known[r.task, r.index], r) for r in after]
    both = [(a, b) for a, b in pairs if a.trusted and b.trusted]
    return {
        "simulator": paired_bootstrap([a.simulator for a, _ in pairs], [b.simulator for _, b in pairs]).as_dict(),
        "dream": paired_bootstrap([a.dream == 1 for a, _ in both], [b.dream == 1 for _, b in both]).as_dict(),
    }
