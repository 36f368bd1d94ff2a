"""LLaMA-Adapter (Zhang et al. 2023, arXiv 2303.16199): tokens per layer, attended to apart, behind a gate from zero."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ptengine.backbone.gated import check_gated
from ptengine.backbone.lowering import GatedTokens
from ptengine.backbone.spec import backbone_spec
from ptengine.checks import check_whole
from ptengine.errors import InputError
from ptengine.prompts.facts import BackboneFacts, backbone_facts
from ptengine.prompts.initialization import check_count, generator_from
from ptengine.prompts.registry import register
from ptengine.prompts.reparametrized import Parametrized

__all__ = ["LlamaAdapter"]

NUM_VIRTUAL_TOKENS = 10  # of the paper
GATINGS = ("layer", "head_tanh")


@register("llama_adapter")
class LlamaAdapter(Parametrized):
    """o = softmax(q K^T s) V + g softmax(q (P W_k)^T s) (P W_v) in each of the A topmost layers, before W_o.

    P [P, d] are the layer's own tokens, W_k and W_v its frozen projections, g its gate, which starts at zero: at first
    the model is the frozen one. q is rotated, the tokens' keys are not: they have no position, and the text begins at
    position 0. Projections keep their biases, and keys that a layer normalises (Qwen3) are normalised. In the paper and
    in PEFT (ADAPTION_PROMPT) g is one trained number per layer; the authors' code has the tanh of one per head. `fold`
    is a copy: there is nothing to fold.

    Args:
        model: a frozen causal transformers model of the types gemma, granite, llama, mistral, qwen2, qwen3 and
            smollm3; read once, not kept.
        num_virtual_tokens: P; None means 10, as in the paper.
        num_adapter_layers: A, counted from the top; None means all but the lowest two (as the paper's 30 of 32), at
            least one.
        gating: ``"layer"``: g is a number per layer. ``"head_tanh"``: g = tanh(x), a number x per layer and head.
        seed: of the tokens, which start standard normal as in the authors' code.

    Attributes:
        tokens: fp32 [A, P, d], the lowest adapted layer first.
        gates: fp32 [A, 1], or [A, H] with ``"head_tanh"``: before the tanh.

    Raises:
        InputError: an argument has the wrong type or range.
        UnsupportedModelError: the model is of no supported type, or of one whose projections are not known to be P W_k
            and P W_v.
    """

    SETTINGS: ClassVar[tuple[str, ...]] = ("num_adapter_layers", "gating")
    # Of the paper, for AdamW. The tokens meet projections that read normalised states, so their scale is one, not that
    # of the word embeddings.
    RATE: ClassVar[float] = 9e-3

    tokens: nn.Parameter
    gates: nn.Parameter

    def __init__(
        self,
        model: Any,
        num_virtual_tokens: int | None = None,
        *,
        num_adapter_layers: int | None = None,
        gating: str = "layer",
        seed: int = 0,
    ) -> None:
        spec = backbone_spec(model)
        count = check_count(NUM_VIRTUAL_TOKENS if num_virtual_tokens is None else num_virtual_tokens, spec)
        generator, facts = generator_from(seed), backbone_facts(model)
        if num_adapter_layers is None:
            num_adapter_layers = max(facts.num_layers - 2, 1)
        settings = {"num_adapter_layers": num_adapter_layers, "gating": gating}
        self.check_settings(facts, settings)
        super().__init__(facts, count, settings)
        check_gated(spec, self.lower())
        with torch.no_grad():
            self.tokens.copy_(torch.randn(self.tokens.shape, generator=generator))
        self._settle(spec, self.RATE, transferred=False)

    @classmethod
    def check_settings(cls, facts: BackboneFacts, settings: Mapping[str, Any]) -> None:
        layers = check_whole("num_adapter_layers", settings["num_adapter_layers"])
        if layers > facts.num_layers:
            raise InputError(f"expected num_adapter_layers of at most {facts.num_layers}, got {layers}")
        if settings["gating"] not in GATINGS:
            raise InputError(f"expected gating, one of {', '.join(GATINGS)}, got {settings['gating']!r}")

    def _build(self) -> None:
        layers, facts = self.settings["num_adapter_layers"], self.facts
        heads = 1 if self.settings["gating"] == "layer" else facts.num_heads
        self.tokens = nn.Parameter(torch.empty(layers, self.num_virtual_tokens, facts.hidden_size))  # [A, P, d]
        self.gates = nn.Parameter(torch.empty(layers, heads))  # [A, 1] or [A, H]

    @property
    def num_positions(self) -> int:
        """None: the tokens stand beside the text, not before it."""
        return 0

    @property
    def layers(self) -> tuple[int, ...]:
        """The adapted layers, ascending."""
        return tuple(range(self.facts.num_layers - self.settings["num_adapter_layers"], self.facts.num_layers))

    def lower(self) -> GatedTokens:
        return GatedTokens(self.layers, self.tokens, self._gates().expand(-1, self.facts.num_heads))  # [A, H]

    def fold(self) -> Self:
        """A copy that shares no memory with this prompt."""
        return copy.deepcopy(self)

    def default_learning_rate(self) -> float:
        """9e-3, as in the paper: the tokens' scale is one whatever the scale of the word embeddings."""
        return super().default_learning_rate()

    def _gates(self) -> Tensor:
        return self.gates if self.settings["gating"] == "layer" else torch.tanh(self.gates)
