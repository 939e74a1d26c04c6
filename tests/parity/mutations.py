"""Deliberate mistakes: each is put into the running engines for one training, which a named test must then refuse."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from cases import ALL, CASES, PARTLY_OFFLOADED, UNCLIPPED
from ds_seg import distributed
from ds_seg.config import ScheduleSettings
from ds_seg.engine import engines, gradients, groups
from ds_seg.engine import step as step_module
from ds_seg.engine.step import TwoEngineStep
from ds_seg.engine.zero3 import JointNormZero3
from ds_seg.models import internvit
from ds_seg.models.heads import SegmentationHeads
from ds_seg.models.sync_batchnorm import SyncBatchNorm
from recipe import Recipe
from sharded_trainer import Training, train_sharded


@dataclass(frozen=True)
class Mutation:
    """One mistake, the case that shows it, and the test that must fail with it."""

    name: str
    case: str
    caught_by: str
    apply: Callable[[], AbstractContextManager[Any]]

    def train(self) -> Training:
        """Train the case with the mistake in place."""
        with self.apply():
            return train_sharded(CASES[self.case])


def patched(owner: Any, attribute: str, make: Callable[[Callable], Callable]) -> Callable[[], AbstractContextManager]:
    """A context in which `owner.attribute` is what `make` returns for the real one."""
    return lambda: mock.patch.object(owner, attribute, make(getattr(owner, attribute)))


def clip_each_engine(step: Callable) -> Callable:
    def step_apart(self: TwoEngineStep, norm: float, _factor: float) -> None:
        both = self.engines
        square = gradients.backbone_squared_norm(both.backbone, both.device)
        squares = (
            distributed.reduce_sum(square.reshape(1)),
            gradients.head_squared_norm(both.head_parameters, both.device),
        )
        factors = [gradients.clip_factor(square.item() ** 0.5, CASES[ALL].clip_norm) for square in squares]
        gradients.scale_gradients(both.head_parameters, factors[1] / factors[0])
        step(self, norm, factors[0])

    return step_apart


def leave_out_clipping(suit: Callable) -> Callable:
    return lambda *args: {key: value for key, value in suit(*args).items() if key != "gradient_clipping"}


def give_all_groups_one_rate(set_rates: Callable) -> Callable:
    def set_one(schedule: ScheduleSettings, param_groups: list[dict[str, Any]], step: int) -> None:
        leader = {"base_lr": Recipe().lr}
        set_rates(schedule, [leader], step)
        for group in param_groups:
            group["lr"] = leader["lr"]

    return set_one


def multiply_head_gradients(factor: float) -> Callable[[Callable], Callable]:
    def make(measure: Callable) -> Callable:
        def measure_multiplied(parameters: list, device: torch.device) -> torch.Tensor:
            for parameter in parameters:
                parameter.grad.mul_(factor)
            return measure(parameters, device)

        return measure_multiplied

    return make


def move_schedule_when_skipping(train_step: Callable) -> Callable:
    def train_as_if_none_was_skipped(self: TwoEngineStep, step: int, batches: list, *, scheduled_steps: int) -> Any:
        return train_step(self, step, batches, scheduled_steps=step)

    return train_as_if_none_was_skipped


def step_head_when_skipping(skip: Callable) -> Callable:
    def skip_backbone_only(self: TwoEngineStep) -> None:
        if all(parameter.grad.isfinite().all() for parameter in self.engines.head_parameters):
            self.engines.head_optimizer.step()
        skip(self)

    return skip_backbone_only


def number_blocks_from_zero(layer_id: Callable) -> Callable:
    return lambda name, depth: max(layer_id(name, depth) - ("blocks." in name), 0)


def drop_class_position(embed: Callable) -> Callable:
    def embed_without(self: internvit.InternViT, images: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        x_BND = embed(self, images, grid)
        return torch.cat([x_BND[:, :1] - self.pos_embed[:, :1].to(x_BND.dtype), x_BND[:, 1:]], dim=1)

    return embed_without


def drop_paths_of_the_first_sample(draw: Callable) -> Callable:
    def draw_for_all(*args: Any) -> torch.Tensor:
        scales_L2B = draw(*args)
        return scales_L2B[:, :, :1].expand_as(scales_L2B)

    return draw_for_all


def round_statistics(update: Callable) -> Callable:
    def update_rounded(self: SyncBatchNorm, *args: Any) -> None:
        update(self, *args)
        for statistic in (self.running_mean, self.running_var):
            statistic.copy_(statistic.bfloat16())

    return update_rounded


def take_deepspeeds_second_optimizer(optimizer_of: Callable) -> Callable:
    def take(self: JointNormZero3, sub_group_id: int) -> torch.optim.Optimizer:
        optimizer = optimizer_of(self, sub_group_id)
        return self.backup_optimizer if optimizer is self.resident_optimizer else optimizer

    return take


@contextlib.contextmanager
def round_head() -> Iterator[None]:
    """Parameters that would not survive a cast are those that a bf16 head has."""
    real = SegmentationHeads.forward

    def forward(self: SegmentationHeads, *args: Any) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(parameter.bfloat16())
        return real(self, *args)

    with mock.patch.object(SegmentationHeads, "forward", forward):
        yield


PARAMETERS = "test_parameters_equal_plain_training"
STATISTICS = "test_running_statistics_equal_plain_training"
LOSSES = "test_losses_equal_plain_training"
NORMS = "test_gradient_norms_equal_plain_training"
CLIPPING, ACCUMULATION, BAD = "clipping that bites on some steps", "accumulation 3", "two bad batches"
_MISTAKES = (
    Mutation(
        "each engine clips by its own norm",
        ALL,
        PARAMETERS,
        patched(TwoEngineStep, "_step", clip_each_engine),
    ),
    Mutation(
        "DeepSpeed clips the backbone as its own default has it",
        UNCLIPPED,
        PARAMETERS,
        patched(engines, "suit_device", leave_out_clipping),
    ),
    Mutation(
        "head gradients summed over ranks, not averaged",
        CLIPPING,
        NORMS,
        patched(step_module, "head_squared_norm", multiply_head_gradients(2.0)),
    ),
    Mutation(
        "head's loss not divided by the accumulation count",
        ACCUMULATION,
        NORMS,
        patched(step_module, "head_squared_norm", multiply_head_gradients(3.0)),
    ),
    Mutation(
        "schedule moves on a skipped step",
        BAD,
        PARAMETERS,
        patched(TwoEngineStep, "__call__", move_schedule_when_skipping),
    ),
    Mutation(
        "head steps when the backbone skips",
        BAD,
        LOSSES,
        patched(TwoEngineStep, "_skip", step_head_when_skipping),
    ),
    Mutation(
        "layer ids off by one", "layer decay 0.6", PARAMETERS, patched(groups, "layer_id", number_blocks_from_zero)
    ),
    Mutation(
        "one learning rate everywhere",
        "layer decay 0.6",
        PARAMETERS,
        patched(ScheduleSettings, "set_rates", give_all_groups_one_rate),
    ),
    Mutation(
        "BatchNorm not synchronised",
        "AdamW and drop path",
        STATISTICS,
        patched(SyncBatchNorm, "_must_reduce", lambda _must: lambda _self: False),
    ),
    Mutation(
        "class token without its position",
        "AdamW and drop path",
        LOSSES,
        patched(internvit.InternViT, "_embed", drop_class_position),
    ),
    Mutation(
        "running statistics in bf16",
        "AdamW and drop path",
        STATISTICS,
        patched(SyncBatchNorm, "_update_running_statistics", round_statistics),
    ),
    Mutation(
        "drop path not per sample",
        "AdamW and drop path",
        LOSSES,
        patched(internvit, "draw_branch_scales", drop_paths_of_the_first_sample),
    ),
    Mutation(
        "what is not offloaded is stepped by the optimizer that DeepSpeed makes for it",
        PARTLY_OFFLOADED,
        PARAMETERS,
        patched(JointNormZero3, "optimizer_of", take_deepspeeds_second_optimizer),
    ),
    Mutation("head in bf16", "AdamW and drop path", PARAMETERS, round_head),
)
MUTATIONS = [mistake for mistake in _MISTAKES if mistake.case in CASES]
