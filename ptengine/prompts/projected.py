"""A prompt of one backbone carried to another by a small trained network (Su et al. 2022, arXiv 2111.06719)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptengine.backbone.lowering import VirtualTokens
from ptengine.backbone.spec import backbone_spec
from ptengine.checks import check_whole
from ptengine.errors import InputError
from ptengine.prompts.base import Prompt
from ptengine.prompts.facts import BackboneFacts, backbone_facts
from ptengine.prompts.initialization import check_count, generator_from
from ptengine.prompts.registry import register
from ptengine.prompts.reparametrized import Reparametrized, fill_like_torch, fold_rows
from ptengine.prompts.soft_prompt import SoftPrompt

__all__ = ["ProjectedPrompt"]

SLOPE = 0.01
"""Of LeakyReLU, as PyTorch has it."""


@register("projected_prompt")
class ProjectedPrompt(Reparametrized):
    """P_t = s_t * (W_up LeakyReLU(W_down (P_s / s_s) + b_down) + b_up), row by row (section 5, the projector).

    P_s is a tuned prompt of a source backbone and does not change; both layers are trained on the source's own task
    with the target backbone ("task tuning" there). The projector can then carry further prompts of the source backbone
    (`project`). s_s and s_t, the standard deviations of the two tables of word embeddings, keep the network's numbers
    near 1, whatever the models' scales. `fold` (and so `save`) keeps P_t alone; ``save(folded=False)`` the projector.

    With `mapping` the network starts as that linear map, exactly: LeakyReLU(x) - LeakyReLU(-x) = 1.01 x.

    Args:
        model: the target backbone; read once, not kept.
        source: a tuned prompt of the source backbone that is or folds to a `SoftPrompt`.
        bottleneck_size: rows of W_down; None means twice the width of the source backbone.
        mapping: floating point [d_s, d_t], such as `ptengine.transfer.vocabulary_map` gives; needs a `bottleneck_size`
            of at least twice d_s. None starts the layers as PyTorch does.
        seed: of what starts at random.

    Attributes:
        source_rows: P_s, fp32 [P, d_s], not trained.
        down, up: the network.

    Raises:
        InputError: a source that is or folds to no `SoftPrompt`, a mapping of another shape or not finite, a size that
            is too small, or a prompt too long for the model.
        UnsupportedModelError: the model is of no supported type.
    """

    SETTINGS: ClassVar[tuple[str, ...]] = ("bottleneck_size", "source_backbone")

    source_rows: Tensor
    down: nn.Linear
    up: nn.Linear

    def __init__(
        self,
        model: Any,
        source: Prompt,
        *,
        bottleneck_size: int | None = None,
        mapping: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        spec, facts, rows = backbone_spec(model), backbone_facts(model), _rows(source)
        check_count(len(rows), spec)
        width = rows.shape[1]
        size = 2 * width if bottleneck_size is None else bottleneck_size
        settings = {"bottleneck_size": size, "source_backbone": source.facts.to_json()}
        self.check_settings(facts, settings)
        if mapping is not None:
            _check_mapping(mapping, width, facts.hidden_size, size)
        super().__init__(facts, len(rows), settings)
        fill_like_torch(self, generator_from(seed))
        with torch.no_grad():
            self.source_rows.copy_(rows)
            if mapping is not None:
                self._start_as(mapping.detach().to("cpu", torch.float64))
        self._finish(spec, transferred=mapping is not None)

    @classmethod
    def check_settings(cls, facts: BackboneFacts, settings: Mapping[str, Any]) -> None:
        check_whole("bottleneck_size", settings["bottleneck_size"])
        BackboneFacts.from_json(settings["source_backbone"])

    @property
    def source_facts(self) -> BackboneFacts:
        """The backbone whose prompts are carried."""
        return BackboneFacts.from_json(self.settings["source_backbone"])

    def project(self, prompt: Prompt) -> SoftPrompt:
        """Another prompt of the source backbone, carried by the network as it is now: a prompt of the target backbone.

        Raises:
            InputError: a prompt of another backbone, or one that is and folds to no `SoftPrompt`.
        """
        rows = _rows(prompt)
        prompt.facts.require_same(self.source_facts, "the prompt to carry")
        with torch.no_grad():
            return fold_rows(self.facts, self.project_rows(rows.to(self.source_rows)))

    def project_rows(self, rows: Tensor) -> Tensor:
        """Virtual tokens [P, d_s] of the source backbone to those of the target, [P, d_t]; differentiable."""
        hidden = F.leaky_relu(self.down(rows / self.source_facts.embedding_std), SLOPE)  # [P, m]
        return self.facts.embedding_std * self.up(hidden)  # [P, d_t]

    def lower_other(self, prompt: Prompt) -> VirtualTokens:
        """Another prompt of the source backbone as the target reads it; differentiable in the network."""
        device = self.source_rows.device
        with torch.autocast(device.type, enabled=False):
            return VirtualTokens(self.project_rows(_rows(prompt).to(self.source_rows)))

    def _build(self) -> None:
        size, width = self.settings["bottleneck_size"], self.source_facts.hidden_size
        self.register_buffer("source_rows", torch.empty(self.num_virtual_tokens, width))  # [P, d_s]
        self.down, self.up = nn.Linear(width, size), nn.Linear(size, self.facts.hidden_size)

    def compute(self) -> Tensor:
        return self.project_rows(self.source_rows)

    def _start_as(self, mapping: Tensor) -> None:
        """Let the network be `mapping`: hidden units in pairs x and -x, and the rest without a say at first."""
        width = mapping.shape[0]
        scaled = mapping.T * (self.source_facts.embedding_std / self.facts.embedding_std)  # [d_t, d_s]
        identity = torch.eye(width)
        self.down.weight[: 2 * width] = torch.cat([identity, -identity])
        self.down.bias.zero_()
        self.up.weight.zero_()
        self.up.weight[:, : 2 * width] = torch.cat([scaled, -scaled], dim=1).float() / (1 + SLOPE)
        self.up.bias.zero_()


def _rows(prompt: Any) -> Tensor:
    """The virtual tokens of a soft prompt, fp32 on the CPU."""
    if not isinstance(prompt, Prompt):
        raise InputError(f"expected a ptengine prompt to project, got {type(prompt).__name__}")
    folded = prompt.fold()
    if not isinstance(folded, SoftPrompt):
        raise InputError(f"expected a prompt that is or folds to a SoftPrompt to project, got {prompt.method!r}")
    rows = folded.embeds.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(rows).all()):
        raise InputError("expected a prompt of finite numbers to project, got NaN or infinity")
    return rows


def _check_mapping(mapping: Any, source: int, target: int, size: int) -> None:
    if not isinstance(mapping, Tensor) or mapping.shape != (source, target) or not mapping.is_floating_point():
        got = f"{mapping.dtype} {list(mapping.shape)}" if isinstance(mapping, Tensor) else type(mapping).__name__
        raise InputError(f"expected mapping, a floating point tensor [{source}, {target}], got {got}")
    if not bool(torch.isfinite(mapping).all()):
        raise InputError("expected a mapping of finite numbers, got NaN or infinity")
    if size < 2 * source:
        raise InputError(f"expected bottleneck_size of at least {2 * source} to start from a mapping, got {size}")
