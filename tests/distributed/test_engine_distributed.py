"""The two engines on one and on two gloo ranks: what they hold, skip, save and resume. See tests/parity for numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from ranks import run_ranks

WORKER = Path(__file__).with_name("engine_worker.py")
TIMEOUT_S = 300
GRADIENT_POISONS = ("poison_images", "poison_head_gradient", "poison_backbone_gradient")
GRADIENT_POISONS += ("overflow_activations", "overflow_backbone_gradient", "overflow_head_gradient")
LOSS_POISONS = ("poison_images", "poison_loss", "overflow_activations")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("engine")


def run_worker(world, out):
    run_ranks(WORKER, world, out, timeout_s=TIMEOUT_S)
    return json.loads((out / f"world{world}.json").read_text())


@pytest.fixture(scope="module")
def two_ranks(out):
    """What each of two ranks measured, in rank order."""
    return run_worker(2, out)


@pytest.fixture(scope="module")
def one_rank(out, two_ranks):
    """What a single rank measured; it reads checkpoints that the two wrote."""
    return run_worker(1, out)[0]


def test_clipping_is_that_of_the_joint_norm(one_rank, two_ranks):
    """The norm of what both optimizers stepped with is min(norm, clip): 1e-7 measured."""
    for run in (one_rank, *two_ranks):
        got = run["check_training"]["fp32"]
        for norm, factor, clipped in zip(got["norms"], got["factors"], got["clipped_norms"], strict=True):
            assert factor == pytest.approx(min(1.0, 0.25 / (norm + 1e-6)), rel=1e-12)
            assert clipped == pytest.approx(norm * factor, rel=2e-6)
        assert 0 < sum(factor == 1.0 for factor in got["factors"]) < len(got["factors"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_step_moves_what_deepspeeds_own_moves(one_rank, two_ranks, precision):
    """Bit for bit: weights, FP32 masters, moments, heads, after four steps of which some are clipped."""
    for run in (one_rank, *two_ranks):
        got = run["check_zero3_step"][precision]
        assert got["sub_groups"] > 2
        assert got["digests"][0] == got["digests"][1] and got["factors"][0] == got["factors"][1]
        assert min(got["factors"][0]) < 1.0 == max(got["factors"][0])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_reducing_as_on_gpus_gives_the_same_bits(one_rank, two_ranks, precision):
    """Two addends have one sum; GPUs keep DeepSpeed's reduce_scatter, which gloo is too slow at to be the default."""
    for run in (one_rank, *two_ranks):
        with_all_reduce, with_reduce_scatter = run["check_reduction"][precision]
        assert with_reduce_scatter == with_all_reduce


def test_all_that_an_offloaded_optimizer_keeps_is_found(one_rank, two_ranks):
    """Master, its gradient, two moments and the sum of gradients of every parameter of the shard."""
    for run in (one_rank, *two_ranks):
        got = run["check_optimizer_tensors"]
        assert got["masters_agree"] and got["bf16"] == pytest.approx(1.0, rel=1e-3)
        assert got["fp32"] == pytest.approx(4.0, rel=1e-3)


def test_the_backbone_is_stepped_where_its_state_is(one_rank, two_ranks):
    """By DeepSpeed's kernel for host memory only where the state is offloaded to it."""
    for run in (one_rank, *two_ranks):
        assert {run["check_training"][precision]["optimizer"] for precision in ("fp32", "bf16")} == {"AdamW"}
        assert run["check_optimizer_tensors"]["optimizer"] == "DeepSpeedCPUAdam"


def test_without_clipping_nothing_is_clipped(one_rank, two_ranks):
    """DeepSpeed clips the backbone's own norm to 1 unless it is told not to."""
    for run in (one_rank, *two_ranks):
        got = run["check_no_clipping"]
        assert min(got["norms"]) > 2
        assert got["stepped"] == pytest.approx(got["norms"], rel=2e-6)


def test_step_reports_every_entry(two_ranks):
    entries = ["acc_seg", "acc_seg_aux", "loss", "loss_ce", "loss_ce_aux"]
    assert two_ranks[0]["check_training"]["fp32"]["entries"] == entries


def test_encode_decode_gives_fp32_scores_at_the_images_size(one_rank, two_ranks):
    for run in (one_rank, *two_ranks):
        assert run["check_training"]["bf16"]["logits"] == [[1, 6, 56, 70], "torch.float32", False]


def test_heads_stay_fp32_and_identical(two_ranks):
    for rank in two_ranks:
        for run in rank["check_training"].values():
            heads = run["heads"]
            assert (heads["type"], heads["dtype"], heads["replicas_identical"]) == ("FCNHead", "float32", True)


def test_each_rank_holds_half_of_the_backbone(one_rank, two_ranks):
    for rank in two_ranks:
        got = rank["check_sharding"]
        assert got["whole"] == 0
        assert got["all"] / 2 <= got["shards"] <= (got["all"] + got["padding"]) / 2
        backbone = rank["check_training"]["fp32"]["backbone"]
        assert backbone["parameters"] == backbone["trainable"] == got["all"]
        assert backbone["parameters_held_per_rank"] == [got["shards"]] * 2
    assert one_rank["check_training"]["fp32"]["backbone"]["parameters_held_per_rank"] == [got["all"]]
    assert one_rank["check_training"]["bf16"]["backbone"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("kind", ["fp32", "bf16", "frozen"])
def test_a_bad_value_on_one_rank_makes_all_ranks_skip_both_engines(two_ranks, kind):
    for rank in two_ranks:
        check_skips(rank["check_skips"][kind])


def test_a_single_rank_skips_both_engines(one_rank):
    check_skips(one_rank["check_skips"]["bf16"])


def check_skips(steps):
    for name, got in steps.items():
        assert got["skipped"], name
        assert not got["moved"], name  # weights, FP32 masters, optimizer states and BatchNorm's running statistics
        assert math.isfinite(got["bad_norm"]) != (name in GRADIENT_POISONS), name
        assert math.isfinite(got["bad_loss"]) != (name in LOSS_POISONS), name
        assert not got["good_skipped"] and got["good_moved"] and got["good_loss"] == pytest.approx(1.4, abs=1.2), name
        assert got["scheduled"] == 1 and got["same_rates"], name  # the bad step did not count
        assert got["finite"] and got["identical"], name


def test_an_overflow_is_infinite_and_no_nan(two_ranks):
    for rank in two_ranks:
        assert math.isinf(rank["check_skips"]["bf16"]["overflow_head_gradient"]["bad_norm"])


def test_a_frozen_backbone_has_no_optimizer_and_no_gradients(two_ranks):
    """Bytes left per backbone parameter of the shard: 2.2 measured when frozen (bf16 alone is 2), 16.2 when trained."""
    for rank in two_ranks:
        frozen, trained = rank["check_frozen"]["frozen"], rank["check_frozen"]["trained"]
        assert frozen["bytes_per_parameter"] < 2.5
        assert trained["bytes_per_parameter"] > 14
        assert frozen["optimizer"] == "DeepSpeedZeRoOffload"  # DeepSpeed's gathering of shards, which optimizes nothing
        assert not frozen["gradient_partitions"] and trained["gradient_partitions"]
        assert frozen["gradients"] == frozen["moved_backbone"] == 0
        assert frozen["moved_heads"] == trained["moved_heads"] == 14
        assert trained["moved_backbone"] > 10
        assert all("head" in name for name in frozen["group_names"])


def test_a_frozen_trunk_is_released_when_it_was_used(two_ranks):
    """DeepSpeed would keep it for a backward pass that never comes: 0.94 of these backbones, 11 GiB of InternViT-6B."""
    for rank in two_ranks:
        got = rank["check_whole_parameters"]
        assert got["trained"]["share"] > 0.99 and got["frozen_kept"]["share"] > 0.9
        assert got["frozen"]["share"] < 0.15  # layers of the pyramid, fetched ahead
        assert got["frozen"]["losses"] == got["frozen_kept"]["losses"]


@pytest.mark.parametrize("kind", ["trained", "frozen", "part"])
def test_a_resumed_run_goes_on_bit_for_bit(two_ranks, kind):
    for rank in two_ranks:
        got = rank["check_resume"][kind]
        assert got["fresh_differs"] and got["loaded"]
        assert got["losses"] and got["end"]
        assert got["state"] and got["listed"] and got["name"] == "step_000002"


def test_a_resumed_run_goes_on_bit_for_bit_on_one_rank(one_rank):
    got = one_rank["check_resume"]["trained"]
    assert got["fresh_differs"] and got["loaded"] and got["losses"] and got["end"]


def test_checkpoints_of_a_frozen_backbone_share_its_file(two_ranks):
    got = two_ranks[0]["check_linked_backbone"]
    assert got == {"shared": True, "again": True, "folders": ["latest", "step_000001", "step_000002"]}


@pytest.mark.parametrize("kind", ["trained", "frozen", "part"])
def test_weights_of_two_ranks_load_on_one_and_on_two(one_rank, two_ranks, kind):
    for run in (one_rank, *two_ranks):
        got = run["check_load_weights"][kind]
        assert got["tensors"] == 44 and got["same_names"]
        assert got["different"] == []


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        ("flipped", "is damaged: backbone/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt has another checksum"),
        ("missing", "is damaged: heads.pt is missing"),
        ("truncated", "is damaged: state.json has "),
        ("manifest", "is damaged: manifest.json can't be read"),
        ("absent", "is not a ds_seg checkpoint: it has no manifest.json"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_all_ranks_before_anything_is_loaded(two_ranks, damage, text):
    for rank in two_ranks:
        got = rank["check_damage"][damage]
        assert text in got["message"] and text in got["loading"]
        assert got["unmoved"]
        assert got["message"] == two_ranks[0]["check_damage"][damage]["message"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("seed", "seed: 0 there, 5 here"),
        ("batch", "global_batch: 16 there, 24 here"),
        ("frozen", "backbone_trained: False there, True here"),
        ("model", "is of another model: backbone parameter 'blocks.2.norm1.weight' has shape none there and [84] in"),
    ],
)
def test_a_checkpoint_of_another_run_or_model_is_refused(one_rank, two_ranks, name, text):
    for run in (one_rank, *two_ranks):
        assert text in run["check_mismatches"][name]
        assert run["check_mismatches"]["unmoved"]


def test_heads_that_do_not_fit_a_checkpoint_start_from_initial_values(two_ranks):
    for rank in two_ranks:
        got = rank["check_other_classes"]
        decode_head, auxiliary_head = got["left_initial"]
        assert decode_head.startswith("decode_head: decode_head.conv_seg.weight is [")
        assert "auxiliary_head: the file's head has" in auxiliary_head
        assert got["taken"] and all(name.startswith("decode_head.norm.") for name in got["taken"])
        assert "is of another model: heads parameter" in got["needed"]


def test_a_model_that_cannot_be_built_is_the_users_mistake(two_ranks):
    for rank in two_ranks:
        got = rank["check_bad_configs"]
        assert "model.backbone can't be built" in got["argument"] and "bogus" in got["argument"]
        assert "embed_dim 84 is not a multiple of num_heads 5" in got["heads"]
        assert "model.decode_head.in_channels is 84, but the backbone's map -1 has 42 channels" in got["channels"]
