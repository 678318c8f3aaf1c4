"""The list of a data set: its samples, and what of the place that holds them is none, said at the start of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .source import Row, counted
from .table_file import doubtful


@dataclass
class Listing:
    """Samples, and what was left out.

    Attributes:
        rows: The samples, in order.
        left_out: Why, and the name, of each file that is no part of a sample.
        unread: Columns of tables that no sample has anything from.
    """

    rows: list[Row] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    def add(self, other: Listing) -> None:
        """Take up the samples of a part."""
        self.rows += other.rows
        self.left_out += other.left_out
        self.unread += [column for column in other.unread if column not in self.unread]

    def summary(self) -> str:
        """How many samples and captions there are, what is odd about these, and what was left out, in one line."""
        return describe([(row.name, row.caption) for row in self.rows], "clip", "caption", self.unread, self.left_out)


def describe(
    captions: Sequence[tuple[str, str]],
    noun: str,
    text: str = "caption",
    unread: Iterable[str] = (),
    left_out: Iterable[tuple[str, str]] = (),
) -> str:
    """One line about a data set.

    Args:
        captions: The name and the caption of each sample.
        noun: What a sample is called.
        text: What its caption is called.
        unread: Columns of its tables that are not read.
        left_out: Why, and the name, of each file that is no part of it.
    """
    full, empty = [text for _, text in captions if text], [name for name, text in captions if not text]
    parts = [f"{len(captions)} {noun}{'' if len(captions) == 1 else 's'}, {len(full)} with a {text}"]
    if full and len({*full}) < len(full):
        parts[0] += f" ({len({*full})} different)"
    if empty:
        parts.append(counted(("without", name) for name in empty))
    if odd := [(reason, name) for name, text in captions if (reason := doubtful(text))]:
        parts.append(counted(odd))
    if repeated := [name for name, count in _counts(captions).items() if count > 1]:
        parts.append(counted(("there more than once", name) for name in repeated))
    if columns := list(unread):
        parts.append(f"columns that are not read: {', '.join(columns)}")
    if skipped := counted(left_out):
        parts.append(f"left out: {skipped}")
    return "; ".join(parts)


def _counts(captions: Iterable[tuple[str, str]]) -> dict[str, int]:
    """How often each pair of name and caption is there, by the name."""
    counts: dict[tuple[str, str], int] = {}
    for pair in captions:
        counts[pair] = counts.get(pair, 0) + 1
    return {name: count for (name, _), count in counts.items()}
