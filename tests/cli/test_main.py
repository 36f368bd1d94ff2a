"""What every command shares: signals wherever they land, and output for whatever reads it."""

from __future__ import annotations

import errno
import gc
import io
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ptengine import cli
from ptengine.commands import Outcome
from ptengine.files import write_atomic


@pytest.fixture(autouse=True)
def _no_other_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    yield
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    signal.signal(signal.SIGTERM, before)


class _Finalised:
    """Gets the signal where Python discards what its handler raises."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(10):
            pass


def _in_a_finaliser() -> None:
    _Finalised()
    gc.collect()
    time.sleep(30)


def _in_an_import() -> None:
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
    except SystemExit as exit:
        raise ModuleNotFoundError("Could not import module 'PreTrainedModel'") from exit


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("land", [_in_a_finaliser, _in_an_import])
def test_a_signal_where_its_exit_is_lost(land: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command ran on and ended with status 0, or with 1 and a traceback."""
    monkeypatch.setattr(cli, "_run", lambda _: land())
    monkeypatch.setattr(cli, "_PATIENCE", 0.2)
    started = time.monotonic()
    with pytest.raises(SystemExit) as leaving:
        cli.main(["eval"])
    assert leaving.value.code == 143
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_output_that_the_terminal_cannot_show(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback, or json that is no UTF-8, for a file whose name is none."""
    data = {"label": "\u597d", "file": os.fsdecode(b"\xff.csv")}
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, write_through=True))
    cli._print(Outcome(data, ("\u597d",), status=0), as_json=True)
    assert json.loads(raw.getvalue().decode(encoding)) == data
    cli._print(Outcome(data, ("\u597d",), status=0), as_json=False)
    assert raw.getvalue().decode(encoding).splitlines()[-1] == ("\\u597d" if encoding == "ascii" else "\u597d")


def test_a_warning_came_once_for_every_evaluation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever changes the filters makes Python forget what it has shown."""

    def run(arguments: list[str]) -> int:
        for text in ("2 of 8 rows were cut", "2 of 8 rows were cut", "another"):
            with warnings.catch_warnings():
                warnings.simplefilter("default")
                warnings.warn(text, stacklevel=1)
        return 0

    monkeypatch.setattr(cli, "_run", run)
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().err == "warning: 2 of 8 rows were cut\nwarning: another\n"


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    def write(_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=r"No space left on device: .*prompt\.json"):
        write_atomic(tmp_path / "prompt.json", write)
    assert list(tmp_path.iterdir()) == []
