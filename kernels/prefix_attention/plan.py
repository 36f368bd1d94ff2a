"""How a call is cut into rectangles of attention: which tokens read which prefix, which rows run together.

Computed on the host from lengths alone, once for all layers of a step that share them (the plans of the last few calls
are kept). Knows no scores and does no arithmetic on keys or values.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["DenseBlock", "OwnBlock", "Plan", "PrefixBlock", "RowBlock", "plan_dense", "plan_varlen"]

_SHORT = 16  # rows up to this long share one bucket: padding them costs less than another call


@dataclass(frozen=True)
class RowBlock:
    """Rows of similar length from a packed batch, padded to the longest of them inside the call."""

    index: Tensor  # int64 [R, T]: packed positions; a row's padding repeats its last token
    real: Tensor | None  # bool [R, T]; None where no row is padded
    flat: tuple[int, int] | None  # (first token, one past the last) where the rows are neighbours of one length
    causal: bool

    def hidden_keys(self, positional: bool) -> Tensor | None:
        """Keys to hide beyond causality, bool [R, T, T] or None. Plain causal rows never reach their padding: it comes
        last in the rectangle, but it repeats the last token's position."""
        if self.real is None or (self.causal and not positional):
            return None
        return (~self.real)[:, None, :].expand(-1, self.real.shape[1], -1)

    def take_queries(self, x: Tensor) -> Tensor:
        """[M, H, D] -> [R, H, T, D]"""
        if self.flat is not None:
            return x[self.flat[0] : self.flat[1]].unflatten(0, self.index.shape).transpose(1, 2)
        return x[self.index].transpose(1, 2)

    take_keys = take_queries

    def take_gradients(self, x: Tensor) -> Tensor:
        """As `take_queries`, with zeros at padding, which then contributes nothing to any gradient."""
        taken = self.take_queries(x)
        return taken if self.real is None else taken * self.real[:, None, :, None].to(x.dtype)

    def take_lse(self, lse: Tensor) -> Tensor:
        """[H, M] -> [R, H, T]"""
        return lse[:, self.index].transpose(0, 1)

    def put_queries(self, target: Tensor, x: Tensor) -> None:
        """Write [R, H, T, D] to the rows' tokens of [M, H, D]."""
        rows = x.transpose(1, 2)  # [R, T, H, D]
        if self.flat is not None:
            target[self.flat[0] : self.flat[1]] = rows.flatten(0, 1)
        elif self.real is None:
            target[self.index] = rows
        else:
            target[self.index[self.real]] = rows[self.real]

    put_keys = put_queries

    def put_lse(self, target: Tensor, lse: Tensor) -> None:
        """Write [R, H, T] to the rows' tokens of [H, M]."""
        rows = lse.transpose(0, 1)  # [H, R, T]
        if self.real is None:
            target[:, self.index] = rows
        else:
            target[:, self.index[self.real]] = rows[:, self.real]

    def query_positions(self, plan: Plan) -> Tensor:
        """[R, T]"""
        return plan.positions[self.index]

    key_positions = query_positions


@dataclass(frozen=True)
class DenseBlock:
    """A stock batch: queries token-major [B * Tq, H, D], keys as they lie in a cache, [B, H_kv, Tk, D]."""

    batch: int
    q_len: int
    k_len: int
    causal: bool
    hidden: Tensor | None  # bool [B, Tq, Tk]: padding, and causality where it is not plain
    padding: Tensor | None  # bool [B, Tk]: slots that hold no token
    first_position: Tensor  # int64 [B]: position of the key in slot 0 (negative under left padding)

    def hidden_keys(self, positional: bool) -> Tensor | None:
        return self.hidden

    def take_queries(self, x: Tensor) -> Tensor:
        """[B * Tq, H, D] -> [B, H, Tq, D]"""
        return self._without_padding(x.unflatten(0, (self.batch, self.q_len)).transpose(1, 2))

    take_gradients = take_queries

    def take_keys(self, x: Tensor) -> Tensor:
        return self._without_padding(x)

    def _without_padding(self, x: Tensor) -> Tensor:
        """Zeros in padded slots of [B, H, T, D]: anything may lie there, and a weight of 0 times NaN is NaN."""
        return x if self.padding is None else x.masked_fill(self.padding[:, None, -x.shape[2] :, None], 0.0)

    def take_lse(self, lse: Tensor) -> Tensor:
        """[H, B * Tq] -> [B, H, Tq]"""
        return lse.unflatten(1, (self.batch, self.q_len)).transpose(0, 1)

    def put_queries(self, target: Tensor, x: Tensor) -> None:
        target.copy_(x.transpose(1, 2).flatten(0, 1))

    def put_keys(self, target: Tensor, x: Tensor) -> None:
        target.copy_(x)

    def put_lse(self, target: Tensor, lse: Tensor) -> None:
        target.copy_(lse.transpose(0, 1).flatten(1))

    def query_positions(self, plan: Plan) -> Tensor:
        """[B, Tq]"""
        return plan.positions.unflatten(0, (self.batch, self.q_len))

    def key_positions(self, plan: Plan) -> Tensor:
        """[B, Tk]"""
        return self.first_position[:, None] + torch.arange(self.k_len, device=self.first_position.device)


OwnBlock = RowBlock | DenseBlock


@dataclass(frozen=True)
class PrefixBlock:
    """All tokens that read one prefix: prompt `prompt` of the given prefixes, or the batch's row at `row_tokens`."""

    tokens: slice | Tensor  # of [M]
    length: int  # P_n
    prompt: int | None
    row_tokens: slice | None

    def keys(self, rows: Tensor, prefix: Tensor | None) -> Tensor:
        """[P_n, H_kv, D] out of the packed rows [S, H_kv, D] or the given prefixes [N, P, H_kv, D]."""
        if self.row_tokens is not None:
            return rows[self.row_tokens]
        assert prefix is not None
        return prefix[self.prompt, : self.length]

    def add_keys(self, rows: Tensor, prefix: Tensor | None, x: Tensor) -> None:
        """Add the gradient x [P_n, H_kv, D] where `keys` came from."""
        if self.row_tokens is not None:
            rows[self.row_tokens] += x
        else:
            assert prefix is not None
            prefix[self.prompt, : self.length] += x


@dataclass(frozen=True)
class Plan:
    """Own rectangles cover every token exactly once, prefix rectangles each token at most once."""

    own: tuple[OwnBlock, ...]
    prefixes: tuple[PrefixBlock, ...]
    positions: Tensor  # int64 [M]: position of every query


@lru_cache(maxsize=16)
def plan_varlen(
    bounds: tuple[int, ...],
    prompt_of_row: tuple[int, ...] | None,
    source_of_row: tuple[int, ...] | None,
    prompt_lengths: tuple[int, ...],
    causal: bool,
    device: torch.device,
) -> Plan:
    """Plan a packed call.

    Args:
        bounds: cu_seqlens.
        prompt_of_row: the prompt each row reads, -1 for none; None where prefixes are rows or there are none.
        source_of_row: the row each row reads, -1 for none; None where prefixes are given apart or there are none.
        prompt_lengths: P_n of every prompt given apart.
        causal: whether a token sees only its row's earlier tokens and itself.
        device: where the tensors are.
    """
    lengths = [end - start for start, end in pairwise(bounds)]
    if source_of_row is not None:
        prefix_of_row = [lengths[source] if source >= 0 else 0 for source in source_of_row]
        readers = _group(source_of_row)
    elif prompt_of_row is not None:
        prefix_of_row = [prompt_lengths[prompt] if prompt >= 0 else 0 for prompt in prompt_of_row]
        readers = _group(prompt_of_row)
    else:
        prefix_of_row, readers = [0] * len(lengths), {}
    prefixes = []
    for key, rows in readers.items():
        size = prefix_of_row[rows[0]]
        tokens = _tokens([(bounds[row], bounds[row + 1]) for row in rows], device)
        if size == 0 or tokens is None:
            continue
        row_tokens = slice(bounds[key], bounds[key + 1]) if source_of_row is not None else None
        prefixes.append(PrefixBlock(tokens, size, None if row_tokens else key, row_tokens))
    row_of_token = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))  # [M]
    shift = torch.tensor(prefix_of_row, dtype=torch.int64) - torch.tensor(bounds[:-1], dtype=torch.int64)  # [rows]
    positions = torch.arange(bounds[-1]) + shift[row_of_token]  # [M]
    return Plan(_buckets(bounds, lengths, causal, device), tuple(prefixes), positions.to(device))


@lru_cache(maxsize=16)
def plan_dense(
    q_len: int,
    k_len: int,
    key_starts: tuple[int, ...],
    key_lengths: tuple[int, ...],
    prompt_of_row: tuple[int, ...] | None,
    prompt_lengths: tuple[int, ...],
    causal: bool,
    device: torch.device,
) -> Plan:
    """Plan a dense call: row b's tokens are the keys in slots key_starts[b] to key_lengths[b], its queries the last
    q_len slots."""
    batch, gap = len(key_starts), k_len - q_len
    bounded = any(key_starts) or any(end < k_len for end in key_lengths)
    prefix_of_row = [0] * batch
    if prompt_of_row is not None:
        prefix_of_row = [prompt_lengths[prompt] if prompt >= 0 else 0 for prompt in prompt_of_row]
    starts, ends = torch.tensor(key_starts, device=device), torch.tensor(key_lengths, device=device)  # [B]
    slot = torch.arange(k_len, device=device)  # [Tk]
    first_position = torch.tensor(prefix_of_row, device=device) - starts  # [B]
    hidden = padding = None
    if bounded or (causal and q_len not in (1, k_len)):
        inside = (slot >= starts[:, None]) & (slot < ends[:, None])  # [B, Tk]
        hidden = ~(inside[:, gap:, None] & inside[:, None, :])  # [B, Tq, Tk]
        padding = ~inside if bounded else None
        if causal:
            hidden |= slot[gap:, None] < slot
    prefixes = []
    for prompt, rows in _group(prompt_of_row or ()).items():
        spans = []
        for row in rows:
            first = max(key_starts[row] - gap, 0)
            last = max(key_lengths[row] - gap, first)
            spans.append((row * q_len + first, row * q_len + last))
        tokens = _tokens(spans, device)
        if prompt_lengths[prompt] and tokens is not None:
            prefixes.append(PrefixBlock(tokens, prompt_lengths[prompt], prompt, None))
    own: tuple[OwnBlock, ...] = ()
    if batch and q_len:
        plain_causal = causal and hidden is None and q_len > 1
        own = (DenseBlock(batch, q_len, k_len, plain_causal, hidden, padding, first_position),)
    positions = (first_position[:, None] + slot[gap:]).flatten()  # [B * Tq]
    return Plan(own, tuple(prefixes), positions)


def _group(key_of_row: tuple[int, ...]) -> dict[int, list[int]]:
    """Rows by what they read, in order of first appearance; rows that read nothing are left out."""
    groups: dict[int, list[int]] = {}
    for row, key in enumerate(key_of_row):
        if key >= 0:
            groups.setdefault(key, []).append(row)
    return groups


def _tokens(spans: list[tuple[int, int]], device: torch.device) -> slice | Tensor | None:
    """The tokens of spans in ascending order: a slice where they are one run, None where there are none."""
    spans = [span for span in spans if span[1] > span[0]]
    if not spans:
        return None
    if all(left[1] == right[0] for left, right in pairwise(spans)):
        return slice(spans[0][0], spans[-1][1])
    return torch.cat([torch.arange(start, end, device=device) for start, end in spans])


def _buckets(bounds: tuple[int, ...], lengths: list[int], causal: bool, device: torch.device) -> tuple[RowBlock, ...]:
    """Rows grouped by the power of two above their length, so that padding at most doubles a group's tokens."""
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        if length:
            groups.setdefault(max(length - 1, _SHORT - 1).bit_length(), []).append(row)
    blocks = []
    for rows in groups.values():
        sizes = torch.tensor([lengths[row] for row in rows])  # [R]
        longest = int(sizes.max())
        starts = torch.tensor([bounds[row] for row in rows])  # [R]
        step = torch.arange(longest)  # [T]
        index = starts[:, None] + torch.minimum(step, sizes[:, None] - 1)  # [R, T]
        real = None if bool((sizes == longest).all()) else step < sizes[:, None]  # [R, T]
        neighbours = real is None and bool((starts.diff() == longest).all())
        flat = (int(starts[0]), int(starts[0]) + len(rows) * longest) if neighbours else None
        real = None if real is None else real.to(device)
        blocks.append(RowBlock(index.to(device), real, flat, causal and longest > 1))
    return tuple(blocks)
