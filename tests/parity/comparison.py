"""How far two trainings lie apart, and how far they may."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

LOSS_TOLERANCE = 5e-6
NORM_TOLERANCE = 5e-6
PARAMETERS_TOLERANCE = 1e-4
WORST_TENSOR_TOLERANCE = 2e-3
STATISTICS_TOLERANCE = 1e-3
Weights = Mapping[str, torch.Tensor]


def compare_curves(got: Iterable[float], wanted: Iterable[float]) -> float:
    """The largest relative difference between two curves."""
    return max(abs(a - b) / abs(b) for a, b in zip(got, wanted, strict=True))


def compare_parameters(got: Weights, wanted: Weights, initial: Weights) -> float:
    """All parameters at once: the norm of the difference over the norm of what training changed."""
    names = parameter_names(wanted)
    got_N, wanted_N, initial_N = (
        torch.cat([w[name].double().flatten() for name in names]) for w in (got, wanted, initial)
    )
    return ((got_N - wanted_N).norm() / (wanted_N - initial_N).norm()).item()


def compare_worst_tensor(got: Weights, wanted: Weights, initial: Weights) -> float:
    """The same measure for the parameter that lies farthest apart."""
    return max(compare_parameters({n: got[n]}, {n: wanted[n]}, {n: initial[n]}) for n in parameter_names(wanted))


def compare_statistics(got: Weights, wanted: Weights) -> float:
    """Running means and variances: the largest difference over the largest value of each."""
    names = [name for name in wanted if "running" in name]
    return max(((got[n] - wanted[n]).abs().max() / wanted[n].abs().max()).item() for n in names)


def parameter_names(weights: Weights) -> list[str]:
    """What the optimizers move, in a fixed order."""
    return sorted(name for name in weights if "running" not in name and "num_batches" not in name)
