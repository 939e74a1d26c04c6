"""Where the heads stand in a `model` section: one owner for their fields, and for which of them predicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_seg.config.faults import list_fields

HeadField = tuple[str, Mapping[str, Any]]
"""The dotted field of a head, such as `model.auxiliary_head[1]`, and its config."""


def decode_head_fields(model: Mapping[str, Any]) -> list[HeadField]:
    """The decode head, or the heads of a cascade in their order; empty where none is configured."""
    return list_fields("model.decode_head", model.get("decode_head"))


def auxiliary_head_fields(model: Mapping[str, Any]) -> list[HeadField]:
    """The heads that only add losses; often none."""
    return list_fields("model.auxiliary_head", model.get("auxiliary_head"))


def classifying_head(field: str, head: Mapping[str, Any]) -> HeadField:
    """The head that takes in maps and has the classes: itself, or K-Net's `kernel_generate_head` inside it."""
    inner = head.get("kernel_generate_head")
    return (f"{field}.kernel_generate_head", inner) if isinstance(inner, Mapping) else (field, head)


def classifying_heads(model: Mapping[str, Any]) -> list[HeadField]:
    """The classifying head of every head, decode heads first."""
    return [classifying_head(*head) for head in decode_head_fields(model) + auxiliary_head_fields(model)]


def predicting_head(model: Mapping[str, Any]) -> HeadField:
    """The head whose classes are predicted: the decode head, or the last one of a cascade."""
    return classifying_head(*decode_head_fields(model)[-1])
