"""Train the small causal backbones of the transfer experiments: sizes of one language with one tokenizer.

    python benchmarks/train_transfer_backbone.py --language en --out FOLDER --epochs 10

What they read is decided and told in transfer_corpus.py. All sizes see the same batches in the same order, so they
differ in size alone. Every size is exported to `FOLDER/<language>-<size>` (fp16 weights, tokenizer) where its loss on
held-out documents is least, with `training.json`: settings, what was seen, losses, and how far a soft prompt can steer
it on one source domain (`STEERED`). Answers of labelled and computed rows count `--answer-weight` times a token of text
in the loss, held-out or not. With a GPU bf16 autocast is used and all of it takes about two minutes.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import random
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from train_backbone import make_optimizer, rate_scale, train_tokenizer
from train_step import SHARED, environment
from transfer_corpus import ANSWER, Corpus, mixture, read_corpus
from transfer_lab import LANGUAGES, Fit, Lab
from transformers import LlamaConfig, LlamaForCausalLM

from ptengine.files import write_json_atomic

SIZES = {"tiny": (128, 3, 352), "small": (256, 4, 704), "large": (384, 4, 768)}
"""Width, layers, inner width; heads of 64 (tiny: 32), two key/value heads."""
VOCABULARY = {"en": 4096, "zh": 6144}
STEERED = {"en": "dvd", "zh": "phone"}
"""A source domain, whose validation rows say how far a prompt steers the model; never a target."""


def new_model(size: str, tokenizer: Any, seed: int) -> LlamaForCausalLM:
    width, layers, inner = SIZES[size]
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=width // (32 if width < 256 else 64), num_key_value_heads=2,
            max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.04,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def pack(documents: list[str], tokenizer: Any, block: int, answer_weight: int) -> torch.Tensor:
    """Documents behind their boundary tokens, cut into blocks: token ids and their weights, int64 [N, 2, T + 1]."""
    pieces = [piece for document in documents for piece in document.split(ANSWER)]
    encoded = iter(tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"])
    ids, weights = [], []
    for document in documents:
        ids.append(tokenizer.bos_token_id)
        weights.append(1)
        for index in range(document.count(ANSWER) + 1):
            piece = next(encoded)
            ids += piece
            weights += [answer_weight if index % 2 else 1] * len(piece)
    stream = torch.tensor([[*ids, tokenizer.eos_token_id], [*weights, 1]])  # [2, tokens]
    return stream.unfold(1, block + 1, block).transpose(0, 1)  # [N, 2, T + 1]


def weighted_loss(model: LlamaForCausalLM, blocks: torch.Tensor) -> torch.Tensor:
    ids, weights = blocks.unbind(1)  # [B, T + 1]
    logits = model(ids[:, :-1], use_cache=False).logits  # [B, T, V]
    losses = cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")  # [B * T]
    counted = weights[:, 1:].flatten()  # [B * T]
    return (losses * counted).sum() / counted.sum()


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, blocks: torch.Tensor, device: str) -> float:
    parts = blocks.split(32)
    return sum(weighted_loss(model, part.to(device)).item() * len(part) for part in parts) / len(blocks)


@dataclass
class Member:
    """One size in training."""

    size: str
    model: LlamaForCausalLM
    optimizer: AdamW
    best: dict[str, float]
    weights: dict[str, torch.Tensor]

    def step(self, batch: torch.Tensor, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=batch.device.type == "cuda"):
            loss = weighted_loss(self.model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def judge(self, held: torch.Tensor, step: int, device: str) -> None:
        """Keep the weights where they are the best so far on the held-out blocks."""
        loss = evaluate(self.model, held, device)
        print(f"{self.size}: step {step}, held-out loss {loss:.4f}", flush=True)
        if not self.best or loss < self.best["held_out_loss"]:
            self.best = {"step": step, "held_out_loss": loss}
            self.weights = {name: p.detach().clone() for name, p in self.model.state_dict().items()}


def held_out(corpus: Corpus) -> tuple[Corpus, Corpus]:
    """The corpus in two: 98 % and the 2 % whose text's hash says so."""

    def away(text: str) -> bool:
        return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % 100 < 2

    def part(held: bool) -> Corpus:
        rows = {name: [row for row in rows if away(row[0]) is held] for name, rows in corpus.rows.items()}
        texts = [text for text in corpus.texts if away(text) is held]
        return Corpus(corpus.language, texts, [p for p in corpus.pieces if away(p) is held], rows)

    return part(False), part(True)


def train(members: list[Member], corpus: Corpus, held: Corpus, tokenizer: Any, args: Any, device: str) -> int:
    """Train all members on the same batches; returns the steps done."""
    held_blocks = pack(mixture(held, random.Random(args.seed)), tokenizer, args.block, args.answer_weight)

    def blocks_of(epoch: int) -> torch.Tensor:
        rng = random.Random(args.seed * 1000 + epoch)
        blocks = pack(mixture(corpus, rng), tokenizer, args.block, args.answer_weight)
        return blocks[torch.tensor(rng.sample(range(len(blocks)), len(blocks)))]  # [N, 2, T + 1]

    started, step = time.monotonic(), 0
    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(blocks_of, 0)
        for epoch in range(args.epochs):
            blocks = coming.result()
            if epoch + 1 < args.epochs:
                coming = ahead.submit(blocks_of, epoch + 1)
            batches = blocks.to(device).split(args.batch)
            for index, batch in enumerate(batches):
                done = (epoch + index / len(batches)) / args.epochs
                if args.seconds is not None:
                    done = max(done, (time.monotonic() - started) / args.seconds)
                if done >= 1:
                    break
                for member in members:
                    member.step(batch, args.learning_rate * rate_scale(step, done))
                step += 1
            print(f"epoch {epoch}: {blocks[:, 0, 1:].numel():,} tokens, {time.monotonic() - started:.0f} s", flush=True)
            for member in members:
                member.judge(held_blocks, step, device)
            if args.seconds is not None and time.monotonic() - started >= args.seconds:
                break
    return step


def steerability(folder: Path, language: str, device: str, data: Path) -> dict[str, float]:
    """Accuracy on the validation rows of `STEERED`: no prompt, and soft prompts on 16 shots and on all its rows."""
    domain = STEERED[language]
    with tempfile.TemporaryDirectory() as cache:
        lab = Lab.open(folder, language, device, Path(cache), data, max_length=128, virtual_tokens=8)
        held = lab.rows(domain, "validation")
        found = {"no prompt": lab.accuracy(None, held)}
        for name, rows, steps in (
            ("16 shots", lab.shots(domain, 16, 0), 60),
            ("all rows", lab.rows(domain, "train"), 200),
        ):
            prompt = lab.fresh("soft", 0)
            lab.fit(Fit(prompt, rows, None, steps, steps, prompt.default_learning_rate(), 0))
            found[name] = lab.accuracy(prompt, held)
    return found


def save_as_half(model: Any, tokenizer: Any, folder: Path) -> None:
    copy.deepcopy(model).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"  # only the file is fp16, whose arithmetic is slow on CPU
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def export(member: Member, tokenizer: Any, folder: Path) -> None:
    member.model.load_state_dict(member.weights)
    save_as_half(member.model, tokenizer, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language", choices=tuple(LANGUAGES), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the exported models")
    parser.add_argument("--data", type=Path, default=SHARED / "data")
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=["small", "large"])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seconds", type=float, help="end the schedule by then at the latest")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, help=f"tokens (default {VOCABULARY})")
    parser.add_argument("--answer-weight", type=int, default=1, help="of an answer's tokens in the loss (default 1)")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tar", action="store_true", help="also pack every size as one .tar beside its folder")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.out.mkdir(parents=True, exist_ok=True)
    corpus = read_corpus(args.data, args.language)
    seen, held = held_out(corpus)
    texts = [text.replace(ANSWER, "") for text in mixture(seen, random.Random(args.seed))]
    tokenizer = train_tokenizer(texts, args.vocabulary or VOCABULARY[args.language])
    members = []
    for size in args.sizes:
        model = new_model(size, tokenizer, args.seed).to(device)  # type: ignore[arg-type]
        members.append(Member(size, model, make_optimizer(model, args.learning_rate), {}, {}))
    steps = train(members, seen, held, tokenizer, args, device)
    for member in members:
        folder = args.out / f"{args.language}-{member.size}"
        export(member, tokenizer, folder)
        facts = {
            "command": "python " + " ".join(["benchmarks/train_transfer_backbone.py", *sys.argv[1:]]),
            "environment": environment(),
            "parameters": sum(p.numel() for p in member.model.parameters()),
            "steps": steps,
            "tokens_a_step": args.batch * args.block,
            "best": member.best,
            "seen": seen.facts(),
            "steered_domain": STEERED[args.language],
            "steerability": steerability(folder, args.language, device, args.data),
        }
        write_json_atomic(folder / "training.json", facts)
        print(json.dumps({"model": folder.name, **{k: facts[k] for k in ("parameters", "best", "steerability")}}))
        if args.tar:
            with tarfile.open(args.out / f"{folder.name}.tar", "w") as tar:
                tar.add(folder, folder.name)


if __name__ == "__main__":
    main()
