"""The recipes on which sharded and plain training are compared: each knob alone, then all of them together."""

from __future__ import annotations

import shutil

from recipe import Recipe

CLASS_WEIGHTS = (0.5, 1.0, 2.0, 1.0, 0.7, 1.5)
UNCLIPPED = "gradient norms of 4 to 5, not clipped"
CASES = {
    "AdamW and drop path": Recipe(),
    "layer decay 0.6": Recipe(layer_decay=0.6),
    "weight decay, embeddings exempt": Recipe(weight_decay=0.5),
    "weight decay, embeddings decayed": Recipe(weight_decay=0.5, decay_embeddings=True),
    "clipping that bites on some steps": Recipe(clip_norm=0.25, ignored_pixels=True),
    UNCLIPPED: Recipe(auxiliary_weight=10.0),
    "accumulation 3": Recipe(accumulation=3),
    "auxiliary head": Recipe(auxiliary_weight=0.4),
    "class weights": Recipe(class_weights=CLASS_WEIGHTS),
    "ignored pixels": Recipe(ignored_pixels=True),
    "checkpointing block": Recipe(checkpointing="block"),
    "checkpointing selective": Recipe(checkpointing="selective"),
    "two bad batches": Recipe(bad_steps=(4, 11)),
    "EMA 0.05": Recipe(ema_momentum=0.05),
    "all together": Recipe(
        accumulation=3,
        layer_decay=0.6,
        weight_decay=0.5,
        clip_norm=0.25,
        auxiliary_weight=0.4,
        class_weights=CLASS_WEIGHTS,
        ignored_pixels=True,
        checkpointing="block",
        bad_steps=(4, 11),
        ema_momentum=0.05,
    ),
}
ALL, PARTLY_OFFLOADED = "all together", "all together, half of the optimizer offloaded"
if shutil.which("c++"):  # DeepSpeed compiles its CPU optimizer when it is first used
    CASES[PARTLY_OFFLOADED] = CASES[ALL].replace(offloaded=0.5)
BF16 = Recipe(bf16=True, lr=1e-3, layer_decay=0.6, weight_decay=0.05)
CURVES = "bf16, 200 steps"
SUMMED_IN_BF16, SUMMED_IN_FP32 = "bf16, accumulation 16", "bf16, accumulation 16 in FP32"
BF16_CASES = {
    CURVES: BF16.replace(steps=200),
    "bf16, all together": CASES[ALL].replace(bf16=True),
    SUMMED_IN_BF16: BF16.replace(steps=6, accumulation=16),
    SUMMED_IN_FP32: BF16.replace(steps=6, accumulation=16, fp32_accumulation=True),
}
