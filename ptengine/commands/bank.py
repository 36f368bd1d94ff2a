"""`ptengine bank`: a folder of tuned prompts with cards, filled, listed, searched and compared."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ptengine.commands import Outcome
from ptengine.commands.options import add_model_arguments, check_output, choice, number, refuse, require, seed, whole
from ptengine.commands.task_options import labelled_task
from ptengine.errors import InputError

EXAMPLE = r"""  ptengine bank add --bank prompts --name phones --prompt out --data phones.csv
  ptengine bank list --bank prompts
  ptengine bank search --bank prompts --shots fruit.csv \
    --template 'Review: {text}\nGood or bad?' --label-words 'positive= good,negative= bad'
  ptengine bank compare --bank prompts --measure token_cosine
  ptengine bank carry --bank prompts --name phones --from models/small --model models/large --into phones-large
  ptengine bank carry --bank prompts --name phones --from models/small --model models/large --into phones-large \
    --method projector --data phones.csv --projector projector"""


_CARRYING = ("v2v_lin", "relative_anchors", "projector")
_BY_SHOTS = ("shot_loss", "mmd", "proxy_a_distance")
_BY_PROMPT = ("mean_token_cosine", "token_cosine")
_OF_SHOTS = ("template", "label_words", "text_column", "text_pair_column", "label_column", "max_length", "truncation")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(
        dest="action", metavar="ACTION", required=True, title="actions", prog="ptengine bank"
    )
    add = _action(actions, "add", "put a tuned prompt into a bank")
    add.add_argument("--prompt", metavar="DIR", required=True, help="output folder of ptengine tune or transfer")
    add.add_argument("--name", metavar="NAME", required=True, help="of the entry")
    add.add_argument("--data", metavar="FILE", help="what it was tuned on, recorded by name, hash and rows")
    add.add_argument("--initial", metavar="DIR", help="saved prompt it started from, kept for task vectors")
    add.add_argument("--note", metavar="TEXT", default="", help="free text")
    add.add_argument("--replace", action="store_true", help="put it in the place of an entry of that name")
    _action(actions, "list", "show a bank's entries")
    search = _action(actions, "search", "rank a bank's entries for a target")
    search.add_argument("--shots", metavar="FILE", help="a few rows of the target to rank by")
    search.add_argument("--template", metavar="TEXT", help="text of a row of --shots")
    search.add_argument("--label-words", metavar="WORDS", help="label=word pairs of --shots, or a .json file")
    search.add_argument("--text-column", metavar="NAME", help="of --shots, for BERT models whose prompts have a head")
    search.add_argument("--text-pair-column", metavar="NAME", help="of a second text of --shots")
    search.add_argument("--label-column", metavar="NAME", help="of --shots (default: label)")
    search.add_argument("--prompt", metavar="DIR", help="a prompt tuned on the target: rank by likeness to it")
    search.add_argument(
        "--measure", metavar="NAME", help="shot_loss, mmd or proxy_a_distance; mean_token_cosine or token_cosine"
    )
    search.add_argument("--max-length", type=whole(1), metavar="N", help="longest row in tokens, with shot_loss")
    search.add_argument("--truncation", action="store_true", help="cut rows that are longer, with shot_loss")
    add_model_arguments(
        search,
        "the embedded one, or that of --prompt",
        "the model's, or that of --prompt",
        "float32, or that of --prompt",
    )
    carry = _action(actions, "carry", "carry a soft prompt to another model that shares tokens with its own")
    carry.add_argument("--name", metavar="NAME", required=True, help="of the entry to carry")
    carry.add_argument("--from", dest="source", metavar="PATH", required=True, help="folder of the model it is for")
    carry.add_argument("--from-tokenizer", metavar="PATH", help="folder of that model's tokenizer (default: its own)")
    carry.add_argument("--into", metavar="NAME", required=True, help="name of the carried prompt in the bank")
    carry.add_argument(
        "--method", type=choice(*_CARRYING), default="v2v_lin", metavar="NAME",
        help="v2v_lin: linear between the vocabularies; relative_anchors: by likeness to shared tokens; projector: a "
        "network trained on the prompt's task with the model it goes to (default: v2v_lin)",
    )  # fmt: skip
    carry.add_argument("--data", metavar="FILE", help="rows of the prompt's task to train the projector on")
    carry.add_argument("--steps", type=whole(1), metavar="N", help="optimiser steps of the projector (default: 200)")
    carry.add_argument("--learning-rate", type=number, metavar="X", help="of the projector (default: by its start)")
    carry.add_argument("--projector", metavar="DIR", help="new folder for the projector's training and the projector")
    carry.add_argument("--max-length", type=whole(1), metavar="N", help="longest row of --data in tokens")
    carry.add_argument("--truncation", action="store_true", help="cut rows of --data that are longer")
    carry.add_argument("--seed", type=seed, metavar="N", help="of relative_anchors or projector (default: 0)")
    add_model_arguments(carry, "the embedded one")
    compare = _action(actions, "compare", "likeness of every two entries")
    compare.add_argument("--names", metavar="A,B", help="entries to compare (default: all)")
    compare.add_argument(
        "--measure", metavar="NAME", default="mean_token_cosine",
        help="mean_token_cosine, token_cosine, task_vector_cosine, mmd or proxy_a_distance (default: the first)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> Outcome:
    return {"add": _add, "list": _list, "search": _search, "compare": _compare, "carry": _carry}[args.action](args)


def _action(actions: Any, name: str, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(
        name, usage="%(prog)s [options]", help=summary, description=f"{summary[0].upper()}{summary[1:]}.",
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON object")
    parser.add_argument("--bank", metavar="DIR", required=True, help="folder of the bank")
    return parser


def _add(args: argparse.Namespace) -> Outcome:
    from ptengine.commands.recipe import find_prompt
    from ptengine.commands.session import load_with_head, open_prompt
    from ptengine.prompts import load_prompt
    from ptengine.transfer import PromptBank
    from ptengine.transfer.bank import check_name

    check_name(args.name)  # before models are loaded
    args.model = args.tokenizer = args.dtype = args.device = None  # those the prompt was tuned with
    session = open_prompt(args)
    folder, _ = find_prompt(args.prompt)
    prompt = load_with_head(folder, session.model, session.task)
    entry = PromptBank(args.bank).add(
        args.name, prompt, model=session.model, tokenizer=session.tokenizer, task=session.task, data=args.data,
        metrics=_metrics(folder), initial=None if args.initial is None else load_prompt(args.initial, session.model),
        note=args.note, replace=args.replace,
    )  # fmt: skip
    return Outcome({"command": "bank add", "entry": entry.card.to_json()}, (f"{entry.name} is in {entry.path}",))


def _metrics(folder: Path) -> dict[str, float]:
    """What training wrote beside the prompt: its last or best evaluation."""
    path = folder / "training.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
        return {name: value for name, value in found.items() if name not in ("step", "epoch")}
    except (ValueError, AttributeError) as error:
        raise InputError(f"expected a json object, got {str(path)!r}: {error}") from error


def _list(args: argparse.Namespace) -> Outcome:
    from rich.table import Table

    entries = _bank(args.bank).list()
    table = Table(title=f"{len(entries)} prompts in {args.bank}")
    for column in ("name", "method", "tokens", "backbone", "data", "metrics", "created"):
        table.add_column(column)
    for entry in entries:
        card = entry.card
        metrics = ", ".join(f"{name} {value:.3f}" for name, value in list(card.metrics.items())[:2])
        backbone = f"{card.backbone.facts.model_type} {card.backbone.fingerprint[:8]}"
        data = "" if card.data is None else f"{card.data.name}, {card.data.rows} rows"
        table.add_row(card.name, card.method, str(card.num_virtual_tokens), backbone, data, metrics, card.created[:10])
    return Outcome({"command": "bank list", "entries": [entry.card.to_json() for entry in entries]}, (table,))


def _search(args: argparse.Namespace) -> Outcome:
    from rich.table import Table

    measure = args.measure or ("shot_loss" if args.shots is not None else "mean_token_cosine")
    given = [name for name in ("shots", "prompt") if getattr(args, name) is not None]
    if len(given) != 1 or measure not in {"shots": _BY_SHOTS, "prompt": _BY_PROMPT}[given[0]]:
        raise InputError(
            f"expected --shots with {', '.join(_BY_SHOTS)}, or --prompt with {' or '.join(_BY_PROMPT)}, got "
            f"{' and '.join(f'--{name}' for name in given) or 'neither'} with {measure}"
        )
    if args.shots is None:
        require(args, "--shots", *_OF_SHOTS)
    if measure in _BY_SHOTS and measure != "shot_loss":
        refuse(args, f"--measure {measure}", "max_length", "truncation")
    found = _by_shots(args, measure) if args.shots is not None else _by_prompt(args, measure)
    table = Table(title=f"{args.bank} by {measure}")
    for column in ("name", measure, "accuracy"):
        table.add_column(column)
    for match in found.matches:
        accuracy = match.details.get("accuracy")
        table.add_row(match.entry.name, f"{match.score:.4f}", "" if accuracy is None else f"{accuracy:.4f}")
    refused = [f"not asked: {name}, since {reason}" for name, reason in found.refused.items()]
    data = {
        "command": "bank search",
        "measure": measure,
        "matches": [
            {"name": match.entry.name, "score": match.score, "metrics": dict(match.details)} for match in found.matches
        ],
        "refused": dict(found.refused),
    }
    return Outcome(data, (table, *refused))


def _by_shots(args: argparse.Namespace, measure: str) -> Any:
    from ptengine.commands.loading import load_model, load_tokenizer, pick_device

    bank, task = _bank(args.bank), labelled_task(args, args.shots)
    device = pick_device(args.device)
    tokenizer = load_tokenizer(args.tokenizer, args.model)
    model = load_model(args.model, device, args.dtype or "float32", task)
    given = {name: getattr(args, name) for name in ("max_length", "truncation") if getattr(args, name)}
    return bank.search(model=model, tokenizer=tokenizer, measure=measure, task=task, shots=args.shots, **given)


def _by_prompt(args: argparse.Namespace, measure: str) -> Any:
    from ptengine.commands.session import open_prompt

    bank = _bank(args.bank)
    session = open_prompt(args)
    return bank.search(
        model=session.model, tokenizer=session.tokenizer, measure=measure, task=session.task, prompt=session.prompt
    )  # the task: whose labels a prompt's head must have


def _carry(args: argparse.Namespace) -> Outcome:
    from ptengine.commands.loading import load_model, load_tokenizer, pick_device
    from ptengine.transfer import carry_prompt
    from ptengine.transfer.bank import check_name

    _check_carry(args)
    check_name(args.into)  # before models are loaded and anything is trained for it
    bank = _bank(args.bank)
    entry = bank.entry(args.name)
    if any(other.name == args.into for other in bank.list()):
        raise InputError(f"expected --into with a name that is free in the bank, got {args.into!r}")
    device = pick_device(args.device)
    target_tokenizer = load_tokenizer(args.tokenizer, args.model)
    target = load_model(args.model, device, args.dtype or "float32")
    source_tokenizer = load_tokenizer(args.from_tokenizer, args.source)
    source = load_model(args.source, device, entry.card.backbone.dtype)
    prompt = entry.load(source, source_tokenizer)
    pair = (source, source_tokenizer, target, target_tokenizer)
    projector: dict[str, Any] = {}
    if args.method == "projector":
        carried, projector = _projected(args, entry, prompt, pair)
    else:
        seed = {} if args.seed is None else {"seed": args.seed}
        carried = carry_prompt(prompt, *pair, args.method, **seed)
    added = bank.add(
        args.into, carried, model=target, tokenizer=target_tokenizer, task=entry.card.task, data=args.data,
        derived_from=[args.name], note=f"carried by {args.method}",
    )  # fmt: skip
    data = {"command": "bank carry", "method": args.method, "entry": added.card.to_json(), **projector}
    shown = (
        f"{added.name} is in {added.path}: a start, not a promise; ptengine bank search --shots says what it is worth"
    )
    return Outcome(data, (shown,))


def _check_carry(args: argparse.Namespace) -> None:
    if args.method == "projector":
        for name in ("data", "projector"):
            if getattr(args, name) is None:
                raise InputError(f"expected --{name} with --method projector, got none")
        check_output(args.projector, "--projector", "; name another one")
        return
    only = ("data", "projector", "steps", "learning_rate", "max_length", "truncation")
    require(args, "--method projector", *only)
    if args.method == "v2v_lin":
        refuse(args, "--method v2v_lin", "seed")


def _projected(args: argparse.Namespace, entry: Any, prompt: Any, pair: tuple[Any, ...]) -> tuple[Any, dict[str, Any]]:
    """The carried prompt, and what there is to say of the projector, which is kept beside its training."""
    from ptengine.training import TrainingConfig
    from ptengine.transfer import ProjectorLesson, tune_projector, vocabulary_map

    config = TrainingConfig(
        output_dir=args.projector, max_steps=args.steps or 200, learning_rate=args.learning_rate, seed=args.seed or 0,
        max_length=args.max_length, truncation=args.truncation, disable_tqdm=True,
    )  # fmt: skip
    lesson = ProjectorLesson(prompt, entry.card.task, args.data)
    projector, result = tune_projector(pair[2], pair[3], [lesson], config, mapping=vocabulary_map(*pair))
    path = projector.save(Path(args.projector) / "projector", folded=False)
    return projector.fold(), {"projector": str(path), "first_loss": result.losses[0], "last_loss": result.losses[-1]}


def _compare(args: argparse.Namespace) -> Outcome:
    from rich.table import Table

    names = args.names.split(",") if args.names else []
    found = _bank(args.bank).compare(args.measure, names)
    table = Table(title=f"{args.bank} by {args.measure}")
    table.add_column("")
    for name in found:
        table.add_column(name, justify="right")
    for name, row in found.items():
        table.add_row(name, *(f"{value:.3f}" for value in row.values()))
    return Outcome({"command": "bank compare", "measure": args.measure, "table": found}, (table,))


def _bank(path: str) -> Any:
    from ptengine.transfer import PromptBank

    if not Path(path).is_dir():
        raise InputError(f"expected --bank, the folder of a prompt bank, got {path!r}, which is no folder")
    return PromptBank(path)
