"""Other trainers than ours train an attached prompt, and it is run again exactly when it must be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

from ptengine.backbone import attached as mechanism
from ptengine.backbone import generate, pack_rows, packed_loss, patched
from ptengine.errors import InputError
from ptengine.prompts import Prompt

from ..backbone.stock import (
    CAUSAL,
    HIDE,
    make,
    pad,
    random_rows,
    relative,
)
from .attached_cases import KINDS, LENGTHS, alone, gradients, labels_for, prompt_for, state


@pytest.fixture(params=CAUSAL)
def model(request: pytest.FixtureRequest) -> Any:
    return make(request.param)


class _Lines(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Batches of rows in a fixed order; the labels leave out each row's first token."""

    def __init__(self, count: int) -> None:
        self.rows = random_rows(*[3 + i % 7 for i in range(count)])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row = self.rows[index]
        return {"input_ids": row, "labels": [HIDE, *row[1:]]}


def collate(items: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    ids, mask = pad([item["input_ids"] for item in items], "right", value=50)
    return {"input_ids": ids, "attention_mask": mask, "labels": pad([i["labels"] for i in items], "right", HIDE)[0]}


BATCH, STEPS, RATE = 4, 20, 0.02


def plain_losses(model: Any, kind: str, data: _Lines) -> tuple[list[float], Prompt]:
    """Twenty steps over packed batches, by hand."""
    prompt = prompt_for(model, kind)
    optimizer, losses = torch.optim.AdamW(prompt.parameters(), lr=RATE, weight_decay=0.0), []
    with patched(model):
        for step in range(STEPS):
            items = [data[i] for i in range(step * BATCH, (step + 1) * BATCH)]
            batch = pack_rows([item["input_ids"] for item in items], [item["labels"] for item in items])
            loss = packed_loss(model, prompt.lower(), batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses, prompt


def make_for_training(family: str) -> Any:
    """As it is loaded: weights that want gradients, dropout, training mode."""
    changes = {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5} if family == "gpt2" else {}
    return make(family, **changes).requires_grad_(True).train()


class _InOrder(Trainer):
    def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_transformers_trainer(family: str, kind: str, checkpointing: bool, tmp_path: Path) -> None:
    """Twenty steps with the losses of a plain loop; the checkpoint holds the prompt, and a second run resumes it."""
    data = _Lines(STEPS * BATCH)
    exact, trained = plain_losses(make(family), kind, data)
    model = make_for_training(family)
    before, prompt = state(model), prompt_for(model, kind)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=BATCH, max_steps=STEPS, learning_rate=RATE,
        weight_decay=0.0, lr_scheduler_type="constant", logging_steps=1, report_to=[], save_steps=10, max_grad_norm=0.0,
        disable_tqdm=True, use_cpu=True, eval_strategy="steps", eval_steps=10, gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
    )  # fmt: skip
    with prompt.attached(model) as both:
        trainer = _InOrder(both, arguments, collate, train_dataset=data, eval_dataset=data)
        trainer.train()
        found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        judged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(found) == STEPS
    assert found == pytest.approx(exact, abs=1e-4)
    assert len(judged) == 2
    assert abs(judged[1] - judged[0]) > 1e-3  # of the prompt as it was then
    for ours, theirs in zip(prompt.parameters(), trained.parameters(), strict=True):
        assert relative(ours, theirs) < 1e-3
    saved = sorted(path.name for path in (tmp_path / "checkpoint-20").iterdir())
    assert "model.safetensors" in saved
    assert (tmp_path / "checkpoint-20" / "model.safetensors").stat().st_size < 20_000
    if not checkpointing:  # which Trainer leaves switched on, as it does without a prompt
        # Trainer itself writes into the configuration.
        assert state(model)[:4] == before[:4]
        again = prompt_for(model, kind)
        with again.attached(model) as both:
            trainer = _InOrder(both, arguments, collate, train_dataset=data, eval_dataset=data)
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
        for ours, theirs in zip(again.parameters(), prompt.parameters(), strict=True):
            assert relative(ours, theirs) < 1e-5


def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    data = _Lines(STEPS * BATCH)
    exact, _ = plain_losses(make("gpt2"), "soft", data)
    model = make_for_training("gpt2")
    prompt, found = prompt_for(model, "soft"), []
    runner = accelerate.Accelerator(cpu=True)
    loader = torch.utils.data.DataLoader(data, batch_size=BATCH, collate_fn=collate)
    with prompt.attached(model) as both:
        optimizer = torch.optim.AdamW(both.parameters(), lr=RATE, weight_decay=0.0)
        ready, optimizer, loader = runner.prepare(both, optimizer, loader)
        ready.train()
        for batch in loader:
            loss = ready(**batch).loss
            runner.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        assert list(runner.get_state_dict(ready)) == ["prompt.embeds"]
    assert found == pytest.approx(exact, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing(model: Any, kind: str) -> None:
    rows, prompt = random_rows(*LENGTHS), prompt_for(model, kind)
    ids, mask = pad(rows, "left", value=50)
    labels, _ = pad(labels_for(rows), "left", value=HIDE)
    with prompt.attached(model) as both:
        both(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        exact = gradients(prompt)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = both(input_ids=ids, attention_mask=mask, labels=labels).loss
        assert any(module.training for module in model.modules())
        loss.backward()
        assert relative(gradients(prompt), exact) < 1e-6
        both.eval()
        settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 50}
        found = both.generate(ids, attention_mask=mask, **settings)
        assert torch.equal(found, generate(model, prompt, rows, **settings))
        cache = both(ids).past_key_values
        both.train()
        with pytest.raises(InputError, match=r"no past_key_values under .*, got 11 tokens"):
            both(ids[:, :1], past_key_values=cache)
        model.gradient_checkpointing_enable({"use_reentrant": True})
        with pytest.raises(InputError, match="use_reentrant=False, got the reentrant kind"):
            both(input_ids=ids)


@pytest.mark.parametrize("kind", [*KINDS, "projected"])
def test_autocast(model: Any, kind: str) -> None:
    """bf16 runs, learns in fp32, and is not mixed up with what was kept without it."""
    rows, prompt = random_rows(5, 8), prompt_for(model, kind)
    ids, mask = pad(rows, "left", value=50)
    with prompt.attached(model), torch.no_grad():
        exact = model(ids, attention_mask=mask).logits
    with prompt.attached(model):
        with torch.no_grad():
            with torch.autocast("cpu", torch.bfloat16):
                half = model(ids, attention_mask=mask).logits
            assert torch.equal(model(ids, attention_mask=mask).logits, exact)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, attention_mask=mask, labels=ids).loss
        loss.backward()
    assert half.dtype == torch.bfloat16
    assert 1e-4 < relative(half.float()[mask.bool()], exact[mask.bool()]) < 0.1
    assert gradients(prompt).dtype == torch.float32


def test_prompt_is_kept_until_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = make("llama"), []
    original = mechanism.capture_prefix
    monkeypatch.setattr(mechanism, "capture_prefix", lambda *given: calls.append(1) or original(*given))
    prompt, ids = prompt_for(model, "soft"), torch.tensor(random_rows(5))
    with prompt.attached(model):
        with torch.inference_mode():
            model(ids)
        with torch.no_grad():
            first = model(ids).logits
            model.generate(ids, max_new_tokens=4)
        assert len(calls) == 1
        model(ids, labels=ids).loss.backward()
        assert len(calls) == 2  # anew, with its graph
        assert gradients(prompt).norm() > 0
        prompt.eval()
        assert not model(ids).logits.requires_grad
        prompt.train()
        with torch.no_grad():
            model(ids)
            kept = len(calls)
            prompt.embeds.mul_(1.5)  # type: ignore[operator]
            second = model(ids).logits
            assert len(calls) == kept + 1
            for change in (lambda x: x.data.add_(0.1), fused_step, lambda x: setattr(x, "data", x + 0.1)):
                change(prompt.embeds)
                second = model(ids).logits
                assert relative(second[0], alone_attached(model, prompt, ids[0].tolist())) < 1e-5
            assert len(calls) == kept + 4
            assert relative(second[0], alone_attached(model, prompt, ids[0].tolist())) < 1e-5
    assert relative(second, first) > 1e-3
    with prompt.attached(model), torch.no_grad():
        count = len(calls)
        model(ids)
        assert len(calls) == count + 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_prompt_in_eval_mode(family: str, kind: str) -> None:
    """It gets no gradient; others may, also through what an inference left behind."""
    model = make(family)
    prompt, ids = prompt_for(model, kind).eval(), torch.tensor(random_rows(5))
    embeds = model.get_input_embeddings()(ids).requires_grad_()
    with prompt.attached(model):
        with torch.inference_mode():
            exact = model(ids).logits
        assert not model(ids).logits.requires_grad
        logits = model(inputs_embeds=embeds).logits
        logits.square().sum().backward()
    assert relative(logits, exact) < 1e-6
    assert embeds.grad.norm() > 0
    assert all(parameter.grad is None for parameter in prompt.parameters())


def fused_step(parameter: Any) -> None:
    """Whose change does not count in the tensor's version."""
    parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW([parameter], lr=0.1, fused=True).step()


def alone_attached(model: Any, prompt: Prompt, row: list[int]) -> Tensor:
    """`alone` while a prompt is attached: by another instance with the same weights."""
    stock = make(model.config.model_type)
    return alone(stock, prompt, row)


def test_freeze() -> None:
    """The model's own parameters get gradients only where that is asked for."""
    model = make("llama").requires_grad_(True)
    prompt, ids = prompt_for(model, "soft"), torch.tensor(random_rows(6))
    with prompt.attached(model):
        model(ids, labels=ids).loss.backward()
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    gradients(prompt)
    model.requires_grad_(False)
    weight = model.model.layers[0].self_attn.k_proj.weight.requires_grad_(True)
    with prompt.attached(model, freeze=False) as both:
        assert [name for name, _ in both.named_parameters()] == ["prompt.embeds"]
        model(ids, labels=ids).loss.backward()
    found = weight.grad.clone()
    weight.grad = None
    embeds = torch.cat([prompt.lower().embeds[None], model.get_input_embeddings()(ids)], dim=1)  # type: ignore[union-attr]
    cross_entropy(model(inputs_embeds=embeds).logits[0, 6:-1], ids[0, 1:]).backward()
    assert relative(found, weight.grad) < 1e-5  # also what flows through the prompt's own row


@pytest.mark.parametrize("learns", [True, False])
def test_lora_beside_the_prompt(learns: bool) -> None:
    """A model that carries a LoRA of PEFT learns with the prompt or alone, as with the prompt placed in the row."""
    peft = pytest.importorskip("peft", reason="needs peft")
    model = make("llama")
    prompt, ids = prompt_for(model, "soft"), torch.tensor(random_rows(9, 9))
    both = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    lora = [parameter for parameter in both.parameters() if parameter.requires_grad]
    prompt.train(learns)
    with prompt.attached(model, freeze=False):
        both(input_ids=ids, labels=ids).loss.backward()
    found, own = [parameter.grad.clone() for parameter in lora], prompt.embeds.grad
    prompt.zero_grad(set_to_none=True)
    both.zero_grad()
    embeds = torch.cat([prompt.lower().embeds.expand(2, -1, -1), model.get_input_embeddings()(ids)], dim=1)  # type: ignore[union-attr]
    labels = torch.cat([torch.full((2, 7), HIDE), ids[:, 1:]], dim=1)
    both(inputs_embeds=embeds, labels=labels).loss.backward()
    if learns:
        assert relative(own.flatten(), gradients(prompt)) < 1e-5
    else:
        assert own is None
    for ours, parameter in zip(found, lora, strict=True):
        assert relative(ours, parameter.grad) < 1e-5
