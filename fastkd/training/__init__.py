"""Training: recipes, the trainer, checkpoints, the cost ledger."""

from fastkd.training.config import DataConfig, DistillConfig, OptimizerConfig, Recipe, RuntimeConfig, Schedule
from fastkd.training.methods import (
    Combined,
    CWDConfig,
    FeatureMethod,
    FGFIConfig,
    ICDConfig,
    LGDConfig,
    LGDICDConfig,
    Method,
    PKDConfig,
    ScoreL2Config,
)
from fastkd.training.recipes.named import all_recipes, fitted_recipe, get_recipe, parse_cli, recipe_names
from fastkd.training.recipes.options import with_detector
from fastkd.training.recipes.scaling import scale_to_batch
from fastkd.training.run.finish import RunResult
from fastkd.training.step import FrozenTeacher, StepModule, sum_losses
from fastkd.training.trainer import NonFiniteLossError, train

__all__ = [
    "CWDConfig",
    "Combined",
    "DataConfig",
    "DistillConfig",
    "FGFIConfig",
    "FeatureMethod",
    "FrozenTeacher",
    "ICDConfig",
    "LGDConfig",
    "LGDICDConfig",
    "Method",
    "NonFiniteLossError",
    "OptimizerConfig",
    "PKDConfig",
    "Recipe",
    "RunResult",
    "RuntimeConfig",
    "Schedule",
    "ScoreL2Config",
    "StepModule",
    "all_recipes",
    "fitted_recipe",
    "get_recipe",
    "parse_cli",
    "recipe_names",
    "scale_to_batch",
    "sum_losses",
    "train",
    "with_detector",
]
