"""Causal models whose LM head is more than a matrix over the last hidden states, and positions that begin elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ptengine.backbone import backbone_spec, generate, label_log_probs, pack_rows, packed_loss, patched
from ptengine.backbone.heads import _tap
from ptengine.backbone.lowering import VirtualTokens
from ptengine.errors import UnsupportedModelError

from .stock import random_rows, relative, stock_loss, virtual
from .test_families import COMMON, LENGTHS, PROMPT, make
from .test_generation import same

DECODER = COMMON | {"is_decoder": True}
# A transform before the matrix; one inside the module of the matrix; positions that begin behind the padding token's
# id; words narrower than the model; no routed attention.
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("shared", DECODER),
    "roberta": ("shared", DECODER),
    "electra": ("shared", DECODER | {"embedding_size": 32}),
    "modernbert-decoder": ("shared", COMMON | {"local_attention": 64, "global_attn_every_n_layers": 1}),
    "megatron-bert": ("in_row", DECODER),
}


def decoder(family: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **HEADS[family][1])
    return AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)


def prompt_of(model: Any) -> VirtualTokens:
    return virtual(PROMPT, width=model.get_input_embeddings().weight.shape[1])


@pytest.mark.filterwarnings("ignore:model type 'megatron-bert'")
@pytest.mark.parametrize("family", HEADS)
def test_loss_and_gradient_equal_stock(family: str) -> None:
    model, rows = decoder(family), random_rows(*LENGTHS)
    prompt = prompt_of(model)
    expected = stock_loss(model, [prompt] * 4, rows, rows)
    exact = torch.autograd.grad(expected, [prompt.embeds])[0]
    with patched(model):
        spec = backbone_spec(model)
        if spec.kind != "causal":
            pytest.skip("this release of transformers shows a decoder what stands behind a token")
        assert (spec.path, spec.before_head is None) == (HEADS[family][0], False)
        loss = packed_loss(model, prompt, pack_rows(rows, rows)).loss
        log_probs, _ = label_log_probs(model, prompt, pack_rows(rows, rows))
    assert abs(loss.item() - expected.item()) < 1e-5
    assert abs(-log_probs.mean().item() - expected.item()) < 1e-5
    assert relative(torch.autograd.grad(loss, [prompt.embeds])[0], exact) < 1e-5
    assert not any(hook is _tap for module in model.modules() for hook in module._forward_pre_hooks.values())


@torch.no_grad()
def searched(model: Any, prompt: VirtualTokens, ids: list[int], new: int) -> torch.Tensor:
    """Greedy search [1, new] by whole forwards of a row: the stock `generate` of RoBERTa counts positions from 0."""
    found: list[int] = []
    while len(found) < new and found[-1:] != [COMMON["eos_token_id"]]:
        words = model.get_input_embeddings()(torch.tensor(ids + found))
        logits = model(inputs_embeds=torch.cat([prompt.embeds, words])[None]).logits
        found.append(int(logits[0, -1].argmax()))
    return torch.tensor([found])


@pytest.mark.parametrize("family", [family for family, (path, _) in HEADS.items() if path == "shared"])
def test_generation_equals_prompt_in_the_row(family: str) -> None:
    """Regression: positions that begin behind the padding token's id began at 0 in steps with a cache."""
    model, rows = decoder(family), random_rows(*LENGTHS)
    prompt = prompt_of(model)
    out = generate(model, prompt, rows, max_new_tokens=8, do_sample=False)
    for index, row in enumerate(rows):
        same(out[index : index + 1, max(LENGTHS) :], searched(model, prompt, row, 8))


def test_a_head_that_depends_on_more_is_refused() -> None:
    """Logits that no module of the model makes of the last hidden states."""
    model = make("olmo2")
    forward = model.forward

    def shifted(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = out.logits + torch.arange(97)
        return out

    model.forward = shifted
    with pytest.raises(UnsupportedModelError, match="its logits are not those of its LM head over the last hidden"):
        backbone_spec(model)


def test_a_head_whose_declared_scale_is_not_applied() -> None:
    """As in models of vision and language around one whose own head is scaled."""
    model = make("cohere2")
    model.logit_scale, model.config.logit_scale = 1.0, 0.25
    assert backbone_spec(model).logit_scale == 1.0


def test_a_model_that_gives_no_gradient_is_refused() -> None:
    model = make("olmo2")
    forward = model.base_model.forward
    model.base_model.forward = torch.no_grad()(forward)
    with pytest.raises(UnsupportedModelError, match="no gradient reaches its input embeddings"):
        backbone_spec(model)
