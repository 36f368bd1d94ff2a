"""An attached prompt under torch.compile, and on models whose weights torchao or bitsandbytes hold in fewer bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from ptengine.backbone import generate

from ..backbone.stock import make, pad, random_rows, relative, stock_loss
from .attached_cases import KINDS, LENGTHS, alone, gradients, labels_for, prompt_for


@pytest.fixture
def _no_graphs_left() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_no_graphs_left")
@pytest.mark.parametrize(("family", "kind"), [("gpt2", "soft"), ("llama", "prefix")])
def test_torch_compile(family: str, kind: str) -> None:
    """Logits, loss and gradient of the eager call, and a changed prompt is seen; generated code is not compiled."""
    model = make(family, **({"n_layer": 1} if family == "gpt2" else {"num_hidden_layers": 1}))
    prompt, rows = prompt_for(model, kind), random_rows(5, 9)
    ids, mask = pad(rows, "left", value=50)
    counter = CompileCounterWithBackend("aot_eager")
    with prompt.attached(model) as both:
        exact = both(input_ids=ids, attention_mask=mask, labels=ids)
        exact.loss.backward()
        wanted = gradients(prompt)
        compiled = torch.compile(both, backend=counter)
        out = compiled(input_ids=ids, attention_mask=mask, labels=ids)
        out.loss.backward()
        assert relative(gradients(prompt), wanted) < 1e-5
        assert relative(out.logits, exact.logits) < 1e-5
        assert abs(out.loss - exact.loss) < 1e-5
        with torch.no_grad():
            for parameter in prompt.parameters():
                parameter.mul_(1.5)
        moved = compiled(input_ids=ids, attention_mask=mask, labels=ids).logits
        assert relative(moved, both(input_ids=ids, attention_mask=mask).logits) < 1e-5
        assert relative(moved, exact.logits) > 1e-3
    assert counter.op_count > 50  # the layer is in its graphs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_int8_weights_of_torchao(family: str, kind: str) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    model = make(family)
    before = type(model.get_output_embeddings().weight)

    def quantize() -> None:
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())

    check_quantised(model, kind, quantize)
    assert type(model.get_output_embeddings().weight) is not before


@pytest.mark.parametrize("kind", KINDS)
def test_4_bit_weights_of_bitsandbytes(kind: str) -> None:
    """As of QLoRA: NF4, computed in fp32; on a CPU by bitsandbytes' own backend for it."""
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    model = make("llama")

    def quantize() -> None:
        for layer in model.model.layers:
            for part in (layer.self_attn, layer.mlp):
                for name, linear in [*part.named_children()]:
                    if not isinstance(linear, torch.nn.Linear):
                        continue
                    bias = linear.bias is not None
                    packed = bnb.nn.Linear4bit(
                        linear.in_features, linear.out_features, bias, compute_dtype=torch.float32, quant_type="nf4"
                    )
                    packed.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
                    packed.bias = linear.bias
                    # With AVX512-BF16 it would compute in bf16, and only layers of a multiple of 32 outputs.
                    packed.support_avx512bf16_for_cpu = False
                    setattr(part, name, packed)
        model.to("cpu")  # which packs the weights

    check_quantised(model, kind, quantize)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8


def check_quantised(model: Any, kind: str, quantize: Callable[[], None]) -> None:
    """The numbers of the quantised model with the prompt in the row, gradients and greedy texts too."""
    rows, prompt = random_rows(*LENGTHS), prompt_for(model, kind)
    full = alone(model, prompt, rows[0])
    quantize()
    ids, mask = pad(rows, "left", value=50)
    labels, _ = pad(labels_for(rows), "left", value=-100)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2}
    with prompt.attached(model):
        out = model(ids, attention_mask=mask, labels=labels)
        out.loss.backward()
        found = gradients(prompt)
        texts = model.generate(ids, attention_mask=mask, **settings)
    longest = ids.shape[1]
    assert torch.equal(texts[:, longest:], generate(model, prompt, rows, **settings)[:, longest:])  # type: ignore[index]
    for logits, kept, row in zip(out.logits, mask.bool(), rows, strict=True):
        assert relative(logits[kept], alone(model, prompt, row)) < 1e-5
    stock_loss(model, [prompt.lower()] * len(rows), rows, labels_for(rows)).backward()
    assert relative(found, gradients(prompt)) < 1e-5
    assert relative(alone(model, prompt, rows[0]), full) > 1e-3  # other weights than before
