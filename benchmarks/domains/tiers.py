"""The tiers of the benchmark: cpu, masks and gpu."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.domains.plan import NAIVE, Suite, Tier, Values, merge_values
from benchmarks.domains.variants import MASKS, METHODS, RIVALS

SHARED: Values = {
    "wandb": {"mode": "disabled"},
    "checkpoint": {"keep_last": 1},
}

UP_TO_SIX = (2, 3, 4, 5)
"""Additional seeds: six in total are the fewest with which a single test can have a p-value below 0.05."""

# Reviews, papers on language, medical abstracts: the three of the six domains that differ most.
THREE = (Suite("encoder", "encoder", ("restaurant", "acl", "pubmed")),)

CPU = Tier(
    name="cpu",
    suites=THREE,
    settings=SHARED
    | {
        "data": {"sequence_length": 64},
        "train": {
            "steps_per_domain": 75,
            "global_batch_size": 16,
            "micro_batch_size": 16,
            # On CPUs that multiply bf16 a step takes less than half as long as in fp32.
            "precision": "bf16",
            "log_interval": 20,
        },
        "evaluation": {"batch_size": 32, "max_sequences": 256},
        "deepspeed": {"zero_optimization": {"stage": 0}},
    },
    num_samples=512,
    learning_rates=(2e-4, 4e-4),
    variants=METHODS,
    seeds=(0, 1),
    lr_search_seed=100,
    sweep_factors=(0.25, 0.5),
    matched=("directions",),
    repeated="directions",
    contenders=("replay", "ewc 10000", "kd 1000", "directions", "directions, replay"),
    more_seeds=UP_TO_SIX,
    # Two runs of one thread each are faster than one run of two threads.
    threads=1,
    parallel=2,
    max_probes=3,
    pretraining={"encoder": {"train": {"steps_per_domain": 400, "learning_rate": 5e-4}, "method": {"name": NAIVE}}},
)

# In fp32, for any CPU, and small, because the contrastive loss takes several passes over each batch.
MASKS_TIER = replace(
    CPU,
    name="masks",
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
    variants=(*MASKS, *RIVALS),
    max_probes=2,
)

PAPER_ORDER = ("restaurant", "acl", "ai", "phone", "pubmed", "camera")
"""Of Ke et al., ICLR 2023."""
OTHER_ORDER = ("pubmed", "camera", "phone", "ai", "restaurant", "acl")

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
    learning_rates=(1e-4, 2e-4, 4e-4),
    variants=(*METHODS, *(variant for variant in MASKS if variant not in METHODS)),
    seeds=(0, 1, 2),
    lr_search_seed=100,
    sweep_factors=(0.25, 0.5),
    matched=("das", "directions"),
    repeated="directions",
    threads=4,
    # A model of this size leaves most of a large GPU idle.
    parallel=4,
    task_seeds=5,
    task_variants=(NAIVE, "replay", "das", "directions"),
    pretraining={
        "encoder": {"train": {"steps_per_domain": 1000, "learning_rate": 5e-4}, "method": {"name": NAIVE}},
        "decoder": {
            "model": {
                "config": {
                    "model_type": "llama",
                    "hidden_size": 384,
                    "num_hidden_layers": 6,
                    "num_attention_heads": 6,
                    "num_key_value_heads": 6,
                    "intermediate_size": 1024,
                    "max_position_embeddings": 256,
                    "tie_word_embeddings": True,
                }
            },
            "train": {"steps_per_domain": 6000, "learning_rate": 1e-3, "lr_scheduler": "cosine", "betas": [0.9, 0.95]},
            "method": {"name": NAIVE},
        },
    },
)

TIERS = {tier.name: tier for tier in (CPU, MASKS_TIER, GPU)}
