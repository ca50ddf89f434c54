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

Both worlds are vector environments driven by :func:`rawdream_env.envs.episodes.run_episodes`. Any simulator can stand in
that is registered under an id (``sim_env``) or passed in: a Gymnasium vector environment with our infos that lists its
``tasks``, (name, instruction) pairs in the order of the task ids, begins from a ``Start`` with a seed and a task id, has a
verdict after every chunk and goes on to its horizon (options ``max_episode_steps``, ``return_frames``,
``end_on_success=False``).

*Truth*: a judge that sees the whole video once (``judge_every="episode"``) can only say whether the goal holds at its
end, so verdicts are compared with that; with ``judge_every="chunk"`` with success after any chunk. The simulator's
headline rate is success after any chunk, which is what ``rawdream/PiperSim-v0`` rewards; the other is reported beside
it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from rawdream_env.envs.episodes import Rollout, make_env, run_episodes
from rawdream_env.envs.imagination import Replay
from rawdream_env.envs.verification import Verifier
from rawdream_env.errors import InvalidOptionError
from rawdream_env.evaluation.side_by_side.aggregate import Scores, aggregate
from rawdream_env.evaluation.side_by_side.records import Clip, Clips, EpisodeRecord, SideBySide
from rawdream_env.evaluation.side_by_side.report import write_report
from rawdream_env.evaluation.world_model.fidelity import compare_episode
from rawdream_env.files import check_output
from rawdream_env.judges.base import ask
from rawdream_env.policies import load_policy
from rawdream_env.robots import find_robot
from rawdream_env.seeding import NoiseKey, mix
from rawdream_env.types import Outcome, Policy, Start, Trajectory, UInt8Array, Verdict, Video


@dataclass(frozen=True)
class EvaluateConfig:
    """Options of ``rawdream policy evaluate``."""

    policies: tuple[str, ...] = ("embedded",)
    """Policies to compare, each name=folder or name=embedded; the first is the reference."""
    tasks: tuple[str, ...] = ()
    """Names of the tasks to evaluate; all tasks of the simulator when not given."""
    episodes_per_task: int = 50
    """Starts per task; 200 gives intervals of about +-7 points."""
    out: Path | None = Path("runs/evaluate")
    """Folder for report.html, report.json and episodes.jsonl."""
    dream_env: str = "rawdream/Dream-v0"
    """Environment id of the dream."""
    dream_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Further keyword arguments of the dream."""
    sim_env: str = ""
    """Environment id of the simulator; that of the dream's robot when not given."""
    sim_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Further keyword arguments of the simulator."""
    world_model: str = "embedded"
    """World model of the dream: "embedded" or a folder."""
    judge: str = "embedded"
    """Judge of the dream: "embedded" or a folder."""
    judge_every: str = "auto"
    """"episode": the whole video once; "chunk": after every chunk, ending at the first success; "auto": by the judge."""
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
    workers: int = 2
    """Processes of the default simulator; 0 runs it in this one."""
    layout: str = "narrow"
    """How far the default simulator spreads objects at the start: "narrow" or "wide"."""
    videos: int = 2
    """Videos in the report per policy and kind (agreeing successes, agreeing failures, each kind of disagreement)."""
    seed: int = 0
    """Names the starts: equal seeds give equal starts for every policy."""
    device: str = "cpu"
    """Torch device of the models."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        if self.episodes_per_task < 1:
            raise InvalidOptionError(f"nothing to run: {self.episodes_per_task} episodes per task; use at least 1.")


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
    simulator: Any = None,
    progress: bool = True,
) -> SideBySide:
    """Run the comparison and, with ``config.out``, write ``report.html``, ``report.json`` and ``episodes.jsonl``.

    Args:
        config: what to compare.
        policies: replace those of ``config``, by name.
        dream: replaces the dream of ``config``: a ``DreamVectorEnv`` with a judge, autoreset disabled and
            ``return_frames=True``.
        simulator: replaces the simulator of ``config``; see the module's text.
        progress: show a bar.

    Environments that were passed in are not closed.

    Raises:
        InvalidOptionError: options or environments that do not fit.
    """
    named = parse_policies(config.policies) if policies is None else {}
    if config.out is not None:
        check_output(config.out)
    actors = policies or {name: load_policy(folder, device=config.device) for name, folder in named.items()}
    records: list[EpisodeRecord] = []
    scores: dict[str, dict[str, list[Scores]]] = {}
    clips = Clips(config.videos)
    with ExitStack() as opened:
        if dream is None:
            dream = opened.enter_context(closing(_make_dream(config)))
        if getattr(dream.unwrapped, "judge", None) is None:
            raise InvalidOptionError(
                "the dream has no judge: there is nothing to compare with the simulator; give judge=..."
            )
        if simulator is None:
            simulator = opened.enter_context(closing(_make_simulator(config, dream)))
        config = replace(config, tasks=_task_names(simulator, config.tasks))
        pairs = [(task, index) for index in range(config.episodes_per_task) for task in config.tasks]
        with tqdm(total=len(pairs) * len(actors), desc="evaluate", unit="episode", disable=not progress) as bar:
            for first in range(0, len(pairs), dream.num_envs):
                batch = pairs[first : first + dream.num_envs]
                for name, policy in actors.items():
                    for clip, horizon in _compare(config, name, policy, batch, dream, simulator):
                        records.append(clip.record)
                        clips.add(clip)
                        for source, frames in horizon.items():
                            scores.setdefault(name, {}).setdefault(source, []).append(frames)
                    bar.update(len(batch))
                    bar.set_postfix(_rates(name, records))
    chunk_len, fps = dream.single_action_space.shape[0], float(dream.unwrapped.fps)
    at_end = dream.unwrapped.judge_every == "episode"
    report = aggregate(records, scores, chunk_len=chunk_len, at_end=at_end, config=config_dict(config))
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
        max_episode_steps=config.max_episode_steps,
        num_inference_steps=config.num_inference_steps,
        device=config.device,
        dtype=config.dtype,
        return_frames=True,
        **{"starts": "null", **config.dream_kwargs},  # every reset is given its starts
    )


def _make_simulator(config: EvaluateConfig, dream: Any) -> Any:
    robot = find_robot(getattr(dream.unwrapped, "robot", ""))
    env_id = config.sim_env or robot.sim_env
    if not env_id:
        raise InvalidOptionError(f"robot {robot.name!r} names no simulator; give the id of one with sim_env.")
    kwargs: dict[str, Any] = {
        "max_episode_steps": config.max_episode_steps,
        "return_frames": True,
        "end_on_success": False,
    }
    if env_id == find_robot().sim_env:  # a simulator of somebody else has options of its own
        image_size = dream.single_observation_space["image"].shape[0]
        kwargs |= {"num_workers": config.workers, "layout": config.layout, "image_size": image_size}
        kwargs["judge_every"] = "chunk"
    return make_env(env_id, config.num_envs, **{**kwargs, **config.sim_kwargs})


def _task_list(simulator: Any) -> tuple[tuple[str, str], ...]:
    """(name, instruction) of every task, in the order of the task ids."""
    tasks: tuple[tuple[str, str], ...] = tuple(getattr(simulator.unwrapped, "tasks", ()))
    if not tasks:
        raise InvalidOptionError(
            f"{type(simulator.unwrapped).__name__} does not list its tasks; give it an attribute 'tasks' with a "
            "(name, instruction) pair for every task id."
        )
    return tasks


def _task_names(simulator: Any, chosen: Sequence[str]) -> tuple[str, ...]:
    """The chosen tasks; all of them when none is."""
    known = [name for name, _ in _task_list(simulator)]
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise InvalidOptionError(f"task {unknown[0]!r} does not exist; choose among {', '.join(known)}")
    return tuple(chosen or known)


def make_starts(simulator: Any, pairs: Sequence[tuple[str, int]], seed: int) -> list[Start]:
    """One start per (task, index) pair, without its frame: the simulator sets it up from the seed ``mix(seed, task id,
    index)`` and the task id.
    """
    tasks = _task_list(simulator)
    ids = {name: task_id for task_id, (name, _) in enumerate(tasks)}
    blank = np.zeros(simulator.single_observation_space["image"].shape, np.uint8)
    return [Start(blank, tasks[ids[task]][1], ids[task], None, mix(seed, ids[task], index)) for task, index in pairs]


def _compare(
    config: EvaluateConfig, name: str, policy: Policy, pairs: Sequence[tuple[str, int]], dream: Any, simulator: Any
) -> Iterator[tuple[Clip, dict[str, Scores]]]:
    """One policy from one batch of starts: a clip with its record, and the scores of its frames, for each start."""
    base, nothing = dream.unwrapped, [None] * len(pairs)
    starts = make_starts(simulator, pairs, config.seed)
    sims = list(run_episodes(simulator, starts, policy, temperature=config.temperature))
    starts = [sim.start for sim in sims]  # as the simulator shows them
    dreams = list(run_episodes(dream, starts, policy, temperature=config.temperature))
    second = _second_verdicts(base, dreams) if config.verify else nothing
    acted: Sequence[Rollout | None] = nothing
    echoes: Sequence[Replay | None] = nothing
    judged: Sequence[Verdict | None] = nothing
    if config.diagnose:
        acted = list(run_episodes(simulator, starts, actions=[d.actions for d in dreams]))
        recorded = [Trajectory(s.start, NoiseKey(s.request.seed), s.actions) for s in sims]
        echoes = base.replay(recorded, draw=0, return_frames=True)
        judged = ask(base.judge, [Video(_frames(s), base.fps) for s in sims], [s.start.instruction for s in sims])
    for i, (task, index) in enumerate(pairs):
        sim, imagined, did = sims[i], dreams[i], acted[i]
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
            simulator_actions=None if (echo := echoes[i]) is None else _outcome(echo.verdict),
            judge_on_simulator=_outcome(judged[i]),
        )
        left = sim if did is None else did
        happened = left.success_end if dream.unwrapped.judge_every == "episode" else left.success_any
        clip = Clip(record, sim.start.instruction, _frames(left), _frames(imagined), happened, did is not None)
        horizon = {}
        if did is not None and echo is not None and echo.frames is not None:  # both worlds got the same actions
            k = base.chunk_len
            horizon["dreamed_actions"] = compare_episode(clip.right[1:], clip.left, k)
            horizon["simulator_actions"] = compare_episode(echo.frames[1:], _frames(sim), k)
        yield clip, horizon


def _second_verdicts(dream: Any, dreams: Sequence[Rollout]) -> list[Verdict | None]:
    """Dual-noise verification (paper section 3.3): the second verdict of each success, None for the others."""
    chosen = [i for i, rollout in enumerate(dreams) if rollout.verdict is Outcome.SUCCESS and rollout.valid]
    second: list[Verdict | None] = [None] * len(dreams)
    trajectories = [t for i in chosen if (t := dreams[i].trajectory) is not None]
    for i, replay in zip(chosen, Verifier(dream).second_dreams(trajectories), strict=True):
        second[i] = replay.verdict
    return second


def _outcome(verdict: Verdict | None) -> int | None:
    return None if verdict is None else int(verdict.outcome)


def _frames(rollout: Rollout) -> UInt8Array:
    if rollout.frames is None:
        raise InvalidOptionError("dream and simulator need return_frames=True: their frames are compared and shown.")
    return rollout.frames


def _rates(name: str, records: Sequence[EpisodeRecord]) -> dict[str, str]:
    """Success rates of a policy so far, for the progress bar."""
    own = [record for record in records if record.policy == name]
    rates = {"sim": sum(r.simulator for r in own), "dream": sum(r.dream == 1 for r in own)}
    return {"policy": name, **{world: f"{100 * count / len(own):.0f}%" for world, count in rates.items()}}


def config_dict(config: EvaluateConfig) -> dict[str, Any]:
    """The configuration as JSON."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
