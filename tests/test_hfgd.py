"""hfgd.py against the words and figures of its paper: who learns from what, and what is computed,
written here anew.
"""

import doctest
import functools
import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from conftest import LIGHT
from torch import nn

import backbones
import car
import data
import evaluate
import hfgd

pytestmark = pytest.mark.usefixtures("one_seed")

CAR = ["inter_c2c", "inter_c2p", "intra_c2p"]
ENCODERS = ("ours", "identity", "aspp", "ocr", "self_attention")


def scene(h=64, w=64, n=2, classes=3):
    images = torch.randn(n, 3, h, w)
    labels = torch.randint(0, classes, (n, h, w))
    labels[:, :5] = 255
    return images, labels


def network(backbone="resnet18", **options):
    return hfgd.build(3, backbone, **options)


def seen_by(module):
    """What enters the module, one by one."""
    seen = []
    module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    return seen


@pytest.mark.equation
def test_the_example_of_the_file():
    found = doctest.testmod(hfgd)
    assert found.failed == 0 and found.attempted > 0


# ---------------------------------------------------------------------------------- who learns what


def learners(net, loss):
    """The parts of the network that receive gradient from the loss."""
    net.zero_grad()
    loss.backward(retain_graph=True)
    parts = dict(
        backbone=net.backbone,
        encoder=net.encoder,
        kernels=net.classifier,
        upsampler=net.upsampler,
        guide=net.guide,
    )
    return {
        name
        for name, part in parts.items()
        if part is not None
        and any(p.grad is not None and p.grad.abs().max() > 0 for p in part.parameters())
    }


@pytest.mark.network
def test_guided_each_loss_trains_what_the_table_says():
    net = network(LIGHT)
    losses = net(*scene(128, 128))
    assert sorted(losses) == ["coarse", "fine", *CAR] and all(loss > 0 for loss in losses.values())
    assert learners(net, losses["coarse"]) == {"backbone", "encoder", "kernels"}
    assert learners(net, losses["fine"]) == {"upsampler", "guide"}
    for name in CAR:
        assert learners(net, losses[name]) == {"backbone", "encoder"}


@pytest.mark.network
def test_fine_loss_reaches_every_weight_of_the_upsampler_and_the_attention():
    net = network(output_stride=2)
    losses = net(*scene())
    losses["fine"].backward()
    weights = [*net.upsampler.parameters(), *net.guide.parameters()]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in weights if p.ndim > 1)
    assert all(
        p.grad is None
        for part in (net.backbone, net.encoder, net.classifier)
        for p in part.parameters()
    )


@pytest.mark.network
def test_unguided_the_fine_loss_trains_all():
    net = network(LIGHT, guided=False)
    losses = net(*scene(128, 128))
    assert sorted(losses) == ["fine", *CAR] and all(loss > 0 for loss in losses.values())
    assert learners(net, losses["fine"]) == {"backbone", "encoder", "kernels", "upsampler"}
    assert learners(net, losses["inter_c2p"]) == {"backbone", "encoder"}


@pytest.mark.network
def test_each_gradient_is_stopped_alone():
    images, labels = scene(128, 128)
    net = network(LIGHT, stop_features=False)
    assert learners(net, net(images, labels)["fine"]) == {
        "backbone", "encoder", "upsampler", "guide"}  # fmt: skip
    net = network(LIGHT, stop_kernels=False)
    assert learners(net, net(images, labels)["fine"]) == {"kernels", "upsampler", "guide"}
    net = network(LIGHT, stop_features=False, stop_kernels=False)
    fine = learners(net, net(images, labels)["fine"])
    assert fine == {"backbone", "encoder", "kernels", "upsampler", "guide"}


@pytest.mark.network
@pytest.mark.parametrize("guided", [True, False])
def test_every_level_is_stopped_if_guided_and_none_if_not(guided):
    net = network(LIGHT, guided=guided)
    levels = []

    def keep(module, inputs, maps):
        for level in maps:
            level.retain_grad()
        levels.extend(maps)

    net.backbone.register_forward_hook(keep)
    images, labels = scene(128, 128)
    net(images, labels)["fine"].backward()
    reached = [level.grad is not None and level.grad.abs().max() > 0 for level in levels]
    assert reached == [not guided] * 4


@pytest.mark.network
@pytest.mark.parametrize("guided", [True, False])
def test_the_upsampler_is_fed_the_backbones_finer_maps_and_z(guided):
    net = network(guided=guided).eval()
    fed, images = seen_by(net.upsampler), torch.randn(1, 3, 65, 65)
    net(images)
    maps = net.backbone(images)
    z, _, _ = net.encoder(maps, net.backbone.resize)
    assert len(fed[0]) == 4 and z.shape[1] == 256
    assert all(torch.equal(a, b) for a, b in zip(fed[0], [*maps[:-1], z]))


@pytest.mark.network
def test_cars_losses_are_on_or_off_one_by_one():
    images, labels = scene()
    assert sorted(network(LIGHT, car=False)(images, labels)) == ["coarse", "fine"]
    assert network(LIGHT).car.literal is False and network(LIGHT, literal=True).car.literal
    losses = network(LIGHT, intra=False, inter_c2p=False)(images, labels)
    assert sorted(losses) == ["coarse", "fine", "inter_c2c"]


@pytest.mark.network
def test_guided_regions_of_ocr_train_backbone_and_encoder():
    net = network(encoder="ocr")
    losses = net(*scene())
    assert sorted(losses) == ["auxiliary", "coarse", "fine"]
    assert learners(net, losses["auxiliary"]) == {"backbone", "encoder"}
    assert learners(net, losses["fine"]) == {"upsampler", "guide"}


@pytest.mark.network
def test_without_upsampler_the_coarse_loss_is_all():
    net = network(upsampler=None)  # guided or not: there is nothing to guide
    losses = net(*scene())
    assert sorted(losses) == ["coarse", *CAR] and net.guide is None and net.stride == 32
    assert learners(net, losses["coarse"]) == {"backbone", "encoder", "kernels"}


@pytest.mark.network
def test_class_kernels_step_as_without_upsampler():
    images, labels = scene()
    torch.manual_seed(1)
    net = network()
    torch.manual_seed(2)
    alone = network(upsampler=None)
    shared = {key: value for key, value in net.state_dict().items() if key in alone.state_dict()}
    alone.load_state_dict(shared)
    for other in (net, alone):
        sum(other(images, labels).values()).backward()
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(net.get_parameter(name).grad, parameter.grad, msg=name)


# -------------------------------------------------------------------------------------- the kernels


@pytest.mark.equation
def test_guided_logits_by_hand():
    kernels = nn.Conv2d(256, 2, 1)
    u = torch.zeros(1, 256, 1, 2)
    u[0, 0], u[0, 255] = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]])
    nn.init.zeros_(kernels.weight)
    with torch.no_grad():
        kernels.weight[0, 0] = kernels.weight[1, 255] = 2.0
        kernels.weight[1, 0] = -1.0
        kernels.bias.copy_(torch.tensor([0.5, 0.0]))
    found = hfgd.HighLevelFeatureGuidedModule(axial=False)(u, kernels)
    # class 0: 2·1 + 0.5, 2·2 + 0.5; class 1: -1 + 2·3, -2 + 2·5
    assert found.tolist() == [[[[2.5, 4.5]], [[5.0, 8.0]]]]


@pytest.mark.equation
def test_guided_logits_equal_the_loop():
    kernels, u = nn.Conv2d(8, 3, 1).double(), torch.randn(2, 8, 2, 5, dtype=torch.float64)
    found = hfgd.HighLevelFeatureGuidedModule(8, axial=False)(u, kernels)
    expected = torch.zeros(2, 3, 2, 5, dtype=torch.float64)
    for n, k, i, j in product(range(2), range(3), range(2), range(5)):
        products = [kernels.weight[k, c, 0, 0] * u[n, c, i, j] for c in range(8)]
        expected[n, k, i, j] = sum(products) + kernels.bias[k]
    torch.testing.assert_close(found, expected)


@pytest.mark.equation
@pytest.mark.parametrize("stop", [True, False])
def test_fine_logits_train_the_features_and_where_asked_the_kernels(stop):
    kernels, u = nn.Conv2d(8, 3, 1).double(), torch.randn(2, 8, 2, 5, dtype=torch.float64)
    u.requires_grad_()
    module = hfgd.HighLevelFeatureGuidedModule(8, axial=False, stop_kernels=stop)
    pull = torch.randn(2, 3, 2, 5, dtype=torch.float64)
    (module(u, kernels) * pull).sum().backward()
    assert u.grad is not None, "no gradient reaches the features"
    torch.testing.assert_close(
        u.grad, torch.einsum("nkij,kc->ncij", pull, kernels.weight[..., 0, 0])
    )
    if stop:
        assert kernels.weight.grad is None and kernels.bias.grad is None
        assert kernels.weight.requires_grad  # they still learn from the coarse loss
    else:
        for name, weight in kernels.named_parameters():
            assert weight.grad is not None, f"no gradient reaches the kernels' {name}"
        expected = torch.einsum("nkij,ncij->kc", pull, u)
        torch.testing.assert_close(kernels.weight.grad[..., 0, 0], expected)
        torch.testing.assert_close(kernels.bias.grad, pull.sum((0, 2, 3)))


@pytest.mark.equation
def test_guided_logits_are_of_the_attended_features():
    kernels, u = nn.Conv2d(8, 3, 1), torch.randn(1, 8, 2, 3)
    module = hfgd.HighLevelFeatureGuidedModule(8)
    module.attention = nn.Hardtanh(-0.5, 0.5)  # something else in place of the attention
    W, b = kernels.weight[..., 0, 0], kernels.bias
    expected = torch.einsum("kc,ncij->nkij", W, u.clamp(-0.5, 0.5)) + b[:, None, None]
    torch.testing.assert_close(module(u, kernels), expected)


@pytest.mark.network
@pytest.mark.parametrize("axial", [False, True])
def test_fine_logits_are_the_class_kernels_on_the_upsamplers_features(axial):
    net = network(axial=axial).eval()
    images = torch.randn(1, 3, 65, 97)
    u = []
    net.upsampler.register_forward_hook(lambda module, inputs, output: u.append(output))
    logits = net(images)
    x = u[0].double()
    if axial:
        attention = net.guide.attention.double()
        theta, phi, value = attention.theta(x)[0], attention.phi(x)[0], attention.g(x)[0]
        y, z = torch.zeros_like(value), torch.zeros_like(value)
        for j in range(x.shape[3]):  # in each column, every row reads all rows
            A = torch.softmax(theta[:, :, j].T @ theta[:, :, j], dim=1)
            y[:, :, j] = value[:, :, j] @ A.T
        for i in range(x.shape[2]):  # then in each row, every column reads all columns
            A = torch.softmax(phi[:, i].T @ phi[:, i], dim=1)
            z[:, i] = y[:, i] @ A.T
        x = x + z
    W, b = net.classifier.weight[:, :, 0, 0].double(), net.classifier.bias.double()
    expected = torch.einsum("kc,ncij->nkij", W, x) + b[:, None, None]
    assert expected.shape == (1, 3, 17, 25)
    torch.testing.assert_close(
        logits[:, :, ::4, ::4].double(), expected, rtol=1e-4, atol=1e-4
    )  # position i at pixel 4i


@pytest.mark.network
@pytest.mark.parametrize("stride", [4, 2, 1])
def test_fine_logits_of_position_i_are_at_pixel_i_times_the_stride(stride):
    net, u = network(LIGHT, output_stride=stride, width=64, axial=False), []
    net.upsampler.register_forward_hook(lambda module, inputs, output: u.append(output))
    logits = net(torch.randn(2, 3, 33, 65))
    fine = F.conv2d(u[0], net.classifier.weight, net.classifier.bias)
    assert fine.shape[2:] == (32 // stride + 1, 64 // stride + 1) and fine.std() > 0.1
    torch.testing.assert_close(logits[:, :, ::stride, ::stride], fine)


@pytest.mark.usefixtures("meta")
@pytest.mark.network
@pytest.mark.parametrize("released", [False, True])
def test_queries_have_a_relu_in_the_released_form_alone(released):
    attention = network(released=released).guide.attention
    for query in (attention.theta, attention.phi):
        assert any(isinstance(layer, nn.ReLU) for layer in query) == released


@pytest.mark.network
@pytest.mark.parametrize("released", [False, True])
def test_axial_attention_starts_near_a_multiple_of_its_input_equally_peaked(released):
    attention = hfgd.AxialAttention(128, released)
    assert torch.equal(attention.g[0].weight[:, :, 0, 0], torch.eye(128))
    query = attention.theta(torch.randn(4, 128, 16, 16))
    assert query.square().sum(1).mean().item() == pytest.approx(32, rel=0.05)


@pytest.mark.network
@pytest.mark.parametrize("axial", [False, True])
def test_axial_attention_takes_the_gradient_of_one_pixel_to_all(axial):
    guide = hfgd.HighLevelFeatureGuidedModule(axial=axial).double()
    u = torch.rand(1, 256, 5, 6, dtype=torch.double, requires_grad=True)
    logits = guide(u, nn.Conv2d(256, 2, 1).double())
    reached = torch.autograd.grad(logits[0, 1, 2, 3], u)[0].abs().amax(1)[0] > 0
    assert reached.all() if axial else reached.nonzero().tolist() == [[2, 3]]


@pytest.mark.equation
def test_attention_by_hand():
    # one column, two rows, one channel: queries ln 2 and 0 have the products (ln² 2, 0) and (0, 0)
    query = torch.tensor([math.log(2), 0]).reshape(1, 1, 2, 1)
    value = torch.tensor([[4.0, 8], [1, 3]]).reshape(1, 2, 2, 1)  # two channels
    a = math.exp(math.log(2) ** 2)
    expected = [[(4 * a + 8) / (a + 1), 6], [(a + 3) / (a + 1), 2]]
    torch.testing.assert_close(hfgd.attend(query, value)[0, :, :, 0], torch.tensor(expected))


@pytest.mark.equation
@pytest.mark.parametrize("size", [(5, 4), (7, 1), (1, 6), (1, 1)])
def test_attention_equals_the_loop_with_gradients(size):
    query = torch.randn(2, 2, *size, dtype=torch.double, requires_grad=True)
    value = torch.randn(2, 6, *size, dtype=torch.double, requires_grad=True)
    rows = []
    for i in range(size[0]):
        energy = torch.einsum("ncw,ncmw->nmw", query[:, :, i], query)
        rows.append(torch.einsum("nmw,ncmw->ncw", torch.softmax(energy, dim=1), value))
    expected, found = torch.stack(rows, dim=2), hfgd.attend(query, value)
    pull = torch.randn_like(expected)
    torch.testing.assert_close(found, expected)
    ours, theirs = (
        torch.autograd.grad((y * pull).sum(), (query, value)) for y in (found, expected)
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.network
@pytest.mark.parametrize("size", [(9, 1), (1, 9)])
def test_one_column_maps_have_the_right_gradient_through_batch_norm(size):
    attention = hfgd.AxialAttention(64).double().train()
    x = torch.randn(2, 64, *size, dtype=torch.double)
    pull = torch.randn_like(x)
    query = attention.theta if size[1] == 1 else attention.phi
    nn.init.constant_(query[1].weight, 0.1)  # so that each position attends to all
    weight = query[0].weight
    (found,) = torch.autograd.grad((attention(x) * pull).sum(), weight)
    for index in [(0, 3, 0, 0), (20, 60, 0, 0)]:
        moved = []
        for h in (1e-5, -1e-5):
            with torch.no_grad():
                weight[index] += h
                moved.append((attention(x) * pull).sum().item())
                weight[index] -= h
        assert found[index].item() == pytest.approx((moved[0] - moved[1]) / 2e-5, rel=1e-4)


@pytest.mark.network
@pytest.mark.parametrize("size", [(9, 1), (1, 9), (3, 4)])
def test_both_queries_receive_contiguous_gradients(size):
    attention, contiguous = hfgd.AxialAttention(64), []
    for query in (attention.theta, attention.phi):
        query.register_full_backward_hook(
            lambda module, inputs, outputs: contiguous.append(outputs[0].is_contiguous())
        )
    attention(torch.randn(2, 64, *size, requires_grad=True)).square().sum().backward()
    assert contiguous == [True, True]


@pytest.mark.equation
def test_attention_maps_are_not_materialised(largest):
    N, c, C, H, W = 1, 8, 32, 256, 8
    query, value = torch.randn(N, c, H, W), torch.randn(N, C, H, W)
    with largest, torch.no_grad():
        hfgd.attend(query, value)
    assert N * C * H * W <= largest.numbers < N * W * H * H / 2


@pytest.mark.network
def test_the_attentions_multiply_adds_are_counted():
    net, (h, w), C = nn.Sequential(nn.Conv2d(3, 128, 1), hfgd.AxialAttention(128)), (9, 7), 128
    queries, values, products = 2 * C * 64, C * C, (C + C) * (h + w)
    # values are two parts of 64, as two heads: the products of the queries are computed for both
    assert evaluate.cost(net, (h, w))[1] == h * w * (3 * C + queries + values + products)


@pytest.mark.equation
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_is_computed_in_float32(dtype, monkeypatch):
    query, value = (30 * torch.randn(1, c, 5, 4).to(dtype) for c in (8, 16))
    query[0, :, 0, 0] = 200  # its product with itself is 320000
    given, fused = [], F.scaled_dot_product_attention

    def spy(q, k, v, **kwargs):
        given.extend([q.dtype, k.dtype, v.dtype, torch.is_autocast_enabled("cpu")])
        return fused(q, k, v, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    with torch.autocast("cpu", dtype):
        found = hfgd.attend(query, value)
    assert found.dtype == dtype and found.isfinite().all()
    assert given == [torch.float32] * 3 + [False]
    expected = hfgd.attend(query.float(), value.float()).to(dtype)
    assert torch.equal(found, expected)


@pytest.mark.network
def test_the_classifier_reads_the_fine_features_and_with_labels_last_the_coarse_ones():
    net = network().eval()
    images, labels = scene(64, 96)
    seen = seen_by(net.classifier)
    logits = net(images)
    assert [x.shape for x in seen] == [(2, 256, 17, 25)]
    seen.clear()
    losses = net(images, labels)
    fine, coarse = seen
    assert fine.shape == (2, 256, 17, 25) and coarse.shape == (2, 256, 3, 4)
    assert losses["fine"].item() == pytest.approx(
        F.cross_entropy(logits, labels, ignore_index=255).item(), rel=1e-5
    )
    coarse = backbones.upsample(
        F.conv2d(coarse, net.classifier.weight, net.classifier.bias), 32, (64, 96)
    )
    assert losses["coarse"].item() == pytest.approx(
        F.cross_entropy(coarse, labels, ignore_index=255).item(), rel=1e-5
    )


# --------------------------------------------------------------------------------------- upsampling


def kernel_sizes(module):
    return [m.kernel_size[0] for m in module.modules() if isinstance(m, nn.Conv2d)]


@pytest.mark.network
def test_blocks_of_semantic_fpn_by_hand():
    # from stride 4: one convolution, from 8: one, from 16: two, from 32: three
    plain = hfgd.SemanticFPN((8, 16, 32, 64))
    assert [kernel_sizes(branch) for branch in plain.branches] == [[3], [3], [3, 3], [3, 3, 3]]
    assert kernel_sizes(plain.leading) == [1, 1, 1, 1]
    assert all(m.out_channels == 256 for m in plain.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.network
@pytest.mark.parametrize(
    "stride, counts", [(4, [1, 1, 2, 3]), (2, [2, 2, 3, 4]), (1, [3, 3, 4, 5])]
)
def test_blocks_of_ultra_semantic_fpn_by_hand(stride, counts):
    with torch.device("meta"):
        ultra = hfgd.UltraSemanticFPN((8, 16, 32, 64), stride)
    assert [len(kernel_sizes(branch)) for branch in ultra.branches] == counts
    assert kernel_sizes(ultra.leading) == [3, 3, 3, 3]


def literal_fpn(net, maps, patches, blocks):
    """The pyramid as Sect. 3.3 and its source say it, with the weights of `net` and untouched batch
    norms.
    """

    def layer(conv, x):
        return F.relu(
            F.conv2d(x, conv.weight, padding=conv.kernel_size[0] // 2) / math.sqrt(1 + 1e-5)
        )

    def twice(x):
        h, w = x.shape[2:]
        size = (2 * h, 2 * w) if patches else (2 * h - 1, 2 * w - 1)
        return F.interpolate(x, size=size, mode="bilinear", align_corners=not patches)

    convs = [[m for m in branch.modules() if isinstance(m, nn.Conv2d)] for branch in net.branches]
    total, above = 0, None
    for level in (3, 2, 1, 0):
        x = layer(net.leading[level][0], maps[level])
        above = x if above is None else x + twice(above)
        y = above
        for i, conv in enumerate(convs[level]):
            y = layer(conv, y)
            if i >= len(convs[level]) - blocks or level > 0:
                y = twice(y)
        total = total + y
    return layer(net.last[0], total)


@pytest.mark.network
@pytest.mark.parametrize("patches", [True, False])
@pytest.mark.parametrize("stride", [None, 4, 2, 1])
def test_semantic_fpn_equals_its_words(stride, patches):
    channels = (3, 4, 5, 6)
    if stride is None:
        net = hfgd.SemanticFPN(channels)
    else:
        net = hfgd.UltraSemanticFPN(channels, stride)
    resize = functools.partial(backbones.resize, patches=patches)
    net = net.double().eval()
    sizes = ((8, 16), (4, 8), (2, 4), (1, 2)) if patches else ((9, 17), (5, 9), (3, 5), (2, 3))
    maps = [
        torch.randn(1, c, *size, dtype=torch.double, requires_grad=True)
        for c, size in zip(channels, sizes)
    ]
    blocks = {None: 0, 4: 0, 2: 1, 1: 2}[stride]
    found, expected = net(maps, resize), literal_fpn(net, maps, patches, blocks)
    h, w = sizes[0]
    scale = 2**blocks
    assert found.shape == (
        1,
        256,
        *((scale * s if patches else scale * (s - 1) + 1) for s in (h, w)),
    )
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad((y * weights).sum(), maps) for y in (found, expected))
    for a, b in zip(ours, theirs):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b)


@pytest.mark.network
@pytest.mark.parametrize(
    "backbone, stride",
    [("resnet18", 4), ("resnet18", 2), ("resnet18", 1), ("swin_t", 2), ("convnext_tiny", 1)],
)
def test_odd_sizes_at_every_output_stride(backbone, stride):
    net = hfgd.build(3, backbone, output_stride=stride).eval()
    images, labels = scene(45, 70, n=1)
    with torch.no_grad():
        assert net(images).shape == (1, 3, 45, 70) and net(images).dtype == torch.float32
        assert all(loss.isfinite() for loss in net(images, labels).values())


# ------------------------------------------------------------------------------------------ encoder


@pytest.mark.usefixtures("meta")
@pytest.mark.network
@pytest.mark.parametrize("leading", [(1, 1), (3, 3), (1,)])
def test_ours_is_convolutions_attention_and_a_pointwise_convolution(leading):
    net = network(leading=leading)
    n = len(leading)
    assert kernel_sizes(net.encoder) == [*leading, 1, 1, 1, 1]  # query, key, value; trailing
    widths = [m.out_channels for m in net.encoder.modules() if isinstance(m, nn.Conv2d)]
    assert widths == [512] * n + [64, 64, 512, 256]
    assert isinstance(net.encoder.body, car.SelfAttention)


def conv_norm_relu(layer, x):
    """Literally, with the layer's weights and untouched batch norm: convolution, norm, ReLU."""
    kernel = layer[0].weight
    return F.relu(F.conv2d(x, kernel, padding=kernel.shape[2] // 2) / math.sqrt(1 + 1e-5))


@pytest.mark.network
@pytest.mark.parametrize("leading", [(1, 1), (3, 3)])
def test_ours_equals_its_words(leading):
    net = network(leading=leading).eval()
    maps = [torch.randn(1, c, 5, 4) for c in net.backbone.channels]
    z, seen, regions = net.encoder(maps, net.backbone.resize)
    assert regions is None
    body, x = net.encoder.body, maps[-1]
    for layer in body.reduce:
        x = conv_norm_relu(layer, x)
    q, k, v = (layer(x).flatten(2) for layer in (body.query, body.key, body.value))
    weight = torch.softmax(torch.einsum("ncp,ncm->npm", q, k), dim=-1)
    x = x + torch.einsum("npm,ncm->ncp", weight, v).reshape(x.shape)
    torch.testing.assert_close(seen, x, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(z, conv_norm_relu(net.encoder.last, x), atol=1e-5, rtol=1e-4)


@pytest.mark.network
@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_encoder_trains_on_one_image_without_noise(encoder):
    net = network(LIGHT, encoder=encoder).train()
    images, labels = scene(64, 64, n=1)
    losses = [net(images, labels)["coarse"] for _ in range(2)]
    assert losses[0].isfinite() and losses[0] == losses[1]  # no dropout


@pytest.mark.network
def test_width_is_that_of_the_fine_and_of_the_guiding_features():
    net = network(width=128).eval()
    assert net.classifier.in_channels == net.encoder.channels == net.upsampler.channels == 128
    assert net(torch.randn(1, 3, 33, 33)).shape == (1, 3, 33, 33)
    plain = network(encoder="identity", upsampler="sfpn", guided=False, width=128)
    assert plain.upsampler.channels == 128 and plain.encoder.channels == 512
    assert network(encoder="aspp", width=128).encoder.channels == 128
    assert network(width=72, guided=False).upsampler.channels == 72


@pytest.mark.network
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("upsampler", [None, "sfpn", "usfpn"])
def test_every_encoder_stands_under_every_upsampler(encoder, upsampler):
    for guided in (False, True):
        net = network(LIGHT, encoder=encoder, upsampler=upsampler, guided=guided)
        losses = net(*scene())
        names = {"coarse"} if upsampler is None else {"coarse", "fine"} if guided else {"fine"}
        names |= {"ours": set(CAR), "ocr": {"auxiliary"}}.get(encoder, set())
        assert set(losses) == names and all(
            loss.isfinite() and loss.ndim == 0 for loss in losses.values()
        )
        width = 320 if encoder == "identity" and not net.guided else 256
        assert net.encoder.channels == width
        assert net.classifier.in_channels == (width if upsampler is None else 256)


@pytest.mark.network
def test_identity_is_the_last_map_itself():
    net = network(encoder="identity", upsampler=None).eval()
    maps, seen = net.backbone(torch.randn(1, 3, 65, 65)), seen_by(net.classifier)
    z, _, _ = net.encoder(maps, net.backbone.resize)
    assert z is maps[-1] and not list(net.encoder.parameters())
    images = torch.randn(1, 3, 65, 65)
    net(images)
    assert torch.equal(seen[0], net.backbone(images)[-1])


@pytest.mark.usefixtures("meta")
@pytest.mark.network
def test_aspp_is_torchvisions_at_the_rates_of_stride_32():
    net = network(encoder="aspp")
    rates = [
        m.dilation[0]
        for m in net.encoder.modules()
        if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)
    ]
    assert type(net.encoder.body).__module__.startswith("torchvision") and rates == [3, 6, 9]


@pytest.mark.network
@pytest.mark.parametrize("released, guided", [(False, True), (False, False), (True, True)])
def test_car_acts_between_the_attention_and_the_trailing_convolution(released, guided):
    net = network(guided=guided, released=released)
    images, labels = scene(65, 65)
    seen, attended = seen_by(net.encoder.last), seen_by(net.encoder.released_conv)
    losses = net(images, labels)
    coarse = labels[:, ::32, ::32]
    features = seen[0]
    assert features.shape == (2, 512, 3, 3) and torch.equal(features, attended[0]) != released
    mu, _ = car.class_centers(features, coarse, 3)
    expected = dict(
        intra_c2p=car.intra_center_to_pixel(features, coarse, mu, released),
        inter_c2c=car.inter_center_to_center(mu, released=released),
        inter_c2p=car.inter_center_to_pixel(features, coarse, mu, released=released),
    )
    assert {name: losses[name].item() for name in CAR} == pytest.approx(
        {name: x.item() for name, x in expected.items()}
    )
    assert [
        layer.out_channels
        for layer in net.encoder.released_conv.modules()
        if isinstance(layer, nn.Conv2d)
    ] == [512] * released


@pytest.mark.network
def test_labels_of_patches_are_those_of_their_middles():
    net = hfgd.build(64, "swin_t").eval()
    labels = torch.arange(64).repeat(64, 1)[None]  # the class is the column
    given = []
    net.car.register_forward_pre_hook(lambda module, inputs: given.append(inputs[1]))
    with torch.no_grad():
        net(torch.randn(1, 3, 64, 64), labels)
    assert given[0].tolist() == [[[16, 48], [16, 48]]]


@pytest.mark.network
@pytest.mark.parametrize(
    "backbone, stride, size", [("resnet18", 32, (3, 4)), ("swin_t", 32, (2, 3))]
)
def test_regions_of_ocr_are_compared_at_stride_16_with_weight_0_4(backbone, stride, size):
    net = hfgd.build(3, backbone, encoder="ocr").eval()
    images, labels = scene(64, 96)
    regions = []
    net.encoder.body.register_forward_hook(lambda module, inputs, output: regions.append(output[1]))
    with torch.no_grad():
        loss = net(images, labels)["auxiliary"]
    patches = backbone != "resnet18"
    assert regions[0].shape[2:] == ((4, 6) if patches else (5, 7))
    size = (64, 96) if patches else (65, 97)
    logits = F.interpolate(regions[0], size=size, mode="bilinear", align_corners=not patches)
    logits = logits[:, :, :64, :96]
    assert loss.item() == pytest.approx(
        0.4 * F.cross_entropy(logits, labels, ignore_index=255).item(), rel=1e-5
    )


@pytest.mark.usefixtures("meta")
@pytest.mark.network
def test_layers_of_every_encoder():
    kinds = {name: network(encoder=name).encoder for name in ENCODERS}
    sizes = {name: kernel_sizes(encoder) for name, encoder in kinds.items()}
    norms = {
        name: sum(isinstance(m, nn.BatchNorm2d) for m in encoder.modules())
        for name, encoder in kinds.items()
    }
    assert sizes["self_attention"] == [3, 1, 1, 1, 1] and norms["self_attention"] == 2
    assert sizes["ours"] == [1] * 6 and norms["ours"] == 3
    assert (
        sizes["identity"] == [1] and norms["identity"] == 1
    )  # for the class kernels; none where it is not guided
    # without batch norm after pooling, without dropout
    assert sizes["aspp"] == [1, 3, 3, 3, 1, 1] and norms["aspp"] == 5
    assert not any(isinstance(m, nn.Dropout) for m in kinds["aspp"].modules())


# ------------------------------------------------------------------------------------------ network


@pytest.mark.network
def test_any_networks_regularizer_finds_the_coarse_features():
    net = car.regularize(network(encoder="identity"), "classifier", 3, released=True)
    losses = net(*scene())
    assert sorted(losses) == ["coarse", "fine", *CAR]
    for name in CAR:
        losses[name].backward(retain_graph=True)
    assert all(p.grad is None for p in net.net.upsampler.parameters())


@pytest.mark.network
@pytest.mark.parametrize("upsampler", ["sfpn", "usfpn"])
def test_patches_lie_where_they_are(upsampler):
    net = hfgd.build(3, "swin_t", upsampler=upsampler).eval()
    images, u = torch.randn(1, 3, 45, 70), seen_by(net.classifier)
    with torch.no_grad():
        logits = net(images)
        assert u[0].shape[2:] == (16, 24)  # of the image at 64x96
        fine = F.conv2d(u[0], net.classifier.weight, net.classifier.bias)
        whole = F.interpolate(fine, scale_factor=4, mode="bilinear", align_corners=False)
        torch.testing.assert_close(logits, whole[:, :, :45, :70])
        z = net.encoder(net.backbone(images), net.backbone.resize)[0]
        coarse = F.conv2d(z, net.classifier.weight, net.classifier.bias)
        coarse = F.interpolate(coarse, scale_factor=32, mode="bilinear", align_corners=False)[
            :, :, :45, :70
        ]
        name = f"prediction from coarse features, stride {net.backbone.strides[-1]}"
        assert torch.equal(net.figures(images)[name], coarse.argmax(1)[0])


@pytest.mark.network
@pytest.mark.parametrize("encoder", ["ours", "identity"])
def test_class_dependency_is_of_what_car_acts_on_or_of_what_is_classified(encoder):
    net = network(encoder=encoder).eval()
    images, labels = scene(65, 65)
    labels[0, 32, ::32] = torch.arange(3)  # each class occurs at one position at least
    pairs, features = [(image[None], label[None]) for image, label in zip(images, labels)], []
    (net.encoder.last if encoder == "ours" else net.classifier).register_forward_pre_hook(
        lambda module, inputs: features.append(inputs[0])
    )
    found = evaluate.class_dependency(net, pairs, 3, net.regularized)
    X, stride = torch.cat(features), 32 if encoder == "ours" else 4
    mu, _ = car.class_centers(X, torch.cat([label for _, label in pairs])[:, ::stride, ::stride], 3)
    similarity = (mu @ mu.T).clamp(min=0)
    torch.testing.assert_close(
        found.float(), similarity / similarity.amax(1, keepdim=True), rtol=1e-4, atol=1e-5
    )


@pytest.mark.network
def test_nothing_labelled_gives_zero_losses_and_gradients():
    net = network()
    images, labels = scene()
    losses = net(images, torch.full_like(labels, 255))
    assert losses["coarse"] == losses["fine"] == losses["intra_c2p"] == 0
    (losses["coarse"] + losses["fine"]).backward()
    assert all(p.grad is None or not p.grad.any() for p in net.parameters())


@pytest.mark.network
def test_one_image_trains_and_an_absent_class_does_no_harm():
    net = network()
    images, labels = scene(64, 64, n=1, classes=2)
    assert all(loss.isfinite() for loss in net(images, labels).values())


@pytest.mark.network
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_float32_losses_and_logits(dtype):
    net = network()
    with torch.autocast("cpu", dtype=dtype):
        losses = net(*scene(33, 33, n=1))
        logits = net.eval()(torch.randn(1, 3, 33, 33))
    assert (
        all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
        and logits.dtype == torch.float32
    )
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


@pytest.mark.usefixtures("meta")
@pytest.mark.network
@pytest.mark.parametrize(
    "options, maps",
    [
        ({}, "012"),
        (dict(encoder="ocr"), "01"),
        (dict(upsampler=None), "012"),
        (dict(guided=False), ""),
        (dict(stop_features=False), ""),
    ],
)
def test_norms_on_maps_that_no_loss_reaches_are_frozen(options, maps):
    net = network("convnext_tiny", **options)
    frozen = {name.split(".")[2] for name, p in net.named_parameters() if not p.requires_grad}
    assert frozen == set(maps)


@pytest.mark.network
def test_layer_norms_have_the_papers_epsilon():
    with torch.device("meta"):
        net = hfgd.build(3, "swin_t")
    assert {module.eps for module in net.modules() if isinstance(module, nn.LayerNorm)} == {1e-6}


@pytest.mark.usefixtures("meta")
@pytest.mark.network
@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(encoder="psp"),
            "encoder='psp': it is one of 'ours', 'identity', 'aspp', 'ocr', 'self_attention'",
        ),
        (dict(width=1), "width=1: expected a multiple of 64"),
        (dict(width=72), "width=72: expected a multiple of 64"),
        (dict(width=1, axial=False), "width=1: expected a multiple of 8"),
        (dict(leading=[4]), r"leading=\[4\]: expected odd kernel sizes"),
        (dict(leading=[]), r"leading=\[\]: expected odd kernel sizes"),
        (dict(car=False, epsilon_0=0.1), "epsilon_0: only encoder='ours' with car=True"),
        (dict(epsilon_0=-1), "decay=0.9, epsilon_0=-1, epsilon_1=0.25: expected"),
        (dict(output_stride=True), "output_stride=True: expected a number"),
        (dict(upsampler="unet"), "upsampler='unet': it is one of 'usfpn', 'sfpn', None"),
        (dict(output_stride=8), "output_stride=8: it is one of 4, 2, 1"),
        (dict(upsampler="sfpn", output_stride=2), "output_stride=2: upsampler='sfpn' has 4 alone"),
        (
            dict(guide=True),
            "HFGD has no option guide; its options and defaults are output_stride=4, "
            "encoder='ours'",
        ),
    ],
)
def test_wrong_options_say_what_there_is(options, message):
    with pytest.raises(ValueError, match=message):
        network(**options)


@pytest.mark.network
def test_parameters_of_the_upsamplers_by_hand():
    # leading: ΣC·256·k² + 2·256 each; blocks: 256·256·9 + 2·256 each; last: 256·256 + 2·256
    channels = (64, 128, 256, 256)
    for net, kernel, blocks in (
        (hfgd.SemanticFPN(channels), 1, 7),
        (hfgd.UltraSemanticFPN(channels), 9, 7),
        (hfgd.UltraSemanticFPN(channels, 2), 9, 11),
        (hfgd.UltraSemanticFPN(channels, 1), 9, 15),
    ):
        expected = sum(channels) * 256 * kernel + 4 * 512 + blocks * (256 * 256 * 9 + 512)
        expected += 256 * 256 + 512
        assert sum(p.numel() for p in net.parameters()) == expected


# ----------------------------------------------------------------------------- figures and analysis


@pytest.mark.network
def test_figures_show_the_coarse_and_the_fine_prediction(monkeypatch):
    net = network(output_stride=2).eval()
    image = torch.randn(3, 44, 70)
    pictures = net.figures(image)
    coarse, fine = (
        f"prediction from {w} features, stride {s}" for w, s in (("coarse", 32), ("fine", 2))
    )
    assert list(pictures) == [coarse, fine]
    assert torch.equal(pictures[fine], net(image[None]).argmax(1)[0])
    x = F.conv2d(
        net.encoder(net.backbone(image[None]), net.backbone.resize)[0],
        net.classifier.weight,
        net.classifier.bias,
    )
    assert torch.equal(pictures[coarse], backbones.upsample(x, 32, (44, 70)).argmax(1)[0])
    photo, seen = torch.randint(256, image.shape).byte(), []
    monkeypatch.setattr(data, "sheet", lambda panels, *rest: seen.extend(panels))
    prediction = net(data.normalise(photo[None])).argmax(1)[0]
    evaluate.figure_sheet(net, photo, prediction, [(0, 0, 0)] * 3, ["a", "b", "c"])
    enlarged = ["image, enlarged", f"{coarse}, enlarged", f"{fine}, enlarged"]
    # The fine prediction is the prediction: it is not shown twice.
    expected = ["image", fine, coarse, "where the predictions differ", *enlarged]
    assert [panel.title for panel in seen] == expected and seen[4].tile.shape == (3, 11, 17)
    assert len({panel.boxes for panel in seen[:4]}) == 1 and seen[0].boxes


@pytest.mark.network
def test_figures_need_guidance_and_evaluation_mode():
    assert network(guided=False).eval().figures(torch.randn(3, 33, 33)) == {}
    with pytest.raises(ValueError, match=r"net.eval\(\)"):
        network().figures(torch.randn(3, 33, 33))


@pytest.mark.network
def test_analyse_is_the_miou_of_both_predictions_everywhere_and_near_borders():
    net, K = network(LIGHT).eval(), 3
    labels = torch.zeros(3, 12, 20, dtype=torch.long)
    labels[:2, :, 9:], labels[2, 7:], labels[:, :2] = 1, 1, 255  # class 2 is predicted alone
    coarse, fine = torch.randint(K, (2, 3, 12, 20))
    images, shown = torch.randn(3, 3, 12, 20), []

    def figures(image):
        n = len(shown)
        shown.append(image)
        return {"coarse": coarse[n], "fine": fine[n]}

    net.figures = figures
    numbers = net.analyse([(images[:2], labels[:2]), (images[2:], labels[2:])])
    assert torch.equal(torch.stack(shown), images)
    (key, found), near = *numbers.items(), backbones.near_border(labels)
    assert key.partition(":")[0] == "features"
    axes = "coarse features, fine features | everywhere, near border"
    assert key.partition(" | ")[2] == axes and found.shape == (2, 2)
    for (i, predicted), (j, where) in product(
        enumerate((coarse, fine)), enumerate((torch.ones_like(near), near))
    ):
        where = where & (labels != 255)
        y, truth, ious = predicted[where], labels[where], []
        for k in range(K):
            either = ((y == k) | (truth == k)).sum()
            ious.append(((y == k) & (truth == k)).sum() / either)
        assert found[i, j].item() == pytest.approx(sum(ious).item() / K)
    assert found.unique().numel() == 4  # which of them is which matters
    assert network(LIGHT, guided=False).eval().analyse([(images, labels)]) == {}


@pytest.mark.network
def test_analyse_leaves_out_absent_classes_and_has_nan_without_a_border():
    net, labels = network(LIGHT).eval(), torch.ones(1, 33, 33, dtype=torch.long)
    net.figures = lambda image: {"coarse": labels[0], "fine": labels[0]}
    (found,) = net.analyse([(torch.randn(1, 3, 33, 33), labels)]).values()
    assert found[:, 0].tolist() == [1, 1] and found[:, 1].isnan().all()


@pytest.mark.network
def test_analyse_reads_the_pictures_of_figures():
    net, (images, labels) = network(LIGHT).eval(), scene(33, 65)
    (found,) = net.analyse([(images, labels)]).values()
    pictures = [torch.stack(maps) for maps in zip(*(net.figures(x).values() for x in images))]
    expected = [backbones.iou(backbones.confusion(y, labels, 3)).nanmean() for y in pictures]
    assert torch.equal(found[:, 0], torch.stack(expected))


# ------------------------------------------------------------------------------------------ recipes


@pytest.mark.system
def test_recipes_are_the_papers():
    context, stuff, city = (
        hfgd.RECIPES[name] for name in ("pascal_context", "coco_stuff164k", "cityscapes")
    )
    for recipe in (context, stuff, city):
        assert (recipe["batch_size"], recipe["bn_momentum"], recipe["power"]) == (16, 0.0003, 0.9)
    keys = ("backbone", "optimizer", "lr", "weight_decay", "iterations", "color")
    assert [context[key] for key in keys] == ["resnet50", "sgd", 0.01, 1e-4, 30_000, "brightness"]
    assert [stuff[key] for key in keys] == [
        "convnext_large",
        "adamw",
        4e-5,
        0.05,
        40_000,
        "photometric",
    ]
    assert [city[key] for key in keys] == [
        "convnext_large",
        "adamw",
        4e-5,
        0.05,
        60_000,
        "photometric",
    ]
    assert city["crop_size"] == (513, 1025) and context["crop_size"] == 513
