"""Bad input through the command line: exit status 2, one line that says what was expected and what came, and nothing
written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Build = Callable[["Bench"], list[str]]


class Bench:
    """Where a bad case is put together: the tests' models and data, and a folder of its own."""

    def __init__(self, world: Any, folder: Path, tuned: Path) -> None:
        self.world = world
        self.folder = folder
        self.tuned = tuned
        self.out = folder / "out"

    def tune(self, *more: str) -> list[str]:
        return self.world.tune(self.out, *more)

    def sweep(self, *more: str) -> list[str]:
        self.out.mkdir()  # an empty folder may be there, and must stay as it is
        return self.tune("--eval", self.world.test, *more)

    def swapped(self, old: str, new: str, *more: str) -> list[str]:
        """A tuning run with one argument replaced."""
        arguments = self.tune(*more)
        arguments[arguments.index(old)] = new
        return arguments

    def file(self, name: str, content: str | bytes) -> str:
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def rows(self, *rows: dict[str, Any]) -> str:
        return self.file("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def train(self, path: str, *more: str) -> list[str]:
        return self.swapped(self.world.train, path, *more)

    def eval(self, *more: str) -> list[str]:
        return ["eval", "--prompt", str(self.tuned), "--data", self.world.test, *more]

    def generate(self, *more: str) -> list[str]:
        return ["generate", "--prompt", str(self.tuned), *more]

    def export(self, *more: str, name: str = "peft") -> list[str]:
        return ["export", "--prompt", str(self.tuned), "--format", name, "--output", str(self.out), *more]

    def copy(self, name: str, source: str | Path) -> Path:
        return Path(shutil.copytree(source, self.folder / name))

    def model(self, change: Callable[[Path], object]) -> list[str]:
        """A tuning run with a copy of the model that `change` spoils."""
        home = self.copy("model", self.world.llama)
        change(home)
        return self.swapped(self.world.llama, str(home))

    def prompt(self, change: Callable[[Path], object]) -> list[str]:
        """An evaluation with a copy of the tuned prompt that `change` spoils."""
        home = self.copy("prompt", self.tuned)
        change(home)
        arguments = self.eval()
        arguments[arguments.index(str(self.tuned))] = str(home)
        return arguments


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


GOOD, BAD = {"text": "it was fine", "label": "good"}, {"text": "it was poor", "label": "bad"}

# Name of the case: how it comes about, and words that its message must hold.
CASES: dict[str, tuple[Build, tuple[str, ...]]] = {
    # The command line itself
    "no command": (lambda b: [], ("demo, tune, eval, generate, export, transfer, bank, doctor", "none")),
    "unknown command": (lambda b: ["train"], ("demo, tune, eval, generate, export, transfer, bank, doctor", "'train'")),
    "unknown option": (lambda b: b.tune("--epochs", "3"), ("'--epochs'", "ptengine tune --help")),
    "shortened option": (lambda b: b.tune("--templ", "x"), ("'--templ'",)),
    "required option missing": (lambda b: ["tune", "--output", str(b.out)], ("expected --train", "none")),
    "option without value": (lambda b: b.tune("--seed"), ("--seed", "expected one argument")),
    "word for a whole number": (lambda b: b.tune("--seed", "many"), ("--seed", "whole number", "'many'")),
    "fraction for a whole number": (lambda b: b.tune("--save-steps", "1.5"), ("--save-steps", "'1.5'")),
    "word for a number": (lambda b: b.tune("--learning-rate", "fast"), ("--learning-rate", "a number", "'fast'")),
    "word for yes or no": (lambda b: b.tune("--greater-is-better", "maybe"), ("yes or no", "'maybe'")),
    "unknown method": (lambda b: b.tune("--method", "lora"), ("--method", "soft, prefix", "'lora'")),
    "unknown option of a method": (
        lambda b: b.tune("--method", "residual", "--prompt-option", "width=3"),
        ("'residual_prompt'", "'width'", "bottleneck_size"),
    ),
    "option of a method without a value": (lambda b: b.tune("--prompt-option", "width"), ("NAME=VALUE", "'width'")),
    "option of a method given elsewhere": (
        lambda b: b.tune("--prompt-option", "seed=3"),
        ("no other option", "'seed'"),
    ),
    "option of a method out of range": (
        lambda b: b.tune("--method", "residual", "--prompt-option", "bottleneck_size=0"),
        ("bottleneck_size", "got 0"),
    ),
    "unknown demo": (lambda b: ["demo", "--task", "mnli"], ("--task", "sms_spam, e2e_nlg", "'mnli'")),
    "unknown dtype": (lambda b: b.tune("--dtype", "int8"), ("--dtype", "float32", "'int8'")),
    "unknown device": (lambda b: b.tune("--device", "abacus"), ("--device", "'abacus'")),
    # It has no numbers: a traceback from the first step.
    "device of no numbers": (lambda b: b.tune("--device", "meta"), ("--device", "cpu or cuda", "'meta'")),
    "missing device": (lambda b: b.tune("--device", "cuda:31"), ("--device", "'cuda:31'")),
    # Settings of the training run
    "learning rate below zero": (lambda b: b.tune("--learning-rate", "-1"), ("learning_rate", "-1")),
    "learning rate not a number": (lambda b: b.tune("--learning-rate", "nan"), ("learning_rate", "nan")),
    # Each was a traceback from the first step, or from the generator.
    "learning rate beyond float32": (lambda b: b.tune("--learning-rate", "1e40"), ("learning_rate", "1e+28", "1e+40")),
    "learning rate that a step takes beyond float32": (lambda b: b.tune("--learning-rate", "1e38"), ("1e+28", "1e+38")),
    "decay beyond float32": (lambda b: b.tune("--weight-decay", "1e39"), ("weight_decay", "1e+10", "1e+39")),
    "seed beyond torch": (lambda b: b.tune("--seed", str(10**20)), ("seed", "from 0 to 4294967295", str(10**20))),
    "seed beyond the prompt": (lambda b: b.tune("--seed", str(2**63)), ("seed", "from 0 to 4294967295", str(2**63))),
    "seed beyond numpy": (
        lambda b: [
            *["transfer", "--source", b.world.train, "--target", b.world.train, "--test", b.world.test],
            *["--template", "{text} is", "--label-words", "good= good,bad= bad", "--shots", "2", "--folds", "2"],
            *["--output", str(b.out), "--seed", str(2**32)],
        ],
        ("seed", "from 0 to 4294967295", str(2**32)),
    ),
    "seed of sampling beyond torch": (
        lambda b: b.generate("--text", "a", "--seed", str(10**20)),
        ("--seed", "from 0 to 4294967295", str(10**20)),
    ),
    "no rows in a batch": (lambda b: b.tune("--per-device-train-batch-size", "0"), ("batch_size", "0")),
    "unknown optimiser": (lambda b: b.tune("--optim", "sgd"), ("optim", "adamw", "'sgd'")),
    "unknown schedule": (lambda b: b.tune("--lr-scheduler-type", "step"), ("lr_scheduler_type", "'step'")),
    "two warm-ups": (
        lambda b: b.tune("--warmup-steps", "1", "--warmup-ratio", "0.1"),
        ("warmup_steps or warmup_ratio", "both"),
    ),
    "warm-up longer than the run": (lambda b: b.tune("--warmup-steps", "9"), ("max_steps=3", "9")),
    "evaluation without data": (lambda b: b.tune("--eval-strategy", "epoch"), ("eval_data", "epoch")),
    "metric the task does not have": (
        lambda b: b.tune("--eval", b.world.test, "--metric-for-best-model", "bleu"),
        ("metric_for_best_model", "accuracy", "'bleu'"),
    ),
    # A sweep
    "seeds that are none": (lambda b: b.tune("--seeds", "1,x"), ("--seeds", "whole number", "'x'")),
    "rates that are none": (lambda b: b.tune("--learning-rates", "0.1,,1"), ("--learning-rates", "a number", "''")),
    "a seed twice": (lambda b: b.sweep("--seeds", "1,2,1"), ("expected seeds", "different", "[1, 2, 1]")),
    "a rate below zero": (lambda b: b.sweep("--learning-rates", "0.1,-1"), ("learning_rate", "-1")),
    "seed and seeds": (lambda b: b.sweep("--seeds", "1,2", "--seed", "3"), ("--seeds or --seed", "both")),
    "rate and rates": (
        lambda b: b.sweep("--learning-rates", "1,2", "--learning-rate", "3"),
        ("--learning-rates or --learning-rate", "both"),
    ),
    "sweep without evaluation": (lambda b: b.tune("--seeds", "1,2"), ("--eval", "none")),
    "sweep with evaluation off": (lambda b: b.sweep("--seeds", "1,2", "--eval-strategy", "no"), ("eval_strategy",)),
    "limit of tokens without a sweep": (
        lambda b: b.tune("--max-tokens-per-batch", "9"),
        ("--seeds or --learning-rates", "--max-tokens-per-batch"),
    ),
    # The task
    "no template": (
        lambda b: ["tune", "--train", b.world.train, "--output", str(b.out)],
        ("--template", "--text-column", "neither"),
    ),
    "two kinds of task": (lambda b: b.tune("--text-column", "text"), ("--template", "--text-column", "got")),
    "label words for a generation task": (
        lambda b: b.tune("--target-column", "text", "--label-words", "a= a,b= b"),
        ("--label-words", "--target-column"),
    ),
    "template without a column": (lambda b: b.swapped("{text} is", "hello"), ("column in braces", "'hello'")),
    "template with a lone brace": (lambda b: b.swapped("{text} is", "{text} {"), ("paired braces", "character 7")),
    "template that holds the answer": (lambda b: b.swapped("{text} is", "{text} {label}"), ("'label'", "answer")),
    "label words without =": (lambda b: b.tune("--label-words", "good,bad"), ("label=word", "'good'")),
    "a label twice": (lambda b: b.tune("--label-words", "good= a,good= b"), ("different labels", "'good' twice")),
    "one label only": (lambda b: b.tune("--label-words", "good= good"), ("two labels", "'good'")),
    "an empty word": (lambda b: b.tune("--label-words", "good=,bad= bad"), ("not empty", "'good'")),
    "the same word twice": (lambda b: b.tune("--label-words", "good= yes,bad= yes"), ("the same tokens", "' yes'")),
    "label words file missing": (lambda b: b.tune("--label-words", "no/such.json"), ("no/such.json",)),
    "label words file damaged": (lambda b: b.tune("--label-words", b.file("w.json", "{")), ("json", "w.json")),
    "label words file of a list": (lambda b: b.tune("--label-words", b.file("w.json", "[1]")), ("object", "list")),
    # The data
    "no such file": (lambda b: b.train("no/such.jsonl"), ("no/such.jsonl", "there is none")),
    "unknown kind of file": (lambda b: b.train(b.file("rows.txt", "x")), (".csv, .json", "'.txt'")),
    "a folder for a file": (lambda b: b.train(str(b.folder / "d.csv")), ("d.csv", "directory")),
    "an empty file": (lambda b: b.train(b.file("rows.jsonl", "")), ("rows.jsonl", "row")),
    "a header without rows": (lambda b: b.train(b.file("rows.csv", "text,label\n")), ("rows.csv", "row")),
    "damaged json": (lambda b: b.train(b.file("rows.jsonl", '{"text": "a"\n')), ("rows.jsonl",)),
    "not UTF-8": (lambda b: b.train(b.file("rows.csv", b"text,label\n\xff\xfe,good\n")), ("rows.csv", "UTF-8")),
    "damaged parquet": (lambda b: b.train(b.file("rows.parquet", b"PAR1nothing")), ("rows.parquet",)),
    "column of the template missing": (
        lambda b: b.train(b.rows({"txt": "a", "label": "good"}, {"txt": "b", "label": "bad"})),
        ("'text'", "'txt'"),
    ),
    "column of the label missing": (
        lambda b: b.tune("--label-column", "stars"),
        ("'stars'", "'text', 'label'"),
    ),
    "label without a word": (
        lambda b: b.train(b.rows(GOOD, GOOD | {"label": "great"}), "--label-words", "good= good,bad= bad"),
        ("row 1", "'good', 'bad'", "'great'"),
    ),
    "empty label": (lambda b: b.train(b.rows(GOOD, BAD | {"label": None})), ("row 1", "'label'", "null")),
    "empty text": (lambda b: b.train(b.rows(GOOD, BAD | {"text": None})), ("row 1", "'text'", "null")),
    "one label in all rows": (lambda b: b.train(b.rows(GOOD, GOOD)), ("two labels", "'good'")),
    "text longer than the context": (
        lambda b: b.train(b.rows(GOOD, BAD | {"text": "word " * 80})),
        ("row 1", "at most 60 tokens"),
    ),
    "max_length beyond the context": (lambda b: b.tune("--max-length", "64"), ("max_length", "60", "64")),
    "broken evaluation data": (lambda b: b.tune("--eval", b.rows(GOOD | {"label": "so-so"})), ("row 0", "'so-so'")),
    "broken test data": (lambda b: b.tune("--test", b.rows({"text": "a"})), ("'label'", "'text'")),
    "empty target": (
        lambda b: b.train(b.rows({"text": "a", "says": " "}), "--target-column", "says"),
        ("row 0", "'says'"),
    ),
    # The model
    "no such model": (lambda b: b.swapped(b.world.llama, "no/such"), ("--model", "'no/such'", "no such folder")),
    "a file for a model": (lambda b: b.swapped(b.world.llama, b.world.train), ("--model", "a file")),
    "a folder without a model": (lambda b: b.swapped(b.world.llama, str(b.folder)), ("checkpoint",)),
    "unsupported model": (
        lambda b: b.swapped(b.world.llama, b.world.vit),
        ("no causal language model", "'vit'"),
    ),
    "a blank for an encoder-decoder": (
        lambda b: [b.world.t5 if x == b.world.llama else x for x in b.swapped("{text} is", "{text} is {mask}")],
        ("{mask}",),
    ),
    "a head for an encoder-decoder": (
        lambda b: [
            "tune",
            "--model",
            b.world.t5,
            "--train",
            b.world.train,
            "--text-column",
            "text",
            "--output",
            str(b.out),
        ],
        ("--template", "encoder-decoder 't5'"),
    ),
    "damaged weights": (lambda b: b.model(lambda home: half(home / "model.safetensors")), ("weights",)),
    "weights missing": (lambda b: b.model(lambda home: (home / "model.safetensors").unlink()), ("model",)),
    "weights of fewer layers": (
        lambda b: b.model(lambda home: edit(home / "config.json", num_hidden_layers=3)),
        ("all weights", "missing"),
    ),
    "damaged configuration": (lambda b: b.model(lambda home: half(home / "config.json")), ("checkpoint",)),
    "damaged tokenizer": (lambda b: b.model(lambda home: half(home / "tokenizer.json")), ("tokenizer",)),
    "encoder for a template": (lambda b: b.swapped(b.world.llama, b.world.bert), ("--text-column", "'bert'")),
    "causal model for a head": (
        lambda b: [
            "tune",
            "--train",
            b.world.train,
            "--text-column",
            "text",
            "--model",
            b.world.llama,
            "--output",
            str(b.out),
        ],
        ("--template", "'llama'"),
    ),
    # The prompt
    "no virtual tokens": (lambda b: b.tune("--num-virtual-tokens", "0"), ("--num-virtual-tokens", "at least 1", "'0'")),
    "more virtual tokens than positions": (lambda b: b.tune("--num-virtual-tokens", "64"), ("below the 64", "64")),
    "unknown start": (lambda b: b.tune("--init", "magic"), ("init", "random", "'magic'")),
    "start from text without one": (lambda b: b.tune("--init", "text"), ("init_text", "None")),
    "text that would be ignored": (lambda b: b.tune("--init-text", "so"), ("init='random'", "init_text")),
    "length of texts that are not written": (
        lambda b: b.eval("--max-new-tokens", "7"),
        ("--write-texts with --max-new-tokens",),
    ),
    "width of a projection that is none": (
        lambda b: b.tune("--method", "prefix", "--projection-size", "7"),
        ("projection=True with projection_size", "7"),
    ),
    "option of another method": (lambda b: b.tune("--projection"), ("'soft_prompt'", "'projection'")),
    "array of another shape": (
        lambda b: b.tune("--init", "array", "--init-array", b.file("a.npy", NPY)),
        ("shape", "16]", "[2, 3]"),
    ),
    "array file missing": (lambda b: b.tune("--init", "array", "--init-array", "no.npy"), ("no.npy",)),
    "start from a prompt that is none": (
        lambda b: b.tune("--init", "prompt", "--init-prompt", str(b.folder)),
        ("prompt.json",),
    ),
    # The output
    "output folder in use": (lambda b: b.swapped(str(b.out), str(b.folder)), ("--output", "not empty")),
    # The status was that of a full disk.
    "too long a name for the output": (lambda b: b.swapped(str(b.out), "a" * 256), ("a name", "aaa", "name too long")),
    "too long a name for the data": (lambda b: b.train("a" * 256 + ".csv"), ("a name", "aaa.csv'", "name too long")),
    "a file for the output": (lambda b: b.swapped(str(b.out), b.file("f", "x")), ("--output", "no folder")),
    "output below a file": (lambda b: b.swapped(str(b.out), b.file("f", "x") + "/out"), ("directory",)),
    "checkpoint that is none": (lambda b: b.tune("--resume", str(b.folder)), ("checkpoint",)),
    "checkpoint of another run": (
        lambda b: b.tune("--resume", str(b.tuned / "checkpoint-3"), "--seed", "7"),
        ("seed=42", "7"),
    ),
    "another task in the folder to go on with": (
        lambda b: b.swapped(str(b.out), str(b.copy("run", b.tuned)), "--resume", "--label-words", "good= yes,bad= no"),
        ("task", "task.json"),
    ),
    "demo output in use": (lambda b: ["demo", "--output", str(b.folder)], ("--output", "not empty")),
    # Evaluating and generating
    "no such prompt": (lambda b: ["eval", "--prompt", "no/such", "--data", b.world.test], ("--prompt", "'no/such'")),
    "a folder without a prompt": (
        lambda b: ["eval", "--prompt", str(b.folder), "--data", b.world.test],
        ("prompt.json",),
    ),
    "prompt without its task": (lambda b: b.prompt(lambda home: (home / "task.json").unlink()), ("task.json",)),
    "damaged task": (lambda b: b.prompt(lambda home: half(home / "task.json")), ("json", "task.json")),
    "task of a later version": (
        lambda b: b.prompt(lambda home: edit(home / "task.json", format_version=2)),
        ("format version 1", "task.json"),
    ),
    "unknown kind of task": (
        lambda b: b.prompt(lambda home: edit(home / "task.json", task={"kind": "ranking"})),
        ("classification", "'ranking'"),
    ),
    "task with a field missing": (
        lambda b: b.prompt(lambda home: edit(home / "task.json", task={"kind": "generation"})),
        ("target_column", "'kind'"),
    ),
    "damaged prompt": (
        lambda b: b.prompt(lambda home: half(home / "prompt" / "prompt.safetensors")),
        ("safetensors",),
    ),
    "prompt of another backbone": (
        lambda b: b.eval("--model", str(b.world.root.parent / "embedded")),
        ("hidden_size 16", "256"),
    ),
    "evaluation without its label": (
        lambda b: ["eval", "--prompt", str(b.tuned), "--data", b.rows({"text": "a"})],
        ("'label'", "'text'"),
    ),
    "texts of a classification task": (lambda b: b.eval("--write-texts"), ("--write-texts", "for classification")),
    "predictions in no folder": (lambda b: b.eval("--predictions", "no/such/file"), ("--predictions", "no/such/file")),
    # It was ignored: "no problems" of a device that is not there.
    "device of no model": (lambda b: ["doctor", "--device", "cuda"], ("--model with --device",)),
    "dtype of no model": (lambda b: ["doctor", "--dtype", "float16"], ("--model with --dtype",)),
    # The message blamed the model's context.
    "rows longer than is allowed": (lambda b: b.tune("--max-length", "3"), ("at most 3 tokens (max_length, or",)),
    # It came as an error of the system's about a temporary name, after the evaluation.
    "predictions over a folder": (lambda b: b.eval("--predictions", "d.csv"), ("--predictions", "'d.csv'")),
    "no rows to generate for": (lambda b: b.generate(), ("--text, --column and --data", "none")),
    # The file was called "data".
    "a text missing to generate for": (
        lambda b: b.generate("--data", b.file("one.csv", 'text\na\n""\n')),
        ("one.csv, row 1", "'text'", "null"),
    ),
    "two sources of rows": (
        lambda b: b.generate("--text", "a", "--data", b.world.test),
        ("--text, --column and --data", "text and data"),
    ),
    "column without =": (lambda b: b.generate("--column", "text"), ("NAME=TEXT", "'text'")),
    "column the template does not have": (lambda b: b.generate("--column", "title=a"), ("text", "'title'")),
    "sampling options without sampling": (lambda b: b.generate("--text", "a", "--top-p", "0.5"), ("--do-sample",)),
    "temperature of zero": (lambda b: b.generate("--text", "a", "--do-sample", "--temperature", "0"), ("above 0", "0")),
    # Exporting
    "unknown format": (lambda b: b.export(name="gguf"), ("--format", "peft, prompt_embeds, baked", "'gguf'")),
    "no format": (lambda b: ["export", "--prompt", str(b.tuned), "--output", str(b.out)], ("--format", "none")),
    "export into a folder in use": (
        lambda b: [*b.export()[:-1], str(b.tuned)],
        ("--output", "new or empty", "not empty"),
    ),
    "export over a file": (lambda b: [*b.export()[:-1], b.file("f", "x")], ("--output", "no folder")),
    "type of PEFT for another format": (
        lambda b: b.export("--peft-type", "P_TUNING", name="baked"),
        ("--peft-type", "--format peft", "baked"),
    ),
    "unknown type of PEFT": (lambda b: b.export("--peft-type", "LORA"), ("PROMPT_TUNING", "'LORA'")),
    "type of PEFT for a prefix": (lambda b: b.export("--peft-type", "CARTRIDGE"), ("SoftPrompt", "'CARTRIDGE'")),
    "export without a model": (
        lambda b: ["export", "--prompt", str(b.copy("p", b.tuned / "prompt")), "--format", "peft", "--output", "o"],
        ("--model", "task.json"),
    ),
    "export for another model": (
        lambda b: b.export("--model", str(b.world.root.parent / "embedded"), name="baked"),
        ("hidden_size 16", "256"),
    ),
    "export of nothing": (
        lambda b: ["export", "--prompt", "no/such", "--format", "peft", "--output", "o"],
        ("--prompt", "'no/such'"),
    ),
    "beams for a label": (lambda b: b.generate("--text", "a", "--num-beams", "2"), ("--num-beams", "classification")),
}

NPY = (
    b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little")
    + b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }".ljust(117) + b"\n" + bytes(24)
)  # fmt: skip


@pytest.fixture(scope="session")
def tuned(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ptengine.assets import backbone_path
    from ptengine.cli import main

    (world.root.parent / "embedded").symlink_to(backbone_path())
    output = tmp_path_factory.mktemp("tuned") / "out"
    assert main(world.tune(output)) == 0
    return output


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(
    name: str, world: Any, tuned: Path, call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.csv").mkdir()
    build, expected = CASES[name]
    arguments = build(Bench(world, tmp_path, tuned))
    before = contents(tmp_path) | contents(tuned)
    result = call(*arguments)
    assert result.status == 2
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert result.err.endswith("\n")
    for words in expected:
        assert words in result.err
    assert contents(tmp_path) | contents(tuned) == before


def test_a_forced_backend_that_is_none(world: Any, call: Callable[..., Any], tmp_path: Path, monkeypatch: Any) -> None:
    """It came as a traceback from the first step of the training, after the output folder had been made."""
    for forced in ("cuda", "triton"):
        monkeypatch.setenv("PTENGINE_BACKEND", forced)
        result = call(*world.tune(tmp_path / "out"))
        assert result.status == 2
        assert f"PTENGINE_BACKEND={forced}" in result.err
        assert result.err.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_an_output_nobody_may_write(world: Any, call: Callable[..., Any], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    result = call(*world.tune(tmp_path / "out"))
    assert result.status == 2
    assert "permission denied" in result.err
    assert not (tmp_path / "out").exists()


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 60
