"""Side-by-side evaluation: the same policies from the same starts in the dream and in the simulator.

Up to five outcomes are recorded for every start (task, index) and every policy:

1. *simulator*: the policy acts in the simulator, which decides on success.
2. *dream*: the policy acts in the dream, and the judge decides. With dual-noise verification (paper section 3.2 and
   appendix A.2) each success is imagined again with fresh noise; one that does not repeat is *flagged*.
3. *dreamed actions*: the actions of the dream, executed in the simulator from the same start. Both worlds get the same
   actions, so outcomes and frames compare one to one.
4. *simulator's actions*: the actions of the simulator, imagined by the world model and judged.
5. *judge*: the judge on the simulator's videos, which isolates the judge's errors from the world model's.

``diagnose`` adds 3, 4 and 5. They split the gap between dream and simulator into the judge's share (5) and the world model's
(3 and 4 beyond 5). INVALID verdicts and flagged successes are counted separately: the success rate in the dream is over the
episodes that were judged and not flagged.

Both worlds are vector environments that :func:`rawdream_env.envs.episodes.run_episodes` steps. ``sim_env`` (an id) or
``simulator`` (an object) replaces the simulator by any Gymnasium vector environment that has our infos, lists its ``tasks``
((name, instruction) pairs in the order of the task ids), starts from a ``Start`` with a seed and a task id, gives a verdict
after every chunk, and continues to its horizon (options ``max_episode_steps``, ``return_frames``,
``end_on_success=False``). A ``protocol`` of the simulator (LIBERO) is recorded, and must be the dream's.

With ``real`` every policy also has trials on the arm (:mod:`rawdream_env.evaluation.side_by_side.trials`).

A world model that imagines a state also tells success by itself, whatever the judge: in 2 and in 4. That splits the world
model's share from the judge's within the dream (docs/evaluation.md lists every number).

*Time rule*: a judge that sees the whole video once (``judge_every="episode"``) can only tell whether the goal holds at its end,
so its verdicts and those of the dream's state are compared with success at the end. With ``judge_every="chunk"`` a success
counts after any chunk, everywhere: recorded videos are then judged chunk by chunk too, until their first success. The
simulator's success rate is success after any chunk, which simulator environments reward; the rate at the end is reported
as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from rawdream_env.envs.episodes import Rollout, make_env, run_episodes
from rawdream_env.envs.imagination import Replay
from rawdream_env.errors import InvalidOptionError
from rawdream_env.evaluation.side_by_side.aggregate import aggregate
from rawdream_env.evaluation.side_by_side.compare import require_same_protocol
from rawdream_env.evaluation.side_by_side.records import Clip, Clips, EpisodeRecord, SideBySide
from rawdream_env.evaluation.side_by_side.report import write_report
from rawdream_env.evaluation.side_by_side.tasks import make_starts, task_names
from rawdream_env.evaluation.side_by_side.trials import add_trials, make_real, run_trials
from rawdream_env.evaluation.side_by_side.verdicts import judge_recorded, second_verdicts, state_outcome
from rawdream_env.evaluation.world_model.fidelity import compare_episode
from rawdream_env.evaluation.world_model.horizon import HorizonScores
from rawdream_env.files import check_output
from rawdream_env.policies import load_policy
from rawdream_env.robots import find_robot, sim_options
from rawdream_env.seeding import NoiseKey
from rawdream_env.types import Outcome, Policy, Trajectory, UInt8Array, Verdict


@dataclass(frozen=True)
class EvaluateConfig:
    """Options of ``rawdream policy evaluate``."""

    policies: tuple[str, ...] = ("embedded",)
    """Policies to compare, each name=PART; the first is the reference. PART: "embedded", a folder, hub id or module:factory."""
    tasks: tuple[str, ...] = ()
    """Tasks to evaluate, by name; default: all tasks of the simulator."""
    episodes_per_task: int = 50
    """Starts per task; with 200 the 95 % interval is about +-7 points."""
    out: Path | None = Path("runs/evaluate")
    """Folder for report.html, report.json and episodes.jsonl."""
    dream_env: str = "rawdream/Dream-v0"
    """Environment id of the dream."""
    dream_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Keyword arguments of the dream environment, as KEY VALUE pairs."""
    sim_env: str = ""
    """Environment id of the simulator; default: that of the dream's robot."""
    sim_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Keyword arguments of the simulator environment, as KEY VALUE pairs."""
    world_model: str = "embedded"
    """World model of the dream: "embedded", a folder, hub id or module:factory."""
    judge: str = "embedded"
    """Judge of the dream: "embedded", a folder, a server, hub id or module:factory."""
    judge_every: str = "auto"
    """"episode": judge the whole video once; "chunk": judge after every chunk and end at the first success; "auto": the
    judge's default."""
    num_inference_steps: int | None = None
    """Denoising steps per chunk; default: the checkpoint's."""
    dtype: str | None = None
    """Precision of the world model: "float32" (the default, bit-reproducible) or "bfloat16" (faster)."""
    temperature: float = 0.0
    """Sampling temperature of the policy in both worlds; 0 is greedy."""
    verify: bool = True
    """Verify dreamed successes with a second noise draw (dual-noise verification)."""
    diagnose: bool = True
    """Execute each world's actions in the other one and judge the simulator's videos; takes about twice the time."""
    max_episode_steps: int | None = None
    """Maximum number of chunks per episode; default: the dream environment's, 8 or that of its protocol."""
    num_envs: int = 16
    """Number of episodes that run in parallel."""
    workers: int = 2
    """Simulator processes; 0: none besides this one, -1: one per core."""
    layout: str = "narrow"
    """Start positions of objects in the default simulator: "narrow" (within 3 cm of the usual place) or "wide"."""
    videos: int = 2
    """Videos in the report per policy and per kind of outcome (both succeed, both fail, only one succeeds)."""
    real: bool = False
    """Also run trials on the arm, before everything else. Rerun the same command to resume with the next trial."""
    real_trials: int = 30
    """Trials per task and policy on the arm."""
    real_env: str = ""
    """Environment id of the arm; default: that of the dream's robot."""
    real_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Keyword arguments of the arm's environment, as KEY VALUE pairs."""
    seed: int = 0
    """Seed of the starts; the same seed gives every policy the same starts."""
    device: str = "cpu"
    """Torch device of the models."""

    def __post_init__(self) -> None:
        """Check the number of episodes."""
        if self.episodes_per_task < 1:
            raise InvalidOptionError(f"nothing to run: {self.episodes_per_task} episodes per task; use at least 1.")
        if self.real and (self.out is None or self.real_trials < 1):
            raise InvalidOptionError("trials on the arm need a folder (--out), and at least one trial per task.")


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
        raise InvalidOptionError('no policy given; use for example --policies "sft=embedded" "rl=runs/grpo/policy".')
    return named


def evaluate(
    config: EvaluateConfig,
    *,
    policies: Mapping[str, Policy] | None = None,
    dream: Any = None,
    simulator: Any = None,
    real: Any = None,
    training: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> SideBySide:
    """Run the comparison and, with ``config.out``, write ``report.html``, ``report.json`` and ``episodes.jsonl``.

    Args:
        config: options.
        policies: policies by name, instead of those of ``config``.
        dream: a ``DreamVectorEnv`` with a judge, autoreset disabled and ``return_frames=True``, instead of that of
            ``config``.
        simulator: instead of that of ``config``; the module docstring lists the requirements.
        real: the arm's environment of one row, for ``config.real``; the requirements are those of the simulator.
        training: dreamed success while the last policy was trained, for the report's chart (``report.training_chart``).
        progress: show a progress bar.

    Environments that were passed in stay open.

    Raises:
        InvalidOptionError: options or environments do not fit.
    """
    named = parse_policies(config.policies) if policies is None else {}
    if config.out is not None:
        check_output(config.out)
    actors = policies or {name: load_policy(folder, device=config.device) for name, folder in named.items()}
    records: list[EpisodeRecord] = []
    scores: dict[str, dict[str, HorizonScores]] = {}
    clips = Clips(config.videos)
    with ExitStack() as opened:
        if dream is None:
            dream = opened.enter_context(closing(_make_dream(config)))
        if getattr(dream.unwrapped, "judge", None) is None:
            raise InvalidOptionError(
                "the dream has no judge, so it has no outcome to compare with the simulator; pass judge=..."
            )
        if simulator is None:
            simulator = opened.enter_context(closing(_make_simulator(config, dream)))
        _check_protocols(dream, simulator)
        config = replace(config, tasks=task_names(simulator, config.tasks))
        chunk_len = dream.single_action_space.shape[0]
        trials = None
        if config.real:
            if real is None:
                real = opened.enter_context(closing(make_real(config.real_env, config.real_kwargs, dream)))
            trials = run_trials(config, actors, real, progress=progress)
        pairs = [(task, index) for index in range(config.episodes_per_task) for task in config.tasks]
        with tqdm(total=len(pairs) * len(actors), desc="evaluate", unit="episode", disable=not progress) as bar:
            for first in range(0, len(pairs), dream.num_envs):
                batch = pairs[first : first + dream.num_envs]
                for name, policy in actors.items():
                    for clip, horizon in _compare(config, name, policy, batch, dream, simulator):
                        records.append(clip.record)
                        clips.add(clip)
                        for source, frames in horizon.items():
                            scores.setdefault(name, {}).setdefault(source, HorizonScores(chunk_len)).add(frames)
                    bar.update(len(batch))
                    bar.set_postfix(_rates(name, records))
    fps, at_end = float(dream.unwrapped.fps), dream.unwrapped.judge_every == "episode"
    report = aggregate(records, scores, at_end=at_end, config=config_dict(config))
    report["protocol"] = _protocol(simulator)
    report |= {} if training is None else {"training": dict(training)}
    if trials is not None:
        add_trials(report, trials)
    result = SideBySide(report, records, clips)
    if config.out is not None:
        write_report(result, config.out, fps)
    return result


def _make_dream(config: EvaluateConfig) -> Any:
    return make_env(
        config.dream_env,
        config.num_envs,
        world_model=config.world_model,
        judge=config.judge,
        judge_every=config.judge_every,
        num_inference_steps=config.num_inference_steps,
        device=config.device,
        dtype=config.dtype,
        return_frames=True,
        **({} if config.max_episode_steps is None else {"max_episode_steps": config.max_episode_steps}),
        **{"starts": "null", **config.dream_kwargs},  # every reset passes its starts
    )


def _make_simulator(config: EvaluateConfig, dream: Any) -> Any:
    robot = find_robot(getattr(dream.unwrapped, "robot", ""))
    env_id = config.sim_env or robot.sim_env
    if not env_id:
        raise InvalidOptionError(f"robot {robot.name!r} has no simulator; pass the id of one with --sim-env.")
    chunk_len, (side, *_) = dream.single_action_space.shape[0], dream.single_observation_space["image"].shape
    kwargs: dict[str, Any] = {
        "max_episode_steps": dream.unwrapped.max_episode_steps,
        "return_frames": True,
        "end_on_success": False,
        **sim_options(
            env_id,
            num_workers=config.workers,
            layout=config.layout,
            image_size=side,
            judge_every="chunk",
            chunk_len=chunk_len,
        ),
    }
    return make_env(env_id, config.num_envs, **{**kwargs, **config.sim_kwargs})


def _protocol(env: Any) -> dict[str, Any] | None:
    """The evaluation protocol of an environment; None where it has none."""
    return getattr(env.unwrapped, "protocol", None)


def _check_protocols(dream: Any, simulator: Any) -> None:
    """Refuse to compare a dream with a simulator of another protocol. The simulator's initial states are used for both."""
    found = {"the dream": _protocol(dream), "the simulator": _protocol(simulator)}
    if all(found.values()):
        require_same_protocol({name: {**(p or {}), "init_states": ""} for name, p in found.items()})


def _compare(
    config: EvaluateConfig, name: str, policy: Policy, pairs: Sequence[tuple[str, int]], dream: Any, simulator: Any
) -> Iterator[tuple[Clip, dict[str, dict[str, NDArray[np.float64]]]]]:
    """Run one policy from one batch of starts; yields a clip with its record, and the scores of its frames, per start."""
    base, nothing = dream.unwrapped, [None] * len(pairs)
    starts = make_starts(simulator, pairs, config.seed)
    sims = list(run_episodes(simulator, starts, policy, temperature=config.temperature))
    starts = [sim.start for sim in sims]  # as the simulator shows them
    dreams = list(run_episodes(dream, starts, policy, temperature=config.temperature))
    second = second_verdicts(base, dreams) if config.verify else nothing
    acted: Sequence[Rollout | None] = nothing
    echoes: Sequence[Replay | None] = nothing
    judged: Sequence[Verdict | None] = nothing
    if config.diagnose:
        acted = list(run_episodes(simulator, starts, actions=[d.actions for d in dreams]))
        recorded = [Trajectory(s.start, NoiseKey(s.request.seed), s.actions) for s in sims]
        echoes = judge_recorded(base, base.replay(recorded, draw=0, return_frames=True, judge=False), starts)
        judged = [seen.verdict for seen in judge_recorded(base, [Replay(_frames(s), None) for s in sims], starts)]
    at_end = base.judge_every == "episode"
    for i, (task, index) in enumerate(pairs):
        sim, imagined, did, echo = sims[i], dreams[i], acted[i], echoes[i]
        record = EpisodeRecord(
            policy=name,
            task=task,
            index=index,
            seed=sim.request.seed,
            simulator=sim.success_any,
            simulator_end=sim.success_end,
            dream=int(imagined.verdict if imagined.valid else Outcome.INVALID),
            second=_outcome(second[i]),
            dreamed_actions=None if did is None else did.success_any,
            dreamed_actions_end=None if did is None else did.success_end,
            simulator_actions=None if echo is None else _outcome(echo.verdict),
            judge_on_simulator=_outcome(judged[i]),
            dream_state=state_outcome(imagined.states.tolist(), at_end),
            simulator_actions_state=-1 if echo is None else state_outcome(echo.states, at_end),
            simulator_lifted=sim.lifted,
            simulator_actions_lifted=-1 if echo is None else echo.lifted,
        )
        left = sim if did is None else did
        happened = left.success_end if at_end else left.success_any
        shown = sim.start.instruction, _frames(left), _frames(imagined), happened, did is not None
        clip = Clip(record, *shown, left.actions, imagined.trajectory)
        horizon = {}
        if did is not None and echo is not None:  # both worlds got the same actions
            assert echo.frames is not None
            k = base.chunk_len
            horizon["dreamed_actions"] = compare_episode(clip.right[1:], clip.left, k)
            horizon["simulator_actions"] = compare_episode(echo.frames[1:], _frames(sim), k)
        yield clip, horizon


def _outcome(verdict: Verdict | None) -> int | None:
    return None if verdict is None else int(verdict.outcome)


def _frames(rollout: Rollout) -> UInt8Array:
    if rollout.frames is None:
        raise InvalidOptionError(
            "dream and simulator need return_frames=True, because their frames are compared and shown."
        )
    return rollout.frames


def _rates(name: str, records: Sequence[EpisodeRecord]) -> dict[str, str]:
    """Success rates of a policy so far, for the progress bar."""
    own = [record for record in records if record.policy == name]
    outcomes = {"sim": [r.simulator for r in own], "dream": [r.dream == 1 for r in own if r.trusted]}
    rates = {world: f"{100 * sum(some) / len(some):.0f}%" if some else "-" for world, some in outcomes.items()}
    return {"policy": name, **rates}


def config_dict(config: EvaluateConfig) -> dict[str, Any]:
    """The configuration as JSON."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
