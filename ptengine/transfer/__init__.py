"""Transfer: what a prompt learned on one task put to use on the next, and an honest word on whether it helped.

1. `PromptBank` keeps tuned prompts with cards, and finds those that may help a target.
"""

from ptengine.transfer.bank import BankEntry, Match, PromptBank, Search
from ptengine.transfer.cards import DataFacts, PromptCard
from ptengine.transfer.identity import BackboneIdentity, identify
from ptengine.transfer.similarity import mean_token_cosine, task_vector_cosine, token_cosine

__all__ = [
    "BackboneIdentity",
    "BankEntry",
    "DataFacts",
    "Match",
    "PromptBank",
    "PromptCard",
    "Search",
    "identify",
    "mean_token_cosine",
    "task_vector_cosine",
    "token_cosine",
]
