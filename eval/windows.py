"""Which tokens each window of a text feeds to the model, and which of them it scores.

The convention (that of WikiText-2 with a stride): windows of ``context`` tokens advance by ``stride``.
Every token of the text but the first is scored exactly once, in the first window that reaches it.
The first window scores all it predicts; in every later one a scored token follows more than
``context - stride`` tokens of that window.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """Feed ``tokens[start:stop]``; the last ``scored`` positions predict the tokens to score."""

    start: int
    stop: int
    scored: int

    @property
    def inputs(self) -> slice:
        """The tokens that the model reads."""
        return slice(self.start, self.stop)

    @property
    def targets(self) -> slice:
        """The tokens that are scored: one further than the positions that predict them."""
        return slice(self.stop - self.scored + 1, self.stop + 1)

    @property
    def positions(self) -> range:
        """Of each scored token, how many tokens of this window the model has read to predict it."""
        length = self.stop - self.start
        return range(length - self.scored + 1, length + 1)


def sliding_windows(tokens: int, *, context: int, stride: int) -> list[Window]:
    """The windows over a text of ``tokens`` tokens.

    Raises:
        ValueError: if ``tokens`` is below 2, or not ``1 <= stride <= context``.
    """
    if tokens < 2:
        raise ValueError(f"tokens must be at least 2 (one to read, one to predict), got {tokens}")
    if not 1 <= stride <= context:
        raise ValueError(f"stride must be between 1 and context ({context}), got {stride}")
    predictions = tokens - 1  # the last token is only ever predicted, never read
    windows = []
    done = 0
    for start in range(0, predictions, stride):
        stop = min(start + context, predictions)
        windows.append(Window(start, stop, stop - done))
        done = stop
        if done == predictions:
            break
    return windows


def spaced_windows(tokens: int, *, context: int, count: int) -> list[Window]:
    """``count`` windows of ``context`` tokens that score all they predict, spread over the text.

    They do not overlap where the text is long enough, and never repeat.

    Raises:
        ValueError: if the text has fewer than ``context + count`` tokens (the last token read must
            have a next one, and every window starts elsewhere).
    """
    last_start = tokens - 1 - context
    if last_start < count - 1:
        raise ValueError(f"{count} windows of {context} tokens need {context + count} tokens, got {tokens}")
    starts = [last_start * i // max(count - 1, 1) for i in range(count)]
    return [Window(start, start + context, context) for start in starts]
