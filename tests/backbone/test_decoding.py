"""Steps of one token at places that do not move: what `generate` gives without them, here and from a CUDA graph."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ptengine.backbone import VirtualTokens, decoding, generate, generation
from ptengine.kernels.dispatch import ENVIRONMENT

from .stock import CAUSAL, make, prefix, random_rows, virtual

NEW = 12
LENGTHS = (5, 11, 1, 8)
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "to the last token": {"do_sample": False, "min_new_tokens": NEW},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "one step": {"do_sample": False, "max_new_tokens": 2},
    "logits kept": {"do_sample": False, "return_dict_in_generate": True, "output_logits": True},
}
OTHERS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "no cache": {"use_cache": False},
    "a cache by name": {"cache_implementation": "dynamic"},  # which stock refuses beside a cache that is given
    "attentions": {"output_attentions": True, "return_dict_in_generate": True},
    "few tokens": {"max_new_tokens": 4},
    "no number of tokens": {"max_new_tokens": None, "max_length": 40},
}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every call decodes in place, its steps run one by one on the CPU; counts them."""
    ran: list[int] = []

    def uncaptured(self: Any) -> Any:
        def run() -> Tensor:
            ran.append(1)
            logits: Tensor = self._step()
            return logits

        return run

    monkeypatch.setattr(decoding._Steps, "_captured", uncaptured)
    monkeypatch.setattr(generation, "decodes", lambda *_: True)
    return ran


def prompts(model: Any, kind: str) -> list[Any]:
    make_one = (lambda size, seed: virtual(size, seed)) if kind == "soft" else (lambda *a: prefix(model, *a))
    first, second = make_one(6, 0), make_one(3, 1)
    return [first, second, None, first]


def run(model: Any, given: Any, **ways: Any) -> Tensor:
    torch.manual_seed(3)
    out = generate(model, given, random_rows(*LENGTHS), **({"max_new_tokens": NEW} | ways))
    assert isinstance(out, Tensor)
    return out


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["soft", "prefix"])
@pytest.mark.parametrize("family", CAUSAL)
def test_equals_the_growing_cache(
    family: str, kind: str, way: str, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of different length, a row without, rows of different length: the same tokens."""
    model = make(family)
    given = prompts(model, kind)
    got = run(model, given, **WAYS[way])
    assert len(steps) == got.shape[1] - max(LENGTHS) - 1  # the prefill gives the first
    monkeypatch.setattr(generation, "decodes", lambda *_: False)
    assert torch.equal(got, run(model, given, **WAYS[way]))


def test_more_tokens_than_told_are_refused(steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot below the first would be the last one: the newest token would overwrite a token of the text."""
    monkeypatch.setattr(generation, "decoder", lambda *a: decoding.decoder(*a[:-1], 3))
    with pytest.raises(RuntimeError, match="at most 3 new tokens a row"):
        run(make("llama"), None, do_sample=False, min_new_tokens=NEW)


def test_the_model_keeps_its_forward(steps: list[int]) -> None:
    model = make("llama")
    run(model, prompts(model, "soft"))
    assert "forward" not in vars(model)
    assert steps


@pytest.mark.parametrize("case", OTHERS)
def test_what_does_not_decode_in_place(case: str) -> None:
    """Settings under which rows move among the cache's, or more than logits is wanted, or it is not worth it."""
    usual: dict[str, Any] = {"max_new_tokens": NEW}
    assert in_place(usual)
    assert not in_place(usual | OTHERS[case])


def in_place(settings: dict[str, Any]) -> bool:
    class OnDevice:
        """As on a GPU, which here is none."""

        device, dtype = torch.device("cuda", 0), torch.float16

    class Spec:
        windowed = ()

        class word_embeddings:
            weight = OnDevice()

    class Model:
        def parameters(self) -> list[Any]:
            return [OnDevice()]

    return decoding.decodes(Model(), Spec(), settings.get)  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
class TestOnTheGpu:
    """The graph itself."""

    @pytest.fixture
    def model(self) -> Any:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2,
            vocab_size=600, bos_token_id=None, eos_token_id=None, pad_token_id=2,
        )  # fmt: skip
        return LlamaForCausalLM(config).to("cuda", torch.float32).eval()

    def tokens(self, model: Any, given: Any) -> Tensor:
        torch.manual_seed(3)
        out = generate(model, given, random_rows(*LENGTHS), max_new_tokens=48, do_sample=False)
        assert isinstance(out, Tensor)
        return out

    def prompts(self) -> list[Any]:
        one, other = (VirtualTokens(virtual(size, size, 256).embeds.cuda()) for size in (6, 3))
        return [one, other, None, one]

    def test_the_graph_gives_the_tokens_of_the_growing_cache(
        self, model: Any, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
    ) -> None:
        given = self.prompts()
        captured = []
        original = decoding._Steps._captured
        monkeypatch.setattr(decoding._Steps, "_captured", lambda self: captured.append(1) or original(self))
        got = self.tokens(model, given)
        assert captured
        assert not [w for w in recwarn if "CUDA graph" in str(w.message)]
        monkeypatch.setattr(generation, "decodes", lambda *_: False)
        assert torch.equal(got, self.tokens(model, given))

    def test_two_threads_capture_at_once(self, model: Any) -> None:
        given = self.prompts()
        alone = [self.tokens(model, given), self.tokens(model, given[::-1])]
        results: dict[int, Tensor] = {}
        threads = [
            threading.Thread(target=lambda i=i, g=g: results.update({i: self.tokens(model, g)}))
            for i, g in enumerate((given, given[::-1]))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [torch.equal(results[i], alone[i]) for i in range(2)] == [True, True]

    def test_a_model_that_cannot_be_captured_says_so(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        want = self.tokens(model, self.prompts())
        step = decoding._Steps._step

        def reads_back(self: Any) -> Tensor:
            logits = step(self)
            assert float(logits.sum()) == float(logits.sum())  # the host waits for the device: not in a graph
            return logits

        monkeypatch.setattr(decoding._Steps, "_step", reads_back)
        with pytest.warns(UserWarning, match="without a CUDA graph"):
            assert torch.equal(self.tokens(model, self.prompts()), want)


def test_forced_pytorch_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """PTENGINE_BACKEND=torch is honoured: its path may read lengths back, which a graph cannot."""
    assert in_place({"max_new_tokens": NEW})
    monkeypatch.setenv(ENVIRONMENT, "torch")
    assert not in_place({"max_new_tokens": NEW})
