"""ptengine tunes prompts against a frozen Hugging Face backbone: exact, fast and small.

The names and modules users need are imported on first use, so that `import ptengine` stays light and the operations
under `ptengine.kernels` can be used without transformers.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"


def _expose_kernels() -> None:
    """Make `ptengine.kernels` importable from a checkout, where its folder is the sibling `kernels/`.

    An editable install knows the package by its own folder only. A top-level `kernels` on sys.path would shadow the
    Hugging Face package of that name, so the folder is bound here to its full name and to nothing else.
    """
    here = Path(__file__).resolve().parent
    folder = here.parent / "kernels"
    if (here / "kernels").is_dir() or not folder.is_dir() or not (here.parent / "pyproject.toml").is_file():
        return
    spec = importlib.machinery.ModuleSpec("ptengine.kernels", None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    module = sys.modules.setdefault("ptengine.kernels", importlib.util.module_from_spec(spec))
    globals()["kernels"] = module  # as the import system does for a package that it finds itself


_expose_kernels()

if TYPE_CHECKING:
    from ptengine import assets as assets
    from ptengine import backbone as backbone
    from ptengine import data as data
    from ptengine import errors as errors
    from ptengine import interop as interop
    from ptengine import kernels as kernels
    from ptengine import prompts as prompts
    from ptengine import training as training
    from ptengine import transfer as transfer
    from ptengine.backbone import embed as embed
    from ptengine.backbone import generate as generate
    from ptengine.backbone import patch as patch
    from ptengine.backbone import patched as patched
    from ptengine.backbone import step_graphs as step_graphs
    from ptengine.backbone import supports as supports
    from ptengine.backbone import unpatch as unpatch
    from ptengine.prompts import AttemptPrompt as AttemptPrompt
    from ptengine.prompts import Cartridge as Cartridge
    from ptengine.prompts import ContextPrompt as ContextPrompt
    from ptengine.prompts import DecomposedPrompt as DecomposedPrompt
    from ptengine.prompts import HeadedPrompt as HeadedPrompt
    from ptengine.prompts import LlamaAdapter as LlamaAdapter
    from ptengine.prompts import LoPAPrompt as LoPAPrompt
    from ptengine.prompts import MixturePrompt as MixturePrompt
    from ptengine.prompts import MultitaskPrompt as MultitaskPrompt
    from ptengine.prompts import Prefix as Prefix
    from ptengine.prompts import ProjectedPrompt as ProjectedPrompt
    from ptengine.prompts import PrunedPrompt as PrunedPrompt
    from ptengine.prompts import PTuning as PTuning
    from ptengine.prompts import ResidualPrompt as ResidualPrompt
    from ptengine.prompts import SoftPrompt as SoftPrompt
    from ptengine.prompts import SuperPosPrompt as SuperPosPrompt
    from ptengine.prompts import ULPTPrompt as ULPTPrompt
    from ptengine.prompts import concatenate_prefixes as concatenate_prefixes
    from ptengine.prompts import load_prompt as load_prompt
    from ptengine.prompts import prune_pieces as prune_pieces
    from ptengine.prompts import prune_tokens as prune_tokens
    from ptengine.recommendation import recommend as recommend
    from ptengine.training import PromptSet as PromptSet
    from ptengine.training import Trainer as Trainer
    from ptengine.training import TrainingConfig as TrainingConfig
    from ptengine.training import sweep as sweep

_HOMES = {
    "AttemptPrompt": "ptengine.prompts",
    "Cartridge": "ptengine.prompts",
    "ContextPrompt": "ptengine.prompts",
    "DecomposedPrompt": "ptengine.prompts",
    "HeadedPrompt": "ptengine.prompts",
    "LlamaAdapter": "ptengine.prompts",
    "LoPAPrompt": "ptengine.prompts",
    "MixturePrompt": "ptengine.prompts",
    "MultitaskPrompt": "ptengine.prompts",
    "PTuning": "ptengine.prompts",
    "Prefix": "ptengine.prompts",
    "ProjectedPrompt": "ptengine.prompts",
    "PromptSet": "ptengine.training",
    "PrunedPrompt": "ptengine.prompts",
    "ResidualPrompt": "ptengine.prompts",
    "SoftPrompt": "ptengine.prompts",
    "SuperPosPrompt": "ptengine.prompts",
    "Trainer": "ptengine.training",
    "TrainingConfig": "ptengine.training",
    "ULPTPrompt": "ptengine.prompts",
    "concatenate_prefixes": "ptengine.prompts",
    "embed": "ptengine.backbone",
    "generate": "ptengine.backbone",
    "load_prompt": "ptengine.prompts",
    "patch": "ptengine.backbone",
    "patched": "ptengine.backbone",
    "prune_pieces": "ptengine.prompts",
    "prune_tokens": "ptengine.prompts",
    "recommend": "ptengine.recommendation",
    "step_graphs": "ptengine.backbone",
    "supports": "ptengine.backbone",
    "sweep": "ptengine.training",
    "unpatch": "ptengine.backbone",
}
_MODULES = ("assets", "backbone", "data", "errors", "interop", "kernels", "prompts", "training", "transfer")
__all__ = [*sorted(_HOMES), "__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"ptengine.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'ptengine' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
