"""YAML, overrides and back: what is read equals what was written, and every mistake names its key."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from das_ds.config import RunConfig
from das_ds.config.help import describe_config, describe_method, describe_methods
from das_ds.config.io import (
    config_differences,
    config_values,
    dump_config,
    load_config,
    resolved_dict,
    values_set,
)
from das_ds.config.schema import RENAMED_KEYS, config_keys, method_keys
from das_ds.errors import ConfigError, RunFolderError
from das_ds.methods import METHODS

RUN = """
output_dir: runs/papers
model: {config: {model_type: roberta, layer_norm_eps: 1e-12}}
domains:
  - {name: acl, train: [acl.txt]}
  - {name: pubmed, train: [pubmed.txt]}
train: {learning_rate: 2e-4, max_grad_norm: 0.5}
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(RUN, encoding="utf-8")
    return path


def leaf_keys(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, dict):
        return [prefix]
    return [key for name, child in node.items() for key in leaf_keys(child, f"{prefix}.{name}".lstrip("."))]


def error_message(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_load_config_reads_file(run_file: Path) -> None:
    config = load_config(run_file)
    assert config.output_dir == Path("runs/papers")
    assert config.train.learning_rate == 2e-4
    assert [domain.name for domain in config.domains] == ["acl", "pubmed"]


@pytest.mark.parametrize("text", ["1e-12", "1E-12", "1.e-12", "+1e-12", "1.0e-12"])
def test_load_config_exponents_are_numbers(run_file: Path, text: str) -> None:
    config = load_config(run_file, [f"model.config.layer_norm_eps={text}", f"train.eps={text}"])
    assert config.model.config == {"model_type": "roberta", "layer_norm_eps": 1e-12}
    assert config.train.eps == 1e-12


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.learning_rate=1e-5", ("train", "learning_rate"), 1e-5),
        ("data.tokenizer=", ("data", "tokenizer"), None),
        ("method.softmask.apply_to=gradient", ("method", "softmask", "apply_to"), "gradient"),
        ("train.betas=[0.8, 0.9]", ("train", "betas"), [0.8, 0.9]),
        ("train.betas.1=0.95", ("train", "betas"), [0.9, 0.95]),
        ("domains.0.name=x", ("domains", 0, "name"), "x"),
        ("domains.1.train.1=more=text.txt", ("domains", 1, "train"), ["pubmed.txt", "more=text.txt"]),
        ("domains.2={name: c, train: [c.txt]}", ("domains", 2, "name"), "c"),
        ("general={name: g, valid: [g.txt]}", ("general", "name"), "g"),
        ("model.config.hidden_size=64", ("model", "config", "hidden_size"), 64),
        ("deepspeed={zero_optimization: {stage: 3}}", ("deepspeed", "zero_optimization", "stage"), 3),
    ],
)
def test_override_sets_key(run_file: Path, override: str, key: tuple[str | int, ...], value: Any) -> None:
    node: Any = resolved_dict(load_config(run_file, [override]))
    for part in key:
        node = node[part]
    assert node == value


def test_renamed_keys_lead_to_known_keys() -> None:
    keys = {key for method in METHODS for key in config_keys(method)}
    assert set(RENAMED_KEYS.values()) <= keys
    assert not set(RENAMED_KEYS) & keys


def test_load_config_method_name_is_short_form(run_file: Path) -> None:
    assert load_config(run_file, ["method=ewc"]) == load_config(run_file, ["method={name: ewc}"])
    assert load_config(run_file, ["method=ewc", "method.lambda=3"]) == load_config(
        run_file, ["method={name: ewc, lambda: 3}"]
    )


@pytest.mark.parametrize("method", METHODS)
def test_resolved_config_lists_own_method_keys_only(run_file: Path, method: str) -> None:
    config = load_config(run_file, [f"method={method}"])
    leaves = {row.key for row in method_keys(method) if not row.is_section}
    assert set(leaf_keys(resolved_dict(config)["method"], "method")) == leaves
    text = describe_method(method)
    assert all(f"\n{key} " in text for key in leaves)
    assert f"\n{method} " in f"\n{describe_methods()}"


def test_describe_method_unknown_name_is_error() -> None:
    with pytest.raises(ConfigError, match=r"^method.name: found 'dsa', allowed: das \| derpp"):
        describe_method("dsa")


def test_override_of_an_entry_of_a_list_that_is_one_text(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: r\nmodel: {name_or_path: m}\ndomains: [{name: acl, train: a.txt}]\n")
    assert load_config(path, ["domains.0.train.1=b.txt"]).domains[0].train == ["a.txt", "b.txt"]
    assert load_config(path, ["domains.0.train=c.txt"]).domains[0].train == ["c.txt"]


def test_values_set_are_those_required_or_changed(run_file: Path) -> None:
    config = load_config(run_file, ["train.eps=1e-5", "wandb.project=das_ds"])
    values = values_set(config)
    assert values["train.eps"] == "1e-05" and values["output_dir"] == repr(str(config.output_dir))
    assert not {"wandb.project", "train.betas", "seed"} & values.keys()
    assert values.items() <= config_values(config).items()
    # Lists of sections, which are empty by default.
    assert not {"tasks", "evaluate_on", "domains.0.sources"} & values.keys()


def test_override_later_one_wins(run_file: Path) -> None:
    assert load_config(run_file, ["seed=1", "seed=2"]).seed == 2


def test_override_builds_section(run_file: Path) -> None:
    config = load_config(run_file, ["general.name=g", "general.valid.0=g.txt", "general.valid.1=h.txt"])
    assert config.general is not None
    assert config.general.valid == ["g.txt", "h.txt"]


def test_override_changes_one_alias_only(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "output_dir: x\nmodel: {name_or_path: m}\ndomains:\n"
        "  - {name: a, train: &files [a.txt]}\n  - {name: b, train: *files}\n",
        encoding="utf-8",
    )
    config = load_config(path, ["domains.0.train.0=other.txt"])
    assert [domain.train for domain in config.domains] == [["other.txt"], ["a.txt"]]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.learning_rat=1", "train.learning_rat: unknown key; did you mean train.learning_rate?"),
        (
            "learning_rate=1",
            "unknown key; did you mean train.learning_rate or domains.0.learning_rate or tasks.0.learning_rate?",
        ),
        (
            "method.temprature=1",
            "method.temprature: unknown key; did you mean method.contrastive.temperature or "
            "method.replay.generation.temperature?",
        ),
        ("domains.1.trian=[a]", "domains.1.trian: unknown key; did you mean domains.1.train?"),
        ("trian.eps=1", "trian: unknown key; did you mean train?"),
        (
            "method.importance.saturation=3",
            "method.importance.saturation: unknown key; did you mean method.importance.half_saturation?",
        ),
        ("run.hang_timeout=3", "run: unknown key; did you mean runtime?"),
        ("method=5", "method: found 5, allowed: mapping"),
        ("method.name=[das]", "method.name: found ['das'], allowed: das | derpp"),
        ("method={name: ewc, decay: 2}", "method.decay: found 2, allowed: number >= 0 and <= 1"),
        (
            "method={name: ewc, ewc: {strength: 1}}",
            "method.ewc: unknown key; the keys of ewc are in method itself: method.lambda, method.decay",
        ),
        (
            "method.ewc.decay=1.0",
            "method.ewc: unknown key; the keys of ewc are in method itself, with method.name ewc: method.lambda",
        ),
        (
            "method={name: kd, alpha: 1}",
            "method.alpha: unknown key; method is kd, this key belongs to derpp; method=NAME replaces the section",
        ),
        (
            "method={name: ncl, importance: {}}",
            "method.importance: unknown key; method is ncl, this key belongs to das, dga; method=NAME replaces",
        ),
        (
            "model={config: {model_type: x}, architecture: {rules: [{}, {spread: halves}]}}",
            "rules.1.spread: unknown key; did you mean model.architecture.rules.1.layout?",
        ),
        ("method.contrastive.zzz=1", "unknown key; allowed in method.contrastive: weight, temperature"),
        (
            "zzz=1",
            "zzz: unknown key; allowed at the top: output_dir, continue_from, model, domains, general, evaluate_on",
        ),
        ("train={7: 1}", "train.7: unknown key; allowed in train: steps_per_domain"),
        ("train.eps=fast", "train.eps: found 'fast', allowed: number > 0"),
        ("train.learning_rate=-1", "train.learning_rate: found -1, allowed: number > 0"),
        ("train.learning_rate=.inf", "train.learning_rate: found inf, allowed: number > 0"),
        ("data.mlm_probability=1.5", "data.mlm_probability: found 1.5, allowed: number > 0 and < 1"),
        ("train.micro_batch_size=2.5", "train.micro_batch_size: found 2.5, allowed: integer >= 1"),
        ("evaluation.batch_size=0", "evaluation.batch_size: found 0, allowed: integer >= 1 or null"),
        (
            "method.name=dsa",
            f"method.name: found 'dsa', allowed: {' | '.join(METHODS)}",
        ),
        ("method.merge.weight=1", "method.merge.weight: found 1, allowed: number >= 0 and < 1 or average"),
        ("method.softmask.include_consumers=7", "method.softmask.include_consumers: found 7, allowed: true | false"),
        ("deepspeed=5", "deepspeed: found 5, allowed: text or mapping"),
        ("deepspeed=[a, b]", "deepspeed: found ['a', 'b'], allowed: text or mapping"),
        ("train=5", "train: found 5, allowed: mapping"),
        ("general=5", "general: found 5, allowed: mapping or null"),
        ("domains=acl", "domains: found 'acl', allowed: list of mappings, at least 1"),
        ("domains=[]", "domains: found [], allowed: list of mappings, at least 1"),
        ("domains.1=acl", "domains.1: found 'acl', allowed: mapping"),
        ("domains.1.train.0=5", "domains.1.train.0: found 5, allowed: list of text"),
        ("domains.0.name=a/b", "domains.0.name: found 'a/b', allowed: text matching"),
        ("domains.0={train: [a]}", "domains.0.name: not given, expected: text matching"),
        ("train.betas=[0.9]", "train.betas.1: not given, expected: list of 2: number, number"),
        ("train.betas=[0.9, 1]", "train: betas must lie in [0, 1), found [0.9, 1.0]"),
        ("domains.1.name=acl", "corpus names must differ, found more than once: acl"),
        ("model=", "model: found None, allowed: mapping"),
        ("seed=4294967296", "seed: found 4294967296, allowed: integer >= 0 and < 4294967296"),
        (f"seed={'x' * 200}", "x..., allowed: integer >= 0"),
        ("seed", "override 'seed': expected dotted.key=value"),
        ("=5", "override '=5': expected dotted.key=value"),
        ("train..eps=5", "override 'train..eps=5': expected dotted.key=value"),
        ("train.betas=[1", "override 'train.betas=[1': not valid YAML at line 1, column 3: expected ',' or ']'"),
        ("train={eps: 1, eps: 2}", "not valid YAML at line 1, column 10: key eps found twice"),
        ("seed=2020-13-45", "override 'seed=2020-13-45': not valid YAML: month must be in 1..12"),
        ("train.eps.x=1", "override train.eps.x: train.eps is 1e-08, a value without keys below it"),
        ("deepspeed.bf16=1", "override deepspeed.bf16: deepspeed is 'zero2', a value without keys"),
        ("domains.3.name=x", "override domains.3: found position '3', allowed: 0 to 2 (2 appends)"),
        ("domains.last.name=x", "override domains.last: found position 'last', allowed: 0 to 2"),
    ],
)
def test_load_config_mistake_names_key_and_allowed(run_file: Path, override: str, expected: str) -> None:
    assert expected in error_message(run_file, override)


def test_load_config_reports_all_mistakes_in_one_line(run_file: Path) -> None:
    message = error_message(run_file, "learning_rate=1", "seed=-1", "method.name=dsa")
    assert message.split("; ") == [
        f"method.name: found 'dsa', allowed: {' | '.join(METHODS)}",
        "seed: found -1, allowed: integer >= 0 and < 4294967296",
        "learning_rate: unknown key",
        "did you mean train.learning_rate or domains.0.learning_rate or tasks.0.learning_rate?",
    ]


def test_load_config_missing_keys_are_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("seed: 1\n", encoding="utf-8")
    message = error_message(path)
    assert "output_dir: not given, expected: text" in message
    assert "model: not given, expected: mapping" in message
    assert "domains: not given, expected: list of mappings, at least 1" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "found nothing, expected a mapping"),
        (b"- a\n", "found ['a'], expected a mapping"),
        (b"train: {eps: [1\n", "not valid YAML at line 2, column 1"),
        (b"seed: 1\nseed: 2\n", "not valid YAML at line 2, column 1: key seed found twice"),
        (b"train:\n  eps: 1\n  eps: 2\n", "not valid YAML at line 3, column 3: key eps found twice"),
        (b"a: \xff\n", "cannot be read (line 1: found byte 0xff, expected UTF-8)"),
        (b"a: \x07\n", "not valid YAML: unacceptable character"),
        (b"a: !!python/object:os.system {}\n", "not valid YAML at line 1, column 4"),
    ],
)
def test_load_config_unreadable_file_is_error(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    message = error_message(path)
    assert message.startswith(f"{path}: ")
    assert expected in message


def test_load_config_missing_file_is_error(tmp_path: Path) -> None:
    assert error_message(tmp_path / "run.yaml").endswith("run.yaml: no such file; expected a run config in YAML")
    assert "cannot be read" in error_message(tmp_path)


def test_dump_config_reads_back_equal(run_file: Path, tmp_path: Path) -> None:
    config = load_config(run_file, ["general={name: g, valid: [g.txt]}", "deepspeed={zero_optimization: {stage: 1}}"])
    dump_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    written = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    assert RunConfig.model_validate(written) == config
    assert written["method"]["contrastive"] == {"weight": 1.0, "temperature": 0.05, "pooling": "auto"}


def test_dump_config_replaces_file(run_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for seed in (1, 2):
        dump_config(load_config(run_file, [f"seed={seed}"]), folder / "config.yaml")
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]
    assert load_config(folder / "config.yaml").seed == 2


def test_dump_config_unwritable_folder_is_error(run_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"config.yaml: cannot be written \(No such file or directory\)"):
        dump_config(load_config(run_file), tmp_path / "missing" / "config.yaml")


def test_dump_config_failed_write_keeps_old_file(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    dump_config(load_config(run_file), folder / "config.yaml")

    def full_disk(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(RunFolderError, match="No space left on device"):
        dump_config(load_config(run_file, ["seed=7"]), folder / "config.yaml")
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]
    assert load_config(folder / "config.yaml").seed == 0


def test_config_differences_name_key_and_values(run_file: Path) -> None:
    old = load_config(run_file)
    new = load_config(run_file, ["train.learning_rate=1e-5", "domains.1.name=papers", "model.config.hidden_size=64"])
    assert config_differences(old, new) == [
        "domains.1.name: was 'pubmed', now 'papers'",
        "train.learning_rate: was 0.0002, now 1e-05",
        "model.config.hidden_size: was not given, now 64",
    ]


def test_config_differences_include_added_domain(run_file: Path) -> None:
    old = load_config(run_file)
    new = load_config(run_file, ["domains.2={name: c, train: [c.txt]}"])
    assert "domains.2.name: was not given, now 'c'" in config_differences(old, new)
    assert "domains.2.name: was 'c', now not given" in config_differences(new, old)


def test_config_differences_ignore_mutable_keys(run_file: Path) -> None:
    changes = [
        "wandb.mode=offline",
        "wandb.project=x",
        "train.log_interval=3",
        "data.num_workers=2",
        "data.cache_dir=c",
    ]
    changes += ["tasks.0={name: a, train: a.jsonl, dev: b.jsonl, test: c.jsonl}", "evaluation.batch_size=4"]
    new = load_config(run_file, [*changes, "output_dir=elsewhere"])
    assert config_differences(load_config(run_file), new) == []


def test_describe_config_shows_every_key_once(run_file: Path) -> None:
    lines = describe_config().splitlines()
    assert max(map(len, lines)) <= 120
    first_words = [line.split()[0] for line in lines if line and not line.startswith(" ")]
    for key in leaf_keys(resolved_dict(load_config(run_file, ["model.config={model_type: a}", "method=ncl"]))):
        if not key.startswith(("model.config.", "domains", "general")):
            assert first_words.count(key) == 1, key


def test_describe_config_shows_choices_default_and_meaning() -> None:
    text = describe_config()
    assert "fp32 | bf16 | fp16; default bf16" in text
    assert "number > 0; default 0.0001" in text
    assert "text; required" in text
    assert "Peak learning rate." in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("!!timestamp x", "not valid YAML: a value that cannot be converted (AttributeError"),
        ("!!bool x", "not valid YAML: a value that cannot be converted (KeyError"),
        ("!!int ''", "not valid YAML"),
        ("[" * 100_000, "not valid YAML: a value that cannot be converted (RecursionError"),
        ("&a {model_type: roberta, inner: *a}", "found more than 50 values within each other"),
        ("&a [*a]", "found more than 50 values within each other"),
    ],
)
def test_load_config_invalid_yaml_is_one_line(run_file: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(run_file, [f"model.config={text}"])
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_load_config_endless_aliases_are_error(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    path = tmp_path / "run.yaml"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ConfigError, match="found more than 1000000 values, which aliases repeat"):
        load_config(path)


def test_load_config_ignores_bom_and_line_ends(run_file: Path) -> None:
    expected = load_config(run_file)
    text = run_file.read_text(encoding="utf-8")
    for end in ("\r\n", "\r"):
        run_file.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", end).encode())
        assert load_config(run_file) == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.steps_per_domain", "100000000000000000000"),
        ("train.steps_per_domain", "0x1" + "0" * 5000),
        ("train.global_batch_size", "4294967296"),
        ("data.sequence_length", "0x10000000000"),
        ("method.importance.num_samples", "1" + "0" * 30),
        ("checkpoint.interval", "9223372036854775808"),
    ],
)
def test_load_config_huge_integer_is_error(run_file: Path, key: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(run_file, [f"{key}={value}"])
    assert str(caught.value).startswith(f"{key}: found ")
    assert str(caught.value).endswith(", allowed: at most 4294967295")


def test_load_config_huge_timeout_is_error(run_file: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"runtime.hang_timeout: found 1e\+300, allowed: number >= 1 and <= 100000000"
    ):
        load_config(run_file, ["runtime.hang_timeout=1e300"])


PATH_KEYS = (
    "output_dir",
    "model.name_or_path",
    "model.lora.init_from",
    "domains.0.train.0",
    "domains.0.valid.0",
    "domains.1.sources.0.train.0",
    "data.tokenizer",
    "data.cache_dir",
    "data.add_tokens.acl",
    "method.importance.init_from",
    "method.init_from",
    "tasks.0.train",
    "tasks.0.dev",
    "tasks.0.test",
    "benchmarks.tasks.0",
    "benchmarks.data",
    "deepspeed",
)


SET_ALONE = ("data.add_tokens.acl", "method.init_from")


def path_run(path: str) -> list[str]:
    """Overrides that set every path of a run config."""
    return [
        "model.config=null",
        "domains=[{name: acl, train: [x.txt], valid: [x.txt]}, {name: mixed, sources: [{train: [x.txt], weight: 1}]}]",
        "tasks=[{name: t, train: x, dev: x, test: x}]",
        "benchmarks={tasks: [x.jsonl]}",
        *(f"{key}={path}" for key in PATH_KEYS if key not in SET_ALONE and not key.startswith("model.lora")),
    ]


def method_with(key: str) -> list[str]:
    """Override that gives the run a method with this key."""
    return ["method=directions"] if key == "method.init_from" else []


def value_at(config: RunConfig, key: str) -> str:
    node: Any = config.model_dump(mode="json")
    for part in key.split("."):
        node = node[int(part)] if isinstance(node, list) else node[part]
    return str(node)


@pytest.mark.parametrize("key", PATH_KEYS)
def test_path_keys_expand_home_and_variables(run_file: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/reader")
    monkeypatch.setenv("SCRATCH", "/scratch")
    base = path_run("plain")
    for given, expected in (("~/x", "/home/reader/x"), ("$SCRATCH/x", "/scratch/x"), ("${SCRATCH}/x", "/scratch/x")):
        config = load_config(run_file, [*base, *method_with(key), f"{key}={given}"])
        assert value_at(config, key) == expected


@pytest.mark.parametrize("key", PATH_KEYS)
def test_path_keys_unset_variable_is_error(run_file: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_SET_HERE", raising=False)
    with pytest.raises(ConfigError) as caught:
        load_config(run_file, [*path_run("plain"), *method_with(key), f"{key}=$NOT_SET_HERE/x"])
    section = key.removesuffix(".acl")
    assert str(caught.value).startswith(f"{section}: found '$NOT_SET_HERE/x', but the variable NOT_SET_HERE is not set")


def test_path_keys_are_complete() -> None:
    """A new key that names a file or folder has to stand above, and to be of a type that is expanded."""
    known = {re.sub(r"\.0$", "", key).replace("domains.1.", "domains.0.") for key in PATH_KEYS}
    named = [
        row
        for method in METHODS
        for row in config_keys(method).values()
        if "text" in row.allowed and row.section != "wandb" and row.leaf != "name"
    ]
    # Of `continue_from` a config is read, see test_continuation.py.
    named = [row for row in named if row.section != "continue_from"]
    found = {row.key for row in named if re.search(r"\b(folder|files?)\b", row.meaning.lower())}
    # Other corpora are read as those of domains are.
    assert {re.sub(r"^(general|evaluate_on\.0)\.", "domains.0.", key) for key in found} <= known
