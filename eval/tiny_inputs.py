"""Inputs for any model: the arguments that its `forward` names, with values of a likely shape.

Shapes follow from the argument's name and the config's sizes. Where several are usual, such as images
with and without a dimension of frames, there are alternatives, of which the caller takes one that runs.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from .tiny_configs import FIRST_SPECIAL_TOKEN, PATCHES_PER_SIDE, POSITIONS, VOCABULARY, WIDTH

BATCH = 2
LENGTH = 32
"""Tokens of a text: more than the 16 queries up to which a step with a cache is SDPA's."""
TARGET_LENGTH = 20
"""Tokens of a decoder's text where there is an encoder too."""
IMAGE_START = 8
"""Tokens of text before an image: more than are ever padding."""
AUDIO_SAMPLES = 8000
AUDIO_FRAMES = 64

MODALITIES = (
    "pixel_values",
    "input_features",
    "input_values",
    "bbox",
    "pixel_values_videos",
    "inputs_embeds",
    "hidden_states",
)
"""What a model may be given beside or instead of a text."""
TIME_SERIES = ("past_time_features", "past_observed_mask", "future_values", "future_time_features")
TYPES = ("token_type_ids", "mm_token_type_ids")
"""1 for image tokens."""
SIZES = ("grid_hw", "grid_hws", "image_sizes", "spatial_shapes", "target_sizes", "tgt_sizes")
RETRY = "the same again"
"""In a set of arguments: the set was tried before, and other values are made for it now."""
CACHE_TROUBLE = "[Cc]ache|get_seq_length|num_hidden_layers"
RESIZED = re.compile(r"(?P<name>\w+) with (?P<size>\d+) in the place of (?P<was>\d+)")
"""In a set of arguments: one of them, with a dimension of another size."""
_WANTED_SIZES = (
    r"cannot be multiplied \(\d+x(?P<got>\d+) and (?P<wanted>\d+)x\d+\)",
    r"size of tensor a \((?P<got>\d+)\) must match the size of tensor b \((?P<wanted>\d+)\)",
    r"size of tensor a \((?P<wanted>\d+)\) must match the size of tensor b \((?P<got>\d+)\)",
    r"to have (?P<wanted>\d+) channels, but got (?P<got>\d+) channels",
    r"normalized_shape=\[(?P<wanted>\d+)\].* of size ?\[[\d, ]*?(?P<got>\d+)\]",
    r"(?P<got>\d+) is not a multiple of (?P<step>\d+)",
    r"multiple of [^(]*\((?P<step>\d+)\), but got (?P<got>\d+)",
)
"""How errors name the size that a dimension has and the one that it should have."""
IMAGE_FEATURES = re.compile(r"features:? *(\d+)")
"""How Transformers says how many image tokens it wants."""


class Inputs:
    """Makes the arguments of one model's `forward` by their names."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.config = model.config
        self.parameters = {
            name: parameter
            for name, parameter in inspect.signature(model.forward).parameters.items()
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        }
        self.generator = torch.Generator().manual_seed(1)
        self.placeholders = 0  # image tokens in a row of text

    def field(self, *names: str, default: Any = None) -> Any:
        """The first of `names` that the config or one of its sub-configs has."""
        queue = [self.config]
        while queue:
            config = queue.pop(0)
            for name in names:
                value = getattr(config, name, None)
                if value is not None:
                    return value
            queue += [v for v in vars(config).values() if isinstance(v, PretrainedConfig)]
        return default

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def tokens(self, length: int = LENGTH) -> Tensor:
        top = min(FIRST_SPECIAL_TOKEN, self.field("vocab_size", default=VOCABULARY))
        tokens = torch.randint(min(8, top - 1), top, (BATCH, length), generator=self.generator)
        if self.placeholders and length == LENGTH:
            token = self.field("image_token_id", "image_token_index", "video_token_id", "audio_token_id")
            images = torch.full((BATCH, self.placeholders), -1 if token is None else token)
            tokens = torch.cat((tokens[:, :IMAGE_START], images, tokens[:, IMAGE_START:]), dim=1)
        return tokens

    def argument_sets(self) -> list[tuple[str, ...]]:
        """Which arguments to give, the likeliest set first."""
        main = self.model.main_input_name
        mains = [main] if isinstance(main, str) else list(main)
        required = [n for n, p in self.parameters.items() if p.default is inspect.Parameter.empty]
        text = [n for n in ("input_ids",) if n in self.parameters]
        decoder = [n for n in ("decoder_input_ids",) if n in self.parameters and self._has_decoder()]
        others = [[*text, name] for name in MODALITIES] + [[name] for name in MODALITIES]
        sets = []
        for names in ([], text, [*text, *mains], mains, *others):
            if not names and not required:
                continue
            if "past_values" in names and "future_time_features" in self.parameters:
                names = [*names, *TIME_SERIES]
            for extra in (decoder, []):
                wanted = tuple(dict.fromkeys([*names, *required, *extra]))
                if wanted and set(wanted) <= set(self.parameters):
                    sets.append(wanted)
        if text and not required:
            sets.sort(key=lambda names: "input_ids" not in names)  # a text alone, if that is enough
        return list(dict.fromkeys(sets))

    def asked_for(self, names: tuple[str, ...], error: Exception) -> Iterator[tuple[str, ...]]:
        """Larger sets of arguments that an error asks for."""
        wanted = IMAGE_FEATURES.search(str(error))
        if wanted and not self.placeholders:
            features = int(wanted[1]) // BATCH
            features = features if features <= POSITIONS - LENGTH else features // WIDTH
            if 0 < features <= POSITIONS - LENGTH:
                self.placeholders = features
                yield (*names, RETRY)
            return
        no_tokens = re.search("argument 'indices'.*NoneType", str(error))  # of an embedding
        if no_tokens and "input_ids" in self.parameters and "input_ids" not in names:
            yield ("input_ids", *names)
        named = set(re.findall(r"[a-z][a-z_0-9]+", str(error).lower())) & set(self.parameters) - set(names)
        if re.search("(exactly|specify) (one|1) of|either", str(error), re.IGNORECASE):
            yield from ((*names, name) for name in sorted(named))
        if named:
            yield (*names, *sorted(named))
        can_skip_cache = "use_cache" in self.parameters and "use_cache" not in names
        if can_skip_cache and re.search(CACHE_TROUBLE, str(error)):
            yield (*names, "use_cache")

    def image_arguments(self, inputs: Mapping[str, Any]) -> list[list[str]]:
        """What an image beside a text takes, the likeliest set first; empty where the model takes none."""
        if "input_ids" not in inputs or "pixel_values" in inputs or "pixel_values" not in self.parameters:
            return []
        sets = (("pixel_values", "image_grid_thw", *TYPES), ("pixel_values", *SIZES, *TYPES))
        known = [[name for name in names if name in self.parameters and name not in inputs] for names in sets]
        return known if known[0] != known[1] else known[:1]

    def guesses(self, names: tuple[str, ...], error: Exception) -> Iterator[tuple[str, ...]]:
        """Larger sets of arguments that may be what an error about None is missing."""
        if "NoneType" in str(error):
            for name in self.parameters:
                if name not in names and re.search(r"mask|grid|shape|len|size|_ids|features|hidden", name):
                    yield (*names, name)
        if not any(RESIZED.fullmatch(name) for name in names):
            for size, was in wanted_sizes(str(error)):
                yield from ((*names, f"{n} with {size} in the place of {was}") for n in names if n != RETRY)

    def _has_decoder(self) -> bool:
        return bool(getattr(self.config, "is_encoder_decoder", False))

    def values_of(self, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Values for these arguments, the likeliest first."""
        changes = [change for name in names if (change := RESIZED.fullmatch(name))]
        names = [name for name in names if name in self.parameters]
        alternatives = [self.alternatives(name) for name in names]
        for change in changes:
            index = names.index(change["name"])
            sizes = int(change["was"]), int(change["size"])
            resized = (with_size(value, *sizes) for value in alternatives[index])
            alternatives[index] = [value for value in resized if value is not None]
        for values in itertools.islice(itertools.product(*alternatives), 40):
            yield dict(zip(names, values, strict=True))

    def alternatives(self, name: str) -> list[Any]:
        """Values that an argument of this name may want, the likeliest first."""
        width = self.field("hidden_size", "d_model", "embed_dim", default=WIDTH)
        width = width if isinstance(width, int) else width[0]
        codebooks = self.field("num_codebooks")
        if name in ("input_ids", "decoder_input_ids", "codes", "audio_codes") and isinstance(codebooks, int):
            length = TARGET_LENGTH if name.startswith("decoder") else LENGTH
            top = min(FIRST_SPECIAL_TOKEN, self.field("vocab_size", default=VOCABULARY))
            shapes = [
                (BATCH, length),
                (BATCH * codebooks, length),
                (BATCH, length, codebooks),
                (BATCH, codebooks, length),
            ]
            return [torch.randint(1, top, shape, generator=self.generator) for shape in shapes]
        simple: dict[str, Callable[[], Any]] = {
            "input_ids": self.tokens,
            "tgt_ids": self.tokens,
            "decoder_input_ids": lambda: self.tokens(TARGET_LENGTH),
            "attention_mask": lambda: torch.ones(BATCH, LENGTH, dtype=torch.long),
            "inputs_embeds": lambda: self.normal(BATCH, LENGTH, width),
            "return_loss": lambda: False,
            "use_cache": lambda: False,
        }
        if name in simple:
            return [simple[name]()]
        if name == "bbox":
            boxes = torch.tensor([1, 2, 5, 6]).expand(BATCH, LENGTH, 4).contiguous()
            return [boxes, boxes / 10]
        if name in TYPES:
            types = torch.zeros(BATCH, LENGTH + self.placeholders, dtype=torch.long)
            types[:, IMAGE_START : IMAGE_START + self.placeholders] = 1
            return [types]
        if name in TIME_SERIES:
            return self._time_series(name)
        if name.startswith("num_"):
            return [LENGTH // 2]
        if re.search(r"_(lens|lengths)$", name):
            return [torch.full((BATCH,), AUDIO_FRAMES)]
        if name == "pixel_position_ids":
            patches = torch.arange(PATCHES_PER_SIDE**2)
            positions = torch.stack((patches % PATCHES_PER_SIDE, patches // PATCHES_PER_SIDE), dim=-1)
            return [positions.expand(BATCH, -1, -1).contiguous()]
        if name == "merge_sizes":
            return [torch.full((BATCH,), 2)]
        if "grid_thw" in name or name in SIZES:
            side = PATCHES_PER_SIDE
            three = torch.tensor([[1, side, side]] * BATCH)
            return [three, three[:, 1:]] if "thw" in name else [three[:, 1:], three]
        if name == "flattened_patches":
            size = self.field("patch_embed_hidden_size", default=WIDTH)
            patches = self.normal(BATCH, PATCHES_PER_SIDE**2, 2 + size)
            patches[..., :2] = 1  # row and column
            return [patches]
        if "pixel_values" in name or name in ("image", "images"):
            return self._pixels()
        if name == "hidden_states":
            return [*self._flat_patches(), self.normal(BATCH, LENGTH, width), self.normal(LENGTH, width)]
        if name in ("input_features", "audio_features", "input_values", "audio_values", "spectrogram"):
            return self._audio(name)
        if "mask" in name:
            mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
            return [mask, mask[..., None]] if "image" in name else [mask]
        if "hidden_states" in name or "embeds" in name or "embed" in name or "features" in name:
            return [self.normal(BATCH, LENGTH, width)]
        if name.startswith("past_") or name in ("future_values", "inputs"):
            return self._series()
        if name.endswith("_ids") or name == "labels":
            return [self.tokens()]
        return [self.normal(BATCH, LENGTH, width)]

    def _image_size(self) -> tuple[int, int]:
        size = self.field("image_size", "img_size", "input_size", default=64)
        if isinstance(size, dict):
            size = list(size.values())
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[-1]))

    def _pixels(self) -> list[Tensor]:
        channels = self.field("num_channels", "in_channels", "in_chans", default=3)
        channels = channels if isinstance(channels, int) else 3
        height, width = self._image_size()
        frames = self.field("num_frames", default=2)
        patches = self._flat_patches()
        images = [
            self.normal(BATCH, channels, height, width),
            self.normal(BATCH, frames, channels, height, width),
            self.normal(BATCH, 1, channels, height, width),
            self.normal(BATCH, channels, 64, 64),
            self.normal(BATCH, channels, 128, 128),
            self.normal(BATCH, channels, 224, 224),
            self.normal(BATCH, channels, frames, height, width),
        ]
        flat = any("grid" in name or "spatial_shapes" in name for name in self.parameters)
        return [*patches, *images] if flat else [*images, *patches]

    def _flat_patches(self) -> list[Tensor]:
        patch = self.field("patch_size", default=16)
        patch = patch if isinstance(patch, int) else patch[-1]
        channels = self.field("num_channels", "in_channels", "in_chans", default=3)
        channels = channels if isinstance(channels, int) else 3
        count = PATCHES_PER_SIDE**2
        frames = self.field("temporal_patch_size", default=1)
        size = channels * patch * patch
        sizes = list(dict.fromkeys((size * frames, size)))
        flat = [self.normal(BATCH * count, s) for s in sizes]
        return [
            *flat,
            *(self.normal(BATCH, count, s) for s in sizes),
            self.normal(BATCH * count, channels, patch, patch),
        ]

    def _audio(self, name: str) -> list[Tensor]:
        bins = self.field(
            "num_mel_bins",
            "feature_size",
            "n_mels",
            "input_feat_per_channel",
            "mel_bins",
            "input_dim",
            default=80,
        )
        positions = self.field("max_source_positions")
        lengths = list(dict.fromkeys(n for n in (2 * positions if positions else 0, AUDIO_FRAMES, 256) if n))
        length = self.field("max_length")
        if isinstance(length, int) and length > 20:
            lengths.insert(0, length)
        shapes: list[tuple[int, ...]] = [
            s for n in lengths for s in ((BATCH, bins, n), (BATCH, n, bins), (BATCH, 1, n, bins))
        ]
        waves: list[tuple[int, ...]] = [(BATCH, AUDIO_SAMPLES), (BATCH, 1, AUDIO_SAMPLES)]
        shapes.append((bins, BATCH * AUDIO_FRAMES))
        order = [*waves, *shapes] if "values" in name else [*shapes, *waves]
        return [self.normal(*shape) for shape in order]

    def _time_series(self, name: str) -> list[Tensor]:
        past = self.field("context_length", default=LENGTH) + max(self.field("lags_sequence", default=[0]))
        future = self.field("prediction_length", default=8)
        if name == "past_observed_mask":
            return [torch.ones(BATCH, past)]
        if name == "future_values":
            return [self.normal(BATCH, future)]
        length = past if name.startswith("past") else future
        return [self.normal(BATCH, length, self.field("num_time_features"))]

    def _series(self) -> list[Tensor]:
        context = self.field("context_length", default=LENGTH)
        lags = self.field("lags_sequence", default=[0])
        channels = self.field("num_input_channels", default=1)
        length = context + max(lags)
        return [
            self.normal(BATCH, length),
            self.normal(BATCH, context, channels),
            self.normal(BATCH, length, self.field("num_time_features", default=1) or 1),
        ]


def wanted_sizes(message: str) -> list[tuple[int, int]]:
    """Sizes that an error asks for, each with the size that it found instead."""
    found = (match for pattern in _WANTED_SIZES for match in re.finditer(pattern, message))
    return list(dict.fromkeys(_wanted(**match.groupdict()) for match in found))


def _wanted(got: str, wanted: str = "", step: str = "") -> tuple[int, int]:
    if step:
        return -(-int(got) // int(step)) * int(step), int(got)
    return int(wanted), int(got)


def with_size(value: Any, was: int, size: int) -> Tensor | None:
    """`value` with `size` in the place of the last dimension that has a size of `was`, or a part of it.

    A part: what a convolution and a flattening have made `was` numbers of, and would make `size` of, if
    the dimension were longer in that proportion. None where no dimension fits.
    """
    if not isinstance(value, Tensor):
        return None
    for dimension in reversed(range(1, value.ndim)):
        old = value.shape[dimension]
        if old > 1 and was % old == 0 and size * old % was == 0:
            index = torch.arange(size * old // was) % old
            return value.index_select(dimension, index)
    return None
