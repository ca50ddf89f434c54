"""Does reinforcement learning in the dream transfer? The same GRPO in the dream and in the simulator, over several seeds.

    python examples/transfer.py --out runs/transfer                  # about 3 hours on one core
    python examples/transfer.py --out runs/transfer --kinds dream    # one kind alone; rerun with others to add them
    python examples/transfer.py --out runs/transfer --report         # only the tables, from what has been measured

Kinds: "dream+dnv" and "dream" train in the bundled dream with and without dual-noise verification, rewarded by ``--judge``;
"sim" trains in the simulator with the true reward. All have the same settings and number of updates. Every ``--every`` updates
the policy is measured in the simulator, from starts that no training sees, greedy and at the temperature of training; the
last policy with ``--episodes`` episodes per task, the others with a quarter. Rerun the same command to resume.

Prints, for each kind, the gain over the bundled policy as a mean over seeds with a 95 % t interval, and the success rates per
task. Everything measured is in ``measured.jsonl``; ``curve.html`` shows success over updates.
"""

import argparse
import json
from itertools import product
from pathlib import Path

import torch

import rawdream_env  # noqa: F401  (registers the ids)
from rawdream_env.evaluation.reporting import html
from rawdream_env.evaluation.reporting.charts import Series, line_chart, point
from rawdream_env.policies import load_policy
from rawdream_env.statistics import Rate, mean_of_runs
from rawdream_env.trainers.grpo import GRPOConfig, train_grpo
from rawdream_env.trainers.policy.validation import simulator_success

TEMPERATURE = 0.7
STARTS = 10_002_000  # simulator seeds of the measured starts
KINDS = ("dream+dnv", "dream", "sim")

STYLE = Path(html.__file__).parent / "templates" / "style.css"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", type=Path, default=Path("runs/transfer"))
parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
parser.add_argument("--updates", type=int, default=120)
parser.add_argument("--every", type=int, default=60)
parser.add_argument("--episodes", type=int, default=200, help="simulator episodes per task of the last policy")
parser.add_argument(
    "--final-updates", type=int, default=0, help="further updates at --final-temperature (docs/grpo.md)"
)
parser.add_argument("--final-temperature", type=float, default=0.35)
parser.add_argument("--lr", type=float, default=2e-4)
parser.add_argument("--judge", default="state")
parser.add_argument("--world-model", default="embedded")
parser.add_argument("--layout", default="narrow", choices=("narrow", "wide"))
parser.add_argument("--report", action="store_true", help="only print the tables")
args = parser.parse_args()
measured = args.out / "measured.jsonl"
last_step = args.updates + args.final_updates


def rows():
    """Everything measured so far."""
    return [json.loads(line) for line in measured.read_text().splitlines()] if measured.exists() else []


def measure(kind, seed, step, policy):
    """Append the success rates of ``policy``, unless they are known."""
    episodes = args.episodes if step in (0, args.updates, last_step) else max(1, args.episodes // 4)
    known = {
        (r["kind"], r["seed"], r["step"], r["temperature"], r["layout"]) for r in rows() if r["episodes"] >= episodes
    }
    for temperature in (0.0, TEMPERATURE):
        if (kind, seed, step, temperature, args.layout) in known:
            continue
        rates = simulator_success(
            policy, episodes, seed=STARTS, temperature=temperature, num_envs=64, layout=args.layout, progress=True
        )
        found = {name: rate.successes for name, rate in rates.items()}
        row = {"kind": kind, "seed": seed, "step": step, "temperature": temperature, "layout": args.layout}
        with measured.open("a") as file:
            file.write(json.dumps({**row, "episodes": episodes, "successes": found}) + "\n")


def trained(config):
    """The finished run; Ctrl-C ends the script, so that nothing is measured as what it is not."""
    result = train_grpo(config)
    if result.stopped == "interrupted":
        raise KeyboardInterrupt
    return result


def train(kind, seed):
    """One run, measured every ``--every`` updates."""
    env = {"world_model": args.world_model, "judge": args.judge, "judge_every": "chunk", "dtype": "bfloat16"}
    run = f"{kind}-{args.layout}-{seed}"
    config = {
        "run_dir": args.out / run,
        "env_id": "rawdream/PiperSim-v0" if kind == "sim" else "rawdream/PiperDream-v0",
        "env_kwargs": {} if kind == "sim" else env,
        "dual_noise_verification": kind == "dream+dnv",
        "held_out_judge": "" if kind == "sim" or args.judge == "state" else "state",
        "layout": args.layout,
        "temperature": TEMPERATURE,
        "lr": args.lr,
        "seed": seed,
        "save_every": 10,
    }
    for steps in range(args.every, args.updates + 1, args.every):
        if any((r["kind"], r["seed"], r["step"]) == (kind, seed, steps) for r in rows()) and steps < args.updates:
            continue
        result = trained(GRPOConfig(steps=steps, **config))
        measure(kind, seed, result.step, result.policy)
    if args.final_updates:
        config |= {"policy": str(args.out / run / "policy"), "run_dir": args.out / f"{run}-final"}
        config["temperature"] = args.final_temperature
        result = trained(GRPOConfig(steps=args.final_updates, **config))
        measure(kind, seed, last_step, result.policy)


def share(row):
    """Success over all tasks, each with the same number of episodes."""
    return sum(row["successes"].values()) / (row["episodes"] * len(row["successes"]))


def table_line(name, row):
    """A policy's success rate over all tasks with its interval, and per task in per cent."""
    found, n = row["successes"].values(), row["episodes"]
    tasks = "  ".join(f"{100 * successes / n:11.1f}" for successes in found)
    return f"  {name:18} {Rate.of(sum(found), n * len(found))!s:34} {tasks}"


def report():
    """The tables, and the curve."""
    found = [r for r in rows() if r["layout"] == args.layout]
    latest = {(r["kind"], r["seed"], r["step"], r["temperature"]): r for r in found}  # later lines have more episodes
    for step, temperature in product(sorted({args.updates, last_step}), (0.0, TEMPERATURE)):
        before = latest.get(("before", 0, 0, temperature))
        if before is None:
            continue
        tasks, n = list(before["successes"]), before["episodes"]
        print(f"\ntemperature {temperature:g}, {step} updates, {n} episodes per task and policy, {args.layout} starts")
        print(f"  {'':18} {'all tasks':34} {'  '.join(f'{task:>11}' for task in tasks)}")
        print(table_line("before", before))
        for kind in KINDS:
            ends = [latest[key] for seed in args.seeds if (key := (kind, seed, step, temperature)) in latest]
            for row in ends:
                print(table_line(f"{kind} seed {row['seed']}", row))
            gains = [share(row) - share(before) for row in ends]
            if gains:
                print(
                    f"  {kind}: mean gain in points {mean_of_runs([100 * gain for gain in gains])} (seeds, 95 % t interval)"
                )
    steps = sorted({step for _, _, step, _ in latest})
    series = []
    for kind, css in zip(KINDS, ("s-dream", "s-last", "s-truth"), strict=True):
        points = []
        for step in steps:
            name, seeds = (kind, args.seeds) if step else ("before", [0])
            some = [100 * share(latest[key]) for seed in seeds if (key := (name, seed, step, TEMPERATURE)) in latest]
            points.append(point(mean_of_runs(some).as_dict()))
        series.append(Series(kind, css, points))
    title = f"Success in the simulator, T={TEMPERATURE:g}, mean of {len(args.seeds)} seeds"
    chart = line_chart(title, "%", [str(step) for step in steps], series, axis="updates")
    legend = "".join(f'<span class="{line.css}"><i></i>{line.label}</span>' for line in series)
    page = f'<!doctype html><style>{STYLE.read_text()}</style><p class="key">{legend}</p>{chart}'
    (args.out / "curve.html").write_text(page)


torch.set_num_threads(1)
args.out.mkdir(parents=True, exist_ok=True)
if not args.report:
    measure("before", 0, 0, load_policy("embedded"))
    for seed in args.seeds:
        for kind in args.kinds:
            train(kind, seed)
report()
