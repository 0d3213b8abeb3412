"""The tiers of the benchmark: cpu, short, length, decoder, tasks, masks and gpu."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.domains.plan import NAIVE, Suite, Tier, Values, merge_values
from benchmarks.domains.variants import (
    DIRECTIONS,
    EWC,
    FIRST_FORM,
    MASKS,
    METHODS,
    NAIVE_TRAINING,
    OSFT,
    REPLAYING,
    RIVALS_IN_8,
)

SHARED: Values = {
    "wandb": {"mode": "disabled"},
    "checkpoint": {"keep_last": 1},
}

PAPER_ORDER = ("restaurant", "acl", "ai", "phone", "pubmed", "camera")
"""Of Ke et al., ICLR 2023."""
OTHER_ORDER = ("pubmed", "camera", "phone", "ai", "restaurant", "acl")
THREE_DOMAINS = ("restaurant", "acl", "pubmed")
"""Reviews, papers on language, medical abstracts: the three of the six domains that differ most."""
TASK_VARIANTS = (NAIVE, "directions", "one", "replay", "ewc", "osft", "das published")
"""Groups whose models learn the end tasks."""

CPU = Tier(
    name="cpu",
    suites=(Suite("encoder_six", "encoder", PAPER_ORDER),),
    settings=SHARED
    | {
        "data": {"sequence_length": 64},
        "train": {
            "steps_per_domain": 400,
            "global_batch_size": 16,
            "micro_batch_size": 16,
            # On CPUs that multiply bf16 a step takes less than half as long as in fp32.
            "precision": "bf16",
            "log_interval": 50,
        },
        "evaluation": {"batch_size": 32, "max_sequences": 256},
        "deepspeed": {"zero_optimization": {"stage": 0}},
    },
    num_samples=512,
    learning_rates=(1e-4, 2e-4, 4e-4, 8e-4),
    variants=METHODS,
    seeds=(0, 1),
    lr_search_seed=100,
    lr_search_steps=100,
    sweep_factors=(0.125, 0.25, 0.5, 2.0),
    repeated="directions",
    contenders=("directions", "directions, replay", "replay", "osft", "ewc", "kd", "first moment"),
    against_naive=("directions", "directions, replay"),
    # With eight pairs a test of a family of up to six can survive Holm's correction.
    more_seeds=(2, 3, 4, 5, 6, 7),
    # Two runs of one thread each are faster than one run of two threads.
    threads=1,
    parallel=2,
    task_variants=TASK_VARIANTS,
    pretraining={"encoder": {"train": {"steps_per_domain": 400, "learning_rate": 5e-4}, "method": {"name": NAIVE}}},
)

# For CPUs without bf16: the same comparison in fp32, with fewer steps.
SHORT = replace(
    CPU,
    name="short",
    settings=merge_values(
        CPU.settings,
        {
            "train": {"steps_per_domain": 75, "precision": "fp32", "log_interval": 25},
            "evaluation": {"max_sequences": 128},
        },
    ),
    lr_search_steps=50,
    sweep_factors=(0.25, 0.5, 2.0),
    task_variants=(),
)

# How much is forgotten depends on the length: a mask that lets a little through lets more through in more steps.
LENGTH = replace(
    CPU,
    name="length",
    suites=tuple(Suite(f"encoder_{steps}", "encoder", THREE_DOMAINS, steps) for steps in (40, 150, 600)),
    lr_search_steps=150,
    variants=(NAIVE_TRAINING, DIRECTIONS, FIRST_FORM, REPLAYING, *OSFT, *EWC),
    contenders=(),
    against_naive=(),
    more_seeds=(),
    task_variants=(),
    restores_groups=False,
)

DECODER = replace(
    SHORT,
    name="decoder",
    suites=(Suite("decoder_three", "decoder", THREE_DOMAINS),),
    pretraining={"decoder": {"train": {"steps_per_domain": 400, "learning_rate": 5e-4}, "method": {"name": NAIVE}}},
)

# The models are those of the first seed of tier cpu.
TASKS = replace(
    CPU,
    name="tasks",
    runs_of="cpu",
    variants=tuple(variant for variant in METHODS if variant.group in TASK_VARIANTS),
    seeds=(0,),
    sweep_factors=(),
    contenders=(),
    against_naive=(),
    more_seeds=(),
    restores_groups=False,
    fine_tunes=True,
    # What two cores can do: the longer texts of chemprot and acl_arc are cut.
    task_settings={"epochs": 5, "patience": 2, "sequence_length": 64},
)

MASKS_CONTENDERS = ("replay", "ewc 10000", "kd 1000", "directions, first form", "directions, first form, replay")

# In fp32, for any CPU, and small, because the contrastive loss takes several passes over each batch.
MASKS_TIER = replace(
    CPU,
    name="masks",
    suites=(Suite("encoder", "encoder", THREE_DOMAINS),),
    settings=merge_values(
        CPU.settings,
        {
            "train": {
                "steps_per_domain": 40,
                "global_batch_size": 8,
                "micro_batch_size": 8,
                "precision": "fp32",
                "log_interval": 10,
            },
            "evaluation": {"max_sequences": 96},
        },
    ),
    num_samples=128,
    # Two rates, and none beyond them: those of its committed results.
    learning_rates=(2e-4, 4e-4),
    max_extensions=0,
    lr_search_steps=None,
    head_epochs=6,
    variants=(*MASKS, *RIVALS_IN_8),
    sweep_factors=(0.25, 0.5),
    repeated="directions, first form",
    contenders=MASKS_CONTENDERS,
    against_naive=MASKS_CONTENDERS,
    more_seeds=(2, 3, 4, 5),
    task_variants=(),
)

GPU = Tier(
    name="gpu",
    suites=(
        Suite("encoder_paper_order", "encoder", PAPER_ORDER),
        Suite("encoder_other_order", "encoder", OTHER_ORDER),
        Suite("decoder_paper_order", "decoder", PAPER_ORDER),
    ),
    settings=SHARED
    | {
        "data": {"sequence_length": 128},
        "train": {
            "steps_per_domain": 500,
            "global_batch_size": 64,
            "micro_batch_size": 64,
            "precision": "bf16",
            "log_interval": 50,
        },
        "evaluation": {"batch_size": 256, "max_sequences": 1024},
        "deepspeed": {"zero_optimization": {"stage": 1}},
    },
    num_samples=4096,
    learning_rates=(5e-5, 1e-4, 2e-4, 4e-4),
    variants=(*METHODS, *(variant for variant in MASKS if variant not in METHODS)),
    seeds=(0, 1, 2),
    lr_search_seed=100,
    lr_search_steps=125,
    sweep_factors=(0.125, 0.25, 0.5, 2.0),
    repeated="directions",
    threads=4,
    # A model of this size leaves most of a large GPU idle.
    parallel=4,
    fine_tunes=True,
    task_variants=(*TASK_VARIANTS, "das"),
    task_runs=(0, 1, 2),
    pretraining={
        "encoder": {"train": {"steps_per_domain": 1000, "learning_rate": 5e-4}, "method": {"name": NAIVE}},
        "decoder": {"train": {"steps_per_domain": 1000, "learning_rate": 5e-4}, "method": {"name": NAIVE}},
    },
)

TIERS = {tier.name: tier for tier in (CPU, SHORT, LENGTH, DECODER, TASKS, MASKS_TIER, GPU)}
