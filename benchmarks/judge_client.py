"""Cost of the vision-language client per video, without image encoding: a server in another process that answers at once,
episodes of the paper's size (65 frames of 256x256 at 10 Hz, of which 26 are sent).

Processor time of this process, which excludes the server's work and waiting. Encoding the same frames as JPEG is timed in
turn, with the same number of threads, and subtracted; choosing frames, base64, JSON, hashing, the connection and
reading replies remain.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.common import ROUNDS, Result, interleave

GOAL_MS = 5.0


def _serve(pipe: Any) -> None:
    from rawdream_env.testing.faults import FaultServer

    with FaultServer() as server:
        pipe.send(server.url)
        pipe.recv()


def run(quick: bool = False) -> Result:
    """16 videos per round, one request at a time and 16 at a time."""
    import numpy as np

    from rawdream_env.judges.vlm.config import VLMServerConfig
    from rawdream_env.judges.vlm.prompt import encode_frames, sample_video
    from rawdream_env.judges.vlm.server import VLMServerJudge
    from rawdream_env.types import Outcome, Video

    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    server = context.Process(target=_serve, args=(theirs,), daemon=True)
    server.start()
    try:
        url = pipe.recv()
        count, side = (8, 256) if quick else (16, 256)
        ramp = np.linspace(0, 200, side, dtype=np.float32)
        still = (ramp[:, None, None] / 2 + ramp[None, :, None] / 2 + np.array([0.0, 20.0, 40.0])).astype(np.uint8)
        videos = [Video(np.stack([np.roll(still, 2 * f + v, axis=1) for f in range(65)]), 10.0) for v in range(count)]
        samples = [sample for video in videos if (sample := sample_video(video)[0]) is not None]

        def encode(threads: int) -> None:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda sample: encode_frames(sample.frames), samples))

        def ask(judge: VLMServerJudge) -> None:
            verdicts = judge(videos, ["put the cup into the pot"] * count)
            assert all(verdict.outcome == Outcome.SUCCESS for verdict in verdicts), verdicts[0]

        judges = {n: VLMServerJudge(VLMServerConfig(servers=(url,), max_in_flight=n, cache_size=0)) for n in (1, 16)}
        sides = {f"{n} in flight": (lambda judge=judge: ask(judge)) for n, judge in judges.items()}
        sides |= {f"encoding, {n} threads": (lambda n=n: encode(n)) for n in judges}
        times = interleave(sides, ROUNDS)
        lines, numbers, passed = [], {}, True
        for n in judges:
            name, encoding = f"{n} in flight", times[f"encoding, {n} threads"].processor
            over = 1e3 * (times[name].processor - encoding) / count
            numbers[name] = {
                "min_ms": float(over.min()),
                "median_ms": float(np.median(over)),
                "encoding_median_ms": 1e3 * float(np.median(encoding)) / count,
                "rounds": ROUNDS,
            }
            passed &= bool(np.median(over) <= GOAL_MS)
            lines.append(
                f"{name}: {over.min():.2f} / {np.median(over):.2f} ms per video (min / median) besides "
                f"{numbers[name]['encoding_median_ms']:.1f} for {len(samples[0].frames)} pictures of {side}x{side}"
            )
        return Result(
            "judge_client",
            f"<= {GOAL_MS:g} ms of processor time per video besides encoding (median)",
            passed,
            lines,
            numbers,
        )
    finally:
        pipe.send(None)
        server.join(5)
        if server.is_alive():
            server.terminate()
