"""PEFT checkpoints, both ways, against the real peft: same numbers, same logits, same files."""

from __future__ import annotations

import json
import shutil
import warnings
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DynamicCache,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ptengine import HeadedPrompt
from ptengine.errors import InputError
from ptengine.interop import load_peft, save_peft
from ptengine.prompts import Prefix, Prompt, SoftPrompt

peft = pytest.importorskip("peft")

IDS = {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
GPT2 = IDS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
SIZE |= IDS | {"max_position_embeddings": 64}
FAMILIES = ["gpt2", "llama", "qwen3", "bert"]


def make_model(family: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(**GPT2))
    elif family == "gpt2-classifier":
        model = GPT2ForSequenceClassification(GPT2Config(**GPT2, num_labels=3))
    elif family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZE, num_key_value_heads=2))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**SIZE, num_key_value_heads=2, head_dim=16))
    else:
        model = BertForSequenceClassification(BertConfig(**SIZE, num_labels=3))
    return model.eval().requires_grad_(False)


def prompt_for(model: Any, kind: str) -> Prompt:
    """A prompt with numbers large enough to move the logits."""
    if kind == "soft":
        return SoftPrompt(model, init="array", array=torch.randn(5, model.config.hidden_size))
    if kind == "projected":
        return Prefix(model, 5, projection=True, projection_size=7)
    shape = Prefix(model, 5).keys.shape
    return Prefix(model, init="array", array=torch.randn(2, *shape))


def logits_by_hand(model: Any, prompt: Prompt, ids: torch.Tensor) -> torch.Tensor:
    """The stock model with the prompt placed in every row, or laid into its cache."""
    rows, count = len(ids), prompt.num_virtual_tokens
    mask = torch.ones(rows, count + ids.shape[1], dtype=torch.int64)
    lowered = prompt.lower()
    if isinstance(prompt, SoftPrompt):
        words = model.get_input_embeddings()(ids)
        both = torch.cat([lowered.embeds.expand(rows, -1, -1), words], dim=1)  # [B, P + T, d]
        return model(inputs_embeds=both, attention_mask=mask).logits
    pairs = [
        (k.transpose(0, 1).expand(rows, -1, -1, -1), v.transpose(0, 1).expand(rows, -1, -1, -1))
        for k, v in zip(lowered.keys, lowered.values, strict=True)
    ]
    return model(ids, past_key_values=DynamicCache(pairs), attention_mask=mask).logits


def peft_logits(wrapped: Any, ids: torch.Tensor) -> torch.Tensor:
    return wrapped(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


IDS_IN = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.mark.parametrize("kind", ["soft", "flat", "projected"])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_what_we_write_and_gives_our_logits(tmp_path, family, kind):
    model = make_model(family)
    prompt = prompt_for(model, kind)
    head = model if family == "bert" else None
    assert save_peft(prompt, tmp_path / "out", head) == tmp_path / "out"
    wrapped = peft.PeftModel.from_pretrained(make_model(family), tmp_path / "out").eval()
    weight = wrapped.prompt_encoder["default"].embedding.weight
    assert torch.equal(weight, load_file(tmp_path / "out/adapter_model.safetensors")["prompt_embeddings"])
    with torch.no_grad():
        ours, theirs = logits_by_hand(model, prompt, IDS_IN), peft_logits(wrapped, IDS_IN)
        bare = model(IDS_IN).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)
    if family != "bert" and kind == "soft":
        ours = ours[:, 5:]
    assert (ours - bare).abs().max() > 1e-4


def peft_config(kind: str, task_type: str) -> Any:
    if kind == "soft":
        return peft.PromptTuningConfig(task_type=task_type, num_virtual_tokens=5)
    return peft.PrefixTuningConfig(
        task_type=task_type, num_virtual_tokens=5, prefix_projection=kind == "projected", encoder_hidden_size=7
    )


@pytest.mark.parametrize("kind", ["soft", "flat", "projected"])
@pytest.mark.parametrize("family", [*FAMILIES, "gpt2-classifier"])
def test_we_load_what_peft_writes_with_identical_numbers_and_logits(tmp_path, family, kind):
    task_type = "SEQ_CLS" if family in ("bert", "gpt2-classifier") else "CAUSAL_LM"
    wrapped = peft.get_peft_model(make_model(family), peft_config(kind, task_type)).eval()
    wrapped.save_pretrained(tmp_path)
    model = make_model(family, seed=0)
    prompt = load_peft(tmp_path, model)
    assert type(prompt) is (SoftPrompt if kind == "soft" else Prefix)
    assert prompt.num_virtual_tokens == 5
    assert all(p.requires_grad and p.is_leaf and p.dtype == torch.float32 for p in prompt.parameters())
    saved = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
    if kind == "soft":
        assert torch.equal(prompt.embeds, saved)
    else:
        layers, count, heads, width = prompt.keys.shape
        view = saved.view(count, 2 * layers, heads, width)
        for layer in range(layers):
            assert torch.equal(prompt.keys[layer], view[:, 2 * layer])
            assert torch.equal(prompt.values[layer], view[:, 2 * layer + 1])
    with torch.no_grad():
        torch.testing.assert_close(
            logits_by_hand(model, prompt, IDS_IN), peft_logits(wrapped, IDS_IN), rtol=0, atol=1e-6
        )


HEADS = {
    "TOKEN_CLS": (BertForTokenClassification, "classifier"),
    "QUESTION_ANS": (BertForQuestionAnswering, "qa_outputs"),
}


@pytest.mark.parametrize("kind", ["soft", "flat"])
@pytest.mark.parametrize("task_type", HEADS)
def test_heads_of_other_tasks_both_ways(tmp_path, task_type, kind):
    """Token classification and question answering: the trained head travels, and the files are those of peft."""
    make, name = HEADS[task_type]

    def fresh() -> Any:
        torch.manual_seed(0)
        return make(BertConfig(**SIZE, num_labels=2)).eval().requires_grad_(False)

    config = peft_config(kind, task_type)
    if kind == "flat":
        config.encoder_hidden_size = None
    wrapped = peft.get_peft_model(fresh(), config).eval()
    with torch.no_grad():
        for parameter in wrapped.base_model.get_submodule(name).parameters():
            parameter.add_(1.0)
    wrapped.save_pretrained(tmp_path / "theirs")
    model = fresh()
    prompt = load_peft(tmp_path / "theirs", model)
    save_peft(prompt, tmp_path / "ours", model, task_type=task_type)
    again = peft.PeftModel.from_pretrained(fresh(), tmp_path / "ours").eval()
    answers = [by(input_ids=IDS_IN, attention_mask=torch.ones_like(IDS_IN)).to_tuple()[0] for by in (wrapped, again)]
    torch.testing.assert_close(answers[1], answers[0], rtol=0, atol=1e-6)
    with prompt.attached(model):
        found = model(IDS_IN).to_tuple()[0]
    torch.testing.assert_close(found, answers[0][:, -IDS_IN.shape[1] :], rtol=1e-5, atol=1e-6)
    assert torch.equal(getattr(model, name).bias, getattr(fresh(), name).bias + 1)
    ours, theirs = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    heads = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    assert set(heads[0].pop("modules_to_save")) == set(heads[1].pop("modules_to_save"))
    assert heads[0] == heads[1]


@pytest.mark.parametrize("kind", ["soft", "flat"])
@pytest.mark.parametrize("family", [*FAMILIES, "gpt2-classifier"])
def test_our_files_are_those_of_peft(tmp_path, family, kind):
    """Written by peft, loaded, written again: the same configuration text and the same tensors."""
    task_type = "SEQ_CLS" if family in ("bert", "gpt2-classifier") else "CAUSAL_LM"
    config = peft_config(kind, task_type)
    if kind == "flat":
        config.encoder_hidden_size = None  # peft fills in token_dim; a flat prefix has no use for it
    peft.get_peft_model(make_model(family), config).save_pretrained(tmp_path / "theirs")
    model = make_model(family)
    save_peft(load_peft(tmp_path / "theirs", model), tmp_path / "ours", model, task_type=task_type)
    texts = [(tmp_path / who / "adapter_config.json").read_text() for who in ("ours", "theirs")]
    # peft lists the heads of a classifier twice.
    texts[1] = texts[1].replace(
        '"classifier",\n    "score",\n    "classifier",\n    "score"', '"classifier",\n    "score"'
    )
    assert texts[0] == texts[1]
    ours, theirs = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    with safe_open(tmp_path / "ours/adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_real_model_both_ways(tmp_path, shared):
    path = shared / "models/stories260k"
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    ids = torch.tensor([[1, 403, 407, 261, 378]])
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=7,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="Once upon a time",
        tokenizer_name_or_path=str(path),
    )
    wrapped = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(path), config).eval()
    wrapped.save_pretrained(tmp_path / "theirs")
    loaded = load_peft(tmp_path / "theirs", model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    own = SoftPrompt(model, 7, "text", init_text="Once upon a time", tokenizer=tokenizer)
    assert torch.equal(own.embeds, loaded.embeds)
    prefix = Prefix(model, 7, "text", init_text="Once upon a time there was", tokenizer=tokenizer)
    for name, prompt in (("soft", own), ("prefix", prefix)):
        save_peft(prompt, tmp_path / name)
        again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), tmp_path / name).eval()
        with torch.no_grad():
            ours, theirs = logits_by_hand(model, prompt, ids), peft_logits(again, ids)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
        back = load_peft(tmp_path / name, model)
        assert all(torch.equal(back.state_dict()[key], tensor) for key, tensor in prompt.state_dict().items())


@pytest.mark.parametrize("kind", ["soft", "prefix"])
@pytest.mark.parametrize("family", ["bert", "gpt2-classifier"])
def test_a_classifier_that_peft_pools_elsewhere_says_so(tmp_path, family, kind):
    """It was written, and read, without a word, and predicted something else."""
    model = make_model(family)
    differs = (family, kind) == ("bert", "soft")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        save_peft(prompt_for(model, kind), tmp_path, model, task_type="SEQ_CLS")
        load_peft(tmp_path, model)
        load_peft(tmp_path, model, load_head=False)
    about = [str(one.message) for one in said if "first slot, a virtual token" in str(one.message)]
    assert len(about) == (2 if differs else 0)


@pytest.mark.parametrize("family", ["bert", "gpt2-classifier"])
def test_the_trained_head_travels_with_the_prompt(tmp_path, family):
    name = "classifier" if family == "bert" else "score"
    trained = make_model(family)
    torch.nn.init.normal_(getattr(trained, name).weight)
    prompt = prompt_for(trained, "soft")
    save_peft(prompt, tmp_path, trained, task_type="SEQ_CLS")
    wrapped = peft.PeftModel.from_pretrained(make_model(family), tmp_path).eval()
    with torch.no_grad():
        ours, theirs = logits_by_hand(trained, prompt, IDS_IN), peft_logits(wrapped, IDS_IN)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)
    fresh, kept = make_model(family), make_model(family)
    load_peft(tmp_path, fresh)
    assert torch.equal(getattr(fresh, name).weight, getattr(trained, name).weight)
    load_peft(tmp_path, kept, load_head=False)
    assert torch.equal(getattr(kept, name).weight, getattr(make_model(family), name).weight)


def test_half_precision_checkpoints_become_fp32(tmp_path):
    model = make_model("gpt2")
    save_peft(prompt_for(model, "soft"), tmp_path)
    rows = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"].half()
    save_file({"prompt_embeddings": rows}, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    assert torch.equal(load_peft(tmp_path, model).embeds, rows.float())


def test_the_models_name_is_written_for_peft_to_find(tmp_path):
    model = make_model("gpt2")
    model.name_or_path = "org/model"
    save_peft(SoftPrompt(model, 4), tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path).base_model_name_or_path == "org/model"


def change(directory, **values):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def weights(directory, **tensors):
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})


def pickled(directory):
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")


BAD = {
    "no directory": (shutil.rmtree, "there is no adapter_config.json"),
    "no config": (lambda d: (d / "adapter_config.json").unlink(), "there is no adapter_config.json"),
    "config cut short": (lambda d: (d / "adapter_config.json").write_text('{"peft'), "expected a json file"),
    "config not an object": (lambda d: (d / "adapter_config.json").write_text("[]"), "json object.*got list"),
    "no weights": (lambda d: (d / "adapter_model.safetensors").unlink(), "which does not exist"),
    "pickled weights": (pickled, "pickled adapter_model.bin"),
    "damaged weights": (
        lambda d: (d / "adapter_model.safetensors").write_bytes(b"\x00" * 64),
        "expected a safetensors file",
    ),
    "lora": (lambda d: change(d, peft_type="LORA"), "PROMPT_TUNING, P_TUNING, .*got 'LORA'"),
    "adaption prompt": (
        lambda d: change(d, peft_type="ADAPTION_PROMPT"),
        "expected target_modules 'self_attn', got None",
    ),
    "multitask without its tasks": (
        lambda d: change(d, peft_type="MULTITASK_PROMPT_TUNING"),
        r"adapter_model.safetensors: MULTITASK_PROMPT_TUNING needs task_id, got None",
    ),
    "no type": (lambda d: change(d, peft_type=None), "got None"),
    "encoder-decoder task": (lambda d: change(d, task_type="SEQ_2_SEQ_LM"), "encoder-decoder"),
    "two transformers": (lambda d: change(d, num_transformer_submodules=2), "encoder-decoder.*submodules 2"),
    "another depth": (lambda d: change(d, num_layers=4), "needs num_layers 3, got 4"),
    "another width": (lambda d: change(d, token_dim=64), "needs token_dim 32, got 64"),
    "no count": (lambda d: change(d, num_virtual_tokens=None), "num_virtual_tokens.*got None"),
    "too many tokens": (lambda d: change(d, num_virtual_tokens=64), "below the 64 positions"),
    "another count": (lambda d: change(d, num_virtual_tokens=6), r"\[6, 32\], got torch.float32 \[5, 32\]"),
    "no prompt tensor": (
        lambda d: weights(d, other=torch.zeros(5, 32)),
        r"'prompt_embeddings' .*got \['other'\]",
    ),
    "prompt of integers": (lambda d: weights(d, prompt_embeddings=torch.zeros(5, 32, dtype=torch.int8)), "torch.int8"),
    "a head that the model lacks": (
        lambda d: weights(d, prompt_embeddings=torch.zeros(5, 32), **{"base_model.score.weight": torch.zeros(3, 32)}),
        "head named classifier or score.*LlamaForCausalLM",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints_are_one_clear_error(tmp_path, case):
    damage, message = BAD[case]
    model = make_model("llama")
    save_peft(prompt_for(model, "soft"), tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(InputError, match=message):
        load_peft(tmp_path / "out", model)


def test_a_head_of_the_prompts_own_is_written_and_the_models_is_not(tmp_path):
    """PEFT's logits with the checkpoint are those of the model in which this head stands."""
    model = make_model("bert")
    prompt = HeadedPrompt(model, prompt_for(model, "soft"), ["a", "b", "c"][: model.config.num_labels], seed=5)
    save_peft(prompt, tmp_path, model, task_type="SEQ_CLS")
    with_it = make_model("bert")
    prompt.install_head(with_it)
    assert not torch.equal(with_it.classifier.weight, model.classifier.weight)
    wrapped = peft.PeftModel.from_pretrained(make_model("bert"), tmp_path).eval()
    with torch.no_grad():
        ours, theirs = logits_by_hand(with_it, prompt.prompt, IDS_IN), peft_logits(wrapped, IDS_IN)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="expected prompts without heads of their own"):
        save_peft([prompt, prompt], tmp_path, model, peft_type="MULTITASK_PROMPT_TUNING")


def test_a_prefix_for_other_key_value_heads_is_refused(tmp_path):
    """4 heads of 4 and 2 heads of 8 fill the same row of numbers."""
    model = make_model("llama")
    save_peft(prompt_for(model, "flat"), tmp_path)
    change(tmp_path, num_attention_heads=4)
    with pytest.raises(InputError, match="needs num_attention_heads 2, got 4"):
        load_peft(tmp_path, model)


def test_a_head_of_another_shape_is_refused_and_the_model_untouched(tmp_path):
    model = make_model("bert")
    save_peft(prompt_for(model, "soft"), tmp_path, model)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    weights(tmp_path, **(tensors | {"base_model.classifier.weight": torch.zeros(4, 32)}))
    with pytest.raises(InputError, match=r"classifier.weight': \[3, 32\].*got .*classifier.weight': \[4, 32\]"):
        load_peft(tmp_path, model)
    assert torch.equal(model.classifier.bias, make_model("bert").classifier.bias)
    assert torch.equal(model.classifier.weight, make_model("bert").classifier.weight)


def test_bad_exports_are_refused_and_write_nothing(tmp_path):
    model, bert = make_model("gpt2"), make_model("bert")
    bare = BertModel(bert.config)
    soft = prompt_for(model, "soft")
    cases: list[tuple[Any, tuple[Any, ...], dict[str, Any], str]] = [
        (torch.zeros(4, 32), (), {}, "the prompts PEFT has a form for, got 'Tensor'"),
        (soft, (), {"task_type": "SEQ_2_SEQ_LM"}, "CAUSAL_LM, .*, FEATURE_EXTRACTION, got 'SEQ_2_SEQ_LM'"),
        (prompt_for(bert, "soft"), (), {"task_type": "CAUSAL_LM"}, "SEQ_CLS, .* for the encoder 'bert'"),
        (prompt_for(bert, "soft"), (), {}, "SEQ_CLS needs model"),
        (soft, (bert,), {}, "expected model_type 'gpt2', got 'bert'"),
        (soft, (model,), {"task_type": "SEQ_CLS"}, "head named classifier or score for SEQ_CLS, got GPT2LMHeadModel"),
        (prompt_for(bert, "soft"), (bert,), {"task_type": "QUESTION_ANS"}, "head named qa_outputs for QUESTION_ANS"),
        (prompt_for(bert, "soft"), (), {"task_type": "TOKEN_CLS"}, "TOKEN_CLS needs model"),
        (prompt_for(bare, "soft"), (bare,), {}, "head named classifier or score for SEQ_CLS, got BertModel"),
    ]
    for prompt, arguments, options, message in cases:
        with pytest.raises(InputError, match=message):
            save_peft(prompt, tmp_path / "out", *arguments, **options)
    assert not (tmp_path / "out").exists()
