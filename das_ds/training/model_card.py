"""README of an exported model: its base, its training, how to load it, and its held-out losses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from das_ds.config import ObjectiveName, RunConfig
from das_ds.config.stage import stage_folder
from das_ds.errors import RunFolderError
from das_ds.reporting.tables import format_loss
from das_ds.storage import MODEL_CARD, atomic_write
from das_ds.training.hub_upload import hub_target

PIPELINES: dict[ObjectiveName, str] = {"mlm": "fill-mask", "clm": "text-generation"}
MODEL = "model"
"""Name of the folder that is uploaded where `export.push_to_hub` is on."""
AUTO_MODELS: dict[ObjectiveName, str] = {"mlm": "AutoModelForMaskedLM", "clm": "AutoModelForCausalLM"}


def model_card(
    config: RunConfig,
    stages_done: int,
    objective: ObjectiveName,
    losses: Mapping[str, tuple[float | None, float]] | None = None,
    *,
    num_steps: int | None = None,
    name: str = MODEL,
) -> str:
    """README of an exported model: its base, its training, how to load it, and its held-out losses.

    Args:
        config: of the run.
        stages_done: stages that the model was trained on.
        objective: of pre-training.
        losses: corpus -> loss before training, if it was measured, and loss of this model; None: not evaluated yet.
        num_steps: steps of the newest stage that the model was trained for; None: all of them.
        name: of the model's folder, in that of its domain.
    """
    stages = config.stages[:stages_done]
    newest = stages[-1]
    steps = [stage.num_steps for stage in stages]
    if num_steps is not None:
        steps[-1] = num_steps
    domains = ", ".join(domain for stage in stages for domain in stage.domains)
    how = "in order" if len(newest.domains) == 1 else "all at once"
    replayed = config.replayed(newest.last_domain)
    if config.replays_generated(newest.last_domain):
        replayed = [*replayed, "text that the model before it generated"]
    num_replayed = config.num_replayed(newest.last_domain)
    replay = f" In the last domain {num_replayed} of these are from {', '.join(replayed)}." if replayed else ""
    # The length of an earlier run's domain is not known where it was given in epochs and the text is gone.
    shown = [str(number) if number else "?" for number in steps]
    lengths = shown[0] if len(set(shown)) == 1 else ", ".join(shown)
    folder = config.output_dir / stage_folder(newest.index, newest.name) / name
    location = f'"{folder}"'
    if config.export.push_to_hub and name == MODEL:
        target = hub_target(config, newest.name)
        location = f'"{target.repo_id}"' + ("" if target.tag is None else f', revision="{target.tag}"')
    base = config.model.name_or_path or "random weights"
    card = f"""---
library_name: transformers
pipeline_tag: {PIPELINES[objective]}
tags: [das_ds, continual-pre-training]
---

# {config.output_dir.name}: after {newest.name}

Continually pre-trained with das_ds, method `{config.method.name}`, from {base}.

Domains {how}: {domains}; {lengths} steps of {config.train.global_batch_size} sequences of \
{config.data.sequence_length} tokens each.{replay}

```python
from transformers import AutoTokenizer, {AUTO_MODELS[objective]}

tokenizer = AutoTokenizer.from_pretrained({location})
model = {AUTO_MODELS[objective]}.from_pretrained({location})
```
"""
    if losses is None:
        return card
    rows = "".join(
        f"| {corpus} | {format_loss(before)} | {after:.4f} |\n" for corpus, (before, after) in losses.items()
    )
    return (
        f"{card}\nHeld-out loss in nats per predicted token:\n\n"
        f"| corpus | before training | after {newest.name} |\n|---|---:|---:|\n{rows}"
    )


def write_model_card(folder: Path, card: str) -> None:
    """Replace the card of an exported model; nothing is written where the user has moved the model away.

    Raises:
        RunFolderError: the disk is full, or the folder cannot be written.
    """
    if not folder.is_dir():
        return
    try:
        with atomic_write(folder / MODEL_CARD) as partial:
            partial.write_text(card, encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"{folder / MODEL_CARD}: cannot be written ({error.strerror})") from error
