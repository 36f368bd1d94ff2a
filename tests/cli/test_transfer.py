"""`ptengine transfer` and `ptengine bank` as a user would call them."""

from __future__ import annotations

import copy
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ptengine.data import ClassificationTask, Template, Verbalizer
from ptengine.prompts import Prefix, SoftPrompt
from ptengine.transfer import PromptBank

ASKED = ["--target", "x", "--template", "{text}", "--verbalizer", "a= good,b= bad", "--output", "out"]
GOOD, BAD = ["fine", "lovely", "great", "warm"], ["poor", "dull", "awful", "cold"]


def write_csv(path: Path, noun: str, labels: tuple[str, str], names: tuple[str, str]) -> str:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for index in range(5):
            for words, label in ((GOOD, labels[0]), (BAD, labels[1])):
                for word in words[:3]:
                    writer.writerow([f"the {noun}, no. {index}, was {word}", label])
        writer.writerow(["", labels[0]])
    return str(path)


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptengine.training.trainer.draw_curve", lambda path, *_: path)


def command(world: Any, folder: Path, names: tuple[str, str] = ("text", "label"), **labels: Any) -> list[str]:
    marks = labels.get("labels", ("good", "bad"))
    source = write_csv(folder / "films.csv", "film", marks, names)
    target = write_csv(folder / "meals.csv", "meal", marks, names)
    return [
        "transfer", "--model", world.llama, "--source", source, "--target", target, "--shots", "4", "--folds", "2",
        "--template", f"{{{names[0]}}} It was", "--num-virtual-tokens", "3", "--source-steps", "3", "--steps", "2",
        "--per-device-train-batch-size", "4", "--scratch-rates", "1", "--output", str(folder / "out"),
    ]  # fmt: skip


def test_two_files_to_a_report_and_a_prompt_for_eval(world: Any, call: Callable[..., Any], tmp_path: Path) -> None:
    arguments = [*command(world, tmp_path), "--verbalizer", "good= fine,bad= poor"]
    done = call(*arguments, "--json")
    assert done.status == 0, done.err
    data = done.json
    assert set(data["test"]) == {"frozen model", "scratch", "source", "transferred", "shuffled source"}
    assert data["cleaning"][0]["dropped"]["a text is missing"] == 1
    for path in data["report"].values():
        assert Path(path).is_file()
    assert json.loads(Path(data["report"]["json"]).read_text()) == {
        name: value for name, value in data.items() if name not in ("command", "output", "prompt", "report")
    }
    judged = call("eval", "--prompt", tmp_path / "out", "--data", tmp_path / "out/clean/test.jsonl", "--json")
    assert judged.json["metrics"] == data["test"][data["kept"]]["metrics"]
    refused = call(*arguments)
    assert (refused.status, "not empty; --resume" in refused.err) == (2, True)
    again = call(*arguments, "--resume")
    assert again.status == 0
    assert "next: ptengine eval" in again.out
    other = call(*arguments, "--resume", "--anchor", "1")
    assert other.status == 2
    assert "expected strategy" in other.err
    # A refused resumption left its own shots and test rows in place of those of the run that is there.
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    reseeded = call(*arguments, "--resume", "--seed", "7")
    assert (reseeded.status, "shots.jsonl' would change" in reseeded.err) == (2, True)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    # One with another source had tuned it, and put it into the bank, by the time it was refused: for ever.
    extra = ("--source", "more=" + write_csv(tmp_path / "more.csv", "play", ("good", "bad"), ("text", "label")))
    changed = call(*arguments, "--resume", *extra)
    assert changed.status == 2
    assert "expected sources=['films'] as in" in changed.err
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    assert call(*arguments, "--resume").status == 0


def test_chinese_columns_labels_and_files(world: Any, call: Callable[..., Any], tmp_path: Path) -> None:
    arguments = command(world, tmp_path, ("评论", "标签"), labels=("正面", "负面"))
    done = call(
        *arguments, "--label-column", "标签", "--verbalizer", "正面=好,负面=差", "--normalization", "NFKC",
        "--method", "prefix", "--joint", "0.5", "--joint-schedule", "linear", "--anchor", "1", "--no-control", "--json",
        "--unlabelled", write_csv(tmp_path / "more.csv", "餐", ("正面", "负面"), ("评论", "标签")),
        "--self-train", "0.5", "--confidence", "0.5", "--consistency", "1", "--augment", "1",
    )  # fmt: skip
    assert done.status == 0, done.err
    assert set(done.json["test"]["scratch"]["by_label"]) == {"正面", "负面"}
    assert done.json["transfer"]["taught"]["kept"] > 0
    assert done.json["transfer"]["augmented"]["made"] > 0
    assert "正面" in Path(done.json["report"]["html"]).read_text(encoding="utf-8")
    assert done.json["measures"].keys() == {
        "absolute_gain", "relative_error_reduction", "wins", "negative_transfer_rate", "source_only_gain",
    }  # fmt: skip


def test_an_encoder_decoder_from_two_files_to_a_report(world: Any, call: Callable[..., Any], tmp_path: Path) -> None:
    arguments = [*command(world, tmp_path), "--verbalizer", "good=fine,bad=poor"]
    arguments[arguments.index(world.llama)] = world.t5
    done = call(*arguments, "--json")
    assert done.status == 0, done.err
    assert set(done.json["test"]) == {"frozen model", "scratch", "source", "transferred", "shuffled source"}
    assert done.json["adaptivity"]["transferred"]["text_loss"] is None
    assert "| transferred |  | " in Path(done.json["report"]["markdown"]).read_text()
    judged = call("eval", "--prompt", tmp_path / "out", "--data", tmp_path / "out/clean/test.jsonl", "--json")
    assert judged.json["metrics"] == done.json["test"][done.json["kept"]]["metrics"]


def test_a_masked_language_model_fills_in_the_label(world: Any, call: Callable[..., Any], tmp_path: Path) -> None:
    arguments = [*command(world, tmp_path), "--model", world.masked, "--verbalizer", "good=fine,bad=poor"]
    done = call(*arguments, "--template", "{text} it was {mask}", "--distill", "0.5", "--json")
    assert done.status == 0, done.err
    assert set(done.json["test"]) == {"frozen model", "scratch", "source", "transferred", "shuffled source"}
    assert done.json["adaptivity"]["transferred"]["text_loss"] > 0
    judged = call("eval", "--prompt", tmp_path / "out", "--data", tmp_path / "out/clean/test.jsonl", "--json")
    assert judged.json["metrics"] == done.json["test"][done.json["kept"]]["metrics"]
    refused = call(*command(world, tmp_path), "--verbalizer", "good=fine,bad=poor", "--template", "{text} {mask}",
                   "--output", tmp_path / "new")  # fmt: skip
    assert (refused.status, (tmp_path / "new").exists()) == (2, False)
    assert "a template with a {mask} is for encoders" in refused.err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--verbalizer", "good= fine"], "at least two labels"),
        # It was told that --label-words was wrong.
        (["--verbalizer", "oops"], "expected --verbalizer as"),
        (["--verbalizer", "good= fine,bad= poor", "--source-verbalizer", "oops"], "expected --source-verbalizer as"),
        (["--verbalizer", "good= fine,bad= poor", "--anchor", "-1"], "expected anchor weight"),
        (["--verbalizer", "good= fine,bad= poor", "--combine", "sum"], "expected combine"),
        (["--verbalizer", "good= fine,bad= poor", "--joint-schedule", "linear"], "expected --joint with"),
        (["--verbalizer", "good= fine,bad= poor", "--distill-similarity", "token_cosine"], "expected --distill with"),
        (["--verbalizer", "good= fine,bad= poor", "--self-train", "0.5"], "expected --self-train and --unlabelled"),
        (["--verbalizer", "good= fine,bad= poor", "--consistency", "1"], "expected --self-train with"),
        (["--verbalizer", "good= fine,bad= poor", "--fresh"], "expected distill or anchor"),
        (["--verbalizer", "good= fine,bad= poor", "--scratch-rates", "1;2"], "with commas"),
        (["--verbalizer", "good= fine,bad= poor", "--label-column", "mark"], "'mark'"),
        (["--verbalizer", "good= fine,bad= poor", "--source", "a b=x.csv"], "--source NAME=FILE"),
        (["--verbalizer", "good= fine,bad= poor", "--source", "films=x.csv"], "'films' twice"),
        (["--verbalizer", "good= fine,bad= poor", "--source", "x.csv"], "none of this name"),
        (["--verbalizer", "good= fine,bad= poor", "--shots", "0"], "whole number of at least 1"),
        (["--verbalizer", "good= fine,bad= poor", "--top-k", "2", "--combine", "mean"], "top_k=2"),
        (["--verbalizer", "good= fine,bad= poor", "--folds", "5"], "every label for 5 folds"),
        (["--verbalizer", "fine= fine,bad= poor"], "expected one of the labels"),
        (["--verbalizer", "good= fine,bad= poor", "--max-length", "5"], "truncation is off"),
        (["--verbalizer", "good= fine,bad= poor", "--steps", "0"], "whole number of at least 1"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    world: Any, call: Callable[..., Any], tmp_path: Path, more: list[str], words: str
) -> None:
    done = call(*command(world, tmp_path), *more)
    assert done.status == 2
    assert words in done.err.splitlines()[-1]
    assert done.err.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_a_bank_from_adding_to_searching(world: Any, call: Callable[..., Any], tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    for name, seed in (("a", "1"), ("b", "2")):
        call(*world.tune(tmp_path / name, "--seed", seed, "--eval", world.test))
        added = call(
            "bank", "add", "--bank", bank, "--name", name, "--prompt", tmp_path / name, "--data", world.train, "--json"
        )
        assert added.status == 0, added.err
        assert added.json["entry"]["data"]["name"] == "train.jsonl"
        assert set(added.json["entry"]["metrics"]) >= {"accuracy", "loss"}
    listed = call("bank", "list", "--bank", bank)
    assert "2 prompts" in listed.out
    assert [entry["name"] for entry in call("bank", "list", "--bank", bank, "--json").json["entries"]] == ["a", "b"]
    asked = ["--template", "{text} is", "--label-words", "good= good,bad= bad", "--model", world.llama]
    found = call("bank", "search", "--bank", bank, "--shots", world.test, *asked, "--json")
    assert found.status == 0, found.err
    losses = [match["score"] for match in found.json["matches"]]
    assert losses == sorted(losses)
    assert [match["metrics"]["loss"] for match in found.json["matches"]] == losses
    near = call("bank", "search", "--bank", bank, "--shots", world.test, "--measure", "mmd", *asked, "--json").json
    assert near["measure"] == "mmd"
    assert near["matches"][0]["score"] == near["matches"][1]["score"]  # both were tuned on one file
    assert call("bank", "compare", "--bank", bank, "--measure", "mmd", "--json").json["table"]["a"]["b"] == 0
    alike = call("bank", "search", "--bank", bank, "--prompt", tmp_path / "b", "--json")
    assert [match["name"] for match in alike.json["matches"]] == ["b", "a"]
    table = call("bank", "compare", "--bank", bank, "--json").json["table"]
    assert table["a"]["b"] == alike.json["matches"][1]["score"]
    assert "1.000" in call("bank", "compare", "--bank", bank, "--names", "a").out
    # The bank's prompts, of four tokens, are sources of a transfer that tunes none.
    moved = call(
        "transfer", "--bank", bank, "--target", world.train, "--shots", "2", "--folds", "2", "--steps", "2",
        "--template", "{text} is", "--verbalizer", "good= good,bad= bad", "--model", world.llama,
        "--scratch-rates", "1", "--output", tmp_path / "moved", "--json",
    )  # fmt: skip
    assert moved.status == 0, moved.err
    assert set(moved.json["sources"]) == {"a", "b"}
    assert moved.json["transfer"]["selected"].keys() <= {"a", "b"}
    # The embedded model is another backbone: nothing is handed out, and the reason is told.
    other = call("bank", "search", "--bank", bank, "--shots", world.test, *asked[:-2])
    assert other.status == 0
    assert "not asked: a, since it was made for a backbone with" in other.out


def test_a_prompt_is_carried_to_another_model_within_its_bank(
    world: Any, call: Callable[..., Any], tmp_path: Path
) -> None:
    bank, large = tmp_path / "bank", tmp_path / "large"
    tokenizer = AutoTokenizer.from_pretrained(world.llama)
    torch.manual_seed(1)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
        )
    ).save_pretrained(large)  # fmt: skip
    tokenizer.save_pretrained(large)
    call(*world.tune(tmp_path / "a"))
    call("bank", "add", "--bank", bank, "--name", "a", "--prompt", tmp_path / "a")
    asked = ["bank", "carry", "--bank", bank, "--name", "a", "--from", world.llama, "--model", large]
    done = call(*asked, "--into", "lin", "--json")
    assert done.status == 0, done.err
    card = done.json["entry"]
    assert (card["derived_from"], card["note"]) == (["a"], "carried by v2v_lin")
    assert card["backbone"]["facts"]["hidden_size"] == 24
    trained = call(
        *asked, "--into", "tuned", "--method", "projector", "--data", world.train, "--steps", "3",
        "--projector", tmp_path / "projector", "--json",
    )  # fmt: skip
    assert trained.status == 0, trained.err
    assert (Path(trained.json["projector"])).is_dir()
    shots = ["--template", "{text} is", "--label-words", "good= good,bad= bad", "--shots", world.test]
    found = call("bank", "search", "--bank", bank, *shots, "--model", large, "--json").json
    assert {match["name"] for match in found["matches"]} == {"lin", "tuned"}
    assert "ptengine bank carry" in found["refused"]["a"]
    for more, words in (
        (["--into", "lin"], "free in the bank"),
        (["--into", "x", "--method", "projector"], "expected --data with"),
        (["--into", "x", "--data", world.train], "expected --method projector with --data"),
        (["--into", "x", "--truncation"], "expected --method projector with --truncation"),
        # Nothing is drawn in the linear carrying: any seed was taken.
        (["--into", "x", "--seed", "1"], "expected no --seed with --method v2v_lin"),
        (["--into", "x", "--from", large], "expected a prompt of this model"),
    ):
        refused = call(*asked, *more)
        assert (refused.status, words in refused.err) == (2, True), refused.err
    assert sorted(path.name for path in bank.iterdir() if not path.name.startswith(".")) == ["a", "lin", "tuned"]


def test_an_ensemble_is_evaluated_in_one_call(world: Any, call: Callable[..., Any], tmp_path: Path) -> None:
    for name in ("a", "b"):
        call(*world.tune(tmp_path / name, "--seed", "1" if name == "a" else "2", "--learning-rate", "0.5"))
    a, b = tmp_path / "a", tmp_path / "b"
    alone = [call("eval", "--prompt", one, "--data", world.test, "--json").json["metrics"]["loss"] for one in (a, b)]
    asked = ["eval", "--prompt", a, "--ensemble", b, "--data", world.test]
    mixed = call(*asked, "--json").json
    assert mixed["ensemble"] == {str(a): 0.5, str(b): 0.5}
    assert min(alone) - 0.7 < mixed["metrics"]["loss"] < sum(alone) / 2
    weighed = call(*asked, "--weights-from", world.train, "--json").json["ensemble"]
    assert sum(weighed.values()) == pytest.approx(1)
    assert weighed[str(a)] != 0.5
    for more, words in (
        (["--ensemble", a], "different prompts"),
        # One prompt under two names counted twice.
        (["--ensemble", f"{a}/prompt"], "different prompts"),
        (["--write-texts"], "expected no --write-texts with --ensemble"),
        (["--ensemble", "nowhere"], "no folder"),
    ):
        refused = call(*asked, *more)
        assert (refused.status, words in refused.err) == (2, True)
    assert "expected --ensemble with" in call("eval", "--prompt", a, "--data", world.test, "--weights-from", "x").err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["transfer", *ASKED], "expected --source or --bank"),
        # Without --self-train it was read by nothing, and 2 is no probability.
        (["transfer", *ASKED, "--bank", ".", "--confidence", "2"], "expected --self-train with --confidence"),
        # Options that nothing read were taken, whatever they said.
        (["transfer", *ASKED, "--bank", ".", "--source-template", "{no}"], "expected --source with --source-template"),
        (["transfer", *ASKED, "--bank", ".", "--source-verbalizer", "a=b"], "--source with --source-verbalizer"),
        (["transfer", *ASKED, "--bank", ".", "--source-steps", "7"], "expected --source with --source-steps"),
        (["transfer", *ASKED, "--bank", ".", "--balance"], "expected --source with --balance"),
        (["transfer", *ASKED, "--bank", ".", "--too-long", "cut"], "expected --max-characters with --too-long"),
        (["bank", "search", "--bank", ".", "--prompt", "x", "--template", "{"], "expected --shots with --template"),
        (["bank", "search", "--bank", ".", "--prompt", "x", "--truncation"], "expected --shots with --truncation"),
        (
            ["bank", "search", "--bank", ".", "--shots", "x", "--measure", "mmd", "--max-length", "3"],
            "expected no --max-length with --measure mmd",
        ),
        (["transfer", *ASKED, "--bank", "nowhere"], "no folder"),
        (["transfer", *ASKED, "--bank", "."], "expected a bank with a prompt to transfer from"),
        (["bank"], "expected ACTION"),
        (["bank", "drop"], "invalid choice"),
        (["bank", "list"], "expected --bank"),
        (["bank", "list", "--bank", "nowhere"], "no folder"),
        (["bank", "search", "--bank", "."], "got neither"),
        (
            ["bank", "search", "--bank", ".", "--shots", "x", "--measure", "token_cosine"],
            "got --shots with token_cosine",
        ),
        (["bank", "search", "--bank", ".", "--shots", "x"], "expected --template"),
        (["bank", "add", "--bank", "b", "--name", "x", "--prompt", "nowhere"], "which is no folder"),
        (["bank", "compare", "--bank", ".", "--names", "x"], "got 'x'"),
    ],
)
def test_bad_bank_calls_are_one_line(
    call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call(*arguments)
    assert (done.status, len(done.err.splitlines())) == (2, 1)
    assert words in done.err


def test_a_bert_model_with_a_head_from_two_files_to_a_report(
    world: Any, call: Callable[..., Any], tmp_path: Path
) -> None:
    """Every prompt has its own head: kept prompt, bank and report are of both, and later commands read both."""
    arguments = command(world, tmp_path)
    at = arguments.index("--template")
    arguments[at : at + 2] = ["--text-column", "text"]
    arguments[arguments.index(world.llama)] = world.bert
    arguments += ["--head-learning-rate", "0.01"]
    more = write_csv(tmp_path / "more.csv", "drink", ("good", "bad"), ("text", "label"))
    arguments += ["--unlabelled", more, "--self-train", "0.5", "--confidence", "0.5"]
    done = call(*arguments, "--distill", "0.5", "--method", "prefix", "--json")
    assert done.status == 0, done.err
    data = done.json
    assert set(data["test"]) == {"scratch", "source", "transferred", "shuffled source"}
    assert data["adaptivity"] == {}
    assert "Adaptivity" not in Path(data["report"]["markdown"]).read_text()
    test = tmp_path / "out/clean/test.jsonl"
    judged = call("eval", "--prompt", tmp_path / "out", "--data", test, "--json")
    assert judged.json["metrics"] == data["test"][data["kept"]]["metrics"]
    said = call("generate", "--prompt", tmp_path / "out", "--text", "the meal was fine", "--json")
    assert said.status == 0, said.err
    kept = call("bank", "add", "--bank", tmp_path / "bank", "--prompt", tmp_path / "out", "--name", "meals", "--data",
                tmp_path / "meals.csv", "--json")  # fmt: skip
    assert kept.status == 0, kept.err
    found = call("bank", "search", "--bank", tmp_path / "bank", "--shots", test, "--text-column", "text", "--model",
                 world.bert, "--json")  # fmt: skip
    assert found.json["matches"][0]["metrics"] == pytest.approx(judged.json["metrics"], abs=1e-6)
    again = [*arguments, "--bank", str(tmp_path / "bank"), "--method", "prefix"]
    again[again.index("--output") + 1] = str(tmp_path / "again")
    both = call(*again, "--json")
    assert both.status == 0, both.err
    assert set(both.json["transfer"]["search"]) == {"films", "meals"}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--template", "{text}"], "expected no --template with --text-column"),
        (["--source-template", "{text}"], "expected no --source-template with --text-column"),
        (["--label-column", "mark"], "'mark'"),
    ],
)
def test_options_that_do_not_go_with_a_head(
    world: Any, call: Callable[..., Any], tmp_path: Path, more: list[str], words: str
) -> None:
    arguments = command(world, tmp_path)
    at = arguments.index("--template")
    arguments[at : at + 2] = ["--text-column", "text"]
    arguments[arguments.index(world.llama)] = world.bert
    refused = call(*arguments, *more)
    assert (refused.status, words in refused.err) == (2, True), refused.err
    assert not (tmp_path / "out" / "target").exists()


def test_without_template_or_text_column(world: Any, call: Callable[..., Any], tmp_path: Path) -> None:
    arguments = command(world, tmp_path)
    at = arguments.index("--template")
    refused = call(*arguments[:at], *arguments[at + 2 :])
    assert (refused.status, "or --text-column for a BERT model" in refused.err) == (2, True)


def test_method_and_length_were_those_of_another_backbone_s_prompt(
    world: Any, call: Callable[..., Any], tmp_path: Path
) -> None:
    """The bank's first entry decided, whichever model it is for."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(world.llama), AutoTokenizer.from_pretrained(world.llama)
    other = copy.deepcopy(model)
    torch.nn.init.normal_(other.model.layers[0].mlp.up_proj.weight)
    bank = PromptBank(tmp_path / "bank")
    task = ClassificationTask(Template("{text} is"), Verbalizer({"bad": " bad", "good": " good"}))
    for name, of, prompt in (("a", other, SoftPrompt(other, 6)), ("b", model, Prefix(model, 4))):
        bank.add(name, prompt, model=of, tokenizer=tokenizer, task=task)
    done = call(
        "transfer", "--bank", bank.path, "--target", world.train, "--shots", "2", "--folds", "2", "--steps", "2",
        "--template", "{text} is", "--verbalizer", "good= good,bad= bad", "--model", world.llama,
        "--scratch-rates", "1", "--output", tmp_path / "moved", "--json",
    )  # fmt: skip
    assert done.status == 0, done.err
    assert set(done.json["sources"]) == {"b"}
    assert set(done.json["left_out"]) == {"a"}


def test_a_projector_s_folder_in_use_named_options_that_are_not_there(call: Callable[..., Any], tmp_path: Path) -> None:
    """It spoke of --output and --resume."""
    (tmp_path / "note").write_text("mine")
    done = call(
        "bank", "carry", "--bank", tmp_path, "--name", "a", "--from", "x", "--into", "b", "--method", "projector",
        "--data", "x.csv", "--projector", tmp_path,
    )  # fmt: skip
    assert done.status == 2
    assert done.err == (
        f"error: expected --projector, a new or empty folder, got {str(tmp_path)!r}, which is not empty; name another "
        "one\n"
    )


def test_a_source_s_name_of_too_many_bytes_failed_when_its_rows_were_written(
    world: Any, call: Callable[..., Any], tmp_path: Path
) -> None:
    arguments = [*command(world, tmp_path), "--verbalizer", "good= fine,bad= poor"]
    done = call(*arguments, "--source", f"{'𠀀' * 80}={world.train}")
    assert (done.status, "240 bytes in UTF-8" in done.err) == (2, True), done.err
    assert not (tmp_path / "out").exists()


def test_blanks_around_a_label_made_it_another_one(world: Any, call: Callable[..., Any], tmp_path: Path) -> None:
    """Cleaning takes them away, and the head's labels came from the file as it is."""
    arguments = command(world, tmp_path)
    at = arguments.index("--template")
    arguments[at : at + 2] = ["--text-column", "text"]
    arguments[arguments.index(world.llama)] = world.bert
    target = tmp_path / "meals.csv"
    target.write_text(target.read_text().replace(",good", ",good "), encoding="utf-8")
    done = call(*arguments, "--no-control", "--json")
    assert done.status == 0, done.err
    assert done.json["task"]["labels"] == ["bad", "good"]
