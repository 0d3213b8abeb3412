"""Plain torch: a model learns new text under a mask of what it needs for earlier text.

python examples/plain_torch.py --model gpt2 --earlier earlier.txt --new new.txt --output learned
"""

from __future__ import annotations

import argparse

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from das_ds.integrations import Protector


def read_blocks(path: str, tokenizer: AutoTokenizer, length: int) -> list[dict[str, torch.Tensor]]:
    """Text as rows of equally many tokens."""
    with open(path, encoding="utf-8") as file:
        ids = torch.tensor(tokenizer(file.read())["input_ids"])
    return [{"input_ids": block, "labels": block} for block in ids[: len(ids) // length * length].view(-1, length)]


def mean_loss(model: torch.nn.Module, dataloader: DataLoader) -> float:
    """Mean loss of the batches, without dropout."""
    model.eval()
    with torch.no_grad():
        losses = [model(**batch).loss for batch in dataloader]
    model.train()
    return float(torch.stack(losses).mean())


def main() -> None:
    """Measure earlier text, then learn new text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="name or folder of a causal language model")
    parser.add_argument("--earlier", required=True, help="text that must not be forgotten")
    parser.add_argument("--new", required=True, help="text to learn")
    parser.add_argument("--output", required=True, help="folder for the model and its protection")
    parser.add_argument("--method", default="directions", choices=["directions", "unit", "parameter"])
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    earlier, new = (
        DataLoader(read_blocks(path, tokenizer, arguments.length), batch_size=arguments.batch_size, shuffle=shuffle)
        for path, shuffle in ((arguments.earlier, False), (arguments.new, True))
    )
    before = mean_loss(model, earlier)

    protector = Protector(model, arguments.method)
    protector.measure(earlier)
    optimizer = protector.wrap(torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate))

    model.train()
    for batch in new:
        model(**batch).loss.backward()
        protector.mask_gradients()  # before clipping, so that the norm is that of masked gradients
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    print(f"loss on earlier text: {before:.3f} before, {mean_loss(model, earlier):.3f} after learning")
    protector.measure(new)  # the next training protects both
    protector.save(f"{arguments.output}/protection.safetensors")
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
