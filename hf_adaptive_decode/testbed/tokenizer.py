"""Builds the testbed's word-level tokenizer: one token a word, from the fixed vocabulary; it knows no model.

Texts are words with single spaces between them, and decoding what was encoded gives the same text back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .problems import EOS, PAD, UNK, VOCABULARY

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Make the tokenizer; save it with `save_pretrained` and `AutoTokenizer` reads it back."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        # A decoder-only model continues the last column, so prompts are padded on their left.
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=256,
    )
