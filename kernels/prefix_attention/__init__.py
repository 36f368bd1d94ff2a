"""Attention of many rows over one shared prefix and, for each row, its own keys and values.

`prefix_attention_reference` and `prefix_attention_varlen_reference` are the specification under the same signatures.
"""

from functools import partial

from ptengine.kernels.prefix_attention.api import prefix_attention, prefix_attention_varlen

prefix_attention_reference = partial(prefix_attention, backend="reference")
prefix_attention_varlen_reference = partial(prefix_attention_varlen, backend="reference")

__all__ = [
    "prefix_attention",
    "prefix_attention_reference",
    "prefix_attention_varlen",
    "prefix_attention_varlen_reference",
]
