"""Prompts that are longer than a text model reads: they are cut, and the user is told once."""

from __future__ import annotations

import warnings
from typing import Any


class LengthWarning:
    """A warning of one reward that prompts are cut; it comes once.

    Args:
        reward: Its published name.
        tokens: What its text model reads.
    """

    def __init__(self, reward: str, tokens: int) -> None:
        self.reward, self.tokens = reward, tokens
        self.due = True

    def tell(self, cut: int, total: int) -> None:
        """Warn that `cut` of `total` prompts are cut, if any are."""
        if cut and self.due:
            self.due = False
            warnings.warn(
                f"{self.reward}: {cut} of {total} prompts are longer than the {self.tokens} tokens that its text model "
                "reads; their rest does not count in the score (said once)",
                stacklevel=2,
            )


class CuttingTokenizer:
    """A tokenizer of transformers that cuts texts at a length, and says so.

    Args:
        tokenizer: As `AutoTokenizer` loads it.
        reward: The published name of who asks.
        length: Tokens, with those that mark beginning and end.
    """

    def __init__(self, tokenizer: Any, reward: str, length: int) -> None:
        self.tokenizer, self.length = tokenizer, length
        self.warning = LengthWarning(reward, length)

    def tell(self, texts: list[str]) -> None:
        """Warn of those among different texts that are cut."""
        if self.warning.due:
            texts = list(dict.fromkeys(texts))
            ids = self.tokenizer(texts, truncation=True, max_length=self.length + 1)["input_ids"]
            self.warning.tell(sum(len(row) > self.length for row in ids), len(texts))

    def __call__(self, texts: list[str], **options: Any) -> Any:
        """The tokenizer's output for `texts`, as tensors; `options` are its own."""
        self.tell(texts)
        return self.tokenizer(texts, truncation=True, max_length=self.length, return_tensors="pt", **options)
