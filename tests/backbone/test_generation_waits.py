"""Where a written token would keep the host waiting for a GPU behind an attached prompt, told on a CPU."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ptengine.prompts import DecomposedPrompt, LlamaAdapter, Prefix, PTuning, SoftPrompt

from ..training.test_host_waits import WAITS
from .stock import make
from .test_families import make as make_other

PROMPTS = {
    "soft": SoftPrompt,
    "prefix": Prefix,
    "P-tuning": PTuning,
    "adapter": LlamaAdapter,
    "offsets": DecomposedPrompt,
}
# The search's look at what has ended and the prompt's comparison with what it was lowered from. The batch's layout is
# read back, too, once, by `tolist`, which is no operation.
A_TOKEN = {"aten::_local_scalar_dense": 2}


class _Waits(TorchDispatchMode):
    """What reads a value back, and tensors that the host writes, which a copy to the device would wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in WAITS | {"aten::equal", "aten::lift_fresh"}:
            self.found[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("side", ["padded", "even"])
@pytest.mark.parametrize(("family", "kind"), [("llama", kind) for kind in PROMPTS] + [("bloom", "soft")])
def test_a_token_behind_an_attached_prompt_waited_for_every_tensor_of_it(family: str, kind: str, side: str) -> None:
    """And for lengths, masks and padding that were read back, or made on the device, anew for every token."""
    model = make("llama") if family == "llama" else make_other(family)
    ids = torch.tensor([[2, 2, 5, 6, 7] if side == "padded" else [9, 8, 5, 6, 7], [5, 6, 7, 8, 9]])
    settings = {"do_sample": False, "pad_token_id": 2, "eos_token_id": 1, "attention_mask": (ids != 2).long()}
    counts = []
    with PROMPTS[kind](model, 5).attached(model):
        for new in (1, 3, 7):  # the first call computes what the others keep
            with _Waits() as waits:
                model.generate(ids, max_new_tokens=new, min_new_tokens=new, **settings)
            counts.append(waits.found)
    more = {name: (count - counts[1][name]) / 4 for name, count in counts[2].items()}
    assert {name: count for name, count in more.items() if count} == A_TOKEN
