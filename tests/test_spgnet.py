"""spgnet.py against the words and figures of its paper, written here over indices, in float64."""

import doctest
import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from conftest import LIGHT, normed, trained
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

import backbones
import data
import evaluate
import spgnet

pytestmark = pytest.mark.usefixtures("one_seed")


def resnets(*depths):
    return tuple(f"resnet{depth}" for depth in depths)


def tiny(**options):
    """Two stages of ResNet-18, narrow decoders."""
    return spgnet.build(4, "resnet18", **dict(channels=16) | options)


def scene(size=(40, 53), n=2):
    images, labels = torch.randn(n, 3, *size), torch.randint(4, (n, *size))
    labels[0, :5] = 255
    return images, labels


# --------------------------------------------------------------------- semantic prediction guidance


def guidance(excite, identity=True, D=2, K=2, out=1):
    return spgnet.SemanticPredictionGuidance(D, K, out, excite, identity).double()


def set_to(conv, weight, bias):
    with torch.no_grad():
        conv.weight.copy_(torch.tensor(weight).double().view_as(conv.weight))
        conv.bias.copy_(torch.tensor(bias).double())


# Two images of two pixels, a and b. x_d is (1, 2), (3, 4) in one, (0, 1), (2, 3) in the other.
# x_l = (x_1, 1 - x_2) is (1, -1), (3, -3) and (0, 0), (2, -2). W_m x_l = ln 3 · (0, x_1):
# the sigmoids are (1/2, 3/4), (1/2, 27/28) and (1/2, 1/2), (1/2, 9/10);
# the softmax over a and b is (1/2, 1/10), (1/2, 9/10) in both images.
# W_t x_d = (2 x_1 + 1, x_2) is (3, 2), (7, 4) and (1, 1), (5, 3). W_o y = 10 y_1 + y_2 + 5.
L = math.log(3)
BY_HAND = [
    ("sigmoid", True, [33.5, 74 + 27 / 7, 11.5, 55.7]),  # a: x_d + m ⊙ W_t x_d = (2.5, 3.5)
    ("sigmoid", False, [21.5, 40 + 27 / 7, 10.5, 32.7]),  # a: (1.5, 1.5)
    ("softmax", True, [32.2, 77.6, 11.1, 55.7]),  # a: (2.5, 2.2)
    ("softmax", False, [20.2, 43.6, 10.1, 32.7]),  # a: (1.5, 0.2)
    ("sum", True, [49 + L, 113 + 3 * L, 17, 81 + 2 * L]),  # a: (4, 4 + ln 3)
    ("sum", False, [37 + L, 79 + 3 * L, 16, 58 + 2 * L]),  # a: (3, 2 + ln 3)
]


@pytest.mark.equation
@pytest.mark.parametrize("excite, identity, expected", BY_HAND)
def test_fig_3_by_hand_on_two_channels_and_two_images(excite, identity, expected):
    module = guidance(excite, identity)
    set_to(module.logits, [[1.0, 0], [0, -1]], [0.0, 1.0])
    set_to(module.attention, [[L, L], [L, 0]], [0.0, 0.0])
    set_to(module.transform, [[2.0, 0], [0, 1]], [1.0, 0.0])
    set_to(module.out, [10.0, 1.0], [5.0])
    x_d = torch.tensor([[[[1.0, 3]], [[2, 4]]], [[[0, 2]], [[1, 3]]]]).double()
    out, x_l = module(x_d)
    assert x_l.tolist() == [[[[1, 3]], [[-1, -3]]], [[[0, 2]], [[0, -2]]]]
    torch.testing.assert_close(out.flatten(), torch.tensor(expected).double())


@pytest.mark.equation
def test_the_example_in_the_docstring_holds():
    found = doctest.testmod(spgnet)
    assert found.attempted > 0 and found.failed == 0


def loop_guidance(module, x_d):
    """Sect. 3.4, position by position."""
    N, D, H, W = x_d.shape
    layers = ("logits", "attention", "transform", "out")
    w = {n: getattr(module, n).weight[:, :, 0, 0] for n in layers}
    b = {n: getattr(module, n).bias for n in layers}
    outs = []
    for n in range(N):
        before = {}
        for i, j in product(range(H), range(W)):
            x_l = w["logits"] @ x_d[n, :, i, j] + b["logits"]
            before[i, j] = w["attention"] @ x_l + b["attention"]
        total = sum(torch.exp(v) for v in before.values())
        for (i, j), v in before.items():
            y = w["transform"] @ x_d[n, :, i, j] + b["transform"]
            if module.excite == "sum":
                y = y + v
            else:
                m = 1 / (1 + torch.exp(-v)) if module.excite == "sigmoid" else torch.exp(v) / total
                y = m * y
            outs.append(w["out"] @ (y + x_d[n, :, i, j] if module.identity else y) + b["out"])
    return torch.stack(outs).view(N, H, W, -1).permute(0, 3, 1, 2)


@pytest.mark.equation
@pytest.mark.parametrize("identity", [True, False])
@pytest.mark.parametrize("excite", ["sigmoid", "softmax", "sum"])
def test_guidance_equals_the_loop_with_gradients(excite, identity):
    module = guidance(excite, identity, D=5, K=3, out=4)
    x_d = torch.randn(2, 5, 2, 3, dtype=torch.float64, requires_grad=True)
    found, expected = module(x_d)[0], loop_guidance(module, x_d)
    torch.testing.assert_close(found, expected)
    pull = torch.randn_like(found)
    inputs = [x_d, *module.parameters()]
    for a, b in zip(
        torch.autograd.grad((found * pull).sum(), inputs),
        torch.autograd.grad((expected * pull).sum(), inputs),
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.equation
def test_the_loss_of_the_guidance_trains_the_logits_alone():
    module, x_d = guidance("sigmoid", D=5, K=3, out=4), torch.randn(2, 5, 2, 3).double()
    module(x_d)[1].sum().backward()
    assert module.logits.weight.grad is not None
    layers = module.attention, module.transform, module.out
    assert all(layer.weight.grad is None for layer in layers)


@pytest.mark.equation
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 1)])
def test_guidance_of_one_image_and_one_position_wide(size):
    for excite, identity in product(("sigmoid", "softmax", "sum"), (True, False)):
        module, x_d = guidance(excite, identity, D=5, K=3, out=4), torch.randn(1, 5, *size).double()
        torch.testing.assert_close(module(x_d)[0], loop_guidance(module, x_d))


@pytest.mark.equation
def test_softmax_mask_sums_to_one_over_the_positions_and_sigmoid_is_a_gate():
    x_l = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    m = guidance("softmax", D=6, K=3).mask(x_l)
    torch.testing.assert_close(m.sum((2, 3)), torch.ones(2, 6, dtype=torch.float64))
    m = guidance("sigmoid", D=6, K=3).mask(10 * x_l)
    assert 0 < m.min() < 0.1 and 0.9 < m.max() < 1


@pytest.mark.network
def test_unknown_excitation_is_named():
    with pytest.raises(ValueError, match="excite='tanh': it is one of 'sigmoid', 'softmax', 'sum'"):
        tiny(excite="tanh")
    with pytest.raises(ValueError, match="excite='tanh'"):
        spgnet.SemanticPredictionGuidance(16, 4, 16, "tanh")


# -------------------------------------------------------------------------------------- supervision


@pytest.mark.network
def test_each_stage_has_its_loss_and_all_parameters_a_gradient():
    net = tiny(backbones=resnets(18, 18, 18)).train()
    losses = net(*scene())
    assert list(losses) == ["stage_1", "stage_2", "cross_entropy"]
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.network
def test_every_stages_loss_is_that_of_its_logits():
    images, labels = scene()
    net = tiny(backbones=resnets(18, 18, 18), hard_examples=False).eval()
    x, maps, expected = backbones.extended(images, 32), None, []
    for stage, guide in zip(net.stages, [*net.guides, None]):
        maps = stage(x, maps)
        x_l = net.classifier(maps[1][0]) if guide is None else guide.logits(maps[1][0])
        full = backbones.upsample(x_l, 4, images.shape[2:])
        expected.append(F.cross_entropy(full, labels, ignore_index=255))
        x = None if guide is None else guide(maps[1][0])[0]
    torch.testing.assert_close(list(net(images, labels).values()), expected)


@pytest.mark.network
def test_a_stages_loss_trains_the_stages_up_to_it_alone():
    net = tiny(backbones=resnets(18, 18)).train()
    net(*scene())["stage_1"].backward()
    reached = {
        name.split(".")[0] + "." + name.split(".")[1]
        for name, p in net.named_parameters()
        if p.grad is not None
    }
    assert reached == {"stages.0", "guides.0"} and net.guides[0].attention.weight.grad is None


@pytest.mark.network
def test_without_supervision_its_loss_has_no_gradient():
    images, labels = scene()
    with_loss, without = tiny().eval(), tiny(supervise=False).eval()
    without.load_state_dict(with_loss.state_dict())
    losses = without(images, labels)
    assert list(losses) == ["cross_entropy"] and torch.equal(
        losses["cross_entropy"], with_loss(images, labels)["cross_entropy"]
    )
    gradients = []
    for net in (with_loss, without):
        loss = sum(net(images, labels).values())
        gradients.append(torch.autograd.grad(loss, net.guides[0].logits.weight)[0])
    extra = torch.autograd.grad(
        with_loss(images, labels)["stage_1"], with_loss.guides[0].logits.weight
    )[0]
    torch.testing.assert_close(gradients[0], gradients[1] + extra)
    assert extra.abs().max() > 1e-4


@pytest.mark.network
def test_losses_are_those_of_the_logits_at_the_images_size():
    images, labels = scene()
    net = tiny(hard_examples=False).eval()
    losses = net(images, labels)
    torch.testing.assert_close(
        losses["cross_entropy"], F.cross_entropy(net(images), labels, ignore_index=255)
    )
    x_d = net.stages[0](backbones.extended(images, 32))[1][0]
    first = backbones.upsample(net.guides[0].logits(x_d), 4, images.shape[2:])
    torch.testing.assert_close(losses["stage_1"], F.cross_entropy(first, labels, ignore_index=255))
    hard = tiny().eval()
    with torch.no_grad():  # sure of class 0: its pixels are easy
        net.guides[0].logits.bias[0] = net.classifier.bias[0] = 5
    hard.load_state_dict(net.state_dict())
    first = backbones.upsample(net.guides[0].logits(x_d), 4, images.shape[2:])
    expected = spgnet.online_hard_example_loss(first, labels)
    assert expected > 1.1 * F.cross_entropy(first, labels, ignore_index=255)
    torch.testing.assert_close(hard(images, labels)["stage_1"], expected)
    torch.testing.assert_close(
        hard(images, labels)["cross_entropy"], spgnet.online_hard_example_loss(net(images), labels)
    )


# -------------------------------------------------------------------------------------- hard pixels


def sorted_loss(logits, labels, threshold, minimum):
    """Image by image: all pixels sorted by their loss, those kept that are hard enough or among the
    first.
    """
    kept = []
    for image, label in zip(logits, labels):
        losses = []
        for i, j in product(*map(range, label.shape)):
            if label[i, j] != 255:
                losses.append(-torch.log_softmax(image[:, i, j], 0)[label[i, j]])
        losses.sort(reverse=True, key=lambda value: value.item())
        least = math.ceil(minimum * len(losses))  # 0: by the threshold alone
        kept += [
            value
            for rank, value in enumerate(losses)
            if rank < least or torch.exp(-value) < threshold
        ]
    return sum(kept) / len(kept) if kept else 0 * logits.sum()


@pytest.mark.equation
@pytest.mark.parametrize(
    "threshold, minimum", [(0.7, 1 / 16), (0.0, 0.3), (0.2, 0.01), (1.1, 0.0), (0.0, 0.0)]
)
def test_hard_examples_against_a_sort_with_gradients(threshold, minimum):
    logits = 3 * torch.randn(2, 3, 5, 6)
    logits[1] /= 10
    logits.requires_grad_()
    labels = torch.randint(3, (2, 5, 6))
    labels[0, 0], labels[1, :, 0] = 255, 255
    found = spgnet.online_hard_example_loss(logits, labels, threshold, minimum)
    expected = sorted_loss(logits, labels, threshold, minimum)
    torch.testing.assert_close(found, expected)
    a, b = (torch.autograd.grad(loss, logits)[0] for loss in (found, expected))
    torch.testing.assert_close(a, b)
    kept = (a.abs().sum(1) > 0).sum().item()
    least = math.ceil(24 * minimum) + math.ceil(25 * minimum)  # labelled pixels: 24 and 25
    assert kept == {0.0: least, 1.1: 49}.get(threshold, kept) and least <= kept <= 49


@pytest.mark.equation
def test_hard_examples_by_hand():
    p = torch.tensor([0.9, 0.8, 0.6, 0.95])  # of the true class; one of four is at least 15 %
    logits = torch.stack([p.log(), (1 - p).log()])[None, :, None]
    labels = torch.zeros(1, 1, 4, dtype=torch.int64)
    assert spgnet.online_hard_example_loss(logits, labels).item() == pytest.approx(
        -math.log(0.6), rel=1e-5
    )
    half = spgnet.online_hard_example_loss(logits, labels, minimum=0.5)
    assert half.item() == pytest.approx(-(math.log(0.6) + math.log(0.8)) / 2, rel=1e-5)


@pytest.mark.equation
def test_many_pixels_without_any_loss_do_not_join_the_hardest():
    logits = torch.tensor([[200.0], [0.0]]).expand(2, 64).clone()
    logits[:, 7] = torch.tensor([0.0, 1.0])
    loss = spgnet.online_hard_example_loss(
        logits.view(1, 2, 8, 8), torch.zeros(1, 8, 8, dtype=torch.int64)
    )
    assert loss.item() == pytest.approx(
        math.log(1 + math.e) / 10, rel=1e-5
    )  # 15 % of 64 pixels are 9.6


@pytest.mark.equation
def test_hard_examples_where_nothing_is_labelled():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = spgnet.online_hard_example_loss(logits, torch.full((1, 4, 4), 255))
    assert loss == 0 and not torch.autograd.grad(loss, logits)[0].any()


@pytest.mark.equation
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_hard_examples_of_half_precision_are_float32(dtype):
    logits, labels = torch.randn(2, 3, 4, 4).to(dtype), torch.randint(3, (2, 4, 4))
    loss = spgnet.online_hard_example_loss(logits, labels)
    assert loss.dtype == torch.float32 and loss == spgnet.online_hard_example_loss(
        logits.float(), labels
    )


def joint_batch():
    generator = torch.Generator().manual_seed(2)
    logits = 2 * torch.randn(2, 3, 6, 6, generator=generator)
    labels = torch.randint(3, (2, 6, 6), generator=generator)
    labels[1, 2:] = 255
    return logits, labels


def share_of_the_batch(rank):
    logits, labels = (part[rank : rank + 1] for part in joint_batch())
    logits = logits.clone().requires_grad_()
    loss = spgnet.online_hard_example_loss(logits, labels)
    return (loss.detach(), *torch.autograd.grad(loss, logits))


@pytest.mark.system
def test_hard_examples_of_two_processes_are_those_of_the_joint_batch(two_processes):
    (loss0, gradient0), (loss1, gradient1) = two_processes(share_of_the_batch)
    logits, labels = joint_batch()
    logits.requires_grad_()
    loss = spgnet.online_hard_example_loss(logits, labels)
    torch.testing.assert_close((loss0 + loss1) / 2, loss.detach())
    torch.testing.assert_close(
        torch.cat([gradient0, gradient1]) / 2, torch.autograd.grad(loss, logits)[0]
    )


# ------------------------------------------------------------------------------ encoder and decoder


def bottleneck(x, block):
    """1x1, 3x3, 1x1, a quarter as wide in the middle, and the shortcut, projected if it must be."""
    y = normed(normed(x, block.conv1, block.bn1), block.conv2, block.bn2)
    y = normed(y, block.conv3, block.bn3, activation=lambda y: y)
    return F.relu(y + (normed(x, *block.downsample, lambda y: y) if block.downsample else x))


@pytest.mark.network
def test_fig_2_residual_block_is_resnets_a_quarter_as_wide_in_its_middle():
    block = trained(spgnet.ResidualBlock(64, 128))
    convs = (block.conv1, block.conv2, block.conv3, block.downsample[0])
    shapes = [tuple(conv.weight.shape) for conv in convs]
    assert shapes == [(32, 64, 1, 1), (32, 32, 3, 3), (128, 32, 1, 1), (128, 64, 1, 1)]
    assert spgnet.ResidualBlock(128, 128).downsample is None
    x = torch.randn(1, 64, 3, 4)
    torch.testing.assert_close(block(x), bottleneck(x, block))


@pytest.mark.network
def test_fig_2b_upsample_module_reduces_adds_and_fuses_twice():
    module = trained(spgnet.UpsampleModule(6, 8))
    e, d = torch.randn(2, 6, 9, 5), torch.randn(2, 8, 5, 3)
    doubled = F.interpolate(d, size=(9, 5), mode="bilinear", align_corners=True)
    # position i of the coarse map is position 2i of the fine one
    assert torch.equal(doubled[:, :, ::2, ::2], d)
    first, second = module.fuse
    y = bottleneck(bottleneck(bottleneck(e, module.reduce) + doubled, first), second)
    torch.testing.assert_close(module(e, d), y)


@pytest.mark.network
def test_fig_2a_one_stage_is_encoder_image_level_and_decoder():
    images, labels = scene()
    net = trained(tiny(backbones=resnets(18), hard_examples=False))
    stage = net.stages[0]
    x, encoded = stage.stem(backbones.extended(images, 32)), []
    for level in stage.levels:
        x = level(x)
        encoded.append(x)
    w, b = stage.image_level.weight, stage.image_level.bias
    y = F.conv2d(x.mean((2, 3), keepdim=True), w, b)  # a 1x1 convolution without a norm
    assert y.shape == (2, 16, 1, 1)
    for i in (3, 2, 1, 0):
        y = stage.upsample[i](encoded[i], y)
    assert stage.last[0].kernel_size == (3, 3)
    y = normed(y, *list(stage.last)[:2])
    logits = backbones.upsample(net.classifier(y), 4, images.shape[2:])
    torch.testing.assert_close(net(images), logits)
    assert len(net.guides) == 0 and list(net(images, labels)) == ["cross_entropy"]


@pytest.mark.network
def test_fig_2c_later_stages_have_no_stem_and_aggregate_at_each_stride():
    first, second = trained(tiny(backbones=resnets(18, 18))).double().stages
    assert isinstance(second.stem, torch.nn.Identity) and second.entry == 64
    assert not first.aggregate
    e, d = first(torch.randn(1, 3, 65, 97).double())
    previous = [[m.detach().requires_grad_() for m in maps] for maps in (e, d)]
    x = z = torch.randn(1, 64, 17, 25).double()
    encoded, decoded = second(x, previous)
    for i, level in enumerate(second.levels):
        from_encoder, from_decoder = second.aggregate[i].encoder, second.aggregate[i].decoder
        assert from_encoder[0].kernel_size == from_decoder[0].kernel_size == (1, 1)
        z = level(z) + normed(previous[0][i], *list(from_encoder)[:2])
        z = z + normed(previous[1][i], *list(from_decoder)[:2])
        torch.testing.assert_close(encoded[i], z)
    y = z.mean((2, 3), keepdim=True)  # the decoder reads the sums as well
    y = F.conv2d(y, second.image_level.weight, second.image_level.bias)
    for i in (3, 2, 1, 0):
        y = second.upsample[i](encoded[i], y)
        torch.testing.assert_close(decoded[i], y if i else normed(y, *list(second.last)[:2]))
    assert [tuple(m.shape[2:]) for m in decoded] == [(17, 25), (9, 13), (5, 7), (3, 4)]
    assert all(m.shape[1] == 16 for m in decoded)
    gradients = torch.autograd.grad(decoded[0].sum(), previous[0] + previous[1])
    assert all(gradient.abs().max() > 0 for gradient in gradients)  # nothing is detached
    assert not tiny(aggregate=False).stages[1].aggregate


# --------------------------------------------------------------- without guidance by predictions


@pytest.mark.network
@pytest.mark.parametrize("gate", [None, "se", "ge"])
def test_tables_3_4_without_guidance_features_pass_and_logits_are_supervised_apart(gate):
    module = spgnet.WithoutGuidance(32, 4, 6, gate).double()
    x_d = torch.randn(2, 32, 9, 17).double().requires_grad_()
    y = x_d
    if gate == "se":
        squeeze, expand = module.gate.fc1, module.gate.fc2
        assert squeeze.out_channels == 2
        h = F.relu(x_d.mean((2, 3)) @ squeeze.weight[:, :, 0, 0].T + squeeze.bias)
        y = x_d * (h @ expand.weight[:, :, 0, 0].T + expand.bias).sigmoid()[..., None, None]
    if gate == "ge":
        y = spgnet.gather_excite(x_d)
    expected = F.conv2d(y, module.out.weight, module.out.bias)
    expected_l = F.conv2d(x_d, module.logits.weight, module.logits.bias)
    assert module.out.weight.shape == (6, 32, 1, 1) and module.logits.weight.shape == (4, 32, 1, 1)
    out, x_l = module(x_d)
    for found, wanted in ((out, expected), (x_l, expected_l)):
        torch.testing.assert_close(found, wanted)
        pull = torch.randn_like(found)
        a, b = (torch.autograd.grad((z * pull).sum(), x_d)[0] for z in (found, wanted))
        torch.testing.assert_close(a, b)
        assert b.abs().max() > 0


@pytest.mark.network
@pytest.mark.parametrize("guidance", [None, "se", "ge"])
def test_tables_3_4_the_baseline_is_supervised_and_need_not_be(guidance):
    net, alone = tiny(guidance=guidance).train(), tiny(guidance=guidance, supervise=False).train()
    assert list(net(*scene())) == ["stage_1", "cross_entropy"]
    losses = alone(*scene())
    assert list(losses) == ["cross_entropy"] and alone.guides[0].logits is None
    losses["cross_entropy"].backward()  # every parameter is used: DDP waits for each
    assert all(p.grad is not None for p in alone.parameters())
    gradients = torch.autograd.grad(net(*scene())["cross_entropy"], net.stages[0].last[0].weight)
    assert gradients[0].abs().max() > 0


@pytest.mark.equation
def test_gather_excite_gates_by_the_averages_around():
    x = torch.randn(1, 2, 17, 25)
    found = spgnet.gather_excite(x)
    # at every eighth position the mean of what is within seven of it
    for i, j in ((0, 0), (8, 8), (16, 24), (8, 16)):
        around = x[0, :, max(0, i - 7) : i + 8, max(0, j - 7) : j + 8].mean((1, 2))
        torch.testing.assert_close(found[0, :, i, j], x[0, :, i, j] * around.sigmoid())
    low, high = (x[0, :, max(0, i - 7) : i + 8, 1:16].mean((1, 2)) for i in (0, 8))
    torch.testing.assert_close(found[0, :, 4, 8], x[0, :, 4, 8] * ((low + high) / 2).sigmoid())


# ------------------------------------------------------------------------------------------ network

# options, the paper's parameters in 1e6, its multiply-adds in 1e9 at 1024x2048
ROWS = [
    (dict(backbones=resnets(18)), 11.7, 107.6),  # Tables 3, 5, 7
    (dict(backbones=resnets(18, 18), guidance=None), 23.9, 215.5),
    (dict(backbones=resnets(18, 18), excite="sum"), 23.9, 218.0),
    (dict(backbones=resnets(18, 18), excite="softmax"), 23.9, 218.0),
    (dict(backbones=resnets(18, 18)), 23.9, 218.0),
    (dict(backbones=resnets(18, 18), identity=False), 23.9, 218.0),
    (dict(backbones=resnets(18, 18), supervise=False), 23.9, 218.0),
    (dict(backbones=resnets(18, 18, 18)), 36.2, 328.5),
    (dict(backbones=resnets(18, 50)), 38.4, 336.0),  # Table 6
    (dict(backbones=resnets(50, 18)), 38.0, 329.9),
    (dict(backbones=resnets(50, 50)), 55.6, 467.6),
    (dict(backbones=resnets(50)), 24.7, 212.9),  # Table 7
    (dict(backbones=resnets(101)), 43.7, 371.7),
    (dict(backbones=resnets(152)), 59.4, 530.1),
    (dict(backbones=resnets(101, 101)), 93.5, 785.3),
    (dict(backbones=resnets(50, 50), channels=256), 59.8, 654.8),  # Tables 1, 9
    (dict(backbones=resnets(101, 101), channels=256), 97.8, 972.4),
]


@pytest.mark.network
@pytest.mark.parametrize("options, millions, billions", ROWS, ids=str)
def test_parameters_and_multiply_adds_are_those_of_the_papers_tables(options, millions, billions):
    with torch.device("meta"):
        net = spgnet.build(19, **dict(channels=128) | options).eval()
        images = torch.empty(1, 3, 1024, 2048)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        net(images)
    assert flops.get_total_flops() / 2e9 == pytest.approx(billions, rel=1e-3)


@pytest.mark.network
def test_the_default_is_the_best_of_table_9():
    with torch.device("meta"):
        net = spgnet.build(19)
    assert (
        len(net.stages) == 2
        and net.classifier.in_channels == 256
        and net.guides[0].excite == "sigmoid"
    )
    assert net.guides[0].identity and net.supervise and net.hard_examples


@pytest.mark.network
@pytest.mark.parametrize("size", [(64, 64), (37, 50), (1, 33)])
@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2"])
def test_logits_have_the_images_size_in_float32(backbone, size):
    net = spgnet.build(4, backbone, channels=16).eval()
    logits = net(torch.randn(1, 3, *size))
    assert logits.shape == (1, 4, *size) and logits.dtype == torch.float32


@pytest.mark.network
def test_stages_of_different_backbones():
    net = tiny(backbones=["mobilenet_v2", "resnet18", "resnet34"]).train()
    losses = net(*scene())
    sum(losses.values()).backward()
    assert [stage.entry for stage in net.stages] == [24, 64, 64]
    assert [stage.widths[-1] for stage in net.stages] == [320, 512, 512]
    assert len(net.stages[2].levels[2]) == 6
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.network
def test_one_image_can_be_trained_on():
    losses = tiny().train()(*scene(size=(64, 64), n=1))
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.network
def test_bf16_trains():
    net = tiny().train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = net(*scene())
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())


@pytest.mark.network
def test_mistakes_name_what_is_expected():
    with pytest.raises(ValueError, match="backbones: expected a name for each stage"):
        tiny(backbones="resnet18")
    with pytest.raises(ValueError, match="guidance='gate': it is one of 'spg', 'se', 'ge', None"):
        tiny(guidance="gate")
    with pytest.raises(ValueError, match="SPGNet has no option stages"):
        tiny(stages=2)
    with pytest.raises(ValueError, match="channels=24: expected a multiple of 16"):
        tiny(channels=24)
    for wrong in ("x", None, 32.0):
        with pytest.raises(ValueError, match="channels=.*: expected a multiple of 16"):
            tiny(channels=wrong)
    with pytest.raises(
        ValueError, match="backbone='xception65': it is one of 'resnet18', .*'mobilenet_v2'"
    ):
        spgnet.build(4, "xception65")


@pytest.mark.network
def test_parts_are_the_backbone():
    for name in ("resnet18", "mobilenet_v2"):
        torch.manual_seed(3)
        whole = backbones.build(name).eval()
        torch.manual_seed(3)
        stem, levels, channels = backbones.parts(name)
        x, found = stem.eval()(torch.ones(1, 3, 65, 65)), []
        assert x.shape[1] == channels[0]
        for level in levels:
            found.append(x := level.eval()(x))
        for a, b in zip(found, whole(torch.ones(1, 3, 65, 65)), strict=True):
            assert torch.equal(a, b)
        assert channels[1:] == whole.channels


@pytest.mark.system
def test_weights_reach_every_stage(tmp_path):
    state = models.resnet18().state_dict()
    torch.save(state, tmp_path / "w.pth")
    net = tiny(weights=str(tmp_path / "w.pth"))
    for stage in net.stages:
        assert torch.equal(stage.levels[3][1].conv2.weight, state["layer4.1.conv2.weight"])
    assert torch.equal(net.stages[0].stem[0].weight, state["conv1.weight"])
    with pytest.raises(ValueError, match="w.pth' does not fit: .* missing from the file"):
        tiny(backbones=resnets(18, 34), weights=str(tmp_path / "w.pth"))


@pytest.mark.system
def test_recipes_are_the_papers():
    recipe = spgnet.RECIPES["cityscapes"]  # Sect. 4.2
    settings = (
        "iterations",
        "batch_size",
        "lr",
        "momentum",
        "weight_decay",
        "power",
        "scale",
        "scale_step",
    )
    assert [recipe[name] for name in settings] == [
        80_000,
        8,
        0.01,
        0.9,
        1e-4,
        0.9,
        (0.5, 2.0),
        0.25,
    ]
    for name in ("pascal_voc_aug", "pascal_person_part"):  # Sect. 4.6
        recipe = spgnet.RECIPES[name]
        assert [recipe[key] for key in ("iterations", "batch_size", "crop_size", "lr")] == [
            30_000,
            28,
            513,
            0.007,
        ]


# ------------------------------------------------------------------------------------------ figures


def attention_of(net, image, size):
    """Fig. 4: for each class the l2 norm of the 15 channels with its largest weights."""
    guide = net.guides[0]
    m = guide.mask(guide.logits(net.stages[0](backbones.extended(image, 32))[1][0]))[0]
    assert m.shape[1:] == size
    norms = []
    for c in range(4):
        largest = sorted(range(32), key=lambda d: -guide.attention.weight[d, c].item())[:15]
        norms.append(torch.sqrt(sum(m[d] ** 2 for d in largest)))
    return torch.stack(norms)


@pytest.mark.network
def test_fig_4_takes_the_15_channels_of_the_class_and_subtracts_one_number_from_all():
    net = tiny(channels=32).eval()
    image = torch.randn(3, 45, 70)
    figures = net.figures(image)
    assert list(figures) == [0, 1, 2, 3]
    norms = attention_of(net, image[None], (17, 25))
    norms = backbones.upsample(norms[None], 4, (45, 70))[0]
    lowest = norms.min()
    for norm, found in zip(norms, figures.values(), strict=True):
        torch.testing.assert_close(found, norm - lowest)
        assert found.shape == (45, 70)
    assert [m.min() == 0 for m in figures.values()].count(True) == 1


@pytest.mark.network
def test_figures_of_three_stages_are_the_firsts():
    net, image = tiny(backbones=resnets(18, 18, 18)).eval(), torch.randn(3, 40, 40)
    before = net.figures(image)
    torch.nn.init.normal_(net.guides[1].attention.weight)
    assert all(torch.equal(before[c], m) for c, m in net.figures(image).items())


@pytest.mark.network
def test_figures_and_numbers_are_empty_without_guidance():
    images, labels = scene((40, 40), 1)
    options = (
        dict(guidance="se"),
        dict(guidance=None),
        dict(excite="sum"),
        dict(backbones=resnets(18)),
    )
    for option in options:
        net = tiny(**option).eval()
        assert net.figures(images[0]) == net.analyse([(images, labels)]) == {}
    assert tiny(excite="softmax").eval().figures(images[0])


@pytest.mark.network
def test_all_classes_are_on_one_sheet_by_name(monkeypatch):
    net, image = tiny().eval(), torch.randint(256, (3, 40, 50)).byte()
    palette, classes = [(i, i, i) for i in range(4)], ["sky", "road", "car", "tree"]
    prediction, seen = torch.zeros(40, 50, dtype=torch.int64), []
    monkeypatch.setattr(data, "sheet", lambda panels, *rest: seen.append((panels, rest)))
    evaluate.figure_sheet(net, image, prediction, palette, classes)
    (panels, (columns, maps, _, _, caption)), names = (
        seen[0],
        [f"attention for {c}" for c in classes],
    )
    assert [panel.title for panel in panels] == ["image", "prediction", *names]
    assert all(panel.tile.shape == (3, 40, 50) for panel in panels)
    assert all(panel.scale[0] == "0" and float(panel.scale[1]) > 0 for panel in panels[2:])
    assert columns == 3 and caption == net.caption
    assert len(maps) == 2 and maps[1].tolist() == [0, 1, 2, 3]  # in the legend


@pytest.mark.network
def test_one_small_image_is_a_clear_error_in_training_and_fine_in_evaluation():
    images, labels = torch.randn(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.int64)
    net = spgnet.build(3, LIGHT, channels=16)
    for side in (2, 33):
        with pytest.raises(ValueError, match="too few for batch norm: take two images or larger"):
            net(images[:1, :, :side, :side], labels[:1, :side, :side])
    assert net(images[:, :, :32, :32], labels[:, :32, :32]) and net(images[:1], labels[:1])
    assert net.eval()(images[:1, :, :32, :32]).shape == (1, 3, 32, 32)


# ------------------------------------------------------------------------------------------ numbers

X = 255


@pytest.mark.equation
def test_pairs_that_the_attention_of_a_class_wins_by_hand():
    labels = torch.tensor([[0, 0, 1], [1, 3, X]])
    maps = torch.ones(4, 2, 3)
    maps[:2] = torch.tensor([[5.0, 2, 3], [2, 1, 9]])
    # Class 0 has 5 and 2, the others 3, 2 and 1; 9 is ignored: three pairs are won, and 1 1/2.
    # Class 1 has 3 and 2, the others 5, 2 and 1: two, and 1 1/2. Class 2 does not occur. Class 3
    # has a tie with each of four.
    assert spgnet.wins(maps, labels).tolist() == [[4.5, 3.5, 0, 2], [6, 6, 0, 4]]


@pytest.mark.equation
@pytest.mark.parametrize("size", [(6, 7), (1, 9), (5, 1), (1, 1)])
def test_pairs_that_the_attention_of_a_class_wins_equal_the_double_loop(size):
    maps = torch.randn(5, *size).mul(2).round()  # with ties
    labels = torch.randint(4, size)  # class 4 does not occur
    labels[0, 0] = X
    expected = torch.zeros(2, 5, dtype=torch.float64)
    places = [p for p in product(*map(range, size)) if labels[p] != X]
    for p, q in product(places, places):
        c = labels[p]
        if labels[q] != c:
            expected[0, c] += 1 if maps[c][p] > maps[c][q] else 0.5 * (maps[c][p] == maps[c][q])
            expected[1, c] += 1
    found = spgnet.wins(maps, labels)
    assert torch.equal(found, expected) and (expected[1].sum() > 0) == (size != (1, 1))
    torch.testing.assert_close(
        spgnet.wins(-maps, labels), torch.stack([found[1] - found[0], found[1]])
    )


@pytest.mark.equation
def test_pairs_are_counted_beyond_the_whole_numbers_of_float32():
    labels = torch.zeros(1, 9004, dtype=torch.int64)
    labels[0, 4501:] = 1
    maps = torch.stack([1 - labels, labels]).float()  # every pair is won; odd, and above 2 ** 24
    assert spgnet.wins(maps, labels).tolist() == [[4501 * 4503] * 2] * 2


@pytest.mark.network
def test_analyse_is_the_area_under_the_roc_curve_over_the_pairs_of_each_image():
    net = tiny(channels=32).eval()
    first = torch.randn(2, 3, 45, 70), torch.randint(3, (2, 45, 70))
    second = torch.randn(1, 3, 33, 9), torch.ones(1, 33, 9, dtype=torch.int64)
    second[1][0, 12:, :5] = 0
    first[1][0, :30] = X  # class 3 never occurs
    with torch.no_grad():
        mean, each = net.analyse(iter([first, second])).values()
        won, pairs = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
        for images, labels in (first, second):
            H, W = labels.shape[1:]
            size = (17, 25) if H == 45 else (9, 9)  # the images are extended
            for image, label in zip(images, labels):
                attention = attention_of(net, image[None], size)
                # position (i, j) is at pixel (4 i, 4 j); those beyond the image are left out
                places = [(i, j) for i, j in product(*map(range, size)) if 4 * i < H and 4 * j < W]
                for c in range(4):
                    own = [attention[c][i, j] for i, j in places if label[4 * i, 4 * j] == c]
                    others = [attention[c][i, j] for i, j in places
                              if label[4 * i, 4 * j] not in (c, X)]  # fmt: skip
                    won[c] += sum((a > torch.stack(others)).sum() for a in own if others)
                    pairs[c] += len(own) * len(others)
    assert each.shape == (1, 4) and each.isnan().tolist() == [[False, False, False, True]]
    torch.testing.assert_close(each[0], won / pairs, rtol=0, atol=1e-3, equal_nan=True)
    assert type(mean) is float and mean == pytest.approx(each[0, :3].mean().item())


@pytest.mark.network
def test_analyse_of_an_attention_that_is_its_class_is_1_and_of_its_reverse_0():
    net, labels = tiny().eval(), torch.randint(4, (2, 45, 70))
    at = labels[:, ::4, ::4]
    ideal = F.pad((at[:, None] == torch.arange(4)[:, None, None]).float(), (0, 7, 0, 5), value=9)
    for net.class_attention, expected in (lambda _: ideal, 1.0), (lambda _: -ideal, 0.0):
        mean, each = net.analyse([(torch.randn(2, 3, 45, 70), labels)]).values()
        assert mean == expected and each.tolist() == [[expected] * 4]


class Pictures(torch.utils.data.Dataset):
    """Three small pictures, as `data.dataset` gives them."""

    classes, num_classes = ["sky", "road", "car", "tree"], 4

    def __len__(self):
        return 3

    def __getitem__(self, index):
        label = torch.full((40, 52), index, dtype=torch.uint8)
        label[:, 20:] = 3
        return torch.randint(256, (3, 40, 52), dtype=torch.uint8), label


@pytest.mark.system
def test_the_numbers_are_printed_and_drawn_by_the_names_of_the_classes(tmp_path, capsys):
    flags = ["--checkpoint", "x.pt", "--analyse", "--figures", str(tmp_path), "--workers", "0"]
    args = evaluate.arguments(flags)
    found = evaluate.analyse(tiny().eval(), Pictures(), torch.device("cpu"), args)
    mean, each = found["own attention"], found["own attention by class"]
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"{mean:.3f}  own attention: ") for line in lines)
    title = next(i for i, line in enumerate(lines) if line.startswith("own attention by class: "))
    assert lines[title + 1].split() == Pictures.classes
    assert lines[title + 2].split() == ["attention", *(f"{x:.3f}" for x in each[0])]
    assert (tmp_path / "own_attention_by_class.png").exists()
