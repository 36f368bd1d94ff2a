"""Where a step would keep the host waiting for a GPU, told on a CPU by the operations that read a size or a value back.

What a copy to the device costs does not show here.
"""

from __future__ import annotations

from collections import Counter
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertForSequenceClassification, BertModel

from ptengine.backbone import backbone_spec, patched
from ptengine.data import EmbeddingTask, load_rows
from ptengine.training.objective import make_objective

WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::_unique2", "aten::repeat_interleave.Tensor"}
FORWARD = "aten::native_layer_norm"  # the backbone's, of which the last ends its forward


class Waits(TorchDispatchMode):
    """Operations that wait, and how many of them came behind the backbone's last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.all: Counter[str] = Counter()
        self.behind: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        sized = name == "aten::repeat_interleave.Tensor" and (kwargs or {}).get("output_size") is not None
        if name == FORWARD:
            self.behind.clear()
        elif (name in WAITS and not sized) or picks_by_mask(func, args):
            self.all[name] += 1
            self.behind[name] += 1
        return func(*args, **(kwargs or {}))


def picks_by_mask(func: Any, args: Any) -> bool:
    """The size of what it picks is read back within the operation."""
    return func.name() == "aten::index.Tensor" and any(x is not None and x.dtype == torch.bool for x in args[1])


def counted(tiny: ModuleType, model: Any, task: Any, data: list[dict[str, Any]], method: str) -> Waits:
    """Of a training step's loss."""
    tokens, prompt = tiny.tokenizer(special=model.config.model_type == "bert"), getattr(tiny, method)(model)
    objective = make_objective(task, model, backbone_spec(model), tokens, False)
    batch = objective.collate(task.encode(load_rows(data), tokens, max_tokens=30).rows)
    with patched(model.eval().requires_grad_(False)), Waits() as waits:
        objective.loss(prompt, batch, 0.0)
    return waits


@pytest.mark.parametrize("method", ["soft", "prefix"])
def test_a_causal_step_reads_the_labels_places_back_and_no_more(tiny: ModuleType, method: str) -> None:
    """Sizes that the host knew were read back, too."""
    waits = counted(tiny, tiny.gpt2(), tiny.words_task(), tiny.rows(6), method)
    assert waits.all == {"aten::nonzero": 2, "aten::_unique2": 1}


@pytest.mark.parametrize("method", ["soft", "prefix"])
@pytest.mark.parametrize("kind", ["sequence", "embedding"])
def test_a_head_waited_for_the_forward(tiny: ModuleType, kind: str, method: str) -> None:
    """The head, the loss and the backward were launched on a GPU only once the backbone's forward was over."""
    texts = tiny.rows(6)
    if kind == "sequence":
        waits = counted(tiny, tiny.bert(BertForSequenceClassification), tiny.head_task(), texts, method)
    else:
        pairs = [{"text": row["text"], "text_pair": row["text"]} for row in texts]
        waits = counted(tiny, tiny.bert(BertModel), EmbeddingTask(), pairs, method)
    assert not waits.behind, waits.behind
