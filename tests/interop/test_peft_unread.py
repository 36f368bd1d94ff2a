"""Backbones that do not read a prefix as PEFT hands it over, against the real peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AlbertConfig, AlbertModel, DistilBertConfig, DistilBertModel, ModernBertConfig, ModernBertModel

from ptengine.errors import InputError
from ptengine.interop import load_peft, save_peft
from ptengine.prompts import Prefix, SoftPrompt

peft = pytest.importorskip("peft")

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
IDS = {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "cls_token_id": 0, "sep_token_id": 1}
BACKBONES = {
    "albert": lambda: AlbertModel(AlbertConfig(**SIZE, **IDS, embedding_size=16)),
    "distilbert": lambda: DistilBertModel(DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=48, **IDS)),
    "modernbert": lambda: ModernBertModel(ModernBertConfig(**SIZE, **IDS)),
}


def make(family: str) -> Any:
    torch.manual_seed(0)
    return BACKBONES[family]().eval().requires_grad_(False)


@pytest.mark.parametrize("family", BACKBONES)
@torch.no_grad()
def test_a_prefix_that_peft_would_ignore_is_refused(tmp_path: Path, family: str) -> None:
    config = peft.PrefixTuningConfig(
        task_type="FEATURE_EXTRACTION", num_virtual_tokens=5, num_layers=2, token_dim=32, num_attention_heads=4
    )
    wrapped = peft.get_peft_model(make(family), config).eval()
    torch.nn.init.normal_(wrapped.prompt_encoder.default.embedding.weight)
    wrapped.save_pretrained(tmp_path / "theirs")
    model, ids = make(family), torch.tensor([[5, 6, 7, 8]])
    theirs = wrapped(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    assert torch.equal(theirs, model(ids).last_hidden_state)
    message = f"reads past_key_values, as which PEFT hands over a prefix, got '{family}': {type(model).__name__} takes"
    with pytest.raises(InputError, match=message):
        load_peft(tmp_path / "theirs", model)
    with pytest.raises(InputError, match=message):
        save_peft(Prefix(model, 5), tmp_path / "ours", task_type="FEATURE_EXTRACTION")
    assert not (tmp_path / "ours").exists()
    save_peft(SoftPrompt(model, 5), tmp_path / "ours", task_type="FEATURE_EXTRACTION")  # which every model reads
