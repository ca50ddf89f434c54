"""One rule names every part: bundled, folder, hub id, ``module:factory``, object; for all four loaders alike."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rawdream_env.errors import CheckpointError, InvalidOptionError
from rawdream_env.judges import load_judge
from rawdream_env.policies import load_policy
from rawdream_env.resolve import bundled_folder, resolve
from rawdream_env.starts import NullStarts, load_starts
from rawdream_env.types import Judge
from rawdream_env.world_models import load_world_model
from rawdream_env.world_models.null import NullWorldModel

LOADERS = {"world_model": load_world_model, "judge": load_judge, "policy": load_policy, "starts": load_starts}
PARTS = {"world_model": "world model", "judge": "judge", "policy": "policy", "starts": "start source"}
OWN = """
from rawdream_env.judges.scripted import ScriptedJudge
from rawdream_env.starts import NullStarts
from rawdream_env.world_models.null import NullWorldModel

class Policy:
    def __init__(self, device="nowhere"): self.device = device
    def act(self, *a, **k): ...
    def logprobs(self, *a, **k): ...

def world_model(*, device, num_inference_steps=3):
    model = NullWorldModel()
    model.made_with = (device, num_inference_steps)
    return model

def judge(**options):
    made = ScriptedJudge()
    made.made_with = options
    return made

class Starts(NullStarts):
    pass

policy, starts, ready = Policy, Starts, NullStarts()
def wrong(): return 3
def needy(weights, *, device): return weights
def broken(): raise ImportError("no module named flash")
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_parts.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_parts", raising=False)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[bool]]:
    """A hub whose cache holds ``lab/policy`` and which can download ``lab/new``; what it was asked."""
    import huggingface_hub

    asked: dict[str, list[bool]] = {}

    def snapshot_download(name: str, *, local_files_only: bool, **_: object) -> str:
        asked.setdefault(name, []).append(local_files_only)
        if name == "lab/policy" or (name == "lab/new" and not local_files_only):
            return str(bundled_folder("policy"))
        raise FileNotFoundError("cannot reach the hub\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


@pytest.mark.parametrize("name", LOADERS)
def test_every_loader_takes_the_bundled_part_a_factory_and_an_object(name: str, own: None) -> None:
    load = LOADERS[name]
    assert load("embedded") is not None
    made = load(f"own_parts:{name}")
    assert load(made) is made
    for wrong in (3, object()):
        with pytest.raises(InvalidOptionError, match=rf"{type(wrong).__name__} is not a {PARTS[name]}: it lacks "):
            load(wrong)  # type: ignore[operator]
    with pytest.raises(InvalidOptionError, match=rf"int of 'own_parts:wrong' is not a {PARTS[name]}: it lacks "):
        load("own_parts:wrong")
    with pytest.raises((InvalidOptionError, CheckpointError)):
        load("no/such/folder")


def test_a_factory_gets_the_options_it_takes(own: None) -> None:
    assert load_world_model("own_parts:world_model", num_inference_steps=1).made_with == ("cpu", 1)  # type: ignore[attr-defined]
    assert load_world_model("own_parts:world_model").made_with == ("cpu", 3)  # type: ignore[attr-defined]
    assert load_judge("own_parts:judge", dtype="bfloat16").made_with == {"device": "cpu", "dtype": "bfloat16"}  # type: ignore[attr-defined]
    assert load_policy("own_parts:Policy").device == "cpu"  # type: ignore[attr-defined]
    assert isinstance(load_starts("own_parts:ready"), NullStarts)  # an object of the module, not called
    with pytest.raises(InvalidOptionError, match="does not accept approximations"):
        load_world_model("own_parts:world_model", approximations=["fp8"])
    with pytest.raises(InvalidOptionError, match="needs weights"):
        load_policy("own_parts:needy")
    with pytest.raises(InvalidOptionError, match="'own_parts:nothing' cannot be imported: .*nothing"):
        load_policy("own_parts:nothing")
    with pytest.raises(InvalidOptionError, match="cannot be imported: No module named 'no_such_module'"):
        load_judge("no_such_module:Judge")
    with pytest.raises(ImportError, match="flash"):  # of the factory itself: not ours to explain
        load_judge("own_parts:broken")


def test_options_do_not_fit_a_loaded_object_or_a_class() -> None:
    with pytest.raises(InvalidOptionError, match="dtype, num_inference_steps cannot be applied"):
        load_world_model(NullWorldModel(), dtype="bfloat16", num_inference_steps=1)
    with pytest.raises(InvalidOptionError, match="NullStarts is a class"):
        load_starts(NullStarts)  # type: ignore[arg-type]


def test_the_hub_s_cache_comes_first_and_a_folder_before_both(
    hub: dict[str, list[bool]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    load_policy("lab/policy")
    load_policy("lab/new")
    assert hub == {"lab/policy": [True], "lab/new": [True, False]}
    with pytest.raises(CheckpointError, match=r"no folder lab/none, and .* hub .*\(cannot reach the hub\)\."):
        load_policy("lab/none")
    hub.clear()
    (tmp_path / "lab").mkdir()  # runs/policy, not yet trained, is no repository
    for path in ("lab/policy", "./lab/new", tmp_path / "lab" / "new", Path("owner/name")):
        with pytest.raises(CheckpointError, match="config.json is missing"):
            load_policy(path)
    assert not hub


def test_devices_and_precisions_are_checked_before_anything_is_loaded() -> None:
    for device, said in (("gpu", "is not known"), ("cuda:99", "needs a GPU|does not exist"), ("", "is not known")):
        for load in LOADERS.values():
            with pytest.raises(InvalidOptionError, match=said):
                load("embedded", device=device)
    with pytest.raises(InvalidOptionError, match="dtype='half' is not known; choose one of 'float32'"):
        resolve("embedded", "judge", Judge, bundled=Path(), dtype="half")
    with pytest.raises(InvalidOptionError, match="computes in float32"):
        load_policy("embedded", dtype="bfloat16")
