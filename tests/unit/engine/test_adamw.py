"""The backbone's optimizer cuts DeepSpeed's flat tensors by rate: the same bits as torch's AdamW on each piece."""

import copy
import weakref

import pytest
import torch
from torch import nn

from ds_seg.config import OptimizerSettings
from ds_seg.engine.adamw import RATE_GROUPS, build_adamw, build_backbone_adamw, build_resident_adamw

SETTINGS = OptimizerSettings(
    lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.05, layer_decay_rate=0.5, decay_embeddings=False
)
SIZES = [[33, 5], [64, 7, 1], [19]]  # elements of the parameters of each rate group: odd lengths have tails
SUB_GROUPS = [(0, 3), (4, 5)]  # first and last parameter of what DeepSpeed steps at once


class CountingOptimizer(torch.optim.Optimizer):
    """Counts in a plain number, as DeepSpeed's CPU optimizer does."""

    def __init__(self, groups):
        super().__init__(groups, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for tensor in group["params"]:
                state = self.state[tensor]
                state.setdefault("step", 0)
                state.setdefault("moment", torch.zeros_like(tensor))
                state["step"] += 1
                state["moment"] += tensor.grad
                tensor -= group["lr"] * state["moment"]


def make_groups():
    """Rate groups whose parameters look like DeepSpeed's shards."""
    numbers = iter(range(100))
    groups = []
    for index, sizes in enumerate(SIZES):
        params = [nn.Parameter(torch.zeros(size)) for size in sizes]
        for parameter in params:
            parameter.ds_id = next(numbers)
            parameter.partition_numel = parameter.numel
        lr = 1e-3 * 0.5**index
        names = [f"p{parameter.ds_id}" for parameter in params]
        decay = 0.05 * (index % 2)
        groups.append({"params": params, "names": names, "lr": lr, "base_lr": lr, "weight_decay": decay, "layers": "x"})
    return groups


def make_flats(groups):
    """One flat tensor for each sub-group, as DeepSpeed makes and names it."""
    torch.manual_seed(0)
    parameters = [parameter for group in groups for parameter in group["params"]]
    flats = []
    for first, last in SUB_GROUPS:
        flat = torch.randn(sum(parameter.numel() for parameter in parameters[first : last + 1])).requires_grad_()
        flat.ds_id = f"{first}_{last}"
        flats.append(flat)
    return flats


def step(optimizer, flats, number):
    """A step as DeepSpeed makes it: each flat tensor in turn is the only parameter of the only group."""
    generator = torch.Generator().manual_seed(number)
    for flat in flats:
        flat.grad = torch.randn(flat.shape, generator=generator)
        optimizer.param_groups[0]["params"] = [flat]
        optimizer.step()
        optimizer.param_groups[0]["params"] = []


def plain_pieces(flats):
    """The stretches of one rate in each flat tensor, as parameters, and the rate group of each."""
    first, second = flats[0].detach().split([38, 71]), flats[1].detach().split([1, 19])
    return [nn.Parameter(piece.clone()) for piece in (*first, *second)], [0, 1, 1, 2]


def test_the_same_bits_as_torch_on_each_piece():
    groups = make_groups()
    optimizer, flats = build_backbone_adamw(groups, SETTINGS, offloaded=False), make_flats(groups)
    pieces, rate_group = plain_pieces(flats)
    rates = [{key: groups[index][key] for key in ("lr", "weight_decay")} for index in rate_group]
    plain = build_adamw([{"params": [p], **rate} for p, rate in zip(pieces, rates, strict=True)], SETTINGS)
    for number in range(6):
        for shown, group in zip((0, 1, 1, 2), plain.param_groups, strict=True):
            group["lr"] = optimizer.param_groups[0][RATE_GROUPS][shown]["lr"] = 1e-3 * 0.5**shown / (number + 1)
        step(optimizer, flats, number)
        gradients = [flats[0].grad.split([38, 71]), flats[1].grad.split([1, 19])]
        for piece, gradient in zip(pieces, [g for part in gradients for g in part], strict=True):
            piece.grad = gradient.clone()
        plain.step()
        assert torch.equal(torch.cat([flat.detach() for flat in flats]), torch.cat([p.detach() for p in pieces]))
    for key in ("exp_avg", "exp_avg_sq"):
        wanted = torch.cat([plain.state[piece][key] for piece in pieces])
        assert torch.equal(torch.cat([optimizer.state[flat][key] for flat in flats]), wanted)
    assert [optimizer.state[flat]["step"].item() for flat in flats] == [6, 6]


def test_between_steps_groups_and_state_belong_to_the_flat_tensors():
    groups = make_groups()
    optimizer, flats = build_backbone_adamw(groups, SETTINGS, offloaded=False), make_flats(groups)
    assert type(optimizer) is torch.optim.AdamW  # DeepSpeed compares exact types
    for number in range(2):
        step(optimizer, flats, number)
        assert [id(tensor) for tensor in optimizer.state] == [id(flat) for flat in flats]
        ((group,),) = (optimizer.param_groups,)
        assert [rates["names"] for rates in group[RATE_GROUPS]] == [["p0", "p1"], ["p2", "p3", "p4"], ["p5"]]
        assert all("params" not in rates for rates in group[RATE_GROUPS])
    steps = [optimizer.state[flat]["step"] for flat in flats]
    assert steps[0].data_ptr() != steps[1].data_ptr() and all(count.dim() == 0 for count in steps)


def test_the_gradient_is_let_go_after_a_step():
    groups = make_groups()
    optimizer, flats = build_backbone_adamw(groups, SETTINGS, offloaded=False), make_flats(groups)
    step(optimizer, flats, 0)
    gradient = weakref.ref(flats[-1].grad.untyped_storage())
    flats[-1].grad = None
    assert gradient() is None


def test_a_loaded_state_goes_on_bit_for_bit():
    groups = make_groups()
    optimizer, flats = build_backbone_adamw(groups, SETTINGS, offloaded=False), make_flats(groups)
    for number in range(2):
        step(optimizer, flats, number)
    optimizer.param_groups[0]["params"] = flats  # as DeepSpeed has it while it saves and loads
    saved, weights = copy.deepcopy(optimizer.state_dict()), [flat.detach().clone() for flat in flats]
    assert [rates["base_lr"] for rates in saved["param_groups"][0][RATE_GROUPS]] == [1e-3, 5e-4, 2.5e-4]

    again_groups = make_groups()
    again, again_flats = build_backbone_adamw(again_groups, SETTINGS, offloaded=False), make_flats(again_groups)
    again.param_groups[0]["params"] = again_flats
    again.load_state_dict(saved)
    for flat, weight in zip(again_flats, weights, strict=True):
        flat.data.copy_(weight)
    for number in range(2, 4):
        step(optimizer, flats, number)
        step(again, again_flats, number)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(flats, again_flats, strict=True))


def test_an_optimizer_that_counts_in_plain_numbers_counts_once_a_step(monkeypatch):
    monkeypatch.setattr("ds_seg.engine.adamw.DeepSpeedCPUAdam", lambda groups, **_settings: CountingOptimizer(groups))
    groups = make_groups()
    optimizer, flats = build_backbone_adamw(groups, SETTINGS, offloaded=True), make_flats(groups)
    before, moment = flats[0].detach().clone(), torch.zeros(109)
    rates = torch.cat([torch.full((38,), 1e-3), torch.full((71,), 5e-4)])
    for number in range(3):
        step(optimizer, flats, number)
        moment += flats[0].grad
        before -= rates * moment
    assert [optimizer.state[flat]["step"] for flat in flats] == [3, 3]
    torch.testing.assert_close(flats[0].detach(), before, rtol=0, atol=1e-7)


def test_a_second_optimizer_steps_what_stays_on_the_gpu(monkeypatch):
    """The state of both is one, and the rates: what a schedule sets in the first is what the second steps with."""
    monkeypatch.setattr("ds_seg.engine.adamw.DeepSpeedCPUAdam", lambda groups, **_settings: CountingOptimizer(groups))
    groups, plain_groups = make_groups(), make_groups()
    offloaded = build_backbone_adamw(groups, SETTINGS, offloaded=True)
    resident, flats = build_resident_adamw(offloaded, groups, SETTINGS), make_flats(groups)
    plain, plain_flats = build_backbone_adamw(plain_groups, SETTINGS, offloaded=False), make_flats(plain_groups)
    assert resident.param_groups[0]["params"] == []
    for number in range(3):
        for optimizer in (offloaded, plain):
            for group in optimizer.param_groups[0][RATE_GROUPS]:
                group["lr"] = group["base_lr"] / (1 + number)
        step(resident, flats[:1], number)
        step(offloaded, flats[1:], number)
        step(plain, plain_flats[:1], number)
    assert torch.equal(flats[0], plain_flats[0])
    assert torch.equal(offloaded.state[flats[0]]["exp_avg_sq"], plain.state[plain_flats[0]]["exp_avg_sq"])
    assert [offloaded.state[flat]["step"] for flat in flats] == [3, 3]
    assert "moment" in offloaded.state[flats[1]] and len(offloaded.state) == 2


def test_a_flat_tensor_of_other_parameters_is_refused():
    groups = make_groups()
    optimizer, flats = build_backbone_adamw(groups, SETTINGS, offloaded=False), make_flats(groups)
    flats[0].ds_id = "0_2"
    with pytest.raises(AssertionError, match="flat tensor 0_2 has 109 elements, its parameters 102"):
        step(optimizer, flats, 0)
