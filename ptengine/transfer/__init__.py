"""Transfer: what a prompt learned on one task put to use on the next, and an honest word on whether it helped.

1. `PromptBank` keeps tuned prompts with cards, and finds those that may help a target.
2. `transfer` starts a target's prompt from them, trains it by a `Strategy`, and by a `Guard` keeps it only where
   held-out shots say that it helped.
3. `domain_terms` and `attention_words` find a domain's words; `with_words` and `words_prompt` make prompts of them,
   and `bridge` does so in rounds.
4. `carry_prompt` carries a soft prompt to another backbone that shares tokens with its own, `tune_projector` trains
   a network that does.
5. `evaluate_ensemble` asks several prompts at once and averages what they say.
6. `transfer_measures` says how much a transfer was worth, with paired intervals.
"""

from ptengine.transfer.across_models import carry_prompt, shared_tokens, vocabulary_map
from ptengine.transfer.adaptivity import Adaptivity, prompt_adaptivity
from ptengine.transfer.augmentation import Augmentation, augment
from ptengine.transfer.bank import BankEntry, Match, PromptBank, Search
from ptengine.transfer.bridging import BridgeResult, BridgeRound, bridge, nearest_words
from ptengine.transfer.cards import DataFacts, PromptCard
from ptengine.transfer.domains import domain_embeddings, maximum_mean_discrepancy, proxy_a_distance
from ptengine.transfer.ensemble import evaluate_ensemble, likelihood_weights
from ptengine.transfer.guard import Decision
from ptengine.transfer.identity import BackboneIdentity, identify
from ptengine.transfer.measures import Interval, paired_interval, steps_to_reach, transfer_measures
from ptengine.transfer.projector import ProjectorLesson, tune_projector
from ptengine.transfer.run import TransferResult, transfer
from ptengine.transfer.similarity import mean_token_cosine, task_vector_cosine, token_cosine
from ptengine.transfer.strategies import Anchor, Distill, Guard, Initialize, Joint, SelfTrain, Strategy
from ptengine.transfer.words import PromptWord, attention_words, domain_terms, with_words, words_prompt

__all__ = [
    "Adaptivity",
    "Anchor",
    "Augmentation",
    "BackboneIdentity",
    "BankEntry",
    "BridgeResult",
    "BridgeRound",
    "DataFacts",
    "Decision",
    "Distill",
    "Guard",
    "Initialize",
    "Interval",
    "Joint",
    "Match",
    "ProjectorLesson",
    "PromptBank",
    "PromptCard",
    "PromptWord",
    "Search",
    "SelfTrain",
    "Strategy",
    "TransferResult",
    "attention_words",
    "augment",
    "bridge",
    "carry_prompt",
    "domain_embeddings",
    "domain_terms",
    "evaluate_ensemble",
    "identify",
    "likelihood_weights",
    "maximum_mean_discrepancy",
    "mean_token_cosine",
    "nearest_words",
    "paired_interval",
    "prompt_adaptivity",
    "proxy_a_distance",
    "shared_tokens",
    "steps_to_reach",
    "task_vector_cosine",
    "token_cosine",
    "transfer",
    "transfer_measures",
    "tune_projector",
    "vocabulary_map",
    "with_words",
    "words_prompt",
]
