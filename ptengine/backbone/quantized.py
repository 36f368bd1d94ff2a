"""What quantised weights need: that their layers keep their gradient, and that the LM head can be read.

Knows modules by what they carry; imports no library of quantisation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ptengine.errors import UnsupportedModelError

__all__ = ["KeepsGradients", "check_head", "plain_weight", "stored_parts"]

_PACKS = "support_avx512bf16_for_cpu"


class KeepsGradients:
    """Keeps the 4-bit layers of bitsandbytes from packing their weights for inference; `remove` allows it again.

    On a CPU with AVX512-BF16 the first call in eval mode without a gradient packs them, for good, into a form whose
    product has no derivative: prompts below would get no gradient, and nobody an error.

    Raises:
        UnsupportedModelError: a layer has packed its weight already.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [module for module in model.modules() if getattr(module, _PACKS, False)]
        for module in self._modules:
            state = getattr(module.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                raise UnsupportedModelError(
                    "expected 4-bit weights through which a gradient goes, got ones that bitsandbytes packed for "
                    "inference when the model first ran without a gradient: load the model anew, and run it with "
                    "ptengine alone or in training mode"
                )
        for module in self._modules:
            setattr(module, _PACKS, False)

    def remove(self) -> None:
        for module in self._modules:
            setattr(module, _PACKS, True)


def check_head(head: Any) -> None:
    """Raise `UnsupportedModelError` where the LM head's weight is stored as numbers that are no weights."""
    if not head.weight.is_floating_point():
        raise UnsupportedModelError(
            f"expected an LM head whose weight is of a floating dtype or quantised by torchao, got a "
            f"{type(head).__name__} of {head.weight.dtype}: leave the head out of the quantisation"
        )


def plain_weight(head: Any) -> Tensor:
    """The weight of an LM head as a plain tensor, computed from the quantised one of torchao where it is that."""
    weight: Tensor = head.weight
    return weight.dequantize() if is_traceable_wrapper_subclass(weight) else weight


def stored_parts(parameter: Tensor) -> list[Tensor]:
    """The plain tensors that a parameter is made of: itself, or codes and scales of a quantised one."""
    if is_traceable_wrapper_subclass(parameter):
        names, _ = parameter.__tensor_flatten__()
        return [part for name in names for part in stored_parts(getattr(parameter, name))]
    scales = getattr(getattr(parameter, "quant_state", None), "absmax", None)  # of bitsandbytes' 4 bits
    return [parameter] if not isinstance(scales, torch.Tensor) else [parameter, scales]
