"""Heads of more than one module in PEFT checkpoints, against the real peft: nothing that was trained is left out."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
)

from ptengine import HeadedPrompt
from ptengine.backbone.heads import task_head
from ptengine.errors import InputError
from ptengine.interop import load_peft, save_peft
from ptengine.prompts import SoftPrompt

peft = pytest.importorskip("peft")

SIZE = {"vocab_size": 61, "pad_token_id": 2, "max_position_embeddings": 64, "num_labels": 3}
WIDE = SIZE | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "cls_token_id": 0, "sep_token_id": 1}
IDS_IN = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])

pytestmark = pytest.mark.filterwarnings("ignore:.*first slot, a virtual token")


def make_model(family: str) -> Any:
    """The head beside `classifier`: pre_classifier of DistilBERT, head of ModernBERT, pooler of DeBERTa."""
    torch.manual_seed(0)
    model: Any
    if family == "distilbert":
        model = DistilBertForSequenceClassification(
            DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=48, **SIZE)
        )
    elif family == "modernbert":
        model = ModernBertForSequenceClassification(ModernBertConfig(**WIDE, **SPECIAL))
    elif family == "deberta":
        model = DebertaV2ForSequenceClassification(DebertaV2Config(**WIDE))
    else:
        model = BertForSequenceClassification(BertConfig(**WIDE))
    return model.eval().requires_grad_(False)


def trained(family: str) -> tuple[Any, SoftPrompt]:
    """A model whose whole head differs from `make_model`'s, and a prompt."""
    model = make_model(family)
    for parameter in task_head(model).values():
        parameter.add_(torch.randn(parameter.shape))
    return model, SoftPrompt(model, init="array", array=torch.randn(5, 32))


def stock_logits(model: Any, prompt: SoftPrompt) -> Tensor:
    """Of PEFT's model of texts, which classifies by the first slot."""
    words = model.get_input_embeddings()(IDS_IN)
    rows = torch.cat([prompt.embeds.expand(len(words), -1, -1), words], dim=1)  # [B, P + T, d]
    logits: Tensor = model(inputs_embeds=rows, attention_mask=torch.ones(rows.shape[:2], dtype=torch.int64)).logits
    return logits


@pytest.mark.parametrize("family", ["distilbert", "modernbert", "deberta"])
@torch.no_grad()
def test_no_module_of_a_trained_head_is_left_out(tmp_path: Path, family: str) -> None:
    model, prompt = trained(family)
    save_peft(prompt, tmp_path, model)
    wrapped = peft.PeftModel.from_pretrained(make_model(family), tmp_path).eval()
    found = wrapped(input_ids=IDS_IN, attention_mask=torch.ones_like(IDS_IN)).logits
    torch.testing.assert_close(found, stock_logits(model, prompt), rtol=1e-5, atol=1e-6)
    fresh = make_model(family)
    load_peft(tmp_path, fresh)
    assert all(torch.equal(parameter, task_head(model)[name]) for name, parameter in task_head(fresh).items())


@pytest.mark.parametrize("family", ["distilbert", "modernbert"])
@torch.no_grad()
def test_the_head_that_peft_itself_saves_is_read(tmp_path: Path, family: str) -> None:
    """PEFT trains every module whose name ends in "classifier" and leaves ModernBERT's other part alone."""
    config = peft.PromptTuningConfig(
        task_type="SEQ_CLS", num_virtual_tokens=5, token_dim=32, num_layers=2, num_attention_heads=4
    )
    wrapped = peft.get_peft_model(make_model(family), config).eval()
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape))
    wrapped.save_pretrained(tmp_path)
    model = make_model(family)
    prompt = load_peft(tmp_path, model)
    found = wrapped(input_ids=IDS_IN, attention_mask=torch.ones_like(IDS_IN)).logits
    assert isinstance(prompt, SoftPrompt)
    torch.testing.assert_close(stock_logits(model, prompt), found, rtol=1e-5, atol=1e-6)


def test_a_head_of_the_prompts_own_is_written_whole(tmp_path: Path) -> None:
    model, prompt = trained("distilbert")
    headed = HeadedPrompt(make_model("distilbert"), prompt, ("a", "b", "c"), head=task_head(model))
    save_peft(headed, tmp_path / "own", make_model("distilbert"))
    save_peft(prompt, tmp_path / "model", model)
    own, models = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("own", "model"))
    assert "base_model.pre_classifier.weight" in own
    assert own.keys() == models.keys()
    assert all(torch.equal(own[name], models[name]) for name in own)


def test_a_head_that_is_not_the_models_is_refused(tmp_path: Path) -> None:
    model = make_model("bert")
    headed = HeadedPrompt(model, SoftPrompt(model, 5), ("a", "b", "c"))
    other = BertForSequenceClassification(BertConfig(**(WIDE | {"num_labels": 5})))
    with pytest.raises(InputError, match=r"expected a prompt with the head .*\[5, 32\].*, got .*\[3, 32\]"):
        save_peft(headed, tmp_path / "out", other)
    assert not (tmp_path / "out").exists()


def test_a_head_of_one_module_is_named_as_peft_names_it(tmp_path: Path) -> None:
    model, prompt = trained("bert")
    save_peft(prompt, tmp_path, model)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["classifier", "score"]


@pytest.mark.parametrize("load_head", [True, False])
@pytest.mark.parametrize(
    ("family", "module", "named"),
    [
        ("bert", "pooler", "bert.pooler.dense.bias"),
        ("bert", "encoder.layer.1.output", "bert.encoder.layer.1.output.LayerNorm.bias"),
        ("bare", "pooler", "pooler.dense.bias"),
        ("llama", "lm_head", "lm_head.weight"),
    ],
)
def test_a_prompt_trained_with_parts_of_the_backbone_does_not_come_without_them(
    tmp_path: Path, family: str, module: str, named: str, load_head: bool
) -> None:
    model: Any = LlamaForCausalLM(LlamaConfig(**WIDE)) if family == "llama" else make_model("bert")
    if family == "bare":
        model = model.bert
    task_type = {"bert": "SEQ_CLS", "bare": "FEATURE_EXTRACTION", "llama": "CAUSAL_LM"}[family]
    config = peft.PromptTuningConfig(
        task_type=task_type, num_virtual_tokens=5, token_dim=32, num_layers=2, num_attention_heads=4,
        modules_to_save=[module],
    )  # fmt: skip
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"together with '{named}' of the backbone .modules_to_save .*'{module}'"):
        load_peft(tmp_path, model, load_head=load_head)
