"""Encoder-decoders under the trainer: the stock loop's losses, exact resumption, many prompts, and no logits."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from ptengine.backbone import TextDependentTokens, VirtualTokens, generate, vocabulary
from ptengine.data import Seq2SeqClassificationTask, Seq2SeqTask, Template, Verbalizer, load_rows
from ptengine.errors import InputError
from ptengine.prompts import Prompt, SoftPrompt, load_prompt
from ptengine.training import PromptSet, Trainer, evaluate

from ..backbone.stock import relative

KINDS = ("soft", "prefix", "by_text")


def run_of(tiny: ModuleType, folder: Path, kind: str, **settings: Any) -> Trainer:
    model = settings.pop("model", None) or tiny.t5()
    prompt = getattr(tiny, kind)(model, settings.get("seed", 7))
    return tiny.trainer(folder, model, prompt, tiny.pair_task(), evaluation=tiny.rows(4, seed=1), **settings)


def stock_loss(model: Any, prompt: Prompt, batch: list[Any]) -> Tensor:
    """Rows alone, by the stock model: the mean over all target tokens."""
    total, count = torch.zeros(()), 0
    lowered = prompt.lower()
    for row in batch:
        source, target = row.input_ids[: row.prompt_length], row.input_ids[row.prompt_length :]
        words = model.get_input_embeddings()(torch.tensor([source]))
        call: dict[str, Any] = {}
        if isinstance(lowered, TextDependentTokens):
            words = torch.cat([lowered.of_texts(words, torch.tensor([len(source)])), words], dim=1)
        elif isinstance(prompt, SoftPrompt):
            words = torch.cat([lowered.embeds[None], words], dim=1)
        else:
            own = DynamicCache()
            for layer, (keys, values) in enumerate(zip(lowered.keys, lowered.values, strict=True)):
                own.update(keys.transpose(0, 1)[None], values.transpose(0, 1)[None], layer)
            call["past_key_values"] = EncoderDecoderCache(own, DynamicCache())
        loss = model(inputs_embeds=words, labels=torch.tensor([target]), **call).loss
        total, count = total + loss * len(target), count + len(target)
    return total / count


@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_of_a_stock_loop(tiny: ModuleType, tmp_path: Path, kind: str) -> None:
    """Six steps over rows of different lengths; what a step rounds, the next ones carry on."""
    trainer = run_of(
        tiny, tmp_path / "ours", kind, max_steps=6, weight_decay=0.0, lr_scheduler_type="constant",
        max_grad_norm=None, per_device_train_batch_size=8, train=tiny.rows(8),
    )  # fmt: skip
    result = trainer.fit()
    model = tiny.t5().eval().requires_grad_(False)
    prompt = getattr(tiny, kind)(model, 7)
    rows = tiny.pair_task().encode(
        load_rows(tiny.rows(8)), tiny.tokenizer(), max_tokens=tiny.POSITIONS
    )  # one batch an epoch, whose order does not matter
    factors = prompt.learning_rate_factors()
    groups = [{"params": [p], "lr": 0.05 * factors.get(name, 1.0)} for name, p in prompt.named_parameters()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    losses = []
    for _ in range(6):
        loss = stock_loss(model, prompt, list(rows))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert result.losses == pytest.approx(losses, abs=2e-5)
    assert losses[0] - losses[-1] > 0.05
    for ours, theirs in zip(trainer.prompt.parameters(), prompt.parameters(), strict=True):
        assert relative(ours, theirs) < 1e-3
    held = tiny.pair_task().encode(load_rows(tiny.rows(4, seed=1)), tiny.tokenizer(), max_tokens=tiny.POSITIONS)
    with torch.no_grad():
        judged = stock_loss(model, prompt, list(held)).item()
    assert result.metrics["loss"] == pytest.approx(judged, abs=1e-4)
    saved = load_prompt(result.prompt_path, tiny.t5())
    again = evaluate(tiny.t5(), saved, tiny.pair_task(), tiny.rows(4, seed=1), tiny.tokenizer(), batch_size=3)
    assert again.metrics["loss"] == pytest.approx(result.metrics["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("soft", {"gradient_checkpointing": True}),
        ("prefix", {"gradient_accumulation_steps": 2}),
        ("soft", {"bf16": True}),
    ],
)
def test_resumed_run_equals_the_uninterrupted_one(
    tiny: ModuleType, tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    settings = settings | {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 2}
    settings |= {"lr_scheduler_type": "constant"}
    settings |= {"model": tiny.t5(), "max_steps": 6}
    whole = run_of(tiny, tmp_path / "whole", kind, **settings).fit()
    run_of(tiny, tmp_path / "halves", kind, **settings | {"max_steps": 3}).fit()
    resumed = run_of(tiny, tmp_path / "halves", kind, **settings).fit(resume=tmp_path / "halves" / "checkpoint-3")
    assert resumed.losses == whole.losses
    assert resumed.metrics == whole.metrics
    for file in whole.prompt_path.glob("*.safetensors"):
        assert file.read_bytes() == (resumed.prompt_path / file.name).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_goes_through_labelled_rows_alone(
    tiny: ModuleType, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stock head runs on nothing; the cross-entropy is handed the labelled tokens' hidden states."""
    model, handed, made = tiny.t5(), [], []
    stock = vocabulary.linear_cross_entropy

    def spy(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
        handed.append((tuple(hidden.shape), int((labels >= 0).sum())))
        return stock(hidden, weight, labels, **options)

    monkeypatch.setattr(vocabulary, "linear_cross_entropy", spy)
    trainer = run_of(tiny, tmp_path / "out", kind, model=model, max_steps=1, eval_strategy="no")
    labels = [len(row.input_ids) - row.prompt_length for row in trainer._train]
    model.lm_head.register_forward_hook(lambda _module, _args, out: made.append(out.numel()))
    trainer.fit()
    assert set(labels) == {5}
    assert handed[-1] == ((3 * 5, 16), 3 * 5)
    assert made[-1] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_many_prompts_at_once(tiny: ModuleType, tmp_path: Path, kind: str) -> None:
    """A set gives its members the losses that they have alone."""
    model, settings = tiny.t5(), {"max_steps": 4, "eval_strategy": "no"}
    members = [run_of(tiny, tmp_path / f"m{seed}", kind, model=model, seed=seed, **settings) for seed in (1, 2)]
    together = PromptSet(members, tmp_path / "set").fit().members
    for seed, member in zip((1, 2), together, strict=True):
        alone = run_of(tiny, tmp_path / f"a{seed}", kind, model=model, seed=seed, **settings).fit()
        assert member.losses == pytest.approx(alone.losses, abs=2e-5)


def test_a_limit_of_tokens_counts_the_virtual_ones_of_every_row(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Soft prompts and prompts that depend on the text share a batch, up to the limit, and keep their numbers."""
    import ptengine.training.joint as joint

    sizes: list[int] = []
    real = joint.seq2seq_losses

    def counted(model: Any, lowered: Any, sources: Any, targets: Any, **options: Any) -> Any:
        sizes.append(sources.num_tokens + targets.num_tokens + 4 * sources.num_rows)
        return real(model, lowered, sources, targets, **options)

    monkeypatch.setattr(joint, "seq2seq_losses", counted)
    model, settings = tiny.t5(), {"max_steps": 2, "eval_strategy": "no"}

    def fit(folder: str, limit: int | None) -> list[list[float]]:
        members = [
            run_of(tiny, tmp_path / folder / kind, kind, model=model, seed=seed, **settings)
            for seed, kind in enumerate(("soft", "by_text"))
        ]
        done = PromptSet(members, tmp_path / folder, max_tokens_per_batch=limit).fit().members
        return [member.losses for member in done]

    whole, joined = fit("whole", None), list(sizes)
    assert len(joined) == 2
    sizes.clear()
    for one, other in zip(fit("same", max(joined)), whole, strict=True):
        assert one == pytest.approx(other, abs=2e-5)
    assert sizes == joined
    sizes.clear()
    for one, other in zip(fit("cut", min(joined) - 1), whole, strict=True):
        assert one == pytest.approx(other, abs=2e-5)
    assert len(sizes) == 4
    assert max(sizes) < min(joined)


def test_virtual_tokens_that_the_template_places(tiny: ModuleType, tmp_path: Path) -> None:
    """Before the source they are the prompt's own place; prompts that cannot stand there are refused."""
    model, settings = tiny.t5(), {"max_steps": 3, "eval_strategy": "no"}
    placed = Seq2SeqTask(Template("{prompt:4}{text} it"))
    for kind in ("soft", "by_text"):
        plain = run_of(tiny, tmp_path / f"{kind} plain", kind, model=model, **settings).fit()
        prompt = getattr(tiny, kind)(model, 7)
        with_place = tiny.trainer(tmp_path / kind, model, prompt, placed, **settings).fit()
        assert with_place.losses == plain.losses
    with pytest.raises(InputError, match="a prompt of virtual tokens for the 4 that the template places, got Prefix"):
        tiny.trainer(tmp_path, model, tiny.prefix(model), placed)
    with pytest.raises(InputError, match="a prompt of 4 virtual tokens, as many as the template places, got 3"):
        tiny.trainer(tmp_path, model, SoftPrompt(model, 3), placed)


def test_texts_behind_a_prompt_that_depends_on_the_source(tiny: ModuleType) -> None:
    """What `evaluate` writes is what `generate` writes behind each row's own virtual tokens."""
    model, tokens, task, rows = tiny.t5(), tiny.tokenizer(), tiny.pair_task(), tiny.rows(5, seed=2)
    # A head of its own: one tied to the embeddings repeats the start token.
    head = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(5))
    model.lm_head.weight = torch.nn.Parameter(head)
    prompt = tiny.by_text(model, 7)
    found = evaluate(model, prompt, task, rows, tokens, batch_size=2, generate=True, max_new_tokens=6)
    encoded = task.encode(load_rows(rows), tokens, max_tokens=tiny.POSITIONS)
    sources = [row.input_ids[: row.prompt_length] for row in encoded]
    own = []
    with torch.no_grad():
        for source in sources:
            words = model.get_input_embeddings()(torch.tensor([source]))
            own.append(VirtualTokens(prompt.lower().of_texts(words, torch.tensor([len(source)]))[0]))
    written = generate(model, own, sources, max_new_tokens=6)
    assert found.predictions == tokens.batch_decode(written, skip_special_tokens=True)
    bare = evaluate(model, None, task, rows, tokens, generate=True, max_new_tokens=6)
    assert bare.predictions != found.predictions


WORDS = Verbalizer({"neg": ["not fine", "bad"], "pos": "good"})
FIRST = {"neg": "not fine", "pos": "good"}


@pytest.mark.parametrize("kind", KINDS)
def test_label_words_are_trained_as_targets(tiny: ModuleType, tmp_path: Path, kind: str) -> None:
    model, rows = tiny.t5(), tiny.rows(8)
    settings = {"max_steps": 5, "train": None}
    found = []
    for folder, task in (
        ("words", Seq2SeqClassificationTask(Template("{text} it"), WORDS)),
        ("texts", Seq2SeqTask(Template("{text} it"), "word")),
    ):
        settings["train"] = [row | {"word": FIRST[row["label"]]} for row in rows]
        prompt = getattr(tiny, kind)(model, 7)
        found.append(tiny.trainer(tmp_path / folder, model, prompt, task, **settings).fit().losses)
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_scored_as_the_stock_model_does(tiny: ModuleType, kind: str) -> None:
    """Every word of every row alone, in fp64: a label's probability is the sum of its words'."""
    task, rows = Seq2SeqClassificationTask(Template("{text} it"), WORDS), tiny.rows(12, seed=4)
    model, tokens = tiny.t5(dropout=0.0).eval(), tiny.tokenizer()
    head = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(3))
    model.lm_head.weight = torch.nn.Parameter(head)  # one tied to the embeddings repeats the start token
    for block in model.decoder.block:  # so that what is said depends on the text
        block.layer[1].EncDecAttention.o.weight.data.mul_(30)
    prompt = getattr(tiny, kind)(model, 7)
    found = evaluate(model, prompt, task, rows, tokens, batch_size=5)
    encoded, bound = task.encode(load_rows(rows), tokens, max_tokens=tiny.POSITIONS), task.bind(tokens)
    double, losses, said = model.double(), [], []
    prompt = prompt.double()
    with torch.no_grad():
        for row in encoded:
            candidates = task.candidates(row, bound)
            words = [-stock_loss(double, prompt, [c]) * (len(c.input_ids) - c.prompt_length) for c in candidates]
            classes = torch.stack([torch.logaddexp(words[0], words[1]), words[2]])
            said.append(bound.labels[int(classes.argmax())])
            first = {0: 0, 1: 2}[row.class_id]
            losses += [-words[first] / len(bound.words[first])] * len(bound.words[first])
    assert found.predictions == said
    assert len(set(said)) == 2
    assert found.metrics["loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)


def test_many_prompts_that_name_labels(tiny: ModuleType, tmp_path: Path) -> None:
    model, task = tiny.t5(), Seq2SeqClassificationTask(Template("{text} it"), WORDS)
    settings = {"evaluation": tiny.rows(4, seed=1), "max_steps": 4, "eval_strategy": "steps", "eval_steps": 2}

    def member(folder: str, seed: int) -> Trainer:
        return tiny.trainer(tmp_path / folder, model, tiny.soft(model, seed), task, seed=seed, **settings)

    together = PromptSet([member(f"m{seed}", seed) for seed in (1, 2)], tmp_path / "set").fit().members
    for seed, result in zip((1, 2), together, strict=True):
        alone = member(f"a{seed}", seed).fit()
        assert result.losses == pytest.approx(alone.losses, abs=2e-5)
        assert result.metrics["loss"] == pytest.approx(alone.metrics["loss"], abs=2e-5)
        assert result.metrics["accuracy"] == alone.metrics["accuracy"]


def test_inputs(tiny: ModuleType, tmp_path: Path) -> None:
    model = tiny.t5()
    with pytest.raises(InputError, match=r"got GenerationTask, which is for causal models: .* takes Seq2SeqTask"):
        tiny.trainer(tmp_path, model, tiny.soft(model), tiny.text_task())
    with pytest.raises(InputError, match="expected a task for causal models with model type 'gpt2', got Seq2SeqTask"):
        tiny.trainer(tmp_path, task=tiny.pair_task())
    with pytest.raises(InputError, match="gradient_checkpointing=False with a prefix in an encoder-decoder"):
        run_of(tiny, tmp_path, "prefix", gradient_checkpointing=True)
    with pytest.raises(InputError, match=r"row 0 .*expected at most 3 tokens .* got 5 .the target"):
        run_of(tiny, tmp_path, "soft", max_length=3)
