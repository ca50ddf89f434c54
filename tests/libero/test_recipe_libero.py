"""The example of the paper's recipe runs end to end in its tiny setting."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rawdream_env.data.lerobot import LeRobotReader

RECIPE = Path(__file__).parents[2] / "examples" / "libero" / "recipe.py"


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
