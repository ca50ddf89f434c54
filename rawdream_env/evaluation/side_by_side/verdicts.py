"""Verdicts on recorded episodes, all by one time rule: that of the dream's judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rawdream_env.envs.episodes import Rollout
from rawdream_env.envs.imagination import Replay
from rawdream_env.envs.verification import Verifier
from rawdream_env.judges.base import ask
from rawdream_env.types import Outcome, Start, Verdict, Video


def judge_recorded(dream: Any, episodes: Sequence[Replay], starts: Sequence[Start]) -> list[Replay]:
    """Episodes with the verdicts of the dream's judge: of the whole video (``judge_every="episode"``), or chunk by chunk until
    the first success (``"chunk"``). Those with a verdict (a dream that broke down) keep it.
    """
    out, k = list(episodes), dream.chunk_len
    whole = dream.judge_every == "episode"
    waiting = [i for i, episode in enumerate(out) if episode.verdict is None]
    chunks = [0 if episode.frames is None else (len(episode.frames) - 1) // k for episode in out]
    for done in range(1, max(chunks, default=0) + 1):
        now = [i for i in waiting if done == chunks[i] or (done < chunks[i] and not whole)]
        videos = []
        for i in now:
            frames, states = out[i].frames, out[i].states
            assert frames is not None
            videos.append(Video(frames[: 1 + done * k], dream.fps, states[done - 1] if states else -1))
        verdicts = ask(dream.judge, videos, [starts[i].instruction for i in now]) if now else []
        for i, verdict in zip(now, verdicts, strict=True):
            out[i] = replace(out[i], verdict=verdict)
            if verdict.outcome == Outcome.SUCCESS:
                waiting.remove(i)
    return out


def state_outcome(states: Sequence[int], at_end: bool) -> int:
    """An episode's outcome (1, 0 or -1) from the dream's own state after each chunk: at the end, or a success after any."""
    if not len(states):
        return -1
    return 1 if not at_end and 1 in states else int(states[-1])


def second_verdicts(dream: Any, dreams: Sequence[Rollout]) -> list[Verdict | None]:
    """Dual-noise verification (paper section 3.2): the second verdict of each success, None for the others."""
    chosen = [i for i, rollout in enumerate(dreams) if rollout.verdict is Outcome.SUCCESS and rollout.valid]
    second: list[Verdict | None] = [None] * len(dreams)
    trajectories = [t for i in chosen if (t := dreams[i].trajectory) is not None]
    for i, replay in zip(chosen, Verifier(dream).second_dreams(trajectories), strict=True):
        second[i] = replay.verdict
    return second
