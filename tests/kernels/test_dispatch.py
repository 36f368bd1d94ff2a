"""Which backend a call takes: precedence, automatic choice, and refusals that say why."""

from __future__ import annotations

import pytest
import torch

from ptengine.kernels import dispatch
from ptengine.kernels.dispatch import explain, implementation, operations, register, resolve_backend
from ptengine.kernels.linear_cross_entropy import linear_cross_entropy
from ptengine.kernels.prefix_concat import prefix_concat

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operation without a kernel ("plain") and one with ("tiled"), beside the real ones."""
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    monkeypatch.setattr(dispatch, "_REGISTRY", {op: dict(entries) for op, entries in dispatch._REGISTRY.items()})
    for op in ("plain", "tiled"):
        register(op, "reference", lambda: "reference")
        register(op, "torch", lambda: "torch")
    register("tiled", "triton", lambda: "triton", devices=("cuda",))


def test_automatic_choice_is_torch_until_a_kernel_is_registered() -> None:
    assert resolve_backend(None, CPU, "plain") == "torch"
    assert resolve_backend(None, CUDA, "plain") == "torch"
    assert resolve_backend(None, CPU, "tiled") == "torch"
    assert resolve_backend(None, CUDA, "tiled") == "triton"


def test_automatic_choice_on_a_cpu_is_torch_even_where_triton_runs() -> None:
    """Triton's interpreter is for tests: it is taken when asked for, never by itself."""
    register("plain", "triton", lambda: "triton")
    assert resolve_backend(None, CPU, "plain") == "torch"
    assert resolve_backend("triton", CPU, "plain") == "triton"


def test_argument_wins_over_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.ENVIRONMENT, "reference")
    assert resolve_backend(None, CPU, "plain") == "reference"
    assert resolve_backend("torch", CPU, "plain") == "torch"


def test_empty_environment_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.ENVIRONMENT, "")
    assert resolve_backend(None, CPU, "plain") == "torch"


@pytest.mark.parametrize("op", ["plain"])
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_triton_without_a_kernel_is_refused(op: str, device: torch.device) -> None:
    with pytest.raises(ValueError, match=f"no Triton kernel is registered for {op}; expected one of 'reference', 'tor"):
        resolve_backend("triton", device, op)


def test_kernel_on_the_wrong_device_is_refused() -> None:
    with pytest.raises(ValueError, match="the triton implementation of tiled runs on 'cuda', not on cpu"):
        resolve_backend("triton", CPU, "tiled")
    assert resolve_backend("triton", CUDA, "tiled") == "triton"


def test_unknown_backend_names_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"backend='cuda': expected a backend of 'reference', 'torch', 'triton', got 'c"
    ):
        resolve_backend("cuda", CPU, "plain")
    monkeypatch.setenv(dispatch.ENVIRONMENT, "fast")
    with pytest.raises(ValueError, match="PTENGINE_BACKEND=fast: expected a backend of"):
        resolve_backend(None, CPU, "plain")


def test_unknown_operation_lists_the_known() -> None:
    for ask in (lambda: resolve_backend(None, CPU, "nothing"), lambda: explain("nothing", CPU)):
        with pytest.raises(ValueError, match=r"expected an imported operation .*'tiled'.*, got 'nothing'"):
            ask()
    assert {"plain", "tiled", "linear_cross_entropy", "prefix_concat"} <= set(operations())


def test_register_refuses_unknown_names_and_seconds() -> None:
    with pytest.raises(ValueError, match="expected a backend of"):
        register("plain", "cuda", lambda: None)
    with pytest.raises(ValueError, match="expected one 'torch' implementation of plain, got a second"):
        register("plain", "torch", lambda: None)


def test_implementation_is_what_was_registered() -> None:
    assert [implementation("tiled", name)() for name in dispatch.BACKENDS] == list(dispatch.BACKENDS)


def test_explain_says_path_and_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert explain("plain", CUDA) == (
        "plain on cuda: torch (chosen by device; no Triton kernel is registered for plain)"
    )
    assert explain("tiled", CUDA) == "tiled on cuda: triton (chosen by device)"
    monkeypatch.setenv(dispatch.ENVIRONMENT, "triton")
    assert explain("tiled", CUDA) == "tiled on cuda: triton (chosen by PTENGINE_BACKEND=triton)"
    assert explain("plain", CPU).startswith("plain on cpu: refused (PTENGINE_BACKEND=triton: no Triton kernel")


def test_environment_reaches_the_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.ENVIRONMENT, "triton")
    doubles = torch.zeros(1, 2).double(), torch.zeros(3, 2).double()  # which no kernel takes, on no device
    with pytest.raises(ValueError, match=r"PTENGINE_BACKEND=triton: .* linear_cross_entropy .*, got 'triton'"):
        linear_cross_entropy(*doubles, torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"PTENGINE_BACKEND=triton: .* prefix_concat .*, got 'triton'"):
        prefix_concat(torch.zeros(1, 1, 2), torch.zeros(1, 1, 1, 2, dtype=torch.float64))
