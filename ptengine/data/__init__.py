"""Data: from a file or a list to rows of tokens, and from rows to packed batches.

The way through, each step on its own:

1. `load_rows` reads csv, json, jsonl, parquet, a list of dicts or a `datasets.Dataset` into a `datasets.Dataset`.
2. A task says what a row means: `ClassificationTask` (a causal model names the label: `Template` and `Verbalizer`),
   `GenerationTask` (a causal model writes the target), `Seq2SeqClassificationTask` and `Seq2SeqTask` (an
   encoder-decoder does), `SequenceClassificationTask` (an encoder with a trained head), `MaskedClassificationTask` (a
   masked language model fills in the label's word), `QuestionAnsweringTask` (a trained head points at the answer in a
   text), `TokenClassificationTask` (a trained head labels every word), `EmbeddingTask` (texts that match get
   embeddings that are near).
   ``task.encode(dataset, tokenizer, max_tokens=...)`` gives an `EncodedSplit`.
3. `ShuffledBatches` orders the rows, exactly resumable, and `collate` packs them into a batch for the backbone.
4. `classification_metrics`, `generation_metrics`, `answer_metrics` and `entity_metrics` judge what came back.

Whatever is wrong with the data is one `InputError` that names the file, row and column. Rows are counted from 0.
Nothing here knows a model, a prompt or a trainer, and nothing reaches the network.
"""

from __future__ import annotations

from ptengine.data.chat import chat_template
from ptengine.data.collation import BatchIndices, ShuffledBatches, collate
from ptengine.data.embedding_tasks import EmbeddingTask
from ptengine.data.encoding import EncodedRow, EncodedSplit
from ptengine.data.masked_tasks import MaskedClassificationTask
from ptengine.data.metrics import answer_metrics, classification_metrics, entity_metrics, generation_metrics
from ptengine.data.question_answering import QuestionAnsweringTask
from ptengine.data.seq2seq_task import Seq2SeqClassificationTask, Seq2SeqTask
from ptengine.data.sources import check_columns, load_rows, named_rows
from ptengine.data.tasks import (
    ClassificationTask,
    GenerationTask,
    LabelledTask,
    SequenceClassificationTask,
    Task,
    VerbalizedTask,
)
from ptengine.data.templates import Template
from ptengine.data.token_tasks import TokenClassificationTask
from ptengine.data.verbalizers import BoundVerbalizer, Verbalizer

__all__ = [
    "BatchIndices",
    "BoundVerbalizer",
    "ClassificationTask",
    "EmbeddingTask",
    "EncodedRow",
    "EncodedSplit",
    "GenerationTask",
    "LabelledTask",
    "MaskedClassificationTask",
    "QuestionAnsweringTask",
    "Seq2SeqClassificationTask",
    "Seq2SeqTask",
    "SequenceClassificationTask",
    "ShuffledBatches",
    "Task",
    "Template",
    "TokenClassificationTask",
    "VerbalizedTask",
    "Verbalizer",
    "answer_metrics",
    "chat_template",
    "check_columns",
    "classification_metrics",
    "collate",
    "entity_metrics",
    "generation_metrics",
    "load_rows",
    "named_rows",
]
