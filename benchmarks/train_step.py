"""One optimiser step of prompt tuning: ptengine against PEFT, interleaved in one process.

    python benchmarks/train_step.py --json benchmarks/results/train_step.json

Random GPT-2 small (12 layers, width 768, vocabulary 50257), fp32, P = 100 virtual tokens. Each case times a whole step
(batch preparation, forward, loss, backward, AdamW update) of both sides in turn and reports medians, their ratio, the
ratio that counting matrix work alone predicts, and the peak of resident memory above the weights. The SST-2 case needs
`../shared/data`. The same cases run under `pytest benchmarks --benchmark-only` (bench_train_step.py).
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import op_timing
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import ptengine
from ptengine.backbone import KeyValuePrefix, VirtualTokens, pack_padded, packed_loss
from ptengine.files import write_json_atomic

NUM_VIRTUAL_TOKENS = 100
SHARED = Path(__file__).resolve().parents[2] / "shared"
Method = Literal["prompt", "prefix"]


@dataclass(frozen=True)
class Case:
    """A batch shape. `labels` is "all", or "few": the last token of even rows, the last two of odd ones, or "one"."""

    name: str
    method: Method
    rows: int
    length: int | None  # None: the rows of SST-2
    labels: Literal["all", "few", "one"]
    target: float  # the ratio this project asks of itself


CASES = (
    Case("prompt_b8_t64_all", "prompt", 8, 64, "all", 2.2),
    Case("prompt_b8_t64_few", "prompt", 8, 64, "few", 3.0),
    Case("prompt_b16_t32_all", "prompt", 16, 32, "all", 4.5),
    Case("prompt_b16_t32_few", "prompt", 16, 32, "few", 6.0),
    Case("prompt_sst2_b32_one", "prompt", 32, None, "one", 9.0),
    Case("prefix_b8_t64_all", "prefix", 8, 64, "all", 1.0),
    Case("prefix_b8_t64_few", "prefix", 8, 64, "few", 1.35),
)


@dataclass(frozen=True)
class PaddedBatch:
    """What a stock data loader gives, padded on the right: all int64 [B, T]."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def make_batch(case: Case) -> PaddedBatch:
    generator = torch.Generator().manual_seed(0)
    lengths = [case.length] * case.rows if case.length else sst2_lengths(case.rows)
    longest = max(lengths)
    ids = torch.randint(0, 50257, (case.rows, longest), generator=generator)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    labels = torch.full_like(ids, -100)
    for row, length in enumerate(lengths):
        count = {"all": length, "few": 1 + row % 2, "one": 1}[case.labels]
        labels[row, length - count : length] = ids[row, length - count : length]
    return PaddedBatch(ids, mask, labels)


@lru_cache
def sst2_lengths(rows: int) -> list[int]:
    """Token counts of the first SST-2 training rows, under a byte-level BPE of GPT-2's size trained on English text."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    corpora = SHARED / "data" / "corpora"
    files = [corpora / name for name in ("wikitext2_valid.txt", "en_reviews_unlabelled.txt", "tinystories_sample.txt")]
    tokenizer.train([str(file) for file in files], vocab_size=50257, min_frequency=1, show_progress=False)
    with (SHARED / "data" / "sst2" / "train.jsonl").open(encoding="utf-8") as lines:
        texts = [json.loads(next(lines))["text"] for _ in range(rows)]
    return [len(encoding.ids) for encoding in tokenizer.encode_batch(texts)]


@lru_cache
def backbone() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    return model.requires_grad_(False)


def peft_step(case: Case, batch: PaddedBatch) -> Callable[[], float]:
    """PEFT as its documentation trains: the wrapped model called with labels, dropout off."""
    from peft import PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model

    config_class = PromptTuningConfig if case.method == "prompt" else PrefixTuningConfig
    config = config_class(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=NUM_VIRTUAL_TOKENS)
    model = get_peft_model(copy.deepcopy(backbone()), config).eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
        out.loss.backward()
        optimizer.step()
        return float(out.loss.detach())

    return step


def ptengine_step(case: Case, batch: PaddedBatch) -> Callable[[], float]:
    model = ptengine.patch(backbone())
    config = model.config
    shapes = {
        "prompt": [(NUM_VIRTUAL_TOKENS, config.n_embd)],
        "prefix": [(config.n_layer, NUM_VIRTUAL_TOKENS, config.n_head, config.n_embd // config.n_head)] * 2,
    }[case.method]
    parameters = [torch.nn.Parameter(0.02 * torch.randn(shape)) for shape in shapes]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        lowered = VirtualTokens(*parameters) if case.method == "prompt" else KeyValuePrefix(*parameters)
        out = packed_loss(model, lowered, pack_padded(batch.input_ids, batch.attention_mask, batch.labels))
        out.loss.backward()
        optimizer.step()
        return float(out.loss.detach())

    return step


def ideal_ratio(case: Case, batch: PaddedBatch) -> float:
    """Matrix work by counting: positions through the layers' weights and positions through the head."""
    config = backbone().config
    body, head = 12 * config.n_embd**2 * config.n_layer, config.n_embd * config.vocab_size
    rows, longest = batch.input_ids.shape
    virtual = NUM_VIRTUAL_TOKENS if case.method == "prompt" else 0
    stock = rows * (virtual + longest) * (body + head)
    text, labelled = int(batch.attention_mask.sum()), int((batch.labels != -100).sum())
    return stock / ((virtual + text) * body + labelled * head)


def run_case(case: Case, repeats: int) -> dict[str, Any]:
    batch = make_batch(case)
    steps = {"peft": peft_step(case, batch), "ptengine": ptengine_step(case, batch)}
    memory = {name: op_timing.resident_peak(step) for name, step in steps.items()}  # the first step is the warm-up too
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "case": case.name,
        "rows": case.rows,
        "tokens": int(batch.attention_mask.sum()),
        "longest": batch.input_ids.shape[1],
        "labels": int((batch.labels != -100).sum()),
        "peft_seconds": median["peft"],
        "ptengine_seconds": median["ptengine"],
        "ratio": median["peft"] / median["ptengine"],
        "ratio_by_counting": ideal_ratio(case, batch),
        "target": case.target,
        "peft_peak_bytes_above_weights": memory["peft"],
        "ptengine_peak_bytes_above_weights": memory["ptengine"],
        "memory_ratio": memory["ptengine"] / memory["peft"],
        "all_seconds": seconds,
    }


def environment() -> dict[str, Any]:
    packages = {name: importlib.metadata.version(name) for name in ("transformers", "peft")}
    return op_timing.environment(torch.device("cpu")) | packages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], help="run these cases alone")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each side (default 5)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = []
    print(f"{'case':22} {'PEFT s':>8} {'ours s':>8} {'ratio':>7} {'counted':>8} {'asked':>6} {'memory':>7}")
    for case in CASES:
        if args.only and case.name not in args.only:
            continue
        if case.length is None and not SHARED.is_dir():
            print(f"{case.name:22} skipped: needs ../shared/data", file=sys.stderr)
            continue
        row = run_case(case, args.repeats)
        results.append(row)
        print(
            f"{case.name:22} {row['peft_seconds']:8.2f} {row['ptengine_seconds']:8.2f} {row['ratio']:6.2f}x "
            f"{row['ratio_by_counting']:7.2f}x {case.target:5.2f}x {row['memory_ratio']:6.0%}",
            flush=True,
        )
        if args.json:
            write_json_atomic(args.json, {"environment": environment(), "results": results})


if __name__ == "__main__":
    main()
