"""Train the tiny causal backbone that `ptengine demo` ships, out of texts whose licences allow shipping a model.

    python benchmarks/train_backbone.py --out ptengine/assets/backbone --state ../backbone_run --minutes 60 --compile

What the model sees, and nothing else (`SOURCES` has files, licences and weights; train splits only):
  plain texts     stories, encyclopaedia paragraphs, two novels, plays, SMS messages, restaurant sentences
  tasks' rows     "passage / Question: q? / Answer: yes" (BoolQ), "context / Question: q / Answer: words" (XQuAD),
                  "abstract / Summary: sentence" (SciTLDR), "meaning representation / Description: sentence" (E2E)
  cues            one to four short texts, each followed by a line "cue: word" that is computed from the text itself:
                  Length, Contains a number, Capital letters, Asks a question, Exclaims, First word, Last word,
                  Mentions <word>, Kind (the corpus it came from), Follows (are two halves neighbours), and for E2E
                  sentences the attributes of their meaning representation. Drawn anew every epoch.
The spam/ham label of the SMS rows is never read. Cues exist because a prompt can only steer a frozen model towards
patterns that the model knows, and "text, newline, cue, word" is the shape of most classification templates.
A document is left out when a held-out text of the five task corpora equals it, or stands in it and is long enough.
The schedule follows the wall clock with --minutes (exactly repeatable: --steps). A killed run continues by --resume.
"""

import argparse
import copy
import hashlib
import json
import math
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOUNDARY, PAD = "<|endoftext|>", "<|pad|>"
BY_SA3, BY_SA4, PUBLIC = "CC BY-SA 3.0", "CC BY-SA 4.0", "public domain"


class Source(NamedTuple):
    kind: str  # the word after the cue "Kind:"
    path: str
    licence: str
    credit: str
    weight: float  # copies of each document in an epoch; below 1, a random share of the documents


SOURCES = {
    "tinystories": Source("story", "corpora/tinystories_sample.txt", "CDLA-Sharing-1.0 (as far as known)",
                          "TinyStories, Eldan & Li 2023, first 1.5 MB", 1.0),
    "wikitext2": Source("encyclopedia", "corpora/wikitext2_valid.txt", BY_SA3,
                        "WikiText-2, Merity et al. 2016, sentences without `<unk>`", 1.0),
    "dracula": Source("novel", "corpora/gutenberg_dracula.txt", PUBLIC, "Bram Stoker, Project Gutenberg 345", 0.4),
    "frankenstein": Source("novel", "corpora/gutenberg_frankenstein.txt", PUBLIC,
                           "Mary Shelley, Project Gutenberg 42324", 0.4),
    "tinyshakespeare": Source("play", "corpora/tinyshakespeare.txt", PUBLIC, "William Shakespeare", 0.2),
    "boolq": Source("encyclopedia", "boolq/train.jsonl", BY_SA3, "BoolQ, Clark et al., NAACL 2019", 1.0),
    "xquad_en": Source("encyclopedia", "xquad_en/train.jsonl", BY_SA4, "XQuAD, Artetxe et al., ACL 2020", 1.0),
    "scitldr": Source("science", "scitldr/train.jsonl", "Apache-2.0", "SciTLDR, Cachola et al., 2020", 1.0),
    "sms_spam": Source("message", "sms_spam/train.jsonl", "CC BY 4.0",
                       "SMS Spam Collection, Almeida et al., DocEng 2011; texts only", 2.0),
    "e2e_nlg": Source("restaurant", "e2e_nlg/train.jsonl", BY_SA4, "E2E NLG, Novikova et al., SIGDIAL 2017", 1.0),
}  # fmt: skip


class Document(NamedTuple):
    source: str
    key: str  # documents of one key (one context, one meaning representation) stay on one side of the hold-out
    text: str
    row: dict[str, str]


def normalise(text: str) -> str:
    return " ".join(re.sub(r"[^a-z0-9]+", " ", text.lower()).split())


def passages(text: str, size: int = 1000) -> Iterator[str]:
    """Join paragraphs until they hold `size` characters, so that one document is about one block."""
    held: list[str] = []
    for paragraph in filter(str.strip, re.split(r"\n\s*\n", text)):
        held.append(paragraph.strip())
        if sum(map(len, held)) >= size:
            yield "\n\n".join(held)
            held = []
    if held:
        yield "\n\n".join(held)


def detokenise_wikitext(text: str) -> str:
    """Undo the corpus' tokenisation; sentences with `<unk>` go, or the model would write it."""
    sentences = (s for line in text.split("\n") if line[:2] != " =" for s in re.split(r"(?<= \.) ", line))
    text = "\n\n".join(s.strip() for s in sentences if s.strip() and "<unk>" not in s)
    text = re.sub(r" @(.)@ ", r"\1", text)
    text = re.sub(r'" ([^"]*) "', r'"\1"', text)
    text = re.sub(r" ([.,;:!?)%]|'s\b|n't\b)", r"\1", text.replace("( ", "("))
    return re.sub(r"(?<=[.!?])\n\n", " ", text)


def read_documents(corpora: Path) -> Iterator[Document]:
    for name, source in SOURCES.items():
        text = (corpora / source.path).read_text(encoding="utf-8")
        if source.path.endswith(".jsonl"):
            for row in map(json.loads, text.splitlines()):
                row.pop("label" if name == "sms_spam" else "id", None)
                plain = row.get("target" if name == "e2e_nlg" else "source") or row.get("text") or row["context"]
                yield Document(name, row.get("source", plain), plain, row)
            continue
        if name == "tinystories":
            pieces: Iterable[str] = text.split(BOUNDARY)
        elif name == "wikitext2":
            found = re.split(r"\n = [^=\n]+ = \n", text)
            pieces = (p for article in found for p in re.findall(r".{1,1200}(?:[.!?] |$)", detokenise_wikitext(article)))
        elif name == "tinyshakespeare":
            pieces = passages(text)
        else:  # the novels' lines are wrapped by hand
            pieces = passages(re.sub(r"(?<=\S)[ ]*\n[ ]*(?=\S)", " ", text))
        yield from (Document(name, p, p, {}) for p in map(str.strip, pieces) if len(p) > 40)


def drop_held_out(documents: list[Document], corpora: Path) -> list[Document]:
    """Remove documents that equal a validation or test text, or hold one of at least 40 characters."""
    held: set[str] = set()
    for path in sorted({corpora / s.path for s in SOURCES.values() if s.path.endswith(".jsonl")}):
        for split in ("validation", "test"):
            for row in map(json.loads, path.with_name(f"{split}.jsonl").read_text(encoding="utf-8").splitlines()):
                fields = [row.get(k, "") for k in ("text", "context", "source", "target")] + row.get("references", [])
                held.update(map(normalise, fields))
    held.discard("")
    bodies = [f" {normalise(d.text)} | {normalise(' | '.join(d.row.values()))} " for d in documents]
    everything = "\n".join(bodies)
    contained = [f" {text} " for text in held if len(text) >= 40 and f" {text} " in everything]
    fields_of = [{normalise(value) for value in (d.text, *d.row.values())} for d in documents]
    return [
        d
        for d, body, fields in zip(documents, bodies, fields_of, strict=True)
        if not fields & held and not any(text in body for text in contained)
    ]


def few(count: int) -> str:
    return "none" if count == 0 else "few" if count < 4 else "many"


ATTRIBUTES: dict[str, Callable[[str], str]] = {
    "Length": lambda t: "short" if len(t.split()) < 9 else "medium" if len(t.split()) < 20 else "long",
    "Contains a number": lambda t: "yes" if re.search(r"\d", t) else "no",
    "Capital letters": lambda t: few(sum(c.isupper() for c in t)),
    "Asks a question": lambda t: "yes" if "?" in t else "no",
    "Exclaims": lambda t: "yes" if "!" in t else "no",
    "First word": lambda t: t.split()[0],
    "Last word": lambda t: t.split()[-1],
}


def cue_document(texts: list[tuple[str, str]], pool: list[str], rng: random.Random) -> str:
    """Some short texts (kind, text), each followed by the same cue and the word that the text itself determines."""
    cue = rng.choice([*ATTRIBUTES, "Mentions", "Kind", "Follows"])
    lead = rng.choice(["Message: ", "Text: ", "", ""])
    word = rng.choice(rng.choice(pool).split()).strip(".,!?\"'():;").lower() or "the"
    parts = []
    for kind, text in texts:
        words = text.split()
        if cue == "Mentions":  # half of the texts are asked about a word of theirs
            asked = rng.choice(words).strip(".,!?\"'():;").lower() or word if rng.random() < 0.5 else word
            answer = "yes" if asked in normalise(text).split() or asked in text.lower().split() else "no"
            parts.append(f"{lead}{text}\nMentions {asked}: {answer}")
        elif cue == "Follows":
            own, other = rng.random() < 0.5, rng.choice(pool).split()
            second = words[len(words) // 2 :] if own else other[len(other) // 2 :]
            halves = " ".join(words[: len(words) // 2]) + "\n" + " ".join(second)
            parts.append(f"{lead}{halves}\nFollows: {'yes' if own else 'no'}")
        else:
            parts.append(f"{lead}{text}\n{cue}: {kind if cue == 'Kind' else ATTRIBUTES[cue](text)}")
    return "\n\n".join(parts)


def formatted(document: Document, rng: random.Random) -> list[str]:
    """The forms in which a row of a task corpus appears; plain documents as they are."""
    row = document.row
    if document.source == "boolq":
        return [f"{row['text']}\nQuestion: {row['text_pair']}?\nAnswer: {row['label']}"]
    if document.source == "xquad_en":
        return [f"{row['context']}\nQuestion: {row['question']}\nAnswer: {row['answer']}"]
    if document.source == "scitldr":
        return [f"{row['source']}\nSummary: {row['target']}"]
    if document.source == "e2e_nlg":
        attributes = re.findall(r"([\w ]+)\[([^\]]*)\]", row["source"])
        chosen = rng.sample(attributes, min(len(attributes), rng.randint(1, 3)))
        asked = "\n".join(f"{name.strip()}: {value}" for name, value in chosen)
        return [f"{row['source']}\nDescription: {row['target']}", f"{row['target']}\n{asked}"]
    return [document.text]


def mixture(documents: list[Document], rng: random.Random) -> list[str]:
    """One epoch: weighted documents in all their forms, and fresh cue documents of short texts."""
    texts: list[str] = []
    short: list[tuple[str, str]] = []
    contexts: set[str] = set()
    for document in rng.sample(documents, len(documents)):
        source = SOURCES[document.source]
        if document.source == "xquad_en" and document.key in contexts:
            continue  # one question for each context and epoch, or the contexts would be repeated five-fold
        contexts.add(document.key)
        copies = int(source.weight) + (rng.random() < source.weight % 1)
        texts += [form for _ in range(copies) for form in formatted(document, rng)]
        if document.source == "sms_spam":
            short += [(source.kind, document.text)] * 2
        elif copies:
            sentences = [s for s in re.split(r"(?<=[.!?])\s+", document.text) if 3 < len(s.split()) < 40]
            short += [(source.kind, s) for s in rng.sample(sentences, min(1, len(sentences)))]
    rng.shuffle(short)
    pool = [text for _, text in short if len(text.split()) > 3]
    while short:
        count = rng.choice((1, 1, 2, 3, 4))
        texts.append(cue_document(short[:count], pool, rng))
        del short[:count]
    return rng.sample(texts, len(texts))


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)  # telephone numbers would fill the vocabulary
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[BOUNDARY, PAD], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOUNDARY, eos_token=BOUNDARY, pad_token=PAD, model_max_length=512
    )


def pack(texts: list[str], tokenizer: PreTrainedTokenizerFast, block: int) -> torch.Tensor:
    """`<|endoftext|>` before every document, cut into blocks that overlap by one token: inputs and labels."""
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    stream = torch.tensor([i for ids in encoded for i in (tokenizer.bos_token_id, *ids)] + [tokenizer.eos_token_id])
    return stream.unfold(0, block + 1, block)  # [N, T + 1]


def token_losses(model: LlamaForCausalLM, blocks: torch.Tensor) -> torch.Tensor:
    logits = model(blocks[:, :-1], use_cache=False).logits  # [B, T, V]
    return F.cross_entropy(logits.flatten(0, 1).float(), blocks[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, blocks: torch.Tensor, batch: int, device: str) -> float:
    model.eval()
    losses = [token_losses(model, part.to(device)).item() * len(part) for part in blocks.split(batch)]
    model.train()
    return sum(losses) / len(blocks)


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def export(out: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, card: str, log: Path) -> None:
    """fp16 weights, tokenizer, log and card, each file renamed into place; the config asks for fp32 when loaded."""
    staging = out / ".staging"
    copy.deepcopy(model).to(torch.float16).save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    config = json.loads((staging / "config.json").read_text())
    config["dtype"] = "float32"  # fp16 arithmetic is slow on CPU; the weights of this size are stored in it all the same
    (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (staging / "README.md").write_text(card, encoding="utf-8")
    shutil.copyfile(log, staging / "training_log.jsonl")
    for path in staging.iterdir():
        os.replace(path, out / path.name)
    staging.rmdir()


def write_card(args: argparse.Namespace, model: LlamaForCausalLM, state: dict[str, Any], kept: dict[str, int]) -> str:
    c, best = model.config, state["best"]
    rows = "\n".join(
        f"| {name} | `{s.path}` | {s.credit} | {s.licence} | {kept.get(name, 0)} | {s.weight:g} "
        f"| `{hashlib.sha256((args.corpora / s.path).read_bytes()).hexdigest()}` |"
        for name, s in SOURCES.items()
    )
    return f"""# The backbone of `ptengine demo`

A tiny English causal language model, trained from scratch by `benchmarks/train_backbone.py`. **For demonstrations and
tests only**: it writes short English and follows short cues; it knows nothing and must not be used for anything else.

- architecture: Llama, {c.num_hidden_layers} layers, hidden {c.hidden_size}, {c.num_attention_heads} heads, \
{c.num_key_value_heads} key/value heads, intermediate {c.intermediate_size}, tied embeddings, \
{sum(p.numel() for p in model.parameters()):,} parameters, stored in fp16
- positions: up to {c.max_position_embeddings}; trained on blocks of {args.block}
- tokenizer: byte-level BPE, {c.vocab_size} tokens, single digits; `{BOUNDARY}` is bos and eos and stands before every \
training document (it is not added by itself), `{PAD}` is pad
- seen: {best["tokens"]:,} tokens in {best["step"]:,} steps, {best["epochs"]:.1f} epochs of the mixture; seed {args.seed}
- loss on the 2 % of the documents held out: **{best["val_loss"]:.3f}** (perplexity \
{math.exp(best["val_loss"]):.1f}); on held-out SMS messages {best["val_loss_sms"]:.3f} (perplexity \
{math.exp(best["val_loss_sms"]):.1f}); `training_log.jsonl` has the course of it
- command: `python {" ".join(sys.argv)}`

## What it saw
Train splits only, and only texts under licences that allow sharing what is made of them. The SMS labels were not read;
the yes/no answers of BoolQ, the answers of XQuAD and the targets of SciTLDR and E2E (train) were.
Rows of task corpora appear in fixed forms ("... Question: ... Answer: ...", "... Summary: ...", "... Description:
..."), and short texts followed by cues computed from the text itself; the docstring of the script lists them. So SMS
messages and E2E restaurants are **in-domain** for this model: demo scores say nothing about larger backbones.
Documents equal to, or containing (40 characters and more), a validation or test text of the five task corpora were
left out. Upstream splits differ: `wikitext2` is WikiText-2's validation file, and BoolQ, XQuAD and E2E rows come from
the original sets' development files, so do not evaluate this model on those.

| corpus | file | credit | licence | documents | copies per epoch | sha256 of the file |
|---|---|---|---|---:|---:|---|
{rows}

The weights are a statistical summary of these texts; whoever passes them on should keep this list of credits.
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpora", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the exported model")
    parser.add_argument("--state", type=Path, required=True, help="folder of the checkpoint and the log, outside --out")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=float, help="wall-clock budget of the training loop")
    budget.add_argument("--steps", type=int)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--compile", action="store_true", help="torch.compile: 1.3 times as fast on 2 CPU cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--checkpoint-seconds", type=float, default=180)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.state.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint, log = args.state / "checkpoint.pt", args.state / "training_log.jsonl"

    documents = drop_held_out(list(read_documents(args.corpora)), args.corpora)
    held_out = [d for d in documents if int(hashlib.sha256(d.key.encode()).hexdigest()[:8], 16) % 100 < 2]
    keys = {d.key for d in held_out}
    documents = [d for d in documents if d.key not in keys]
    kept = {name: sum(d.source == name for d in documents) for name in SOURCES}
    tokenizer = train_tokenizer(mixture(documents, random.Random(args.seed)), 4096)
    validation = pack(mixture(held_out, random.Random(args.seed)), tokenizer, args.block)
    validation_sms = pack([d.text for d in held_out if d.source == "sms_spam"], tokenizer, args.block)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.04,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)
    state: dict[str, Any] = {"step": 0, "epoch": 0, "block": 0, "seconds": 0.0, "best": {"val_loss": math.inf}}
    if args.resume and checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]
    else:
        log.unlink(missing_ok=True)
    loss_of = torch.compile(token_losses, dynamic=False) if args.compile else token_losses

    def epoch_blocks() -> torch.Tensor:
        rng = random.Random(args.seed * 1000 + state["epoch"])
        blocks = pack(mixture(documents, rng), tokenizer, args.block)
        return blocks[torch.tensor(rng.sample(range(len(blocks)), len(blocks)))]  # [N, T + 1]

    blocks, progress, running, started = epoch_blocks(), 0.0, [], time.monotonic() - state["seconds"]
    print(f"{len(documents)} documents, {blocks[:, 1:].numel():,} tokens an epoch, {len(validation)} held-out blocks: {kept}")
    last_saved, last_logged = state["seconds"], (state["seconds"], state["step"])
    while progress < 1:
        if state["block"] + args.batch > len(blocks):
            state.update(epoch=state["epoch"] + 1, block=0)
            blocks = epoch_blocks()
        batch = blocks[state["block"] : state["block"] + args.batch].to(device)
        scale = min(1.0, progress / 0.02 + 0.01) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * scale
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        running.append(loss.detach())
        seconds = time.monotonic() - started
        state.update(step=state["step"] + 1, block=state["block"] + args.batch, seconds=seconds)
        progress = state["step"] / args.steps if args.steps else seconds / 60 / args.minutes
        save = progress >= 1 or seconds - last_saved > args.checkpoint_seconds
        if not save and state["step"] % 100:
            continue
        speed = (state["step"] - last_logged[1]) * args.batch * args.block / max(seconds - last_logged[0], 1e-9)
        entry = {"step": state["step"], "seconds": round(seconds), "loss": round(torch.stack(running).mean().item(), 4),
                 "lr": args.learning_rate * scale, "tokens_per_s": round(speed)}  # fmt: skip
        running, last_logged = [], (seconds, state["step"])
        if save:
            entry["val_loss"] = round(evaluate(model, validation, args.batch, device), 4)
            entry["val_loss_sms"] = round(evaluate(model, validation_sms, args.batch, device), 4)
            last_saved = seconds
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        print(json.dumps(entry), flush=True)
        if save and entry["val_loss"] < state["best"]["val_loss"]:  # the shipped weights are the best held-out ones
            seen = {"tokens": state["step"] * args.batch * args.block, "epochs": state["epoch"] + state["block"] / len(blocks)}
            state["best"] = {**entry, **seen}
            export(args.out, model, tokenizer, write_card(args, model, state, kept), log)
        if save:
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": state}
            replace_file(checkpoint, lambda path, saved=saved: torch.save(saved, path))


if __name__ == "__main__":
    main()
