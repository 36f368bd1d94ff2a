"""What an installation promises: pinned versions for everything it names, and nothing that ties it to one machine."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    entries = [line.partition("==") for line in lines if not line.startswith("#")]
    return {canonical(name): version for name, _, version in entries}


def requirements() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["dependencies"] + [entry for extra in project["optional-dependencies"].values() for entry in extra]


def test_every_dependency_is_pinned() -> None:
    missing = [entry for entry in requirements() if canonical(re.match(r"[\w.-]+", entry)[0]) not in pins()]  # type: ignore[index]
    assert missing == []


def test_pins_are_plain_releases() -> None:
    """A local version such as 2.13.0+cpu exists on one machine's disk only."""
    odd = {name: version for name, version in pins().items() if not re.fullmatch(r"\d+(\.\d+)*", version)}
    assert odd == {}


def test_exact_requirements_agree_with_the_pins() -> None:
    for entry in requirements():
        name, _, version = entry.partition(";")[0].partition("==")
        if version:
            assert pins()[canonical(name)] == version


def test_triton_is_the_release_torch_asks_for() -> None:
    """torch's Linux build requires one exact triton; with another one pinned, pip finds no solution.

    The CPU-only build does not say, so the pair is written down here and to be changed together.
    """
    assert (pins()["torch"], pins()["triton"]) == ("2.13.0", "3.7.1")


def test_operations_are_reached_by_attributes(tmp_path: Path) -> None:
    """In an editable install `ptengine.kernels` was importable but no attribute of `ptengine`."""
    code = "import ptengine.kernels.dispatch; print(ptengine.kernels.dispatch.BACKENDS)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, stdout=subprocess.DEVNULL)


def test_modules_are_reached_by_attributes(tmp_path: Path) -> None:
    """README speaks of `ptengine.training.evaluate`, which was no attribute until something had imported it."""
    code = """
import sys, ptengine
assert not {"torch", "transformers", "datasets"} & set(sys.modules)
for name in ("assets", "backbone", "data", "errors", "interop", "kernels", "prompts", "training", "transfer"):
    assert name in dir(ptengine), name
    getattr(ptengine, name)
print(ptengine.training.evaluate, ptengine.transfer.carry_prompt)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, stdout=subprocess.DEVNULL)
