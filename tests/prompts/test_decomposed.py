"""DePT: offsets of the text by position, the same in packed batches, attached calls and generation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import ptengine
from ptengine.backbone import packed_loss, sequence_logits
from ptengine.backbone.lowering import VirtualTokens
from ptengine.backbone.packing import pack_rows
from ptengine.data import ClassificationTask, Template, Verbalizer
from ptengine.errors import InputError
from ptengine.prompts import DecomposedPrompt, SoftPrompt, load_prompt

ROWS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
LABELS = [[5, -100, 7, 8, -100], [-100, 11], [-100, 13, 14]]


def shaken(prompt):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return prompt


def make(model, **options):
    return shaken(DecomposedPrompt(model, 4, **({"max_length": 9, "rank": 3, "alpha": 2.0} | options)))


def offsets_of(prompt):
    """The formula in fp64: [S, d]."""
    left, right = prompt.left.detach().double().numpy(), prompt.right.detach().double().numpy()
    return torch.from_numpy(prompt.settings["alpha"] / math.sqrt(left.shape[1]) * (left @ right))


def stock_embeds(model, prompt, ids):
    """[1, P + T, d]: virtual tokens, then words with their offsets, as the paper has it."""
    words = model.get_input_embeddings()(torch.tensor(ids))
    text = words + offsets_of(prompt)[: len(ids)].to(words)
    return torch.cat([prompt.embeds.detach().to(words), text])[None]


def test_it_lowers_to_the_formula_of_the_paper(gpt2):
    prompt = make(gpt2)
    lowered = prompt.lower()
    assert torch.equal(lowered.embeds, prompt.embeds)
    np.testing.assert_allclose(lowered.input_offsets.detach().numpy(), offsets_of(prompt), rtol=1e-5, atol=1e-6)


def test_it_starts_as_the_authors_do(make_model):
    model = make_model("gpt2", n_positions=600)
    prompt = DecomposedPrompt(model, 4, seed=3)
    assert torch.equal(prompt.embeds, SoftPrompt(model, 4, "sampled_vocab", seed=3).embeds)
    assert prompt.left.shape == (256, 45)
    assert not prompt.right.any()
    bound = 45**-0.5
    assert 0.95 * bound < float(prompt.left.detach().abs().max()) <= bound
    assert prompt.settings == {"max_length": 256, "rank": 45, "alpha": 8.0, "offset_rate_factor": 0.1}
    assert prompt.default_learning_rate() == SoftPrompt(model, 4).default_learning_rate()
    assert DecomposedPrompt(make_model("gpt2"), 4).settings["max_length"] == 60  # the 64 positions but four


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_packed_loss_and_its_gradients_are_the_stock_ones(make_model, family):
    model = make_model(family).requires_grad_(False)
    prompt = make(model)
    with ptengine.patched(model):
        loss = packed_loss(model, prompt.lower(), pack_rows(ROWS, labels=LABELS)).loss
    loss.backward()
    exact = make_model(family).double().requires_grad_(False)
    copies = {name: p.detach().double().requires_grad_() for name, p in prompt.named_parameters()}
    offsets = 2.0 / math.sqrt(3) * copies["left"] @ copies["right"]
    logits, labels = [], []
    for ids, wanted in zip(ROWS, LABELS, strict=True):
        words = exact.get_input_embeddings()(torch.tensor(ids)) + offsets[: len(ids)]
        out = exact(inputs_embeds=torch.cat([copies["embeds"], words])[None]).logits[0]
        logits += [out[3 + i] for i, label in enumerate(wanted) if label != -100]
        labels += [label for label in wanted if label != -100]
    reference = torch.nn.functional.cross_entropy(torch.stack(logits), torch.tensor(labels))
    reference.backward()
    torch.testing.assert_close(loss.double(), reference, rtol=1e-5, atol=1e-6)
    for name, parameter in prompt.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
        torch.testing.assert_close(parameter.grad.double(), copies[name].grad, rtol=1e-3, atol=1e-6)


def test_rows_of_one_batch_have_the_offsets_of_their_own_prompt(gpt2):
    one, two, plain = make(gpt2), make(gpt2, max_length=6, seed=4), SoftPrompt(gpt2, 3)
    pairs = [(one, 2), (two, 1), (plain, 0), (two, 0), (None, 1), (one, 2)]
    order = [one, two, plain]
    with ptengine.patched(gpt2.requires_grad_(False)):
        together = packed_loss(
            gpt2, [prompt.lower() for prompt in order],
            pack_rows([ROWS[row] for _, row in pairs], labels=[LABELS[row] for _, row in pairs]),
            prompt_ids=[-1 if prompt is None else order.index(prompt) for prompt, _ in pairs],
        )  # fmt: skip
        total = 0.0
        for prompt, row in pairs:
            lowered = None if prompt is None else prompt.lower()
            alone = packed_loss(gpt2, lowered, pack_rows([ROWS[row]], labels=[LABELS[row]]))
            total += alone.loss.item() * alone.num_labels
    assert together.loss.item() == pytest.approx(total / together.num_labels, rel=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_attached_calls_are_the_stock_computation(make_model, family, side):
    model = make_model(family).requires_grad_(False)
    prompt = make(model)
    ids, mask = torch.zeros(3, 5, dtype=torch.int64), torch.zeros(3, 5, dtype=torch.int64)
    for row, tokens in enumerate(ROWS):
        at = slice(5 - len(tokens), 5) if side == "left" else slice(0, len(tokens))
        ids[row, at], mask[row, at] = torch.tensor(tokens), 1
    with prompt.attached(model) as attached:
        logits = attached(input_ids=ids, attention_mask=mask).logits
        kept = attached.eval()(input_ids=ids, attention_mask=mask).logits
        attached.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in prompt.parameters())
    for row, tokens in enumerate(ROWS):
        wanted = model(inputs_embeds=stock_embeds(model, prompt, tokens)).logits[0, 4:]
        for got in (logits, kept):
            torch.testing.assert_close(got[row][mask[row] == 1], wanted, rtol=1e-4, atol=1e-5)


def greedy(model, prompt, ids, new):
    ids = list(ids)
    for _ in range(new):
        ids.append(int(model(inputs_embeds=stock_embeds(model, prompt, ids)).logits[0, -1].argmax()))
    return ids[-new:]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_generation_is_the_stock_computation(make_model, family):
    model = make_model(family, initializer_range=0.3).requires_grad_(False)
    model.generation_config.eos_token_id = None
    prompt = make(model)
    wanted = [greedy(model, prompt, ids, 4) for ids in ROWS]
    plain = ptengine.generate(model, SoftPrompt(model, init="array", array=prompt.embeds), ROWS, max_new_tokens=4)
    got = ptengine.generate(model, prompt, ROWS, max_new_tokens=4)
    assert got[:, -4:].tolist() == wanted
    assert plain[:, -4:].tolist() != wanted
    mixed = ptengine.generate(model, [prompt, None, prompt], ROWS, max_new_tokens=4)
    assert mixed[[0, 2], -4:].tolist() == [wanted[0], wanted[2]]
    assert torch.equal(mixed[1, -4:], ptengine.generate(model, None, ROWS[1:2], max_new_tokens=4)[0, -4:])
    beams = ptengine.generate(model, prompt, ROWS, max_new_tokens=4, num_beams=2)
    uncached = ptengine.generate(model, prompt, ROWS, max_new_tokens=4, num_beams=2, use_cache=False)
    assert torch.equal(beams, uncached)
    with prompt.attached(model):
        inside = model.generate(torch.tensor(ROWS[:1]), max_new_tokens=4, do_sample=False)
    assert inside[0, -4:].tolist() == wanted[0]


def test_an_encoder_reads_the_offsets_too(make_model):
    model = make_model("bert").requires_grad_(False)
    prompt = make(model)
    ids, mask = torch.tensor([[*ROWS[2], 0, 0]]), torch.tensor([[1, 1, 1, 0, 0]])
    with prompt.attached(model):
        attached = model(input_ids=ids, attention_mask=mask).logits
    with ptengine.patched(model):
        packed = sequence_logits(model, prompt.lower(), pack_rows([ROWS[2]]))
    hidden = model.bert(inputs_embeds=stock_embeds(model, prompt, ROWS[2])).last_hidden_state
    wanted = model.classifier(model.bert.pooler(hidden[:, 4:5]))
    torch.testing.assert_close(attached, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed, wanted, rtol=1e-4, atol=1e-5)


def test_fold_and_save_keep_everything(gpt2, tmp_path):
    prompt = make(gpt2)
    folded = prompt.fold()
    prompt.save(tmp_path)
    loaded = load_prompt(tmp_path, gpt2)
    for other in (folded, loaded):
        assert type(other) is DecomposedPrompt
        assert other.config() == prompt.config()
        assert torch.equal(other.lower().embeds, prompt.lower().embeds)
        assert torch.equal(other.lower().input_offsets, prompt.lower().input_offsets)
        assert other.max_text_length == 9
    shaken(prompt)
    assert not torch.equal(folded.embeds, prompt.embeds)


DATA = [{"text": "good or good", "label": "good"}, {"text": "bad review", "label": "bad"}]


def train(model, prompt, tokenizer, output, steps, **settings):
    task = ClassificationTask(Template("{text} is"), Verbalizer({"good": " good", "bad": " bad"}))
    config = ptengine.TrainingConfig(
        output_dir=str(output), max_steps=steps, per_device_train_batch_size=1, disable_tqdm=True,
        lr_scheduler_type="constant", save_strategy="steps", save_steps=2, **settings,
    )  # fmt: skip
    return ptengine.Trainer(model, prompt, DATA, DATA, config, task=task, tokenizer=tokenizer)


def test_it_trains_with_two_rates_and_resumes_exactly(gpt2, tokenizer, tmp_path):
    def new():
        return DecomposedPrompt(gpt2, 4, max_length=9, rank=3, offset_rate_factor=0.5)

    whole, resumed = new(), new()
    result = train(gpt2, whole, tokenizer, tmp_path / "whole", 4).fit()
    train(gpt2, new(), tokenizer, tmp_path / "cut", 2).fit()
    again = train(gpt2, resumed, tokenizer, tmp_path / "cut", 4).fit(resume=True)
    assert again.losses == result.losses
    assert torch.equal(resumed.right, whole.right)
    one = new()
    train(gpt2, one, tokenizer, tmp_path / "one", 1, learning_rate=0.01).fit()
    assert float(one.right.detach().abs().max()) == pytest.approx(0.005, rel=1e-2)  # from zero, by Adam's first step
    assert float((one.embeds - new().embeds).detach().abs().max()) == pytest.approx(0.01, rel=1e-2)


BAD = {
    "no rank": ({"rank": 0}, "rank, a whole number of at least 1, got 0"),
    "no alpha": ({"alpha": 0}, "alpha, a number above 0, got 0"),
    "no rate": ({"offset_rate_factor": 0}, "offset_rate_factor, a number above 0, got 0"),
    "no length": ({"max_length": 0}, "max_length, a whole number of at least 1, got 0"),
    "longer than the model": ({"max_length": 61}, "max_length of at most 60, the 64 positions.*got 61"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error(gpt2, case):
    arguments, message = BAD[case]
    with pytest.raises(InputError, match=message):
        DecomposedPrompt(gpt2, 4, **arguments)


def test_texts_beyond_the_offsets_are_refused(gpt2, tokenizer, tmp_path):
    prompt = make(gpt2, max_length=4)
    with ptengine.patched(gpt2), pytest.raises(InputError, match=r"row 0: expected at most 4 tokens.*got 5"):
        packed_loss(gpt2, prompt.lower(), pack_rows(ROWS, labels=LABELS))
    with prompt.attached(gpt2), pytest.raises(InputError, match=r"expected at most 4 tokens.*got 5"):
        gpt2(torch.tensor(ROWS[:1]))
    with pytest.raises(InputError, match=r"input 2 with 2 new tokens: expected at most 4 tokens.*got 5"):
        ptengine.generate(gpt2, prompt, [ROWS[1], ROWS[1], ROWS[2]], max_new_tokens=2)
    with pytest.raises(InputError, match="at most 4"):
        train(gpt2, prompt, tokenizer, tmp_path, 2)
    with pytest.raises(InputError, match="max_length of at most 4, the longest text of the prompt, got 5"):
        train(gpt2, prompt, tokenizer, tmp_path, 2, max_length=5)


def test_offsets_of_another_shape_are_refused(gpt2):
    for wrong in (torch.zeros(3), torch.zeros(0, 32)):
        with pytest.raises(InputError, match=r"input offsets of shape \[S, d\]"):
            VirtualTokens(torch.zeros(2, 32), wrong)
    with ptengine.patched(gpt2), pytest.raises(InputError, match="input offsets of the model's width 32, got 16"):
        packed_loss(gpt2, VirtualTokens(torch.zeros(2, 32), torch.zeros(9, 16)), pack_rows(ROWS, labels=LABELS))
