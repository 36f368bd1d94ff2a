"""Families that no list names: served exactly, as the comparison at patching found, or refused and left alone."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ptengine.backbone import attention as attention_module
from ptengine.backbone import (
    backbone_spec,
    capture_prefix,
    generate,
    pack_rows,
    packed_loss,
    patch,
    patched,
    proof,
    supports,
    unpatch,
)
from ptengine.errors import UnsupportedModelError
from ptengine.prompts import Prefix

from .stock import parameters, random_rows, relative, stock_loss, virtual
from .test_generation import in_row, same, stock_prefix_search
from .test_patching import traces

WIDTH, WINDOW, PROMPT = 48, 6, 7
LENGTHS = (5, 11, 1, 8)
COMMON = {
    "vocab_size": 97, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
GQA = {"num_key_value_heads": 2}
HEADS = GQA | {"head_dim": 16}
HYBRID = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32,
    "first_k_dense_replace": 1, "num_key_value_heads": 4,
}  # fmt: skip
SERVED: dict[str, dict[str, Any]] = {
    "mistral": GQA | {"sliding_window": WINDOW},
    "qwen2": GQA | HYBRID | {"use_sliding_window": True},
    "qwen3": HEADS | HYBRID | {"use_sliding_window": True},
    "gemma2": HEADS | HYBRID | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
                                "query_pre_attn_scalar": 16},
    "gemma3_text": HEADS | HYBRID | {"query_pre_attn_scalar": 16},
    "gpt_neox": {"use_parallel_residual": True},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": WIDTH, "init_std": 0.2},
    "phi3": GQA,
    "mixtral": GQA | {"num_local_experts": 4},
    "gpt_oss": HEADS | HYBRID | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo2": GQA,
    "deepseek_v3": LATENT,
    "cohere2": HEADS | HYBRID | {"logit_scale": 0.25},
    "granite": GQA | {"logits_scaling": 4.0, "attention_multiplier": 0.5, "residual_multiplier": 0.5},
}  # fmt: skip
# Under latent attention the stock cache holds latents, so a prefix of keys and values has no stock row to compare with.
CACHED = [family for family in SERVED if family != "deepseek_v3"]
GENERATED = ("mistral", "gemma2", "gemma3_text", "opt", "gpt_oss", "deepseek_v3", "cohere2")
LINEAR = ["linear_attention", "full_attention"]
IN_ROW: dict[str, tuple[dict[str, Any], str]] = {
    "bloom": ({"n_layer": 2, "n_head": 4}, "does not go through transformers' attention interface"),
    "falcon": ({}, r"attention of layers \[0, 1\] does not go through"),
    "gpt_neo": ({"num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}, "does not go through|window"),
    "mamba": ({"state_size": 4}, "linear_attention"),
    "qwen3_next": (HEADS | {"layer_types": LINEAR, "num_experts": 4, "num_experts_per_tok": 2}, "linear_attention"),
    "llama4_text": (HEADS | {"layer_types": ["chunked_attention", "full_attention"]}, "chunked_attention"),
    "bart": ({"d_model": WIDTH, "decoder_layers": 2, "encoder_layers": 2, "decoder_attention_heads": 4,
              "decoder_ffn_dim": 64}, "ignores position_ids"),
}  # fmt: skip
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "reformer": (
        {
            "is_decoder": True,
            "axial_pos_embds": False,
            "attn_layers": ["local", "local"],
            "attention_head_size": 12,
            "feed_forward_size": 64,
        },
        "no gradient reaches its input embeddings",
    ),
}


def make(family: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    changes = SERVED[family] if family in SERVED else (IN_ROW | REFUSED)[family][0]
    config = AutoConfig.for_model(family, **(COMMON | changes))
    # SDPA, the default of some releases, leaves out the cap of Gemma 2's scores.
    stock = {"attn_implementation": "eager"} if family == "gemma2" else {}
    model = AutoModelForCausalLM.from_config(config, **stock).float().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):  # far from what leaving them out would be
            parameter.data.normal_(std=2.0)
    return model


def lowered(model: Any, kind: str) -> Any:
    """A prompt whose gradients are of size: embeddings, or the keys and values they have."""
    soft = virtual(PROMPT, width=WIDTH)
    if kind == "soft":
        return soft
    with patched(model), torch.no_grad():
        kept = capture_prefix(model, soft)
    return type(kept)(kept.keys.clone().requires_grad_(), kept.values.clone().requires_grad_())


@pytest.mark.parametrize(
    ("family", "kind"), [(family, "soft") for family in SERVED] + [(family, "prefix") for family in CACHED]
)
def test_loss_and_gradient_equal_stock(family: str, kind: str) -> None:
    """Rows reach beyond the windows: 7 virtual tokens and up to 11 of text, with windows of 6."""
    model, rows = make(family), random_rows(*LENGTHS)
    prompt = lowered(model, kind)
    expected = stock_loss(model, [prompt] * 4, rows, rows)
    exact = torch.autograd.grad(expected, parameters(prompt))
    with patched(model):
        loss = packed_loss(model, prompt, pack_rows(rows, rows)).loss
    assert abs(loss.item() - expected.item()) < 1e-5
    for got, wanted in zip(torch.autograd.grad(loss, parameters(prompt)), exact, strict=True):
        assert relative(got, wanted) < 1e-5


@pytest.mark.parametrize("family", SERVED)
def test_last_layer_and_a_few_labels(family: str) -> None:
    """Where few positions are wanted the last MLP may run on those alone."""
    model, rows, prompt = make(family), random_rows(*LENGTHS), virtual(PROMPT, width=WIDTH)
    labels = [[-100] * (len(row) - 1) + row[-1:] for row in rows]
    expected = stock_loss(model, [prompt] * 4, rows, labels)
    exact = torch.autograd.grad(expected, parameters(prompt))[0]
    with patched(model):
        for _ in range(2):  # nothing of a call is left for the next
            loss = packed_loss(model, prompt, pack_rows(rows, labels)).loss
            assert abs(loss.item() - expected.item()) < 1e-5
        assert relative(torch.autograd.grad(loss, parameters(prompt))[0], exact) < 1e-5


@pytest.mark.parametrize("family", GENERATED)
def test_generation_equals_prompt_in_the_row(family: str) -> None:
    """Ragged rows, padded on the left, until the windows have left the prompt and much of the text behind."""
    model, rows, prompt = make(family), random_rows(*LENGTHS), virtual(PROMPT, width=WIDTH)
    out = generate(model, prompt, rows, max_new_tokens=12, do_sample=False)
    beams = generate(model, prompt, rows, max_new_tokens=6, do_sample=False, num_beams=3)
    kept = lowered(model, "prefix")
    from_prefix = generate(model, kept, rows, max_new_tokens=12, do_sample=False)
    assert torch.equal(out, from_prefix)
    for index, row in enumerate(rows):
        same(out[index : index + 1, max(LENGTHS) :], in_row(model, prompt, row, 12, do_sample=False))
        same(beams[index : index + 1, max(LENGTHS) :], in_row(model, prompt, row, 6, do_sample=False, num_beams=3))
    if family in CACHED:
        same(from_prefix[:1, max(LENGTHS) :], stock_prefix_search(model, kept, rows[0], 12))


@pytest.mark.parametrize("family", SERVED)
def test_stock_calls_of_a_patched_model(family: str) -> None:
    """Without a prompt: padding, a cache, caps and sinks as the family's own implementation computes them."""
    model = make(family)
    ids = torch.tensor(random_rows(12, 12))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0

    def outputs() -> list[Tensor]:
        start = model(ids[:, :9], use_cache=True)
        step = model(ids[:, 9:], past_key_values=start.past_key_values)
        return [model(ids, attention_mask=mask).logits[mask.bool()], start.logits, step.logits]

    before, numbers = traces(model), outputs()
    with patched(model):
        for got, exact in zip(outputs(), numbers, strict=True):
            torch.testing.assert_close(got, exact, rtol=2e-5, atol=2e-5)
    assert traces(model) == before
    assert all(torch.equal(got, exact) for got, exact in zip(outputs(), numbers, strict=True))


@pytest.mark.parametrize("family", REFUSED)
def test_refused_and_left_as_it_was(family: str) -> None:
    model, (_, reason) = make(family), REFUSED[family]
    ids = torch.tensor(random_rows(9))
    before, numbers, state = traces(model), model(ids).logits, torch.get_rng_state()
    with pytest.raises(UnsupportedModelError, match=reason) as raised:
        patch(model)
    assert f"'{family}' is not supported" in str(raised.value)
    report = supports(model)
    assert (report.supported, report.reason) == (False, str(raised.value))
    assert traces(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model(ids).logits, numbers)


def test_facts_are_measured() -> None:
    """Latent attention: the configuration's head_dim is that of the rotary part."""
    spec = backbone_spec(make("deepseek_v3"))
    assert (spec.num_kv_heads, spec.head_dim, spec.value_dim) == (4, 24, 12)
    assert (spec.windowed, spec.no_generation) == ((), None)
    spec = backbone_spec(make("gemma2"))
    assert (spec.num_kv_heads, spec.head_dim, spec.value_dim, spec.windowed) == (2, 16, 16, (0,))
    assert spec.logit_softcap == 3.0
    report = supports(make("gemma2"))
    assert [layer.path for layer in report.layers] == ["shared", "shared"]
    assert ["sliding window" in layer.reason for layer in report.layers] == [True, False]


@pytest.mark.parametrize("family", IN_ROW)
def test_in_the_row(family: str) -> None:
    """What the shared path does not serve runs with its own attention: losses, gradients, and nothing left behind."""
    model, (_, reason), rows = make(family), IN_ROW[family], random_rows(*LENGTHS)
    prompts = [virtual(PROMPT, seed, width=WIDTH) for seed in (0, 1)]
    before, state, ids = traces(model), torch.get_rng_state(), [1, 0, -1, 1]
    expected = stock_loss(model, [None if n < 0 else prompts[n] for n in ids], rows, rows)
    exact = torch.autograd.grad(expected, [prompt.embeds for prompt in prompts])
    with pytest.warns(UserWarning, match="every row with the model's own attention"):  # a slower path says so
        report = supports(model)
    assert report.supported
    assert {layer.path for layer in report.layers} == {"in_row"}
    assert re.search(reason, report.reason)
    with patched(model):
        loss = packed_loss(model, prompts, pack_rows(rows, rows), prompt_ids=ids).loss
    assert abs(loss.item() - expected.item()) < 1e-5
    for got, wanted in zip(torch.autograd.grad(loss, [p.embeds for p in prompts]), exact, strict=True):
        assert relative(got, wanted) < 2e-5
    assert traces(model) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_what_the_row_alone_does_not_offer() -> None:
    model = make("bloom")
    with pytest.raises(UnsupportedModelError, match="not supported by Prefix: its attention does not go"):
        Prefix(model, 3)
    with patched(model), pytest.raises(UnsupportedModelError, match="keeps no prompt apart"):
        capture_prefix(model, virtual(3, width=WIDTH))


def test_layers_of_a_hybrid() -> None:
    layers = supports(make("qwen3_next")).layers
    assert [layer.path for layer in layers] == ["in_row", "in_row"]
    assert layers[0].reason.startswith("linear_attention")
    assert layers[1].reason.startswith("attention, but other layers")


def test_dynamic_rope_ends_where_its_frequencies_change() -> None:
    config = AutoConfig.for_model(
        "llama", **(COMMON | GQA),
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4,
                         "original_max_position_embeddings": 32},
    )  # fmt: skip
    assert backbone_spec(AutoModelForCausalLM.from_config(config)).max_positions == 32


def test_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once per model, not per patch; training mode, random numbers and windows are as before."""
    calls, compare = [], proof.compare
    monkeypatch.setattr(proof, "compare", lambda *args: calls.append(1) or compare(*args))
    model = make("mistral").train()
    state = torch.get_rng_state()
    for _ in range(3):
        patch(model)
        unpatch(model)
        backbone_spec(model)
    assert len(calls) == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert model.config.sliding_window == WINDOW


@pytest.mark.parametrize(
    ("family", "rule"), [("mistral", "window"), ("gemma2", "softcap"), ("gpt_oss", "sinks"), ("qwen2", "window")]
)
def test_a_rule_left_out_is_found_out(family: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison refuses what attention does not respect: a rule that is lost on the way."""
    keywords = attention_module._Rules.keywords
    monkeypatch.setattr(attention_module._Rules, "keywords", lambda self: keywords(self) | {rule: None})
    model, lost = make(family), r"differ from the stock computation by \d"
    if rule != "window" and model.config._attn_implementation != "eager":
        with pytest.raises(UnsupportedModelError, match=lost):  # the stock side may have left it out
            patch(model)
    else:
        assert backbone_spec(model).path == "in_row"
        assert re.search(lost, str(backbone_spec(model).why_in_row))


def test_an_unknown_keyword_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("mistral")
    stock = attention_module._rules
    monkeypatch.setattr(
        attention_module, "_rules", lambda window, cap, sinks, others: stock(window, cap, sinks, others | {"bias": 1})
    )
    assert backbone_spec(model).path == "in_row"
    assert re.search("its attention is handed .*bias", str(backbone_spec(model).why_in_row))


def test_a_stock_side_that_leaves_out_the_cap_is_named() -> None:
    model = make("gemma2")
    model.config._attn_implementation = "sdpa"
    named = r"sdpa may leave out the cap .*attn_implementation='eager'"
    with pytest.raises(UnsupportedModelError, match=rf"{named}|does not support `softcap`"):  # newer releases say so
        patch(model)
    assert model.config._attn_implementation == "sdpa"
