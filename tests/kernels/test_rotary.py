"""rotary_embedding: every backend against float64 and transformers; the kernel in the interpreter without a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ptengine.kernels import dispatch
from ptengine.kernels.dispatch import resolve_backend
from ptengine.kernels.launch import INTERPRETED
from ptengine.kernels.rotary import rotary_embedding, rotary_embedding_reference
from ptengine.kernels.rotary.tiles import tile

from .frozen_layer_cases import DEVICE, HALVES, PAIRS, check, check_rounded_once, forbid_launches, noise, poisoned, run

pytest.importorskip("triton")

from ptengine.kernels.rotary import triton_path

# The interpreter computes with numpy, which remarks on every NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
# N, H, H_kv, D, R
SHAPES = [
    (1, 1, 1, 2, 2),
    (5, 4, 2, 16, 16),
    (3, 6, 1, 24, 10),
    (4, 3, 5, 10, 6),
    (2, 32, 8, 128, 128),
    (2, 9, 9, 80, 32),
]


def inputs(
    tokens: int, heads: int, heads_kv: int, dim: int, turned: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """q, k, cos, sin. The halves of the angles differ, which a model's do not, and no pair is a unit vector."""
    shapes = [(tokens, heads, dim), (tokens, heads_kv, dim), (tokens, turned), (tokens, turned)]
    return [noise(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def stock(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """transformers', over the channels that are turned."""
    width = cos.shape[-1]
    turned = apply_rotary_pos_emb(q[..., :width], k[..., :width], cos, sin)
    new_q, new_k = (torch.cat([x, old[..., width:]], dim=-1) for x, old in zip(turned, (q, k), strict=True))
    return new_q, new_k


def exact(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    leaves = [x.detach().double().requires_grad_() for x in (q, k)]
    outs = rotary_embedding_reference(*leaves, cos.double(), sin.double())
    of_outs = [noise(*x.shape, seed=90 + i, dtype=q.dtype).double() for i, x in enumerate(outs)]
    return [*(x.detach() for x in outs), *torch.autograd.grad(outs, leaves, of_outs)]


@pytest.mark.parametrize(("backend", "dtype"), PAIRS, ids=str)
def test_against_float64(backend: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        x = inputs(*shape, dtype=dtype)
        with poisoned():
            got = run(rotary_embedding, x[:2], *x[2:], backend=backend)
        check(got, run(stock, x[:2], *x[2:]), exact(*x), outputs=2)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rounded_once(backend: str, dtype: torch.dtype) -> None:
    """With angles in float32 too, as rotary modules may give them."""
    q, k, cos, sin = inputs(6, 4, 2, 40, 32)
    x = [q.to(dtype), k.to(dtype), 1.0 + cos.abs(), 0.01 * sin]  # so small a sine leaves nothing to cancel
    got, truth = run(rotary_embedding, x[:2], *x[2:], backend=backend), exact(*x)
    check_rounded_once(got, truth)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_equals_transformers(backend: str) -> None:
    """q and k [B, H, T, D] of one projection, and the angles of positions, as a Llama layer has them."""
    batch, tokens, heads, heads_kv, dim = 2, 7, 4, 2, 16
    qkv = noise(batch, tokens, heads + 2 * heads_kv, dim, seed=1)
    frequencies = 10000.0 ** -(torch.arange(0, dim, 2, device=DEVICE) / dim)
    angles = torch.arange(tokens, device=DEVICE)[:, None] * frequencies
    cos, sin = (f(torch.cat([angles, angles], dim=-1))[None].expand(batch, -1, -1) for f in (torch.cos, torch.sin))
    q, k, _ = qkv.split((heads, heads_kv, heads_kv), dim=2)
    expected = run(
        lambda q, k: tuple(
            x.transpose(1, 2).flatten(0, 1)
            for x in apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        ),
        [q, k],
    )
    got = run(
        lambda q, k: rotary_embedding(
            q.flatten(0, 1), k.flatten(0, 1), cos.flatten(0, 1), sin.flatten(0, 1), backend=backend
        ),
        [q, k],
    )
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("turned", [16, 6])
def test_strided(turned: int) -> None:
    qkv = noise(5, 8, 16, seed=1)
    angles = noise(5, 2 * turned, seed=2)
    apart = noise(5, turned, 2, seed=3)
    cases = [
        (qkv[:, :4], qkv[:, 4:6], *angles.chunk(2, dim=1)),
        (qkv.transpose(0, 1)[:5, :4], qkv.transpose(0, 1)[:5, 4:5], angles[:, :turned], angles[:, :turned].clone()),
        (qkv.mT[:, :, :6], qkv.mT[:, 1:3, 2:], *apart.unbind(2)),
        (
            qkv[:, :4],
            qkv[:1, 4:5].expand(5, 3, 16),
            angles[:1, :turned].expand(5, -1),
            angles[:1, :turned].expand(5, -1),
        ),
    ]
    for q, k, cos, sin in cases:
        cos, sin = cos[..., : q.shape[2] // 2 * 2], sin[..., : q.shape[2] // 2 * 2]
        k = k[..., : q.shape[2]]
        leaves = [x.detach().requires_grad_() for x in (q, k)]
        dense = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in (q, k)]
        with poisoned():
            got = rotary_embedding(*leaves, cos, sin, backend="triton")
            expected = rotary_embedding(*dense, cos.contiguous(), sin.contiguous(), backend="triton")
        assert all(x.is_contiguous() for x in got)
        assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
        for order in ((0, 1, 2), (1, 0, 2), (2, 1, 0)):
            of_outs = [noise(*(x.shape[i] for i in order), seed=4 + x.shape[1]).permute(order) for x in got]
            with poisoned():
                mine = torch.autograd.grad(got, leaves, of_outs, retain_graph=True)
                theirs = torch.autograd.grad(expected, dense, [x.contiguous() for x in of_outs], retain_graph=True)
            assert all(torch.equal(*pair) for pair in zip(mine, theirs, strict=True))


def test_results_are_new() -> None:
    q, k, cos, sin = inputs(3, 2, 1, 8, 8)
    for backend in ("reference", "torch", "triton"):
        for out, x in zip(rotary_embedding(q, k, cos, sin, backend=backend), (q, k), strict=True):
            assert out.is_contiguous()
            assert out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_one_launch_each_way(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[tuple[int, ...]] = []
    kernel = triton_path.turn_kernel

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(triton_path, "turn_kernel", Counted())
    q, k, cos, sin = inputs(3, 12, 2, 64, 64)
    run(rotary_embedding, [q, k], cos, sin, backend="triton")
    assert len(launches) == 2


@pytest.mark.parametrize("one", [0, 1])
def test_gradient_through_one_result_alone(one: int) -> None:
    q, k, cos, sin = inputs(3, 4, 2, 16, 16)
    expected = run(rotary_embedding, [q, k], cos, sin, backend="triton")[2 + one]
    leaves = [q.requires_grad_(), k.requires_grad_()]
    out = rotary_embedding(q, k, cos, sin, backend="triton")[one]
    mine = torch.autograd.grad(out, leaves, noise(*out.shape, seed=90 + one))
    assert torch.equal(mine[one], expected)
    assert not mine[1 - one].any()


@pytest.mark.parametrize("shape", [(0, 4, 2, 8, 8), (3, 0, 2, 8, 8), (3, 4, 0, 8, 6), (3, 0, 0, 8, 8)])
def test_empty(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(*shape)
    expected = run(rotary_embedding, x[:2], *x[2:], backend="reference")
    if shape[0] == 0 or shape[1] == shape[2] == 0:
        forbid_launches(monkeypatch, triton_path, "turn_kernel")
    for backend in ("torch", "triton"):
        torch.testing.assert_close(run(rotary_embedding, x[:2], *x[2:], backend=backend), expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nan_stays_in_its_pair(backend: str) -> None:
    q, k, cos, sin = inputs(6, 5, 3, 12, 8)
    q[2, 4, 1], k[5, 0, 11], k[0, 2, 7] = torch.nan, torch.nan, torch.nan
    new_q, new_k = rotary_embedding(q, k, cos, sin, backend=backend)
    assert new_q.isnan().nonzero().tolist() == [[2, 4, 1], [2, 4, 5]]
    assert new_k.isnan().nonzero().tolist() == [[0, 2, 3], [0, 2, 7], [5, 0, 11]]


def test_same_bits() -> None:
    q, k, cos, sin = inputs(9, 5, 3, 32, 32)
    first = run(rotary_embedding, [q, k], cos, sin, backend="triton")
    second = run(rotary_embedding, [q, k], cos, sin, backend="triton")
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    with torch.no_grad(), torch.autocast(DEVICE, dtype=torch.bfloat16):
        third = rotary_embedding(q, k, cos, sin, backend="triton")
    assert all(torch.equal(*pair) for pair in zip(first, third, strict=False))


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_angles_are_constants(backend: str) -> None:
    q, k, cos, sin = inputs(3, 2, 1, 8, 8)
    out, _ = rotary_embedding(q.requires_grad_(), k, cos.requires_grad_(), sin, backend=backend)
    assert torch.autograd.grad(out.sum(), [q, cos], allow_unused=True)[1] is None


def test_keeps_the_angles_alone() -> None:
    q, k, cos, sin = inputs(3, 4, 2, 16, 16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        rotary_embedding(q.requires_grad_(), k, cos, sin, backend="triton")
    assert {t.data_ptr() for t in kept} == {cos.data_ptr(), sin.data_ptr()}


def test_second_derivative_is_an_error() -> None:
    q, k, cos, sin = inputs(3, 4, 2, 16, 16)
    out, _ = rotary_embedding(q.requires_grad_(), k, cos, sin, backend="triton")
    of_out = torch.ones_like(out, requires_grad=True)
    (gradient,) = torch.autograd.grad(out, q, of_out, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, cos, sin = inputs(3, 4, 2, 8, 6)
    for wrong in (q[0], q.long()):
        with pytest.raises(ValueError, match=r"expected q \[N, H, D\] in float64, .* got \["):
            rotary_embedding(wrong, k, cos, sin)
    for wrong in (k[0], k[:2], k[..., :6], k.half(), k.to("meta")):
        with pytest.raises(ValueError, match=r"expected k \[N = 3, H_kv, D = 8\] in torch.float32 on .* got \["):
            rotary_embedding(q, wrong, cos, sin)
    for wrong in (cos[0], cos[:2], cos[:, :5], cos[:, :0], cos.repeat(1, 2), cos[None], cos.to("meta")):
        with pytest.raises(ValueError, match=r"expected cos \[N = 3, R\] with R even, 2 to D = 8, on .* got \["):
            rotary_embedding(q, k, wrong, sin)
    with pytest.raises(ValueError, match=r"expected cos in float64, .* got torch.int64"):
        rotary_embedding(q, k, cos.long(), sin)
    for wrong in (sin[:, :4], sin.half(), sin.to("meta")):
        with pytest.raises(ValueError, match=r"expected sin as cos, \[3, 6\] in torch.float32 on .* got \["):
            rotary_embedding(q, k, cos, wrong)
    with pytest.raises(ValueError, match="expected a backend of"):
        rotary_embedding(q, k, cos, sin, backend="cuda")
    with pytest.raises(ValueError, match=r"triton implementation of rotary takes .* not float64"):
        rotary_embedding(q.double(), k.double(), cos, sin, backend="triton")
    if INTERPRETED:  # which would compute nonsense from them
        with pytest.raises(ValueError, match="takes no angles in bfloat16 here"):
            rotary_embedding(q, k, cos.bfloat16(), sin.bfloat16(), backend="triton")
    assert resolve_backend(None, torch.device("cuda"), "rotary", dtype=torch.float16) == "triton"
    monkeypatch.setattr(dispatch, "_WARNED", set())
    with pytest.warns(UserWarning, match="rotary takes the slower PyTorch path: .* not float64"):
        assert resolve_backend(None, torch.device("cuda"), "rotary", dtype=torch.float64) == "torch"


@pytest.mark.parametrize("turned", [16, 6])
def test_compiles_as_one_graph_without_the_kernel(turned: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    q, k, cos, sin = inputs(5, 4, 2, 16, turned)
    expected = run(rotary_embedding, [q, k], cos, sin, backend="torch")
    forbid_launches(monkeypatch, triton_path, "turn_kernel")
    compiled = torch.compile(rotary_embedding, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, [q, k], cos, sin, backend="triton"), expected)


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "gfx942", "interpreter"])
def test_tiles(name: str) -> None:
    for heads, dim, turned, itemsize in ((1, 2, 2, 2), (32, 128, 128, 2), (71, 80, 20, 4), (8, 2048, 2048, 4)):
        chosen = tile(name, heads, dim, turned, itemsize)
        assert chosen.half >= turned // 2
        assert chosen.rest >= dim - turned
        assert all(math.log2(size).is_integer() for size in (chosen.heads, chosen.half, chosen.rest, chosen.warps))
