"""The tuner of tiles, end to end under Triton's interpreter: what it launches, compares, refuses and leaves out."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from dataclasses import replace

import pytest
import torch

from ptengine.kernels import launch

if importlib.util.find_spec("triton") is None or not launch.INTERPRETED:
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

import tune_candidates
import tune_tiles
import tune_workers
from tune_workers import Result, Shape, Task, Workers

from ptengine.kernels.prefix_attention import triton_path
from ptengine.kernels.prefix_attention.tiles import Backward, Forward

GOOD, INVALID = Forward(16, 32, 8, 3), Forward(24, 32, 4, 1)
BASE = Backward(64, 32, 32, 64, 32, 64, 8, 2)


@pytest.fixture
def tune(tmp_path, monkeypatch):
    """Runs the tuner on one tiny shape with the given tiles; gives its exit status and what it wrote."""

    def shapes(part, dim, decode, tiny):
        assert tiny
        return [Shape(part, 2, 1, dim, 1, 1 if decode else 16, 16, 16 if decode else 0)]

    def run(*arguments, tiles=(GOOD,)):
        monkeypatch.setattr(tune_tiles, "candidates", lambda *_: list(tiles))
        report = tmp_path / "tiles.json"
        status = tune_tiles.main(["--json", str(report), "--device", "cpu", "--dim", "64", *arguments])
        return status, json.loads(report.read_text())

    monkeypatch.setattr(tune_tiles, "shapes_of", shapes)
    monkeypatch.setattr(tune_tiles, "matmul_rate", lambda *_: 1e9)
    monkeypatch.setattr(tune_tiles, "copy_rate", lambda *_: 1e9)
    return run


@pytest.fixture
def launched(monkeypatch):
    """The blocks and warps of every launch of the forward kernel."""
    seen = []
    kernel = triton_path.forward_kernel
    names = [parameter.name for parameter in kernel.fn.params] if hasattr(kernel.fn, "params") else kernel.arg_names

    class Recorder:
        def __getitem__(self, grid):
            def run(*args, **options):
                given = dict(zip(names, args, strict=True)) | options
                seen.append(tuple(given[x] for x in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")))
                return kernel[grid](*args, **options)

            return run

    monkeypatch.setattr(triton_path, "forward_kernel", Recorder())
    return seen


def test_candidates_reach_the_kernel_and_bad_ones_are_told(tune, launched, capsys):
    status, report = tune("--part", "forward", "--jobs", "0", tiles=(GOOD, INVALID))
    assert status == 0
    assert (16, 32, 8, 3) in launched
    rows, decode = report["stages"]
    assert (rows["name"], decode["name"]) == ("forward D=64", "forward D=64 decode")
    assert rows["finished"]
    found = {candidate["name"]: candidate for candidate in rows["candidates"]}
    assert found["24x32 w4 s1"]["state"] == "failed"
    assert found["24x32 w4 s1"]["error"]
    assert not found["24x32 w4 s1"]["seconds"]
    assert found["16x32 w8 s3"]["seconds"]["T=16 P=16"] > 0
    table = rows["table"]["T=16 P=16"]
    assert found[table]["origin"] == "table"
    said = capsys.readouterr().out
    assert "failed: 24x32 w4 s1" in said
    assert f"{table} " in said
    lines = [line for line in said.split("decode")[0].splitlines() if "% of limit" in line]
    times = [float(line.split(" ms")[0].split()[-1]) for line in lines]
    assert len(times) == 2
    assert times == sorted(times)


def test_the_backward_is_searched_part_by_part(tune):
    status, report = tune("--part", "backward", "--jobs", "0", tiles=[Backward(16, 32, 64, 32, 64, 32, 4, 1)])
    assert status == 0
    (stage,) = report["stages"]
    assert set(stage["groups"]) == {"T<=64"}
    assert {candidate["origin"] for candidate in stage["candidates"]} >= {"table", "grid"}
    assert not [candidate for candidate in stage["candidates"] if candidate["state"] == "failed"]


def test_what_the_time_is_too_short_for_is_left_out(tune, capsys):
    status, report = tune("--part", "forward", "--jobs", "0", "--seconds", "1")
    assert status == 0
    assert "left out" in capsys.readouterr().out
    for stage in report["stages"]:
        assert "16x32 w8 s3: queued when time was up" in stage["left_out"]
        assert {candidate["state"] for candidate in stage["candidates"]} == {"left out"}


def test_wrong_results_disqualify_a_tile(tune, monkeypatch):
    forward = triton_path.forward

    def broken(*arguments):
        out, lse = forward(*arguments)
        return (out * 2 if triton_path.forward_tile().block_m == GOOD.block_m else out), lse

    table = triton_path.forward_tile
    monkeypatch.setattr(triton_path, "forward_tile", lambda *given: table(*given) if given else Forward(0, 0, 0, 0))
    monkeypatch.setattr(triton_path, "forward", broken)
    _, report = tune("--part", "forward", "--jobs", "0")
    found = {candidate["name"]: candidate for candidate in report["stages"][0]["candidates"]}
    assert "expected the results of" in found["16x32 w8 s3"]["error"]


def test_a_signal_leaves_a_report(tune, monkeypatch):
    monkeypatch.setattr(tune_tiles.Tuner, "_finals", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    status, report = tune("--part", "forward", "--jobs", "0")
    assert status == 1
    assert report["failure"] == "SIGTERM"
    assert any(candidate["seconds"] for candidate in report["stages"][0]["candidates"])


def test_workers_survive_a_candidate_that_fails_and_one_that_takes_too_long():
    workers = Workers(1, torch.float32, torch.device("cpu"), limit=60.0)
    shape = Shape("forward", 2, 1, 64, 1, 16, 16)
    try:
        for number, tile in enumerate((INVALID, GOOD)):
            workers.submit(0, Task(number, (shape,), tile))
        results: list[Result] = []
        while len(results) < 2:
            results += workers.poll(1.0)
        assert [result.task.tile for result in results] == [INVALID, GOOD]
        assert results[0].error is not None
        assert results[1].error is None
        workers.submit(0, Task(2, (shape,), GOOD))
        workers._hand_out()
        workers._workers[0].deadline = 0.0
        results = workers.poll(0.0)
        assert [(result.task.number, result.error) for result in results] == [(2, "not done after 60 s")]
    finally:
        workers.close()


def test_parts_are_combined_and_varied():
    ranked = [(1.0, replace(BASE, key_m=64)), (1.1, replace(BASE, query_n=64)), (1.2, BASE)]
    assert tune_candidates.combinations(ranked) == [replace(BASE, key_m=64, query_n=64)]
    assert replace(BASE, key_m=64) in tune_candidates.neighbours(BASE, [tile for _, tile in ranked])


@pytest.mark.parametrize(("dim", "decode"), [(64, False), (128, False), (256, False), (128, True)])
def test_candidates_differ_and_fit(dim, decode):
    tiles = tune_candidates.candidates(Forward(16, 64, 4, 3), dim, decode, 2)
    tiles += [] if decode else tune_candidates.candidates(BASE, dim, False, 2)
    assert len(tiles) == len(set(tiles)) > 10
    assert all((tile.block_m == 16) == decode for tile in tiles if isinstance(tile, Forward))


def test_the_table_is_asked_without_a_launch(launched):
    problem = tune_workers.Problem(torch.float32, torch.device("cpu"), random=True)
    shape = Shape("forward", 2, 1, 64, 1, 16, 16)
    assert isinstance(tune_workers.current_tile("forward", problem.call(shape)), Forward)
    assert not launched


def test_candidates_are_ranked_by_their_mean_over_the_best_and_only_if_timed_everywhere():
    shapes = [Shape("forward", 2, 1, 64, 1, length, 16) for length in (16, 32)]
    seconds = {"slow": (4.0, 1.0), "best": (1.0, 1.0), "middle": (1.0, 2.0), "once": (0.5, None), "failed": (0.1, 0.1)}
    stage = tune_candidates.Stage("forward", 64, False, shapes, 0.0)
    for name, times in seconds.items():
        found = {shape.name: time for shape, time in zip(shapes, times, strict=True) if time is not None}
        state = "failed" if name == "failed" else "screened"
        stage.candidates.append(tune_candidates.Candidate(GOOD, name, seconds=found, state=state))
    ranked = stage.ranked(shapes)
    assert [candidate.origin for _, candidate in ranked] == ["best", "middle", "slow"]
    assert [mean for mean, _ in ranked] == pytest.approx([1.0, 2**0.5, 2.0])
