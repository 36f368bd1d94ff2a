"""Where the first numbers of a prompt come from: checks and sources shared by the methods.

Every source is a function of the frozen model and its arguments; randomness comes from an own seeded generator on the
CPU, so the same seed gives the same prompt on every device and leaves the global random state alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptengine.backbone.spec import BackboneSpec
from ptengine.checks import check_whole, is_whole
from ptengine.errors import InputError

__all__ = [
    "DEFAULT_NUM_VIRTUAL_TOKENS",
    "RATE",
    "Initial",
    "check_count",
    "check_init",
    "check_seed",
    "generator_from",
    "is_trained",
    "label_ids",
    "rate_factor",
    "read_array",
    "refuse_unused",
    "sampled_vocabulary_ids",
    "text_ids",
]

DEFAULT_NUM_VIRTUAL_TOKENS = 20

RATE = 0.3
"""Of virtual tokens, in standard deviations of the word embeddings: what worked lies between 0.1 and 0.3."""

# Lester et al. 2021 sample among the 5,000 most common tokens. BPE and SentencePiece number tokens by frequency.
COMMON_TOKENS = 5000

Initial = Tensor | np.ndarray | str | os.PathLike[str]


def check_init(init: Any, allowed: Iterable[str]) -> None:
    if init not in tuple(allowed):
        raise InputError(f"expected init, one of {', '.join(allowed)}, got {init!r}")


def is_trained(init: str) -> bool:
    """Whether `init` starts from numbers that are given, and so taken for trained."""
    return init in ("array", "prompt")


def rate_factor(trained: bool) -> float:
    """What a default learning rate is multiplied by: a start that is trained already wants a quarter of it."""
    return 0.25 if trained else 1.0


def refuse_unused(init: str, used: Iterable[str], **given: Any) -> None:
    """Refuse arguments that `init` would ignore, and the lack of those it needs.

    Args:
        init: the chosen initialisation.
        used: names, among `given`, of the arguments that it needs.
        given: optional arguments by name; None means not given.
    """
    for name, value in given.items():
        if name in used and value is None:
            raise InputError(f"init={init!r} needs {name}, got None")
        if name not in used and value is not None:
            raise InputError(f"init={init!r} does not use {name}, but it was given")


def check_count(num_virtual_tokens: Any, spec: BackboneSpec) -> int:
    """P, if it is a whole number from 1 up to one less than the positions of the model."""
    if check_whole("num_virtual_tokens", num_virtual_tokens) >= spec.max_positions:
        raise InputError(
            f"expected num_virtual_tokens below the {spec.max_positions} positions of the model, so that text fits "
            f"behind the prompt, got {num_virtual_tokens}"
        )
    return num_virtual_tokens


def check_seed(name: str, value: Any) -> int:
    """`value`, if torch's generators take it; `InputError` otherwise."""
    if not is_whole(value) or not 0 <= value < 2**63:
        raise InputError(f"expected {name}, a whole number from 0 to 2**63 - 1, got {value!r}")
    return value


def generator_from(seed: Any) -> torch.Generator:
    return torch.Generator().manual_seed(check_seed("seed", seed))


def text_ids(tokenizer: Any, text: Any, count: int, spec: BackboneSpec) -> Tensor:
    """Token ids of `text` repeated or cut to `count`, as PEFT does: int64 [count].

    The tokenizer's special tokens are part of the text (a beginning-of-text token comes first) and are repeated with it
    when the text is shorter than the prompt.

    Raises:
        InputError: the text is not a string or has no tokens, or the tokenizer has ids the model does not.
    """
    if not isinstance(text, str):
        raise InputError(f"expected init_text, a string, got {type(text).__name__}")
    ids = _encode(tokenizer, text, spec, special=True)
    if not text.strip() or not ids:
        raise InputError(f"expected init_text with at least one token, got {text!r}")
    repeats = -(-count // len(ids))
    return torch.tensor((ids * repeats)[:count])  # [count]


def label_ids(tokenizer: Any, labels: Any, count: int, spec: BackboneSpec) -> list[list[int]]:
    """Token ids of each label, without special tokens.

    Raises:
        InputError: `labels` is not a list of non-empty strings, or there are more labels than virtual tokens.
    """
    if isinstance(labels, str) or not isinstance(labels, Iterable):
        raise InputError(f"expected class_labels, a list of strings, got {labels!r}")
    labels = list(labels)
    if not 1 <= len(labels) <= count:
        raise InputError(f"expected 1 to {count} class_labels, at most one per virtual token, got {len(labels)}")
    pieces = []
    for index, label in enumerate(labels):
        if not isinstance(label, str) or not label.strip():
            raise InputError(f"expected class_labels of non-empty strings, got {label!r} at index {index}")
        pieces.append(_encode(tokenizer, label, spec, special=False))
        if not pieces[-1]:
            raise InputError(f"expected class_labels with at least one token each, got {label!r} at index {index}")
    return pieces


def sampled_vocabulary_ids(
    model: Any, tokenizer: Any | None, count: int, spec: BackboneSpec, generator: torch.Generator
) -> Tensor:
    """Ids drawn from the 5,000 lowest of the vocabulary, special tokens left out: int64 [count].

    Without replacement, unless fewer tokens than `count` are there to draw from. The special tokens are those of the
    tokenizer where there is one, else those the model's configuration names.
    """
    if tokenizer is not None:
        special = set(tokenizer.all_special_ids)
    else:
        names = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id")
        special = set()
        for name in names:
            value = getattr(model.config, name, None)
            special.update(value if isinstance(value, list) else [] if value is None else [value])
    pool = [token for token in range(spec.vocab_size) if token not in special][:COMMON_TOKENS]
    if not pool:
        raise InputError(f"expected a vocabulary with ordinary tokens, got {spec.vocab_size} special ones")
    if count <= len(pool):
        picks = torch.randperm(len(pool), generator=generator)[:count]  # [count]
    else:
        picks = torch.randint(len(pool), (count,), generator=generator)  # [count]
    return torch.tensor(pool)[picks]  # [count]


def read_array(value: Any, name: str) -> Tensor:
    """A floating-point array as an fp32 CPU tensor of its own memory, from a tensor, an ndarray or a .npy file.

    Raises:
        InputError: anything else, a file that is missing or no .npy, a dtype that is not floating point, or a value
            that is NaN or infinite.
    """
    if isinstance(value, str | os.PathLike):
        path = Path(value)
        if not path.is_file():
            raise InputError(f"expected {name}, a .npy file, got {str(path)!r}, which is not a file")
        try:
            value = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise InputError(f"expected {name}, a .npy file without pickled objects, got {str(path)!r}") from error
        if not isinstance(value, np.ndarray):
            raise InputError(f"expected {name}, a .npy file of one array, got the archive {str(path)!r}")
    if isinstance(value, np.ndarray):
        if value.dtype.kind != "f":
            raise InputError(f"expected {name} of a floating-point dtype, got {value.dtype}")
        value = torch.from_numpy(value.astype(np.float32))
    if not isinstance(value, Tensor):
        raise InputError(
            f"expected {name}, a tensor, an ndarray or the path of a .npy file, got {type(value).__name__}"
        )
    if not value.is_floating_point():
        raise InputError(f"expected {name} of a floating-point dtype, got {value.dtype}")
    result = value.detach().to("cpu", torch.float32, copy=True)
    if not bool(torch.isfinite(result).all()):
        raise InputError(f"expected {name} of finite numbers, got NaN or infinity")
    return result


def _encode(tokenizer: Any, text: str, spec: BackboneSpec, special: bool) -> list[int]:
    if not callable(tokenizer):
        raise InputError(f"expected tokenizer, a transformers tokenizer, got {type(tokenizer).__name__}")
    ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    if ids and max(ids) >= spec.vocab_size:
        raise InputError(
            f"expected the model's own tokenizer, with ids below {spec.vocab_size}, got one that maps {text!r} to "
            f"{max(ids)}"
        )
    return ids
