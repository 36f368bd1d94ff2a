"""PEFT's prompt methods by their `peft_type`: what each keeps in a checkpoint, and the numbers the model reads from it.

Every method here comes down to the rows of a soft prompt [P, d] or of a prefix [P, L*2*H_kv*D]. Knows tensors and the
fields of `adapter_config.json`; neither files nor models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ptengine.checks import check_number, check_whole
from ptengine.errors import InputError

__all__ = ["PREFIX_TYPES", "SOFT_TYPES", "multitask_tensors", "rows_of", "training_fields"]

SOFT_TYPES = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT")
PREFIX_TYPES = ("PREFIX_TUNING", "CARTRIDGE")

_PROMPT_KEY = "prompt_embeddings"
# How `PeftModel.state_dict()` names the parameters of a prompt's encoder, which `save_pretrained` leaves out.
_ENCODER_KEY = re.compile(r"(?:prompt_encoder\.[^.]+\.)?((?:embedding|delta_embedding|mlp_head|lstm_head)\..+)")


def rows_of(config: Mapping[str, Any], tensors: dict[str, Tensor], width: int, task_id: int | None) -> Tensor:
    """The rows that the model reads, fp32 [P, width]; the tensors they come from are taken out of `tensors`.

    Args:
        config: `adapter_config.json`, its peft_type one of `SOFT_TYPES` and `PREFIX_TYPES`.
        tensors: of `adapter_model.safetensors`.
        width: numbers of a row: d, or L*2*H_kv*D.
        task_id: for MULTITASK_PROMPT_TUNING, and only for it.

    Raises:
        InputError: a tensor is missing, too many, of another shape, or not floating point; a wrong `task_id`.
    """
    peft_type, count = config["peft_type"], config["num_virtual_tokens"]
    if (task_id is not None) != (peft_type == "MULTITASK_PROMPT_TUNING"):
        said = "needs task_id, got None" if task_id is None else f"has no tasks, got task_id={task_id!r}"
        raise InputError(f"{peft_type} {said}")
    if _PROMPT_KEY not in tensors and peft_type in ("P_TUNING", "CPT"):
        state = {match[1]: name for name in tensors if (match := _ENCODER_KEY.fullmatch(name))}
        encoder = {short: _floating(tensors.pop(name), name) for short, name in state.items()}
        if encoder:
            return _p_tuning(config, encoder, width) if peft_type == "P_TUNING" else _cpt(config, encoder, width)
    if _PROMPT_KEY not in tensors:
        raise InputError(f"expected {_PROMPT_KEY!r} among the checkpoint's tensors, got {sorted(tensors)}")
    rows = tensors.pop(_PROMPT_KEY)
    if list(rows.shape) != [count, width] or not rows.is_floating_point():
        raise InputError(
            f"expected {_PROMPT_KEY} floating point [{count}, {width}], got {rows.dtype} {list(rows.shape)}"
        )
    rows = rows.float()
    if peft_type == "MULTITASK_PROMPT_TUNING":
        return rows * _task_factor(tensors, count, width, task_id)
    return rows


def training_fields(peft_type: str, num_ranks: int, num_tasks: int) -> dict[str, Any]:
    """The fields of `adapter_config.json` that say how a prompt of this type would be trained on, as PEFT writes them.

    What a folded prompt does not know is what PEFT itself starts from.
    """
    if peft_type == "P_TUNING":
        return {
            "encoder_dropout": 0.0,
            "encoder_hidden_size": None,
            "encoder_num_layers": 2,
            "encoder_reparameterization_type": "MLP",
        }
    if peft_type == "CARTRIDGE":
        return {"num_frozen_tokens": 0}
    if peft_type == "PREFIX_TUNING":
        return {"init_weights": None, "prefix_projection": False}
    fields: dict[str, Any] = {
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    }
    if peft_type == "MULTITASK_PROMPT_TUNING":
        fields |= {
            "num_ranks": num_ranks,
            "num_tasks": num_tasks,
            "prompt_tuning_init_state_dict_path": None,
            "prompt_tuning_init_task": 0,
        }
    return fields


def multitask_tensors(prompts: Sequence[Tensor]) -> dict[str, Tensor]:
    """N prompts [P, d] as MULTITASK_PROMPT_TUNING: shared prompt 1, task columns I [N, P, P], task rows [N, P, d].

    The product 1 * (I @ rows) has the prompts' numbers exactly.
    """
    count, width = prompts[0].shape
    return {
        _PROMPT_KEY: torch.ones(count, width),
        "prefix_task_cols": torch.eye(count).expand(len(prompts), -1, -1).contiguous(),
        "prefix_task_rows": torch.stack([prompt.detach().float().cpu() for prompt in prompts]),
    }


def _task_factor(tensors: dict[str, Tensor], count: int, width: int, task_id: int | None) -> Tensor:
    """Columns times rows of one task, by which the shared prompt is multiplied (Wang et al. 2023, eq. 1): [P, d]."""
    missing = [name for name in ("prefix_task_cols", "prefix_task_rows") if name not in tensors]
    if missing:
        raise InputError(f"expected {missing[0]!r} among the checkpoint's tensors, got {sorted(tensors)}")
    cols = _floating(tensors.pop("prefix_task_cols"), "prefix_task_cols")
    rows = _floating(tensors.pop("prefix_task_rows"), "prefix_task_rows")
    got = [list(cols.shape), list(rows.shape)]
    if cols.dim() != 3 or rows.dim() != 3 or got != [[len(cols), count, cols.shape[2]], [*rows.shape[:2], width]]:
        raise InputError(f"expected prefix_task_cols [N, {count}, r] and prefix_task_rows [N, r, {width}], got {got}")
    if len(cols) != len(rows) or cols.shape[2] != rows.shape[1]:
        raise InputError(f"expected as many tasks and ranks in prefix_task_cols as in prefix_task_rows, got {got}")
    chosen = check_whole("task_id", task_id, 0, len(cols) - 1)
    return cols[chosen] @ rows[chosen]  # [P, r] @ [r, d]


@torch.no_grad()
def _p_tuning(config: Mapping[str, Any], state: dict[str, Tensor], width: int) -> Tensor:
    """What the encoder of P-tuning (Liu et al. 2021, arXiv 2103.10385) computes in eval mode: [P, d]."""
    count, kind = config["num_virtual_tokens"], config.get("encoder_reparameterization_type")
    if kind not in ("MLP", "LSTM"):
        raise InputError(f"expected encoder_reparameterization_type MLP or LSTM, got {kind!r}")
    hidden, depth = (check_whole(name, config.get(name)) for name in ("encoder_hidden_size", "encoder_num_layers"))
    # On the meta device nothing is drawn at random; the tensors are put in place below.
    with torch.device("meta"):
        encoder = nn.ModuleDict({"embedding": nn.Embedding(count, width)})
        if kind == "LSTM":
            encoder["lstm_head"] = nn.LSTM(width, hidden, depth, bidirectional=True, batch_first=True)
            encoder["mlp_head"] = _mlp([hidden * 2, hidden * 2, width])
        else:
            encoder["mlp_head"] = _mlp([width, hidden, hidden, width])
    _require_shapes(state, encoder.state_dict())
    encoder.load_state_dict(state, assign=True)
    hidden_rows = state["embedding.weight"][None]  # [1, P, d]
    if kind == "LSTM":
        hidden_rows = encoder["lstm_head"](hidden_rows)[0]  # [1, P, 2 * hidden]
    rows: Tensor = encoder["mlp_head"](hidden_rows)[0]  # [P, d]
    return rows


def _cpt(config: Mapping[str, Any], state: dict[str, Tensor], width: int) -> Tensor:
    """The context's embeddings plus what was learned, each token's part scaled down into its ball: [P, d].

    Blau et al. 2024 (arXiv 2410.17222), section 3.3, with the radii of PEFT: epsilon * sqrt(d / 2048) by the kind of
    the token, which is its type modulo 4: 1 and 3 are the format of the input and of the label, 2 is the input, and
    labels (0) do not move.
    """
    count = config["num_virtual_tokens"]
    _require_shapes(
        state, dict.fromkeys(("embedding.weight", "delta_embedding.weight"), torch.empty(count, width, device="meta"))
    )
    kinds = config.get("cpt_tokens_type_mask")
    if not isinstance(kinds, list) or len(kinds) != count or not all(isinstance(kind, int) for kind in kinds):
        raise InputError(f"expected cpt_tokens_type_mask, a list of {count} whole numbers, got {kinds!r}")
    unit = math.sqrt(width / 2048)
    in_input, in_format = (
        _positive(config, name) * unit for name in ("opt_projection_epsilon", "opt_projection_format_epsilon")
    )
    by_kind = [1e-10, in_format, in_input, in_format]
    radius = torch.tensor([by_kind[kind % 4] if kind > 0 else by_kind[0] for kind in kinds])  # [P]
    learned = state["delta_embedding.weight"]  # [P, d]
    length = learned.norm(dim=1)  # [P]
    return state["embedding.weight"] + learned * (radius / length.maximum(radius))[:, None]


def _mlp(sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers with ReLU between them, numbered as PEFT's are."""
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(pairwise(sizes)):
        layers += [nn.ReLU()] * bool(index) + [nn.Linear(inputs, outputs)]
    return nn.Sequential(*layers)


def _positive(config: Mapping[str, Any], name: str) -> float:
    return check_number(name, config.get(name))


def _floating(tensor: Tensor, name: str) -> Tensor:
    if not tensor.is_floating_point():
        raise InputError(f"expected {name} floating point, got {tensor.dtype}")
    return tensor.float()


def _require_shapes(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    shapes = {name: list(tensor.shape) for name, tensor in wanted.items()}
    got = {name: list(tensor.shape) for name, tensor in state.items()}
    if shapes != got:
        raise InputError(f"expected the prompt encoder's tensors {shapes}, got {got}")
