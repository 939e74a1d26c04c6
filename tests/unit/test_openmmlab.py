import subprocess
import sys
import textwrap

import pytest

import ds_seg.openmmlab as openmmlab
from ds_seg.errors import UserError


def run_python(code, *path):
    """Run code in a fresh process with folders in front of its import path."""
    prefix = f"import sys; sys.path[:0] = {[str(folder) for folder in path]!r}\n"
    return subprocess.run(
        [sys.executable, "-c", prefix + textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )


def write_package(folder, name, **files):
    package = folder / name
    package.mkdir()
    for file, content in files.items():
        (package / f"{file}.py").write_text(textwrap.dedent(content))


def test_a_working_torchvision_and_compiled_mmcv_are_left_alone(tmp_path):
    write_package(tmp_path, "torchvision", __init__="WORKS = True")
    write_package(tmp_path, "mmcv", __init__="", _ext="def nms(): return 'compiled'")
    done = run_python(
        """
        import torch, ds_seg.openmmlab as openmmlab
        import torchvision, mmcv._ext
        assert torchvision.WORKS and mmcv._ext.nms() == 'compiled' and openmmlab.has_compiled_ops()
        assert openmmlab._torchvision_library is None and not hasattr(torch.ops.torchvision, 'nms')
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr


def test_a_torchvision_without_its_operators_is_mended(tmp_path):
    code = """
        import torch
        torch.library.register_fake("torchvision::nms")(lambda dets, scores, threshold: dets)
        torch.library.register_fake("torchvision::qnms")(lambda dets, scores, threshold: dets)
        """
    write_package(tmp_path, "torchvision", __init__=code)
    write_package(tmp_path, "mmcv", __init__="", _ext="")
    broken = run_python("import torchvision", tmp_path)
    assert "operator torchvision::nms does not exist" in broken.stderr
    code = (
        "import ds_seg.openmmlab as o, torchvision, torch; assert o.torchvision_is_mended(); torch.ops.torchvision.nms"
    )
    mended = run_python(code, tmp_path)
    assert mended.returncode == 0, mended.stderr


def test_a_torchvision_that_fails_for_another_reason_is_not_hidden(tmp_path):
    write_package(tmp_path, "torchvision", __init__="raise RuntimeError('no such driver')")
    write_package(tmp_path, "mmcv", __init__="", _ext="")
    code = "import ds_seg.openmmlab, torchvision; torchvision.models"
    assert "RuntimeError: no such driver" in run_python(code, tmp_path).stderr


@pytest.mark.parametrize("use", ["torchvision.part.VALUE", "part.VALUE"])
def test_torchvision_is_imported_when_it_is_used_and_not_before(tmp_path, use):
    write_package(tmp_path, "torchvision", __init__="print('now'); __version__ = '1'", part="VALUE = 5")
    write_package(tmp_path, "mmcv", __init__="import torchvision", _ext="")
    code = f"""
        import ds_seg.openmmlab, importlib.util, mmcv
        assert importlib.util.find_spec('torchvision').name == 'torchvision' and mmcv.torchvision.__file__
        import torchvision
        print('before')
        {"import torchvision.part" if use.startswith("torchvision") else "from torchvision import part"}
        print({use}, torchvision.__version__, mmcv.torchvision.part.VALUE)
        assert not ds_seg.openmmlab.torchvision_is_mended()
        """
    done = run_python(code, tmp_path)
    assert done.stdout.split("\n") == ["before", "now", "5 1 5", ""], done.stderr


def test_mmseg_imports_and_builds_a_dataset_pipeline():
    done = run_python(
        """
        import warnings; warnings.simplefilter("error", UserWarning)
        import ds_seg.openmmlab
        warnings.simplefilter("ignore")
        import mmcv.runner, mmcv.ops, mmseg.models, mmseg.apis
        from mmseg.datasets.pipelines import Compose
        Compose([dict(type='Resize', img_scale=(8, 8)), dict(type='RandomFlip', prob=0.5)])
        """
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(openmmlab.has_compiled_ops(), reason="this mmcv-full has its compiled operators")
def test_a_missing_operator_says_how_to_build_it():
    import torch
    from mmcv.ops import sigmoid_focal_loss

    assert issubclass(openmmlab.MissingOperatorError, UserError)  # whoever meets it can choose another loss
    message = r"sigmoid_focal_loss_forward' was called.*Choose a head, loss.*MMCV_WITH_OPS=1 pip install"
    with pytest.raises(openmmlab.MissingOperatorError, match=message):
        sigmoid_focal_loss(torch.zeros(1, 1), torch.zeros(1, dtype=torch.long))
