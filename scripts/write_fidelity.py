"""Run the tests that compare with other implementations and write docs/fidelity.md from what they measured.

Usage: python scripts/write_fidelity.py [ROWS]

Every row is a test that passed in that run; nothing else gets into the page. ROWS is the file of an earlier whole run
(`.pytest_cache/v/ds_seg/fidelity`), to write the page without running the tests again.
"""

from __future__ import annotations

import datetime

import matplotlib
from measured_page import ROOT, Row, describe_place, read_or_measure

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PAGE = ROOT / "docs" / "fidelity.md"
PICTURE = ROOT / "docs" / "images" / "fidelity_bf16.png"
PACKAGES = ("torch", "deepspeed", "mmcv-full", "mmsegmentation", "transformers")

INTRODUCTION = """# Fidelity

The sharded trainer compared with plain PyTorch and with independent implementations. This page is written by
`scripts/write_fidelity.py` from the values that `pytest tests/parity tests/distributed/test_elastic_resume.py`
measured; each row is a test that passed.
{when}, {where}.

The reference (`tests/parity/plain_trainer.py`, `plain_model.py`) is one process of plain PyTorch with a vision
transformer of its own: `nn.BatchNorm2d` over the whole global micro-batch, `clip_grad_norm_` over all parameters, one
AdamW with a rate for each parameter. The engines train on the same global batches, on 1, 2 and 4 processes (gloo, real
ZeRO-3).

- *Losses* and *gradient norms*: the largest relative difference in any step.
- *Parameters*: the norm of the difference over the norm of what training changed, over all parameters of backbone and
  head at once.
- *The worst parameter*: the same for the tensor that differs most. It is `patch_embed.proj.bias`: the BatchNorm of the
  head nearly undoes an equal shift of all patches, so its gradient is a small difference of large numbers, and AdamW
  divides by its size. The section on FP64 shows that plain PyTorch's own rounding does the same.
- *Running statistics*: the largest difference over the largest value of each tensor.

![Loss of 200 steps in bf16](images/fidelity_bf16.png)
"""


def main() -> None:
    """Write the page and its picture."""
    rows = read_or_measure("fidelity", "tests/distributed/test_elastic_resume.py", "tests/parity")
    (curves,) = (row["curves"] for row in rows if row["kind"] == "curves")
    draw_curves(curves)
    parts = [INTRODUCTION.format(when=datetime.date.today().isoformat(), where=describe_place(PACKAGES))]
    parts += format_claims([row for row in rows if row["kind"] == "claim"])
    parts.append(format_mutations([row for row in rows if row["kind"] == "mutation"]))
    PAGE.write_text("\n".join(parts), encoding="utf-8")
    print(f"wrote {PAGE} from {len(rows)} rows")


def format_claims(rows: list[Row]) -> list[str]:
    """One section a test function, in the order in which they ran."""
    sections: dict[str, list[Row]] = {}
    for row in rows:
        sections.setdefault(name_function(row["test"]), []).append(row)
    return [format_section(name, members) for name, members in sections.items()]


def format_section(name: str, rows: list[Row]) -> str:
    """A table of what was compared (rows) and on how many processes (columns)."""
    worlds = sorted({row["world"] for row in rows if row["world"]})
    against = sorted({row["against"] for row in rows})
    columns = [f"{world} process{'es' if world > 1 else ''}" for world in worlds] or ["measured"]
    lines = [f"## {name}", "", f"Against {'; '.join(against)}.", ""]
    lines += [f"| | {' | '.join(columns)} | allowed |", f"|---|{'---|' * len(columns)}---|"]
    by_text: dict[str, dict[int | None, Row]] = {}
    for row in rows:
        by_text.setdefault(row["text"], {})[row["world"]] = row
    for text, cells in by_text.items():
        values = [f"{cells[w]['measured']:.1e}" if w in cells else "" for w in worlds or [None]]
        allowed = max(row["tolerance"] for row in cells.values())
        lines.append(f"| {text} | {' | '.join(values)} | {allowed:.0e} |")
    return "\n".join([*lines, ""])


def format_mutations(rows: list[Row]) -> str:
    """Which deliberate mistake was caught by which test, and by what margin."""
    lines = ["## Deliberate mistakes", "", "Each is put into the running code by the tests and must be refused.", ""]
    lines += ["| mistake | caught by | measured | allowed |", "|---|---|---|---|"]
    lines += [
        f"| {row['text']} | `{row['by']}` | {row['measured']:.1e} | {row['tolerance']:.0e} |"
        for row in sorted(rows, key=lambda row: row["test"].partition("[")[0])
    ]
    return "\n".join([*lines, ""])


def name_function(test: str) -> str:
    """`a/test_b.py::test_losses_equal[x]` as `Losses equal`."""
    words = test.rpartition("::")[2].partition("[")[0].removeprefix("test_").replace("_", " ")
    return (words[0].upper() + words[1:]).replace("Bf16", "bf16").replace("fp", "FP")


def draw_curves(curves: dict[str, list[float]]) -> None:
    """The loss curves side by side, and each one's distance from the first bf16 one below."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    reference = curves["plain PyTorch, bf16"]
    for index, (name, losses) in enumerate(curves.items()):
        top.plot(losses, label=name, color=f"C{index}", linewidth=5 - 1.4 * index)
        if losses is not reference:
            far = [abs(a - b) / b for a, b in zip(losses, reference, strict=True)]
            bottom.plot(far, label=name, color=f"C{index}", linewidth=1)
    top.set_ylabel("loss")
    top.legend()
    bottom.set_yscale("log")
    bottom.set_ylabel("relative distance from\nplain PyTorch, bf16")
    bottom.set_xlabel("step")
    bottom.legend()
    figure.savefig(PICTURE, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
