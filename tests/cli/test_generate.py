"""What `ptengine generate` writes is the command's own matter: no setting that the model came with changes it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def tune(call: Callable[..., Any], world: Any, model: Path, output: Path) -> None:
    arguments = world.tune(output, "--target-column", "target")
    for old, new in ((world.train, world.pairs), ("{text} is", "{source} says"), (world.llama, str(model))):
        arguments[arguments.index(old)] = new
    assert call(*arguments).status == 0


def settle(model: Path, **settings: Any) -> None:
    """Write the generation settings that a model comes with."""
    path = model / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_settings_of_the_model_replaced_those_of_the_help(world: Any, call: Callable[..., Any], tmp_path: Path) -> None:
    """A model that came with sampling sampled, one with beams searched by beams, with none of them asked for."""
    home = Path(shutil.copytree(world.llama, tmp_path / "llama"))
    model = AutoModelForCausalLM.from_pretrained(home)
    model.lm_head.weight.data *= 50  # or beams would find what greedy search does
    model.save_pretrained(home)
    tune(call, world, home, tmp_path / "out")
    asked = ("generate", "--prompt", tmp_path / "out", "--text", "fine", "--max-new-tokens", "8", "--json")
    greedy = call(*asked).json["texts"]
    sampled = call(*asked, "--do-sample").json["texts"]
    searched = call(*asked, "--num-beams", "4").json["texts"]
    assert greedy != sampled
    assert greedy != searched
    settle(home, do_sample=True, temperature=3.0, top_p=0.01, num_beams=4, max_new_tokens=9)
    assert call(*asked).json["texts"] == greedy
    assert call(*asked, "--do-sample").json["texts"] == sampled
    assert call(*asked, "--num-beams", "4").json["texts"] == searched


@pytest.mark.parametrize("own", [None, 5])
def test_texts_went_on_behind_the_ending_of_their_task(
    world: Any, call: Callable[..., Any], tmp_path: Path, own: int | None
) -> None:
    """A model that names another EOS than its tokenizer, or none, wrote on behind what it was taught to end with."""
    home = Path(shutil.copytree(world.llama, tmp_path / "llama"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(home), AutoTokenizer.from_pretrained(home)
    end = tokenizer.eos_token_id
    (last,), (film,), (good,) = (tokenizer(text)["input_ids"][-1:] for text in (" says", " film", " good"))
    with torch.no_grad():  # the last token alone says what follows: "film", EOS, "good" and no end
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        seen = torch.nn.functional.normalize(model.model.embed_tokens.weight[[last, film, end, good]])
        model.lm_head.weight.zero_().index_add_(0, torch.tensor([film, end, good, good]), seen)
    model.save_pretrained(home)
    settle(home, eos_token_id=own)
    tune(call, world, home, tmp_path / "out")
    written = call("generate", "--prompt", tmp_path / "out", "--text", "fine", "--max-new-tokens", "5", "--json")
    assert written.json["texts"] == [tokenizer.decode([film])]


def test_a_seed_of_no_sampling_did_nothing(world: Any, call: Callable[..., Any], tmp_path: Path) -> None:
    tune(call, world, world.llama, tmp_path / "out")
    refused = call("generate", "--prompt", tmp_path / "out", "--text", "fine", "--seed", "3", "--num-beams", "2")
    assert (refused.status, refused.err) == (2, "error: expected --do-sample with --seed, got --seed alone\n")
