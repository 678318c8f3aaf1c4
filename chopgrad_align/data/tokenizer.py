"""Tokenizers of whole words, for models that know the captions of procedural clips and little else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def text_tokenizer(texts: Iterable[str]) -> Any:
    """A transformers tokenizer of the words of some texts; other words become `[UNK]`.

    A text ends in `[EOS]`, which has the highest id, because open_clip reads a text's embedding at its highest id.
    """
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words, "[EOS]"])}
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]"}
    return word_tokenizer(vocabulary, "$A [EOS]", model_max_length=512, **special)


def word_tokenizer(vocabulary: dict[str, int], template: str, **settings: Any) -> Any:
    """A transformers tokenizer of whole words, made lower case.

    Args:
        vocabulary: Ids of words and special tokens, `[UNK]` among them.
        template: What surrounds a text `$A`, such as `"$A [EOS]"`.
        settings: Of `PreTrainedTokenizerFast`: its special tokens, its length.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    around = [(token, vocabulary[token]) for token in template.split() if token != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=around)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)
