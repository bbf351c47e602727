"""The seam between decoder and head, so that logits are computed for the rows that need them and by the model itself.

The head path of an architecture (final soft-capping, logit scaling) is whatever its ``ForCausalLM`` class does after
calling its decoder. While ``head_rows`` is set in the context, the decoder returns those rows instead of running.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from deltaserve.errors import UnsupportedBase
from deltaserve.model.context import current_or_none

# GPT-2's decoder looks for padding in the ids of every pass: on a GPU a wait in each step. Rows here are never padded.
_WARNING = "warn_if_padding_and_no_attention_mask"


def cut_before_head(model: PreTrainedModel) -> PreTrainedModel:
    """Let ``model``'s decoder stand aside when the head runs alone; returns the decoder."""
    decoder = find_decoder(model)
    decoder.__dict__["forward"] = _Seam(decoder)
    if hasattr(decoder, _WARNING):
        decoder.__dict__[_WARNING] = lambda *_: None
    return decoder


def find_decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The module below the head that turns ids into hidden rows. OPT keeps it one level deeper than others."""
    decoder = model.get_decoder()
    if decoder is model or not isinstance(decoder, PreTrainedModel):
        decoder = model.base_model
    if decoder is model:
        raise UnsupportedBase(f"{type(model).__name__} has no separate decoder below its head; not served")
    return decoder


class _Seam:
    """The forward of a decoder: the given rows while the head runs alone, else the decoder's own."""

    def __init__(self, decoder: PreTrainedModel) -> None:
        self.run = decoder.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        context = current_or_none()
        if context is not None and context.head_rows is not None:
            return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=context.head_rows)
        return self.run(*args, **kwargs)
