"""What keys that a config leaves out mean: a run's numbers depend on them."""

from ds_seg.config.batches import Batches, resolve_batches
from ds_seg.config.faults import Faults
from ds_seg.config.optimizer import LAYER_DECAY_CONSTRUCTOR, OptimizerSettings, read_optimizer

DEPTH = 6


def test_an_optimizer_without_keys():
    wanted = OptimizerSettings(
        1e-4, (0.9, 0.999), 1e-8, 0.01, layer_decay_rate=None, decay_embeddings=False, multipliers={}
    )
    assert read_optimizer({}, DEPTH, Faults("a.py")) == wanted


def test_layer_decay_without_keys_decays_no_rate_and_exempts_the_embeddings():
    settings = read_optimizer({"constructor": LAYER_DECAY_CONSTRUCTOR}, DEPTH, Faults("a.py"))
    assert (settings.layer_decay_rate, settings.decay_embeddings) == (1.0, False)


def test_a_multiplier_without_a_factor_leaves_it():
    given = {"paramwise_cfg": {"custom_keys": {"a": {"lr_mult": 0.5}, "b": {"decay_mult": 0.0}}}}
    assert read_optimizer(given, DEPTH, Faults("a.py")).multipliers == {"a": (0.5, 1.0), "b": (1.0, 0.0)}


def test_a_process_takes_one_crop_where_nothing_is_said():
    for data in ({}, {"samples_per_gpu": 1}):
        faults = Faults("a.py")
        batches = resolve_batches({"data": data}, cumulative_iters=None, world_size=2, kept=None, faults=faults)
        assert batches == Batches(1, 1) and not faults.messages
