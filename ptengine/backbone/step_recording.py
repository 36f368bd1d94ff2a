"""Training steps of a frozen backbone as CUDA graphs: in small steps a GPU waits for the host longer than it computes.

Inside `step_graphs(model)` the backbone's forward and backward over a packed batch are recorded for every shape that
recurs, and replayed. Batches differ in length, so each is brought to the shape of its bucket: one more row of tokens
that no row reads, a longest row rounded up, wanted positions filled up with others. None of it changes a result by more
than rounding. The embeddings before and the head and the loss behind stay outside, as they were.

Knows tensors and the packed call; what a prompt or a loss is, it does not.
"""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ptengine.backbone.attention import PrefixContext
from ptengine.backbone.spec import BackboneSpec
from ptengine.backbone.trial import first_line
from ptengine.kernels.dispatch import resolve_backend

__all__ = ["CAPTURING", "Recording", "StepGraphs", "active_graphs", "graphs_where_they_serve", "step_graphs"]

CAPTURING = threading.Lock()  # one capture at a time: it begins by waiting for the device

_SEEN_BEFORE = 2  # calls of a shape before it is recorded: recording costs the time of about three steps
_MOST = 64  # shapes kept; each keeps its graphs, its inputs and the hidden states it gave
_TOKENS = 64  # by which a batch's tokens are rounded up
_MANY_TOKENS = (1024, 128)  # from so many tokens on, by so many: the blocks of a large matrix product
_LONGEST = 32  # by which the longest row is rounded up
_FLOPS = 1e12  # of a layer's forward: above, an H200 computes longer than the host launches, and padding only costs
_NARROWED = 0.75  # of the positions: above, all last hidden states are computed (see `last_layer`)

PackedCall: TypeAlias = Callable[[Tensor, Tensor, PrefixContext, dict[str, Tensor]], Tensor]
Compute: TypeAlias = Callable[[Sequence[Tensor]], Tensor]
Record: TypeAlias = Callable[[Compute, list[Tensor]], "Recording"]


@dataclass(frozen=True)
class Recording:
    """A computation whose tensors do not move.

    Attributes:
        output: what `forward` writes.
        grad_output: what `backward` reads, of output's shape.
        grads: what `backward` writes, of every input that requires a gradient; None for one that has no part in it.
        forward, backward: run one half, on whatever stands in the inputs.
    """

    output: Tensor
    grad_output: Tensor
    grads: Sequence[Tensor | None]
    forward: Callable[[], None]
    backward: Callable[[], None]


class StepGraphs:
    """The recorded shapes of one model.

    Args:
        spec: of the patched model, whose base model is frozen.
        record: how a computation over inputs that do not move is recorded.
    """

    def __init__(self, spec: BackboneSpec, record: Record) -> None:
        self.spec = spec
        self._record = record
        weights = sum(x.numel() for x in spec.base_model.parameters()) - spec.word_embeddings.weight.numel()
        self._most_tokens = _FLOPS * spec.num_layers / (2 * max(weights, 1))
        self._seen: dict[Any, int] = {}
        self._steps: OrderedDict[Any, _Step] = OrderedDict()
        self._lease: weakref.ref[_Lease] | None = None
        self._broken = False

    def run(
        self, call: PackedCall, embeds: Tensor, positions: Tensor, context: PrefixContext, extra: dict[str, Tensor]
    ) -> Tensor:
        """Last hidden states [N, d] of a packed call.

        A call that needs gradients is made in the shape of its bucket, by a graph unless the shape is new or the last
        graph's backward is still to come: recorded steps share their memory. Every other call, and one so large that
        the device is busy anyway, is made as it is.
        """
        packed = context.cu_seqlens is not None and context.captured is None and context.observed is None
        packed = packed and not context.gated  # whose tensors no graph is given
        given = _Call(embeds, positions, context, extra)
        if (
            embeds.shape[0] > self._most_tokens
            or not packed
            or not torch.is_grad_enabled()
            or not any(x.requires_grad for x in given.tensors()[1])
        ):
            return call(embeds, positions, context, extra)
        padded = _to_bucket(given)
        names, tensors = padded.tensors()
        device = embeds.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        described = tuple((tuple(x.shape), x.dtype, x.requires_grad) for x in tensors)
        key = (names, described, padded.context.max_seqlen, autocast)
        hidden: Tensor
        if self._at_work() or not self._recorded(key, call, padded, tensors):
            hidden = call(padded.embeds, padded.positions, padded.context, padded.extra)
        else:
            self._steps.move_to_end(key)
            lease = _Lease()
            self._lease = weakref.ref(lease)
            hidden = _Replay.apply(self._steps[key], lease, *tensors)
        return hidden[: embeds.shape[0]]

    def _at_work(self) -> bool:
        lease = None if self._lease is None else self._lease()
        return lease is not None and not lease.ended

    def _recorded(self, key: Any, call: PackedCall, padded: _Call, tensors: list[Tensor]) -> bool:
        """Whether there is a graph of a shape, which is recorded once the shape has been seen often enough."""
        if key in self._steps:
            return True
        self._seen[key] = self._seen.get(key, 0) + 1
        return not self._broken and self._seen[key] > _SEEN_BEFORE and self._add(key, call, padded, tensors)

    def _add(self, key: Any, call: PackedCall, padded: _Call, tensors: list[Tensor]) -> bool:
        """Record a shape; False where the model cannot be recorded, which is said once."""
        while len(self._steps) >= _MOST:
            self._steps.popitem(last=False)
        inputs = [x.detach().clone().requires_grad_(x.requires_grad) for x in tensors]

        def over(given: Sequence[Tensor]) -> Tensor:
            one = padded.with_tensors(given)
            return call(one.embeds, one.positions, one.context, one.extra)

        try:
            self._steps[key] = _Step(inputs, self._record(over, inputs))
        except RuntimeError as error:
            self._broken = True
            warnings.warn(
                f"model type {self.spec.model_type!r} trains without CUDA graphs, more slowly in small steps: its step "
                f"cannot be captured ({first_line(error)})",
                stacklevel=2,
            )
        return key in self._steps


@dataclass(frozen=True)
class _Step:
    inputs: list[Tensor]
    recording: Recording


class _Lease:
    """Held by the result of a replay until its backward: meanwhile nothing may write over the step's activations."""

    ended = False


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: _Step, lease: _Lease, *given: Tensor) -> Tensor:
        ctx.step, ctx.lease = step, lease
        with torch.no_grad():
            torch._foreach_copy_([x.detach() for x in step.inputs], list(given))
        step.recording.forward()
        return step.recording.output.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.lease.ended:
            raise RuntimeError("expected one backward through a step inside step_graphs, got a second one")
        recording: Recording = ctx.step.recording
        recording.grad_output.copy_(grad)
        recording.backward()
        ctx.lease.ended = True
        found = iter(recording.grads)
        # No copies: the stacking and the padding in front of a step pass on copies of their own.
        return None, None, *(next(found) if x.requires_grad else None for x in ctx.step.inputs)


@dataclass(frozen=True)
class _Call:
    """What one packed call is given."""

    embeds: Tensor  # [N, d]
    positions: Tensor  # int64 [N]
    context: PrefixContext
    extra: dict[str, Tensor]  # [1, N] each

    _OF_CONTEXT = ("cu_seqlens", "prompt_ids", "prefix_lengths", "prefix_rows", "hidden_rows")

    def tensors(self) -> tuple[tuple[str, ...], list[Tensor]]:
        """Everything a replay reads, and the names of what is there."""
        named = {"embeds": self.embeds, "positions": self.positions}
        named |= {name: x for name in self._OF_CONTEXT if (x := getattr(self.context, name)) is not None}
        named |= {f"extra {name}": x for name, x in self.extra.items()}
        for kind in ("keys", "values"):
            layers: tuple[Tensor, ...] | None = getattr(self.context, kind)
            named |= {f"{kind} {layer}": x for layer, x in enumerate(layers or ())}
        return tuple(named), list(named.values())

    def with_tensors(self, given: Sequence[Tensor]) -> _Call:
        """The same call on other tensors, in the order of `tensors`."""
        names, _ = self.tensors()
        named = dict(zip(names, given, strict=True))
        changed: dict[str, Any] = {name: named[name] for name in self._OF_CONTEXT if name in named}
        for kind in ("keys", "values"):
            if getattr(self.context, kind) is not None:
                changed[kind] = tuple(x for name, x in named.items() if name.startswith(f"{kind} "))
        extra = {name: named[f"extra {name}"] for name in self.extra}
        return _Call(named["embeds"], named["positions"], replace(self.context, **changed), extra)


def _to_bucket(given: _Call) -> _Call:
    context = given.context
    assert context.cu_seqlens is not None
    tokens = given.embeds.shape[0]
    total = _round_up(tokens, _MANY_TOKENS[1] if tokens >= _MANY_TOKENS[0] else _TOKENS)
    more = total - tokens

    def own_row(x: Tensor | None, value: int) -> Tensor | None:
        return None if x is None else nn.functional.pad(x, (0, 1), value=value)

    bucketed = replace(
        context,
        cu_seqlens=own_row(context.cu_seqlens, total),  # int32 [rows + 2]
        max_seqlen=_round_up(max(context.max_seqlen, more), _LONGEST),
        prompt_ids=own_row(context.prompt_ids, -1),
        prefix_rows=own_row(context.prefix_rows, -1),
        hidden_rows=_filled_up(context.hidden_rows, total),
    )
    return _Call(
        embeds=nn.functional.pad(given.embeds, (0, 0, 0, more)),
        positions=nn.functional.pad(given.positions, (0, more)),
        context=bucketed,
        extra={name: nn.functional.pad(x, (0, more)) for name, x in given.extra.items()},
    )


def _filled_up(rows: Tensor | None, total: int) -> Tensor | None:
    """Wanted positions with as many others, in ascending order of either, as their number's bucket has."""
    if rows is None:
        return None
    number = _round_up(rows.numel(), _TOKENS)
    if number > _NARROWED * total:
        return None
    unwanted = torch.ones(total, dtype=torch.int8, device=rows.device)
    unwanted[rows] = 0
    return unwanted.argsort(stable=True)[:number]  # [n]


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


_active: ContextVar[StepGraphs | None] = ContextVar("ptengine_step_graphs", default=None)


def active_graphs(spec: BackboneSpec) -> StepGraphs | None:
    """Those of the block this call stands in, where it is the block of this model."""
    graphs = _active.get()
    return graphs if graphs is not None and graphs.spec.base_model is spec.base_model else None


@contextmanager
def step_graphs(model: Any) -> Iterator[None]:
    """Replay training steps of `model` whose shapes recur as CUDA graphs, inside the block and in this thread.

    For loops of many steps on one CUDA device; `ptengine.Trainer` and `ptengine.PromptSet` do it by themselves. From
    the third step of a shape on, forward and backward of the backbone cost the host a few launches instead of some
    thousand. Losses and gradients are those of the same steps outside the block up to rounding. Inside the block the
    model's modules, hooks and dtypes must stay as they are. Each loss is to be followed by its backward before the next
    one is computed; where it is not, the next one runs without a graph.

    Steps of more than 1e12 operations a layer are not replayed. Nothing is, and nothing else changes, on a CPU, where
    the kernels are not chosen, with the backbone spread over devices, in training mode or not frozen, with hooks of
    others in it, and for models whose virtual tokens run in every row: a warning says which. A model that cannot be
    captured warns once and runs as outside the block.

    Args:
        model: patched.

    Raises:
        InputError: it is not patched.
    """
    from ptengine.backbone.patching import require_patched

    reason = _why_not(require_patched(model))
    if reason is not None:
        warnings.warn(f"steps run without CUDA graphs: {reason}", stacklevel=3)
    with graphs_where_they_serve(model):
        yield


@contextmanager
def graphs_where_they_serve(model: Any) -> Iterator[None]:
    """`step_graphs` for callers that did not ask for graphs: without the warning."""
    from ptengine.backbone.patching import require_patched

    spec = require_patched(model)
    token = _active.set(StepGraphs(spec, _recorder()) if _why_not(spec) is None else None)
    try:
        yield
    finally:
        _active.reset(token)


def _why_not(spec: BackboneSpec) -> str | None:
    """What stands in the way of recording a model's steps."""
    weight, base = spec.word_embeddings.weight, spec.base_model
    if weight.device.type != "cuda":
        return f"the model is on {weight.device}"
    if spec.path != "shared" or spec.kind == "seq2seq":
        return "virtual tokens run in every row"
    if _devices(base) != {weight.device}:
        return "the backbone is spread over devices"
    if any(x.requires_grad for x in base.parameters()):
        return "the backbone is not frozen"
    if any(module.training for module in base.modules()):
        return "the backbone is in training mode"
    if any(_hooked(module) for module in base.modules()):
        return "hooks in the backbone would not see its calls"
    if resolve_backend(None, weight.device, "prefix_attention_varlen", dtype=weight.dtype) != "triton":
        return "attention does not run on the kernels"
    return None


def _devices(module: nn.Module) -> set[torch.device]:
    return {x.device for x in module.parameters()}


def _hooked(module: nn.Module) -> bool:
    """Whether somebody else wants to see the module's calls, which a replay does not make."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values(), *module._backward_hooks.values()]
    return any(not getattr(hook, "__module__", "").startswith("ptengine.") for hook in hooks)


def _recorder() -> Record:
    """Records into one pool of memory, since only one of a model's steps has activations at a time."""
    return functools.partial(_capture, torch.cuda.graph_pool_handle())


def _capture(pool: Any, compute: Compute, inputs: list[Tensor]) -> Recording:
    """Two CUDA graphs, forward and backward."""
    wanted = [x for x in inputs if x.requires_grad]
    device = inputs[0].device
    dtype = torch.get_autocast_dtype(device.type)
    # A cache of cast weights would outlive the capture that its casts are part of.
    autocast = functools.partial(
        torch.autocast, device.type, dtype, torch.is_autocast_enabled(device.type), cache_enabled=False
    )
    here, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    # Named everywhere: what CUDA takes for current may be another device than the model's.
    with CAPTURING, torch.cuda.device(device):
        side.wait_stream(here)
        with torch.cuda.stream(side), torch.enable_grad(), autocast():  # compiles kernels and makes workspaces
            trial = compute(inputs)
            torch.autograd.grad(trial, wanted, torch.zeros_like(trial), allow_unused=True)
        here.wait_stream(side)
        grad_output = torch.zeros_like(trial)
        del trial
        # What steps outside graphs have left free would otherwise stand beside the graphs' own memory.
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # What other threads launch and allocate meanwhile does not break a capture.
        record = functools.partial(torch.cuda.graph, pool=pool, stream=side, capture_error_mode="thread_local")
        with torch.enable_grad():
            with record(forward), autocast():
                output = compute(inputs)
            with record(backward):
                grads = list(torch.autograd.grad(output, wanted, grad_output, allow_unused=True))
    return Recording(output.detach(), grad_output, grads, forward.replay, backward.replay)
