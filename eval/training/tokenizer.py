"""The built-in model's tokenizer: byte-level BPE, every digit a token of its own."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """Train on `texts`; the result round-trips any text and needs no unknown token.

    As in GPT-2, one token marks both the start and the end of a text, and none is added on its own.

    Args:
        texts: training text.
        vocab_size: tokens in all, at least 258: 256 bytes and two special tokens.
        context: stored as the tokenizer's `model_max_length`, in tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    # Digits first, so that "12345" is five tokens wherever it stands: a number's tokens then do not
    # depend on its neighbours, and recalling it means recalling five things.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
