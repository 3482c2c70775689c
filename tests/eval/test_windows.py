"""Windows with a stride score every token of a text but the first exactly once."""

from __future__ import annotations

import pytest
from dma_hf_eval.windows import Window, sliding_windows
from hypothesis import given
from hypothesis import strategies as st


def test_windows_advance_by_the_stride() -> None:
    # 11 tokens, 10 of them to predict; all that the first window predicts, then two at a time.
    assert sliding_windows(11, context=4, stride=2) == [
        Window(start=0, stop=4, scored=4),
        Window(start=2, stop=6, scored=2),
        Window(start=4, stop=8, scored=2),
        Window(start=6, stop=10, scored=2),
    ]


def test_scored_positions_predict_the_next_token() -> None:
    window = Window(start=2, stop=6, scored=2)
    tokens = list("abcdefg")
    assert tokens[window.inputs] == list("cdef")
    assert tokens[window.targets] == list("fg")  # predicted at the positions of e and f


def test_the_last_window_is_as_long_as_the_text_allows() -> None:
    assert sliding_windows(10, context=4, stride=4)[-1] == Window(start=8, stop=9, scored=1)


@given(st.data())
def test_every_token_but_the_first_is_scored_once_with_its_context(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(2, 500), label="tokens")
    context = data.draw(st.integers(1, 600), label="context")
    stride = data.draw(st.integers(1, context), label="stride")
    windows = sliding_windows(tokens, context=context, stride=stride)

    text = range(tokens)
    scored = [target for window in windows for target in text[window.targets]]
    assert scored == list(range(1, tokens))
    for window in windows:
        read = text[window.inputs]
        assert len(read) <= context
        assert len(text[window.targets]) == window.scored
        assert text[window.targets][-1] == read[-1] + 1
        if window.start > 0:
            before = text[window.targets][0] - window.start
            assert before > context - stride


@pytest.mark.parametrize(
    ("tokens", "context", "stride", "complaint"),
    [
        (1, 4, 2, "tokens must be at least 2"),
        (10, 4, 0, "stride must be between 1 and context"),
        (10, 4, 5, "stride must be between 1 and context"),
    ],
)
def test_impossible_windows_are_refused(tokens: int, context: int, stride: int, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        sliding_windows(tokens, context=context, stride=stride)
