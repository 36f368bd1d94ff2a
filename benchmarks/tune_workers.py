"""What benchmarks/tune_tiles.py runs: the shapes, their operands, a launch with a tile of one's choice, and processes
that compile.

A worker calls the launcher exactly as the tuner will, on tensors of the same shapes, but every Triton kernel is
compiled instead of launched, so that what it leaves in Triton's cache is what the tuner asks for. It is a process with
a pipe: one that crashes or takes too long is replaced, and only its task is lost.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, TypeAlias

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from ptengine.kernels.prefix_attention import triton_path
from ptengine.kernels.prefix_attention.scores import ScoreRules
from ptengine.kernels.prefix_attention.tiles import Backward, Forward

__all__ = ["Problem", "Result", "Shape", "Task", "Tile", "Workers", "current_tile", "label", "observed", "using"]

Tile: TypeAlias = Forward | Backward

_START_LIMIT = 120.0  # seconds until a worker has imported what it needs
_BROKEN_STARTS = 3  # workers that did not start, before the tuner compiles for itself


@dataclass(frozen=True)
class Shape:
    """Packed rows of one length behind a shared prefix; `cache` > 0: dense rows of one query over caches so long."""

    part: str
    heads: int
    kv_heads: int
    dim: int
    rows: int
    length: int
    virtual: int
    cache: int = 0

    @property
    def name(self) -> str:
        kind = f"decode B={self.rows} cache={self.cache}" if self.cache else f"T={self.length}"
        return f"{kind} P={self.virtual}"


@dataclass(frozen=True)
class Task:
    number: int
    shapes: tuple[Shape, ...]
    tile: Tile


@dataclass(frozen=True)
class Result:
    task: Task
    error: str | None
    seconds: float
    compiled: int  # kernels that were not in the cache


class Problem:
    """Operands of all shapes of one head layout; without `random` whatever lies in memory, for compiling."""

    def __init__(self, dtype: torch.dtype, device: torch.device, random: bool) -> None:
        self._dtype, self._device, self._random = dtype, device, random
        self._kept: dict[Any, Tensor] = {}
        self._piece = torch.empty(0, dtype=dtype, device=device)

    def call(self, shape: Shape) -> Callable[[], list[Tensor]]:
        """Launches the shape's part, alone, and gives its results."""
        h, kv, d, p = shape.heads, shape.kv_heads, shape.dim, shape.virtual
        prefix_k, prefix_v = self._tensor("pk", 1, p, kv, d), self._tensor("pv", 1, p, kv, d)
        rules = ScoreRules(True, d**-0.5, None, True, None, None, None, None)
        if shape.cache:
            q = self._tensor("q", shape.rows, 1, h, d)
            k, v = (self._tensor(x, shape.rows, kv, shape.cache, d) for x in "kv")
            layout = triton_path.Layout(True, shape.rows, 1, shape.cache, None, None, None, False, None)
            return lambda: list(triton_path.forward(q, k, v, prefix_k, prefix_v, layout, rules))
        total = shape.rows * shape.length
        q, k, v = self._tensor("q", total, h, d), self._tensor("k", total, kv, d), self._tensor("v", total, kv, d)
        bounds = torch.arange(0, total + 1, shape.length, dtype=torch.int32, device=self._device)
        layout = triton_path.Layout(False, shape.rows, shape.length, shape.length, bounds, None, None, False, None)
        if shape.part == "forward":
            return lambda: list(triton_path.forward(q, k, v, prefix_k, prefix_v, layout, rules))
        grad, out = self._tensor("grad", total, h, d), self._tensor("out", total, h, d)
        # Scores of random queries and keys are about normal, so this is about their log-sum-exp.
        seen = torch.arange(shape.length, dtype=torch.float32, device=self._device).repeat(shape.rows) + (p + 1)
        lse = (seen.log() + 0.5).expand(h, -1).contiguous()
        return lambda: triton_path.backward(
            grad, q, k, v, prefix_k, prefix_v, out, lse, layout, rules, rows_need_grad=True, deterministic=True
        )

    def _tensor(self, name: str, *size: int) -> Tensor:
        key = (name, size)
        if key not in self._kept:
            if self._random:
                generator = torch.Generator(self._device).manual_seed(len(self._kept))
                made = torch.randn(size, generator=generator, device=self._device).to(self._dtype)
            else:  # one piece of memory for all of them
                count = math.prod(size)
                if self._piece.numel() < count:
                    self._kept.clear()
                    self._piece = torch.empty(count, dtype=self._dtype, device=self._device)
                made = self._piece[:count].view(size)
            self._kept[key] = made
        return self._kept[key]


def label(tile: Tile) -> str:
    """A tile for people: 128x64 w8 s3, or q64x32 k32x64 p32x64 w8 s2 swapped."""
    values = asdict(tile)
    shared = f"w{values['num_warps']} s{values['num_stages']}"
    if isinstance(tile, Forward):
        return f"{tile.block_m}x{tile.block_n} {shared}"
    blocks = " ".join(f"{part[0]}{values[f'{part}_m']}x{values[f'{part}_n']}" for part in ("query", "key", "prefix"))
    return f"{blocks} {shared}{' swapped' if tile.swapped else ''}"


@contextlib.contextmanager
def using(tile: Tile) -> Iterator[None]:
    """The launcher takes this tile, whatever the table says."""
    with _replaced("forward_tile" if isinstance(tile, Forward) else "backward_tile", lambda *_, **__: tile):
        yield


def current_tile(part: str, call: Callable[[], object]) -> Tile:
    """The tile that the table gives a call; nothing is launched."""
    name = f"{part}_tile"
    table = getattr(triton_path, name)
    found: list[Tile] = []

    def look_up(*args: Any, **kwargs: Any) -> Tile:
        found.append(table(*args, **kwargs))
        raise LookupError

    with _replaced(name, look_up), contextlib.suppress(LookupError):
        call()
    return found[0]


@contextlib.contextmanager
def _replaced(name: str, value: object) -> Iterator[None]:
    original = getattr(triton_path, name)
    setattr(triton_path, name, value)
    try:
        yield
    finally:
        setattr(triton_path, name, original)


@contextlib.contextmanager
def observed(only_compile: bool = False) -> Iterator[list[tuple[str, Any]]]:
    """Collect the name and the compiled kernel of every Triton launch; with `only_compile` nothing is launched."""
    seen: list[tuple[str, Any]] = []
    original = JITFunction.run

    def run(function: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = original(function, *args, warmup=warmup or only_compile, **kwargs)
        seen.append((function.__name__, kernel))
        return kernel

    JITFunction.run = run
    try:
        yield seen
    finally:
        JITFunction.run = original


def generalise() -> None:
    """Compile for any lengths and counts at once, where Triton would again for 1 and for multiples of 16.

    Pointers and strides, which decide how memory is read, stay specialised. Before the first launch of a process.
    """
    for kernel in vars(triton_path).values():
        if isinstance(kernel, JITFunction):
            for parameter in kernel.params:
                if not parameter.is_constexpr and not parameter.name.endswith("_ptr"):
                    parameter.do_not_specialize |= not parameter.name.startswith("stride_")


def count_compilations(names: list[str]) -> None:
    """Note down the name of every kernel that this process compiles from now on instead of finding it in the cache."""
    import triton

    def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            names.append(str(getattr(src, "name", src)))

    triton.knobs.compilation.listener = listen


def work(pipe: Connection, dtype: torch.dtype, device_name: str) -> None:
    """The main function of a worker: a message when it is ready, then a result for every task, until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the tuner ends its workers itself
    device = torch.device(device_name)
    names: list[str] = []
    try:
        if device.type == "cuda":
            torch.empty(1, device=device)
            generalise()
            count_compilations(names)
        problem = Problem(dtype, device, random=False)
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}"[:300])
        return
    pipe.send(None)
    sink = os.open(os.devnull, os.O_WRONLY)  # compilers that fail print whole programs
    for descriptor in (sys.stdout.fileno(), sys.stderr.fileno()):
        os.dup2(sink, descriptor)
    with contextlib.suppress(EOFError, OSError):
        while True:
            task: Task = pipe.recv()
            begun, before, error_line = time.perf_counter(), len(names), None
            try:
                with using(task.tile), observed(only_compile=True):
                    for shape in task.shapes:
                        problem.call(shape)()
            except Exception as error:  # whatever a stage of the compiler raises is the answer
                problem = Problem(dtype, device, random=False)
                error_line = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
            pipe.send(Result(task, error_line, time.perf_counter() - begun, len(names) - before))


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    deadline: float
    ready: bool = False
    task: Task | None = None


class Workers:
    """Processes that compile tasks, the smallest priority first."""

    def __init__(self, count: int, dtype: torch.dtype, device: torch.device, limit: float) -> None:
        """`limit`: seconds that one task may take. With a `count` of 0 tasks come back as they are."""
        self._context = multiprocessing.get_context("spawn")
        self._count, self._dtype, self._device, self._limit = count, dtype, str(device), limit
        self._queue: list[tuple[int, int, Task]] = []
        self._order = itertools.count()
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        self.started_error: str | None = None
        self._staff()

    @property
    def broken(self) -> bool:
        return self._count == 0 or self._failed_starts >= _BROKEN_STARTS

    def submit(self, priority: int, task: Task) -> None:
        heapq.heappush(self._queue, (priority, next(self._order), task))

    def withdraw(self, numbers: Sequence[int]) -> None:
        """Forget tasks that no worker has begun."""
        gone = set(numbers)
        self._queue = [entry for entry in self._queue if entry[2].number not in gone]
        heapq.heapify(self._queue)

    def poll(self, seconds: float) -> list[Result]:
        """Hand out tasks and give what is done; waits at most so long for something to happen."""
        if self.broken:
            tasks = [worker.task for worker in self._workers if worker.task is not None]
            tasks += [heapq.heappop(self._queue)[2] for _ in range(len(self._queue))]
            self.close()
            return [Result(task, None, math.nan, 0) for task in tasks]
        self._hand_out()
        results: list[Result] = []
        waiting = {worker.pipe: worker for worker in self._workers if worker.task is not None or not worker.ready}
        for pipe in wait(list(waiting), seconds) if waiting else []:
            worker = waiting[pipe]  # type: ignore[index]
            try:
                self._take(worker, results)
            except (EOFError, OSError):
                worker.process.join(1)
                self._lose(worker, f"the compiler crashed, exit code {worker.process.exitcode}", results)
        for worker in list(self._workers):
            if time.monotonic() > worker.deadline and (worker.task is not None or not worker.ready):
                self._lose(worker, f"not done after {self._limit:.0f} s", results)
        self._staff()
        self._hand_out()
        return results

    def close(self) -> None:
        for worker in self._workers:
            worker.process.kill()
            worker.process.join(5)
            worker.pipe.close()
        self._workers.clear()

    def _take(self, worker: _Worker, results: list[Result]) -> None:
        message = worker.pipe.recv()
        if isinstance(message, Result):
            worker.task = None
            results.append(message)
        elif message is None:
            worker.ready = True
            self._failed_starts = 0
        else:
            self._lose(worker, message, results)

    def _lose(self, worker: _Worker, why: str, results: list[Result]) -> None:
        worker.process.kill()
        worker.process.join(5)
        worker.pipe.close()
        self._workers.remove(worker)
        if worker.task is not None:
            results.append(Result(worker.task, why, math.nan, 0))
        if not worker.ready:
            self._failed_starts += 1
            self.started_error = why

    def _hand_out(self) -> None:
        for worker in self._workers:
            if worker.ready and worker.task is None and self._queue:
                task = heapq.heappop(self._queue)[2]
                worker.task, worker.deadline = task, time.monotonic() + self._limit
                with contextlib.suppress(OSError):  # it is gone: the next look at its pipe tells
                    worker.pipe.send(task)

    def _staff(self) -> None:
        while len(self._workers) < self._count and not self.broken:
            mine, its = self._context.Pipe()
            process = self._context.Process(target=work, args=(its, self._dtype, self._device), daemon=True)
            process.start()
            its.close()
            self._workers.append(_Worker(process, mine, time.monotonic() + _START_LIMIT))
