"""Attention of many rows over one shared prefix and, for each row, its own keys and values."""

from ptengine.kernels.prefix_attention.api import prefix_attention, prefix_attention_varlen

__all__ = ["prefix_attention", "prefix_attention_varlen"]
