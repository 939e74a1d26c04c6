"""The one seam to MMCV 1.7 and MMSegmentation 0.30 on a current Python, torch and torchvision.

Importing this module makes `import mmcv.runner` and `import mmseg.models` work:

* `mmcv.runner` imports all of `torchvision` for a list of models that nothing here asks for. A stand-in imports it when
  something in it is asked for: half a second of a start, and torch's compiler for commands that train nothing.
* `torchvision` built for another torch (a CUDA wheel beside a CPU torch) then fails to import because its
  compiled operators are absent. Declaring their schemas is enough, since nothing here calls one.
* `mmcv._ext`, the compiled operators, is absent from the pure-Python build of mmcv-full. A stand-in
  lets mmseg import; calling an operator raises and tells how to build it.

`mend_label_map` is for datasets that pick some of their classes, whose ids numpy 2 would not store;
`mend_concatenation` for Cityscapes, of which MMSeg joins no two.

A torchvision that imports and an mmcv whose operators load are left exactly as they are.
"""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any

import torch

from ds_seg.errors import ConfigError

BUILD_OPS_COMMAND = (
    "pip install 'setuptools<81' wheel && MMCV_WITH_OPS=1 pip install --no-binary mmcv-full --no-build-isolation "
    "--force-reinstall --no-deps mmcv-full==1.7.2"
)

_TORCHVISION_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_torchvision_library: torch.library.Library | None = None


class MissingOperatorError(ConfigError):
    """A compiled operator of mmcv was called where there is none: the config asks for what needs it."""


class LaterTorchvision(types.ModuleType):
    """Stand-in for `torchvision`: the real one takes its place, mended, when something in it is asked for.

    Args:
        spec: of the real one, whose place and parts anybody may look up before.
    """

    def __init__(self, spec: ModuleSpec) -> None:
        super().__init__(spec.name)
        self.__spec__, self.__file__ = spec, spec.origin

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(self.__name__) is self:
            if name.startswith("_") and name not in ("__path__", "__version__"):
                raise AttributeError(name)  # asked of every module: mmcv looks for one that has `_check_balance`
            del sys.modules[self.__name__]
            mend_torchvision()
        return getattr(importlib.import_module(self.__name__), name)


class MissingOps(types.ModuleType):
    """Stand-in for `mmcv._ext`: every operator exists and raises when called."""

    def __getattr__(self, name: str) -> Callable[..., object]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing_op(*_args: object, **_kwargs: object) -> object:
            raise MissingOperatorError(
                f"mmcv operator '{name}' was called, but this mmcv-full has no compiled operators. Choose a head, "
                "loss or layer that needs none, or build them for this torch (about 15 minutes): "
                f"{BUILD_OPS_COMMAND}"
            )

        return missing_op


def mend_torchvision() -> bool:
    """Make `import torchvision` work beside a torch its operators were not built for.

    Returns:
        True if the operator schemas had to be declared, False if torchvision worked as it is.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: it fails to import for another reason.
    """
    global _torchvision_library
    try:
        importlib.import_module("torchvision")
        return False
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    _torchvision_library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _TORCHVISION_SCHEMAS:
        _torchvision_library.define(schema)
    importlib.import_module("torchvision")
    return True


def mend_mmcv_ops() -> bool:
    """Put a stand-in for `mmcv._ext` in place where the compiled one does not load.

    Returns:
        True if the stand-in was needed, False if the compiled operators are there.
    """
    try:
        importlib.import_module("mmcv._ext")
        return False
    except ImportError:
        sys.modules["mmcv._ext"] = MissingOps("mmcv._ext")
        return True


def mend_label_map(dataset: Any) -> None:
    """Let an MMSeg dataset with `classes=[some of its own]` load annotations under numpy 2.

    MMSeg 0.30 gives a class that was left out the id -1, which numpy 1 stored in uint8 as 255 (ignored) and numpy 2
    refuses.
    """
    if dataset.label_map is not None:
        dataset.label_map = {old: new % 256 for old, new in dataset.label_map.items()}


def mend_concatenation() -> None:
    """Let MMSeg 0.30 join Cityscapes datasets, which it refuses because of their own `evaluate`; nothing calls that."""
    importlib.import_module("mmseg.datasets.dataset_wrappers").CityscapesDataset = ()  # type: ignore[attr-defined]


def torchvision_is_mended() -> bool:
    """Whether torchvision's operators were built for another torch, and had to be declared; imports it.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: it fails to import for another reason than its operators.
    """
    _ = importlib.import_module("torchvision").__path__
    return _torchvision_library is not None


def has_compiled_ops() -> bool:
    """Whether mmcv's compiled operators can be called in this process."""
    return not isinstance(sys.modules.get("mmcv._ext"), MissingOps)


def postpone_torchvision() -> None:
    """Put the stand-in for torchvision in place, unless torchvision is imported already or not there at all."""
    spec = None if "torchvision" in sys.modules else find_spec("torchvision")
    if spec is not None:
        sys.modules["torchvision"] = LaterTorchvision(spec)


postpone_torchvision()
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="On January 1, 2023, MMCV will release v2.0.0")
    importlib.import_module("mmcv")
mend_mmcv_ops()
