"""Templates made from a tokenizer's chat template: the tokens that transformers gives, once."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ptengine.data import ClassificationTask, Template, Verbalizer, chat_template, load_rows
from ptengine.errors import InputError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKS = ["<s>", "<|im_start|>", "<|im_end|>"]

_EACH = "{% for m in messages %}"
CHATS = {
    "chatml": CHATML,
    "llama2": _EACH + "{% if m['role'] == 'system' %}{{ bos_token }}[INST] <<SYS>>\n{{ m['content'] }}\n<</SYS>>\n\n"
    "{% else %}{{ m['content'].strip() + ' [/INST]' }}{% endif %}{% endfor %}",
    "llama3": "{{ bos_token }}"
    + _EACH
    + "<|start|>{{ m['role'] }}<|end|>\n\n{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "<|start|>assistant<|end|>\n\n",
    "mistral": "{{ bos_token }}" + _EACH + "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}",
    "zephyr": _EACH + "{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}<|assistant|>\n",
    "gemma": "{{ bos_token }}"
    + _EACH
    + "{{ '<start_of_turn>' + m['role'] + '\n' + m['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}<start_of_turn>model\n",
    "phi": _EACH + "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}<|assistant|>\n",
}
TURNS = [
    "<|start|>",
    "<|end|>",
    "<|eot|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|user|>",
    "<|system|>",
    "<|assistant|>",
]


def tokenizer(chat: str | None = CHATML, *, bos: bool = False) -> PreTrainedTokenizerFast:
    """A token for every byte and mark; with `bos` the tokenizer puts <s> before every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={one: i for i, one in enumerate([*alphabet, *MARKS])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", len(alphabet))])
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", additional_special_tokens=MARKS[1:])
    made.chat_template = chat
    return made


def sentencepiece(scheme: str, chat: str, *, bos: bool) -> PreTrainedTokenizerFast:
    """As of Llama-2: pieces behind a blank written "▁", which `scheme` also puts before a text, and bytes for the rest.
    The turns' marks eat the blanks behind them, as those of Phi-3."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *map(chr, range(33, 127)), "▁", "▁n", "▁y"]
    core = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[("▁", "n"), ("▁", "y")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    marks = [AddedToken(mark, special=True, normalized=False, rstrip=True) for mark in TURNS]
    made.add_tokens(marks, special_tokens=True)
    made.chat_template = chat
    return made


def row_tokens(tokens: Any, template: Template, row: dict[str, Any]) -> list[int]:
    """Of the row's text; the label's word, one token, left out."""
    task = ClassificationTask(template, Verbalizer({"no": "n", "yes": "y"}))
    [encoded] = task.encode(load_rows([{**row, "label": "no"}]), tokens, max_tokens=500).rows
    return encoded.input_ids[:-1]


def stock_tokens(tokens: Any, messages: list[dict[str, str]], **options: Any) -> list[int]:
    return tokens.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **options)


@pytest.mark.parametrize("value", ["nice film", "{text} {{x}} {", "a\n\nb", "price: 5 % {% if %}"])
def test_rows_get_the_tokens_of_the_stock_chat(value: str) -> None:
    tokens = tokenizer()
    messages = [
        {"role": "system", "content": "Say {{y}} or n."},
        {"role": "user", "content": "First: {first}\nThen: {text}?"},
    ]
    template = chat_template(tokens, messages)
    filled = [
        {"role": "system", "content": "Say {y} or n."},
        {"role": "user", "content": f"First: 1\nThen: {value}?"},
    ]
    assert template.columns == ("first", "text")
    assert row_tokens(tokens, template, {"first": 1, "text": value}) == stock_tokens(tokens, filled)


def test_a_text_alone_is_the_users() -> None:
    tokens = tokenizer()
    assert chat_template(tokens, "{text}") == chat_template(tokens, [{"role": "user", "content": "{text}"}])


def test_a_bos_of_both_comes_once() -> None:
    tokens = tokenizer("<s>" + CHATML, bos=True)
    ids = row_tokens(tokens, chat_template(tokens, "{text}"), {"text": "hi"})
    assert ids == stock_tokens(tokens, [{"role": "user", "content": "hi"}])
    assert ids.count(tokens.bos_token_id) == 1


def test_a_bos_of_the_tokenizer_alone_stays() -> None:
    tokens = tokenizer(bos=True)
    ids = row_tokens(tokens, chat_template(tokens, "{text}"), {"text": "hi"})
    assert ids == [tokens.bos_token_id, *stock_tokens(tokens, [{"role": "user", "content": "hi"}])]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("scheme", ["first", "always", "never"])
@pytest.mark.parametrize("chat", CHATS)
def test_sentencepiece_chats_are_not_refused_for_what_comes_first(chat: str, scheme: str, bos: bool) -> None:
    """Metaspace puts a blank before a text, which the text behind a chat template's own BOS is not."""
    tokens = sentencepiece(scheme, CHATS[chat], bos=bos)
    template = chat_template(
        tokens, [{"role": "system", "content": "Be terse"}, {"role": "user", "content": "{a}\nthen {b}."}]
    )
    for value in ("nice [film]", "好 é", "  x", "\nx", "<s> t", ""):
        filled = [{"role": "system", "content": "Be terse"}, {"role": "user", "content": f"| {value}\nthen {value}."}]
        stock = stock_tokens(tokens, filled)
        if bos and stock[0] != tokens.bos_token_id:
            stock = [tokens.bos_token_id, *stock]
        assert row_tokens(tokens, template, {"a": f"| {value}", "b": value}) == stock


def test_virtual_tokens_and_a_cut_keep_the_place_behind_a_bos_of_the_template() -> None:
    tokens = sentencepiece("first", CHATS["mistral"], bos=True)
    task = ClassificationTask(chat_template(tokens, "{prompt:2}{text}"), Verbalizer({"no": "n", "yes": "y"}))
    rows = load_rows([{"text": "tttttttt", "label": "no"}])
    [row] = task.encode(rows, tokens, max_tokens=20, truncation=True).rows
    before = tokens("<s>[INST] ", add_special_tokens=False)["input_ids"]
    assert row.virtual_at == [len(before)] * 2
    assert row.input_ids[: len(before)] == before
    assert row.input_ids.count(tokens.bos_token_id) == 1
    assert len(row.input_ids) == 20


def test_places_of_virtual_tokens_stay_places() -> None:
    template = chat_template(tokenizer(), "{prompt:4}{text}{prompt:2}")
    assert template.num_virtual_tokens == 6
    assert template.text == "<|im_start|>user\n{prompt:4}{text}{prompt:2}<|im_end|>\n<|im_start|>assistant\n"


def test_braces_of_the_chat_template_are_text() -> None:
    tokens = tokenizer("{{ '{tool}' }}" + CHATML)
    assert row_tokens(tokens, chat_template(tokens, "{text}"), {"text": "hi"}) == stock_tokens(
        tokens, [{"role": "user", "content": "hi"}]
    )


def test_variables_reach_the_chat_template() -> None:
    tokens = tokenizer(CHATML + "{% if think %}hmm{% endif %}")
    assert chat_template(tokens, "{text}", think=True).text.endswith("assistant\nhmm")


@pytest.mark.parametrize(
    ("chat", "messages", "message"),
    [
        (None, "{text}", "expected a tokenizer with a chat template, got "),
        (CHATML, [], "got none"),
        (CHATML, [{"role": "user"}], "messages of a role and a content, both texts, got {'role': 'user'}"),
        (CHATML, [{"role": "user", "content": "{text}"}, {"role": "assistant", "content": "a"}], "got its own last"),
        (CHATML, "no column", "a template with a column in braces"),
        (CHATML, "{text", "a lone '{' at character 0 of the template '{text'"),
        ("{{ raise_exception('users only') }}", "{text}", "its error: users only"),
        ("{{ messages[0]['role'] }}", "{text}", "writes {text} once, got one that writes it 0 times"),
        (CHATML + "{{ messages[0]['content'] }}", "{text}", "writes {text} once, got one that writes it 2 times"),
    ],
)
def test_what_makes_no_chat_is_refused(chat: str | None, messages: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        chat_template(tokenizer(chat), messages)
    assert message in str(error.value)
