"""AdamW of both engines: torch's or DeepSpeed's own, at a rate for each layer without a DeepSpeed group for each.

DeepSpeed makes at least one sub-group of every parameter group. A step then reduces a norm, flattens gradients and
calls the whole optimizer once for each of them, which with a hundred groups takes longer than the arithmetic. So
the backbone's optimizer shows DeepSpeed one group, and cuts each flat tensor that it is given to step into the
stretches of equal rate and weight decay. The arithmetic on them is the optimizer's own, bit for bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch import nn

from ds_seg.config import OptimizerSettings

RATE_GROUPS = "rate_groups"
"""Key in DeepSpeed's one group: rate, weight decay, description and names of each group that is stepped."""

Group = dict[str, Any]


def build_adamw(groups: list[Group], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Torch's fused AdamW, with one set of betas for all groups."""
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def build_backbone_adamw(groups: list[Group], settings: OptimizerSettings, *, offloaded: bool) -> torch.optim.Optimizer:
    """AdamW to be handed to DeepSpeed ZeRO-3: one group for DeepSpeed, stepped as all of `groups`.

    Args:
        groups: what `build_param_groups` returns.
        settings: the rates that are the same everywhere.
        offloaded: whether DeepSpeed keeps the optimizer's state in host memory.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    rate_groups = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    whole: list[Group] = [{"params": parameters, RATE_GROUPS: rate_groups}]
    if offloaded:
        optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(
            whole, lr=settings.lr, betas=settings.betas, eps=settings.eps, adamw_mode=True
        )
    else:
        optimizer = build_adamw(whole, settings)
    _StepByRate(optimizer, parameters, [index for index, group in enumerate(groups) for _ in group["params"]])
    return optimizer


def build_resident_adamw(
    offloaded: torch.optim.Optimizer, groups: list[Group], settings: OptimizerSettings
) -> torch.optim.Optimizer:
    """A second AdamW for what stays on the GPU where a part of the optimizer's state is offloaded.

    It has the rates and the state of the first one, so that a schedule and a checkpoint know of one optimizer.

    Args:
        offloaded: what `build_backbone_adamw` returned, and DeepSpeed was given.
        groups: as it was given.
        settings: as it was given.
    """
    resident = build_backbone_adamw(groups, settings, offloaded=False)
    resident.state = offloaded.state
    resident.param_groups[0].update({"params": [], RATE_GROUPS: offloaded.param_groups[0][RATE_GROUPS]})
    return resident


class _StepByRate:
    """Hooks around `optimizer.step` that put the rate groups in the place of DeepSpeed's one group.

    Between steps, and in checkpoints, the optimizer's state belongs to DeepSpeed's flat tensors.

    Args:
        optimizer: with one parameter group, which holds RATE_GROUPS.
        parameters: of the group, in its order.
        rate_group: index of each one's rate group.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], rate_group: Sequence[int]
    ) -> None:
        self.parameters, self.rate_group = parameters, rate_group
        self._stretches: dict[str, list[tuple[int, int]]] = {}
        self._whole: list[Group] = []
        self._pieces: list[torch.Tensor] = []
        optimizer.register_step_pre_hook(self._cut)
        optimizer.register_step_post_hook(self._join)

    def _cut(self, optimizer: torch.optim.Optimizer, _args: tuple, _kwargs: dict) -> None:
        """Let the coming step see the pieces of the flat tensor in the groups of their rates."""
        ((group,), ((flat,),)) = optimizer.param_groups, [group["params"] for group in optimizer.param_groups]
        rate_groups, sizes = zip(*self._find_stretches(flat), strict=True)
        self._whole, self._pieces = optimizer.param_groups, list(flat.detach().split(sizes))
        shared = {key: value for key, value in group.items() if key != RATE_GROUPS}
        optimizer.param_groups = [
            {**shared, **group[RATE_GROUPS][index], "params": [piece]}
            for index, piece in zip(rate_groups, self._pieces, strict=True)
        ]
        for piece, gradient in zip(self._pieces, flat.grad.split(sizes), strict=True):
            piece.grad = gradient
        cut = {key: _cut_state(value, sizes) for key, value in optimizer.state[flat].items()}
        for index, piece in enumerate(self._pieces):
            optimizer.state[piece] = {key: values[index] for key, values in cut.items()}

    def _join(self, optimizer: torch.optim.Optimizer, _args: tuple, _kwargs: dict) -> None:
        """Give the group and the state back to the flat tensor."""
        optimizer.param_groups = self._whole
        (flat,) = self._whole[0]["params"]
        states = [optimizer.state.pop(piece) for piece in self._pieces]
        self._pieces = []  # they hold the gradient, which DeepSpeed frees now
        state = optimizer.state[flat]
        for key, first in states[0].items():
            if not isinstance(first, torch.Tensor):
                state[key] = first
            elif first.dim() == 0:
                state[key] = first.clone()
            elif key not in state:  # made by this first step; later ones write through the pieces
                state[key] = torch.cat([piece[key] for piece in states])

    def _find_stretches(self, flat: torch.Tensor) -> list[tuple[int, int]]:
        """(index of the rate group, elements) of each stretch of a flat tensor, in order.

        DeepSpeed 0.19.8 names a flat tensor by the ids of the first and the last parameter in it.
        """
        name = flat.ds_id  # type: ignore[attr-defined]
        if name not in self._stretches:
            positions = {parameter.ds_id: i for i, parameter in enumerate(self.parameters)}  # type: ignore[attr-defined]
            first, last = (positions[int(part)] for part in name.split("_"))
            inside = range(first, last + 1)
            stretches = [
                (index, sum(self.parameters[i].partition_numel() for i in members))  # type: ignore[operator]
                for index, members in itertools.groupby(inside, key=lambda i: self.rate_group[i])
            ]
            total = sum(size for _, size in stretches)
            assert total == flat.numel(), f"flat tensor {name} has {flat.numel()} elements, its parameters {total}"
            self._stretches[name] = stretches
        return self._stretches[name]


def _cut_state(value: Any, sizes: Sequence[int]) -> Sequence[Any]:
    """A moment by pieces, views of it; or a step count for each piece, a tensor of its own that it may advance."""
    if not isinstance(value, torch.Tensor):
        return [value] * len(sizes)
    return value.split(sizes) if value.dim() else value.repeat(len(sizes)).unbind()
