"""P-tuning v1 (Liu, Zheng, Du, Ding, Qian, Yang, Tang 2021, arXiv 2103.10385): pseudo tokens behind a small encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from ptengine.backbone.spec import backbone_spec
from ptengine.checks import check_whole
from ptengine.errors import InputError
from ptengine.prompts.facts import BackboneFacts, backbone_facts
from ptengine.prompts.initialization import DEFAULT_NUM_VIRTUAL_TOKENS, check_count, generator_from
from ptengine.prompts.registry import register
from ptengine.prompts.reparametrized import Reparametrized, fill_like_torch

__all__ = ["PTuning"]

ENCODERS = ("LSTM", "MLP")


@register("p_tuning")
class PTuning(Reparametrized):
    """P virtual tokens that an encoder makes of P pseudo tokens e_1 .. e_P (Liu et al. 2021).

    With the LSTM: h_i = MLP([LSTM_forward(e_1..e_i) : LSTM_backward(e_i..e_P)]), where the MLP is
    Linear(2h, 2h) - ReLU - Linear(2h, d). With the MLP alone, which is PEFT's default:
    h_i = Linear(h, d) ReLU Linear(h, h) ReLU Linear(d, h) e_i. Names and shapes are those of PEFT's PromptEncoder. The
    virtual tokens stand before the text, or, as in the paper, between its words where the task's template places them
    (`ptengine.data.Template`).

    The start is the authors': pseudo tokens standard normal, layers as PyTorch starts them. `fold` (and so `save`)
    drops the encoder and keeps the virtual tokens.

    Args:
        model: the frozen transformers model; read once, not kept.
        num_virtual_tokens: P, from 1 to one less than the positions of the model; None means 20.
        encoder_reparameterization_type: ``"LSTM"``, as in the paper, or ``"MLP"``.
        encoder_hidden_size: h; None means d/2 (rounded up) for the LSTM, so that both directions together are as wide
            as the model, and d for the MLP.
        encoder_num_layers: layers of the LSTM, None means 2 as in the paper; not for the MLP.
        seed: of pseudo tokens and encoder.

    Attributes:
        embedding: the pseudo tokens, weight fp32 [P, d].
        lstm_head, mlp_head: the encoder; `lstm_head` with the LSTM only.

    Raises:
        InputError: an argument has the wrong type or range, or would be ignored.
        UnsupportedModelError: the model is of no supported type.
    """

    SETTINGS: ClassVar[tuple[str, ...]] = (
        "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers",
    )  # fmt: skip

    embedding: nn.Embedding
    lstm_head: nn.LSTM
    mlp_head: nn.Sequential

    def __init__(
        self,
        model: Any,
        num_virtual_tokens: int | None = None,
        *,
        encoder_reparameterization_type: str = "LSTM",
        encoder_hidden_size: int | None = None,
        encoder_num_layers: int | None = None,
        seed: int = 0,
    ) -> None:
        spec = backbone_spec(model)
        count = check_count(DEFAULT_NUM_VIRTUAL_TOKENS if num_virtual_tokens is None else num_virtual_tokens, spec)
        generator = generator_from(seed)
        is_lstm = encoder_reparameterization_type == "LSTM"
        if encoder_hidden_size is None:
            encoder_hidden_size = -(-spec.hidden_size // 2) if is_lstm else spec.hidden_size
        if encoder_num_layers is None and is_lstm:
            encoder_num_layers = 2
        settings = {
            "encoder_reparameterization_type": encoder_reparameterization_type,
            "encoder_hidden_size": encoder_hidden_size,
            "encoder_num_layers": encoder_num_layers,
        }
        facts = backbone_facts(model)
        self.check_settings(facts, settings)
        super().__init__(facts, count, settings)
        fill_like_torch(self, generator)
        self._finish(spec)

    @classmethod
    def check_settings(cls, facts: BackboneFacts, settings: Mapping[str, Any]) -> None:
        kind, layers = settings["encoder_reparameterization_type"], settings["encoder_num_layers"]
        if kind not in ENCODERS:
            raise InputError(f"expected encoder_reparameterization_type, one of {', '.join(ENCODERS)}, got {kind!r}")
        check_whole("encoder_hidden_size", settings["encoder_hidden_size"])
        if kind == "LSTM":
            check_whole("encoder_num_layers", layers)
        elif layers is not None:
            raise InputError(f"expected no encoder_num_layers with the MLP, which has three layers, got {layers!r}")

    def _build(self) -> None:
        width, hidden = self.facts.hidden_size, self.settings["encoder_hidden_size"]
        self.embedding = nn.Embedding(self.num_virtual_tokens, width)
        if self.settings["encoder_reparameterization_type"] == "LSTM":
            layers = self.settings["encoder_num_layers"]
            self.lstm_head = nn.LSTM(width, hidden, layers, bidirectional=True, batch_first=True)
            self.mlp_head = nn.Sequential(
                nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width)
            )  # fmt: skip
        else:
            self.mlp_head = nn.Sequential(
                nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width)
            )

    def compute(self) -> Tensor:
        tokens = self.embedding.weight  # [P, d]
        if self.settings["encoder_reparameterization_type"] == "LSTM":
            tokens = self.lstm_head(tokens[None])[0][0]  # [P, 2h]
        embeds: Tensor = self.mlp_head(tokens)  # [P, d]
        return embeds
