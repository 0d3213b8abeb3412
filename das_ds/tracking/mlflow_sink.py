"""MLflow as a metric sink: a database in the run folder, or the server that MLFLOW_TRACKING_URI names."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from das_ds.config import RunConfig
from das_ds.config.io import identity_values
from das_ds.errors import EXIT_STOPPED
from das_ds.run_dir import MLFLOW_FOLDER, MLFLOW_RUN_ID_FILE
from das_ds.tracking.names import DOMAINS_LEARNED, GLOBAL_STEP, LOSS, eval_loss, name_by_domain, name_within_domain
from das_ds.tracking.run_ids import group_name, run_name, store_run_id, stored_run_id
from das_ds.tracking.sinks import Metrics, Scalar, Sink

DEFAULT_EXPERIMENT = "das_ds"
MAX_PARAM_LENGTH = 500
"""Of a value, on servers with an older database."""


class MlflowSink(Sink):
    """One MLflow run per training run, continued on resume; metrics over the global step.

    The environment variables MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME apply.

    Args:
        config: of the run.
        library: the `mlflow` module.
    """

    def __init__(self, config: RunConfig, library: Any) -> None:
        self._library = library
        self._step = 0
        folder = config.output_dir.resolve() / MLFLOW_FOLDER
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None:
            folder.mkdir(exist_ok=True)
        self._client = library.MlflowClient(tracking_uri=uri or f"sqlite:///{folder / 'mlflow.db'}")
        # Artifacts of a local database would otherwise go to the working directory.
        artifacts = (folder / "artifacts").as_uri() if uri is None else None
        self._run_id = self._find_run(config.output_dir) or self._create_run(config, artifacts)

    def log(self, metrics: Metrics, *, global_step: int) -> None:
        """Log a step as `<domain>/...`."""
        self._log_batch(name_by_domain(metrics), global_step)

    def log_evaluation(self, losses: Mapping[str, float], *, domains_learned: int, global_step: int) -> None:
        """Log `eval/<corpus>`."""
        row = {eval_loss(corpus): loss for corpus, loss in losses.items()}
        self._log_batch({**row, DOMAINS_LEARNED: domains_learned}, global_step)

    def log_domain_evaluation(self, metrics: Metrics, *, global_step: int) -> None:
        """Log `within/eval/<corpus>`."""
        self._log_batch(name_within_domain(metrics), global_step)

    def log_summary(self, metrics: Metrics) -> None:
        """Log metrics of the run so far as `summary/...`."""
        self._log_batch({f"summary/{name}": value for name, value in metrics.items()}, self._step)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Scalar]]) -> None:
        """Write the artifact `tables/<name>.json` in the form of MLflow's own tables."""
        table = {"columns": list(columns), "data": [list(row) for row in rows]}
        self._client.log_dict(self._run_id, table, f"tables/{name}.json")

    def log_image(self, name: str, path: Path) -> None:
        """Write a PNG file as an artifact in `images/`."""
        self._client.log_artifact(self._run_id, str(path), "images")

    def close(self, exit_code: int = 0) -> None:
        """End the run as finished, killed (stopped, will be resumed) or failed."""
        status = {0: "FINISHED", EXIT_STOPPED: "KILLED"}.get(exit_code, "FAILED")
        self._client.set_terminated(self._run_id, status)

    def _find_run(self, folder: Path) -> str | None:
        """The run to continue; None where there is none in this database."""
        run_id = stored_run_id(folder, MLFLOW_RUN_ID_FILE)
        if run_id is None:
            return None
        try:
            self._client.update_run(run_id, status="RUNNING")
        except self._library.exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run_id

    def _create_run(self, config: RunConfig, artifacts: str | None) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", DEFAULT_EXPERIMENT)
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = (
            self._client.create_experiment(name, artifacts) if experiment is None else experiment.experiment_id
        )
        tags = {"method": config.method.name, "group": group_name(config)}
        run_id = str(self._client.create_run(experiment_id, tags=tags, run_name=run_name(config)).info.run_id)
        store_run_id(config.output_dir, run_id, MLFLOW_RUN_ID_FILE)
        # Parameters of a run cannot change later, so these are the keys that a resumed run cannot change either.
        param = self._library.entities.Param
        params = [param(key, str(value)[:MAX_PARAM_LENGTH]) for key, value in identity_values(config).items()]
        for first in range(0, len(params), 100):
            self._client.log_batch(run_id, params=params[first : first + 100])
        return run_id

    def _log_batch(self, metrics: Mapping[str, Scalar], global_step: int) -> None:
        self._step = global_step
        now = int(time.time() * 1000)
        metric = self._library.entities.Metric
        values = mlflow_metrics(metrics)
        self._client.log_batch(
            self._run_id, metrics=[metric(name, value, now, global_step) for name, value in values.items()]
        )


def mlflow_metrics(metrics: Mapping[str, Scalar]) -> dict[str, float]:
    """The numbers among metrics, but the step, with names such as `acl/loss.mlm`.

    A store of files has a file per metric, so `acl/loss` cannot also be the folder of `acl/loss/mlm`.
    """
    return {
        name.replace(f"/{LOSS}/", f"/{LOSS}."): value
        for name, value in metrics.items()
        if name != GLOBAL_STEP and not isinstance(value, str)
    }
