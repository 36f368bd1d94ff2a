"""Bridging to a target in rounds: words are generated, embedded as soft prompts, optimised together, and selected.

    output_dir/plan.json                   what the run starts from; going on with another one is refused
    output_dir/round-<i>/<candidate>/      the runs of a round, which share every batch
    output_dir/prompt/, bridge.json        the best prompt of all rounds, and what every round found

Knows words, prompts and the trainer of many prompts; no bank.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from ptengine.backbone.spec import backbone_spec
from ptengine.checks import check_whole
from ptengine.data import ClassificationTask, load_rows, named_rows
from ptengine.data.sources import name_of
from ptengine.data.tasks import row_labels
from ptengine.errors import InputError, TrainingDiverged
from ptengine.files import make_directory, write_json_atomic
from ptengine.prompts import SoftPrompt
from ptengine.prompts.base import Prompt
from ptengine.prompts.facts import embedding_scale
from ptengine.training import PromptSet, Trainer, TrainingConfig
from ptengine.training.evaluation import evaluation_options
from ptengine.training.preparation import DataSource, check_prompt
from ptengine.transfer.arithmetic import start_from
from ptengine.transfer.bank import check_name, weights_sha256
from ptengine.transfer.guard import SCRATCH, folds
from ptengine.transfer.run import hold_plan
from ptengine.transfer.similarity import shot_metrics
from ptengine.transfer.words import PromptWord, domain_terms, words_prompt

__all__ = ["BridgeResult", "BridgeRound", "bridge", "nearest_words"]

_NEAREST = 50
_PARTS = 4


@dataclass(frozen=True)
class BridgeRound:
    """Attributes:
    losses: candidate to its loss on the held-back shots after optimisation; those that diverged are left out.
    words: candidate to the words it was embedded from, for those that were.
    kept: the candidates that the next round goes on with, best first.
    """

    losses: Mapping[str, float]
    words: Mapping[str, Sequence[str]]
    kept: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        words = {name: list(some) for name, some in self.words.items()}
        return {"losses": dict(self.losses), "words": words, "kept": list(self.kept)}


@dataclass(frozen=True)
class BridgeResult:
    """Attributes:
    prompt: the one with the lowest held-back loss of all rounds.
    name, round: which candidate it was, and in which round, counted from 0.
    loss: its loss on the held-back shots, in nats.
    rounds: what every round found.
    """

    prompt: Prompt
    name: str
    round: int
    loss: float
    rounds: Sequence[BridgeRound]

    def to_json(self) -> dict[str, Any]:
        rounds = [one.to_json() for one in self.rounds]
        return {"name": self.name, "round": self.round, "loss": self.loss, "rounds": rounds}


def bridge(
    model: Any,
    tokenizer: Any,
    *,
    task: ClassificationTask,
    shots: DataSource,
    texts: Sequence[str],
    background: Sequence[str],
    training: TrainingConfig,
    sources: Mapping[str, Prompt] | None = None,
    num_virtual_tokens: int = 20,
    rounds: int = 3,
    samples: int = 2,
    keep: int = 2,
    resume: bool = False,
) -> BridgeResult:
    """Find a soft prompt for a target through words of its domain and prompts of others.

    The first round's candidates are embedded from the target's domain terms (by log odds, by tf-idf, and `samples`
    random choices among both), and beside them stand `sources` and one from scratch. All are optimised at once on three
    quarters of the shots, and the `keep` with the lowest loss on the last quarter go on. Each of these enters the next
    round twice: as it is, and embedded anew from the words that its virtual tokens now lie nearest to, unless those
    have been tried. The best of all rounds is the result, so what no word improves ends as scratch, or as a source.

    Args:
        model, tokenizer: the frozen causal backbone.
        task: the target's.
        shots: labelled rows of the target, at least four of every label.
        texts, background: texts of the target and of other domains, for `domain_terms`; no labels.
        training: of every candidate in every round; `learning_rate` None takes that of each start. `output_dir` is the
            folder of everything.
        sources: name, as in a bank, to a prompt of this backbone, of any length, that is or folds to a `SoftPrompt`.
        num_virtual_tokens: of prompts that are embedded.
        rounds, samples, keep: whole numbers of at least 1; `samples` may be 0.
        resume: go on in an `output_dir` that holds such a run; `rounds` may be another number.

    Raises:
        InputError: what does not fit, before any training; words, prompts or settings that differ from those of the run
            to go on with; every candidate diverged; as `PromptSet`.
    """
    counts = {"num_virtual_tokens": num_virtual_tokens, "rounds": rounds, "keep": keep, "samples": samples}
    for name, value in counts.items():
        check_whole(name, value, 0 if name == "samples" else 1)
    if not isinstance(task, ClassificationTask):
        raise InputError(f"expected a task whose labels are words to bridge to, got {type(task).__name__}")
    if training.eval_strategy not in (None, "no"):
        raise InputError(
            f"expected eval_strategy off, since bridging holds back rows itself, got {training.eval_strategy!r}"
        )
    dataset = load_rows(shots, name="shots")
    labels = row_labels(task, dataset, name_of(shots, "shots"))
    rows = named_rows(dataset)
    for name in sources or {}:
        check_name(name)
    kept, away = folds(labels, len(rows), _PARTS, training.seed)[0]
    work = _Work(model, tokenizer, task, training, [rows[i] for i in kept], [rows[i] for i in away], num_virtual_tokens)
    pool = work.pool(texts, background)
    tried: set[tuple[str, ...]] = set()
    candidates, words = work.first(pool, sources or {}, samples, tried)
    plan = {
        "keep": keep,
        "terms": {name: [word.text for word in some] for name, some in pool.items()},
        "starts": {name: weights_sha256(prompt.fold()) for name, prompt in candidates.items()},
    }
    history: list[BridgeRound] = []
    best: tuple[float, int, str, Prompt] | None = None
    for number in range(rounds):
        together = work.together(candidates, number)
        if number == 0:
            hold_plan(make_directory(training.output_dir) / "plan.json", plan, resume)
        losses = work.optimized(candidates, together, resume)
        order = sorted(losses, key=lambda name: (losses[name], name))
        history.append(BridgeRound(losses, words, order[:keep]))
        if best is None or losses[order[0]] < best[0]:
            best = (losses[order[0]], number, order[0], candidates[order[0]])
        candidates, words = work.following({name: candidates[name] for name in order[:keep]}, pool, tried)
    assert best is not None  # there is a round
    result = BridgeResult(best[3].fold(), best[2], best[1], best[0], history)
    result.prompt.save(Path(training.output_dir) / "prompt")
    write_json_atomic(Path(training.output_dir) / "bridge.json", result.to_json())
    return result


@torch.no_grad()
def nearest_words(model: Any, tokenizer: Any, prompt: Prompt) -> list[str]:
    """For each virtual token the word of the vocabulary with the greatest cosine, each once, in their order.

    A word has at least two letters or digits, or one of a script without blanks; special tokens and punctuation have
    none. A virtual token that is far from all words, further than from fifty other tokens, is left out.

    Raises:
        InputError: a prompt that is and folds to no `SoftPrompt`.
    """
    folded = _soft(prompt, model, "prompt")
    spec = backbone_spec(model)
    table = embedding_scale(spec) * spec.word_embeddings.weight.detach().float()  # [V, d]
    embeds = folded.embeds.to(table.device).float()  # [P, d]
    cosines = F.normalize(embeds, dim=1) @ F.normalize(table, dim=1).T  # [P, V]
    special = set(tokenizer.all_special_ids)
    found: list[str] = []
    for ids in cosines.topk(min(_NEAREST, cosines.shape[1]), dim=1).indices.tolist():
        readable = (tokenizer.decode([i]).strip() for i in ids if i not in special)
        word = next((text for text in readable if _is_word(text)), None)
        if word is not None and word not in found:
            found.append(word)
    return found


@dataclass(frozen=True)
class _Work:
    model: Any
    tokenizer: Any
    task: ClassificationTask
    training: TrainingConfig
    train: list[dict[str, Any]]
    held: list[dict[str, Any]]
    count: int

    def pool(self, texts: Sequence[str], background: Sequence[str]) -> dict[str, list[PromptWord]]:
        """Measure to the words that set the target apart, best first."""
        most = 3 * self.count
        return {name: domain_terms(texts, background, top_k=most, measure=name) for name in ("log_odds", "tfidf")}

    def first(
        self,
        pool: Mapping[str, Sequence[PromptWord]],
        sources: Mapping[str, Prompt],
        samples: int,
        tried: set[tuple[str, ...]],
    ) -> tuple[dict[str, Prompt], dict[str, list[str]]]:
        """The candidates of the first round, and the words of those that are made of words, no list twice."""
        union = sorted({word.text for some in pool.values() for word in some})
        words = {name: [word.text for word in some[: self.count]] for name, some in pool.items()}
        for number in range(samples):
            draw = random.Random(f"{self.training.seed} {number}")
            words[f"sample-{number}"] = draw.sample(union, min(self.count, len(union)))
        words = {name: some for name, some in words.items() if _new(some, tried)}
        candidates: dict[str, Prompt] = {name: self.embedded(some) for name, some in words.items()}
        candidates[SCRATCH] = SoftPrompt(
            self.model, self.count, init="sampled_vocab", tokenizer=self.tokenizer, seed=self.training.seed
        )
        for name, source in sources.items():
            if name in candidates:
                raise InputError(f"expected sources with names that no candidate has, got {name!r}")
            candidates[name] = start_from(self.model, _soft(source, self.model, f"source {name!r}"))
        return candidates, words

    def following(
        self, survivors: Mapping[str, Prompt], pool: Mapping[str, Sequence[PromptWord]], tried: set[tuple[str, ...]]
    ) -> tuple[dict[str, Prompt], dict[str, list[str]]]:
        """Survivors as they are, and embedded anew from the words they lie nearest to, domain terms filling up."""
        candidates: dict[str, Prompt] = {}
        words: dict[str, list[str]] = {}
        for name, prompt in survivors.items():
            candidates[name] = start_from(self.model, prompt)
            read = nearest_words(self.model, self.tokenizer, prompt)
            rest = [word.text for word in pool["log_odds"] if word.text not in read]
            again, some = f"{name}-read", [*read, *rest][: self.count]
            while again in survivors or again in candidates:
                again += "-read"
            if _new(some, tried):
                words[again] = some
                candidates[again] = self.embedded(some)
        return candidates, words

    def embedded(self, words: Sequence[str]) -> SoftPrompt:
        return words_prompt(self.model, self.tokenizer, words, self.count, seed=self.training.seed)

    def together(self, candidates: Mapping[str, Prompt], number: int) -> PromptSet:
        """All candidates of a round, in one batch a step."""
        folder = Path(self.training.output_dir) / f"round-{number}"
        members = [
            Trainer(
                self.model, prompt, self.train, None, replace(self.training, output_dir=str(folder / name)),
                task=self.task, tokenizer=self.tokenizer,
            )
            for name, prompt in candidates.items()
        ]  # fmt: skip
        return PromptSet(members, folder)

    def optimized(self, candidates: Mapping[str, Prompt], together: PromptSet, resume: bool) -> dict[str, float]:
        """Train all candidates; name to loss on the held-back rows."""
        result = together.fit(resume=resume)
        options = evaluation_options(self.training)
        losses = {
            name: shot_metrics(self.model, self.tokenizer, self.task, self.held, prompt, **options)["loss"]
            for (name, prompt), run in zip(candidates.items(), result.members, strict=True)
            if not isinstance(run, TrainingDiverged)
        }
        if not losses:
            raise InputError(
                f"expected a candidate that can be trained, but all in {str(together.output_dir)!r} diverged"
            )
        return losses


def _new(words: Sequence[str], tried: set[tuple[str, ...]]) -> bool:
    """Whether these words, in their order, come up for the first time."""
    known = tuple(words) in tried
    tried.add(tuple(words))
    return not known


def _soft(prompt: Prompt, model: Any, name: str) -> SoftPrompt:
    check_prompt(prompt, model)
    folded = prompt.fold()
    if not isinstance(folded, SoftPrompt):
        raise InputError(f"expected {name} that is or folds to a SoftPrompt, got {prompt.method!r}")
    return folded


def _is_word(text: str) -> bool:
    letters = [c for c in text if c.isalnum()]
    return len(letters) == len(text) and (len(letters) > 1 or (len(letters) == 1 and ord(letters[0]) >= 0x2E80))
