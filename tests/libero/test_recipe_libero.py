"""The example of the paper's recipe runs end to end in its tiny setting."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rawdream_env.data.lerobot import LeRobotReader

RECIPE = Path(__file__).parents[2] / "examples" / "libero" / "recipe.py"


@pytest.mark.parametrize("setting", ["tiny", "paper"])
def test_every_stage_gets_what_the_ones_before_it_wrote(setting, tmp_path, monkeypatch) -> None:
    spec = importlib.util.spec_from_file_location("libero_recipe", RECIPE)
    recipe = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, recipe)
    spec.loader.exec_module(recipe)
    done = []
    for name in ("collect", "import_hdf5", "train_world_model", "train_sft", "train_grpo", "evaluate"):
        monkeypatch.setattr(recipe, name, lambda config: done.append(config) or SimpleNamespace(report=None))
    monkeypatch.setattr(recipe, "table", str)
    recipe.main(recipe.Options(setting, tmp_path))
    rollouts, world_model, demos, sft, grpo, evaluation = done
    assert world_model.data == (rollouts.out,) and sft.data == (demos.out,) and rollouts.robot == "libero_90"
    assert grpo.policy == f"{sft.run_dir}/policy" and grpo.env_kwargs["judge"] == evaluation.judge
    assert grpo.env_kwargs["world_model"] == evaluation.world_model == f"{world_model.run_dir}/world_model"
    assert evaluation.policies == (f"sft={grpo.policy}", f"grpo={grpo.run_dir}/policy") and sft.demos_per_task == 1
    if setting == "paper":
        assert (sft.init, sft.steps, demos.per_task, grpo.steps) == (rollouts.policy, 50_000, 1, 50)
        assert (grpo.group_size, grpo.temperature, grpo.lr, evaluation.episodes_per_task) == (8, 1.6, 5e-6, 50)


@pytest.mark.slow
def test_the_tiny_setting_runs_end_to_end(group, tmp_path) -> None:
    command = [sys.executable, str(RECIPE), "--setting", "tiny", "--out", str(tmp_path)]
    subprocess.run(command, check=True, timeout=900, capture_output=True)
    out = tmp_path / "tiny"
    assert len(LeRobotReader(out / "rollouts")) == 4
    assert [entry.success for entry in LeRobotReader(out / "demos").meta.entries] == [True]
    assert all(
        (out / part / "config.json").is_file() for part in ("world_model/world_model", "sft/policy", "grpo/policy")
    )
    report = json.loads((out / "evaluate" / "report.json").read_text())
    assert "raw-dream with horizon 16" in json.dumps(report)
    again = subprocess.run(
        [*command, "--stages", "rollouts", "world_model"], timeout=300, capture_output=True, check=False
    )
    assert again.returncode == 0  # nothing is left to do
