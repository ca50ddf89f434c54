"""The alarm of GRPO: does the judge that rewards still agree with other verdicts of the same episodes?

Reinforcement learning exploits what the judge gets wrong: its success rate rises and the task is not done more often. Any
other verdict that is not rewarded shows this: ``held_out``, of a hold-out judge, and ``state``, of a world model that reports
``info["state_success"]``. Verdicts are compared episode by episode, over the trusted episodes of several steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

from rawdream_env.judges.ensemble import JudgeGap, watch_gap

_WORDS = {"held_out": "the hold-out judge", "state": "the world model's own state"}


class GapAlarm:
    """Compares the judge's success rate with that of other verdicts over the last ``window`` steps.

    An alarm is raised, with one ``JudgeGapWarning``, when the judge's rate is higher by more than ``margin`` with 95 %
    confidence, and cleared when the difference itself is no longer larger. ``state``: of an earlier alarm, to continue it.
    """

    def __init__(self, margin: float, window: int, state: Mapping[str, Any] | None = None) -> None:
        state = state or {"steps": [], "raised": []}
        self.margin = margin
        self.raised: set[str] = set(state["raised"])
        self._steps: deque[dict[str, JudgeGap]] = deque(maxlen=window)
        self._steps.extend({name: JudgeGap(*counts) for name, counts in step.items()} for step in state["steps"])

    def look(self, step: Mapping[str, JudgeGap]) -> dict[str, float]:
        """Add a step's verdicts. Returns, per name, gap, interval and n over the window and ``NAME_alarm`` (0 or 1)."""
        self._steps.append(dict(step))
        metrics: dict[str, float] = {}
        for name in sorted({name for step in self._steps for name in step}):
            gap = sum((step[name] for step in self._steps if name in step), JudgeGap())
            where = f"over {gap.n} episodes of the last {len(self._steps)} steps"
            if watch_gap(gap, self.margin, name in self.raised, _WORDS.get(name, name), where):
                self.raised.add(name)
            else:
                self.raised.discard(name)
            metrics |= {**gap.as_dict(name), f"{name}_alarm": float(name in self.raised)}
        return metrics

    def state(self) -> dict[str, Any]:
        """JSON values for the checkpoint."""
        steps = [{name: list(astuple(gap)) for name, gap in step.items()} for step in self._steps]
        return {"steps": steps, "raised": sorted(self.raised)}
