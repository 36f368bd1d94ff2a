"""A prompt bank: a folder of tuned prompts with cards, to be listed, compared and searched.

    bank/<name>/card.json              what it was trained for, on what, and for which backbone
    bank/<name>/prompt.*               the prompt as `Prompt.save` writes it
    bank/<name>/initial/prompt.*       its first numbers P0, where they were kept
    bank/<name>/domain.safetensors     embeddings of texts it was tuned on, where its data was named

An entry appears in one rename, whole or not at all. Prompts of several backbones may lie in one bank; one that is not
of the backbone and tokenizer at hand is never handed out. Knows saved prompts and cards; nothing of training.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ptengine.backbone.spec import backbone_spec
from ptengine.data import Task
from ptengine.data.serialization import task_to_json
from ptengine.errors import InputError
from ptengine.files import TEMPORARY_PREFIX, make_directory, save_safetensors_atomic, write_json_atomic
from ptengine.prompts.base import Prompt
from ptengine.prompts.headed import without_head
from ptengine.prompts.io import load_prompt, read_prompt
from ptengine.training.folders import clean_leftovers, exclusive, write_folder
from ptengine.training.preparation import DataSource, check_own_head, check_prompt
from ptengine.transfer.arithmetic import form_of
from ptengine.transfer.cards import PromptCard, checked_metrics, data_facts
from ptengine.transfer.domains import DOMAIN_MEASURES, domain_distance, domain_embeddings, domain_texts
from ptengine.transfer.identity import BackboneIdentity, identify
from ptengine.transfer.similarity import PROMPT_MEASURES, prompt_similarity, require_finite, shot_metrics

__all__ = ["BankEntry", "Match", "PromptBank", "Search", "check_name", "weights_sha256"]

CARD_NAME = "card.json"
INITIAL_NAME = "initial"
DOMAIN_NAME = "domain.safetensors"

_NAME = re.compile(r"\w[\w.-]{0,79}")
_MOST_BYTES = 240  # of 255 in the name of a file: source-NAME.jsonl, .old-NAME-12345678


def check_name(name: Any) -> None:
    """Raise `InputError` where no entry, or source of a transfer, can be called `name`."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(f"expected a name of at most 80 letters, digits, '_', '-' or '.', got {name!r}")
    if len(name.encode()) > _MOST_BYTES:
        raise InputError(f"expected a name of at most {_MOST_BYTES} bytes in UTF-8, got {len(name.encode())}: {name!r}")


@dataclass(frozen=True)
class BankEntry:
    """Attributes:
    path: the entry's folder.
    card: what its card says.
    """

    path: Path
    card: PromptCard

    @property
    def name(self) -> str:
        return self.card.name

    def load(self, model: Any, tokenizer: Any) -> Prompt:
        """The prompt, on the model's device.

        Raises:
            InputError: it was made for another backbone or tokenizer, with what differs and, for a soft prompt of
                another backbone, the bridge that can carry it (`carry_prompt`); or its files are damaged.
        """
        self._require(identify(model, tokenizer))
        return load_prompt(self.path, model)

    def load_initial(self, model: Any, tokenizer: Any) -> Prompt:
        """The numbers it started from, P0; raises as `load`, and where they were not kept."""
        self._require(identify(model, tokenizer))
        if self.card.initial_sha256 is None:
            raise InputError(f"expected bank entry {self.name!r} with its initial prompt P0, but it was added without")
        return load_prompt(self.path / INITIAL_NAME, model)

    def read(self) -> tuple[Prompt, Prompt | None]:
        """The prompt and P0 (or None) on the CPU, without a model: for comparisons only."""
        prompt = read_prompt(self.path)
        return prompt, None if self.card.initial_sha256 is None else read_prompt(self.path / INITIAL_NAME)

    def domain(self) -> Tensor:
        """The frozen backbone's embeddings of texts it was tuned on: fp32 [n, d].

        Raises:
            InputError: it was added without data, or the file is damaged or missing.
        """
        if not self.card.domain_texts:
            raise InputError(f"expected bank entry {self.name!r} with data it was tuned on, but it was added without")
        path = self.path / DOMAIN_NAME
        try:
            found = load_file(path)["embeddings"]
        except (OSError, SafetensorError, KeyError) as error:
            raise InputError(f"expected embeddings in the file {str(path)!r}: {error}") from error
        if found.dim() != 2 or len(found) != self.card.domain_texts:
            raise InputError(
                f"expected {self.card.domain_texts} embeddings as on the card, got {list(found.shape)} in {str(path)!r}"
            )
        return found

    def _require(self, present: BackboneIdentity) -> None:
        reason = self.card.refusal(present)
        if reason is not None:
            raise InputError(f"expected a prompt of this model in bank entry {self.name!r}, but {reason}")


@dataclass(frozen=True)
class Match:
    """One answer of a search: an entry, its score, and every number the measure gave."""

    entry: BankEntry
    score: float
    details: Mapping[str, float]


@dataclass(frozen=True)
class Search:
    """Attributes:
    measure: what `matches` are ordered by.
    matches: best first.
    refused: name to reason of the entries that could not be asked: of another backbone, method or start, damaged, or
        with numbers or a score that are not finite.
    """

    measure: str
    matches: tuple[Match, ...]
    refused: Mapping[str, str]


class PromptBank:
    """The bank in the folder `path`, which need not exist before something is added.

    Raises:
        InputError: something that is no folder stands at `path`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"expected the folder of a prompt bank, got {str(self.path)!r}, which is no folder")

    def add(
        self,
        name: str,
        prompt: Prompt,
        *,
        model: Any,
        tokenizer: Any,
        task: Task,
        data: DataSource | None = None,
        metrics: Mapping[str, float] | None = None,
        initial: Prompt | None = None,
        derived_from: Sequence[str] = (),
        note: str = "",
        replace: bool = False,
    ) -> BankEntry:
        """Save `prompt`, folded, with a card.

        Args:
            name: of the entry: letters (of any script), digits, ``_``, ``-`` and ``.``, at most 80, and 240 bytes.
            prompt: the tuned prompt; of a task with a trained head a `HeadedPrompt`.
            model, tokenizer: what it was tuned with; recorded by content.
            task: what it was tuned for.
            data: what it was tuned on; recorded by name, hash and number of rows, and by the model's embeddings of 200
                texts at most, for distances between domains (none of an encoder-decoder, which embeds no text alone).
            metrics: what it scored, name to finite number.
            initial: its first numbers P0, kept for task vectors.
            derived_from: the entries it was transferred from.
            note: free text.
            replace: put it in the place of an entry of that name.

        Raises:
            InputError: the name is taken or none; the prompt is of another backbone; `initial` is of another method,
                shape or settings; a number of the two or a metric is not finite; the bank cannot be written.
        """
        check_name(name)
        where = self.path / name
        if where.exists() and not replace:
            raise InputError(
                f"expected a name that is free in the bank {str(self.path)!r}, got {name!r}; with replace=True "
                "(--replace) the new entry takes its place"
            )
        check_prompt(prompt, model)
        task_to_json(task)  # refuses what is no task before anything is written
        check_own_head(task, prompt)
        folded = prompt.fold()
        start = None if initial is None else initial.fold()
        if start is not None and form_of(start) != form_of(folded):
            raise InputError(f"expected an initial prompt of the form {form_of(folded)}, got {form_of(start)}")
        for one in (folded, start):
            if one is not None:
                require_finite(one)
        domain = None
        if data is not None and backbone_spec(model).kind != "seq2seq":
            domain = domain_embeddings(model, tokenizer, domain_texts(data, task))
        card = PromptCard(
            name=name,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            method=without_head(folded).method,
            num_virtual_tokens=folded.num_virtual_tokens,
            task=task,
            data=None if data is None else data_facts(data),
            metrics=checked_metrics(metrics or {}, f"bank entry {name!r}"),
            backbone=identify(model, tokenizer),
            initial_sha256=None if start is None else weights_sha256(start),
            derived_from=tuple(derived_from),
            note=note,
            domain_texts=0 if domain is None else len(domain),
        )

        def write(folder: Path) -> None:
            folded.save(folder)
            if start is not None:
                start.save(folder / INITIAL_NAME)
            if domain is not None:
                save_safetensors_atomic(folder / DOMAIN_NAME, {"embeddings": domain})
            write_json_atomic(folder / CARD_NAME, card.to_json())

        make_directory(self.path)
        with self._held():
            if where.exists() and not replace:  # added by another process meanwhile
                raise InputError(f"expected a name that is free in the bank, got {name!r}, which just came in")
            write_folder(where, write)
        return BankEntry(where, card)

    def take(self, entry: BankEntry, *, replace: bool = False) -> BankEntry:
        """Copy an entry of another bank into this one as it is, card and all.

        Raises:
            InputError: the name is taken, unless `replace`; the entry is gone or damaged; the bank cannot be written.
        """
        PromptBank(entry.path.parent).entry(entry.name)
        where = self.path / entry.name
        if where.exists() and not replace:
            raise InputError(f"expected a name that is free in the bank {str(self.path)!r}, got {entry.name!r}")
        make_directory(self.path)
        with self._held():
            write_folder(where, lambda folder: shutil.copytree(entry.path, folder, dirs_exist_ok=True))
        return BankEntry(where, entry.card)

    def remove(self, name: str) -> None:
        """Delete the entry called `name`; raises as `entry`."""
        entry = self.entry(name)
        with self._held():
            # In one rename; what a kill then leaves of it goes with the next change.
            gone = entry.path.rename(entry.path.with_name(f"{TEMPORARY_PREFIX}{name}"))
            shutil.rmtree(gone)

    def entry(self, name: str) -> BankEntry:
        """The entry called `name`.

        Raises:
            InputError: there is none (lists those there are), or its card is damaged.
        """
        path = self.path / name
        if not (path / CARD_NAME).is_file():
            raise InputError(
                f"expected an entry of the bank {str(self.path)!r}, one of {', '.join(self._names()) or 'none'}, "
                f"got {name!r}"
            )
        try:
            value = json.loads((path / CARD_NAME).read_bytes())
        except ValueError as error:
            raise InputError(f"expected a card as json, got {str(path / CARD_NAME)!r}: {error}") from error
        card = PromptCard.from_json(value, str(path / CARD_NAME))
        if card.name != name:
            raise InputError(f"expected the card of {name!r} in {str(path)!r}, got that of {card.name!r}")
        return BankEntry(path, card)

    def list(self) -> tuple[BankEntry, ...]:
        """All entries by name; raises as `entry` where a card is damaged."""
        return tuple(self.entry(name) for name in self._names())

    def search(
        self,
        *,
        model: Any,
        tokenizer: Any,
        measure: str = "shot_loss",
        task: Task | None = None,
        shots: DataSource | None = None,
        prompt: Prompt | None = None,
        initial: Prompt | None = None,
        exclude: Sequence[str] = (),
        batch_size: int | None = None,
        max_length: int | None = None,
        truncation: bool | None = None,
        bf16: bool | None = None,
    ) -> Search:
        """Entries that may help a target task, best first.

        Args:
            model, tokenizer: what the prompt is wanted for; entries of others are refused by name, and so are, with a
                `task`, those whose heads have other labels.
            measure: ``"shot_loss"``: the entry's own loss on `shots` under `task`, smaller first. A distance of domains
                (`DOMAIN_MEASURES`): between the texts of `shots` and those the entry was tuned on, smaller first. A
                cosine (`PROMPT_MEASURES`): with `prompt`, one tuned briefly on the target (and `initial` for task
                vectors), greater first.
            task, shots: the target's task and a few of its rows; a distance needs no labels.
            prompt, initial: a prompt of the target, and its P0.
            exclude: names to leave out, such as the target itself.
            batch_size, max_length, truncation, bf16: as in `ptengine.training.evaluate`, None for its own defaults; for
                ``"shot_loss"`` only.

        Raises:
            InputError: an empty bank, an unknown measure, or one without what it needs or with what it does not read;
                `prompt` is not of finite numbers.
        """
        given = {"batch_size": batch_size, "max_length": max_length, "truncation": truncation, "bf16": bf16}
        options = {name: value for name, value in given.items() if value is not None}
        needs: dict[str, dict[str, Any]] = {name: {"prompt": prompt} for name in PROMPT_MEASURES}
        needs |= {name: {"task": task, "shots": shots} for name in ("shot_loss", *DOMAIN_MEASURES)}
        if measure not in needs:
            raise InputError(f"expected measure, one of {', '.join(needs)}, got {measure!r}")
        for argument, value in needs[measure].items():
            if value is None:
                raise InputError(f"expected {argument} to search by {measure}, got None")
        if options and measure != "shot_loss":
            raise InputError(f"expected no {next(iter(options))} to search by {measure}, got {options}")
        entries = [entry for entry in self.list() if entry.name not in exclude]
        if not entries:
            raise InputError(f"expected a bank with prompts to search, got {str(self.path)!r} with none")
        if prompt is not None:
            require_finite(prompt)
        present = identify(model, tokenizer)
        wanted = None
        if measure in DOMAIN_MEASURES:
            assert task is not None
            assert shots is not None
            wanted = domain_embeddings(model, tokenizer, domain_texts(shots, task))
        matches, refused = [], {}
        for entry in entries:
            reason = entry.card.refusal(present, task)
            if reason is not None:
                refused[entry.name] = reason
                continue
            if measure == "shot_loss":
                assert task is not None
                assert shots is not None
                try:
                    candidate = load_prompt(entry.path, model)
                    require_finite(candidate)
                except InputError as error:
                    refused[entry.name] = str(error)
                    continue
                # What it raises lies in the shots or the options, and holds for every entry.
                details = shot_metrics(model, tokenizer, task, shots, candidate, **options)
                if math.isfinite(details["loss"]):
                    matches.append(Match(entry, details["loss"], details))
                else:
                    refused[entry.name] = f"its loss on the shots is {details['loss']}"
                continue
            try:
                banked, start = entry.read()
                require_finite(banked)
                if wanted is not None:
                    matches.append(Match(entry, domain_distance(measure, wanted, entry.domain()), {}))
                    continue
                assert prompt is not None
                matches.append(Match(entry, prompt_similarity(measure, prompt, banked, initial, start), {}))
            except InputError as error:
                refused[entry.name] = str(error)
        matches.sort(key=lambda match: (-match.score if measure in PROMPT_MEASURES else match.score, match.entry.name))
        return Search(measure, tuple(matches), refused)

    def compare(self, measure: str = "mean_token_cosine", names: Sequence[str] = ()) -> dict[str, dict[str, float]]:
        """A cosine or a distance of domains between every two entries (of `names`, by default all): name to name to
        value.

        Raises:
            InputError: an unknown measure or name, or two entries that cannot be compared, with the reason.
        """
        known = (*PROMPT_MEASURES, *DOMAIN_MEASURES)
        if measure not in known:
            raise InputError(f"expected measure, one of {', '.join(known)}, got {measure!r}")
        entries = [self.entry(name) for name in names] if names else [*self.list()]
        if not entries:
            raise InputError(f"expected a bank with prompts to compare, got {str(self.path)!r} with none")
        for entry in entries:
            reason = entries[0].card.backbone.difference(entry.card.backbone)
            if reason is not None:
                raise InputError(f"cannot compare {entry.name!r} with {entries[0].name!r}: {reason}")
        if measure in DOMAIN_MEASURES:
            domains = {entry.name: entry.domain() for entry in entries}
            return {
                one: {other: domain_distance(measure, mine, its) for other, its in domains.items()}
                for one, mine in domains.items()
            }
        read = {entry.name: entry.read() for entry in entries}
        table: dict[str, dict[str, float]] = {}
        for one, (prompt, start) in read.items():
            table[one] = {}
            for other, (its, its_start) in read.items():
                try:
                    table[one][other] = prompt_similarity(measure, prompt, its, start, its_start)
                except InputError as error:
                    raise InputError(f"cannot compare {one!r} with {other!r}: {error}") from error
        return table

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Change the bank alone; what a killed change left behind is put right first.

        Raises:
            InputError: another process is changing it now.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(exclusive(self.path))
            except InputError as error:
                raise InputError(
                    f"expected the bank {str(self.path)!r} to be free, but another process is changing it now"
                ) from error
            clean_leftovers(self.path)
            yield

    def _names(self) -> Sequence[str]:
        if not self.path.is_dir():
            return ()
        return sorted(entry.name for entry in self.path.iterdir() if _NAME.fullmatch(entry.name) and _has_card(entry))


def weights_sha256(prompt: Prompt) -> str:
    """A sha256 over the numbers of a folded prompt, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(prompt.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu").float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _has_card(folder: Path) -> bool:
    return (folder / CARD_NAME).is_file()
