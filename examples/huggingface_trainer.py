"""Hugging Face's Trainer: learn one text after the other, each under a mask of all before.

python examples/huggingface_trainer.py --model gpt2 --texts first.txt second.txt --output runs
torchrun --nproc-per-node 2 examples/huggingface_trainer.py ... --deepspeed examples/zero2.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from das_ds.integrations.huggingface import PROTECTION_FILE, ProtectionCallback


def read_blocks(path: str, tokenizer: AutoTokenizer, length: int) -> list[dict[str, torch.Tensor]]:
    """Text as rows of equally many tokens."""
    ids = torch.tensor(tokenizer(Path(path).read_text(encoding="utf-8"))["input_ids"])
    return [{"input_ids": block} for block in ids[: len(ids) // length * length].view(-1, length)]


def main() -> None:
    """Train on each text in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="name or folder of a causal language model")
    parser.add_argument("--texts", required=True, nargs="+", help="files to learn, one after the other")
    parser.add_argument("--output", required=True, help="folder for models, checkpoints and protections")
    parser.add_argument("--method", default="directions", choices=["directions", "unit", "parameter"])
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--batch-size", type=int, default=8, help="rows per rank")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--deepspeed", help="DeepSpeed config")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model, protection = arguments.model, None
    for number, path in enumerate(arguments.texts):
        folder = Path(arguments.output) / f"{number:02d}_{Path(path).stem}"
        training = TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=1,
            per_device_train_batch_size=arguments.batch_size,
            per_device_eval_batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            deepspeed=arguments.deepspeed,
            report_to=[],
        )
        trainer = Trainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            args=training,
            train_dataset=read_blocks(path, tokenizer, arguments.length),
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )
        # Masks by the texts before, and measures this one after training.
        trainer.add_callback(ProtectionCallback(trainer, arguments.method, load=protection))
        trainer.train()
        trainer.save_model(str(folder))
        model, protection = folder, folder / PROTECTION_FILE


if __name__ == "__main__":
    main()
