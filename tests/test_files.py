"""Files that are wholly there or not at all."""

from __future__ import annotations

import json
import os
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import ptengine.files
from ptengine.errors import InputError
from ptengine.files import (
    make_directory,
    save_safetensors_atomic,
    staged_directory,
    write_atomic,
    write_json_atomic,
    write_together,
)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("content", [b"new", lambda file: file.write(b"new")])
def test_content_replaces_what_was_there(tmp_path, content):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old and longer")
    assert write_atomic(str(path), content) == path
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a.bin"]


def test_a_file_gets_the_permissions_of_an_ordinary_new_one(tmp_path):
    """mkstemp's 0600 would hide results from the group."""
    (tmp_path / "ordinary").write_bytes(b"")
    path = write_atomic(tmp_path / "ours", b"")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "ordinary").stat().st_mode)


@pytest.mark.parametrize("error", [OSError("no space"), KeyboardInterrupt()])
def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = write_atomic(tmp_path / "a.bin", b"old")

    def half(file):
        file.write(b"ne")
        raise error

    with pytest.raises(type(error)):
        write_atomic(path, half)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_the_file_is_synced_before_the_rename_and_the_directory_after(tmp_path, monkeypatch):
    """Renamed first, a power cut could leave an empty file under the final name."""
    events = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(handle):
        events.append("directory" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def watched_replace(source, target):
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(ptengine.files.os, "fsync", watched_fsync)
    monkeypatch.setattr(ptengine.files.os, "replace", watched_replace)
    write_together(tmp_path, {"a": b"1", "b": b"2"})
    assert events == ["file", "file", "rename", "rename", "directory"]


def test_several_files_are_replaced_only_if_all_can_be_written(tmp_path):
    write_together(tmp_path, {"a": b"1", "b": b"2"})

    def fail(file):
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write_together(tmp_path, {"a": b"3", "b": fail})
    assert (tmp_path / "a").read_bytes() == b"1"
    assert names(tmp_path) == ["a", "b"]


def test_json(tmp_path):
    path = write_json_atomic(tmp_path / "a.json", {"a": None, "b": [1, "ä"]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": None, "b": [1, "ä"]}
    assert path.read_text(encoding="utf-8").startswith('{\n  "a"')
    for bad, error in ((float("nan"), ValueError), (object(), TypeError)):
        with pytest.raises(error):
            write_json_atomic(path, bad)
    assert json.loads(path.read_text(encoding="utf-8"))["a"] is None
    assert names(tmp_path) == ["a.json"]


def test_safetensors(tmp_path):
    base = torch.arange(12.0).view(3, 4).requires_grad_()
    tensors = {"view": base.T, "same": base, "half": base.to(torch.bfloat16), "int": torch.arange(3)}
    path = save_safetensors_atomic(tmp_path / "a.safetensors", tensors, {"key": "value"})
    loaded = load_file(path)
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"key": "value"}


def test_directories(tmp_path):
    assert make_directory(tmp_path / "a" / "b").is_dir()
    make_directory(tmp_path / "a" / "b")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match=r"expected a directory to write to, got '.*file'"):
        make_directory(tmp_path / "file")
    with pytest.raises(OSError, match="missing"):
        write_atomic(tmp_path / "missing" / "a", b"")


def test_a_directory_appears_when_all_of_it_is_written(tmp_path):
    """With the permissions of an ordinary new one; an empty directory gives way."""
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new"):
        path = tmp_path / name
        with staged_directory(path) as staging:
            (staging / "a").write_bytes(b"a")
            assert staging.parent == tmp_path
            assert not path.exists() or not names(path)
        assert names(path) == ["a"]
        (tmp_path / "ordinary").mkdir()
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "ordinary").stat().st_mode)
        (tmp_path / "ordinary").rmdir()
    assert names(tmp_path) == ["empty", "new"]


@pytest.mark.parametrize("error", [OSError("no space"), KeyboardInterrupt()])
def test_a_directory_that_fails_leaves_nothing(tmp_path, error):
    def half():
        with staged_directory(tmp_path / "out") as staging:
            (staging / "a").write_bytes(b"a")
            raise error

    with pytest.raises(type(error)):
        half()
    assert names(tmp_path) == []


def test_a_directory_with_files_is_not_replaced(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_bytes(b"a")
    (tmp_path / "link").symlink_to(tmp_path / "full")
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    cases = (("full", "which has files"), ("full/a", "no directory"), ("link", "has files"), ("lost", "no directory"))
    for path, message in cases:
        with (
            pytest.raises(InputError, match=f"a new or empty directory, got .*{message}"),
            staged_directory(tmp_path / path),
        ):
            raise AssertionError
    assert names(tmp_path) == ["full", "link", "lost"]


def test_a_link_to_an_empty_directory_is_followed(tmp_path):
    """It was refused as no directory, where `make_directory` takes it."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "empty").mkdir()
    (tmp_path / "link").symlink_to("home/empty")
    with staged_directory(tmp_path / "link") as staging:
        (staging / "a").write_bytes(b"a")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "home" / "empty") == ["a"]
    assert names(tmp_path / "home") == ["empty"]


@pytest.mark.parametrize("path", ["/proc/x", "a" * 256, "a\0b"], ids=["proc", "long", "nul"])
@pytest.mark.parametrize("make", [make_directory, lambda path: staged_directory(path).__enter__()])
def test_a_name_that_the_system_refuses(tmp_path, make, path):
    """They were errors of the system, for which the command line exits as for a full disk, or a ValueError."""
    with pytest.raises(InputError, match="expected a directory to write to, got"):
        make(tmp_path / path)
    assert names(tmp_path) == []


def test_the_longest_name_has_room_for_a_temporary_one(tmp_path):
    with staged_directory(tmp_path / ("a" * 255)):
        pass
    assert names(tmp_path) == ["a" * 255]


@pytest.mark.parametrize("name", ["a" * 255, "好" * 85])
def test_a_file_with_the_longest_name_there_is_could_not_be_written(tmp_path, name):
    assert write_atomic(tmp_path / name, b"all").read_bytes() == b"all"
    assert names(tmp_path) == [name]
