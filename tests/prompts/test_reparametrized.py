"""What every prompt keeps whose virtual tokens are computed: folding, files, gradients, training, the stock calls."""

from __future__ import annotations

import hashlib
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import ptengine
from ptengine.backbone.lowering import VirtualTokens
from ptengine.data import ClassificationTask, Template, Verbalizer
from ptengine.errors import InputError
from ptengine.prompts import Prefix, SoftPrompt, create, load_prompt
from ptengine.prompts.reparametrized import relative_rate

from .method_cases import METHODS

ROWS = [
    {"text": "is this review good or very good", "label": "good"},
    {"text": "this review is very bad", "label": "bad"},
    {"text": "good or good", "label": "good"},
    {"text": "negative review or bad", "label": "bad"},
    {"text": "this is positive", "label": "good"},
]


def hash_of(model):
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def shaken(prompt, seed=5):
    """The prompt with every trainable parameter moved."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in prompt.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return prompt


@pytest.fixture(params=METHODS)
def make(request):
    return METHODS[request.param]


def test_it_lowers_to_fp32_virtual_tokens_of_its_seed(model, make):
    prompt = make(model)
    lowered = prompt.lower()
    assert isinstance(lowered, VirtualTokens)
    assert lowered.embeds.shape == (5, 32)
    assert lowered.embeds.dtype == torch.float32
    assert torch.equal(make(model).lower().embeds, lowered.embeds)
    assert not torch.equal(make(model, seed=1).lower().embeds, lowered.embeds)


def test_neither_the_global_random_state_nor_the_backbone_changes(gpt2, make):
    state, before = torch.get_rng_state(), hash_of(gpt2)
    make(gpt2).fold()
    assert torch.equal(torch.get_rng_state(), state)
    assert hash_of(gpt2) == before


def test_it_is_made_where_no_gradients_are_wanted(gpt2, make):
    with torch.no_grad():
        prompt = make(gpt2)
    assert prompt.default_learning_rate() == make(gpt2).default_learning_rate()
    assert torch.equal(prompt.lower().embeds, make(gpt2).lower().embeds)


def test_gradients_reach_every_trainable_parameter(gpt2, make):
    prompt = shaken(make(gpt2))
    prompt.lower().embeds.square().sum().backward()
    for name, parameter in prompt.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in gpt2.parameters())


def test_fold_is_the_same_prompt_with_nothing_to_compute(model, make):
    prompt = shaken(make(model))
    embeds = prompt.lower().embeds.detach()
    folded = prompt.fold()
    assert type(folded) is SoftPrompt
    assert list(folded.state_dict()) == ["embeds"]
    # An LSTM rounds differently where no gradient is wanted.
    torch.testing.assert_close(folded.lower().embeds, embeds, rtol=0, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(folded.lower().embeds, prompt.lower().embeds)
    assert folded.facts == prompt.facts
    assert folded.embeds.requires_grad
    assert folded.embeds.is_leaf
    kept = folded.embeds.detach().clone()
    shaken(prompt, seed=6)
    assert torch.equal(folded.embeds, kept)


def test_the_formula_stays_fp32_under_autocast(gpt2, make):
    prompt = make(gpt2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = prompt.lower().embeds
    assert torch.equal(inside, prompt.lower().embeds)


def test_save_keeps_the_folded_prompt_and_what_is_trained(gpt2, tmp_path, make):
    prompt = shaken(make(gpt2))
    with torch.no_grad():
        embeds = prompt.lower().embeds
    prompt.save(tmp_path / "folded")
    folded = load_prompt(tmp_path / "folded", gpt2)
    assert type(folded) is SoftPrompt
    assert torch.equal(folded.embeds, embeds)

    prompt.save(tmp_path / "whole", folded=False)
    whole = load_prompt(tmp_path / "whole", gpt2)
    assert type(whole) is type(prompt)
    assert whole.config() == prompt.config()
    assert whole.default_learning_rate() == prompt.default_learning_rate()
    for name, tensor in prompt.state_dict().items():
        assert torch.equal(whole.state_dict()[name], tensor), name
    wanted = {name: parameter.requires_grad for name, parameter in prompt.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in whole.named_parameters()} == wanted
    with torch.no_grad():
        assert torch.equal(whole.lower().embeds, embeds)


def test_a_soft_prompt_starts_from_it(gpt2, tmp_path, make):
    prompt = shaken(make(gpt2))
    prompt.save(tmp_path, folded=False)
    for source in (prompt, tmp_path):
        start = SoftPrompt(gpt2, init="prompt", prompt=source)
        assert torch.equal(start.embeds, prompt.fold().embeds)


def test_a_prompt_saved_whole_trains_on(gpt2, tmp_path, make):
    shaken(make(gpt2)).save(tmp_path, folded=False)
    loaded = load_prompt(tmp_path, gpt2)
    before = loaded.lower().embeds.detach()
    optimizer = torch.optim.AdamW([p for p in loaded.parameters() if p.requires_grad], lr=0.1)
    loaded.lower().embeds.sum().backward()
    optimizer.step()
    assert not torch.allclose(loaded.lower().embeds, before)


def rewrite(directory, change):
    description = json.loads((directory / "prompt.json").read_text())
    change(description["config"])
    held = load_file(directory / "prompt.safetensors")
    save_file(held, directory / "prompt.safetensors", {"ptengine": json.dumps(description)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(num_virtual_tokens=0), "num_virtual_tokens, a whole number of at least 1, got 0"),
        (lambda c: c.update(num_virtual_tokens=10**12), "expected the tensors"),
        (lambda c: c.update(default_learning_rate="high"), "default_learning_rate, a number above 0, got 'high'"),
        (lambda c: c.update(other=1), "config with"),
        (lambda c: c.pop("num_virtual_tokens"), "config with"),
    ],
)
def test_a_damaged_description_is_one_clear_error(gpt2, tmp_path, make, change, message):
    make(gpt2).save(tmp_path, folded=False)
    rewrite(tmp_path, change)
    with pytest.raises(InputError, match=message):
        load_prompt(tmp_path, gpt2)


def test_empty_is_zero_on_the_cpu(gpt2, make):
    prompt = make(gpt2)
    empty = type(prompt).empty(prompt.facts, prompt.config())
    for name, tensor in empty.state_dict().items():
        assert tensor.device.type == "cpu", name
        assert not tensor.any(), name
    empty.load_state_dict(prompt.state_dict())
    assert torch.equal(empty.lower().embeds, prompt.lower().embeds)


@pytest.mark.parametrize("method", ["p_tuning_lstm", "p_tuning_mlp", "superpos", "superpos_trained", "ulpt"])
def test_the_default_rate_gains_what_a_soft_prompt_gains(gpt2, method):
    """The first Adam step lowers a random linear loss as much, or its size is a fraction of a parameter's own."""
    prompt = METHODS[method](gpt2)
    rate = prompt.default_learning_rate()
    weights = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    (prompt.lower().embeds * weights).sum().backward()
    trained = [parameter for parameter in prompt.parameters() if parameter.requires_grad]
    gain = rate * sum(float(parameter.grad.abs().sum()) for parameter in trained)
    soft = SoftPrompt(gpt2, 5).default_learning_rate() * float(weights.abs().sum())
    scales = [float(parameter.detach().square().mean().sqrt()) for parameter in trained]
    capped = rate == pytest.approx(0.3 * min(scale for scale in scales if scale))
    assert capped or gain == pytest.approx(soft, rel=1e-4)
    assert gain <= soft * (1 + 1e-4)
    assert rate == relative_rate(prompt)


def train(model, prompt, output, tokenizer, steps, **settings):
    task = ClassificationTask(Template("{text} is"), Verbalizer({"good": " good", "bad": " bad"}))
    config = ptengine.TrainingConfig(
        output_dir=str(output), max_steps=steps, per_device_train_batch_size=2, disable_tqdm=True, seed=3,
        lr_scheduler_type="constant", save_strategy="steps", save_steps=3, **settings,
    )  # fmt: skip
    return ptengine.Trainer(model, prompt, ROWS, ROWS, config, task=task, tokenizer=tokenizer)


def test_it_trains_with_the_trainer_and_resumes_exactly(gpt2, tokenizer, tmp_path, make):
    before = hash_of(gpt2)
    whole = make(gpt2)
    result = train(gpt2, whole, tmp_path / "whole", tokenizer, 6).fit()
    train(gpt2, make(gpt2), tmp_path / "cut", tokenizer, 3).fit()
    resumed = make(gpt2)
    again = train(gpt2, resumed, tmp_path / "cut", tokenizer, 6).fit(resume=True)
    assert again.losses == result.losses
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    assert not torch.equal(whole.lower().embeds, make(gpt2).lower().embeds)
    assert torch.equal(load_prompt(result.prompt_path, gpt2).embeds, whole.fold().embeds)
    assert hash_of(gpt2) == before


def test_attached_calls_see_it_as_they_see_its_fold(gpt2, make):
    gpt2.requires_grad_(False)
    prompt = shaken(make(gpt2))
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
    with prompt.fold().eval().attached(gpt2):
        wanted = gpt2(ids).logits
    with prompt.attached(gpt2) as attached:
        torch.testing.assert_close(attached(ids).logits, wanted, rtol=1e-5, atol=1e-6)
        attached(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in prompt.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_parameters_with_a_factor_learn_at_their_own_rate(gpt2, tokenizer, tmp_path, monkeypatch):
    make = METHODS["residual"]
    monkeypatch.setattr(type(make(gpt2)), "learning_rate_factors", lambda self: {"embeds": 0.5, "norm.bias": 0.0})
    prompt = make(gpt2)
    start = {name: tensor.clone() for name, tensor in prompt.state_dict().items()}
    train(gpt2, prompt, tmp_path / "a", tokenizer, 1, learning_rate=0.01).fit()
    moved = {name: float((tensor - start[name]).abs().max()) for name, tensor in prompt.state_dict().items()}
    assert moved["embeds"] == pytest.approx(0.005, rel=1e-2)  # Adam's first step is the rate itself
    assert moved["norm.weight"] == pytest.approx(0.01, rel=1e-2)
    assert moved["norm.bias"] == 0


def test_another_formula_of_the_same_shapes_is_not_the_same_run(gpt2, tokenizer, tmp_path):
    def prompt(trained):
        return create("superpos_prompt", gpt2, num_virtual_tokens=5, num_sampled_tokens=9, train_embeddings=trained)

    train(gpt2, prompt(False), tmp_path, tokenizer, 3, learning_rate=0.1).fit()
    with pytest.raises(InputError, match="expected prompt train_embeddings=False as in the checkpoint"):
        train(gpt2, prompt(True), tmp_path, tokenizer, 6, learning_rate=0.1).fit(resume=True)


def test_a_projected_prefix_is_kept_whole_too(gpt2, tmp_path):
    prefix = Prefix(gpt2, 4, projection=True, projection_size=7)
    prefix.save(tmp_path, folded=False)
    loaded = load_prompt(tmp_path, gpt2)
    assert loaded.projection
    assert torch.equal(loaded.lower().keys, prefix.lower().keys)
    empty = Prefix.empty(prefix.facts, prefix.config())
    assert sorted(empty.state_dict()) == sorted(prefix.state_dict())
    assert not any(tensor.any() for tensor in empty.state_dict().values())
    rewrite(tmp_path, lambda config: config.update(projection_size=0))
    with pytest.raises(InputError, match="projection_size of at least 1, got 0"):
        load_prompt(tmp_path, gpt2)


@pytest.mark.parametrize("count", [0, 64, True, 2.5])
def test_a_count_that_no_prompt_has_is_refused(gpt2, count):
    for method in ("p_tuning", "residual_prompt", "superpos_prompt"):
        with pytest.raises(InputError, match="num_virtual_tokens"):
            create(method, gpt2, num_virtual_tokens=count)
    assert math.isfinite(create("p_tuning", gpt2, num_virtual_tokens=3).default_learning_rate())
