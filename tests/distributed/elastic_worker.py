"""One rank of test_elastic_resume.py: trains straight through, and goes on from what other numbers of ranks saved.

Start it with 2 ranks, then with 1 and with 4, then with 2 again, all on the same folder; what a start can read decides
what it does. Usage: elastic_worker.py OUTPUT_FOLDER NAME_OF_THIS_START
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

import torch

from cases import ALL, CASES
from ds_seg import distributed
from ds_seg.checkpoint import resharding
from ds_seg.checkpoint.shards import SavedShards
from ds_seg.engine.engines import own_stretch
from sharded_trainer import ShardedTrainer, Training

OUT, START = Path(sys.argv[1]), sys.argv[2]
FIRST_SAVE, SECOND_SAVE, STEPS = 3, 5, 8
RECIPE = CASES[ALL].replace(steps=STEPS, accumulation=2, bad_steps=(1, 4))
RECIPES = {"fp32": RECIPE, "bf16": RECIPE.replace(bf16=True)}
MANY_SUB_GROUPS = {"sub_group_size": 20000}  # their ends differ between world sizes
OFFLOADED = {"1 offloaded": 1.0, "1 partly offloaded": 0.5}
HAS_COMPILER = shutil.which("c++") is not None  # DeepSpeed compiles its CPU optimizer when it is first used


def build(precision: str, name: str) -> ShardedTrainer:
    offloaded = OFFLOADED.get(name.rpartition(" -> ")[2], 0.0)
    return ShardedTrainer(RECIPES[precision].replace(offloaded=offloaded), OUT / precision / name, **MANY_SUB_GROUPS)


def report(trainer: ShardedTrainer) -> Training:
    """Beside what was trained: what DeepSpeed and the run counted."""
    engine = trainer.engines.backbone
    counters = {"engine": [engine.global_steps, engine.skipped_steps], "state": vars(trainer.state)}
    sub_groups = len(engine.optimizer.fp32_partitioned_groups_flat)
    return trainer.report() | counters | {"sub_groups": sub_groups}


def train_through(precision: str) -> Training:
    """The run that is never interrupted; what it saves on its way is for other starts."""
    trainer = build(precision, f"{distributed.world_size()}")
    trainer.train(FIRST_SAVE)
    trainer.save()
    trainer.train(STEPS)
    return report(trainer)


def go_on(precision: str, came_from: str, step: int, kind: str = "", save: bool = False) -> Training:
    """Resume what `came_from` saved at a step; save once more on the way if asked to."""
    trainer = build(precision, f"{came_from} -> {kind or distributed.world_size()}")
    trainer.resume(OUT / precision / came_from / "checkpoints" / f"step_{step:06d}")
    if save:
        trainer.train(SECOND_SAVE)
        trainer.save()
    trainer.train(STEPS)
    return report(trainer)


def rates_of_the_first_group() -> AbstractContextManager:
    """What DeepSpeed's own conversion does (TRAP 23)."""

    def load(saved: SavedShards, engines: resharding.Engines) -> None:
        resharding_load(saved, engines)
        groups = engines.param_groups
        for group in groups:
            group.update(base_lr=groups[0]["base_lr"], weight_decay=groups[0]["weight_decay"])

    resharding_load = resharding.load_backbone
    return mock.patch("ds_seg.checkpoint.load.load_backbone", load)


def steps_counted_twice() -> AbstractContextManager:
    real = SavedShards.optimizer_steps.fget
    return mock.patch.object(SavedShards, "optimizer_steps", property(lambda self: 2 * real(self)))


def moments_swapped() -> AbstractContextManager:
    read, swapped = SavedShards.read, {"exp_avg": "exp_avg_sq", "exp_avg_sq": "exp_avg"}

    def read_other(self: SavedShards, name: str, what: str, *stretch: int) -> torch.Tensor:
        value = read(self, name, swapped.get(what, what), *stretch)
        return value.abs() if what == "exp_avg_sq" else value

    return mock.patch.object(SavedShards, "read", read_other)


def shards_of_the_next_rank() -> AbstractContextManager:
    def next_stretch(parameter: torch.nn.Parameter) -> tuple[int, int]:
        with mock.patch.object(distributed, "rank", lambda: (rank() + 1) % distributed.world_size()):
            return own_stretch(parameter)

    rank = distributed.rank
    return mock.patch.object(resharding, "own_stretch", next_stretch)


MUTATIONS: dict[str, Callable[[], AbstractContextManager]] = {
    "rates of the first group": rates_of_the_first_group,
    "steps counted twice": steps_counted_twice,
    "moments swapped": moments_swapped,
    "shards of the next rank": shards_of_the_next_rank,
}


def start_again(precision: str) -> dict[str, Training]:
    """The second start of two ranks: what one and four ranks saved, from the beginning and from a resume."""
    done = {f"{world} -> 2": go_on(precision, f"{world}", FIRST_SAVE) for world in (1, 4)}
    if precision == "bf16":
        return done
    worlds = [1, 4, *OFFLOADED] if HAS_COMPILER else [1, 4]
    done |= {f"2 -> {world} -> 2": go_on(precision, f"2 -> {world}", SECOND_SAVE) for world in worlds}
    for name, apply in MUTATIONS.items():
        with apply():
            done[name] = go_on(precision, "4", FIRST_SAVE)
    return done


def start_first(precision: str) -> dict[str, Training]:
    world = distributed.world_size()
    done = {f"{world}": train_through(precision)}
    if world != 2:
        done[f"2 -> {world}"] = go_on(precision, "2", FIRST_SAVE, save=True)
    if world == 1 and precision == "fp32" and HAS_COMPILER:
        done |= {f"2 -> {kind}": go_on(precision, "2", FIRST_SAVE, kind, save=True) for kind in OFFLOADED}
    return done


def main() -> None:
    distributed.initialize()
    again = (OUT / "fp32" / "4").exists() and distributed.world_size() == 2
    done = {precision: start_again(precision) if again else start_first(precision) for precision in RECIPES}
    if distributed.is_main():
        torch.save(done, OUT / f"{START}.pt")
    distributed.barrier()
    distributed.shutdown()


if __name__ == "__main__":
    main()
