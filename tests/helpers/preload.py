"""What every rank of a test imports, loaded once by the fork server, and the parts that ranks skip."""

import gc
from pathlib import Path

# DeepSpeed imports it when it builds an engine, and torch's compiler with it, which takes two seconds.
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
from PIL import Image
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import das_ds.training.train  # noqa: F401
from das_ds.reporting import run_report, run_sections
from helpers.compiled_ops import keep_compiled_ops

keep_compiled_ops()

# Every export looks into this table, whose thousand regular expressions are compiled when it is first asked for.
get_checkpoint_conversion_mapping("roberta")


def _one_pixel(_: object, path: Path) -> None:
    if path.suffix == ".svg":
        path.write_text("<svg xmlns='http://www.w3.org/2000/svg'></svg>")
    else:
        Image.new("L", (1, 1)).save(path)


# The plots of a report take longer than the rest of a tiny run. They have their own tests, and runs that are
# started as commands draw them.
run_report.plot_loss_matrix = run_report.plot_importance = run_sections.plot_learning_curves = _one_pixel

# ZeRO-3 collects garbage when it begins; what is loaded by now is none, and takes a second to look through.
gc.collect()
gc.freeze()
