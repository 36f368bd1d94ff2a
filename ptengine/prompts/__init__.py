"""What is trained: prompts, their first numbers, and saving and loading them."""

from ptengine.prompts.base import Prompt
from ptengine.prompts.facts import BackboneFacts, backbone_facts
from ptengine.prompts.io import load_prompt
from ptengine.prompts.p_tuning import PTuning
from ptengine.prompts.prefix import Prefix
from ptengine.prompts.registry import create, methods, prompt_class, register
from ptengine.prompts.residual import ResidualPrompt
from ptengine.prompts.soft_prompt import SoftPrompt
from ptengine.prompts.superpos import SuperPosPrompt

__all__ = [
    "BackboneFacts",
    "PTuning",
    "Prefix",
    "Prompt",
    "ResidualPrompt",
    "SoftPrompt",
    "SuperPosPrompt",
    "backbone_facts",
    "create",
    "load_prompt",
    "methods",
    "prompt_class",
    "register",
]
