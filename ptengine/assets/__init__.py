"""What `ptengine demo` needs without a network: a tiny backbone and two small data sets, as folders on disk."""

from importlib.resources import files
from pathlib import Path
from typing import Literal, get_args

DatasetName = Literal["sms_spam", "e2e_nlg"]

__all__ = ["DatasetName", "backbone_path", "data_path"]


def backbone_path() -> Path:
    """The folder of the embedded model and tokenizer, for `from_pretrained`; its README.md is the model card."""
    return _folder("backbone")


def data_path(name: DatasetName) -> Path:
    """The folder of an embedded data set: train.jsonl, validation.jsonl, test.jsonl and LICENSE.md."""
    if name not in get_args(DatasetName):
        raise ValueError(f"expected a data set out of {', '.join(get_args(DatasetName))}, got {name!r}")
    return _folder("data", name)


def _folder(*parts: str) -> Path:
    # from_pretrained and the data loaders want real files, so an import from a zip archive is refused, not unpacked
    folder = files(__name__).joinpath(*parts)
    if not isinstance(folder, Path) or not folder.is_dir():
        raise FileNotFoundError(f"expected {'/'.join(parts)} as a folder on disk in ptengine/assets, got none")
    return folder
