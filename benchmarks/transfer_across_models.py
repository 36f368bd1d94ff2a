"""Zero-shot transfer across models: does a soft prompt say to another backbone what it said to its own?

    python benchmarks/transfer_across_models.py --language zh --models ../backbones/zh-large ../backbones/zh-small \\
        --out ../across_zh --json benchmarks/results/transfer_across_zh.json

Every domain of `../shared/data/online_shopping_zh` (zh) or `fdu_mtl` (en) has a soft prompt tuned on its training rows
for each model (transfer_lab.py; kept in --out, so a run that was cut off goes on). Each is carried to every other model
by each method of `ptengine.transfer.carry_prompt` and scored on the domain's test rows, without a step of training,
beside

    projector   a network tuned on half of the domains (their prompts, and their rows on the target model) carries the
                prompts of the other half
    no_prompt   the target model alone
    random      the prompt times a random matrix of the carried prompt's root mean square; the mean of five of them
    lessons     a fresh prompt of the target model tuned on the rows that the projector saw, by as many steps: what they
                teach without any prompt of the source model
    own         the domain's prompt tuned for the target model itself: what could be had

A pair is (source model, target model, domain). Nothing is picked on test rows. The models must not know labelled rows
of the domains: those of train_transfer_backbone.py and train_masked_backbone.py do not.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from train_step import SHARED, environment
from transfer_lab import LANGUAGES, Fit, Lab

from ptengine.backbone import VirtualTokens
from ptengine.files import write_json_atomic
from ptengine.prompts import ProjectedPrompt
from ptengine.prompts.base import Prompt
from ptengine.transfer import ProjectorLesson, carry_prompt, tune_projector, vocabulary_map
from ptengine.transfer.across_models import CARRY_METHODS

RANDOM_MATRICES = 5


def random_rows(given: torch.Tensor, like: torch.Tensor, seed: int) -> torch.Tensor:
    """`given` [P, d_s] times a random matrix, with the root mean square of `like` [P, d_t]."""
    generator = torch.Generator().manual_seed(seed)
    rows = given @ torch.randn(given.shape[1], like.shape[1], generator=generator)  # [P, d_t]
    return rows * (like.square().mean() / rows.square().mean()).sqrt()


def soft_rows(prompt: Any) -> torch.Tensor:
    lowered = prompt.lower()
    assert isinstance(lowered, VirtualTokens)
    return lowered.embeds.detach().float().cpu()  # [P, d]


@dataclass(frozen=True)
class Lessons:
    """What half of the domains taught a target model: a `projector` from a source model's prompts, and a prompt."""

    projector: ProjectedPrompt
    alone: Prompt


def learn(source: Lab, target: Lab, domains: Sequence[str], steps: int) -> Lessons:
    rows = {domain: target.rows(domain, "train") for domain in domains}
    lessons = [
        ProjectorLesson(source.source("soft", "sources", domain), target.task, rows[domain]) for domain in domains
    ]
    mapping = vocabulary_map(source.model, source.tokenizer, target.model, target.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        projector, _ = tune_projector(
            target.model, target.tokenizer, lessons, target.config(folder, 0, max_steps=steps), mapping=mapping
        )
    alone = target.fresh("soft", 0)
    every = [row for its in rows.values() for row in its]
    target.fit(Fit(alone, every, None, steps, steps, alone.default_learning_rate(), 0))
    return Lessons(projector, alone)


def run_pair(source: Lab, target: Lab, domain: str, test_rows: int, lessons: Lessons) -> dict[str, float]:
    prompt = source.source("soft", "sources", domain)
    test = target.encode(domain, "test", test_rows)
    own = target.source("soft", "sources", domain)
    found = {"no_prompt": target.accuracy(None, test), "own": target.accuracy(own, test)}
    for method in CARRY_METHODS:
        carried = carry_prompt(prompt, source.model, source.tokenizer, target.model, target.tokenizer, method)
        found[method] = target.accuracy(carried, test)
    found["projector"] = target.accuracy(lessons.projector.project(prompt), test)
    found["lessons"] = target.accuracy(lessons.alone, test)
    scores = []
    for seed in range(RANDOM_MATRICES):
        anything = target.fresh("soft", seed)
        with torch.no_grad():
            anything.embeds.copy_(random_rows(soft_rows(prompt), soft_rows(carried), seed))
        scores.append(target.accuracy(anything, test))
    return found | {"random": statistics.mean(scores)}


def summary(pairs: dict[str, dict[str, float]]) -> dict[str, Any]:
    found: dict[str, Any] = {"pairs": len(pairs)}
    names = list(next(iter(pairs.values())))
    found["accuracy"] = {name: statistics.mean(pair[name] for pair in pairs.values()) for name in names}
    for method in (*CARRY_METHODS, "projector"):
        wins = [pair[method] > max(pair["no_prompt"], pair["random"]) for pair in pairs.values()]
        found[f"{method}_beats_no_prompt_and_random"] = statistics.mean(wins)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language", choices=tuple(LANGUAGES), required=True)
    parser.add_argument("--models", type=Path, nargs="+", metavar="PATH", required=True, help="two or more checkpoints")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="a folder of prompts for each model")
    parser.add_argument("--json", type=Path, metavar="FILE", required=True)
    parser.add_argument("--data", type=Path, default=SHARED / "data")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--test-rows", type=int, default=300, help="of a domain, at most (default 300)")
    parser.add_argument("--source-steps", type=int, default=200, help="(default 200)")
    parser.add_argument("--projector-steps", type=int, default=100, help="(default 100)")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a row (default 128)")
    args = parser.parse_args()
    if len({path.name for path in args.models}) < 2:
        parser.error(f"argument --models: expected two or more of different names, got {args.models}")
    labs = {}
    for path in args.models:
        lab = Lab.open(
            path, args.language, args.device, args.out / path.name, args.data, max_length=args.max_length,
            virtual_tokens=8, source_steps=args.source_steps,
        )  # fmt: skip
        lab.make_sources("soft", "sources")
        labs[path.name] = lab
    pairs: dict[str, dict[str, float]] = {}
    for (name, source), (other, target) in itertools.permutations(labs.items(), 2):
        domains = source.domains()
        halves = domains[::2], domains[1::2]
        for carried, taught in (halves, halves[::-1]):
            lessons = learn(source, target, taught, args.projector_steps)
            for domain in carried:
                key = f"{name} to {other}, {domain}"
                pairs[key] = run_pair(source, target, domain, args.test_rows, lessons)
                print(f"{key}: {pairs[key]}", flush=True)
    facts = [path / "training.json" for path in args.models]
    result = {
        "command": "python " + " ".join(["benchmarks/transfer_across_models.py", *sys.argv[1:]]),
        "environment": environment(),
        "backbones": [json.loads(path.read_text()) if path.exists() else str(path.parent) for path in facts],
        "settings": {
            "test_rows": args.test_rows,
            "source_steps": args.source_steps,
            "projector_steps": args.projector_steps,
            "max_length": args.max_length,
        },
        "summary": summary(pairs),
        "pairs": pairs,
    }
    write_json_atomic(args.json, result)
    print(json.dumps(result["summary"], indent=1))


if __name__ == "__main__":
    main()
