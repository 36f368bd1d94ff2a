"""LLaMA-Adapter: a stock model with the formula hooked into its layers says what every path must compute."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, MistralConfig, MistralForCausalLM

import ptengine
from ptengine.backbone import generate, label_log_probs, pack_rows, packed_loss, patched
from ptengine.errors import InputError, UnsupportedModelError
from ptengine.prompts import LlamaAdapter, SoftPrompt, load_prompt
from ptengine.training import PromptSet, evaluate
from ptengine.transfer.similarity import token_vectors

from .test_reparametrized import ROWS, hash_of
from .test_text_dependent import TASK, trainer

IDS = [[3, 4, 5, 6, 7], [8, 9], [10, 11, 12, 13, 14, 15, 16, 17]]


def mistral() -> Any:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=64, sliding_window=4, bos_token_id=0, eos_token_id=1,
        pad_token_id=2,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


def strong(model: Any) -> Any:
    """The model with weights large enough for attention to choose among keys; frozen."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter *= 8
    return model.requires_grad_(False)


OTHERS = ("gemma", "granite", "qwen2", "qwen3", "smollm3")


def other(family: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=61, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=64, head_dim=8, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        **{"granite": {"attention_multiplier": 0.2}, "smollm3": {"no_rope_layer_interval": 3}}.get(family, {}),
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(params=["llama", "llama mha", "mistral", *OTHERS])
def model(request: pytest.FixtureRequest, make_model: Any) -> Any:
    if request.param == "mistral":
        return strong(mistral())
    if request.param in OTHERS:
        return strong(other(request.param))
    return strong(make_model("llama", **({"num_key_value_heads": 4} if request.param == "llama mha" else {})))


@pytest.fixture
def llama(make_model: Any) -> Any:
    return strong(make_model("llama"))


def adapter(model: Any, gating: str = "layer", seed: int = 0, **options: Any) -> LlamaAdapter:
    """One that matters: its gates are open."""
    prompt = LlamaAdapter(model, 5, gating=gating, seed=seed, **options)
    with torch.no_grad():
        prompt.gates.copy_(torch.randn(prompt.gates.shape, generator=torch.Generator().manual_seed(seed)))
    return prompt


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


@contextmanager
def hooked(model: Any, prompts: Sequence[LlamaAdapter | None]) -> Iterator[Any]:
    """The stock model with the adapter of each row added behind every attention, head by head."""

    def behind(attention: Any, args: Any, call: dict[str, Any], out: Any) -> Any:
        added = []
        for row, prompt in enumerate(prompts):
            hidden, (cos, sin) = call["hidden_states"][row], (x[row % len(x)] for x in call["position_embeddings"])
            if prompt is None or attention.layer_idx not in prompt.layers:
                added.append(torch.zeros_like(hidden))
                continue
            place = prompt.layers.index(attention.layer_idx)
            queries = attention.q_proj(hidden).unflatten(-1, (-1, attention.head_dim))  # [T, H, D]
            if hasattr(attention, "q_norm"):
                queries = attention.q_norm(queries)
            keys, values = (
                projection(prompt.tokens[place].to(hidden)).unflatten(-1, (-1, attention.head_dim))
                for projection in (attention.k_proj, attention.v_proj)
            )  # [P, H_kv, D]
            if hasattr(attention, "k_norm"):
                keys = attention.k_norm(keys)
            rotates = getattr(attention, "use_rope", True)  # SmolLM3 leaves it out in some layers, here in the last
            heads = []
            for head in range(queries.shape[1]):
                of = head * keys.shape[1] // queries.shape[1]
                q = rotated(queries[:, head], cos, sin) if rotates else queries[:, head]
                weights = (q @ keys[:, of].T * attention.scaling).softmax(-1)
                gate = prompt.gates[place, 0] if prompt.gates.shape[1] == 1 else prompt.gates[place, head].tanh()
                heads.append(gate * weights @ values[:, of])
            added.append(attention.o_proj(torch.cat(heads, dim=-1).to(hidden)))
        return (out[0] + torch.stack(added), *out[1:])

    handles = [layer.self_attn.register_forward_hook(behind, with_kwargs=True) for layer in model.model.layers]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def stock_loss(model: Any, prompts: Sequence[LlamaAdapter | None]) -> Tensor:
    losses = []
    for row, prompt in zip(IDS, prompts, strict=True):
        with hooked(model, [prompt]):
            logits = model(torch.tensor([row])).logits[0]
        losses.append(cross_entropy(logits[:-1], torch.tensor(row[1:]), reduction="none"))
    return torch.cat(losses).mean()


@pytest.mark.parametrize("gating", ["layer", "head_tanh"])
def test_loss_and_gradients_are_the_formulas(model: Any, gating: str) -> None:
    model, prompt = model.double(), adapter(model, gating, num_adapter_layers=2).double()
    expected = stock_loss(model, [prompt] * 3)
    with patched(model):
        got = packed_loss(model, prompt.lower(), pack_rows(IDS, IDS))
    assert got.num_labels == 4 + 1 + 7
    torch.testing.assert_close(got.loss, expected, rtol=1e-9, atol=0)
    assert abs(expected - stock_loss(model, [None] * 3)) > 1e-3
    wanted = torch.autograd.grad(expected, [prompt.tokens, prompt.gates])
    for x, exact in zip(torch.autograd.grad(got.loss, [prompt.tokens, prompt.gates]), wanted, strict=True):
        # The norm of Qwen3's keys computes in fp32, per row in the stock loop and once here.
        normed = hasattr(model.model.layers[0].self_attn, "k_norm")
        atol = 4 * torch.finfo(torch.float32).eps * float(exact.abs().max()) if normed else 1e-12
        torch.testing.assert_close(x, exact, rtol=1e-6, atol=atol)


def test_several_in_one_batch_and_rows_without_one(llama: Any) -> None:
    prompts = [adapter(llama), adapter(llama, "head_tanh", seed=1, num_adapter_layers=3)]
    expected = stock_loss(llama, [prompts[1], None, prompts[0]])
    with patched(llama):
        got = packed_loss(llama, [prompt.lower() for prompt in prompts], pack_rows(IDS, IDS), prompt_ids=[1, -1, 0])
        alone = packed_loss(llama, prompts[0].lower(), pack_rows(IDS, IDS), prompt_ids=[-1, -1, -1]).loss
    assert abs(got.loss - expected) < 1e-5
    assert abs(alone - stock_loss(llama, [None] * 3)) < 1e-5


def test_at_first_the_model_is_the_frozen_one(model: Any) -> None:
    prompt = LlamaAdapter(model)
    assert prompt.num_virtual_tokens == 10
    assert prompt.layers == (2,)
    assert not prompt.gates.any()
    assert float(prompt.tokens.detach().std()) == pytest.approx(1, abs=0.15)
    with patched(model), torch.no_grad():
        with_it, _ = label_log_probs(model, prompt.lower(), pack_rows(IDS, IDS))
        without, _ = label_log_probs(model, None, pack_rows(IDS, IDS))
    assert torch.equal(with_it, without)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_generate_is_the_stock_generate_of_the_hooked_model(model: Any, options: dict[str, Any]) -> None:
    one, other = adapter(model), adapter(model, "head_tanh", seed=1)
    given = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2, "eos_token_id": None, **options}
    for prompts in ([one] * 3, [one, None, other]):
        got = generate(model, prompts if None in prompts else one, IDS, **given)
        for row, prompt, written in zip(IDS, prompts, got, strict=True):
            beams = [prompt] * given.get("num_beams", 1)
            with hooked(model, beams):
                wanted = model.generate(torch.tensor([row]), attention_mask=torch.ones(1, len(row)), **given)[0]
            assert torch.equal(written[-6:], wanted[-6:])


def test_attached_calls_see_it_whatever_the_padding(model: Any) -> None:
    prompt = adapter(model)
    with hooked(model, [prompt]):
        wanted = model(torch.tensor([IDS[0]])).logits[0]
    ids = torch.tensor([[2, 2, *IDS[0]], [*IDS[0], 2, 2]])
    with prompt.attached(model) as attached:
        for row, span in ((0, slice(2, None)), (1, slice(0, 5))):
            mask = torch.zeros(1, 7)
            mask[0, span] = 1
            got = attached(input_ids=ids[row : row + 1], attention_mask=mask.long()).logits[0, span]
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        attached(input_ids=ids[:, 2:5], labels=ids[:, 2:5]).loss.backward()
        first = attached(input_ids=torch.tensor([IDS[0][:3]]), past_key_values=DynamicCache())
        rest = attached(input_ids=torch.tensor([IDS[0][3:]]), past_key_values=first.past_key_values)
        torch.testing.assert_close(rest.logits[0], wanted[3:], rtol=1e-4, atol=1e-4)
    assert prompt.tokens.grad is not None
    assert prompt.tokens.grad.any()
    assert prompt.gates.grad is not None
    assert prompt.gates.grad.any()


def test_fold_and_files_keep_all_of_it(llama: Any, tmp_path: Any) -> None:
    prompt = adapter(llama, "head_tanh")
    prompt.save(tmp_path)
    for copy in (prompt.fold(), load_prompt(tmp_path, llama)):
        assert type(copy) is LlamaAdapter
        assert copy.config() == prompt.config()
        assert copy.tokens.data_ptr() != prompt.tokens.data_ptr()
        for name, tensor in prompt.state_dict().items():
            assert torch.equal(copy.state_dict()[name], tensor)
    assert token_vectors(prompt).shape == (5, 32)


def test_it_takes_no_positions_from_the_text(llama: Any, tokenizer: Any) -> None:
    prompt, longest = adapter(llama), [{"text": " ".join(["good"] * 62), "label": "bad"}]  # 64 tokens with <s> and is
    whole = ptengine.data.ClassificationTask(
        ptengine.data.Template("{text}"), ptengine.data.Verbalizer({"good": " good", "bad": " bad"})
    )
    assert evaluate(llama, prompt, whole, longest, tokenizer).n == 1
    with pytest.raises(InputError, match="at most 59"):
        evaluate(llama, SoftPrompt(llama, 5), whole, longest, tokenizer)


def test_it_trains_resumes_and_shares_a_batch(llama: Any, tokenizer: Any, tmp_path: Any) -> None:
    before, whole = hash_of(llama), LlamaAdapter(llama, 5, num_adapter_layers=2)
    result = trainer(llama, whole, tmp_path / "whole", tokenizer, 6).fit()
    assert result.losses[-1] != result.losses[0]
    trainer(llama, LlamaAdapter(llama, 5, num_adapter_layers=2), tmp_path / "cut", tokenizer, 3).fit()
    resumed = LlamaAdapter(llama, 5, num_adapter_layers=2)
    assert trainer(llama, resumed, tmp_path / "cut", tokenizer, 6).fit(resume=True).losses == result.losses
    assert torch.equal(resumed.tokens, whole.tokens)
    assert torch.equal(load_prompt(result.prompt_path, llama).tokens, whole.tokens)
    recomputed = LlamaAdapter(llama, 5, num_adapter_layers=2)
    again = trainer(llama, recomputed, tmp_path / "again", tokenizer, 6, gradient_checkpointing=True).fit()
    assert again.losses == pytest.approx(result.losses, abs=1e-5)
    members = [
        trainer(llama, LlamaAdapter(llama, 5, num_adapter_layers=2), tmp_path / "set" / "0", tokenizer, 6),
        trainer(llama, adapter(llama, "head_tanh"), tmp_path / "set" / "1", tokenizer, 6, seed=5),
    ]
    found = PromptSet(members, tmp_path / "set").fit()
    assert found.members[0].losses == pytest.approx(result.losses, abs=1e-5)
    assert hash_of(llama) == before
    assert evaluate(llama, whole, TASK, ROWS, tokenizer).n == len(ROWS)
    beside = trainer(llama, SoftPrompt(llama, 3), tmp_path / "soft", tokenizer, 6)
    with pytest.raises(InputError, match="got GatedTokens in member 0 and VirtualTokens in member 1"):
        PromptSet([members[0], beside], tmp_path / "mixed")


def test_other_models_and_bad_options_are_refused(llama: Any, make_model: Any) -> None:
    for family in ("gpt2", "bert"):
        with pytest.raises(UnsupportedModelError, match="projected as in gemma, granite, llama, mistral"):
            LlamaAdapter(make_model(family))
    for options, message in (
        ({"num_virtual_tokens": 0}, "num_virtual_tokens"),
        ({"num_adapter_layers": 4}, "num_adapter_layers of at most 3, got 4"),
        ({"num_adapter_layers": 0}, "num_adapter_layers, a whole number of at least 1, got 0"),
        ({"gating": "tanh"}, "gating, one of layer, head_tanh, got 'tanh'"),
    ):
        with pytest.raises(InputError, match=message):
            LlamaAdapter(llama, **options)
    with pytest.raises(InputError, match="one kind"), patched(llama):
        packed_loss(
            llama, [adapter(llama).lower(), SoftPrompt(llama, 3).lower()], pack_rows(IDS, IDS), prompt_ids=[0, 1, 0]
        )
    with pytest.raises(InputError, match="one kind"):
        generate(llama, [adapter(llama), SoftPrompt(llama, 3), None], IDS, max_new_tokens=2)
