"""Bridges to other people's formats and code."""

from ptengine.interop.npy_format import load_npy, save_npy
from ptengine.interop.peft_format import load_peft, save_peft

__all__ = ["load_npy", "load_peft", "save_npy", "save_peft"]
