"""Preflight checks on one rank: their failures and their reports."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from das_ds.config import RunConfig
from das_ds.config.io import dump_config, load_config
from das_ds.distributed.process_group import RankInfo
from das_ds.errors import PreflightError
from das_ds.models.architectures.registry import spec_for
from das_ds.models.loading import load_model
from das_ds.models.lora import Lora
from das_ds.preflight.checks import CheckResult, CheckWarning, format_bytes, group_reasons
from das_ds.preflight.corpora import check_corpora
from das_ds.preflight.environment import check_method_files, check_settings
from das_ds.preflight.host_memory import free_memory
from das_ds.preflight.memory import MemoryBudget, check_memory, check_model, compare_memory, count_parameters
from das_ds.preflight.memory_estimate import MemoryEstimate, activation_bytes
from das_ds.preflight.output_dir import check_disk, check_folder
from das_ds.softmask.directions_file import save_directions
from das_ds.softmask.importance_file import save_unit_importance
from das_ds.softmask.input_layout import InputLayout
from helpers.head_warmup import headless_run
from helpers.locking import holding_process
from helpers.mixed_domains import mixed_run
from helpers.preflight import Alone, silent_checks
from helpers.runs import WORDS, small_run
from helpers.single_rank import SingleRank
from helpers.streams import streamed_run
from helpers.tiny_models import CONFIGS, NO_DROPOUT, random_importance, tiny_model
from helpers.tiny_tokenizer import word_tokenizer

GIB = 2**30
CPU = RankInfo(0, 0, 1, torch.device("cpu"))


def only(check: Any, *args: Any) -> CheckResult:
    """What one check found on one rank."""
    checks = silent_checks(Alone())
    check(checks, *args)
    (result,) = checks.results
    return result


def config(folder: Path, **changes: Any) -> RunConfig:
    return RunConfig(**small_run(folder, **changes))


def test_group_reasons_names_ranks_once() -> None:
    assert group_reasons({0: "a", 1: "a"}, 2) == "a"
    assert group_reasons({1: "a"}, 3) == "rank 1: a"
    assert group_reasons({1: "a", 2: "b", 3: "a"}, 4) == "rank 1 and 1 more: a; rank 2: b"
    many = {rank: str(rank) for rank in range(5)}
    assert group_reasons(many, 5) == "rank 0: 0; rank 1: 1; rank 2: 2; and 2 other reasons"


def test_check_result_line_shows_expected_only_if_not_ok() -> None:
    assert CheckResult("disk", "ok", "much", "little").line() == "ok       disk       much"
    assert CheckResult("disk", "failed", "little", "much").line() == "failed   disk       little | expected: much"
    assert [format_bytes(n) for n in (12, 2048, 3 * 2**20, 1.5 * GIB)] == ["12 bytes", "2.0 KiB", "3.0 MiB", "1.5 GiB"]


def test_check_folder_uncreatable_fails(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    checks = silent_checks(Alone())
    assert not check_folder(checks, config(tmp_path, output_dir=tmp_path / "file" / "run"), Alone())
    folder, writing, sharing = checks.results
    assert (folder.status, writing.status, sharing.status) == ("ok", "failed", "skipped")
    assert "Not a directory" in writing.found and sharing.found == "not checked, because writing failed"


def test_check_folder_of_another_run_fails(tmp_path: Path) -> None:
    run = config(tmp_path)
    run.output_dir.mkdir()
    dump_config(run.model_copy(update={"seed": 7}), run.output_dir / "config.yaml")
    (run.output_dir / "results.json").touch()
    checks = silent_checks(Alone())
    assert not check_folder(checks, run, Alone())
    assert checks.results[0].status == "failed" and "seed: was 7, now 0" in checks.results[0].found
    (run.output_dir / "config.yaml").rename(run.output_dir / "notes.txt")
    checks = silent_checks(Alone())
    assert not check_folder(checks, run, Alone())
    assert "is not empty and contains no run" in checks.results[0].found


def test_check_folder_of_same_run_is_resumed_unchanged(tmp_path: Path) -> None:
    run = config(tmp_path)
    run.output_dir.mkdir()
    dump_config(run, run.output_dir / "config.yaml")
    # What a killed check left must not make the folder somebody else's.
    (run.output_dir / ".preflight-0-0").mkdir()
    checks = silent_checks(Alone())
    assert check_folder(checks, run, Alone())
    assert "contains this run" in checks.results[0].found
    assert [path.name for path in run.output_dir.iterdir()] == ["config.yaml"]


def test_check_folder_of_failed_start_is_unchanged(tmp_path: Path) -> None:
    run = config(tmp_path)
    run.output_dir.mkdir()
    failed = run.model_copy(update={"seed": 7})
    dump_config(failed, run.output_dir / "config.yaml")
    checks = silent_checks(Alone())
    assert check_folder(checks, run, Alone())
    assert checks.results[0].found == f"{run.output_dir} contains no training yet, so the run starts there"
    assert load_config(run.output_dir / "config.yaml") == failed


def test_check_folder_in_use_is_a_warning(tmp_path: Path) -> None:
    run = config(tmp_path)
    run.output_dir.mkdir()
    dump_config(run, run.output_dir / "config.yaml")
    with holding_process(run.output_dir) as pid:
        checks = silent_checks(Alone())
        assert check_folder(checks, run, Alone())
        assert (
            checks.results[0].status == "warning" and f"held by another start, pid {pid} on " in checks.results[0].found
        )
    checks = silent_checks(Alone())
    assert check_folder(checks, run, Alone()) and checks.results[0].status == "ok"


def test_check_disk_counts_written_and_planned_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config(tmp_path, method={"name": "ncl"})
    run.output_dir.mkdir()
    size = check_model(silent_checks(Alone()), run)
    assert size is not None
    # keep 2 + 1 checkpoints with two moments; two domains with weights and model.
    needed = 3 * 12 * size.trained + 2 * 8 * size.trained

    def found(free: int) -> CheckResult:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        return only(check_disk, run, size, 1)

    assert found(needed).status == "ok"
    short = found(needed - 2048)
    assert short.status == "failed" and "make room for 2.0 KiB or lower checkpoint.keep_last" in short.found
    assert short.expected.startswith(f"{format_bytes(needed)} = 3 checkpoints of {format_bytes(12 * size.trained)}")
    (run.output_dir / "checkpoint").write_bytes(bytes(2048))
    assert found(needed - 2048).status == "ok"


def test_check_model_counts_without_building(tmp_path: Path) -> None:
    run = config(tmp_path)
    size = check_model(silent_checks(Alone()), run)
    model, _ = load_model(run.model, seed=0, vocab_size=300)
    assert size is not None and size.total == size.trained == sum(p.numel() for p in model.parameters())
    assert (size.num_units, size.num_layers, size.hidden, size.inner, size.heads) == (2 * (3 + 40 + 24), 2, 24, 40, 3)
    embedding = model.get_input_embeddings().weight.numel()
    layer = sum(p.numel() for p in model.base_model.encoder.layer[0].parameters())
    assert size.largest_layer == max(embedding, layer)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral"])
def test_count_parameters_equals_built_model(name: str, tmp_path: Path) -> None:
    run = config(tmp_path, model={"config": {"model_type": name, **CONFIGS[name]}})
    model, spec = load_model(run.model, seed=0, vocab_size=100)
    assert count_parameters(run, model, spec, 100).total == sum(p.numel() for p in model.parameters())


def test_count_parameters_frozen_layers(tmp_path: Path) -> None:
    run = config(tmp_path, method={"name": "freeze", "num_layers": 1})
    model, spec = load_model(run.model, seed=0, vocab_size=300)
    size = count_parameters(run, model, spec, 300)
    base = model.base_model
    frozen = sum(p.numel() for module in (base.embeddings, base.encoder.layer[0]) for p in module.parameters())
    assert size.total - size.trained == frozen and size.total == sum(p.numel() for p in model.parameters())
    assert size.has_frozen and not size.has_adapters
    # The largest that is left is a matrix of the second layer's MLP.
    assert size.largest_trained == max(p.numel() for p in base.encoder.layer[1].parameters())


def test_count_parameters_lora_and_added_tokens(tmp_path: Path) -> None:
    lora = config(tmp_path, model={"lora": {"rank": 2}})
    model, spec = load_model(lora.model, seed=0, vocab_size=300)
    size = count_parameters(lora, model, spec, 300)
    assert lora.model.lora is not None
    Lora.plan(model, spec.layout(model), lora.model.lora).attach(model, seed=0)
    assert size.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert size.total == sum(p.numel() for p in model.parameters())

    plain = check_model(silent_checks(Alone()), config(tmp_path))
    grown = check_model(silent_checks(Alone()), config(tmp_path, data={"add_tokens": {"papers": ["zyx", "yxz"]}}))
    assert plain is not None and grown is not None
    # Two rows of the tied embedding and two biases.
    assert grown.total - plain.total == 2 * (24 + 1) and grown.vocabulary == plain.vocabulary + 2


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"data": {"tokenizer": "/no/such/tokenizer"}}, "cannot load the tokenizer"),
        ({"model": {"config": {"model_type": "t5"}}}, "no architecture spec for model type 't5'"),
        ({"data": {"sequence_length": 512}}, "data.sequence_length: found 512"),
        ({"model": {"lora": {"rank": 1000}}}, "model.lora.rank: found 1000"),
        ({"method": {"name": "freeze", "num_layers": 9}}, "method.num_layers: found 9, allowed: at most 2"),
        ({"model": {"config": {"model_type": "roberta", "vocab_size": 100}}}, "embeddings for only 100"),
    ],
)
def test_check_model_untrainable_config_fails(changes: dict[str, Any], found: str, tmp_path: Path) -> None:
    result = only(check_model, config(tmp_path, **changes))
    assert result.status == "failed" and found in result.found


def test_check_model_stored_weights_are_checked(tmp_path: Path) -> None:
    values = headless_run(tmp_path, stage=2, steps=0)
    found = only(check_model, RunConfig(**values))
    assert found.status == "ok" and "tensors (float32) of model.safetensors as float32" in found.found
    assert "5 of the LM head drawn by seed" in found.found
    refused = only(check_model, RunConfig(**{**values, "model": {"name_or_path": str(tmp_path / "headless")}}))
    assert refused.status == "failed" and "found no weights of the LM head (lm_head.bias, " in refused.found
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4000\n"
    (tmp_path / "headless" / "model.safetensors").write_bytes(pointer)
    fetched = only(check_model, RunConfig(**values))
    assert fetched.status == "failed" and "found Git LFS pointers in place of model.safetensors" in fetched.found
    (tmp_path / "headless" / "model.safetensors").write_bytes(b"nonsense")
    damaged = only(check_model, RunConfig(**values))
    assert damaged.status == "failed" and "cannot read the weights of" in damaged.found


def test_check_settings_wrong_number_of_ranks_fails(tmp_path: Path) -> None:
    good = only(check_settings, config(tmp_path), 2)
    assert (good.status, good.found) == ("ok", "fp32, ZeRO 2, 8 sequences = 2 ranks x 4 x 1 micro-steps")
    bad = only(check_settings, config(tmp_path), 3)
    assert bad.status == "failed" and "train.global_batch_size: found 8" in bad.found


@pytest.mark.parametrize("method", ["das", "directions"])
def test_check_method_files_missing_or_of_another_method_fails(method: str, tmp_path: Path) -> None:
    layout = spec_for("roberta").layout(tiny_model())
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("das", "directions")}
    save_unit_importance(paths["das"], random_importance(tiny_model()), layout)
    inputs = InputLayout((), {"layer.q": 24}, {"layer.q": 0}, {"layer.q": (0,)})
    save_directions(paths["directions"], {"layer.q": torch.eye(24)}, inputs, layout, SingleRank())

    def check(path: Path) -> CheckResult:
        file = {"init_from": str(path)}
        settings = file if method == "directions" else {"importance": file}
        return only(check_method_files, config(tmp_path, method={"name": method, **settings}))

    assert (check(paths[method]).status, check(paths[method]).found) == ("ok", method)
    missing = check(tmp_path / "none.safetensors")
    assert missing.status == "failed" and "none.safetensors: cannot read" in missing.found
    other = check(paths["das" if method == "directions" else "directions"])
    expected = {
        "das": "by direction, from a run of directions, expected by unit or parameter",
        "directions": "by unit, expected by direction (method.init_from)",
    }
    assert other.status == "failed" and other.found.endswith(f"importance {expected[method]}")


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("missing.txt", None, "found no such file"),
        ("blank.txt", b"\n \n", "no text in"),
        ("latin.txt", b"caf\xe9\n", "UTF-8"),
        ("broken.jsonl", b"{", "not JSON"),
        ("broken.txt.xz", b"no archive", "damaged archive"),
    ],
)
def test_check_corpora_unreadable_source_fails(name: str, content: bytes | None, found: str, tmp_path: Path) -> None:
    values = small_run(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    values["domains"][1]["train"].append(str(tmp_path / name))
    result = only(check_corpora, RunConfig(**values))
    assert result.status == "failed" and result.found.startswith("corpus 'papers': ") and found in result.found


def test_check_corpora_are_counted(tmp_path: Path) -> None:
    result = only(check_corpora, config(tmp_path))
    assert result.status == "ok" and result.found.startswith("3 corpora, 3 sources, ")


def test_check_corpora_reads_every_source_and_evaluated_corpus(tmp_path: Path) -> None:
    values = mixed_run(tmp_path, "run")
    result = only(check_corpora, RunConfig(**values))
    assert result.status == "ok" and result.found.startswith("5 corpora, 6 sources, ")
    recipes = tmp_path / "recipes.txt"
    text = recipes.read_text()
    recipes.write_text("hi")
    result = only(check_corpora, RunConfig(**values))
    assert result.status == "failed" and result.found.startswith("corpus 'food': found 4 tokens in")
    recipes.write_text(text)
    leaking = {**values, "evaluate_on": [{"name": "law", "valid": [str(recipes)]}]}
    result = only(check_corpora, RunConfig(**leaking))
    assert result.status == "warning"
    assert result.found.endswith("recipes.txt is held out for law, but domain food trains on it")


def test_check_corpora_opens_the_first_source_of_a_stream_only(tmp_path: Path) -> None:
    """A later one that is bad is found when training reaches it; a bad first one, and bad held-out text, here."""
    values = streamed_run(tmp_path, "run")
    shards = tmp_path / "food-shards"
    (shards / "5.jsonl").write_text("not JSON")
    result = only(check_corpora, RunConfig(**values))
    assert result.status == "ok" and result.found.startswith("3 corpora, 17 sources, "), result
    assert not (tmp_path / "cache").exists()
    (shards / "0.jsonl").write_text("not JSON")
    result = only(check_corpora, RunConfig(**values))
    assert (
        result.status == "failed" and "corpus 'food': " in result.found and "0.jsonl, line 1: not JSON" in result.found
    )
    (shards / "0.jsonl").unlink()
    (tmp_path / "papers-valid.txt").write_text("short\n")
    result = only(check_corpora, RunConfig(**values))
    assert result.status == "failed" and "corpus 'papers': found" in result.found
    # Held-out text that is also streamed is refused as elsewhere.
    values["domains"][0]["valid"] = [str(shards / "0.txt")]
    result = only(check_corpora, RunConfig(**values))
    assert result.status == "failed" and "0.txt in train and in valid" in result.found


def test_check_corpora_unknown_tokens_are_reported(tmp_path: Path) -> None:
    run = config(tmp_path)
    word_tokenizer(WORDS[:4]).save_pretrained(str(run.data.tokenizer))
    result = only(check_corpora, run)
    assert result.status == "failed"
    assert re.fullmatch(
        r"corpus 'food': found \d\d\.\d% unknown tokens, allowed: at most 50%; the tokenizer is not made for this text "
        r"\(data\.tokenizer\)",
        result.found,
    )
    word_tokenizer(WORDS[4:]).save_pretrained(str(run.data.tokenizer))
    result = only(check_corpora, run)
    assert result.status == "ok"
    assert re.search(r"unknown tokens in the first documents: food \d\.\d%, papers \d\.\d%, gen", result.found)
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    bare = RunConfig(**{**small_run(tmp_path, data={"tokenizer": None}), "model": {"name_or_path": str(folder)}})
    assert "found no token but special ones" in only(check_model, bare).found
    # The text itself can still be looked at.
    assert only(check_corpora, bare).status == "ok"


def test_check_model_vocabulary_has_room_for_the_largest_id(tmp_path: Path) -> None:
    run = config(tmp_path)
    word_tokenizer(WORDS, skipped=400).save_pretrained(str(run.data.tokenizer))
    size = check_model(silent_checks(Alone()), run)
    assert size is not None and size.vocabulary == 405 + len(set(WORDS))


def room(node: str, host: int, device: int | None = None) -> MemoryBudget:
    return MemoryBudget(node, None if device is None else device * GIB, host * GIB)


def needs(
    device: int, host: int = 0, export: int = 0, writers: tuple[int, ...] = (0,), main: int = 0
) -> MemoryEstimate:
    return MemoryEstimate({"all": device * GIB}, {"all": host * GIB}, 0, 0, export * GIB, writers, main * GIB)


@pytest.mark.parametrize(
    ("rooms", "fixed", "rough", "outcome"),
    [
        ([room("a", 8), room("a", 8)], needs(4), 0, "ok"),
        ([room("a", 8), room("a", 7)], needs(4), 0, "failed"),
        # Rank 0 exports, on the first node only; or both do.
        ([room("a", 8), room("a", 8)], needs(3, export=3), 0, "failed"),
        ([room("a", 8), room("b", 4)], needs(4, export=4), 0, "ok"),
        ([room("a", 8), room("b", 4)], needs(4, export=4, writers=(0, 1)), 0, "failed"),
        ([room("a", 8), room("b", 8)], needs(4, export=4, writers=(0, 1)), 0, "ok"),
        ([room("a", 8), room("b", 4)], needs(4, main=5), 0, "failed"),
        ([room("a", 9), room("b", 4)], needs(4, main=5), 0, "ok"),
        ([room("a", 8), room("a", 8)], needs(3), 1, "ok"),
        ([room("a", 8), room("a", 8)], needs(3), 2, "doubt"),
        ([room("a", 8, 4), room("a", 8, 4)], needs(3, 4), 1, "ok"),
        ([room("a", 8, 4), room("a", 8, 4)], needs(3, 4), 2, "doubt"),
        ([room("a", 8, 4), room("a", 8, 2)], needs(3, 4), 0, "failed"),
        ([room("a", 8, 4), room("a", 8, 4)], needs(3, 5), 0, "failed"),
    ],
)
def test_compare_memory_uses_the_tightest_node_and_gpu(
    rooms: list[MemoryBudget], fixed: MemoryEstimate, rough: int, outcome: str
) -> None:
    if outcome == "failed":
        with pytest.raises(PreflightError, match="use more nodes, a higher ZeRO stage"):
            compare_memory(rooms, fixed, rough * GIB)
        return
    judged = compare_memory(rooms, fixed, rough * GIB)
    assert isinstance(judged, CheckWarning) == (outcome == "doubt")


def test_check_memory_too_little_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config(tmp_path)
    size = check_model(silent_checks(Alone()), run)
    engine = check_settings(silent_checks(Alone()), run, 1)
    assert only(check_memory, run, CPU, size, engine).status == "ok"
    monkeypatch.setattr("das_ds.preflight.memory.free_memory", lambda: 1000)
    result = only(check_memory, run, CPU, size, engine)
    assert result.status == "failed" and "of 1000 bytes free" in result.found and "moments" in result.expected


def test_free_memory_cgroup_limit_counts(tmp_path: Path) -> None:
    own = tmp_path / "own"
    mounted = tmp_path / "mounted"
    job = mounted / "slurm" / "job"
    job.mkdir(parents=True)

    def write(folder: Path, **files: object) -> None:
        for name, content in files.items():
            (folder / name.replace("_", ".", 1)).write_text(f"{content}\n")

    own.write_text("0::/slurm/job/step\n")
    without = free_memory(own, mounted)
    assert without > 10_000
    write(job, memory_max="max", memory_current=500, memory_stat="inactive_file 100")
    assert abs(free_memory(own, mounted) - without) < GIB
    write(job, memory_max=5000, memory_current=500, memory_stat="inactive_file 100")
    assert free_memory(own, mounted) == 5000 - 500 + 100
    write(job.parent, memory_max=3000, memory_current=500, memory_stat="inactive_file 0")
    assert free_memory(own, mounted) == 2500
    # The first version of control groups.
    old = mounted / "memory" / "job"
    old.mkdir(parents=True)
    own.write_text("5:cpu,memory:/job\n4:pids:/job\n")
    write(old, memory_limit_in_bytes=4000, memory_usage_in_bytes=1000, memory_stat="total_inactive_file 10")
    assert free_memory(own, mounted) == 3010


@pytest.mark.parametrize(
    ("model", "attention"),
    [
        ({"model_type": "roberta", "intermediate_size": 512, **NO_DROPOUT}, "sdpa"),
        ({"model_type": "roberta", "intermediate_size": 512, **NO_DROPOUT}, "eager"),
        ({"model_type": "gpt2"}, "eager"),
        ({"model_type": "llama", "intermediate_size": 344}, "sdpa"),
        ({"model_type": "llama", "intermediate_size": 344}, "eager"),
    ],
)
def test_activation_bytes_within_a_factor_of_two(model: dict[str, Any], attention: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 72}
    special = {"bos_token_id": 1, "eos_token_id": 2}
    run = config(tmp_path, model={"config": {**sizes, "vocab_size": 100, **special, **model}, "attention": attention})
    network, spec = load_model(run.model, seed=0, vocab_size=100)
    network.train()
    own = {weight.untyped_storage().data_ptr() for weight in (*network.parameters(), *network.buffers())}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network.base_model(torch.randint(5, 90, (4, 64)))
    measured = sum(t.untyped_storage().nbytes() for address, t in saved.items() if address not in own)
    size = count_parameters(run, network, spec, 100)
    estimate = activation_bytes(
        size, num_rows=4, num_tokens=64, weight_bytes=4, is_eager=attention == "eager", is_recomputed=False
    )
    assert 0.5 < estimate / measured < 2.0


def test_check_memory_deepspeed_auto_equals_default(tmp_path: Path) -> None:
    left_open = {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_max_live_parameters": "auto",
        "stage3_max_reuse_distance": "auto",
        "offload_optimizer": "auto",
        "offload_param": {"device": "none", "pin_memory": "auto"},
    }
    run = config(tmp_path, deepspeed={"zero_optimization": left_open, "train_batch_size": "auto", "bf16": "auto"})
    plain = run.model_copy(update={"deepspeed": {"zero_optimization": {"stage": 3}}})
    sizes = [check_model(silent_checks(Alone()), chosen) for chosen in (run, plain)]
    found = []
    for chosen, size in zip((run, plain), sizes, strict=True):
        engine = check_settings(silent_checks(Alone()), chosen, 1)
        assert engine is not None and size is not None
        found.append(only(check_memory, chosen, CPU, size, engine))
    assert found[0].status == found[1].status == "ok"
    assert found[0].expected == found[1].expected
