"""Quantised backbones: prompts below get the gradient of what runs, and models that cannot give it are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import ptengine
from ptengine.backbone import pack_rows, packed_loss
from ptengine.errors import UnsupportedModelError
from ptengine.training.identity import fingerprint_model

from .stock import make, parameters, random_rows, relative, stock_loss, virtual

PACKS = "support_avx512bf16_for_cpu"  # set by bitsandbytes where the CPU has it


def in_4_bits(**changes: Any) -> tuple[Any, list[Any]]:
    """A Llama whose linear layers are bitsandbytes' (NF4, computed in fp32), and these."""
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    model = make("llama", hidden_size=64, intermediate_size=128, **changes)
    layers = []
    for parent in [*model.modules()]:
        for name, linear in [*parent.named_children()]:
            if not isinstance(linear, torch.nn.Linear) or linear is model.lm_head:
                continue
            packed = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, False, compute_dtype=torch.float32, quant_type="nf4"
            )
            packed.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
            setattr(parent, name, packed)
            layers.append(packed)
    return model.to("cpu").eval(), layers


def test_4_bit_layers_on_a_cpu_gave_no_gradient() -> None:
    """bitsandbytes packs them in the first call without a gradient, as in the trial that patching makes."""
    model, layers = in_4_bits()
    for layer in layers:
        setattr(layer, PACKS, True)  # as on a CPU with AVX512-BF16
    rows, prompt = random_rows(9, 3, 14), virtual(6, width=64)
    with ptengine.patched(model):
        assert not any(getattr(layer, PACKS) for layer in layers)
        copied = copy.deepcopy(model)
        found = packed_loss(model, prompt, pack_rows(rows, rows)).loss
        got = torch.autograd.grad(found, parameters(prompt))
    assert all(getattr(layer, PACKS) for layer in layers)
    assert not any(getattr(module, PACKS, False) for module in copied.modules())
    ptengine.unpatch(copied)
    assert getattr(copied.model.layers[0].mlp.up_proj, PACKS)
    for layer in layers:
        setattr(layer, PACKS, False)
    exact = stock_loss(model, [prompt] * 3, rows, rows)
    for ours, theirs in zip(got, torch.autograd.grad(exact, parameters(prompt)), strict=True):
        assert relative(ours, theirs) < 1e-5
        assert theirs.abs().max() > 0


def test_4_bit_layers_that_are_packed_are_refused() -> None:
    model, layers = in_4_bits()
    for layer in layers:
        setattr(layer, PACKS, True)
    layers[3].weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(UnsupportedModelError, match="packed for inference when the model first ran"):
        ptengine.patch(model)
    assert not ptengine.supports(model).supported
    assert all(getattr(layer, PACKS) for layer in layers)
    assert model.config._attn_implementation != "ptengine"


def test_a_head_of_codes_is_refused() -> None:
    model = make("llama")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"a Linear of torch\.uint8: leave the head out"):
        ptengine.patch(model)


def test_fingerprints_of_4_bit_models_saw_no_scales() -> None:
    one, _ = in_4_bits()
    other, layers = in_4_bits()
    assert fingerprint_model(one) == fingerprint_model(other)
    layers[0].weight.quant_state.absmax.mul_(3)
    assert fingerprint_model(one) != fingerprint_model(other)


def test_a_trainer_could_not_read_weights_of_torchao() -> None:
    """Nor the loss an LM head of it. `attached` and `generate` could."""
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    model = make("llama", hidden_size=64, intermediate_size=128)
    plain = fingerprint_model(model)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert type(model.lm_head.weight) is not torch.nn.Parameter
    found = fingerprint_model(model)
    assert found == fingerprint_model(copy.deepcopy(model)) != plain
    rows, prompt = random_rows(9, 3, 14), virtual(6, width=64)
    with ptengine.patched(model):
        got = torch.autograd.grad(packed_loss(model, prompt, pack_rows(rows, rows)).loss, parameters(prompt))
    exact = torch.autograd.grad(stock_loss(model, [prompt] * 3, rows, rows), parameters(prompt))
    for ours, theirs in zip(got, exact, strict=True):
        assert relative(ours, theirs) < 1e-5
