"""The model card of the bundled models, written from the measurements."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rawdream_env.evaluation.reporting.numbers import estimate_text, rate_text
from rawdream_env.files import atomic_write_json, atomic_write_text, sha256_file

_ORDER = (
    "play",
    "other_play",
    "held_out_play",
    "pretrained",
    "rollouts",
    "demonstrations",
    "policy",
    "states",
    "pictures",
    "start_pictures",
    "reader",
    "painter",
    "first_dynamics",
    "first_world_model",
    "dreamers",
    "more_states",
    "dynamics",
    "world_model",
    "dreams",
    "placed",
    "placed_dreams",
    "fumbled",
    "fumbled_dreams",
    "judge",
    "starts",
    "assets",
    "metrics",
)


def model_card(stages: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, Any]) -> str:
    """The card as Markdown.

    ``stages``: the markers of the stages; ``metrics``: the content of metrics.json.
    """
    run = metrics["run"]
    hardware, versions = run["hardware"], run["versions"]
    return "\n".join(
        [
            "# Bundled models of the Piper tabletop",
            "",
            "World model, judge and policy that `rawdream/PiperDream-v0` uses by default, and the "
            "starts of its episodes. Trained from scratch by this project, on data from its own simulator; weights "
            "under the package's licence (Apache-2.0). Format: safetensors and JSON.",
            "",
            "- **Use**: trying the method, tests, teaching. 64x64 pixels, primitive objects, one camera, one arm.",
            "- **Not for**: real robots; conclusions about full-size models.",
            "- **Reproduce with** `rawdream models train` (`--preset gpu` for more data and steps).",
            f"- **Machine**: {hardware['cpu']}, {hardware['cores']} cores, GPU: {hardware.get('gpu') or 'none'}; "
            f"torch {versions['torch']}, Python {versions['python']}; {run['time']}.",
            "",
            "## Training",
            "",
            "| stage | hours | what |",
            "|---|---|---|",
            *_stage_rows(stages),
            "",
            *(_scene(stages) if "dynamics" in stages else ()),
            "## World model on held-out play",
            "",
            *_fidelity(metrics["world_model"]),
            "",
            "## Judge on held-out clips",
            "",
            *_judge(metrics["judge"]),
            "",
            "## Few-shot policy, greedy",
            "",
            *_policy(metrics["policy"]),
            "",
            "Rates with 95 % Wilson intervals. All numbers: `metrics.json`; hashes: `manifest.json`.",
            "",
        ]
    )


def _stage_rows(stages: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows = []
    numbered = sorted(name for name in stages if name.startswith(("dreamer_rollouts_", "dreamer_dreams_")))
    at = _ORDER.index("judge")
    for name in (n for n in (*_ORDER[:at], *numbered, *_ORDER[at:]) if n in stages):
        stage = stages[name]
        rows.append(f"| {name.replace('_', ' ')} | {stage['hours']:.2f} | {_what(stage)} |")
    total = sum(stage["hours"] for stage in stages.values())
    return [*rows, f"| all | {total:.2f} | |"]


def _scene(stages: Mapping[str, Mapping[str, Any]]) -> list[str]:
    states, more, pictures, starts = (
        stages[name]["facts"] for name in ("states", "more_states", "pictures", "start_pictures")
    )
    own = _ORDER[_ORDER.index("states") : _ORDER.index("dreams")]
    hours = sum(stages[name]["hours"] for name in own)
    return [
        "## What the world model was trained on",
        "",
        "The world model was trained on object states that the simulator reports (**privileged supervision**); at run time it "
        "sees the start picture, the commanded start pose and the actions.",
        "",
        f"- **States**: {states['episodes']} episodes, {states['transitions']} control steps, without pictures: a policy's "
        "episodes with disturbed actions, and scripted play, practice of grasping and placing, and noisy experts. Then "
        f"{more['episodes']} episodes, {more['transitions']} control steps, with policies among them that GRPO trained in a "
        "first world model (a second round).",
        f"- **Pictures**: {pictures['pictures']} of {pictures['episodes']} scripted episodes for the painter; "
        f"{starts['pictures']} start pictures for the reader.",
        "- **No task is done in them.** An episode ends before the relation of one of the four tasks comes true; an episode of "
        "states also ends where a task's object is let go near its target, whatever comes of it. Tests count that none of "
        "these relations is true in collected states and pictures. The objects are grasped, carried, dropped and put "
        "elsewhere. The policies whose episodes are among the states were trained on play, on the demonstrations of the tasks, "
        "and on the tasks in the first world model.",
        f"- **Time**: {hours:.2f} hours for data and training of the world model.",
        "",
    ]


def _what(stage: Mapping[str, Any]) -> str:
    settings, facts = stage["settings"], stage.get("facts", {})
    parts = []
    if "transitions" in facts:
        kind = settings.get("kind", "object states")
        parts.append(f"{facts['episodes']} episodes, {facts['transitions']} transitions ({kind})")
    if "pictures" in facts:
        parts.append(f"{facts['pictures']} pictures")
    for part in ("autoencoder", "transformer"):
        if part in settings:
            sub = settings[part]
            parts.append(f"{part}: {sub['steps']} steps of {sub['batch_size']}, lr {sub['lr']:g}")
    if settings.get("minutes"):
        parts.append(f"{settings['minutes']:g} minutes, batch {settings['batch_size']}, lr {settings['lr']:g}")
    elif "steps" in settings and "transitions" not in facts:
        parts.append(f"{settings['steps']} steps of {settings['batch_size']}, lr {settings['lr']:g}")
    words = {"clips": "imagined clips", "per_task": "starts per task", "episodes": "episodes per task"}
    words |= {"dreamers": "policies", "grpo_steps": "GRPO steps each"}
    parts += [
        f"{settings[key]} {word}" for key, word in words.items() if key in settings and "transitions" not in facts
    ]
    if "seed" in settings:
        parts.append(f"seed {settings['seed']}")
    return "; ".join(parts)


def _fidelity(fidelity: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{fidelity['episodes']} episodes replayed open loop from their first frame: PSNR in dB with 95 % intervals "
        "over episodes, beside two baselines: repeating the first frame, and repeating the last real frame before each chunk.",
        "",
        "| frames | dream | first frame | last frame |",
        "|---|---|---|---|",
    ]
    for row in fidelity["horizon"]:
        low, high = row["frames"]
        cells = [estimate_text(row[name]["psnr"], digits=1) for name in ("dream", "copy_first", "copy_last")]
        lines.append(f"| {low}-{high} | {' | '.join(cells)} |")
    return lines


def _judge(groups: Mapping[str, Any]) -> list[str]:
    lines = ["| clips | precision | recall | false positives |", "|---|---|---|---|"]
    for name, row in groups.items():
        if name.startswith(("all", "source", "trained", "held-out")):
            cells = [_rate(row.get(key)) for key in ("precision", "recall", "false_positive_rate")]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _policy(policies: Any) -> list[str]:
    lines = ["| task | dream | simulator |", "|---|---|---|"]
    for entry in policies:
        for task, part in {"all": entry["all"], **entry["tasks"]}.items():
            dream = part.get("dream_trusted", part["dream"])  # earlier reports have first verdicts alone
            lines.append(f"| {task.replace('_', ' ')} | {_rate(dream)} | {_rate(part['simulator'])} |")
    return lines


def _rate(rate: Any) -> str:
    return rate_text(rate) if isinstance(rate, Mapping) else "not measured"


def write_card(assets: Path, markers: Path) -> None:
    """Write the model card (README.md) and the manifest (SHA-256 of every file) of an assets folder."""
    stages = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(markers.glob("*.json"))}
    metrics = json.loads((assets / "metrics.json").read_text(encoding="utf-8"))
    atomic_write_text(assets / "README.md", model_card(stages, metrics))
    write_manifest(assets)


def write_manifest(assets: Path) -> None:
    """Write ``manifest.json``: SHA-256 of every checkpoint, configuration and start pack. Loading and ``rawdream doctor``
    compare them."""
    files = sorted(p for p in assets.rglob("*") if p.suffix in (".safetensors", ".json") and p.name != "manifest.json")
    atomic_write_json(
        assets / "manifest.json", {"sha256": {p.relative_to(assets).as_posix(): sha256_file(p) for p in files}}
    )
