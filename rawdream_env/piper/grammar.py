"""The tabletop's goals as the generic trainers ask for them; see :class:`rawdream_env.robots.GoalGrammar`."""

from __future__ import annotations

from rawdream_env.piper import hindsight
from rawdream_env.piper.goals import GOAL_NAMES, HELD_OUT_JUDGE_PAIRS, TASK_PAIRS, goal_mask, paraphrase
from rawdream_env.piper.relations import OBJECTS, PLACE_RELATIONS, RELATION_NAMES, TASKS
from rawdream_env.robots import GoalGrammar


class PiperGrammar:
    """Goals of ``goals.GOAL_NAMES``, labelled by ``hindsight``."""

    objects = OBJECTS
    relations = RELATION_NAMES
    place_relations = PLACE_RELATIONS
    goals = GOAL_NAMES
    tasks = tuple((task.name, task.instruction, task.relation) for task in TASKS)
    task_pairs = TASK_PAIRS
    held_out_pairs = HELD_OUT_JUDGE_PAIRS

    paraphrase = staticmethod(paraphrase)
    goal_mask = staticmethod(goal_mask)
    label_clips = staticmethod(hindsight.label_clips)
    label_windows = staticmethod(hindsight.label_windows)
    sample_goals = staticmethod(hindsight.sample_goals)
    pick_place_segments = staticmethod(hindsight.pick_place_segments)

    def goal_objects(self, goal: str) -> tuple[str, ...]:
        """The objects of a goal, what is moved first."""
        return tuple(part for part in goal.split(":")[1:] if part in OBJECTS)


GRAMMAR: GoalGrammar = PiperGrammar()
