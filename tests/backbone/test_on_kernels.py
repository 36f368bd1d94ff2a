"""The backbone's steps with the Triton kernels behind them, forced by PTENGINE_BACKEND as on a machine with a GPU.

Here they run in Triton's interpreter on a CPU. What they must equal is the stock model, row by row.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ptengine.backbone import generate, pack_rows, packed_loss, patched
from ptengine.commands.loading import import_operations
from ptengine.kernels.dispatch import ENVIRONMENT, explain, operations, resolve_backend

from .stock import CAUSAL, HIDE, make, parameters, prefix, random_rows, relative, stock_loss, virtual

triton_path = pytest.importorskip("ptengine.kernels.prefix_attention.triton_path", reason="needs Triton (Linux)")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter's run; a GPU takes the kernels anyway"
)

import_operations()  # which makes them known


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Force the kernels, and note which ran."""
    monkeypatch.setenv(ENVIRONMENT, "triton")
    names: list[str] = []
    for name in ("forward", "backward"):
        original = getattr(triton_path, name)

        def noted(*args: Any, _name: str = name, _original: Any = original) -> Any:
            names.append(_name)
            return _original(*args)

        monkeypatch.setattr(triton_path, name, noted)
    return names


def lowered(model: Any, kind: str, size: int = 6, seed: int = 0) -> Any:
    return virtual(size, seed) if kind == "soft" else prefix(model, size, seed)


@pytest.mark.parametrize("kind", ["soft", "prefix"])
@pytest.mark.parametrize("family", CAUSAL)
def test_loss_and_gradient_equal_the_stock_model(family: str, kind: str, launches: list[str]) -> None:
    model, rows = make(family), random_rows(9, 3, 14)
    labels = [[HIDE] * (len(row) - 2) + row[-2:] for row in rows]
    prompts = [lowered(model, kind, 6, 0), lowered(model, kind, 4, 1)]
    ids = [0, 1, 0]
    with patched(model):
        loss = packed_loss(model, prompts, pack_rows(rows, labels), prompt_ids=ids).loss
    wanted = [weight for prompt in prompts for weight in parameters(prompt)]
    got = torch.autograd.grad(loss, wanted)
    layers = model.config.num_hidden_layers
    assert launches[-2 * layers :] == ["forward"] * layers + ["backward"] * layers  # patching tries the model first
    exact = stock_loss(model, [prompts[i] for i in ids], rows, labels)
    assert abs(loss.item() - exact.item()) < 1e-5
    for ours, theirs in zip(got, torch.autograd.grad(exact, wanted), strict=True):
        assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize("kind", ["soft", "prefix"])
def test_generation_equals_the_pytorch_path(kind: str, launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill and single steps over a kept prefix, one prompt per row, one row without."""
    model, rows = make("llama"), random_rows(5, 8, 2)
    prompts = [lowered(model, kind, 6, 0), None, lowered(model, kind, 3, 1)]
    out = generate(model, prompts, rows, max_new_tokens=4, do_sample=False)
    assert "forward" in launches
    count = len(launches)
    monkeypatch.setenv(ENVIRONMENT, "torch")
    assert torch.equal(out, generate(model, prompts, rows, max_new_tokens=4, do_sample=False))
    assert len(launches) == count


@pytest.mark.parametrize("op", operations())
def test_a_gpu_takes_the_kernels_by_itself(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert resolve_backend(None, torch.device("cuda"), op, dtype=torch.float16) == "triton"
    assert "triton (chosen by device)" in explain(op, torch.device("cuda"))
