"""Fixture: results of a small run, complete or unfinished."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from das_ds.reporting.results import Results, build_results

LOSS_MATRIX = [[6.0, 5.0, 4.0, 3.0], [4.0, 4.5, 4.1, 3.1], [4.6, 2.0, 4.3, 3.2], [4.7, 2.2, 1.0, 3.4]]
DOMAINS = ["acl", "pubmed", "restaurant"]


def _results(
    method: str = "das",
    num_rows: int = 4,
    num_domains: int = 3,
    general: bool = True,
    learned: list[list[str]] | None = None,
) -> Results:
    columns = [*range(num_domains), *([3] if general else [])]
    return build_results(
        method=method,
        domains=DOMAINS[:num_domains],
        eval_domains=DOMAINS[:num_domains] + ["general"] * general,
        loss_matrix=[[row[column] for column in columns] for row in LOSS_MATRIX[:num_rows]],
        tokens_seen=1_234_567,
        wall_seconds=3725.4,
        world_size=2,
        zero_stage=3,
        learned=learned,
    )


@pytest.fixture(scope="session")
def make_results() -> Callable[..., Results]:
    """(method, num_rows, num_domains, general, learned) -> results."""
    return _results
