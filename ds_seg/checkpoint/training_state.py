"""What a run has to remember beside weights and optimizers, and what a checkpoint must agree with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ds_seg.checkpoint.manifest import verify_file
from ds_seg.config import RunConfig
from ds_seg.data.bad_samples import BadSample
from ds_seg.data.left_out import BatchRange, leave_out
from ds_seg.errors import CheckpointError

if TYPE_CHECKING:
    from ds_seg.engine.engines import Engines

STATE_FILE = "state.json"


@dataclass(frozen=True)
class Rollback:
    """A return to a checkpoint, after which the batches of some steps are left out of the stream."""

    to_step: int
    """Of the checkpoint."""
    first_bad_step: int
    """First step, from 0, whose loss or gradient was not finite; the batches are those it had at that time."""
    last_bad_step: int


@dataclass
class TrainingState:
    """Where a run stands. All noise and data of step k come from (seed, k), so no RNG state is needed."""

    step: int = 0
    """Global batches consumed: the data position."""
    scheduled_steps: int = 0
    """Steps that were not skipped: the position of the schedule."""
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    """Of them, those since the last one that was not skipped."""
    best_score: float | None = None
    best_metric: str | None = None
    """Which score that is."""
    best_checkpoint: str | None = None
    evaluation_due: bool = False
    """Whether the evaluation after this step is still to be made."""
    train_images: int | None = None
    """Samples of the training set, whose order follows from their number."""
    bad_samples: list[BadSample] = field(default_factory=list)
    """Replaced because their files could not be read."""
    rollbacks: list[Rollback] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Take lists of dicts too, as a state file has them."""
        self.bad_samples = [bad if isinstance(bad, BadSample) else BadSample(**bad) for bad in self.bad_samples]
        self.rollbacks = [one if isinstance(one, Rollback) else Rollback(**one) for one in self.rollbacks]

    def note_train_images(self, count: int) -> None:
        """Remember the number of training images, which the order of the stream follows from.

        Raises:
            CheckpointError: it is another one than in the run that is resumed.
        """
        if self.train_images not in (None, count):
            raise CheckpointError(
                f"The run to resume drew its data from {self.train_images} training images, but there are "
                f"{count} here: every sample from now on would be another one. Bring the images back (a file "
                "that can't be read may stay, with data.max_bad_samples), or start a new run from its "
                "weights with --load-from."
            )
        self.train_images = count

    @property
    def left_out(self) -> list[BatchRange]:
        """Global batches that no step trains on."""
        ranges: list[BatchRange] = []
        for rollback in self.rollbacks:
            ranges = leave_out(ranges, rollback.first_bad_step, rollback.last_bad_step)
        return ranges


def describe_model(backbone: nn.Module, heads: nn.Module) -> dict[str, dict[str, list[int]]]:
    """Names and full shapes of all parameters of both parts (and of the heads' buffers)."""
    shapes = {name: list(getattr(p, "ds_shape", p.shape)) for name, p in backbone.named_parameters()}
    return {"backbone": shapes, "heads": {name: list(p.shape) for name, p in heads.state_dict().items()}}


def describe_state(state: TrainingState, run: RunConfig, engines: Engines, *, averaged: bool) -> str:
    """The text of a checkpoint's state file; `averaged` if the checkpoint holds averages of the weights."""
    content = {
        "state": asdict(state),
        "seed": run.seed,
        "world_size": run.world_size,
        "micro_batch": run.micro_batch,
        "global_batch": run.global_batch,
        "bf16": run.bf16,
        "backbone_trained": bool(engines.trainable_backbone),
        "averaged": averaged,
        "model": describe_model(engines.backbone.module, engines.heads),
    }
    return json.dumps(content, indent=1)


def restate(folder: Path, state: TrainingState) -> str | None:
    """The text of a checkpoint's state file with another state; None where the checkpoint has no whole one."""
    try:
        content = read_state(folder)
    except CheckpointError:
        return None
    return json.dumps({**content, "state": asdict(state)}, indent=1)


def read_state(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint's state file, also of one from before averages or other scores than mIoU were known.

    Raises:
        CheckpointError: it is missing or not the one that was saved.
    """
    verify_file(folder, STATE_FILE)
    content = {"averaged": False, **json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))}
    state = content.get("state", {})
    if "best_mIoU" in state:
        state |= {"best_score": state.pop("best_mIoU"), "best_metric": "mIoU"}
    return content


def validate_same_model(
    folder: Path, content: Mapping[str, Any], backbone: nn.Module, heads: nn.Module, *, needs_heads: bool = True
) -> None:
    """Compare the checkpoint's parameters with the run's; those of the heads only where they are needed.

    Raises:
        CheckpointError: they are of different models.
    """
    for part, wanted in describe_model(backbone, heads).items():
        got = content["model"][part]
        if got == wanted or (part == "heads" and not needs_heads):
            continue
        name = next(name for name in [*wanted, *got] if got.get(name) != wanted.get(name))
        raise CheckpointError(
            f"Checkpoint {folder} is of another model: {part} parameter '{name}' has shape {got.get(name, 'none')} "
            f"there and {wanted.get(name, 'none')} in this config ({len(got)} against {len(wanted)} tensors). "
            "Use the config that the checkpoint was trained with: it lies beside it as ../../config.py."
        )


def validate_same_run(
    folder: Path, content: Mapping[str, Any], run: RunConfig, engines: Engines, *, averaged: bool
) -> None:
    """Compare what an exact resume needs: batch, seed, precision, what is trained and averaged.

    The number of processes may be another one: their parts are put together anew.

    Raises:
        CheckpointError: naming each difference and its remedy.
    """
    wanted = {
        "global_batch": run.global_batch,
        "seed": run.seed,
        "bf16": run.bf16,
        "backbone_trained": bool(engines.trainable_backbone),
        "averaged": averaged,
    }
    differing = [f"{key}: {content[key]} there, {value} here" for key, value in wanted.items() if content[key] != value]
    if differing:
        averages = " (averaged: an EMAHook in custom_hooks)" if content["averaged"] != averaged else ""
        raise CheckpointError(
            f"Checkpoint {folder} can't be resumed exactly by this run: {'; '.join(differing)}. Resume with the same "
            f"values{averages}, or start a new run from its weights with --load-from."
        )


def validate_same_rates(folder: Path, saved: Iterable[Mapping[str, Any]], groups: Iterable[Mapping[str, Any]]) -> None:
    """Compare the base rate and the weight decay of every parameter, which stay those of the run.

    Args:
        folder: of the checkpoint, for messages.
        saved: parameter groups of the checkpoint's optimizers.
        groups: those of the run's.

    Raises:
        CheckpointError: naming the first parameter whose rate or decay differs.
    """
    got, wanted = (
        {name: _describe_rates(group) for group in part for name in group["names"]} for part in (saved, groups)
    )
    differing = [name for name in {**wanted, **got} if got.get(name) != wanted.get(name)]
    if differing:
        name = differing[0]
        there, here = (part.get(name, "not trained") for part in (got, wanted))
        raise CheckpointError(
            f"Checkpoint {folder} can't be resumed exactly by this run: {len(differing)} parameters are trained in "
            f"another way, the first is {name}: {there} there, {here} here. Freeze the same parts and use the same "
            "optimizer section (config.py in the checkpoint's work dir has both), or start a new run from its weights "
            "with --load-from."
        )


def _describe_rates(group: Mapping[str, Any]) -> str:
    """All that a config says of a group; the backbone's share betas and eps with the heads', whose groups tell them."""
    text = f"lr {group['base_lr']!r}, weight decay {group['weight_decay']!r}"
    return f"{text}, betas {tuple(group['betas'])}, eps {group['eps']!r}" if "betas" in group else text
