"""Names of metrics, defined once for the code that logs them and the code that reads them."""

from __future__ import annotations

from collections.abc import Mapping

GLOBAL_STEP = "global_step"
DOMAIN = "domain"
DOMAIN_STEP = "domain_step"
TOKENS_SEEN = "tokens_seen"
LOSS = "loss"
LEARNING_RATE = "lr"
GRAD_NORM = "grad_norm"
SKIPPED_STEPS = "skipped_steps"
TOKENS_PER_S = "tokens_per_s"
MODEL_TFLOPS = "model_tflops"
"""TFLOP/s of a device for what plain training needs."""
MFU = "mfu"
"""Their fraction of the device's peak; missing where that is unknown."""
DATA_WAIT = "data_wait"
"""Fraction of the time that rank 0 waited for batches."""
PEAK_MEMORY_GIB = "peak_memory_gib"
CHECKPOINTS = "checkpoints"
CHECKPOINT_STALL_S = "checkpoint_stall_s"
CHECKPOINT_WRITE_S = "checkpoint_write_s"
CHECKPOINT_MIB = "checkpoint_mib"

STEP_METRICS = (
    GLOBAL_STEP,
    DOMAIN,
    DOMAIN_STEP,
    TOKENS_SEEN,
    LOSS,
    LEARNING_RATE,
    GRAD_NORM,
    SKIPPED_STEPS,
    TOKENS_PER_S,
)
"""Fields of every line of a step in metrics.jsonl; `loss_part` names and others may be added."""

HARDWARE_METRICS = (
    TOKENS_PER_S,
    MODEL_TFLOPS,
    MFU,
    DATA_WAIT,
    PEAK_MEMORY_GIB,
    CHECKPOINTS,
    CHECKPOINT_STALL_S,
    CHECKPOINT_WRITE_S,
    CHECKPOINT_MIB,
)
"""Fields that depend on the machine; two runs of one config agree in all others."""

DOMAINS_LEARNED = "domains_learned"
LOSS_MATRIX = "loss_matrix"
CURVES = "curves"
IMPORTANCE = "importance"
PLASTICITY = "plasticity"
"""Share of all directions that earlier domains left open when the domain began, in its lines; and of the plot."""
PASSING_ENERGY = "passing_energy"
"""Share of the energy of the domain's inputs that passed the masks of earlier domains then."""


def loss_part(name: str) -> str:
    """Name of one term of the loss, such as `loss/mlm`."""
    return f"{LOSS}/{name}"


def group_norm(group: str) -> str:
    """Name of the gradient norm of a group of parameters, such as `grad_norm/attention`."""
    return f"{GRAD_NORM}/{group}"


EVALUATION_METRICS = (GLOBAL_STEP, DOMAIN, DOMAIN_STEP)
"""Fields of every line of an evaluation within a domain, in addition to the `eval_loss` of each evaluated corpus."""


def eval_loss(corpus: str) -> str:
    """Name of the held-out loss on a corpus, such as `eval/pubmed`."""
    return f"eval/{corpus}"


def eval_bits_per_byte(corpus: str) -> str:
    """Name of the same loss in bits per byte, such as `bits_per_byte/pubmed`."""
    return f"bits_per_byte/{corpus}"


def within_domain(name: str) -> str:
    """Name of a metric of evaluations within domains where it has to differ from that of evaluations after them."""
    return f"within/{name}"


def step_axis(domain: str) -> str:
    """Name of the step within a domain, such as `pubmed/step`."""
    return f"{domain}/step"


def name_by_domain(metrics: Mapping[str, float | int | str]) -> dict[str, float | int | str]:
    """Metrics of a step, prefixed with its domain; counters of the complete run keep their names."""
    domain = str(metrics[DOMAIN])
    names = {GLOBAL_STEP: GLOBAL_STEP, TOKENS_SEEN: TOKENS_SEEN, DOMAIN_STEP: step_axis(domain)}
    return {names.get(name, f"{domain}/{name}"): value for name, value in metrics.items() if name != DOMAIN}


def name_within_domain(metrics: Mapping[str, float | int | str]) -> dict[str, float | int | str]:
    """Metrics of an evaluation within a domain, over the steps of the run: one curve per corpus over all domains."""
    return {within_domain(name): value for name, value in metrics.items() if name not in (DOMAIN, DOMAIN_STEP)}
