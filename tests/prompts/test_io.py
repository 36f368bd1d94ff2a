"""Saving and loading: bit for bit, never half, never into another model."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ptengine.files
from ptengine.errors import InputError, UnsupportedModelError
from ptengine.prompts import BackboneFacts, Prefix, SoftPrompt, backbone_facts, create, load_prompt, methods

MADE = {
    "soft": lambda model, seed=0: SoftPrompt(model, 5, seed=seed),
    "flat": lambda model, seed=0: Prefix(model, 5, seed=seed),
    "projected": lambda model, seed=0: Prefix(model, 5, projection=True, projection_size=7, seed=seed),
}


def numbers(prompt):
    lowered = prompt.lower()
    pair = (lowered.embeds, lowered.embeds) if hasattr(lowered, "embeds") else (lowered.keys, lowered.values)
    return torch.stack(pair).detach()


@pytest.mark.parametrize("kind", MADE)
def test_a_saved_prompt_comes_back_bit_for_bit(model, tmp_path, kind):
    prompt = MADE[kind](model)
    assert prompt.save(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["prompt.json", "prompt.safetensors"]
    loaded = load_prompt(str(tmp_path / "a" / "b"), model)
    assert type(loaded) is type(prompt)
    assert torch.equal(numbers(loaded), numbers(prompt))
    assert loaded.facts == prompt.facts
    assert loaded.num_virtual_tokens == 5
    assert all(p.dtype == torch.float32 and p.requires_grad and p.is_leaf for p in loaded.parameters())
    assert loaded.default_learning_rate() == prompt.fold().default_learning_rate()


def test_a_loaded_prompt_trains_and_saves_again(gpt2, tmp_path):
    for kind, make in MADE.items():
        make(gpt2).save(tmp_path / kind)
        loaded = load_prompt(tmp_path / kind, gpt2)
        first = (tmp_path / kind / "prompt.safetensors").read_bytes()
        loaded.save(tmp_path / kind)
        assert (tmp_path / kind / "prompt.safetensors").read_bytes() == first
        optimizer = torch.optim.AdamW(loaded.parameters(), lr=0.1)
        before = numbers(loaded).clone()
        lowered = loaded.lower()
        (lowered.embeds if kind == "soft" else lowered.keys + lowered.values).square().sum().backward()
        optimizer.step()
        assert not torch.equal(numbers(loaded), before)
        assert torch.equal(numbers(load_prompt(tmp_path / kind, gpt2)), before)


def test_the_description_says_what_the_prompt_is(gpt2, tmp_path):
    MADE["projected"](gpt2).save(tmp_path)
    description = json.loads((tmp_path / "prompt.json").read_text())
    assert description == {
        "format_version": 1,
        "method": "prefix",
        "num_virtual_tokens": 5,
        "config": {"num_virtual_tokens": 5, "init": "random"},
        "backbone": {
            "model_type": "gpt2",
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 4,
            "head_dim": 8,
            "vocab_size": 61,
            "embedding_std": backbone_facts(gpt2).embedding_std,
            "base_model": None,
        },
        "ptengine_version": ptengine.__version__,
    }
    assert sorted(load_file(tmp_path / "prompt.safetensors")) == ["keys", "values"]


def test_the_name_of_the_model_is_kept_but_no_path_of_the_machine(gpt2, tmp_path):
    gpt2.name_or_path = "org/some-model"
    assert backbone_facts(gpt2).base_model == "org/some-model"
    for path in (str(tmp_path), "./here", "~/there", ""):
        gpt2.name_or_path = path
        assert backbone_facts(gpt2).base_model is None


def test_a_prompt_of_a_half_precision_module_is_saved_in_fp32(gpt2, tmp_path):
    prompt = SoftPrompt(gpt2, 4).to(torch.bfloat16)
    prompt.save(tmp_path)
    assert torch.equal(load_prompt(tmp_path, gpt2).embeds, prompt.embeds.float())


def test_a_model_loaded_in_another_dtype_is_the_same_model(gpt2, tmp_path):
    prompt = SoftPrompt(gpt2, 4)
    prompt.save(tmp_path)
    gpt2.name_or_path = "another/name"
    assert torch.equal(load_prompt(tmp_path, gpt2.to(torch.bfloat16)).embeds, prompt.embeds)


class Boom(OSError):
    pass


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("kind", MADE)
def test_a_save_that_fails_leaves_the_earlier_prompt(gpt2, tmp_path, monkeypatch, kind, call, nth):
    old, new = MADE[kind](gpt2, seed=1), MADE[kind](gpt2, seed=2)
    old.save(tmp_path)
    real, calls = getattr(ptengine.files.os, call), []

    def failing(*args):
        calls.append(args)
        if len(calls) == nth:
            raise Boom("no space left")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(ptengine.files.os, call, failing)
        with pytest.raises(Boom):
            new.save(tmp_path)
    assert torch.equal(numbers(load_prompt(tmp_path, gpt2)), numbers(old))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompt.json", "prompt.safetensors"]
    new.save(tmp_path)
    assert torch.equal(numbers(load_prompt(tmp_path, gpt2)), numbers(new))


def test_a_kill_at_any_moment_leaves_the_earlier_or_the_new_prompt(gpt2, tmp_path, monkeypatch):
    """A directory as it stands before and after every rename is what a kill leaves behind.

    The two prompts differ in length: new weights beside an old description would not load.
    """
    here = tmp_path / "prompt"
    old, new = SoftPrompt(gpt2, 4, seed=1), SoftPrompt(gpt2, 6, seed=2)
    old.save(here)
    snapshots = []
    for call in ("replace", "fsync"):
        real = getattr(ptengine.files.os, call)

        def watched(*args, real=real):
            snapshots.append(Path(shutil.copytree(here, tmp_path / f"{len(snapshots)}")))
            result = real(*args)
            snapshots.append(Path(shutil.copytree(here, tmp_path / f"{len(snapshots)}")))
            return result

        monkeypatch.setattr(ptengine.files.os, call, watched)
    new.save(here)
    states = []
    for snapshot in snapshots:
        loaded = load_prompt(snapshot, gpt2)
        states.append(loaded.num_virtual_tokens)
        assert torch.equal(loaded.embeds, (old if states[-1] == 4 else new).embeds)
    assert len(states) == 10
    assert states == sorted(states)
    assert set(states) == {4, 6}


def test_saving_into_a_file_or_below_one_is_refused(gpt2, tmp_path):
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="expected a directory to write to"):
            SoftPrompt(gpt2, 4).save(target)
    assert (tmp_path / "file").read_text() == "x"


OTHERS = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_layers": 3,
    "num_heads": 8,
    "num_kv_heads": 2,
    "head_dim": 16,
    "vocab_size": 62,
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("kind", ["soft", "flat"])
def test_another_backbone_is_refused_by_the_field_that_differs(gpt2, tmp_path, kind, name):
    prompt = MADE[kind](gpt2)
    own = getattr(prompt.facts, name)
    prompt.facts = replace(prompt.facts, **{name: OTHERS[name]})
    # Weights of the method's shapes for those facts, so that the facts alone decide.
    prompt.empty(prompt.facts, prompt.config()).save(tmp_path)
    with pytest.raises(InputError, match=f"expected {name} {OTHERS[name]!r}, got {own!r}"):
        load_prompt(tmp_path, gpt2)


def test_every_fact_is_compared_but_the_two_that_are_told():
    assert {field.name for field in fields(BackboneFacts)} - set(OTHERS) == {"embedding_std", "base_model"}


def rewrite(directory, change, tensors=None):
    """Save the prompt again with its description changed."""
    description = json.loads((directory / "prompt.json").read_text())
    change(description)
    held = load_file(directory / "prompt.safetensors") if tensors is None else tensors
    save_file(held, directory / "prompt.safetensors", {"ptengine": json.dumps(description)})


def put(directory, name, content):
    (directory / name).write_bytes(content)


DAMAGE = {
    "no directory": (lambda d: shutil.rmtree(d), "is not a directory"),
    "no json": (lambda d: (d / "prompt.json").unlink(), r"there is no prompt\.json"),
    "no weights": (lambda d: (d / "prompt.safetensors").unlink(), "prompt.safetensors', which does not exist"),
    "json cut short": (lambda d: put(d, "prompt.json", b'{"format_ver'), "expected a json file"),
    "json empty": (lambda d: put(d, "prompt.json", b""), "expected a json file"),
    "json not text": (lambda d: put(d, "prompt.json", b"\xff\xfe\x00"), "expected a json file"),
    "weights empty": (lambda d: put(d, "prompt.safetensors", b""), "expected a safetensors file"),
    "weights cut short": (
        lambda d: put(d, "prompt.safetensors", (d / "prompt.safetensors").read_bytes()[:-20]),
        "expected a safetensors file",
    ),
    "weights garbage": (lambda d: put(d, "prompt.safetensors", b"\x00" * 300), "expected a safetensors file"),
    "weights of somebody else": (
        lambda d: save_file({"embeds": torch.zeros(5, 32)}, d / "prompt.safetensors"),
        "header does not describe one",
    ),
    "description not json": (
        lambda d: save_file({"embeds": torch.zeros(5, 32)}, d / "prompt.safetensors", {"ptengine": "{"}),
        "description is damaged",
    ),
    "description not an object": (
        lambda d: save_file({"embeds": torch.zeros(5, 32)}, d / "prompt.safetensors", {"ptengine": "[]"}),
        "not a json object",
    ),
    "newer format": (lambda d: rewrite(d, lambda x: x.update(format_version=2)), "format version 1, got 2"),
    "no method": (lambda d: rewrite(d, lambda x: x.pop("method")), "expected 'method'"),
    "unknown method": (lambda d: rewrite(d, lambda x: x.update(method="magic")), "soft_prompt.*, got 'magic'"),
    "method not a name": (lambda d: rewrite(d, lambda x: x.update(method=["prefix"])), "soft_prompt.*, got"),
    "another method": (lambda d: rewrite(d, lambda x: x.update(method="prefix")), "expected the tensors"),
    "no backbone": (lambda d: rewrite(d, lambda x: x.pop("backbone")), "expected 'backbone'"),
    "backbone not an object": (lambda d: rewrite(d, lambda x: x.update(backbone=3)), "facts as a json object"),
    "backbone fact missing": (lambda d: rewrite(d, lambda x: x["backbone"].pop("head_dim")), "'head_dim' of type int"),
    "backbone fact of another type": (
        lambda d: rewrite(d, lambda x: x["backbone"].update(num_layers="2")),
        "'num_layers' of type int, got '2'",
    ),
    "config not an object": (lambda d: rewrite(d, lambda x: x.update(config=[])), "num_virtual_tokens of at least 1"),
    "config of no tokens": (
        lambda d: rewrite(d, lambda x: x["config"].update(num_virtual_tokens=0)),
        "num_virtual_tokens of at least 1",
    ),
    "config of too many tokens": (
        lambda d: rewrite(d, lambda x: x["config"].update(num_virtual_tokens=10**12)),
        "expected the tensors",
    ),
    "config of unknown init": (lambda d: rewrite(d, lambda x: x["config"].update(init="no")), "init, one of"),
    "config with more": (lambda d: rewrite(d, lambda x: x["config"].update(rank=3)), "config with init"),
    "tensor missing": (lambda d: rewrite(d, dict, {"other": torch.zeros(5, 32)}), "expected the tensors"),
    "tensor too many": (
        lambda d: rewrite(d, dict, {"embeds": torch.zeros(5, 32), "more": torch.zeros(1)}),
        "expected the tensors",
    ),
    "tensor of another dtype": (
        lambda d: rewrite(d, dict, {"embeds": torch.zeros(5, 32, dtype=torch.float16)}),
        "expected the tensors.*float16",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_one_clear_error(gpt2, tmp_path, case):
    damage, message = DAMAGE[case]
    MADE["soft"](gpt2).save(tmp_path / "prompt")
    damage(tmp_path / "prompt")
    with pytest.raises(InputError, match=message):
        load_prompt(tmp_path / "prompt", gpt2)


def test_loading_for_what_is_no_model_is_refused(gpt2, tmp_path):
    MADE["soft"](gpt2).save(tmp_path)
    with pytest.raises(UnsupportedModelError, match="got NoneType"):
        load_prompt(tmp_path, None)


def test_methods_are_made_by_name(gpt2):
    assert methods() == sorted(methods())
    assert {"prefix", "soft_prompt", "p_tuning", "residual_prompt", "superpos_prompt"} <= set(methods())
    prompt = create("prefix", gpt2, num_virtual_tokens=3, init="zero", projection=True)
    assert isinstance(prompt, Prefix)
    assert prompt.projection
    assert isinstance(create("soft_prompt", gpt2), SoftPrompt)
    with pytest.raises(InputError, match=r"one of .*prefix, .*soft_prompt.*, got 'lora'"):
        create("lora", gpt2)
    with pytest.raises(InputError, match="'soft_prompt' has no option 'projection'; it has num_virtual_tokens, init"):
        create("soft_prompt", gpt2, projection=True)
