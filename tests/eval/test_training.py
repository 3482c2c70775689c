"""The built-in model's training: its data, its schedule, and a run from end to end in miniature."""

from __future__ import annotations

import json
import lzma
import re
from pathlib import Path

import pytest
import torch
from dma_hf_eval.training.corpus import FILES, SEPARATOR, hold_out, read_corpus, token_stream
from dma_hf_eval.training.mixture import Mixture, MixtureSampler, common_words
from dma_hf_eval.training.tokenizer import END_OF_TEXT, train_tokenizer
from dma_hf_eval.training.train import Recipe, learning_rate_factor, main, schedule
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

BUILTIN = Path(__file__).parents[2] / "eval" / "builtin_model"
TEXT = "the quick brown fox jumps over lazy dogs while seven wizards brew potions under silver moons. "
MIXTURE = Mixture(copies=0.25, numbers=0.5, slot=64, min_numbers=1, max_numbers=3, max_span=50)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([TEXT * 5], vocab_size=320, context=512)


@pytest.fixture
def sampler(tokenizer: PreTrainedTokenizerFast) -> MixtureSampler:
    """Over a stream whose every token says where it stands: no text repeats."""
    stream = torch.arange(1000, 20_000)
    names = common_words([TEXT], 10)
    return MixtureSampler(stream, tokenizer, names, MIXTURE, seed=0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for name in FILES:
        documents = [TEXT * 3 * n for n in range(1, 31)]
        with lzma.open(folder / name, "wt", encoding="utf-8") as file:
            file.write(SEPARATOR.join(documents))
    return folder


def test_the_tokenizer_gives_back_every_text(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "Ünïcode ☃\n\n\ttabs, 12345 and\x00 bytes"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_every_digit_is_a_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize("a12 345")[-6:] == ["1", "2", "Ġ", "3", "4", "5"]


def test_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 320
    assert tokenizer.bos_token == tokenizer.eos_token == END_OF_TEXT
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_the_corpus_is_split_at_form_feeds(corpus: Path) -> None:
    books, peps = read_corpus(corpus)
    assert len(books) == len(peps) == 30
    assert books[1] == TEXT * 6


def test_a_missing_corpus_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no train_books\.txt\.xz in the corpus folder"):
        read_corpus(tmp_path)


def test_held_out_documents_are_not_trained_on() -> None:
    train, held = hold_out([str(i) for i in range(25)], every=10)
    assert held == ["5", "15"]
    assert len(train) == 23
    assert not set(train) & set(held)


def test_documents_end_with_the_end_of_text_token(tokenizer: PreTrainedTokenizerFast) -> None:
    stream = token_stream(["the fox", "dogs"], tokenizer)
    assert tokenizer.decode(stream.tolist()) == f"the fox{END_OF_TEXT}dogs{END_OF_TEXT}"


def test_a_batch_has_its_shares_of_copies_and_numbers(sampler: MixtureSampler) -> None:
    ids, weights = sampler.batch(16, 512)
    assert ids.shape == weights.shape == (16, 513)
    plain = (ids[:, 1:] - ids[:, :-1] == 1).all(1)
    assert plain.tolist() == [False] * 12 + [True] * 4
    assert (weights[:4] == 1).all()
    assert (weights[4:12] != 1).any(1).all()


def test_copies_repeat_earlier_text(sampler: MixtureSampler) -> None:
    ids, _ = sampler.batch(16, 512)
    for row in ids[:4]:
        repeated = [t for t in range(513) if row[t] in row[:t]]
        assert len(repeated) >= MIXTURE.min_span
        assert row[0] == row.min()  # all of it is text of this window, and the start is never a copy


def test_every_number_asked_for_was_stated_before_with_its_name(
    sampler: MixtureSampler, tokenizer: PreTrainedTokenizerFast
) -> None:
    ids, weights = sampler.batch(16, 512)
    asked = 0
    for row, weight in zip(ids[4:12], weights[4:12], strict=True):
        # What stands in the stream is no text to this tokenizer: show it as a dot.
        text = "".join(tokenizer.decode([i]) if i < 320 else "." for i in row.tolist())
        told = re.findall(r"number of (\w+) is (\d{5})\.|Remember: (\w+) has the number (\d{5})"
                          r"|\n(\w+): (\d{5})\n", text)  # fmt: skip
        told_pairs = {tuple(part for part in match if part) for match in told}
        requests = re.findall(r"secret number of (\w+)\?\nAnswer: (\d{5})|number of (\w+) was (\d{5})"
                              r"|\n(\w+) again: (\d{5})", text)  # fmt: skip
        pairs = [tuple(part for part in match if part) for match in requests]
        assert {pair for pair in pairs if pair[0] != "Answer"} <= told_pairs
        asked += len(pairs)
        assert (weight == MIXTURE.answer_weight).sum() == 5 * len(pairs)
    assert asked >= 8


def test_batches_depend_on_the_seed_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    def draw(seed: int) -> torch.Tensor:
        stream = torch.arange(1000, 20_000)
        return MixtureSampler(stream, tokenizer, common_words([TEXT], 10), MIXTURE, seed).batch(4, 256)[0]

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))


def test_a_slot_too_small_for_the_templates_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="slot must hold every template"):
        MixtureSampler(torch.arange(1000), tokenizer, ["quick"] * 9, Mixture(slot=8), seed=0)


def test_names_of_the_recall_test_are_not_trained_on() -> None:
    assert common_words(["lantern Lantern lantern bread bread Candle"], 5) == ["bread"]


def test_the_learning_rate_warms_up_stays_and_decays_to_zero() -> None:
    recipe = Recipe(warmup_steps=10, decay_share=0.5)
    assert learning_rate_factor(0.0, 0, recipe) == pytest.approx(0.1)
    assert learning_rate_factor(0.3, 100, recipe) == 1.0
    assert learning_rate_factor(0.75, 100, recipe) == pytest.approx(0.5)
    assert learning_rate_factor(1.0, 100, recipe) == 0.0


def test_a_schedule_by_steps_counts_both_phases() -> None:
    recipe = Recipe()
    steps = list(schedule(recipe, seconds=0.0, steps=(3, 2)))
    assert [phase for phase, _ in steps] == [recipe.short] * 3 + [recipe.long] * 2
    assert [progress for _, progress in steps] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8])


def test_training_writes_a_model_that_loads_and_can_be_resumed(corpus: Path, tmp_path: Path) -> None:
    common = ["--corpus", str(corpus), "--recipe", "smoke", "--device", "cpu", "--steps", "1", "1"]
    first, second = tmp_path / "first", tmp_path / "second"
    main([*common, "--output", str(first)])
    main([*common, "--output", str(second), "--resume", str(first)])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(second), AutoTokenizer.from_pretrained(second)
    assert model.dtype == torch.bfloat16
    prompt = tokenizer("the quick", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt["input_ids"].shape[1]
    log = json.loads((second / "training_log.json").read_text())
    assert log["steps"] == {"128": 1, "512": 1}
    assert log["tokens"] == 128 * 4 + 512 * 2
    assert log["resumed_from"]["resumed_from"] is None
    card = (second / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert f"{2 * log['tokens']:,} tokens in all" in card


def test_the_builtin_model_is_what_the_project_promises() -> None:
    assert (BUILTIN / "model.safetensors").stat().st_size <= 16e6
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BUILTIN), AutoTokenizer.from_pretrained(BUILTIN)
    config = model.config
    assert config.max_position_embeddings == tokenizer.model_max_length == 4096
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.head_dim in (64, 128)
    assert tokenizer.tokenize("12345") == list("12345")
