"""Training: recipes, the trainer, checkpoints, the cost ledger."""

from fastkd.training.config import (
    DataConfig,
    FGFIConfig,
    ICDConfig,
    LGDConfig,
    LGDICDConfig,
    OptimizerConfig,
    Recipe,
    RuntimeConfig,
    Schedule,
)
from fastkd.training.recipes.named import all_recipes, get_recipe, parse_cli, recipe_names
from fastkd.training.recipes.scaling import scale_to_batch
from fastkd.training.run.finish import RunResult
from fastkd.training.step import FrozenTeacher, StepModule, sum_losses
from fastkd.training.trainer import NonFiniteLossError, train

__all__ = [
    "DataConfig",
    "FGFIConfig",
    "FrozenTeacher",
    "ICDConfig",
    "LGDConfig",
    "LGDICDConfig",
    "NonFiniteLossError",
    "OptimizerConfig",
    "Recipe",
    "RunResult",
    "RuntimeConfig",
    "Schedule",
    "StepModule",
    "all_recipes",
    "get_recipe",
    "parse_cli",
    "recipe_names",
    "scale_to_batch",
    "sum_losses",
    "train",
]
