"""Bridges to other people's formats and code."""

from ptengine.interop.peft_format import load_peft, save_peft

__all__ = ["load_peft", "save_peft"]
