"""Encoders that no list names: heads behind prompts through the shared path or in the row, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_encoder import stock_prefix, stock_soft
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import ptengine
from ptengine.backbone import (
    KeyValuePrefix,
    backbone_spec,
    encoder_hidden,
    heads,
    masked_lm_loss,
    pack_padded,
    pack_rows,
    packed_loss,
    patch,
    patched,
    sequence_logits,
    supports,
    token_logits,
)
from ptengine.backbone.spec import kind_of
from ptengine.errors import InputError, UnsupportedModelError

from .stock import pad, parameters, random_rows, relative, virtual
from .test_patching import traces

WIDTH, PROMPT = 48, 6
LENGTHS = (5, 11, 1, 8)
COMMON = {
    "vocab_size": 97, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64, "initializer_range": 0.2, "num_labels": 3, "pad_token_id": 1,
}  # fmt: skip
SHARED: dict[str, dict[str, Any]] = {
    "roberta": {},
    "albert": {"embedding_size": 24},
    "distilbert": {"dim": WIDTH, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    "electra": {"embedding_size": 24},
    "modernbert": {"local_attention": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "eurobert": {"num_key_value_heads": 2},
}
IN_ROW: dict[str, dict[str, Any]] = {
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    "mpnet": {},
    "convbert": {"embedding_size": 24},
    "fnet": {},
}
FAMILIES = [*SHARED, *IN_ROW]
UNPADDED = ("convbert", "fnet")


def make(family: str, auto: Any = AutoModelForSequenceClassification) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(COMMON | (SHARED | IN_ROW)[family]))
    model = auto.from_config(config).float().eval().requires_grad_(False)
    model.get_input_embeddings().weight.data.normal_(std=0.2)
    return model


def soft(model: Any, seed: int = 0) -> Any:
    return virtual(PROMPT, seed, width=model.get_input_embeddings().weight.shape[1])


def prefix(model: Any, seed: int = 0) -> KeyValuePrefix:
    spec = backbone_spec(model)
    generator = torch.Generator().manual_seed(200 + seed)
    shape = (spec.num_layers, PROMPT, spec.num_kv_heads, spec.head_dim)
    keys, values = (torch.randn(shape, generator=generator).requires_grad_() for _ in range(2))
    return KeyValuePrefix(keys, values)


def held(got: Tensor, exact: Tensor, trained: list[Tensor]) -> None:
    """fp32, two layers: rounding alone, in values and in gradients."""
    assert relative(got, exact) < 1e-5
    # Weighted: the squares of normalised hidden states add up to the same whatever the prompt is.
    weights = torch.randn(exact.shape, generator=torch.Generator().manual_seed(3))
    pairs = zip(
        *(torch.autograd.grad((x * weights).sum(), trained, retain_graph=True) for x in (got, exact)), strict=True
    )
    for ours, theirs in pairs:
        assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_head_behind_virtual_tokens_under_any_padding(family: str) -> None:
    model, rows = make(family), random_rows(*LENGTHS)
    prompt = soft(model)
    exact = stock_soft(model, prompt.embeds, rows, "sequence")
    assert backbone_spec(model).path == ("shared" if family in SHARED else "in_row")
    batches = [pack_rows(rows), *(pack_padded(*pad(rows, side)) for side in ("left", "right"))]
    with patched(model):
        for batch in batches:
            held(sequence_logits(model, prompt, batch), exact, parameters(prompt))


@pytest.mark.parametrize("family", SHARED)
def test_head_behind_a_prefix(family: str) -> None:
    """Against a plain attention that puts the prefix before the keys, one row at a time."""
    model, rows = make(family), random_rows(*LENGTHS)
    lowered = prefix(model)
    first = {"roberta": 2}.get(family, 0)
    exact = stock_prefix(model, lowered.keys, lowered.values, rows, "sequence", first)
    with patched(model):
        held(sequence_logits(model, lowered, pack_rows(rows)), exact, parameters(lowered))


@pytest.mark.parametrize("family", ["roberta", "mpnet", "convbert"])
def test_several_prompts_and_rows_without(family: str) -> None:
    model, rows = make(family), random_rows(*LENGTHS)
    prompts, ids = [soft(model, 0), soft(model, 1)], [1, 0, -1, 1]
    empty = prompts[0].embeds[:0]
    exact = torch.cat([
        stock_soft(model, prompts[n].embeds if n >= 0 else empty, [row], "sequence")
        for n, row in zip(ids, rows, strict=True)
    ])  # fmt: skip
    with patched(model):
        got = sequence_logits(model, prompts, pack_rows(rows), prompt_ids=ids)
    held(got, exact, [prompt.embeds for prompt in prompts])


@pytest.mark.parametrize("family", ["roberta", "modernbert", "deberta-v2"])
def test_masked_lm(family: str) -> None:
    """Each label is predicted at its own place, by the stock head on the wanted tokens alone."""
    model, rows = make(family, AutoModelForMaskedLM), random_rows(*LENGTHS)
    labels = [[token if i % 3 == 1 else -100 for i, token in enumerate(row)] for row in rows]
    prompt = soft(model)
    logits = stock_soft(model, prompt.embeds, rows, "masked")  # [N, V]
    flat = torch.tensor([label for row in labels for label in row])
    exact = cross_entropy(logits[flat != -100], flat[flat != -100])
    with patched(model):
        found = masked_lm_loss(model, prompt, pack_rows(rows, labels))
        every = token_logits(model, prompt, pack_rows(rows))
    assert found.num_labels == int((flat != -100).sum())
    held(every, logits, parameters(prompt))
    held(found.loss, exact, parameters(prompt))


@pytest.mark.parametrize("family", ["electra", "mpnet"])
def test_token_classification_and_hidden_states(family: str) -> None:
    model, rows = make(family, AutoModelForTokenClassification), random_rows(*LENGTHS)
    prompt = soft(model)
    with patched(model):
        hidden, logits = (call(model, prompt, pack_rows(rows)) for call in (encoder_hidden, token_logits))
        wanted = token_logits(model, prompt, pack_rows(rows), tokens=torch.tensor([3, 0]))
    held(hidden, stock_soft(model, prompt.embeds, rows, "hidden"), parameters(prompt))
    held(logits, stock_soft(model, prompt.embeds, rows, "masked"), parameters(prompt))
    assert relative(wanted, logits[[3, 0]]) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_patching_leaves_no_trace(family: str) -> None:
    model = make(family)
    before, state = traces(model), torch.get_rng_state()
    numbers = model(torch.tensor(random_rows(9))).logits
    with patched(model), patched(model):
        torch.testing.assert_close(model(torch.tensor(random_rows(9))).logits, numbers, rtol=2e-5, atol=2e-5)
    assert traces(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model(torch.tensor(random_rows(9))).logits, numbers)


@pytest.mark.parametrize("family", FAMILIES)
def test_report(family: str) -> None:
    report = supports(make(family))
    assert report.supported
    assert [layer.path for layer in report.layers] == ["shared" if family in SHARED else "in_row"] * 2
    assert ("rows of equal length run together" in report.reason) == (family in UNPADDED)
    assert ("no prefixes" in report.reason) == (family in IN_ROW)
    if family == "modernbert":
        assert ["sliding window" in layer.reason for layer in report.layers] == [True, False]


def test_facts_are_measured() -> None:
    """RoBERTa's first token stands behind the padding token's id, and its positions end so much earlier."""
    roberta, electra = backbone_spec(make("roberta")), backbone_spec(make("electra"))
    assert (roberta.kind, roberta.first_position, roberta.max_positions) == ("encoder", 2, 62)
    assert (electra.first_position, electra.max_positions, electra.hidden_size) == (0, 64, 24)
    model, rows = make("roberta"), random_rows(56, 57)
    with patched(model):
        got = sequence_logits(model, soft(model), pack_rows(rows[:1]))
        with pytest.raises(InputError, match="row 1: expected at most 62 positions"):
            sequence_logits(model, soft(model), pack_rows(rows))
    assert relative(got, stock_soft(model, soft(model).embeds, rows[:1], "sequence")) < 1e-5


@pytest.mark.parametrize("family", ["deberta-v2", "fnet"])
def test_a_prefix_in_the_row_is_refused(family: str) -> None:
    model = make(family)
    with pytest.raises(UnsupportedModelError, match=r"not supported by Prefix: .*a SoftPrompt works"):
        ptengine.Prefix(model, 3)
    zeros = torch.zeros(2, 3, 4, 12)
    with patched(model), pytest.raises(UnsupportedModelError, match="with a prefix of keys and values: the attention"):
        sequence_logits(model, KeyValuePrefix(zeros, zeros), pack_rows([[5, 6]]))


def test_layers_that_share_a_module_do_not_recompute_behind_a_prefix() -> None:
    model = make("albert")
    layer = model.albert.encoder.albert_layer_groups[0]
    stock = layer.forward
    layer.forward = lambda *args, **kwargs: checkpoint(stock, *args, use_reentrant=False, **kwargs)
    with patched(model):
        loss = sequence_logits(model, prefix(model), pack_rows(random_rows(5))).sum()
        with pytest.raises(InputError, match="no gradient checkpointing with a prefix"):
            loss.backward()


@torch.no_grad()
def test_segment_ids_that_the_model_leaves_unread() -> None:
    """Older checkpoints of DistilBERT come with BERT's tokenizer, which makes some; they were taken for rules."""
    for family, reads in (("distilbert", False), ("electra", True)):
        model, rows = make(family), random_rows(*LENGTHS)
        segments = [[i % 2 for i in range(len(row))] for row in rows]
        with patched(model):
            got = sequence_logits(model, soft(model), pack_rows(rows, token_type_ids=segments))
            without = sequence_logits(model, soft(model), pack_rows(rows))
        assert torch.equal(got, without) != reads


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["roberta", "electra", "distilbert", "modernbert"])
def test_small_encoders_in_half_precision_were_taken_for_causal(family: str, dtype: torch.dtype) -> None:
    """What a token says to those before it was lost in the rounding of a model as it is initialised."""
    torch.manual_seed(0)
    sizes = {name: 16 for name in ("hidden_size", "dim") if name in COMMON | SHARED[family]}
    settings = COMMON | SHARED[family] | sizes | {"initializer_range": 0.02, "num_attention_heads": 2, "n_heads": 2}
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(family, **settings)).to(dtype).eval()
    assert backbone_spec(model).kind == "encoder"


def test_inputs() -> None:
    model, masked = make("roberta"), make("roberta", AutoModelForMaskedLM)
    batch = pack_rows([[5, 6]], [[-100, -100]])
    with pytest.raises(InputError, match="patched model, got a stock Roberta"):
        encoder_hidden(model, None, batch)
    with patched(model), patched(masked):
        with pytest.raises(InputError, match="head reads every token, got RobertaForSequenceClassification"):
            token_logits(model, None, batch)
        with pytest.raises(InputError, match="sequence-classification head, got RobertaForMaskedLM"):
            sequence_logits(masked, None, batch)
        with pytest.raises(InputError, match="at least one labelled token"):
            masked_lm_loss(masked, None, batch)
        with pytest.raises(InputError, match="causal model with an LM head"):
            packed_loss(masked, None, batch)


def test_a_head_that_reads_the_end_of_a_row_is_refused() -> None:
    """Regression: XLNet's classes come of the last position, which in a batch of several lengths is padding."""
    torch.manual_seed(0)
    sizes = {"d_model": WIDTH, "n_layer": 2, "n_head": 4, "d_inner": 64}
    common = {name: value for name, value in COMMON.items() if name != "max_position_embeddings"}
    config = AutoConfig.for_model("xlnet", **(common | sizes))
    model = AutoModelForSequenceClassification.from_config(config).float().eval().requires_grad_(False)
    assert "hidden states alone: its head reads the end of a row" in supports(model).reason
    with patched(model), pytest.raises(UnsupportedModelError, match="reads the end of a row"):
        sequence_logits(model, soft(model), pack_rows(random_rows(*LENGTHS)))


def test_a_head_that_reads_more_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = heads.answering
    monkeypatch.setattr(heads, "answering", lambda base, out: stock(base, type(out)(out.last_hidden_state * 2)))
    model = make("electra")
    report = supports(model)
    assert report.supported
    assert "hidden states alone: its head computes from more" in report.reason
    with patched(model), pytest.raises(UnsupportedModelError, match="its head computes from more"):
        sequence_logits(model, None, pack_rows([[5, 6]]))


@pytest.mark.parametrize(("family", "side"), [("roberta", "right"), ("albert", "left"), ("mpnet", "right")])
def test_attached(family: str, side: str) -> None:
    model, rows = make(family), random_rows(*LENGTHS)
    prompt = ptengine.SoftPrompt(model, PROMPT)
    exact = stock_soft(model, prompt.embeds, rows, "sequence")
    ids, mask = pad(rows, side, 1)
    with prompt.attached(model):
        assert relative(model(ids, attention_mask=mask).logits, exact) < 1e-5
        if family == "mpnet":
            with pytest.raises(InputError, match="no padding before a text"):
                model(*pad(rows, "left", 1))
            with pytest.raises(InputError, match="no position_ids"):
                model(ids, attention_mask=mask, position_ids=torch.arange(11)[None])
    if family in SHARED:
        kept = ptengine.Prefix(model, PROMPT, seed=1)
        lowered = kept.lower()
        expected = stock_prefix(model, lowered.keys, lowered.values, rows, "sequence", 2 if family == "roberta" else 0)
        with kept.attached(model):
            assert relative(model(ids, attention_mask=mask).logits, expected) < 1e-5


def test_patch_is_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("mpnet")
    patch(model)
    ptengine.unpatch(model)
    monkeypatch.setattr("ptengine.backbone.patching.stock_rows", lambda *_: pytest.fail("compared again"))
    assert backbone_spec(model).path == "in_row"


def test_kinds_by_name() -> None:
    """Before there is a model: what a checkpoint is loaded as, and what an exported prompt says it is for."""
    kinds = {name: kind_of(name) for name in ("roberta", "modernbert", "llama", "gpt2", "bert", "t5", "bart")}
    assert kinds == {
        "roberta": "encoder", "modernbert": "encoder", "llama": "causal", "gpt2": "causal", "bert": "encoder",
        "t5": "seq2seq", "bart": "seq2seq",
    }  # fmt: skip
