"""Transfer of prompts with heads of their own: head and prompt move together, and the model with its head stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ptengine import HeadedPrompt
from ptengine.data import SequenceClassificationTask, load_rows
from ptengine.errors import InputError
from ptengine.training import PromptSet, Trainer, TrainingConfig, evaluate
from ptengine.transfer import Anchor, Distill, Guard, Initialize, Joint, PromptBank, SelfTrain, Strategy, transfer
from ptengine.transfer.arithmetic import add_task_vectors, start_from, weighted_mean
from ptengine.transfer.losses import TransferLoss

SETTINGS = TrainingConfig(
    output_dir="unset", max_steps=4, per_device_train_batch_size=4, disable_tqdm=True, seed=3, head_learning_rate=0.02
)
TASK = SequenceClassificationTask(labels=("neg", "pos"))


class World:
    """A model with a head of its own, eight shots, and a bank of two prompts trained from one P0."""

    def __init__(self, tiny: ModuleType, root: Path) -> None:
        self.tiny, self.model, self.tokens = tiny, tiny.bert(), tiny.tokenizer(special=True)
        self.bank = PromptBank(root / "bank")
        initial = self.headed(0)
        for seed in range(2):
            prompt = start_from(self.model, initial)
            config = replace(SETTINGS, output_dir=str(root / f"run-{seed}"), max_steps=8, learning_rate=0.1)
            data = tiny.rows(12, seed)
            Trainer(self.model, prompt, data, None, config, task=TASK, tokenizer=self.tokens).fit()
            self.bank.add(
                f"p{seed}", prompt, model=self.model, tokenizer=self.tokens, task=TASK, initial=initial, data=data
            )
        draw = tiny.rows(40, 9)
        self.shots = [row for label in ("pos", "neg") for row in [r for r in draw if r["label"] == label][:4]]

    def headed(self, seed: int, labels: tuple[str, ...] = ("neg", "pos")) -> HeadedPrompt:
        return HeadedPrompt(self.model, self.tiny.prefix(self.model, seed), labels, seed=seed)

    def run(self, folder: Path, strategy: Strategy | None = None, **more: Any) -> Any:
        return transfer(
            self.model, self.tokens, task=TASK, shots=self.shots, bank=more.pop("bank", self.bank), strategy=strategy,
            training=replace(SETTINGS, output_dir=str(folder)), **more,
        )  # fmt: skip


@pytest.fixture(scope="module")
def world(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tiny, tmp_path_factory.mktemp("world"))


def weights(prompt: Any) -> dict[str, list[Any]]:
    return {name: tensor.tolist() for name, tensor in prompt.state_dict().items()}


def test_prompt_and_head_move_and_the_model_stays(world: World, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in world.model.state_dict().items()}
    result = world.run(tmp_path / "out", Strategy(distill=Distill(0.5), anchor=Anchor(0.1)), guard=Guard(folds=2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in world.model.state_dict().items())
    (name,) = result.selected
    source = world.bank.entry(name).load(world.model, world.tokens)
    assert isinstance(source, HeadedPrompt)
    assert weights(result.candidates["source"]) == weights(source)
    moved, scratch = result.candidates["transferred"], result.candidates["scratch"]
    for prompt in (moved, scratch):
        assert isinstance(prompt, HeadedPrompt)
    assert weights(moved)["head.classifier/weight"] != weights(source)["head.classifier/weight"]
    assert (
        result.search.matches[0].details["accuracy"]
        == evaluate(world.model, source, TASK, world.shots, world.tokens).metrics["accuracy"]
    )
    again = world.run(tmp_path / "out", Strategy(distill=Distill(0.5), anchor=Anchor(0.1)), guard=Guard(folds=2),
                      resume=True)  # fmt: skip
    assert weights(again.prompt) == weights(result.prompt)


def test_plain_transfer_is_training_from_the_source(world: World, tmp_path: Path) -> None:
    result = world.run(tmp_path / "out")
    (name,) = result.selected
    prompt = start_from(world.model, world.bank.entry(name).load(world.model, world.tokens))
    config = replace(SETTINGS, output_dir=str(tmp_path / "alone"))
    alone = Trainer(world.model, prompt, world.shots, None, config, task=TASK, tokenizer=world.tokens).fit()
    assert result.runs["transferred"].losses == alone.losses
    assert weights(result.prompt) == weights(prompt)


@pytest.mark.parametrize(("weight", "rows"), [(0.0, "target"), (1.0, "source")])
def test_a_joint_loss_at_its_ends_is_one_of_the_two(world: World, tmp_path: Path, weight: float, rows: str) -> None:
    """With a = 0 the losses are those of the target alone, with a = 1 those of the source."""
    source = world.tiny.rows(9, 7)
    joint = world.run(tmp_path / "joint", Strategy(joint=Joint(weight)), source_task=TASK, source_data=source)
    (name,) = joint.selected
    prompt = start_from(world.model, world.bank.entry(name).load(world.model, world.tokens))
    data = source if rows == "source" else world.shots
    config = replace(SETTINGS, output_dir=str(tmp_path / "alone"))
    alone = Trainer(world.model, prompt, data, None, config, task=TASK, tokenizer=world.tokens).fit()
    assert joint.runs["transferred"].losses == pytest.approx(alone.losses, abs=1e-6, rel=0)


@torch.no_grad()
def test_distillation_is_of_the_classes_logits(world: World) -> None:
    """Against logits of the stock model in which each of the two heads stands."""
    import copy

    from torch.nn import functional as F

    from ptengine import patched
    from ptengine.backbone.spec import backbone_spec
    from ptengine.training.objective import make_objective

    teacher, student = (world.bank.entry(f"p{i}").load(world.model, world.tokens) for i in (0, 1))
    assert isinstance(teacher, HeadedPrompt)
    assert isinstance(student, HeadedPrompt)
    rows = TASK.encode(load_rows(world.shots), world.tokens, max_tokens=30).rows
    logits = []
    for prompt in (teacher, student):
        twin = copy.deepcopy(world.model).eval()
        prompt.install_head(twin)
        with prompt.prompt.attached(twin):
            logits.append(torch.cat([twin(input_ids=torch.tensor([row.input_ids])).logits for row in rows]))
    gold = torch.tensor([row.class_id for row in rows])
    expected = F.cross_entropy(logits[1], gold) + 0.7 * F.mse_loss(logits[1], logits[0])
    loss = TransferLoss(
        Strategy(distill=Distill(0.7)), model=world.model, tokenizer=world.tokens, start=teacher, config=SETTINGS,
        task=TASK,
    )  # fmt: skip
    objective = make_objective(TASK, world.model, backbone_spec(world.model), world.tokens, False)
    world.model.eval()
    with patched(world.model):
        assert loss._distill is not None
        got = loss._distill.loss(student, objective.collate(rows), 0.0)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_means_and_task_vectors_are_of_prompt_and_head(world: World) -> None:
    one, other = (world.bank.entry(f"p{i}").load(world.model, world.tokens) for i in (0, 1))
    initial = world.bank.entry("p0").load_initial(world.model, world.tokens)
    mean = weighted_mean([one, other], [3, 1])
    assert isinstance(mean, HeadedPrompt)
    for name, tensor in mean.state_dict().items():
        torch.testing.assert_close(tensor, 0.75 * one.state_dict()[name] + 0.25 * other.state_dict()[name])
    back = add_task_vectors([one], initial)
    assert all(torch.allclose(t, one.state_dict()[n], rtol=0, atol=1e-6) for n, t in back.state_dict().items())


def test_the_models_own_head_is_no_part_of_its_identity(world: World, tiny: ModuleType) -> None:
    """Loading a checkpoint without a head makes one at random, and banked prompts are not foreign for that."""
    other = tiny.bert()
    torch.nn.init.normal_(other.classifier.weight)
    assert weights(world.bank.entry("p0").load(other, world.tokens)) == weights(
        world.bank.entry("p0").load(world.model, world.tokens)
    )
    torch.nn.init.normal_(other.bert.encoder.layer[0].attention.self.query.weight)
    with pytest.raises(InputError, match="other weights"):
        world.bank.entry("p0").load(other, world.tokens)


def test_what_cannot_be_moved_is_refused(world: World, tmp_path: Path) -> None:
    bank = PromptBank(tmp_path / "bank")
    other = SequenceClassificationTask(labels=("bad", "good"))
    common: dict[str, Any] = {"model": world.model, "tokenizer": world.tokens}
    bank.add("words", world.headed(1, ("bad", "good")), task=other, **common)
    with pytest.raises(InputError, match=r"its head has the labels \['bad', 'good'\], this task \['neg', 'pos'\]"):
        world.run(tmp_path / "out", bank=bank)
    found = bank.search(task=TASK, shots=world.shots, **common)
    assert "its head has the labels" in found.refused["words"]
    assert not found.matches
    with pytest.raises(InputError, match="expected a HeadedPrompt, a prompt with its head"):
        bank.add("bare", world.tiny.soft(world.model), task=TASK, **common)
    with pytest.raises(InputError, match="the labels of the prompt's head"):
        bank.add("wrong", world.headed(1), task=other, **common)
    assert [entry.name for entry in bank.list()] == ["words"]
    assert not (tmp_path / "out").exists()


def test_unlabelled_texts_are_taught_by_the_source_and_its_head(world: World, tmp_path: Path) -> None:
    texts = [{"text": row["text"]} for row in world.tiny.rows(9, 5)]
    result = world.run(tmp_path / "out", Strategy(self_train=SelfTrain(0.5, 0.5)), unlabelled=texts)
    assert result.taught.kept > 0
    plain = world.run(tmp_path / "plain")
    assert result.runs["transferred"].losses != plain.runs["transferred"].losses


def test_several_transferred_prompts_train_at_once(world: World, tmp_path: Path) -> None:
    """What the few-shot experiment does: many starts of a bank in one set."""
    members = []
    for index, name in enumerate(("p0", "p1")):
        prompt = start_from(world.model, world.bank.entry(name).load(world.model, world.tokens))
        config = replace(SETTINGS, output_dir=str(tmp_path / name), seed=index)
        members.append(Trainer(world.model, prompt, world.shots, None, config, task=TASK, tokenizer=world.tokens))
    found = PromptSet(members, tmp_path).fit()
    assert [len(member.losses) for member in found.members] == [4, 4]  # type: ignore[union-attr]


def test_the_start_of_several_is_their_mean(world: World, tmp_path: Path) -> None:
    result = world.run(tmp_path / "out", Strategy(Initialize("mean", top_k=2)))
    assert set(result.selected) == {"p0", "p1"}
    expected = weighted_mean([world.bank.entry(f"p{i}").load(world.model, world.tokens) for i in (0, 1)])
    assert weights(result.candidates["source"]) == weights(expected)


def test_a_cosine_took_heads_of_other_labels_for_sources(world: World, tmp_path: Path) -> None:
    """They were selected, and averaged with the others."""
    bank, common = PromptBank(tmp_path / "bank"), {"model": world.model, "tokenizer": world.tokens}
    other = SequenceClassificationTask(labels=("pos", "neg"))
    for seed, task in ((SETTINGS.seed, other), (1, TASK), (2, TASK)):
        bank.add(f"p{seed}", world.headed(seed, task.labels), task=task, **common)
    strategy = Strategy(Initialize("mean", top_k=2, measure="mean_token_cosine"))
    result = world.run(tmp_path / "out", strategy, bank=bank)
    assert set(result.selected) == {"p1", "p2"}
    assert "its head has the labels" in result.search.refused[f"p{SETTINGS.seed}"]
