"""What is trained: prompts, their first numbers, and saving and loading them."""

from ptengine.prompts.attempt import AttemptPrompt
from ptengine.prompts.base import Prompt
from ptengine.prompts.cartridge import Cartridge, concatenate_prefixes
from ptengine.prompts.context import ContextPrompt
from ptengine.prompts.decomposed import DecomposedPrompt
from ptengine.prompts.facts import BackboneFacts, backbone_facts
from ptengine.prompts.headed import HeadedPrompt
from ptengine.prompts.io import load_prompt
from ptengine.prompts.llama_adapter import LlamaAdapter
from ptengine.prompts.lopa import LoPAPrompt
from ptengine.prompts.mixture import MixturePrompt
from ptengine.prompts.multitask import MultitaskPrompt
from ptengine.prompts.p_tuning import PTuning
from ptengine.prompts.prefix import Prefix
from ptengine.prompts.projected import ProjectedPrompt
from ptengine.prompts.pruning import PrunedPrompt, prune_pieces, prune_tokens
from ptengine.prompts.registry import create, methods, prompt_class, register
from ptengine.prompts.residual import ResidualPrompt
from ptengine.prompts.soft_prompt import SoftPrompt
from ptengine.prompts.superpos import SuperPosPrompt
from ptengine.prompts.text_dependent import TextDependentPrompt
from ptengine.prompts.ulpt import ULPTPrompt

__all__ = [
    "AttemptPrompt",
    "BackboneFacts",
    "Cartridge",
    "ContextPrompt",
    "DecomposedPrompt",
    "HeadedPrompt",
    "LlamaAdapter",
    "LoPAPrompt",
    "MixturePrompt",
    "MultitaskPrompt",
    "PTuning",
    "Prefix",
    "ProjectedPrompt",
    "Prompt",
    "PrunedPrompt",
    "ResidualPrompt",
    "SoftPrompt",
    "SuperPosPrompt",
    "TextDependentPrompt",
    "ULPTPrompt",
    "backbone_facts",
    "concatenate_prefixes",
    "create",
    "load_prompt",
    "methods",
    "prompt_class",
    "prune_pieces",
    "prune_tokens",
    "register",
]
