"""What keeps a part of a config from being built, said of the config's keys where MMCV names classes."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

from ds_seg.config.faults import OF_A_BASE, describe_unknown_key, list_fields, suggest

_UNEXPECTED = re.compile(r"got an unexpected keyword argument '(\w+)'")


def describe_build_error(error: Exception, field: str, section: Any) -> str:
    """The key at fault where it can be told: one that nothing takes, a type that is not registered, or none.

    Args:
        error: as `mmcv.utils.build_from_cfg` raised it.
        field: dotted, of `section`.
        section: what was to be built.

    Returns:
        What is wrong, without a full stop; else what `describe_error` says.
    """
    origin = find_origin(error)
    frames = [frame for frame, _ in traceback.walk_tb(origin.__traceback__)]
    building = [frame.f_locals for frame in frames if frame.f_code.co_name == "build_from_cfg"]
    fault = _find_fault(origin, building[-1], list(_sections(field, section))) if building else None
    return fault or describe_error(error)


def _find_fault(origin: Exception, building: Mapping[str, Any], sections: list[tuple[str, Any]]) -> str | None:
    cfg, kind = building["cfg"], building.get("obj_cls")
    if unexpected := _UNEXPECTED.search(str(origin)):
        key = unexpected[1]
        of_kind = [(where, found) for where, found in sections if key in found and _is_like(found, cfg)]
        if inspect.isclass(kind) and of_kind:
            place = of_kind[0][0]
            hint = "" if place.endswith("]") else f". {OF_A_BASE}"  # a base's lists are not merged
            return f"{place}.{key}: {describe_unknown_key(key, _list_arguments(kind))}{hint}"
    where = next((where for where, found in sections if _is_like(found, cfg)), None)
    if where is None or not isinstance(origin, KeyError):
        return None
    if "type" not in cfg:
        return f"{where}: got {dict(cfg)}, which has no `type`"
    if kind is None and "obj_type" in building:
        hint = suggest(cfg["type"], building["registry"].module_dict)
        return (
            f"{where}.type: got {cfg['type']!r}, which is not registered.{hint} A module of yours that registers it "
            "goes into custom_imports"
        )
    return None


def _sections(field: str, value: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every dict inside `value` with its dotted field."""
    if isinstance(value, Mapping):
        yield field, value
        for key, inner in value.items():
            yield from _sections(f"{field}.{key}", inner)
    elif isinstance(value, (list, tuple)):
        for place, inner in list_fields(field, value):
            yield from _sections(place, inner)


def _is_like(section: Mapping[str, Any], cfg: Mapping[str, Any]) -> bool:
    """Whether `cfg` is built from a section; constructors on the way may have added to it, or taken from it."""
    return section.get("type") == cfg.get("type") and ("type" in section or dict(section) == dict(cfg))


def _list_arguments(kind: type) -> set[str]:
    """Names that a constructor takes, and those of its bases while it hands on what it does not know."""
    names: set[str] = set()
    for base in inspect.getmro(kind):
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        names.update(parameter.name for parameter in parameters if parameter.kind in named)
        if all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            break
    return names - {"self"}


def find_origin(error: Exception) -> Exception:
    """What a constructor raised: MMCV 1.7 raises it again for each part around it, the part's class in front."""
    inner = error.__context__
    while isinstance(inner, type(error)) and error.args and str(error.args[0]).endswith(f": {inner}"):
        error, inner = inner, inner.__context__
    return error


def describe_error(error: Exception) -> str:
    """What an exception says, or the assertion that failed where it says nothing, as many in MMSegmentation."""
    text = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, AssertionError):
        origin = find_origin(error)
        failed = traceback.extract_tb(origin.__traceback__)[-1].line or ""
        return text if str(origin) else f"{text} {failed}".strip()
    return f"{type(error).__name__}: {text}"
