"""Skips the last layer's MLP where nothing reads its result.

Only positions that predict a label reach the head, so the last layer's MLP, which works on each position alone, need
not run on prompt rows or unlabelled text. The attention of the last layer announces the wanted positions; hooks on the
MLP narrow its input to them and widen its output with zeros. The announcement is made again when gradient
checkpointing recomputes the layer, and is kept per thread.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["HookHandle", "announce", "install"]

_LINK = "_ptengine_mlp"  # attribute of the last layer's attention module: a one-element tuple with its MLP
_SHARE = 0.75  # narrowing costs two copies: it must save at least a quarter of the rows


class _Announced(threading.local):
    rows: Tensor | None = None
    width: int = 0


_announced = _Announced()


class _Link:
    """Undoes the link as a hook's handle undoes the hook."""

    def __init__(self, attention: nn.Module) -> None:
        self.attention = attention

    def remove(self) -> None:
        delattr(self.attention, _LINK)


HookHandle = RemovableHandle | _Link


def announce(attention: nn.Module, rows: Tensor | None) -> None:
    """Tell the MLP that follows `attention` which packed positions, int64 [n], are wanted; None for all.

    Every call announces, or a call that was cut short (an interrupt, a failure) would narrow the next one.
    """
    if hasattr(attention, _LINK):
        _announced.rows = rows


def install(attention: nn.Module, mlp: nn.Module) -> list[HookHandle]:
    """Link the last layer's attention to its MLP; returns what undoes it (objects with `remove`)."""
    setattr(attention, _LINK, (mlp,))  # in a tuple, or it would become a submodule
    return [
        _Link(attention),
        mlp.register_forward_pre_hook(_narrow),
        mlp.register_forward_hook(_widen),
    ]


def _narrow(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    rows, _announced.rows = _announced.rows, None
    _announced.width = 0
    if rows is None or rows.numel() > _SHARE * args[0].shape[1]:
        return None
    _announced.width, _announced.rows = args[0].shape[1], rows
    return (args[0][:, rows], *args[1:])  # [1, n, d]


def _widen(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
    rows, width = _announced.rows, _announced.width
    _announced.rows, _announced.width = None, 0
    if not width or rows is None:
        return None
    full = torch.zeros(out.shape[0], width, out.shape[2], dtype=out.dtype, device=out.device)  # [1, N, d]
    return full.index_copy(1, rows, out)
