"""Patching one model instance: nothing else changes, and nothing is left when it is undone."""

from __future__ import annotations

import copy
import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertForMaskedLM,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from ptengine.backbone import (
    backbone_spec,
    is_patched,
    pack_rows,
    packed_loss,
    patch,
    patched,
    patching,
    supports,
    unpatch,
)
from ptengine.errors import UnsupportedModelError

from .stock import CAUSAL, config, make, pad, random_rows, stock_loss, stories, virtual

FAMILIES = [*CAUSAL, "bert"]


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return make(request.param)


def traces(model: Any) -> Any:
    """Everything a patch could leave: attributes, classes, hooks, configurations of every module, and the classes'."""
    modules = [
        (
            name,
            type(module).__name__,
            sorted(key for key in vars(module) if not key.startswith("_forward") and not key.startswith("_backward")),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            id(vars(module).get("config")),
            module.training,
        )
        for name, module in model.named_modules()
    ]
    classes = {type(module) for module in model.modules()}
    of_classes = {name: sorted((key, id(value)) for key, value in vars(kind).items()) for kind in classes
                  for name in (kind.__qualname__,)}  # fmt: skip
    return modules, of_classes, model.config.to_dict(), model.config._attn_implementation, sorted(vars(model))


def outputs(model: Any) -> list[Tensor]:
    """Stock calls with every kind of padding, with and without positions, and with a cache."""
    rows = random_rows(5, 11, 8)
    results = [model(torch.tensor(random_rows(9))).logits]
    for side in ("left", "right"):
        ids, mask = pad(rows, side)
        kept = mask.bool() if results[0].dim() == 3 else slice(None)
        results.append(model(ids, attention_mask=mask).logits[kept])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        results.append(model(ids, attention_mask=mask, position_ids=positions).logits[kept])
    if results[0].dim() == 3:
        ids = torch.tensor(random_rows(9, 9))
        start = model(ids[:, :6], use_cache=True)
        results.append(start.logits)
        results.append(model(ids[:, 6:], past_key_values=start.past_key_values).logits)
        results.append(model.generate(ids, max_new_tokens=4, do_sample=False).float())
    return [x.detach() for x in results]


def test_leaves_no_trace(model: Any) -> None:
    before, numbers = traces(model), outputs(model)
    for _ in range(2):
        assert patch(model) is model
        assert is_patched(model)
        assert model.config._attn_implementation == "ptengine"
        assert unpatch(model) is model
    assert not is_patched(model)
    assert traces(model) == before
    for got, exact in zip(outputs(model), numbers, strict=True):
        assert torch.equal(got, exact)
    unpatch(model)  # once more does nothing
    assert traces(model) == before


def test_stock_calls_of_a_patched_model(model: Any) -> None:
    """Without a prompt a patched model is the stock model."""
    numbers = outputs(model)
    with patched(model):
        for got, exact in zip(outputs(model), numbers, strict=True):
            torch.testing.assert_close(got, exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_restores_the_implementation_there_was(implementation: str) -> None:
    model = make("llama")
    model.set_attn_implementation(implementation)
    numbers = outputs(model)
    with patched(model):
        for got, exact in zip(outputs(model), numbers, strict=True):
            torch.testing.assert_close(got, exact, rtol=2e-5, atol=2e-5)
    assert model.config._attn_implementation == implementation
    for got, exact in zip(outputs(model), numbers, strict=True):
        assert torch.equal(got, exact)


def test_nested() -> None:
    model = make("gpt2")
    before = traces(model)
    with patched(model):
        inside = traces(model)
        with patched(model):
            pass
        assert traces(model) == inside  # the inner block does not undo the outer one
    assert traces(model) == before
    with pytest.raises(KeyError), patched(model):
        raise KeyError
    assert traces(model) == before
    patch(model)
    with patched(model):
        pass
    assert is_patched(model)


def test_blocks_that_overlap_end_with_the_last() -> None:
    """As in threads that generate at once: the first to end took the patch away from the others."""
    model = make("llama")
    first, second = patched(model), patched(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert is_patched(model)
    second.__exit__(None, None, None)
    assert not is_patched(model)
    with patched(model):
        patch(model)
    assert is_patched(model)
    with patched(model):
        unpatch(model)
    assert not is_patched(model)
    with patched(model):
        unpatch(model)
        patch(model)
    assert is_patched(model)
    unpatch(model)
    with patched(model):  # nothing of the others is left over
        assert is_patched(model)
    assert not is_patched(model)


def test_training_mode_is_kept() -> None:
    model = make("gpt2")
    model.train()
    model.transformer.h[1].eval()
    before = [module.training for module in model.modules()]
    patch(model)
    unpatch(model)
    assert [module.training for module in model.modules()] == before


def test_two_models_are_independent() -> None:
    one, other = make("gpt2"), make("gpt2")
    before = traces(other)
    patch(one)
    assert traces(other) == before
    assert not is_patched(other)


def test_models_that_share_a_configuration() -> None:
    """Regression: undoing one patch took the attention of the other model away, whose prompts were then ignored."""
    shared = config("llama")
    models = [type(make("llama"))(shared).eval().requires_grad_(False) for _ in range(2)]
    assert models[0].config is models[1].config
    rows, prompt = random_rows(5, 8), virtual(4)
    exact = [stock_loss(model, [prompt] * 2, rows, rows).item() for model in models]
    implementation = shared._attn_implementation
    patch(models[0])
    patch(models[1])
    unpatch(models[0])
    assert abs(packed_loss(models[1], prompt, pack_rows(rows, rows)).loss.item() - exact[1]) < 1e-5
    with patched(models[0]):
        assert abs(packed_loss(models[0], prompt, pack_rows(rows, rows)).loss.item() - exact[0]) < 1e-5
    unpatch(models[1])
    assert shared._attn_implementation == implementation
    patch(models[0])
    patch(models[1])
    unpatch(models[1])
    unpatch(models[0])
    assert shared._attn_implementation == implementation


def test_a_forgotten_model_is_freed() -> None:
    shared = config("llama")
    models = [type(make("llama"))(shared).eval() for _ in range(2)]
    patch(models.pop())
    gc.collect()
    assert not list(patching._patched_models)
    patch(models[0])
    unpatch(models[0])


def test_an_attribute_somebody_else_set_is_put_back() -> None:
    """Regression: unpatch removed a `prepare_inputs_for_generation` that was set on the instance before (PEFT does)."""
    model = make("gpt2")
    stock = model.prepare_inputs_for_generation
    calls = []

    def mine(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return stock(*args, **kwargs)

    model.prepare_inputs_for_generation = mine
    with patched(model):
        model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False)
    assert len(calls) == 2
    assert vars(model)["prepare_inputs_for_generation"] is mine


def test_a_model_without_a_head() -> None:
    """Regression: patching a base model, which does not generate, raised AttributeError."""
    model = LlamaModel(config("llama")).eval()
    before, ids = traces(model), torch.tensor([[5, 6, 7]])
    exact = model(ids).last_hidden_state
    with patched(model):
        torch.testing.assert_close(model(ids).last_hidden_state, exact)
    assert traces(model) == before


UNSUPPORTED = {
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_positions=8, n_embd=16, n_layer=1, n_head=2, add_cross_attention=True,
                   bos_token_id=0, eos_token_id=1)
    ),
    "bert": lambda: BertLMHeadModel(config("bert", is_decoder=True, add_cross_attention=True)),
}  # fmt: skip


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_unsupported_models(family: str) -> None:
    """Refused by name, untouched, and reported."""
    model = UNSUPPORTED[family]().eval()
    before = traces(model)
    with pytest.raises(UnsupportedModelError, match=f"'{family}'") as raised:
        patch(model)
    assert "not supported" in str(raised.value)
    report = supports(model)
    assert not report.supported
    assert report.model_type == family
    assert report.layers == ()
    assert str(report).startswith(f"{family}: not supported: ")
    assert traces(model) == before


def test_not_a_model() -> None:
    with pytest.raises(UnsupportedModelError, match="expected a transformers model, got Linear"):
        patch(nn.Linear(2, 2))
    report = supports(nn.Linear(2, 2))
    assert (report.supported, report.model_type) == (False, "Linear")


def test_a_compiled_wrapper_broke_every_other_model() -> None:
    """It hands attributes on to the model inside: that was patched and the wrapper noted, with KeyErrors for good."""
    model, other = make("llama"), make("gpt2")
    wrapper = torch.compile(model)
    before = traces(model)
    with pytest.raises(UnsupportedModelError, match="got OptimizedModule around it: pass its _orig_mod"):
        patch(wrapper)
    assert "_orig_mod" in supports(wrapper).reason
    assert traces(model) == before
    with patched(other):
        assert is_patched(other)
    assert patch(wrapper._orig_mod) is model


def test_a_peft_model_is_refused_by_name() -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    wrapper = peft.get_peft_model(make("llama"), peft.LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(UnsupportedModelError, match=r"got PeftModelForCausalLM around it: pass its get_base_model\(\)"):
        patch(wrapper)
    assert is_patched(patch(wrapper.get_base_model()))


def test_a_failing_patch_leaves_the_model_as_it_was(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it fails: in the trial forward, behind it, or because a layer's attention is not routed."""
    before, numbers = traces(model), outputs(model)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no")

    places = ("_probe", "fuse_activations") + (("_link_last_mlp",) if model.config.model_type != "bert" else ())
    for name in places:
        with monkeypatch.context() as patches:
            patches.setattr(patching, name, fail)
            with pytest.raises(RuntimeError):
                patch(model)
        assert traces(model) == before
        assert not is_patched(model)
    attention = next(module for module in model.modules() if getattr(module, "layer_idx", None) == 1)
    own = copy.copy(attention.config)
    own._attn_implementation = "eager"
    with monkeypatch.context() as patches:
        patches.setattr(patching, "_configs", lambda found: [model.config])
        patches.setattr(attention, "config", own)
        with pytest.raises(UnsupportedModelError, match=r"attention of layers \[1\] does not go through"):
            patch(model)
    assert traces(model) == before
    for got, exact in zip(outputs(model), numbers, strict=True):
        assert torch.equal(got, exact)


def test_report(model: Any) -> None:
    before = traces(model)
    report = supports(model)
    assert traces(model) == before
    assert report.supported
    assert report.model_type == model.config.model_type
    assert [layer.index for layer in report.layers] == [0, 1, 2]
    assert all(layer.path == "shared" and "prefix_attention_varlen on cpu" in layer.reason for layer in report.layers)
    assert ("bidirectional" in report.reason) == (model.config.model_type == "bert")
    text = str(report)
    assert text.startswith(f"{model.config.model_type}: supported: ")
    assert len(text.splitlines()) == 4
    with patched(model):
        assert supports(model) == report
        assert is_patched(model)


def test_other_heads_of_an_encoder() -> None:
    with patched(BertForMaskedLM(config("bert")).eval()) as model:
        assert is_patched(model)


def test_the_real_model(shared: Path) -> None:
    model, tokenizer = stories(shared)
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    exact = model(ids).logits
    with patched(model):
        torch.testing.assert_close(model(ids).logits, exact)
    assert torch.equal(model(ids).logits, exact)
    assert supports(model).supported


def test_a_first_look_does_not_undo_another_thread_s_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family that is not proven is patched for a moment when it is asked for its facts."""
    config = MistralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, sliding_window=None,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval().requires_grad_(False)
    looking, go_on = threading.Event(), threading.Event()
    require = patching.require_patched

    def waits(given: Any) -> Any:
        looking.set()
        assert go_on.wait(10)
        return require(given)

    monkeypatch.setattr(patching, "require_patched", waits)
    first = threading.Thread(target=backbone_spec, args=(model,))
    first.start()
    assert looking.wait(30)
    second = threading.Thread(target=patch, args=(model,))
    second.start()
    second.join(0.2)
    go_on.set()
    first.join()
    second.join()
    assert is_patched(model)


@pytest.mark.parametrize("family", CAUSAL)
def test_a_model_without_values_ended_in_errors_of_its_own_forward(family: str) -> None:
    with torch.device("meta"):
        model = make(family)
    for call in (backbone_spec, patch):
        with pytest.raises(UnsupportedModelError, match="its word embeddings have no values"):
            call(model)


def test_a_report_of_a_model_that_is_not_supported_counted_as_true() -> None:
    """`if ptengine.supports(model)` took every model."""
    assert supports(make("gpt2"))
    assert not supports(nn.Linear(2, 2))
