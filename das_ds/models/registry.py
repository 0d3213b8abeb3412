"""Model type -> adapter."""

from das_ds.errors import ModelError
from das_ds.models.adapter import ArchitectureAdapter
from das_ds.models.bert import BERT
from das_ds.models.roberta import ROBERTA

ADAPTERS: dict[str, ArchitectureAdapter] = {adapter.model_type: adapter for adapter in (BERT, ROBERTA)}


def adapter_for(model_type: str) -> ArchitectureAdapter:
    """The adapter of a Hugging Face `model_type`.

    Raises:
        ModelError: no adapter; the message lists the known types.
    """
    if model_type not in ADAPTERS:
        raise ModelError(f"no adapter for model type {model_type!r}; known: {', '.join(sorted(ADAPTERS))}")
    return ADAPTERS[model_type]
