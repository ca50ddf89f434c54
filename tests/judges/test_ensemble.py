"""Ensembles, the hold-out judge and its alarm, and the Robometer client against a server that misbehaves."""

from __future__ import annotations

import contextlib
import email
import email.policy
import io
import json
import math
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rawdream_env.envs.dream import DreamVectorEnv
from rawdream_env.errors import InvalidOptionError, JudgeError
from rawdream_env.judges import load_judge
from rawdream_env.judges.ensemble import EnsembleJudge, HoldOutJudge, JudgeGap, JudgeGapWarning
from rawdream_env.judges.robometer import RobometerJudge
from rawdream_env.judges.scripted import ScriptedJudge
from rawdream_env.types import Outcome, Verdict, Video

YES, NO, UNREAD = Outcome.SUCCESS, Outcome.FAILURE, Outcome.INVALID
CLIP = Video(np.zeros((17, 8, 8, 3), np.uint8), 10.0)


def always(outcome: Outcome, probability: float | None = None) -> ScriptedJudge:
    return ScriptedJudge(lambda video, text: Verdict(outcome, outcome.name, probability))


@pytest.mark.parametrize(
    ("rule", "votes", "expected"),
    [
        ("all", [YES, YES], YES), ("all", [YES, NO], NO), ("all", [YES, UNREAD], UNREAD), ("all", [NO, UNREAD], NO),
        ("any", [NO, YES], YES), ("any", [NO, NO], NO), ("any", [NO, UNREAD], UNREAD), ("any", [YES, UNREAD], YES),
        ("majority", [YES, YES, NO], YES), ("majority", [YES, NO, UNREAD], UNREAD), ("majority", [NO, NO, UNREAD], NO),
    ],
)  # fmt: skip
def test_rules(rule: str, votes: list[Outcome], expected: Outcome) -> None:
    verdict = EnsembleJudge([always(vote) for vote in votes], rule)([CLIP], ["go"])[0]
    assert verdict.outcome is expected and verdict.votes == tuple(votes)


def test_one_judge_that_fails_does_not_take_the_others_with_it() -> None:
    def broken(videos: Any, instructions: Any) -> list[Verdict]:
        raise RuntimeError("boom")

    verdict = EnsembleJudge([always(YES, 0.8), broken], "any")([CLIP], ["go"])[0]
    assert verdict.outcome is YES and verdict.probability == 0.8 and "boom" in verdict.reason
    assert EnsembleJudge([always(YES), broken], "all")([CLIP], ["go"])[0].outcome is UNREAD
    with pytest.raises(JudgeError, match="0 verdicts for 1 videos"):  # not a failure but a judge that is none
        EnsembleJudge([always(YES), lambda v, t: []], "all")([CLIP], ["go"])
    with pytest.raises(InvalidOptionError, match="2 judges"):
        EnsembleJudge([always(YES)])


def test_the_gap_has_its_interval_by_hand() -> None:
    gap = JudgeGap(n=98, rewarding=60, held_out=30, only_rewarding=35, only_held_out=5)
    b, c, n = 35.5, 5.5, 100
    half = 1.959964 * math.sqrt(((b + c) / n - ((b - c) / n) ** 2) / n)
    assert gap.gap == pytest.approx(30 / 98)
    assert gap.interval == pytest.approx(((b - c) / n - half, (b - c) / n + half))
    assert JudgeGap().as_dict() == {"judge_gap_n": 0} and math.isnan(JudgeGap().gap)


def test_the_hold_out_judge_never_rewards_and_alarms_once_per_gap() -> None:
    mood = {"kind": False}
    rewarding = ScriptedJudge(lambda video, text: YES if mood["kind"] else NO)
    judge = HoldOutJudge(rewarding, always(NO), alarm=0.2, window=40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(v.outcome is NO for v in judge([CLIP] * 40, ["go"] * 40))
        mood["kind"] = True
        assert judge([CLIP] * 4, ["go"] * 4)[0].outcome is YES  # 4 of 40: not certain yet
    with pytest.warns(JudgeGapWarning, match="more successes than the hold-out judge"):
        judge([CLIP] * 20, ["go"] * 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judge([CLIP] * 20, ["go"] * 20)
    assert judge.alarmed and judge.gap.n == 40 and judge.gap.gap == 1.0
    mood["kind"] = False
    judge([CLIP] * 40, ["go"] * 40)
    assert not judge.alarmed and judge.gap.gap == 0.0
    assert HoldOutJudge(always(YES), always(UNREAD))([CLIP], ["go"])[0].outcome is YES


def test_grpo_logs_the_gap_of_a_watched_environment(tmp_path: Path) -> None:
    from rawdream_env.policies.tiny_vla import TinyVLA, TinyVLAConfig
    from rawdream_env.trainers.grpo.grpo import GRPOConfig, train_grpo

    own = ScriptedJudge(success_rate=0.5)
    env = DreamVectorEnv(
        4, world_model="null", judge=own, held_out_judge="scripted", starts="null", autoreset_mode="Disabled",
        max_episode_steps=1,
    )  # fmt: skip
    config = GRPOConfig(
        tmp_path, steps=1, group_size=4, groups_per_step=1, max_flagged=4, tensorboard=False, progress=False
    )
    train_grpo(config, env=env, policy=TinyVLA(TinyVLAConfig(width=16, heads=2)))
    with pytest.raises(InvalidOptionError, match="give held_out_judge to the environment"):
        train_grpo(replace(config, held_out_judge="scripted"), env=env)
    with pytest.raises(
        InvalidOptionError, match="held_out_judge needs a judge to compare with, but this environment has none"
    ):
        DreamVectorEnv(1, world_model="null", judge="none", starts="null", held_out_judge="scripted")
    logged = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert logged["held_out_gap"] == 0.0 and logged["held_out_gap_n"] == logged["trusted"] >= 2
    assert logged["held_out_success_rate"] == logged["trusted_success_rate"] and env.judge.rewarding is own


# -- Robometer ------------------------------------------------------------------------------------------------------


Answer = Callable[[Any, dict[str, Any]], None]


def reply(handler: Any, status: int, body: bytes, length: int | None = None, **headers: str) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    handler.end_headers()
    handler.wfile.write(body)


def probabilities(*values: Any) -> bytes:
    """The server's response to one sample."""
    success = {"success_probs": [list(values)]}
    progress = {"progress_pred": [[0.5] * len(values)]}
    return json.dumps({"outputs_preference": None, "outputs_progress": progress, "outputs_success": success}).encode()


def chances(*values: float) -> Answer:
    return lambda handler, asked: reply(handler, 200, probabilities(0.0, *values))


def parsed(handler: Any) -> dict[str, Any]:
    """A multipart request as the public server reads it: .npy files and JSON fields, references replaced by arrays."""
    head = f"Content-Type: {handler.headers['Content-Type']}\r\n\r\n".encode()
    message = email.message_from_bytes(
        head + handler.rfile.read(int(handler.headers["Content-Length"])), policy=email.policy.HTTP
    )
    arrays: dict[str, Any] = {}
    fields: dict[str, Any] = {}
    for part in message.iter_parts():  # type: ignore[attr-defined]
        name, content = part.get_param("name", header="content-disposition"), part.get_payload(decode=True)
        if part.get_filename():
            assert part.get_filename().endswith(".npy")
            arrays[name] = np.load(io.BytesIO(content), allow_pickle=False)
        else:
            fields[name] = json.loads(content)
    steps = fields.pop("use_frame_steps", False)
    samples = [fields[f"sample_{i}"] for i in range(len(fields))]
    for sample in samples:
        assert sample["sample_type"] == "progress"
        sample["trajectory"]["frames"] = arrays[sample["trajectory"]["frames"]["__numpy_file__"]]
    return {"samples": samples, "use_frame_steps": steps, "path": handler.path}


def brightness(handler: Any, asked: dict[str, Any]) -> None:
    """The server with a model that takes the brightness of the newest frame it sees for the probability of success.

    With frame steps, frame i is judged from 4 frames spread over the first i + 1; without, from the whole video.
    """
    rows = []
    for sample in asked["samples"]:
        frames = sample["trajectory"]["frames"]
        seen = [frames[np.linspace(0, i, 4, dtype=int)] for i in range(len(frames))]
        rows.append([float((s if asked["use_frame_steps"] else frames)[-1].mean()) / 255 for s in seen])
    reply(handler, 200, json.dumps({"outputs_progress": None, "outputs_success": {"success_probs": rows}}).encode())


@pytest.fixture
def service() -> Iterator[Any]:
    """A server that gives its ``answers`` in order and repeats the last; ``asked`` are the requests as it reads them."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = parsed(self)
            server.asked.append(asked)
            server.keys.append(self.headers.get("Authorization"))
            answer = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
            with contextlib.suppress(OSError):  # the client has left
                answer(self, asked)

        def log_message(self, *args: Any) -> None:
            pass

    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.asked, server.keys, server.answers = [], [], [chances(0.1, 0.2)]
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_the_first_chunk_above_the_threshold_is_the_success(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBOMETER_API_KEY", "secret")
    judge = load_judge(f"robometer:{service.url}")
    assert isinstance(judge, RobometerJudge) and judge.remote
    service.answers = [chances(0.9, 0.2), chances(0.1, 0.85), chances(0.1, 0.84)]
    verdicts = [judge([CLIP], [" put\x00 it "])[0] for _ in range(3)]
    assert [v.outcome for v in verdicts] == [YES, YES, NO] and verdicts[0].probability == 0.9
    assert "frame 8" in verdicts[0].reason and "frame 16" in verdicts[1].reason
    (sample,) = service.asked[0]["samples"]
    trajectory = sample["trajectory"]
    assert trajectory["frames"].shape == (3, 8, 8, 3) and trajectory["frames"].dtype == np.uint8
    assert trajectory["task"] == "put it" and trajectory["frames_shape"] == [3, 8, 8, 3]
    assert service.asked[0]["path"] == "/evaluate_batch_npy" and service.asked[0]["use_frame_steps"] is True
    assert set(service.keys) == {"Bearer secret"} and "secret" not in repr(vars(judge))


def test_chunks_are_judged_from_the_frames_up_to_them(service: Any) -> None:
    """The start frame and every chunk's last frame travel; a bright start is no success, a bright later chunk is."""
    service.answers = [brightness]
    frames = np.zeros((21, 8, 8, 3), np.uint8)
    frames[0] = frames[15] = 255  # the start and a frame within a chunk: neither ends a chunk
    frames[16], frames[20] = 230, 100
    judge = RobometerJudge(f"{service.url}/")
    verdict, dark = judge([Video(frames, 10.0), Video(np.zeros_like(frames), 10.0)], ["go", "go"])
    assert verdict.outcome is YES and verdict.probability == pytest.approx(230 / 255) and "frame 16" in verdict.reason
    assert dark.outcome is NO and dark.probability == 0.0
    sent = {asked["samples"][0]["trajectory"]["frames"].tobytes() for asked in service.asked}
    assert frames[[0, 8, 16, 20]].tobytes() in sent


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"[" * 50_000, b"{}", b'{"outputs_success": null}', b'{"outputs_success": {"success_probs": 1}}',
     b'{"outputs_success": {"success_probs": []}}', b'{"outputs_success": {"success_probs": [0.9, 0.9, 0.9]}}',
     probabilities(0.9), probabilities(0, 0.9), probabilities(0, 0.9, 0.9, 0.9), probabilities(0, 0.9, math.nan),
     probabilities(0, 0.9, "1"), probabilities(0, 0.9, True), probabilities(0, 0.9, 1.1), probabilities(0, 0.9, None),
     b'{"success_probability": [0.9, 0.9]}', b"\xff" * 9],
)  # fmt: skip
def test_anything_but_the_schema_is_invalid(service: Any, body: bytes) -> None:
    service.answers = [lambda handler, asked: reply(handler, 200, body)]
    verdict = RobometerJudge(service.url)([CLIP], ["go"])[0]
    assert verdict.outcome is UNREAD and verdict.reason and len(service.asked) == 1


def test_outages_are_tried_again_and_bad_requests_are_not(service: Any) -> None:
    def cut(handler: Any, asked: Any) -> None:
        reply(handler, 200, b'{"outputs_success', length=400)

    def reset(handler: Any, asked: Any) -> None:
        handler.connection.close()

    busy = [lambda h, a, s=status: reply(h, s, b"", Retry_After="0") for status in (503, 429)]
    for first, second in zip(busy, (cut, reset), strict=True):
        service.answers = [first, second, chances(0.9, 0.9)]
        assert RobometerJudge(service.url)([CLIP], ["go"])[0].outcome is YES
    assert len(service.asked) == 6
    service.answers = [lambda handler, asked: reply(handler, 400, b"no")]
    assert "status 400" in RobometerJudge(service.url)([CLIP], ["go"])[0].reason and len(service.asked) == 7


def never(handler: Any, asked: Any) -> None:
    time.sleep(5)


def trickle(handler: Any, asked: Any) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "40")
    handler.end_headers()
    for _ in range(40):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.2)


@pytest.mark.parametrize(
    "answer", [never, trickle, lambda h, a: reply(h, 503, b"", Retry_After="86400"), "nobody listens"]
)
def test_every_call_is_back_by_its_deadline_and_no_outage_is_a_failure(service: Any, answer: Any) -> None:
    url = "http://127.0.0.1:9/" if isinstance(answer, str) else service.url
    service.answers = [answer]
    begin = time.monotonic()
    verdicts = RobometerJudge(url, deadline_s=0.6, concurrency=2)([CLIP] * 3, ["go"] * 3)
    assert time.monotonic() - begin < 4.5  # the slowest answer takes 5 s
    assert [v.outcome for v in verdicts] == [UNREAD] * 3 and all("within 0.6 s" in v.reason for v in verdicts)


def test_bad_items_are_not_sent_and_bad_options_are_named(service: Any) -> None:
    judge = RobometerJudge(service.url)
    empty = Video(np.zeros((1, 8, 8, 3), np.uint8), 10.0)
    assert [v.outcome for v in judge([empty, CLIP], ["go", ""])] == [UNREAD, UNREAD] and not service.asked
    assert judge([], []) == []
    for url in ("ftp://x/y", "localhost:80", "http://user:secret@host/", "http://host:99999", "http://host/a b"):
        with pytest.raises(InvalidOptionError, match="address") as error:
            RobometerJudge(url)
        assert "secret" not in str(error.value)
