"""The naming schemes that InternViT and DINOv2 weights come in, translated to the names of our InternViT.

Pure renaming: nothing here touches a file or a tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from ds_seg.errors import WeightsError

SEGMENTOR_LEFTOVERS = ("decode_head.*", "auxiliary_head.*")
"""What a whole segmentation checkpoint holds beside its backbone."""


@dataclass(frozen=True)
class Rule:
    """One renaming: names that match `pattern` fully become `name`, as its `part` of a fused tensor."""

    pattern: str
    name: str
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class Dialect:
    """A naming scheme.

    Args:
        title: what the report calls it.
        mark: pattern of a name that this scheme alone has; any dotted prefix before it is stripped.
        rules: the first that matches a name applies.
        leftovers: fnmatch patterns of names that such files hold and a backbone has no use for.
    """

    title: str
    mark: str
    rules: tuple[Rule, ...]
    leftovers: tuple[str, ...]


@dataclass(frozen=True)
class Translation:
    """What a file's names mean.

    Args:
        dialect: its scheme.
        sources: our name -> the file's names whose tensors, joined along dimension 0, are its value.
        leftovers: the file's names that mean nothing to us.
        prefix: what stood before every translated name.
    """

    dialect: Dialect
    prefix: str
    sources: dict[str, tuple[str, ...]] = field(default_factory=dict)
    leftovers: list[str] = field(default_factory=list)

    def is_expected_leftover(self, name: str, extra: Iterable[str] = ()) -> bool:
        """Whether `name`, as the file spells it, is known to be of no use, or matches a pattern of `extra`."""
        patterns = [*self.dialect.leftovers, *SEGMENTOR_LEFTOVERS, *extra]
        bare = name.removeprefix(self.prefix)
        return any(fnmatchcase(name, pattern) or fnmatchcase(bare, pattern) for pattern in patterns)


def _split_qkv(pattern: str, spellings: tuple[str, str, str]) -> tuple[Rule, ...]:
    return tuple(Rule(pattern % s, r"blocks.\1.attn.qkv.\2", part, 3) for part, s in enumerate(spellings))


_INTERNVL_MMSEG = Dialect(
    title="InternVL segmentation backbone",
    mark=r"blocks\.\d+\.attn\.qkv\.weight",
    rules=(Rule(r"(cls_token|pos_embed|(?:patch_embed|blocks|norm|up[1-4])\..+)", r"\1"),),
    leftovers=("clip_projector.*", "mask_token"),
)
_HF_INTERN_VISION = Dialect(
    title="HuggingFace InternVisionModel",
    mark=r"encoder\.layers\.\d+\.attn\.qkv\.weight",
    rules=(
        Rule(r"embeddings\.patch_embedding\.(.+)", r"patch_embed.proj.\1"),
        Rule(r"embeddings\.class_embedding", "cls_token"),
        Rule(r"embeddings\.position_embedding", "pos_embed"),
        Rule(r"encoder\.layers\.(\d+)\.(ls[12])", r"blocks.\1.\2.gamma"),
        Rule(r"encoder\.layers\.(\d+)\.(.+)", r"blocks.\1.\2"),
    ),
    leftovers=("language_model.*", "mlp1.*"),
)
_TRANSFORMERS_EMBEDDINGS = (
    Rule(r"embeddings\.patch_embeddings\.projection\.(.+)", r"patch_embed.proj.\1"),
    Rule(r"embeddings\.cls_token", "cls_token"),
    Rule(r"embeddings\.position_embeddings", "pos_embed"),
    Rule(r"encoder\.layer\.(\d+)\.(mlp\.fc[12]\..+)", r"blocks.\1.\2"),
)
_HF_INTERNVL_NATIVE = Dialect(
    title="transformers InternVLVisionModel (-hf)",
    mark=r"encoder\.layer\.\d+\.lambda_1",
    rules=(
        *_TRANSFORMERS_EMBEDDINGS,
        *_split_qkv(r"encoder\.layer\.(\d+)\.attention\.%s\.(weight|bias)", ("q_proj", "k_proj", "v_proj")),
        Rule(r"encoder\.layer\.(\d+)\.attention\.projection_layer\.(.+)", r"blocks.\1.attn.proj.\2"),
        Rule(r"encoder\.layer\.(\d+)\.attention\.([qk]_norm\..+)", r"blocks.\1.attn.\2"),
        Rule(r"encoder\.layer\.(\d+)\.layernorm_before\.(.+)", r"blocks.\1.norm1.\2"),
        Rule(r"encoder\.layer\.(\d+)\.layernorm_after\.(.+)", r"blocks.\1.norm2.\2"),
        Rule(r"encoder\.layer\.(\d+)\.lambda_([12])", r"blocks.\1.ls\2.gamma"),
        Rule(r"layernorm\.(.+)", r"norm.\1"),
    ),
    leftovers=("*language_model.*", "*multi_modal_projector.*", "lm_head.*", "embeddings.mask_token"),
)
_HF_DINOV2 = Dialect(
    title="HuggingFace Dinov2Model",
    mark=r"encoder\.layer\.\d+\.layer_scale1\.lambda1",
    rules=(
        *_TRANSFORMERS_EMBEDDINGS,
        *_split_qkv(r"encoder\.layer\.(\d+)\.attention\.attention\.%s\.(weight|bias)", ("query", "key", "value")),
        *_split_qkv(r"encoder\.layer\.(\d+)\.attention\.%s\.(weight|bias)", ("q_proj", "k_proj", "v_proj")),
        Rule(r"encoder\.layer\.(\d+)\.attention\.(?:output\.dense|o_proj)\.(.+)", r"blocks.\1.attn.proj.\2"),
        Rule(r"encoder\.layer\.(\d+)\.(norm[12]\..+)", r"blocks.\1.\2"),
        Rule(r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
        Rule(r"layernorm\.(.+)", r"norm.\1"),
    ),
    leftovers=("embeddings.mask_token", "classifier.*"),
)
DIALECTS = (_INTERNVL_MMSEG, _HF_INTERN_VISION, _HF_INTERNVL_NATIVE, _HF_DINOV2)


def translate_names(names: Iterable[str]) -> Translation:
    """Detect the dialect of a file from its tensor names and translate them to ours.

    Args:
        names: every tensor name in the file.

    Returns:
        Sources for our names; a fused tensor of which a part is absent stays untranslated.

    Raises:
        WeightsError: no dialect, or more than one backbone, fits the names.
    """
    names = list(names)
    dialect, prefix = _detect(names)
    found: dict[str, dict[int, str]] = {}
    wanted: dict[str, int] = {}
    leftovers = []
    for name in names:
        rule_and_target = _apply_rules(dialect, name.removeprefix(prefix)) if name.startswith(prefix) else None
        if rule_and_target is None:
            leftovers.append(name)
            continue
        rule, target = rule_and_target
        found.setdefault(target, {})[rule.part] = name
        wanted[target] = rule.parts
    sources = {}
    for target, parts in found.items():
        if len(parts) == wanted[target]:
            sources[target] = tuple(parts[i] for i in range(len(parts)))
        else:
            leftovers.extend(parts.values())
    return Translation(dialect, prefix, sources, leftovers)


def _detect(names: list[str]) -> tuple[Dialect, str]:
    candidates: dict[tuple[str, str], Dialect] = {}
    for dialect in DIALECTS:
        mark = re.compile(rf"((?:\w+\.)*?){dialect.mark}")
        for name in names:
            if match := mark.fullmatch(name):
                candidates[dialect.title, match[1]] = dialect
    if len(candidates) == 1:
        ((_, prefix), dialect) = next(iter(candidates.items()))
        return dialect, prefix
    shown = ", ".join(sorted(names)[:6]) or "nothing"
    if not candidates:
        known = "; ".join(dialect.title for dialect in DIALECTS)
        raise WeightsError(
            f"its tensor names fit no known naming of a ViT backbone (it holds {len(names)}: {shown}, ...). Known: "
            f"{known}. Rename the tensors to one of them, or point to another file."
        )
    found = "; ".join(f"{title} under '{prefix}'" for title, prefix in candidates)
    raise WeightsError(f"it holds more than one backbone ({found}). Save the one that you mean to a file of its own.")


def _apply_rules(dialect: Dialect, name: str) -> tuple[Rule, str] | None:
    for rule in dialect.rules:
        if match := re.fullmatch(rule.pattern, name):
            return rule, match.expand(rule.name)
    return None
