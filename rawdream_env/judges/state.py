"""The state of a world model as a judge."""

from __future__ import annotations

from collections.abc import Sequence

from rawdream_env.judges.base import check_pairs, invalid
from rawdream_env.types import Outcome, Verdict, Video


class StateJudge:
    """Reports ``Video.state_success``: whether the task is done in the state that a world model imagined.

    It sees no picture. As the judge of an environment it is the truth *within the dream*, and shows what reinforcement
    learning makes of the world model's errors alone; as ``held_out_judge`` it shows what it makes of the judge's. A video
    without a state, such as one of a video model, is INVALID.
    """

    scanning = True

    def frames_seen(self, total: int, fps: float) -> tuple[int, ...]:
        """None."""
        return ()

    def __call__(self, videos: Sequence[Video], instructions: Sequence[str]) -> list[Verdict]:
        """One verdict per video."""
        check_pairs(videos, instructions)
        return [
            Verdict(Outcome(video.state_success), probability=float(video.state_success))
            if video.state_success in (0, 1)
            else invalid("the world model reports no state for this task")
            for video in videos
        ]
