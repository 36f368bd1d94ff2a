"""What a user can hand over wrongly: one error each, before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers import processors

from ptengine.data import SequenceClassificationTask
from ptengine.errors import InputError
from ptengine.prompts import SoftPrompt
from ptengine.training import Trainer, TrainingConfig, evaluate, load_head


def _half_prompt(tiny: ModuleType) -> Any:
    return tiny.soft(tiny.gpt2()).half()


def _half_head(tiny: ModuleType) -> Any:
    model = tiny.bert()
    model.classifier.to(torch.bfloat16)
    return model


def _frozen_prompt(tiny: ModuleType) -> Any:
    return tiny.soft(tiny.gpt2()).requires_grad_(False)


def _three_labels(tiny: ModuleType) -> Any:
    return SequenceClassificationTask(labels=("neg", "pos", "none"))


def _pairs_in_one_segment(tiny: ModuleType) -> dict[str, Any]:
    """A model with segments of one kind, as RoBERTa is, and a tokenizer that tells a pair's texts apart."""
    model, tokens = tiny.bert(), tiny.tokenizer(special=True)
    model.bert.embeddings.token_type_embeddings = torch.nn.Embedding(1, 16)
    model.config.type_vocab_size = 1
    tokens.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", pair="$A $B:1", special_tokens=[]
    )
    tokens.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    task = SequenceClassificationTask(text_pair_column="target", labels=("neg", "pos"))
    return {"model": model, "tokens": tokens, "task": task}


def _larger_tokenizer(tiny: ModuleType) -> Any:
    tokens = tiny.tokenizer()
    tokens.add_tokens(["unheard", "novel"])
    return tokens


BAD: dict[str, Callable[[ModuleType], dict[str, Any]]] = {
    "expected task, a task of ptengine.data, got str": lambda tiny: {"task": "classification"},
    "expected a ptengine prompt, got Parameter": lambda tiny: {"prompt": torch.nn.Parameter(torch.zeros(4, 16))},
    "expected model_type 'llama', got 'gpt2'": lambda tiny: {"prompt": tiny.soft(tiny.llama())},
    "expected a transformers model, got Linear": lambda tiny: {
        "model": torch.nn.Linear(2, 2),
        "prompt": tiny.soft(tiny.gpt2()),
    },
    "task for causal models with model type 'gpt2', got SequenceClassificationTask": lambda tiny: {
        "task": tiny.head_task()
    },
    "task for encoder models with model type 'bert', got ClassificationTask": lambda tiny: {"model": tiny.bert()},
    r"the task's 3 labels \(num_labels\), got 2": lambda tiny: {"model": tiny.bert(), "task": _three_labels(tiny)},
    "classifier.weight in float32, got torch.bfloat16": lambda tiny: {
        "model": _half_head(tiny),
        "task": tiny.head_task(),
    },
    "a model with a classification head .*got BertModel": lambda tiny: {
        "model": tiny.bert().bert,
        "task": tiny.head_task(),
    },
    "language-modelling head, got GPT2Model": lambda tiny: {"model": tiny.gpt2().transformer},
    "the prompt's embeds in float32 .*got torch.float16": lambda tiny: {"prompt": _half_prompt(tiny)},
    "expected something to train": lambda tiny: {"prompt": _frozen_prompt(tiny)},
    "expected eval_data with eval_strategy='epoch', got None": lambda tiny: {"eval_strategy": "epoch"},
    "expected eval_data with early_stopping_patience=2, got None": lambda tiny: {"early_stopping_patience": 2},
    "expected eval_data with load_best_model_at_end=True, got None": lambda tiny: {"load_best_model_at_end": True},
    "expected metric_for_best_model among loss, accuracy.*got 'bleu'": lambda tiny: {
        "evaluation": tiny.rows(3),
        "metric_for_best_model": "bleu",
    },
    r"expected max_length of at most 44 .*got 45": lambda tiny: {"max_length": 45},
    r"eval, row 1 .*expected one of the labels": lambda tiny: {
        "evaluation": [{"text": "film", "label": "neg"}, {"text": "film", "label": "meh"}]
    },
    r"train, row 0 .*at most 6 tokens": lambda tiny: {
        "train": [{"text": "film " * 6, "label": "neg"}],
        "max_length": 6,
    },
    "train: expected at least one row": lambda tiny: {"train": []},
    "nowhere.csv: expected a file": lambda tiny: {"train": "nowhere.csv"},
    "expected columns? 'text'": lambda tiny: {"train": [{"review": "film", "label": "neg"}]},
    r"train, row 0 .*expected token ids below 26, .*got 27: is the tokenizer the backbone's own": lambda tiny: {
        "tokens": _larger_tokenizer(tiny),
        "train": [{"text": "novel", "label": "neg"}],
    },
    r"train, row 0 .*expected segment ids \(token_type_ids\) below 1, .*got 1: is the tok": _pairs_in_one_segment,
    "expected bf16=False with a model in float16": lambda tiny: {"model": tiny.gpt2().half(), "bf16": True},
    "expected warmup_steps of at most the run's 14 steps, got 15": lambda tiny: {
        "max_steps": -1,
        "num_train_epochs": 2,
        "warmup_steps": 15,
    },
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_error_before_anything_is_written(tiny: ModuleType, tmp_path: Path, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny.trainer(tmp_path / "out", **BAD[message](tiny))
    assert not (tmp_path / "out").exists()


def test_a_folder_of_an_impossible_name_was_a_value_error(tiny: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected a directory to write to, got .*: .*embedded null"):
        tiny.trainer(tmp_path / "a\0b").fit()


def test_a_missing_tokenizer_was_a_type_error(tiny: ModuleType, tmp_path: Path) -> None:
    model = tiny.gpt2()
    config = TrainingConfig(output_dir=str(tmp_path / "out"), max_steps=1)
    with pytest.raises(InputError, match="expected tokenizer, that of the model, got NoneType"):
        Trainer(model, tiny.soft(model), tiny.rows(3), config=config, task=tiny.words_task(), tokenizer=None)
    with pytest.raises(InputError, match="expected tokenizer, that of the model, got NoneType"):
        evaluate(model, None, tiny.words_task(), tiny.rows(3), None)


def test_a_step_loss_that_is_none_was_an_attribute_error(tiny: ModuleType, tmp_path: Path) -> None:
    model = tiny.gpt2()
    with pytest.raises(InputError, match=r"expected step_loss with parts\(\) and identity\(\).*got int"):
        Trainer(
            model, tiny.soft(model), tiny.rows(4), None, TrainingConfig(str(tmp_path / "out")), task=tiny.words_task(),
            tokenizer=tiny.tokenizer(), step_loss=3,  # type: ignore[arg-type]
        )  # fmt: skip


def test_config_is_required(tiny: ModuleType) -> None:
    model = tiny.gpt2()
    with pytest.raises(InputError, match="expected config, a TrainingConfig, got NoneType"):
        Trainer(model, tiny.soft(model), tiny.rows(3), task=tiny.words_task(), tokenizer=tiny.tokenizer())


def test_prompt_that_fills_the_context_is_refused(tiny: ModuleType, tmp_path: Path) -> None:
    model = tiny.gpt2()
    prompt = SoftPrompt(model, num_virtual_tokens=40)
    with pytest.raises(InputError, match=r"expected at most 8 tokens"):
        tiny.trainer(tmp_path / "out", model, prompt, train=[{"text": "film " * 8, "label": "neg"}])
    object.__setattr__(prompt, "num_virtual_tokens", tiny.POSITIONS)
    with pytest.raises(InputError, match="fewer virtual tokens than the backbone's 48 positions, got 48"):
        tiny.trainer(tmp_path / "out", model, prompt)


def test_first_token_needs_virtual_tokens(tiny: ModuleType, tmp_path: Path) -> None:
    """A label at the first text token has nothing to be predicted from behind a prefix, and was silently dropped."""
    from ptengine.data import ClassificationTask, Template, Verbalizer

    task = ClassificationTask(Template("{text}"), Verbalizer({"neg": "bad", "pos": "good"}))
    rows = [{"text": "film", "label": "neg"}, {"text": "", "label": "pos"}]
    model = tiny.gpt2()
    with pytest.raises(InputError, match=r"train, row 1 .*at least one token before the target"):
        tiny.trainer(tmp_path / "out", model, tiny.prefix(model), task, rows)
    result = tiny.trainer(tmp_path / "soft", model, tiny.soft(model), task, rows, max_steps=2).fit()
    assert result.steps == 2
    with pytest.raises(InputError, match="data, row 1"):
        evaluate(model, None, task, rows, tiny.tokenizer())


def test_output_dir_that_is_a_file_is_refused(tiny: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match="expected a directory to write to"):
        tiny.trainer(tmp_path / "out").fit()
    assert (tmp_path / "out").read_text() == "mine"


def test_refused_checkpoint_leaves_no_folder(tiny: ModuleType, tmp_path: Path) -> None:
    """`fit(resume=path)` made the output folder before it looked at the checkpoint."""
    checkpoint = tiny.trainer(tmp_path / "one", max_steps=2).fit().checkpoints[-1]
    for resume, settings in ((tmp_path / "nowhere", {}), (checkpoint, {"learning_rate": 0.9}), (3, {})):
        with pytest.raises(InputError, match=r"expected (a checkpoint folder|config learning_rate|resume as True)"):
            tiny.trainer(tmp_path / "new" / "out", max_steps=2, **settings).fit(resume=resume)
    assert not (tmp_path / "new").exists()


def test_rows_that_were_cut_are_counted_in_a_warning(tiny: ModuleType, tmp_path: Path) -> None:
    """`truncation=True` cut rows without a word: `EncodedSplit.truncated` was dropped."""
    rows = [{"text": "film " * length, "label": "neg"} for length in (2, 20, 30)]
    with pytest.warns(UserWarning, match="train: 2 of 3 rows were cut to 10 tokens"):
        tiny.trainer(tmp_path, train=rows, max_length=10, truncation=True)


def test_encoded_rows_are_taken_as_they_are(tiny: ModuleType, tmp_path: Path) -> None:
    from datasets import Dataset

    rows = Dataset.from_list(tiny.rows(20))
    encoded = tiny.words_task().encode(rows, tiny.tokenizer(), max_tokens=40)
    plain = tiny.trainer(tmp_path / "a", train=rows, max_steps=3).fit()
    assert tiny.trainer(tmp_path / "b", train=encoded, max_steps=3).fit().losses == plain.losses
    with pytest.raises(InputError, match=r"train, row .*at most 5 tokens .*encoded before"):
        tiny.trainer(tmp_path / "c", train=encoded, max_length=5)


def test_two_runs_in_one_folder_are_refused(tiny: ModuleType, tmp_path: Path) -> None:
    from ptengine.training.folders import exclusive

    with exclusive(tmp_path), pytest.raises(InputError, match="in which another run is training now"):
        tiny.trainer(tmp_path).fit(resume=True)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("expected batch_size, a whole number of at least 1, got 0", {"batch_size": 0}),
        ("expected max_new_tokens, a whole number of at least 1, got True", {"max_new_tokens": True}),
        ("expected a GenerationTask with generate=True, got ClassificationTask", {"generate": True}),
        ("expected max_length of at most 48", {"max_length": 49}),
    ],
)
def test_evaluation_refuses_bad_options(tiny: ModuleType, message: str, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(tiny.gpt2(), None, tiny.words_task(), tiny.rows(3), tiny.tokenizer(), **options)


def test_generation_beyond_the_context_is_refused_before_work(tiny: ModuleType) -> None:
    model = tiny.gpt2()
    rows = [{"text": "film", "target": "fine"}, {"text": "film " * 9, "target": "fine"}]
    with pytest.raises(InputError, match=r"row 1 .*1 to 4 tokens .*max_new_tokens=40\), got 10"):
        evaluate(
            model, tiny.soft(model), tiny.text_task(), rows, tiny.tokenizer(), generate=True, max_new_tokens=40
        )  # fmt: skip


def test_head_that_does_not_fit_is_refused(tiny: ModuleType, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = tiny.bert()
    before = model.classifier.weight.detach().clone()
    with pytest.raises(InputError, match="does not exist"):
        load_head(tmp_path, model)
    (tmp_path / "head.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="expected a safetensors file"):
        load_head(tmp_path, model)
    save_file({"classifier.weight": torch.zeros(3, 16)}, tmp_path / "head.safetensors")
    with pytest.raises(InputError, match=r"expected a head with .*got .*\[3, 16\]"):
        load_head(tmp_path, model)
    assert torch.equal(model.classifier.weight, before)


def test_config_object_is_checked_once_and_frozen() -> None:
    config = TrainingConfig(output_dir="out")
    with pytest.raises(AttributeError):
        config.seed = 3  # type: ignore[misc]
