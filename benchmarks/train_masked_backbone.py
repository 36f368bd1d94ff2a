"""Train the small masked language models of the transfer experiments: sizes of one language with one tokenizer.

    python benchmarks/train_masked_backbone.py --language zh --out FOLDER --seconds 1500

They read the plain texts of transfer_corpus.py, which hold no label of any task, no validation and no test row: what a
prompt brings to such a model it cannot have seen. All sizes see the same batches with the same masks, so they differ in
size alone. Every size is exported to `FOLDER/<language>-masked-<size>` (fp16 weights, tokenizer) as it is at the end,
with `training.json`: settings, what was seen, held-out loss, and how far a soft prompt can steer it on one source
domain. 25 minutes on two cores of a CPU do.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import BertWordPieceTokenizer
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from train_backbone import rate_scale
from train_step import SHARED, environment
from train_transfer_backbone import held_out, save_as_half
from transfer_corpus import read_corpus
from transfer_lab import LANGUAGES
from transformers import BertTokenizer, ModernBertConfig, ModernBertForMaskedLM

from ptengine.files import write_json_atomic

SIZES = {"tiny": (96, 3), "small": (160, 3)}
"""Width, layers; heads of 32, gated inner width of twice the width."""
VOCABULARY = {"en": 6000, "zh": 4500}
MASKED = 0.2
"""Share of a text's tokens that are predicted: 80 % of them masked, 10 % another token, 10 % as they are (BERT,
Devlin et al. 2019, arXiv 1810.04805, section 3.1)."""
IGNORED = -100


def train_wordpiece(texts: list[str], vocabulary: int, folder: Path) -> BertTokenizer:
    """Word pieces; of Chinese, single characters."""
    pieces = BertWordPieceTokenizer(lowercase=True)
    pieces.train_from_iterator(
        texts, vocab_size=vocabulary, min_frequency=4, limit_alphabet=vocabulary, show_progress=False
    )
    folder.mkdir(parents=True, exist_ok=True)
    pieces.save_model(str(folder))
    return BertTokenizer(vocab=str(folder / "vocab.txt"), do_lower_case=True)


def new_model(size: str, tokenizer: BertTokenizer, block: int, seed: int) -> ModernBertForMaskedLM:
    """With norms before the blocks: a BERT of this size stays at the frequencies of words for most of the minutes."""
    width, layers = SIZES[size]
    torch.manual_seed(seed)
    return ModernBertForMaskedLM(
        ModernBertConfig(
            vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 32,
            intermediate_size=2 * width, max_position_embeddings=2 * block, global_attn_every_n_layers=1,
            pad_token_id=tokenizer.pad_token_id, cls_token_id=tokenizer.cls_token_id,
            sep_token_id=tokenizer.sep_token_id, bos_token_id=tokenizer.cls_token_id,
            eos_token_id=tokenizer.sep_token_id,
        )
    )  # fmt: skip


def windows(texts: list[str], tokenizer: BertTokenizer, block: int) -> list[list[int]]:
    """[CLS] text [SEP], long texts in several rows of at most `block` tokens."""
    rows = []
    for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
        for start in range(0, len(ids), block - 2):
            piece = ids[start : start + block - 2]
            if len(piece) >= 8 or start == 0:
                rows.append([tokenizer.cls_token_id, *piece, tokenizer.sep_token_id])
    return rows


def batches_of(rows: list[list[int]], tokens: int, rng: random.Random) -> list[list[list[int]]]:
    """Rows of like length together, at most `tokens` padded tokens each, in random order."""
    order = sorted(rows, key=lambda row: len(row) + rng.random() * 8)
    batches: list[list[list[int]]] = [[]]
    for row in order:
        if len(row) * (len(batches[-1]) + 1) > tokens:
            batches.append([])
        batches[-1].append(row)
    return rng.sample(batches, len(batches))


def masked(rows: list[list[int]], tokenizer: BertTokenizer, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ids and labels, int64 [B, T]; the labels are IGNORED where nothing is predicted."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])  # [B, T]
    special = torch.isin(ids, torch.tensor([tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id]))
    chosen = (torch.rand(ids.shape, generator=generator) < MASKED) & ~special  # [B, T]
    fate = torch.rand(ids.shape, generator=generator)  # [B, T]
    anything = torch.randint(len(tokenizer), ids.shape, generator=generator)  # [B, T]
    seen = torch.where(chosen & (fate < 0.8), tokenizer.mask_token_id, ids)
    seen = torch.where(chosen & (fate >= 0.9), anything, seen)
    return seen, torch.where(chosen, ids, IGNORED)


def loss_of(model: ModernBertForMaskedLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean over the predicted tokens; the head runs at these alone."""
    padding = ids.ne(model.config.pad_token_id)  # [B, T]
    hidden = model.model(ids, attention_mask=padding.long()).last_hidden_state  # [B, T, d]
    wanted = labels.ne(IGNORED)
    logits = model.decoder(model.head(hidden[wanted]))  # [n, V]
    return cross_entropy(logits.float(), labels[wanted])


@dataclass
class Member:
    """One size in training."""

    size: str
    model: ModernBertForMaskedLM
    optimizer: AdamW

    def step(self, ids: torch.Tensor, labels: torch.Tensor, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(self.model, ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def judge(self, held: list[tuple[torch.Tensor, torch.Tensor]], device: str) -> float:
        losses = [loss_of(self.model, ids.to(device), labels.to(device)).item() for ids, labels in held]
        return sum(losses) / len(losses)


def train(
    members: list[Member], rows: list[list[int]], held: list[Any], tokenizer: BertTokenizer, args: Any, device: str
) -> int:
    """Train all members on the same batches for `args.seconds`; returns the steps done."""
    started, step, epoch = time.monotonic(), 0, 0
    while True:
        for batch in batches_of(rows, args.tokens, random.Random(args.seed * 1000 + epoch)):
            done = (time.monotonic() - started) / args.seconds
            if done >= 1:
                return step
            ids, labels = masked(batch, tokenizer, args.seed * 10**7 + step)
            for member in members:
                member.step(ids.to(device), labels.to(device), args.learning_rate * rate_scale(step, done))
            step += 1
            if step % 500 == 0:
                print(f"step {step}, {time.monotonic() - started:.0f} s", flush=True)
        epoch += 1
        told = ", ".join(f"{member.size} {member.judge(held, device):.4f}" for member in members)
        print(f"epoch {epoch}, step {step}, {time.monotonic() - started:.0f} s: held-out loss {told}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language", choices=tuple(LANGUAGES), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the exported models")
    parser.add_argument("--data", type=Path, default=SHARED / "data")
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=list(SIZES))
    parser.add_argument("--seconds", type=float, default=1500, help="of training (default 1500)")
    parser.add_argument("--tokens", type=int, default=1024, help="of a batch, padding counted (default 1024)")
    parser.add_argument("--block", type=int, default=96, help="tokens of a row, at most (default 96)")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seen, held = held_out(read_corpus(args.data, args.language))
    tokenizer = train_wordpiece(seen.texts, VOCABULARY[args.language], args.out / f"{args.language}-vocabulary")
    rows = windows(seen.texts, tokenizer, args.block)
    held_batches = batches_of(windows(held.texts, tokenizer, args.block), args.tokens, random.Random(args.seed))
    held_rows = [masked(batch, tokenizer, index) for index, batch in enumerate(held_batches)]
    members = []
    for size in args.sizes:
        model = new_model(size, tokenizer, args.block, args.seed).to(device)  # type: ignore[arg-type]
        members.append(Member(size, model, AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.05)))
    print(f"{sum(map(len, rows)):,} tokens an epoch, vocabulary {len(tokenizer)}", flush=True)
    steps = train(members, rows, held_rows, tokenizer, args, device)
    for member in members:
        folder = args.out / f"{args.language}-masked-{member.size}"
        save_as_half(member.model, tokenizer, folder)
        facts = {
            "command": "python " + " ".join(["benchmarks/train_masked_backbone.py", *sys.argv[1:]]),
            "environment": environment(),
            "parameters": sum(p.numel() for p in member.model.parameters()),
            "steps": steps,
            "tokens_a_step": args.tokens,
            "held_out_loss": member.judge(held_rows, device),
            "seen": {"plain_documents": len(seen.texts), "tokens_an_epoch": sum(map(len, rows)), "labels": "none"},
        }
        write_json_atomic(folder / "training.json", facts)
        print(json.dumps({"model": folder.name, **{k: facts[k] for k in ("parameters", "held_out_loss")}}))


if __name__ == "__main__":
    main()
