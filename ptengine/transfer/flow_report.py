"""The report of one flow: what was kept and why, scores on the test rows, and what the transfer was worth.

Knows the flow's result; files are written by `ptengine.transfer.report`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptengine.data import LabelledTask
from ptengine.transfer.domains import DOMAIN_MEASURES
from ptengine.transfer.flow import CONTROL, CURVE_ROWS, FlowResult, described
from ptengine.transfer.guard import SCRATCH, SOURCE, TRANSFERRED
from ptengine.transfer.measures import Interval, steps_to_reach, transfer_measures
from ptengine.transfer.plots import gain_heat_map, learning_curves, similarity_scatter
from ptengine.transfer.report import Figure, Report, Table

__all__ = ["flow_report"]

_COLUMNS = ("accuracy", "macro_f1", "loss")
_ADAPTIVITY = {
    "text_loss": "loss of the texts",
    "term_coverage": "domain terms near",
    "num_virtual_tokens": "virtual tokens",
    "template_perplexity": "perplexity of the template",
    "token_distance": "distance to the nearest word",
    "norm_ratio": "length over a word's",
}


def flow_report(result: FlowResult, task: LabelledTask, target: str) -> Report:
    """The report of `result` on the target called `target`."""
    measures = transfer_measures(
        result.test[SCRATCH].correct,
        result.test[TRANSFERRED].correct,
        source_only=result.test[SOURCE].correct,
        shuffled=result.test[CONTROL].correct if CONTROL in result.test else None,
    )
    data = {**described(result, task), "measures": {name: value.to_json() for name, value in measures.items()}}
    data["steps_to_scratch"] = _steps_to_scratch(result)
    return Report(
        title=f"Transfer to {target}",
        summary=_summary(result, measures, data["steps_to_scratch"]),
        tables=_tables(result, task, measures),
        figures=_figures(result, target),
        notes=_notes(result),
        data=data,
    )


def _summary(result: FlowResult, measures: Mapping[str, Interval], steps: int | None) -> list[str]:
    decision = result.transfer.decision
    kept = result.transfer.chosen
    accuracy = {name: judged.metrics["accuracy"] for name, judged in result.test.items()}
    lines = [] if decision is None else [f"The guard: {decision.reason}."]
    lines += [
        f"On {len(result.test[SCRATCH].correct)} test rows the kept prompt ({kept}) has accuracy {accuracy[kept]:.3f}; "
        f"transferred {accuracy[TRANSFERRED]:.3f}, scratch {accuracy[SCRATCH]:.3f}, source untouched "
        f"{accuracy[SOURCE]:.3f}.",
        f"Transferred over scratch: {_points(measures['absolute_gain'])}: {_verdict(measures['absolute_gain'])}.",
    ]
    if CONTROL in result.test:
        lines.append(
            f"Control, from a source with shuffled labels: {_points(measures['shuffled_gain'])} over scratch. What "
            "transfer gains beyond that is knowledge of the source's labels."
        )
    if steps is not None:
        lines.append(f"The transferred prompt reached scratch's last accuracy after {steps} optimiser steps.")
    if result.unseen:
        lines.append(f"No shot has the label {', '.join(result.unseen)}: training on the target says nothing of it.")
    best = max(result.baselines, key=result.baselines.__getitem__)
    if result.baselines[best] > accuracy[kept]:
        lines.append(
            f"A {best} with accuracy {result.baselines[best]:.3f} is better than the kept prompt: this backbone has "
            "little to call up for this task."
        )
    return lines


def _points(interval: Interval) -> str:
    text = f"{100 * interval.value:+.1f} points"
    if interval.low is None or interval.high is None:
        return text
    return f"{text} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"


def _verdict(gain: Interval) -> str:
    if gain.low is None or gain.high is None:
        return "too few rows for an interval"
    if gain.low > 0:
        return "better than chance alone would explain on these rows"
    if gain.high < 0:
        return "negative transfer on these rows"
    return "these rows cannot tell the two apart"


def _tables(result: FlowResult, task: LabelledTask, measures: Mapping[str, Interval]) -> list[Table]:
    rows: list[list[Any]] = [[name, value, None, None] for name, value in result.baselines.items()]
    rows += [[name, *(judged.metrics[column] for column in _COLUMNS)] for name, judged in result.test.items()]
    kept = result.test[result.transfer.chosen]
    labels = list(task.labels)
    decision = result.transfer.decision
    tables = [
        Table("Test scores", ["", *_COLUMNS], rows),
        Table(
            "Measures over the test rows, with 95 % paired bootstrap intervals",
            ["measure", "value", "low", "high"],
            [[name, value.value, value.low, value.high] for name, value in measures.items()],
        ),
    ]
    if decision is not None:
        tables.append(
            Table(
                "The guard, on held-back shots",
                ["candidate", decision.metric, "loss"],
                [[name, score, decision.losses[name]] for name, score in decision.scores.items()],
            )
        )
    tables += [
        Table(
            f"Kept prompt ({result.transfer.chosen}) by label",
            ["label", "precision", "recall", "f1", "rows"],
            [[name, s.precision, s.recall, s.f1, s.support] for name, s in kept.by_label.items()],
        ),
        Table(
            "Confusion of the kept prompt: gold labels down, predicted ones across",
            ["", *labels],
            [[name, *counts] for name, counts in zip(labels, kept.confusion, strict=True)],
        ),
        Table(
            f"Sources by {result.transfer.search.measure}",
            ["source", result.transfer.search.measure, "weight in the start", "accuracy untouched"],
            [
                [
                    match.entry.name, match.score, result.transfer.selected.get(match.entry.name, 0.0),
                    result.sources[match.entry.name].metrics["accuracy"],
                ]
                for match in result.transfer.search.matches
                if match.entry.name in result.sources
            ],
        ),
    ]  # fmt: skip
    if result.adaptivity:
        tables.append(
            Table(
                "Adaptivity: content (text loss, term coverage) and form",
                ["", *_ADAPTIVITY.values()],
                [[name, *(getattr(its, field) for field in _ADAPTIVITY)] for name, its in result.adaptivity.items()],
            )
        )
    return tables


def _figures(result: FlowResult, target: str) -> list[Figure]:
    scratch = result.test[SCRATCH].metrics["accuracy"]
    gains = {name: judged.metrics["accuracy"] - scratch for name, judged in result.sources.items()}
    measure = result.transfer.search.measure
    points = [
        (match.entry.name, match.score, gains[match.entry.name])
        for match in result.transfer.search.matches
        if match.entry.name in gains
    ]
    table = {name: {f"{target}, untouched": gain} for name, gain in gains.items()}
    for name in result.transfer.selected:
        if name in table:
            table[name][f"{target}, tuned"] = result.test[TRANSFERRED].metrics["accuracy"] - scratch
    figures = [
        Figure("gains", "Accuracy over scratch in points, source by source.", gain_heat_map(table)),
        Figure(
            "similarity", f"{measure} of each source against its untouched gain.", similarity_scatter(points, measure)
        ),
    ]
    if all(result.curves.get(name) for name in (SCRATCH, TRANSFERRED)):
        caption = f"Accuracy on test rows, {CURVE_ROWS} of them drawn at most, while training on the shots."
        figures.insert(0, Figure("curves", caption, learning_curves(result.curves, "accuracy")))
    return figures


def _notes(result: FlowResult) -> list[str]:
    lines = ["; ".join(part.strip() for part in report.lines()) for report in result.cleaning]
    if result.uncontrolled is not None:
        lines.append(f"There is no control with shuffled labels: {result.uncontrolled}.")
    lines += [f"Banked prompt {name} was left out: {reason}." for name, reason in result.left_out.items()]
    taught, augmented = result.transfer.taught, result.transfer.augmented
    if taught is not None:
        said = ", ".join(f"{label} {count}" for label, count in taught.labels.items())
        lines.append(f"Of {taught.texts} unlabelled texts the source was sure enough of {taught.kept}: {said}.")
        if taught.one_label:
            lines.append("All of them got one label: they teach to say it, and nothing about when.")
    if result.transfer.untaught:
        folds = ", ".join(result.transfer.untaught)
        lines.append(f"In {folds} of the guard the source was sure of no unlabelled text: trained on shots alone.")
    if augmented is not None:
        lines.append(f"{augmented.made} changed copies of the {augmented.rows} shots were trained on beside them.")
    if result.transfer.likeness is not None:
        lines.append(f"Source and target are {result.transfer.likeness:.3f} alike, by which distillation was weighted.")
    if result.transfer.search.measure == "shot_loss":
        lines.append(
            "shot_loss is the untouched source prompt's loss on the target's shots, in nats: smaller is closer."
        )
    if result.transfer.search.measure in DOMAIN_MEASURES:
        lines.append(
            f"{result.transfer.search.measure} is the distance between what the frozen model makes of the shots' texts "
            "and of the source's: smaller is closer."
        )
    if result.adaptivity:
        lines.append(
            "Adaptivity describes and decides nothing: nats per token of the shots' texts behind the prompt; the share "
            "of words typical of the target whose token is among the 20 nearest to a virtual token; 1 - cosine to the "
            "nearest word embedding. A prefix has no place among the words."
        )
    lines.append(
        "Intervals resample test rows of this one run; they say nothing about other draws of shots or other seeds."
    )
    lines.append(
        "A prompt can call up and combine what the frozen model does; it cannot teach it new skills "
        "(Petrov et al. 2023, arXiv 2310.19698)."
    )
    return lines


def _steps_to_scratch(result: FlowResult) -> int | None:
    scratch, moved = result.curves.get(SCRATCH), result.curves.get(TRANSFERRED)
    return steps_to_reach(moved, scratch[-1][1]) if scratch and moved else None
