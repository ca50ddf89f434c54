"""The update has the memory of the dream: states of finished episodes are gone, weights can go to the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import test_grpo_openvla as toy

from rawdream_env.policies.tiny_vla import TinyVLA, TinyVLAConfig
from rawdream_env.trainers.common.run_dir import read_jsonl
from rawdream_env.trainers.grpo import grpo, train_grpo
from tests.envs.test_dream_memory import ShadeWorldModel, dream, state_bytes

SIZES = TinyVLAConfig(
    image_size=16, stem_channels=8, trunk_channels=8, trunk_blocks=1, width=16, heads=2, decoder_layers=1
)


def test_the_update_has_the_memory_of_the_dream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update, before = grpo.update, state_bytes()
    for name in ("kept", "offloaded"):
        moves, seen = list[str](), list[tuple[int, list[str]]]()

        def watching(*args: Any, moves: list[str] = moves, seen: list[Any] = seen) -> Any:
            seen.append((state_bytes() - before, list(moves)))
            return update(*args)

        monkeypatch.setattr(grpo, "update", watching)
        env = dream(5, "Disabled", ShadeWorldModel(moves), return_frames=False)
        moves.clear()
        config = toy.config(tmp_path / name, steps=2, offload_world_model=name == "offloaded")
        train_grpo(config, env=env, policy=TinyVLA(SIZES))
        moved = [["cpu"], ["cpu"] * 3] if name == "offloaded" else [[], []]
        assert seen == [(0, moved[0]), (0, moved[1])]
        assert state_bytes() == before
    kept, offloaded = tmp_path / "kept", tmp_path / "offloaded"
    assert len(read_jsonl(kept / "metrics.jsonl")) == 2
    for file in ("metrics.jsonl", "policy/model.safetensors"):
        assert (kept / file).read_bytes() == (offloaded / file).read_bytes(), file
