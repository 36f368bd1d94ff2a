"""Eager calls of registered operators, past `torch.library`.

An operator is what torch.compile, fake tensors and functorch see, and costs more host time than the kernels behind it:
after every call `custom_op` reads the schema (a copy, dear with 22 arguments), its autograd fills in defaults by a
search that is quadratic in the arguments, checks what aliases what, and unpacks lists of tensors.
Nothing of this helps a call that nobody traces, so such a call takes the implementation itself, under a plain
`torch.autograd.Function` where a gradient is needed. Knows operators and their functions, no operation.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import contains
from types import UnionType
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["is_traced", "shortcut"]


def shortcut(
    operator: Callable[..., Any],
    function: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    *,
    writes: int | None = None,
) -> Callable[..., Any]:
    """A function that does what `operator` does, and calls `function` instead wherever that cannot be told apart.

    It takes positional arguments, the first of them a tensor on the device of all. Whatever `function` is not annotated
    for, as an int for a float or a tensor of a subclass, goes to the operator, which converts it or refuses it. So do
    tensors without values.

    Args:
        operator: what `torch.library.custom_op` made of `function`.
        function: the implementation; its results share no memory with its arguments.
        setup_context: as the operator's `register_autograd` has it.
        backward: the same, the derivative of the first result alone: without a gradient for that it is not called, and
            those of the others are None or zeros. None where the operator has no derivative; a call that is to be
            differentiated then goes to the operator, whose error in the backward pass says so.
        writes: the place of the one argument that is changed, if any is.

    Raises:
        NotImplementedError: by the function it gives, where an argument has a forward-mode tangent: neither way would
            carry it on, and what else a model adds to it would be a wrong derivative.
    """
    hints = list(get_type_hints(function).values())[:-1]  # the last is the result's
    accepted = [_types(hint) for hint in hints]
    tensors = [place for place, types in enumerate(accepted) if Tensor in types]
    node = None
    if setup_context is not None and backward is not None:
        node = _node(function, setup_context, backward)

    def call(*args: Any) -> Any:
        if forward_ad._current_level >= 0 and not torch.compiler.is_compiling():
            _refuse_tangents(function, args)
        if is_traced() or not all(map(contains, accepted, map(type, args))) or args[0].is_meta:
            return operator(*args)
        if torch.is_grad_enabled() and any(args[i] is not None and args[i].requires_grad for i in tensors):
            return operator(*args) if node is None else node.apply(*args)
        if writes is not None:
            torch.autograd.graph.increment_version(args[writes])
        with torch._C._AutoDispatchBelowAutograd():  # as an operator
            return function(*args)

    return call


def is_traced() -> bool:
    """Whether something may be looking at the operators that are called: a compiler, a tracer, a transform or a mode.

    A mode for `__torch_function__` is among them because an operator's inside is hidden from it: a default device, for
    one, would move the tensors made there.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_function_stack() > 0
        or torch.jit.is_tracing()
    )


def _refuse_tangents(function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    if any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in args):
        raise NotImplementedError(
            f"expected no forward-mode derivative (torch.func.jvp, jacfwd, dual tensors) through "
            f"{function.__module__.removesuffix('.operators')}, which has a backward pass alone; backend='reference' "
            "has both"
        )


def _types(hint: Any) -> frozenset[type]:
    """The types that an argument annotated so may have; a tensor is no subclass but a parameter."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return frozenset(kinds) | (frozenset({torch.nn.Parameter}) if Tensor in kinds else frozenset())


def _node(
    function: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    def forward(ctx: Any, *args: Any) -> Any:
        output = function(*args)
        ctx.set_materialize_grads(False)  # no zeros for results that nobody differentiates
        setup_context(ctx, args, output)
        return output

    def differentiate(ctx: Any, *gradients: Tensor | None) -> Any:
        if gradients[0] is None:  # whoever read the result has no gradient to give
            return (None,) * len(ctx.needs_input_grad)
        return backward(ctx, *gradients)

    # One `forward` for both, as in an operator's own node: with a `setup_context` beside it, every call would begin by
    # binding the arguments to `forward`'s signature.
    methods = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
    return type(function.__name__.strip("_"), (torch.autograd.Function,), methods)
