"""What the arguments of linear_cross_entropy must be; nothing is computed here."""

from __future__ import annotations

import math

import torch

from ptengine.kernels.arguments import check_numbers, check_optional_tensors, check_tensors, check_whole

REDUCTIONS = ("mean", "sum", "none")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_arguments(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    ignore_index: int,
    reduction: str,
) -> None:
    """Kinds, shapes, dtypes, devices and scalars; raises TypeError for kinds, else ValueError. Reads no element, so it
    never waits for a device."""
    check_tensors(hidden=hidden, weight=weight, labels=labels)
    check_optional_tensors(bias=bias)
    check_numbers(label_smoothing=label_smoothing, z_loss=z_loss)
    check_whole(ignore_index=ignore_index)
    if softcap is not None:
        check_numbers(softcap=softcap)
    if hidden.dim() != 2:
        raise ValueError(f"expected hidden of shape [n, d], got {list(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] == 0:
        raise ValueError(f"expected weight of shape [V >= 1, d = {hidden.shape[1]}], got {list(weight.shape)}")
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"expected labels of shape [n = {hidden.shape[0]}], got {list(labels.shape)}")
    if labels.dtype != torch.int64:
        raise ValueError(f"expected labels of dtype torch.int64, got {labels.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"expected bias of shape [V = {weight.shape[0]}], got {list(bias.shape)}")
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            raise ValueError(f"expected {name} in float64, float32, bfloat16 or float16, got {tensor.dtype}")
        if (tensor.dtype == torch.float64) != (hidden.dtype == torch.float64):
            raise ValueError(
                f"expected {name} and hidden both or neither in float64, got {tensor.dtype}, {hidden.dtype}"
            )
    for name, tensor in (("weight", weight), ("labels", labels), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"expected {name} on hidden's device {hidden.device}, got {tensor.device}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"expected a frozen head ({name}.requires_grad False), got a {name} that requires grad")
    if softcap is not None and not (softcap > 0.0 and math.isfinite(softcap)):
        raise ValueError(f"expected softcap None or finite and above 0, got {softcap}")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"expected label_smoothing in [0, 1), got {label_smoothing}")
    if not (z_loss >= 0.0 and math.isfinite(z_loss)):
        raise ValueError(f"expected z_loss finite and at least 0, got {z_loss}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"expected reduction 'mean', 'sum' or 'none', got {reduction!r}")


def check_label_range(labels: torch.Tensor, vocabulary: int, ignore_index: int) -> None:
    """On a CPU, name the first label outside [0, V); on other devices nothing, since reading one would wait for it."""
    if labels.device.type != "cpu":
        return
    wrong = ((labels < 0) | (labels >= vocabulary)) & (labels != ignore_index)  # [n]
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"expected labels in [0, {vocabulary}) or ignore_index {ignore_index}, got {int(labels[row])} at row {row}"
        )
