"""What `das-ds plan` prints: one plan as text or JSON, or a table over numbers of GPUs and ZeRO stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from das_ds.config import RunConfig
from das_ds.config.deepspeed import with_zero_stage
from das_ds.errors import ConfigError
from das_ds.preflight.checks import format_bytes
from das_ds.preflight.cluster import GIGA, Cluster
from das_ds.preflight.plan import GIB, HEADROOM, Plan, plan_run
from das_ds.preflight.planned_model import PlannedModel
from das_ds.preflight.traffic import bytes_sent
from das_ds.tracking.device_peak import TERA

TABLE_GPUS = (1, 8, 16, 64, 128, 512)
STAGES = (0, 1, 2, 3)
HOURS_PER_DAY = 24


def format_plan(config: RunConfig, model: PlannedModel, cluster: Cluster, plan: Plan) -> str:
    """One plan, a line for each of its parts."""
    size = model.size
    gpus = f"{plan.num_gpus} x {cluster.gpu}"
    nodes = cluster.num_nodes(plan.num_gpus)
    batch = config.train.global_batch_size
    on_gpu = {name: num_bytes for name, num_bytes in plan.memory.device.items() if num_bytes}
    on_gpu["activations"] = plan.activations
    on_host = {name: num_bytes for name, num_bytes in plan.memory.host.items() if num_bytes}
    disk = plan.disk
    trained = f", of which {size.trained:,} are trained" if size.has_frozen else ""
    lines = {
        "model": f"{size.total:,} parameters{trained}, {size.num_layers} layers",
        "run": f"method {config.method.name}, ZeRO {plan.zero_stage}, {config.train.precision}",
        "cluster": (
            f"{gpus} of {cluster.memory_gib:g} GiB on {nodes} node{'s' if nodes > 1 else ''}, MFU {cluster.mfu:g} of "
            f"{cluster.peak / TERA:g} TFLOP/s, {cluster.bandwidth(plan.num_gpus) / GIGA:g} GB/s between GPUs"
        ),
        "batch": (
            f"{batch} sequences of {config.data.sequence_length} = {plan.tokens_per_step:,} tokens = {plan.num_gpus} "
            f"ranks x {config.train.micro_batch_size} x {plan.micro_steps} micro-steps"
        ),
        "GPU": f"a step: {_list_bytes(on_gpu)}",
        "peaks": _list_bytes(plan.peaks),
        "fits": _describe_fit(cluster, plan),
        "host": f"{format_bytes(plan.host_per_node)} per node; a rank: {_list_bytes(on_host)}",
        "disk": (
            f"{format_bytes(disk.total)} = {disk.num_checkpoints} checkpoints of {format_bytes(disk.checkpoint)} + "
            f"{disk.num_domains} domains of {format_bytes(disk.domain)} + files of the method {format_bytes(disk.run)}"
        ),
        "traffic": _describe_traffic(plan),
        "step": (
            f"{plan.step_seconds:.3g} s: {plan.flops / plan.num_gpus / TERA:.3g} TFLOP of a GPU in "
            f"{plan.compute_seconds:.3g} s, beside traffic of {plan.traffic_seconds:.3g} s; "
            f"{plan.tokens_per_step / plan.step_seconds:,.0f} tokens/s"
        ),
    }
    for domain in plan.domains:
        measured = domain.measured_seconds / plan.step_seconds
        lines[domain.name] = (
            f"{domain.steps} steps, {domain.tokens / GIGA:.3g} billion tokens, {_hours(domain.seconds)}, "
            f"{domain.gpu_hours:,.1f} GPU hours{_cost(domain.cost)}"
            + (f", of which measuring takes the time of {measured:.2g} steps" if measured else "")
        )
    seconds = sum(domain.seconds for domain in plan.domains)
    costs = [domain.cost for domain in plan.domains if domain.cost is not None]
    lines["run in all"] = (
        f"{_hours(seconds)}, {plan.gpu_hours:,.1f} GPU hours{_cost(sum(costs) if costs else None)}; without evaluation "
        "and reading text"
    )
    width = max(map(len, lines)) + 1
    return "\n".join(f"{name:<{width}} {text}" for name, text in lines.items())


def plan_values(config: RunConfig, model: PlannedModel, cluster: Cluster, plan: Plan) -> dict[str, Any]:
    """One plan as JSON values; bytes, seconds and FLOPs without prefixes."""
    return {
        "model": {key: value for key, value in asdict(model.size).items() if key not in ("parameters", "matrices")},
        "method": config.method.name,
        "cluster": asdict(cluster),
        "gpus": plan.num_gpus,
        "nodes": cluster.num_nodes(plan.num_gpus),
        "zero_stage": plan.zero_stage,
        "micro_steps": plan.micro_steps,
        "fits": plan.fits(cluster),
        "gpu_bytes": {**plan.memory.device, "activations": plan.activations},
        "gpu_peak_bytes": plan.peaks,
        "host_bytes": dict(plan.memory.host),
        "host_bytes_per_node": plan.host_per_node,
        "disk": {**asdict(plan.disk), "total": plan.disk.total},
        "traffic": [
            {**asdict(collective), "bytes_sent": bytes_sent(collective, plan.num_gpus)}
            for collective in plan.collectives
        ],
        "flops_per_step": plan.flops,
        "compute_seconds": plan.compute_seconds,
        "traffic_seconds": plan.traffic_seconds,
        "step_seconds": plan.step_seconds,
        "tokens_per_second": plan.tokens_per_step / plan.step_seconds,
        "domains": [asdict(domain) for domain in plan.domains],
        "gpu_hours": plan.gpu_hours,
    }


def format_table(
    config: RunConfig, model: PlannedModel, cluster: Cluster, numbers_of_gpus: Sequence[int] = TABLE_GPUS
) -> str:
    """A Markdown table: peak memory of a GPU by ZeRO stage, and time and cost at the fastest stage that fits."""
    has_price = cluster.price is not None
    header = ["GPUs", *(f"ZeRO {stage}" for stage in STAGES), "host memory of a node", "step", "tokens/s", "GPU hours"]
    header += ["cost"] if has_price else []
    reasons: dict[str, int] = {}
    rows = []
    for num_gpus in numbers_of_gpus:
        plans = {stage: _try_plan(config, model, cluster, num_gpus, stage, reasons) for stage in STAGES}
        cells = [_memory_cell(cluster, plan, reasons) for plan in plans.values()]
        fitting = [plan for plan in plans.values() if isinstance(plan, Plan) and plan.fits(cluster)]
        fastest = min(fitting, key=lambda plan: plan.step_seconds, default=None)
        rows.append([str(num_gpus), *cells, *_time_cells(cluster, fastest)])
    lines = [_row(header), "|" + "|".join("---:" for _ in header) + "|", *map(_row, rows)]
    notes = [f"({number}) {reason}" for reason, number in reasons.items()]
    return "\n".join([*lines, "", *notes] if notes else lines)


def format_values_of_table(
    config: RunConfig, model: PlannedModel, cluster: Cluster, numbers_of_gpus: Sequence[int] = TABLE_GPUS
) -> list[dict[str, Any]]:
    """The plans of the table as JSON values; `error` in place of those that the config does not allow."""
    values = []
    for num_gpus in numbers_of_gpus:
        for stage in STAGES:
            try:
                changed = with_zero_stage(config, stage)
                values.append(plan_values(changed, model, cluster, plan_run(changed, model, cluster, num_gpus)))
            except ConfigError as error:
                values.append({"gpus": num_gpus, "zero_stage": stage, "error": str(error)})
    return values


def _try_plan(
    config: RunConfig, model: PlannedModel, cluster: Cluster, num_gpus: int, stage: int, reasons: dict[str, int]
) -> Plan | int:
    """The plan, or the number of the reason why there is none."""
    try:
        return plan_run(with_zero_stage(config, stage), model, cluster, num_gpus)
    except ConfigError as error:
        return reasons.setdefault(str(error), len(reasons) + 1)


def _memory_cell(cluster: Cluster, plan: Plan | int, reasons: dict[str, int]) -> str:
    if isinstance(plan, int):
        return f"({plan})"
    text = f"{plan.peak / GIB:.0f} GiB" if plan.peak >= 10 * GIB else f"{plan.peak / GIB:.1f} GiB"
    if plan.fits(cluster):
        return text
    return f"no: {text}" if plan.host_fits(cluster) is not False else f"no: {text}, host"


def _time_cells(cluster: Cluster, plan: Plan | None) -> list[str]:
    if plan is None:
        return ["-"] * (4 + (cluster.price is not None))
    cells = [
        f"{plan.host_per_node / GIB:,.0f} GiB",
        f"{plan.step_seconds:.3g} s",
        f"{plan.tokens_per_step / plan.step_seconds:,.0f}",
        f"{plan.gpu_hours:,.0f}",
    ]
    return cells if cluster.price is None else [*cells, f"{cluster.price * plan.gpu_hours:,.0f}"]


def _describe_fit(cluster: Cluster, plan: Plan) -> str:
    usable = (1 - HEADROOM) * cluster.memory_gib
    peak = f"{plan.peak / GIB:.1f} GiB at {max(plan.peaks, key=lambda phase: plan.peaks[phase])}"
    room = f"{usable:.1f} GiB, which leaves {HEADROOM:.0%} of {cluster.memory_gib:g} GiB to libraries"
    if plan.fits(cluster):
        return f"yes: {peak}, of {room}"
    if plan.host_fits(cluster) is False:
        return f"no: {format_bytes(plan.host_per_node)} of host memory, of {cluster.host_memory_gib:g} GiB of a node"
    return f"no: {peak}, of {room}; use more GPUs, a higher ZeRO stage, offload, or model.gradient_checkpointing"


def _describe_traffic(plan: Plan) -> str:
    if not plan.collectives:
        return "none"
    sent = {
        f"{collective.content} ({collective.kind.replace('_', '-')})": bytes_sent(collective, plan.num_gpus)
        for collective in plan.collectives
    }
    return f"a rank sends {format_bytes(sum(sent.values()))} in a step: {_list_bytes(sent)}"


def _list_bytes(items: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {format_bytes(num_bytes)}" for name, num_bytes in items.items()) or "nothing"


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:.2g} hours" if hours < 2 * HOURS_PER_DAY else f"{hours / HOURS_PER_DAY:.1f} days"


def _cost(cost: float | None) -> str:
    return "" if cost is None else f", cost {cost:,.0f}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
