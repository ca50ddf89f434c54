"""The output folder of an evaluation has one writer and no litter."""

from __future__ import annotations

from pathlib import Path

import pytest

from rawdream_env.errors import InvalidOptionError
from rawdream_env.evaluation.reporting.output import writing_results
from rawdream_env.files import atomic_write_text


def test_results_of_one_process_at_a_time_without_litter(tmp_path: Path) -> None:
    litter = [tmp_path / ".report.html.4711.0a1b2c3d.tmp", tmp_path / ".x.json.1.00000000.tmp"]
    others = [tmp_path / ".mine.tmp", tmp_path / "run" / ".a.json.1.00000000.tmp", tmp_path / ".d.1.00000000.tmp" / "a"]
    for path in (*litter, *others):
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    with writing_results(tmp_path) as folder:
        atomic_write_text(folder / "report.html", "done")
        with (
            pytest.raises(InvalidOptionError, match="is being written by another process"),
            writing_results(tmp_path),
        ):
            pass
    assert not any(path.exists() for path in litter) and all(path.exists() for path in others)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [".mine.tmp", "report.html"]
