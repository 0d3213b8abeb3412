"""Lines that a run prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from das_ds.checkpoint.manifest import DomainEnd, DomainEvaluation, RunState
from das_ds.config.stage import Stage
from das_ds.softmask.plasticity import DomainPlasticity, InputPlasticity, PlasticityReading
from das_ds.training.callbacks import LoggedStep
from das_ds.training.console import (
    DomainSummary,
    RunClock,
    RunConsole,
    RunSummary,
    SourceSummary,
    evaluation_line,
    plasticity_line,
    protection_line,
    step_line,
)


def summary(resumes: str | None = None) -> RunSummary:
    """A run of two ranks over two domains."""
    return RunSummary(
        method="directions",
        model="roberta-base (roberta)",
        num_parameters=124_697_433,
        num_trained=124_697_433,
        objective="mlm",
        device="cpu",
        num_ranks=2,
        zero_stage=2,
        precision="bf16",
        optimizer="adamw",
        micro_batch_size=4,
        global_batch_size=16,
        sequence_length=64,
        domains=[
            DomainSummary("acl", 1600, 75, 1200),
            # Each step replays two of its sequences.
            DomainSummary(
                "restaurants", 10, 5, 70, [SourceSummary("yelp", 6, 49), SourceSummary("foursquare_tips", 4, 21)]
            ),
        ],
        eval_corpora=["acl", "restaurants", "general"],
        output_dir="runs/papers",
        continues=None,
        resumes=resumes,
    )


def test_run_summary_says_what_is_trained_on_what() -> None:
    text = "\n".join(summary().lines())
    assert text.startswith("Continual pre-training with das_ds, method directions\n")
    for part in (
        "roberta-base (roberta), 125 M parameters, mlm",
        "2 ranks on cpu, ZeRO 2, bf16, adamw",
        "16 sequences of 64 tokens = 1,024 tokens a step (2 ranks x 4 sequences x 2 micro-steps)",
        "acl                    1,600 blocks    102 K tokens       75 steps   0.75 epochs",
        "restaurants               10 blocks      640 tokens        5 steps   7.00 epochs",
        "  yelp                     6 blocks      384 tokens    70.0% share   8.17 epochs",
        "  foursquare_tips          4 blocks      256 tokens    30.0% share   5.25 epochs",
        "acl, restaurants, general",
        "runs/papers (results.json",
        "from the beginning",
    ):
        assert part in text, part


def test_run_summary_names_the_checkpoint_of_a_run_that_resumes() -> None:
    assert "resuming from 0007: domain acl, step 40 of 75" in summary("0007: domain acl, step 40 of 75").lines()[-1]


def test_run_clock_adds_steps_and_phases_that_are_to_come() -> None:
    clock = RunClock()
    phases = {"evaluate": 2, "after": 1}
    assert clock.seconds_left(100, phases) is None
    clock.add_phase("evaluate", 10.0)
    clock.add_steps(20, 40.0)
    # 80 steps of 2 s and two evaluations of 10 s; `after` has not been seen.
    assert clock.seconds_left(80, phases) == 180.0
    clock.add_phase("after", 5.0)
    assert clock.seconds_left(80, phases) == 185.0


def test_run_clock_leaves_out_the_first_interval_which_includes_start_up() -> None:
    clock = RunClock()
    clock.add_steps(10, 100.0)
    assert clock.seconds_left(50, {}) == 500.0
    clock.add_steps(10, 20.0)
    clock.add_steps(10, 10.0)
    assert clock.seconds_left(30, {}) == 45.0


def test_step_line_has_loss_rate_speed_and_time_left() -> None:
    logged = LoggedStep(
        domain="acl",
        step=20,
        num_steps=75,
        steps_since_last=10,
        seconds=3.0,
        loss=5.6123,
        learning_rate=4e-5,
        tokens_per_s=1234.4,
    )
    line = "acl 20/75 | loss 5.612 | lr 4.00e-05 | 1,234 tokens/s"
    assert step_line(logged, None) == line
    assert step_line(logged, 760.0) == f"{line} | run ends in 12m40s"


def test_evaluation_line_has_the_change_since_the_row_before() -> None:
    before = {"acl": 6.08, "general": 4.2}
    after = {"acl": 5.61, "general": 4.25}
    assert evaluation_line("before training", before, {}) == "held-out loss before training: acl 6.080, general 4.200"
    assert evaluation_line("after acl", after, before) == (
        "held-out loss after acl: acl 5.610 (-0.470), general 4.250 (+0.050)"
    )


def test_plasticity_line_before_and_after_a_domain() -> None:
    def reading(open_: float, passing: float | None) -> PlasticityReading:
        inputs = {"q": InputPlasticity(2, open_, passing), "f": InputPlasticity(2, open_, passing and passing / 2)}
        return PlasticityReading.summarize(inputs, {"q": "attention input", "f": "MLP output"})

    measured = DomainPlasticity(domain="acl", before=reading(0.614, 0.24))
    assert plasticity_line(measured) == (
        "plasticity before acl: 61% of all directions are open; 18% of the input energy of acl passes (least: MLP "
        "output 12%)"
    )
    assert plasticity_line(measured.model_copy(update={"after": reading(0.3, 0.04)})) == (
        "plasticity after acl: 30% of all directions are open; 3.0% of the input energy of acl still passes (least: "
        "MLP output 2.0%)"
    )
    without = DomainPlasticity(domain="acl", before=reading(0.5, None))
    assert plasticity_line(without) == "plasticity before acl: 50% of all directions are open"


def test_protection_line_names_what_and_how() -> None:
    reading = PlasticityReading.summarize({"q": InputPlasticity(2, 0.5, None)}, {"q": "attention input"})
    measured = DomainPlasticity(domain="acl", before=reading, protected=["general", "food"], form="masks on update")
    assert protection_line(measured) == "protected while acl is learned: general, food (masks on update)"
    assert (
        protection_line(DomainPlasticity(domain="acl", before=reading)) == "protected while acl is learned: nothing yet"
    )


def test_run_console_estimates_the_end_of_all_domains(capsys: pytest.CaptureFixture[str]) -> None:
    console = RunConsole([Stage(0, ("acl",), 75), Stage(1, ("restaurants",), 25)], is_main=True)
    console.phase_ended("evaluate", 10.0)
    logged = LoggedStep(
        domain="acl",
        step=25,
        num_steps=75,
        steps_since_last=25,
        seconds=50.0,
        loss=5.5,
        learning_rate=1e-4,
        tokens_per_s=512.0,
    )
    state = RunState(phase="train", loss_matrix=[[6.0, 6.5]])
    # 50 + 25 steps of 2 s, and two evaluations of 10 s.
    assert console.step_logged(logged, state) == "loss=5.500, run ends in 2m50s"
    assert capsys.readouterr().err == "acl 25/75 | loss 5.500 | lr 1.00e-04 | 512 tokens/s | run ends in 2m50s\n"


def test_run_console_of_other_ranks_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    console = RunConsole([Stage(0, ("acl",), 75)], is_main=False)
    console.run_started(summary())
    console.evaluated({"acl": 5.0}, {"acl": 6.0}, 1)
    console.exported("acl", Path("model"))
    assert capsys.readouterr().err == ""


def test_run_console_names_the_stage_that_was_evaluated(capsys: pytest.CaptureFixture[str]) -> None:
    console = RunConsole([Stage(0, ("acl",), 75)], is_main=True)
    console.evaluated({"acl": 6.0}, {}, 0)
    console.evaluated({"acl": 5.0}, {"acl": 6.0}, 1)
    console.evaluated({"acl": 5.0, "law": 7.0}, {"acl": 6.0, "law": None}, 1)
    assert capsys.readouterr().err == (
        "held-out loss before training: acl 6.000\nheld-out loss after acl: acl 5.000 (-1.000)\n"
        "held-out loss after acl: acl 5.000 (-1.000), law 7.000\n"
    )


def test_run_console_counts_evaluations_within_domains(capsys: pytest.CaptureFixture[str]) -> None:
    stages = [Stage(0, ("acl",), 75), Stage(1, ("restaurants",), 25)]
    console = RunConsole(stages, is_main=True, every_steps=10)
    console.phase_ended("within", 5.0)
    logged = LoggedStep(
        domain="acl",
        step=20,
        num_steps=75,
        steps_since_last=20,
        seconds=20.0,
        loss=5.5,
        learning_rate=1e-4,
        tokens_per_s=512.0,
    )
    # 55 + 25 steps of 1 s; evaluations at 20, 30 ... 70 and 75, and at 10, 20 and 25.
    state = RunState(phase="train", loss_matrix=[[6.0, 6.5]])
    assert console.step_logged(logged, state) == "loss=5.500, run ends in 2m10s"
    warmup = RunState(phase="head_warmup", loss_matrix=[])
    # 55 + 75 + 25 steps, and 8 + 3 evaluations.
    assert console.step_logged(logged, warmup) == "loss=5.500, run ends in 3m30s"


def test_run_console_prints_evaluations_within_domains_and_early_ends(capsys: pytest.CaptureFixture[str]) -> None:
    console = RunConsole([Stage(0, ("acl",), 75)], is_main=True)
    first, second = (
        DomainEvaluation(domain="acl", step=step, global_step=step, losses={"acl": loss, "general": 4.0})
        for step, loss in ((0, 6.0), (10, 5.5))
    )
    console.evaluated_within(second, before=first)
    ends = (("steps", 75, 75), ("steps", 75, 60), ("early_stopping", 50, 50), ("max_forgetting", 50, 40))
    for reason, step, model_step in ends:
        end = {"domain": "acl", "reason": reason, "step": step, "best_step": 40, "model_step": model_step}
        console.domain_ended(DomainEnd.model_validate(end))
    assert capsys.readouterr().err.splitlines() == [
        "held-out loss at step 10 of acl: acl 5.500 (-0.500), general 4.000 (+0.000)",
        "acl took all of its steps, at step 75; going on with the model of step 60",
        "acl ended early, as its held-out loss hardly fell any more (evaluation.early_stopping), at step 50",
        "acl ended early, as other text lost too much (faults.max_forgetting), at step 50; going on with the model of "
        "step 40",
    ]
