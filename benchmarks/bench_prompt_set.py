"""Sixteen prompts at once against sixteen runs one after another: whole calls of `fit`, in turn in one process.

    python benchmarks/bench_prompt_set.py --json benchmarks/results/prompt_set.json

The embedded model (4 million parameters) on the embedded SMS Spam messages, 32 training rows, fp32 on CPU: four seeds
at four learning rates, each run 10 optimiser steps with what `fit` does besides (patching, log, checkpoint, export, but
no evaluation, which is each prompt's own on both sides). Wall time and the process's CPU time, which other work on the
machine disturbs less; both sides start with the same fresh prompts; the largest difference between
their losses stands beside the times. What one batch saves is the cost of a small one: calls of operators, and matrix
products too narrow for the processor; so the ratio falls with fewer and shorter rows. A case runs under
`pytest benchmarks --benchmark-only` too.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import op_timing
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ptengine
from ptengine.assets import backbone_path, data_path
from ptengine.data import ClassificationTask, Template, Verbalizer, load_rows
from ptengine.files import write_json_atomic
from ptengine.training import PromptSet, Trainer, TrainingConfig, TrainingResult

SEEDS, RATES = (1, 2, 3, 4), (0.003, 0.006, 0.012, 0.024)
STEPS, TRAIN_ROWS = 10, 32
TARGET = 0.5  # the most that sixteen at once may cost of sixteen alone


@dataclass(frozen=True)
class Case:
    """Attributes:
    method: "soft" or "prefix".
    virtual: P.
    rows: of one run's step.
    """

    name: str
    method: str
    virtual: int
    rows: int


CASES = (
    Case("soft_p8_b2", "soft", 8, 2),
    Case("soft_p8_b4", "soft", 8, 4),
    Case("soft_p20_b8", "soft", 20, 8),
    Case("prefix_p8_b4", "prefix", 8, 4),
)


@lru_cache
def backbone() -> tuple[Any, Any]:
    folder = backbone_path()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


TASK = ClassificationTask(Template("Message: {text}\nSpam:"), Verbalizer({"ham": " no", "spam": " yes"}))


def mean_tokens() -> float:
    """Of a training row, target included."""
    rows = load_rows(str(data_path("sms_spam") / "train.jsonl")).select(range(TRAIN_ROWS))
    encoded = TASK.encode(rows, backbone()[1], max_tokens=512)
    return sum(len(row.input_ids) for row in encoded) / TRAIN_ROWS


def trainers(case: Case, folder: Path) -> list[Trainer]:
    """Sixteen runs, each ready to `fit`."""
    model, tokenizer = backbone()
    data = load_rows(str(data_path("sms_spam") / "train.jsonl"))
    train = data.select(range(TRAIN_ROWS))
    method = ptengine.SoftPrompt if case.method == "soft" else ptengine.Prefix
    made = []
    for seed, rate in itertools.product(SEEDS, RATES):
        config = TrainingConfig(
            output_dir=str(folder / f"{seed}-{rate}"),
            max_steps=STEPS,
            per_device_train_batch_size=case.rows,
            learning_rate=rate,
            seed=seed,
            disable_tqdm=True,
        )
        prompt = method(model, num_virtual_tokens=case.virtual, seed=seed)
        made.append(Trainer(model, prompt, train, None, config, task=TASK, tokenizer=tokenizer))
    return made


def alone(runs: list[Trainer], folder: Path) -> list[TrainingResult]:
    return [run.fit() for run in runs]


def together(runs: list[Trainer], folder: Path) -> list[TrainingResult]:
    found = PromptSet(runs, folder).fit().members
    return [member for member in found if isinstance(member, TrainingResult)]


SIDES = {"alone": alone, "together": together}


def run_case(case: Case, repeats: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    losses: dict[str, list[list[float]]] = {}
    for repeat in range(repeats + 1):  # the first is the warm-up
        for name, side in SIDES.items():
            with tempfile.TemporaryDirectory() as home:
                runs = trainers(case, Path(home))
                start, begun = time.perf_counter(), time.process_time()
                results = side(runs, Path(home) / "set")
                if repeat:
                    seconds[name].append(time.perf_counter() - start)
                    cpu_seconds[name].append(time.process_time() - begun)
                losses[name] = [result.losses for result in results]
    pairs = zip(itertools.chain(*losses["alone"]), itertools.chain(*losses["together"]), strict=True)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    cpu = {name: statistics.median(values) for name, values in cpu_seconds.items()}
    return {
        "case": case.name,
        "prompts": len(SEEDS) * len(RATES),
        "virtual_tokens": case.virtual,
        "rows_a_step": case.rows,
        "mean_tokens_a_row": mean_tokens(),
        "steps": STEPS,
        "alone_seconds": median["alone"],
        "together_seconds": median["together"],
        "ratio": median["together"] / median["alone"],
        "alone_cpu_seconds": cpu["alone"],
        "together_cpu_seconds": cpu["together"],
        "cpu_ratio": cpu["together"] / cpu["alone"],
        "target": TARGET,
        "largest_loss_difference": max(abs(one - other) for one, other in pairs),
        "all_seconds": seconds,
        "all_cpu_seconds": cpu_seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], help="run these cases alone")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each side (default 3)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    environment = op_timing.environment(torch.device("cpu"))
    results = []
    print(f"{'case':22} {'alone s':>8} {'together s':>11} {'ratio':>6} {'CPU':>6} {'asked':>6} {'loss apart':>11}")
    for case in CASES:
        if args.only and case.name not in args.only:
            continue
        row = run_case(case, args.repeats)
        results.append(row)
        print(
            f"{case.name:22} {row['alone_seconds']:8.2f} {row['together_seconds']:11.2f} {row['ratio']:6.2f} "
            f"{row['cpu_ratio']:6.2f} {row['target']:6.2f} {row['largest_loss_difference']:11.1e}",
            flush=True,
        )
        if args.json:
            write_json_atomic(args.json, {"environment": environment, "results": results})


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("case", CASES[1:2], ids=lambda case: case.name)
def test_prompt_set(benchmark: Any, case: Case, side: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    torch.set_num_threads(2)
    benchmark.group = case.name

    def fresh() -> tuple[tuple[list[Trainer], Path], dict[str, Any]]:
        folder = tmp_path_factory.mktemp("runs")
        return (trainers(case, folder), folder / "set"), {}

    results = benchmark.pedantic(SIDES[side], setup=fresh, rounds=2, warmup_rounds=1)
    assert [result.steps for result in results] == [STEPS] * len(SEEDS) * len(RATES)


if __name__ == "__main__":
    sys.exit(main())
