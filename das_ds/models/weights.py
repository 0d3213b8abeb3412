"""What is done with the stored weights of a model, decided from names, shapes and types before a value is read.

Every ZeRO stage, preflight and evaluation take the same decision and read through the same reader, so that the fp32
weights of a run do not depend on how they are divided. What transformers does on loading is done here too: old names
are renamed, a missing or surplus prefix of the base model is no obstacle, and tensors that the present form of a model
keeps together (the experts of Mixtral) are put together by transformers' own conversions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.initialization import no_init_weights

from das_ds.errors import ModelError
from das_ds.models.stored_tensors import READABLE, TensorFiles, abbreviate

COMPARED = 2**24
"""Weights that are compared at once."""
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer")
"""Parts of names that libraries put in front of the modules that they wrap, anywhere in a network."""
LONGEST_PREFIX = 3
"""Parts of a foreign prefix that are tried."""
IGNORED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.masked_bias$")
"""Tensors of layers that are no weights; old versions of transformers stored them."""
IN_LAYER = re.compile(r"(.*?\.)\d+\.")
HEAD = "lm_head"
"""What `model.allow_missing` calls the weights behind the base model."""


@dataclass(frozen=True)
class _Source:
    """What a weight is made of."""

    keys: tuple[str, ...]
    """Tensors of the files."""
    converter: WeightConverter | None = None
    """Makes the weight of several tensors, or of a part of one."""
    patterns: tuple[str, ...] = ()
    """For the converter, one per key."""
    first_target: str = ""
    """The first weight that the converter makes."""


class StoredWeights:
    """The weights of a model in files, by the names that the model gives them.

    Args:
        source: folder or hub name.
        model: the model they are for; its parameters need no values.
        local_only: look for a hub name on this machine alone.

    Raises:
        ModelError: weights that are not this model's, or not all of them: see `check`.
        SafetensorError, OSError: damaged files; later reading may raise them too.
    """

    def __init__(self, source: str, model: PreTrainedModel, *, local_only: bool = False) -> None:
        self.source = source
        self._model, self._expected = model, model.state_dict()
        self._files = TensorFiles(
            source, name=getattr(model.config, "transformers_weights", None), local_only=local_only
        )
        self._sources: dict[str, _Source] = {}
        self._names = _names(model)
        self.surplus: list[str] = []
        """Tensors that the model has no place for."""
        self._resolve()
        stored = {name: next((n for n in names if n in self._sources), None) for name, names in self._names.items()}
        self._stored_as = {name: found for name, found in stored.items() if found is not None}
        self.missing = [name for name, found in stored.items() if found is None]
        """Parameters that no file has."""

    def __contains__(self, name: str) -> bool:
        return name in self._stored_as or (name in self._sources and name not in self._names)

    def check(self, allow_missing: Iterable[str] = ()) -> None:
        """Refuse weights with which another network than the one that was named would be trained.

        Args:
            allow_missing: as in the config.

        Raises:
            ModelError: weights are missing, of another shape or type, or tied ones differ.
        """
        base = f"{self._model.base_model_prefix}."
        missing = [*self.missing, *(name for name in self._buffers() if name not in self._sources)]
        lost = [name for name in missing if name.startswith(base)]
        if lost:
            raise ModelError(
                f"model.name_or_path: found no weights of {abbreviate(lost)} in {self.source}, expected all of a "
                f"{type(self._model).__name__}; {self._hint(lost)}"
            )
        self._check_layers()
        self._check_shapes()
        if self.missing and HEAD not in allow_missing:
            raise ModelError(
                f"model.name_or_path: found no weights of the LM head ({abbreviate(self.missing)}) in {self.source}, "
                f"expected them; model.allow_missing: [{HEAD}] has them drawn at random by seed, and "
                "model.head_warmup_steps trains them before anything else"
            )
        self._check_ties()

    def record(self) -> dict[str, Any]:
        """The decision, as JSON can hold it."""
        read = [name for name in self._sources if name in self._expected]
        sources = {name: self._sources[name] for name in read}
        keys = {key for source in sources.values() for key in source.keys}
        return {
            "source": self.source,
            "files": [path.name for path in self._files.paths],
            "dtypes": sorted({self._files.of(key).dtype(key) for key in sorted(keys, key=self._file_order)}),
            "num_tensors": len(keys),
            "renamed": sum(source.converter is None and source.keys != (name,) for name, source in sources.items()),
            "converted": sum(source.converter is not None for source in sources.values()),
            "surplus": self.surplus,
            "drawn": self.missing,
        }

    def fill(self, construct: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """The network of `construct()`, whole, with these weights; those that are missing stay as it drew them."""
        with no_init_weights() if not self.missing else nullcontext():
            model = construct()
        model.tie_weights()
        with torch.no_grad():
            for name, value in [*model.named_parameters(), *model.named_buffers()]:
                if name in self:
                    value.copy_(self.read(name, value.shape, 0, value.numel()).view(value.shape))
        return model

    def read(self, name: str, shape: torch.Size, offset: int, numel: int) -> torch.Tensor:
        """Elements [offset, offset + numel) of a flattened weight, (numel,) float32 with memory of its own.

        Where it is made of several tensors the whole of it is made first, and its parts are held for that long.
        """
        target = self._stored_as.get(name, name)
        source = self._sources[target]
        if source.converter is None:
            return self._files.of(source.keys[0]).read(source.keys[0], offset, numel)
        whole = self._convert(source, self._whole)[target]
        return whole.reshape(-1)[offset : offset + numel].clone()

    def close(self) -> None:
        """Close the file that is open."""
        self._files.close()

    def _resolve(self) -> None:
        """Which tensors make which weight, as `transformers.core_model_loading` decides it."""
        transforms = get_model_conversion_mapping(self._model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        collected: dict[str, list[tuple[str, str]]] = {}
        for key in sorted(self._files.places, key=dot_natural_key):
            name, pattern = self._renamed(key, renamings, converters)
            if name not in self._expected and key in self._expected:
                name, pattern = self._renamed(key, [], [])
            if name not in self._expected:
                self.surplus.append(key)
            elif pattern is not None:
                collected.setdefault(name, []).append((key, pattern))
            elif name in self._sources:
                raise ModelError(
                    f"model.name_or_path: found {self._sources[name].keys[0]} and {key} in {self.source}, both of "
                    f"them weights of {name}, expected one"
                )
            else:
                self._sources[name] = _Source((key,))
        for first, parts in collected.items():
            converter = by_pattern[parts[0][1]]
            keys, patterns = zip(*parts, strict=True)
            for target in converter.target_patterns:
                name = first.replace(converter.target_patterns[0], target)
                self._sources[name] = _Source(keys, converter, patterns, first)

    def _renamed(self, key: str, renamings: list[Any], converters: list[Any]) -> tuple[str, str | None]:
        return rename_source_key(key, renamings, converters, self._model.base_model_prefix, self._expected)

    def _base_renamed(self, key: str) -> str:
        return self._renamed(key, [], [])[0]

    def _buffers(self) -> list[str]:
        """Buffers that belong to the weights."""
        parameters = {name for names in self._names.values() for name in names}
        return [name for name in self._expected if name not in parameters]

    def _check_layers(self) -> None:
        """A layer of this config has no place for it: biases, norms or whole layers, adapters that were not merged."""
        ignored = [*IGNORED, *(getattr(self._model, "_keys_to_ignore_on_load_unexpected", None) or ())]
        base = f"{self._model.base_model_prefix}."
        starts = {start[1].removeprefix(base) for start in map(IN_LAYER.match, self._expected) if start}
        for key in self.surplus:
            place = IN_LAYER.match(key)
            is_of_layers = place and (place[1].removeprefix(base) in starts or key.startswith(base))
            if is_of_layers and not any(re.search(i, key) for i in ignored):
                raise ModelError(
                    f"model.name_or_path: found {key} in {self.source}, expected no such weights in a "
                    f"{type(self._model).__name__} by its config.json: the two contradict each other"
                )

    def _check_shapes(self) -> None:
        for name, source in self._sources.items():
            for key in source.keys:
                dtype = self._files.of(key).dtype(key)
                if self._expected[name].is_floating_point() and dtype not in _READABLE_NAMES:
                    raise ModelError(
                        f"model.name_or_path: found {key} of type {dtype} in {self.source}, expected one of "
                        f"{', '.join(_READABLE_NAMES)}; quantized weights have to be made whole first"
                    )
            expected = tuple(self._expected[name].shape)
            found = self._shape(name, source)
            if found != expected:
                raise ModelError(
                    f"model.name_or_path: found weights of {name} of shape {found} in {self.source}, expected "
                    f"{expected} by its config"
                )

    def _shape(self, name: str, source: _Source) -> tuple[int, ...]:
        if source.converter is None:
            return self._files.of(source.keys[0]).shape(source.keys[0])
        made = self._convert(source, lambda key: torch.empty(self._files.of(key).shape(key), device="meta"))
        return tuple(made[name].shape)

    def _convert(self, source: _Source, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """What transformers makes of the tensors that `read` gives."""
        converter: Any = deepcopy(source.converter)
        for key, pattern in zip(source.keys, source.patterns, strict=True):
            converter.add_tensor(source.first_target, key, pattern, read(key))
        try:
            made = converter.convert(source.first_target, model=self._model, config=self._model.config)
        except (RuntimeError, ValueError, IndexError, KeyError) as error:
            raise ModelError(
                f"model.name_or_path: cannot make {source.first_target} of {abbreviate(source.keys)} in {self.source}, "
                f"which have other shapes or are not all there: {str(error).splitlines()[0]}"
            ) from error
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _whole(self, key: str) -> torch.Tensor:
        shape = self._files.of(key).shape(key)
        return self._files.of(key).read(key, 0, torch.Size(shape).numel()).view(shape)

    def _check_ties(self) -> None:
        """transformers unties, on loading, what the config ties and the file has twice with other values."""
        for names in self._names.values():
            first, *others = [name for name in names if name in self._sources] or [""]
            for other in others:
                if self._shape(first, self._sources[first]) != self._shape(
                    other, self._sources[other]
                ) or not self._are_equal(first, other):
                    raise ModelError(
                        f"model.name_or_path: found other weights of {other} than of {first} in {self.source}, "
                        "expected the same, which config.json ties; or tie_word_embeddings: false there"
                    )

    def _are_equal(self, first: str, other: str) -> bool:
        numel = self._expected[first].numel()
        a, b = self._sources[first].keys[0], self._sources[other].keys[0]
        for offset in range(0, numel, COMPARED):
            part = min(COMPARED, numel - offset)
            values = self._files.of(a).read(a, offset, part)
            if not torch.equal(values, self._files.of(b).read(b, offset, part)):
                return False
        return True

    def _file_order(self, key: str) -> tuple[str, str]:
        return str(self._files.places[key]), key

    def _hint(self, lost: list[str]) -> str:
        """What may be wrong with the names in the files."""
        # Without renaming first: transformers overlooks a doubled prefix, which would name a part of the foreign one.
        renamings: tuple[Callable[[str], str], ...] = (str, self._base_renamed)
        for rename, (what, strip) in product(renamings, _wrappings(self.surplus)):
            if {rename(strip(key)) for key in self.surplus}.issuperset(lost):
                return (
                    f"names there hold {what!r}, which a wrapper left and without which they fit: save them without it"
                )
        return (
            f"names there that fit nothing: {abbreviate(self.surplus)}" if self.surplus else "it has no other weights"
        )


_READABLE_NAMES = sorted(str(dtype).removeprefix("torch.") for dtype in READABLE)


def _names(model: PreTrainedModel) -> dict[str, list[str]]:
    """Name of every parameter -> all its names, of which tied ones have several."""
    first: dict[torch.nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first.setdefault(parameter, []).append(name)
    return {names[0]: names for names in first.values()}


def _wrappings(keys: list[str]) -> list[tuple[str, Callable[[str], str]]]:
    """Changes of names to try: without a prefix, then without what wrappers put anywhere."""
    parts = [key.split(".") for key in keys]
    prefixes = dict.fromkeys(
        ".".join(p[:end]) + "." for p in parts for end in range(1, min(len(p), LONGEST_PREFIX + 1))
    )
    inside = (re.compile(rf"(^|\.){wrapper}\.") for wrapper in WRAPPERS)
    return [
        *((prefix, partial(_without_prefix, prefix)) for prefix in prefixes),
        *((f"{wrapper}.", partial(pattern.sub, r"\1")) for wrapper, pattern in zip(WRAPPERS, inside, strict=True)),
    ]


def _without_prefix(prefix: str, key: str) -> str:
    return key.removeprefix(prefix)
