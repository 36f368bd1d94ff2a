"""`transfer` from bank to kept prompt: what it starts from, what it leaves behind, and that it goes on exactly."""

from __future__ import annotations

import gc
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset
from transformers import BertForMaskedLM

from ptengine.data import EmbeddingTask, MaskedClassificationTask, Seq2SeqClassificationTask, Template, Verbalizer
from ptengine.errors import InputError
from ptengine.prompts import SoftPrompt, load_prompt
from ptengine.training import Trainer, TrainingConfig, evaluate
from ptengine.transfer import Anchor, Distill, Guard, Initialize, Joint, PromptBank, SelfTrain, Strategy, run, transfer
from ptengine.transfer.guard import Guess
from ptengine.transfer.self_training import NothingTaught, teach
from ptengine.transfer.similarity import prompt_similarity

SETTINGS = TrainingConfig(
    output_dir="unset", max_steps=4, per_device_train_batch_size=4, disable_tqdm=True, seed=3, save_steps=2
)


@pytest.fixture(scope="module")
def world(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model, eight shots, and a bank of three prompts trained from one P0."""
    model, tokens = tiny.gpt2(dropout=0.0), tiny.tokenizer()
    root = tmp_path_factory.mktemp("world")
    bank = PromptBank(root / "bank")
    initial = tiny.soft(model, 0)
    for seed in range(3):
        prompt = SoftPrompt(model, init="prompt", prompt=initial)
        config = replace(SETTINGS, output_dir=str(root / f"run-{seed}"), max_steps=6, learning_rate=0.05 * (seed + 1))
        Trainer(model, prompt, tiny.rows(12, seed), None, config, task=tiny.words_task(), tokenizer=tokens).fit()
        bank.add(
            f"p{seed}", prompt, model=model, tokenizer=tokens, task=tiny.words_task(), initial=initial,
            data=tiny.rows(12, seed),
        )  # fmt: skip

    class World:
        def __init__(self) -> None:
            self.model, self.tokens, self.bank = model, tokens, bank
            draw = tiny.rows(40, 9)
            self.shots = [row for label in ("pos", "neg") for row in [r for r in draw if r["label"] == label][:4]]

        def run(self, folder: Path, **more: Any) -> Any:
            given: dict[str, Any] = {"bank": bank, "shots": self.shots, "task": tiny.words_task()}
            training = replace(SETTINGS, output_dir=str(folder), **more.pop("training", {}))
            return transfer(model, tokens, training=training, **(given | more))

    return World()


def test_with_a_guard_everything_is_scored_and_left_behind(world: Any, tiny: ModuleType, tmp_path: Path) -> None:
    output = tmp_path / "out"
    before = {name: tensor.clone() for name, tensor in world.model.state_dict().items()}
    result = world.run(output, guard=Guard(folds=2, scratch_rates=(1.0, 0.5)), strategy=Strategy(distill=Distill()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in world.model.state_dict().items())
    assert set(result.candidates) == {"transferred", "source", "scratch"}
    assert set(result.runs) == {"transferred", "scratch"}
    decision = result.decision
    assert set(decision.scores) == {"scratch-1", "scratch-0.5", "source", "transferred"}
    assert result.prompt is result.candidates[decision.chosen]
    told = json.loads((output / "transfer.json").read_text())
    assert told["chosen"] == decision.chosen
    assert told["decision"]["reason"] == decision.reason
    saved = load_prompt(output / "prompt", world.model)
    assert torch.equal(saved.embeds, result.prompt.embeds)
    # The untouched source scores in the guard what evaluating it on the held-back parts says.
    (name,) = result.selected
    assert name == result.search.matches[0].entry.name
    source = world.bank.entry(name).load(world.model, world.tokens)
    assert torch.equal(result.candidates["source"].embeds, source.embeds)


@pytest.mark.parametrize("of_one_label", [2, 3, 5])
def test_the_guard_is_told_what_guessing_scores(
    of_one_label: int, world: Any, tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Guess] = []
    original = run.decide

    def noted(settings: Guard, candidates: Any, guess: Guess) -> Any:
        told.append(guess)
        return original(settings, candidates, guess)

    monkeypatch.setattr(run, "decide", noted)
    draw = tiny.rows(60, 9)
    positive, negative = ([row for row in draw if row["label"] == label] for label in ("pos", "neg"))
    world.run(tmp_path / "out", guard=Guard(folds=2), shots=[*positive[:of_one_label], *negative[:3]])
    assert told == [Guess.of(["pos"] * of_one_label + ["neg"] * 3)]


def test_the_guard_took_losses_per_token_of_words_for_those_of_shots(
    world: Any, tiny: ModuleType, tmp_path: Path
) -> None:
    task = tiny.words_task(several=True)
    found = world.run(
        tmp_path / "out", task=task, guard=Guard(folds=2), exclude=["p1", "p2"], training={"max_steps": 1}
    )
    source = world.bank.entry("p0").load(world.model, world.tokens)
    loss = evaluate(world.model, source, task, world.shots, world.tokens).metrics["loss"]
    assert found.decision.losses["source"] == pytest.approx(loss * (4 * 1 + 4 * 2) / 8)  # "bad" and "very good"


def test_without_a_guard_there_is_one_run_and_no_decision(world: Any, tmp_path: Path) -> None:
    result = world.run(tmp_path / "out")
    assert (result.chosen, result.decision) == ("transferred", None)
    assert set(result.candidates) == {"transferred", "source"}
    assert not list((tmp_path / "out").glob("fold-*"))
    assert result.runs["transferred"].steps == 4


@pytest.mark.parametrize("strategy", [Strategy(distill=Distill(0.5)), Strategy(anchor=Anchor(1.0)), "joint"])
@pytest.mark.parametrize("kind", ["masked", "encoder-decoder"])
def test_other_models_transfer_as_a_causal_one_does(tiny: ModuleType, tmp_path: Path, kind: str, strategy: Any) -> None:
    """From a bank to the kept prompt: distilled, anchored, or beside the source."""
    rows, words = tiny.rows(40, 9), Verbalizer({"neg": ["bad", "poor"], "pos": "good"})
    if kind == "masked":
        model, tokens = tiny.bert(BertForMaskedLM), tiny.tokenizer(special=True)
        task: Any = MaskedClassificationTask(Template("{text} it was {mask}"), words)
    else:
        model, tokens = tiny.t5(dropout=0.0), tiny.tokenizer()
        task = Seq2SeqClassificationTask(Template("{text} it was"), words)
    bank = PromptBank(tmp_path / "bank")
    for seed in range(2):
        bank.add(f"p{seed}", tiny.soft(model, seed), model=model, tokenizer=tokens, task=task, data=tiny.rows(12, seed))
    shots = [row for label in ("pos", "neg") for row in [r for r in rows if r["label"] == label][:4]]
    source: dict[str, Any] = {}
    if strategy == "joint":
        strategy, source = Strategy(joint=Joint(0.5)), {"source_task": task, "source_data": tiny.rows(12, 1)}
    result = transfer(
        model, tokens, task=task, shots=shots, bank=bank, strategy=strategy, guard=Guard(folds=2),
        training=replace(SETTINGS, output_dir=str(tmp_path / "out")), **source,
    )  # fmt: skip
    (name,) = result.selected
    losses = {match.entry.name: match.score for match in result.search.matches}
    entries = {entry.name: entry.load(model, tokens) for entry in bank.list()}
    for its, prompt in entries.items():
        assert losses[its] == pytest.approx(evaluate(model, prompt, task, shots, tokens).metrics["loss"], rel=1e-6)
    assert name == min(losses, key=losses.__getitem__)
    assert result.decision is not None
    assert set(result.candidates) == {"transferred", "source", "scratch"}
    assert not torch.equal(result.candidates["transferred"].embeds, entries[name].embeds)
    assert json.loads((tmp_path / "out" / "transfer.json").read_text())["chosen"] == result.chosen


def test_a_killed_transfer_goes_on_to_the_same_numbers(world: Any, tmp_path: Path) -> None:
    options = {"guard": Guard(folds=2), "strategy": Strategy(anchor=Anchor(0.1))}
    whole = world.run(tmp_path / "whole", **options)
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    # As after a kill in the second fold: its transferred run has a checkpoint of step 2, and nothing came after it.
    for name in ("transferred", "scratch-1", "start", "prompt"):
        shutil.rmtree(cut / name)
    (cut / "transfer.json").unlink()
    torn = cut / "fold-1" / "transferred"
    for name in ("prompt", "checkpoint-4"):
        shutil.rmtree(torn / name)
    again = world.run(cut, resume=True, **options)
    assert again.decision == whole.decision
    assert again.runs["transferred"].losses == whole.runs["transferred"].losses
    assert torch.equal(again.prompt.embeds, whole.prompt.embeds)
    with pytest.raises(InputError, match="resume=True"):
        world.run(cut, **options)
    with pytest.raises(InputError, match="expected strategy"):
        world.run(cut, resume=True, guard=options["guard"])
    with pytest.raises(InputError, match="expected shots"):
        world.run(cut, resume=True, shots=world.shots[::-1], **options)
    with pytest.raises(InputError, match="expected bank"):
        world.run(cut, resume=True, exclude=["p1"], **options)


def test_stages_that_keep_no_checkpoints_are_done_anew(world: Any, tmp_path: Path) -> None:
    whole = world.run(tmp_path, training={"save_strategy": "no"})
    again = world.run(tmp_path, training={"save_strategy": "no"}, resume=True)
    assert again.runs["transferred"].losses == whole.runs["transferred"].losses
    assert torch.equal(again.prompt.embeds, whole.prompt.embeds)


@pytest.mark.parametrize("combine", ["mean", "weighted", "task_vectors"])
@pytest.mark.parametrize("measure", ["shot_loss", "mmd", "mean_token_cosine", "task_vector_cosine"])
def test_starts_made_of_several_prompts(
    world: Any, tiny: ModuleType, tmp_path: Path, combine: str, measure: str
) -> None:
    strategy = Strategy(Initialize(combine, top_k=2, measure=measure))
    result = world.run(tmp_path / "out", strategy=strategy)
    best = result.search.matches[:2]
    assert list(result.selected) == [match.entry.name for match in best]
    assert sum(result.selected.values()) == pytest.approx(1)
    numbers = [match.entry.load(world.model, world.tokens).embeds for match in best]
    scores = torch.tensor([match.score for match in best])
    if combine == "mean":
        weights = torch.full((2,), 0.5)
    elif measure in ("shot_loss", "mmd"):
        weights = torch.softmax(-scores, dim=0)
    else:
        weights = scores / scores.sum()
    # Task vectors of prompts from one P0 with weights that add up to 1 give their weighted mean.
    wanted = sum(w * x for w, x in zip(weights, numbers, strict=True))
    assert torch.allclose(result.candidates["source"].embeds, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("measure", ["mean_token_cosine", "task_vector_cosine"])
def test_panda_trains_a_fresh_prompt_by_a_teacher_weighted_by_likeness(
    world: Any, tiny: ModuleType, tmp_path: Path, measure: str
) -> None:
    strategy = Strategy(Initialize(fresh=True), distill=Distill(0.5, measure))
    result = world.run(tmp_path / "out", strategy=strategy)
    (name,) = result.selected
    teacher = world.bank.entry(name).load(world.model, world.tokens)
    assert torch.equal(result.candidates["source"].embeds, teacher.embeds)
    probe, initial = load_prompt(tmp_path / "out" / "probe" / "prompt", world.model), tiny.soft(world.model, 0)
    wanted = prompt_similarity(measure, teacher, probe, initial, initial)
    assert result.likeness == pytest.approx(max(wanted, 0))
    assert 0 < result.likeness < 1
    assert json.loads((tmp_path / "out" / "transfer.json").read_text())["likeness"] == result.likeness
    # The student begins where scratch begins: its first step's loss is that of a fresh prompt taught by the source.
    fresh = SoftPrompt(world.model, num_virtual_tokens=4, seed=SETTINGS.seed)
    moved = (result.prompt.embeds - fresh.embeds).norm()
    assert moved < (result.prompt.embeds - teacher.embeds).norm()
    again = world.run(tmp_path / "half", strategy=replace(strategy, distill=Distill(0.5 * wanted)))
    assert again.likeness is None
    assert again.runs["transferred"].losses == pytest.approx(result.runs["transferred"].losses, rel=1e-5)


def test_self_transfer_without_a_step_is_the_prompt_itself(world: Any, tiny: ModuleType, tmp_path: Path) -> None:
    """One step at a rate of next to nothing, since a run has at least one step."""
    bank = PromptBank(tmp_path / "bank")
    prompt = world.bank.entry("p0").load(world.model, world.tokens)
    bank.add("own", prompt, model=world.model, tokenizer=world.tokens, task=tiny.words_task())
    result = world.run(tmp_path / "out", bank=bank, training={"learning_rate": 1e-12, "max_steps": 1})
    assert torch.allclose(result.prompt.embeds, prompt.embeds, rtol=0, atol=1e-6)
    scores = [
        evaluate(world.model, one, tiny.words_task(), world.shots, world.tokens).metrics["loss"]
        for one in (prompt, result.prompt)
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


def test_curves_come_from_rows_that_decide_nothing(world: Any, tiny: ModuleType, tmp_path: Path) -> None:
    training = {"eval_strategy": "steps", "eval_steps": 2}
    result = world.run(tmp_path / "out", guard=Guard(folds=2), training=training, eval_data=tiny.rows(6, 20))
    assert [entry["step"] for entry in result.runs["scratch"].evaluations] == [2, 4]
    assert not list((tmp_path / "out").glob("fold-*/transferred/best"))


def test_bad_input_is_refused_before_anything_is_written(world: Any, tiny: ModuleType, tmp_path: Path) -> None:
    output = tmp_path / "out"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"task": EmbeddingTask()}, "task with a template, or one of labels"),
        ({"task": tiny.head_task()}, "was tuned for a ClassificationTask, this is a SequenceClassificationTask"),
        ({"bank": PromptBank(tmp_path / "none")}, "expected a bank with prompts"),
        ({"strategy": Strategy(Initialize("mean", top_k=4))}, "top_k=4"),
        ({"strategy": Strategy(joint=Joint())}, "source's task and rows"),
        ({"guard": Guard(folds=5)}, "every label for 5 folds"),
        ({"shots": [{"text": "it was"}]}, "'label'"),
        # It was counted as a label called 'None', of which there were too few for the folds.
        ({"shots": [*world.shots, {"text": "it was", "label": None}], "guard": Guard(folds=2)}, "row 8 .*'label', got"),
        # These came as AttributeErrors and TypeErrors.
        ({"bank": "prompts"}, "expected bank, a PromptBank, got str"),
        ({"strategy": "best"}, "expected strategy, a Strategy, got str"),
        ({"guard": "x"}, "expected guard, a Guard, got str"),
        ({"training": {"eval_strategy": "epoch"}}, "expected eval_data"),
        ({"training": {"eval_strategy": "epoch", "load_best_model_at_end": True}, "eval_data": world.shots}, "off in"),
        ({"guard": Guard(folds=2, scratch_init="text")}, "init_text"),
    ]
    for more, words in cases:
        with pytest.raises(InputError, match=words):
            world.run(output, **more)
        assert not output.exists(), words
    output.mkdir()
    (output / "note").write_text("mine")
    with pytest.raises(InputError, match="empty output_dir"):
        world.run(output)


def test_a_bank_of_several_forms_is_refused(world: Any, tiny: ModuleType, tmp_path: Path) -> None:
    bank = PromptBank(tmp_path / "bank")
    for name, prompt in (("soft", tiny.soft(world.model)), ("deep", tiny.prefix(world.model))):
        bank.add(name, prompt, model=world.model, tokenizer=world.tokens, task=tiny.words_task())
    llama = tiny.llama()
    bank.add("llama", tiny.soft(llama), model=llama, tokenizer=world.tokens, task=tiny.words_task())
    with pytest.raises(InputError, match="one method and length"):
        world.run(tmp_path / "out", bank=bank)
    result = world.run(tmp_path / "out", bank=bank, exclude=["deep"])
    assert list(result.selected) == ["soft"]
    assert "model_type" in result.search.refused["llama"]


def test_shots_of_a_dataset_mean_what_they_mean_in_training(world: Any, tiny: ModuleType, tmp_path: Path) -> None:
    """The numbers of its classes were taken for their names, so labels could be those of other classes."""
    rows = tiny.rows(8)
    names = list(dict.fromkeys(row["label"] for row in rows))
    numbered = [{**row, "label": names.index(row["label"])} for row in rows]
    shots = Dataset.from_list(numbered).cast_column("label", ClassLabel(names=names))
    by_rows, by_dataset = (
        world.run(tmp_path / name, shots=given).runs["transferred"].losses
        for name, given in (("rows", rows), ("dataset", shots))
    )
    assert by_rows == by_dataset


def test_too_few_shots_for_a_measure_came_to_light_after_training(world: Any, tmp_path: Path) -> None:
    """The error was "expected at least one prompt to combine, got none", with the reason hidden."""
    strategy = Strategy(Initialize(measure="proxy_a_distance"))
    with pytest.raises(InputError, match=r"at least 5 shots to search by proxy_a_distance, in every fold .* got 4"):
        world.run(tmp_path / "out", strategy=strategy, guard=Guard(folds=2))
    assert not (tmp_path / "out").exists()
    assert world.run(tmp_path / "whole", strategy=strategy).selected


@pytest.mark.parametrize("measure", ["shot_loss", "mean_token_cosine"])
def test_fewer_prompts_than_asked_for_were_combined(world: Any, tiny: ModuleType, tmp_path: Path, measure: str) -> None:
    bank = PromptBank(tmp_path / "bank")
    for name in ("p0", "p1"):
        bank.take(world.bank.entry(name))
    prompt = tiny.soft(world.model)
    torch.nn.init.constant_(prompt.embeds, float("nan"))
    prompt.save(bank.path / "p0")
    strategy = Strategy(Initialize("mean", top_k=2, measure=measure))
    with pytest.raises(InputError, match=f"top_k=2 prompts .* {measure} can rank, got 1; refused: .*'p0': .*finite"):
        world.run(tmp_path / "out", bank=bank, strategy=strategy)
    assert (tmp_path / "out").exists() == (measure == "mean_token_cosine")  # a prompt is tuned for it


def test_every_run_settled_all_objects_anew(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of a second each time, which was longer than the run; now once for all of them."""
    freeze, calls = gc.freeze, []

    def counted() -> None:
        calls.append(gc.get_freeze_count())
        freeze()

    gc.unfreeze()  # the suite has frozen what it imported
    try:
        monkeypatch.setattr(gc, "freeze", counted)
        world.run(tmp_path / "out", guard=Guard(folds=2))
    finally:
        freeze()
    assert calls == [0]


def test_a_fold_with_nothing_to_teach_ended_the_run(
    world: Any, tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def sometimes(*asked: Any) -> Any:
        calls.append(asked)
        if len(calls) == 2:  # in a fold; before any training it is asked on all shots
            raise NothingTaught("sure of none")
        return teach(*asked)

    monkeypatch.setattr("ptengine.transfer.procedure.teach", sometimes)
    texts = [{"text": row["text"]} for row in tiny.rows(6, 30)]
    strategy = Strategy(self_train=SelfTrain(0.5, 0.0))
    result = world.run(tmp_path / "out", guard=Guard(folds=2), strategy=strategy, unlabelled=texts)
    assert len(calls) == 4
    assert result.untaught == {"fold-0": "sure of none"}
    assert result.taught.kept == 6
    assert json.loads((tmp_path / "out" / "transfer.json").read_text())["untaught"] == result.untaught
    never = replace(strategy, self_train=SelfTrain(0.5, 1.0))
    with pytest.raises(InputError, match="expected an unlabelled text of which"):
        world.run(tmp_path / "never", guard=Guard(folds=2), strategy=never, unlabelled=texts)
    assert not (tmp_path / "never").exists()


def test_another_plan_was_shown_whole(world: Any, tmp_path: Path) -> None:
    """Two dictionaries of every setting, for one number that differs."""
    world.run(tmp_path / "out", strategy=Strategy(anchor=Anchor(0.1)))
    for words, more in (
        (r"expected training\.max_steps=4 as in the transfer in '.*out', got 5$", {"training": {"max_steps": 5}}),
        (r"expected strategy\.anchor\.weight=0\.1 as in .*, got 0\.2$", {"strategy": Strategy(anchor=Anchor(0.2))}),
        (r"expected strategy\.anchor=\{'weight': 0\.1\} as in .*, got None$", {"strategy": Strategy()}),
    ):
        given = {"strategy": Strategy(anchor=Anchor(0.1))} | more
        with pytest.raises(InputError, match=words):
            world.run(tmp_path / "out", resume=True, **given)
