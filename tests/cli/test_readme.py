"""The README keeps its word: its Python runs as written, and its commands exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from ptengine.cli import make_parser
from ptengine.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_python_examples_run_as_written(tmp_path: Path) -> None:
    """One after the other: a later one goes on where the one before ended."""
    code = "\n".join(blocks("python"))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "accuracy" in done.stdout
    peft, stock = "my-prompt-for-peft/adapter_model.safetensors", "hf-out/checkpoint-2/model.safetensors"
    for name in ("out/curve.png", "my-prompt/prompt.safetensors", peft, stock):
        assert (tmp_path / name).is_file()


def test_command_lines_parse() -> None:
    """Options that were renamed must not live on in the README."""
    lines = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    calls = [line.partition("#")[0].rpartition("&&")[2] for line in lines if "ptengine " in line]
    assert len(calls) >= 4
    for call in calls:
        program, command, *arguments = shlex.split(call)
        assert program == "ptengine"
        make_parser(command).parse_args(arguments)


def test_every_command_is_listed() -> None:
    for command in COMMANDS:
        assert f"| `ptengine {command}` |" in README


def test_links_and_scripts_are_there() -> None:
    """Tables and figures moved between the two files, and with them the folder that links start from."""
    found = 0
    for folder in (ROOT, ROOT / "benchmarks"):
        text = (folder / "README.md").read_text(encoding="utf-8")
        links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
        scripts = [ROOT / path for path in re.findall(r"\bbenchmarks/\w+\.(?:py|sh)", text)]
        if folder != ROOT:
            scripts += [folder / name for name in re.findall(r"`(\w+\.py)`", text)]
        missing = [str(path) for path in (*(folder / link for link in links), *scripts) if not path.exists()]
        assert not missing
        found += len(links) + len(scripts)
    assert found > 40
