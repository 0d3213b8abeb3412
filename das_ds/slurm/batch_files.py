"""`das-ds slurm init`: batch files that need no checkout.

They are those of the repository's `launch/slurm/` with its functions written into them, because SLURM runs a copy of a
batch file that cannot find the files next to it. What is between `# >>> repository` and `# <<< repository` is for the
repository alone.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

from das_ds import __version__
from das_ds.errors import RunFolderError
from das_ds.shipped_files import shipped_folder

SOURCE = "launch/slurm"
FUNCTIONS = "common.sh"
_FOR_REPOSITORY = re.compile(r"^# >>> repository.*?^# <<< repository\n", re.MULTILINE | re.DOTALL)


def write_batch_files(folder: Path) -> list[Path]:
    """Write one batch file for each of the repository's.

    Args:
        folder: where to; it is made if it does not exist.

    Returns:
        The files, sorted by name.

    Raises:
        RunFolderError: one of them exists, and then none is written, or the folder cannot be written, or its name
            would end a line of the files.
    """
    if not str(folder).isprintable():
        raise RunFolderError(f"slurm init: found folder {str(folder)!r}, expected a name without control characters")
    texts = {folder / name: text for name, text in batch_files(folder, Path(sys.executable)).items()}
    existing = [path.name for path in texts if path.exists() or path.is_symlink()]
    if existing:
        raise RunFolderError(
            f"slurm init {folder}: found {', '.join(existing)} there, expected a folder without batch files; move them "
            "away or choose another folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
    except OSError as error:
        raise RunFolderError(f"slurm init {folder}: cannot be written ({error.strerror})") from error
    return sorted(texts)


def batch_files(folder: Path, python: Path) -> dict[str, str]:
    """File name -> text of each batch file.

    Args:
        folder: in which they will lie; for the commands in their comments.
        python: absolute path of the Python that the jobs run unless DAS_DS_PYTHON names another.
    """
    source = shipped_folder(SOURCE)
    # Its first paragraph is about the repository.
    functions = _FOR_REPOSITORY.sub("", (source / FUNCTIONS).read_text(encoding="utf-8")).partition("\n\n")[2]
    inserted = (
        f"# Written by das-ds slurm init, das_ds {__version__}, for the environment of this Python.\n"
        f"default_python={shlex.quote(str(python))}\n"
        f"how_to_install='install das_ds there again'\n\n{functions.strip()}\n"
    )
    texts = {}
    for path in sorted(source.glob("*.sbatch")):
        text = path.read_text(encoding="utf-8").replace(f"{SOURCE}/", f"{shlex.quote(str(folder))}/")
        # A function, so that backslashes of the inserted text stay what they are.
        texts[path.name] = _FOR_REPOSITORY.sub(lambda _: inserted, text)
    return texts
