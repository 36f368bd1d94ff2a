"""A prompt with a classification head of its own, so that many tasks with heads can share one model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Self

import torch
from torch import Tensor, nn

from ptengine.backbone.attached import AttachedModel
from ptengine.backbone.heads import task_head
from ptengine.backbone.lowering import LoweredPrompt
from ptengine.backbone.spec import backbone_spec
from ptengine.errors import InputError
from ptengine.prompts.base import Prompt
from ptengine.prompts.facts import BackboneFacts, backbone_facts
from ptengine.prompts.registry import prompt_class, register

__all__ = ["HEAD_PREFIX", "HeadedPrompt", "without_head"]

HEAD_PREFIX = "head."
"""What the names of the head's parameters begin with; they learn at `TrainingConfig.head_learning_rate`."""


@register("headed_prompt")
class HeadedPrompt(Prompt):
    """A prompt of any method, and weights that take the place of those of the model's head wherever it is used.

    A task such as `SequenceClassificationTask` trains a head beside the prompt (P-tuning v2, Liu et al. 2021, arXiv
    2110.07602, section 3.3). In `Trainer` that is the model's own, which the run changes. With a `HeadedPrompt` nothing
    of the model changes: prompts of many tasks, customers and seeds live beside each other on one model, train in one
    `PromptSet`, lie in a bank and transfer, head and all. Logits and gradients are those of the model with this head.

    Args:
        model: an encoder with a head (`AutoModelForSequenceClassification`, ``...ForTokenClassification`` or
            ``...ForQuestionAnswering``); read once, not kept.
        prompt: the prompt; its own parameters are trained, no copies.
        labels: the task's labels in order, which are those of the head's outputs; () for question answering.
        head: name of each parameter of the model's head to its weights; None starts as the family does, by `seed`.
        seed: of a head that is made new.

    Attributes:
        prompt: as given.
        labels: as given.
        head: the parameters, fp32, by name with ``/`` for ``.``.

    Raises:
        InputError: the model has no such head, the prompt is of another backbone or has a head already, or `head` has
            other names or shapes than the model's.
    """

    prompt: Prompt
    head: nn.ParameterDict

    def __init__(
        self,
        model: Any,
        prompt: Prompt,
        labels: Sequence[str],
        *,
        head: Mapping[str, Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(prompt, Prompt) or isinstance(prompt, HeadedPrompt):
            raise InputError(f"expected a prompt without a head, got {type(prompt).__name__}")
        named = isinstance(labels, Sequence) and not isinstance(labels, str)
        if not named or not all(isinstance(label, str) for label in labels):
            raise InputError(f"expected labels, a list of names, got {labels!r}")
        prompt.facts.require_same(backbone_facts(model), "the prompt")
        spec = backbone_spec(model)
        own = {} if spec.kind != "encoder" or spec.lm_head is not None else task_head(model)
        if not own:
            raise InputError(
                "expected an encoder with a classification head (AutoModelForSequenceClassification), "
                f"got {type(model).__name__}"
            )
        wanted = {name: list(parameter.shape) for name, parameter in own.items()}
        got = wanted if head is None else {name: list(tensor.shape) for name, tensor in head.items()}
        if got != wanted:
            raise InputError(f"expected a head with {wanted} as in the model, got {got}")
        self._set_up(prompt, tuple(labels), _new_head(model, own, seed) if head is None else head)
        self.to(spec.word_embeddings.weight.device)

    def _set_up(self, prompt: Prompt, labels: tuple[str, ...], head: Mapping[str, Tensor]) -> None:
        Prompt.__init__(self, prompt.facts, prompt.num_virtual_tokens)
        self.prompt = prompt
        self.labels = labels
        self.max_text_length = prompt.max_text_length
        weights = {name.replace(".", "/"): nn.Parameter(_master(tensor)) for name, tensor in head.items()}
        self.head = nn.ParameterDict(weights)

    @property
    def num_positions(self) -> int:
        return self.prompt.num_positions

    def head_weights(self) -> dict[str, nn.Parameter]:
        """The head's parameters by the names that they have in the model."""
        return {name.replace("/", "."): parameter for name, parameter in self.head.items()}

    @torch.no_grad()
    def install_head(self, model: Any) -> None:
        """Copy the head into `model`, in place, for stock calls: ``with prompt.prompt.attached(model): model(...)``.

        Raises:
            InputError: the model's head has other names or shapes; the model is then as it was.
        """
        own = task_head(model)
        wanted = {name: list(parameter.shape) for name, parameter in own.items()}
        got = {name: list(parameter.shape) for name, parameter in self.head_weights().items()}
        if got != wanted:
            raise InputError(f"expected a model with the head {got}, got {wanted}")
        for name, parameter in self.head_weights().items():
            own[name].copy_(parameter)

    def lower(self) -> LoweredPrompt:
        return self.prompt.lower()

    def fold(self) -> HeadedPrompt:
        return self.around(self.prompt.fold())

    def around(self, prompt: Prompt) -> HeadedPrompt:
        """`prompt`, of the same backbone, with a copy of this head."""
        folded = HeadedPrompt.__new__(HeadedPrompt)
        folded._set_up(prompt, self.labels, {name: p.detach().clone() for name, p in self.head_weights().items()})
        return folded

    def config(self) -> dict[str, Any]:
        return {
            "prompt": {"method": self.prompt.method, "config": self.prompt.config()},
            "labels": list(self.labels),
            "head": {name: list(parameter.shape) for name, parameter in self.head_weights().items()},
        }

    @classmethod
    def empty(cls, facts: BackboneFacts, config: dict[str, Any]) -> Self:
        inner, labels, shapes = _described(config)
        prompt = cls.__new__(cls)
        zeros = {name: torch.zeros(shape) for name, shape in shapes.items()}
        prompt._set_up(prompt_class(inner["method"]).empty(facts, inner["config"]), labels, zeros)
        return prompt

    def default_learning_rate(self) -> float:
        """That of the prompt; the head has `TrainingConfig.head_learning_rate`."""
        return self.prompt.default_learning_rate()

    def learning_rate_factors(self) -> dict[str, float]:
        return {f"prompt.{name}": factor for name, factor in self.prompt.learning_rate_factors().items()}

    def attached(self, model: Any, *, freeze: bool = True) -> AbstractContextManager[AttachedModel]:
        """Refused: stock calls read the model's own head. `install_head` first, then attach `prompt`."""
        raise InputError(
            "expected a prompt without a head of its own to attach, since stock calls read the model's head: call "
            "install_head(model), then attach .prompt"
        )


def without_head(prompt: Prompt) -> Prompt:
    """The prompt inside a `HeadedPrompt`; any other as it is."""
    return prompt.prompt if isinstance(prompt, HeadedPrompt) else prompt


def _master(tensor: Tensor) -> Tensor:
    """fp32, in memory of its own."""
    return tensor.detach().to(torch.float32, copy=True)


def _new_head(model: Any, own: Mapping[str, nn.Parameter], seed: int) -> dict[str, Tensor]:
    """The head's parameters as its family starts them, from a generator of their own."""
    tops = dict.fromkeys(name.split(".", 1)[0] for name in own)
    head = {top: copy.deepcopy(getattr(model, top)).cpu() for top in tops}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part in head.values():
            for module in part.modules():
                model._init_weights(module)
    found = {f"{top}.{name}": p for top, part in head.items() for name, p in part.named_parameters()}
    return {name: found[name].detach() for name in own}


def _described(config: Any) -> tuple[dict[str, Any], tuple[str, ...], dict[str, list[int]]]:
    """The parts of a saved `config`, checked."""
    found = config if isinstance(config, dict) else {}
    inner, labels, shapes = found.get("prompt"), found.get("labels"), found.get("head")
    if (
        isinstance(inner, dict)
        and set(inner) == {"method", "config"}
        and inner["method"] != "headed_prompt"
        and isinstance(labels, list)
        and all(isinstance(label, str) for label in labels)
        and isinstance(shapes, dict)
        and all(
            isinstance(shape, list) and all(type(size) is int and size > 0 for size in shape)
            for shape in shapes.values()
        )
    ):
        return inner, tuple(labels), shapes
    raise InputError(f"expected a saved prompt's config with prompt, labels and head, got {config!r}")
