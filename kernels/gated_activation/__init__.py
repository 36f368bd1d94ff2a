"""The gate of a frozen feed-forward layer, act(gate) * up: one launch forward, one backward."""

from ptengine.kernels.gated_activation.api import gated_activation
from ptengine.kernels.gated_activation.reference import gated_activation_reference

__all__ = ["gated_activation", "gated_activation_reference"]
