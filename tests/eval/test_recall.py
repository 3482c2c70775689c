"""Passkey accuracy and second-copy perplexity, with models whose recall is known."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from dma_hf_eval.recall import LEAD, passkey_accuracy, second_copy_perplexity
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

BUILTIN = Path(__file__).parents[2] / "eval" / "builtin_model"
FILLER = "All work and no play makes Jack a dull boy. " * 40


class FakeModel:
    """Says what `predict` says: a function from input ids [T] to next-token ids [T]."""

    device = torch.device("cpu")

    def __init__(self, predict, context: int = 4096, confidence: float = 50.0) -> None:
        self.predict = predict
        self.config = SimpleNamespace(max_position_embeddings=context)
        self.confidence = confidence
        self.prompts: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor) -> SimpleNamespace:
        self.prompts.append(input_ids[0])
        logits = F.one_hot(self.predict(input_ids[0]), 300)[None].float()
        return SimpleNamespace(logits=self.confidence * logits)


@pytest.fixture
def tokenizer(tiny_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture
def finder(tokenizer: PreTrainedTokenizerBase) -> FakeModel:
    """Finds the number in the prompt and gives it as the answer."""

    def predict(ids: torch.Tensor) -> torch.Tensor:
        number = re.search(r"is (\d{5})\.\n", tokenizer.decode(ids))[1]
        answer = tokenizer(" " + number)["input_ids"]
        return torch.tensor([0] * (len(ids) - len(answer)) + answer)

    return FakeModel(predict)


def test_a_model_that_finds_the_number_has_accuracy_one(finder, tokenizer) -> None:
    steps = []
    accuracy = passkey_accuracy(
        finder, tokenizer, FILLER, distances=[50, 400], samples=3, progress=steps.append
    )
    assert accuracy == {50: 1.0, 400: 1.0}
    assert steps == [1] * 6


def test_one_wrong_digit_is_a_wrong_answer(finder, tokenizer) -> None:
    right = finder.predict

    def nearly(ids: torch.Tensor) -> torch.Tensor:
        return torch.cat([right(ids)[:-1], torch.tensor([299])])

    wrong = FakeModel(nearly)
    assert passkey_accuracy(wrong, tokenizer, FILLER, distances=[50], samples=3) == {50: 0.0}


def test_the_needle_lies_exactly_the_distance_before_the_question(finder, tokenizer) -> None:
    passkey_accuracy(finder, tokenizer, FILLER, distances=[123], samples=2)
    for prompt in finder.prompts:
        text = tokenizer.decode(prompt)  # one token per byte
        needle = re.search(r"\nThe secret number of \w+ is \d{5}\.\n", text)
        assert needle.start() == LEAD
        assert text.index("\nQuestion:") - needle.end() == 123


def test_the_samples_of_a_distance_do_not_depend_on_the_others(finder, tokenizer) -> None:
    passkey_accuracy(finder, tokenizer, FILLER, distances=[60, 90], samples=1)
    passkey_accuracy(finder, tokenizer, FILLER, distances=[90], samples=1)
    assert torch.equal(finder.prompts[1], finder.prompts[2])


def test_a_tokenizer_that_begins_texts_with_a_token_begins_prompts_with_it(finder, tokenizer) -> None:
    class WithStart:
        bos_token_id = 7

        def __call__(self, text: str, add_special_tokens: bool = True, **options):
            ids = tokenizer(text, **options)["input_ids"]
            return {"input_ids": [7, *ids] if add_special_tokens else ids}

    passkey_accuracy(finder, WithStart(), FILLER, distances=[60], samples=1)
    assert finder.prompts[0][0] == 7
    assert (finder.prompts[0] == 7).sum() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distances": [100_000], "samples": 1}, "filler has 1760 tokens; distance 100000 needs"),
        ({"distances": [1300], "samples": 1}, "distance 1300 needs .* context is 1024 tokens"),
        ({"distances": [50], "samples": 0}, "samples must be at least 1, got 0"),
        ({"distances": [0], "samples": 1}, "distance must be at least 1, got 0"),
    ],
)
def test_passkeys_that_cannot_be_are_refused(tiny_model, tokenizer, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        passkey_accuracy(tiny_model, tokenizer, FILLER, **options)


def test_a_model_that_looks_back_by_the_distance_has_second_copy_perplexity_one(tokens) -> None:
    copier = FakeModel(lambda ids: torch.cat([ids[1:], ids[:1]]).roll(300))
    assert second_copy_perplexity(copier, tokens, passage=64, distance=300) == pytest.approx(1.0)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(tokens) -> None:
    steps = []
    blind = FakeModel(torch.zeros_like, confidence=0.0)
    perplexity = second_copy_perplexity(
        blind, tokens, passage=64, distance=300, samples=2, progress=steps.append
    )
    assert perplexity == pytest.approx(300.0, rel=1e-4)
    assert steps == [1, 1]


def test_the_sequence_is_the_text_and_then_its_beginning(tokens) -> None:
    model = FakeModel(torch.zeros_like)
    second_copy_perplexity(model, tokens, passage=64, distance=300, samples=1)
    sequence = model.prompts[0]
    assert len(sequence) == 300 + 64 - 1  # the last token is only predicted
    assert torch.equal(sequence[300:], sequence[:63])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"passage": 64, "distance": 63}, r"distance must be at least passage \(64\), got 63"),
        ({"passage": 64, "distance": 701}, "token_ids has 700 tokens; distance 701 needs more"),
        ({"passage": 600, "distance": 600}, "distance 600 with passage 600 needs 1200 tokens"),
        ({"passage": 0, "distance": 5}, "passage must be at least 1, got 0"),
    ],
)
def test_passages_that_cannot_be_are_refused(tiny_model, tokens, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        second_copy_perplexity(tiny_model, tokens, **options)


def test_token_ids_must_be_one_dimensional(tiny_model, tokens) -> None:
    with pytest.raises(ValueError, match=r"must be 1-D, got shape \(1, 700\)"):
        second_copy_perplexity(tiny_model, tokens[None])


def test_the_builtin_model_recalls_over_thousands_of_tokens() -> None:
    from pydoc_data.topics import topics

    model = AutoModelForCausalLM.from_pretrained(BUILTIN, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN)
    text = "\n\n".join(topics.values())
    accuracy = passkey_accuracy(model, tokenizer, text, distances=[2500], samples=1)
    assert accuracy == {2500: 1.0}
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    assert second_copy_perplexity(model, ids, distance=1200, samples=2) < 1.5
