"""The contract every prompt method keeps.

A prompt holds what is trained, in fp32 whatever the backbone's dtype, and lowers itself to one of the forms that the
backbone understands (`ptengine.backbone.lowering`). It never sees data, a trainer or the attention, and keeps no
reference to the model.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import nn

from ptengine.backbone.attached import AttachedModel, attached
from ptengine.backbone.lowering import LoweredPrompt
from ptengine.backbone.spec import backbone_spec
from ptengine.prompts.facts import BackboneFacts
from ptengine.prompts.io import save_prompt

__all__ = ["Prompt"]


class Prompt(nn.Module):
    """Base class of all prompts; a new method is one file with a subclass and `@register(name)`.

    `state_dict()` holds everything that is trained, reparametrisation included: what a checkpoint that resumes needs.
    `save()` writes the folded prompt: what a use of the prompt needs; ``save(folded=False)`` writes what is trained.

    Attributes:
        method: the name the method is saved and registered under.
        num_virtual_tokens: P.
        facts: the backbone the prompt belongs to.
        max_text_length: the longest text, in tokens, that the prompt can stand before; None where any fits.
    """

    method: ClassVar[str]
    max_text_length: int | None = None
    num_virtual_tokens: int
    facts: BackboneFacts

    def __init__(self, facts: BackboneFacts, num_virtual_tokens: int) -> None:
        super().__init__()
        self.facts = facts
        self.num_virtual_tokens = num_virtual_tokens

    @property
    def num_positions(self) -> int:
        """Positions of the model that the prompt takes from the text: P."""
        return self.num_virtual_tokens

    def lower(self) -> LoweredPrompt:
        """The prompt as the backbone reads it; differentiable with respect to every trainable parameter."""
        raise NotImplementedError

    def fold(self) -> Prompt:
        """The same prompt without its reparametrisation: lowers to the same numbers, fewest parameters.

        Always a new prompt that shares no memory with this one.
        """
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """JSON-able description from which `empty` rebuilds the prompt before its weights are loaded."""
        raise NotImplementedError

    @classmethod
    def empty(cls, facts: BackboneFacts, config: dict[str, Any]) -> Self:
        """The prompt that `config()` describes, all parameters zero, on the CPU.

        Raises:
            InputError: `config` is not one that this method wrote.
        """
        raise NotImplementedError

    def default_learning_rate(self) -> float:
        """A learning rate for Adam-like optimisers, which move an element by about this much per step."""
        raise NotImplementedError

    def learning_rate_factors(self) -> dict[str, float]:
        """Factors of the learning rate by the name of the parameter; those not named have 1."""
        return {}

    def save(self, directory: str | os.PathLike[str], *, folded: bool = True) -> Path:
        """Write the prompt, folded or with its reparametrisation, to `directory`: `ptengine.prompts.io.save_prompt`."""
        return save_prompt(self, directory, folded=folded)

    def attached(self, model: Any, *, freeze: bool = True) -> AbstractContextManager[AttachedModel]:
        """Inside ``with prompt.attached(model):`` the stock calls of this model instance see the prompt.

        That is `model(...)`, `model.generate(...)`, `transformers.pipeline(..., model=model)`. For training, the block
        yields a module whose parameters are the prompt's alone and whose calls are the model's: hand it to
        `transformers.Trainer`, to accelerate's `prepare`, or its `parameters()` to an optimiser. Checkpoints of such a
        trainer hold the prompt; `save` writes it as ever.

        - **Output.** Logits and hidden states have the text's length T; virtual tokens do not appear, and attention
          weights are not computed (`output_attentions` stays empty, as with SDPA). `labels` stand beside `input_ids` as
          in the stock call. Its loss shifts them by one inside the T logits, so a label at a row's first token does not
          count, though the last virtual token predicts it: the stock head is given T hidden states and no more.
          `ptengine.Trainer` counts it.
        - **Positions.** A text starts at P and counts its own tokens: padded on the left or on the right, or alone, a
          row gives the same numbers. `position_ids` count the text without the prompt and are shifted by P. A mask with
          holes, and positions of several texts in one row, are refused; so is more than the model's positions.
        - **Cache.** It holds the text alone, dynamic, static or offloaded. One that a call inside a block with this
          prompt filled is continued; any other that is not empty is refused, and so is one that rounds. An empty
          dynamic cache that would drop what leaves a sliding window is told to keep it; a static one is refused, and so
          is going on with one that a call of such a model has made itself: give it an empty one.
        - **Generation.** `generate` takes batches padded on the left, and every search of the stock one. An assistant
          reads the text alone unless a prompt is attached to it, too. On a GPU give ``disable_compile=True`` with a
          static cache, whose count of tokens every step reads.
        - **Causal models in the row** (`ptengine.supports`). Virtual tokens stand before the text of every row and in
          the cache, which therefore is not static, and are taken out of hidden states and logits. Padding on a side
          that changes such a model's numbers is refused, as are `token_type_ids`.
        - **Gradients.** In training mode with gradients enabled the prompt runs anew in every call. Otherwise its keys
          and values are computed once and kept until a parameter of the prompt or the model changes, adapters of PEFT
          inside the model are switched, or the block ends; a change of the model's weights through ``.data`` is not
          seen. `freeze` takes the gradients of the model's own parameters away inside the block; with ``freeze=False``
          those that require one, such as a head or a LoRA, get theirs: hand them to the optimiser beside the prompt's.
        - **Modes.** Calls of the yielded module run the backbone in eval mode, without dropout. Calls of the model
          itself leave its mode alone; attention dropout is refused. Gradient checkpointing must be non-reentrant.
        - **Encoders.** Virtual tokens stand in every row and are taken out of the output; the pooler reads the text's
          first token. A head that reads the first slot of a row itself (RoBERTa's) wants padding on the right, as
          without a prompt. Encoders whose attention is their own (`ptengine.supports`: in the row) take padding on the
          right alone, and no `position_ids`.
        - **Encoder-decoders.** Virtual tokens stand in the encoder's rows, whose padding may be on either side, and are
          taken out of a call's output; the `encoder_outputs` that the encoder itself gives have them, and a call takes
          only those of a call that saw this prompt. Before a prefix the encoder is the stock one, whose positions may
          count padding before a source (BART's do), the decoder's cache has P empty slots, targets are padded behind
          their ends, and gradient checkpointing is refused. `labels` are the stock call's; so is `generate`,
          `transformers.Seq2SeqTrainer` included.
        - **Threads.** An attachment belongs to the thread that made it, and each thread may attach a prompt of its own
          to the same model. A thread without one is refused while others have theirs, but for calls through the
          yielded module, which see its prompt in any thread (`Thread(target=attached.generate, ...)`), and for
          `ptengine.generate`, which names its prompt.

        An unpatched model is patched for the duration. Afterwards, also after an exception, the model is as it was
        before: attention, hooks, modes and `requires_grad`.

        Args:
            model: a supported transformers model, not the wrapper of another library around it.
            freeze: whether the model's own parameters need no gradient inside the block.

        Raises:
            InputError: on entry, where the prompt was made for another backbone or depends on the text, or this thread
                has attached a prompt to the model already; in a call, where the input is not as described.
            UnsupportedModelError: on entry, where the model is of no supported type.
        """
        self.facts.require_fits(backbone_spec(model), "the prompt")
        return attached(model, self, freeze=freeze)
