"""The texts of the demo backbone: only such whose licences allow shipping a model that was trained on them.

What the model sees, and nothing else (`SOURCES` has files, licences and weights; train splits only):
  plain texts     stories, encyclopaedia paragraphs, two novels, plays, SMS messages
  tasks' rows     "passage / Question: q? / Answer: yes" (BoolQ), "context / Question: q / Answer: words" (XQuAD),
                  "abstract / Summary: sentence" (SciTLDR), "meaning representation / Description: sentence" (E2E)
  cues            one to four short texts, each followed by a line "cue: word" that is computed from the text itself:
                  Length, Contains a number, Capital letters, Asks a question, Exclaims, First word, Last word,
                  Mentions <word>, Kind (the corpus it came from), Follows (are two halves neighbours); and E2E
                  sentences followed by attributes of their meaning representation. Drawn anew every epoch.
The spam/ham label of the SMS rows is never read. Cues exist because a prompt can only steer a frozen model towards
patterns that the model knows, and "text, newline, cue, word" is the shape of most classification templates.
A document is left out when a held-out text of the five task corpora equals it, or stands in it and is long enough.
"""

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

BOUNDARY = "<|endoftext|>"
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
            articles = map(detokenise_wikitext, re.split(r"\n = [^=\n]+ = \n", text))
            pieces = (p for article in articles for p in re.findall(r".{1,1200}(?:[.!?] |$)", article))
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
