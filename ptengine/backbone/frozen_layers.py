"""Runs the layers of a frozen Llama-like model on fused kernels: gated MLP and rotary embedding on ours, norms on
PyTorch's own, whose calls cost the host less. On a CPU, any model's products run on the library that
`frozen_products` chooses.

The stock modules compose them of some forty small operations a layer, which on a GPU cost as much time as half of the
matrix products and more of the host's than everything else together. Their results are the same up to rounding. The
replacement is each module's own `forward`, and asks at every call: where the kernels are not chosen (a CPU, a model
under torch.compile, PTENGINE_BACKEND), where weights are not frozen or dtypes are mixed, the stock one runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from ptengine.backbone.attention import KEYWORD, PrefixContext, packed_attention
from ptengine.backbone.frozen_products import ReplacedForward, fuse_products, is_fused
from ptengine.kernels.dispatch import resolve_backend
from ptengine.kernels.gated_activation import gated_activation
from ptengine.kernels.rotary import rotary_embedding

__all__ = ["fuse_layers"]

_FAMILIES = ("Llama", "Qwen3")  # the names of transformers' classes begin so
_SILU = ("SiLU", "SiLUActivation")  # torch's, and the one that some releases of transformers have


def fuse_layers(model: nn.Module) -> list[ReplacedForward]:
    """Replace the forward of every module that is known; returns what undoes it.

    A module whose forward somebody else has replaced (hooks that move weights do) is left alone.
    """
    known = {
        family + name: forward
        for family in _FAMILIES
        for name, forward in (("RMSNorm", _norm), ("MLP", _mlp), ("Attention", _attention))
    }
    replaced = []
    for module in model.modules():
        kind = type(module)
        forward = known.get(kind.__name__) if kind.__module__.startswith("transformers.models.") else None
        if forward is not None and "forward" not in vars(module):
            replaced.append(ReplacedForward(module, forward))
    return replaced + fuse_products(model)


def _chosen(x: Tensor, *modules: Any) -> bool:
    """Whether a call on x of modules with a weight, and perhaps a bias, runs on the kernels."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return False
    for module in modules:
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        trained = any(p is not None and p.requires_grad for p in (weight, bias))
        if weight is None or weight.dtype != x.dtype or trained:
            return False
    return resolve_backend(None, x.device, "gated_activation", dtype=x.dtype) == "triton"


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    """LlamaRMSNorm, Qwen3RMSNorm."""
    if not _chosen(hidden_states, self):
        return type(self).forward(self, hidden_states)
    return rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


def _mlp(self: Any, x: Tensor) -> Tensor:
    """LlamaMLP, Qwen3MLP."""
    if type(self.act_fn).__name__ not in _SILU or not _chosen(x, self.gate_proj, self.up_proj):
        return type(self).forward(self, x)
    flat = x.flatten(0, -2)  # [N, d]: of two dimensions a linear layer is one operation, of three it is four
    gate, up = _project(flat, self.gate_proj, self.up_proj)  # [N, inner] both
    out = self.down_proj(gated_activation(gate, up, "silu", backend="triton"))  # [N, d]
    return out.unflatten(0, x.shape[:-1])


def _attention(
    self: Any,
    hidden_states: Tensor,  # [1, N, d] in a packed call
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """LlamaAttention, Qwen3Attention in a packed call; every other call is theirs."""
    context: PrefixContext | None = kwargs.get(KEYWORD)
    projections = (self.q_proj, self.k_proj, self.v_proj)
    packed = context is not None and context.cu_seqlens is not None and past_key_values is None
    if not packed or not _chosen(hidden_states, *projections):
        return type(self).forward(
            self, hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask,
            past_key_values=past_key_values, **kwargs,
        )  # fmt: skip
    assert context is not None
    assert position_embeddings is not None
    q, k, v = (x.unflatten(1, (-1, self.head_dim)) for x in _project(hidden_states.squeeze(0), *projections))
    if hasattr(self, "q_norm"):  # Qwen3, over each head
        q, k = self.q_norm(q), self.k_norm(k)
    cos, sin = (x.squeeze(0) for x in position_embeddings)  # [N, D]
    q, k = rotary_embedding(q, k, cos, sin, backend="triton")  # [N, H, D], [N, H_kv, D]
    dropout = self.attention_dropout if self.training else 0.0
    window = getattr(self, "sliding_window", None)  # of Qwen3's sliding layers
    out = packed_attention(self, q, k, v, context, self.scaling, dropout, window)  # [N, H, D]
    return self.o_proj(out.flatten(1))[None], None


def _project(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """Each layer's result on x [N, d]; of plain linear layers the gradient of x is summed as it is computed."""
    if all(type(layer) is nn.Linear and not _hooked(layer) for layer in layers):
        parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
        projected: tuple[Tensor, ...] = _Projections.apply(x, *parameters)
        return projected
    return tuple(layer(x) for layer in layers)


def _hooked(layer: nn.Module) -> bool:
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return ("forward" in vars(layer) and not is_fused(layer)) or any(hooks)


class _Projections(torch.autograd.Function):
    """Frozen linear layers that share their input: x [N, d] and of each layer weight [out, d] and bias [out] or None.

    Autograd would add the gradients that x receives from them in passes of their own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        # Without a `setup_context`: with one, every call binds its arguments to a signature first.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*parameters[::2])
        pairs = zip(parameters[::2], parameters[1::2], strict=True)
        return tuple(torch.nn.functional.linear(x, weight, bias) for weight, bias in pairs)  # type: ignore[arg-type]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        total: Tensor | None = None
        for grad, weight in zip(grads, ctx.saved_tensors, strict=True):
            if grad is not None:
                total = grad @ weight if total is None else total.addmm_(grad, weight)  # [N, out] @ [out, d]
        return (total, *[None] * (2 * len(grads)))
