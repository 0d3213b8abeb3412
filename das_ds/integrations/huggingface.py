"""Protection in Hugging Face's Trainer and its subclasses, such as TRL's SFTTrainer: a callback.

The Trainer may run alone, under DDP, or under DeepSpeed ZeRO 0 to 3.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from das_ds.errors import ConfigError, DataError, ImportanceError
from das_ds.integrations.protector import Protector, is_engine
from das_ds.integrations.settings import DEFAULT_METHOD, MethodName, parse_settings

logger = logging.getLogger(__name__)

PROTECTION_FILE = "protection.safetensors"


class ProtectionCallback(TrainerCallback):
    """Masks the steps of a Trainer by what earlier training needs, and measures what this training needs in the end.

        trainer = Trainer(model=model, args=args, train_dataset=dataset, ...)
        trainer.add_callback(ProtectionCallback(trainer, load="first/protection.safetensors"))
        trainer.train()

    Gradients are masked before the Trainer clips them, updates within the optimizer's step. Every checkpoint has a copy
    of what masked the steps before it, and a run that resumes from a checkpoint of its `output_dir` is masked by that.
    After training, `output_dir/protection.safetensors` protects this training's text and all before.

    A second `trainer.train()` protects what the first one measured.

    Args:
        trainer: the callback's.
        method: as of `Protector`.
        load: protection of earlier training, or of a run of das_ds; None: none.
        measure: what is measured after training: True, the training set; a dataset, in the form of the training set,
            or a data loader; False, nothing.
        before: dataset or data loader whose text is protected from the first step on, measured when training begins;
            for general text.
        num_samples: rows of a dataset that are measured, from its beginning; None: all.
        tokenizer: as of `Protector`; by default vocabularies are not compared.
        architecture: as of `Protector`.
        loss: as of `Protector`.
        settings: as of `Protector`.

    Raises:
        ConfigError: unknown method or setting, or FSDP.
    """

    def __init__(
        self,
        trainer: Trainer,
        method: MethodName = DEFAULT_METHOD,
        *,
        load: str | Path | None = None,
        measure: bool | Dataset[Any] | DataLoader[Any] = True,
        before: Dataset[Any] | DataLoader[Any] | None = None,
        num_samples: int | None = None,
        tokenizer: Any = None,
        architecture: Mapping[str, Any] | None = None,
        loss: Any = None,
        **settings: Any,
    ) -> None:
        parse_settings(method, settings)
        if num_samples is not None and num_samples < 1:
            raise ConfigError(f"num_samples: found {num_samples}, expected at least 1, or None for all rows")
        if getattr(trainer, "is_fsdp_enabled", False):
            raise ConfigError("trainer: found FSDP, expected no sharding, DDP or DeepSpeed ZeRO (args.deepspeed)")
        self._trainer = trainer
        self._load = None if load is None else Path(load)
        self._measure = measure
        self._before = before
        self._num_samples = num_samples
        self._options: dict[str, Any] = {
            "method": method,
            "tokenizer": tokenizer,
            "architecture": architecture,
            "loss": loss,
            **settings,
        }
        self.protector: Protector | None = None
        """What masks the steps, from the beginning of training on."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Load what is protected, and mask all further steps.

        Raises:
            DasError: a model, an optimizer or a file that does not fit.
        """
        earlier = None
        if self.protector is not None:
            earlier = self.protector.state_dict()
            # Training may have ended by an error, with an optimizer that is kept.
            self.protector.unwrap()
        trainer = self._trainer
        wrapped: Any = trainer.model_wrapped
        protector = Protector(wrapped, **self._options)
        saved = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / PROTECTION_FILE
        if state.global_step > 0 and saved.exists():
            protector.load(saved)
        elif earlier is not None:
            protector.load_state_dict(earlier)
        else:
            if self._load is not None:
                protector.load(self._load)
            if self._before is not None:
                self._check_measured_once(state)
                protector.measure(self._batches(self._before))
        if state.global_step > 0 and protector.is_empty:
            logger.warning(
                "%s: found no such file at step %d where this run resumes, so that its steps are not masked; expected "
                "one if something was protected before",
                saved,
                state.global_step,
            )
        self.protector = protector
        if is_engine(wrapped):
            protector.wrap()
        else:
            protector.wrap(trainer.optimizer)
            self._mask_before_clipping(protector)

    def _check_measured_once(self, state: TrainerState) -> None:
        """What is measured before the first step cannot be measured after it.

        Raises:
            ImportanceError: the run resumes, and its checkpoint has no protection.
        """
        if state.global_step > 0:
            raise ImportanceError(
                f"before: found a run that resumes at step {state.global_step} without {PROTECTION_FILE} in its "
                "checkpoint, expected the one that was measured before the first step; copy it there, or begin anew"
            )

    def _mask_before_clipping(self, protector: Protector) -> None:
        """The Trainer calls this function of accelerate once for every step, before its callbacks."""
        accelerator = self._trainer.accelerator
        clip = type(accelerator).clip_grad_norm_

        def clip_masked(*args: Any, **kwargs: Any) -> Any:
            # In fp16 gradients are still scaled; a mask is linear.
            protector.mask_gradients()
            return clip(accelerator, *args, **kwargs)

        accelerator.clip_grad_norm_ = clip_masked

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write what masks the steps beside a checkpoint."""
        if self.protector is not None and not self.protector.is_empty:
            self.protector.save(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / PROTECTION_FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure what this training needs, and write it with all that was protected before.

        Raises:
            DasError: a dataset without batches or labels, or a file that cannot be written.
        """
        protector = self.protector
        assert protector is not None, "training began"
        protector.unwrap()
        vars(self._trainer.accelerator).pop("clip_grad_norm_", None)
        if self._measure is False:
            return
        source: Any = self._trainer.train_dataset if self._measure is True else self._measure
        protector.measure(self._batches(source))
        path = Path(str(args.output_dir)) / PROTECTION_FILE
        protector.save(path)
        logger.info("what this training needs is protected by %s", path)

    def _batches(self, source: Any) -> Iterable[Any]:
        """Batches of a dataset as the Trainer evaluates them: in order, each on one rank.

        Raises:
            DataError: there is no dataset, or it cannot be cut off.
        """
        if isinstance(source, DataLoader):
            return source
        if source is None:
            raise DataError("measure: found no training set in the trainer, expected a dataset or a data loader")
        if self._num_samples is not None:
            source = _first_rows(source, self._num_samples)
        if isinstance(source, Iterator):
            raise DataError(
                f"measure, before: found a {type(source).__name__}, expected a dataset in the form of the training "
                "set, or a data loader"
            )
        # Not that of evaluation, which with persistent workers is kept, whatever dataset is asked for next.
        return self._trainer.get_test_dataloader(source)


def _first_rows(dataset: Any, num_samples: int) -> Any:
    if hasattr(dataset, "take"):
        return dataset.take(min(num_samples, len(dataset)) if hasattr(dataset, "__len__") else num_samples)
    if not hasattr(dataset, "__len__"):
        raise DataError(
            f"num_samples: found {num_samples} with a {type(dataset).__name__} without length, expected a dataset of "
            "known length, or a data loader as `measure`"
        )
    from torch.utils.data import Subset

    return Subset(dataset, range(min(num_samples, len(dataset))))
