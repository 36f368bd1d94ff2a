"""A soft prompt as new tokens of a stock checkpoint: what AutoModelForCausalLM and AutoTokenizer make of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
)

import ptengine
from ptengine.assets import backbone_path
from ptengine.errors import InputError, UnsupportedModelError
from ptengine.interop import baked as mechanism
from ptengine.interop import save_baked_checkpoint
from ptengine.prompts import Prefix, SoftPrompt

from ..backbone.stock import make, relative, stories
from ..backbone.test_families import make as make_family
from .attached_cases import alone, prompt_for, state

VOCABULARY = 4096  # of the embedded tokenizer
TEXTS = ["Once upon a time", " there was\na film, 12"]
FAMILIES = ["gpt2", "llama", "llama, tied", "qwen3", "gemma3", "phi"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(backbone_path())


def model_of(family: str, vocabulary: int = VOCABULARY, dtype: torch.dtype = torch.float32) -> Any:
    shape = {
        "vocab_size": vocabulary, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "max_position_embeddings": 64, "initializer_range": 0.2, "bos_token_id": 0,
        "eos_token_id": 1, "pad_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    if family == "gemma3":  # multiplies its table by sqrt(d), and ties it
        model: Any = Gemma3ForCausalLM(Gemma3TextConfig(**shape, num_key_value_heads=2, head_dim=16, sliding_window=8))
    elif family == "phi":  # a head with a bias
        model = PhiForCausalLM(PhiConfig(**shape))
        torch.nn.init.normal_(model.lm_head.bias)
    else:
        changes = {"tie_word_embeddings": True} if "tied" in family else {}
        model = make(family.split(",")[0], vocab_size=vocabulary, **changes)
    return model.to(dtype).eval().requires_grad_(False)


def read(directory: Path, **options: Any) -> tuple[Any, Any, dict[str, Any]]:
    """What a user of stock transformers has, and what is told in words."""
    model = AutoModelForCausalLM.from_pretrained(directory, **options).eval()
    return model, AutoTokenizer.from_pretrained(directory), json.loads((directory / "soft_prompt.json").read_text())


def behind(baked: tuple[Any, Any, dict[str, Any]], text: str) -> Any:
    _, tokenizer, told = baked
    return tokenizer(told["prefix"] + text, add_special_tokens=False, return_tensors="pt")["input_ids"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_transformers_gives_our_logits(tmp_path: Path, tokenizer: Any, family: str, dtype: torch.dtype) -> None:
    """Every text position and the last virtual token, greedy texts too; the bound is a few roundings of each layer."""
    model = model_of(family, dtype=dtype)
    before = state(model)
    prompt = prompt_for(model, "soft")
    assert save_baked_checkpoint(model, prompt, tokenizer, tmp_path / "out") == tmp_path / "out"
    assert state(model) == before
    baked = read(tmp_path / "out")
    stock = baked[0]
    assert stock.dtype == dtype
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    for text in TEXTS:
        ids = behind(baked, text)
        row = tokenizer(text)["input_ids"]
        assert ids[0].tolist() == [*range(VOCABULARY, VOCABULARY + 6), *row]
        with torch.no_grad():
            got = stock(ids).logits[0, 6:]
            with prompt.attached(model):
                exact = model(torch.tensor([row])).logits[0]
        assert relative(got[:, :VOCABULARY].float(), exact.float()) < 8 * torch.finfo(dtype).eps
        if dtype == torch.float32:
            settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2}
            found = stock.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :]
            exact = ptengine.generate(model, prompt, torch.tensor([row]), **settings)[0, len(row) :]
            assert torch.equal(found, exact)


@pytest.mark.parametrize("family", FAMILIES)
def test_new_tokens_are_never_written(tmp_path: Path, tokenizer: Any, family: str) -> None:
    """Their logit is the mean of all others, also where the head was tied to the table with the prompt's own rows."""
    model = model_of(family)
    # Rows that a tied head would score far above all others.
    prompt = SoftPrompt(model, init="array", array=50 * model.get_input_embeddings().weight[5:9].clone())
    save_baked_checkpoint(model, prompt, tokenizer, tmp_path / "out")
    baked = read(tmp_path / "out")
    stock, _, told = baked
    assert told["untied"] == (family not in ("llama", "qwen3", "phi"))
    assert stock.config.tie_word_embeddings is False
    with torch.no_grad():
        logits = stock(behind(baked, TEXTS[0])).logits[0]  # [P + T, V + P]
    known, new = logits[:, :VOCABULARY], logits[:, VOCABULARY:]
    assert new.shape[1] == 4
    if family == "phi":
        assert new.max() < -20_000
    else:
        torch.testing.assert_close(new, known.mean(1, keepdim=True).expand_as(new), rtol=1e-4, atol=1e-4)
    assert (new.max(1).values < known.max(1).values).all()
    assert (logits.softmax(1)[:, VOCABULARY:] < 1 / VOCABULARY).all()
    assert stock.generation_config.suppress_tokens == told["ids"] == [*range(VOCABULARY, VOCABULARY + 4)]


def test_the_real_model(tmp_path: Path, shared: Path) -> None:
    """Whose tokenizer begins texts with a token of its own and a blank; batches and pipelines of stock transformers."""
    from transformers import pipeline

    model, tokenizer = stories(shared)
    prompt = SoftPrompt(model, 5, init="text", init_text="Tom had a red ball .", tokenizer=tokenizer)
    save_baked_checkpoint(model, prompt, tokenizer, tmp_path / "out")
    baked = read(tmp_path / "out")
    stock, new, told = baked
    assert told["prefix"].endswith("<|soft_prompt_4|><s>")
    exact = ptengine.generate(model, prompt, TEXTS, tokenizer, max_new_tokens=12, do_sample=False)
    for text, wanted in zip(TEXTS, exact, strict=True):
        ids = behind(baked, text)
        found = stock.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert new.decode(found[0, ids.shape[1] :], skip_special_tokens=True) == wanted
    write = pipeline("text-generation", model=stock, tokenizer=new)
    settings = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False, "add_special_tokens": False}
    assert write(told["prefix"] + TEXTS[0], **settings)[0]["generated_text"] == exact[0]


def test_a_chat_begins_with_the_prompt(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(backbone_path())
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    own = tokenizer.apply_chat_template(chat, return_dict=False)
    model = model_of("llama")
    save_baked_checkpoint(model, prompt_for(model, "soft"), tokenizer, tmp_path / "out")
    _, new, told = read(tmp_path / "out")
    assert new.apply_chat_template(chat, return_dict=False) == [*told["ids"], *own]
    assert new.decode([*told["ids"], *own], skip_special_tokens=True) == tokenizer.decode(own)
    assert tokenizer.apply_chat_template(chat, return_dict=False) == own


@pytest.mark.parametrize("room", [3, 16])
def test_a_padded_vocabulary(tmp_path: Path, tokenizer: Any, room: int) -> None:
    """Rows without a token become the prompt's; the table grows only where they are too few."""
    model = model_of("qwen3", VOCABULARY + room)
    prompt = prompt_for(model, "soft")
    save_baked_checkpoint(model, prompt, tokenizer, tmp_path / "out")
    baked = read(tmp_path / "out")
    assert baked[0].config.vocab_size == len(baked[0].lm_head.weight) == VOCABULARY + max(room, 6)
    ids = behind(baked, TEXTS[0])
    with torch.no_grad():
        got = baked[0](ids).logits[0, 6:, :VOCABULARY]
        with prompt.attached(model):
            exact = model(ids[:, 6:]).logits[0, :, :VOCABULARY]
    assert relative(got, exact) < 1e-6


def test_a_patched_model(tmp_path: Path, tokenizer: Any) -> None:
    """Stays patched, and the checkpoint names nothing of ptengine's attention."""
    model = model_of("llama")
    with ptengine.patched(model):
        save_baked_checkpoint(model, prompt_for(model, "soft"), tokenizer, tmp_path / "out")
        assert model.config._attn_implementation == "ptengine"
    assert "ptengine" not in (tmp_path / "out" / "config.json").read_text()
    assert read(tmp_path / "out")[0].config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", ["mixtral", "cohere2", "deepseek_v3", "gpt_oss"])
def test_other_families(tmp_path: Path, family: str) -> None:
    """Experts, scaled logits, latent attention and sinks pass through transformers' own writing and reading."""
    backend = Tokenizer(models.WordLevel({f"w{index}": index for index in range(90)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    model = make_family(family)
    prompt = prompt_for(model, "soft")
    save_baked_checkpoint(
        model, prompt, PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0"), tmp_path / "out"
    )
    baked = read(tmp_path / "out")
    ids = behind(baked, "w5 w17 w3 w44")
    assert ids[0, 6:].tolist() == [5, 17, 3, 44]
    with torch.no_grad():
        got = baked[0](ids).logits[0, 6:]
        exact = alone(model, prompt, ids[0, 6:].tolist())
    assert relative(got[:, :90], exact[:, :90]) < 1e-6
    assert (got[:, 90:96].max(1).values < got[:, :90].max(1).values).all()


REFUSED: dict[str, tuple[Any, str]] = {
    "a prefix": (lambda m, t: (m, Prefix(m, 4), t), "expected a SoftPrompt, got 'prefix': only virtual tokens"),
    "another backbone": (lambda m, t: (make("qwen3"), prompt_for(m, "soft"), t), "made for another backbone"),
    "an encoder": (lambda m, t: (make("bert"), None, t), "causal model with an LM head, got BertForSequence"),
    "no head": (lambda m, t: (m.model, None, t), "causal model with an LM head, got LlamaModel"),
    "no tokenizer": (lambda m, t: (m, None, "tokenizer"), "a transformers tokenizer, got str"),
    "a larger tokenizer": (lambda m, t: (make("llama"), None, t), "ids below 97, got one up to 4095"),
    "not finite": (
        lambda m, t: (m, prompt_for(m, "soft").apply(lambda p: p.embeds.data.fill_(float("inf"))), t), "finite numbers"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, tokenizer: Any, case: str) -> None:
    given, message = REFUSED[case]
    model, prompt, tokens = given(model_of("llama"), tokenizer)
    with pytest.raises(InputError, match=message):
        save_baked_checkpoint(model, prompt or SoftPrompt(model, 4), tokens, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_refused_twice(tmp_path: Path, tokenizer: Any) -> None:
    """A folder with files, and a checkpoint whose tokenizer has the tokens already."""
    model = model_of("llama")
    prompt = prompt_for(model, "soft")
    save_baked_checkpoint(model, prompt, tokenizer, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"a new or empty directory, got .* which has files"):
        save_baked_checkpoint(model, prompt, tokenizer, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    stock, new, _ = read(tmp_path / "out")
    with pytest.raises(InputError, match=r"without the tokens of a soft prompt, got one with '<\|soft_prompt_0\|>'"):
        save_baked_checkpoint(stock, SoftPrompt(stock, 4), new, tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_refused_where_an_id_is_taken(tmp_path: Path, tokenizer: Any) -> None:
    model = model_of("llama", VOCABULARY + 8)
    model.generation_config.eos_token_id = [1, VOCABULARY + 2]
    with pytest.raises(InputError, match=r"got eos_token_id \[1, 4098\]"):
        save_baked_checkpoint(model, prompt_for(model, "soft"), tokenizer, tmp_path / "out")


def test_refused_where_token_ids_mean_more(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that does something to ids besides looking them up would give other logits: found, and nothing left."""
    model = model_of("llama")
    forward = type(model).forward

    def more(self: Any, input_ids: Any = None, **given: Any) -> Any:
        out = forward(self, input_ids=input_ids, **given)
        if input_ids is not None:
            out.logits = out.logits * 1.01
        return out

    monkeypatch.setattr(type(model), "forward", more)
    with pytest.raises(UnsupportedModelError, match=r"differ by .* more with token ids than to look up"):
        save_baked_checkpoint(model, prompt_for(model, "soft"), tokenizer, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_refused_with_a_lora(tmp_path: Path, tokenizer: Any) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    model = model_of("llama")
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UnsupportedModelError, match="with the weights its class makes"):
        save_baked_checkpoint(model, prompt_for(model, "soft"), tokenizer, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_blank_before_a_whole_string(tmp_path: Path) -> None:
    """Such a tokenizer splits a text behind special tokens in another way: there is no prefix, but ids."""
    words = {"<unk>": 0, "\u2581Once": 1, "Once": 2, "\u2581upon": 3}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    model = make("llama")
    prompt = prompt_for(model, "soft")
    save_baked_checkpoint(model, prompt, tokenizer, tmp_path / "out")
    stock, new, told = read(tmp_path / "out")
    assert told["prefix"] is None
    assert "put ids before its token ids" in told["how_to_use"]
    row = new("Once upon")["input_ids"]
    assert row == [1, 3]
    with torch.no_grad():
        got = stock(torch.tensor([told["ids"] + row])).logits[0, 6:, :4]
        with prompt.attached(model):
            exact = model(torch.tensor([row])).logits[0, :, :4]
    assert relative(got, exact) < 1e-6


def test_a_full_disk_leaves_nothing(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    (tmp_path / "out").mkdir()

    def full(*_: Any) -> None:
        assert any(path.name == "model.safetensors" for path in tmp_path.rglob("*"))
        raise OSError("no space left")

    monkeypatch.setattr(mechanism, "write_json_atomic", full)
    with pytest.raises(OSError, match="no space left"):
        save_baked_checkpoint(model, prompt_for(model, "soft"), tokenizer, tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]
