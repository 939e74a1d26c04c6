"""The naming schemes that InternViT and DINOv2 weights come in, translated to the names of our InternViT.

Pure renaming: nothing here touches a file or a tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from ds_seg.errors import WeightsError

SEGMENTOR_LEFTOVERS = ("*decode_head.*", "*auxiliary_head.*", "ema_*")
"""What a whole segmentation checkpoint holds beside its backbone; `ema_*` is MMCV's other copy of the weights."""
PYRAMID = ("up[1-4].*",)
"""Our names of the layers of `with_fpn`."""
TRUNK = ("patch_embed.*", "cls_token", "pos_embed", "blocks.*", "norm.*")
"""Our names of everything else in a backbone."""
_PYRAMID_MARK = r"up1\.0\.weight"
_HEAD_NAME = re.compile(r"(?:\w+\.)*?(decode_head|auxiliary_head)\.(.+)")


@dataclass(frozen=True)
class Rule:
    """One renaming: names that match `pattern` fully become `name`, as its `part` of a fused tensor."""

    pattern: str
    name: str
    part: int = 0
    parts: int = 1


_PYRAMID_RULE = Rule(r"(up[1-4]\..+)", r"\1")


@dataclass(frozen=True)
class Dialect:
    """A naming scheme.

    Args:
        title: what the report calls it.
        mark: pattern of a name that this scheme alone has; any dotted prefix before it is stripped.
        rules: the first that matches a name applies.
        leftovers: fnmatch patterns of names, as the file spells them or without the prefix, that such files hold
            and a backbone has no use for.
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


_CHAT_MODEL = (
    *("*language_model.*", "mlp1.*", "*multi_modal_projector.*", "*lm_head.*"),  # InternVL 1.2 to 3.5, both formats
    *("model.layers.*", "model.embed_tokens.*", "model.norm.*", "model.mm_projector.*"),  # InternVL-Chat 1.0 and 1.1
    *("qllama.*", "query_tokens", "clip_projector*", "text_projection", "itm_head.*", "logit_scale"),  # InternVL-14B
)
"""What InternVL's image-and-text models hold beside their vision model."""

_INTERNVL_MMSEG = Dialect(
    title="InternVL segmentation backbone",
    mark=r"blocks\.\d+\.attn\.qkv\.weight",
    rules=(Rule(r"(cls_token|pos_embed|(?:patch_embed|blocks|norm)\..+)", r"\1"),),
    leftovers=("clip_projector.*", "mask_token", *_CHAT_MODEL),
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
        Rule(r"layernorm\.(.+)", r"norm.\1"),  # of our exports alone: InternViT has no final norm, DINOv2 has one
    ),
    leftovers=_CHAT_MODEL,
)
_TRANSFORMERS_EMBEDDINGS = (
    Rule(r"embeddings\.patch_embeddings\.projection\.(.+)", r"patch_embed.proj.\1"),
    Rule(r"embeddings\.cls_token", "cls_token"),
    Rule(r"embeddings\.position_embeddings", "pos_embed"),
    Rule(r"encoder\.layer\.(\d+)\.(mlp\.fc[12]\..+)", r"blocks.\1.\2"),
)
_INTERN_VISION_SPELLINGS = (
    (r"patch_embed\.proj\.(.+)", r"embeddings.patch_embedding.\1"),
    (r"cls_token", "embeddings.class_embedding"),
    (r"pos_embed", "embeddings.position_embedding"),
    (r"blocks\.(\d+)\.(ls[12])\.gamma", r"encoder.layers.\1.\2"),
    (r"blocks\.(\d+)\.(.+)", r"encoder.layers.\1.\2"),
    (r"norm\.(.+)", r"layernorm.\1"),
)
"""The rules of that dialect, the other way round."""
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
    leftovers=("embeddings.mask_token", *_CHAT_MODEL),
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


def spell_as_intern_vision(name: str) -> str:
    """Our name of a backbone's tensor as HuggingFace's InternVisionModel spells it; `translate_names` turns it back."""
    for pattern, spelling in _INTERN_VISION_SPELLINGS:
        if match := re.fullmatch(pattern, name):
            return match.expand(spelling)
    return name


def holds_trunk(names: Iterable[str]) -> bool:
    """Whether a file with these tensor names has the blocks of a backbone in a known dialect."""
    return bool(_find_marks(names))


def holds_pyramid(names: Iterable[str]) -> bool:
    """Whether a file with these tensor names has the layers of `with_fpn`."""
    return any(re.fullmatch(rf"(?:\w+\.)*?{_PYRAMID_MARK}", name) for name in names)


def translate_head_names(names: Iterable[str]) -> dict[str, str]:
    """Find the heads of an MMSegmentation model among tensor names.

    Args:
        names: every tensor name in a file.

    Returns:
        Name in our `SegmentationHeads` -> the file's name. A lone auxiliary head is our first.
    """
    found = {}
    for name in names:
        if match := _HEAD_NAME.fullmatch(name):
            head, rest = match.groups()
            if head == "auxiliary_head":
                head = "auxiliary_heads" if re.match(r"\d+\.", rest) else "auxiliary_heads.0"
            found[f"{head}.{rest}"] = name
    return found


def _detect(names: list[str]) -> tuple[Dialect, str]:
    candidates = _find_marks(names)
    if not candidates:  # a file that adds a trained pyramid to a frozen trunk
        candidates = _find_marks(names, [(_INTERNVL_MMSEG, _PYRAMID_MARK)])
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


def _find_marks(
    names: Iterable[str], marks: Sequence[tuple[Dialect, str]] | None = None
) -> dict[tuple[str, str], Dialect]:
    names = list(names)
    candidates: dict[tuple[str, str], Dialect] = {}
    for dialect, pattern in marks or [(dialect, dialect.mark) for dialect in DIALECTS]:
        mark = re.compile(rf"((?:\w+\.)*?){pattern}")
        for name in names:
            if match := mark.fullmatch(name):
                candidates[dialect.title, match[1]] = dialect
    return candidates


def _apply_rules(dialect: Dialect, name: str) -> tuple[Rule, str] | None:
    for rule in (*dialect.rules, _PYRAMID_RULE):
        if match := re.fullmatch(rule.pattern, name):
            return rule, match.expand(rule.name)
    return None
