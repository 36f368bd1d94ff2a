"""What the few-shot transfer experiment says of its pairs: means, paired intervals, and gains over scratch.

A pair is what one target, seed, method and number of shots scored, by name; see transfer_fewshot.py. Knows scores in
[0, 1] and no models.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ptengine.transfer import transfer_measures
from ptengine.transfer.measures import paired_interval

PLAIN_SETTING = "1 x rate, 1 x steps"
"""Scratch as everything else is tuned: what a control may be compared with that has no choice of setting either."""
ANCHORED = ("joint", "anchor")
JOINT_ALL = "joint_all"
LONGER = "longer"
"""Of a pair: by strategy, what it scored after one, two and three times the steps."""
RELATED = "related"
"""The source in the name of a guard's pair that took the other domains' prompts."""
SCORES = ("source_only", "plain", *ANCHORED, "shuffled", "oracle")
POOLED = ("pooled_source_only", "pooled")
POOLED_CONTROLS = (*(f"pooled_{name}" for name in ANCHORED), "pooled_shuffled")
_POINT = 0.01 + 1e-9


def gain(new: Any, old: Any, axis: int = -1) -> Any:
    return (new - old).mean(axis)


def summary(pairs: Mapping[str, Mapping[str, Any]], guards: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """By method and shots, and over all: accuracies, measures against scratch, and strategies compared.

    Of scores that not every pair of a group has there is nothing, but for the longer runs.
    """
    groups: dict[str, list[str]] = {}
    for name in pairs:
        groups.setdefault("-".join(name.split("-")[:2]), []).append(name)
    found: dict[str, Any] = {}
    columns: dict[str, list[float]] = {}
    for group, names in sorted(groups.items()):
        configurations = pairs[names[0]]["scratch"]
        mean = {of: statistics.mean(pairs[name]["scratch"][of] for name in names) for of in configurations}
        best = max(mean, key=mean.__getitem__)
        scores = {
            of: [pairs[name][of] for name in names]
            for of in (*SCORES, JOINT_ALL, *POOLED, *POOLED_CONTROLS)
            if all(of in pairs[name] for name in names)
        }
        scores["scratch"] = [pairs[name]["scratch"][best] for name in names]
        scores["scratch_of_one_setting"] = [pairs[name]["scratch"][PLAIN_SETTING] for name in names]
        found[group] = {"scratch_configuration": best, **compared(scores)}
        if longer := [name for name in names if LONGER in pairs[name]]:
            better = [max(pairs[name]["source_only"], pairs[name]["scratch"][best]) for name in longer]
            found[group][LONGER] = lengthened([pairs[name][LONGER] for name in longer], better)
        for of, values in scores.items():
            columns.setdefault(of, []).extend(values)
    if columns:
        found["all"] = compared({of: values for of, values in columns.items() if len(values) == len(pairs)})
    for kind, related in (("unrelated", False), ("related", True)):
        mine = [of for name, of in guards.items() if (f"-{RELATED}-" in name) is related]
        if mine:
            found[f"guard_on_{kind}_pairs"] = guarded(mine)
    return found


def guarded(pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the guard kept, and how often that was at most a point worse than scratch on the test rows."""
    names = ("scratch", "source", "transferred")
    near = (of["scratch"] - of["kept"] <= _POINT for of in pairs)
    return {
        "pairs": len(pairs),
        "within_1_point_of_scratch": statistics.mean(near),
        "kept": {name: sum(of["chosen"] == name for of in pairs) for name in names},
        "accuracy": {name: statistics.mean(of[name] for of in pairs) for name in ("scratch", "kept", "transferred")},
    }


def lengthened(pairs: Sequence[Mapping[str, Sequence[float]]], better: Sequence[float]) -> dict[str, Any]:
    """Every strategy by length, against plain tuning of that length, and each at its best length.

    The best length is the one with the best mean, picked on the test rows for plain tuning, too. `better` is the better
    of source-only and scratch, pair by pair.
    """
    lengths = range(len(pairs[0]["plain"]))
    scores = {name: [[pair[name][length] for pair in pairs] for length in lengths] for name in pairs[0]}
    mean = {name: [statistics.mean(of) for of in by_length] for name, by_length in scores.items()}
    best = {name: max(lengths, key=mean[name].__getitem__) for name in scores}
    best_plain = scores["plain"][best["plain"]]
    found: dict[str, Any] = {
        "pairs": len(pairs),
        "accuracy": mean,
        "over_plain": {},
        "best_over_best_plain": {},
        "within_1_point": {},
    }
    for name, by_length in scores.items():
        near = ([high - low <= _POINT for low, high in zip(of, better, strict=True)] for of in by_length)
        found["within_1_point"][name] = [statistics.mean(of) for of in near]  # the share of pairs
        if name != "plain":
            over = (paired_interval([*two], gain) for two in zip(by_length, scores["plain"], strict=True))
            found["over_plain"][name] = [interval.to_json() for interval in over]
            found["best_over_best_plain"][name] = paired_interval([by_length[best[name]], best_plain], gain).to_json()
    return found


def compared(scores: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    scratch = scores["scratch"]
    found: dict[str, Any] = {
        "pairs": len(scratch),
        "accuracy": {name: statistics.mean(values) for name, values in scores.items()},
        "measures": {},
        "anchored_over_plain": {},
        "anchored_over_better_of_source_only_and_scratch": {},
        "anchored_within_1_point_of_that": {},  # the share of pairs
    }
    for start, plain in (("", "plain"), ("pooled_", "pooled")):
        if plain not in scores:
            continue
        control = scores.get(f"{start}shuffled", scores.get("shuffled"))
        strategies = [f"{start}{name}" for name in (*ANCHORED, JOINT_ALL)]
        for name in (f"{start}source_only", plain, *strategies):
            if name in scores:
                measures = transfer_measures(scratch, scores[name], shuffled=control)
                found["measures"][name] = {of: value.to_json() for of, value in measures.items()}
        better = [max(pair) for pair in zip(scores[f"{start}source_only"], scratch, strict=True)]
        for name in strategies:
            if name in scores:
                for of, other in (("plain", scores[plain]), ("better_of_source_only_and_scratch", better)):
                    found[f"anchored_over_{of}"][name] = paired_interval([scores[name], other], gain).to_json()
                near = (high - low <= _POINT for low, high in zip(scores[name], better, strict=True))
                found["anchored_within_1_point_of_that"][name] = statistics.mean(near)
    found["shuffled_over_scratch_of_its_setting"] = {
        name: paired_interval([scores[name], scores["scratch_of_one_setting"]], gain).to_json()
        for name in ("shuffled", "pooled_shuffled")
        if name in scores
    }
    if "oracle" in scores:
        oracle_gain, chosen_gain = (
            statistics.mean(scores[name]) - statistics.mean(scratch) for name in ("oracle", "plain")
        )
        found["better_of_means"] = max(statistics.mean(scores["source_only"]), statistics.mean(scratch))
        found["selection_share_of_oracle_gain"] = chosen_gain / oracle_gain if oracle_gain > 0 else None
    return found


def show(found: Mapping[str, Any]) -> None:
    for group, of in found.items():
        if group.startswith("guard_on"):
            print(f"\n{group}: {json.dumps(of)}")
            continue
        print(f"\n{group}: {of['pairs']} pairs, scratch: {of.get('scratch_configuration', 'of each group')}")
        print("  " + ", ".join(f"{name} {100 * value:.2f}" for name, value in of["accuracy"].items()))
        for name, measures in of["measures"].items():
            told = [f"{m} {100 * v['value']:+.2f} [{100 * (v['low'] or 0):+.2f}, {100 * (v['high'] or 0):+.2f}]"
                    for m, v in measures.items() if m in ("absolute_gain", "shuffled_gain", "wins")]  # fmt: skip
            print(f"  {name}: " + ", ".join(told))
        if LONGER in of:
            print(f"  {LONGER}: {json.dumps(of[LONGER])}")
        if "selection_share_of_oracle_gain" in of:
            print(f"  selection's share of the oracle's gain: {of['selection_share_of_oracle_gain']}")
