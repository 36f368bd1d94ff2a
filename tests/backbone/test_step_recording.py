"""Training steps in the shapes of buckets: what they give without, here step by step and there from CUDA graphs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ptengine.backbone import (
    KeyValuePrefix,
    VirtualTokens,
    backbone_spec,
    encoder_hidden,
    pack_rows,
    packed_loss,
    patch,
    step_graphs,
    step_recording,
)
from ptengine.errors import InputError
from ptengine.kernels.dispatch import ENVIRONMENT

from .stock import CAUSAL, HIDE, make, parameters, prefix, random_rows, relative, virtual

SHAPES = {  # batches of one bucket, by the labels of a row
    1: ((30, 20, 35), (40, 15, 20), (25, 45, 30), (31, 32, 34), (20, 20, 40)),  # 65 to 128 tokens with the prompts
    30: ((5, 9, 3), (4, 10, 2), (7, 7, 5), (5, 9, 3), (9, 2, 6)),
}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Recordings that compute anew from inputs that do not move, on the CPU; their number of forwards and backwards."""
    ran: list[Any] = []

    def record(compute: Callable[[Sequence[Tensor]], Tensor], inputs: list[Tensor]) -> Any:
        wanted = [x for x in inputs if x.requires_grad]
        first = compute(inputs)
        output, grad_output = torch.zeros_like(first), torch.zeros_like(first)
        grads = [torch.zeros_like(x) for x in wanted]
        live: list[Tensor] = []

        def forward() -> None:
            with torch.enable_grad():
                live[:] = [compute(inputs)]
            output.copy_(live[0].detach())
            ran.append("forward")

        def backward() -> None:
            for place, grad in zip(grads, torch.autograd.grad(live[0], wanted, grad_output), strict=True):
                place.copy_(grad)
            ran.append("backward")

        ran.append("recorded")
        return step_recording.Recording(output.detach(), grad_output, grads, forward, backward)

    monkeypatch.setattr(step_recording, "_recorder", lambda: record)
    monkeypatch.setattr(step_recording, "_why_not", lambda _: None)
    return ran


def prompts_of(model: Any, kind: str) -> list[Any]:
    return [virtual(6, 0), virtual(4, 1)] if kind == "soft" else [prefix(model, 6, 0), prefix(model, 4, 1)]


def steps(model: Any, prompts: list[Any], labelled: int) -> list[tuple[Tensor, list[Tensor]]]:
    """Loss and gradients of one step a batch; the labels are the last tokens of every row."""
    found = []
    for seed, lengths in enumerate(SHAPES[labelled]):
        rows = random_rows(*lengths, seed=seed)
        labels = [[HIDE] * (len(row) - labelled) + row[-labelled:] for row in rows]
        ids = [0, len(prompts) - 1, -1]
        loss = packed_loss(model, prompts, pack_rows(rows, labels), prompt_ids=ids).loss
        wanted = [weight for prompt in prompts for weight in parameters(prompt)]
        found.append((loss.detach(), list(torch.autograd.grad(loss, wanted))))
    return found


@pytest.mark.parametrize("labelled", [1, 30])
@pytest.mark.parametrize("kind", ["soft", "prefix"])
@pytest.mark.parametrize("family", CAUSAL)
def test_steps_equal_those_outside(family: str, kind: str, labelled: int, recorded: list[str]) -> None:
    """With few labels the last MLP is narrowed to a filled-up number of positions, with many it is not."""
    model = patch(make(family))
    prompts = prompts_of(model, kind)
    exact = steps(model, prompts, labelled)
    assert not recorded
    with step_graphs(model):
        got = steps(model, prompts, labelled)
    assert recorded == ["recorded", *["forward", "backward"] * 3]  # the first two of the shape ran as they are
    for (loss, grads), (exact_loss, exact_grads) in zip(got, exact, strict=True):
        assert abs(loss.item() - exact_loss.item()) < 1e-5
        for ours, theirs in zip(grads, exact_grads, strict=True):
            assert relative(ours, theirs) < 1e-5
    steps(model, prompts, labelled)
    assert len(recorded) == 7  # nothing outlives the block


@pytest.mark.parametrize("kind", ["soft", "prefix"])
def test_an_encoder_s_hidden_states(kind: str, recorded: list[str]) -> None:
    model = patch(make("bert"))
    prompt = prompts_of(model, kind)[0]

    def run() -> list[Tensor]:
        found = []
        for seed in range(4):
            batch = pack_rows(random_rows(7, 5, seed=seed), token_type_ids=[[0] * 4 + [1] * 3, [0, 0, 1, 1, 1]])
            hidden = encoder_hidden(model, prompt, batch)
            found += [hidden.detach(), *torch.autograd.grad(hidden.square().sum(), parameters(prompt))]
        return found

    exact = run()
    with step_graphs(model):
        got = run()
    assert recorded == ["recorded", *["forward", "backward"] * 2]
    assert all(relative(ours, theirs) < 1e-5 for ours, theirs in zip(got, exact, strict=True))


def one_loss(model: Any, prompt: Any, seed: int = 0) -> Tensor:
    rows = random_rows(6, 4, seed=seed)
    return packed_loss(model, prompt, pack_rows(rows, rows)).loss


class TestActivationsInUse:
    """Recorded steps share their memory: between a forward and its backward nothing may be replayed."""

    @pytest.fixture
    def model(self) -> Any:
        return patch(make("llama"))

    @pytest.fixture
    def block(self, model: Any, recorded: list[str]) -> Iterator[list[str]]:
        with step_graphs(model):
            for _ in range(3):
                one_loss(model, virtual(4)).backward()
            assert recorded[-2:] == ["forward", "backward"]
            recorded.clear()
            yield recorded

    def test_two_losses_before_one_backward(self, model: Any, block: list[str]) -> None:
        """As a joint loss does: the second runs without the graph."""
        prompt = virtual(4)
        (one_loss(model, prompt, 1) + one_loss(model, prompt, 2)).backward()
        assert block == ["forward", "backward"]
        again = virtual(4)
        with step_graphs(model):  # where these shapes are new
            (one_loss(model, again, 1) + one_loss(model, again, 2)).backward()
        assert prompt.embeds.grad is not None
        assert again.embeds.grad is not None
        assert relative(prompt.embeds.grad, again.embeds.grad) < 1e-5

    def test_a_loss_that_was_dropped_does_not_hold_the_graph(self, model: Any, block: list[str]) -> None:
        one_loss(model, virtual(4))
        one_loss(model, virtual(4)).backward()
        assert block == ["forward", "forward", "backward"]

    def test_a_second_backward_is_refused(self, model: Any, block: list[str]) -> None:
        loss = one_loss(model, virtual(4))
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="expected one backward"):
            loss.backward()

    @pytest.mark.parametrize("kind", ["soft", "prefix"])
    def test_gradients_add_up(self, kind: str, model: Any, block: list[str]) -> None:
        """A parameter must not keep the buffer that the next replay writes."""
        prompt = prompts_of(model, kind)[1]
        for _ in range(3):
            one_loss(model, prompt)
        block.clear()
        parts = [torch.autograd.grad(one_loss(model, prompt, seed), parameters(prompt)) for seed in (1, 2)]
        for seed in (1, 2):
            one_loss(model, prompt, seed).backward()
        assert block == ["forward", "backward"] * 4
        for leaf, *grads in zip(parameters(prompt), *parts, strict=True):
            assert leaf.grad is not None
            assert relative(leaf.grad, sum(grads)) < 1e-5

    def test_without_gradients_the_call_is_made_as_it_is(self, model: Any, block: list[str]) -> None:
        with torch.no_grad():
            one_loss(model, virtual(4))
        assert block == []


def test_a_model_that_cannot_be_captured_says_so_once(
    monkeypatch: pytest.MonkeyPatch, recorded: list[str], recwarn: pytest.WarningsRecorder
) -> None:
    def fails(*_: Any) -> None:
        recorded.append("tried")
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(step_recording, "_recorder", lambda: fails)
    model, prompt = patch(make("llama")), virtual(4)
    want = one_loss(model, prompt)
    with step_graphs(model):
        losses = [one_loss(model, prompt) for _ in range(5)]
    assert recorded == ["tried"]
    assert all(abs(loss.item() - want.item()) < 1e-5 for loss in losses)
    assert [str(w.message) for w in recwarn if "without CUDA graphs" in str(w.message)] == [
        "model type 'llama' trains without CUDA graphs, more slowly in small steps: its step cannot be captured "
        "(RuntimeError: operation not permitted when stream is capturing)"
    ]


def test_least_recent_shapes_are_dropped(monkeypatch: pytest.MonkeyPatch, recorded: list[str]) -> None:
    monkeypatch.setattr(step_recording, "_MOST", 1)
    model, prompt = patch(make("llama")), virtual(4)
    with step_graphs(model):
        for lengths in [(6, 4)] * 3 + [(30, 38)] * 3 + [(6, 4)]:
            rows = random_rows(*lengths)
            packed_loss(model, prompt, pack_rows(rows, rows)).loss.backward()
        assert len(step_recording._active.get()._steps) == 1
    assert recorded.count("recorded") == 3


def test_large_steps_are_made_as_they_are(monkeypatch: pytest.MonkeyPatch, recorded: list[str]) -> None:
    """Of one token more than fits: 19 with the prompt."""
    model = patch(make("llama"))
    weights = sum(x.numel() for x in model.model.parameters()) - model.model.embed_tokens.weight.numel()
    monkeypatch.setattr(step_recording, "_FLOPS", 2 * weights * 18 / model.config.num_hidden_layers)
    shapes: list[tuple[int, ...]] = []
    base = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda **k: shapes.append(k["inputs_embeds"].shape) or base(**k))
    with step_graphs(model):
        for lengths in [(10, 7)] * 3 + [(9, 7)] * 3:  # less the last token of each row, whose label alone counts
            rows = random_rows(*lengths)
            packed_loss(model, virtual(4), pack_rows(rows, rows)).loss.backward()
    assert recorded == ["recorded", "forward", "backward"]
    assert [shape[1] for shape in shapes[:4]] == [19, 19, 19, 64]


def test_another_model_in_the_block_is_left_alone(recorded: list[str]) -> None:
    model, other = patch(make("llama")), patch(make("llama", seed=1))
    with step_graphs(model):
        for _ in range(4):
            one_loss(other, virtual(4)).backward()
    assert not recorded


def test_a_stock_model_is_refused() -> None:
    with pytest.raises(InputError, match="patched"), step_graphs(make("llama")):
        pass


def on_a_gpu(model: Any, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the model's steps would be recorded on a GPU."""
    spec = backbone_spec(model)

    class Weight:
        device, dtype = torch.device("cuda", 0), torch.float16

    class Embeddings:
        weight = Weight()

    monkeypatch.setattr(step_recording, "_devices", lambda _: {Weight.device})
    return step_recording._why_not(dataclasses.replace(spec, word_embeddings=Embeddings())) is None


def test_what_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patch(make("llama"))
    with pytest.warns(UserWarning, match="steps run without CUDA graphs: the model is on cpu"), step_graphs(model):
        assert step_recording.active_graphs(backbone_spec(model)) is None
    assert on_a_gpu(model, monkeypatch)
    layer = model.model.layers[1]
    handle = layer.register_forward_hook(lambda *_: None)
    assert not on_a_gpu(model, monkeypatch)  # the hook would not see the replays
    handle.remove()
    layer.train()
    assert not on_a_gpu(model, monkeypatch)  # gradient checkpointing, or dropout
    layer.eval()
    layer.mlp.up_proj.weight.requires_grad_()
    assert not on_a_gpu(model, monkeypatch)
    layer.mlp.up_proj.weight.requires_grad_(False)
    assert on_a_gpu(model, monkeypatch)
    monkeypatch.setenv(ENVIRONMENT, "torch")
    assert not on_a_gpu(model, monkeypatch)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnTheGpu:
    @pytest.fixture
    def model(self) -> Any:
        config = LlamaConfig(
            vocab_size=500, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512,
        )  # fmt: skip
        torch.manual_seed(0)
        return patch(LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval().requires_grad_(False))

    def steps(self, model: Any, kind: str, count: int = 8, labelled: int = 2) -> list[Tensor]:
        """Losses and gradients of the steps; rows differ from step to step, of 64 shapes of rows one bucket."""
        generator = torch.Generator().manual_seed(5)
        if kind == "soft":
            leaves = [(0.1 * torch.randn(20, 256, generator=generator)).cuda().requires_grad_()]
            prompt: Any = VirtualTokens(leaves[0])
        else:
            leaves = [torch.randn(3, 20, 2, 64, generator=generator).cuda().requires_grad_() for _ in range(2)]
            prompt = KeyValuePrefix(*leaves)
        found = []
        for _ in range(count):
            lengths = torch.randint(20, 24, (16,), generator=generator).tolist()
            rows = [torch.randint(500, (length,), generator=generator).tolist() for length in lengths]
            labels = [[HIDE] * (len(row) - labelled) + row[-labelled:] for row in rows]
            loss = packed_loss(model, prompt, pack_rows(rows, labels)).loss
            found += [loss.detach(), *torch.autograd.grad(loss, leaves)]
        return found

    @pytest.mark.parametrize("autocast", [False, True])
    @pytest.mark.parametrize("labelled", [2, 19])
    @pytest.mark.parametrize("kind", ["soft", "prefix"])
    def test_replays_equal_the_steps_they_recorded(
        self, model: Any, kind: str, labelled: int, autocast: bool, monkeypatch: pytest.MonkeyPatch,
        recwarn: pytest.WarningsRecorder,
    ) -> None:  # fmt: skip
        """Bitwise: the same kernels on the same shapes."""
        captured = []
        capture = step_recording._capture
        monkeypatch.setattr(step_recording, "_capture", lambda *a: captured.append(1) or capture(*a))
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            with step_graphs(model):
                got = self.steps(model, kind, labelled=labelled)
            monkeypatch.setattr(step_recording, "_SEEN_BEFORE", 1000)
            with step_graphs(model):
                exact = self.steps(model, kind, labelled=labelled)
            plain = self.steps(model, kind, labelled=labelled)
        assert 1 <= len(captured) <= 2
        assert not [w for w in recwarn if "CUDA graph" in str(w.message)]
        for ours, theirs, outside in zip(got, exact, plain, strict=True):
            assert torch.equal(ours, theirs)
            assert relative(ours.float(), outside.float()) < 0.05  # bf16, other blocks of the same sums

    def test_a_model_that_cannot_be_captured(self, model: Any) -> None:
        before = type(model.model.norm).forward

        def reads_back(self: Any, x: Tensor) -> Tensor:
            assert float(x.sum()) == float(x.sum())
            return before(self, x)

        want = self.steps(model, "soft")
        model.model.norm.forward = MethodType(reads_back, model.model.norm)
        with step_graphs(model), pytest.warns(UserWarning, match="without CUDA graphs"):
            got = self.steps(model, "soft")
        assert all(relative(x.float(), y.float()) < 0.05 for x, y in zip(got, want, strict=True))
