"""The house: what the README says works, pins fit, nothing of this machine is in the files."""

from __future__ import annotations

import doctest
import re
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ASSETS = ROOT / "rawdream_env" / "assets"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def run_doctests(text: str, name: str) -> int:
    test = doctest.DocTestParser().get_doctest(text, {}, name, "README.md", 0)
    output: list[str] = []
    results = doctest.DocTestRunner().run(test, out=output.append)
    assert results.failed == 0, "".join(output)
    return results.attempted


def section(title: str) -> str:
    return README.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


@pytest.mark.skipif(not (ASSETS / "world_model" / "config.json").is_file(), reason="the embedded models are not here")
def test_quick_start_runs():
    assert run_doctests(section("Quick start"), "quick start") == 6


def test_quick_start_is_seven_lines():
    code = [line for line in section("Quick start").splitlines() if line.startswith((">>> ", "... "))]
    assert len(code) == 7


def test_bring_your_own_runs():
    assert run_doctests(">>> import gymnasium as gym\n>>> import rawdream_env\n" + section("Bring your own"), "own") > 8


def test_readme_commands_and_options_exist():
    import dataclasses
    from importlib import import_module

    from rawdream_env.cli import COMMANDS

    text = README + "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    commands = re.findall(r"^(?:torchrun .* -m rawdream_env|rawdream) (.*(?:\\\n.*)*)$", text, flags=re.MULTILINE)
    assert len(commands) >= 18
    for words in commands:
        name = next(name for name in COMMANDS if f"{words} ".startswith(f"{name} "))
        command = COMMANDS[name]
        fields = {f.name for f in dataclasses.fields(getattr(import_module(command.module), command.config))}
        options = {option.replace("-", "_") for option in re.findall(r"--([a-z][a-z-]+)", words)}
        assert options <= {*fields, "config"}, name


def test_readme_links_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", re.sub(r"<!--.*?-->", "", README, flags=re.DOTALL)):
        if target.startswith("rawdream_env/assets"):
            continue  # the model card is made with the models
        assert (ROOT / target).exists(), target


def test_sections_of_the_paper_exist():
    """Dual-noise verification is in 3.2 and A.2, the training of the world model in A.1."""
    folders = [ROOT / name for name in ("rawdream_env", "trainers", "wrappers", "docs", "examples", "benchmarks")]
    files = [path for folder in folders for ending in ("py", "md") for path in folder.rglob(f"*.{ending}")]
    texts = [path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *files]]
    sections = {number for text in texts for number in re.findall(r"(?i)sections? (3\.\d|A\.\d)", text)}
    appendices = {number for text in texts for number in re.findall(r"(?i)appendix (A\.\d)", text)}
    assert sections == {"3.1", "3.2"} and appendices <= {f"A.{number}" for number in range(1, 8)}


def test_wheel_lists_every_package():
    """A package that is not listed is missing from the wheel."""
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    inits = [*(ROOT / "rawdream_env").rglob("__init__.py"), *ROOT.glob("wrappers/**/__init__.py")]
    inits += ROOT.glob("trainers/**/__init__.py")
    folders = [".".join(path.parent.relative_to(ROOT).parts) for path in inits]
    found = {name if name.startswith("rawdream_env") else f"rawdream_env.{name}" for name in folders}
    assert listed == found


def test_constraints_pin_every_requirement_exactly_and_fit():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"==[^*]+", str(pin.specifier)) and pin.url is None for pin in pins)
    by_name = {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in pins}
    assert len(by_name) == len(pins) and "torchvision" not in by_name and by_name["torch"] == "2.13.0"
    extras = PROJECT["project"]["optional-dependencies"]
    for text in [
        *PROJECT["project"]["dependencies"],
        *extras["dev"],
        *extras["sb3"],
        *extras["torchrl"],
        *extras["skrl"],
        *extras["rsl_rl"],
        *extras["trl"],
        *extras["piper"],
    ]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(by_name[canonicalize_name(requirement.name)]), text
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name, pin in re.findall(r"([\w-]+)==(\S+)", makefile):
        assert by_name[canonicalize_name(name)] == pin, f"Makefile pins {name}=={pin}"


def test_markers_used_are_declared_and_version_is_one():
    assert {m.split(":")[0] for m in PROJECT["tool"]["pytest"]["ini_options"]["markers"]} == {"slow", "gpu", "vllm"}
    number = PROJECT["project"]["version"]
    assert f"version: {number}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## {number}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    try:
        assert version("rawdream-env") == number
    except PackageNotFoundError:
        pytest.skip("not installed")


def test_no_file_names_a_registry_or_somebody_s_home():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout")
    pattern = re.compile(r"(?:https?://[^\s)]*(?:pypi|pytorch\.org/whl)|/home/\w+|/Users/\w+|/root/)")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".txt", ".cfg", ".yaml", ".cff", "") and path.is_file():
            found = pattern.search(path.read_text(encoding="utf-8", errors="ignore"))
            assert found is None or path == Path(__file__).resolve(), f"{name}: {found}"
