"""Hindsight: what happened is put into words, what is doubtful is not asked, demonstrations are cut where they lie."""

from __future__ import annotations

import numpy as np
import pytest

from rawdream_env.data.reader import Episode, EpisodeArrays
from rawdream_env.errors import DatasetError, InvalidOptionError
from rawdream_env.piper.goals import (
    GOAL_NAMES,
    GOALS,
    HELD_OUT_JUDGE_PAIRS,
    TASK_PAIRS,
    goal_index,
    goal_mask,
    paraphrase,
    phrases,
)
from rawdream_env.piper.hindsight import clip_labels, label_clips, label_windows, pick_place_segments, sample_goals
from rawdream_env.piper.relations import (
    MOVABLE,
    OBJECTS,
    PLACE_RELATIONS,
    RELATION_NAMES,
    SHAPES,
    TASKS,
    object_index,
    relation_index,
)
from rawdream_env.text import tokenize


def scene(**places: tuple[float, ...]) -> np.ndarray:
    """Object poses (7, 7) from ``name=(x, y)`` (standing on the table) or ``name=(x, y, z)``; the rest is absent."""
    poses = np.full((len(OBJECTS), 7), np.nan)
    for name, at in places.items():
        z = at[2] if len(at) == 3 else SHAPES[name].half[2]
        poses[object_index(name)] = [at[0], at[1], z, 1, 0, 0, 0]
    return poses


def true(*names: str) -> np.ndarray:
    """A relation vector in which exactly these hold."""
    vector = np.zeros(len(RELATION_NAMES), bool)
    vector[[relation_index(name) for name in names]] = True
    return vector


STACKED = "on:blue_block:red_block"
APART = scene(blue_block=(0.25, -0.1), red_block=(0.25, 0.1))


class TestGrammar:
    def test_every_task_is_a_goal_and_its_instruction_a_phrase(self) -> None:
        for task in TASKS:
            assert task.instruction in phrases(task.relation)

    def test_phrases_are_distinct_across_goals_and_fit_the_tokenizer(self) -> None:
        seen: dict[tuple[int, ...], str] = {}
        for name in GOAL_NAMES:
            for phrase in phrases(name):
                assert len(phrase.split()) <= 16
                assert seen.setdefault(tuple(tokenize(phrase)), name) == name, phrase
        assert set(PLACE_RELATIONS) < set(GOAL_NAMES)

    def test_paraphrase_is_seeded_and_varied(self) -> None:
        def draw(seed: int) -> list[str]:
            rng = np.random.default_rng(seed)
            return [paraphrase("in:cup:pot", rng) for _ in range(40)]

        assert draw(0) == draw(0)
        assert len(set(draw(0))) > 10

    def test_unknown_goal(self) -> None:
        with pytest.raises(InvalidOptionError, match="goal 'on:stove:cup' does not exist"):
            goal_index("on:stove:cup")

    def test_held_out_pairs_are_askable_and_no_task_pairs(self) -> None:
        assert len(set(HELD_OUT_JUDGE_PAIRS)) == 4
        assert not set(HELD_OUT_JUDGE_PAIRS) & set(TASK_PAIRS)
        place_pairs = {tuple(name.split(":")[1:]) for name in PLACE_RELATIONS}
        assert set(HELD_OUT_JUDGE_PAIRS) <= place_pairs
        left = place_pairs - set(HELD_OUT_JUDGE_PAIRS) - set(TASK_PAIRS)
        assert {name for pair in left for name in pair} == set(OBJECTS)  # every word is still learned somewhere

    def test_mask(self) -> None:
        mask = goal_mask(exclude_pairs=TASK_PAIRS, kinds=("on", "near"))
        chosen = [goal for goal, keep in zip(GOALS, mask, strict=True) if keep]
        assert {goal.kind for goal in chosen} == {"on", "near"}
        assert not {goal.pair for goal in chosen} & set(TASK_PAIRS)
        assert goal_mask().all()


class TestLabels:
    def test_stacking(self) -> None:
        end = scene(blue_block=(0.25, 0.1, 0.051), red_block=(0.25, 0.1))
        labels = clip_labels(APART, end, true(), true(STACKED))
        assert labels[STACKED] is True
        assert labels["on:red_block:blue_block"] is False
        assert labels["near:blue_block:red_block"] is False  # on it is not beside it
        assert not any("cup" in name for name in labels)  # absent: not askable

    def test_already_true_is_not_asked(self) -> None:
        end = scene(blue_block=(0.25, 0.1, 0.051), red_block=(0.25, 0.1))
        labels = clip_labels(end, end, true(STACKED), true(STACKED))
        assert STACKED not in labels
        assert labels["table:blue_block"] is False

    def test_still_in_the_gripper_is_not_stacked(self) -> None:
        end = scene(blue_block=(0.25, 0.1, 0.052), red_block=(0.25, 0.1))
        held = true("holding:blue_block", "lifted:blue_block")
        labels = clip_labels(APART, end, true(), held)
        assert labels[STACKED] is False
        assert labels["lifted:blue_block"] is True

    @pytest.mark.parametrize(
        ("shift", "expected"),
        [
            ((0.0, -0.06), {"left": True, "right": False, "front": False, "back": False}),
            ((0.06, 0.0), {"left": False, "right": False, "front": True, "back": False}),
            ((0.0, 0.025), {"left": False, "front": False, "back": False}),  # a little to the right: nobody is asked
            ((-0.05, 0.05), {"left": False, "front": False}),  # askew: neither back nor right
        ],
    )
    def test_pushing(self, shift: tuple[float, float], expected: dict[str, bool]) -> None:
        end = scene(blue_block=(0.25 + shift[0], -0.1 + shift[1]), red_block=(0.25, 0.1))
        labels = clip_labels(APART, end, true(), true())
        found = {name.split(":")[2]: value for name, value in labels.items() if name.startswith("move:blue")}
        assert found == expected

    def test_next_to(self) -> None:
        beside = scene(blue_block=(0.25, 0.055), red_block=(0.25, 0.1))
        labels = clip_labels(APART, beside, true(), true())
        assert labels["near:blue_block:red_block"] is True
        assert "near:red_block:blue_block" not in labels  # the red block did not move: nobody can say
        undecided = scene(blue_block=(0.25, 0.03), red_block=(0.25, 0.1))
        assert "near:blue_block:red_block" not in clip_labels(APART, undecided, true(), true())

    def test_back_on_the_table(self) -> None:
        start = scene(blue_block=(0.25, 0.1, 0.051), red_block=(0.25, 0.1))
        labels = clip_labels(start, APART, true(STACKED), true())
        assert labels["table:blue_block"] is True
        assert "table:red_block" not in labels  # it was there all along

    def test_batch_equals_single(self) -> None:
        rng = np.random.default_rng(0)
        draws = [scene(**{n: rng.uniform(-0.2, 0.4, 2) for n in MOVABLE}) for _ in range(18)]
        start, end = np.stack(draws[:9]), np.stack(draws[9:])
        r_start, r_end = rng.random((2, 9, len(RELATION_NAMES))) < 0.2
        labels = label_clips(start, end, r_start, r_end)
        assert not (labels.reached & ~labels.askable).any()
        for m in range(9):
            single = clip_labels(start[m], end[m], r_start[m], r_end[m])
            assert [GOAL_NAMES[i] for i in np.flatnonzero(labels.askable[m])] == list(single)
            assert labels.reached[m, labels.askable[m]].tolist() == list(single.values())


class TestSampling:
    def test_balance_weights_and_exclusion(self) -> None:
        end = scene(blue_block=(0.25, 0.1, 0.051), red_block=(0.25, 0.1), cup=(0.3, 0.0), pot=(0.35, 0.15))
        start = scene(blue_block=(0.25, -0.1), red_block=(0.25, 0.1), cup=(0.3, 0.0), pot=(0.35, 0.15))
        labels = label_clips(*(np.repeat(x[None], 2000, 0) for x in (start, end, true(), true(STACKED))))
        goals = sample_goals(labels, np.random.default_rng(0))
        reached = labels.reached[np.arange(2000), goals]
        assert labels.askable[np.arange(2000), goals].all()
        assert 0.45 < reached.mean() < 0.55
        about_blue = np.array(["blue_block" in GOAL_NAMES[g] for g in goals[~reached]])
        assert about_blue.mean() > 0.6
        without = sample_goals(labels, np.random.default_rng(0), allowed=goal_mask(exclude_pairs=TASK_PAIRS))
        assert not {GOALS[g].pair for g in without} & set(TASK_PAIRS)
        assert not labels.reached[np.arange(2000), without].any()  # only negatives are left, and they are given

    def test_nothing_to_ask(self) -> None:
        labels = label_clips(scene()[None], scene()[None], true()[None], true()[None])
        assert sample_goals(labels, np.random.default_rng(0)).tolist() == [-1]


def pick_and_place(*, let_go: bool = True, relation: str = STACKED, rows: int = 60) -> Episode:
    """A hand-made episode: wander off (0-9), approach (10-19), hold (20-39), release and retreat (40-)."""
    poses = np.repeat(APART[None], rows, 0).astype(np.float32)
    truth = np.zeros((rows, len(RELATION_NAMES)), bool)
    state = np.zeros((rows, 7), np.float32)
    state[:, 6] = -1
    state[:, :3] = [0.25, 0.0, 0.15]
    block = poses[0, 0, :3].copy()
    state[:10, :3] = block + np.linspace(0.02, 0.15, 10)[:, None]
    state[10:20, :3] = block + np.linspace(0.15, 0.0, 10)[:, None]
    state[18:40, 6] = 1
    truth[20:40] = true("holding:blue_block", "lifted:blue_block")
    state[20:40, :3] = np.linspace(block, [0.25, 0.1, 0.051], 20)
    poses[20:40, 0, :3] = state[20:40, :3]
    poses[40:, 0, :3] = [0.25, 0.1, 0.051]
    if let_go:
        truth[41:] = true(relation)
    else:
        truth[40:] = truth[39]
        state[40:, 6] = 1
    frames = np.zeros((rows, 2, 2, 3), np.uint8)
    privileged = {"object_poses": poses.reshape(rows, 49), "relations": truth.astype(np.float32)}
    return Episode(0, frames, np.zeros((rows - 1, 7), np.float32), state, "play", 10.0, privileged)


class TestSegments:
    def test_from_the_approach_to_shortly_after_the_release(self) -> None:
        (segment,) = pick_place_segments(pick_and_place())
        assert segment.goal == STACKED
        assert (segment.object_a, segment.object_b) == ("blue_block", "red_block")
        assert segment.start in (9, 10)  # not the wandering away before it
        assert (segment.grasp, segment.release, segment.established, segment.end) == (20, 40, 41, 47)
        assert len(segment) == segment.end - segment.start

    def test_pairs_and_kinds_are_filtered(self) -> None:
        episode = pick_and_place()
        assert (
            pick_place_segments(episode, exclude_pairs=TASK_PAIRS) == []
        )  # and not relabelled as "moved to the right"
        assert pick_place_segments(episode, kinds=("in",)) == []

    def test_never_let_go(self) -> None:
        assert pick_place_segments(pick_and_place(let_go=False)) == []

    def test_next_grasp_ends_it(self) -> None:
        episode = pick_and_place()
        episode.privileged["relations"][44:, relation_index("holding:red_block")] = 1
        assert pick_place_segments(episode)[0].end == 44

    def test_put_down_on_the_table(self) -> None:
        episode = pick_and_place()
        episode.privileged["relations"][40:] = 0
        poses = episode.privileged["object_poses"].reshape(-1, 7, 7)
        poses[40:, 0, :3] = [0.25, 0.0, 0.015]
        (segment,) = pick_place_segments(episode)
        assert segment.goal == "move:blue_block:right"
        poses[40:, 0, :3] = [0.25, 0.055, 0.015]
        assert pick_place_segments(episode)[0].goal == "near:blue_block:red_block"

    def test_data_without_truth(self) -> None:
        episode = pick_and_place()
        bare = Episode(0, episode.frames, episode.actions, episode.state, "x", 10.0)
        with pytest.raises(DatasetError, match=r"privileged\.object_poses"):
            pick_place_segments(bare)
        old = {**episode.privileged, "relations": episode.privileged["relations"][:, :5]}
        with pytest.raises(DatasetError, match="has 5 columns"):
            pick_place_segments(Episode(0, episode.frames, episode.actions, episode.state, "x", 10.0, old))


def test_windows_of_play() -> None:
    episode = pick_and_place()
    actions = np.concatenate([episode.actions, np.zeros((1, 7), np.float32)])
    data = EpisodeArrays(
        frames=np.concatenate([episode.frames] * 2),
        actions=np.concatenate([actions] * 2),
        state=np.concatenate([episode.state] * 2),
        privileged={name: np.concatenate([value] * 2) for name, value in episode.privileged.items()},
        offsets=np.array([0, 60, 120]),
        episodes=np.array([0, 1]),
        tasks=("play", "play"),
        fps=10.0,
    )
    first = data.windows(33, stride=8)
    labels = label_windows(data, first, first + 32)
    stacked = labels.reached[:, goal_index(STACKED)]
    assert stacked.tolist() == [(start % 60) + 32 >= 41 for start in first]
    lifted = labels.reached[:, goal_index("lifted:blue_block")]
    assert lifted.tolist() == [20 <= (start % 60) + 32 < 40 for start in first]
