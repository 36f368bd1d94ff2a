"""`ptengine transfer`: from source and target files to a prompt for the target, and a report on whether it helped."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptengine.commands import Outcome
from ptengine.commands.options import (
    absolute,
    add_config_arguments,
    add_model_arguments,
    check_output,
    choice,
    config_options,
    number,
    refuse,
    require,
    whole,
)
from ptengine.commands.task_options import classification_task, labelled_task
from ptengine.errors import InputError

if TYPE_CHECKING:
    from ptengine.data import LabelledTask
    from ptengine.transfer import PromptBank
    from ptengine.transfer.flow import FlowSettings
    from ptengine.transfer.identity import BackboneIdentity

EXAMPLE = r"""  ptengine transfer --source phones.csv --source books=other/train.jsonl \
    --target fruit.csv --test test.csv --template 'Review: {text}\nGood or bad?' \
    --verbalizer 'positive= good,negative= bad' --output out
  ptengine transfer --source 手机.csv --target 水果.csv --template '评论：{text}\n评价：' \
    --verbalizer '正面=好,负面=差' --normalization NFKC --method prefix --anchor 1 --output out
  ptengine transfer --source phones.csv --target fruit.csv --text-column text --model path/to/bert \
    --pool-sources --output out
  ptengine transfer --bank prompts --target fruit.csv --template 'Review: {text}\nGood or bad?' \
    --verbalizer 'positive= good,negative= bad' --output out
  ptengine eval --prompt out --data test.csv"""

METHODS = {"soft": "soft_prompt", "prefix": "prefix"}
INITS = {"soft": "sampled_vocab", "prefix": "random"}

_SET_HERE = (
    "output_dir", "max_steps", "num_train_epochs", "logging_steps", "disable_tqdm", "eval_strategy", "eval_steps",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "early_stopping_patience", "report_to",
)  # fmt: skip

_OF_SOURCES = (
    "source_template", "source_verbalizer", "source_steps", "source_learning_rate", "pool_sources", "joint", "balance",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data", "csv, json, jsonl or parquet files with named columns")
    data.add_argument(
        "--source", metavar="[NAME=]FILE", action="append", default=[],
        help="rows to learn from; may be repeated (default name: the file's, without its ending)",
    )  # fmt: skip
    data.add_argument(
        "--bank", metavar="DIR", help="tuned prompts to transfer from, beside or instead of --source (ptengine bank)"
    )
    data.add_argument("--target", metavar="FILE", required=True, help="rows of the target; shots are drawn from them")
    data.add_argument("--test", metavar="FILE", help="rows to judge on (default: the target's rows that are no shots)")
    data.add_argument("--unlabelled", metavar="FILE", help="more texts of the target, without labels (--self-train)")
    data.add_argument("--shots", type=_shots, default=16, metavar="N|all", help="target rows per label (default: 16)")
    data.add_argument("--test-rows", type=whole(1), metavar="N", help="draw at most this many test rows")
    task = parser.add_argument_group("task")
    task.add_argument(
        "--template", metavar="TEXT",
        help=r"text of a row, such as 'Review: {text}\nIt is'; for a masked language model 'It was {mask}. {text}'",
    )  # fmt: skip
    task.add_argument(
        "--verbalizer", "--label-words", dest="label_words", metavar="WORDS",
        help="label=word pairs, 'positive= good,negative= bad', or a .json file",
    )  # fmt: skip
    task.add_argument(
        "--text-column", metavar="NAME",
        help="instead of --template: column of the text for a BERT model with a head, whose labels are the target's",
    )  # fmt: skip
    task.add_argument("--text-pair-column", metavar="NAME", help="column of a second text beside it")
    task.add_argument("--label-column", default="label", metavar="NAME", help="column of the label (default: label)")
    task.add_argument("--source-template", metavar="TEXT", help="of the sources, where it differs")
    task.add_argument("--source-verbalizer", metavar="WORDS", help="of the sources, where it differs")
    cleaning = parser.add_argument_group("cleaning", "missing values and duplicates are always dropped and reported")
    cleaning.add_argument(
        "--normalization", type=choice("NFC", "NFKC", "none"), default="NFC", metavar="FORM",
        help="NFC, NFKC (also full-width forms to plain ones) or none (default: NFC)",
    )  # fmt: skip
    cleaning.add_argument("--max-characters", type=whole(1), metavar="N", help="longest text (default: no cap)")
    cleaning.add_argument(
        "--too-long", type=choice("drop", "cut"), metavar="NAME", help="drop or cut such texts (default: drop)"
    )
    cleaning.add_argument(
        "--balance", action="store_true", help="draw as many source rows of each label as the rarest has"
    )
    cleaning.add_argument(
        "--augment", type=whole(1), metavar="N",
        help="also train on N changed copies of every row: words left out or swapped, negations kept",
    )  # fmt: skip
    prompt = parser.add_argument_group("prompt and strategy")
    prompt.add_argument(
        "--method", type=choice(*METHODS), metavar="NAME",
        help="soft: virtual tokens before the text; prefix: keys and values in every layer (default: the bank's, soft)",
    )  # fmt: skip
    prompt.add_argument(
        "--num-virtual-tokens", type=whole(1), metavar="N", help="length (default: the bank's prompts', or 20)"
    )
    prompt.add_argument(
        "--steps", type=whole(1), default=60, metavar="N", help="optimiser steps on the target's shots (default: 60)"
    )
    prompt.add_argument("--source-steps", type=whole(1), metavar="N", help="optimiser steps on a source (default: 200)")
    prompt.add_argument(
        "--source-learning-rate", type=number, metavar="X", help="on a source (default: the method's own)"
    )
    prompt.add_argument(
        "--pool-sources", action="store_true",
        help="tune one prompt on the rows of all sources together instead of one on each (mostly better, where the "
        "sources have one task)",
    )  # fmt: skip
    prompt.add_argument(
        "--combine", default="best", metavar="NAME",
        help="start from the best source, or the mean, weighted or task_vectors of several (default: best)",
    )  # fmt: skip
    prompt.add_argument("--top-k", type=whole(1), default=1, metavar="N", help="sources that are combined (default: 1)")
    prompt.add_argument(
        "--measure", default="shot_loss", metavar="NAME",
        help="shot_loss, mmd, proxy_a_distance, or mean_token, token or task_vector with _cosine (default: shot_loss)",
    )  # fmt: skip
    prompt.add_argument("--joint", type=number, metavar="A", help="train on a*source + (1-a)*target with this a")
    prompt.add_argument(
        "--joint-schedule", metavar="NAME",
        help="constant, or linear or cosine from a to 0 (default: constant)",
    )  # fmt: skip
    prompt.add_argument("--anchor", type=number, metavar="W", help="stay near the start, with this weight")
    prompt.add_argument("--distill", type=number, metavar="W", help="learn the source's logits, with this weight")
    prompt.add_argument(
        "--distill-similarity", metavar="NAME",
        help="multiply the weight by this cosine of the source and a prompt tuned on the shots (PANDA)",
    )  # fmt: skip
    prompt.add_argument(
        "--fresh", action="store_true", help="start from a fresh prompt; the source only teaches (--distill, --anchor)"
    )
    prompt.add_argument(
        "--self-train", type=number, metavar="U",
        help="train on (1-u)*labelled + u*unlabelled texts, taught by the source prompt; 1: without the shots' labels",
    )  # fmt: skip
    prompt.add_argument(
        "--confidence", type=number, metavar="P",
        help="unlabelled texts count of which the source prompt is at least this sure (default: 0.9)",
    )  # fmt: skip
    prompt.add_argument(
        "--consistency", type=whole(1), metavar="N",
        help="the learner reads N changed copies of an unlabelled text instead of the text",
    )  # fmt: skip
    prompt.add_argument("--folds", type=whole(2), default=4, metavar="N", help="of the guard (default: 4)")
    prompt.add_argument(
        "--scratch-rates", default="3,1,0.3", metavar="X,X",
        help="learning rates of scratch, times the method's own; the best counts (default: 3,1,0.3)",
    )  # fmt: skip
    prompt.add_argument("--no-control", action="store_true", help="leave out the control with shuffled source labels")
    add_model_arguments(parser, "the embedded one")
    run = parser.add_argument_group("run")
    run.add_argument("--output", metavar="DIR", required=True, help="new folder for all results")
    run.add_argument("--resume", action="store_true", help="go on with the run in --output")
    add_config_arguments(parser, _SET_HERE)


def run(args: argparse.Namespace) -> Outcome:
    from ptengine.commands.loading import load_model, load_tokenizer, pick_device
    from ptengine.commands.recipe import Recipe, model_fingerprint
    from ptengine.training import TrainingConfig
    from ptengine.transfer.flow import run_flow
    from ptengine.transfer.flow_report import flow_report
    from ptengine.transfer.identity import identify
    from ptengine.transfer.report import write_report

    output = Path(args.output)
    if args.resume is False:
        check_output(output, hint="; --resume goes on with the run in it")
    training = TrainingConfig(
        output_dir=args.output, max_steps=args.steps, logging_steps=50, disable_tqdm=True, **config_options(args)
    )
    bank = _bank(args)
    settings = _settings(args, training.seed)  # refuses before a model is loaded
    task = labelled_task(args, args.target, "--verbalizer")
    source_task = _source_task(args, task)
    sources = _sources(args.source)
    device, dtype = pick_device(args.device), args.dtype or "float32"
    tokenizer, model = load_tokenizer(args.tokenizer, args.model), load_model(args.model, device, dtype, task)
    if bank is not None:
        settings = _like_the_bank(args, settings, bank, identify(model, tokenizer), task)
    result = run_flow(
        model, tokenizer, sources=sources, target=args.target, test=args.test, task=task, source_task=source_task,
        unlabelled=args.unlabelled, bank=bank, settings=settings, training=training,
        say=lambda text: print(text, file=sys.stderr),
    )  # fmt: skip
    Recipe(task, absolute(args.model), absolute(args.tokenizer), dtype, model_fingerprint(model, task)).write(output)
    report = flow_report(result, task, _stem(args.target))
    paths = write_report(output, report)
    data = {
        "command": "transfer",
        "output": args.output,
        "prompt": str(output / "prompt"),
        "report": {name: str(path) for name, path in paths.items()},
        **report.data,
    }
    return Outcome(data, tuple(_shown(args.output, report, paths)))


def _source_task(args: argparse.Namespace, task: LabelledTask) -> LabelledTask:
    if args.text_column is not None:
        refuse(args, "--text-column", "source_template", "source_verbalizer")
        return task
    template, words = args.source_template or args.template, args.source_verbalizer or args.label_words
    return classification_task(args.model, template, words, args.label_column, "--source-verbalizer")


def _bank(args: argparse.Namespace) -> PromptBank | None:
    """The bank, if one is named."""
    from ptengine.transfer import PromptBank

    if not args.source and args.bank is None:
        raise InputError("expected --source or --bank to transfer from, got neither")
    if args.bank is None:
        return None
    if not Path(args.bank).is_dir():
        raise InputError(f"expected --bank, the folder of a prompt bank, got {args.bank!r}, which is no folder")
    return PromptBank(args.bank)


def _like_the_bank(
    args: argparse.Namespace, settings: FlowSettings, bank: PromptBank, present: BackboneIdentity, task: LabelledTask
) -> FlowSettings:
    """Where they are not given, method and length are those of the bank's first prompt that can be a source."""
    short = {long: name for name, long in METHODS.items()}
    for card in (entry.card for entry in bank.list()):
        method = short.get(card.method)
        if method is not None and args.method in (None, method) and card.refusal(present, task) is None:
            length = args.num_virtual_tokens or card.num_virtual_tokens
            guard = replace(settings.guard, scratch_init=INITS[method])
            return replace(settings, method=card.method, num_virtual_tokens=length, init=INITS[method], guard=guard)
    return settings


def _settings(args: argparse.Namespace, seed: int) -> FlowSettings:
    from ptengine.transfer.augmentation import Augmentation
    from ptengine.transfer.cleaning import Cleaning
    from ptengine.transfer.flow import FlowSettings
    from ptengine.transfer.strategies import Anchor, Distill, Guard, Initialize, Joint, SelfTrain, Strategy

    try:
        rates = tuple(float(rate) for rate in args.scratch_rates.split(","))
    except ValueError:
        raise InputError(f"expected --scratch-rates as numbers with commas, got {args.scratch_rates!r}") from None
    if (args.self_train is None) != (args.unlabelled is None):
        raise InputError("expected --self-train and --unlabelled together, got one of them")
    if not args.source:
        require(args, "--source", *_OF_SOURCES)
    if args.max_characters is None:
        require(args, "--max-characters", "too_long")
    if args.joint is None:
        require(args, "--joint", "joint_schedule")
    if args.distill is None:
        require(args, "--distill", "distill_similarity")
    if args.self_train is None:
        require(args, "--self-train", "confidence", "consistency")
    method = args.method or "soft"
    return FlowSettings(
        method=METHODS[method],
        num_virtual_tokens=args.num_virtual_tokens or 20,
        init=INITS[method],
        shots=args.shots,
        test_rows=args.test_rows,
        source_steps=args.source_steps or 200,
        source_learning_rate=args.source_learning_rate,
        pool_sources=args.pool_sources,
        control=not args.no_control,
        cleaning=Cleaning(
            normalization=args.normalization,
            max_characters=args.max_characters,
            too_long=args.too_long or "drop",
            balance="downsample" if args.balance else "none",
            seed=seed,
        ),
        augmentation=None if args.augment is None else Augmentation(args.augment, seed=seed),
        strategy=Strategy(
            Initialize(args.combine, args.top_k, args.measure, fresh=args.fresh),
            joint=None if args.joint is None else Joint(args.joint, args.joint_schedule or "constant"),
            anchor=None if args.anchor is None else Anchor(args.anchor),
            distill=None if args.distill is None else Distill(args.distill, args.distill_similarity),
            self_train=None
            if args.self_train is None
            else SelfTrain(
                args.self_train,
                0.9 if args.confidence is None else args.confidence,
                views=None if args.consistency is None else Augmentation(args.consistency, seed=seed),
            ),
        ),
        guard=Guard(folds=args.folds, scratch_rates=rates, scratch_init=INITS[method]),
    )


def _sources(given: list[str]) -> dict[str, str]:
    """Name to file; a name is what stands before ``=``, or the file's own without its ending."""
    from ptengine.transfer.bank import check_name

    sources: dict[str, str] = {}
    for entry in given:
        name, equals, path = entry.partition("=")
        if not equals or os.path.exists(entry):  # which takes a name of any length, unlike that of Path
            name, path = _stem(entry), entry
        try:
            check_name(name)
        except InputError as error:
            raise InputError(f"--source NAME=FILE: {error}") from None
        if name in sources:
            raise InputError(f"expected --source files of different names (NAME=FILE gives one), got {name!r} twice")
        sources[name] = path
    return sources


def _shots(text: str) -> int | None:
    return None if text == "all" else whole(1)(text)


def _stem(path: str) -> str:
    return Path(path).stem


def _shown(output: str, report: Any, paths: dict[str, Path]) -> list[Any]:
    from rich.table import Table

    scores = report.tables[0]
    table = Table(title=scores.title)
    for index, column in enumerate(scores.columns):
        table.add_column(column, justify="right" if index else "left")
    for row in scores.rows:
        table.add_row(*("" if cell is None else f"{cell:.4f}" if isinstance(cell, float) else cell for cell in row))
    return [
        *report.summary,
        table,
        f"prompt in {output}/prompt, report in {paths['html']} (also report.md and report.json)",
        f"next: ptengine eval --prompt {output} --data FILE",
    ]
