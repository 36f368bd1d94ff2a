"""Bridges to other people's formats and code."""

from ptengine.interop.baked import save_baked_checkpoint
from ptengine.interop.npy_format import load_npy, save_npy
from ptengine.interop.peft_format import load_peft, save_peft
from ptengine.interop.prompt_embeds import save_prompt_embeds

__all__ = ["load_npy", "load_peft", "save_baked_checkpoint", "save_npy", "save_peft", "save_prompt_embeds"]
