"""Rotary position embedding of queries and keys together: one launch forward, one backward."""

from ptengine.kernels.rotary.api import rotary_embedding
from ptengine.kernels.rotary.reference import rotary_embedding_reference

__all__ = ["rotary_embedding", "rotary_embedding_reference"]
