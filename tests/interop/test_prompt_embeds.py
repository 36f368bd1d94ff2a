"""Virtual tokens as a tensor of input embeddings: what stock transformers computes with the file alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from ptengine.backbone import generate
from ptengine.errors import InputError
from ptengine.interop import save_prompt_embeds
from ptengine.prompts import DecomposedPrompt, LoPAPrompt, Prefix, SoftPrompt
from ptengine.training.identity import fingerprint_model

from ..backbone.stock import CAUSAL, VOCABULARY, config, make, random_rows, relative
from .attached_cases import prompt_for


def model_of(family: str, dtype: torch.dtype) -> Any:
    if family != "gemma3":
        return make(family).to(dtype)
    shape = {name: getattr(config("llama"), name) for name in ("hidden_size", "num_hidden_layers", "intermediate_size")}
    torch.manual_seed(0)
    settings = Gemma3TextConfig(
        **shape, vocab_size=VOCABULARY, num_attention_heads=4, num_key_value_heads=2, head_dim=16, pad_token_id=2
    )
    return Gemma3ForCausalLM(settings).to(dtype).eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*CAUSAL, "gemma3"])
def test_stock_transformers_gives_our_logits(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    """Also of a model that scales its table, behind which the rows stand."""
    model = model_of(family, dtype)
    prompt, rows = prompt_for(model, "soft"), random_rows(9)
    assert save_prompt_embeds(model, prompt, tmp_path / "out") == tmp_path / "out"
    told = json.loads((tmp_path / "out" / "prompt_embeds.json").read_text())
    embeds = load_file(tmp_path / "out" / told["file"])[told["tensor"]]
    assert [*embeds.shape] == told["shape"] == [6, 48]
    assert str(embeds.dtype) == f"torch.{told['dtype']}" == str(dtype)
    assert told["fingerprint"] == fingerprint_model(model)
    assert told["backbone"]["model_type"] == model.config.model_type
    both = torch.cat([embeds[None], model.get_input_embeddings()(torch.tensor(rows))], dim=1)
    with torch.no_grad():
        got = model(inputs_embeds=both).logits[0, 6:]
        with prompt.attached(model):
            exact = model(torch.tensor(rows)).logits[0]
    assert relative(got.float(), exact.float()) < 8 * torch.finfo(dtype).eps
    if dtype == torch.float32:
        settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2}
        found = model.generate(inputs_embeds=both, attention_mask=torch.ones(1, both.shape[1]), **settings)
        wanted = generate(model, prompt, rows, **settings)
        assert torch.equal(found, wanted[:, 9:])


def test_a_fingerprint_tells_models_apart(tmp_path: Path) -> None:
    prints = []
    for seed in (0, 0, 1):
        model = make("llama", seed)
        save_prompt_embeds(model, SoftPrompt(model, 4), tmp_path)
        prints.append(json.loads((tmp_path / "prompt_embeds.json").read_text())["fingerprint"])
    assert prints[0] == prints[1] != prints[2]


def test_refused(tmp_path: Path) -> None:
    model, bert = make("llama"), make("bert")
    cases: list[tuple[Any, Any, str]] = [
        (model, Prefix(model, 4), "expected a SoftPrompt, got 'prefix': .* PEFT's format .* holds this one"),
        # These two were called keys and values of layers, which PEFT's format holds.
        (model, LoPAPrompt(model, 4), "got 'lopa_prompt': .*, are input embeddings$"),
        (model, DecomposedPrompt(model, 4, max_length=8, rank=2), "got '.*': .*, are input embeddings$"),
        (model, SoftPrompt(make("qwen3"), 4), "made for another backbone"),
        (bert, SoftPrompt(bert, 4), "causal model with an LM head, got BertForSequenceClassification"),
        (model.model, SoftPrompt(model, 4), "causal model with an LM head, got LlamaModel"),
    ]
    for backbone, prompt, message in cases:
        with pytest.raises(InputError, match=message):
            save_prompt_embeds(backbone, prompt, tmp_path / "out")
    assert not list(tmp_path.iterdir())
