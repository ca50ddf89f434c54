"""The command line: fast help, errors as sentences, exit codes; doctor; demo; the bookkeeping of the recipe."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import is_dataclass, replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import rawdream_env
from rawdream_env import cli, doctor
from rawdream_env.errors import InvalidOptionError, MissingDependencyError, RendererError, RunDirError
from rawdream_env.libero import install


def test_help_is_light_and_lists_every_command():
    script = (
        "import sys, time; begin = time.process_time(); from rawdream_env.cli import main; code = main(['--help']); "
        "took = time.process_time() - begin; "
        "heavy = [m for m in ('torch', 'mujoco', 'tyro', 'diffusers', 'pyarrow') if m in sys.modules]; "
        "print(code, heavy, took < 1.0)"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120).stdout
    assert out.splitlines()[-1] == "0 [] True"
    for name in ("demo", "doctor", "data collect", "world-model train", "judge train", "policy sft", "policy grpo",
                 "policy evaluate", "world-model evaluate", "models train", "bench"):  # fmt: skip
        assert f"  {name} " in out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_its_config_and_help(name, capsys):
    command = cli.COMMANDS[name]
    module = import_module(command.module)
    assert is_dataclass(getattr(module, command.config)) and callable(getattr(module, command.function))
    assert cli.main([*name.split(), "--help"]) == 0
    assert f"rawdream {name}" in capsys.readouterr().out
    assert cli.main(["help", *name.split()]) == 0
    assert f"usage: rawdream {name}" in capsys.readouterr().out


def test_help_of_a_noun_lists_its_verbs(capsys):
    for words in (["judge", "--help"], ["help", "judge"], ["judge", "help"]):
        assert cli.main(words) == 0
        out = capsys.readouterr().out
        assert "judge watch" in out and "Judge\n" in out and "policy sft" not in out
    assert cli.main(["judge"]) == 2
    assert "judge evaluate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "usage: rawdream COMMAND"),
        (["dokter"], 2, "did you mean 'doctor'?"),
        (["xyz"], 2, "choose among demo, doctor"),
        (["policy", "grpp"], 2, "there is no command 'policy grpp'; did you mean 'policy grpo'?"),
        (["grpo", "--run-dir", "RUN", "--policy", "no/such/policy"], 2, "config.json is missing"),
        (["policy", "grpo"], 2, "missing --run-dir; see `rawdream policy grpo --help`."),
        (["policy", "grpo", "--run-dir", "RUN", "--steps", "ten"], 2, "--steps: invalid literal for int()"),
        (["policy", "grpo", "--run-dir", "RUN", "--stepz", "3"], 2, "unrecognized options: --stepz"),
        (
            ["policy", "grpo", "--run-dir", "RUN", "--loss-type", "x"],
            2,
            "invalid choice 'x' for argument '--loss-type'",
        ),
        (["judge", "watch"], 2, "missing VIDEO, --instruction"),
        (["evaluate", "--policies", "a=x", "a=y"], 2, "give each once as name=folder"),
        (["train-world-model", "--data", "no/such/data", "--run-dir", "RUN"], 2, "no/such/data"),
        (["train-embedded", "--out", "RUN", "--until", "dessert"], 2, "is no stage; choose among play"),
        (["sft", "--run-dir", "RUN"], 2, "--data"),
        (["grpo", "--run-dir", "RUN", "--group-size", "1"], 2, "group_size=1 must be at least 2"),
    ],
)
def test_mistakes_get_one_sentence_and_code_2(arguments, code, said, capsys, tmp_path):
    assert cli.main([str(tmp_path / "run") if a == "RUN" else a for a in arguments]) == code
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err
    if arguments:  # besides the notice of a former name
        assert len([line for line in err.splitlines() if "still works" not in line]) == 1


def test_debug_raises_and_version_prints(capsys):
    with pytest.raises(InvalidOptionError, match="no command"):
        cli.main(["dokter", "--debug"])
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("rawdream-env ")


def test_an_interrupt_inside_a_destructor_is_not_lost(monkeypatch, capsys):
    class Closing:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def work(*_):
        Closing()  # Python ignores the KeyboardInterrupt that is raised there
        time.sleep(10)
        return 0

    monkeypatch.setattr(cli, "run", work)
    hook = sys.unraisablehook
    assert cli.main(["grpo"]) == 130
    assert sys.unraisablehook is hook
    assert capsys.readouterr().err == "\nInterrupted. Saved work is kept; rerun the same command to resume.\n"


def test_an_interrupt_waits_until_the_modules_are_imported(monkeypatch, capsys):
    """Raised in the middle of torch's import, it would abort the process."""
    finished = []

    def slow_import(name):
        signal.raise_signal(signal.SIGINT)
        finished.append(name)
        return import_module(name)

    monkeypatch.setattr(cli, "import_module", slow_import)
    assert cli.main(["doctor"]) == 130
    assert finished == ["rawdream_env.doctor"]
    assert "rerun the same command to resume" in capsys.readouterr().err
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_interrupt_is_130_and_bugs_keep_their_traceback(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", interrupted)
    assert cli.main(["grpo"]) == 130
    assert "rerun the same command to resume" in capsys.readouterr().err

    def buggy(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "run", buggy)
    with pytest.raises(ZeroDivisionError):
        cli.main(["grpo"])


def test_explain_knows_what_newcomers_meet():
    import gymnasium as gym

    assert cli.explain(OSError(errno.ENOSPC, "No space left on device", "/x")).startswith(
        "no space left on the disk at /x"
    )
    full = cli.explain(OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert full == "no space left in the disk quota; free space or write to another folder. Saved work is intact."
    assert cli.explain(FileNotFoundError(errno.ENOENT, "No such file", "a.txt")) == "No such file: a.txt."
    assert "rawdream doctor" in cli.explain(ImportError("cannot import name 'x'"))
    assert cli.explain(RendererError("no renderer")) == "no renderer"
    with pytest.raises(gym.error.Error) as caught:
        gym.make_vec("rawdream/PiperDreem-v0", num_envs=1)
    assert "PiperDream" in cli.explain(caught.value)
    assert cli.explain(AssertionError()) is None


def test_output_that_the_locale_cannot_write_is_escaped():
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for words in (
        ["world-model", "train", "--help"],
        ["policy", "sft", "--run-dir", "/proc/\u2022", "--data", "/\u2022"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "rawdream_env", *words],
            env={**os.environ, **plain},
            capture_output=True,
            check=False,
        )
        assert done.returncode in (0, 2) and b"Traceback" not in done.stderr and (done.stdout + done.stderr).isascii()


def test_bench_passes_its_options_on(monkeypatch):
    seen = []
    run = import_module("benchmarks.run")
    monkeypatch.setattr(run, "main", lambda arguments: seen.append(arguments) or 1)
    assert cli.main(["bench", "--only", "env_layer", "--quick", "--json", "b.json"]) == 1
    assert seen == [["--only", "env_layer", "--quick", "--json", "b.json"]]


# -- doctor ------------------------------------------------------------------------------------------------------------


def test_doctor_says_what_is_broken_and_suggests_a_fix(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "ASSETS", tmp_path)
    assert cli.main(["doctor", "--no-render"]) == 1
    out = capsys.readouterr().out
    assert "BROKEN bundled models" in out and "-> Reinstall the package" in out and "1 broken." in out
    assert "ok     packages" in out


def test_doctor_checks_the_hashes_of_the_models(tmp_path):
    from rawdream_env.recipes.card import write_manifest

    for name in ("world_model", "judge", "policy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "starts_narrow.safetensors").write_bytes(b"x" * 9)
    (check,) = doctor._models(tmp_path)
    assert check.state == "note" and "manifest.json" in check.found
    write_manifest(tmp_path)
    (check,) = doctor._models(tmp_path)
    assert check.state == "ok" and "4 files" in check.found and "without model card" in check.found
    (tmp_path / "judge" / "config.json").write_text("{ }")
    (check,) = doctor._models(tmp_path)
    assert check.state == "broken" and "judge/config.json" in check.found


def test_doctor_reports_a_renderer_that_fails(monkeypatch):
    monkeypatch.setattr(doctor, "_RENDER", "raise SystemExit('no display')")
    check = doctor._renderer()
    assert check.state == "broken" and "no display" in check.found and "libegl1" in check.fix
    monkeypatch.setattr(doctor, "_RENDER", "print('fine')")
    assert doctor._renderer().state == "ok"


def test_doctor_looks_for_libero(tmp_path, monkeypatch):
    def missing():
        raise MissingDependencyError("not here")

    monkeypatch.setattr(install, "find_package", missing)
    (check,) = doctor._libero(render=True)
    assert check.state == "note" and "not installed" in check.found
    monkeypatch.setattr(install, "find_package", lambda: tmp_path)
    monkeypatch.setenv(install.ASSETS, str(tmp_path))
    (check,) = doctor._libero(render=True)
    assert check.state == "note" and str(tmp_path) in check.found and "hf download" in check.fix
    for part in install._PARTS:
        (tmp_path / part).mkdir()
    monkeypatch.setattr(doctor, "_LIBERO", "print('a control step takes 90 ms')")
    assets, step = doctor._libero(render=True)
    assert assets.state == step.state == "ok" and "90 ms" in step.found
    monkeypatch.setattr(doctor, "_LIBERO", "raise SystemExit('no OpenGL')")
    assert [check.state for check in doctor._libero(render=True)] == ["ok", "broken"]
    assert len(list(doctor._libero(render=False))) == 1


# -- demo --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_policy(tmp_path_factory):
    from rawdream_env.policies.tiny_vla import TinyVLA, TinyVLAConfig

    folder = tmp_path_factory.mktemp("policy")
    small = TinyVLAConfig(stem_channels=8, trunk_channels=8, width=16, heads=2, decoder_layers=1, bin_rank=8)
    TinyVLA(small, seed=0).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_demo_trains_compares_and_leaves_page_and_film(tmp_path, tiny_policy, capsys):
    from PIL import Image

    parts = ["--world-model", "null", "--judge", "scripted", "--starts", "null", "--policy", str(tiny_policy)]
    budget = ["--steps", "1", "--episodes", "1", "--num-envs", "16", "--workers", "0"]
    assert cli.main(["demo", "--out", str(tmp_path / "demo"), *parts, *budget]) == 0
    out = capsys.readouterr().out
    assert "before" in out and "after dreaming" in out and "n=4" in out
    assert "gain of 'after dreaming' over 'before', simulator: " in out
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert [entry["name"] for entry in report["policies"]] == ["before", "after dreaming"]
    assert "<html" in (tmp_path / "demo" / "report.html").read_text()
    film = Image.open(tmp_path / "demo" / "dream.gif")
    assert film.n_frames >= 4 * 32  # equal pictures are stored once
    assert np.asarray(film.convert("RGB")).std() > 10


def test_demo_budget_is_short_long_or_given():
    from rawdream_env.demo import DemoConfig

    assert DemoConfig().budget == (60, 15.0) and DemoConfig(long=True).budget == (120, 30.0)
    assert DemoConfig(long=True, steps=7).budget == (7, 30.0) and DemoConfig(minutes=0.5).budget == (60, 0.5)


def test_demo_shows_dreamed_success_at_the_beginning_and_the_end():
    from rawdream_env.demo import curve_text, training_curve

    rows = [
        {
            "trusted": 10,
            "trusted_success_rate": 0.2,
            "n/task_0": 12,
            "trusted/task_0": 10,
            "trusted_success_rate/task_0": 0.2,
        },
        *[{"trusted": 0, "trusted_success_rate": None}] * 9,
        {"trusted": 8, "trusted_success_rate": 0.75},
    ]
    curve = training_curve(rows, 0.7)
    assert [window["updates"] for window in curve["windows"]] == [[1, 5], [6, 11]]
    assert [(w["all"]["successes"], w["all"]["n"]) for w in curve["windows"]] == [(2, 10), (6, 8)]
    assert len(training_curve(rows * 40, 0.7)["windows"]) <= 16
    lines = curve_text({"training": curve, "policies": [{"tasks": {"stack_block": {}}}]}).splitlines()
    assert "updates 1-5" in lines[0] and "updates 6-11" in lines[0] and "T = 0.7" in lines[0]
    assert (
        "20.0 %" in lines[1] and "75.0 %" in lines[1] and lines[2].startswith("stack_block") and lines[2].endswith("-")
    )
    assert curve_text({"training": training_curve([], 0.7), "policies": []}) == ""


@pytest.mark.parametrize(
    ("dream", "simulator", "said"),
    [
        ((0.1, 0.3), (0.05, 0.2), "the simulator confirms it"),
        ((0.1, 0.3), (-0.4, -0.1), "it learned where the dream is wrong"),
        ((-0.3, -0.1), (-0.4, -0.1), "really got worse"),
        ((0.1, 0.3), (-0.1, 0.2), "shows no clear change in the simulator"),
    ],
)
def test_table_says_what_the_gains_mean(dream, simulator, said):
    from rawdream_env.evaluation.side_by_side.aggregate import conclusions
    from rawdream_env.evaluation.side_by_side.table import table

    def gain(ends):
        return {"value": sum(ends) / 2, "low": ends[0], "high": ends[1], "n": 50}

    rate = {"successes": 5, "n": 10, "value": 0.5, "low": 0.2, "high": 0.8}
    verdicts = {"invalid": 0, "flagged": 0}
    part = {"dream": rate, "dream_trusted": rate, "verdicts": verdicts, "simulator": {**rate, "value": None, "n": 0}}
    before = {"name": "before", "all": part, "tasks": {"stack_block": part}}
    after = {**before, "name": "after", "gain": {"dream": gain(dream), "simulator": gain(simulator)}}
    policies = [before, after]
    text = table({"policies": policies, "reference": "before", "conclusions": conclusions(policies)})
    assert said in text.splitlines()[-1]
    assert "50.0 % [20.0, 80.0], n=10" in text and "not measured, n=0" in text
    assert f"dream: {50 * sum(dream):+.1f} points [{100 * dream[0]:+.1f}, {100 * dream[1]:+.1f}], n=50 starts" in text


# -- the recipe of the embedded models ---------------------------------------------------------------------------------


def stages_in(folder, log, *, first=None, fail=False):
    from rawdream_env.trainers.common.stages import Stage

    def run(name):
        def inner():
            log.append(name)
            if fail and name == "b":
                raise RuntimeError("cut off")
            (folder / name).write_text("made")
            return {"n": 1}

        return inner

    return [
        Stage("a", first or {"steps": 1}, (folder / "a",), run("a")),
        Stage("b", {}, (folder / "b",), run("b"), ("a",)),
        Stage("c", {}, (folder / "c",), run("c")),
    ]


def test_stages_resume_skip_and_notice_other_settings(tmp_path):
    from rawdream_env.trainers.common.stages import run_stages

    log, markers = [], tmp_path / "stages"
    with pytest.raises(RuntimeError, match="cut off"):
        run_stages(stages_in(tmp_path, log, fail=True), markers)
    time.sleep(0.01)
    hours = run_stages(stages_in(tmp_path, log), markers)
    assert log == ["a", "b", "b", "c"] and list(hours) == ["a", "b", "c"]
    assert run_stages(stages_in(tmp_path, log), markers) == hours and len(log) == 4
    marker = json.loads((markers / "a.json").read_text())
    assert marker["complete"] and marker["facts"] == {"n": 1} and marker["settings"] == {"steps": 1}
    (tmp_path / "c").unlink()
    run_stages(stages_in(tmp_path, log), markers)
    assert log[4:] == ["c"]
    with pytest.raises(RunDirError, match="stage 'a' .* other settings"):
        run_stages(stages_in(tmp_path, log, first={"steps": 2}), markers)
    (markers / "a.json").unlink()
    with pytest.raises(RunDirError, match="stage 'b' needs 'a', which is not complete"):
        run_stages(stages_in(tmp_path, log), markers, only="b")
    with pytest.raises(RunDirError, match="stage 'b' .* builds on"):
        run_stages(stages_in(tmp_path, log, first={"steps": 2}), markers)


def test_a_stage_can_run_alone(tmp_path):
    from rawdream_env.trainers.common.stages import run_stages

    log, markers = [], tmp_path / "stages"
    assert list(run_stages(stages_in(tmp_path, log), markers, only="c")) == ["c"] == log
    with pytest.raises(RunDirError, match="run it first"):
        run_stages(stages_in(tmp_path, log), markers, only="b")
    run_stages(stages_in(tmp_path, log), markers, only="a")
    assert list(run_stages(stages_in(tmp_path, log), markers)) == ["a", "b", "c"] and log == ["c", "a", "b"]


def test_presets_train_the_world_model_that_they_name(tmp_path):
    from rawdream_env.recipes.piper_bundled import PRESETS, EmbeddedConfig, recipe

    scene = [
        "states", "pictures", "start_pictures", "reader", "painter", "first_dynamics", "first_world_model", "dreamers",
        "more_states", "dynamics",
    ]  # fmt: skip
    for preset, wanted in (("cpu", scene), ("smoke", scene), ("gpu", [])):
        config = EmbeddedConfig(out=tmp_path, preset=preset, device="cpu")
        names = [stage.name for stage in recipe(config, PRESETS[preset])]
        at = names.index("world_model")
        assert [name for name in names if name in scene] == wanted == names[at - len(wanted) : at]
        assert names.index("policy") < at < names.index("dreams") < names.index("judge") < names.index("assets")


def test_recipe_needs_only_earlier_stages(tmp_path):
    from rawdream_env.recipes.piper_bundled import PRESETS, EmbeddedConfig, recipe

    for preset, scale in PRESETS.items():
        seen: set[str] = set()
        for stage in recipe(EmbeddedConfig(out=tmp_path, preset=preset, device="cpu"), scale):
            assert set(stage.needs) <= seen, stage.name
            json.dumps(stage.settings, default=str)
            assert str(tmp_path) not in json.dumps(stage.settings, default=str), "a moved folder would not resume"
            seen.add(stage.name)


@pytest.mark.parametrize("kind", ["scene", "video"])
def test_installed_models_replace_those_of_their_kind(tmp_path, kind):
    from rawdream_env.recipes.piper_bundled import install_models

    bundled = Path(rawdream_env.__file__).parent / "assets"
    folder = {"scene": "world_model", "video": "video_world_model"}[kind]
    shutil.copytree(bundled / folder, tmp_path / "made" / "world_model")
    target = tmp_path / "package"
    for name in ("world_model", "video_world_model"):
        (target / name).mkdir(parents=True)
        (target / name / "old.json").write_text("{}")
    install_models(tmp_path / "made", target)
    replaced = {name for name in ("world_model", "video_world_model") if not (target / name / "old.json").exists()}
    assert replaced == {folder} and (target / folder / "config.json").is_file()
    assert f"{folder}/config.json" in json.loads((target / "manifest.json").read_text())["sha256"]


@pytest.mark.slow
def test_policies_of_the_second_round_are_trained_in_the_first_world_model(tmp_path: Path) -> None:
    from rawdream_env.recipes.folders import Paths
    from rawdream_env.recipes.presets import PRESETS
    from rawdream_env.recipes.scene_stages import scene_stages

    bundled = Path(rawdream_env.__file__).parent / "assets"
    paths = Paths(tmp_path)
    shutil.copytree(bundled / "world_model", paths.first_scene / "world_model")
    shutil.copytree(bundled / "policy", paths.policy)
    scale = replace(PRESETS["smoke"].world_model, dreamers=1, dreamer_steps=1)
    stage = next(s for s in scene_stages(scale, paths, seed=0, workers=0, progress=False) if s.name == "dreamers")
    stage.run()
    (made,) = stage.makes
    trained, before = (load_file(folder / "model.safetensors") for folder in (made.parent, paths.policy))
    assert any(not torch.equal(trained[name], before[name]) for name in before)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["scene", "video"])
def test_whole_recipe_in_small(tmp_path, capsys, monkeypatch, kind):
    from rawdream_env.recipes.presets import PRESETS, VideoScale
    from rawdream_env.trainers.world_model.config import StageConfig

    if kind == "video":
        stages = [StageConfig(steps=2, batch_size=size, lr=1e-3) for size in (2, 1)]
        video = replace(PRESETS["smoke"], world_model=VideoScale(*stages), judge_on_dreams=True)
        monkeypatch.setitem(PRESETS, "smoke", video)
    assert (
        cli.main(["models", "train", "--preset", "smoke", "--out", str(tmp_path), "--workers", "0", "--no-progress"])
        == 0
    )
    assets = tmp_path / "assets"
    assert f"The models are in {assets}." in capsys.readouterr().out
    assert [check.state for check in doctor._models(assets)] == ["ok"]
    card = (assets / "README.md").read_text()
    for words in (
        "## World model on held-out play",
        "## Judge on held-out clips",
        "| stack block |",
        "2048 transitions",
    ):
        assert words in card
    for words in (
        "trained on object states that the simulator reports",
        "No task is done in them",
        "| start pictures |",
    ):
        assert (words in card) == (kind == "scene")
    assert cli.main(["models", "train", "--preset", "smoke", "--out", str(tmp_path), "--seed", "1"]) == 2
    assert "made with other settings" in capsys.readouterr().err


def test_threads_do_not_spin_unless_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert cli.main(["--version"]) == 0 and os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert cli.main(["--version"]) == 0 and os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
