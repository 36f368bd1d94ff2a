"""RMSNorm of a frozen backbone: one launch forward, one backward, nothing kept but the input."""

from ptengine.kernels.rms_norm.api import rms_norm
from ptengine.kernels.rms_norm.reference import rms_norm_reference

__all__ = ["rms_norm", "rms_norm_reference"]
