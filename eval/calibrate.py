"""The fastest setting of every layer that keeps a quality budget.

1. Sensitivities: each layer in turn uses each candidate setting, and all other layers SDPA; measured is
   how far the model's predictions move (KL from SDPA).
2. The ladder: from every layer at its fastest to every layer unquantised, one layer a step. The next
   step is always the one that saves the most KL for the time it costs, by the sensitivities. KL of
   several layers is estimated as their sum: it is quadratic in a small error, and the errors of two
   layers have little to do with one another, so that their mixed terms cancel.
3. The search: the setting is measured, not only estimated, at a few rungs of the ladder (bisection),
   and the fastest that is within the budget by measurement is taken.
4. The check: the same measurement on text that played no part in the choice; and recall over a long
   distance, which KL on running text says little about.
"""

from __future__ import annotations

import inspect
import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dma_hf import DMAConfig
from dma_hf.formats import NONE

from .attention import attention
from .attention_cost import TileTimes, attention_time, speed_against_sdpa
from .divergence import compare_logits, token_losses
from .errors import EvalError, UsageError, first_line
from .journal import NO_JOURNAL, Journal
from .perplexity import RecallTask
from .progress import Advance
from .recall import second_copy_perplexity
from .windows import Window

Measure = Literal["kl", "perplexity_change"]

CHOSEN_FIELDS = ("low", "high", "diagonal", "sink")
"""What layers may differ in. ``high`` differs only where a layer is not quantised at all."""


@dataclass(frozen=True)
class Budget:
    """How much quality may be lost.

    measure: "kl" (nats per token against SDPA, mean) or "perplexity_change" (percent, up or down).
    """

    measure: Measure
    limit: float

    def keeps(self, quality: Quality) -> bool:
        """Whether the loss is within the budget."""
        return self.of(quality) <= self.limit

    def of(self, quality: Quality) -> float:
        """What of ``quality`` counts against the limit."""
        return quality.kl if self.measure == "kl" else abs(quality.perplexity_change)


@dataclass(frozen=True)
class Quality:
    """What a setting costs on some text."""

    kl: float
    """KL(SDPA‖DMA) of the next-token distributions, mean over tokens, in nats."""
    perplexity_change: float
    """Against SDPA, in percent."""
    top1_agreement: float


@dataclass(frozen=True)
class Rung:
    """One step of the ladder: the setting of each layer, and what it is expected to do."""

    choice: tuple[int, ...]
    """Each layer's candidate, by number."""
    estimated_kl: float
    speed: float
    """Of the attention, in multiples of SDPA's."""


@dataclass(frozen=True)
class Calibration:
    """The result."""

    config: DMAConfig
    rung: int
    """Where on the ladder it is."""
    quality: Quality
    """On the text it was chosen on."""
    held_out: Quality
    """On other text."""
    recall_sdpa: float
    """Perplexity of the second copy of a passage with SDPA; see ``recall``."""
    recall: float
    """The same with the chosen setting."""
    candidates: list[DMAConfig]
    floor: float
    """KL in nats of the model with no layer quantised."""
    sensitivities: list[list[float]]
    """KL in nats that quantising adds to that: a list a layer, in it a value a candidate."""
    ladder: list[Rung]
    measured: dict[int, Quality]
    """By rung: what the search measured."""


def candidate_settings(
    base: DMAConfig,
    *,
    lows: Sequence[str],
    diagonals: Sequence[int],
    sinks: Sequence[int],
    length: int,
    times: TileTimes,
) -> list[DMAConfig]:
    """What one layer may use, the fastest first; the last is not quantised at all.

    Settings that are not faster than the last are left out: nothing is to be had for their error.

    Args:
        base: every other field comes from here.
        lows: formats of the low tiles; diagonals, sinks: widths in tokens.
        length: of the prompt whose attention is to be fast.

    Raises:
        UsageError: if a field holds a value that is not accepted, or a format's time is not known.
    """
    exact = replace(base, low=NONE, high=NONE)
    found = {}
    for low in lows:
        for diagonal in diagonals:
            for sink in sinks:
                try:
                    config = replace(base, low=low, diagonal=diagonal, sink=sink)
                except (ValueError, TypeError) as error:
                    raise UsageError(f"calibrate: {error}") from error
                if config.low != NONE:
                    found[config] = attention_time(config, length, times)
    limit = attention_time(exact, length, times)
    faster = sorted((config for config in found if found[config] < limit), key=lambda c: found[c])
    return [*faster, exact]


def layered(base: DMAConfig, settings: Sequence[DMAConfig]) -> DMAConfig:
    """One setting whose layers use ``settings``: the most common for all, and the others by layer."""
    (common, _), *_ = Counter(settings).most_common(1)
    layers = {
        index: {
            field: getattr(setting, field)
            for field in CHOSEN_FIELDS
            if getattr(setting, field) != getattr(common, field)
        }
        for index, setting in enumerate(settings)
        if setting != common
    }
    chosen = {field: getattr(common, field) for field in CHOSEN_FIELDS}
    return replace(base, **chosen, layers=layers)


def ladder(
    sensitivities: Sequence[Sequence[float]],
    candidates: Sequence[DMAConfig],
    *,
    floor: float,
    length: int,
    times: TileTimes,
) -> list[Rung]:
    """From every layer at its fastest to every layer at its most exact, one layer a step.

    Of each layer, only the candidates on the lower convex hull of KL over time take part: any other is
    beaten by one of them, or by two of them on two layers.

    Args:
        sensitivities: KL that a layer's candidate adds, [layers][candidates].
        floor: KL with no layer quantised.
    """
    cost = [attention_time(config, length, times) for config in candidates]
    hulls = [_lower_hull(cost, kl) for kl in sensitivities]
    steps = sorted(
        (
            (-(kl[a] - kl[b]) / (cost[b] - cost[a]), layer, b)
            for layer, (hull, kl) in enumerate(zip(hulls, sensitivities, strict=True))
            for a, b in itertools.pairwise(hull)
        ),
    )
    choice = [hull[0] for hull in hulls]
    rungs = []
    for step in (None, *steps):
        if step is not None:
            _, layer, candidate = step
            choice[layer] = candidate
        rungs.append(
            Rung(
                tuple(choice),
                floor + sum(kl[c] for c, kl in zip(choice, sensitivities, strict=True)),
                speed_against_sdpa([candidates[c] for c in choice], length, times),
            )
        )
    return rungs


def _lower_hull(cost: Sequence[float], loss: Sequence[float]) -> list[int]:
    """The points on the lower left convex hull, by number: cost goes up, loss down, ever more slowly."""
    hull: list[int] = []
    for point in sorted(range(len(cost)), key=lambda p: (cost[p], loss[p])):
        if hull and loss[point] >= loss[hull[-1]]:
            continue
        while len(hull) > 1:
            before, last = hull[-2:]
            slope_to_last = (loss[last] - loss[before]) / (cost[last] - cost[before])
            slope_to_point = (loss[point] - loss[before]) / (cost[point] - cost[before])
            if slope_to_last < slope_to_point:
                break
            hull.pop()
        if hull and cost[point] == cost[hull[-1]]:  # only the first point can be as cheap as the hull's end
            continue
        hull.append(point)
    return hull


class Meter:
    """Measures settings of one model on one text against SDPA.

    Args:
        model: a causal language model in evaluation mode.
        tokens: the text, LongTensor [tokens].
        journal: of what is already measured. Its key must hold the model and the text.
        advance: told 1 after each forward pass with DMA.
    """

    def __init__(self, model: PreTrainedModel, tokens: Tensor, *, journal: Journal, advance: Advance) -> None:
        self.model = model
        self.tokens = tokens
        self.journal = journal
        self.advance = advance
        self._reference: tuple[Window, Tensor] | None = None

    def quality(self, config: DMAConfig, windows: Sequence[Window]) -> Quality:
        """What ``config`` costs on the windows together."""
        sums = torch.zeros(4, dtype=torch.float64)
        for window in windows:
            (found,) = self.sums([config], window)
            sums += torch.tensor(found, dtype=torch.float64)
        kl, loss_change, agree = (sums[:3] / sums[3]).tolist()
        return Quality(kl, 100 * math.expm1(loss_change), agree)

    def sums(self, configs: Sequence[DMAConfig], window: Window) -> list[list[float]]:
        """Sums over the window's tokens, a list a setting: KL, change of loss, agreement, and tokens."""
        piece = {"window": [window.start, window.stop], "configs": [config.to_dict() for config in configs]}
        found: list[list[float]] | None = self.journal.get(**piece)
        if found is None:
            found = [self._measure(config, window) for config in configs]
            self.journal.put(found, **piece)
        else:
            self.advance(len(configs))
        return found

    def _measure(self, config: DMAConfig, window: Window) -> list[float]:
        if self._reference is None or self._reference[0] != window:
            self._reference = None  # before the next one is made
            self._reference = (window, self._logits(None, window))
        reference = self._reference[1]
        targets = self.tokens[window.targets].to(self.model.device)
        compared = compare_logits(reference, self._logits(config, window), targets)
        sums = [
            compared.kl.double().sum().item(),
            (compared.loss.double() - token_losses(reference, targets).double()).sum().item(),
            float(compared.agree.sum()),
            float(window.scored),
        ]
        if not all(map(math.isfinite, sums)):
            raise EvalError(
                "calibrate: the model's logits are not finite in the window that starts at token"
                f" {window.start} (for float16 try --dtype bfloat16)"
            )
        self.advance(1)
        return sums

    def recall(self, config: DMAConfig | None, task: RecallTask) -> float:
        """Perplexity of the second copy of a passage, far behind the first one (see ``recall``)."""
        piece = {"recall": asdict(task), "config": None if config is None else config.to_dict()}
        found: float | None = self.journal.get(**piece)
        if found is None:
            with attention(self.model, config):
                found = second_copy_perplexity(self.model, self.tokens, **asdict(task))
            self.journal.put(found, **piece)
        self.advance(task.samples)
        return found

    def _logits(self, config: DMAConfig | None, window: Window) -> Tensor:
        options: dict[str, Any] = {"use_cache": False}
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            options["logits_to_keep"] = window.scored  # no memory for logits that nobody scores
        inputs = self.tokens[window.inputs].to(self.model.device)[None]
        try:
            with attention(self.model, config), torch.inference_mode():
                logits: Tensor = self.model(inputs, **options).logits[0, -window.scored :]
        except (NotImplementedError, ValueError) as error:
            raise UsageError(f"calibrate: {first_line(error)}") from error
        return logits


def alone(config: DMAConfig, layer: int) -> DMAConfig:
    """``config`` in one layer, and SDPA in all others, which is exact and less work than the kernel."""
    return replace(config, min_length=sys.maxsize, layers={layer: {"min_length": config.min_length}})


def measure_sensitivities(
    meter: Meter, windows: Sequence[Window], layers: int, candidates: Sequence[DMAConfig]
) -> tuple[float, list[list[float]]]:
    """KL in nats of the whole model without quantisation, and what quantising one layer adds.

    The first is rounding alone: next to nothing in float32. The second is [layers][candidates], each
    against the layer's last candidate, which is the one without quantisation.
    """
    floor = 0.0
    kl = torch.zeros(layers, len(candidates), dtype=torch.float64)
    for window in windows:
        floor += meter.sums([candidates[-1]], window)[0][0]
        for layer in range(layers):
            settings = [alone(config, layer) for config in candidates]
            kl[layer] += torch.tensor([sums[0] for sums in meter.sums(settings, window)])
    tokens = sum(window.scored for window in windows)
    added = ((kl - kl[:, -1:]) / tokens).clamp(min=0)
    return max(floor / tokens, 0.0), added.tolist()


def calibrate(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    windows: Sequence[Window],
    held_out: Sequence[Window],
    recall: RecallTask,
    layers: int,
    base: DMAConfig,
    candidates: Sequence[DMAConfig],
    budget: Budget,
    length: int,
    times: TileTimes,
    journal: Journal = NO_JOURNAL,
    advance: Advance = lambda steps: None,
) -> Calibration:
    """The fastest setting that keeps ``budget`` on ``windows``, and what it does on ``held_out``.

    Args:
        model: a causal language model in evaluation mode.
        tokens: the text, LongTensor [tokens].
        recall: the second-copy test that SDPA and the setting take.
        layers: of the model.
        base: fields that are not chosen.
        candidates: what a layer may use, of ``candidate_settings``.
        length: of the prompt whose attention is to be fast, in tokens.
        times: of a tile in each format.
        journal: of what is already measured.
        advance: told how many forward passes with DMA are done; ``steps`` has their number.

    Raises:
        UsageError: if DMA refuses the model.
        EvalError: if even the unquantised kernel does not keep the budget.
    """
    meter = Meter(model, tokens, journal=journal, advance=advance)
    floor, sensitivities = measure_sensitivities(meter, windows, layers, candidates)
    rungs = ladder(sensitivities, candidates, floor=floor, length=length, times=times)
    measured: dict[int, Quality] = {}

    def config_of(rung: int) -> DMAConfig:
        return layered(base, [candidates[c] for c in rungs[rung].choice])

    def keeps(rung: int) -> bool:
        if rung not in measured:
            measured[rung] = meter.quality(config_of(rung), windows)
        return budget.keeps(measured[rung])

    chosen = _first_rung(rungs, budget, keeps)
    if not keeps(chosen):
        loss = budget.of(measured[chosen])
        raise EvalError(
            f"the budget of {budget.limit:g} cannot be kept: with nothing quantised the model is already"
            f" {loss:.2g} away from SDPA, by rounding alone"
        )
    config = config_of(chosen)
    return Calibration(
        config,
        chosen,
        measured[chosen],
        meter.quality(config, held_out),
        meter.recall(None, recall),
        meter.recall(config, recall),
        list(candidates),
        floor,
        sensitivities,
        rungs,
        measured,
    )


def _first_rung(rungs: Sequence[Rung], budget: Budget, keeps: Callable[[int], bool]) -> int:
    """The first rung that keeps the budget, by bisection; the last one, unmeasured, if none before does.

    The first guess is the estimate's. Measurements need not fall from rung to rung as the estimate does:
    what is returned was measured to keep the budget, and is the fastest such rung as far as it was looked.
    """
    low, high = 0, len(rungs) - 1
    guess = (low + high) // 2
    if budget.measure == "kl":
        guess = next((i for i, rung in enumerate(rungs) if rung.estimated_kl <= budget.limit), high)
    while low < high:
        guess = min(guess, high - 1)
        if keeps(guess):
            high = guess
        else:
            low = guess + 1
        guess = (low + high) // 2
    return high


def steps(layers: int, candidates: int, windows: int, held_out: int, recall: RecallTask) -> int:
    """How many steps ``calibrate`` reports, about: how long the search is depends on what it finds."""
    rungs = layers * candidates
    sensitivities = layers * candidates + 1
    return windows * (sensitivities + rungs.bit_length()) + held_out + 2 * recall.samples
