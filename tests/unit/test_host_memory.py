"""Memory that a host can still give, under the limits of Slurm and of containers."""

from __future__ import annotations

import psutil
import pytest

from ds_seg.host_memory import measure_free_bytes

GIB = 2**30


def write(folder, **values):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (folder / name.replace("memory_", "memory.")).write_text(f"{value}\n")


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A system with 100 GiB available; returns a function that says which groups this process is in."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("memory", (), {"available": 100 * GIB}))
    (tmp_path / "proc/self").mkdir(parents=True)

    def in_groups(*lines):
        (tmp_path / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in lines))
        return tmp_path

    return in_groups


def test_a_job_of_slurm_has_what_its_group_leaves(system):
    root = system("0::/slurm/job_7/step_0")
    groups = root / "sys/fs/cgroup/slurm"
    write(groups / "job_7/step_0", memory_max="max", memory_current=9 * GIB, memory_stat=f"inactive_file {GIB}")
    assert measure_free_bytes(root) == 100 * GIB
    write(
        groups / "job_7", memory_max=32 * GIB, memory_current=10 * GIB, memory_stat=f"anon 5\ninactive_file {2 * GIB}"
    )
    assert measure_free_bytes(root) == 24 * GIB
    write(groups, memory_max=8 * GIB, memory_current=9 * GIB, memory_stat="anon 5")
    assert measure_free_bytes(root) == 0


def test_a_container_with_the_older_groups(system):
    root = system("5:cpuset:/", "4:memory,hugetlb:/docker/abc", "0::/")
    names = {"memory_limit_in_bytes": 16 * GIB, "memory_usage_in_bytes": 4 * GIB}
    write(root / "sys/fs/cgroup/memory", **names, memory_stat=f"total_inactive_file {GIB}")
    assert measure_free_bytes(root) == 13 * GIB


def test_without_groups_or_limits_it_is_what_the_machine_has(system):
    root = system("0::/", "1:cpu:/")
    assert measure_free_bytes(root) == 100 * GIB
    (root / "proc/self/cgroup").unlink()
    assert measure_free_bytes(root) == 100 * GIB


def test_of_this_machine_it_is_some_of_what_is_available():
    assert 0 < measure_free_bytes() <= psutil.virtual_memory().total
