"""How alike two prompts are, and how well a prompt already fits a few rows of another task.

Numbers in [-1, 1] for the cosines, greater is more alike; a loss in nats for the shots, smaller is better. Cosines
know prompts only; the loss needs the frozen model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ptengine.backbone.lowering import GatedTokens, TextDependentTokens, VirtualTokens
from ptengine.data import Task
from ptengine.errors import InputError
from ptengine.prompts.base import Prompt
from ptengine.training import evaluate
from ptengine.training.preparation import DataSource

__all__ = [
    "PROMPT_MEASURES",
    "mean_token_cosine",
    "prompt_similarity",
    "require_finite",
    "shot_metrics",
    "task_vector_cosine",
    "token_cosine",
    "token_vectors",
]


def require_finite(prompt: Prompt) -> None:
    """Raise `InputError` where `prompt`, or its head, has NaN or infinity among its numbers."""
    for name, tensor in prompt.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"expected a prompt of finite numbers, got NaN or infinity in its {name!r}")


@torch.no_grad()
def token_vectors(prompt: Prompt) -> Tensor:
    """A prompt as one vector per virtual token, fp64 on the CPU.

    [P, d] of virtual tokens, [P, L*2*H_kv*D] of a prefix, [P, A*d] of the A layers of gated tokens.

    Raises:
        InputError: the prompt depends on the text, or has numbers that are not finite.
    """
    require_finite(prompt)
    lowered = prompt.lower()
    if isinstance(lowered, VirtualTokens):
        return lowered.embeds.detach().to("cpu", torch.float64)  # [P, d]
    if isinstance(lowered, GatedTokens):
        return lowered.embeds.transpose(0, 1).flatten(1).detach().to("cpu", torch.float64)  # [P, A*d]
    if isinstance(lowered, TextDependentTokens):
        raise InputError(
            f"expected a prompt that no text changes to compare, got {prompt.method!r}, which depends on it"
        )
    both = torch.stack([lowered.keys, lowered.values], dim=1)  # [L, 2, P, H_kv, D]
    return both.permute(2, 0, 1, 3, 4).flatten(1).detach().to("cpu", torch.float64)  # [P, L*2*H_kv*D]


def mean_token_cosine(one: Prompt, other: Prompt) -> float:
    """Cosine of the two prompts' average tokens (SPoT, Vu et al. 2022, arXiv 2110.07904, section 5.1).

    Raises:
        InputError: the prompts are of different kinds or widths, an average is zero, or a number is not finite.
    """
    a, b = _pair(one, other)
    return _cosine(a.mean(dim=0), b.mean(dim=0))


def token_cosine(one: Prompt, other: Prompt) -> float:
    """Mean cosine over all pairs of a token of one and a token of the other (SPoT, "per-token average").

    Independent of the order of the tokens; the prompts may differ in length. Raises as `mean_token_cosine`.
    """
    a, b = _pair(one, other)
    for x in (a, b):
        if bool((x.norm(dim=1) == 0).any()):
            raise InputError("expected prompts without tokens of all zeros to take cosines of, got one")
    return float((F.normalize(a, dim=1) @ F.normalize(b, dim=1).T).mean())  # [P, P'] -> []


def task_vector_cosine(one: Prompt, one_initial: Prompt, other: Prompt, other_initial: Prompt) -> float:
    """Cosine of what training moved: tau = P - P0, all its numbers as one vector (Belanec et al. 2024, 2408.01119).

    Raises:
        InputError: the two did not start from the same numbers, where their vectors mean nothing to each other; the
            prompts differ in kind or length; or one did not move.
    """
    starts = token_vectors(one_initial), token_vectors(other_initial)
    if starts[0].shape != starts[1].shape or not torch.equal(*starts):
        raise InputError("expected prompts trained from the same initial prompt to compare task vectors, got two")
    a, b = _pair(one, other)
    if a.shape != b.shape or a.shape != starts[0].shape:
        raise InputError(f"expected prompts of one length to compare task vectors, got {len(a)} and {len(b)} tokens")
    return _cosine((a - starts[0]).flatten(), (b - starts[1]).flatten())


PROMPT_MEASURES = ("mean_token_cosine", "token_cosine", "task_vector_cosine")
"""Measures of two prompts alone; with "shot_loss" all that a bank searches by."""


def prompt_similarity(
    measure: str, one: Prompt, other: Prompt, one_initial: Prompt | None = None, other_initial: Prompt | None = None
) -> float:
    """The measure called `measure`, one of `PROMPT_MEASURES`.

    Raises:
        InputError: an unknown measure; as the measure itself; task vectors without initial prompts.
    """
    if measure == "mean_token_cosine":
        return mean_token_cosine(one, other)
    if measure == "token_cosine":
        return token_cosine(one, other)
    if measure != "task_vector_cosine":
        raise InputError(f"expected a measure of two prompts, one of {', '.join(PROMPT_MEASURES)}, got {measure!r}")
    if one_initial is None or other_initial is None:
        raise InputError("expected both prompts with their initial prompt P0 to compare task vectors, got one without")
    return task_vector_cosine(one, one_initial, other, other_initial)


def shot_metrics(
    model: Any, tokenizer: Any, task: Task, shots: DataSource, prompt: Prompt, **options: Any
) -> Mapping[str, float]:
    """What `prompt`, untouched, scores on the target's few rows: its metrics, "loss" among them.

    Cheap, since nothing is trained, and the only measure that has seen the target. `options` are those of
    `ptengine.training.evaluate`.
    """
    return evaluate(model, prompt, task, shots, tokenizer, **options).metrics


def _pair(one: Prompt, other: Prompt) -> tuple[Tensor, Tensor]:
    kinds = [type(prompt.lower()).__name__ for prompt in (one, other)]
    a, b = token_vectors(one), token_vectors(other)
    if kinds[0] != kinds[1] or a.shape[1] != b.shape[1]:
        raise InputError(
            f"expected two prompts of one kind and backbone to compare, got {one.method} of width {a.shape[1]} and "
            f"{other.method} of width {b.shape[1]}"
        )
    return a, b


def _cosine(a: Tensor, b: Tensor) -> float:
    norms = a.norm() * b.norm()
    if norms == 0:
        raise InputError("expected two vectors other than zero to take a cosine of, got a prompt that is all zeros")
    return float((a @ b / norms).clamp(-1, 1))
