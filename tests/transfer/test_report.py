"""Reports: the three forms hold the same, the page needs nothing beside it, and odd text breaks nothing."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ptengine.transfer.plots import gain_heat_map, learning_curves, similarity_scatter
from ptengine.transfer.report import Figure, Report, Table, write_report

GAINS = {"书 book": {"水果": 0.031, "phone": -0.02}, "a<b": {"phone": 0.0}}


def texts(svg: str) -> str:
    return " ".join(
        "".join(node.itertext()) for node in ElementTree.fromstring(svg).iter() if node.tag.endswith("text")
    )


def test_figures_say_their_numbers_and_names() -> None:
    said = texts(gain_heat_map(GAINS))
    for words in ("书 book", "水果", "+3.1", "-2.0", "+0.0", "a<b"):
        assert words in said
    assert said.count("+") == 2
    curve = learning_curves({"scratch": [(1, 0.5), (2, 0.6)], "迁移": [(1, 0.7)]}, "accuracy")
    assert "迁移" in texts(curve)
    assert "accuracy" in texts(curve)
    assert "book" in texts(similarity_scatter([("book", 0.3, 0.01)], "cosine"))
    assert gain_heat_map(GAINS) == gain_heat_map(GAINS)
    assert gain_heat_map({"a": {"b": 0.0}}).startswith("<svg")


class _Page(HTMLParser):
    """Collects the text of a page and every address in it."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "data")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_three_forms(tmp_path: Path) -> None:
    report = Report(
        title="From <a> & b",
        summary=["kept | scratch"],
        tables=[Table("Scores", ["", "accuracy"], [["x|y", 0.5], ["<script>", None]])],
        figures=[Figure("gains", "gains & losses", gain_heat_map(GAINS))],
        notes=["one\nline"],
        data={"chosen": "scratch", "名": [1, None]},
    )
    paths = write_report(tmp_path / "out", report)
    assert json.loads(paths["json"].read_text(encoding="utf-8")) == report.data
    said = paths["markdown"].read_text(encoding="utf-8")
    assert "| x\\|y | 0.5000 |" in said
    assert "- kept \\| scratch\n" in said
    assert "- one line\n" in said
    assert "(gains.svg)" in said
    ElementTree.fromstring((tmp_path / "out" / "gains.svg").read_text(encoding="utf-8"))
    text = paths["html"].read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    words = " ".join(page.words)
    for part in ("From <a> & b", "kept | scratch", "x|y", "0.5000", "<script>", "gains & losses", "水果"):
        assert part in words
    # Self-contained: every address points into the page itself.
    assert all(link.startswith("#") for link in page.links)
    assert not re.search(r"url\((?!#)", text)


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    good = Report("t", [], [], data={"a": 1})
    write_report(tmp_path, good)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="JSON"):
        write_report(tmp_path, Report("u", [], [], data={"a": float("nan")}))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_dollar_in_a_name_begins_no_formula() -> None:
    """The report of a finished transfer to cost_$5_and_$6.csv failed in matplotlib's parser of mathematics."""
    name = "cost_$5_and_$6"
    for svg in (
        gain_heat_map({name: {name: 0.1}}),
        learning_curves({name: [(1, 0.5), (2, 0.6)]}, "accuracy"),
        similarity_scatter([(name, 1.0, 0.1)], "shot_loss"),
    ):
        assert name in texts(svg)


def test_markdown_holds_no_html_and_no_cells_of_a_label(tmp_path: Path) -> None:
    label = "<script>a&b</script> x\\|y"
    report = Report(label, [label], [Table(label, ["label"], [[label]])], notes=[label])
    text = write_report(tmp_path, report)["markdown"].read_text()
    assert "<script>" not in text
    assert text.count("&lt;script>a&amp;b&lt;/script> x\\\\\\|y") == 5
