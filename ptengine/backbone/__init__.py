"""The frozen backbone: patching a transformers model, running it over packed rows with prompts, generating.

Knows nothing of how prompts are trained, of tasks or of data files.
"""

from ptengine.backbone.embedding import embed, text_embeddings
from ptengine.backbone.encoders import (
    encoder_hidden,
    masked_lm_logits,
    masked_lm_loss,
    masked_lm_losses,
    sequence_head,
    sequence_logits,
    token_head,
    token_logits,
)
from ptengine.backbone.generation import generate
from ptengine.backbone.lowering import GatedTokens, KeyValuePrefix, LoweredPrompt, TextDependentTokens, VirtualTokens
from ptengine.backbone.packing import IGNORE_INDEX, PackedBatch, pack_padded, pack_rows
from ptengine.backbone.patching import is_patched, patch, patched, unpatch
from ptengine.backbone.seq2seq import seq2seq_log_probs, seq2seq_logits, seq2seq_loss, seq2seq_losses
from ptengine.backbone.spec import BackboneSpec, backbone_spec
from ptengine.backbone.step import (
    PackedLoss,
    capture_prefix,
    label_hidden,
    label_log_probs,
    label_losses,
    packed_loss,
)
from ptengine.backbone.step_recording import step_graphs
from ptengine.backbone.support import SupportReport, supports
from ptengine.backbone.vocabulary import LabelHidden

__all__ = [
    "IGNORE_INDEX",
    "BackboneSpec",
    "GatedTokens",
    "KeyValuePrefix",
    "LabelHidden",
    "LoweredPrompt",
    "PackedBatch",
    "PackedLoss",
    "SupportReport",
    "TextDependentTokens",
    "VirtualTokens",
    "backbone_spec",
    "capture_prefix",
    "embed",
    "encoder_hidden",
    "generate",
    "is_patched",
    "label_hidden",
    "label_log_probs",
    "label_losses",
    "masked_lm_logits",
    "masked_lm_loss",
    "masked_lm_losses",
    "pack_padded",
    "pack_rows",
    "packed_loss",
    "patch",
    "patched",
    "seq2seq_log_probs",
    "seq2seq_logits",
    "seq2seq_loss",
    "seq2seq_losses",
    "sequence_head",
    "sequence_logits",
    "step_graphs",
    "supports",
    "text_embeddings",
    "token_head",
    "token_logits",
    "unpatch",
]
