"""The errors for what the user can correct."""

from examples.common.checkpoints import CheckpointError as CheckpointError
from examples.finetune.planner.data import DataError as DataError
from examples.llama.run_config import ConfigError as ConfigError
from examples.pretrained import WeightsError as WeightsError
