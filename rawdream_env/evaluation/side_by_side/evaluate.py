"""The same policy, the same starts, in the dream and in the simulator: how far the dream can be trusted.

For every start (task, index) and every policy up to six things are recorded:

1. *simulator*: the policy acts in the simulator; success by the simulator's predicate.
2. *dream*: the policy acts in the dream; the judge's verdict. With dual-noise verification (paper section 3.3) each
   success is dreamt again with fresh noise; one that does not repeat is *flagged*.
3. *dreamed actions*: what the policy did in the dream, executed in the simulator from the same start. Outcome and
   frames compare one to one: this is the fair test of a dream, since both worlds get the same actions.
4. *simulator's actions*: what it did in the simulator, through the world model, judged.
5. *judge*: the judge on the simulator's videos: its errors without the world model's.

3, 4 and 5 are the ``diagnose`` part. The gap between dream and simulator splits into the judge's share (5) and the
world model's (3 and 4 beyond 5). Verdicts that are INVALID are counted and left out, never taken for failures.

*Truth*: a judge that sees the whole video once (``judge_every="episode"``) can only say whether the goal holds at its
end, so verdicts are compared with that; with ``judge_every="chunk"`` with success after any chunk. The simulator's
headline rate is success after any chunk, which is what ``rawdream/PiperSim-v0`` rewards; the other is reported beside
it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rawdream_env.errors import InvalidOptionError
from rawdream_env.evaluation.side_by_side import rollouts
from rawdream_env.evaluation.side_by_side.aggregate import Scores, aggregate
from rawdream_env.evaluation.side_by_side.records import Clip, Clips, EpisodeRecord, SideBySide
from rawdream_env.evaluation.side_by_side.report import write_report
from rawdream_env.evaluation.side_by_side.rollouts import DreamEpisode, SimEpisode
from rawdream_env.evaluation.world_model.fidelity import compare_episode
from rawdream_env.types import Judge, Policy, Start, Verdict, Video


@dataclass(frozen=True)
class EvaluateConfig:
    """Options of ``rawdream evaluate``."""

    policies: tuple[str, ...] = ("embedded",)
    """Policies to compare, each name=folder or name=embedded; the first is the reference."""
    tasks: tuple[str, ...] = rollouts.TASK_NAMES
    """Tasks to evaluate."""
    episodes_per_task: int = 50
    """Starts per task; 200 gives intervals of about +-7 points."""
    output: Path | None = Path("runs/evaluate")
    """Folder for report.html, report.json and episodes.jsonl."""
    world_model: str = "embedded"
    """World model of the dream: "embedded" or a folder."""
    judge: str = "embedded"
    """Judge of the dream: "embedded" or a folder."""
    judge_every: str = "episode"
    """"episode": the whole video once; "chunk": after every chunk, ending at the first success."""
    num_inference_steps: int | None = None
    """Evaluations of the world model's sampler per chunk; the checkpoint's own when not given."""
    dtype: str | None = None
    """Precision of the world model: "float32" (the default, bit-reproducible) or "bfloat16" (faster)."""
    temperature: float = 0.0
    """Sampling temperature of the policy in both worlds; 0 is greedy."""
    verify: bool = True
    """Dual-noise verification of dreamed successes."""
    diagnose: bool = True
    """Execute each world's actions in the other and judge the simulator's videos (about twice the time)."""
    max_episode_steps: int = 8
    """Horizon in chunks."""
    num_envs: int = 16
    """Episodes at once."""
    sim_workers: int = 2
    """Simulator processes; 0 runs it in this one."""
    layout: str = "narrow"
    """How far objects are spread at the start: "narrow" or "wide"."""
    videos: int = 2
    """Videos in the report per policy and kind (agreeing successes, agreeing failures, each kind of disagreement)."""
    seed: int = 0
    """Names the starts: equal seeds give equal starts for every policy."""
    device: str = "cpu"
    """Torch device of the models."""


@dataclass
class _Parts:
    """The worlds and their judge."""

    dream: Any
    simulator: rollouts.Simulator
    judge: Judge
    fps: float


@dataclass
class _Collected:
    """What grows while episodes run."""

    clips: Clips
    records: list[EpisodeRecord] = field(default_factory=list)
    scores: dict[str, dict[str, list[Scores]]] = field(default_factory=dict)


def parse_policies(specs: Sequence[str]) -> dict[str, str]:
    """Policy specs "name=folder" as a mapping; a bare spec is named by its last part.

    Raises InvalidOptionError for an empty list, an empty name or a name given twice.
    """
    named: dict[str, str] = {}
    for spec in specs:
        name, separator, folder = spec.partition("=")
        name, folder = (name, folder) if separator else (Path(spec).name, spec)
        if not name or not folder or name in named:
            raise InvalidOptionError(f'policy {spec!r}: give each once as name=folder, for example "sft=runs/sft"')
        named[name] = folder
    if not named:
        raise InvalidOptionError('no policy given; use for example --policies "sft=embedded" "rl=runs/grpo/policy"')
    return named


def evaluate(
    config: EvaluateConfig,
    *,
    policies: Mapping[str, Policy] | None = None,
    dream: Any = None,
    simulator: rollouts.Simulator | None = None,
    progress: bool = True,
) -> SideBySide:
    """Run the comparison and, with ``config.output``, write ``report.html``, ``report.json`` and ``episodes.jsonl``.

    ``policies``, ``dream`` (a ``DreamVectorEnv`` with a judge and autoreset disabled) and ``simulator`` replace what
    the configuration names; what was passed in is not closed. Raises InvalidOptionError for options that do not fit.
    """
    if config.episodes_per_task < 1 or not config.tasks:
        raise InvalidOptionError(f"nothing to run: {config.episodes_per_task} episodes of {len(config.tasks)} tasks")
    actors = _load_policies(config) if policies is None else dict(policies)
    parts, opened = _open(config, dream, simulator)
    collected = _Collected(Clips(config.videos))
    try:
        _run_all(config, actors, parts, collected, progress)
    finally:
        for thing in opened:
            thing.close()
    report = aggregate(
        collected.records,
        collected.scores,
        chunk_len=parts.dream.chunk_len,
        at_end=config.judge_every == "episode",
        config=config_dict(config),
    )
    result = SideBySide(report, collected.records, collected.clips)
    if config.output is not None:
        write_report(result, config.output, parts.fps)
    return result


def _load_policies(config: EvaluateConfig) -> dict[str, Policy]:
    from rawdream_env.policies import load_policy

    return {name: load_policy(folder, device=config.device) for name, folder in parse_policies(config.policies).items()}


def _open(config: EvaluateConfig, dream: Any, simulator: Any) -> tuple[_Parts, list[Any]]:
    """Both worlds, and which of them are ours to close."""
    opened: list[Any] = []
    if dream is None:
        from rawdream_env.envs.dream import DreamVectorEnv

        dream = DreamVectorEnv(
            config.num_envs,
            world_model=config.world_model,
            judge=config.judge,
            judge_every=config.judge_every,
            starts="null",  # every reset is given its starts
            max_episode_steps=config.max_episode_steps,
            autoreset_mode="Disabled",
            num_inference_steps=config.num_inference_steps,
            device=config.device,
            dtype=config.dtype,
        )
        opened.append(dream)
    if dream.judge is None:
        raise InvalidOptionError(
            "the dream has no judge: there is nothing to compare with the simulator; give judge=..."
        )
    if simulator is None:
        from rawdream_env.piper.workers import PiperWorkers

        simulator = PiperWorkers(
            dream.num_envs, config.sim_workers, image_size=dream.world_model.frame_shape[0], layout=config.layout
        )
        opened.append(simulator)
    return _Parts(dream, simulator, dream.judge, float(dream.fps)), opened


def _run_all(
    config: EvaluateConfig, policies: Mapping[str, Policy], parts: _Parts, collected: _Collected, progress: bool
) -> None:
    from tqdm import tqdm

    pairs = [(task, index) for index in range(config.episodes_per_task) for task in config.tasks]
    size = parts.dream.num_envs
    with tqdm(total=len(pairs) * len(policies), desc="evaluate", unit="episode", disable=not progress) as bar:
        for first in range(0, len(pairs), size):
            batch = pairs[first : first + size]
            starts = rollouts.make_starts(parts.simulator, [t for t, _ in batch], [i for _, i in batch], config.seed)
            for name, policy in policies.items():
                _run_batch(config, name, policy, parts, starts, batch, collected)
                bar.update(len(batch))
                done = [r for r in collected.records if r.policy == name]
                rates = {"sim": sum(r.simulator for r in done), "dream": sum(r.dream == 1 for r in done)}
                bar.set_postfix({"policy": name, **{k: f"{100 * v / len(done):.0f}%" for k, v in rates.items()}})


@dataclass
class _Batch:
    """One batch of starts under one policy; the diagnose parts are None when they were not asked for."""

    sims: list[SimEpisode]
    dreams: list[DreamEpisode]
    second: list[Verdict | None]
    acted: list[SimEpisode] | None = None
    echoes: list[DreamEpisode] | None = None
    judged: list[Verdict] | None = None


def _run_batch(
    config: EvaluateConfig,
    name: str,
    policy: Policy,
    parts: _Parts,
    starts: Sequence[Start],
    batch: Sequence[tuple[str, int]],
    collected: _Collected,
) -> None:
    sim, temperature = parts.simulator, config.temperature
    b = _Batch(
        rollouts.run_in_simulator(sim, starts, policy=policy, chunks=config.max_episode_steps, temperature=temperature),
        dreams := rollouts.run_in_dream(parts.dream, starts, policy, temperature=temperature),
        rollouts.verify(parts.dream, dreams) if config.verify else [None] * len(starts),
    )
    if config.diagnose:
        b.acted = rollouts.run_in_simulator(sim, starts, actions=[d.trajectory.actions for d in b.dreams])
        b.echoes = rollouts.replay_in_dream(parts.dream, starts, [s.actions for s in b.sims])
        b.judged = parts.judge([Video(s.frames, parts.fps) for s in b.sims], [start.instruction for start in starts])
        _score(b, collected.scores.setdefault(name, {}), parts.dream.chunk_len)
    for i, (task, index) in enumerate(batch):
        record = _record(name, task, index, starts[i], b, i)
        collected.records.append(record)
        left = b.sims[i] if b.acted is None else b.acted[i]
        happened = left.success_end if config.judge_every == "episode" else left.success_any
        text, same_actions = starts[i].instruction, b.acted is not None
        collected.clips.add(Clip(record, text, left.frames, b.dreams[i].frames, happened, same_actions))


def _record(name: str, task: str, index: int, start: Start, b: _Batch, i: int) -> EpisodeRecord:
    second = b.second[i]
    return EpisodeRecord(
        policy=name,
        task=task,
        index=index,
        seed=start.seed or 0,
        simulator=b.sims[i].success_any,
        simulator_end=b.sims[i].success_end,
        dream=int(b.dreams[i].verdict.outcome),
        second=None if second is None else int(second.outcome),
        dreamed_actions=None if b.acted is None else b.acted[i].success_any,
        dreamed_actions_end=None if b.acted is None else b.acted[i].success_end,
        simulator_actions=None if b.echoes is None else int(b.echoes[i].verdict.outcome),
        judge_on_simulator=None if b.judged is None else int(b.judged[i].outcome),
    )


def _score(b: _Batch, scores: dict[str, list[Scores]], chunk_len: int) -> None:
    """PSNR and SSIM of every frame where dream and simulator got the same actions."""
    assert b.acted is not None and b.echoes is not None
    for dream, acted in zip(b.dreams, b.acted, strict=True):
        scores.setdefault("dreamed_actions", []).append(compare_episode(dream.frames[1:], acted.frames, chunk_len))
    for echo, sim in zip(b.echoes, b.sims, strict=True):
        scores.setdefault("simulator_actions", []).append(compare_episode(echo.frames[1:], sim.frames, chunk_len))


def config_dict(config: EvaluateConfig) -> dict[str, Any]:
    """The configuration as JSON."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
