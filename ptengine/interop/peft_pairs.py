"""What PEFT's checkpoints of encoder-decoders (SEQ_2_SEQ_LM) hold, and which of it their models read.

PEFT keeps every prompt for two transformers. Of the 2P rows of a soft prompt the model reads the first P, before the
source. A prefix row has 2N blocks, N being the encoder's layers unless the configuration says otherwise, which are laid
end to end twice and cut into groups of four, of which the decoder's layer i reads the first two: block 4i modulo 2N for
its keys and the next one for its values. So with an even N layers i and i + N/2 read the same, and half of the blocks
are read by none; with an odd one every layer has blocks of its own. Knows tensors only.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["PAIR_TYPES", "SUBMODULES", "blocks_to_decoder", "decoder_to_blocks", "soft_rows", "written_layers"]

PAIR_TYPES = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
SUBMODULES = 2  # num_transformer_submodules


def soft_rows(embeds: Tensor) -> Tensor:
    """A soft prompt [P, d] as PEFT keeps it, [2P, d]: the second half is read by nothing."""
    return torch.cat([embeds, torch.zeros_like(embeds)])


def written_layers(num_layers: int) -> int:
    """How many layers a checkpoint says it has for a decoder of so many: an odd number, whose blocks are all read."""
    return num_layers | 1


def blocks_to_decoder(rows: Tensor, num_layers: int, num_kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """The keys and values [L, P, H_kv, D] that a decoder of L layers reads of a prefix [P, N*2*H_kv*D]; N >= L."""
    blocks = rows.view(len(rows), -1, num_kv_heads, head_dim).transpose(0, 1)  # [2N, P, H_kv, D]
    read = _keys_of(num_layers, len(blocks))
    return blocks[read], blocks[read + 1]


def decoder_to_blocks(keys: Tensor, values: Tensor) -> Tensor:
    """A prefix [P, N*2*H_kv*D] of which the decoder's layers read `keys` and `values`, [L, P, H_kv, D] each; N is
    `written_layers` of L."""
    layers, count = keys.shape[:2]
    blocks = keys.new_zeros(2 * written_layers(layers), *keys.shape[1:])  # [2N, P, H_kv, D]
    read = _keys_of(layers, len(blocks))
    blocks[read], blocks[read + 1] = keys, values
    return blocks.transpose(0, 1).reshape(count, -1)


def _keys_of(num_layers: int, num_blocks: int) -> Tensor:
    """The block of each layer's keys: int64 [L]."""
    return 4 * torch.arange(num_layers) % num_blocks
