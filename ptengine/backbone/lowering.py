"""What every prompt method becomes before it meets the backbone.

A prompt is lowered to virtual tokens, which run through the backbone as one row of the packed batch, to keys and values
per layer, which attention reads directly, or to tokens that layers attend to apart from the text. A prompt that depends
on the text is lowered to the function that gives every row virtual tokens of its own. Nothing here knows how a prompt
is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ptengine.errors import InputError

__all__ = [
    "FixedPrompt",
    "GatedTokens",
    "KeyValuePrefix",
    "LoweredPrompt",
    "TextDependentTokens",
    "VirtualTokens",
    "detached",
]


@dataclass(frozen=True)
class VirtualTokens:
    """Input embeddings of a prompt, floating point, in the scale of the model's word embeddings.

    Attributes:
        embeds: [P, d].
        input_offsets: [S, d], what is added to the embedding of the text's token 0, 1, .. S - 1; None for nothing.
    """

    embeds: Tensor
    input_offsets: Tensor | None = None

    def __post_init__(self) -> None:
        if self.embeds.dim() != 2:
            raise InputError(f"expected virtual tokens of shape [P, d], got {list(self.embeds.shape)}")
        _check_offsets(self.input_offsets)

    @property
    def num_virtual_tokens(self) -> int:
        return self.embeds.shape[0]

    @property
    def num_positions(self) -> int:
        """Positions that the text stands behind: P."""
        return self.num_virtual_tokens


@dataclass(frozen=True)
class KeyValuePrefix:
    """Keys (after rotary embedding, where the model has it) and values of a prompt in every layer, without a batch.

    Attributes:
        keys: [L, P, H_kv, D].
        values: [L, P, H_kv, D_v].
        input_offsets: as of `VirtualTokens`.
    """

    keys: Tensor
    values: Tensor
    input_offsets: Tensor | None = None

    def __post_init__(self) -> None:
        if self.keys.dim() != 4 or self.values.dim() != 4 or self.keys.shape[:3] != self.values.shape[:3]:
            raise InputError(
                "expected prefix keys [L, P, H_kv, D] and values [L, P, H_kv, D_v], "
                f"got {list(self.keys.shape)} and {list(self.values.shape)}"
            )
        _check_offsets(self.input_offsets)

    @property
    def num_virtual_tokens(self) -> int:
        return self.keys.shape[1]

    @property
    def num_positions(self) -> int:
        """Positions that the text stands behind: P."""
        return self.num_virtual_tokens

    def by_layer(self, device: torch.device) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The keys and values of each layer, [1, P, H_kv, D] and [1, P, H_kv, D_v], as they lie.

        Unbound once: indexing a layer inside its attention would give every layer a gradient of all layers' size.
        """
        # Autograd reads only copies of what inference mode left.
        own = (x.clone() if x.is_inference() else x.contiguous() for x in (self.keys, self.values))
        keys, values = (x.to(device)[:, None].unbind(0) for x in own)
        return keys, values


@dataclass(frozen=True)
class GatedTokens:
    """Tokens that some layers attend to beside the text, under a softmax of their own, times a gate.

    Attributes:
        layers: the A layers that do, ascending.
        embeds: [A, P, d], what each layer's own key and value projections read.
        gates: [A, H], the factor of each query head's result.
    """

    layers: tuple[int, ...]
    embeds: Tensor
    gates: Tensor

    input_offsets: ClassVar[None] = None
    num_positions: ClassVar[int] = 0  # the tokens have none: the text begins at position 0

    def __post_init__(self) -> None:
        count = len(self.layers)
        if self.embeds.dim() != 3 or self.gates.dim() != 2 or {len(self.embeds), len(self.gates)} != {count}:
            raise InputError(
                f"expected gated tokens [A, P, d] and gates [A, H] of A = {count} layers, got "
                f"{list(self.embeds.shape)} and {list(self.gates.shape)}"
            )

    @property
    def num_virtual_tokens(self) -> int:
        return self.embeds.shape[1]


@dataclass(frozen=True)
class TextDependentTokens:
    """Virtual tokens that depend on the text behind them: every row of a batch has its own.

    Attributes:
        num_virtual_tokens: P, of every row.
        of_texts: from the input embeddings of B texts [B, T, d], zero behind a text's end, and their lengths int64 [B],
            at least 1, to the rows' virtual tokens [B, P, d].
    """

    num_virtual_tokens: int
    of_texts: Callable[[Tensor, Tensor], Tensor]


# What no text changes, and all that a prompt may be lowered to.
FixedPrompt = VirtualTokens | KeyValuePrefix | GatedTokens
LoweredPrompt = FixedPrompt | TextDependentTokens

_Fixed = TypeVar("_Fixed", bound=FixedPrompt)


def detached(prompt: _Fixed) -> _Fixed:
    """The prompt with its tensors apart from their graph and from the parameters that lowering may have handed out."""
    parts = {part.name: getattr(prompt, part.name) for part in fields(prompt)}
    changes: dict[str, Any] = {name: x.detach() for name, x in parts.items() if isinstance(x, Tensor)}
    return replace(prompt, **changes)


def _check_offsets(offsets: Tensor | None) -> None:
    if offsets is not None and (offsets.dim() != 2 or not len(offsets)):
        raise InputError(f"expected input offsets of shape [S, d], S at least 1, got {list(offsets.shape)}")
