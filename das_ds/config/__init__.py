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
from das_ds.config.data import CorpusConfig, DataConfig, DomainConfig
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
    "CheckpointConfig",
    "CorpusConfig",
    "DataConfig",
    "DomainConfig",
    "EvaluationConfig",
    "ExportConfig",
    "FaultsConfig",
    "FrozenPart",
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
    "Section",
    "SiteConfig",
    "SoftmaskConfig",
    "TaskConfig",
    "TrainConfig",
    "UnitCountsConfig",
    "WandbConfig",
    "parse_method",
]
