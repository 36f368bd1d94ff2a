"""The transfer experiments' bookkeeping: what their backbones read, their summaries, their files."""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import train_transfer_backbone as backbones
import transfer_across_models as across
import transfer_corpus as corpus
import transfer_fewshot as experiment
import transfer_summary
from tokenizers import Tokenizer, models, pre_tokenizers
from transfer_lab import HEAD_RATE, LANGUAGES, Fit, Lab
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from ptengine import HeadedPrompt
from ptengine.transfer.arithmetic import start_from

ONE = transfer_summary.PLAIN_SETTING


def pair(scratch: dict[str, float], plain: float, source_only: float = 0.4, oracle: float = 0.8) -> dict[str, Any]:
    return {
        "scratch": scratch, "plain": plain, "joint": plain, "anchor": 0.5, "source_only": source_only, "shuffled": 0.6,
        "oracle": oracle,
    }  # fmt: skip


def test_scratch_counts_with_its_best_mean_of_all_pairs() -> None:
    """Not with the best of each pair, which would be 0.65 on average."""
    pairs = {
        "soft-16-music-0": pair({ONE: 0.5, "b": 0.6}, 0.7, source_only=0.7),
        "soft-16-music-1": pair({ONE: 0.7, "b": 0.62}, 0.62),
    }
    guards = {
        "soft-music-related-0": {"chosen": "transferred", "kept": 0.9, "scratch": 0.5, "transferred": 0.9},
        "one": {"chosen": "scratch", "kept": 0.7, "scratch": 0.7, "transferred": 0.5},
        "two": {"chosen": "transferred", "kept": 0.6, "scratch": 0.62, "transferred": 0.6},
        "three": {"chosen": "transferred", "kept": 0.61, "scratch": 0.62, "transferred": 0.61},
    }
    found = transfer_summary.summary(pairs, guards)
    group = found["soft-16"]
    assert (group["pairs"], group["scratch_configuration"]) == (2, "b")
    assert group["accuracy"]["scratch"] == pytest.approx(0.61)
    plain = group["measures"]["plain"]
    assert plain["absolute_gain"]["value"] == pytest.approx(0.05)
    assert plain["wins"]["value"] == pytest.approx(0.5)
    assert plain["shuffled_gain"]["value"] == pytest.approx(-0.01)
    assert group["anchored_over_plain"]["anchor"]["value"] == pytest.approx(-0.16)
    assert group["anchored_over_better_of_source_only_and_scratch"]["joint"]["value"] == pytest.approx(0.0)
    assert group["anchored_within_1_point_of_that"] == {"joint": 1.0, "anchor": 0.0}
    assert group["selection_share_of_oracle_gain"] == pytest.approx(0.05 / 0.19)
    assert found["all"]["pairs"] == 2
    assert found["guard_on_unrelated_pairs"]["within_1_point_of_scratch"] == pytest.approx(2 / 3)
    assert found["guard_on_unrelated_pairs"]["kept"] == {"scratch": 1, "source": 0, "transferred": 2}
    assert found["guard_on_related_pairs"]["accuracy"]["kept"] == 0.9


def test_pooled_prompts_count_once_every_pair_has_them() -> None:
    """Against their own control and their own prompt untouched, not those of the single source."""
    pairs = {f"soft-16-music-{seed}": pair({ONE: 0.5}, 0.7) for seed in range(2)}
    pooled = {"pooled": 0.6, "pooled_source_only": 0.4, "pooled_joint": 0.65, "pooled_anchor": 0.6}
    pairs["soft-16-music-0"] |= pooled
    assert "pooled" not in transfer_summary.summary(pairs, {})["all"]["measures"]
    pairs["soft-16-music-1"] |= pooled | {"pooled": 0.8, "pooled_source_only": 0.8}
    found = transfer_summary.summary(pairs, {})["all"]
    assert found["measures"]["pooled"]["absolute_gain"]["value"] == pytest.approx(0.2)
    assert found["measures"]["pooled_source_only"]["absolute_gain"]["value"] == pytest.approx(0.1)
    assert found["anchored_over_plain"]["pooled_joint"]["value"] == pytest.approx(-0.05)
    over_better = found["anchored_over_better_of_source_only_and_scratch"]["pooled_joint"]
    assert over_better["value"] == pytest.approx(0.0)
    assert found["measures"]["pooled"]["shuffled_gain"]["value"] == pytest.approx(0.1)
    assert set(found["shuffled_over_scratch_of_its_setting"]) == {"shuffled"}
    for of in pairs.values():
        of["pooled_shuffled"] = 0.45
    found = transfer_summary.summary(pairs, {})["all"]
    assert found["measures"]["pooled"]["shuffled_gain"]["value"] == pytest.approx(-0.05)
    assert found["measures"]["plain"]["shuffled_gain"]["value"] == pytest.approx(0.1)


def test_the_joint_loss_of_all_domains_is_compared_once_every_pair_has_it() -> None:
    pairs = {f"soft-16-music-{seed}": pair({ONE: 0.5}, 0.7) for seed in range(2)}
    pairs["soft-16-music-0"]["joint_all"] = 0.75
    assert "joint_all" not in transfer_summary.summary(pairs, {})["all"]["measures"]
    pairs["soft-16-music-1"]["joint_all"] = 0.73
    found = transfer_summary.summary(pairs, {})["all"]
    assert found["anchored_over_plain"]["joint_all"]["value"] == pytest.approx(0.04)
    assert found["measures"]["joint_all"]["absolute_gain"]["value"] == pytest.approx(0.24)


def test_what_one_group_lacks_counts_in_the_others() -> None:
    pairs = {f"{method}-16-music-{seed}": pair({ONE: 0.5}, 0.7) for method in ("soft", "deep") for seed in range(2)}
    for seed in range(2):
        pairs[f"soft-16-music-{seed}"]["joint_all"] = 0.75
    found = transfer_summary.summary(pairs, {})
    assert found["soft-16"]["accuracy"]["joint_all"] == pytest.approx(0.75)
    assert not {"joint_all"} & (set(found["deep-16"]["accuracy"]) | set(found["all"]["accuracy"]))
    assert found["all"]["pairs"] == 4


def test_a_run_without_single_sources_is_summed_up_by_what_it_has() -> None:
    pairs = {
        f"deep-32-music-{seed}": {
            "scratch": {ONE: 0.5}, "pooled": 0.6, "pooled_source_only": 0.4, "pooled_shuffled": 0.5
        }
        for seed in range(2)
    }  # fmt: skip
    found = transfer_summary.summary(pairs, {})["all"]
    assert found["measures"]["pooled"]["absolute_gain"]["value"] == pytest.approx(0.1)
    assert found["measures"]["pooled"]["shuffled_gain"]["value"] == pytest.approx(0.0)
    assert "selection_share_of_oracle_gain" not in found
    transfer_summary.show({"all": found})


def test_controls_are_also_compared_with_scratch_of_their_own_setting() -> None:
    """Scratch with the best of twelve settings beats a control of one setting even where the source taught nothing."""
    pairs = {f"soft-16-music-{seed}": pair({ONE: 0.6, "b": 0.7}, 0.7) for seed in range(2)}
    found = transfer_summary.summary(pairs, {})["all"]
    assert found["measures"]["plain"]["shuffled_gain"]["value"] == pytest.approx(-0.1)
    assert found["shuffled_over_scratch_of_its_setting"]["shuffled"]["value"] == pytest.approx(0.0)


def test_longer_runs_are_compared_at_equal_and_at_their_best_lengths() -> None:
    """Plain tuning at its own best, which is its first length here: a strategy that only overfits later gains less."""
    pairs = {f"soft-16-music-{seed}": pair({ONE: 0.5}, 0.7, source_only=0.745) for seed in range(2)}
    longer = {"plain": [0.74, 0.70, 0.60], "joint": [0.70, 0.75, 0.73]}
    assert "longer" not in transfer_summary.summary(pairs, {})["soft-16"]
    pairs["soft-16-music-0"]["longer"] = longer
    assert transfer_summary.summary(pairs, {})["soft-16"]["longer"]["pairs"] == 1
    pairs["soft-16-music-1"]["longer"] = {"plain": [0.76, 0.80, 0.60], "joint": [0.72, 0.77, 0.75]}
    found = transfer_summary.summary(pairs, {})["soft-16"]["longer"]
    assert found["accuracy"]["plain"] == pytest.approx([0.75, 0.75, 0.60])
    assert [of["value"] for of in found["over_plain"]["joint"]] == pytest.approx([-0.04, 0.01, 0.14])
    assert found["best_over_best_plain"]["joint"]["value"] == pytest.approx(0.01)
    assert found["within_1_point"] == {"plain": [1.0, 0.5, 0.0], "joint": [0.0, 1.0, 0.5]}


def test_a_pooled_prompt_sees_every_domain_but_its_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the controls' labels are shuffled in both splits, as they are in no other kind."""
    lab = Lab(LANGUAGES["zh"], None, None, Path(), Path(), 32, 0)
    rows = [{"text": str(number), "label": "negative" if number < 20 else "positive"} for number in range(40)]
    monkeypatch.setattr(Lab, "domains", lambda _: ["fruit", "phone", "book"])
    monkeypatch.setattr(Lab, "rows", lambda _, domain, split: [row | {"from": (domain, split)} for row in rows])
    monkeypatch.setattr(Lab, "encoding", lambda _, held, name: held)
    trained, held = lab.lesson("pooled", "fruit")
    assert {row["from"] for row in trained} == {("phone", "train"), ("book", "train")}
    assert {row["from"] for row in held} == {("phone", "validation"), ("book", "validation")}  # type: ignore[attr-defined]
    for kind, is_right in (("sources", True), ("shuffled", False), ("pooled", True), ("pooled-shuffled", False)):
        for part in lab.lesson(kind, "fruit"):
            right = [row["label"] == ("negative" if int(row["text"]) < 20 else "positive") for row in part]  # type: ignore[attr-defined]
            assert all(right) is is_right


def test_a_folder_with_runs_of_other_settings_is_refused(tmp_path: Path) -> None:
    args = argparse.Namespace(
        **dict.fromkeys(experiment.FULL), minutes=None, language="zh", targets=None, virtual_tokens=8,
        pooled_only=False, bf16=False, rates=[3.0, 1.0], model=Path("somewhere/large"), out=tmp_path,
    )  # fmt: skip
    settings = experiment.held_settings(args)
    assert (settings["seeds"], settings["max_length"], settings["model"]) == (6, 128, "large")
    assert experiment.held_settings(args) == settings
    for name, value in (("seeds", 2), ("pooled_only", True), ("bf16", True)):
        other = argparse.Namespace(**vars(args) | {name: value})
        with pytest.raises(SystemExit, match="choose another folder"):
            experiment.held_settings(other)


def test_every_pair_is_one_process_s() -> None:
    settings = {"seeds": 3, "shots": [16, 32], "methods": ["soft", "deep"]}
    groups = list(experiment.pair_keys(settings, ["music", "health"]))
    shards = [key for index in range(5) for group in groups[index::5] for key in group]
    assert len(shards) == len(set(shards)) == 3 * 2 * 2 * 2


def test_held_out_texts_are_left_out() -> None:
    held = {corpus.key("The battery died after two days."), corpus.key("Bad.")}
    texts = [
        "the battery died , after two days .",
        "So: the battery died after two days. Sad!",
        "bad",
        "Not bad at all",
    ]
    assert corpus.drop_held_out(texts, held) == ["Not bad at all"]


def test_answers_are_marked_and_weighed() -> None:
    """The tokens of an answer, its blank included, and no others."""
    document = corpus._document("en", [("fine", "good"), ("poor", "bad")], ("sentiment",), "Opinion:", random.Random(0))
    assert document == "fine\nOpinion:\x1e good\x1e\n\npoor\nOpinion:\x1e bad\x1e"

    class Letters:
        bos_token_id, eos_token_id = 1, 2

        def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

    blocks = backbones.pack([document], Letters(), 37, 9)
    assert blocks.shape == (1, 2, 38)
    ids, weights = blocks[0].tolist()
    said = "".join(chr(token) for token, weight in zip(ids, weights, strict=True) if weight == 9)
    assert said == " good bad"
    assert ids[0] == 1
    assert set(weights) == {1, 9}


def test_joined_rows_keep_their_labels() -> None:
    rows = [(f"text {i}", "positive" if i % 3 else "negative") for i in range(60)]
    found = corpus.joined(rows, "en", random.Random(1))
    assert len(found) < len(rows)
    label_of = dict(rows)
    for text, label in found:
        parts = ["text" + part for part in text.split("text")[1:]]
        assert {label_of[part.strip()] for part in parts} == {label}
    assert sum(text.count("text") for text, _ in found) == len(rows)


def test_a_carried_prompt_must_beat_both() -> None:
    names = ("no_prompt", "own", *across.CARRY_METHODS, "random", "projector")
    scores = [(0.6, 0.9, 0.7, 0.7, 0.5, 0.8), (0.6, 0.9, 0.7, 0.5, 0.65, 0.65), (0.6, 0.9, 0.64, 0.7, 0.65, 0.64)]
    pairs = {str(i): dict(zip(names, row, strict=True)) for i, row in enumerate(scores)}
    found = across.summary(pairs)
    assert found["v2v_lin_beats_no_prompt_and_random"] == pytest.approx(2 / 3)
    assert found["projector_beats_no_prompt_and_random"] == pytest.approx(1 / 3)
    assert found["accuracy"]["own"] == pytest.approx(0.9)
    like = torch.full((4, 6), 0.25)
    rows = across.random_rows(torch.randn(4, 3), like, seed=0)
    assert rows.square().mean().sqrt().item() == pytest.approx(0.25, rel=1e-5)


def test_a_bag_of_words_sees_no_row_of_the_target_but_the_shots() -> None:
    class Rows:
        """Two domains whose words mean the opposite of each other."""

        def domains(self) -> list[str]:
            return ["music", "books"]

        def rows(self, domain: str, split: str) -> list[dict[str, str]]:
            words = {"good": "positive", "bad": "negative"}
            if domain == "books":
                words = {"good": "negative", "bad": "positive"}
            return [{"text": word, "label": label} for word, label in words.items()]

        def sample(self, domain: str, split: str, most: int) -> list[dict[str, str]]:
            return self.rows(domain, split)

        def shots(self, target: str, count: int, seed: int) -> list[dict[str, str]]:
            return self.rows(target, "train") * count

    settings = {"language": "en", "targets": ["music", "books"], "test_rows": 9, "shots": [2], "seeds": 2}
    found = experiment.bags_of_words(Rows(), settings)  # type: ignore[arg-type]
    assert found == {"all rows of the other domains": 0.0, "2 shots": 1.0}


def test_a_stage_goes_on_with_the_pairs_that_lack_its_scores(tmp_path: Path) -> None:
    settings = {"seeds": 1, "shots": [16], "methods": ["soft", "deep"], "targets": ["music", "health", "kitchen"]}
    (tmp_path / "pairs").mkdir()
    done, begun = ("soft", 16, "music", 0), ("soft", 16, "health", 0)
    experiment.add_scores(tmp_path, done, {"scratch": {}}, dict.fromkeys(experiment.POOLED, 0.5))
    experiment.add_scores(tmp_path, begun, {"scratch": {}}, {experiment.POOLED[0]: 0.5})
    experiment.add_scores(tmp_path, ("deep", 16, "health", 0), {"scratch": {}}, {})
    never, now = float("inf"), 0.0
    (found,) = experiment.lacking(experiment.POOLED, "soft", settings, tmp_path, never)
    assert found == {begun: {"scratch": {}, experiment.POOLED[0]: 0.5}}
    (found,) = experiment.lacking(experiment.POOLED_CONTROLS, "soft", settings, tmp_path, never)
    assert set(found) == {done, begun}
    assert list(experiment.lacking(experiment.POOLED, "soft", settings, tmp_path, now)) == []


def test_prompts_of_an_encoder_without_words_have_heads_that_learn_at_their_own_rate(tmp_path: Path) -> None:
    """A transferred prompt starts at a quarter of the rate of a fresh one, and so does its head."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=40,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    core = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "good": 2, "bad": 3}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    lab = Lab(LANGUAGES["en"], model, PreTrainedTokenizerFast(tokenizer_object=core), tmp_path, tmp_path, 20, 3)
    rows = [{"text": f"a {word}", "label": label} for word, label in (("good", "positive"), ("bad", "negative"))]
    for method in ("soft", "deep"):
        fresh = lab.fresh(method, 1)
        assert isinstance(fresh, HeadedPrompt)
        assert fresh.labels == lab.task.labels == ("negative", "positive")
        moved = start_from(model, fresh)
        for prompt, share in ((fresh, 1.0), (moved, 0.25)):
            fit = Fit(prompt, rows, None, 1, 1, prompt.default_learning_rate(), 0)
            config = lab._trainer(fit, str(tmp_path / "x")).config
            assert config.head_learning_rate == pytest.approx(share * HEAD_RATE)


def test_scratch_has_the_rate_that_controls_are_compared_with(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["transfer_fewshot.py", "--language", "en", "--model", "m", "--out", "o", "--stage", "pairs"]
    monkeypatch.setattr("sys.argv", [*asked, "--rates", "10", "1"])
    assert experiment.parse_arguments().rates == [10.0, 1.0]
    monkeypatch.setattr("sys.argv", [*asked, "--rates", "10", "3"])
    with pytest.raises(SystemExit):
        experiment.parse_arguments()
