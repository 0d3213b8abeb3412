"""The command `das-ds plan`: options in, text or JSON out."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout

from das_ds.config import RunConfig
from das_ds.preflight.cluster import Cluster, describe_cluster
from das_ds.preflight.plan import plan_run
from das_ds.preflight.plan_report import format_plan, format_table, format_values_of_table, plan_values
from das_ds.preflight.planned_model import read_model


def run_plan(config: RunConfig, options: argparse.Namespace) -> None:
    """Print the plan for `--gpus`, or the table over numbers of GPUs.

    Raises:
        ConfigError, ModelError, DataError: options, a config or a model that cannot be.
    """
    # Libraries that are loaded on the way print warnings, which must not end up among the results.
    with redirect_stdout(sys.stderr):
        text = _describe(config, options)
    print(text)


def _describe(config: RunConfig, options: argparse.Namespace) -> str:
    cluster = _cluster(config, options)
    if options.gpus is not None:
        # Before the model is built, which takes a while.
        cluster.check_gpus(options.gpus)
    model = read_model(config)
    if options.gpus is None:
        if options.json:
            return json.dumps(format_values_of_table(config, model, cluster))
        return format_table(config, model, cluster)
    plan = plan_run(config, model, cluster, options.gpus)
    if options.json:
        return json.dumps(plan_values(config, model, cluster, plan))
    return format_plan(config, model, cluster, plan)


def _cluster(config: RunConfig, options: argparse.Namespace) -> Cluster:
    precision = config.train.precision
    is_tf32 = precision == "fp32" and config.train.matmul_precision == "high"
    return describe_cluster(
        gpu=options.gpu,
        gpu_memory=options.gpu_memory,
        gpu_tflops=options.gpu_tflops,
        precision="tf32" if is_tf32 else precision,
        mfu=options.mfu,
        gpus_per_node=options.gpus_per_node,
        link_gb=options.link_bandwidth,
        network_gb=options.network_bandwidth,
        disk_gb=options.disk_bandwidth,
        host_memory=options.host_memory,
        price=options.price_per_gpu_hour,
    )
