"""One element of a sweep over method x seed x order of the domains: prints the arguments of its run, a line each.

The run is the config with a method, a seed, an order of the domains, and its own run folder inside the config's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

from das_ds.config import RunConfig
from das_ds.config.io import load_config, resolved_dict
from das_ds.config.method import MethodConfig, method_configs
from das_ds.errors import EXIT_USER_ERROR, ConfigError, DasError


def sweep_overrides(config: RunConfig, methods: str, seeds: str, orders: str) -> list[list[str]]:
    """Overrides of every element, methods outermost, orders innermost.

    Args:
        config: common to all elements.
        methods: names with commas between; empty: the config's.
        seeds: numbers with commas between; empty: the config's.
        orders: names of all domains with commas between, orders with colons between; empty: the config's.

    Raises:
        ConfigError: something is named twice, or an order is not one of the config's domains.
    """
    names = [domain.name for domain in config.domains]
    axes = (
        _distinct("methods", methods.split(",") if methods else [config.method.name]),
        _distinct("seeds", seeds.split(",") if seeds else [str(config.seed)]),
        _distinct("orders", orders.split(":") if orders else [",".join(names)]),
    )
    domains = dict(zip(names, resolved_dict(config)["domains"], strict=True))
    elements = []
    for method, seed, order in itertools.product(*axes):
        chosen = order.split(",")
        if sorted(chosen) != sorted(names):
            raise ConfigError(f"orders: found {order!r}, expected all of {', '.join(names)}, each once")
        folder = config.output_dir / f"{method}-seed{seed}-{'+'.join(chosen)}"
        elements.append(
            [
                f"method={json.dumps(_method_section(config.method, method))}",
                f"seed={seed}",
                f"domains={json.dumps([domains[name] for name in chosen])}",
                f"output_dir={json.dumps(str(folder))}",
            ]
        )
    return elements


def _method_section(settings: MethodConfig, name: str) -> dict[str, Any]:
    """The config's section for another method: the settings that both methods take in the same sense."""
    other = method_configs().get(name, MethodConfig)
    # Methods may have keys of one name, such as `batch_size`, and mean different things by them.
    bases = (base for base in type(settings).__mro__ if issubclass(base, MethodConfig))
    shared = next(base for base in bases if issubclass(other, base))
    kept = settings.model_dump(mode="json", by_alias=True, exclude_unset=True)
    names = {field.alias or key for key, field in shared.model_fields.items()}
    return {key: value for key, value in kept.items() if key in names} | {"name": name}


def _distinct(key: str, values: list[str]) -> list[str]:
    repeated = sorted({value for value in values if values.count(value) > 1})
    if repeated:
        raise ConfigError(f"{key}: found {', '.join(repeated)} more than once, expected each once")
    return values


def _arguments(options: argparse.Namespace) -> list[str]:
    config = load_config(options.config, options.overrides)
    elements = sweep_overrides(config, options.methods, options.seeds, options.orders)
    if options.element >= len(elements):
        raise ConfigError(
            f"--array: found element {options.element}, but there are {len(elements)}; allowed: "
            f"sbatch --array 0-{len(elements) - 1}"
        )
    overrides = [*options.overrides, *elements[options.element]]
    # All of them are right before any of them trains.
    for element in elements:
        load_config(options.config, [*options.overrides, *element])
    return ["--config", str(options.config), *overrides]


def main() -> int:
    """Exit code 2 and one line where the config or the axes are wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--element", required=True, type=int, help="number of the element, from 0")
    parser.add_argument("--methods", default="", help="such as das,ncl; default: the config's")
    parser.add_argument("--seeds", default="", help="such as 0,1,2; default: the config's")
    parser.add_argument("--orders", default="", help="such as acl,pubmed:pubmed,acl; default: the config's")
    parser.add_argument("--config", required=True, type=Path, help="run config (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="overrides of the config")
    options = parser.parse_args()
    try:
        print(*_arguments(options), sep="\n")
    except DasError as error:
        print(f"das_ds: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
