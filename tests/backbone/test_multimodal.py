"""Models that read images or sounds beside text: prompts before text, through the part that reads it."""

from __future__ import annotations

from typing import Any

import family_seq2seq
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

from ptengine.backbone import backbone_spec, generate, pack_rows, packed_loss, patch, patched, supports
from ptengine.backbone.spec import kind_of
from ptengine.errors import InputError, UnsupportedModelError
from ptengine.prompts import Prefix, SoftPrompt

from .stock import random_rows, relative, stock_loss, virtual
from .test_generation import in_row, same
from .test_patching import traces

WIDTH, PROMPT, IMAGE = 48, 7, 96
LENGTHS = (5, 11, 1, 8)
TEXT = {
    "vocab_size": 97, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 128, "initializer_range": 0.2, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
SEES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAVA = {
    "text_config": TEXT | {"model_type": "llama"}, "image_token_index": IMAGE, "vision_feature_layer": -1,
    "vision_config": SEES | {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4},
}  # fmt: skip
QWEN = {
    "text_config": TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}},
    "vision_config": {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": WIDTH, "mlp_ratio": 1},
    "image_token_id": IMAGE, "video_token_id": IMAGE - 1, "vision_start_token_id": IMAGE - 2,
}  # fmt: skip
HEARS = {
    "text_config": TEXT | {"model_type": "qwen2"}, "audio_token_index": IMAGE,
    "audio_config": {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32},
}  # fmt: skip
SERVED = {"llava": LLAVA, "qwen2_vl": QWEN, "qwen2_audio": HEARS}


def make(family: str) -> Any:
    torch.manual_seed(0)
    auto = AutoModelForSeq2SeqLM if family == "qwen2_audio" else AutoModelForImageTextToText
    return auto.from_config(AutoConfig.for_model(family, **SERVED[family])).float().eval().requires_grad_(False)


@pytest.mark.parametrize("family", SERVED)
def test_text_equals_stock(family: str) -> None:
    """Losses, gradients and generation against the whole stock model; patched and put back the text's part alone."""
    model, rows, prompt = make(family), random_rows(*LENGTHS), virtual(PROMPT, width=WIDTH)
    before = traces(model)
    # Alone: some of these models remember the positions of the batch that was generated last.
    wanted = [in_row(make(family), prompt, row, 8, do_sample=False) for row in rows]
    expected = stock_loss(model, [prompt] * 4, rows, rows)
    exact = torch.autograd.grad(expected, [prompt.embeds])[0]
    with patched(model):
        assert backbone_spec(model).path == "shared"
        loss = packed_loss(model, prompt, pack_rows(rows, rows)).loss
        assert model.config._attn_implementation != "ptengine"  # that of what sees and hears, too
        assert model.config.text_config._attn_implementation == "ptengine"
    assert abs(loss.item() - expected.item()) < 1e-5
    assert relative(torch.autograd.grad(loss, [prompt.embeds])[0], exact) < 1e-5
    assert traces(model) == before
    out = generate(model, prompt, rows, max_new_tokens=8, do_sample=False)
    for index, exact_row in enumerate(wanted):
        same(out[index : index + 1, max(LENGTHS) :], exact_row)


@pytest.mark.parametrize("family", SERVED)
def test_attached_to_text(family: str) -> None:
    """Stock calls of the whole model see the prompt."""
    model = make(family)
    prompt, ids = SoftPrompt(model, PROMPT), torch.tensor(random_rows(9))
    embeds = torch.cat([prompt.lower().embeds[None], model.get_input_embeddings()(ids)], dim=1)
    with torch.no_grad():
        exact = model(inputs_embeds=embeds).logits[:, PROMPT:]
    with prompt.attached(model), torch.no_grad():
        assert relative(model(ids).logits, exact) < 1e-5


def test_an_image_behind_an_attached_prompt() -> None:
    """Its embeddings stand in the text like words: the same numbers as with the virtual tokens in the row."""
    model = make("llava")
    prompt, ids = SoftPrompt(model, PROMPT), torch.tensor([[5, IMAGE, IMAGE, IMAGE, IMAGE, 7, 9]])
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    embeds = torch.cat([prompt.lower().embeds[None], model.get_input_embeddings()(ids)], dim=1)
    with torch.no_grad():
        exact = model(inputs_embeds=embeds, pixel_values=pixels).logits[:, PROMPT:]
        blind = model(inputs_embeds=embeds).logits[:, PROMPT:]
    with prompt.attached(model), torch.no_grad():
        got = model(ids, pixel_values=pixels).logits
    assert relative(got, exact) < 1e-5
    assert relative(blind, exact) > 1e-2


def test_a_hybrid_that_remembers_a_batch() -> None:
    """Patching tries `generate`, whose offsets of positions the model keeps: stock calls of other sizes then failed."""
    model = family_seq2seq.build("qwen3_5", "multimodal")
    before, ids = traces(model), torch.tensor(random_rows(9, 9))
    embeds = model.get_input_embeddings()(ids)
    kept = model.model.rope_deltas
    with torch.no_grad(), patched(model):
        assert backbone_spec(model).path == "in_row"
        assert backbone_spec(model).no_generation is None
        assert model.model.rope_deltas is kept
        got = model(inputs_embeds=embeds).logits
    assert traces(model) == before
    with torch.no_grad():
        assert torch.equal(got, model(inputs_embeds=embeds).logits)


def test_positions_of_text_along_several_axes() -> None:
    """As `generate` gives them: the same along every axis."""
    model = make("qwen2_vl")
    ids = torch.tensor(random_rows(6))
    with SoftPrompt(model, PROMPT).attached(model), torch.no_grad():
        assert torch.equal(model(ids, position_ids=torch.arange(6).expand(3, 1, 6)).logits, model(ids).logits)


def test_positions_of_images_are_refused() -> None:
    """Behind a prompt they would have to move along some axes: never a wrong number."""
    model = make("qwen2_vl")
    positions = torch.arange(6).expand(3, 1, 6).clone()
    positions[1, 0, 3:] += 2
    with (
        SoftPrompt(model, PROMPT).attached(model),
        pytest.raises(InputError, match="position_ids that differ between them, as those of images do"),
    ):
        model(torch.tensor(random_rows(6)), position_ids=positions)


def test_prefix_of_the_text_part() -> None:
    prompt = Prefix(make("llava"), 3)
    assert prompt.lower().keys.shape == (2, 3, 2, WIDTH // 4)


def test_a_model_that_needs_an_image_is_refused() -> None:
    torch.manual_seed(0)
    text = TEXT | {"encoder_hidden_size": 32, "max_position_embeddings": 64}
    config = AutoConfig.for_model("blip", text_config=text, vision_config=SEES | {"image_size": 8, "patch_size": 4})
    model = AutoModelForImageTextToText.from_config(config).eval()
    with pytest.raises(UnsupportedModelError, match="'blip' is not supported: it does not run on input embeddings"):
        patch(model)
    assert not supports(model).supported


def test_kinds_by_the_configuration() -> None:
    """Transformers lists causal models that read sounds among encoder-decoders."""
    assert kind_of("qwen2_audio") == "causal"
    assert kind_of("t5") == "seq2seq"
    assert kind_of("qwen2_vl") == "causal"
