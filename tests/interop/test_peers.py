"""What peers get wrong or crash on, with the right answer: the cases that no other test has.

The others, by the defect seen in PEFT 0.21.2, and where their tests are:

- logits that change under left padding: `test_attached.test_logits_loss_and_gradient`
- a second packed document that differs from itself alone: `backbone.test_step.test_equals_each_row_alone`, and
  `test_attached_limits.test_refused` ("two texts in a row") for stock calls
- BERT's pooler on a virtual token: `test_attached.test_classifier`
- tokens dropped when a cache is continued: `test_attached.test_generate_by_embeddings_look_up_and_turns`
- a window that evicts the prefix: `backbone.test_families.test_loss_and_gradient_equal_stock`
- a crash without a cache, and with a static one: `test_attached.test_generate` ("no cache"),
  `test_attached_generation.test_a_static_cache`
- one prompt for all rows where several were meant: `backbone.test_generation.test_one_prompt_per_row`,
  `backbone.test_step.test_several_prompts_in_one_batch`
- training that cannot be resumed: `training.test_resume`, with a reparametrised prefix, too
- an IndexError at the last position: `test_attached_limits.test_length_limit`
- random starts of fifty times the embeddings' scale: `prompts.test_soft_prompt`
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.nn.functional import cross_entropy

from ptengine.errors import UnsupportedModelError
from ptengine.prompts import Prefix, Prompt, SoftPrompt

from ..backbone.stock import HIDE, VOCABULARY, WIDTH, config, make, pad, random_rows, relative
from .attached_cases import KINDS, LENGTHS, SIDES, gradients, prompt_for, state


def in_row(model: Any, prompt: Prompt, row: list[int], **given: Any) -> Any:
    """The stock model's output for one row, its virtual tokens before it."""
    words = model.get_input_embeddings()(torch.tensor([row]))
    embeds = torch.cat([prompt.lower().embeds[None], words], dim=1)  # type: ignore[union-attr]
    return model(inputs_embeds=embeds, **given)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_decoder_classifies_by_its_last_token(family: str, side: str) -> None:
    """PEFT looks for the last token in ids that do not count the prompt, and pools another one."""
    torch.manual_seed(0)
    head = {"gpt2": hf.GPT2ForSequenceClassification, "llama": hf.LlamaForSequenceClassification}[family]
    model = head(config(family, num_labels=3)).eval().requires_grad_(False)
    rows, prompt, labels = random_rows(*LENGTHS), prompt_for(model, "soft"), torch.tensor([0, 2, 1, 1])
    ids, mask = pad(rows, side, value=2)
    with prompt.attached(model):
        out = model(ids, attention_mask=mask, labels=labels)
        out.loss.backward()
    found = gradients(prompt)
    # Alone and by embeddings the stock head reads the last position.
    exact = torch.cat([in_row(model, prompt, row).logits for row in rows])
    loss = cross_entropy(exact, labels)
    loss.backward()
    assert relative(out.logits, exact) < 1e-5
    assert abs(out.loss - loss) < 1e-5
    assert relative(found, gradients(prompt)) < 1e-5


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", KINDS)
def test_question_answering_counts_positions_in_the_text(kind: str, side: str) -> None:
    """PEFT leaves start and end where they were while the text moves by P."""
    torch.manual_seed(0)
    model = hf.BertForQuestionAnswering(config("bert", num_labels=2)).eval().requires_grad_(False)
    rows, prompt = random_rows(*LENGTHS), prompt_for(model, kind)
    ids, mask = pad(rows, side, value=50)
    first = mask.argmax(1)  # [B]
    start, end = first + torch.tensor([1, 4, 0, 2]), first + torch.tensor([3, 9, 0, 7])
    with prompt.attached(model):
        out = model(ids, attention_mask=mask, start_positions=start, end_positions=end)
        out.loss.backward()
        found = gradients(prompt)
        for index, (row, kept) in enumerate(zip(rows, mask.bool(), strict=True)):
            alone = model(torch.tensor([row]))
            assert relative(out.start_logits[index][kept], alone.start_logits[0]) < 1e-5
            assert relative(out.end_logits[index][kept], alone.end_logits[0]) < 1e-5
    assert out.start_logits.shape == ids.shape
    loss = (cross_entropy(out.start_logits, start) + cross_entropy(out.end_logits, end)) / 2
    assert abs(out.loss - loss) < 1e-6
    assert found.norm() > 0
    if kind == "soft":
        exact = [in_row(model, prompt, row) for row in rows]
        for index, (one, kept) in enumerate(zip(exact, mask.bool(), strict=True)):
            assert relative(out.start_logits[index][kept], one.start_logits[0, 6:]) < 1e-5


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_token_of_the_text_is_classified(kind: str, side: str) -> None:
    """PEFT gives P + T logits to T labels, and crashes."""
    torch.manual_seed(0)
    model = hf.BertForTokenClassification(config("bert")).eval().requires_grad_(False)
    rows, prompt = random_rows(*LENGTHS), prompt_for(model, kind)
    classes = [[token % 3 for token in row] for row in rows]
    (ids, mask), (labels, _) = pad(rows, side, value=50), pad(classes, side, value=HIDE)
    with prompt.attached(model):
        out = model(ids, attention_mask=mask, labels=labels)
        out.loss.backward()
        found = gradients(prompt)
        if kind == "prefix":
            exact = [model(torch.tensor([row])).logits[0] for row in rows]
    if kind == "soft":
        exact = [in_row(model, prompt, row).logits[0, 6:] for row in rows]
    loss = cross_entropy(torch.cat(exact), torch.tensor([one for row in classes for one in row]))
    assert abs(out.loss - loss) < 1e-5
    for logits, kept, wanted in zip(out.logits, mask.bool(), exact, strict=True):
        assert relative(logits[kept], wanted) < 1e-5
    if kind == "soft":
        loss.backward()
        assert relative(found, gradients(prompt)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_assisted_decoding(family: str, kind: str) -> None:
    """PEFT crashes. The assistant has no prompt, so most of what it proposes is thrown away; the text is greedy's."""
    model, assistant = make(family), make(family)
    prompt, ids = prompt_for(model, kind), torch.tensor(random_rows(7))
    settings: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
    stock = model.generate(ids, **settings)
    with prompt.attached(model):
        exact = model.generate(ids, **settings)
        assert torch.equal(model.generate(ids, assistant_model=assistant, **settings), exact)
    assert not torch.equal(stock, exact)


SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GQA = {"num_key_value_heads": 2}
FAMILIES: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "falcon": (
        hf.FalconForCausalLM, hf.FalconConfig,
        {"intermediate_size": None, "multi_query": True, "new_decoder_architecture": False, "alibi": False},
    ),
    "deepseek_v3": (
        hf.DeepseekV3ForCausalLM, hf.DeepseekV3Config,
        {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
         "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12,
         "first_k_dense_replace": 1, "num_key_value_heads": 4},
    ),
    "qwen3_next": (
        hf.Qwen3NextForCausalLM, hf.Qwen3NextConfig,
        GQA | EXPERTS | {"num_hidden_layers": 4, "head_dim": 16, "shared_expert_intermediate_size": 32,
                         "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
                         "linear_value_head_dim": 8},
    ),
    "lfm2": (hf.Lfm2ForCausalLM, hf.Lfm2Config, GQA | {"layer_types": ["conv", "full_attention"]}),
    "jamba": (
        hf.JambaForCausalLM, hf.JambaConfig,
        GQA | {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 4,
               "mamba_expand": 1},
    ),
    "t5": (hf.T5ForConditionalGeneration, hf.T5Config, {"d_kv": 8, "d_ff": 64}),  # d_kv is not d / h
    "deberta-v2": (hf.DebertaV2ForSequenceClassification, hf.DebertaV2Config, {}),
    "modernbert": (hf.ModernBertForSequenceClassification, hf.ModernBertConfig, {"cls_token_id": 3, "sep_token_id": 4}),
}  # fmt: skip


def family_of(name: str) -> Any:
    kind, settings, changes = FAMILIES[name]
    torch.manual_seed(0)
    shape = {key: value for key, value in (SHAPE | changes).items() if value is not None}
    return kind(settings(**shape)).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", [SoftPrompt, Prefix])
@pytest.mark.parametrize("name", FAMILIES)
def test_families_that_crash(name: str, kind: type[Any]) -> None:
    """PEFT's prefixes end in errors of shapes. Here the stock numbers come, or a refusal that says why, in advance."""
    model = family_of(name)
    before, row = state(model), random_rows(9)[0]
    given: dict[str, Any] = {"decoder_input_ids": torch.tensor([row[:4]])} if name == "t5" else {}
    bare = model(torch.tensor([row]), **given).logits
    logits: Tensor | None = None
    refusal = ""
    try:
        prompt = kind(model, 6)
        with prompt.attached(model):
            logits = model(torch.tensor([row]), **given).logits
    except UnsupportedModelError as error:
        refusal = str(error)
    assert state(model) == before
    assert torch.equal(model(torch.tensor([row]), **given).logits, bare)
    if logits is None:
        assert refusal.startswith(f"model type {name!r} is not supported")
        assert len(refusal.partition(": ")[2]) > 30, "a refusal says why"
        assert "\n" not in refusal
        return
    assert relative(logits, bare) > 1e-3
    if kind is SoftPrompt:
        cut = None
        if logits.dim() == 2:  # a head that reads the first token reads the text's, not a virtual one
            cut = model.base_model.register_forward_hook(
                lambda module, args, out: type(out)(last_hidden_state=out.last_hidden_state[:, 6:])
            )
        exact = in_row(model, prompt, row, **given).logits
        if cut is not None:
            cut.remove()
        assert relative(logits[0], exact[0] if logits.dim() == 2 else exact[0, -len(logits[0]) :]) < 1e-4
