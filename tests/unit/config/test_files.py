"""How config files and their bases are read."""

import sys

import pytest

from ds_seg.config import CONFIGS_ROOT, read_config_file
from ds_seg.errors import ConfigError

DEMO = f"_base_ = {str(CONFIGS_ROOT / 'runs' / 'demo.py')!r}\n"


def write(folder, name, text):
    (folder / name).write_text(text)
    return folder / name


def test_nested_dict_literals_are_python(tmp_path):
    text = 'optimizer = dict(paramwise_cfg={"custom_keys": {"norm": {"decay_mult": 0.0}}})\nseed = {3: {3: 3}}[3][3]\n'
    config = read_config_file(write(tmp_path, "mine.py", DEMO + text), {})
    assert config.optimizer.paramwise_cfg.custom_keys.norm.decay_mult == 0.0 and config.seed == 3


def test_mmcvs_own_variables(tmp_path):
    write(tmp_path, "data.py", DEMO + "steps = 7\nmine = dict(lr=3e-4)")
    text = '_base_ = "{{ fileDirname }}/data.py"\nrunner = dict(max_iters={{_base_.steps}})\n'
    text += 'optimizer = dict(lr={{ _base_.mine.lr }})\nwork_dir = "runs/{{ fileBasenameNoExtension }}"'
    config = read_config_file(write(tmp_path, "mine.py", text), {})
    assert (config.runner.max_iters, config.optimizer.lr, config.work_dir) == (7, 3e-4, "runs/mine")


def test_a_base_may_be_computed_and_is_checked_all_the_same(tmp_path):
    child = write(tmp_path, "mine.py", '_base_ = ["da" + "ta.py"]\nseed = 3')
    write(tmp_path, "data.py", DEMO + "my_lr = 3e-4\noptimizer = dict(lr=my_lr)")
    assert read_config_file(child, {}).optimizer.lr == 3e-4
    write(tmp_path, "data.py", DEMO + "evalution = dict(")
    with pytest.raises(ConfigError, match=r"data\.py line 2 is not valid Python: '\(' was never closed"):
        read_config_file(child, {})


@pytest.mark.parametrize(
    ("name", "text"),
    [("mine.json", '{"_base_": "data.py", "seed": 3}'), ("mine.yaml", "_base_: data.py\nseed: 3\n")],
)
def test_variables_of_a_base_in_python_are_none_of_the_keys(tmp_path, name, text):
    write(tmp_path, "data.py", DEMO + "my_lr = 3e-4\noptimizer = dict(lr=my_lr)")
    assert read_config_file(write(tmp_path, name, text), {}).seed == 3


@pytest.mark.parametrize("text", ["custom_imports = dict(imports=['no_such_module'])", "import no_such_module"])
def test_a_module_that_is_not_found_is_named(tmp_path, text):
    with pytest.raises(
        ConfigError, match=r"mine\.py.*: No module named 'no_such_module'.*PYTHONPATH=\. for the current"
    ):
        read_config_file(write(tmp_path, "mine.py", DEMO + text), {})


def test_modules_of_the_command_line_are_imported(tmp_path, monkeypatch):
    path, key = write(tmp_path, "mine.py", DEMO), "custom_imports.imports"
    with pytest.raises(ConfigError, match=r"^--cfg-options custom_imports can't be read: No module named 'from_there'"):
        read_config_file(path, {key: ["from_there"]})
    write(tmp_path, "from_there.py", "")
    monkeypatch.syspath_prepend(tmp_path)
    read_config_file(path, {key: ["from_there"]})
    assert sys.modules.pop("from_there").__file__ == str(tmp_path / "from_there.py")


def test_bases_in_a_circle_are_named(tmp_path):
    own = write(tmp_path, "own.py", '_base_ = "own.py"')
    with pytest.raises(ConfigError, match=r"_base_ leads back to the file that it stands in: \S+own\.py -> \S+own\.py"):
        read_config_file(own, {})
    start = write(tmp_path, "start.py", '_base_ = ["first.py"]')
    write(tmp_path, "first.py", '_base_ = "second.json"')
    write(tmp_path, "second.json", '{"_base_": "./first.py"}')
    with pytest.raises(ConfigError, match=r"in: \S+first\.py -> \S+second\.json -> \S+first\.py\. Remove it"):
        read_config_file(start, {})


@pytest.mark.parametrize("content", [b"\xff\xfe\x00\x01", b"model = 1\x00"])
def test_a_binary_file_is_no_config(tmp_path, content):
    (tmp_path / "mine.py").write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"mine\.py( line 1)? is not valid Python: \S+ .*\. If the file was cut"
    ) as caught:
        read_config_file(tmp_path / "mine.py", {})
    assert "None" not in str(caught.value)
