"""The smallest model of any model type, with random weights, and inputs on which it runs.

Generated, not listed: a config (`tiny_configs`), a class that takes it, inputs (`tiny_inputs`), and a
search. Where the smallest config does not build or run, it is tried again with a group of shrinking
rules left out; where inputs do not run, the error often names what is missing.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import inspect
import itertools
import math
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .tiny_configs import GROUPS, PATCHES, WINDOW, add_fields, likely_value, tiny_config
from .tiny_inputs import RETRY, Inputs

SEARCH_SECONDS = 15.0
"""How long to look for a config and inputs, in seconds of CPU time: a busy machine finds the same."""
IMAGE_SECONDS = 2.0
"""How long to look for an image beside a text that runs."""
MAX_ARGUMENT_SETS = 60
LIKELY_INPUTS, ALL_INPUTS = 10, 1000
"""How many inputs are tried with a config, in the first round and in the second."""
MAX_PARAMETERS = 300_000_000
"""Larger models are not built: the rules did not shrink them."""


class CannotBuildError(Exception):
    """No config and inputs were found with which this model type runs. The message says why."""


@dataclasses.dataclass(frozen=True)
class TinyModel:
    """A model, and inputs it takes.

    Attributes:
        model_class: the model's class.
        config: its config; every build gets a copy.
        inputs: keyword arguments of `forward`, without padding.
        relaxed: the groups of rules that had to stay unused for the model to run.
    """

    model_class: type[PreTrainedModel]
    config: PretrainedConfig
    inputs: dict[str, Any]
    relaxed: tuple[str, ...]

    def build(self, attention: str | None) -> PreTrainedModel:
        """The model under `attn_implementation=attention`: the same weights in every call.

        None leaves the choice to Transformers.
        """
        return build(self.model_class, self.config, attention)


def relaxations() -> Iterator[tuple[str, ...]]:
    """Which groups of rules to leave out, fewest first."""
    yield ()
    yield ("widths",)
    yield ("images",)
    yield ("widths", "images")
    yield from ((group,) for group in GROUPS if group not in ("widths", "images"))
    yield ("widths", "heads")
    yield ("widths", "heads", "rope")
    yield tuple(group for group in GROUPS if group not in ("layers", "tokens", "experts", "windows"))
    yield tuple(group for group in GROUPS if group not in ("layers", "tokens"))


def tiny_model(model_type: str, attention: str | None = "sdpa") -> TinyModel:
    """The smallest model of a type that runs.

    Args:
        model_type: a key of Transformers' `CONFIG_MAPPING`.
        attention: the attention implementation to try it with.

    Raises:
        CannotBuildError: there is none; the message is what the first attempt ran into.
    """
    try:
        config_class = CONFIG_MAPPING[model_type]
    except (ImportError, AttributeError) as error:
        raise CannotBuildError(f"its config cannot be imported: {error}") from error
    patch = PATCHES.get(model_type, {})
    try:
        _default_config(config_class, patch)
    except Exception as error:
        raise CannotBuildError(f"its default config is not valid: {error}") from error
    classes = model_classes(config_class)
    if not classes:
        raise CannotBuildError("no class of Transformers takes this config alone")
    first: Exception | None = None
    asked: dict[str, Any] = {}
    missing: dict[tuple[str, str], Any] = {}
    deadline = time.process_time() + SEARCH_SECONDS
    # the likely inputs with every config come first, then every input with every config
    for attempts, most_classes in ((LIKELY_INPUTS, 2), (ALL_INPUTS, 4)):
        tried: list[str] = []
        configs = list(relaxations())
        while configs:
            relaxed = configs.pop(0)
            try:
                config = tiny_config(_default_config(config_class, {**patch, **asked}), relaxed)
                add_fields(config, missing)
            except Exception as error:
                first = first or error
                continue
            if config.to_json_string(use_diff=False) in tried:
                continue
            tried.append(config.to_json_string(use_diff=False))
            for model_class in classes[:most_classes]:
                if time.process_time() > deadline:
                    break
                try:
                    return _runnable(model_class, config, attention, relaxed, attempts, deadline)
                except Exception as error:
                    first = first or error
                    asked |= _fields_asked_for(config, error)
                    if (field := _missing_field(error)) is not None and field not in missing:
                        missing[field] = likely_value(field[1])
                        configs.insert(0, relaxed)
                        break
    assert first is not None
    raise CannotBuildError(f"{type(first).__name__}: {first}") from first


def _default_config(config_class: type[PretrainedConfig], fields: Mapping[str, Any]) -> PretrainedConfig:
    try:
        return config_class(**fields)
    except Exception:
        return config_class()  # fields for a small model do not fit the default sizes


def _fields_asked_for(config: PretrainedConfig, error: Exception) -> dict[str, int]:
    """Fields without a default that an error message names in quotes, with a small number for each."""
    names = set(re.findall(r"[`'\"](\w+)[`'\"]", str(error)))
    return {name: WINDOW for name in names if getattr(config, name, 0) is None}


def _missing_field(error: Exception) -> tuple[str, str] | None:
    """The config class that lacks a field its model reads, and the field: it is part of the checkpoints."""
    names = re.search(r"'(\w+Config)' object has no attribute '(\w+)'", str(error))
    return None if names is None else (names[1], names[2])


def _runnable(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    attention: str | None,
    relaxed: tuple[str, ...],
    attempts: int,
    deadline: float,
) -> TinyModel:
    model = build(model_class, config, attention)
    maker = Inputs(model)
    inputs = _inputs_that_run(model, maker, maker.argument_sets(), attempts, deadline)
    with_image = [(*inputs, *image) for image in maker.image_arguments(inputs)]
    if with_image:
        with contextlib.suppress(Exception):  # a text alone will do
            more_time = time.process_time() + IMAGE_SECONDS
            inputs = _inputs_that_run(model, maker, with_image, 2 * LIKELY_INPUTS, more_time)
    return TinyModel(model_class, config, inputs, relaxed)


def _inputs_that_run(
    model: PreTrainedModel,
    maker: Inputs,
    queue: list[tuple[str, ...]],
    attempts: int,
    deadline: float,
) -> dict[str, Any]:
    tried = set(queue)
    first: Exception | None = None
    while queue:
        names = queue.pop(0)
        for inputs in maker.values_of(names):
            attempts -= 1
            if attempts < 0 or time.process_time() > deadline:
                raise first or CannotBuildError("no time left to try inputs")
            try:
                with torch.no_grad():
                    outputs = model(**inputs)
            except Exception as error:
                first = first or error
                asked = [a for a in maker.asked_for(names, error) if a not in tried]
                asked = asked[: MAX_ARGUMENT_SETS - len(tried)]
                tried.update(asked)
                queue[:0] = asked
                if any(RETRY in a for a in asked):
                    break
                for guess in maker.guesses(names, error):
                    if guess not in tried and len(tried) < MAX_ARGUMENT_SETS:
                        tried.add(guess)
                        queue.append(guess)
                continue
            if any(bool(tensor.isfinite().all() and tensor.any()) for _, tensor in tensors(outputs)):
                return inputs
            first = first or CannotBuildError("its outputs are zero or not finite")
    raise first or CannotBuildError("no inputs for its forward")


def tensors(outputs: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors of a model's output, with their names; caches are left out."""
    if isinstance(outputs, Tensor):
        if outputs.is_floating_point() and outputs.numel():
            yield prefix or "output", outputs
    elif isinstance(outputs, Mapping):
        for name, value in outputs.items():
            yield from tensors(value, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(outputs, (list, tuple)):
        for index, value in enumerate(outputs):
            yield from tensors(value, f"{prefix}[{index}]")


# -- classes ---------------------------------------------------------------------------------------

_MAPPINGS = (
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "MASKED_LM",
    "CAUSAL_LM",
)
"""Heads that tell most, in the order in which they are tried; the model without a head comes next."""


def model_types() -> list[str]:
    """Every model type of the installed Transformers, in alphabetical order."""
    return sorted(CONFIG_MAPPING)


def model_classes(config_class: type[PretrainedConfig]) -> list[type[PreTrainedModel]]:
    """The classes that take such a config, the most telling first."""
    first = [getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING", {}) for name in _MAPPINGS]
    first.append(modeling_auto.MODEL_MAPPING)
    others = [
        mapping
        for name, mapping in vars(modeling_auto).items()
        if name.endswith("_MAPPING") and not any(mapping is known for known in first)
    ]
    found: list[type[PreTrainedModel]] = []
    for mapping in itertools.chain(first, others):
        try:
            classes = mapping.get(config_class, ())
        except (ImportError, AttributeError, ValueError):
            continue  # a head of this type that is not there, or that needs a missing package
        found += classes if isinstance(classes, (tuple, list)) else (classes,)
    found += _classes_of_module(config_class)
    return [c for c in dict.fromkeys(found) if inspect.isclass(c) and issubclass(c, PreTrainedModel)]


def _classes_of_module(config_class: type[PretrainedConfig]) -> list[type[PreTrainedModel]]:
    """Classes beside the config's own that no auto class knows, such as a vision tower."""
    name = config_class.__module__.replace(".configuration_", ".modeling_")
    try:
        module = importlib.import_module(name)
    except ImportError:
        return []
    classes = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, PreTrainedModel)
        and value.__module__ == module.__name__
        and getattr(value, "config_class", None) is config_class
        and "forward" in dir(value)
        and not value.__name__.endswith("PreTrainedModel")
    ]
    return sorted(classes, key=lambda c: not c.__name__.endswith("Model"))


# -- weights ---------------------------------------------------------------------------------------


def build(
    model_class: type[PreTrainedModel], config: PretrainedConfig, attention: str | None
) -> PreTrainedModel:
    """A model in float32 and evaluation mode with seeded random weights.

    The weights are larger than at the start of a training, so that attention decides what comes out.

    Raises:
        CannotBuildError: it would have more than `MAX_PARAMETERS`.
    """
    config = copy.deepcopy(config)
    with torch.device("meta"):
        try:
            size = sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
        except (RuntimeError, NotImplementedError, TypeError):
            size = 0  # it computes with its weights while it is built, which "meta" cannot
    if size > MAX_PARAMETERS:
        raise CannotBuildError(f"its smallest config has {size / 1e6:,.0f} M parameters")
    torch.manual_seed(0)
    arguments = {} if attention is None else {"attn_implementation": attention}
    model: PreTrainedModel = model_class._from_config(config, dtype=torch.float32, **arguments)
    randomise(model)
    return model.eval()


def randomise(model: nn.Module) -> None:
    """Seeded random weights under which signals keep their size from layer to layer."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters(), key=lambda item: item[0]):
            if not weight.is_floating_point() or weight.numel() == 0:
                continue
            if weight.numel() == 1:
                if not weight.any():
                    weight.fill_(0.5)  # a gate that training opens
            elif weight.ndim >= 2:
                fan_in = weight[0].numel() if weight.ndim != 3 else weight.shape[-1]
                std = 1.0 if "embed" in name else 1 / math.sqrt(fan_in)
                weight.copy_(torch.randn(weight.shape, generator=generator) * std)
            elif weight.abs().max() < 0.01 and weight.any() and weight.min() == weight.max():
                weight.fill_(1.0)  # a layer scale
