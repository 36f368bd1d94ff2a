"""Puts ptengine's attention into one model instance, and takes it out again.

Only this instance changes: its configurations' attention implementation, a wrapper around its
`prepare_inputs_for_generation`, two hooks on its last MLP, a note in encoders' attention modules, and the forward of
encoders under a head and of modules that have faster equals. No class is touched.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ptengine.backbone import families, last_layer, proof, seq2seq_proof
from ptengine.backbone.activations import fuse_activations
from ptengine.backbone.attention import IMPLEMENTATION, KEYWORD, PLACES, Observed, PrefixContext
from ptengine.backbone.frozen_layers import fuse_layers
from ptengine.backbone.generation_steps import BehindPrefix
from ptengine.backbone.heads import PreparedForward, TappedHead, tapping
from ptengine.backbone.in_row_generation import row_hooks
from ptengine.backbone.modes import eval_mode
from ptengine.backbone.quantized import KeepsGradients, check_head
from ptengine.backbone.spec import STATE, BackboneSpec, config_spec, is_proven
from ptengine.backbone.trial import StockRows, first_line, refuse, stock_rows
from ptengine.errors import InputError, UnsupportedModelError

__all__ = ["PATCHING", "cache_off", "is_patched", "no_mask", "patch", "patched", "require_patched", "unpatch"]

_STATE = STATE
_PREPARE = "prepare_inputs_for_generation"
_patched_models: WeakSet[Any] = WeakSet()
# Held while a model is patched or unpatched: the first look at a family that is not proven patches it for a moment.
PATCHING = threading.RLock()


class _StockDoubtful(UnsupportedModelError):
    """The stock side of the comparison may be the wrong one, so no path is held to it."""


@dataclass
class _State:
    """What `unpatch` puts back.

    Attributes:
        blocks: how many `patched` blocks hold the model; None where it stays patched after them.
    """

    implementations: list[tuple[Any, str | None]]
    spec: BackboneSpec
    handles: list[Any] = field(default_factory=list)
    prepare: dict[str, Any] = field(default_factory=dict)  # the instance's own attribute, where somebody had set one
    blocks: int | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _State:
        return _State(*(copy.deepcopy(getattr(self, one.name), memo) for one in fields(self)))

    def __reduce__(self) -> Any:
        raise InputError(
            "expected a stock model to pickle, got one that ptengine has patched: call ptengine.unpatch first, or "
            "save its state_dict"
        )


def patch(model: Any) -> Any:
    """Route the attention of `model` through ptengine, in place; returns the model.

    Without a prompt the model computes what it computed before, up to rounding, but for attention weights: as with SDPA
    there are none, and what `output_attentions` asks for stays empty. Patching twice is patching once. A family that no
    test of ours covers is compared with its stock computation on a few tokens, once per model. Where the shared path
    does not serve (the configuration declares it, a layer's attention does not go through transformers' attention
    interface, or the numbers differ), virtual tokens run in every row of stock batches, if that is exact: a warning
    says so for a causal model, and `ptengine.supports` says which path and why.

    Raises:
        UnsupportedModelError: neither path gives the numbers of the stock computation. The model is then as it was.
    """
    with PATCHING:
        if not is_patched(model):
            _patch(model)
        model.__dict__[_STATE].blocks = None
        return model


def _patch(model: Any) -> None:
    spec = config_spec(model)
    if spec.lm_head is not None:
        check_head(spec.lm_head)
    kept = KeepsGradients(model)
    try:
        _patch_kind(model, spec)
    except BaseException:
        kept.remove()
        raise
    model.__dict__[_STATE].handles.append(kept)


def _patch_kind(model: Any, spec: BackboneSpec) -> Any:
    if is_proven(model.config):
        return _install(model, spec, None, None)
    if spec.kind == "seq2seq":
        return _install_seq2seq(model, spec)
    facts, stock = proof.known(model), None
    if facts is None:
        stock = _stock_rows(model, spec, _implementations(_reader(model, spec)))
        spec = replace(spec, kind=stock.kind, first_position=stock.first_position or 0, before_head=stock.before_head)
        spec = spec if stock.logit_scale is None else replace(spec, logit_scale=stock.logit_scale)
        why = families.not_shared(families.text_config(model.config))
        if why is None:
            try:
                return _install(model, spec, None, stock)
            except _StockDoubtful:
                raise
            except UnsupportedModelError as error:
                why = str(error).removeprefix(str(refuse(spec, "")))
        with _quietly(model, spec), tapping(spec.lm_head):
            facts = proof.compare_in_row(model, spec, stock, why)
    if facts.path == "in_row":
        return _install_in_row(model, spec, facts, stock)
    return _install(model, facts.into(spec), facts, None)


def _install(model: Any, spec: BackboneSpec, facts: proof.Facts | None, stock: StockRows | None) -> Any:
    """Route the attention of `model` through ptengine, and compare with `stock` where that is given."""
    state = _begin(model, spec, _implementations(_reader(model, spec)))
    try:
        for config, _ in state.implementations:
            config._attn_implementation = IMPLEMENTATION
        observed = _probe(model, spec)
        if spec.kind == "encoder":
            state.handles.append(_Places(observed))
        if stock is not None:
            facts = proof.measure(spec, observed)
            state.spec = facts.into(spec)
        skips = spec.kind == "causal" and (facts is None or facts.skips_mlp)
        links = _link_last_mlp(spec, observed[-1].module) if skips else []
        state.handles.extend(links)
        state.handles.extend(fuse_activations(model))
        state.handles.extend(fuse_layers(model))
        _answer_heads(model, state)
        if stock is not None and facts is not None:
            try:
                _prove(model, state, facts, spec, stock, links)
            except UnsupportedModelError as error:
                hint = _left_out(observed, state.implementations)
                raise (_StockDoubtful if hint else UnsupportedModelError)(f"{error}{hint}") from error
        if spec.kind == "causal" and hasattr(model, _PREPARE):  # models without a head do not generate
            setattr(model, _PREPARE, BehindPrefix(getattr(model, _PREPARE), spec))
    except BaseException:
        unpatch(model)
        raise
    return model


def _install_in_row(model: Any, spec: BackboneSpec, facts: proof.Facts, stock: StockRows | None) -> Any:
    """Leave the attention of `model` alone: virtual tokens will stand in its rows."""
    state = _begin(model, facts.into(spec), [])
    try:
        _answer_heads(model, state)
        if spec.kind == "causal":
            state.handles.extend(row_hooks(model, spec.base_model))
        if stock is not None and spec.kind == "encoder":
            with _quietly(model, spec):
                facts = proof.read_head(model, state.spec, facts, stock)
            state.spec = facts.into(spec)
        if stock is not None:
            proof.remember(model, facts)
    except BaseException:
        unpatch(model)
        raise
    if stock is not None and spec.kind == "causal":
        warnings.warn(
            f"model type {spec.model_type!r}: soft prompts run in every row with the model's own attention, more "
            f"slowly than as one row of the batch: {facts.why_in_row}",
            stacklevel=4,
        )
    return model


def _install_seq2seq(model: Any, spec: BackboneSpec) -> Any:
    """Prepare an encoder-decoder: its LM head, and its decoder's self-attention where a prefix is served exactly."""
    if spec.lm_head is None:
        raise refuse(spec, "it is an encoder-decoder without an LM head")
    facts, implementations = proof.known(model), _implementations(model)
    stock = None
    if facts is None:
        with _stock(implementations), _quietly(model, spec):
            stock = seq2seq_proof.stock_pairs(model, spec)
        facts = proof.Facts("seq2seq", spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.value_dim, path="in_row")
    state = _begin(model, facts.into(spec), [])
    state.handles.append(TappedHead(spec.lm_head))
    try:
        if stock is None:
            if facts.path == "shared":
                _route(model, state, implementations)
        else:
            with _quietly(model, spec):
                facts = seq2seq_proof.compare_soft(model, state.spec, stock, facts)
                facts = _prove_prefix(model, state, facts, stock, implementations)
            proof.remember(model, facts)
        state.spec = facts.into(spec)
    except BaseException:
        unpatch(model)
        raise
    return model


def _route(model: Any, state: _State, implementations: list[tuple[Any, str | None]]) -> list[Observed]:
    """Route attention through ptengine and tell the decoder's self-attention which layers it is."""
    state.implementations = implementations
    for config, _ in implementations:
        config._attn_implementation = IMPLEMENTATION
    with eval_mode(model):
        observed = seq2seq_proof.observe(model, state.spec)
    own = seq2seq_proof.own_attention(observed)
    places = [replace(one, layer=index) for index, one in enumerate(own)]
    mine = {one.module for one in own}
    state.handles.append(_Places(places, {one.module for one in observed} - mine))
    return observed


def _prove_prefix(
    model: Any,
    state: _State,
    facts: proof.Facts,
    stock: seq2seq_proof.StockPairs,
    implementations: list[tuple[Any, str | None]],
) -> proof.Facts:
    """Hold a prefix through the shared path to the stock model; the model stays as it came where that fails."""
    spec, handles = state.spec, list(state.handles)
    try:
        found = seq2seq_proof.prefix_facts(spec, _route(model, state, implementations))
        found = replace(found, pads=facts.pads)
        prefix = seq2seq_proof.trial_prefix(spec, found)
        with _stock(implementations):
            expected = seq2seq_proof.stock_prefix(model, spec, stock, prefix)
        state.spec = found.into(spec)
        seq2seq_proof.compare_prefix(model, state.spec, stock, prefix, expected)
        found = replace(found, no_generation=seq2seq_proof.compare_steps(model, state.spec, stock, prefix, expected))
        found = seq2seq_proof.compare_soft(model, state.spec, stock, found)  # through the attention of a prefix, too
    except Exception as error:
        for handle in state.handles[len(handles) :]:
            handle.remove()
        state.handles, state.implementations = handles, []
        for config, before in implementations:
            config._attn_implementation = before
        why = str(error).removeprefix(str(refuse(spec, ""))) if isinstance(error, UnsupportedModelError) else None
        why = why or f"a trial step behind a prefix failed ({first_line(error)})"
        return replace(facts, why_in_row=why, no_prefix=why)
    return found


def _begin(model: Any, spec: BackboneSpec, implementations: list[tuple[Any, str | None]]) -> _State:
    state = _State(implementations, spec)
    state.prepare = {name: value for name, value in vars(model).items() if name == _PREPARE}
    setattr(model, _STATE, state)
    _patched_models.add(model)
    return state


def _answer_heads(model: Any, state: _State) -> None:
    base = state.spec.base_model
    if state.spec.kind == "encoder" and model is not base:
        state.handles.append(PreparedForward(base))
    if state.spec.before_head is not None:
        state.handles.append(TappedHead(state.spec.lm_head))  # type: ignore[arg-type]


def unpatch(model: Any) -> Any:
    """Put back everything `patch` changed; returns the model. A model that is not patched is left alone."""
    with PATCHING:
        _unpatch(model)
    return model


def _unpatch(model: Any) -> None:
    state: _State | None = model.__dict__.get(_STATE)
    if state is None:
        return
    _patched_models.discard(model)
    for config, implementation in state.implementations:
        if not any(config is other for other, _ in _routed()):
            config._attn_implementation = implementation
    for handle in state.handles:
        handle.remove()
    model.__dict__.pop(_PREPARE, None)
    model.__dict__.update(state.prepare)
    delattr(model, _STATE)


@contextmanager
def patched(model: Any) -> Iterator[Any]:
    """Patch for the duration of a block; a model that `patch` has patched, before or inside it, stays so after it.

    Blocks may overlap, in several threads, too: the last one that ends puts the model back.
    """
    with PATCHING:
        if not is_patched(model):
            _patch(model)
            model.__dict__[_STATE].blocks = 0
        state: _State = model.__dict__[_STATE]
        if state.blocks is not None:
            state.blocks += 1
    try:
        yield model
    finally:
        with PATCHING:
            if state.blocks is not None:
                state.blocks -= 1
                if not state.blocks and model.__dict__.get(_STATE) is state:
                    _unpatch(model)


def is_patched(model: Any) -> bool:
    return _STATE in getattr(model, "__dict__", {})


def require_patched(model: Any) -> BackboneSpec:
    """The facts of a patched model.

    Raises:
        InputError: the model is not patched, or its attention implementation was changed since.
    """
    state: _State | None = getattr(model, "__dict__", {}).get(_STATE)
    if state is None:
        raise InputError(
            f"expected a patched model, got a stock {type(model).__name__}: call ptengine.patch(model) first"
        )
    for config, _ in state.implementations:
        if config._attn_implementation != IMPLEMENTATION:
            raise InputError(
                f"expected the attention implementation {IMPLEMENTATION!r} of a patched model, got "
                f"{config._attn_implementation!r}: it was changed after patch; unpatch and patch again"
            )
    return state.spec


def _configs(model: nn.Module) -> list[Any]:
    """Every configuration object in the model, once: some families keep one per stack."""
    found = {
        id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None
    }
    return [config for config in found.values() if hasattr(config, "_attn_implementation")]


def _reader(model: Any, spec: BackboneSpec) -> Any:
    """The modules whose attention is routed: of a multimodal model those that read text, which alone see prompts."""
    return spec.base_model if families.is_multimodal(model.config) else model


def _implementations(model: nn.Module) -> list[tuple[Any, str | None]]:
    """Every configuration of `model`, and the implementation to put back one day."""
    return [(config, _implementation_before(config)) for config in _configs(model)]


def _routed() -> list[tuple[Any, str | None]]:
    """The configurations of all patched models and what they had before: models built from one object share it."""
    return [pair for model in _patched_models for pair in model.__dict__[_STATE].implementations]


def _implementation_before(config: Any) -> str | None:
    """The implementation to put back one day, not the one that another model's patch left in a shared configuration."""
    return next((before for other, before in _routed() if other is config), config._attn_implementation)


@contextmanager
def _quietly(model: nn.Module, spec: BackboneSpec) -> Iterator[None]:
    """Eval mode, narrow windows and the caller's random numbers, for a comparison."""
    device = spec.word_embeddings.weight.device
    devices = [device] if device.type == "cuda" else []
    with eval_mode(model), proof.narrowed(model), torch.random.fork_rng(devices):
        yield


def _stock_rows(model: Any, spec: BackboneSpec, implementations: list[tuple[Any, str | None]]) -> StockRows:
    """The comparison's stock side, by the implementation the model had before any patch of a shared configuration."""
    with _stock(implementations), _quietly(model, spec):
        return stock_rows(model, spec)


@contextmanager
def _stock(implementations: list[tuple[Any, str | None]]) -> Iterator[None]:
    """Inside the block the configurations have the implementations to put back one day."""
    now = [config._attn_implementation for config, _ in implementations]
    try:
        for config, before in implementations:
            config._attn_implementation = before
        yield
    finally:
        for (config, _), implementation in zip(implementations, now, strict=True):
            config._attn_implementation = implementation


def _prove(
    model: Any, state: _State, facts: proof.Facts, spec: BackboneSpec, stock: StockRows, links: list[Any]
) -> None:
    """Compare with the stock side, first with the last MLP narrowed; not every block bears that."""
    with _quietly(model, state.spec):
        try:
            facts = proof.compare(model, state.spec, facts, stock)
        except UnsupportedModelError:
            if not links:
                raise
            for link in links:
                link.remove()
                state.handles.remove(link)
            facts = replace(proof.compare(model, state.spec, facts, stock), skips_mlp=False)
        if spec.kind == "encoder":
            facts = proof.read_head(model, state.spec, facts, stock)
    state.spec = facts.into(spec)
    proof.remember(model, facts)


def _left_out(observed: list[Observed], implementations: list[tuple[Any, str | None]]) -> str:
    """What the stock side may lack: SDPA of older transformers caps no scores and knows no sinks, and says nothing."""
    names = sorted({str(before) for _, before in implementations if before != "eager"})
    if not names or not any(one.softcap is not None or one.sinks for one in observed):
        return ""
    return (
        f"; the stock implementation {', '.join(names)} may leave out the cap or the sinks of its scores: load the "
        "model with attn_implementation='eager'"
    )


@torch.no_grad()
def _probe(model: Any, spec: BackboneSpec) -> list[Observed]:
    """Run two tokens and return what each layer handed to attention, in the order of the layers.

    Raises:
        UnsupportedModelError: a layer's attention was not reached or is handed what is not known, or the forward fails.
    """
    device = spec.word_embeddings.weight.device
    observed: list[Observed] = []
    context = PrefixContext(
        cu_seqlens=torch.tensor([0, 2], dtype=torch.int32, device=device), max_seqlen=2, observed=observed
    )
    embeds = spec.word_embeddings(torch.zeros(1, 2, dtype=torch.int64, device=device))  # [1, 2, d]
    try:
        with eval_mode(model):
            hidden = spec.base_model(
                inputs_embeds=embeds, attention_mask=no_mask(device),
                position_ids=spec.first_position + torch.arange(2, device=device)[None],
                **cache_off(spec), **{KEYWORD: context},
            ).last_hidden_state  # fmt: skip
    except UnsupportedModelError as error:
        raise refuse(spec, str(error)) from error
    except Exception as error:
        routed = "" if observed else "its attention does not go through transformers' attention interface, or "
        raise refuse(spec, f"{routed}a trial forward of packed rows failed ({first_line(error)})") from error
    if spec.kind == "encoder" and len(observed) == spec.num_layers:  # in which every module is called in its turn
        observed = [replace(one, layer=index) for index, one in enumerate(observed)]
    missing = sorted(set(range(spec.num_layers)) - {one.layer for one in observed})
    if missing or hidden.shape[:2] != (1, 2):
        raise refuse(
            spec,
            f"the attention of layers {missing} does not go through transformers' attention interface, or not with the "
            "keywords of the model call",
        )
    return sorted(observed, key=lambda one: one.layer)


class _Places:
    """Tells attention modules which layers they are, `others` that they are none; `remove` takes it back."""

    def __init__(self, observed: list[Observed], others: Iterable[nn.Module] = ()) -> None:
        self.modules = {one.module for one in observed} | set(others)
        for module in self.modules:
            setattr(module, PLACES, tuple(one.layer for one in observed if one.module is module))

    def remove(self) -> None:
        for module in self.modules:
            delattr(module, PLACES)


def no_mask(device: torch.device) -> Tensor:
    """A four-dimensional mask, which transformers hands to attention as it is; packed calls need none and ignore it."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def cache_off(spec: BackboneSpec) -> dict[str, bool]:
    return {"use_cache": False} if spec.kind == "causal" else {}


def _link_last_mlp(spec: BackboneSpec, attention: nn.Module) -> list[Any]:
    """Find the MLP beside the last attention; without one of that name nothing is skipped. Returns what undoes it."""
    for module in spec.base_model.modules():
        children = dict(module.named_children())
        if "mlp" in children and any(child is attention for child in children.values()):
            return list(last_layer.install(attention, children["mlp"]))
    return []
