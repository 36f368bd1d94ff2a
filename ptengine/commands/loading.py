"""Models and tokenizers from folders, with one clear error for whatever is wrong with one.

Nothing here reaches the network.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ptengine.backbone import families
from ptengine.backbone.embedding import UNREAD
from ptengine.backbone.spec import kind_of
from ptengine.data.tasks import Task
from ptengine.errors import InputError, UnsupportedModelError

__all__ = [
    "OPERATIONS",
    "import_operations",
    "is_seq2seq",
    "load_for_report",
    "load_model",
    "load_tokenizer",
    "pick_device",
]

OPERATIONS = ("gated_activation", "linear_cross_entropy", "prefix_attention", "prefix_concat", "rotary")


def import_operations() -> None:
    """Import every operation's package, which registers its implementations."""
    for name in OPERATIONS:
        importlib.import_module(f"ptengine.kernels.{name}")


def pick_device(name: str | None) -> torch.device:
    """The device called `name`, or CUDA where there is one and else the CPU; and a check that operations can run on it.

    Raises:
        InputError: no such device, or the environment forces a backend that an operation does not have there.
    """
    from ptengine.kernels.dispatch import operations, resolve_backend

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch's own, by device type
        raise InputError(f"expected --device, a device of this machine, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"expected --device, cpu or cuda, got {name!r}")
    import_operations()
    for operation in operations():
        try:
            resolve_backend(None, device, operation)
        except ValueError as error:
            raise InputError(str(error)) from error
    return device


def load_tokenizer(path: str | None, model_path: str | None) -> Any:
    """The tokenizer in the folder `path`, by default that of the model, by default the embedded one.

    Raises:
        InputError: there is no such folder or no tokenizer in it; or the model's folder is not one of a model.
        UnsupportedModelError: the model type is not supported.
    """
    from transformers import AutoTokenizer

    # The model first: what is wrong with its folder is no fault of the tokenizer's.
    model_folder, _ = _read_config(model_path)
    folder = model_folder if path is None else _folder(path, "--tokenizer")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise many types, several per defect
        raise InputError(f"expected a tokenizer in {str(folder)!r}, got: {_first_line(error)}") from error


def load_model(path: str | None, device: torch.device, dtype: str, task: Task | None = None, seed: int = 0) -> Any:
    """The model in the folder `path`, by default the embedded one, with the head that a task reads.

    Args:
        path: folder of a transformers checkpoint.
        device: where it goes.
        dtype: name of its dtype.
        task: what the model is for; None is one that reads the LM head. A head to be trained is made new where the
            checkpoint has none.
        seed: of a new head.

    Raises:
        InputError: there is no such folder, no checkpoint in it, or one that lacks weights of the model; or the model
            is not of the kind the task is for.
        UnsupportedModelError: the model type is not supported.
    """
    import transformers

    folder, model_type = _read_config(path)
    kind, wanted = kind_of(model_type), "causal" if task is None else task.backbone_kind
    if kind == "encoder" and wanted != "encoder":
        raise InputError(
            f"expected --text-column, or --template with a {{mask}}, with the encoder {model_type!r} in "
            f"{str(folder)!r}, which cannot write words"
        )
    if kind != "encoder" and wanted == "encoder":
        name = "causal model" if kind == "causal" else "encoder-decoder"
        raise InputError(
            f"expected --template with the {name} {model_type!r} in {str(folder)!r}, which writes words: "
            f"{_OPTIONS[task.kind]} is for encoders"  # type: ignore[union-attr]
        )
    torch.manual_seed(seed)
    known = None if task is None else task.auto_class
    auto = _with_lm_head(model_type) if known is None else getattr(transformers, known)
    if task is None or not task.trains_head:
        return _load(auto, folder, device, dtype, unread=UNREAD if task and task.kind == "embedding" else None)
    labels = getattr(task, "labels", None)
    options: dict[str, Any] = {} if labels is None else {"num_labels": len(labels)}
    return _load(auto, folder, device, dtype, new_head=True, **options)


_OPTIONS = {
    "sequence_classification": "--text-column",
    "masked_classification": "a template with a {mask}",
    "embedding": "--embedding",
    "token_classification": "--tokens-column",
    "question_answering": "--question-column",
}


def is_seq2seq(path: str | None) -> bool:
    """Whether the model in the folder `path`, by default the embedded one, is an encoder-decoder; raises as
    `load_model`."""
    return kind_of(_read_config(path)[1]) == "seq2seq"


def _with_lm_head(model_type: str) -> Any:
    """The class of transformers that loads a model with its language-modelling head, None where there is none."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM
    from transformers.models.auto import modeling_auto

    classes = (
        (modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, AutoModelForSeq2SeqLM),
        (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, AutoModelForCausalLM),
        (modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, AutoModelForImageTextToText),
    )
    return next((auto for table, auto in classes if model_type in table), None)


def load_for_report(path: str, device: torch.device, dtype: str) -> Any:
    """The model in the folder `path` with whatever head its family needs to be patched; raises as `load_model`."""
    from transformers import AutoModel

    folder, model_type = _read_config(path)
    auto = AutoModel if kind_of(model_type) == "encoder" else _with_lm_head(model_type)
    return _load(auto, folder, device, dtype)


def _read_config(path: str | None) -> tuple[Path, str]:
    """The folder of the model and its type; what its configuration alone refuses is refused before weights are read."""
    from transformers import AutoConfig

    folder = _model_folder(path)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as for tokenizers
        raise InputError(f"expected a transformers checkpoint in {str(folder)!r}, got: {_first_line(error)}") from error
    reason = families.refusal(config)
    if kind_of(config.model_type) == "causal" and _with_lm_head(config.model_type) is None:
        reason = "it is no causal language model, no encoder and no encoder-decoder"
    if reason is not None:
        raise UnsupportedModelError(f"model type {config.model_type!r} in {str(folder)!r} is not supported: {reason}")
    return folder, config.model_type


def _load(
    auto: Any,
    folder: Path,
    device: torch.device,
    dtype: str,
    new_head: bool = False,
    unread: str | None = None,
    **options: Any,
) -> Any:
    from transformers.utils import logging

    # What would be reported here, missing weights above all, is checked below instead.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options |= {"local_files_only": True, "dtype": getattr(torch, dtype), "output_loading_info": True}
    try:
        model, info = auto.from_pretrained(folder, **options)
    except Exception as error:  # as for tokenizers
        raise InputError(f"expected the weights of a model in {str(folder)!r}, got: {_first_line(error)}") from error
    _require_whole(model, info["missing_keys"], folder, new_head, unread)
    return model.to(device)


def _require_whole(model: Any, missing: Iterable[str], folder: Path, new_head: bool, unread: str | None) -> None:
    """transformers fills weights that a checkpoint lacks with random numbers; only a new head may start from those."""
    inside = f"{model.base_model_prefix}."
    lost = sorted(name for name in missing if name.startswith(inside) or not new_head)
    lost = [name for name in lost if unread is None or not name.startswith(unread)]
    if lost:
        raise InputError(
            f"expected all weights of the frozen model in {str(folder)!r}, but {len(lost)} are missing, "
            f"the first {lost[0]!r}"
        )


def _model_folder(path: str | None) -> Path:
    from ptengine.assets import backbone_path

    return backbone_path() if path is None else _folder(path, "--model")


def _folder(path: str, option: str) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        got = "a file" if folder.exists() else "no such folder"
        raise InputError(f"expected {option}, a folder on this machine, got {path!r}: {got}")
    return Path(os.path.abspath(folder))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(" :")
