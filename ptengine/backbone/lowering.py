"""What every prompt method becomes before it meets the backbone.

A prompt is lowered either to virtual tokens, which run through the backbone as one row of the packed batch, or to keys
and values per layer, which attention reads directly. Nothing here knows how a prompt is trained.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ptengine.errors import InputError

__all__ = ["KeyValuePrefix", "LoweredPrompt", "VirtualTokens"]


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


LoweredPrompt = VirtualTokens | KeyValuePrefix


def _check_offsets(offsets: Tensor | None) -> None:
    if offsets is not None and (offsets.dim() != 2 or not len(offsets)):
        raise InputError(f"expected input offsets of shape [S, d], S at least 1, got {list(offsets.shape)}")
