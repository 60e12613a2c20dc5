"""The root schemas, composed of the dataclasses that live beside the code they configure.

Only the scripts and tests read this file: no part of the package depends on the whole.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from omegaconf import OmegaConf

from mamba2lm.data.loader import DataConfig
from mamba2lm.distributed import ParallelConfig
from mamba2lm.models import ModelConfig
from mamba2lm.models.lora import LoRAConfig
from mamba2lm.schema import ConfigError
from mamba2lm.training.config import TrainingConfig
from mamba2lm.training.metrics import Tracking
from mamba2lm.training.optimizer import OptimizerConfig
from mamba2lm.training.schedule import ScheduleConfig


@dataclass
class TrainConfig:
    """Everything ``train.py`` takes."""

    run_dir: str = "runs/quickstart"
    """Where the run is kept."""
    resume: str = "auto"
    """auto: go on with the run in run_dir, if any; never; or a run or checkpoint to start from."""
    init_from: str | None = None
    """Begin with the weights, model.* and tokenizer of a run, a checkpoint, a folder that
    transformers or mamba-ssm loads, or its hub name; a run that goes on has its own."""
    dry_run: bool = False
    """Show the configuration, sizes and one step; write nothing."""
    tracking: Tracking = Tracking.none
    """Where metrics go besides metrics.jsonl."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """What ``python -m eval`` takes, as ``{tasks: [recall], recall: {n_pairs: [16]}}``, done at
    every validation; empty does nothing more than validate."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def validate(self) -> None:
        """Check every part; raise ConfigError."""
        parts = (self.model, self.lora, self.optimizer, self.schedule, self.training, self.parallel)
        for part in parts:
            part.validate()
        if self.lora.rank and self.init_from is None:
            raise ConfigError(
                "lora.rank", self.lora.rank, "changes a trained model: name one, init_from=…."
            )

    def resolved(self) -> dict[str, Any]:
        """Return plain values as kept in ``config.yaml``, without mixers that are not used."""
        fields = dataclasses.asdict(dataclasses.replace(self, model=ModelConfig(mixers={})))
        plain: dict[str, Any] = OmegaConf.to_container(  # type: ignore[assignment]
            OmegaConf.create(fields), enum_to_str=True
        )
        plain["model"] = self.model.resolved()
        return plain
