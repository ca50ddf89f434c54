"""The client against a real vLLM serving a tiny random Qwen3-VL. RAWDREAM_VLLM names an environment with bin/vllm."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny_qwen import save_tiny_qwen3vl

from rawdream_env.errors import JudgeUnavailableError
from rawdream_env.judges import load_judge
from rawdream_env.judges.verdict import read_reply
from rawdream_env.judges.vlm import prompt
from rawdream_env.judges.vlm.config import VLMServerConfig
from rawdream_env.judges.vlm.http import request
from rawdream_env.judges.vlm.server import VLMServerJudge, read_completion
from rawdream_env.testing.faults import free_port
from rawdream_env.types import Outcome, Video

ENVIRONMENT = os.environ.get("RAWDREAM_VLLM", "")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        not (Path(ENVIRONMENT) / "bin" / "vllm").is_file() or not ENVIRONMENT,
        reason="RAWDREAM_VLLM does not name an environment with bin/vllm",
    ),
]
START_S = 600


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("vllm")
    save_tiny_qwen3vl(folder / "model")
    port = free_port()
    command = [
        f"{ENVIRONMENT}/bin/vllm", "serve", str(folder / "model"), "--served-model-name", "tiny", "--dtype", "float32",
        "--enforce-eager", "--max-model-len", "8192", "--host", "127.0.0.1", "--port", str(port),
        "--trust-request-mm-kwargs",
        # On a CPU vLLM 0.32 dies of a request with a seed whose prompt is worked off in parts.
        "--no-enable-chunked-prefill", "--max-num-batched-tokens", "16384",
    ]  # fmt: skip
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True, cwd=folder,
            env={k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")} | settings,
        )  # fmt: skip
    try:
        end = time.monotonic() + START_S
        while True:
            assert server.poll() is None and time.monotonic() < end, (folder / "log").read_text(errors="replace")[
                -3000:
            ]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def clips(count: int, frames: int = 9, side: int = 32) -> list[Video]:
    rng = np.random.default_rng(3)
    return [Video(rng.integers(0, 256, (frames, side, side, 3), dtype=np.uint8), 10.0) for _ in range(count)]


def test_every_video_gets_a_verdict(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judge = VLMServerJudge(VLMServerConfig(
        servers=(url,), model="tiny", min_side=0, max_in_flight=16, deadline_s=300, request_timeout_s=300,
        cache_dir=str(tmp_path),
    ))  # fmt: skip
    assert judge.servers.all[0].checked and judge.servers.all[0].echoes_id
    videos = clips(200)
    begin = time.perf_counter()
    verdicts = judge(videos, [f"put cup {i} into the pot" for i in range(200)])
    wall = time.perf_counter() - begin
    readable = sum(vote != Outcome.INVALID for verdict in verdicts for vote in verdict.votes)
    with capsys.disabled():
        print(f"\n200 videos, n=5, 16 at a time: {Counter(v.outcome.name for v in verdicts)}, {readable} of 1000 votes "
              f"readable, {wall:.0f} s")  # fmt: skip
    assert len(verdicts) == 200 and all(len(verdict.votes) == len(verdict.raw) == 5 for verdict in verdicts)
    assert all(verdict.latency_s > 0 and verdict.reason for verdict in verdicts)
    assert readable >= 990, [verdict.reason for verdict in verdicts if verdict.outcome == Outcome.INVALID][:3]
    decided = [i for i, verdict in enumerate(verdicts) if verdict.outcome != Outcome.INVALID][:20]
    again = VLMServerJudge(judge.config)([videos[i] for i in decided], [f"put cup {i} into the pot" for i in decided])
    assert [v.raw for v in again] == [verdicts[i].raw for i in decided]  # from the folder


def test_frames_of_a_long_video_all_arrive_with_their_times(url: str) -> None:
    """A model that writes times into its prompt needs more tokens for later times: 1000.0 has more digits than 1.0."""

    def tokens(fps: float, count: int) -> int:
        judge = VLMServerJudge(VLMServerConfig(
            servers=(url,), model="tiny", votes=1, need=1, max_tokens=1, sample_fps=fps, min_side=0, max_frames=count
        ), check=False)  # fmt: skip
        sample, _ = prompt.sample_video(
            Video(clips(1, 80)[0].frames, fps), sample_fps=fps, max_frames=count, min_side=0
        )
        assert sample is not None
        answer = request(f"{url}/chat/completions", time.monotonic() + 100, judge.request_body(sample, "go"))
        return int(json.loads(answer.body)["usage"]["prompt_tokens"])

    assert tokens(4.0, 80) > tokens(4.0, 40) + 20 * 5  # 32 frames at most, were the request's options not heeded
    assert tokens(0.01, 80) > tokens(4.0, 80)  # times up to 7900 s instead of 19.75 s


def test_a_reply_cut_short_is_invalid_and_png_works(url: str) -> None:
    judge = load_judge({"kind": "vlm_server", "servers": [url], "max_tokens": 400, "encoding": "png", "min_side": 0})
    assert judge(clips(1), ["put the cup down"])[0].votes
    short = VLMServerJudge(VLMServerConfig(servers=(url,), model="tiny", max_tokens=3, min_side=0), check=False)
    verdict = short(clips(1), ["put the cup down"])[0]
    assert verdict.outcome == Outcome.INVALID and "cut at the limit of tokens" in verdict.reason


def test_wrong_model_is_named_and_free_text_is_invalid(url: str) -> None:
    with pytest.raises(JudgeUnavailableError, match=r"\(vLLM .*does not serve the model 'other'; it serves 'tiny'"):
        load_judge(f"vlm_server:{url}?model=other")
    judge = VLMServerJudge(VLMServerConfig(servers=(url,), model="tiny", max_tokens=50, min_side=0), check=False)
    sample, _ = prompt.sample_video(clips(1)[0], min_side=0)
    assert sample is not None
    free = judge.request_body(sample, "go").replace(b'"response_format"', b'"guided_json"')
    replies = read_completion(request(f"{url}/chat/completions", time.monotonic() + 100, free), 5)
    assert isinstance(replies, list) and all(read_reply(text)[0] == Outcome.INVALID for text, _ in replies)
