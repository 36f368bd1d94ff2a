"""Cross-entropy through a frozen LM head, without ever keeping the logits."""

from ptengine.kernels.linear_cross_entropy.api import linear_cross_entropy
from ptengine.kernels.linear_cross_entropy.reference import linear_cross_entropy_reference

__all__ = ["linear_cross_entropy", "linear_cross_entropy_reference"]
