"""Tokens per second of plain training with das_ds and with its alternatives, measured in one run.

Compared are das_ds (`ncl`) and the Hugging Face `Trainer` with `DataCollatorForLanguageModeling`: plain, with
DeepSpeed, and with PEFT's orthogonal subspace fine-tuning (OSF). All train the same model on the same text at the same
batch size, precision and ZeRO stage, each in a separate process, in turns, and including data loading and logging.

In bf16, das_ds and DeepSpeed hold bf16 weights and an fp32 copy; plain `Trainer` uses autocast instead.

Run: `python -m benchmarks.peers [--sizes encoder decoder] [--batch-sizes 4 16] [--rounds 2]`
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.result_io import default_device, print_table, write_result

ROOT = Path(__file__).resolve().parents[1]
SIZES: dict[str, dict[str, Any]] = {
    "encoder": {
        "model_type": "bert",
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
        "max_position_embeddings": 512,
        "vocab_size": 30000,
    },
    "decoder": {
        "model_type": "llama",
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "intermediate_size": 1024,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "vocab_size": 30000,
    },
    "tiny": {
        "model_type": "bert",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "vocab_size": 500,
    },
    "roberta-base": {
        "model_type": "roberta",
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "vocab_size": 50265,
    },
}
CAUSAL = ("llama",)
NCL = "das_ds ncl"
NCL_ZERO = "das_ds ncl, ZeRO"
TRAINER = "Trainer"
TRAINER_ZERO = "Trainer, DeepSpeed ZeRO"
OSF = "Trainer, PEFT OSF"
PEERS = (NCL, TRAINER, OSF, NCL_ZERO, TRAINER_ZERO)
SPECIAL = ("<pad>", "<unk>", "<mask>", "<eos>", "<bos>")
WARM_UP = 3
TIMEOUT_S = 1800.0
"""Per peer and round."""
LEARNING_RATE = 1e-4


class PeerError(RuntimeError):
    """A peer failed to train; the others are still compared."""


@dataclass(frozen=True)
class Workload:
    """One comparison."""

    size: str
    batch_size: int
    sequence_length: int
    precision: str
    zero_stage: int
    """Of the peers with ZeRO; the others use stage 0, which is none."""
    steps: int

    @property
    def is_causal(self) -> bool:
        """Whether the model predicts the next token."""
        return SIZES[self.size]["model_type"] in CAUSAL


def write_text(folder: Path, vocabulary: int, num_words: int) -> None:
    """Write random words, a hundred per line, and a tokenizer with one token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [f"w{number}" for number in range(vocabulary - len(SPECIAL))]
    generator = random.Random(0)
    lines = [" ".join(generator.choices(words, k=100)) for _ in range(-(-num_words // 100))]
    (folder / "train.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "valid.txt").write_text("\n".join(lines[:20]), encoding="utf-8")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate((*SPECIAL, *words))}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", **names).save_pretrained(
        folder / "tokenizer"
    )


def model_values(work: Workload) -> dict[str, Any]:
    """Hugging Face config values with the tokenizer's special tokens."""
    tokens = {"pad_token_id": 0, "eos_token_id": 3, "bos_token_id": 4}
    return {**SIZES[work.size], **tokens}


def write_run_config(work: Workload, folder: Path, name: str, domains: list[str], **sections: Any) -> Path:
    """Write the config of a das_ds run over the text of `write_text`.

    Args:
        work: sizes.
        folder: with text and tokenizer.
        name: of the run folder and the config file.
        domains: names; all have the same text.
        sections: additional sections of the config.
    """
    text = {"train": [str(folder / "train.txt")], "valid": [str(folder / "valid.txt")]}
    config = {
        "output_dir": str(folder / name),
        "model": {"config": model_values(work)},
        "domains": [{"name": domain, **text} for domain in domains],
        "data": {
            "tokenizer": str(folder / "tokenizer"),
            "sequence_length": work.sequence_length,
            "cache_dir": str(folder / "cache"),
        },
        "train": {
            "steps_per_domain": work.steps,
            "global_batch_size": work.batch_size,
            "micro_batch_size": work.batch_size,
            "learning_rate": LEARNING_RATE,
            "precision": work.precision,
            "log_interval": 1,
        },
        "evaluation": {"max_sequences": work.batch_size},
        "wandb": {"mode": "disabled"},
        **sections,
    }
    path = folder / f"{name}.yaml"
    # JSON is YAML.
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def run_das_ds(work: Workload, folder: Path, zero_stage: int) -> list[float]:
    """Tokens per second of each step, from the run's metrics."""
    path = write_run_config(
        work,
        folder,
        f"run_{zero_stage}",
        ["words"],
        checkpoint={"interval": 10 * work.steps},
        method={"name": "ncl"},
        deepspeed={"zero_optimization": {"stage": zero_stage}},
    )
    _call([sys.executable, str(ROOT / "launch" / "train.py"), "--config", str(path)])
    lines = (folder / f"run_{zero_stage}" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["tokens_per_s"] for line in lines]


def run_trainer(work: Workload, folder: Path, peer: str) -> list[float]:
    """Tokens per second of each step, from a process that runs `train_with_trainer`."""
    result = folder / "trainer.json"
    result.unlink(missing_ok=True)
    options = [f"--{key.replace('_', '-')}={value}" for key, value in vars(work).items()]
    _call([sys.executable, "-m", "benchmarks.peers", "--child", peer, "--folder", str(folder), *options])
    seconds: list[float] = json.loads(result.read_text(encoding="utf-8"))
    return [work.batch_size * work.sequence_length / step for step in seconds]


def train_with_trainer(work: Workload, folder: Path, peer: str) -> None:
    """Train with `Trainer` and write the seconds of every step."""
    if peer == TRAINER_ZERO:
        # Without a launcher's variables DeepSpeed looks for MPI.
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(_free_port())
    import time

    import torch
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    values = model_values(work)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(0)
    model: Any = (AutoModelForCausalLM if work.is_causal else AutoModelForMaskedLM).from_config(config)
    if peer == OSF:
        from peft import OSFConfig, get_peft_model

        targets = [name for name, module in model.base_model.named_modules() if isinstance(module, torch.nn.Linear)]
        model = get_peft_model(model, OSFConfig(target_modules=targets))
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    ids = tokenizer((folder / "train.txt").read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    starts = range(0, len(ids) - work.sequence_length + 1, work.sequence_length)
    blocks = [{"input_ids": ids[start : start + work.sequence_length]} for start in starts]
    stamps: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Records when steps end."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            stamps.append(time.perf_counter())

    deepspeed = {
        "zero_optimization": {"stage": work.zero_stage},
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
    }
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=work.steps,
        per_device_train_batch_size=work.batch_size,
        learning_rate=LEARNING_RATE,
        weight_decay=0.01,
        max_grad_norm=1.0,
        bf16=work.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        deepspeed=deepspeed if peer == TRAINER_ZERO else None,
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=not work.is_causal, mlm_probability=0.15)
    trainer = Trainer(model, arguments, data_collator=collator, train_dataset=blocks, callbacks=[Clock()])
    trainer.train()
    seconds = [after - before for before, after in pairwise(stamps)]
    (folder / "trainer.json").write_text(json.dumps(seconds), encoding="utf-8")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _call(command: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    if process.returncode:
        print(process.stdout[-2000:], process.stderr[-4000:], file=sys.stderr)
        raise PeerError(f"{' '.join(command[:4])} ... exited with code {process.returncode}")


def compare(work: Workload, rounds: int, peers: tuple[str, ...]) -> list[dict[str, Any]]:
    """One row per peer: the median over the steps of all rounds, without the first steps of each."""
    rates: dict[str, list[float]] = {peer: [] for peer in peers}
    for _, peer in product(range(rounds), peers):
        with TemporaryDirectory() as name:
            folder = Path(name)
            num_words = (work.steps + 2) * work.batch_size * work.sequence_length
            write_text(folder, SIZES[work.size]["vocab_size"], num_words)
            try:
                if peer in (NCL, NCL_ZERO):
                    step_rates = run_das_ds(work, folder, work.zero_stage if peer == NCL_ZERO else 0)
                else:
                    step_rates = run_trainer(work, folder, peer)
            except (PeerError, subprocess.TimeoutExpired) as error:
                print(f"{peer}: {error}", file=sys.stderr)
                continue
        rates[peer] += step_rates[WARM_UP:]
    medians = {peer: statistics.median(peer_rates) for peer, peer_rates in rates.items() if peer_rates}
    rivals = {NCL: TRAINER, NCL_ZERO: TRAINER_ZERO}

    def ratio(peer: str, other: str | None) -> float | None:
        return medians[peer] / medians[other] if other in medians and peer in medians else None

    return [
        {
            "network": work.size,
            "batch": f"{work.batch_size} x {work.sequence_length}",
            "trained by": peer,
            "tokens/s": medians.get(peer),
            "over Trainer": ratio(peer, TRAINER),
            "over its rival": ratio(peer, rivals.get(peer)),
        }
        for peer in peers
    ]


def main() -> int:
    """Compare all peers and print the table; the result file is written after each comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=["encoder", "decoder"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 16], help="sequences per step")
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--zero-stage", type=int, choices=(1, 2, 3), default=1, help="of the peers with ZeRO")
    parser.add_argument("--steps", type=int, default=12, help="per round and peer, three of them for warm-up")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    # Arguments of a child process, which trains once.
    for name, kind in (("child", str), ("folder", Path), ("size", str), ("batch-size", int)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    shared = {key: getattr(options, key) for key in ("sequence_length", "precision", "zero_stage", "steps")}
    if options.child is not None:
        train_with_trainer(Workload(options.size, options.batch_size, **shared), options.folder, options.child)
        return 0
    device = default_device()
    rows: list[dict[str, Any]] = []
    for size, batch_size in product(options.sizes, options.batch_sizes):
        rows += compare(Workload(size, batch_size, **shared), options.rounds, tuple(options.peers))
        path = write_result("peers", device, {**shared, "rounds": options.rounds}, rows)
    print_table(rows)
    print(f"written to {path.name}")
    return 1 if any(row["tokens/s"] is None for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
