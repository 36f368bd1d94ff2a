"""A shared prefix and each row's own keys or values, materialised in one pass: dense, packed, or in a paged cache."""

from ptengine.kernels.prefix_concat.api import prefix_concat, prefix_concat_paged, prefix_concat_varlen
from ptengine.kernels.prefix_concat.reference import (
    prefix_concat_paged_reference,
    prefix_concat_reference,
    prefix_concat_varlen_reference,
)

__all__ = [
    "prefix_concat",
    "prefix_concat_paged",
    "prefix_concat_paged_reference",
    "prefix_concat_reference",
    "prefix_concat_varlen",
    "prefix_concat_varlen_reference",
]
