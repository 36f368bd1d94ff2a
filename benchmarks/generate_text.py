"""Greedy generation behind a tuned prompt on a CPU: ptengine against PEFT, interleaved in one process.

    python benchmarks/generate_text.py --json benchmarks/results/generate_text.json

Random GPT-2 small (12 layers, width 768, vocabulary 50257), fp32, P = 100 virtual tokens, one soft prompt for all rows,
texts of 32 tokens, 32 new ones. Each case times a whole call of both sides in turn and reports medians, the new tokens
of all rows a second, and the peak of resident memory above the weights. Both sides must give the same tokens. On a GPU
see bench_end_to_end.py.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import op_timing
import torch
from peft import PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor
from train_step import NUM_VIRTUAL_TOKENS, backbone, environment

import ptengine
from ptengine.files import write_json_atomic

TEXT_TOKENS, NEW_TOKENS = 32, 32
ROWS = (1, 4, 16)
OPTIONS: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}


def contenders(rows: int) -> dict[str, Callable[[], Tensor]]:
    """What gives the new tokens, int64 [rows, NEW_TOKENS], of either side."""
    torch.manual_seed(1)
    ids = torch.randint(0, 50257, (rows, TEXT_TOKENS))
    virtual = 0.02 * torch.randn(NUM_VIRTUAL_TOKENS, 768)
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=NUM_VIRTUAL_TOKENS)
    theirs = get_peft_model(copy.deepcopy(backbone()), config).eval()
    with torch.no_grad():
        next(p for p in theirs.parameters() if p.requires_grad).copy_(virtual)
    ours = ptengine.patch(backbone())
    prompt = ptengine.SoftPrompt(ours, NUM_VIRTUAL_TOKENS, init="array", array=virtual)

    def peft() -> Tensor:
        out: Tensor = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **OPTIONS)
        return out[:, -NEW_TOKENS:]

    def own() -> Tensor:
        out: Tensor = ptengine.generate(ours, prompt, ids, pad_token_id=0, **OPTIONS)
        return out[:, -NEW_TOKENS:]

    return {"peft": peft, "ptengine": own}


def run_case(rows: int, repeats: int) -> dict[str, Any]:
    sides = contenders(rows)
    tokens: dict[str, Tensor] = {}
    memory = {
        name: op_timing.resident_peak(lambda name=name, run=run: tokens.update({name: run()}))  # type: ignore[misc]
        for name, run in sides.items()
    }
    seconds = op_timing.clock_samples(sides, repeats, torch.device("cpu"))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "rows": rows,
        "same_tokens": torch.equal(tokens["peft"], tokens["ptengine"]),
        "peft_seconds": median["peft"],
        "ptengine_seconds": median["ptengine"],
        "ptengine_tokens_per_second": rows * NEW_TOKENS / median["ptengine"],
        "ratio": median["peft"] / median["ptengine"],
        "peft_peak_bytes_above_weights": memory["peft"],
        "ptengine_peak_bytes_above_weights": memory["ptengine"],
        "all_seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each side (default 5)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = []
    print(f"{'rows':>4} {'PEFT s':>8} {'ours s':>8} {'ratio':>7} {'tokens/s':>9}  same tokens")
    for rows in ROWS:
        row = run_case(rows, args.repeats)
        results.append(row)
        print(
            f"{rows:4} {row['peft_seconds']:8.2f} {row['ptengine_seconds']:8.2f} {row['ratio']:6.2f}x "
            f"{row['ptengine_tokens_per_second']:9.0f}  {row['same_tokens']}",
            flush=True,
        )
        if args.json:
            write_json_atomic(args.json, {"environment": environment(), "results": results})
    if not all(row["same_tokens"] for row in results):
        raise SystemExit("expected the same tokens of both sides, got different ones")


if __name__ == "__main__":
    main()
