"""One of each prompt method that computes its virtual tokens, small, for the tests that hold for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ptengine.prompts import PTuning, ResidualPrompt, SuperPosPrompt

METHODS: dict[str, Callable[..., Any]] = {
    "p_tuning_lstm": lambda model, seed=0: PTuning(model, 5, encoder_hidden_size=6, seed=seed),
    "p_tuning_mlp": lambda model, seed=0: PTuning(
        model, 5, encoder_reparameterization_type="MLP", encoder_hidden_size=7, seed=seed
    ),
    "residual": lambda model, seed=0: ResidualPrompt(model, 5, bottleneck_size=6, seed=seed),
    "superpos": lambda model, seed=0: SuperPosPrompt(model, 5, num_sampled_tokens=9, seed=seed),
    "superpos_trained": lambda model, seed=0: SuperPosPrompt(
        model, 5, num_sampled_tokens=9, train_embeddings=True, seed=seed
    ),
}
