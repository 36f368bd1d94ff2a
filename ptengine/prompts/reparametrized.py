"""What prompts share whose virtual tokens are computed from other parameters: lowering, folding, files, learning rate.

A method of this kind says which parameters it has (`_build`), what they start from, and how virtual tokens come out of
them (`compute`). Knows no formula of its own and no model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ptengine.backbone.lowering import VirtualTokens
from ptengine.backbone.spec import BackboneSpec
from ptengine.checks import check_number, check_whole
from ptengine.errors import InputError
from ptengine.prompts.base import Prompt
from ptengine.prompts.facts import BackboneFacts
from ptengine.prompts.initialization import RATE, rate_factor
from ptengine.prompts.soft_prompt import SoftPrompt

__all__ = [
    "Parametrized",
    "Reparametrized",
    "fill_like_torch",
    "fold_rows",
    "relative_rate",
]


class Parametrized(Prompt):
    """Base class of prompts whose parameters are built from settings, which their files hold.

    Attributes:
        settings: what, beside P and the backbone, decides the shapes of the parameters and the formula; json values.
    """

    SETTINGS: ClassVar[tuple[str, ...]] = ()
    settings: dict[str, Any]

    def __init__(self, facts: BackboneFacts, num_virtual_tokens: int, settings: Mapping[str, Any]) -> None:
        super().__init__(facts, num_virtual_tokens)
        self.settings = dict(settings)
        self._rate = 0.0
        # Built without memory or values, so that the global random state is neither read nor moved.
        with torch.device("meta"):
            self._build()
        if torch.get_default_device().type != "meta":
            self.to_empty(device="cpu")
            with torch.no_grad():
                for tensor in [*self.parameters(), *self.buffers()]:
                    tensor.zero_()

    @classmethod
    def check_settings(cls, facts: BackboneFacts, settings: Mapping[str, Any]) -> None:
        """Refuse settings that the method cannot be built with.

        Raises:
            InputError: naming the setting, what it may be and what came.
        """
        raise NotImplementedError

    def _build(self) -> None:
        """Make all parameters and buffers (fp32) from `facts`, `num_virtual_tokens` and `settings`, without values."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        return {"num_virtual_tokens": self.num_virtual_tokens, "default_learning_rate": self._rate, **self.settings}

    @classmethod
    def empty(cls, facts: BackboneFacts, config: dict[str, Any]) -> Self:
        wanted = {"num_virtual_tokens", "default_learning_rate", *cls.SETTINGS}
        if not isinstance(config, dict) or set(config) != wanted:
            raise InputError(f"expected a saved prompt's config with {', '.join(sorted(wanted))}, got {config!r}")
        count = check_whole("num_virtual_tokens", config["num_virtual_tokens"])
        rate = check_number("default_learning_rate", config["default_learning_rate"])
        settings = {name: config[name] for name in cls.SETTINGS}
        cls.check_settings(facts, settings)
        prompt = cls.__new__(cls)
        Parametrized.__init__(prompt, facts, count, settings)
        prompt._rate = rate
        return prompt

    def default_learning_rate(self) -> float:
        return self._rate

    def extra_repr(self) -> str:
        shown = {"num_virtual_tokens": self.num_virtual_tokens, "hidden_size": self.facts.hidden_size} | self.settings
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

    def _settle(self, spec: BackboneSpec, rate: float, transferred: bool) -> None:
        """Fix the learning rate of the filled prompt and put it on the device of the word embeddings.

        Args:
            spec: the backbone.
            rate: from a start that is not trained.
            transferred: whether the start is trained already, see `rate_factor`.
        """
        self._rate = rate * rate_factor(transferred)
        self.to(spec.word_embeddings.weight.device)


class Reparametrized(Parametrized):
    """Base class of prompts whose virtual tokens are a function of their parameters and of nothing else.

    `fold` keeps the virtual tokens alone, as a `SoftPrompt`; ``save(directory, folded=False)`` keeps what is trained.
    """

    def compute(self) -> Tensor:
        """The virtual tokens [P, d], differentiable with respect to every trainable parameter."""
        raise NotImplementedError

    def lower(self) -> VirtualTokens:
        device = next(self.parameters()).device
        # What computes the virtual tokens is part of the fp32 master, also where the backbone runs under autocast.
        with torch.autocast(device.type, enabled=False):
            return VirtualTokens(self.compute())

    def fold(self) -> Prompt:
        with torch.no_grad():
            return fold_rows(self.facts, self.lower().embeds)

    def default_learning_rate(self) -> float:
        """The rate at which a first Adam step lowers a loss as much as the default step of a `SoftPrompt` would.

        See `relative_rate`; fixed when the prompt is made. From a trained start a quarter of it.
        """
        return super().default_learning_rate()

    def _finish(self, spec: BackboneSpec, transferred: bool = False, rate: float | None = None) -> None:
        """Fix the learning rate of the filled prompt and put it on the device of the word embeddings.

        Args:
            spec: the backbone.
            transferred: whether the start is trained already, which wants a quarter of the rate.
            rate: in place of `relative_rate`, for a formula that its comparison does not fit.
        """
        self._settle(spec, relative_rate(self) if rate is None else rate, transferred)


def fold_rows(facts: BackboneFacts, rows: Tensor) -> SoftPrompt:
    """Virtual tokens [P, d] as a `SoftPrompt` of their own memory; it counts as trained."""
    folded = SoftPrompt.empty(facts, {"num_virtual_tokens": len(rows), "init": "prompt"})
    folded.embeds = nn.Parameter(rows.detach().clone(memory_format=torch.contiguous_format))
    return folded


@torch.enable_grad()
def relative_rate(prompt: Reparametrized) -> float:
    """A learning rate for Adam that suits the embedding scale, whatever parameters the virtual tokens come from.

    Adam moves every parameter by about the rate r, in the direction of its gradient's sign, so a step lowers a loss by
    r times the sum of the gradient's absolute values. For a loss linear in the virtual tokens with random normal
    weights, r is chosen so that this equals what a `SoftPrompt` gains at its own rate, 0.3 of the standard deviation of
    the word embeddings. It is at most 0.3 of the root mean square of any parameter that does not start at zero: beyond
    that the first step would not be small and the comparison would mean nothing.
    """
    factors = prompt.learning_rate_factors()
    named = {name: parameter for name, parameter in prompt.named_parameters() if parameter.requires_grad}
    embeds = prompt.lower().embeds  # [P, d]
    weights = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(0))  # [P, d]
    gradients = torch.autograd.grad((embeds * weights).sum(), list(named.values()))
    gain = sum(
        factors.get(name, 1.0) * float(gradient.abs().sum(dtype=torch.float64))
        for name, gradient in zip(named, gradients, strict=True)
    )
    rate = RATE * prompt.facts.embedding_std * float(weights.abs().sum(dtype=torch.float64)) / gain
    scales = [
        float(parameter.detach().square().mean().sqrt()) / factors.get(name, 1.0) for name, parameter in named.items()
    ]
    return min([rate, *(RATE * scale for scale in scales if scale > 0)])


def fill_like_torch(module: nn.Module, generator: torch.Generator) -> None:
    """Fill embeddings, linear layers, LSTMs and layer norms in `module` as PyTorch starts them, from `generator`.

    Embeddings are standard normal, a linear layer's weights and biases uniform within 1/sqrt(inputs), an LSTM's within
    1/sqrt(hidden size), a layer norm's weights one and biases zero.
    """
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, generator=generator)
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Linear | nn.LSTM):
            bound = 1 / math.sqrt(part.in_features if isinstance(part, nn.Linear) else part.hidden_size)
            for parameter in part.parameters():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
