"""Training: one prompt or many at once against a frozen backbone, resumable exactly, and the evaluation of prompts."""

from ptengine.configuration import TrainingConfig
from ptengine.training.context_distillation import context_distillation_loss, text_prefix
from ptengine.training.evaluation import evaluate, load_head
from ptengine.training.importance import Importance, prompt_importance
from ptengine.training.multitask import multitask_loss
from ptengine.training.objective import EvalResult
from ptengine.training.prompt_set import PromptSet, PromptSetResult
from ptengine.training.sweeping import SweepResult, SweepRun, sweep
from ptengine.training.trainer import Trainer, TrainingResult

__all__ = [
    "EvalResult",
    "Importance",
    "PromptSet",
    "PromptSetResult",
    "SweepResult",
    "SweepRun",
    "Trainer",
    "TrainingConfig",
    "TrainingResult",
    "context_distillation_loss",
    "evaluate",
    "load_head",
    "multitask_loss",
    "prompt_importance",
    "sweep",
    "text_prefix",
]
