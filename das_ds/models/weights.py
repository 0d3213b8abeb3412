"""Stored weights of a model: which tensors of which files become which parameter, decided before any value is read.

Every ZeRO stage, preflight and evaluation make the same decision and read through the same class, so that the fp32
weights of a run do not depend on how they are sharded. The rules are those of transformers: old names are renamed, the
prefix of the base model may be missing or surplus, and tensors that current versions of a model fuse (the experts of
Mixtral) are converted by transformers' own code.
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

COMPARED_AT_ONCE = 2**24
"""Elements of tied weights that are compared per read."""
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer")
"""Name components that libraries insert where they wrap a module, anywhere in a network."""
MAX_PREFIX_COMPONENTS = 3
"""Length up to which foreign prefixes are tried."""
IGNORED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.masked_bias$")
"""Tensors of layers that are not weights; old versions of transformers stored them."""
IN_LAYER = re.compile(r"(.*?\.)\d+\.")
HEAD = "lm_head"
"""Name, in `model.allow_missing`, of the weights outside the base model."""


@dataclass(frozen=True)
class _WeightSource:
    """The stored tensors that become one weight."""

    keys: tuple[str, ...]
    """Names of the stored tensors."""
    converter: WeightConverter | None = None
    """Builds the weight from several tensors, or from a part of one; None: the single tensor is the weight."""
    patterns: tuple[str, ...] = ()
    """For the converter, one per key."""
    first_target: str = ""
    """The first weight that the converter builds."""


class StoredWeights:
    """The stored weights of a model, by the model's own parameter names.

    Args:
        source: folder or hub name.
        model: the model to load; its parameters may be on the meta device.
        local_only: look up a hub name in the local cache only.

    Raises:
        ModelError: two stored tensors are the same weight; for other mismatches see `check`.
        SafetensorError, OSError: damaged files; later reads may raise them too.
    """

    def __init__(self, source: str, model: PreTrainedModel, *, local_only: bool = False) -> None:
        self.source = source
        self._model = model
        self._expected = model.state_dict()
        self._files = TensorFiles(
            source, name=getattr(model.config, "transformers_weights", None), local_only=local_only
        )
        self._sources: dict[str, _WeightSource] = {}
        self._aliases = _group_tied_names(model)
        self.surplus: list[str] = []
        """Stored tensors that the model does not have."""
        self._resolve()
        # Of tied parameters, files may store any one name.
        stored_as = {
            name: next((alias for alias in aliases if alias in self._sources), None)
            for name, aliases in self._aliases.items()
        }
        self._stored_as = {name: alias for name, alias in stored_as.items() if alias is not None}
        self.missing = [name for name, alias in stored_as.items() if alias is None]
        """Parameters that no file contains."""

    def __contains__(self, name: str) -> bool:
        return name in self._stored_as or (name in self._sources and name not in self._aliases)

    def check(self, allow_missing: Iterable[str] = ()) -> None:
        """Refuse weights that do not make the network that the config describes.

        Args:
            allow_missing: `model.allow_missing` of the run config.

        Raises:
            ModelError: weights are missing or of another shape or dtype, layers have weights that the model lacks, or
                tied weights differ.
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
        """A summary of the files and of how they map to the model, as JSON values."""
        sources = {name: source for name, source in self._sources.items() if name in self._expected}
        keys = {key for source in sources.values() for key in source.keys}
        return {
            "source": self.source,
            "files": [path.name for path in self._files.paths],
            "dtypes": sorted({self._files.file_with(key).dtype(key) for key in sorted(keys, key=self._file_order)}),
            "num_tensors": len(keys),
            "renamed": sum(source.converter is None and source.keys != (name,) for name, source in sources.items()),
            "converted": sum(source.converter is not None for source in sources.values()),
            "surplus": self.surplus,
            "drawn": self.missing,
        }

    def fill(self, construct: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """The network of `construct()` with these weights; missing weights keep their random initialization."""
        with no_init_weights() if not self.missing else nullcontext():
            model = construct()
        model.tie_weights()
        with torch.no_grad():
            for name, value in [*model.named_parameters(), *model.named_buffers()]:
                if name in self:
                    value.copy_(self.read(name, value.shape, 0, value.numel()).view(value.shape))
        return model

    def read(self, name: str, shape: torch.Size, offset: int, numel: int) -> torch.Tensor:
        """Elements [offset, offset + numel) of a flattened weight: a copy, (numel,) float32.

        A weight with a converter is built in full first, from all of its stored tensors.
        """
        target = self._stored_as.get(name, name)
        source = self._sources[target]
        if source.converter is None:
            return self._files.file_with(source.keys[0]).read(source.keys[0], offset, numel)
        weight = self._convert(source, self._read_tensor)[target]
        return weight.reshape(-1)[offset : offset + numel].clone()

    def close(self) -> None:
        """Close the file that is open."""
        self._files.close()

    def _resolve(self) -> None:
        """Map stored tensors to weights by the rules of `transformers.core_model_loading`."""
        transforms = get_model_conversion_mapping(self._model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        collected: dict[str, list[tuple[str, str]]] = {}
        for key in sorted(self._files.path_by_tensor, key=dot_natural_key):
            name, pattern = self._rename(key, renamings, converters)
            if name not in self._expected and key in self._expected:
                # A rule for old names matched a name that is already current.
                name, pattern = self._rename(key, [], [])
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
                self._sources[name] = _WeightSource((key,))
        # All stored tensors of a converter are known only now; it builds one or several weights from them.
        for first, pairs in collected.items():
            converter = by_pattern[pairs[0][1]]
            keys, patterns = zip(*pairs, strict=True)
            for target in converter.target_patterns:
                name = first.replace(converter.target_patterns[0], target)
                self._sources[name] = _WeightSource(keys, converter, patterns, first)

    def _rename(self, key: str, renamings: list[Any], converters: list[Any]) -> tuple[str, str | None]:
        return rename_source_key(key, renamings, converters, self._model.base_model_prefix, self._expected)

    def _fix_base_prefix(self, key: str) -> str:
        return self._rename(key, [], [])[0]

    def _buffers(self) -> list[str]:
        """Persistent buffers, which are stored like weights."""
        parameters = {name for names in self._aliases.values() for name in names}
        return [name for name in self._expected if name not in parameters]

    def _check_layers(self) -> None:
        """Refuse stored weights of layers that the model lacks: biases, norms, more layers, or unmerged adapters."""
        ignored = [*IGNORED, *(getattr(self._model, "_keys_to_ignore_on_load_unexpected", None) or ())]
        base = f"{self._model.base_model_prefix}."
        starts = {match[1].removeprefix(base) for match in map(IN_LAYER.match, self._expected) if match}
        for key in self.surplus:
            match = IN_LAYER.match(key)
            is_in_layer = match and (match[1].removeprefix(base) in starts or key.startswith(base))
            if is_in_layer and not any(re.search(pattern, key) for pattern in ignored):
                raise ModelError(
                    f"model.name_or_path: found {key} in {self.source}, expected no such weights in a "
                    f"{type(self._model).__name__} by its config.json: the two contradict each other"
                )

    def _check_shapes(self) -> None:
        for name, source in self._sources.items():
            for key in source.keys:
                dtype = self._files.file_with(key).dtype(key)
                if self._expected[name].is_floating_point() and dtype not in _READABLE_NAMES:
                    raise ModelError(
                        f"model.name_or_path: found {key} of type {dtype} in {self.source}, expected one of "
                        f"{', '.join(_READABLE_NAMES)}; dequantize quantized weights first"
                    )
            expected = tuple(self._expected[name].shape)
            found = self._shape(name, source)
            if found != expected:
                raise ModelError(
                    f"model.name_or_path: found weights of {name} of shape {found} in {self.source}, expected "
                    f"{expected} by its config"
                )

    def _shape(self, name: str, source: _WeightSource) -> tuple[int, ...]:
        if source.converter is None:
            return self._files.file_with(source.keys[0]).shape(source.keys[0])
        converted = self._convert(source, lambda key: torch.empty(self._files.file_with(key).shape(key), device="meta"))
        return tuple(converted[name].shape)

    def _convert(self, source: _WeightSource, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights that transformers' converter builds from the tensors that `read` returns."""
        # A copy, because a converter collects tensors in its own state.
        converter: Any = deepcopy(source.converter)
        for key, pattern in zip(source.keys, source.patterns, strict=True):
            converter.add_tensor(source.first_target, key, pattern, read(key))
        try:
            converted = converter.convert(source.first_target, model=self._model, config=self._model.config)
        except (RuntimeError, ValueError, IndexError, KeyError) as error:
            raise ModelError(
                f"model.name_or_path: cannot build {source.first_target} from {abbreviate(source.keys)} in "
                f"{self.source}, which have other shapes or are incomplete: {str(error).splitlines()[0]}"
            ) from error
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}

    def _read_tensor(self, key: str) -> torch.Tensor:
        shape = self._files.file_with(key).shape(key)
        return self._files.file_with(key).read(key, 0, torch.Size(shape).numel()).view(shape)

    def _check_ties(self) -> None:
        """Refuse tied weights that are stored twice with different values; transformers would silently untie them."""
        for aliases in self._aliases.values():
            first, *others = [name for name in aliases if name in self._sources] or [""]
            for other in others:
                shapes = [self._shape(name, self._sources[name]) for name in (first, other)]
                if shapes[0] != shapes[1] or not self._are_equal(first, other):
                    raise ModelError(
                        f"model.name_or_path: found other weights of {other} than of {first} in {self.source}, "
                        "expected the same, which config.json ties; or tie_word_embeddings: false there"
                    )

    def _are_equal(self, first: str, other: str) -> bool:
        numel = self._expected[first].numel()
        key = self._sources[first].keys[0]
        other_key = self._sources[other].keys[0]
        for offset in range(0, numel, COMPARED_AT_ONCE):
            size = min(COMPARED_AT_ONCE, numel - offset)
            # Read one after the other: only one file is open at a time.
            values = self._files.file_with(key).read(key, offset, size)
            if not torch.equal(values, self._files.file_with(other_key).read(other_key, offset, size)):
                return False
        return True

    def _file_order(self, key: str) -> tuple[str, str]:
        return str(self._files.path_by_tensor[key]), key

    def _hint(self, lost: list[str]) -> str:
        """The probable error in the names in the files."""
        # Unrenamed names first: transformers tolerates a doubled prefix, so that only a part of the foreign prefix
        # would be named.
        renamings: tuple[Callable[[str], str], ...] = (str, self._fix_base_prefix)
        for rename, (component, strip) in product(renamings, _list_wrappers(self.surplus)):
            if {rename(strip(key)) for key in self.surplus}.issuperset(lost):
                return f"names there contain {component!r}, left by a wrapper; save the weights without it"
        return (
            f"names there that fit nothing: {abbreviate(self.surplus)}" if self.surplus else "it has no other weights"
        )


_READABLE_NAMES = sorted(str(dtype).removeprefix("torch.") for dtype in READABLE)


def _group_tied_names(model: PreTrainedModel) -> dict[str, list[str]]:
    """First name of every parameter -> all its names; tied parameters have several."""
    names_by_parameter: dict[torch.nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_by_parameter.setdefault(parameter, []).append(name)
    return {names[0]: names for names in names_by_parameter.values()}


def _list_wrappers(keys: list[str]) -> list[tuple[str, Callable[[str], str]]]:
    """(component, function that removes it) to try: first prefixes, then the names of wrappers anywhere."""
    split_keys = [key.split(".") for key in keys]
    prefixes = dict.fromkeys(
        ".".join(components[:end]) + "."
        for components in split_keys
        for end in range(1, min(len(components), MAX_PREFIX_COMPONENTS + 1))
    )
    inside = (re.compile(rf"(^|\.){wrapper}\.") for wrapper in WRAPPERS)
    return [
        *((prefix, partial(_strip_prefix, prefix)) for prefix in prefixes),
        *((f"{wrapper}.", partial(pattern.sub, r"\1")) for wrapper, pattern in zip(WRAPPERS, inside, strict=True)),
    ]


def _strip_prefix(prefix: str, key: str) -> str:
    return key.removeprefix(prefix)
