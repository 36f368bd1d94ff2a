"""How far two domains lie apart, as a frozen backbone sees their texts: embeddings, and distances between sets of them.

The distances are numbers of at least 0; 0 is alike, smaller is nearer. Knows texts, a tokenizer and a frozen model, and
sets of vectors; no prompt and no bank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptengine.backbone import backbone_spec, pack_rows
from ptengine.backbone.step import text_hidden
from ptengine.data import Task, check_columns, load_rows
from ptengine.data.sources import name_of
from ptengine.errors import InputError, UnsupportedModelError
from ptengine.training.freezing import frozen
from ptengine.training.preparation import DataSource

__all__ = [
    "DOMAIN_MEASURES",
    "LEAST_TEXTS",
    "domain_distance",
    "domain_embeddings",
    "domain_texts",
    "maximum_mean_discrepancy",
    "proxy_a_distance",
    "texts_of",
]

MOST_TEXTS = 200
"""Texts that stand for a domain in a bank; of more, as many at even distances, since files are often sorted."""

MOST_TOKENS = 128
BATCH = 32
_FOLDS = 5


def domain_texts(data: DataSource, task: Task) -> list[str]:
    """The texts of `data` that stand for its domain, `MOST_TEXTS` of `texts_of` at most; raises as it does."""
    texts = texts_of(data, task)
    count = min(len(texts), MOST_TEXTS)
    return [texts[i * len(texts) // count] for i in range(count)]


def texts_of(data: DataSource, task: Task) -> list[str]:
    """The texts of `data` that are not blank, without their answers, which need not be there.

    The columns of a row are joined with line breaks, words with blanks; a null is no text.

    Raises:
        InputError: a column is missing, or as `ptengine.data.load_rows`.
    """
    name = name_of(data, "rows")
    dataset, columns = load_rows(data, name=name), task.text_columns
    check_columns(dataset, columns, name)
    rows = dataset.select_columns([*dict.fromkeys(columns)]).with_format(None)
    texts = ("\n".join(_text(row[column]) for column in columns) for row in rows)
    return [text for text in texts if text.strip()]


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(_text(word) for word in value)
    return "" if value is None else str(value)


@torch.no_grad()
def domain_embeddings(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """The mean of the frozen model's last hidden states over each text's tokens: fp32 [n, d] on the CPU.

    No prompt, no template; texts are cut to `MOST_TOKENS` tokens.

    Raises:
        InputError: no texts, or one of no tokens.
        UnsupportedModelError: an encoder-decoder, or as `ptengine.patch`.
    """
    if not texts:
        raise InputError("expected at least one text to embed, got none")
    spec = backbone_spec(model)
    if spec.kind == "seq2seq":
        raise UnsupportedModelError(f"model type {spec.model_type!r} is not supported here: it embeds no text alone")
    ids = [row[: min(MOST_TOKENS, spec.max_positions)] for row in tokenizer(list(texts), verbose=False)["input_ids"]]
    empty = [index for index, row in enumerate(ids) if not row]
    if empty:
        raise InputError(f"text {empty[0]}: expected at least one token to embed, got {texts[empty[0]]!r}")
    means = []
    with frozen(model):
        for start in range(0, len(ids), BATCH):
            batch = pack_rows(ids[start : start + BATCH]).to(spec.word_embeddings.weight.device)
            hidden = text_hidden(spec, None, batch).float().cpu()  # [tokens, d]
            parts = hidden.split(batch.cu_seqlens.diff().tolist())
            means += [part.mean(dim=0) for part in parts]
    return torch.stack(means)  # [n, d]


def maximum_mean_discrepancy(one: Tensor, other: Tensor) -> float:
    """MMD^2 = mean k(x, x') + mean k(y, y') - 2 mean k(x, y) over all pairs (Gretton et al. 2012, equation 5).

    The kernel is Gaussian, exp(-|a - b|^2 / (2 s^2)), with the median distance of different vectors for s.

    Args:
        one, other: [n, d] and [m, d].

    Raises:
        InputError: no vectors on a side, vectors of different widths or that are not finite.
    """
    a, b = _sides(one, other)
    both = torch.cat([a, b])
    # By differences: the products that torch takes for many rows leave equal vectors a little apart.
    distances = torch.cdist(both, both, compute_mode="donot_use_mm_for_euclid_dist")
    squares = distances.square()  # [n + m, n + m]
    above = squares[torch.ones_like(squares).triu(1).bool()]
    different = above[above > 0]
    if different.numel() == 0:
        return 0.0  # all texts are one and the same
    kernel = torch.exp(-squares / (2 * different.median()))
    n = len(a)
    value = kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()
    return max(float(value), 0.0)


def proxy_a_distance(one: Tensor, other: Tensor) -> float:
    """2 (1 - 2 e), where e is the held-out error of a linear classifier that tells the two domains apart (Ben-David et
    al. 2007); from 0, where it can do no better than guess, to 2.

    Logistic regression on standardised vectors, five folds, both sides cut to as many vectors as the smaller has.

    Args:
        one, other: [n, d] and [m, d].

    Raises:
        InputError: fewer than five vectors on a side; else as `maximum_mean_discrepancy`.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    a, b = _sides(one, other)
    size = min(len(a), len(b))
    if size < LEAST_TEXTS["proxy_a_distance"]:
        raise InputError(f"expected at least {_FOLDS} texts on both sides for the proxy A distance, got {size}")
    x = torch.cat([a[:size], b[:size]]).numpy()
    y = np.repeat([0, 1], size)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    right = cross_val_score(classifier, x, y, cv=StratifiedKFold(_FOLDS, shuffle=True, random_state=0))
    return float(max(2 * (1 - 2 * (1 - right.mean())), 0.0))


DOMAIN_MEASURES = ("mmd", "proxy_a_distance")
"""Distances between the texts that prompts were tuned on; a bank keeps embeddings of those."""

LEAST_TEXTS = {"mmd": 1, "proxy_a_distance": _FOLDS}
"""Texts that a distance of domains needs on both sides."""

_DISTANCES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "mmd": maximum_mean_discrepancy,
    "proxy_a_distance": proxy_a_distance,
}


def domain_distance(measure: str, one: Tensor, other: Tensor) -> float:
    """The distance called `measure`, one of `DOMAIN_MEASURES`; raises as it does."""
    if measure not in _DISTANCES:
        raise InputError(f"expected a distance of domains, one of {', '.join(DOMAIN_MEASURES)}, got {measure!r}")
    return _DISTANCES[measure](one, other)


def _sides(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    a, b = (x.detach().to("cpu", torch.float64) for x in (one, other))
    if a.dim() != 2 or b.dim() != 2 or len(a) == 0 or len(b) == 0 or a.shape[1] != b.shape[1]:
        raise InputError(f"expected vectors [n, d] and [m, d] on both sides, got {list(a.shape)} and {list(b.shape)}")
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise InputError("expected finite vectors, got NaN or infinity")
    return a, b
