"""TRL's SFTTrainer: fine-tune on instructions under a mask of what general text needs.

    python examples/sft_trainer.py --model Qwen/Qwen3-0.6B --general general.txt --data tasks.jsonl --output tuned

A line of the data is {"prompt": "...", "completion": "..."}.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from das_ds.integrations.huggingface import ProtectionCallback


def read_blocks(path: str, tokenizer: AutoTokenizer, length: int) -> list[dict[str, torch.Tensor]]:
    """Text as rows of equally many tokens."""
    ids = torch.tensor(tokenizer(Path(path).read_text(encoding="utf-8"))["input_ids"])
    return [{"input_ids": block, "labels": block} for block in ids[: len(ids) // length * length].view(-1, length)]


def main() -> None:
    """Protect general text, fine-tune, and add what the instructions need to the protection."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="name or folder of a causal language model")
    parser.add_argument("--general", required=True, help="text whose knowledge must stay")
    parser.add_argument("--data", required=True, help="instructions, JSON lines")
    parser.add_argument("--output", required=True, help="folder for the model and its protection")
    parser.add_argument("--method", default="directions", choices=["directions", "unit", "parameter"])
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--batch-size", type=int, default=8, help="rows per rank")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row of general text")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    data: Dataset = load_dataset("json", data_files=arguments.data, split="train")
    general = DataLoader(read_blocks(arguments.general, tokenizer, arguments.length), batch_size=arguments.batch_size)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32),
        args=SFTConfig(
            output_dir=arguments.output,
            num_train_epochs=1,
            per_device_train_batch_size=arguments.batch_size,
            per_device_eval_batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            bf16=torch.cuda.is_available(),
            report_to=[],
        ),
        train_dataset=data,
        processing_class=tokenizer,
    )
    trainer.add_callback(ProtectionCallback(trainer, arguments.method, before=general))
    trainer.train()
    trainer.save_model(arguments.output)


if __name__ == "__main__":
    main()
