"""P-tuning v1: the encoder is the paper's, in fp64, and PEFT's, name by name."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from peft import PromptEncoder, PromptEncoderConfig

from ptengine.errors import InputError
from ptengine.prompts import PTuning


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm(x, state, layer, suffix):
    """One direction of one layer over x [P, n]: hidden states [P, h]; gates in the order i, f, g, o."""
    w_x, w_h, b_x, b_h = (state[f"lstm_head.{kind}_l{layer}{suffix}"] for kind in
                          ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))  # fmt: skip
    hidden, cell, out = np.zeros(w_h.shape[1]), np.zeros(w_h.shape[1]), []
    for row in x:
        i, f, g, o = np.split(w_x @ row + b_x + w_h @ hidden + b_h, 4)
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
        hidden = sigmoid(o) * np.tanh(cell)
        out.append(hidden)
    return np.stack(out)


def mlp(x, state, *layers):
    for index in layers:
        x = x @ state[f"mlp_head.{index}.weight"].T + state[f"mlp_head.{index}.bias"]
        x = x if index == layers[-1] else np.maximum(x, 0)
    return x


@pytest.mark.parametrize("layers", [1, 2])
def test_the_lstm_encoder_is_the_formula_of_the_paper(gpt2, layers):
    prompt = PTuning(gpt2, 6, encoder_hidden_size=5, encoder_num_layers=layers)
    state = {name: tensor.double().numpy() for name, tensor in prompt.state_dict().items()}
    x = state["embedding.weight"]
    for layer in range(layers):
        x = np.concatenate([lstm(x, state, layer, ""), lstm(x[::-1], state, layer, "_reverse")[::-1]], axis=1)
    np.testing.assert_allclose(prompt.lower().embeds.detach().numpy(), mlp(x, state, 0, 2), rtol=1e-5, atol=1e-6)


def test_the_mlp_encoder_is_the_formula(gpt2):
    prompt = PTuning(gpt2, 6, encoder_reparameterization_type="MLP", encoder_hidden_size=5)
    state = {name: tensor.double().numpy() for name, tensor in prompt.state_dict().items()}
    wanted = mlp(state["embedding.weight"], state, 0, 2, 4)
    np.testing.assert_allclose(prompt.lower().embeds.detach().numpy(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["LSTM", "MLP"])
def test_it_is_pefts_encoder_name_by_name(gpt2, kind):
    prompt = PTuning(gpt2, 6, encoder_reparameterization_type=kind, encoder_hidden_size=5)
    peft = PromptEncoder(
        PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=6, token_dim=32, num_transformer_submodules=1,
            num_attention_heads=4, num_layers=2, encoder_reparameterization_type=kind, encoder_hidden_size=5,
        )
    )  # fmt: skip
    peft.load_state_dict(prompt.state_dict())
    torch.testing.assert_close(peft(torch.arange(6)[None])[0], prompt.lower().embeds)


def test_it_starts_as_the_authors_layers_do(make_model):
    prompt = PTuning(make_model("gpt2"), 60)
    assert prompt.settings == {
        "encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 16, "encoder_num_layers": 2,
    }  # fmt: skip
    assert float(prompt.embedding.weight.detach().std()) == pytest.approx(1, rel=0.1)
    for module, size in ((prompt.lstm_head, 16), (prompt.mlp_head[0], 32), (prompt.mlp_head[2], 32)):
        bound = 1 / math.sqrt(size)
        for name, tensor in module.named_parameters():
            assert 0.8 * bound < float(tensor.detach().abs().max()) <= bound, name
    assert PTuning(make_model("gpt2"), encoder_reparameterization_type="MLP").settings["encoder_hidden_size"] == 32


BAD = {
    "another encoder": ({"encoder_reparameterization_type": "GRU"}, "one of LSTM, MLP, got 'GRU'"),
    "no width": ({"encoder_hidden_size": 0}, "encoder_hidden_size, a whole number of at least 1, got 0"),
    "no layers": ({"encoder_num_layers": 0}, "encoder_num_layers, a whole number of at least 1, got 0"),
    "layers of the MLP": (
        {"encoder_reparameterization_type": "MLP", "encoder_num_layers": 2},
        "no encoder_num_layers with the MLP.*got 2",
    ),
    "negative seed": ({"seed": -1}, "seed, a whole number from 0 to 2\\*\\*63 - 1, got -1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error(gpt2, case):
    arguments, message = BAD[case]
    with pytest.raises(InputError, match=message):
        PTuning(gpt2, **arguments)
