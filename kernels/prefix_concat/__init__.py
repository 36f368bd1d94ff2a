"""A shared prefix and each row's own keys or values, materialised in one pass."""

from ptengine.kernels.prefix_concat.api import prefix_concat
from ptengine.kernels.prefix_concat.reference import prefix_concat_reference

__all__ = ["prefix_concat", "prefix_concat_reference"]
