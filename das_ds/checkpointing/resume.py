"""Which checkpoint a run continues from; all ranks agree."""

from __future__ import annotations

from das_ds.checkpointing.manifest import Manifest, read_manifest
from das_ds.checkpointing.store import CheckpointStore
from das_ds.distributed.launch import Ranks
from das_ds.errors import CheckpointError


def newest_whole(store: CheckpointStore, ranks: Ranks) -> Manifest | None:
    """The newest checkpoint whose files are what its manifest says; None where there has never been one.

    The ranks share the work of reading. One that is not whole is named in a warning and set aside.

    Raises:
        CheckpointError: there are checkpoints, and none is whole.
    """
    names = ranks.gather(store.names() if ranks.info.is_main else [])[0]
    for name in reversed(names):
        manifest, problems = _examined(store, name, ranks)
        if not problems:
            return manifest
        ranks.on_main(lambda name=name, problems=problems: store.set_aside(name, problems))  # type: ignore[misc]
    if names or ranks.gather(store.has_broken)[0]:
        raise CheckpointError(
            f"{store.folder}: found no whole checkpoint, {len(names)} were damaged (see the warnings above); put back "
            "a sound copy of one, or start anew with another output_dir"
        )
    return None


def _examined(store: CheckpointStore, name: str, ranks: Ranks) -> tuple[Manifest | None, list[str]]:
    rank, size = ranks.info.rank, ranks.info.world_size
    manifest, problems = None, []
    try:
        manifest = read_manifest(store.folder / name)
        problems = store.problems(name, manifest, lambda number: number % size == rank)
    except CheckpointError as error:
        problems = [str(error)]
    return manifest, list(dict.fromkeys(problem for found in ranks.gather(problems) for problem in found))
