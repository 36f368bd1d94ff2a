"""A tokenizer with P special tokens for the virtual ones, and the strings that put them before a text.

Virtual tokens stand before everything else of a row, a beginning-of-text token included. Tokenizers put that one before
whatever they are given, so the prefix for plain texts names it behind the virtual tokens. Knows no model.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ptengine.errors import InputError

__all__ = ["BakedTokenizer", "bake_tokenizer"]

# Texts that tokenizers treat differently at the beginning of a string and behind a special token.
_PROBES = ("Once upon a time", " a blank first", "\na line first", "é", "Spam: 1 2", "text behind\n\nlines ")


@dataclass(frozen=True)
class BakedTokenizer:
    """Attributes:
    tokenizer: with the new tokens.
    tokens: the P new special tokens.
    ids: theirs, one after another.
    prefix: what stands before a plain text that is encoded without special tokens.
    original: the tokenizer as it was.
    """

    tokenizer: Any
    tokens: list[str]
    ids: list[int]
    prefix: str
    original: Any

    def save(self, directory: Path) -> str | None:
        """Write the tokenizer, and check what stock transformers reads.

        Returns:
            `prefix`, or None where a text behind it gets other tokens than alone: some tokenizers put a blank before
            a whole string only.

        Raises:
            InputError: with the new tokens in its vocabulary the tokenizer splits a text alone in another way.
        """
        self.tokenizer.save_pretrained(directory)
        read = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        prefix: str | None = self.prefix
        for text in _PROBES:
            alone = list(self.original(text)["input_ids"])
            if list(read(text)["input_ids"]) != alone:
                raise InputError(
                    f"expected a tokenizer that reads {text!r} as {alone} after it was written, too, got one that "
                    f"reads {list(read(text)['input_ids'])}"
                )
            if list(read(self.prefix + text, add_special_tokens=False)["input_ids"]) != self.ids + alone:
                prefix = None
        return prefix


def bake_tokenizer(tokenizer: Any, count: int, vocab_size: int) -> BakedTokenizer:
    """A copy of `tokenizer` with `count` new special tokens, which a chat template begins with.

    Args:
        tokenizer: of transformers; not changed.
        count: P.
        vocab_size: rows of the model's word embeddings.

    Raises:
        InputError: no tokenizer, one with ids the model does not have, or one that has such tokens already.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(f"expected tokenizer, a transformers tokenizer, got {type(tokenizer).__name__}")
    known = max(tokenizer.get_vocab().values()) + 1
    if known > vocab_size:
        raise InputError(f"expected the model's own tokenizer, with ids below {vocab_size}, got one up to {known - 1}")
    tokens = [f"<|soft_prompt_{index}|>" for index in range(count)]
    taken = [token for token in tokens if token in tokenizer.get_vocab()]
    if taken:
        raise InputError(f"expected a tokenizer without the tokens of a soft prompt, got one with {taken[0]!r}")
    new = copy.deepcopy(tokenizer)
    new.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    ids = new.convert_tokens_to_ids(tokens)
    if ids != list(range(known, known + count)):
        raise InputError(f"expected a tokenizer that numbers new tokens from {known}, got {ids}")
    spelled = "".join(tokens)
    _lead_chat_template(new, spelled)
    return BakedTokenizer(new, tokens, ids, spelled + "".join(_before_text(tokenizer)), tokenizer)


def _before_text(tokenizer: Any) -> list[str]:
    """The special tokens that the tokenizer puts before a text."""
    whole = list(tokenizer(_PROBES[0])["input_ids"])
    plain = list(tokenizer(_PROBES[0], add_special_tokens=False)["input_ids"])
    before = whole[: len(whole) - len(plain)]
    if before + plain != whole:
        raise InputError(
            f"expected a tokenizer that puts special tokens before a text alone, as a causal model continues it, got "
            f"one that makes {whole} of {plain}"
        )
    return [str(token) for token in tokenizer.convert_ids_to_tokens(before)]


def _lead_chat_template(tokenizer: Any, spelled: str) -> None:
    template = getattr(tokenizer, "chat_template", None)
    lead = f'{{{{ "{spelled}" }}}}'
    if isinstance(template, dict):
        tokenizer.chat_template = {name: lead + one for name, one in template.items()}
    elif template is not None:
        tokenizer.chat_template = lead + template
