"""The vision-language client against a server that misbehaves: deadlines, retries, probe, cache, keys, order."""

from __future__ import annotations

import itertools
import json
import logging
import os
import pickle
import random
import threading
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import rawdream_env  # noqa: F401
from rawdream_env.errors import InvalidOptionError, JudgeUnavailableError
from rawdream_env.judges import load_judge
from rawdream_env.judges.vlm.config import API_KEY, VLMLocalConfig, VLMServerConfig, parse_vlm_spec
from rawdream_env.judges.vlm.http import Response, Server, Servers
from rawdream_env.judges.vlm.server import VLMServerJudge
from rawdream_env.testing.faults import FAULTS, FaultServer, free_port, reply
from rawdream_env.types import Outcome, Video

YES, NO, UNREAD = Outcome.SUCCESS, Outcome.FAILURE, Outcome.INVALID
GO = "put the cup into the pot"
QUICK: dict[str, Any] = {
    "deadline_s": 60.0, "request_timeout_s": 30.0, "backoff_s": 0.02, "max_backoff_s": 0.1, "max_retry_after_s": 0.2,
    "min_side": 0,
}  # fmt: skip


def video(seed: int = 0, frames: int = 5, side: int = 16) -> Video:
    return Video(np.random.default_rng(seed).integers(0, 256, (frames, side, side, 3), dtype=np.uint8), 10.0)


def judge_of(*servers: FaultServer, **options: Any) -> VLMServerJudge:
    return VLMServerJudge(VLMServerConfig(servers=tuple(s.url for s in servers), **(QUICK | options)))


# -- what travels -----------------------------------------------------------------------------------------------------


def test_a_video_becomes_one_constrained_request_for_all_votes() -> None:
    with FaultServer(keep=True) as server:
        judge = judge_of(server, seed=7, encoding="png")
        (verdict,) = judge([video(frames=11)], [GO])
        assert verdict.outcome is YES and verdict.votes == (YES,) * 5 and verdict.raw == (reply(),) * 5
        assert verdict.probability == 1.0 and verdict.latency_s > 0 and "It is there." in verdict.reason
        body = server.seen[-1][1]
    assert (body["n"], body["temperature"], body["seed"], body["model"]) == (5, 0.7, 7, "tiny-vlm")
    schema = body["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["Final Answer"]["enum"] == ["Success", "Failure"] and not schema["additionalProperties"]
    media = body["media_io_kwargs"]["video"]
    assert media["fps"] == 10.0 and media["frames_indices"] == [0, 3, 7, 10] and media["num_frames"] == -1
    url = body["messages"][-1]["content"][0]["video_url"]["url"]
    assert url.count(",") == 4 and url.startswith("data:video/jpeg;base64,iVBOR")


def test_bad_items_are_invalid_without_a_request() -> None:
    with FaultServer() as server:
        judge = judge_of(server)
        asked = server.requests
        bad = Video(np.full((5, 16, 16, 3), np.nan), 10.0)
        verdicts = judge([video(), bad, video(1), video(2)], [GO, GO, "<>{}", GO])
        assert [v.outcome for v in verdicts] == [YES, UNREAD, UNREAD, YES] and server.requests == asked + 2
        assert "not finite" in verdicts[1].reason and "empty" in verdicts[2].reason
        assert judge([], []) == []
        with pytest.raises(ValueError, match="1 videos but 2 instructions"):
            judge([video()], [GO, GO])


def test_votes_decide_and_odd_replies_are_unreadable() -> None:
    answers = itertools.cycle([
        [reply()] * 4 + ["{"], [reply()] * 3 + [reply("Failure")] * 2, [reply()] * 3 + ["Success"] * 2,
        [reply("Failure")], [None, 3, {"Final Answer": "Success"}, reply(), reply()],
    ])  # fmt: skip
    with FaultServer(answer=lambda request: next(answers)) as server:
        judge = judge_of(server, max_in_flight=1)
        verdicts = judge([video(i) for i in range(5)], [GO] * 5)
    assert [v.outcome for v in verdicts] == [YES, NO, UNREAD, UNREAD, UNREAD]
    assert all(len(verdict.votes) == 5 for verdict in verdicts)
    assert "not text but dict" in verdicts[4].raw[2]


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_for_ever_is_invalid_by_the_deadline(fault: str) -> None:
    with FaultServer(itertools.repeat(fault), drip_s=0.05) as server:
        judge = judge_of(server, deadline_s=0.7, request_timeout_s=0.4)
        begin = time.monotonic()
        verdicts = judge([video(i) for i in range(20)], [GO] * 20)
        assert time.monotonic() - begin < 0.7 + 30
    assert [verdict.outcome for verdict in verdicts] == [UNREAD] * 20
    assert all("no answer within" in verdict.reason for verdict in verdicts)


@pytest.mark.parametrize("fault", FAULTS)
def test_after_a_fault_the_video_is_asked_about_again(fault: str) -> None:
    with FaultServer([fault] * 3, drip_s=0.05, answer=lambda request: [reply("Failure")] * 5) as server:
        verdicts = judge_of(server, request_timeout_s=0.4)([video(i) for i in range(6)], [GO] * 6)
    assert [verdict.outcome for verdict in verdicts] == [NO] * 6


def test_no_episode_is_lost_in_a_mixture_of_faults() -> None:
    _mixture(60)


@pytest.mark.slow
def test_no_episode_is_lost_in_a_long_mixture_of_faults(capsys: pytest.CaptureFixture[str]) -> None:
    said = _mixture(1500)
    with capsys.disabled():
        print(f"\n{said}")


def _mixture(count: int) -> str:
    rng = random.Random(0)
    with FaultServer((rng.choice((*FAULTS, *["ok"] * 11)) for _ in itertools.count()), drip_s=0.05) as server:
        judge = judge_of(server, request_timeout_s=0.3)
        verdicts = judge([video(i) for i in range(count)], [GO] * count)
        asked = server.requests
    outcomes = [verdict.outcome for verdict in verdicts]
    assert outcomes == [YES] * count and asked > 1.5 * count
    assert max(verdict.latency_s for verdict in verdicts) < 61.0
    return (
        f"{count} videos, {asked} requests, half of them failing in {len(FAULTS)} ways: {outcomes.count(UNREAD)} lost, "
        f"{outcomes.count(NO)} turned into failures (95 % bound {3 / count:.4f})"
    )


def test_down_for_a_while_loses_nothing_and_a_dead_port_is_left_alone() -> None:
    with FaultServer() as server:
        judge = judge_of(server, deadline_s=4.0)
        server.down.set()
        threading.Timer(0.8, server.down.clear).start()
        verdicts = judge([video(i) for i in range(20)], [GO] * 20)
        assert [verdict.outcome for verdict in verdicts] == [YES] * 20 and server.requests < 30
    begin = time.monotonic()
    verdicts = judge([video(i) for i in range(20, 60)], [GO] * 40)  # down for ever: the server is gone
    assert time.monotonic() - begin < 60 and {verdict.outcome for verdict in verdicts} == {UNREAD}
    assert "Connection" in verdicts[0].reason


def test_a_long_call_has_time_as_long_as_answers_come() -> None:
    with FaultServer(delay=lambda request: 0.4) as server:
        verdicts = judge_of(server, deadline_s=2.0, max_in_flight=2)([video(i) for i in range(12)], [GO] * 12)
    assert [verdict.outcome for verdict in verdicts] == [YES] * 12


def test_refusals_are_final_and_say_what_the_server_said() -> None:
    with FaultServer(["400"]) as server:
        judge = judge_of(server)
        asked = server.requests
        (verdict,) = judge([video()], [GO])
        assert verdict.outcome is UNREAD and "status 400" in verdict.reason and server.requests == asked + 1


def test_servers_take_turns_and_failing_ones_rest() -> None:
    with FaultServer() as good, FaultServer(itertools.repeat("500")) as bad, FaultServer() as other:
        judge = judge_of(good, bad, other, max_backoff_s=5.0, backoff_s=1.0, max_in_flight=2)
        verdicts = judge([video(i) for i in range(30)], [GO] * 30)
        assert {verdict.outcome for verdict in verdicts} == {YES}
        assert good.requests >= 12 and other.requests >= 12 and bad.requests <= 6


def test_retry_after_in_all_its_spellings() -> None:
    def wait(text: str) -> float | None:
        return Response(429, {"retry-after": text}, b"").retry_after()

    assert wait("3") == 3 and wait("1e999") == float("inf") and wait("-5") == 0 and wait("soon") is None
    assert (
        wait("Wed, 21 Oct 2015 07:28:00 GMT") == 0
        and wait("Wed, 21 Oct 2999 07:28:00 GMT") > 1e9
        and wait("nan") is None
    )
    servers = Servers([Server("a"), Server("b")], max_rest_s=9.0)
    servers.failed(servers.all[0], 1.0, 7.0)
    assert servers.pick() == (servers.all[1], 0.0)
    servers.failed(servers.all[1], 1.0, 3.0)
    assert servers.pick()[0] is servers.all[1] and 0.5 < servers.pick()[1] <= 3.0


def test_shuffled_replies_find_their_episodes() -> None:
    _shuffled(400)


@pytest.mark.slow
def test_ten_thousand_shuffled_replies_find_their_episodes(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = _shuffled(10_000)
    with capsys.disabled():
        print(f"\n10,000 delayed and shuffled replies: {wrong} on the wrong episode (95 % bound {3 / 10_000:.4f})")


def _shuffled(count: int) -> int:
    """Every video has its own right answer, which only its instruction tells; replies come late and in any order."""

    def number(request: Any) -> int:
        return int(request["messages"][-1]["content"][1]["text"].split("cup ")[1].split("<")[0])

    def answer(request: Any) -> list[str]:
        i = number(request)
        return [reply("Success" if i * 7919 % 3 else "Failure", f"cup {i}.")] * 5

    still = video()
    with FaultServer(answer=answer, delay=lambda request: (number(request) * 31 % 17) / 1500) as server:
        judge = judge_of(server, deadline_s=300.0, request_timeout_s=60.0, max_in_flight=24)
        verdicts = judge([still] * count, [f"find cup {i}" for i in range(count)])
    wrong = sum(
        verdict.outcome != (YES if i * 7919 % 3 else NO) or not verdict.reason.endswith(f"cup {i}.")
        for i, verdict in enumerate(verdicts)
    )
    assert len(verdicts) == count and wrong == 0
    return wrong


def test_calls_from_several_threads_keep_the_bound() -> None:
    at_once, most, lock = 0, 0, threading.Lock()

    def answer(request: Any) -> list[str]:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.02)
        with lock:
            at_once -= 1
        return [reply()] * 5

    with FaultServer(answer=answer) as server:
        judge = judge_of(server, max_in_flight=3)
        calls = [threading.Thread(target=judge, args=([video(i) for i in range(8)], [str(n)] * 8)) for n in range(4)]
        before = threading.active_count()
        for call in calls:
            call.start()
        for call in calls:
            call.join()
    assert 1 < most <= 3 and server.requests == 2 + 32 and threading.active_count() <= before + 1


# -- the start ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"structured": False}, r"\(vLLM 0.32.0\) ignores structured output: .*replied 'Sure! Hello.'"),
        ({"honours_n": False}, "gives 1 replies where 5 are asked for"),
        ({"honours_frames": False}, "ignores media_io_kwargs: videos of 34 and 66 frames both make 64 tokens"),
        ({"model": "other"}, "does not serve the model 'tiny-vlm'; it serves 'other'"),
    ],
)
def test_servers_that_do_not_fit_are_refused_by_name(options: dict[str, Any], said: str) -> None:
    with FaultServer(**options) as server, pytest.raises(JudgeUnavailableError, match=said) as caught:
        judge_of(server, model="tiny-vlm")
    assert server.url in str(caught.value)


def test_unreachable_servers_raise_at_the_start_only(caplog: pytest.LogCaptureFixture) -> None:
    dead = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(JudgeUnavailableError, match=f"No judge server answers: {dead} cannot be reached.*vllm serve"):
        load_judge(f"vlm_server:{dead}")
    with FaultServer() as good, caplog.at_level(logging.WARNING):
        judge = load_judge(f"vlm_server:{dead},{good.url}?backoff_s=0.05")
        assert "cannot be reached" in caplog.text
        assert {v.outcome for v in judge([video(i) for i in range(8)], [GO] * 8)} == {YES}


def test_servers_of_different_models_need_a_name() -> None:
    with FaultServer() as one, FaultServer(model="other") as two:
        with pytest.raises(JudgeUnavailableError, match="different models"):
            judge_of(one, two)
        with pytest.raises(JudgeUnavailableError, match="does not serve the model 'other'"):
            judge_of(one, two, model="other")


def test_without_threads_the_caller_works(monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultServer() as server:
        judge = judge_of(server)
        start = threading.Thread.start

        def refuse(thread: threading.Thread) -> None:
            if thread.name.startswith("judge-"):
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", refuse)
        assert judge([video()], [GO])[0].outcome is YES


# -- cache, key, configuration -----------------------------------------------------------------------------------------


def test_the_same_question_is_asked_once_and_outages_are_not_kept(tmp_path: Path) -> None:
    with FaultServer(["500"] * 200) as server:
        judge = judge_of(server, deadline_s=0.2, cache_dir=str(tmp_path))
        assert judge([video()], [GO])[0].outcome is UNREAD
        server._faults = iter(())
        first = judge_of(server, cache_dir=str(tmp_path))([video(), video(1), video()], [GO, GO, "put the spoon down"])
        asked = server.requests
        second = judge_of(server, cache_dir=str(tmp_path))([video(), video(1)], [GO, GO])
        assert [v.raw for v in second] == [v.raw for v in first[:2]] and server.requests == asked + 2  # its probe
        judge_of(server, cache_dir=str(tmp_path), seed=1)([video()], [GO])
        assert server.requests == asked + 5
        stored = {path: path.read_text() for path in tmp_path.rglob("*.json")}
        for damage in (lambda text: "{", lambda text: text.replace("Success", "Failure")):
            for path, text in stored.items():
                assert damage(text) != text
                path.write_text(damage(text))
            assert judge_of(server, cache_dir=str(tmp_path))([video()], [GO])[0].outcome is YES


def test_the_key_stays_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    key = "sk-very-secret-123"
    monkeypatch.setenv(API_KEY, key)
    answers = iter([[reply()] * 5, [f"bad key {key}"] * 5])

    def answer(request: Any) -> list[str]:
        return next(answers)

    with FaultServer(["500"], answer=answer, keep=True) as server, caplog.at_level(logging.DEBUG):
        judge = judge_of(server, cache_dir=str(tmp_path))
        verdicts = judge([video()], [GO]) + judge([video(1)], [GO])
        assert {authorization for authorization, _ in server.seen} == {f"Bearer {key}"}
        texts = [repr(judge), repr(vars(judge)), repr(verdicts[0]), caplog.text, pickle.dumps(judge).decode("latin-1")]
        texts += [path.read_text() for path in tmp_path.rglob("*.json")] + [json.dumps(server.seen[-1][1])]
        assert verdicts[0].outcome is YES and verdicts[1].outcome is UNREAD
        assert not any(key in text for text in texts) and key not in verdicts[1].reason
        again = pickle.loads(pickle.dumps(judge))
        assert again.model == "tiny-vlm" and again.servers.all[0].checked
    for bad in ({"api_key": key}, {"servers": [f"http://me:{key}@host/v1"]}):
        with pytest.raises(InvalidOptionError) as caught:
            load_judge({"kind": "vlm_server", "servers": ["http://host/v1"], **bad})
        assert key not in str(caught.value) and API_KEY in str(caught.value)


def test_specs_in_words_json_and_files(tmp_path: Path) -> None:
    words = parse_vlm_spec("vlm_server:http://a:1/v1,https://b/v1?model=Qwen/Qwen3-VL-8B-Instruct&votes=7&need=5")
    options = {"kind": "vlm_server", "servers": ["http://a:1/v1", "https://b/v1"], "votes": 7, "need": 5}
    assert words == parse_vlm_spec({**options, "model": "Qwen/Qwen3-VL-8B-Instruct"})
    assert parse_vlm_spec("vlm_local:models/q?seed=3") == VLMLocalConfig(model="models/q", seed=3)
    with FaultServer() as server:
        (tmp_path / "judge.json").write_text(json.dumps({"kind": "vlm_server", "servers": [server.url], **QUICK}))
        assert isinstance(load_judge(tmp_path / "judge.json"), VLMServerJudge)
        envs = gym.make_vec(
            "rawdream/Dream-v0", num_envs=2, world_model="null", starts="null", max_episode_steps=1,
            judge={"kind": "vlm_server", "servers": [server.url], **QUICK},
        )  # fmt: skip
        assert "vlm_server" in envs.spec.to_json()
        envs.reset(seed=0)
        *_, info = envs.step(envs.action_space.sample())
        assert info["verdict"].tolist() == [1, 1] and info["success_probability"].tolist() == [1.0, 1.0]
        envs.close()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"kind": "vlm"}, "kind='vlm'"), ("vlm_server:", "no servers"), ("vlm_local:", "no model"),
        ("vlm_server:ftp://a", "no address"), ("vlm_server:http://a:99999/v1", "no address"),
        ("vlm_server:http://a/v1?colour=1", "no option 'colour'"), ("vlm_server:http://a/v1?votes=x", "must be a number"),
        ("vlm_server:http://a/v1?votes=0", "above 0"), ("vlm_server:http://a/v1?deadline_s=inf", "finite"),
        ("vlm_server:http://a/v1?need=2", "more than half"), ("vlm_server:http://a/v1?encoding=gif", "jpeg"),
        ({"kind": "vlm_server", "servers": ["http://a/v1"], "votes": True}, "integer"),
        ({"kind": "vlm_server", "servers": 3}, "cannot be read"), ("nothing.json", "cannot be read"),
    ],
)  # fmt: skip
def test_specs_that_make_no_sense_are_named(spec: Any, said: str) -> None:
    with pytest.raises(InvalidOptionError, match=said):
        load_judge(spec)


def test_the_environment_of_these_tests_has_no_key() -> None:
    assert API_KEY not in os.environ
