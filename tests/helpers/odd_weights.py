"""Folders of models whose weights are stored in some odd but real way, and folders that must be refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from das_ds.config import ModelConfig
from das_ds.distributed.process_group import init_process_group
from das_ds.engine.sharded_init import sharded_init
from das_ds.errors import ModelError
from das_ds.models.loading import load_model
from helpers.construction import engine_settings
from helpers.tiny_models import NO_DROPOUT, tiny_model

Tensors = dict[str, torch.Tensor]
SAFE = "model.safetensors"
TORCH = "pytorch_model.bin"


def saved(folder: Path, model_type: str = "bert", **changes: Any) -> Tensors:
    """A tiny model written as transformers does; its tensors."""
    dropout = NO_DROPOUT if model_type == "bert" else {}
    tiny_model(model_type, **dropout, **changes).save_pretrained(folder)
    return load_file(folder / SAFE)


def rewritten(folder: Path, tensors: Tensors) -> None:
    """The file of a folder with other tensors."""
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / SAFE, metadata={"format": "pt"})


def changed(change: Callable[[Tensors], Tensors], model_type: str = "bert", **changes: Any) -> Callable[[Path], None]:
    """Writes a folder whose tensors were changed."""
    return lambda folder: rewritten(folder, change(saved(folder, model_type, **changes)))


def config_changed(model_type: str = "bert", **values: Any) -> Callable[[Path], None]:
    """Writes a folder whose config contradicts its file."""

    def write(folder: Path) -> None:
        saved(folder, model_type)
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return write


def renamed(change: Callable[[str], str], model_type: str = "bert", **changes: Any) -> Callable[[Path], None]:
    """Writes a folder whose tensors have other names."""
    return changed(lambda tensors: {change(name): value for name, value in tensors.items()}, model_type, **changes)


def with_prefix(prefix: str, model_type: str = "bert") -> Callable[[Path], None]:
    """Writes a folder whose names have a prefix."""
    return renamed(lambda name: f"{prefix}{name}", model_type)


def _old_names(name: str) -> str:
    name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    return name


def _with(**more: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, **{name.replace("__", "."): value for name, value in more.items()}}


def _mixed(tensors: Tensors) -> Tensors:
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return {name: value.to(kinds[i % 4]) for i, (name, value) in enumerate(tensors.items())}


def _sharded(folder: Path) -> None:
    tiny_model("bert", **NO_DROPOUT).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1


def _torch_file(folder: Path, **options: Any) -> None:
    # As state_dict() gives it: tied weights stand in it under every name.
    model = tiny_model("bert", **NO_DROPOUT)
    model.save_pretrained(folder)
    (folder / SAFE).unlink()
    torch.save(model.state_dict(), folder / TORCH, **options)


def _torch_shards(folder: Path) -> None:
    _torch_file(folder)
    state = torch.load(folder / TORCH)
    (folder / TORCH).unlink()
    parts = [dict(list(state.items())[i::2]) for i in range(2)]
    files = [f"pytorch_model-{i + 1:05d}-of-00002.bin" for i in range(2)]
    for file, part in zip(files, parts, strict=True):
        torch.save(part, folder / file)
    places = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    (folder / f"{TORCH}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _both_kinds(folder: Path) -> None:
    saved(folder)
    torch.save({name: torch.zeros_like(v) for name, v in load_file(folder / SAFE).items()}, folder / TORCH)


def _beside_a_variant(folder: Path) -> None:
    rewritten(folder, {name: torch.zeros_like(value) for name, value in saved(folder).items()})
    shutil.move(folder / SAFE, folder / "model.fp16.safetensors")
    saved(folder)


def _old_dtype_key(folder: Path) -> None:
    rewritten(folder, {name: value.half() for name, value in saved(folder).items()})
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values.pop("dtype", None)
    path.write_text(json.dumps({**values, "torch_dtype": "float16"}))


def _experts_apart(folder: Path) -> None:
    """As the files of Mixtral are: transformers' own writer takes the merged experts apart."""
    tensors = saved(folder, "mixtral")
    assert any(".experts.3.w1.weight" in name for name in tensors), sorted(tensors)


ACCEPTED: dict[str, Callable[[Path], None]] = {
    "as transformers writes": lambda folder: saved(folder) and None,
    "bf16": changed(lambda t: {k: v.bfloat16() for k, v in t.items()}),
    "fp16 and torch_dtype": _old_dtype_key,
    "mixed types": changed(_mixed),
    "config says bf16": config_changed(dtype="bfloat16"),
    "shards": _sharded,
    "torch file": _torch_file,
    "old torch file": lambda folder: _torch_file(folder, _use_new_zipfile_serialization=False),
    "torch shards": _torch_shards,
    "both kinds": _both_kinds,
    "with a variant": _beside_a_variant,
    "surplus": changed(
        _with(
            bert__pooler__dense__weight=torch.ones(24, 24),
            cls__seq_relationship__bias=torch.ones(2),
            bert__embeddings__position_ids=torch.zeros(1, 40, dtype=torch.int64),
        )
    ),
    "gamma and beta": renamed(_old_names),
    "no prefix": renamed(lambda name: name.removeprefix("bert.")),
    "the prefix twice": renamed(lambda name: name if name.startswith("lm_head") else f"model.{name}", "llama"),
    "tied head stored too": changed(
        lambda t: {**t, "cls.predictions.decoder.weight": t["bert.embeddings.word_embeddings.weight"]}
    ),
    "tied weight by the other name": changed(
        lambda t: {
            "lm_head.weight" if name == "model.embed_tokens.weight" else name: value for name, value in t.items()
        },
        "llama",
        tie_word_embeddings=True,
    ),
    "old rotary frequencies": changed(
        lambda t: {**t, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4).half()}, "llama"
    ),
    "rotary frequencies of the network": changed(lambda t: {**t, "model.rotary_emb.inv_freq": torch.rand(4)}, "llama"),
    "gpt2 with its mask": changed(
        lambda t: {
            **t,
            "transformer.h.0.attn.bias": torch.ones(1, 1, 40, 40),
            "transformer.h.0.attn.masked_bias": torch.ones(()),
        },
        "gpt2",
    ),
    "experts apart": _experts_apart,
    "experts apart in bf16": lambda folder: rewritten(
        folder, {name: value.bfloat16() for name, value in saved(folder, "mixtral").items()}
    ),
    "qwen3_moe": lambda folder: saved(folder, "qwen3_moe") and None,
}
"""What is read, with the same weights as by transformers."""


def _quantized(folder: Path) -> None:
    config_changed(quantization_config={"quant_method": "gptq", "bits": 4})(folder)


def _adapter_beside(folder: Path) -> None:
    saved(folder)
    model = get_peft_model(tiny_model("bert", **NO_DROPOUT), LoraConfig(target_modules=["query"]))
    model.save_pretrained(folder)


def _missing_shard(folder: Path) -> None:
    _sharded(folder)
    sorted(folder.glob("*.safetensors"))[0].unlink()


def _twice(folder: Path) -> None:
    _sharded(folder)
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    more = {**load_file(second), **dict(list(load_file(first).items())[:1])}
    save_file(more, second, metadata={"format": "pt"})


def _truncated(folder: Path) -> None:
    saved(folder)
    content = (folder / SAFE).read_bytes()
    (folder / SAFE).write_bytes(content[:-100])


def _truncated_torch(folder: Path) -> None:
    _torch_file(folder)
    content = (folder / TORCH).read_bytes()
    (folder / TORCH).write_bytes(content[: len(content) // 2])


def _only_variant(folder: Path) -> None:
    saved(folder)
    shutil.move(folder / SAFE, folder / "model.fp16.safetensors")


def _nested(folder: Path) -> None:
    _torch_file(folder)
    torch.save({"step": 3, "model": torch.load(folder / TORCH)}, folder / TORCH)


def _bad_index(folder: Path) -> None:
    _sharded(folder)
    (folder / f"{SAFE}.index.json").write_text('{"metadata": {}}')


def _compiled_layers(name: str) -> str:
    return name.replace("layer.0.", "layer.0._orig_mod.").replace("layer.1.", "layer.1._orig_mod.")


def _peft(folder: Path) -> None:
    """A network with its adapters not merged, stored completely."""
    model = tiny_model("bert", **NO_DROPOUT)
    model.save_pretrained(folder)
    rewritten(folder, dict(get_peft_model(model, LoraConfig(target_modules=["query"])).state_dict()))


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "quantized": (_quantized, r"found weights quantized by gptq \(quantization_config in config.json\)"),
    "quantized by bitsandbytes": (
        config_changed(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        r"found weights quantized by bitsandbytes",
    ),
    "with an adapter": (_adapter_beside, r"found adapter_config.json in .*expected a complete model"),
    "integers": (
        changed(lambda t: {k: v.to(torch.int8) if k.endswith("query.weight") else v for k, v in t.items()}),
        r"query.weight of type I8 .*expected one of bfloat16, float16, float32, float64",
    ),
    "8 bits": (
        changed(lambda t: {k: v.to(torch.float8_e4m3fn) if "query.weight" in k else v for k, v in t.items()}),
        r"query.weight of type F8_E4M3 ",
    ),
    "compiled": (with_prefix("_orig_mod."), r"found no weights of bert.embeddings.* names there contain '_orig_mod.'"),
    "data parallel": (with_prefix("module."), r"names there contain 'module.'"),
    "a wrapper's attribute": (with_prefix("encoder.net."), r"names there contain 'encoder.net.'"),
    "compiled and data parallel": (
        with_prefix("module._orig_mod.", "llama"),
        r"names there contain 'module._orig_mod.'",
    ),
    "peft prefix": (with_prefix("base_model.model.", "llama"), r"names there contain 'base_model.model.'"),
    "compiled layers": (renamed(_compiled_layers), r"names there contain '_orig_mod.'"),
    "adapters inside": (_peft, r"found no weights of bert.embeddings.* names there that fit nothing: base_model"),
    "another network": (lambda folder: saved(folder, "bert") and _other_type(folder), r"found no weights of roberta"),
    "no head": (
        changed(lambda t: {k: v for k, v in t.items() if not k.startswith("cls.")}),
        r"no weights of the LM head \(cls.predictions.bias, .*model.allow_missing: \[lm_head\]",
    ),
    "half a head": (
        changed(lambda t: {k: v for k, v in t.items() if "transform.dense" not in k}),
        r"no weights of the LM head \(cls.predictions.transform.dense.weight, cls.predictions.transform.dense.bias\)",
    ),
    "no head of a decoder": (
        changed(lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"}, "llama"),
        r"no weights of the LM head \(lm_head.weight\)",
    ),
    "a layer too few": (config_changed(num_hidden_layers=3), r"no weights of bert.encoder.layer.2"),
    "a layer too many": (config_changed(num_hidden_layers=1), r"found bert.encoder.layer.1.* contradict each other"),
    "biases unknown to the config": (config_changed("llama", attention_bias=False), r"k_proj.bias .*contradict"),
    "another width": (config_changed(intermediate_size=41), r"shape \(40,\) .*expected \(41,\) by its config"),
    "another vocabulary": (config_changed(vocab_size=120), r"shape \(100, 24\) .*expected \(120, 24\)"),
    "experts of another width": (config_changed("mixtral", intermediate_size=24), r"of shape .*expected"),
    "an expert too few": (
        changed(lambda t: {k: v for k, v in t.items() if "layers.1.block_sparse_moe.experts.3." not in k}, "mixtral"),
        r"of shape .*expected",
    ),
    "one weight by two names": (
        changed(lambda t: {**t, **{_old_names(k): v for k, v in t.items() if "embeddings.LayerNorm" in k}}),
        r"found .*LayerNorm.beta and .*LayerNorm.bias .*both of them weights of",
    ),
    "tied weights that differ": (
        changed(lambda t: {**t, "cls.predictions.decoder.weight": torch.ones(100, 24)}),
        r"found other weights of cls.predictions.decoder.weight than of bert.embeddings.word_embeddings.weight",
    ),
    "one tensor in two shards": (_twice, r"found .* in .*safetensors and in .*safetensors, expected one"),
    "a missing shard": (_missing_shard, r"found no model-00001.*which it names"),
    "an index without names": (_bad_index, r"found no weight_map"),
    "truncated": (_truncated, r"cannot load the model"),
    "truncated torch file": (_truncated_torch, r"cannot load the model|found no state dict"),
    "only a variant": (_only_variant, r"found no weights, expected model.safetensors .*found model.fp16.safetensors"),
    "not a state dict": (_nested, r"found step: int, expected a state dict"),
}
"""Refused folders, with the message."""


def _other_type(folder: Path) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "model_type": "roberta", "architectures": ["RobertaForMaskedLM"]}))


def loaded_in_parts(folders: dict[str, Path], allow_missing: list[Any] | None = None) -> dict[str, Tensors | str]:
    """Of every folder the weights and buffers that ZeRO-3 makes on these ranks, or the refusal."""
    ranks = init_process_group()
    settings = engine_settings(Path(), "bf16", 2)[1]
    found: dict[str, Tensors | str] = {}
    for name, folder in folders.items():
        construction = sharded_init(settings, ranks)
        assert construction is not None
        config = ModelConfig(name_or_path=str(folder), attention="eager", allow_missing=allow_missing or [])
        try:
            model, _ = load_model(config, seed=7, vocab_size=100, construction=construction)
        except ModelError as error:
            found[name] = str(error)
            continue
        shapes = {key: parameter.ds_shape for key, parameter in model.named_parameters()}
        full = {}
        for key, piece in construction.take_exact_weights().take(shapes).items():
            part = -(-shapes[key].numel() // ranks.info.world_size)
            full[key] = ranks.all_gather_cpu(piece.values, part)[: shapes[key].numel()].view(shapes[key])
        found[name] = {**full, **{key: buffer.clone() for key, buffer in model.named_buffers()}}
    return found
