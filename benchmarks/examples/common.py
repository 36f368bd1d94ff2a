"""What the examples share: their options, rows and trivial baselines, and the table at the end.

Every example tunes one prompt on one task with the public interface of ptengine and prints test scores of one seed
beside what needs no tuning. None was searched for good settings, and the embedded backbone is tiny: the scores show
what is measured, not what the method can do.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_pipeline
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptengine.assets import backbone_path
from ptengine.data import check_columns, classification_metrics, load_rows
from ptengine.errors import InputError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
HELD_OUT = 0.2  # share of the rows of --data that only the scores see
LOWER_IS_BETTER = ("loss", "perplexity")

Rows = list[dict[str, Any]]
Scores = Mapping[str, Mapping[str, float]]


def example(main: Callable[[Sequence[str] | None], None]) -> Callable[[Sequence[str] | None], int]:
    """`main` with an exit status: bad input is one line on standard error and status 2."""

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        try:
            main(argv)
        except InputError as error:
            print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
            return 2
        return 0

    return wrapped


def arguments(text: str | None, argv: Sequence[str] | None, *, steps: int) -> argparse.Namespace:
    """The options all examples have. `text` is the example's docstring, `steps` its default."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="PATH", help="folder of a causal checkpoint (default: the embedded one)")
    parser.add_argument("--steps", type=_count, default=steps, help=f"optimiser steps (default: {steps})")
    parser.add_argument("--output", metavar="DIR", help="keep the prompt, the log and the curve here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the scores here")
    parser.add_argument("--data", metavar="FILE", help="csv, json, jsonl or parquet; a fifth of it is held out")
    parser.add_argument("--test-rows", type=_count, default=200, help="rows to score, at most (default: 200)")
    args = parser.parse_args(argv)
    args.name = (text or "").split(":")[0]
    if args.json is not None and not args.json.parent.is_dir():
        raise InputError(f"expected --json in a folder that exists, got {str(args.json)!r}")
    return args


def backbone(path: str | None) -> tuple[Any, Any]:
    """The model, in fp32 and on the GPU where there is one, and its tokenizer."""
    if path is not None and not Path(path).is_dir():
        raise InputError(f"expected --model, the folder of a Hugging Face checkpoint, got {path!r}")
    folder = backbone_path() if path is None else Path(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"expected a causal checkpoint and its tokenizer in {str(folder)!r}, got: {error}") from error
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def rows(args: argparse.Namespace, folder: Path, columns: Sequence[str]) -> tuple[Rows, Rows]:
    """Training and test rows: of --data, or else train.jsonl and test.jsonl in `folder`."""
    if args.data is not None:
        return divided(args, load_columns(args.data, columns))
    if not folder.is_dir():
        raise missing(folder)
    train, test = (load_columns(folder / f"{split}.jsonl", columns) for split in ("train", "test"))
    return train, random.Random(0).sample(test, min(args.test_rows, len(test)))


def spaced(rows: Rows, column: str) -> Rows:
    """The rows with a blank before their target, which then starts with the tokens that it has within a text."""
    return [row | {column: f" {row[column]}"} for row in rows]


def load_columns(path: str | Path, columns: Sequence[str]) -> Rows:
    """All rows of a file that has these columns, with a text in each."""
    data = load_rows(path)
    check_columns(data, columns, str(path))
    found = data.to_list()
    for index, row in enumerate(found):
        for column in columns:
            if not isinstance(row[column], str) or not row[column].strip():
                raise InputError(
                    f"{path}, row {index} (counting from 0): expected text in column {column!r}, got {row[column]!r}"
                )
    return found


def missing(path: Path) -> InputError:
    """The error where `path` of ../shared/data is not there."""
    name = path.relative_to(SHARED) if path.is_relative_to(SHARED) else path
    return InputError(
        f"expected the data {str(name)!r} in ../shared/data beside the checkout, or --data FILE, got none"
    )


def divided(args: argparse.Namespace, found: Rows) -> tuple[Rows, Rows]:
    """Rows of one file, shuffled with a fixed seed, as training and test rows."""
    if len(found) < 2:
        raise InputError(f"expected at least two rows to train on one and score the other, got {len(found)}")
    shuffled = random.Random(0).sample(found, len(found))
    cut = max(1, round(HELD_OUT * len(found)))
    return shuffled[cut:], shuffled[:cut][: args.test_rows]


@contextmanager
def output(args: argparse.Namespace) -> Iterator[str]:
    """The folder of the run: --output, or one that goes away again."""
    if args.output is not None:
        yield args.output
        return
    with tempfile.TemporaryDirectory() as folder:
        yield folder


def label_baselines(train: Rows, test: Rows, columns: Sequence[str]) -> dict[str, dict[str, float]]:
    """What needs no language model: the most frequent label, and naive Bayes on the words of `columns`."""
    labels = sorted({row["label"] for row in train + test})
    texts = [" ".join(row[column] for column in columns) for row in train]
    held = [" ".join(row[column] for column in columns) for row in test]
    known, gold = [row["label"] for row in train], [labels.index(row["label"]) for row in test]
    most = max(labels, key=known.count)
    bayes = make_pipeline(CountVectorizer(), MultinomialNB()).fit(texts, known)
    guesses = {"majority class": [most] * len(test), "bag of words, naive Bayes": list(bayes.predict(held))}
    return {
        name: classification_metrics(gold, [labels.index(label) for label in guess], labels)
        for name, guess in guesses.items()
    }


def nearest(train: Rows, test: Rows, source: str, target: str) -> list[str]:
    """For each test row the target of the training row with the most similar source (TF-IDF of 1 to 3 letters)."""
    vectors = TfidfVectorizer(analyzer="char", ngram_range=(1, 3)).fit([row[source] for row in train])
    known, asked = (vectors.transform([row[source] for row in part]) for part in (train, test))  # [N, F], [M, F]
    best = (asked @ known.T).toarray().argmax(axis=1)  # [M]
    return [train[i][target] for i in best]


def references(test: Rows, target: str) -> list[list[str]]:
    """What a text may be: all references of a row that has several, else its target."""
    return [row.get("references") or [row[target]] for row in test]


def report(
    args: argparse.Namespace, counts: tuple[int, int], scores: Scores, metrics: Sequence[str], shown: Mapping[str, str]
) -> None:
    """Print the scores and what they come to, and write --json.

    Args:
        counts: rows trained on and rows scored.
        scores: name to metrics; the last one is the tuned prompt, and it is compared with the best of the others.
        metrics: the columns, the one that decides first.
        shown: an input, and what the tuned model answered.
    """
    print(f"{args.name}: {args.steps} steps, {counts[0]} training rows, {counts[1]} test rows, one seed")
    print(" " * 36 + "".join(f"{metric:>13}" for metric in metrics))
    for name, found in scores.items():
        cells = (f"{found[metric]:13.4f}" if metric in found else f"{'-':>13}" for metric in metrics)
        print(f"{name:36}" + "".join(cells))
    for text, answer in shown.items():
        print(f"{text!r} -> {answer!r}")
    print(verdict(scores, metrics[0]))
    if args.json is not None:
        data = {
            "example": args.name, "model": args.model or "embedded", "data": args.data, "steps": args.steps,
            "train_rows": counts[0], "test_rows": counts[1], "scores": scores, "shown": shown,
        }  # fmt: skip
        args.json.write_text(json.dumps(data, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def verdict(scores: Scores, metric: str) -> str:
    """One sentence: the last of `scores` against the best of the others."""
    *others, tuned = ((name, found[metric]) for name, found in scores.items() if metric in found)
    pick = min if metric in LOWER_IS_BETTER else max
    name, best = pick(others, key=lambda entry: entry[1])
    ahead = tuned[1] != best and pick(tuned[1], best) == tuned[1]
    word = "better than" if ahead else "no better than"
    return f"{tuned[0]}: {metric} {tuned[1]:.4f}, {word} the best of the others ({name}, {best:.4f})"


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value
