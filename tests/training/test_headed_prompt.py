"""Heads that are the prompt's own: the numbers of training a model's head in place, and the model does not move."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    DistilBertConfig,
    RobertaConfig,
)

from ptengine import HeadedPrompt, load_prompt
from ptengine.backbone.heads import task_head, with_weights
from ptengine.data import QuestionAnsweringTask, SequenceClassificationTask, Task, TokenClassificationTask
from ptengine.errors import InputError
from ptengine.prompts import LoPAPrompt, PTuning
from ptengine.training import PromptSet, Trainer, TrainingResult, evaluate, sweep


@dataclass(frozen=True)
class Kind:
    head: Any
    task: Task
    rows: Callable[[ModuleType, int, int], list[dict[str, Any]]]


def _texts(tiny: ModuleType, count: int, seed: int) -> list[dict[str, Any]]:
    return tiny.rows(count, seed)


def _words(tiny: ModuleType, count: int, seed: int) -> list[dict[str, Any]]:
    split = [row["text"].split() for row in tiny.rows(count, seed)]
    return [{"tokens": x, "tags": ["B-X" if word in tiny.GOOD + tiny.BAD else "O" for word in x]} for x in split]


def _questions(tiny: ModuleType, count: int, seed: int) -> list[dict[str, Any]]:
    found = []
    for row in tiny.rows(count, seed):
        answer = next(word for word in row["text"].split() if word in tiny.GOOD + tiny.BAD)
        found.append({"question": "was it good", "context": row["text"], "answer": answer})
    return found


KINDS = {
    "sequence": Kind(BertForSequenceClassification, SequenceClassificationTask(labels=("neg", "pos")), _texts),
    "token": Kind(BertForTokenClassification, TokenClassificationTask(labels=("O", "B-X")), _words),
    "answer": Kind(BertForQuestionAnswering, QuestionAnsweringTask(stride=2, max_answer_length=3), _questions),
}


def special(tiny: ModuleType) -> Any:
    return tiny.tokenizer(special=True)


def own_head(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in task_head(model).items()}


def headed(model: Any, prompt: Any, task: Task, **options: Any) -> HeadedPrompt:
    return HeadedPrompt(model, prompt, getattr(task, "labels", ()), **options)


@pytest.mark.parametrize("method", ["soft", "prefix"])
@pytest.mark.parametrize("name", KINDS)
def test_a_run_has_the_numbers_of_training_the_models_own_head(
    tiny: ModuleType, tmp_path: Path, name: str, method: str
) -> None:
    """Bit for bit, with a rate, weight decay and clipping that the head's part in them would show; the model is as it
    was."""
    kind, tokens = KINDS[name], tiny.tokenizer(special=True)
    model = tiny.bert(kind.head)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    data, held = kind.rows(tiny, 8, 0), kind.rows(tiny, 5, 1)

    def run(prompt: Any, on: Any) -> TrainingResult:
        folder = tmp_path / type(prompt).__name__
        return tiny.trainer(
            folder, on, prompt, kind.task, data, held, tokens, max_steps=7, head_learning_rate=0.02, weight_decay=0.1,
            max_grad_norm=0.5, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2,
        ).fit()  # fmt: skip

    mine = headed(model, getattr(tiny, method)(model), kind.task, head=own_head(model))
    got = run(mine, model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    twin = copy.deepcopy(model)
    expected = run(getattr(tiny, method)(twin), twin)
    assert got.losses == expected.losses
    assert got.evaluations == expected.evaluations
    moved = own_head(twin)
    assert all(torch.equal(weight, moved[key]) for key, weight in mine.head_weights().items())
    assert any(not torch.equal(moved[key], before[key]) for key in moved)
    loaded = load_prompt(got.prompt_path, model)
    assert evaluate(model, loaded, kind.task, held, tokens).metrics == got.metrics


@pytest.mark.parametrize("name", KINDS)
def test_members_of_a_set_equal_the_same_prompts_trained_alone(tiny: ModuleType, tmp_path: Path, name: str) -> None:
    """Each with a head of its own, on rows of other lengths, micro-batches of other sizes and other numbers of steps;
    in fp64 all but the fp32 masters."""
    kind, tokens = KINDS[name], tiny.tokenizer(special=True)
    model = tiny.bert(kind.head).double()

    def make(folder: Path, seed: int) -> Trainer:
        inner = LoPAPrompt(model, 3, rank=2, seed=seed) if seed == 3 else tiny.soft(model, seed)
        return tiny.trainer(
            folder / str(seed), model, headed(model, inner, kind.task, seed=seed), kind.task,
            kind.rows(tiny, 6 + seed, seed), kind.rows(tiny, 4, 9), tokens, max_steps=4 + seed, seed=seed,
            per_device_train_batch_size=1 + seed, gradient_accumulation_steps=seed, head_learning_rate=0.02,
        )  # fmt: skip

    for limit in (None, 40):
        found = PromptSet(
            [make(tmp_path / f"set-{limit}", seed) for seed in (1, 2, 3)], tmp_path / f"set-{limit}",
            max_tokens_per_batch=limit,
        ).fit()  # fmt: skip
        for seed, member in zip((1, 2, 3), found.members, strict=True):
            assert isinstance(member, TrainingResult)
            alone = make(tmp_path / f"alone-{limit}", seed).fit()
            assert member.losses == pytest.approx(alone.losses, abs=1e-7, rel=0)
            assert len({*member.losses}) > 1
            for one, other in zip(member.evaluations, alone.evaluations, strict=True):
                assert one == pytest.approx(other, abs=1e-6, rel=0)


def test_a_sweep_over_seeds_of_heads(tiny: ModuleType, tmp_path: Path) -> None:
    """PromptSet once refused every task with a head."""
    model, task = tiny.bert(), tiny.head_task()
    config = tiny.trainer(tmp_path / "x", model, tiny.soft(model), task, max_steps=3, tokens=special(tiny)).config
    found = sweep(
        model, lambda seed: headed(model, tiny.soft(model, seed), task, seed=seed), tiny.rows(8), tiny.rows(5, 1),
        config, task=task, tokenizer=special(tiny), seeds=[1, 2], learning_rates=[0.1, 0.01],
    )  # fmt: skip
    assert len(found.runs) == 4
    assert found.prompt_path is not None
    assert isinstance(load_prompt(found.prompt_path, model), HeadedPrompt)


def test_a_killed_run_goes_on_exactly(tiny: ModuleType, tmp_path: Path) -> None:
    model, task = tiny.bert(), tiny.head_task()

    def run(folder: str, steps: int, resume: bool = False) -> tuple[HeadedPrompt, TrainingResult]:
        prompt = headed(model, tiny.prefix(model), task, seed=4)
        trainer = tiny.trainer(
            tmp_path / folder, model, prompt, task, tokens=special(tiny), max_steps=steps, save_steps=2,
            lr_scheduler_type="constant",
        )  # fmt: skip
        return prompt, trainer.fit(resume=resume)

    whole, expected = run("whole", 8)
    run("cut", 4)
    prompt, got = run("cut", 8, resume=True)
    assert got.losses == expected.losses
    assert all(torch.equal(weight, prompt.state_dict()[key]) for key, weight in whole.state_dict().items())


def test_a_prompt_of_another_start_goes_on(tiny: ModuleType, tmp_path: Path) -> None:
    """As a prompt without a head does: what P-tuning takes its own rate from was compared, inside the headed one."""
    model, task = tiny.bert(), tiny.head_task()
    rates = set()
    for seed, steps, resume in ((1, 2, False), (2, 4, True)):
        prompt = PTuning(model, 3, seed=seed)
        rates.add(prompt.default_learning_rate())
        trainer = tiny.trainer(
            tmp_path / "run", model, headed(model, prompt, task, seed=4), task, tokens=special(tiny), max_steps=steps,
            save_steps=1, lr_scheduler_type="constant", learning_rate=0.01,
        )  # fmt: skip
        assert trainer.fit(resume=resume).steps == steps
    assert len(rates) == 2


@pytest.mark.parametrize(
    "config",
    [
        RobertaConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
            max_position_embeddings=40, pad_token_id=1,
        ),
        DistilBertConfig(
            vocab_size=40, dim=16, n_layers=2, n_heads=4, hidden_dim=24, max_position_embeddings=40, pad_token_id=1
        ),
    ],
    ids=["roberta", "distilbert"],
)  # fmt: skip
def test_heads_of_several_layers(tiny: ModuleType, config: Any) -> None:
    """RoBERTa's head nests its layers, DistilBERT's are two modules of the model."""
    model = AutoModelForSequenceClassification.from_config(config).eval()
    prompt = headed(model, tiny.soft(model), tiny.head_task(), seed=3)
    assert len(prompt.head_weights()) == 4
    batch = {"input_ids": torch.tensor([[5, 6, 7]])}
    before = model(**batch).logits
    got = with_weights(model, prompt.head_weights())(**batch).logits
    assert torch.equal(model(**batch).logits, before)
    prompt.install_head(model)
    assert torch.equal(model(**batch).logits, got)
    assert not torch.allclose(got, before)


def test_a_new_head_starts_as_the_family_does_and_by_its_seed(tiny: ModuleType) -> None:
    """Without touching the process's generator."""
    model = tiny.bert()
    state = torch.get_rng_state()
    one, same, other = (headed(model, tiny.soft(model), tiny.head_task(), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    weight = "classifier.weight"
    assert torch.equal(one.head_weights()[weight], same.head_weights()[weight])
    assert not torch.equal(one.head_weights()[weight], other.head_weights()[weight])
    assert 0.15 < one.head_weights()[weight].std() < 0.45  # initializer_range is 0.3
    assert not one.head_weights()["classifier.bias"].any()


def test_folding_saving_and_copies(tiny: ModuleType, tmp_path: Path) -> None:
    model = tiny.bert()
    prompt = headed(model, tiny.prefix(model, projection=True, projection_size=8), tiny.head_task())
    folded = prompt.fold()
    assert torch.allclose(folded.lower().keys, prompt.lower().keys, rtol=0, atol=1e-6)
    assert folded.head_weights()["classifier.weight"] is not prompt.head_weights()["classifier.weight"]
    for whole in (True, False):
        prompt.save(tmp_path / str(whole), folded=whole)
        loaded = load_prompt(tmp_path / str(whole), model)
        assert isinstance(loaded, HeadedPrompt)
        assert (loaded.labels, loaded.num_virtual_tokens) == (("neg", "pos"), 3)
        wanted = (folded if whole else prompt).state_dict()
        assert {k: v.tolist() for k, v in loaded.state_dict().items()} == {k: v.tolist() for k, v in wanted.items()}


def test_threads_with_heads_of_their_own_share_a_model(tiny: ModuleType) -> None:
    """A head swapped into the model for the time of a call would be another thread's, too."""
    model, task, tokens = tiny.bert().eval(), tiny.head_task(), special(tiny)
    prompts = [headed(model, tiny.soft(model), task, seed=seed) for seed in range(4)]
    expected = [evaluate(model, prompt, task, tiny.rows(20), tokens).metrics["loss"] for prompt in prompts]
    wrong: list[float] = []

    def work(index: int) -> None:
        from ptengine.backbone import pack_rows, sequence_head

        hidden, batch = torch.ones(3, 16), pack_rows([[5, 6, 7]])
        weights = prompts[index].head_weights()
        first = sequence_head(model, hidden, batch, weights)
        wrong.extend(index for _ in range(50) if not torch.equal(sequence_head(model, hidden, batch, weights), first))

    from ptengine import patched

    with patched(model):
        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert len(set(expected)) == 4


def test_what_does_not_fit_is_refused(tiny: ModuleType, tmp_path: Path) -> None:
    model, task, tokens = tiny.bert(), tiny.head_task(), special(tiny)
    good = headed(model, tiny.soft(model), task)
    cases: list[tuple[str, Callable[[], Any]]] = [
        ("expected a prompt without a head, got HeadedPrompt", lambda: headed(model, good, task)),
        ("expected labels, a list of names", lambda: HeadedPrompt(model, tiny.soft(model), "neg")),
        ("expected labels, a list of names, got None", lambda: HeadedPrompt(model, tiny.soft(model), None)),  # type: ignore[arg-type]
        ("an encoder with a classification head", lambda: headed(tiny.gpt2(), tiny.soft(tiny.gpt2()), task)),
        (
            "an encoder with a classification head",
            lambda: headed(tiny.bert(BertForMaskedLM), tiny.soft(tiny.bert(BertForMaskedLM)), task),
        ),
        ("expected a head with", lambda: headed(model, tiny.soft(model), task, head={"x": torch.ones(1)})),
        ("the labels of the prompt's head", lambda: tiny.trainer(
            tmp_path, model, headed(model, tiny.soft(model), SequenceClassificationTask(labels=("a", "b"))), task,
            tokens=tokens,
        )),
        ("expected a task with a trained head", lambda: tiny.trainer(tmp_path, model, good, tiny.words_task())),
        ("install_head", lambda: good.attached(model)),
        ("expected a prompt, for a task with a trained head a HeadedPrompt", lambda: PromptSet(
            [tiny.trainer(tmp_path / "a", model, tiny.soft(model), task, tokens=tokens)], tmp_path
        )),
        ("expected a model with the head", lambda: good.install_head(tiny.bert(BertForMaskedLM))),
    ]  # fmt: skip
    for words, call in cases:
        with pytest.raises(InputError, match=words):
            call()
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "config", [{}, None, {"prompt": {"method": "prefix", "config": {}}, "labels": [], "head": {"a": [0]}},
               {"prompt": {"method": "headed_prompt", "config": {}}, "labels": [], "head": {}}]
)  # fmt: skip
def test_a_damaged_description_is_refused(tiny: ModuleType, config: Any) -> None:
    with pytest.raises(InputError, match="expected a saved prompt's config with prompt, labels and head"):
        HeadedPrompt.empty(tiny.soft(tiny.bert()).facts, config)
