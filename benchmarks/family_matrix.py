"""Tries every family of the installed transformers against its stock computation, and writes a table.

    python benchmarks/family_matrix.py [--kind causal|encoder|multimodal|seq2seq] [--only llama,opt] [--again failed]
    python benchmarks/family_matrix.py --summary

Each family is built from a shrunken configuration with random weights, in a process of its own. A soft prompt of six
virtual tokens and a prefix of keys and values run through ptengine over two texts, longer than the shrunken sliding
windows, and through the stock model with the prompt placed in each row (a prefix: in its cache, or before the keys of a
plain attention), in fp32. Logits and gradients of the prompt must agree within 1e-4, relative.

Rows are one of: ``pass``; ``in-row``, exact with the model's own attention over stock batches, soft prompts alone;
``refused``, with the reason ``ptengine.patch`` gave, also where the stock model itself fails on input embeddings;
``failed``; ``not built``, where no small model could be made of the configuration.
Families that are in the table already are skipped, so a run can be cut short and taken up again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import family_causal
import family_encoder
import family_seq2seq
import torch
import transformers
from family_numbers import BOUND, brief
from family_sets import KINDS, families, summary

from ptengine.files import write_json_atomic

RESULTS = Path(__file__).parent / "results"
CHECKS = {
    "causal": family_causal.check,
    "encoder": family_encoder.check,
    "multimodal": partial(family_seq2seq.check, kind="multimodal"),
    "seq2seq": family_seq2seq.check,
}


def _child(kind: str, model_type: str, connection: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    try:
        connection.send(CHECKS[kind](model_type))
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        connection.send({"status": "failed", "reason": f"{brief(error)} ({place.name}, line {place.lineno})"})


def try_family(kind: str, model_type: str, timeout: float) -> dict[str, Any]:
    """One row, in a process of its own, forked so that libraries are imported once."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(kind, model_type, sender))
    process.start()
    sender.close()
    try:
        if receiver.poll(timeout):
            return dict(receiver.recv())
        return {"status": "not built", "reason": f"nothing came in {timeout:.0f} s"}
    except EOFError:
        return {"status": "failed", "reason": "the process died"}
    finally:
        if process.is_alive() and process.pid is not None:
            process.join(1)
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
        process.join()


def write_summary() -> int:
    """Families by what the best of their rows is, over the tables of all kinds."""
    tables = {kind: RESULTS / f"families_{kind}.json" for kind in KINDS}
    found = summary({kind: json.loads(path.read_text())["families"] for kind, path in tables.items() if path.exists()})
    write_json_atomic(RESULTS / "families.json", found)
    print(json.dumps(found, indent=2))
    return int(bool(found["failed rows"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kind", choices=KINDS, default="causal")
    parser.add_argument("--summary", action="store_true", help="print and write what the tables there are come to")
    parser.add_argument("--only", help="model types, separated by commas")
    parser.add_argument("--again", default="", help="try rows of these statuses again, separated by commas")
    parser.add_argument("--timeout", type=float, default=120, help="seconds per family")
    parser.add_argument("--out", type=Path, help="default: results/families_KIND.json")
    options = parser.parse_args()
    if options.summary:
        return write_summary()
    out = options.out or RESULTS / f"families_{options.kind}.json"
    table: dict[str, Any] = json.loads(out.read_text())["families"] if out.exists() else {}
    again = set(options.again.split(","))
    wanted = options.only.split(",") if options.only else families(options.kind)
    for model_type in wanted:
        if model_type in table and not options.only and table[model_type]["status"] not in again:
            continue
        start = time.perf_counter()
        row = try_family(options.kind, model_type, options.timeout)
        table[model_type] = row
        print(
            f"{model_type:28} {row['status']:9} {(row.get('reason') or '')[:180]} [{time.perf_counter() - start:.1f} s]"
        )
        counts = Counter(one["status"] for one in table.values())
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        payload = {"bound": BOUND, "versions": versions, "counts": counts, "families": dict(sorted(table.items()))}
        write_json_atomic(out, payload)
        sys.stdout.flush()
    print(dict(Counter(one["status"] for one in table.values())))
    return int(any(one["status"] == "failed" for one in table.values()))


if __name__ == "__main__":
    raise SystemExit(main())
