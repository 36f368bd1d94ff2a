"""The packed step of causal models: every number and gradient equals the stock model's on each row alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ptengine.backbone import (
    PackedBatch,
    capture_prefix,
    label_hidden,
    label_log_probs,
    pack_rows,
    packed_loss,
    patch,
    patched,
    unpatch,
)
from ptengine.errors import InputError

from .stock import (
    CAUSAL,
    HIDE,
    make,
    parameters,
    prefix,
    random_rows,
    relative,
    stock_logits,
    stock_loss,
    stock_losses,
    virtual,
)

LENGTHS = (5, 11, 1, 8)
FAMILIES = [*CAUSAL, "gpt2 scaled by layer", "llama mha", "llama with biases"]
CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2 scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "llama mha": ("llama", {"num_key_value_heads": 4}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
}


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    family, changes = CHANGES.get(request.param, (request.param, {}))
    return make(family, **changes)


def lowered(model: Any, kind: str, size: int, seed: int = 0) -> Any:
    return virtual(size, seed) if kind == "soft" else prefix(model, size, seed)


def some_labels(rows: list[list[int]]) -> list[list[int]]:
    """The last token of a row, all of it, its first token alone, one in the middle."""
    labels = [[HIDE] * len(row) for row in rows]
    labels[0][-1], labels[1], labels[2][0], labels[3][4] = rows[0][-1], list(rows[1]), rows[2][0], rows[3][4]
    return labels


@pytest.mark.parametrize("kind", ["soft", "prefix", "none"])
def test_equals_each_row_alone(model: Any, kind: str) -> None:
    rows = random_rows(*LENGTHS)
    labels = some_labels(rows)
    prompt = None if kind == "none" else lowered(model, kind, 7)
    expected = stock_loss(model, [prompt] * 4, rows, labels)
    trained = parameters(prompt)
    expected_grads = torch.autograd.grad(expected, trained) if trained else ()
    with patched(model):
        out = packed_loss(model, prompt, pack_rows(rows, labels))
    assert out.num_labels == {"soft": 14, "prefix": 12, "none": 12}[kind]  # two labels at a first token
    assert abs(out.loss.item() - expected.item()) < 1e-5
    for got, exact in zip(torch.autograd.grad(out.loss, trained) if trained else (), expected_grads, strict=True):
        assert relative(got, exact) < 1e-5


@pytest.mark.parametrize("kind", ["soft", "prefix"])
def test_several_prompts_in_one_batch(model: Any, kind: str) -> None:
    """Prompts of 7, 3 and 1 tokens, one of them read twice, rows without a prompt, and a prompt nobody reads."""
    rows = random_rows(5, 11, 1, 8, 4, 6)
    labels = [list(row) for row in rows]
    prompts = [lowered(model, kind, size, seed) for seed, size in enumerate((7, 3, 1, 4))]
    ids = [1, 0, 2, -1, 1, -1]
    expected = stock_loss(model, [None if n < 0 else prompts[n] for n in ids], rows, labels)
    with patched(model):
        out = packed_loss(model, prompts, pack_rows(rows, labels), prompt_ids=ids)
    assert abs(out.loss.item() - expected.item()) < 1e-5
    everything = [x for prompt in prompts for x in parameters(prompt)]
    pairs = [
        torch.autograd.grad(loss, everything, allow_unused=True, materialize_grads=True)
        for loss in (out.loss, expected)
    ]
    for got, exact in zip(*pairs, strict=True):
        assert not got.any() if not exact.any() else relative(got, exact) < 1e-5
    assert pairs[1][0].any()
    assert not pairs[0][-1].any()


def test_a_prompt_of_no_tokens_predicts_nothing() -> None:
    """Regression: behind a prompt of 0 tokens, a row's first label was predicted from the prompt before it."""
    model = make("gpt2")
    rows = random_rows(3, 5)
    prompts = [virtual(5), virtual(0)]
    expected = stock_loss(model, prompts, rows, rows)
    with patched(model):
        out = packed_loss(model, prompts, pack_rows(rows, rows), prompt_ids=[0, 1])
    assert out.num_labels == 3 + 4
    assert abs(out.loss.item() - expected.item()) < 1e-5


def test_first_label_comes_from_the_last_virtual_token(model: Any) -> None:
    rows, prompt = random_rows(4, 1, 9), virtual(6)
    labels = [[row[0]] + [HIDE] * (len(row) - 1) for row in rows]
    exact = torch.stack([stock_logits(model, prompt, row)[5].log_softmax(-1)[row[0]] for row in rows])
    with patched(model):
        log_probs, at = label_log_probs(model, prompt, pack_rows(rows, labels))
    torch.testing.assert_close(log_probs, exact, rtol=1e-5, atol=1e-5)
    assert at.tolist() == [0, 1, 2]


def test_label_hidden_and_log_probs(model: Any) -> None:
    """In the order of the labels, each with its row; the hidden state is what the head reads."""
    rows = random_rows(*LENGTHS)
    labels, prompt = some_labels(rows), virtual(7)
    with patched(model), torch.no_grad():
        found = label_hidden(model, prompt, pack_rows(rows, labels))
        log_probs, at = label_log_probs(model, prompt, pack_rows(rows, labels))
        logits = model.lm_head(found.hidden)
    exact = [-x for row, wanted in zip(rows, labels, strict=True) for x in stock_losses(model, prompt, row, wanted)]
    torch.testing.assert_close(log_probs, torch.stack(exact).detach(), rtol=1e-5, atol=1e-5)
    assert log_probs.dtype == torch.float32
    assert found.labels.tolist() == [y for row in labels for y in row if y != HIDE]
    assert found.rows.tolist() == at.tolist() == [0] + [1] * 11 + [2, 3]
    picked = logits.log_softmax(-1).gather(1, found.labels[:, None])[:, 0]
    torch.testing.assert_close(picked, log_probs, rtol=1e-5, atol=1e-5)


def test_empty_rows_and_order_do_not_matter(model: Any) -> None:
    rows, prompt = random_rows(5, 11, 8), virtual(7)
    with patched(model), torch.no_grad():
        exact = packed_loss(model, prompt, pack_rows(rows, rows)).loss
        for shuffled in ([rows[2], [], rows[0], rows[1]], [[], rows[1], rows[2], rows[0], []]):
            assert abs(packed_loss(model, prompt, pack_rows(shuffled, shuffled)).loss - exact) < 1e-6


def test_label_smoothing() -> None:
    model, rows, prompt = make("llama"), random_rows(5, 11), virtual(7)
    logits = torch.cat([stock_logits(model, prompt, row)[6:-1] for row in rows])
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([*rows[0], *rows[1]]), label_smoothing=0.3)
    with patched(model):
        out = packed_loss(model, prompt, pack_rows(rows, rows), label_smoothing=0.3)
    assert abs(out.loss.item() - expected.item()) < 1e-5


def test_captured_prefix_equals_virtual_tokens(model: Any) -> None:
    """Keys and values of a prompt that ran once stand for the prompt."""
    rows, prompt = random_rows(5, 11), virtual(7)
    labels = [[HIDE, *row[1:]] for row in rows]
    with patched(model), torch.no_grad():
        kept = capture_prefix(model, prompt)
        got = packed_loss(model, kept, pack_rows(rows, labels)).loss
        exact = packed_loss(model, prompt, pack_rows(rows, labels)).loss
    assert kept.keys.shape == prefix(model, 7).keys.shape
    assert abs(got - exact) < 1e-5


def put_layers_in_training_mode(model: Any) -> None:
    """As the trainer does: transformers recomputes only layers in training mode; dropout stays off."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.eval()
    for module in model.modules():
        if type(module).__name__.endswith(("Block", "DecoderLayer")):
            module.training = True


@pytest.mark.parametrize("kind", ["soft", "prefix"])
def test_gradient_checkpointing(model: Any, kind: str) -> None:
    """Layers that run again in the backward pass see the same prefix, and skip the same rows of the last MLP."""
    rows, prompt = random_rows(*LENGTHS), lowered(model, kind, 7)
    batch = pack_rows(rows, some_labels(rows))
    seen: list[int] = []
    layers = model.base_model.h if hasattr(model.base_model, "h") else model.base_model.layers
    with patched(model):
        plain = torch.autograd.grad(packed_loss(model, prompt, batch).loss, parameters(prompt))
        put_layers_in_training_mode(model)
        handle = layers[-1].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
        again = torch.autograd.grad(packed_loss(model, prompt, batch).loss, parameters(prompt))
        handle.remove()
    rows_wanted = (
        12 if kind == "prefix" else 13
    )  # labels that share no predictor: two rows share the last virtual token
    assert seen == [rows_wanted, rows_wanted]  # forward, and once more in the backward pass
    for got, exact in zip(again, plain, strict=True):
        assert torch.equal(got, exact)


def counted_rows(model: Any, prompt: Any, batch: PackedBatch) -> tuple[list[int], Tensor, tuple[Tensor, ...]]:
    """Rows that the MLP of each layer works on, the loss, and the prompt's gradients."""
    layers = model.base_model.h if hasattr(model.base_model, "h") else model.base_model.layers
    seen = [0] * len(layers)

    def count(index: int) -> Any:
        def hook(_: Any, args: tuple[Tensor, ...]) -> None:
            seen[index] += args[0].shape[1]

        return hook

    handles = [layer.mlp.register_forward_pre_hook(count(i)) for i, layer in enumerate(layers)]
    loss = packed_loss(model, prompt, batch).loss
    for handle in handles:
        handle.remove()
    return seen, loss.detach(), torch.autograd.grad(loss, parameters(prompt))


def test_last_mlp_runs_on_wanted_rows_alone(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, prompt = random_rows(*LENGTHS), virtual(7)
    few, everything = pack_rows(rows, some_labels(rows)), pack_rows(rows, rows)
    with patched(model):
        seen, loss, grads = counted_rows(model, prompt, few)
        # 7 virtual tokens and 18 before the last labels of their rows; 14 labels, two from the same virtual token
        assert seen == [25, 25, 13]
        # 21 of text; 25 labels, 4 from the last virtual token, leave less than a quarter to save
        assert counted_rows(model, prompt, everything)[0] == [28, 28, 28]
        monkeypatch.setattr("ptengine.backbone.last_layer._SHARE", -1.0)
        seen, whole_loss, whole_grads = counted_rows(model, prompt, few)
        assert seen == [25, 25, 25]
    torch.testing.assert_close(loss, whole_loss, rtol=1e-6, atol=1e-6)
    for got, exact in zip(grads, whole_grads, strict=True):
        assert relative(got, exact) < 1e-6


@pytest.mark.parametrize("kind", ["soft", "prefix"])
def test_what_no_label_follows_is_not_run(model: Any, kind: str) -> None:
    """A label's own token, which the next one reads, is the last input of no prediction where no label comes after it:
    rows end before their last label, and rows without one are not run at all."""
    rows, prompt = random_rows(6, 3, 4), lowered(model, kind, 7)
    labels = [[HIDE, rows[0][1], HIDE, rows[0][3], HIDE, HIDE], [HIDE] * 3, [HIDE] * 3 + [rows[2][3]]]
    short = [rows[0][:4], rows[2]]
    taken: list[int] = []
    with patched(model):
        handle = model.base_model.register_forward_pre_hook(
            lambda _, args, kwargs: taken.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
        )
        loss = packed_loss(model, prompt, pack_rows(rows, labels)).loss
        cut = packed_loss(model, prompt, pack_rows(short, [labels[0][:4], labels[2]])).loss
        handle.remove()
        virtual_rows = 7 if kind == "soft" else 0
        assert taken == [virtual_rows + 6] * 2  # three tokens of each row that has a label
        grads = [torch.autograd.grad(each, parameters(prompt)) for each in (loss, cut)]
        torch.testing.assert_close(loss, cut, rtol=1e-6, atol=1e-6)
        for got, exact in zip(*grads, strict=True):
            assert relative(got, exact) < 1e-6
        rows[0][5] = 10**6
        with pytest.raises(InputError, match=r"row 0.*1000000"):
            packed_loss(model, prompt, pack_rows(rows, labels))
    expected = stock_loss(model, [prompt] * 2, short, [labels[0][:4], labels[2]])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_interrupted_call_leaves_nothing_behind() -> None:
    """Regression: a call cut short between attention and MLP narrowed the MLP of the next one, a stock call too."""
    model, rows = make("llama"), random_rows(*LENGTHS)
    ids = torch.tensor(random_rows(20))
    with patched(model), torch.no_grad():
        exact = model(ids).logits
        layer = model.base_model.layers[-1]

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        handle = layer.post_attention_layernorm.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            packed_loss(model, virtual(7), pack_rows(rows, some_labels(rows)))
        handle.remove()
        assert torch.equal(model(ids).logits, exact)


def test_frozen_weights_get_no_gradient(model: Any) -> None:
    rows, prompt = random_rows(*LENGTHS), virtual(7)
    with patched(model):
        packed_loss(model, prompt, pack_rows(rows, rows)).loss.backward()
    assert prompt.embeds.grad is not None
    assert all(x.grad is None for x in model.parameters())


@pytest.mark.parametrize("kind", ["soft", "prefix"])
@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("how", ["bf16 model", "autocast"])
def test_half_precision_backbone(family: str, kind: str, how: str) -> None:
    """fp32 prompts before a bf16 backbone, or under autocast: fp32 gradients, near those in fp32."""
    rows = random_rows(*LENGTHS)
    batch = pack_rows(rows, rows)
    model = make(family, initializer_range=0.05)
    prompt = lowered(model, kind, 7)
    with patched(model):
        exact = packed_loss(model, prompt, batch).loss
    exact_grads = torch.autograd.grad(exact, parameters(prompt))
    model = model.bfloat16() if how == "bf16 model" else model
    with patched(model), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        out = packed_loss(model, prompt, batch)
    assert abs(out.loss.item() - exact.item()) < 0.02
    for got, expected in zip(torch.autograd.grad(out.loss, parameters(prompt)), exact_grads, strict=True):
        assert got.dtype == torch.float32
        assert relative(got, expected) < 0.1


def test_repeatable_bit_for_bit(model: Any) -> None:
    rows, prompt = random_rows(*LENGTHS), virtual(7)
    with patched(model):
        losses = [packed_loss(model, prompt, pack_rows(rows, rows)).loss for _ in range(5)]
        grads = [torch.autograd.grad(loss, [prompt.embeds])[0] for loss in losses]
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    assert all(torch.equal(grad, grads[0]) for grad in grads)


def test_repatching_gives_the_same() -> None:
    model, rows, prompt = make("gpt2"), random_rows(*LENGTHS), virtual(7)
    losses = []
    for _ in range(2):
        patch(model)
        losses.append(packed_loss(model, prompt, pack_rows(rows, rows)).loss.item())
        unpatch(model)
    assert losses[0] == losses[1]
