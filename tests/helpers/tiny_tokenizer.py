"""A tokenizer that needs no download: byte-level BPE trained on the text below, with RoBERTa's special tokens."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]

TEXT = """\
The waiter brought warm bread and a bowl of soup before we had read the menu.
The noodles were cold, but the service was friendly and the price was fair.
We propose a new method for parsing sentences and evaluate it on three treebanks.
The results show that the model learns better representations than the baseline.
Patients with high blood pressure were treated for twelve weeks with a low dose.
The treatment reduced the risk of stroke; no serious side effects were observed.
A language model that is trained further on new text forgets some of the old text.
What it learned before can be protected where it matters most and left free elsewhere.
"""


@cache
def _trained_bpe(vocab_size: int) -> str:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    bos = tokenizer.token_to_id("<s>")
    eos = tokenizer.token_to_id("</s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", bos), ("</s>", eos)]
    )
    return tokenizer.to_str()


def tiny_tokenizer(vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """Tokenizer with `vocab_size` entries (at least 261: all bytes and the five special tokens)."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_bpe(vocab_size)),
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        cls_token="<s>",
        sep_token="</s>",
        model_max_length=512,
    )


def word_tokenizer(words: list[str], *, skipped: int = 0, **special: str) -> PreTrainedTokenizerFast:
    """Tokenizer that knows these words and the special tokens, and nothing else.

    Args:
        words: the words.
        skipped: ids between the special tokens and the words that no token has.
        special: changes of what the special tokens are for.
    """
    first = len(SPECIAL_TOKENS) + skipped
    ids = {token: number for number, token in enumerate(SPECIAL_TOKENS)}
    ids |= {word: first + number for number, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", ids["<s>"]), ("</s>", ids["</s>"])]
    )
    names = {f"{use}_token": f"<{use}>" for use in ("pad", "unk", "mask")} | {"bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**names, **special})
