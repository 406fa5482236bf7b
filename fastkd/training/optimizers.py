"""The optimisers of a run: their parameters, learning rates, and state as named tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastkd.training.config import Recipe
from fastkd.training.optimizer_config import OptimizerConfig
from fastkd.training.schedule import learning_rate


class NamedOptimizer:
    """A torch optimiser with the names of its parameters, so that its state can be stored as plain tensors.

    Args:
        name: "student", "method" or the name of one of several methods; prefix of its log entries.
        config: kind, rate and decay.
        parameters: name -> parameter, including those that get no gradient in some phases.
    """

    def __init__(self, name: str, config: OptimizerConfig, parameters: dict[str, nn.Parameter]):
        self.name = name
        self.config = config
        self.parameters = parameters
        plain = [p for p in parameters.values() if p.ndim <= 1 and not config.decay_norm_and_bias]
        kept = {id(p) for p in plain}
        groups: list[dict[str, Any]] = [{"params": [p for p in parameters.values() if id(p) not in kept]}]
        groups += [{"params": plain, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        fused = all(p.device.type in ("cpu", "cuda") for p in parameters.values())  # one kernel for all parameters
        if config.kind == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
                groups,
                lr=config.learning_rate,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
                fused=fused,
            )
            # The fused kernel needs all momentum buffers to exist; starting from zero gives the same first step.
            for parameter in parameters.values() if config.momentum > 0 else ():
                self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
        else:
            self.optimizer = torch.optim.AdamW(
                groups, lr=config.learning_rate, weight_decay=config.weight_decay, fused=fused
            )

    def set_rate(self, step: int, steps: int) -> float:
        """Sets and returns the learning rate of a step."""
        rate = learning_rate(self.config, step, steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def step(self) -> Tensor:
        """Clips the gradients, updates, and drops them; returns the norm before clipping, without a device sync."""
        present = [p for p in self.parameters.values() if p.grad is not None]
        limit = self.config.clip_norm
        with torch.no_grad():
            norm = nn.utils.get_total_norm([p.grad for p in present if p.grad is not None])
            if limit is not None and present:
                nn.utils.clip_grads_with_norm_(present, limit, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """The optimiser's state, "<name>/<parameter>/<entry>" -> tensor."""
        return {
            f"{self.name}/{parameter_name}/{entry}": value
            for parameter_name, parameter in self.parameters.items()
            for entry, value in self.optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restores the state returned by `tensors`; entries of other optimisers are ignored.

        Raises: ValueError for a parameter that is not in this optimiser.
        """
        for key, value in tensors.items():
            owner, parameter_name, entry = key.split("/")
            if owner != self.name:
                continue
            if parameter_name not in self.parameters:
                raise ValueError(f"resume: optimizer state must be of the model's parameters, got {parameter_name}")
            parameter = self.parameters[parameter_name]
            if entry == "step":  # the fused optimiser keeps it on the parameter's device
                value = value.to(parameter.device)
            else:
                value = torch.empty_like(parameter, requires_grad=False).copy_(value)
            self.optimizer.state[parameter][entry] = value


def build_optimizers(recipe: Recipe, module: nn.Module) -> list[NamedOptimizer]:
    """The optimisers of a StepModule: the student's, and the separate ones of the method or its parts.

    The student's optimiser takes every trainable parameter that no separate optimiser takes.
    """
    parts = recipe.method.optimizers(recipe.method_optimizer) if recipe.method is not None else {}
    own = {f"distiller.{prefix}": optimizer for prefix, optimizer in parts.items()}
    student = {name: p for name, p in module.named_parameters() if p.requires_grad}
    found = []
    for prefix, (owner, config) in own.items():
        parameters = {name: p for name, p in student.items() if name.startswith(prefix)}
        if config is not None and parameters:
            student = {name: p for name, p in student.items() if name not in parameters}
            found.append(NamedOptimizer(owner, config, parameters))
    return [NamedOptimizer("student", recipe.optimizer, student), *found]
