import zipfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import ds_seg.openmmlab  # noqa: F401
from disks import fill, small_disk
from ds_seg.checkpoint.export import note_for_mmseg, validate_output, write_export
from ds_seg.checkpoint.model_weights import open_exported, open_modules
from ds_seg.errors import UserError
from ds_seg.models.weight_dialects import DIALECTS, spell_as_intern_vision, translate_names
from tiny_export import CLASSES, HEAD, MODELS, build, describe, export

from mmcv import ConfigDict  # isort: skip
from mmseg.models import build_segmentor  # isort: skip

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def rounded(weights, dtype):
    """What a file of this dtype must hold: the backbone rounded, the heads as they are."""
    return {name: weights.read(name).to(dtype) for name in weights.shapes} | weights.heads


def assert_same_bits(got, wanted):
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype and torch.equal(got[name], value), name


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_holds_every_tensor_bit_by_bit(tmp_path, name, dtype, suffix):
    path = tmp_path / f"model{suffix}"
    weights = export(path, describe(name), dtype)
    got = open_exported(path)
    assert got.shapes == weights.shapes
    assert_same_bits({n: got.read(n).clone() for n in got.shapes} | got.heads, rounded(weights, dtype))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", MODELS)
def test_mmsegmentations_own_segmentor_loads_the_file_strictly(tmp_path, name):
    description = describe(name)
    weights = export(tmp_path / "model.pth", description)
    content = torch.load(tmp_path / "model.pth", weights_only=True)
    assert content["meta"]["CLASSES"] == CLASSES
    model = build_segmentor(ConfigDict(description.model))
    model.load_state_dict(content["state_dict"], strict=True)
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, weights.read(key)), key


def test_the_safetensors_library_reads_names_of_intern_vision_model(tmp_path):
    weights = export(tmp_path / "model.safetensors", describe("one_auxiliary_head"), torch.bfloat16)
    state = load_file(tmp_path / "model.safetensors")
    assert torch.equal(state["encoder.layers.3.ls1"], weights.read("blocks.3.ls1.gamma").bfloat16())
    assert torch.equal(state["embeddings.position_embedding"], weights.read("pos_embed").bfloat16())
    assert state["auxiliary_head.convs.0.conv.weight"].dtype == torch.float32
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize("name", MODELS)
def test_every_name_of_a_backbone_is_translated_back(name):
    names = list(build(describe(name))[0].state_dict())
    spelt = [spell_as_intern_vision(one) for one in names]
    found = translate_names(spelt)
    assert found.dialect == DIALECTS[1] and found.leftovers == []
    assert found.sources == {one: (other,) for one, other in zip(names, spelt, strict=True)}


def test_a_torch_file_is_a_sound_archive_with_a_record_a_tensor(tmp_path):
    weights = export(tmp_path / "model.pth", describe())
    with zipfile.ZipFile(tmp_path / "model.pth") as archive:
        assert archive.testzip() is None
        records = [info.file_size for info in archive.infolist() if "/data/" in info.filename]
    tensors = [weights.read(name) for name in weights.shapes] + list(weights.heads.values())
    assert sorted(records) == sorted(tensor.nbytes for tensor in tensors)


def test_only_one_parameter_is_asked_for_at_a_time(tmp_path):
    weights = open_modules(*build(describe()))
    asked, written = [], []
    object.__setattr__(weights, "read", lambda name, read=weights.read: asked.append(name) or read(name))
    note = lambda _bytes: written.append(len(asked))  # noqa: E731
    with write_export(tmp_path / "m.safetensors", "safetensors", weights, describe(), torch.float32, note):
        pass
    assert sorted(asked) == sorted(weights.shapes) and len(written) == len(asked) + len(weights.heads)
    assert max(now - before for before, now in zip([0, *written], written, strict=False)) == 1


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_failed_check_leaves_the_file_that_was_there(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"earlier")
    weights = open_modules(*build(describe()))
    with (
        pytest.raises(RuntimeError, match="the check"),
        write_export(path, "mmseg" if suffix == ".pth" else "safetensors", weights, describe(), torch.float32) as file,
    ):
        assert file.is_file() and file.suffix == suffix
        raise RuntimeError("the check")
    assert path.read_bytes() == b"earlier" and list(tmp_path.iterdir()) == [path]


def test_a_file_that_can_not_be_written(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match=r"model\.pth can't be written: .*Choose another --out, or make room there"):
        export(tmp_path / "taken" / "model.pth", describe())


def test_a_disk_that_is_full_with_the_scratch_file(tmp_path):
    """Torch raises an error of its own where a tensor is larger than the file's buffer."""
    description = describe()
    description.model["backbone"] = {**description.model["backbone"], "embed_dim": 64}
    description.model["decode_head"] = {**HEAD, "in_channels": 64, "channels": 64}
    export(tmp_path / "model.pth", description)
    with small_disk(tmp_path / "disk", 4) as disk:
        fill(disk, leave_bytes=int(1.3 * (tmp_path / "model.pth").stat().st_size))
        with pytest.raises(UserError, match=r"model\.pth can't be written: .*No space left.*Choose another --out"):
            export(disk / "model.pth", description)
        assert [path.name for path in disk.iterdir()] == ["ballast"]


@pytest.mark.parametrize(("name", "file_format"), [("a.pth", "safetensors"), ("a.bin", "mmseg"), ("a", "mmseg")])
def test_a_suffix_that_would_not_be_recognised(tmp_path, name, file_format):
    with pytest.raises(UserError, match=rf"--out .*{name}: .* suffix .*Write to .*a\.(safetensors|pth) instead"):
        validate_output(tmp_path / name, file_format)
    validate_output(tmp_path / "a.pth", "mmseg")


def test_what_internvl_computes_otherwise_is_said():
    model = {"decode_head": {**HEAD, "concat_input": True}, "auxiliary_head": [{**HEAD, "num_convs": 1}]}
    assert "set concat_input=False in model.decode_head: its FCNHead" in note_for_mmseg(model)
    assert note_for_mmseg({"decode_head": HEAD}) is None
