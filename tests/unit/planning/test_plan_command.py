"""`ds-seg plan` from the command line, in this process: what it prints, writes and refuses."""

import argparse
import json
import re
import shlex
from dataclasses import replace

import pytest
import torch

from ds_seg.__main__ import main
from ds_seg.commands import add_commands, plan
from ds_seg.commands.arguments import run_options
from ds_seg.config import RunOptions, build_run_config
from ds_seg.config.files import CONFIGS_ROOT
from ds_seg.errors import ConfigError, UserError
from ds_seg.planning import fitting
from ds_seg.planning.fitting import Room, apply_fit, choose_fit, measure_room, needs_fitting
from ds_seg.planning.hardware import GIB, Hardware, place
from ds_seg.planning.model_size import measure_model
from ds_seg.planning.scaling import compute_scaling
from ds_seg.planning.search import Planner
from ds_seg.planning.step_costs import StepCosts

SIX_B = "internvit6b_224_full_linear_ade20k"


@pytest.fixture(scope="module")
def planner():
    """Simulated once; its tables serve any hardware."""
    own = Planner(build_run_config(RunOptions(SIX_B), 1))
    assert own.costs
    return own


@pytest.fixture
def ds_seg_plan(planner, monkeypatch, tmp_path, capsys):
    """Runs the command in an empty folder on the shared simulation; gives its code and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ds_seg.planning.search.Planner", lambda _run: planner)

    def run(*arguments):
        try:
            plan.run(parse("plan", SIX_B, *map(str, arguments)))
        except UserError as error:
            return error.exit_code, str(error)
        return 0, capsys.readouterr().out

    return run


def parse(*arguments):
    parser = argparse.ArgumentParser()
    plan.add_parser(parser.add_subparsers())
    return parser.parse_args(arguments)


def test_keys_of_the_config_that_mean_nothing_are_named(ds_seg_plan, planner, monkeypatch):
    assert planner.run.notes == ()
    monkeypatch.setattr(planner, "run", replace(planner.run, notes=("ignoring fp16: the precision is the JSON's",)))
    code, out = ds_seg_plan("--gpus", 8)
    assert code == 0 and out.startswith("ignoring fp16")


def test_a_plan_names_parts_time_and_the_command(ds_seg_plan, tmp_path):
    code, out = ds_seg_plan("--gpus", 8, "--gpu-memory", 80, "--json", "plan.json")
    assert code == 0
    for part in ("parameters", "moments", "live parameters", "activations", "logits and loss", "images/s", "GPU-hours"):
        assert part in out
    assert "assumed, not measured" in out and "bound by " in out and "16.34 by formula" in out
    assert f"torchrun --nproc_per_node 8 -m ds_seg train {SIX_B}" in out
    (found,) = json.loads((tmp_path / "plan.json").read_text())["plans"]
    assert found["fits"] and found["global_batch"] == 16 and found["gpu_gib"] < 76
    written = tmp_path / f"plan_{SIX_B}_8_gpus.json"
    options = RunOptions(
        SIX_B, deepspeed_config=str(written), cfg_options={"data.samples_per_gpu": found["micro_batch"]}
    )
    run = build_run_config(options, 8)
    assert run.auto_sizes == () and run.global_batch == 16
    assert run.deepspeed["zero_optimization"]["stage3_max_live_parameters"] >= planner_parameters(found)


def planner_parameters(found):
    return found["traffic_bytes_a_micro_batch"]["gathered_forward"] / 2


def test_the_page_and_the_readme_say_what_the_command_prints(ds_seg_plan, monkeypatch):
    """Written by scripts/write_plans.py."""
    root = CONFIGS_ROOT.parent
    monkeypatch.syspath_prepend(str(root / "scripts"))
    import plans_page

    plans = plans_page.print_plans(lambda _run, *arguments: ds_seg_plan(*arguments, "--force")[1])
    assert len(plans) == len(plans_page.PLANS) and all("recommended" in printed for printed in plans.values())
    assert (root / "docs" / "plans.md").read_text() == plans_page.format_page(plans)
    readme = (root / "README.md").read_text()
    assert plans_page.put_plans(readme, plans) == readme


def test_files_are_not_replaced_silently(ds_seg_plan):
    assert ds_seg_plan("--gpus", 8)[0] == 0
    code, message = ds_seg_plan("--gpus", 8)
    assert code == 2 and "would be replaced" in message and "--force" in message
    assert ds_seg_plan("--gpus", 8, "--force")[0] == 0


def test_what_does_not_fit_is_refused_with_the_remedy(ds_seg_plan):
    code, message = ds_seg_plan("--gpus", 1, "--gpu-memory", 80, "--host-memory", 40)
    assert code == 2 and "does not fit" in message
    assert "It fits on 2 GPUs of 80 GiB" in message and "GiB of host memory a node, where 40 are" in message


def test_a_sweep_of_which_nothing_fits_speaks_of_the_nodes_of_its_largest_world(ds_seg_plan):
    code, message = ds_seg_plan("--sweep", "1,64", "--host-memory", 30)
    assert code == 2 and "The closest way on 64 GPUs of 80 GiB on 8 nodes" in message
    assert "takes 64 GiB of host memory a node, where 30 are" in message


def test_a_gpu_that_nothing_fits_on_is_named(ds_seg_plan):
    code, message = ds_seg_plan("--gpus", 8, "--gpu-memory", 2)
    assert code == 2 and "No number of such GPUs up to 1024 suffices" in message


PSP = """
_base_ = {base!r}
norm = dict(type="SyncBN")
head = dict(type="PSPHead", in_channels=192, in_index=0, channels=8, pool_scales=(1,), num_classes=6, norm_cfg=norm)
model = dict(decode_head=dict(_delete_=True, **head))
global_batch = 1
"""


def test_a_batch_that_is_too_small_for_one_gpu_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "psp.py").write_text(PSP.format(base=str(CONFIGS_ROOT / "runs" / "demo.py")))
    with pytest.raises(
        UserError, match=r"its BatchNorm needs 2 crops at once, .* fits on 2 GPUs .* cures: a larger batch"
    ):
        plan.run(parse("plan", "psp.py", "--gpus", "1"))


def test_without_gpus_three_worlds_are_planned(ds_seg_plan):
    code, out = ds_seg_plan()
    assert code == 0 and all(f"\n{count} GPU" in out for count in (1, 8, 64))
    assert (
        "a batch of 16 can't be spread over 64 GPUs" in out
        and "global_batch=64 runner.max_iters=20000 lr_config.warmup_iters=375" in out
    )


@pytest.mark.parametrize("global_batch", [None, 8])
def test_the_printed_command_starts_what_was_planned_of_a_config_that_accumulates(
    global_batch, monkeypatch, tmp_path, capsys
):
    """Of one that asks for two micro-batches a step, where one has room for all of it."""
    monkeypatch.chdir(tmp_path)
    options = [f"global_batch={global_batch}", "data.samples_per_gpu=4", "optimizer_config.cumulative_iters=2"]
    plan.run(parse("plan", "demo", "--gpus", "2", "--json", "plan.json", "--cfg-options", *options))
    (planned,) = json.loads((tmp_path / "plan.json").read_text())["plans"]
    (command,) = (line for line in capsys.readouterr().out.splitlines() if "-m ds_seg train" in line)
    parser = argparse.ArgumentParser()
    add_commands(parser)
    args = parser.parse_args(shlex.split(command.partition("ds_seg ")[2]))
    run = build_run_config(run_options(args), 2)
    assert run.global_batch == planned["global_batch"] and run.micro_batch == planned["micro_batch"]
    assert run.accumulation_steps == 1
    assert all(command.count(option.partition("=")[0]) == 1 for option in options)


def test_a_sweep_draws_and_names_where_communication_takes_over(ds_seg_plan, tmp_path):
    code, out = ds_seg_plan("--sweep", "8,512", "--chart", "chart")
    assert code == 0 and "communication-bound: as recommended from 512 GPUs on" in out
    assert (tmp_path / "chart").read_bytes().startswith(b"\x89PNG")


def test_a_row_of_a_sweep_is_the_plan_of_that_world_on_nodes_of_eight(planner):
    (row,) = compute_scaling(planner, Hardware(8, 1, 80.0), [64])
    wanted = planner.recommend(Hardware(64, 8, 80.0))
    assert row.kept.hardware == wanted.hardware and row.kept.hours == wanted.hours


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", "0"), "--gpus: got 0, want more than 0"),
        (("--sweep", "1,x"), "--sweep: got '1,x', want numbers of GPUs"),
        (("--sweep", "8,64", "--nodes", "8"), "--nodes: a sweep has up to 8 GPUs on each node"),
        (("--gpu-memory", "inf"), "--gpu-memory: got inf, want more than 0, and less than infinity"),
        (("--sweep", "8,64", "--gpus", "8"), "--gpus: a sweep is over its own numbers of GPUs"),
        (("--sweep", "8,64", "--out", "x.json"), "--out: a sweep is over its own numbers of GPUs"),
        (("--gpus", "8", "--chart", "x.png"), "--chart: only a --sweep is drawn"),
        (("--nodes", "3"), "--nodes: of how many GPUs in all"),
        (("--gpus", "8", "--nodes", "3"), "--nodes: 8 GPUs can't be spread evenly over 3 nodes"),
        (("--out", "x.json"), "--out: one file for plans of 3 numbers of GPUs"),
    ],
)
def test_impossible_options_are_refused(ds_seg_plan, arguments, message):
    code, said = ds_seg_plan(*arguments)
    assert code == 2 and message in said


def test_under_a_launcher_it_is_refused(ds_seg_plan, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, message = ds_seg_plan("--gpus", 8)
    assert code == 2 and "start it alone" in message


def test_one_large_gpu_holds_everything(planner):
    chosen = planner.recommend(Hardware(1, 1, 141.0))
    assert chosen.fits and not chosen.states.offloaded


def test_80_gib_and_a_host_of_128(planner):
    chosen = planner.recommend(Hardware(1, 1, 80.0, host_memory_gib=128.0))
    states = chosen.states
    assert 0 < states.offloaded < 0.5 and states.pin_memory and chosen.host_gib < 64 and chosen.gpu_gib > 72
    assert chosen.deepspeed["zero_optimization"]["offload_optimizer"]["ratio"] == states.offloaded


def test_the_least_that_fits_is_offloaded(planner):
    """None where everything fits, all of it where nothing of it does, and in between the less the larger the GPU is."""
    chosen = [planner.recommend(Hardware(1, 1, memory)) for memory in (20.0, 40.0, 60.0, 80.0, 141.0)]
    shares = [candidate.states.offloaded for candidate in chosen]
    assert shares == sorted(shares, reverse=True) and shares[0] == 1 and shares[-1] == 0 and len(set(shares)) == 5
    host_gib = [candidate.host_gib for candidate in chosen[1:]]
    assert host_gib == sorted(host_gib, reverse=True)


def test_more_memory_never_makes_a_plan_slower(planner):
    times = [planner.recommend(Hardware(8, 1, memory)).time.total_s for memory in (24.0, 40.0, 80.0, 141.0)]
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize(("gpus", "gib"), [(8, 20.0), (8, 24.0), (4, 32.0), (2, 60.0)])
def test_parameters_that_stay_whole_push_nothing_off_the_gpus(planner, gpus, gib):
    chosen = planner.recommend(Hardware(gpus, 1, gib))
    assert chosen.states.offloaded == 0 and gib - 4 < chosen.gpu_gib < 0.95 * gib


def test_a_command_with_an_offloaded_optimizer_names_its_threads(ds_seg_plan):
    _, out = ds_seg_plan("--gpus", 2, "--gpu-memory", 40)
    assert re.search(r"optimizer \d+% in host memory", out)
    assert "export OMP_NUM_THREADS first, a node's cores over its 2 processes" in out
    _, resident = ds_seg_plan("--gpus", 8, "--gpu-memory", 80, "--force")
    assert "OMP_NUM_THREADS" not in resident


def test_the_shipped_json_suits_the_sizes_that_planning_uses(planner):
    roomy, tight = (planner.recommend(Hardware(64, place(64), memory)) for memory in (80.0, 16.0))
    assert roomy.traffic.gathered_backward == 0 < tight.traffic.gathered_backward
    assert tight.fits and roomy.fits


def auto_run(**options):
    return build_run_config(RunOptions("demo", cfg_options={"model.backbone.checkpointing": "auto", **options}), 1)


def test_auto_takes_the_fastest_policy_that_fits(monkeypatch):
    run = auto_run(**{"data.samples_per_gpu": 8})
    assert needs_fitting(run, "cpu") and run.model.backbone.checkpointing == "auto"
    costs = StepCosts(run, ("none", "selective", "block"), fused_norms=False)
    size = measure_model(run.model)
    monkeypatch.setattr("ds_seg.planning.fitting.StepCosts", lambda *_args, **_kwargs: costs)
    monkeypatch.setattr("ds_seg.planning.fitting.measure_model", lambda _model: size)
    chosen: list[str] = []
    for memory_gib in (64.0, *(0.2 - 0.0005 * step for step in range(400))):
        try:
            fit = choose_fit(run, memory_gib=memory_gib, device_type="cpu")
        except ConfigError:
            break
        chosen.append(apply_fit(run, fit).model.backbone.checkpointing)
    assert list(dict.fromkeys(chosen)) == ["none", "selective", "block"]
    assert "planned for" in fit.note


def test_auto_that_fits_nowhere_is_refused_with_the_remedy():
    with pytest.raises(ConfigError, match=r"even 'block' needs .* GiB a process .*Lower data\.samples_per_gpu=4"):
        choose_fit(auto_run(), memory_gib=0.01, device_type="cpu")


def test_a_gpu_run_gets_sizes_for_its_memory():
    run = build_run_config(RunOptions("camvid_dinov2s_full"), 2)
    assert needs_fitting(run, "cuda") and not needs_fitting(run, "cpu")
    zero = apply_fit(run, choose_fit(run, memory_gib=80, device_type="cuda")).deepspeed["zero_optimization"]
    assert zero["stage3_max_live_parameters"] > 22_000_000 and "auto" not in zero.values()


def test_host_memory_that_an_offloaded_optimizer_lacks_is_told_of():
    run = build_run_config(
        RunOptions("demo", deepspeed_config=str(CONFIGS_ROOT / "deepspeed" / "zero3_bf16_offload.json")), 8
    )
    on_gpus = {"memory_gib": 80, "device_type": "cuda", "nodes": 2}
    short = choose_fit(run, host_memory_gib=3.0, **on_gpus).warning
    need = re.search(r"warning: each node needs ([\d.]+) GiB of host memory, of which 3\.0 GiB are free", short)
    assert need and 16 < float(need[1]) < 30  # four processes of 4 GiB and their workers
    assert "offload_optimizer.ratio" in short
    assert choose_fit(run, host_memory_gib=500.0, **on_gpus).warning == ""
    resident = build_run_config(RunOptions("demo"), 8)
    assert choose_fit(resident, host_memory_gib=3.0, **on_gpus).warning == ""


@pytest.mark.parametrize(("free", "reserved", "room"), [(70, 0, 71.5), (20, 4, 25.5), (79, 0, 80)])
def test_what_others_take_of_a_gpu_is_not_counted_on(monkeypatch, free, reserved, room):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (free * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: reserved * GIB)
    monkeypatch.setattr(fitting, "measure_free_bytes", lambda: 32 * GIB)
    assert measure_room(torch.device("cuda", 0)) == Room(room, 32, 1)


def test_processes_share_what_their_host_has_free(monkeypatch):
    found = [("a", 8.0, None), ("a", 8.0, None), ("b", 6.0, None)]
    monkeypatch.setattr(fitting.distributed, "gather_objects", lambda _own: found)
    assert measure_room(torch.device("cpu")) == Room(4.0, 6.0, 2)


def test_the_help_lists_the_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "plan" in capsys.readouterr().out and (CONFIGS_ROOT / "deepspeed").is_dir()
