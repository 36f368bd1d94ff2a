"""Training: one prompt or many at once against a frozen backbone, resumable exactly, and the evaluation of prompts."""

from ptengine.training.config import TrainingConfig
from ptengine.training.evaluation import evaluate, load_head
from ptengine.training.objective import EvalResult
from ptengine.training.prompt_set import PromptSet, PromptSetResult
from ptengine.training.sweeping import SweepResult, SweepRun, sweep
from ptengine.training.trainer import Trainer, TrainingResult

__all__ = [
    "EvalResult",
    "PromptSet",
    "PromptSetResult",
    "SweepResult",
    "SweepRun",
    "Trainer",
    "TrainingConfig",
    "TrainingResult",
    "evaluate",
    "load_head",
    "sweep",
]
