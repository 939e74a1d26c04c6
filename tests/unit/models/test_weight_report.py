from __future__ import annotations

from ds_seg.models.weight_report import format_rate, summarise_names


def test_a_rate_for_people():
    assert format_rate(3 << 20, 2.0) == "3.0 MiB in 2.0 s, 2 MiB/s"


def test_names_are_summarised():
    names = [f"blocks.{i}.norm1.weight" for i in range(3)] + ["up1.0.bias"]
    assert summarise_names(names) == "blocks.N.norm1.weight (x3), up1.N.bias"
    assert summarise_names([]) == "none"
    assert summarise_names([f"{letter}.weight" for letter in "abcdefghij"]).endswith(", and 2 more kinds")
