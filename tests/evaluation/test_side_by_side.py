"""Dream against simulator on a toy world whose answers are known, and the report made of it.

The world: a square slides right by ``action[0]`` pixels a step; the task is done when it is at least GOAL pixels along.
The fake simulator moves it exactly; the dream moves it by ``gain`` times as much plus keyed noise; the judge looks at
the picture. The policy pushes with a force that differs by start.
"""

from __future__ import annotations

import html
import json
import re
import tracemalloc
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict
from gymnasium.vector import AutoresetMode, VectorEnv

from rawdream_env.envs.episodes import run_episodes
from rawdream_env.errors import DatasetError, InvalidOptionError
from rawdream_env.evaluation.reporting import charts
from rawdream_env.evaluation.side_by_side import aggregate as agg
from rawdream_env.evaluation.side_by_side import report
from rawdream_env.evaluation.side_by_side.compare import CompareConfig, compare
from rawdream_env.evaluation.side_by_side.evaluate import EvaluateConfig, evaluate, make_starts, parse_policies
from rawdream_env.evaluation.side_by_side.ranking import rank_policies
from rawdream_env.evaluation.side_by_side.records import EpisodeRecord, SideBySide
from rawdream_env.evaluation.side_by_side.table import MEASURES, measure_text, table, trust_table
from rawdream_env.judges.scripted import ScriptedJudge
from rawdream_env.seeding import NoiseKey
from rawdream_env.statistics import Rate
from rawdream_env.types import PolicyOutput, Video

SIZE, K, GOAL, CHUNKS = 24, 4, 8.0, 2


def draw(x: np.ndarray, shade: np.ndarray) -> np.ndarray:
    """Frames (n, H, W, 3): a bright column pair at ``x``; the floor's ``shade`` tells the start apart."""
    frames = np.zeros((len(x), SIZE, SIZE, 3), np.uint8)
    frames[:] = shade[:, None, None, None]
    for i, left in enumerate(np.clip(np.round(x), 0, SIZE - 2).astype(int)):
        frames[i, :, left : left + 2] = 255
    return frames


def position(frame: np.ndarray) -> int:
    """Where the column is."""
    return int(np.argmax(frame[0, :, 0] == 255))


TASKS = (("stack_block", "stack it"), ("place_pot", "place it"), ("put_spoon", "put it"), ("place_cup", "lay it"))


class ToySimulator(VectorEnv[Any, Any, Any]):
    """The truth: somebody's own vector environment, with our infos and no class of ours."""

    tasks = TASKS
    metadata = {"autoreset_mode": AutoresetMode.DISABLED}  # noqa: RUF012

    def __init__(self, num_envs: int = 8, **options: Any) -> None:
        self.num_envs, self.options = num_envs, options
        self.single_observation_space = Dict({"image": Box(0, 255, (SIZE, SIZE, 3), np.uint8)})
        self.single_action_space = Box(-1, 1, (K, 7), np.float32)
        self.x, self.shade = np.zeros(num_envs), np.zeros(num_envs, np.uint8)
        self.steps, self.task_id = np.zeros(num_envs, int), np.zeros(num_envs, int)
        self.resets: list[tuple[int, str]] = []

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        for row in np.flatnonzero(options["reset_mask"]):
            start = options["starts"][row]
            assert seed[row] == start.seed and start.instruction == TASKS[start.task_id][1]
            self.x[row], self.shade[row], self.steps[row] = 0.0, start.seed % 100, 0
            self.task_id[row] = start.task_id
            self.resets.append((start.seed, TASKS[start.task_id][0]))
        return {"image": draw(self.x, self.shade)}, self.infos(np.full(self.num_envs, -1))

    def step(self, actions: np.ndarray) -> Any:
        frames = []
        for k in range(K):
            self.x += 2 * actions[:, k, 0]
            frames.append(draw(self.x, self.shade))
        self.steps += 1
        over = self.steps >= CHUNKS
        infos = {**self.infos((self.x >= GOAL).astype(int)), "frames": np.stack(frames, 1)}
        return {"image": frames[-1]}, np.zeros(self.num_envs), np.zeros_like(over), over, infos

    def infos(self, verdict: np.ndarray) -> dict[str, Any]:
        instructions = np.array([TASKS[i][1] for i in self.task_id], object)
        valid = np.ones(self.num_envs, bool)
        return {"instruction": instructions, "task_id": self.task_id.copy(), "verdict": verdict, "valid": valid}


@dataclass
class State:
    x: torch.Tensor
    shade: torch.Tensor
    keys: list[NoiseKey]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, rows: Any) -> State:
        return State(self.x[rows], self.shade[rows], [self.keys[int(r)] for r in rows])

    @staticmethod
    def where(mask: Any, a: State, b: State) -> State:
        keys = [p if m else q for m, p, q in zip(mask, a.keys, b.keys, strict=True)]
        return State(torch.where(mask, a.x, b.x), torch.where(mask, a.shade, b.shade), keys)


class ToyWorldModel:
    """The dream of it: wrong by a factor ``gain``, and by keyed ``noise`` pixels a chunk."""

    chunk_len, frame_shape, fps = K, (SIZE, SIZE, 3), 10.0

    def __init__(self, gain: float = 1.0, noise: float = 0.0) -> None:
        self.gain, self.noise = gain, noise

    def start(self, frames: torch.Tensor, keys: Any, proprio: torch.Tensor | None = None) -> State:
        x = torch.tensor([position(frame.numpy()) for frame in frames], dtype=torch.float64)
        return State(x, frames[:, 0, -1, 0], list(keys))

    def imagine(self, state: State, actions: torch.Tensor) -> tuple[State, torch.Tensor]:
        jitter = [self.noise * key.numpy(1).standard_normal() for key in state.keys]
        path = state.x[:, None] + 2 * self.gain * actions[..., 0].double().cumsum(1) + torch.tensor(jitter)[:, None]
        frames = [draw(path[:, k].numpy(), state.shade.numpy()) for k in range(K)]
        keys = [key.at(chunk=key.chunk + 1) for key in state.keys]
        return State(path[:, -1], state.shade, keys), torch.from_numpy(np.stack(frames, 1))


class KnowingWorldModel(ToyWorldModel):
    """It knows where its square is drawn; "picked up" is three quarters of the way."""

    def success(self, state: State, instructions: Any) -> Any:
        return np.where([text in dict(TASKS).values() for text in instructions], np.round(state.x.numpy()) >= GOAL, -1)

    def lifted(self, state: State, instructions: Any) -> Any:
        return (state.x.numpy() >= 0.75 * GOAL).astype(np.int8)

    def belief(self, state: State) -> Any:
        raise NotImplementedError


class LiftingSimulator(ToySimulator):
    def infos(self, verdict: np.ndarray) -> dict[str, Any]:
        return super().infos(verdict) | {"lifted": self.x >= 0.75 * GOAL, "_lifted": np.ones(self.num_envs, bool)}


class ThereAndBack:
    """Pushes the square onto the goal with the first chunk and away from it with the second."""

    def act(self, images: Any, instructions: Any, *, temperature: float, keys: Any) -> PolicyOutput:
        actions = torch.zeros(len(instructions), K, 7)
        actions[:, :, 0] = torch.tensor([1.0 if position(image) == 0 else -1.0 for image in images])[:, None]
        empty = torch.zeros(len(instructions), K * 7)
        return PolicyOutput(actions, empty.long(), empty)


class ToyPolicy:
    """Pushes with ``force`` times a number in [0.5, 1.5) that the picture's shade fixes."""

    def __init__(self, force: float) -> None:
        self.force = force
        self.seen_keys: list[NoiseKey] = []

    def act(self, images: Any, instructions: Any, *, temperature: float, keys: Any) -> PolicyOutput:
        self.seen_keys += keys
        actions = torch.zeros(len(instructions), K, 7)
        actions[:, :, 0] = torch.tensor([self.force * (0.5 + image[0, -1, 0] / 100) for image in images])[:, None]
        empty = torch.zeros(len(instructions), K * 7)
        return PolicyOutput(actions.clamp(-1, 1), empty.long(), empty)

    def logprobs(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError


def make_dream(
    gain: float = 1.0,
    noise: float = 0.0,
    judge: Any = None,
    num_envs: int = 8,
    model: Any = ToyWorldModel,
    **options: Any,
) -> Any:
    from rawdream_env.envs.dream import DreamVectorEnv

    def rule(video: Video, _: str) -> bool:
        return position(video.frames[-1]) >= GOAL

    return DreamVectorEnv(
        num_envs,
        world_model=model(gain, noise),
        judge=judge or ScriptedJudge(rule),
        starts="null",
        max_episode_steps=CHUNKS,
        autoreset_mode="Disabled",
        return_frames=True,
        **options,
    )


CONFIG = EvaluateConfig(
    tasks=("stack_block", "place_cup"), episodes_per_task=10, out=None, max_episode_steps=CHUNKS, videos=1
)


def run(
    config: EvaluateConfig = CONFIG, forces: tuple[float, ...] = (0.5,), simulator: Any = ToySimulator, **dream: Any
) -> SideBySide:
    policies = {f"force {force:g}": ToyPolicy(force) for force in forces}
    return evaluate(config, policies=policies, dream=make_dream(**dream), simulator=simulator(), progress=False)


def test_a_true_dream_agrees_on_everything() -> None:
    result = run()
    overall = result.report["policies"][0]["all"]
    assert len(result.records) == 20 and 0 < overall["simulator"]["successes"] < 20
    assert overall["dream"] == overall["simulator"] == overall["dream_trusted"]
    for name in ("closed_loop", "dreamed_actions", "simulator_actions", "judge_on_simulator"):
        assert overall[name]["agreement"]["value"] == 1.0 and overall[name]["kappa"]["value"] == pytest.approx(1.0)
    assert overall["verification"]["flagged"]["successes"] == 0
    for rows in result.report["policies"][0]["horizon"].values():
        assert [row["frames"] for row in rows] == [[0, 4], [4, 8]]
        assert all(row["dream"]["psnr"]["value"] == 60.0 for row in rows)


def test_an_optimistic_dream_is_caught_by_its_own_actions() -> None:
    overall = run(gain=1.6).report["policies"][0]["all"]
    assert overall["dream"]["value"] > overall["simulator"]["value"]
    acted = overall["dreamed_actions"]
    assert acted["false_positive"] > 0 and acted["false_negative"] == 0
    assert overall["judge_on_simulator"]["agreement"]["value"] == 1.0  # the judge is not to blame
    assert overall["verification"]["flagged"]["successes"] == 0  # a bias repeats: fresh noise cannot find it


def test_dual_noise_verification_flags_lucky_noise() -> None:
    config = replace(CONFIG, episodes_per_task=40)
    verified = run(config, noise=3.0).report["policies"][0]["all"]["verification"]
    assert verified["flagged"]["successes"] > 0
    assert verified["after"]["precision"]["value"] > verified["before"]["precision"]["value"]
    assert verified["after"]["n"] == verified["before"]["n"] - verified["flagged"]["successes"]


def test_starts_are_shared_and_repeat() -> None:
    first, again = run(forces=(0.3, 0.6)), run(forces=(0.3, 0.6))
    assert first.records == again.records
    weak, strong = ([(r.task, r.index, r.seed) for r in first.records if r.policy == f"force {f}"] for f in (0.3, 0.6))
    assert weak == strong and len({seed for _, _, seed in weak}) == 20
    assert run(replace(CONFIG, seed=1)).records[0].seed != first.records[0].seed


def test_rows_do_not_depend_on_the_batch() -> None:
    def records(num_envs: int) -> list[EpisodeRecord]:
        dream = make_dream(noise=2.0, num_envs=num_envs)
        return evaluate(
            CONFIG, policies={"p": ToyPolicy(0.5)}, dream=dream, simulator=ToySimulator(num_envs), progress=False
        ).records

    assert records(8) == records(3)


class WatchedPolicy(ToyPolicy):
    """Notes how much memory is allocated when it is asked."""

    def act(self, *args: Any, **kwargs: Any) -> PolicyOutput:
        self.held = [*getattr(self, "held", ()), tracemalloc.get_traced_memory()[0]]
        self.seen_keys.clear()
        return super().act(*args, **kwargs)


def test_little_is_kept_of_a_finished_episode(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores of the frames of an episode take 23 kB: 120 frames of the dream and two baselines, in both worlds."""
    monkeypatch.setitem(globals(), "CHUNKS", 30)
    policy = WatchedPolicy(0.5)
    config = replace(CONFIG, episodes_per_task=7, videos=0)
    tracemalloc.start()
    try:
        evaluate(
            config, policies={"p": policy}, dream=make_dream(num_envs=2), simulator=ToySimulator(2), progress=False
        )
    finally:
        tracemalloc.stop()
    third, last = 3 * len(policy.held) // 7 - 1, -1  # the last question of the third batch and of the seventh
    assert policy.held[last] - policy.held[third] < 8 * 18_000


def test_policy_noise_is_the_same_in_both_worlds() -> None:
    policy, dream, simulator = ToyPolicy(0.5), make_dream(), ToySimulator()
    starts = make_starts(simulator, [("place_pot", index) for index in range(3)], 0)
    starts = [rollout.start for rollout in run_episodes(simulator, starts, policy)]
    in_simulator, policy.seen_keys = set(policy.seen_keys), []
    list(run_episodes(dream, starts, policy))
    assert set(policy.seen_keys) == in_simulator
    list(run_episodes(simulator, starts, policy))
    assert simulator.resets[:3] == simulator.resets[8:11] and len(set(simulator.resets)) == 3


def test_invalid_verdicts_are_left_out_never_failures() -> None:
    judge = ScriptedJudge(success_rate=0.5, invalid_rate=0.4)
    overall = run(judge=judge).report["policies"][0]["all"]
    assert overall["dream_invalid"] > 0 and overall["judge_invalid"] > 0
    assert overall["dream"]["n"] == 20 - overall["dream_invalid"] == overall["closed_loop"]["n"]
    assert overall["judge_on_simulator"]["n"] == 20 - overall["judge_invalid"]


def test_judged_invalid_and_flagged_episodes_are_apart_and_the_rate_is_of_the_trusted() -> None:
    def records(policy: str, outcomes: list[tuple[int, int | None]]) -> list[EpisodeRecord]:
        return [EpisodeRecord(policy, "lift", i, i, True, True, *outcome) for i, outcome in enumerate(outcomes)]

    verified, flagged, unread, failure, invalid = (1, 1), (1, 0), (1, -1), (0, None), (-1, None)
    before = records("before", [verified, failure, failure, failure, failure, failure])
    after = records("after", [verified, flagged, unread, failure, failure, invalid])
    made = agg.aggregate([*before, *after], {}, config={"videos": 0})
    overall = made["policies"][1]["all"]
    assert overall["verdicts"] == {"episodes": 6, "judged": 4, "invalid": 2, "flagged": 1, "trusted": 3}
    assert (overall["dream_trusted"]["successes"], overall["dream_trusted"]["n"]) == (1, 3)
    assert (overall["dream"]["successes"], overall["dream"]["n"]) == (3, 5)  # first verdicts
    gain = made["policies"][1]["gain"]["dream"]
    assert (gain["value"], gain["n"]) == (0.0, 3)  # the flagged success is no gain
    assert made["ranking"]["policies"][1]["dream"] == pytest.approx(1 / 3)
    rows = [line.split() for line in table(made).splitlines() if line.startswith("after")]
    assert rows[0][:9] == ["after", "all", "tasks", "33.3", "%", "[6.1,", "79.2],", "n=3", "2"] and rows[0][9] == "1"
    page = report.render(made, [], 10.0)
    assert "<td>6</td><td>4</td><td>2</td><td>1</td><td>3</td>" in page


def test_without_diagnosis_only_the_closed_loop_is_measured() -> None:
    result = run(replace(CONFIG, diagnose=False, verify=False))
    overall = result.report["policies"][0]["all"]
    assert not {"dreamed_actions", "judge_on_simulator", "verification"} & set(overall)
    assert not result.clips[0].same_actions and result.report["policies"][0]["horizon"] == {}


def test_the_state_of_the_dream_tells_its_errors_from_the_judges() -> None:
    def measured(judge: Any = None, gain: float = 1.0) -> Any:
        return run(model=KnowingWorldModel, simulator=LiftingSimulator, judge=judge, gain=gain).report["policies"][0]

    fooled = measured(ScriptedJudge(lambda *_: True))["all"]  # it calls everything a success; the dream is right
    wrong = fooled["judge_against_state"]
    assert wrong["false_positive_rate"]["value"] == 1.0 and (wrong["kappa"]["value"], wrong["n"]) == (0.0, 20)
    for name in ("state_closed_loop", "state_reimagined"):
        assert fooled[name]["kappa"]["value"] == pytest.approx(1.0) and fooled[name]["n"] == 20
    assert fooled["dreamed_actions"]["kappa"]["value"] == 0.0
    assert fooled["lifts_on_misses"]["successes"] == 0 < fooled["lifts_on_misses"]["n"] < 20

    rosy = measured(gain=1.6)  # the judge is right, the dream is not
    assert rosy["all"]["judge_against_state"]["agreement"]["value"] == 1.0
    assert rosy["all"]["state_closed_loop"]["false_positive"] == rosy["all"]["dreamed_actions"]["false_positive"] > 0
    lifts = [part["lifts_on_misses"] for part in (rosy["all"], *rosy["tasks"].values())]
    assert (
        lifts[0]["successes"] > 0 and lifts[0]["n"] == lifts[1]["n"] + lifts[2]["n"] == fooled["lifts_on_misses"]["n"]
    )
    assert rosy["all"]["dream_minus_simulator"]["value"] == pytest.approx(
        rosy["all"]["dream"]["value"] - rosy["all"]["simulator"]["value"]
    )


@pytest.mark.parametrize(("judge_every", "success"), [("chunk", 1), ("episode", 0)])
@pytest.mark.parametrize("judge", [None, "state"])
def test_truth_and_verdicts_have_one_time_rule(judge_every: str, success: int, judge: str | None) -> None:
    # The square is on the goal after the first chunk and off it at the end.
    dream = make_dream(model=KnowingWorldModel, judge=judge, judge_every=judge_every)
    simulator = ToySimulator()
    made = evaluate(CONFIG, policies={"p": ThereAndBack()}, dream=dream, simulator=simulator, progress=False)
    for r in made.records:
        assert (r.simulator, r.simulator_end) == (True, False)
        assert r.dream == r.dream_state == r.simulator_actions == r.simulator_actions_state == success
        assert judge == "state" or r.judge_on_simulator == success
        assert (r.dreamed_actions, r.dreamed_actions_end) == (True, bool(success))  # a dream that succeeds ends there
    overall = made.report["policies"][0]["all"]
    names = ("closed_loop", "dreamed_actions", "simulator_actions", "state_closed_loop", "state_reimagined")
    assert all(overall[name]["agreement"]["value"] == 1.0 for name in (*names, "judge_against_state"))


def test_confusions_of_the_state_by_hand() -> None:
    def at(index: int, dream: int, state: int, acted: bool, echo: int, lifted: tuple[int, int]) -> EpisodeRecord:
        given = {"dreamed_actions": acted, "dreamed_actions_end": acted, "dream_state": state}
        given |= {"simulator_actions_state": echo, "simulator_lifted": lifted[0], "simulator_actions_lifted": lifted[1]}
        return EpisodeRecord("p", "lift", index, index, True, index < 3, dream, **given)  # type: ignore[arg-type]

    records = [
        at(0, 1, 1, True, 1, (1, 1)),
        at(1, 1, 0, False, 0, (0, 1)),
        at(2, -1, 1, False, 1, (0, 0)),  # the judge did not answer
        at(3, 0, -1, False, 1, (0, -1)),  # the state is not known
        at(4, 0, 0, False, 0, (-1, 1)),
    ]
    part = agg.describe(records, at_end=True)
    counts = ("true_positive", "false_positive", "false_negative", "true_negative")

    def confusion(name: str) -> list[int]:
        return [part[name][count] for count in counts]

    assert confusion("judge_against_state") == [1, 1, 0, 1]
    assert confusion("state_closed_loop") == [1, 1, 0, 2]
    assert confusion("state_reimagined") == [2, 1, 1, 1]
    assert (part["lifts_on_misses"]["successes"], part["lifts_on_misses"]["n"]) == (1, 2)


def test_the_terminal_shows_every_measure_and_the_ranking() -> None:
    knowing = run(forces=(0.3, 0.5, 0.9), model=KnowingWorldModel, simulator=LiftingSimulator)
    text = table(knowing.report)
    assert text.count("how far the dream can be trusted") == 3 and "rank correlation of 3 policies" in text
    part = knowing.report["policies"][1]["tasks"]["place_cup"]
    shown = [line.split(maxsplit=1)[1] for line in text.splitlines() if line.startswith("place_cup")][3:6]
    cells = [re.split(r"  +", line) for line in shown]
    assert cells == [[measure_text(part, *keys) for *keys, _ in MEASURES[i : i + 3]] for i in (0, 3, 6)]
    page = report.render(knowing.report, knowing.clips, 10.0)
    assert all(cell.replace(" [", '<br><span class="ci">[') in page for line in cells for cell in line)
    assert "Missed grasps that the dream lifts" in page

    unknowing = run()  # no state: judge only
    assert not {"judge_against_state", "state_closed_loop", "state_reimagined", "lifts_on_misses"} & set(
        unknowing.report["policies"][0]["all"]
    )
    titles = trust_table(unknowing.report["policies"][0])[0]
    assert len(titles) == 5 and not any("state" in title or "lifts" in title for title in titles)
    assert "Missed grasps" not in report.render(unknowing.report, unknowing.clips, 10.0)


def test_many_tasks_are_rows_and_the_protocol_is_on_the_page() -> None:
    result = run(replace(CONFIG, tasks=tuple(name for name, _ in TASKS), episodes_per_task=2))
    page = report.render({**result.report, "protocol": {"name": "raw-dream", "horizon": 300}}, [], 10.0)
    assert '<th scope="row">put spoon</th>' in page and '<th scope="col">Dreamed actions, judge</th>' in page
    assert "Protocol <b>raw-dream</b>: horizon 300." in page
    assert '<th scope="col">place cup</th>' in report.render(run().report, [], 10.0)


def test_gain_and_ranking_of_three_policies() -> None:
    result = run(forces=(0.3, 0.5, 0.9))
    gain = result.report["policies"][2]["gain"]["simulator"]
    rates = [entry["all"]["simulator"]["value"] for entry in result.report["policies"]]
    assert gain["value"] == pytest.approx(rates[2] - rates[0]) and gain["low"] > 0 and gain["n"] == 20
    ranking = result.report["ranking"]
    assert ranking["spearman"]["value"] == pytest.approx(1.0) and ranking["n_policies"] == 3
    assert ranking["swapped_pairs"] == []


def record(policy: str, index: int, simulator: bool, dream: int) -> EpisodeRecord:
    return EpisodeRecord(policy, "stack_block", index, index, simulator, simulator, dream)


def test_the_conclusion_is_in_the_report_and_at_the_top_of_the_page(tmp_path: Path) -> None:
    # 20 starts: after training 15 succeed in the dream (5 before), 3 in the simulator (16 before).
    records = [record("before", i, i < 16, i < 5) for i in range(20)]
    records += [record("after", i, i < 3, i < 15) for i in range(20)]
    written = SideBySide(agg.aggregate(records, {}, config={"videos": 1}), records)
    report.write_report(written, tmp_path, 10.0)
    said = "'after' got better in the dream and worse in the simulator: it learned where the dream is wrong."
    assert json.loads((tmp_path / "report.json").read_text())["conclusions"] == [said]
    page = html.unescape((tmp_path / "report.html").read_text())
    assert page.count(said) == 1 and page.index(said) < page.index("<h2>")
    assert table(written.report).splitlines()[-1] == said


def test_equal_pairs_conclude_nothing() -> None:
    records = [record(name, i, False, 0) for name in ("before", "after") for i in range(8)]
    made = agg.aggregate(records, {})
    for world in ("dream", "simulator"):
        gain = made["policies"][1]["gain"][world]
        assert (gain["value"], gain["low"], gain["high"]) == pytest.approx((0.0, -0.195996, 0.195996), abs=1e-6)
    assert made["conclusions"] == ["'after' shows no clear change in the simulator; more starts narrow the interval."]
    assert "simulator: +0.0 points [-19.6, +19.6], n=8 starts" in table(made)
    one_sided = [record("good", i, True, 1) for i in range(8)] + [record("bad", i, False, 0) for i in range(8)]
    spearman = rank_policies(one_sided)["spearman"]
    assert spearman == {"value": pytest.approx(1.0), "low": None, "high": None, "n": 8}


def test_ranking_finds_what_the_dream_swaps() -> None:
    records = [record("good", i, i < 8, i < 3) for i in range(10)] + [record("bad", i, i < 2, i < 6) for i in range(10)]
    ranking = rank_policies(records)
    assert ranking["swapped_pairs"] == [["good", "bad"]] and ranking["spearman"]["value"] == pytest.approx(-1.0)
    blind = [record("a", i, True, -1) for i in range(4)] + [record("b", i, False, 1) for i in range(4)]
    assert rank_policies(blind)["spearman"]["value"] is None


def test_tasks_and_policies_are_ranked_with_what_a_wrong_order_costs() -> None:
    def records(policy: str, *rates: tuple[int, int]) -> list[EpisodeRecord]:
        """Of ten starts of each task: successes in the simulator and in the dream."""
        return [
            replace(record(policy, i, i < sim, i < dream), task=f"task {task}")
            for task, (sim, dream) in enumerate(rates)
            for i in range(10)
        ]

    made = agg.aggregate(records("only", (9, 5), (6, 7), (3, 2)), {}, config={"videos": 1})
    cells = made["ranking"]["cells"]
    assert cells["n"] == 3 and cells["mmrv"]["value"] == pytest.approx(0.2)  # the first two are swapped, 0.3 apart
    assert cells["mmrv"]["low"] < 0.2 <= cells["mmrv"]["high"]
    assert cells["spearman"]["value"] == pytest.approx(0.5) and cells["pearson"]["value"] == pytest.approx(
        np.corrcoef([9, 6, 3], [5, 7, 2])[0, 1]
    )
    assert "rank correlation of 3 tasks, n starts: Pearson 0.60" in table(made) and "of 1 policies" not in table(made)
    page = report.render(made, [], 10.0)
    assert "rank the tasks like" in page and ">3 tasks</th>" in page and "1 policies" not in page
    assert agg.aggregate(records("only", (9, 5), (6, 7)), {})["ranking"] is None

    both = records("a", (9, 5), (6, 7)) + records("b", (3, 5), (2, 1))
    ranking = rank_policies(both)
    assert ranking["mmrv"]["value"] == 0.0 and ranking["cells"]["n"] == 4


def test_reports_of_checkpoints_are_ranked_together(tmp_path: Path) -> None:
    def write(name: str, sim: int, dream: int, starts: int = 10) -> Path:
        records = [record("policy", i, i < sim, i < dream) for i in range(starts)]
        made = SideBySide(agg.aggregate(records, {}, config={"videos": 1}), records)
        report.write_report(made, tmp_path / name, 10.0)
        return tmp_path / name

    folders = write("10", 2, 3), write("20", 5, 9), write("30", 8, 7)
    text = compare(CompareConfig(folders))
    assert "rank correlation of 3 policies" in text and "Spearman 0.50" in text and "MMRV 0.20" in text
    assert "have different starts" in compare(CompareConfig((folders[0], write("short", 2, 3, starts=5))))
    (folders[0] / "episodes.jsonl").write_text("{}")
    with pytest.raises(DatasetError, match=r"episodes.jsonl cannot be read"):
        compare(CompareConfig(folders))


def test_policy_specs() -> None:
    assert parse_policies(["sft=embedded", "runs/grpo/final"]) == {"sft": "embedded", "final": "runs/grpo/final"}
    for bad in ([], ["=x"], ["a=b", "a=c"]):
        with pytest.raises(InvalidOptionError, match="polic"):
            parse_policies(bad)


def test_bad_options_are_named() -> None:
    with pytest.raises(InvalidOptionError, match="'fly' does not exist; choose among stack_block"):
        run(replace(CONFIG, tasks=("fly",)))
    with pytest.raises(InvalidOptionError, match="0 episodes"):
        run(replace(CONFIG, episodes_per_task=0))
    policies = {"p": ToyPolicy(0.5)}
    untold = ToySimulator()
    untold.tasks = ()
    with pytest.raises(InvalidOptionError, match="ToySimulator does not list its tasks"):
        evaluate(CONFIG, policies=policies, dream=make_dream(), simulator=untold, progress=False)
    blind = make_dream()
    blind.return_frames = False
    with pytest.raises(InvalidOptionError, match="return_frames=True"):
        evaluate(CONFIG, policies=policies, dream=blind, simulator=ToySimulator(), progress=False)


def test_a_simulator_of_ones_own_stands_in_by_its_id() -> None:
    class Strict(ToySimulator):
        def __init__(self, num_envs: int) -> None:
            super().__init__(num_envs)

    made: list[ToySimulator] = []

    def make(num_envs: int, **options: Any) -> ToySimulator:
        made.append(ToySimulator(num_envs, **options))
        return made[-1]

    gym.register("tests/ToySim-v0", vector_entry_point=make)
    gym.register("tests/StrictSim-v0", vector_entry_point=Strict)
    try:
        config = replace(CONFIG, sim_env="tests/ToySim-v0", sim_kwargs={"gravity": 9.81}, num_envs=8, tasks=())
        policies = {"force 0.5": ToyPolicy(0.5)}
        result = evaluate(config, policies=policies, dream=make_dream(), progress=False)
        assert [r.task for r in result.records[:5]] == [
            "stack_block",
            "place_pot",
            "put_spoon",
            "place_cup",
            "stack_block",
        ]
        chosen = [r for r in result.records if r.task in CONFIG.tasks]
        assert chosen == run().records and made[0].closed
        told = {"max_episode_steps": CHUNKS, "end_on_success": False, "return_frames": True}
        assert made[0].options == {**told, "gravity": 9.81, "autoreset_mode": "Disabled"}
        with pytest.raises(InvalidOptionError, match="do not fit tests/StrictSim-v0"):
            evaluate(
                replace(config, sim_env="tests/StrictSim-v0"), policies=policies, dream=make_dream(), progress=False
            )
    finally:
        del gym.registry["tests/ToySim-v0"], gym.registry["tests/StrictSim-v0"]


class _Checker(HTMLParser):
    """Collects what a browser would fetch, and checks that tags close."""

    VOID = ("meta", "br")

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.sources: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        assert {"th": "scope", "video": "aria-label", "svg": "aria-label"}.get(tag, "") in ("", *dict(attrs))
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:  # <line ... />
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def test_report_is_one_self_contained_page(tmp_path: Path) -> None:
    config = replace(CONFIG, out=tmp_path / "out")
    result = run(config, forces=(0.4, 0.6), gain=1.3)
    page = (tmp_path / "out" / "report.html").read_text()
    checker = _Checker()
    checker.feed(page)
    assert checker.stack == [] and "script" not in checker.tags
    assert checker.tags.count("video") == len(result.clips) >= 4
    assert all(source.startswith("data:") for source in checker.sources)
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)
    for entry in result.report["policies"]:
        rate = entry["all"]["simulator"]
        assert f"[{100 * rate['low']:.1f}, {100 * rate['high']:.1f}], n=20" in page
    assert json.loads((tmp_path / "out" / "report.json").read_text())["policies"] == result.report["policies"]
    lines = (tmp_path / "out" / "episodes.jsonl").read_text().splitlines()
    assert len(lines) == 40 and json.loads(lines[0])["policy"] == "force 0.4"
    assert len(page) < 2_000_000 and 'name="viewport"' in page
    assert "The first 1 episode of each kind and policy" in page


def test_names_cannot_break_the_page() -> None:
    result = evaluate(
        replace(CONFIG, episodes_per_task=1, diagnose=False),
        policies={"<script>alert(1)</script>": ToyPolicy(0.5)},
        dream=make_dream(),
        simulator=ToySimulator(),
        progress=False,
    )
    assert "<script>" not in report.render(result.report, result.clips, 10.0)


def test_clip_film_has_outcome_borders() -> None:
    clip = next(c for c in run(gain=1.6).clips if c.kind == "only the dream succeeds")
    film = report.clip_frames(clip, min_side=SIZE)
    assert film.shape == (1 + CHUNKS * K, SIZE + 12, 2 * (SIZE + 12) + 4, 3)
    assert film[0, 0, 0].tolist() == [218, 54, 51] and film[0, 0, -1].tolist() == [46, 160, 67]


def test_training_is_drawn_between_the_simulators_before_and_after() -> None:
    windows = [
        {"updates": [1, 5], "all": Rate.of(3, 10).as_dict()},
        {"updates": [6, 9], "all": Rate.of(6, 10).as_dict()},
    ]
    policies = {"before": ToyPolicy(0.3), "after": ToyPolicy(0.6)}
    result = evaluate(
        CONFIG,
        policies=policies,
        dream=make_dream(),
        simulator=ToySimulator(),
        training={"temperature": 0.7, "windows": windows},
        progress=False,
    )
    page = report.render(result.report, result.clips, 10.0)
    assert "dream: 30.00" in page and "dream: 60.00" in page and "at temperature 0.7" in page
    for entry in result.report["policies"]:
        assert f"simulator: {100 * entry['all']['simulator']['value']:.2f}" in page
    assert "Training in the dream" not in report.render(run().report, [], 10.0)


def test_chart_ticks_cover_the_data() -> None:
    for low, high in ((17.2, 28.9), (0.0, 1.0), (-3.0, 250.0), (20.0, 20.0)):
        ticks = charts.nice_ticks(low, high)
        assert ticks[0] <= low and ticks[-1] >= high and len(ticks) <= 9
    empty = charts.line_chart("Nothing", "dB", ["0-8"], [charts.Series("dream", "s", [None])])
    assert "not measured" in empty
