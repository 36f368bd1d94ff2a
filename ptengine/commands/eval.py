"""`ptengine eval`: how good a tuned prompt is on a file, or the frozen model without one."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptengine.commands import Outcome
from ptengine.commands.options import refuse, require, whole
from ptengine.commands.session import add_prompt_argument, add_session_arguments, load_with_head, open_prompt
from ptengine.errors import InputError

if TYPE_CHECKING:
    from ptengine.commands.session import Session
    from ptengine.training import EvalResult

EXAMPLE = """  ptengine eval --prompt out --data test.jsonl
  ptengine eval --prompt out --data test.jsonl --hard-prompt-only   # the same without the tuned prompt
  ptengine eval --prompt out --ensemble out2 --ensemble out3 --weights-from held.jsonl --data test.jsonl"""


_WRITING = ("max_new_tokens", "bleu_tokenizer")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_prompt_argument(parser)
    parser.add_argument("--data", metavar="FILE", required=True, help="rows to score: csv, json, jsonl or parquet")
    parser.add_argument(
        "--hard-prompt-only", action="store_true", help="leave the tuned prompt out: the frozen model and the template"
    )
    parser.add_argument(
        "--ensemble", metavar="DIR", action="append", default=[],
        help="another prompt of the same model and task, asked in the same batch, probabilities averaged; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--weights-from", metavar="FILE", help="weigh the prompts of an ensemble by their likelihood of these rows"
    )
    parser.add_argument("--batch-size", type=whole(1), default=32, metavar="N", help="rows per forward (default: 32)")
    parser.add_argument("--max-length", type=whole(1), metavar="N", help="longest row in tokens (default: what fits)")
    parser.add_argument("--truncation", action="store_true", help="cut rows that are longer")
    parser.add_argument("--write-texts", action="store_true", help="generation: also write texts and score those")
    parser.add_argument("--max-new-tokens", type=whole(1), metavar="N", help="of a text written (default: 64)")
    parser.add_argument(
        "--bleu-tokenizer", metavar="NAME",
        help="how BLEU splits the texts written: zh for Chinese, intl, char or 13a (default: 13a, at blanks)",
    )  # fmt: skip
    parser.add_argument("--predictions", metavar="FILE", help="write one JSON line per row with its prediction")
    add_session_arguments(parser)


def run(args: argparse.Namespace) -> Outcome:
    from ptengine.data import GenerationTask
    from ptengine.data.metrics import check_bleu_tokenizer
    from ptengine.training import evaluate

    target = None if args.predictions is None else Path(args.predictions).absolute()
    if target is not None and (target.is_dir() or not target.parent.is_dir()):
        raise InputError(f"expected --predictions, a file in a folder that exists, got {args.predictions!r}")
    if not args.write_texts:
        require(args, "--write-texts", "max_new_tokens", "bleu_tokenizer")
    if args.bleu_tokenizer is not None:
        check_bleu_tokenizer(args.bleu_tokenizer)
    mixed = _ensemble_folders(args)
    session = open_prompt(args)
    if session.task.trains_head and args.hard_prompt_only:
        raise InputError("expected a task with a template for --hard-prompt-only, got one with a trained head")
    if args.predictions is not None and session.task.kind in ("generation", "seq2seq") and not args.write_texts:
        raise InputError("expected --write-texts with --predictions for a generation task, got --predictions alone")
    if args.write_texts and not isinstance(session.task, GenerationTask):
        raise InputError(f"expected --write-texts with a prompt that writes texts, got one for {session.task.kind}")
    weights: dict[str, float] = {}
    if mixed:
        result, weights = _ensemble(args, session, mixed)
    else:
        result = evaluate(
            session.model,
            None if args.hard_prompt_only else session.prompt,
            session.task,
            args.data,
            session.tokenizer,
            batch_size=args.batch_size,
            max_length=args.max_length,
            truncation=args.truncation,
            generate=args.write_texts,
            **{name: getattr(args, name) for name in _WRITING if getattr(args, name) is not None},
        )
    data: dict[str, Any] = {
        "command": "eval",
        "prompt": None if args.hard_prompt_only else args.prompt,
        **({"ensemble": weights} if weights else {}),
        "data": args.data,
        "rows": result.n,
        "metrics": result.metrics,
    }
    if args.predictions is not None:
        data["predictions"] = _write_predictions(args.predictions, result)
    lines = [
        f"{result.n} rows of {args.data}",
        *(f"  {name} has weight {weight:.4f}" for name, weight in weights.items()),
        *(f"  {name:<12} {value:.4f}" for name, value in result.metrics.items()),
    ]
    return Outcome(data, tuple(lines))


def _ensemble_folders(args: argparse.Namespace) -> list[Path]:
    """Where the weights of an ensemble's prompts are, that of ``--prompt`` first; none without one."""
    from ptengine.commands.recipe import find_prompt

    if not args.ensemble:
        require(args, "--ensemble", "weights_from")
        return []
    refuse(args, "--ensemble", "hard_prompt_only", "write_texts")
    named = [args.prompt, *args.ensemble]
    found = [find_prompt(name) for name in named]
    if len({folder.resolve() for folder, _ in found}) < len(named):
        raise InputError(f"expected different prompts in an ensemble, got {', '.join(named)}")
    own = found[0][1]
    for name, (_, recipe) in zip(named, found, strict=True):
        for what, same in (("model", recipe.fingerprint == own.fingerprint), ("task", recipe.task == own.task)):
            if not same:
                raise InputError(f"expected prompts of one {what} in an ensemble, got {name!r}, tuned for another")
    return [folder for folder, _ in found]


def _ensemble(args: argparse.Namespace, session: Session, folders: list[Path]) -> tuple[EvalResult, dict[str, float]]:
    """The mixture's result, and the prompts as they were named with their weights."""
    from ptengine.transfer import evaluate_ensemble, likelihood_weights

    prompts = [load_with_head(folder, session.model, session.task) for folder in folders]
    options: dict[str, Any] = {
        "batch_size": args.batch_size, "max_length": args.max_length, "truncation": args.truncation,
    }  # fmt: skip
    asked = (session.model, prompts, session.task)
    weights = [1 / len(prompts)] * len(prompts)
    if args.weights_from is not None:
        weights = [*likelihood_weights(*asked, args.weights_from, session.tokenizer, **options)]
    result = evaluate_ensemble(*asked, args.data, session.tokenizer, weights=weights, **options)
    return result, dict(zip([args.prompt, *args.ensemble], weights, strict=True))


def _write_predictions(path: str, result: EvalResult) -> str:
    from ptengine.files import write_atomic

    lines = [
        json.dumps({"row": row, "prediction": text}, ensure_ascii=False) for row, text in enumerate(result.predictions)
    ]
    return str(write_atomic(path, ("\n".join(lines) + "\n").encode()))
