"""Templates in the form that an instruction-tuned model was trained on: its tokenizer's chat template.

Knows tokenizers and templates; no task and no data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ptengine.data.templates import Part, Template, split_template
from ptengine.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["chat_template"]


def chat_template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]] | str, **options: Any
) -> Template:
    """`messages`, whose contents may have the placeholders of a `Template`, as `tokenizer` writes them for its model,
    up to where the assistant's answer begins::

        chat_template(tokenizer, "Is this review good or bad?\\n{text}")
        chat_template(tokenizer, [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "{text}"}])

    Rows get the tokens of ``tokenizer.apply_chat_template(messages, add_generation_prompt=True)`` with their values in
    the messages, untrimmed; only a BOS that the tokenizer puts before every text, and the chat template does not,
    comes before them. Label words and targets follow at once, mostly without a blank before them. A date that the chat
    template writes is that of this call, and stays. A mark such as ``<|im_end|>`` in a row's value is read as that
    mark, as by transformers.

    Args:
        tokenizer: with a chat template.
        messages: roles and contents, the last not the assistant's; or the content of one message by the user.
        options: further variables of the chat template, such as ``enable_thinking=False``.

    Returns:
        The template, with the columns that the messages name.

    Raises:
        InputError: the tokenizer has no chat template; messages of another form; a chat template that refuses them,
            leaves one of their placeholders out, or repeats it; whatever `Template` refuses.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(f"expected a tokenizer with a chat template, got {type(tokenizer).__name__} without one")
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    for turn in turns:
        if not (isinstance(turn, Mapping) and all(isinstance(turn.get(key), str) for key in ("role", "content"))):
            raise InputError(f"expected messages of a role and a content, both texts, got {turn!r}")
    if not turns or turns[-1]["role"] == "assistant":
        got = "its own last" if turns else "none"
        raise InputError(f"expected messages that the assistant is to answer, got {got}")
    marks: dict[str, str] = {}  # what stands in for a placeholder: the placeholder
    marked = [{**turn, "content": _marked(turn["content"], marks)} for turn in turns]
    try:
        text: Any = tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True, **options)
    except Exception as error:  # jinja2's own, or whatever a template raises
        raise InputError(f"expected messages that the chat template takes, got its error: {error}") from error
    text = text.replace("{", "{{").replace("}", "}}")
    for mark, placeholder in marks.items():
        times = text.count(mark)
        if times != 1:
            raise InputError(
                f"expected a chat template that writes {placeholder} once, got one that writes it {times} times"
            )
        text = text.replace(mark, placeholder)
    return Template(text)


def _marked(content: str, marks: dict[str, str]) -> str:
    """`content` as plain text, with a mark of no text's for every placeholder, which chat templates neither trim nor
    read as braces."""
    return "".join(part.text if part.kind == "text" else _mark(part, marks) for part in split_template(content))


def _mark(part: Part, marks: dict[str, str]) -> str:
    written = {"column": part.text, "mask": "mask", "prompt": f"prompt:{part.size}"}[part.kind]
    mark = f"\ue000{len(marks)}\ue001"
    marks[mark] = f"{{{written}}}"
    return mark
