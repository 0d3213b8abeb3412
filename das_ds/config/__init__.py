"""The run config; the docstrings of its fields are the text that `--help` prints.

Reading, overriding and writing configs is `config/io.py`, the table of all keys `config/schema.py`, their help
`config/help.py`.
"""

from das_ds.config.architecture import (
    ArchitectureConfig,
    GroupName,
    ObjectiveName,
    RuleConfig,
    SiteConfig,
    UnitCountsConfig,
)
from das_ds.config.benchmarks import BenchmarksConfig, ScoringRule
from das_ds.config.continuation import ContinueConfig
from das_ds.config.data import CorpusConfig, DataConfig, EvaluationCorpusConfig, SourceConfig
from das_ds.config.domain import DomainConfig, DomainReplayConfig
from das_ds.config.generation import GenerationConfig
from das_ds.config.method import FrozenPart, MergeConfig, MethodConfig, ReplayConfig, SampleSize, parse_method
from das_ds.config.model import LoraConfig, ModelConfig
from das_ds.config.run import RunConfig
from das_ds.config.runtime import CheckpointConfig, ExportConfig, FaultsConfig, RuntimeConfig, WandbConfig
from das_ds.config.section import Section
from das_ds.config.softmask import ImportanceConfig, ImportanceScore, MaskTarget, SoftmaskConfig
from das_ds.config.tasks import TaskConfig
from das_ds.config.train import EvaluationConfig, TrainConfig

__all__ = [
    "ArchitectureConfig",
    "BenchmarksConfig",
    "CheckpointConfig",
    "ContinueConfig",
    "CorpusConfig",
    "DataConfig",
    "DomainConfig",
    "DomainReplayConfig",
    "EvaluationConfig",
    "EvaluationCorpusConfig",
    "ExportConfig",
    "FaultsConfig",
    "FrozenPart",
    "GenerationConfig",
    "GroupName",
    "ImportanceConfig",
    "ImportanceScore",
    "LoraConfig",
    "MaskTarget",
    "MergeConfig",
    "MethodConfig",
    "ModelConfig",
    "ObjectiveName",
    "ReplayConfig",
    "RuleConfig",
    "RunConfig",
    "RuntimeConfig",
    "SampleSize",
    "ScoringRule",
    "Section",
    "SiteConfig",
    "SoftmaskConfig",
    "SourceConfig",
    "TaskConfig",
    "TrainConfig",
    "UnitCountsConfig",
    "WandbConfig",
    "parse_method",
]
