"""PEFT checkpoints of encoder-decoders, both ways, against the real peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from ptengine.errors import InputError
from ptengine.interop import load_peft, save_peft
from ptengine.prompts import Prefix, Prompt, SoftPrompt

peft = pytest.importorskip("peft")

P = 5
IDS, LABELS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]]), torch.tensor([[4, 13, 14], [15, 16, 1]])
CONFIGS = {
    "prompt": lambda **common: peft.PromptTuningConfig(**common),
    "mlp": lambda **common: peft.PromptEncoderConfig(**common, encoder_hidden_size=7),
    "lstm": lambda **common: peft.PromptEncoderConfig(
        **common, encoder_hidden_size=7, encoder_reparameterization_type="LSTM"
    ),
    "prefix": lambda **common: peft.PrefixTuningConfig(**common),
    "projected": lambda **common: peft.PrefixTuningConfig(**common, prefix_projection=True, encoder_hidden_size=7),
}


def make(family: str, layers: int = 3, encoder_layers: int | None = None) -> Any:
    torch.manual_seed(0)
    if family == "t5":
        model = T5ForConditionalGeneration(
            T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=encoder_layers or layers,
                     num_decoder_layers=layers, num_heads=4, pad_token_id=0, decoder_start_token_id=0)
        )  # fmt: skip
    else:
        model = BartForConditionalGeneration(
            BartConfig(vocab_size=61, d_model=32, encoder_layers=encoder_layers or layers, decoder_layers=layers,
                       encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_attention_heads=4, decoder_attention_heads=4,
                       init_std=0.2, max_position_embeddings=64, forced_eos_token_id=None)
        )  # fmt: skip
    return model.eval().requires_grad_(False)


def by_us(model: Any, prompt: Prompt) -> Tensor:
    with prompt.attached(model), torch.no_grad():
        return model(IDS, attention_mask=torch.ones_like(IDS), labels=LABELS).logits


def by_peft(wrapped: Any) -> Tensor:
    with torch.no_grad():
        return wrapped(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=LABELS).logits


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_we_load_what_peft_writes(tmp_path: Path, family: str, kind: str, layers: int) -> None:
    """With an even number of layers, too, where half of them read what others do; written again it is the same."""
    config = CONFIGS[kind](task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P)
    wrapped = peft.get_peft_model(make(family, layers), config).eval()
    for parameter in wrapped.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter)
    wrapped.save_pretrained(tmp_path / "in")
    model = make(family, layers)
    prompt = load_peft(tmp_path / "in", model)
    exact = by_peft(wrapped)
    torch.testing.assert_close(by_us(model, prompt), exact, rtol=0, atol=1e-5)
    assert (model(IDS, labels=LABELS).logits - exact).abs().max() > 1e-2
    save_peft(prompt, tmp_path / "out", peft_type="P_TUNING" if kind in ("mlp", "lstm") else None)
    again = peft.PeftModel.from_pretrained(make(family, layers), tmp_path / "out").eval()
    torch.testing.assert_close(by_peft(again), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("layers", "encoder_layers"), [(2, 3), (2, 4), (3, 4)])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_prefixes_beside_a_deeper_encoder_are_read(
    tmp_path: Path, family: str, layers: int, encoder_layers: int
) -> None:
    """PEFT makes a prefix for each layer of the encoder, of which the decoder reads some."""
    config = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P)
    wrapped = peft.get_peft_model(make(family, layers, encoder_layers), config).eval()
    torch.nn.init.normal_(wrapped.prompt_encoder.default.embedding.weight)
    wrapped.save_pretrained(tmp_path)
    model = make(family, layers, encoder_layers)
    torch.testing.assert_close(by_us(model, load_peft(tmp_path, model)), by_peft(wrapped), rtol=0, atol=1e-5)


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("peft_type", ["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_peft_loads_what_we_write(tmp_path: Path, family: str, peft_type: str, layers: int) -> None:
    """An even number of layers gets one more that nothing reads: PEFT would let two of them read the same."""
    model = make(family, layers)
    if peft_type == "PREFIX_TUNING":
        prompt: Prompt = Prefix(model, init="array", array=torch.randn(2, layers, P, 4, 8))
    else:
        prompt = SoftPrompt(model, init="array", array=torch.randn(P, 32))
    save_peft(prompt, tmp_path / "out", model, peft_type=peft_type)
    wrapped = peft.PeftModel.from_pretrained(make(family, layers), tmp_path / "out").eval()
    torch.testing.assert_close(by_peft(wrapped), by_us(model, prompt), rtol=0, atol=1e-5)
    same = load_peft(tmp_path / "out", model)
    assert all(torch.equal(x, y) for x, y in zip(same.parameters(), prompt.parameters(), strict=True))


def test_refused(tmp_path: Path) -> None:
    model, deeper = make("t5", 2), make("t5", 4)
    soft = SoftPrompt(model, P)
    for prompt, options, message in (
        (soft, {"peft_type": "MULTITASK_PROMPT_TUNING"}, "PREFIX_TUNING and task_type SEQ_2_SEQ_LM .* got MULTITASK"),
        (soft, {"task_type": "CAUSAL_LM"}, "for the encoder-decoder 't5', got PROMPT_TUNING and 'CAUSAL_LM'"),
    ):
        with pytest.raises(InputError, match=message):
            save_peft(prompt, tmp_path / "no", **options)
    assert not (tmp_path / "no").exists()
    save_peft(soft, tmp_path / "out")
    load_peft(tmp_path / "out", deeper)  # of another depth: a soft prompt has none
    text = (tmp_path / "out/adapter_config.json").read_text()
    (tmp_path / "out/adapter_config.json").write_text(json.dumps(json.loads(text) | {"task_type": "CAUSAL_LM"}))
    with pytest.raises(
        InputError, match=r"of an encoder-decoder .* for 't5', got PROMPT_TUNING \(task_type 'CAUSAL_LM'"
    ):
        load_peft(tmp_path / "out", model)
    save_peft(Prefix(make("t5", 3), P), tmp_path / "short")
    with pytest.raises(InputError, match="num_layers of at least 4, for each layer of the decoder of 't5', got 3"):
        load_peft(tmp_path / "short", deeper)
