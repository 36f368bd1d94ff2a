"""Reads a stock model's own head from hidden states that ptengine computed.

The head is run by the model's own `forward`, whose call of the model without its head is answered with the hidden
states at hand, so every head computes what its family wrote. Knows no prompts and no packing.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ptengine.errors import UnsupportedModelError

__all__ = [
    "Pooling",
    "PreparedForward",
    "TappedHead",
    "answering",
    "before_head",
    "head_output",
    "is_answered",
    "logits_of",
    "pooled",
    "pooling_of",
    "tapped",
    "tapping",
    "task_head",
    "ways_to_head",
    "with_weights",
]

Pooling = Literal["module", "first_token"]

# The module whose next calls, in this thread, are answered, and the answer.
_answer: ContextVar[tuple[nn.Module, Any] | None] = ContextVar("ptengine_head_answer", default=None)


class _Answer(BaseModelOutputWithPooling):
    """Last hidden states and what is pooled of them; every other field a family has is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class PreparedForward:
    """Lets calls of `base` be answered; `remove` takes it out again."""

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        self.before = vars(base).get("forward")
        if self.before is None:
            base.forward = MethodType(_class_forward, base)  # bound, so that a deep copy binds its own
        else:
            base.forward = _instance_forward(base, self.before)

    def remove(self) -> None:
        vars(self.base).pop("forward", None)
        if self.before is not None:
            self.base.forward = self.before


def _class_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    answer = _answer.get()
    if answer is not None and answer[0] is self:
        return answer[1]
    return type(self).forward(self, *args, **kwargs)


def _instance_forward(base: nn.Module, before: Any) -> Any:
    @functools.wraps(before)
    def forward(*args: Any, **kwargs: Any) -> Any:
        answer = _answer.get()
        return answer[1] if answer is not None and answer[0] is base else before(*args, **kwargs)

    return forward


@contextmanager
def answering(base: nn.Module, output: Any) -> Iterator[None]:
    """Calls of `base` in this thread return `output` inside the block."""
    token = _answer.set((base, output))
    try:
        yield
    finally:
        _answer.reset(token)


def is_answered(base: nn.Module) -> bool:
    """Whether a call of `base` in this thread is answered."""
    answer = _answer.get()
    return answer is not None and answer[0] is base


class TappedHead:
    """Lets what an LM head is about to read be taken in its place; `remove` takes it out again."""

    def __init__(self, head: nn.Module) -> None:
        self.handle = head.register_forward_pre_hook(_tap)

    def remove(self) -> None:
        self.handle.remove()


@contextmanager
def tapping(head: nn.Module | None) -> Iterator[None]:
    """Inside the block `head`, if any, has a `TappedHead`."""
    tap = None if head is None else TappedHead(head)
    try:
        yield
    finally:
        if tap is not None:
            tap.remove()


# The positions among B * T whose hidden states are wanted in this thread, int64 [n], and where to put them.
_wanted: ContextVar[tuple[Tensor, list[Tensor]] | None] = ContextVar("ptengine_head_wanted", default=None)


def _tap(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    wanted = _wanted.get()
    if wanted is None:
        return None
    positions, taken = wanted
    if args[0].dim() != 3:
        raise UnsupportedModelError(
            f"its LM head reads hidden states of shape {list(args[0].shape)}, not one of every token [B, T, d]"
        )
    hidden = args[0].flatten(0, -2)  # [B * T, d]
    taken.append(hidden[positions])  # [n, d]
    return (hidden[None, :0], *args[1:])  # [1, 0, d]


@contextmanager
def tapped(positions: Tensor) -> Iterator[list[Tensor]]:
    """Inside the block LM heads with a `TappedHead` run on nothing.

    The hidden states [n, d] that they would have read at `positions`, int64 [n] of B * T, are put in the list.
    """
    taken: list[Tensor] = []
    token = _wanted.set((positions, taken))
    try:
        yield taken
    finally:
        _wanted.reset(token)


def before_head(module: nn.Module | None, hidden: Tensor) -> Tensor:
    """What an LM head reads [n, d'] of last hidden states [n, d], which pass `module` on their way, if any.

    The LM head may be the end of `module` itself, and then has a `TappedHead`.
    """
    if module is None:
        return hidden
    with tapped(torch.arange(len(hidden), device=hidden.device)) as taken:
        out: Tensor = module(hidden[None])  # [1, n, d'], or nothing of the logits
    return taken[0] if taken else out[0]


def ways_to_head(model: Any, base: nn.Module, head: Any, hidden: Tensor) -> Iterator[nn.Module]:
    """Modules outside of `base` that make of last hidden states [n, d] something as wide as what `head` reads.

    `head` has a `TappedHead`.
    """
    inside = {model, *base.modules(), *head.modules()}
    for module in model.modules():
        if module in inside:
            continue
        try:
            fits = before_head(module, hidden).shape == (len(hidden), head.weight.shape[1])
        except Exception:  # of modules that read something else
            continue
        if fits:
            yield module


def head_output(model: Any, base: nn.Module, pooling: Pooling | None, hidden: Tensor, mask: Tensor) -> Tensor:
    """The logits that the head of `model` computes from last hidden states.

    Args:
        model: patched, with a head.
        base: the model without its head.
        pooling: how `base` pools.
        hidden: [B, T, d], of the text alone.
        mask: int64 [B, T], 1 where there is a token.

    Returns:
        [B, C] of heads that read a row, [B, T, C] of heads that read every token, [B, T, 2] of those that answer
        questions: start and end.

    Raises:
        UnsupportedModelError: the output has no logits.
    """
    pooler_output: Any = None if pooling is None else pooled(base, hidden, pooling)
    output = _Answer(last_hidden_state=hidden, pooler_output=pooler_output)
    with answering(base, output):
        result = model(input_ids=torch.zeros_like(mask), attention_mask=mask)
    return logits_of(model, result)


def task_head(model: Any) -> dict[str, nn.Parameter]:
    """The parameters of `model` outside its base model, by name: its head; none where it is a base model."""
    inside = {id(parameter) for parameter in model.base_model.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in inside}


def with_weights(module: nn.Module, weights: Mapping[str, nn.Parameter]) -> nn.Module:
    """A twin of `module` that has these parameters under these names and shares all else with it.

    They are rounded to the dtype of those they stand in for. `module` is not touched, not even for a moment: other
    threads may be running it.
    """
    twin = copy.copy(module)
    twin._modules, twin._parameters = dict(module._modules), dict(module._parameters)
    inner: dict[str, dict[str, nn.Parameter]] = {}
    for name, weight in weights.items():
        first, _, rest = name.partition(".")
        if rest:
            inner.setdefault(first, {})[rest] = weight
        else:
            twin._parameters[first] = weight.to(getattr(module, first).dtype)  # type: ignore[assignment]
    for child, its in inner.items():
        twin._modules[child] = with_weights(getattr(module, child), its)
    return twin


def logits_of(model: Any, result: Any) -> Tensor:
    """The logits in the output of a stock model; of heads that answer questions those of start and end, [B, T, 2].

    Raises:
        UnsupportedModelError: the output has no logits.
    """
    logits = result.get("logits", result.get("prediction_logits"))
    if logits is None and "start_logits" in result:
        logits = torch.stack([result["start_logits"], result["end_logits"]], dim=-1)  # [B, T, 2]
    if not isinstance(logits, Tensor):
        raise UnsupportedModelError(f"the output of {type(model).__name__} has no logits: {', '.join(result)}")
    return logits


def pooled(base: Any, hidden: Tensor, pooling: Pooling) -> Tensor:
    """[B, d] from last hidden states [B, T, d]: by the pooler itself, or of the first token behind an activation."""
    if pooling == "module":
        result: Tensor = base.pooler(hidden)
        return result
    activation = getattr(base, "pooler_activation", None) or base.activation
    activated: Tensor = activation(base.pooler(hidden[:, 0]))
    return activated


def pooling_of(base: Any, hidden: Tensor, expected: Tensor, bound: float) -> Pooling | None:
    """How `base` made `expected` [B, d] of `hidden` [B, T, d], within a relative distance; None if in no known way."""
    for way in ("module", "first_token"):
        try:
            got = pooled(base, hidden, way)  # type: ignore[arg-type]
        except (AttributeError, TypeError, RuntimeError, IndexError):
            continue
        if got.shape == expected.shape and (got - expected).norm() <= bound * expected.norm():
            return way  # type: ignore[return-value]
    return None
