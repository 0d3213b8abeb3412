"""KL(base || model) of the models that a run exported, from their complete logits in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from das_ds.config import RunConfig
from das_ds.distributed.process_group import RankInfo
from das_ds.models.loading import load_model
from das_ds.training.data_module import DataModule, prepare_data
from helpers.tiny_tokenizer import tiny_tokenizer


def expected_divergences(values: dict[str, Any]) -> list[float]:
    """After each domain, on its held-out text; the base are the run's initial weights."""
    config = RunConfig(**values)
    base, spec = load_model(config.model, seed=config.seed, vocab_size=len(tiny_tokenizer()))
    data = prepare_data(config, RankInfo(0, 0, 1, torch.device("cpu")), spec.objective)
    load = AutoModelForCausalLM if spec.objective == "clm" else AutoModelForMaskedLM
    folders = [
        Path(config.output_dir) / f"domains/{i:02d}_{domain.name}/model" for i, domain in enumerate(config.domains)
    ]
    return [
        _divergence(base, load.from_pretrained(folder), data, domain.name)
        for folder, domain in zip(folders, config.domains, strict=True)
    ]


@torch.no_grad()
def _divergence(base: PreTrainedModel, model: PreTrainedModel, data: DataModule, corpus: str) -> float:
    batches = data.evaluation_batches(corpus)
    divergences = []
    for index in range(len(batches)):
        batch = batches[index]
        of_base, of_model = (
            log_softmax(
                network.double().eval()(input_ids=batch.corrupted_ids).logits.flatten(0, 1)[batch.predicted], -1
            )
            for network in (base, model)
        )
        divergences.append(kl_div(of_model, of_base, reduction="none", log_target=True).sum(-1))
    return float(torch.cat(divergences).mean())
