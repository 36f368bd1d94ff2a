"""`ptengine export` from a tuned folder and from a prompt alone: what other programs then read."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from ptengine.commands.session import open_prompt
from ptengine.interop import load_peft
from ptengine.prompts import load_prompt

from .conftest import BAD, GOOD, write_rows


@pytest.fixture(scope="module")
def tuned(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ptengine.cli import main

    output = tmp_path_factory.mktemp("tuned") / "out"
    assert main(world.tune(output)) == 0
    return output


@pytest.mark.parametrize("source", ["a tuned folder", "a prompt alone"])
@pytest.mark.parametrize("name", ["peft", "prompt_embeds", "baked"])
def test_export(world: Any, tuned: Path, call: Callable[..., Any], tmp_path: Path, name: str, source: str) -> None:
    """Stock transformers gives the logits of the prompt from the files alone."""
    prompt, more = tuned, ["--json"]
    if source == "a prompt alone":
        prompt = Path(shutil.copytree(tuned / "prompt", tmp_path / "prompt"))
        more += ["--model", world.llama]
    output = tmp_path / "out"
    result = call("export", "--prompt", prompt, "--format", name, "--output", output, *more)
    assert result.status == 0, result.err
    assert result.json == {
        "command": "export", "prompt": str(prompt), "method": "soft_prompt", "num_virtual_tokens": 4, "format": name,
        "output": str(output), "files": sorted(path.name for path in output.iterdir()),
    }  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(world.llama).eval()
    own = load_prompt(tuned / "prompt", model)
    ids = AutoTokenizer.from_pretrained(world.llama)("it was fine", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        with own.attached(model):
            exact = model(ids).logits
        if name == "peft":
            embeds = load_file(output / "adapter_model.safetensors")["prompt_embeddings"]
        elif name == "prompt_embeds":
            embeds = load_file(output / "prompt_embeds.safetensors")["prompt_embeds"]
        if name == "baked":
            stock, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
            prefix = json.loads((output / "soft_prompt.json").read_text())["prefix"]
            ids = tokenizer(prefix + "it was fine", add_special_tokens=False, return_tensors="pt")["input_ids"]
            got = stock(ids).logits[:, 4:, : exact.shape[-1]]
        else:
            both = torch.cat([embeds[None], model.get_input_embeddings()(ids)], dim=1)
            got = model(inputs_embeds=both).logits[:, 4:]
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["peft", "prompt_embeds", "baked"])
def test_outputs_that_formats_did_not_agree_on(
    tuned: Path, call: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    result = call("export", "--prompt", tuned, "--format", name, "--output", tmp_path / "link", "--json")
    assert (result.status, result.err) == (0, "")
    assert result.json["files"] == sorted(path.name for path in (tmp_path / "empty").iterdir())
    for output, wanted in (("/proc/x", "a directory to write to"), (str(tmp_path / ("a" * 256)), "a name that")):
        refused = call("export", "--prompt", tuned, "--format", name, "--output", output)
        assert refused.status == 2
        assert refused.err.startswith(f"error: expected {wanted}")
        assert f", got {output!r}: " in refused.err


def test_export_for_people(tuned: Path, call: Callable[..., Any], tmp_path: Path) -> None:
    result = call(
        "export", "--prompt", tuned, "--format", "peft", "--peft-type", "P_TUNING", "--output", tmp_path / "out"
    )
    assert result.status == 0, result.err
    assert result.out.startswith("4 virtual tokens in ")
    assert "next: PeftModel.from_pretrained(model, " in result.out
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == "P_TUNING"


def test_a_trained_head_is_exported(world: Any, call: Callable[..., Any], tmp_path: Path) -> None:
    """A classifier's head is part of PEFT's checkpoint; its virtual tokens alone are of no use to a server."""
    peft = pytest.importorskip("peft", reason="needs peft")
    output = tmp_path / "tuned"
    tuned = call(
        "tune", "--model", world.bert, "--train", world.train, "--text-column", "text", "--method", "prefix",
        "--output", output, "--num-virtual-tokens", "3", "--max-steps", "2", "--disable-tqdm",
    )  # fmt: skip
    assert tuned.status == 0, tuned.err
    result = call("export", "--prompt", output, "--format", "peft", "--output", tmp_path / "out", "--json")
    assert result.status == 0, result.err
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert "base_model.classifier.weight" in tensors
    stock = AutoModelForSequenceClassification.from_pretrained(world.bert, num_labels=2)
    wrapped = peft.PeftModel.from_pretrained(stock, tmp_path / "out")
    head = wrapped.base_model.classifier.modules_to_save["default"]
    assert torch.equal(head.weight, tensors["base_model.classifier.weight"])
    for name in ("prompt_embeds", "baked"):
        refused = call("export", "--prompt", output, "--format", name, "--output", tmp_path / name)
        assert refused.status == 2
        assert "expected a SoftPrompt, got 'prefix'" in refused.err
        assert not (tmp_path / name).exists()


ENCODER_TASKS = {
    "TOKEN_CLS": (AutoModelForTokenClassification, ["--tokens-column", "words"]),
    "QUESTION_ANS": (AutoModelForQuestionAnswering, ["--question-column", "text"]),
    "FEATURE_EXTRACTION": (AutoModel, ["--embedding", "--text-pair-column", "answer"]),
    "FEATURE_EXTRACTION of a masked model": (
        AutoModelForMaskedLM, ["--template", "{text} {mask}", "--label-words", "good=great,bad=poor"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", ["soft", "prefix"])
@pytest.mark.parametrize("task", ENCODER_TASKS)
def test_peft_is_told_the_task_of_an_encoder(
    world: Any, call: Callable[..., Any], tmp_path: Path, task: str, method: str
) -> None:
    """All were written for SEQ_CLS, or refused because they are not."""
    peft = pytest.importorskip("peft", reason="needs peft")
    rows = [
        {
            "text": f"it was {word}", "words": ["it", "was", word], "tags": ["out", "out", "in"],
            "context": f"film {word}", "answer": word, "label": "good" if word in GOOD else "bad",
        }
        for word in GOOD + BAD
    ]  # fmt: skip
    data, output = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "tuned"
    auto, options = ENCODER_TASKS[task]
    folder = world.masked if "masked" in task else world.bert
    tuned = call(
        "tune", "--model", folder, "--train", data, "--method", method, "--output", output, "--num-virtual-tokens",
        "3", "--max-steps", "2", "--disable-tqdm", *options,
    )  # fmt: skip
    assert tuned.status == 0, tuned.err
    result = call("export", "--prompt", output, "--format", "peft", "--output", tmp_path / "out")
    assert (result.status, result.err) == (0, "")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["task_type"] == task.split()[0]
    session = open_prompt(argparse.Namespace(prompt=str(output), model=None, tokenizer=None, dtype=None, device=None))
    ids = session.tokenizer("it was great [MASK]", return_tensors="pt")["input_ids"]
    stock = auto.from_pretrained(folder)
    wrapped = peft.PeftModel.from_pretrained(stock, tmp_path / "out").eval()
    session.model.eval()
    with torch.no_grad():
        bare = session.model(ids).to_tuple()[0]
        with session.prompt.attached(session.model):
            ours = session.model(ids).to_tuple()[0]
        theirs = wrapped(input_ids=ids, attention_mask=torch.ones_like(ids)).to_tuple()[0]
    torch.testing.assert_close(theirs[:, -ids.shape[1] :], ours, rtol=0, atol=1e-6)
    assert not torch.equal(ours, bare)
    again = load_peft(tmp_path / "out", session.model)
    assert all(torch.equal(one, two) for one, two in zip(again.parameters(), session.prompt.parameters(), strict=True))


def test_an_adapter_is_exported_for_peft(world: Any, call: Callable[..., Any], tmp_path: Path) -> None:
    assert call(*world.tune(tmp_path / "tuned", "--method", "llama-adapter")).status == 0
    result = call("export", "--prompt", tmp_path / "tuned", "--format", "peft", "--output", tmp_path / "out", "--json")
    assert result.status == 0, result.err
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == "ADAPTION_PROMPT"
    wanted = load_prompt(tmp_path / "tuned" / "prompt", AutoModelForCausalLM.from_pretrained(world.llama)).state_dict()
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.adaption_"
    assert torch.equal(tensors[name + "prompt"], wanted["tokens"])
    assert torch.equal(tensors[name + "gate"], wanted["gates"][0])
    for format_name in ("prompt_embeds", "baked"):
        refused = call(
            "export", "--prompt", tmp_path / "tuned", "--format", format_name, "--output", tmp_path / format_name
        )
        assert refused.status == 2
        assert "llama_adapter" in refused.err
