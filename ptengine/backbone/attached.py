"""Lets the stock calls of one model instance see a prompt: `model(...)`, `generate`, pipelines, Trainer.

Hooks on the model without its head hand every call the prompt's keys and values, which stand apart from the row and
from the cache; the head, the loss and `generate` are the stock ones and see the text alone. In a bidirectional model
virtual tokens stand in the row, and the hook behind the call takes them out of its output. Which prompt a call sees is
a matter of the thread that makes it.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from ptengine.backbone.attached_pairs import PairHooks
from ptengine.backbone.attached_rows import (
    StockContext,
    in_row,
    padded_left,
    text_part,
    with_offsets,
    without_first,
)
from ptengine.backbone.attention import KEYWORD
from ptengine.backbone.caches import filled_slots, is_static, keep_all_tokens, require_seen
from ptengine.backbone.causal_rows import CausalRows, RowPrompts, RowSlots
from ptengine.backbone.gated import gated_parts
from ptengine.backbone.heads import is_answered
from ptengine.backbone.in_row import carries_its_prompt
from ptengine.backbone.kept_lowering import KeptLowering
from ptengine.backbone.lowering import FixedPrompt, GatedTokens, KeyValuePrefix, VirtualTokens, detached
from ptengine.backbone.patching import no_mask, patched, require_patched
from ptengine.backbone.spec import BackboneSpec, backbone_spec
from ptengine.backbone.step import capture_prefix, check_fit
from ptengine.backbone.stock_batch import StockBatch, read_batch
from ptengine.backbone.text_dependent import require_fixed
from ptengine.errors import InputError, UnsupportedModelError

__all__ = ["AttachedModel", "attached"]

_PREPARE = "prepare_inputs_for_generation"
_CACHE_OWNER = "_ptengine_prompt"  # attribute of a cache: a weak reference to the prompt its text stands behind


@dataclass(eq=False)
class _Attachment:
    """One prompt on one model, from the beginning to the end of a block."""

    host: _Host
    prompt: nn.Module
    is_prefix: bool
    active: bool = True
    kept: KeptLowering | None = None

    def lowered(self, spec: BackboneSpec) -> FixedPrompt:
        """The prompt as this call reads it: with its graph where gradients are wanted, else computed once."""
        sources = [*self.prompt.parameters(), *self.prompt.buffers()]
        learns = self.prompt.training and any(source.requires_grad for source in sources)
        weights = list(self.host.model.parameters())
        if any(one.requires_grad for one in weights):
            return self._lower(spec, learns)  # a model that learns too may differ in every call
        if learns and torch.is_grad_enabled():
            return self._lower(spec, learns)
        weight = spec.word_embeddings.weight
        half = torch.get_autocast_dtype(weight.device.type) if torch.is_autocast_enabled(weight.device.type) else None
        state = (weight.device, weight.dtype, half, self.prompt.training)
        if self.is_prefix or spec.kind != "causal" or spec.path != "shared":
            weights = []  # which it does not depend on
        kept = self.kept
        if kept is None or not kept.serves(state, sources, weights):
            with torch.no_grad():
                lowered = self._lower(spec, False)
                kept = self.kept = KeptLowering.of(state, sources, weights, self.host.model, lowered)
        return kept.lowered

    def _lower(self, spec: BackboneSpec, learns: bool) -> FixedPrompt:
        device = spec.word_embeddings.weight.device
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()), torch.autocast(device.type, enabled=False):
            lowered = require_fixed(self.prompt.lower())  # type: ignore[operator]
        check_fit(spec, lowered)
        if not learns:  # lowering may hand out the parameters themselves
            lowered = detached(lowered)
        if isinstance(lowered, VirtualTokens) and spec.kind == "causal" and spec.path == "shared":
            with _all_layers(self.host.base, spec.num_layers):
                lowered = capture_prefix(self.host.model, lowered)
        return lowered


@dataclass(eq=False)
class _Host:
    """A model that has prompts attached, and what their end puts back."""

    model: Any
    base: nn.Module
    freeze: bool
    patching: ExitStack = field(default_factory=ExitStack)
    attachments: list[_Attachment] = field(default_factory=list)
    handles: list[Any] = field(default_factory=list)
    layers: list[GradientCheckpointingLayer] = field(default_factory=list)
    names: dict[nn.Module, list[str]] = field(default_factory=dict)  # of the arguments of the modules with hooks
    # Of the call under way: `yes`, whether it came to the prompt; `places`, where an encoder's row has its text.
    reached: threading.local = field(default_factory=threading.local)
    training: list[tuple[nn.Module, bool]] = field(default_factory=list)
    requires_grad: list[tuple[nn.Parameter, bool]] = field(default_factory=list)
    prepare: tuple[Any, dict[str, Any]] | None = None  # our wrapper, and the instance's own attribute before it

    def __deepcopy__(self, _: dict[int, Any]) -> _Host:
        return self.__reduce__()

    def __reduce__(self) -> Any:
        raise InputError(
            f"expected a {type(self.model).__name__} without an attached prompt to copy or pickle: do so before the "
            "block or after it"
        )

    def install(self) -> None:
        self.patching.enter_context(patched(self.model))
        self.training = [(module, module.training) for module in self.model.modules()]
        self.requires_grad = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        if self.freeze:
            self.model.requires_grad_(False)
        if require_patched(self.model).kind == "seq2seq":
            self.layers = [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]
            self.handles = PairHooks(self.model, self.current, self._recomputes).install()
            return
        self.layers = [module for module in self.base.modules() if isinstance(module, GradientCheckpointingLayer)]
        if self._runs_rows():
            self._install_rows()
            return
        # Some heads call the decoder inside the model without its head; who is called second finds the prompt there.
        decoder = getattr(self.base, "decoder", None)
        for module in (self.base, decoder):
            if isinstance(module, nn.Module):
                self.names[module] = list(inspect.signature(type(module).forward).parameters)[1:]
                self.handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
                self.handles.append(module.register_forward_hook(self._behind, with_kwargs=True))
        self._guard(self._wrap_prepare)

    def _install_rows(self) -> None:
        """Hooks on a causal model whose rows hold the virtual tokens."""
        calls = CausalRows(self.model, lambda: require_patched(self.model), self._row_prompts)
        self.handles += calls.install(self.base)
        self._guard(lambda prepare: self._wrap_prepare(calls.wrap_prepare(prepare, self._row_slots)))

    def _guard(self, wrap: Any) -> None:
        """Hooks on the head, and a wrapper around what prepares a step of `generate`."""
        if self.model is not self.base:
            self.names[self.model] = list(inspect.signature(type(self.model).forward).parameters)[1:]
            self.handles.append(self.model.register_forward_pre_hook(self._begin, with_kwargs=True))
            self.handles.append(self.model.register_forward_hook(self._end))
        if hasattr(self.model, _PREPARE):
            before = {name: value for name, value in vars(self.model).items() if name == _PREPARE}
            wrapper = wrap(getattr(self.model, _PREPARE))
            self.prepare = (wrapper, before)
            setattr(self.model, _PREPARE, wrapper)

    def _runs_rows(self) -> bool:
        spec = require_patched(self.model)
        return spec.kind == "causal" and spec.path == "in_row"

    def _row_prompts(self) -> RowPrompts | None:
        """What the rows of a call are to hold; None of a call that has its prompt in place."""
        self.reached.yes = True
        if carries_its_prompt():
            return None
        attachment = self.current()
        self._recomputes()
        lowered = attachment.lowered(require_patched(self.model))
        assert isinstance(lowered, VirtualTokens)
        return RowPrompts(attachment.prompt, lowered.num_virtual_tokens, [lowered])

    def _row_slots(self) -> RowSlots | None:
        """What a step of `generate` asks before it makes its inputs; nothing is computed."""
        if carries_its_prompt():
            return None
        prompt: Any = self.current().prompt
        return RowSlots(prompt, prompt.num_virtual_tokens)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        if self.prepare is not None and vars(self.model).get(_PREPARE) is self.prepare[0]:
            del vars(self.model)[_PREPARE]  # else somebody unpatched inside the block, which removed it
            vars(self.model).update(self.prepare[1])
        for module, flag in self.training:
            module.training = flag
        for parameter, flag in self.requires_grad:
            parameter.requires_grad_(flag)
        self.patching.close()

    def current(self) -> _Attachment:
        """The attachment of the thread that calls."""
        for attachment in _here.get():
            if attachment.host is self and attachment.active:
                return attachment
        raise InputError(
            "expected a prompt attached in this thread, got a model that another thread has attached one to: attach "
            "here too, or call through the object that `attached` gave the other thread"
        )

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Also of a shallow copy of the model, which has its hooks."""
        self.reached.yes = False
        spec = require_patched(self.model)
        if spec.kind != "causal" or spec.lm_head is None:
            return None
        call = dict(zip(self.names[self.model], args, strict=False)) | kwargs
        labels = without_first(call.get("labels"), call.get("attention_mask"))
        return None if labels is None else ((), call | {"labels": labels})

    def _end(self, *_: Any) -> None:
        """Never an answer that has not seen the prompt."""
        if not self.reached.yes:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} does not call its {type(self.base).__name__}, through which an attached "
                "prompt reaches it"
            )

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Give a stock call the prompt; a call that carries a context of its own is none."""
        self.reached.yes = True
        if KEYWORD in kwargs or is_answered(module) or carries_its_prompt():
            return None
        attachment = self.current()
        spec = require_patched(self.model)
        call = dict(zip(self.names[module], args, strict=False)) | kwargs
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        if (ids is None) == (embeds is None):
            return None  # the stock model says what it expects
        shape = ids.shape if ids is not None else embeds.shape[:-1]  # type: ignore[union-attr]
        if len(shape) != 2:
            raise InputError(f"expected a batch [B, T] beside an attached prompt, got {list(shape)}")
        past = self._check_cache(call.get("past_key_values"), attachment)
        if self._recomputes() and spec.kind == "causal":
            if past:
                raise InputError(
                    f"expected no past_key_values under gradient checkpointing, which drops them, got {past} tokens"
                )
            # As the stock layers would, if they got it by name: a layer that runs twice would fill it twice.
            call |= {"past_key_values": None, "use_cache": False}
        lowered = attachment.lowered(spec)
        batch = read_batch(call, (shape[0], shape[1]), past, lowered.num_positions, spec.max_positions)
        if lowered.input_offsets is not None:
            call = with_offsets(call, batch, lowered, spec)
        if isinstance(lowered, VirtualTokens):
            call, *self.reached.places = in_row(call, batch, lowered, spec)
            return (), call
        call["position_ids"] = batch.positions + spec.first_position
        context = _context(spec, lowered, batch)
        if is_static(call.get("past_key_values")):
            context = replace(context, key_slots=past + shape[1])
        if spec.kind == "encoder":
            call, context = padded_left(call, batch, context)
        return (), call | {KEYWORD: context, "attention_mask": no_mask(batch.positions.device)}

    def _behind(self, base: nn.Module, _: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """Tell whose text a new cache holds; take virtual tokens out of an encoder's output."""
        context = kwargs.get(KEYWORD)
        if is_answered(base) or carries_its_prompt() or (context is not None and not isinstance(context, StockContext)):
            return None
        attachment = self.current()
        spec = require_patched(self.model)
        if spec.kind == "causal":
            parts = out if isinstance(out, tuple) else (out.get("past_key_values"),)
            for cache in (part for part in parts if isinstance(part, Cache)):
                setattr(cache, _CACHE_OWNER, weakref.ref(attachment.prompt))
            return None
        if isinstance(out, tuple):
            raise InputError("expected return_dict=True beside a prompt attached to an encoder, got False")
        if context is not None:
            return text_part(spec, out, context.first, moved=context.moved)
        size: Any = attachment.prompt.num_virtual_tokens
        first, moved = self.reached.places
        return text_part(spec, out, first, moved=moved, skip=size)

    def _recomputes(self) -> bool:
        """Whether layers recompute themselves in the backward pass of this call."""
        running = [layer for layer in self.layers if layer.training and layer.gradient_checkpointing]
        how = getattr(running[0], "_gradient_checkpointing_func", None) if running else None
        # PyTorch's default, where nobody says which.
        if isinstance(how, functools.partial):
            reentrant = how.keywords.get("use_reentrant", how.func is checkpoint)
        else:
            reentrant = how is checkpoint
        if reentrant and torch.is_grad_enabled():
            raise InputError(
                "expected gradient checkpointing with use_reentrant=False, got the reentrant kind, through which "
                "no gradient reaches an attached prompt"
            )
        return bool(running)

    def _check_cache(self, cache: Any, attachment: _Attachment) -> int:
        """The slots that are filled already, by a call that saw the same prompt."""
        if cache is None:
            return 0
        keep_all_tokens(cache)
        past = filled_slots(cache)
        if not past:
            setattr(cache, _CACHE_OWNER, weakref.ref(attachment.prompt))
        require_seen(past, getattr(cache, _CACHE_OWNER, None), attachment.prompt)
        return past

    def _wrap_prepare(self, prepare: Any) -> Any:
        """Refuse a batch that `generate` would continue behind its padding, before any work; hand masks on as given."""

        @functools.wraps(prepare)
        def wrapped(input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
            mask = kwargs.get("attention_mask")
            if kwargs.get("is_first_iteration") and isinstance(mask, Tensor) and mask.dim() == 2:
                ends = (mask[:, -1] == 0) & (mask != 0).any(1)  # [B], but for pieces of a prefill before a row begins
                if bool(ends.any()):
                    raise InputError(
                        f"input {int(ends.nonzero()[0])}: expected padding on the left to generate, got it on the right"
                    )
            inputs: dict[str, Any] = prepare(input_ids, *args, **kwargs)
            if is_static(inputs.get("past_key_values")):  # for which the stock model has made masks of all its slots
                inputs["attention_mask"] = mask
            return inputs

        return wrapped


# The attachments of this thread, and the models that have any in any thread.
_here: ContextVar[tuple[_Attachment, ...]] = ContextVar("ptengine_attached", default=())
_hosts: dict[nn.Module, _Host] = {}
_lock = threading.RLock()


class AttachedModel(nn.Module):
    """What `attached` yields: the model and its prompt as one module, whose parameters are the prompt's alone.

    For whoever wants a module to train (transformers' Trainer, accelerate, an optimiser): `parameters()` and
    `state_dict()`, and so checkpoints, hold the prompt; calls and every other attribute are the model's. Calls through
    it see its prompt in any thread, and run the backbone in eval mode; in training mode its layers recompute themselves
    if gradient checkpointing is on. `to()` moves both.

    Attributes:
        prompt: the prompt.

    Raises:
        InputError: a call after the end of the block.
    """

    prompt: nn.Module

    def __init__(self, attachment: _Attachment) -> None:
        super().__init__()
        self.prompt = attachment.prompt
        self._attachment = attachment  # not a module: the model is no part of the state

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_attachment":  # a copy that is not filled yet
                raise
            return getattr(self._attachment.host.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        host = self._attachment.host
        with self._entered():
            host.model.eval()
            for layer in host.layers:
                layer.training = self.training and layer.gradient_checkpointing
            return host.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`."""
        with self._entered():
            self._attachment.host.model.eval()
            return self._attachment.host.model.generate(*args, **kwargs)

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        raise InputError("expected prompt.save(directory): the model beside the prompt is frozen and as it was loaded")

    def _get_name(self) -> str:
        """The stock class, by whose name Trainer knows a causal model and shifts the labels that it smooths."""
        return type(self._attachment.host.model).__name__

    def __repr__(self) -> str:
        return f"Attached{super().__repr__()}"

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._attachment.host.model._apply(fn, recurse)
        return super()._apply(fn, recurse)

    @contextmanager
    def _entered(self) -> Iterator[None]:
        """This thread's calls see the prompt."""
        if not self._attachment.active:
            raise InputError("expected a call inside the block that attached the prompt, got one behind its end")
        before = _here.get()
        _here.set((self._attachment, *before))
        try:
            yield
        finally:
            _here.set(before)


def _wrapper(attachment: _Attachment) -> AttachedModel:
    """Of a class whose `forward` has the model's signature: Trainer picks columns and labels by it."""
    kind = type(attachment.host.model)
    forward = functools.wraps(kind.forward)(lambda self, *args, **kwargs: AttachedModel.forward(self, *args, **kwargs))
    module: AttachedModel = type(f"Attached{kind.__name__}", (AttachedModel,), {"forward": forward})(attachment)
    return module


@contextmanager
def attached(model: Any, prompt: nn.Module, *, freeze: bool = True) -> Iterator[AttachedModel]:
    """The stock calls of `model` see `prompt` inside the block; see `ptengine.prompts.base.Prompt.attached`."""
    base = backbone_spec(model).base_model
    with torch.no_grad():
        lowered = require_fixed(prompt.lower())  # type: ignore[operator]
    with _lock:
        if any(other.active and other.host.base is base for other in _here.get()):
            raise InputError(
                f"expected a {type(model).__name__} without a prompt, got one that this thread has attached a prompt "
                "to: one prompt at a time"
            )
        host = _hosts.get(base)
        if host is None:
            host = _Host(model, base, freeze)
            try:
                host.install()
            except BaseException:
                host.remove()
                raise
            _hosts[base] = host
        elif host.model is not model or host.freeze != freeze:
            raise InputError(
                f"expected the {type(host.model).__name__} and freeze={host.freeze}, as another thread attached a "
                f"prompt to this backbone, got {type(model).__name__} and freeze={freeze}"
            )
        attachment = _Attachment(host, prompt, isinstance(lowered, KeyValuePrefix))
        host.attachments.append(attachment)
    try:
        spec = require_patched(model)
        is_kept = spec.path == "shared" and (spec.kind != "seq2seq" or attachment.is_prefix)
        if is_kept and spec.no_generation is not None:  # stock batches behind a kept prompt are what is attached, too
            raise UnsupportedModelError(
                f"model type {spec.model_type!r} is not supported with an attached prompt: {spec.no_generation}"
            )
        check_fit(spec, lowered)
        _here.set((attachment, *_here.get()))
        yield _wrapper(attachment)
    finally:
        attachment.active, attachment.kept = False, None
        # Not reset by a token: a generator may be closed in another context than it was started in.
        _here.set(tuple(other for other in _here.get() if other is not attachment))
        with _lock:
            host.attachments.remove(attachment)
            if not host.attachments:
                del _hosts[base]
                host.remove()


@contextmanager
def _all_layers(base: Any, num_layers: int) -> Iterator[None]:
    """Inside the block the model runs all of its layers, in the midst of an assistant's early exit, too."""
    config = base.config.get_text_config()
    layers = getattr(config, "num_hidden_layers", num_layers)
    if layers == num_layers:
        yield
        return
    config.num_hidden_layers = num_layers
    try:
        yield
    finally:
        config.num_hidden_layers = layers


def _context(spec: BackboneSpec, lowered: KeyValuePrefix | GatedTokens, batch: StockBatch) -> StockContext:
    """What every layer reads of the prompt."""
    if isinstance(lowered, GatedTokens):
        return StockContext(gated=gated_parts(spec, [lowered], None), key_starts=batch.starts)
    keys, values = lowered.by_layer(spec.word_embeddings.weight.device)
    return StockContext(keys=keys, values=values, key_starts=batch.starts)
