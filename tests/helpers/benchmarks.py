"""Small benchmarks, and their scores by the plainest computation: one choice at a time, all logits, by transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from das_ds.benchmark.benchmarks import Benchmark
from das_ds.benchmark.items import Item
from das_ds.benchmark.log_likelihood import ChoiceScorer, ScoredItems
from das_ds.benchmark.run import run_benchmarks
from das_ds.benchmark.scores import ModelBenchmarks
from das_ds.config import RunConfig
from das_ds.distributed.process_group import RankInfo, init_process_group
from das_ds.models.architectures.registry import spec_for
from helpers.single_rank import SingleRank
from helpers.tiny_tokenizer import tiny_tokenizer

DATA = Path(__file__).parents[1] / "data"
REQUESTS = "kitchen/rc_0shot"
"""The benchmark in the request files of `DATA`."""
QUESTIONS: list[dict[str, Any]] = [
    {"context": "The waiter brought", "choices": ["warm bread", "a treebank", "soup"], "answer": 0},
    {"context": "We propose a new method for", "choices": ["soup", "parsing sentences"], "answer": 1},
    {"context": "The treatment reduced the risk of", "choices": ["stroke", "a bowl of soup", "noodles"], "answer": 0},
    {"context": "The noodles were", "choices": ["cold", "fair"], "answer": 0},
]
CLOZES: list[dict[str, Any]] = [
    {"context": question["context"], "choices": [question["choices"][question["answer"]]], "answer": 0}
    for question in QUESTIONS
]


def write_items(path: Path, items: list[dict[str, Any]]) -> str:
    """A file of items; returns its name."""
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return str(path)


def items_of(questions: list[dict[str, Any]]) -> list[Item]:
    """Items whose choices follow their context after a space."""
    return [
        Item((q["context"],) * len(q["choices"]), tuple(f" {choice}" for choice in q["choices"]), q["answer"])
        for q in questions
    ]


def benchmark_of(items: list[Item]) -> Benchmark:
    """A benchmark of these items."""
    return Benchmark("toy", items, "acc", {"file": "toy", "items": len(items)})


def bare_tokenizer() -> PreTrainedTokenizerBase:
    """The tiny tokenizer without special tokens around a text, and without token for padding, like that of GPT-2."""
    description = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    description["post_processor"] = None
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(description)), eos_token="</s>")


def score_alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, benchmark: Benchmark, *, batch_size: int = 4
) -> ScoredItems:
    """The product's probabilities on one rank; logits of few positions at a time."""
    spec = spec_for(model.config.model_type)
    info = RankInfo(0, 0, 1, torch.device("cpu"))
    with patch("das_ds.benchmark.log_likelihood.positions_per_chunk", return_value=3):
        scorer = ChoiceScorer(model.eval(), spec, tokenizer, info, batch_size=batch_size, logits_mib=1)
    return scorer.score(benchmark, "")


@torch.no_grad()
def plain_log_likelihood(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: str, continuation: str
) -> tuple[float, bool, int]:
    """Log-likelihood of a choice, whether each of its tokens is the most probable one, and their number."""
    ids = tokenizer(context + continuation)["input_ids"]
    before = tokenizer(context)["input_ids"]
    if ids[-1] == tokenizer.eos_token_id:
        before = before[:-1]
        choice = range(len(before), len(ids) - 1)
    else:
        choice = range(len(before), len(ids))
    total = 0.0
    is_greedy = True
    for position in choice:
        if spec_for(model.config.model_type).objective == "clm":
            logits = model(torch.tensor([ids[:position]])).logits[0, -1].double()
        else:
            masked = [*ids[:position], tokenizer.mask_token_id, *ids[position + 1 :]]
            logits = model(torch.tensor([masked])).logits[0, position].double()
        total += float(logits.log_softmax(dim=0)[ids[position]])
        is_greedy = is_greedy and int(logits.argmax()) == ids[position]
    return total, is_greedy, len(choice)


def benchmarks_alone(config: RunConfig) -> list[ModelBenchmarks]:
    """All benchmarks of a run, in this process."""
    ranks: Any = SingleRank()
    return run_benchmarks(config, ranks)


def benchmarks_on_ranks(config: RunConfig) -> tuple[list[ModelBenchmarks], list[str]]:
    """All benchmarks of a run on these ranks, and what this start scored."""
    with note_scored() as scored:
        return run_benchmarks(config, init_process_group()), scored


@contextmanager
def note_scored() -> Iterator[list[str]]:
    """Benchmarks and models that are scored meanwhile."""
    scored: list[str] = []
    score = ChoiceScorer.score

    def noted(self: ChoiceScorer, benchmark: Benchmark, label: str) -> ScoredItems:
        scored.append(label)
        return score(self, benchmark, label)

    with patch.object(ChoiceScorer, "score", noted):
        yield scored
