"""Before the first domain of a run that continues another one: its history, and the state in which it begins.

The phases before it are those of one run over all domains, without the training: each model of the earlier run is
loaded in turn and evaluated on the corpora that are new; the losses of the others are known.
"""

from __future__ import annotations

from collections.abc import Callable

from das_ds.checkpoint.manifest import RunState
from das_ds.checkpoint.reader import CheckpointReader
from das_ds.config import RunConfig
from das_ds.context import RunContext
from das_ds.distributed.resumable import ResumableLoops
from das_ds.distributed.state import Stateful
from das_ds.models.vocabulary import vocabulary_parameters
from das_ds.training.data_module import DataModule
from das_ds.training.earlier_run import EarlierRun
from das_ds.training.evaluate import evaluate_corpora


class Continuation:
    """The part of a run that another run has done.

    Args:
        config: of the run.
        earlier: the run that it continues.
        context: of the run, whose engine has the weights of the base model.
        method: gets the state of the earlier run.
        data: of the run.
        reset_new_tokens: name of the domain learned last -> resets the embeddings of tokens that later ones add.
        has_base: whether the base model is that of the earlier run, and not one whose head was trained before.
    """

    def __init__(
        self,
        config: RunConfig,
        earlier: EarlierRun,
        context: RunContext,
        method: Stateful,
        data: DataModule,
        reset_new_tokens: Callable[[str], None],
        *,
        has_base: bool,
    ) -> None:
        self._earlier = earlier
        self._stages = config.stages
        self._engine = context.engine
        self._network = context.network
        self._method = method
        self._data = data
        self._reset_new_tokens = reset_new_tokens
        self._has_base = has_base

    @property
    def global_step(self) -> int:
        """Optimizer steps of the earlier run."""
        return self._earlier.state.global_step

    @property
    def wall_seconds(self) -> float:
        """Duration of the earlier run."""
        return self._earlier.state.wall_seconds

    def start(self, state: RunState) -> RunState:
        """The state in which a run begins to continue the earlier one.

        Args:
            state: of a run that begins.

        Raises:
            RunFolderError: the text of the earlier run changed since.
        """
        self._earlier.check_text(self._data.fingerprints)
        kept = {
            name: getattr(self._earlier.state, name) for name in ("global_step", "tokens_seen", "evaluations", "ends")
        }
        return state.model_copy(update={**kept, "phase": "evaluate"})

    def is_at_history(self, state: RunState) -> bool:
        """Whether the model to be evaluated is one of the earlier run."""
        return state.phase == "evaluate" and state.domains_done <= self._earlier.num_learned

    def is_at_end(self, state: RunState) -> bool:
        """Whether that is its last model, which the run goes on with."""
        return state.domains_done == self._earlier.num_learned

    def has_model(self, state: RunState) -> bool:
        """Whether the model that is loaded is the one that the run had after as many domains."""
        return not self.is_at_history(state) or self._has_model(state.domains_done)

    def evaluate(self, state: RunState, loops: ResumableLoops) -> dict[str, float | None]:
        """Corpus -> loss of the model that is loaded, or None where it is not known and the model is gone."""
        known = self._earlier.losses(state.domains_done)
        if not self._has_model(state.domains_done):
            return known
        new = [corpus for corpus in self._data.blocks if known.get(corpus) is None]
        return {**known, **evaluate_corpora(self._network, self._data, loops, new)}

    def load_next(self, state: RunState) -> RunState:
        """Load the model that the earlier run had after one more domain, and after the last one what its method knows.

        Returns:
            The state in which that model is to be evaluated.
        """
        num_learned = state.domains_done + 1
        if self._has_model(num_learned):
            end = self._earlier.ends[num_learned]
            reader = CheckpointReader(
                end.folder,
                end.manifest,
                self._engine.ranks.info,
                self._engine.zero_stage,
                self._engine.weights.shards,
            )
            # Rows of tokens that only this run adds are in no checkpoint of the earlier one.
            growing = () if self._data.vocabulary is None else vocabulary_parameters(self._network.model)
            self._engine.load_state_dict(reader.component("engine"), growing=growing)
            self._reset_new_tokens(self._stages[num_learned - 1].last_domain)
            if num_learned == self._earlier.num_learned:
                self._method.load_state_dict(reader.component("method"))
            reader.close()
        return state.model_copy(update={"domains_done": num_learned})

    def _has_model(self, num_learned: int) -> bool:
        return num_learned in self._earlier.ends if num_learned else self._has_base
