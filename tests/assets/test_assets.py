"""The embedded backbone and data sets load offline, stay small, are what their cards say, and the model has learned."""

import json
import math
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptengine.assets import DatasetName, backbone_path, data_path

LICENCES = {
    "tinystories": "CDLA-Sharing-1.0",
    "wikitext2": "CC BY-SA 3.0",
    "dracula": "public domain",
    "frankenstein": "public domain",
    "tinyshakespeare": "public domain",
    "boolq": "CC BY-SA 3.0",
    "xquad_en": "CC BY-SA 4.0",
    "scitldr": "Apache-2.0",
    "sms_spam": "CC BY 4.0",
    "e2e_nlg": "CC BY-SA 4.0",
}


@pytest.fixture(scope="module")
def backbone() -> tuple[Any, Any]:
    path = backbone_path()
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True).eval()
    return model, tokenizer


def rows_of(name: DatasetName, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (data_path(name) / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_assets_are_small() -> None:
    folder = backbone_path().parent
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 12 * 2**20


def test_unknown_data_set_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"sms_spam, e2e_nlg.*'imdb'"):
        data_path("imdb")  # type: ignore[arg-type]


def test_default_load_gives_a_finite_fp32_model(backbone: tuple[Any, Any]) -> None:
    model, tokenizer = backbone
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.vocab_size == len(tokenizer) == 4096
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|endoftext|>", "<|endoftext|>", "<|pad|>",
    )  # fmt: skip
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("text", ["Call 09061743811 for £5000, ok?", "  two  blanks\nand a line", "naïve café 你好 🙂"])
def test_tokenizer_round_trip(backbone: tuple[Any, Any], text: str) -> None:
    tokenizer = backbone[1]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@torch.no_grad()
def test_perplexity_is_far_below_uniform(backbone: tuple[Any, Any]) -> None:
    model, tokenizer = backbone
    texts = [tokenizer.bos_token + row["text"] for row in rows_of("sms_spam", "validation")[:50]]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")  # [B, T]
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    perplexity = model(**batch, labels=labels).loss.exp().item()
    assert perplexity < model.config.vocab_size / 20


def test_card_names_every_corpus_with_its_licence() -> None:
    card = (backbone_path() / "README.md").read_text(encoding="utf-8")
    lines = ([cell.strip() for cell in line.split("|")] for line in card.splitlines() if line.startswith("|"))
    table = {cells[1]: cells for cells in lines}
    for name, licence in LICENCES.items():
        assert licence in table[name][4], f"{name}: expected {licence}, got {table[name][4]}"
        assert len(table[name][7].strip("`")) == 64, "a sha256 of the input file"
    assert set(table) - {"corpus", "---"} == set(LICENCES), "a corpus that nobody cleared"
    assert not [cells for cells in table.values() if cells[2].endswith(("test.jsonl`", "validation.jsonl`"))]


def test_training_log_improves() -> None:
    log = [json.loads(line) for line in (backbone_path() / "training_log.jsonl").read_text().splitlines()]
    losses = [entry["val_loss"] for entry in log if "val_loss" in entry]
    assert losses[-1] == min(losses), "only the best checkpoint is exported, so its log ends with the best loss"
    assert losses[-1] < math.log(4096) * 0.6


@pytest.mark.parametrize(
    ("name", "fields", "sizes"),  # the first field is the one that no two splits may share
    [
        ("sms_spam", ("text", "label"), {"train": 3000, "validation": 400, "test": 1000}),
        ("e2e_nlg", ("source", "target"), {"train": 2500, "validation": 55, "test": 300}),
    ],
)
def test_data_sets(name: DatasetName, fields: tuple[str, ...], sizes: dict[str, int]) -> None:
    rows = {split: rows_of(name, split) for split in sizes}
    assert {split: len(found) for split, found in rows.items()} == sizes
    assert all(set(fields) <= row.keys() for found in rows.values() for row in found)
    assert not {row[fields[0]] for row in rows["train"]} & {row[fields[0]] for row in rows["test"]}
    licence = (data_path(name) / "LICENSE.md").read_text(encoding="utf-8")
    assert LICENCES[name] in licence
    assert "creativecommons.org/licenses/" in licence
    assert all(str(size) in licence for size in sizes.values())
