"""Training: one prompt against a frozen backbone, resumable exactly, and the evaluation of what came out."""

from ptengine.training.config import TrainingConfig
from ptengine.training.context_distillation import context_distillation_loss, text_prefix
from ptengine.training.evaluation import evaluate, load_head
from ptengine.training.importance import Importance, prompt_importance
from ptengine.training.multitask import multitask_loss
from ptengine.training.objective import EvalResult
from ptengine.training.trainer import Trainer, TrainingResult

__all__ = [
    "EvalResult",
    "Importance",
    "Trainer",
    "TrainingConfig",
    "TrainingResult",
    "context_distillation_loss",
    "evaluate",
    "load_head",
    "multitask_loss",
    "prompt_importance",
    "text_prefix",
]
