"""ksac.py against Algorithm 1 of the thesis, written here literally, in float64."""

import doctest
import warnings
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from conftest import LIGHT
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import backbones
import ksac
import train

pytestmark = pytest.mark.filterwarnings("ignore:at rate")  # maps in tests are small


@pytest.fixture(params=["rearranged", "shared_atrous"])
def shared_atrous(request):
    """Both forms: for few channels ksac.shared_atrous takes ksac.separate."""
    return getattr(ksac, request.param)


RATES = [(1,), (1, 2), (6, 12, 18), (1, 6, 12, 18, 24), (3, 3)]
OPTIONS = [
    dict(),
    dict(head="aspp"),
    dict(head="fcn"),
    dict(decoder=True),
    dict(rates=(1, 2, 3, 4)),
]
SIZES = [(7, 9), (1, 5), (4, 1), (1, 1), (8, 8)]


# -------------------------------------------------------------------------------------- Algorithm 1


def loop_conv2d(T, r, K):
    """Line 4, over the indices: the kernel's nine taps, r apart, zeros outside the map."""
    N, C, H, W = T.shape
    out = []
    for b, o, i, j in product(range(N), range(len(K)), range(H), range(W)):
        total = T.new_zeros(())
        for c, u, v in product(range(C), range(3), range(3)):
            m, n = i + r * (u - 1), j + r * (v - 1)
            if 0 <= m < H and 0 <= n < W:
                total = total + K[o, c, u, v] * T[b, c, m, n]
        out.append(total)
    return torch.stack(out).reshape(N, len(K), H, W)


def algorithm_1(T, K, R, gamma, beta, eps=1e-5):
    """Lines 3 to 6 and "Ensure", batch norm with the batch's own statistics."""
    total = 0
    for r, g, b in zip(R, gamma, beta):
        T_r = loop_conv2d(T, r, K)
        mean = T_r.mean((0, 2, 3), keepdim=True)
        variance = ((T_r - mean) ** 2).mean((0, 2, 3), keepdim=True)
        B_r = g[:, None, None] * (T_r - mean) / torch.sqrt(variance + eps) + b[:, None, None]
        total = total + torch.where(B_r > 0, B_r, torch.zeros_like(B_r))
    return total


@pytest.mark.equation
@pytest.mark.parametrize("form", ["separate", "rearranged", "shared_atrous"])
def test_line_4_by_hand(form):
    # A kernel that takes 1 of the position itself, 10 of the one r to its left, 100 of the one r
    # below.
    weight = torch.tensor([[[[0.0, 0, 0], [10, 1, 0], [0, 100, 0]]]])
    x = torch.tensor([[[[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]]])
    one, two, three = getattr(ksac, form)(x, weight, (1, 2, 3))
    assert one[0, 0].tolist() == [[401, 512, 623], [704, 845, 956], [7, 78, 89]]
    assert two[0, 0].tolist() == [[701, 802, 913], [4, 5, 46], [7, 8, 79]]
    # The rate exceeds the map: only the centre is inside.
    assert three[0, 0].tolist() == x[0, 0].tolist()


@pytest.mark.equation
def test_rearranged_taps_by_hand_with_the_multiply_adds_of_one_convolution():
    # The tap of the position itself, and the one r to its right times ten.
    weight = torch.tensor([[[[0.0, 0, 0], [0, 1, 10], [0, 0, 0]]]])
    one, two = ksac.rearranged(torch.tensor([[[[1.0, 2, 3]]]]), weight, (1, 2))
    assert one.flatten().tolist() == [21, 32, 3]
    assert two.flatten().tolist() == [31, 2, 3]
    x, weight = torch.randn(2, 8, 16, 16), torch.randn(4, 8, 3, 3)
    with FlopCounterMode(display=False) as counter:
        ksac.rearranged(x, weight, (1, 2, 3))
    counted = counter.get_total_flops() // 2
    one = 2 * 4 * 8 * 9 * 16 * 16  # of a convolution with one rate; three separate ones have thrice
    assert one <= counted < 2 * one, (
        f"multiply-adds of `rearranged` for three rates, in matrix products and convolutions: "
        f"expected {one}, those of one 3x3 convolution, got {counted}"
    )


@pytest.mark.equation
def test_the_example_of_the_docstring_runs():
    result = doctest.testmod(ksac)
    assert result.failed == 0 and result.attempted > 0


@pytest.mark.equation
def test_algorithm_1_by_hand_with_two_rates_norm_and_relu():
    # T is 1 2 | 3 4 in image 0, 5 6 | 7 8 in image 1, K takes 1 of the position, 1 of the one r to
    # its right. Rate 1: T' = 3 2 | 7 4 and 11 6 | 15 8, rate 2 = T itself (the tap is outside).
    # Mean 7 and variance 16.5 for rate 1; 4.5 and 5.25 for rate 2. Norm 1 has weight √16.5, bias 1,
    # norm 2 weight -√5.25, bias 0:
    # B_1 = T' - 6 = -3 -4 | 1 -2 and 5 0 | 9 2;  B_2 = 4.5 - T = 3.5 2.5 | 1.5 0.5 and < 0
    head = ksac.KSAC(1, (1, 2), channels=1)
    T = torch.tensor([[[[1.0, 2], [3, 4]]], [[[5.0, 6], [7, 8]]]])
    with torch.no_grad():
        head.kernel.copy_(torch.tensor([[[[0.0, 0, 0], [0, 1, 1], [0, 0, 0]]]]))
        for norm, weight, bias in zip(head.norms, (16.5**0.5, -(5.25**0.5)), (1.0, 0.0)):
            norm.weight.fill_(weight)
            norm.bias.fill_(bias)
        found = sum(head.pyramid(T))
    expected = torch.tensor([[[[3.5, 2.5], [2.5, 0.5]]], [[[5.0, 0], [9, 2]]]])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.equation
@pytest.mark.parametrize("rates", [(1, 2), (2, 5), (3,)])
def test_line_4_equals_the_loop_with_gradients(shared_atrous, rates):
    torch.manual_seed(0)
    x = torch.randn(2, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    pull = [torch.randn(2, 3, 4, 3, dtype=torch.float64) for _ in rates]
    found = shared_atrous(x, weight, rates)
    expected = [loop_conv2d(x, r, weight) for r in rates]
    for a, b in zip(found, expected):
        assert torch.allclose(a, b, atol=1e-12)
    for parameter in (x, weight):
        gradients = [
            torch.autograd.grad(
                sum((y * p).sum() for y, p in zip(maps, pull)), parameter, retain_graph=True
            )[0]
            for maps in (found, expected)
        ]
        assert torch.allclose(*gradients, atol=1e-12)


@pytest.mark.equation
@pytest.mark.parametrize("rates", RATES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_shared_atrous_equals_separate_convolutions_at_any_size(shared_atrous, rates, size):
    torch.manual_seed(0)
    x = torch.randn(2, 5, *size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    found = shared_atrous(x, weight, rates)
    expected = [F.conv2d(x, weight, padding=r, dilation=r) for r in rates]
    assert len(found) == len(rates)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, expected))
    gradients = [
        torch.autograd.grad(sum((y * y).sum() for y in maps), (x, weight))
        for maps in (found, expected)
    ]
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(*gradients))


@pytest.mark.equation
def test_gradient_of_the_shared_kernel_is_the_sum_over_the_rates(shared_atrous):
    torch.manual_seed(0)
    x = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    weight = torch.randn(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    pull = torch.randn(3, 1, 2, 6, 6, dtype=torch.float64)
    whole = torch.autograd.grad(
        sum((y * p).sum() for y, p in zip(shared_atrous(x, weight, (1, 2, 4)), pull)), weight
    )[0]
    parts = [
        torch.autograd.grad((F.conv2d(x, weight, padding=r, dilation=r) * p).sum(), weight)[0]
        for r, p in zip((1, 2, 4), pull)
    ]
    assert torch.allclose(whole, sum(parts), atol=1e-12)
    assert not torch.allclose(whole, parts[0])


@pytest.mark.equation
@pytest.mark.parametrize(
    "channels, rates, form",
    [
        (768, (1, 2), "rearranged"),
        (767, (1, 2), "separate"),
        (384, (1, 2, 3), "rearranged"),
        (383, (1, 2, 3), "separate"),
        (2048, (2,), "separate"),
    ],
)
def test_the_form_is_chosen_by_channels_and_rates_and_changes_nothing(
    channels, rates, form, monkeypatch
):
    torch.manual_seed(0)
    x, weight = torch.randn(1, channels, 4, 5), torch.randn(2, channels, 3, 3)
    calls = []
    for name in ("separate", "rearranged"):
        call = getattr(ksac, name)
        monkeypatch.setattr(
            ksac, name, lambda *a, name=name, call=call: calls.append(name) or call(*a)
        )
    found = ksac.shared_atrous(x, weight, rates)
    assert calls == [form], f"forms that `shared_atrous` called: expected [{form!r}], got {calls}"
    for y, r in zip(found, rates):
        assert torch.allclose(y, F.conv2d(x, weight, padding=r, dilation=r), atol=1e-3)


@pytest.mark.equation
@pytest.mark.parametrize("rates", [(1, 2), (2, 4, 6)])
def test_pyramid_of_many_channels_is_that_of_separate_convolutions(rates):
    torch.manual_seed(0)
    head, x = (
        ksac.KSAC(800, rates, channels=4).double().eval(),
        torch.randn(1, 800, 5, 6, dtype=torch.float64),
    )
    for y, r, norm in zip(head.pyramid(x), rates, head.norms):
        assert torch.allclose(
            y, norm(F.conv2d(x, head.kernel, padding=r, dilation=r)).clamp(min=0), atol=1e-10
        )


@pytest.mark.equation
def test_channels_last_changes_nothing(shared_atrous):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 8, 5, 7), torch.randn(4, 8, 3, 3)
    for a, b in zip(
        shared_atrous(x, weight, (1, 3)),
        shared_atrous(x.contiguous(memory_format=torch.channels_last), weight, (1, 3)),
    ):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.equation
def test_half_precision_is_near_to_full(shared_atrous):
    torch.manual_seed(0)
    x, weight = torch.randn(1, 64, 9, 9), torch.randn(8, 64, 3, 3) / 24
    with torch.autocast("cpu", torch.bfloat16):
        found = shared_atrous(x, weight, (1, 4))
    for a, b in zip(found, shared_atrous(x, weight, (1, 4))):
        assert a.dtype == torch.bfloat16
        assert (a.float() - b).abs().max() < 0.05 < b.abs().max()


@pytest.mark.equation
@pytest.mark.parametrize("rates", [(1, 2), (2, 4, 6)])
def test_pyramid_sum_is_algorithm_1_with_gradients(rates):
    torch.manual_seed(0)
    head = ksac.KSAC(3, rates, channels=4).double()
    for norm in head.norms:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    T = torch.randn(2, 3, 4, 3, dtype=torch.float64, requires_grad=True)
    found = sum(head.pyramid(T))
    gamma, beta = [norm.weight for norm in head.norms], [norm.bias for norm in head.norms]
    expected = algorithm_1(T, head.kernel, rates, gamma, beta)
    assert torch.allclose(found, expected, atol=1e-10)
    pull, inputs = torch.randn_like(found), (T, head.kernel, *gamma, *beta)
    gradients = [torch.autograd.grad((y * pull).sum(), inputs) for y in (found, expected)]
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(*gradients))


# -------------------------------------------------------------------------------------------- heads


@pytest.mark.equation
def test_fig_2_3_the_three_components_are_concatenated_and_projected():
    torch.manual_seed(0)
    head, x = ksac.KSAC(6, (1, 2), channels=4).eval(), torch.randn(2, 6, 5, 5)
    for module in head.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
    pyramid = torch.zeros(2, 4, 5, 5)
    for r, norm in zip((1, 2), head.norms):
        pyramid += norm(F.conv2d(x, head.kernel, padding=r, dilation=r)).clamp(min=0)
    image = head.image_level[1](x.mean((2, 3), keepdim=True)).repeat(1, 1, 5, 5)
    parts = torch.cat([head.pointwise(x), pyramid, image], 1)
    assert torch.allclose(head(x), head.project[0](parts), atol=1e-5)


@pytest.mark.equation
def test_one_rate_is_a_plain_convolution():
    torch.manual_seed(0)
    head, x = ksac.KSAC(6, (2,), channels=4).eval(), torch.randn(1, 6, 5, 5)
    norm = head.norms[0]
    assert torch.allclose(
        sum(head.pyramid(x)),
        F.relu(norm(F.conv2d(x, head.kernel, padding=2, dilation=2))),
        atol=1e-6,
    )


@pytest.mark.network
def test_each_rate_has_its_own_batch_norm_and_one_kernel():
    head = ksac.KSAC(6, (1, 2, 3), channels=4)
    before = [norm.running_mean.clone() for norm in head.norms]
    head(torch.randn(4, 6, 8, 8))
    means = [norm.running_mean for norm in head.norms]
    assert all(not torch.equal(a, b) for a, b in zip(means, before)) and not torch.equal(
        means[0], means[1]
    )
    assert [name for name, p in head.named_parameters() if p.shape[2:] == (3, 3)] == ["kernel"]


@pytest.mark.network
@pytest.mark.parametrize("rates", [(6, 12, 18), (1, 6, 12, 18, 24)])
def test_parameters_of_aspp_minus_ksac_by_hand(rates):
    heads = {"aspp": ksac.ASPP, "ksac": ksac.KSAC}
    count = {
        name: sum(p.numel() for p in head(2048, rates).parameters()) for name, head in heads.items()
    }
    kernels = (len(rates) - 1) * 9 * 2048 * 256  # one instead of R
    projection = (len(rates) - 1) * 256 * 256  # 3·256 channels enter it instead of (2 + R)·256
    assert count["aspp"] - count["ksac"] == kernels + projection  # 9,568,256 for three rates
    # 1x1, image level, one kernel, projection of 768; batch norms: two of them, R of the rates, one
    # of the projection
    assert count["ksac"] == 2 * 2048 * 256 + 9 * 2048 * 256 + 768 * 256 + 2 * 256 * (3 + len(rates))


@pytest.mark.network
def test_more_rates_cost_ksac_a_batch_norm_each():
    three, five = (
        sum(p.numel() for p in ksac.KSAC(64, r).parameters())
        for r in ((6, 12, 18), (1, 6, 12, 18, 24))
    )
    assert five - three == 2 * 2 * 256


@pytest.mark.network
def test_aspp_is_the_plain_baseline_with_dropout_of_deeplab_v3_plus():
    torch.manual_seed(0)
    head, x = ksac.ASPP(6, (1, 2), channels=4).eval(), torch.randn(2, 6, 5, 5)
    convs = [head.convs[1][0], head.convs[2][0]]
    assert [(c.dilation, c.kernel_size, c.bias) for c in convs] == [
        ((1, 1), (3, 3), None),
        ((2, 2), (3, 3), None),
    ]
    assert head.project[-1].p == 0.1 and ksac.KSAC(6).project[-1].p == 0.1
    parts = [head.convs[0](x), *head.pyramid(x), head.convs[-1](x)]
    assert torch.allclose(head(x), head.project(torch.cat(parts, 1)), atol=1e-6)


# ------------------------------------------------------------------------------------------ network


@pytest.mark.network
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_logits_at_pixel_i_times_stride_are_those_of_position_i(options):
    torch.manual_seed(0)
    net = ksac.build(5, "resnet18", **options).eval()
    seen = []
    net.classifier.register_forward_hook(lambda _, inputs, out: seen.append(out))
    images = torch.randn(1, 3, 40, 70)
    logits, stride = net(images), 4 if options.get("decoder") else 16
    position = seen[0]
    assert position.shape[2:] == (48 // stride + 1, 80 // stride + 1)  # continued to 49 x 81
    assert torch.allclose(
        logits[:, :, ::stride, ::stride],
        position[:, :, : 39 // stride + 1, : 69 // stride + 1],
        atol=1e-5,
    )


@pytest.mark.network
def test_multi_grid_in_the_last_stage_of_a_resnet_alone():
    with torch.device("meta"):
        last = ksac.build(3, "resnet50").backbone.body.layer4
        xception = ksac.build(3, "xception65").backbone.body.exit_flow.block2
    assert [block.conv2.dilation[0] for block in last.children()] == [2, 4, 8]
    assert [
        m.dilation[0] for m in xception.modules() if isinstance(m, nn.Conv2d) and m.groups > 1
    ] == [2, 2, 2]


@pytest.mark.network
def test_fcn_is_one_convolution_of_1x1():
    head = ksac.FCN(2048)
    assert sum(p.numel() for p in head.parameters()) == 2048 * 256 + 2 * 256
    assert head[1].p == 0.1


@pytest.mark.network
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_logits_have_the_images_size_and_the_loss_reaches_every_parameter(options):
    torch.manual_seed(0)
    net = ksac.build(5, LIGHT, output_stride=32, **options)
    images, labels = torch.randn(2, 3, 45, 70), torch.randint(5, (2, 45, 70))
    labels[:, :9] = 255
    losses = net(images, labels)
    assert list(losses) == ["cross_entropy"] and losses["cross_entropy"].dtype == torch.float32
    losses["cross_entropy"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    net.eval()
    logits = net(images)
    assert logits.shape == (2, 5, 45, 70) and logits.dtype == torch.float32
    assert net(images[:1, :, :1, :1]).shape == (1, 5, 1, 1)


@pytest.mark.network
def test_the_loss_is_the_cross_entropy_of_the_logits_over_labelled_pixels():
    torch.manual_seed(0)
    net = ksac.build(3, "resnet18", output_stride=32).eval()
    images, labels = torch.randn(1, 3, 40, 33), torch.randint(3, (1, 40, 33))
    labels[:, ::2] = 255
    p = net(images).softmax(1)
    seen = labels != 255
    expected = -p.gather(1, labels.clamp(max=2)[:, None])[:, 0][seen].log().mean()
    assert net(images, labels)["cross_entropy"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.network
def test_ignored_pixels_and_no_labelled_pixel_give_a_zero_gradient():
    torch.manual_seed(0)
    net = ksac.build(3, "resnet18", output_stride=32)
    loss = net(torch.randn(2, 3, 33, 33), torch.full((2, 33, 33), 255))["cross_entropy"]
    loss.backward()
    assert loss.item() == 0 and not any(p.grad.abs().sum() for p in net.parameters())


@pytest.mark.usefixtures("meta")
@pytest.mark.network
def test_what_enters_the_classifier_are_256_channels():
    for options in (dict(), dict(head="aspp"), dict(head="fcn"), dict(decoder=True)):
        net = ksac.build(7, "resnet18", **options)
        assert isinstance(net.classifier, nn.Conv2d)
        assert (
            net.classifier.in_channels,
            net.classifier.out_channels,
            net.classifier.kernel_size,
        ) == (256, 7, (1, 1))


@pytest.mark.usefixtures("meta")
@pytest.mark.network
@pytest.mark.parametrize(
    "stride, rates", [(16, (1, 6, 12, 18, 24)), (8, (2, 12, 24, 36, 48)), (32, (1, 3, 6, 9, 12))]
)
@pytest.mark.parametrize("head", ["ksac", "aspp"])
def test_rates_are_scaled_with_the_output_stride(stride, rates, head):
    net = ksac.build(3, "resnet18", head=head, rates=(1, 6, 12, 18, 24), output_stride=stride)
    assert net.head.rates == rates
    if head == "aspp":
        assert tuple(branch[0].dilation[0] for branch in net.head.convs[1:-1]) == rates


@pytest.mark.network
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_regularized_is_the_last_batch_norm(options):
    net = settled(ksac.build(3, LIGHT, output_stride=32, **options))
    norm, seen = net.get_submodule(net.regularized), []
    for module in (norm, net.classifier):
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    net(torch.randn(1, 3, 33, 33).double())
    before, after = seen
    assert before.min() < 0  # linear: a convolution's output
    torch.testing.assert_close(normed(norm, before), after)


@pytest.mark.usefixtures("meta")
@pytest.mark.network
@pytest.mark.parametrize("decoder, read", [(False, [0, 0, 0, 1]), (True, [1, 0, 0, 1])])
def test_levels_that_are_not_read_are_frozen(decoder, read):
    net = ksac.build(3, "swin_t", output_stride=32, decoder=decoder)
    norms = [norm.weight.requires_grad for norm in net.backbone.norms]
    assert norms == read


@pytest.mark.network
def test_a_label_that_is_not_a_class_is_refused():
    images, labels = torch.randn(2, 3, 33, 33), torch.full((2, 33, 33), 3)
    with pytest.raises(ValueError, match="label"):
        ksac.build(3, LIGHT, output_stride=32)(images, labels)


@pytest.mark.network
def test_decoder_reads_the_features_of_stride_4():
    torch.manual_seed(0)
    net = ksac.build(3, "resnet18", decoder=True).eval()
    seen = []
    net.decoder.register_forward_hook(lambda _, inputs, out: seen.extend([*inputs[:2], out]))
    net(torch.randn(1, 3, 65, 33))
    assert [tuple(x.shape[1:]) for x in seen] == [(256, 5, 3), (64, 17, 9), (256, 17, 9)]


@pytest.mark.network
def test_decoder_is_deeplab_v3_plus_s():
    decoder = backbones.Decoder(256, 64).eval()
    convs = [m for m in decoder.modules() if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size[0]) for c in convs] == [
        (64, 48, 1),
        (304, 256, 3),
        (256, 256, 3),
    ]


@pytest.mark.network
def test_a_batch_of_one_is_an_error_in_training_and_fine_in_evaluation():
    images, labels = torch.randn(1, 3, 33, 33), torch.zeros(1, 33, 33, dtype=torch.int64)
    for head in ("ksac", "aspp"):
        net = ksac.build(3, "resnet18", head=head, rates=(1, 2))
        with pytest.raises(ValueError, match="more than 1 value per channel when training"):
            net(images, labels)
        assert net.eval()(images).shape == (1, 3, 33, 33)
    assert ksac.build(3, "resnet18", head="fcn")(images, labels)["cross_entropy"] > 0


@pytest.mark.system
def test_a_batch_of_one_is_one_line_in_train_py(photos, tmp_path, capsys):
    flags = f"--method ksac --dataset folder --data-root {photos} --batch-size 1 --crop-size 33"
    flags += " --workers 0 --device cpu"
    assert train.main([*flags.split(), "--output", str(tmp_path / "a")]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("train.py: batch norm needs more than one value per channel; take a")


@pytest.mark.network
@pytest.mark.parametrize("head", ["ksac", "aspp"])
def test_rates_beyond_the_map_are_a_warning_at_the_first_training_step(head):
    net = ksac.build(3, LIGHT, head=head, rates=(2, 3, 4, 7))
    images, labels = torch.randn(2, 3, 33, 49), torch.zeros(2, 33, 49, dtype=torch.int64)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        net.eval()(images)  # evaluation does not warn
        large = torch.randn(2, 3, 113, 17)  # 8x2 positions
        net.train()(large, torch.zeros(2, 113, 17, dtype=torch.int64))
        assert not seen
        for _ in range(3):
            net(images, labels)  # 3x4 positions: a tap of rate 3 still reads the row
    (text,) = (str(warning.message) for warning in seen)
    start = "at rate 4, 7 only the centre tap reads a map of 3x4, the others padding; take "
    assert text.startswith(start) and "\n" not in text and "--option rates=" in text


@pytest.mark.network
def test_no_warning_while_compiling_or_without_rates(monkeypatch):
    images, labels = torch.randn(2, 3, 33, 33), torch.zeros(2, 33, 33, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ksac.build(3, LIGHT, head="fcn")(images, labels)
        net = ksac.build(3, LIGHT)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        net(images, labels)
        monkeypatch.undo()
        with pytest.raises(UserWarning, match="at rate 6, 12, 18"):
            net(images, labels)


@pytest.mark.usefixtures("meta")
@pytest.mark.network
def test_wrong_options_are_named():
    with pytest.raises(ValueError, match="KSACNet has no option rate; .*rates=\\(6, 12, 18\\)"):
        ksac.build(3, "resnet18", rate=6)
    with pytest.raises(ValueError, match="head='psp': it is one of 'ksac', 'aspp', 'fcn'"):
        ksac.build(3, "resnet18", head="psp")
    for rates in ((), (0, 6), (1.5,), 6, (True,)):
        with pytest.raises(ValueError, match=r"^rates=.*: expected whole numbers from 1 on"):
            ksac.build(3, "resnet18", rates=rates)
    for rates in ((0,), (1.5,), 24):
        with pytest.raises(ValueError, match=r"^extra_rates=.*: expected whole numbers from 1 on"):
            ksac.build(3, "resnet18", extra_rates=rates)


@pytest.mark.network
def test_extra_rates_are_ksacs_alone():
    with torch.device("meta"):
        options = dict(extra_rates=(1, 24))
        five = ksac.build(3, "resnet18", **options)
        three = ksac.build(3, "resnet18", head="aspp", **options)
    assert five.head.rates == (1, 6, 12, 18, 24) and len(five.head.norms) == 5
    assert three.head.rates == (6, 12, 18)  # Table 2.1's ASPP with the recipe of VOC


@pytest.mark.network
def test_figures_are_the_first_25_maps_of_each_rate():
    torch.manual_seed(0)
    for head in ("ksac", "aspp"):
        net, image = ksac.build(3, "resnet18", head=head).eval(), torch.randn(3, 60, 90)
        figures = net.figures(image)
        ends = ": 25 channels | 0 | largest of each"
        beyond = " (beyond the map: centre tap alone)"
        rates = "atrous rate 6", f"atrous rate 12{beyond}", f"atrous rate 18{beyond}"
        assert list(figures) == [f"{rate}{ends}" for rate in rates]
        x = net.backbone(image[None])[-1]  # 65 x 97 pixels, 5 x 7 positions
        for m, y in zip(figures.values(), net.head.pyramid(x)):
            assert m.shape == (5 * 6, 5 * 8)
            assert m.nan_to_num().min() >= 0 and m.nan_to_num().max() <= 1
            seventh = y[0, 7].detach()  # second row, third column
            tile = m[6:11, 16:23]
            assert torch.allclose(tile, seventh / seventh.max().clamp(min=1e-6), atol=1e-6)
            assert m[5].isnan().all() and m[:, 7].isnan().all()  # between the tiles
            assert m.isnan().sum() == m.numel() - 25 * 5 * 7
    net = ksac.build(3, "resnet18", rates=(1, 2, 6), output_stride=32).eval()
    names = [name.split(":")[0] for name in net.figures(image)]
    assert names == ["atrous rate 1", "atrous rate 3"]  # 1/2 and 1 are both 1
    assert ksac.build(3, "resnet18", head="fcn").eval().figures(image) == {}
    with pytest.raises(ValueError, match="of one image, not of a batch"):
        net.figures(image.expand(2, -1, -1, -1))
    with pytest.raises(ValueError, match="evaluation mode"):
        net.train().figures(image)


@pytest.mark.network
@pytest.mark.parametrize("rate, side", [(4, 5), (5, 5), (6, 5)])
def test_figures_say_at_which_rates_only_the_centre_tap_reads_the_map(rate, side):
    torch.manual_seed(0)
    net = ksac.build(3, LIGHT, rates=(rate,)).eval()
    (name,) = net.figures(torch.randn(3, 17, 16 * (side - 1) + 1))
    x = torch.randn(1, 320, 2, side)
    (found,) = ksac.shared_atrous(x, net.head.kernel, (rate,))
    centre = torch.allclose(found, F.conv2d(x, net.head.kernel[:, :, 1:2, 1:2]), atol=1e-5)
    assert centre == ("centre tap alone" in name) == (rate > 4)


@pytest.mark.system
def test_saved_weights_reproduce_the_outputs(tmp_path):
    torch.manual_seed(0)
    a, b = (ksac.build(4, "resnet18", decoder=True).eval() for _ in range(2))
    torch.save(a.state_dict(), tmp_path / "net.pt")
    b.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    images = torch.randn(1, 3, 40, 40)
    assert torch.equal(a(images), b(images))


STATED = {  # the thesis, section by section; what is not here is open
    "coco_voc": dict(iterations=300_000, lr=1e-3),
    "pascal_voc_aug": dict(iterations=40_000, lr=4e-4),
    "pascal_voc": dict(lr=2e-4),
    "ade20k": dict(lr=2e-3, momentum=0.9, halve_every=30_000, weights="imagenet"),
    "cityscapes": dict(crop_size=769),
}


@pytest.mark.system
@pytest.mark.parametrize("dataset", STATED)
def test_recipes_have_what_sect_2_3_states(dataset):
    stated = dict(optimizer="sgd", batch_size=16, scale=(0.5, 2.0), scale_step=0.25)
    stated |= dict(crop_size=513, backbone="xception65", output_stride=16) | STATED[dataset]
    recipe = ksac.RECIPES[dataset]
    assert {key: recipe[key] for key in stated} == stated
    voc = "voc" in dataset  # Table 2.2's five rates
    expected = dict(decoder=True, extra_rates=(1, 24)) if voc else dict(decoder=True)
    assert recipe["option"] == expected and set(ksac.RECIPES) - {"shapes"} == set(STATED)


def settled(net):
    """In double, in evaluation mode, with batch norms far from where they start."""
    for module in net.double().eval().modules():
        if isinstance(module, nn.BatchNorm2d):
            for x, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.5, 0.5),
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
            ):
                nn.init.uniform_(x, low, high)
    return net


def normed(norm, y):
    """Batch norm of the running statistics, ReLU."""
    mean, var, gamma, beta = (
        v[:, None, None] for v in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    return ((y - mean) / torch.sqrt(var + 1e-5) * gamma + beta).clamp(min=0)


def layer(conv, norm, x):
    """Convolution without bias, batch norm, ReLU, written out."""
    assert conv.bias is None
    return normed(norm, F.conv2d(x, conv.weight, padding=conv.weight.shape[2] // 2))


@pytest.mark.network
def test_head_layer_by_layer():
    torch.manual_seed(0)
    head, x = settled(ksac.KSAC(6, (1, 2), channels=4)), torch.randn(2, 6, 5, 5).double()
    assert [head.pointwise[0].kernel_size, head.project[0][0].kernel_size] == [(1, 1), (1, 1)]
    assert head.kernel.shape == (4, 6, 3, 3) and head.project[1].p == 0.1
    pyramid = sum(
        normed(norm, loop_conv2d(x, r, head.kernel)) for r, norm in zip((1, 2), head.norms)
    )
    pooled = head.image_level[1]
    image = layer(pooled[0], pooled[1], x.mean((2, 3), keepdim=True)).repeat(1, 1, 5, 5)
    parts = torch.cat([layer(head.pointwise[0], head.pointwise[1], x), pyramid, image], 1)
    project = head.project[0]
    torch.testing.assert_close(head(x), layer(project[0], project[1], parts))


@pytest.mark.network
def test_fcn_and_decoder_layer_by_layer():
    torch.manual_seed(0)
    head, x = settled(ksac.FCN(5, 4)), torch.randn(2, 5, 3, 4).double()
    assert head[0][0].kernel_size == (1, 1) and head[1].p == 0.1
    torch.testing.assert_close(head(x), layer(head[0][0], head[0][1], x))
    decoder = settled(backbones.Decoder(4, 3))
    low = torch.randn(2, 3, 5, 7).double()
    up = F.interpolate(x[:, :4], size=(5, 7), mode="bilinear", align_corners=True)
    y = torch.cat([up, layer(decoder.low[0], decoder.low[1], low)], 1)
    for conv, norm, _ in decoder.fuse:
        assert conv.kernel_size == (3, 3)
        y = layer(conv, norm, y)
    torch.testing.assert_close(decoder(x[:, :4], low, backbones.resize), y)


@pytest.mark.network
def test_stands_on_what_cannot_be_dilated():
    net = ksac.build(3, "swin_t", output_stride=8, decoder=True).eval()
    assert list(net.head.rates) == [12, 24, 36]
    with torch.no_grad():
        assert net(torch.randn(1, 3, 65, 40)).shape == (1, 3, 65, 40)
