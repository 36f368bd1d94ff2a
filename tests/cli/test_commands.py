"""Every command, once through, with what it prints for machines and for people."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from ptengine import cli
from ptengine.cli import make_parser
from ptengine.commands import COMMANDS
from ptengine.commands.options import flag, unescape
from ptengine.errors import TrainingDiverged
from ptengine.training import TrainingConfig


def kinds(value: Any) -> Any:
    """The shape of a json value: names and types."""
    if isinstance(value, dict):
        return {name: kinds(member) for name, member in value.items()}
    return type(value).__name__


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_and_json(command: str, call: Callable[..., Any]) -> None:
    result = call(command, "--help")
    assert result.status == 0
    assert "--json" in result.out
    assert f"ptengine {command}" in result.out.partition("example:")[2]
    assert result.err == ""


@pytest.mark.parametrize("command", ["eval", "generate", "export"])
def test_help_said_that_a_tuned_prompt_runs_in_float32(command: str, call: Callable[..., Any]) -> None:
    """Its model runs in the dtype and with the tokenizer that its folder names."""
    text = " ".join(call(command, "--help").out.split())
    assert "float32, bfloat16, float16 (default: that of the tuning)" in text
    assert "folder of its tokenizer (default: that of the tuning, or of --model)" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_in_the_overview(command: str, call: Callable[..., Any]) -> None:
    assert f"\n  {command} " in call("--help").out


def test_help_of_tune_and_transfer_took_seconds_to_import_torch() -> None:
    code = (
        "import sys; from ptengine.cli import main\n"
        f"for command in [[], *([name] for name in {COMMANDS!r}), ['tune', '--seed', 'x']]:\n"
        "    main([*command, '--help'])\n"
        "print('torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert shown.stdout.endswith("\nFalse\n")


def test_module_and_version() -> None:
    shown = subprocess.run([sys.executable, "-m", "ptengine", "--version"], check=True, capture_output=True, text=True)
    assert shown.stdout.startswith("ptengine ")


def test_every_training_setting_is_an_option_with_its_text() -> None:
    """The options come from the dataclass: a field added there must appear here with a help text."""
    options = {text: action for action in make_parser("tune")._actions for text in action.option_strings}
    for field in fields(TrainingConfig):
        if field.name != "output_dir":
            assert flag(field.name) in options
            assert len(options[flag(field.name)].help or "") > 15, field.name


def test_the_texts_of_training_settings_vanished_on_python_3_13(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes the common indentation out of docstrings."""
    before = make_parser("tune").format_help()
    monkeypatch.setattr(TrainingConfig, "__doc__", inspect.cleandoc(TrainingConfig.__doc__ or ""))
    assert make_parser("tune").format_help() == before


def test_options_of_training_become_their_types(world: Any) -> None:
    args = make_parser("tune").parse_args(
        ["--train", "t", "--output", "o", "--max-grad-norm", "none", "--bf16", "--no-truncation", "--eval-steps", "5",
         "--greater-is-better", "no", "--learning-rate", "1e-3"]
    )  # fmt: skip
    assert (args.max_grad_norm, args.bf16, args.truncation, args.eval_steps) == (None, True, False, 5)
    assert (args.greater_is_better, args.learning_rate) == (False, 1e-3)


def test_classification_from_tuning_to_labels(world: Any, call: Callable[..., Any], tmp_path: Path) -> None:
    output = tmp_path / "out"
    tuned = call(*world.tune(output, "--eval", world.test, "--test", world.test, "--json"))
    assert (tuned.status, tuned.err) == (0, "")
    assert tuned.json["steps"] == 3
    assert tuned.json["test"]["rows"] == 6
    assert set(tuned.json["metrics"]) == {"loss", "accuracy", "macro_f1", "micro_f1", "weighted_f1"}
    assert json.loads((output / "metrics.json").read_text()) == tuned.json
    for name in ("prompt", "best_prompt", "log", "curve"):
        assert Path(tuned.json[name]).exists()

    # The folder alone says what to do: task, verbaliser and model are not named again.
    judged = call("eval", "--prompt", output, "--data", world.test, "--predictions", tmp_path / "p.jsonl", "--json")
    assert (judged.status, judged.err) == (0, "")
    assert judged.json["metrics"] == tuned.json["test"]["metrics"]
    predictions = [json.loads(line)["prediction"] for line in (tmp_path / "p.jsonl").read_text().splitlines()]

    labelled = call("generate", "--prompt", output, "--data", world.test, "--json")
    assert (labelled.status, labelled.err) == (0, "")
    assert labelled.json["texts"] == predictions
    assert set(predictions) <= {"good", "bad"}
    shown = call("generate", "--prompt", output / "best", "--text", "it was fine", "--text", "it was poor")
    assert len(shown.out.splitlines()) == 2

    bare = call("eval", "--prompt", output, "--data", world.test, "--hard-prompt-only", "--json")
    assert bare.json["prompt"] is None
    assert bare.json["metrics"]["loss"] != judged.json["metrics"]["loss"]


def test_encoder_decoder_from_tuning_to_texts(world: Any, call: Callable[..., Any], tmp_path: Path) -> None:
    """The model's folder decides that the task is one of sources and targets; a run goes on where it stopped."""
    output = tmp_path / "out"
    arguments = world.tune(
        output, "--target-column", "target", "--eval", world.pairs, "--save-strategy", "epoch", "--json"
    )
    for old, new in ((world.train, world.pairs), ("{text} is", "say: {source}"), (world.llama, world.t5)):
        arguments[arguments.index(old)] = new
    tuned = call(*arguments)
    assert (tuned.status, tuned.err) == (0, "")
    assert set(tuned.json["metrics"]) == {"loss", "perplexity"}
    assert json.loads((output / "task.json").read_text())["task"]["kind"] == "seq2seq"
    resumed = call(*arguments, "--resume")
    assert (resumed.status, resumed.json["final_loss"]) == (0, tuned.json["final_loss"])

    common = ("--prompt", output, "--max-new-tokens", "5", "--json")
    judged = call("eval", *common, "--data", world.pairs, "--write-texts")
    assert judged.json["metrics"]["loss"] == pytest.approx(tuned.json["metrics"]["loss"])
    assert {"bleu", "chrf", "rouge_l", "exact_match"} < set(judged.json["metrics"])
    written = call("generate", *common, "--text", "fine", "--text", "poor", "--num-beams", "2")
    assert len(written.json["texts"]) == 2
    report = call("doctor", "--model", world.t5, "--json").json["model"]
    assert report["supported"] is True


def test_an_encoder_decoder_names_labels(world: Any, call: Callable[..., Any], tmp_path: Path) -> None:
    """Words of a verbaliser and nothing else, scored rather than written."""
    output = tmp_path / "out"
    arguments = world.tune(output, "--test", world.test, "--json")
    arguments[arguments.index(world.llama)] = world.t5
    tuned = call(*arguments)
    assert (tuned.status, tuned.err) == (0, "")
    assert json.loads((output / "task.json").read_text())["task"]["kind"] == "seq2seq_classification"
    judged = call("eval", "--prompt", output, "--data", world.test, "--json")
    assert judged.json["metrics"] == tuned.json["test"]["metrics"]
    labelled = call("generate", "--prompt", output, "--data", world.test, "--json")
    assert labelled.status == 0
    assert set(labelled.json["texts"]) <= {"good", "bad"}
    assert len(labelled.json["texts"]) == 6


def test_generation_from_tuning_to_texts(world: Any, call: Callable[..., Any], tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = world.tune(output, "--target-column", "target", "--method", "prefix", "--eval", world.pairs, "--json")
    arguments[arguments.index(world.train)] = world.pairs
    arguments[arguments.index("{text} is")] = r"{source}\nsays"
    tuned = call(*arguments)
    assert (tuned.status, tuned.err) == (0, "")
    assert set(tuned.json["metrics"]) == {"loss", "perplexity"}
    assert json.loads((output / "task.json").read_text())["task"]["template"] == "{source}\nsays"

    judged = call("eval", "--prompt", output, "--data", world.pairs, "--write-texts", "--max-new-tokens", "5", "--json")
    assert {"bleu", "chrf", "rouge_l", "exact_match"} < set(judged.json["metrics"])
    written = call("generate", "--prompt", output, "--text", "fine", "--max-new-tokens", "5", "--json")
    again = call("generate", "--prompt", output, "--column", "source=fine", "--max-new-tokens", "5", "--json")
    assert written.json["texts"] == again.json["texts"]
    sampling = ("generate", "--prompt", output, "--text", "fine", "--max-new-tokens", "5", "--do-sample", "--json")
    sampled = [call(*sampling, "--temperature", "2", "--seed", seed).json["texts"] for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.parametrize(
    ("method", "option"),
    [
        ("p-tuning", "encoder_reparameterization_type=MLP"),
        ("residual", "bottleneck_size=6"),
        ("superpos", "num_sampled_tokens=7"),
        ("ulpt", "rank=3"),
        ("dept", "rank=3"),
        (
            "cartridge",
            "text=it was fine good bad fine poor it was good very good it was it was fine good poor it was bad",
        ),
        ("multitask", "vector_init=ones"),
        ("lopa", "rank=3"),
        ("smop", "num_experts=3"),
        ("llama-adapter", "gating=head_tanh"),
        ("cpt", 'context=[["format", "it"], ["input", "was fine"], ["label", "good"]]'),
    ],
)
def test_every_method_is_tuned_and_used(
    world: Any, call: Callable[..., Any], tmp_path: Path, method: str, option: str
) -> None:
    output = tmp_path / "out"
    arguments = world.tune(output, "--method", method, "--prompt-option", option, "--json")
    if method == "cpt":  # as long as its context
        at = arguments.index("--num-virtual-tokens")
        del arguments[at : at + 2]
    tuned = call(*arguments)
    assert (tuned.status, tuned.err) == (0, "")
    assert tuned.json["method"] == method
    assert call("eval", "--prompt", output, "--data", world.test, "--json").status == 0


def test_tuned_prompts_become_sources_of_an_attentional_mixture(
    world: Any, call: Callable[..., Any], tmp_path: Path
) -> None:
    sources = [tmp_path / name for name in ("one", "two")]
    for seed, source in enumerate(sources):
        assert call(*world.tune(source, "--seed", str(seed))).status == 0
    option = f"sources={json.dumps([str(source / 'prompt') for source in sources])}"
    arguments = world.tune(tmp_path / "out", "--method", "attempt", "--prompt-option", option, "--json")
    at = arguments.index("--num-virtual-tokens")  # as long as its sources
    del arguments[at : at + 2]
    tuned = call(*arguments)
    assert (tuned.status, tuned.err) == (0, "")
    for command in ("eval", "generate"):
        assert call(command, "--prompt", tmp_path / "out", "--data", world.test, "--json").status == 0


def test_generate_writes_what_eval_writes(world: Any, call: Callable[..., Any], tmp_path: Path) -> None:
    """Both must tokenise a row alike; a tokenizer's own EOS or a lost BOS would show as other texts."""
    arguments = world.tune(tmp_path / "out", "--target-column", "target", "--json")
    arguments[arguments.index(world.train)] = world.pairs
    arguments[arguments.index("{text} is")] = "{source} says"
    assert call(*arguments).status == 0
    common = ("--prompt", tmp_path / "out", "--data", world.pairs, "--max-new-tokens", "6", "--json")
    assert call("eval", *common, "--write-texts", "--predictions", tmp_path / "texts.jsonl").status == 0
    texts = [json.loads(line)["prediction"] for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert call("generate", *common).json["texts"] == texts


def test_sequence_classification_keeps_the_head(world: Any, call: Callable[..., Any], tmp_path: Path) -> None:
    """The trained head must come back with the prompt: a new random one would give another loss."""
    output = tmp_path / "out"
    tuned = call(
        "tune", "--model", world.bert, "--train", world.train, "--text-column", "text", "--method", "prefix",
        "--num-virtual-tokens", "4", "--max-steps", "3", "--test", world.test, "--output", output, "--disable-tqdm",
        "--json",
    )  # fmt: skip
    assert (tuned.status, tuned.err) == (0, "")
    judged = call("eval", "--prompt", output, "--data", world.test, "--json")
    assert judged.json["metrics"] == tuned.json["test"]["metrics"]
    assert call("generate", "--prompt", output, "--text", "it was fine", "--json").json["texts"][0] in ("good", "bad")


def test_tune_with_a_head_did_not_say_that_generate_labels_texts(
    world: Any, call: Callable[..., Any], tmp_path: Path
) -> None:
    tuned = call(
        "tune", "--model", world.bert, "--train", world.train, "--text-column", "text", "--num-virtual-tokens", "2",
        "--max-steps", "1", "--output", tmp_path / "out", "--disable-tqdm",
    )  # fmt: skip
    assert tuned.out.splitlines()[-1] == f"      ptengine generate --prompt {tmp_path / 'out'} --data FILE"


def test_tuning_again_gives_the_same_and_resuming_goes_on(world: Any, call: Callable[..., Any], tmp_path: Path) -> None:
    common = ("--lr-scheduler-type", "constant", "--json")
    whole = call(*world.tune(tmp_path / "whole", "--max-steps", "6", *common)).json
    first = call(*world.tune(tmp_path / "parts", *common)).json
    rest = call(*world.tune(tmp_path / "parts", "--max-steps", "6", "--resume", *common)).json
    assert first["steps"] == 3
    assert rest["steps"] == 6
    assert rest["final_loss"] == whole["final_loss"]


def test_label_words_from_a_file_and_starting_from_text(world: Any, call: Callable[..., Any], tmp_path: Path) -> None:
    words = tmp_path / "words.json"
    words.write_text('{"good": [" yes", " fine"], "bad": " no"}')
    result = call(
        *world.tune(tmp_path / "out", "--label-words", words, "--init", "text", "--init-text", "so", "--json")
    )
    assert (result.status, result.err) == (0, "")
    task = json.loads((tmp_path / "out" / "task.json").read_text())["task"]
    assert task["label_words"] == {"good": [" yes", " fine"], "bad": [" no"]}


def test_a_projector_was_trained_for_a_name_that_no_bank_takes(
    world: Any, call: Callable[..., Any], tmp_path: Path
) -> None:
    """The name was looked at after the training, which was then lost."""
    call(*world.tune(tmp_path / "out"))
    call("bank", "add", "--bank", tmp_path / "bank", "--name", "a", "--prompt", tmp_path / "out")
    refused = call(
        "bank", "carry", "--bank", tmp_path / "bank", "--name", "a", "--from", world.llama, "--model", world.llama,
        "--into", "a/b", "--method", "projector", "--data", world.train, "--steps", "2",
        "--projector", tmp_path / "projector",
    )  # fmt: skip
    assert not (tmp_path / "projector").exists()
    assert refused.status == 2
    assert "expected a name of at most 80 letters" in refused.err


def test_a_changed_model_is_noticed(world: Any, call: Callable[..., Any], tmp_path: Path) -> None:
    """A model of the same shape but other weights takes the prompt and answers nonsense."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    home = tmp_path / "model"
    model = AutoModelForCausalLM.from_pretrained(world.llama)
    model.save_pretrained(home)
    AutoTokenizer.from_pretrained(world.llama).save_pretrained(home)
    arguments = world.tune(tmp_path / "out")
    arguments[arguments.index(world.llama)] = str(home)
    assert call(*arguments).status == 0
    with torch.no_grad():
        model.model.norm.weight += 1
    model.save_pretrained(home)
    refused = call("eval", "--prompt", tmp_path / "out", "--data", world.test)
    assert refused.status == 2
    assert "other weights" in refused.err
    assert call("eval", "--prompt", tmp_path / "out", "--data", world.test, "--model", home).status == 0


def test_divergence_is_status_one(world: Any, call: Callable[..., Any], tmp_path: Path, monkeypatch: Any) -> None:
    def diverge(self: Any, resume: Any = False, on_start: Any = None) -> None:
        raise TrainingDiverged("step 2: the loss is not finite", 2, [1, 2])

    monkeypatch.setattr("ptengine.training.Trainer.fit", diverge)
    result = call(*world.tune(tmp_path / "out"))
    assert (result.status, result.out) == (1, "")
    assert result.err == "error: step 2: the loss is not finite\n"


def test_sigterm_outside_training_exits_143_and_gives_the_handler_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(_: list[str]) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)  # the signal's handler interrupts it
        return 0

    monkeypatch.setattr(cli, "_run", stopped)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # without a handler of ours nothing would happen
    try:
        with pytest.raises(SystemExit) as leaving:
            cli.main(["eval"])
        assert leaving.value.code == 143
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_sigterm_saves_and_exits_143(world: Any, call: Callable[..., Any], tmp_path: Path) -> None:
    arguments = world.tune(tmp_path / "out", "--lr-scheduler-type", "constant", "--logging-steps", "1")
    arguments[arguments.index("--max-steps") + 1] = "100000"
    process = subprocess.Popen([sys.executable, "-m", "ptengine", *arguments], stderr=subprocess.PIPE, text=True)
    log, waited = tmp_path / "out" / "log.jsonl", time.monotonic()
    while not (log.exists() and log.stat().st_size) and time.monotonic() - waited < 120:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "Traceback" not in err
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    # The same command with --resume and a little further.
    step = int(checkpoint.name.partition("-")[2])
    arguments[arguments.index("--max-steps") + 1] = str(step + 2)
    assert call(*arguments, "--resume", "--json").json["steps"] == step + 2


@pytest.mark.parametrize(("task", "count"), [("sms_spam", 4), ("e2e_nlg", 2)])
def test_demo(task: str, count: int, call: Callable[..., Any], tmp_path: Path, monkeypatch: Any) -> None:
    """The whole demo with few steps and rows; how good the real one is, is measured elsewhere."""
    from dataclasses import replace

    from ptengine.assets import data_path
    from ptengine.commands import demo

    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "validation", "test"):
        lines = (data_path(task) / f"{split}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (data / f"{split}.jsonl").write_text("".join(lines[:24]), encoding="utf-8")
    monkeypatch.setattr("ptengine.assets.data_path", lambda name: data)
    settings = demo.DEMOS[task]
    short = {**settings.training, "max_steps": 2, "eval_steps": 1}
    monkeypatch.setitem(demo.DEMOS, task, replace(settings, training=short, max_new_tokens=4))
    result = call("demo", "--task", task, "--output", tmp_path / "out", "--json")
    assert result.status == 0
    assert kinds(result.json) == {
        "command": "str", "task": "str", "output": "str", "prompt": "str", "curve": "str", "next": "list",
        "test": {name: dict.fromkeys(settings.columns, "float") for name in result.json["test"]},
        "validation": kinds(result.json["validation"]), "steps": "int", "tokens_per_second": "float",
        "training_seconds": "float", "seconds": "float",
    }  # fmt: skip
    assert len(result.json["test"]) == count
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == result.json
    assert (tmp_path / "out" / "curve.png").read_bytes().startswith(b"\x89PNG")
    # For people it is a table.
    shown = call("demo", "--task", task, "--output", tmp_path / "again").out
    for words in ("tuned prompt", *(f"{result.json['test']['tuned prompt'][name]:.4f}" for name in settings.columns)):
        assert words in shown
    # What it says to do next works as it says it.
    import shlex

    for line in result.json["next"]:
        program, *arguments = shlex.split(line)
        assert program == "ptengine"
        assert call(*arguments).status == 0


def test_doctor(world: Any, call: Callable[..., Any], monkeypatch: Any) -> None:
    result = call("doctor", "--model", world.llama, "--json")
    assert result.status == 0
    assert result.json["problems"] == []
    assert result.json["model"]["supported"] is True
    assert len(result.json["model"]["layers"]) == 2
    operations = " ".join(result.json["operations"]["cpu"])
    for name in ("prefix_attention", "prefix_attention_varlen", "prefix_concat", "linear_cross_entropy"):
        assert f"{name} on cpu: torch" in operations
    assert set(result.json["assets"]) == {"backbone", "sms_spam", "e2e_nlg"}
    refused = call("doctor", "--model", world.vit, "--json")
    assert refused.status == 0
    assert refused.json["model"]["supported"] is False
    assert "vit" in refused.json["model"]["reason"]
    monkeypatch.setenv("PTENGINE_BACKEND", "triton")
    forced = call("doctor")
    assert forced.status == 1
    assert "refused" in forced.out


def test_library_output_does_not_reach_standard_output(call: Callable[..., Any], monkeypatch: Any) -> None:
    """A print inside a library once stood before the JSON object."""
    import ptengine.commands.doctor as doctor

    inner = doctor._assets

    def noisy() -> Any:
        print("hello from a library")
        return inner()

    monkeypatch.setattr(doctor, "_assets", noisy)
    result = call("doctor", "--json")
    assert result.json["command"] == "doctor"
    assert "hello from a library" in result.err


def test_unescape() -> None:
    assert unescape(r"{text}\nKind:\t") == "{text}\nKind:\t"


def test_kernels_is_not_a_module_of_ours(tmp_path: Path) -> None:
    """A top-level `kernels` of ours would shadow the Hugging Face package that transformers probes for."""
    code = """
import importlib.util, pathlib
import ptengine.kernels.dispatch
root = pathlib.Path(ptengine.__file__).resolve().parents[1]
spec = importlib.util.find_spec("kernels")
places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])]
assert not any(pathlib.Path(place).is_relative_to(root) for place in places if place), places
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""})


def test_texts_of_a_classification_prompt_named_internals(world: Any, call: Callable[..., Any], tmp_path: Path) -> None:
    """The error was "expected a GenerationTask with generate=True", and the command line has neither."""
    call(*world.tune(tmp_path / "out"))
    done = call("eval", "--prompt", tmp_path / "out", "--data", world.test, "--write-texts")
    assert done.status == 2
    assert done.err == "error: expected --write-texts with a prompt that writes texts, got one for classification\n"


def test_a_demo_that_was_refused_left_an_empty_folder(
    call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PTENGINE_BACKEND", "triton")
    done = call("demo", "--output", tmp_path / "out")
    assert (done.status, "PTENGINE_BACKEND=triton" in done.err) == (2, True), done.err
    assert not (tmp_path / "out").exists()


def test_a_demo_that_cannot_write_failed_after_the_baselines(
    call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: Any) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr("ptengine.commands.loading.load_model", loaded)
    (tmp_path / "file").write_text("")
    done = call("demo", "--output", tmp_path / "file" / "x")
    assert (done.status, "expected a directory to write to" in done.err) == (2, True), done.err
