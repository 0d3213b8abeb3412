"""The base decoder: a small LLaMA that das_ds itself pre-trains on the general corpus, as the only domain of a run."""

from __future__ import annotations

import lzma
from pathlib import Path

from benchmarks.domains.data import GENERAL, corpus
from benchmarks.domains.jobs import TrainingRun
from benchmarks.domains.plan import Tier, merged
from benchmarks.domains.runner import Runner
from das_ds.durable import replaced_folder
from launch.demo_corpora import train_tokenizer

VOCAB_SIZE = 16_384


def base_decoder(tier: Tier, folder: Path, data: Path, cache: Path, runner: Runner) -> Path:
    """Folder of the exported model; trained, with a tokeniser of its own, where it is not done."""
    tokenizer = folder / "decoder_tokenizer"
    if not tokenizer.exists():
        text = lzma.decompress(Path(corpus(data, GENERAL)["train"][0]).read_bytes()).decode()
        with replaced_folder(tokenizer) as partial:
            train_tokenizer(text.splitlines(), VOCAB_SIZE).save_pretrained(partial)
    run = decoder_run(tier, folder, data, cache, tokenizer)
    runner.run([run])
    return run.model(0)


def decoder_run(tier: Tier, folder: Path, data: Path, cache: Path, tokenizer: Path) -> TrainingRun:
    """The run that pre-trains it."""
    own = {"domains": [corpus(data, GENERAL)], "data": {"tokenizer": str(tokenizer), "cache_dir": str(cache)}}
    return TrainingRun(folder / f"decoder_{tier.name}", merged(own, tier.settings, tier.decoder), keeps_models=True)
