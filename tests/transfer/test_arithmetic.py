"""Arithmetic on prompts, against fp64, and its identities."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from ptengine.errors import InputError
from ptengine.prompts import DecomposedPrompt, HeadedPrompt, SoftPrompt
from ptengine.transfer.arithmetic import add_task_vectors, start_from, weighted_mean


@pytest.mark.parametrize("kind", ["soft", "prefix"])
def test_means_and_task_vectors(tiny: ModuleType, kind: str) -> None:
    model = tiny.llama()
    one, other, initial = (getattr(tiny, kind)(model, seed) for seed in range(3))
    mean = weighted_mean([one, other])
    weighted = weighted_mean([one, other], [3, 1])
    summed = add_task_vectors([one, other], initial, [3, 1], scale=0.5)
    for name, a in one.state_dict().items():
        b, start = other.state_dict()[name].double(), initial.state_dict()[name].double()
        # One rounding to fp32 at the end.
        assert torch.equal(mean.state_dict()[name], ((a.double() + b) / 2).float())
        assert torch.allclose(weighted.state_dict()[name].double(), 0.75 * a.double() + 0.25 * b, rtol=1e-7, atol=0)
        wanted = start + 0.5 * (0.75 * (a.double() - start) + 0.25 * (b - start))
        assert torch.allclose(summed.state_dict()[name].double(), wanted, rtol=1e-7, atol=1e-12)


def test_one_prompt_combined_is_itself(tiny: ModuleType) -> None:
    model = tiny.gpt2()
    prompt, initial = tiny.soft(model, 1), tiny.soft(model, 2)
    assert torch.equal(weighted_mean([prompt]).embeds, prompt.embeds)
    assert torch.equal(weighted_mean([prompt, initial], [1, 0]).embeds, prompt.embeds)
    assert torch.equal(add_task_vectors([prompt], initial).embeds, prompt.embeds)
    assert torch.equal(start_from(model, prompt).embeds, prompt.embeds)


def test_a_start_is_trainable_at_a_quarter_of_the_rate(tiny: ModuleType) -> None:
    model = tiny.gpt2()
    prompt = tiny.soft(model)
    start = start_from(model, weighted_mean([prompt]))
    assert start.embeds.requires_grad
    assert start.default_learning_rate() == pytest.approx(prompt.default_learning_rate() / 4)
    assert start.embeds.data_ptr() != prompt.embeds.data_ptr()


def test_an_mlp_prefix_counts_by_what_it_lowers_to(tiny: ModuleType) -> None:
    model = tiny.llama()
    prompt = tiny.prefix(model, 3, projection=True, projection_size=8)
    assert torch.equal(start_from(model, weighted_mean([prompt])).keys, prompt.fold().keys)


def test_what_cannot_be_combined_is_refused(tiny: ModuleType) -> None:
    model = tiny.gpt2()
    prompt = tiny.soft(model)
    with pytest.raises(InputError, match="at least one prompt"):
        weighted_mean([])
    with pytest.raises(InputError, match="one method and shape"):
        weighted_mean([prompt, SoftPrompt(model, 5)])
    with pytest.raises(InputError, match="one method and shape"):
        add_task_vectors([prompt], tiny.prefix(model))
    with pytest.raises(InputError, match="another backbone"):
        weighted_mean([prompt, tiny.soft(tiny.llama())])
    for weights in ([1.0], [1.0, -1.0], [0.0, 0.0], [1.0, float("inf")]):
        with pytest.raises(InputError, match="expected 2 weights"):
            weighted_mean([prompt, prompt], weights)


def test_weights_whose_sum_is_no_float_overflowed(tiny: ModuleType) -> None:
    prompt = tiny.soft(tiny.gpt2())
    assert torch.equal(weighted_mean([prompt, prompt], [1e308, 1e308]).embeds, prompt.embeds)


def test_numbers_of_other_meaning_were_averaged(tiny: ModuleType) -> None:
    """Heads of other labels, and offsets times another alpha; a rate of training changes no meaning."""
    bert, llama = tiny.bert(), tiny.llama()
    heads = [HeadedPrompt(bert, tiny.soft(bert), labels) for labels in (("neg", "pos"), ("pos", "neg"))]
    with pytest.raises(InputError, match=r"labels to combine, got .*\['neg', 'pos'\].* and .*\['pos', 'neg'\]"):
        weighted_mean(heads)
    short = {"max_length": 8, "rank": 2}
    mild, strong = (DecomposedPrompt(llama, 3, alpha=alpha, **short) for alpha in (8.0, 80.0))
    with pytest.raises(InputError, match=r"'alpha': 8\.0.* and .*'alpha': 80\.0"):
        weighted_mean([mild, strong])
    slow = DecomposedPrompt(llama, 3, alpha=8.0, offset_rate_factor=0.5, **short)
    assert torch.equal(weighted_mean([mild, slow]).left, (mild.left + slow.left) / 2)
