"""``rawdream judge evaluate``: where the truth comes from, what is counted, and what is written."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rawdream_env.cli import main
from rawdream_env.data import schema
from rawdream_env.data.lerobot import EpisodeData, ShardWriter
from rawdream_env.errors import DatasetError, InvalidOptionError
from rawdream_env.evaluation.judges.episodes import FreshEpisodes, Player, fresh_clips, recorded_clips
from rawdream_env.evaluation.judges.evaluate import EvaluateJudgeConfig, evaluate_judge
from rawdream_env.evaluation.judges.report import JudgeClip, JudgeReport, evaluate
from rawdream_env.judges.scripted import ScriptedJudge
from rawdream_env.piper.relations import RELATION_NAMES, TASKS
from rawdream_env.types import Outcome, Verdict, Video

YES, NO, UNREAD = Outcome.SUCCESS, Outcome.FAILURE, Outcome.INVALID
CLIP = Video(np.zeros((9, 8, 8, 3), np.uint8), 10.0)


def data(
    root: Path, labels: list[float], column: str = "privileged.success", tasks: tuple[str, ...] = ("fold",)
) -> str:
    width = len(RELATION_NAMES) if column == "privileged.relations" else 1
    features = {
        schema.STATE_KEY: schema.numeric_feature(1, ["x"]),
        schema.ACTION_KEY: schema.numeric_feature(7, list("abcdefg")),
        column: schema.numeric_feature(width, [str(i) for i in range(width)]),
    }
    writer = ShardWriter(str(root), fps=10.0, image_shape=(16, 16, 3), features=features)
    episodes = []
    for index, label in enumerate(labels):
        task = tasks[index % len(tasks)]
        truth = np.zeros((9, width), np.float32)
        known = [t.relation for t in TASKS if t.instruction == task]
        truth[-1, RELATION_NAMES.index(known[0]) if known and width > 1 else 0] = label
        frames = np.full((9, 16, 16, 3), 200 if label else 20, np.uint8)
        actions, state = np.zeros((8, 7), np.float32), np.zeros((9, 1), np.float32)
        privileged = {column.removeprefix("privileged."): truth}
        episodes.append(EpisodeData(frames=frames, actions=actions, state=state, task=task, privileged=privileged))
    writer.write(0, episodes, first_episode=0, first_row=0, tasks=tasks)
    writer.finalize(tasks, robot_type="piper" if "relations" in column else "toy")
    return str(root)


def bright(video: Video, text: str) -> float:
    return float(video.frames[-1].mean() > 100)


def test_labels_come_from_the_columns_of_a_data_set(tmp_path: Path) -> None:
    folder = data(tmp_path / "plain", [1, 0, 1])
    clips = list(recorded_clips([folder]))
    assert [clip.label for clip in clips] == [True, False, True] and clips[0].task == "fold"
    assert clips[0].groups() == ("all", "source recorded", "task fold")
    assert len(list(recorded_clips([folder, folder], limit=2))) == 4
    texts = tuple(task.instruction for task in TASKS)
    piper = data(tmp_path / "piper", [1, 0, 0, 1], "privileged.relations", texts)
    assert [(c.label, c.task) for c in recorded_clips([piper])][3] == (True, TASKS[3].name)
    for where, options, message in (
        (data(tmp_path / "none", [1], "privileged.relations"), {}, "has no success label for episode 0"),
        (folder, {"success_key": "won"}, "no column 'won'"),
    ):
        with pytest.raises(DatasetError, match=message):
            list(recorded_clips([where], **options))  # type: ignore[arg-type]


def test_the_report_counts_and_is_written(tmp_path: Path) -> None:
    folder = data(tmp_path / "data", [1, 0, 1, 0, 1])
    config = EvaluateJudgeConfig(data=(folder,), out=str(tmp_path / "out"), batch_size=2, progress=False)
    right = evaluate_judge(config, judge=ScriptedJudge(bright))
    row = right.report.rows["task fold"]
    assert row.confusion.precision.value == row.confusion.recall.value == 1.0 and row.invalid.n == 5
    assert not (tmp_path / "out" / "mistakes.png").exists()
    dark = ScriptedJudge(lambda v, t: 1 - bright(v, t))
    dark.threshold = 0.5  # type: ignore[attr-defined]
    wrong = evaluate_judge(config, judge=dark)
    assert wrong.report.rows["all"].confusion.false_positive_rate.value == 1.0
    assert {p.name for p in wrong.folder.iterdir()} == {"judge_report.json", "judge_report.html", "mistakes.png"}
    content = json.loads((wrong.folder / "judge_report.json").read_text())
    assert content["groups"]["all"]["recall"]["n"] == 3 and content["run"]["config"]["batch_size"] == 2
    page = (wrong.folder / "judge_report.html").read_text()
    assert "<svg" in page and "data:image/png" in page and "probability threshold" in page and "http://" not in page
    assert "this judge: 0.5" in page and "INVALID" in page and 'name="viewport"' in page and "<th>" not in page
    assert "task fold" in str(wrong) and "judge_report.html" in str(wrong)
    timid = evaluate_judge(config, judge=ScriptedJudge(lambda v, t: True if bright(v, t) else UNREAD))
    row = timid.report.as_dict()["groups"]["all"]
    assert (row["judged"], row["invalid"]["successes"], row["invalid"]["n"]) == (3, 2, 5)
    assert [(row[name]["successes"], row[name]["n"]) for name in ("success", "true_success")] == [(3, 3), (3, 3)]
    blind = evaluate_judge(config, judge=ScriptedJudge(lambda v, t: UNREAD))
    assert blind.report.rows["all"].invalid.value == 1.0 and "100.0" in str(blind)


def test_votes_are_swept() -> None:
    votes = [(YES, YES, NO), (YES, NO, NO), (YES, UNREAD, UNREAD)]
    report, without = JudgeReport(), JudgeReport()
    for vote, label in zip(votes, (True, False, True), strict=True):
        clip = JudgeClip(CLIP, "go", label, task="t")
        report.add(clip, Verdict(NO, "x", 0.5, vote))
        without.add(clip, Verdict(YES))
    sweep = report.vote_sweep
    assert [(point["need"], point["true_positive"], point["false_positive"]) for point in sweep] == [
        (1, 2, 1), (2, 1, 0), (3, 0, 0),
    ]  # fmt: skip
    assert [point["invalid"]["successes"] for point in sweep] == [0, 1, 1]
    assert without.vote_sweep == ()


def test_only_the_worst_mistakes_are_kept() -> None:
    report = JudgeReport(worst=2)
    cases = [(YES, 0.7, False), (NO, 0.1, True), (YES, 0.9, False), (YES, 0.95, True), (UNREAD, 0.99, False)]
    for number, (outcome, chance, label) in enumerate(cases):
        report.add(JudgeClip(CLIP, f"clip {number}", label, task="t"), Verdict(outcome, "", chance))
    assert [clip.instruction for clip, _ in report.mistakes()] == ["clip 2", "clip 1"] and report.n == 5


def test_clips_are_forgotten_once_they_are_counted() -> None:
    seen: list[weakref.ref[JudgeClip]] = []
    alive: list[int] = []

    def clips() -> Iterator[JudgeClip]:
        for _ in range(60):
            clip = JudgeClip(CLIP, "go", False, task="t")
            seen.append(weakref.ref(clip))
            alive.append(sum(ref() is not None for ref in seen))
            yield clip

    report = evaluate(ScriptedJudge(lambda v, t: 1.0), clips(), batch_size=5, worst=3)
    assert report.n == 60 and len(report.mistakes()) == 3 and max(alive) <= 3 + 2 * 5


def test_fresh_episodes_depend_on_seed_and_number_alone() -> None:
    spec = FreshEpisodes(seed=3, steps=6, drivers=("expert", "shaky expert"), image_size=32)
    clips = list(fresh_clips(spec, 6))
    assert [clip.task for clip in clips[:4]] == [task.name for task in TASKS]
    assert [clip.source for clip in clips] == ["expert"] * 4 + ["shaky expert"] * 2
    player = Player(spec)
    again = player(5)
    player.close()
    assert (again.video.frames == clips[5].video.frames).all() and again.label == clips[5].label
    assert clips[0].video.frames.shape == (7, 32, 32, 3)
    with pytest.raises(InvalidOptionError, match="drivers"):
        replace(spec, drivers=("nobody",))
    with pytest.raises(InvalidOptionError, match="episodes=0"):
        EvaluateJudgeConfig(episodes=0)


@pytest.mark.slow
def test_the_command_evaluates_the_shipped_judge(tmp_path: Path, capsys: Any) -> None:
    words = ["judge", "evaluate", "--judge", "embedded", "--episodes", "24", "--no-progress", "--workers", "2"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "task put_spoon" in told and "source policy" in told
    content = json.loads((tmp_path / "judge_report.json").read_text())
    assert content["groups"]["source expert"]["recall"]["value"] == 1.0
    alone = evaluate_judge(EvaluateJudgeConfig(episodes=24, workers=0, out=str(tmp_path / "b"), progress=False))
    assert alone.report.as_dict()["groups"] == content["groups"]


_PEAK = """
import resource, sys
import numpy as np
from rawdream_env.evaluation.judges.report import JudgeClip, evaluate
from rawdream_env.judges.scripted import ScriptedJudge
from rawdream_env.types import Video

def clips(count):
    for i in range(count):
        yield JudgeClip(Video(np.full((33, 96, 96, 3), i % 251, np.uint8), 10.0), "fold", bool(i % 2), task="fold")

evaluate(ScriptedJudge(success_rate=0.5), clips(int(sys.argv[1])))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_the_memory_of_the_table_does_not_grow_with_the_episodes() -> None:
    """The videos of 500 episodes take 456 MB."""
    few, many = (
        int(subprocess.run([sys.executable, "-c", _PEAK, str(n)], capture_output=True, check=True).stdout)
        for n in (50, 500)
    )
    assert many < 1.2 * few
