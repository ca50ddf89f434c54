"""Judges: what is INVALID, the strict reader, votes, the embedded judge's checkpoints, and the report."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rawdream_env.errors import CheckpointError, InvalidOptionError, JudgeError
from rawdream_env.evaluation.judges.report import JudgeClip, evaluate
from rawdream_env.files import load_safetensors, save_safetensors
from rawdream_env.judges import load_judge
from rawdream_env.judges.base import spread_indices
from rawdream_env.judges.embedded import EmbeddedJudge, resize_frames
from rawdream_env.judges.embedded_network import EmbeddedJudgeConfig, JudgeNetwork, frame_indices
from rawdream_env.judges.verdict import combine_votes, read_reply
from rawdream_env.types import Judge, Outcome, Verdict, Video

YES, NO, UNREAD = Outcome.SUCCESS, Outcome.FAILURE, Outcome.INVALID
SMALL = EmbeddedJudgeConfig(frame_size=32, stem=8, mid=8, deep=16, width=16, heads=2, layers=1, text_layers=1)


@pytest.fixture
def judge() -> EmbeddedJudge:
    torch.manual_seed(0)
    return EmbeddedJudge(JudgeNetwork(SMALL), metadata={"steps": 3})


def video(frames: int = 9, height: int = 32, width: int = 32, seed: int = 0) -> Video:
    rng = np.random.default_rng(seed)
    return Video(rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8), 10.0)


# -- the strict reader ------------------------------------------------------------------------------------------------


def reply(answer: str = "Success", reasoning: str = "it is there") -> str:
    return json.dumps({"Reasoning": reasoning, "Final Answer": answer})


@pytest.mark.parametrize(
    "text",
    [
        reply(),
        ' \n{ "Final Answer" : "Success" ,\t"Reasoning" : "" }\r\n',
        json.dumps({"Reasoning": 'say "no" \\ \n {}', "Final Answer": "Success"}),
        '{"Reasoning": "x", "Final\\u0020Answer": "Succ\\u0065ss"}',
    ],
)
def test_reader_takes_the_schema_in_any_json_spelling(text: str) -> None:
    assert read_reply(text)[0] is YES
    failure = text.replace("Success", "Failure").replace("Succ\\u0065ss", "Failure")
    assert read_reply(failure)[0] is NO


@pytest.mark.parametrize(
    "text",
    [
        "", "  ", "Success", "null", "[]", "{}", '"Success"', "{" * 100_000, "[" * 5000 + "]" * 5000, "9" * 5001,
        reply()[:-1], reply() + ".", "Sure! " + reply(), f"```json\n{reply()}\n```", reply() + reply(), f"[{reply()}]",
        '{"Final Answer": "Success"}', '{"Reasoning": "x", "Final Answer": true}',
        '{"Reasoning": 1, "Final Answer": "Success"}', '{"Reasoning": null, "Final Answer": "Success"}',
        '{"Reasoning": {"a": "b"}, "Final Answer": "Success"}', '{"Reasoning": ["x"], "Final Answer": "Success"}',
        '{"Reasoning": "x", "Final Answer": "Success", "Confidence": "1"}',
        '{"Final Answer": "Failure", "Final Answer": "Success"}',
        '{"Reasoning": "x", "Final Answer": "Failure", "Final Answer": "Success"}',
        '{"Reasoning": "x", "Reasoning": "Success"}',
        '{"reasoning": "x", "final answer": "Success"}', '{"Reasoning": "x", "Final Answer": "success"}',
        '{"Reasoning": "x", "Final Answer": " Success"}', '{"Reasoning": "x", "Final Answer": "Success\\u0000"}',
        '{"Reasoning": "x", "Final Answer": "Success",}', "{'Reasoning': 'x', 'Final Answer': 'Success'}",
        '{"Reasoning": "raw\nline", "Final Answer": "Success"}', '{"Reasoning": "x", "Final Answer": "Success"}\x00',
        '\ufeff{"Reasoning": "x", "Final Answer": "Success"}', '{"Reasoning": "x"\u00a0, "Final Answer": "Success"}',
        '{"Reasoning": "\\x41", "Final Answer": "Success"}', '{"Reasoning": "x", "Final Answer": "Ѕuccess"}',
        reply(reasoning="a" * 30_000),
    ],
)  # fmt: skip
def test_reader_refuses_everything_else_with_a_reason(text: str) -> None:
    outcome, reason = read_reply(text)
    assert outcome is UNREAD
    assert reason and len(reason) < 400 and reason.isprintable()


@pytest.mark.parametrize("value", [None, 1, b"{}", {"Reasoning": "x", "Final Answer": "Success"}, math.nan])
def test_reader_refuses_what_is_not_text(value: object) -> None:
    assert read_reply(value)[0] is UNREAD
    assert type(value).__name__ in read_reply(value)[1]


def test_reader_makes_reasons_safe_to_print() -> None:
    outcome, reason = read_reply(reply(reasoning="\ud800\u202e\n\x1b[31m" + "long " * 1000))
    assert outcome is YES
    assert reason.isprintable() and len(reason) <= 500


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=8), st.integers(0, 70), st.integers(0, 6))
def test_mutated_failures_never_become_successes(noise: str, place: int, cut: int) -> None:
    text = reply("Failure")
    outcome, _ = read_reply(text[:place] + noise + text[place + cut :])
    assert outcome is not YES


# -- votes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("votes", "need", "expected"),
    [
        ([YES] * 5, 4, YES), ([YES] * 4 + [NO], 4, YES), ([YES] * 4 + [UNREAD], 4, YES),
        ([YES] * 3 + [NO] * 2, 4, NO), ([YES] * 3 + [NO] + [UNREAD], 4, UNREAD), ([YES] * 3 + [UNREAD] * 2, 4, UNREAD),
        ([NO] * 2 + [UNREAD] * 3, 4, NO), ([NO] + [UNREAD] * 4, 4, UNREAD), ([UNREAD] * 5, 4, UNREAD),
        ([], 4, UNREAD), ([YES] * 3, 4, UNREAD), ([NO], 1, NO), ([YES], 1, YES),
    ],
)  # fmt: skip
def test_votes_combine_to_three_values(votes: list[Outcome], need: int, expected: Outcome) -> None:
    verdict = combine_votes(votes, need)
    assert verdict.outcome is expected
    assert verdict.votes == tuple(votes) and verdict.reason


def test_vote_probability_is_the_share_of_readable_votes() -> None:
    assert combine_votes([YES, YES, NO, UNREAD], 2).probability == pytest.approx(2 / 3)
    assert combine_votes([UNREAD] * 5).probability is None
    with pytest.raises(ValueError, match="need is 0"):
        combine_votes([YES], 0)


@given(st.lists(st.sampled_from(list(Outcome)), min_size=5, max_size=5), st.integers(1, 5), st.integers(0, 4))
def test_a_lost_vote_never_flips_a_verdict(votes: list[Outcome], need: int, lost: int) -> None:
    full = combine_votes(votes, need).outcome
    damaged = combine_votes([UNREAD if i == lost else vote for i, vote in enumerate(votes)], need).outcome
    assert damaged in (full, UNREAD)


# -- the embedded judge -----------------------------------------------------------------------------------------------


def test_frames_picked_from_any_length_are_ordered_and_hold_both_ends() -> None:
    assert frame_indices(65) == [0, 21, 42, 56, 60, 64]
    for count in range(2, 140):
        picked = frame_indices(count)
        assert len(picked) == 6 and picked == sorted(picked)
        assert picked[0] == 0 and picked[-1] == count - 1
    assert spread_indices(5, (0.0, 0.5), (1,)) == [0, 2, 3]


def test_embedded_is_a_judge_and_deterministic(judge: EmbeddedJudge) -> None:
    assert isinstance(judge, Judge)
    videos = [video(9), video(65, seed=1), video(2, seed=2), video(12, 100, 80, seed=3)]
    first, second = (judge(videos, ["put the cup into the pot"] * 4) for _ in range(2))
    assert [v.probability for v in first] == [v.probability for v in second]
    assert all(v.outcome is not UNREAD and 0 <= (v.probability or 0) <= 1 for v in first)
    assert judge([], []) == []


def test_word_order_and_frame_order_matter(judge: EmbeddedJudge) -> None:
    clip = video(20)
    texts = ["the blue block on the red block", "the red block on the blue block"]
    blue, red = (verdict.probability for verdict in judge([clip, clip], texts))
    assert blue != red
    backwards = Video(clip.frames[::-1].copy(), clip.fps)
    assert judge([backwards], texts[:1])[0].probability != blue


@pytest.mark.parametrize(
    ("bad", "instruction", "reason"),
    [
        (Video(np.zeros((0, 8, 8, 3), np.uint8), 10.0), "go", "0 frames"),
        (Video(np.zeros((1, 8, 8, 3), np.uint8), 10.0), "go", "1 frames"),
        (Video(np.zeros((4, 8, 8, 3), np.float32), 10.0), "go", "float32"),
        (Video(np.full((4, 8, 8, 3), np.nan), 10.0), "go", "frame 0 .* not finite"),
        (Video(np.zeros((4, 3, 8, 8), np.uint8), 10.0), "go", "shape"),
        (Video(np.zeros((8, 8, 3), np.uint8), 10.0), "go", "shape"),
        (Video(np.zeros((4, 0, 8, 3), np.uint8), 10.0), "go", "empty"),
        (Video([1, 2], 10.0), "go", "list"),  # type: ignore[arg-type]
        (Video(np.zeros((4, 8, 8, 3), np.uint8), math.nan), "go", "fps"),
        (None, "go", "NoneType"),
        (video(), "", "empty"),
        (video(), " \x00\n!", "empty"),
        (video(), None, "NoneType"),
    ],
)
def test_bad_items_are_invalid_and_leave_their_neighbours_alone(
    judge: EmbeddedJudge, bad: Video, instruction: str, reason: str
) -> None:
    alone = judge([video()], ["go"])[0]
    verdicts = judge([video(), bad, video()], ["go", instruction, "go"])
    assert verdicts[1].outcome is UNREAD and verdicts[1].probability is None
    assert re.search(reason, verdicts[1].reason)
    assert verdicts[0].outcome is alone.outcome is verdicts[2].outcome


def test_unequal_lengths_are_the_callers_mistake(judge: EmbeddedJudge) -> None:
    with pytest.raises(ValueError, match="2 videos but 1 instructions"):
        judge([video(), video()], ["go"])


def test_torch_frames_and_other_sizes_are_taken(judge: EmbeddedJudge) -> None:
    clip = video(9)
    tensor = Video(torch.from_numpy(clip.frames), clip.fps)  # type: ignore[arg-type]
    assert judge([tensor], ["go"])[0].probability == judge([clip], ["go"])[0].probability
    doubled = clip.frames.repeat(2, axis=1).repeat(2, axis=2)
    assert torch.equal(resize_frames(doubled, 32), torch.from_numpy(clip.frames))


def test_non_finite_weights_give_invalid(judge: EmbeddedJudge) -> None:
    judge.network.read_out[1].bias.data.fill_(math.nan)
    verdict = judge([video()], ["go"])[0]
    assert verdict.outcome is UNREAD and "not finite" in verdict.reason


def test_threshold_decides(judge: EmbeddedJudge) -> None:
    chance = judge([video()], ["go"])[0].probability
    assert chance is not None
    for threshold, expected in ((chance - 1e-6, YES), (chance + 1e-6, NO)):
        judge.network.config = replace(SMALL, threshold=threshold)
        verdict = judge([video()], ["go"])[0]
        assert verdict.outcome is expected and "threshold" in verdict.reason


def test_a_success_must_have_lasted(judge: EmbeddedJudge) -> None:
    clip, short = video(17), video(9, seed=1)
    at_end, earlier = judge([clip, Video(clip.frames[:9], 10.0)], ["stack"] * 2)
    alone = judge([short], ["stack"])[0]
    judge.network.config = replace(SMALL, hold=8)
    lasting, too_short = judge([clip, short], ["stack"] * 2)
    assert lasting.probability == min(at_end.probability, earlier.probability) and at_end != earlier
    assert too_short.probability == alone.probability


def test_a_verdict_does_not_depend_on_what_else_is_judged() -> None:
    torch.manual_seed(0)
    judge = EmbeddedJudge(JudgeNetwork(EmbeddedJudgeConfig()))
    clips = [
        Video(np.random.default_rng(i).integers(0, 256, (9 + 8 * i, 64, 64, 3), dtype=np.uint8), 10) for i in range(5)
    ]
    texts = ["put the cup into the pot", "go", "place the pot on the stove", "lift the spoon", "go"]
    together = [verdict.probability for verdict in judge(clips, texts)]
    assert together[::-1] == [verdict.probability for verdict in judge(clips[::-1], texts[::-1])]
    assert together == [judge([clip], [text])[0].probability for clip, text in zip(clips, texts, strict=True)]


def test_default_network_is_small_and_asks_many_questions_at_once() -> None:
    torch.manual_seed(0)
    network = JudgeNetwork(EmbeddedJudgeConfig()).eval()
    assert 1e6 < sum(p.numel() for p in network.parameters()) < 2.5e6
    frames = torch.randint(0, 256, (2, 6, 64, 64, 3), dtype=torch.uint8)
    tokens = torch.randint(2, 1024, (2, 3, 16))
    logits, places = network(frames, tokens)
    assert logits.shape == (2, 3) and places.shape == (2, 3, 6, 2, 3)
    single, _ = network(frames[1:], tokens[1:, 2:])
    torch.testing.assert_close(single[0, 0], logits[1, 2], atol=1e-4, rtol=1e-4)


def test_the_network_without_pointers_loads_and_the_one_with_them_is_refused(
    judge: EmbeddedJudge, tmp_path: Path
) -> None:
    folder = judge.save_pretrained(tmp_path)
    _edit(folder, model=_model(folder, pointers=False))
    assert load_judge(folder)([video()], ["go"])[0].probability == judge([video()], ["go"])[0].probability
    _edit(folder, model=_model(folder, pointers=True))
    with pytest.raises(CheckpointError, match="pointers"):
        load_judge(folder)


def test_the_shipped_judge_answers_everywhere_alike() -> None:
    clips = [
        Video(np.random.default_rng(i).integers(0, 256, (9 + 8 * i, 64, 64, 3), dtype=np.uint8), 10.0) for i in range(3)
    ]
    texts = ["stack the blue block onto the red block", "put the spoon into the bowl", "go"]
    found = [verdict.probability for verdict in load_judge("embedded")(clips, texts)]
    assert found == pytest.approx([0.0022557, 0.2055083, 0.0037600], abs=2e-5)


def test_padding_does_not_change_the_text() -> None:
    torch.manual_seed(0)
    network = JudgeNetwork(SMALL).eval()
    tokens = torch.tensor([[5, 6, 7] + [0] * 13])
    network.words.weight.data[0] = 100.0
    text = network.read_text(tokens)
    network.words.weight.data[0] = -3.0
    torch.testing.assert_close(text, network.read_text(tokens))


# -- checkpoints ------------------------------------------------------------------------------------------------------


def test_round_trip_is_exact(judge: EmbeddedJudge, tmp_path: Path) -> None:
    judge.network.config = replace(SMALL, threshold=0.7)
    folder = judge.save_pretrained(tmp_path / "judge")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "manifest.json", "model.safetensors"]
    again = load_judge(folder)
    assert isinstance(again, EmbeddedJudge)
    assert again.threshold == 0.7 and again.metadata == {"steps": 3}
    assert again([video()], ["go"])[0].probability == judge([video()], ["go"])[0].probability


def _edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _model(folder: Path, **changes: object) -> dict[str, object]:
    return {**json.loads((folder / "config.json").read_text())["model"], **changes}


def test_folders_of_earlier_versions_ask_only_about_the_end(judge: EmbeddedJudge, tmp_path: Path) -> None:
    path = judge.save_pretrained(tmp_path / "judge") / "config.json"
    content = json.loads(path.read_text())
    del content["model"]["hold"]
    path.write_text(json.dumps(content))
    assert EmbeddedJudge.from_pretrained(path.parent).network.config == SMALL
    for wrong in (-1, 2.0, True):
        path.write_text(json.dumps(content | {"model": content["model"] | {"hold": wrong}}))
        with pytest.raises(CheckpointError, match="hold"):
            EmbeddedJudge.from_pretrained(path.parent)


def test_damaged_checkpoints_are_named(judge: EmbeddedJudge, tmp_path: Path) -> None:
    folder = judge.save_pretrained(tmp_path)
    (folder / "manifest.json").unlink()  # what the other checks say; its checksums come before them
    config, weights = (folder / "config.json").read_bytes(), load_safetensors(folder / "model.safetensors")

    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            load_judge(folder)
        (folder / "config.json").write_bytes(config)
        save_safetensors(folder / "model.safetensors", weights)

    (folder / "config.json").write_text("{")
    refused("config.json cannot be read")
    (folder / "config.json").write_text("[" * 100_000)
    refused("config.json cannot be read")
    _edit(folder, kind="other")
    refused("kind='other'")
    _edit(folder, format=2)
    refused("format")
    _edit(folder, model=_model(folder, colour=1))
    refused("colour")
    for field, value in (("width", "16"), ("width", True), ("layers", 10**9), ("threshold", math.nan), ("heads", 3)):
        _edit(folder, model=_model(folder, **{field: value}))
        refused("config|heads")
    _edit(folder, model=_model(folder, width=32))
    refused(r"has shape \(.*16.*\), expected \(.*32.*\)")
    _edit(folder, model=_model(folder, layers=2))
    refused("missing")
    save_safetensors(folder / "model.safetensors", {**weights, "extra": torch.zeros(1)})
    refused("extra is unknown")
    save_safetensors(folder / "model.safetensors", {n: t.long() for n, t in weights.items()})
    refused("has type torch.int64, expected torch.float32")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    refused("damaged")
    assert isinstance(load_judge(folder), EmbeddedJudge)


def test_load_judge_by_name_folder_and_object(tmp_path: Path) -> None:
    judge = load_judge("scripted")
    assert load_judge(judge) is judge
    with pytest.raises(InvalidOptionError, match="neither 'embedded' nor 'state' nor 'scripted' nor"):
        load_judge(str(tmp_path / "nothing"))
    with pytest.raises(InvalidOptionError, match="int"):
        load_judge(3)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="config.json is missing; give a folder that holds a judge"):
        load_judge(tmp_path)


# -- the report -------------------------------------------------------------------------------------------------------


def _clips() -> list[JudgeClip]:
    facts = [("on:cup:stove", True), ("on:cup:stove", True), ("on:cup:stove", False), ("in:cup:pot", False)]
    return [
        JudgeClip(video(9, seed=i), f"question {i}", label, relation, held_out=relation.startswith("in"))
        for i, (relation, label) in enumerate(facts)
    ]


def _script(answers: list[Verdict]) -> Judge:
    given = iter(answers)
    return lambda videos, instructions: [next(given) for _ in videos]


def test_report_counts_by_hand(tmp_path: Path) -> None:
    answers = [
        Verdict(YES, probability=0.9), Verdict(UNREAD, "outage"), Verdict(YES, probability=0.8),
        Verdict(NO, probability=0.3),
    ]  # fmt: skip
    report = evaluate(_script(answers), _clips(), batch_size=3)
    row = report.rows["all"]
    assert (row.confusion.true_positive, row.confusion.false_positive, row.confusion.true_negative) == (1, 1, 1)
    assert row.confusion.false_negative == 0 and (row.invalid.successes, row.invalid.n) == (1, 4)
    assert report.rows["kind on"].invalid.n == 3 and report.rows["held-out pairs"].invalid.n == 1
    low, high = row.confusion.precision.low, row.confusion.precision.high
    assert low < 0.5 < high
    strict = next(entry for entry in report.sweep if entry["threshold"] == 0.85)
    assert (strict["true_positive"], strict["false_positive"]) == (1, 0)
    assert [clip.instruction for clip, _ in report.mistakes()] == ["question 2"]
    assert "kind on" in report.table() and "50.0 [" in report.table()
    report.write(tmp_path)
    written = json.loads((tmp_path / "judge_report.json").read_text())
    assert written["groups"]["relation on:cup:stove"]["invalid"]["n"] == 3
    picture = np.asarray(Image.open(tmp_path / "mistakes.png"))
    assert picture.shape == (114, 768, 3) and picture.std() > 10


def test_report_without_mistakes_or_probabilities(tmp_path: Path) -> None:
    (tmp_path / "mistakes.png").write_bytes(b"stale")
    answers = [Verdict(YES), Verdict(YES), Verdict(NO), Verdict(NO)]
    report = evaluate(_script(answers), _clips()).write(tmp_path)
    assert not (report / "mistakes.png").exists()
    assert json.loads((report / "judge_report.json").read_text())["threshold_sweep"] == []


def test_report_refuses_nothing_and_miscounts() -> None:
    with pytest.raises(ValueError, match="no clips"):
        evaluate(_script([]), [])
    with pytest.raises(JudgeError, match="0 verdicts for 4 videos"):
        evaluate(lambda videos, instructions: [], _clips())
