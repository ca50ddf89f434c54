"""A judge of a user that returns something else than verdicts: the same named error at every door."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rawdream_env.envs.dream import DreamVectorEnv
from rawdream_env.envs.reflector import Reflector
from rawdream_env.errors import JudgeError
from rawdream_env.evaluation.judges.report import JudgeClip, evaluate
from rawdream_env.evaluation.judges.watch import WatchConfig, watch
from rawdream_env.judges.base import ask
from rawdream_env.judges.ensemble import EnsembleJudge, HoldOutJudge
from rawdream_env.judges.overlap import OverlappedJudge
from rawdream_env.judges.scripted import ScriptedJudge
from rawdream_env.types import Outcome, Verdict, Video
from rawdream_env.wrappers.dual_noise import DualNoiseVerification

YES = Verdict(Outcome.SUCCESS, "yes")
GOOD = ScriptedJudge(lambda video, text: True)
CLIPS = [Video(np.full((9, 8, 8, 3), i, np.uint8), 10.0) for i in range(3)]
TEXTS = ["go"] * 3

ANSWERS: dict[str, tuple[Callable[[int], Any], str]] = {
    "a generator": (lambda n: (YES for _ in range(n)), "gave a generator"),
    "None": (lambda n: None, "gave a NoneType"),
    "bools": (lambda n: [True] * n, "gave a bool as a verdict"),
    "numbers": (lambda n: np.ones(n), "gave a ndarray"),
    "a None among them": (lambda n: [YES] * (n - 1) + [None], "gave a NoneType as a verdict"),
    "one too few": (lambda n: [YES] * (n - 1), "verdicts for"),
    "one for all": (lambda n: YES, "gave a Verdict"),
    "a verdict without an outcome": (lambda n: [Verdict("Success")] * n, "outcome 'Success'"),  # type: ignore[arg-type]
}


class Bad:
    """Answers rightly ``good`` times, then with ``answer``."""

    def __init__(self, answer: Callable[[int], Any], good: int = 0) -> None:
        self.answer, self.good = answer, good

    def __call__(self, videos: Any, instructions: Any) -> Any:
        self.good -= 1
        return [YES] * len(videos) if self.good >= 0 else self.answer(len(videos))


def dream(judge: Any, **options: Any) -> DreamVectorEnv:
    return DreamVectorEnv(
        2, world_model="null", judge=judge, starts="null", max_episode_steps=1, autoreset_mode="Disabled", **options
    )


def step(env: Any) -> None:
    env.reset(seed=0)
    env.step(np.zeros(env.action_space.shape, np.float32))


def overlapped(judge: Any) -> None:
    waiting: OverlappedJudge[int] = OverlappedJudge(judge)
    try:
        waiting.submit([0, 1, 2], CLIPS, TEXTS)
        waiting.fetch(wait_s=5)
    finally:
        waiting.close()


DOORS: dict[str, Callable[[Any], object]] = {
    "ask": lambda answer: ask(Bad(answer), CLIPS, TEXTS),
    "ensemble": lambda answer: EnsembleJudge([GOOD, Bad(answer)])(CLIPS, TEXTS),
    "rewarding": lambda answer: HoldOutJudge(Bad(answer), GOOD)(CLIPS, TEXTS),
    "held out": lambda answer: HoldOutJudge(GOOD, Bad(answer))(CLIPS, TEXTS),
    "overlapped": lambda answer: overlapped(Bad(answer)),
    "dream": lambda answer: step(dream(Bad(answer))),
    "dream after every chunk": lambda answer: step(dream(Bad(answer), judge_every="chunk")),
    "second dream": lambda answer: step(DualNoiseVerification(dream(Bad(answer, good=1)))),
    "reflector": lambda answer: step(dream("none", return_frames=True, reflector=Reflector(Bad(answer)))),
    "report": lambda answer: evaluate(Bad(answer), [JudgeClip(CLIPS[0], "go", True, "on:a:b")]),
}


@pytest.mark.parametrize("kind", ANSWERS)
@pytest.mark.parametrize("door", DOORS)
def test_every_door_names_what_a_judge_gave(door: str, kind: str) -> None:
    answer, said = ANSWERS[kind]
    with pytest.raises(JudgeError, match=said) as caught:
        DOORS[door](answer)
    assert "Bad" in str(caught.value) and "Verdict per video" in str(caught.value)
    assert str(caught.value).count("\n") == 0 and len(str(caught.value)) < 250


@pytest.mark.parametrize("kind", ANSWERS)
def test_watching_one_video_names_it_too(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [Image.fromarray(frame) for frame in CLIPS[1].frames]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    answer, said = ANSWERS[kind]
    monkeypatch.setattr("rawdream_env.evaluation.judges.watch.load_judge", lambda *_, **__: Bad(answer))
    with pytest.raises(JudgeError, match=said):
        watch(WatchConfig(tmp_path / "a.gif", instruction="go"))
