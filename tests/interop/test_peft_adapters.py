"""ADAPTION_PROMPT both ways against the installed PEFT: equal logits, and one clear error for what is not the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaptionPromptConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from ptengine.backbone import label_log_probs, pack_rows, patched
from ptengine.errors import InputError
from ptengine.interop import load_peft, save_peft
from ptengine.prompts import LlamaAdapter, SoftPrompt

SIZE = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
IDS = torch.arange(3, 21).view(2, 9)


def make(family: str = "llama", **changes: Any) -> Any:
    torch.manual_seed(0)
    if family == "mistral":
        return MistralForCausalLM(MistralConfig(**(SIZE | changes))).eval()
    return LlamaForCausalLM(LlamaConfig(**(SIZE | changes))).eval()


def peft_checkpoint(folder: Path, family: str = "llama", **changes: Any) -> torch.Tensor:
    """What PEFT saves of an adapter with open gates, and its logits of `IDS`."""
    config = AdaptionPromptConfig(adapter_len=5, adapter_layers=2, task_type="CAUSAL_LM")
    model = get_peft_model(make(family, **changes), config)
    with torch.no_grad():
        gates = [parameter for name, parameter in model.named_parameters() if name.endswith("adaption_gate")]
        for gate, value in zip(gates, (0.9, -1.4), strict=True):
            gate.fill_(value)
        logits = model.eval()(IDS).logits
    model.save_pretrained(folder)
    return logits


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("llama", {"num_key_value_heads": 4}), ("mistral", {})])
def test_a_checkpoint_of_peft_gives_its_logits(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    wanted, model = peft_checkpoint(tmp_path, family, **changes), make(family, **changes)
    with torch.no_grad():
        assert (wanted - model(IDS).logits).abs().max() > 0.1  # it matters
    prompt = load_peft(tmp_path, model)
    assert isinstance(prompt, LlamaAdapter)
    assert prompt.layers == (1, 2)
    assert prompt.gates.detach().flatten().tolist() == pytest.approx([0.9, -1.4])
    with prompt.attached(model), torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, wanted, rtol=1e-4, atol=1e-5)
    rows = IDS.tolist()
    with patched(model), torch.no_grad():
        log_probs, _ = label_log_probs(model, prompt.lower(), pack_rows(rows, rows))
    exact = wanted.log_softmax(-1)[:, :-1].gather(2, IDS[:, 1:, None]).flatten()
    torch.testing.assert_close(log_probs, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_peft_loads_what_is_written_and_gives_the_logits(tmp_path: Path, family: str) -> None:
    model = make(family)
    prompt = LlamaAdapter(model, 4, num_adapter_layers=3)
    with torch.no_grad():
        prompt.gates.copy_(torch.tensor([[0.5], [-1.0], [2.0]]))
    save_peft(prompt, tmp_path, model)
    with prompt.attached(model), torch.no_grad():
        wanted = model(IDS).logits
    loaded = PeftModel.from_pretrained(make(family), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, wanted, rtol=1e-4, atol=1e-5)
    back = load_peft(tmp_path, model)
    assert back.config() == prompt.config()
    for name, tensor in prompt.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor)


def test_the_files_are_those_that_peft_writes(tmp_path: Path) -> None:
    peft_checkpoint(tmp_path / "theirs")
    prompt = load_peft(tmp_path / "theirs", make())
    save_peft(prompt, tmp_path / "ours", make())
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


def change(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def reshape(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("adaption_prompt"))
    save_file(tensors | {name: tensors[name][:, :, :16].contiguous()}, path)


BAD = {
    "more layers than the model": ({"adapter_layers": 9}, "num_adapter_layers of at most 3, got 9"),
    "no layers": ({"adapter_layers": None}, "adapter_layers, a whole number of at least 1, got None"),
    "no length": ({"adapter_len": "5"}, "adapter_len, a whole number of at least 1, got '5'"),
    "another length": ({"adapter_len": 10**12}, "expected floating-point tensors"),
    "another module": ({"target_modules": "attn"}, "target_modules 'self_attn', got 'attn'"),
    "another width": (reshape, "expected floating-point tensors"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_checkpoint_that_does_not_fit_is_one_clear_error(tmp_path: Path, case: str) -> None:
    peft_checkpoint(tmp_path)
    damage, message = BAD[case]
    change(tmp_path, **damage) if isinstance(damage, dict) else damage(tmp_path)
    with pytest.raises(InputError, match=message):
        load_peft(tmp_path, make())


def test_models_that_peft_computes_otherwise_are_refused(tmp_path: Path) -> None:
    """PEFT adds the output projection's bias twice, and divides wide heads wrongly."""
    peft_checkpoint(tmp_path / "theirs")
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=3, n_head=4, n_positions=64))
    for model, message in (
        (gpt2, "type llama or mistral for ADAPTION_PROMPT, got 'gpt2'"),
        (make(attention_bias=True), "attention_bias=True: PEFT adds"),
        (make(head_dim=16), "heads are together as wide"),
    ):
        with pytest.raises(InputError, match=message):
            load_peft(tmp_path / "theirs", model)
    for model in (make(attention_bias=True), make(head_dim=16)):
        with pytest.raises(InputError, match="PEFT"):
            save_peft(LlamaAdapter(model), tmp_path / "ours", model)
    assert not (tmp_path / "ours").exists()


def test_bad_exports_are_refused_and_write_nothing(tmp_path: Path) -> None:
    model = make()
    prompt = LlamaAdapter(model)
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    qwen = Qwen2ForCausalLM(Qwen2Config(vocab_size=61, hidden_size=32, **sizes))
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (LlamaAdapter(qwen), {"model": qwen}, "type llama or mistral for ADAPTION_PROMPT, got 'qwen2'"),
        (prompt, {}, "ADAPTION_PROMPT needs model, .*got None"),
        (LlamaAdapter(model, gating="head_tanh"), {"model": model}, "expected gating 'layer'.*got 'head_tanh'"),
        (prompt, {"model": model, "peft_type": "PREFIX_TUNING"}, "ADAPTION_PROMPT for a LlamaAdapter, got"),
        ([prompt, prompt], {"model": model}, "expected one prompt for ADAPTION_PROMPT, got 2"),
        (SoftPrompt(model, 3), {"peft_type": "ADAPTION_PROMPT"}, "for a SoftPrompt, got 'ADAPTION_PROMPT'"),
    ]
    for one, options, message in cases:
        with pytest.raises(InputError, match=message):
            save_peft(one, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    peft_checkpoint(tmp_path / "theirs")
    with pytest.raises(InputError, match="ADAPTION_PROMPT has no tasks, got task_id=0"):
        load_peft(tmp_path / "theirs", model, task_id=0)
