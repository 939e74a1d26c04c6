"""Try micro-batches, checkpointing policies and offloading; the cheapest that fits is recommended."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from ds_seg.config import RunConfig
from ds_seg.config.zero_sizes import LIVE_SIZES, settle_zero_sizes
from ds_seg.models.checkpointing import AUTO, POLICIES, resolve_policy
from ds_seg.planning.candidates import OFFLOAD, Batch, Candidate, build_candidate, with_offload
from ds_seg.planning.hardware import Hardware, place
from ds_seg.planning.model_size import ModelSize, measure_model
from ds_seg.planning.step_costs import Known, StepCosts

_PARTS = tuple(twentieths / 20 for twentieths in range(1, 20))
"""Shares of the optimizer's state that may be offloaded, beside none and all of it."""
_WORLD_SIZES = tuple(2**power for power in range(11))


class Planner:
    """Plans one run for any machines; each micro-batch is simulated once.

    Args:
        run: built for a world of one.
        known: traces that planners of several runs share; None for none.
    """

    def __init__(self, run: RunConfig, known: Known | None = None) -> None:
        self.run, self.known = run, known
        self.size: ModelSize = measure_model(run.model)

    @cached_property
    def costs(self) -> StepCosts:
        """Of micro-batches with each policy that can be chosen."""
        policies = POLICIES if self.size.trainable else (self.configured_policy,)
        return StepCosts(self.run, policies, known=self.known)

    @property
    def configured_policy(self) -> str:
        """What the config asks for; `block` for AUTO."""
        backbone = self.run.model.backbone
        return resolve_policy(backbone.get("checkpointing"), backbone.get("with_cp"))

    def recommend(self, hardware: Hardware) -> Candidate | None:
        """The fastest way that fits, None if none does.

        Of equally fast ones it is that with most of the optimizer on the GPUs, then that with the fewest micro-batches,
        then that with the most memory to spare.
        """
        fitting = [candidate for candidate in self.list_candidates(hardware) if candidate.fits]
        return min(fitting, key=_rank, default=None)

    def find_closest(self, hardware: Hardware) -> Candidate | None:
        """Of the ways that don't fit, the one that lacks the least; None where a step has too few crops for any."""
        return max(self.list_candidates(hardware), key=lambda c: min(c.gpu_spare_gib, c.host_spare_gib), default=None)

    def find_smallest_world(self, hardware: Hardware) -> Candidate | None:
        """The recommendation for the smallest power of two of such GPUs that any way fits on."""
        for gpus in _WORLD_SIZES:
            found = self.recommend(replace(hardware, gpus=gpus, nodes=place(gpus)))
            if found is not None:
                return found
        return None

    def list_candidates(self, hardware: Hardware) -> Iterator[Candidate]:
        """Every way that may be chosen; the batch of a step stays."""
        images, max_steps = self.spread_batch(hardware.gpus)
        for micro_batch in self._list_micro_batches(images // hardware.gpus, hardware.gpus):
            steps = images // hardware.gpus // micro_batch
            batch = Batch(hardware.gpus, micro_batch, steps, max_steps)
            for policy in self.costs.policies:
                build = partial(
                    build_candidate, self.run, self.size, self.costs.of(policy, micro_batch), hardware, batch, policy
                )
                resident = build(with_offload(self.run.deepspeed, None))
                yield resident
                if self.size.trainable:
                    yield from self._offload(build, partly=resident.gpu_spare_gib < 0)

    def rebuild(self, candidate: Candidate, *, live_bytes: float, **zero: int) -> Candidate:
        """The same way with so much memory for whole parameters, whatever the DeepSpeed JSON says of it.

        Args:
            candidate: one of this planner's.
            live_bytes: memory of a GPU for whole parameters.
            zero: other values of `zero_optimization`.
        """
        sizes = settle_zero_sizes(candidate.deepspeed, LIVE_SIZES, self.run.model.backbone, live_bytes)
        sizes["zero_optimization"] = {**sizes["zero_optimization"], **zero}
        run = replace(self.run, auto_sizes=())
        arguments = (candidate.cost, candidate.hardware, candidate.batch, candidate.checkpointing, sizes)
        return build_candidate(run, self.size, *arguments)

    def spread_batch(self, gpus: int) -> tuple[int, int]:
        """Crops and number of steps: the config's, or where its batch can't be spread the next larger and fewer."""
        own = self.run.global_batch
        wanted = own if self.run.mmseg.get("global_batch") is not None else own * gpus
        images = math.ceil(wanted / gpus) * gpus
        return images, math.ceil(self.run.schedule.max_steps * wanted / images)

    def _list_micro_batches(self, images_a_gpu: int, gpus: int) -> list[int]:
        least = self.costs.smallest_alone if gpus == 1 else 1
        return [n for n in range(least, images_a_gpu + 1) if images_a_gpu % n == 0]

    def _offload(self, build: Callable[[Mapping[str, Any]], Candidate], *, partly: bool) -> Iterator[Candidate]:
        """With the optimizer's state in host memory, pinned or not: all of it, and if asked the least that fits."""
        for offload in (OFFLOAD, {**OFFLOAD, "pin_memory": False}):
            parts = (build(with_offload(self.run.deepspeed, {**offload, "ratio": ratio})) for ratio in _PARTS)
            least = next((candidate for candidate in parts if candidate.gpu_spare_gib >= 0), None) if partly else None
            if least is not None:
                yield least
            yield build(with_offload(self.run.deepspeed, offload))


def _rank(candidate: Candidate) -> tuple[float, float, int, float, float]:
    """The smaller the better; times count to two digits, which is more than a prediction is good for."""
    return (
        float(f"{candidate.time.total_s:.2g}"),
        candidate.states.offloaded,
        candidate.batch.accumulation_steps,
        -candidate.gpu_spare_gib,
        candidate.host_gib,
    )


def wants_policy(run: RunConfig) -> bool:
    """Whether the config leaves the checkpointing policy to be chosen."""
    return run.model.backbone.get("checkpointing") == AUTO
