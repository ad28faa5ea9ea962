import importlib
import math
from itertools import product
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import LIGHT
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision import models
from torchvision.ops import SqueezeExcitation

import backbones

METHODS = ("ksac", "caa", "car", "spgnet", "pyramid_fuse", "hfgd")
SMALL = ("resnet18", "resnet34", "resnet50", "mobilenet_v2")


pytestmark = pytest.mark.usefixtures("one_seed")


def kernels(module):
    """(dilation, padding) of the convolutions that are larger than 1x1, in order."""
    convolutions = [
        m for m in module.modules() if isinstance(m, nn.Conv2d) and m.kernel_size[0] > 1
    ]
    return [(conv.dilation[0], conv.padding[0]) for conv in convolutions]


def meta(*arguments, **options):
    """The body of a backbone that has shapes, but no numbers."""
    with torch.device("meta"):
        return backbones.build(*arguments, **options).body


# ----------------------------------------------------------------------------------------- networks


PATCHES = [name for name in backbones.NAMES if name.startswith(("swin", "convnext"))]


@pytest.mark.network
@pytest.mark.parametrize(
    "name", [name for name in backbones.NAMES if not name.startswith(("swin", "convnext", "hrnet"))]
)
@pytest.mark.parametrize("stride", [32, 8])
def test_four_maps_finest_first_at_their_strides(name, stride):
    with torch.device("meta"):  # shapes only
        net = backbones.build(name, stride)
        maps = net(torch.zeros(2, 3, 65, 97))
    assert net.strides == {32: (4, 8, 16, 32), 8: (4, 8, 8, 8)}[stride]
    assert not net.patches
    sizes = [(2, c, -(-65 // s), -(-97 // s)) for c, s in zip(net.channels, net.strides)]
    assert isinstance(maps, list) and [tuple(m.shape) for m in maps] == sizes


@pytest.mark.network
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "xception65", "efficientnet_b5"])
def test_stride_16_has_two_maps_of_it(name):
    with torch.device("meta"):
        net = backbones.build(name, 16)
        maps = net(torch.zeros(1, 3, 65, 97))
    assert net.strides == (4, 8, 16, 16)
    assert [tuple(m.shape[2:]) for m in maps] == [(17, 25), (9, 13), (5, 7), (5, 7)]


@pytest.mark.network
@pytest.mark.parametrize("name, stride", [(n, 8 if n[-1] in "tl" else 32) for n in PATCHES])
def test_networks_of_patches_have_four_maps_of_images_of_multiples_of_32(name, stride):
    with torch.device("meta"):
        net = backbones.build(name, stride)
        maps = net(torch.zeros(2, 3, 64, 96))
    assert net.strides == (4, 8, 16, stride) and net.coarsest == 32 and net.patches
    assert net.channels[-1] == (
        2048 if stride == 8 else {"t": 768, "s": 768, "b": 1024, "l": 1536}[name.split("_")[1][0]]
    )
    assert [tuple(m.shape) for m in maps] == [
        (2, c, 64 // s, 96 // s) for c, s in zip(net.channels, net.strides)
    ]


@pytest.mark.system
@pytest.mark.parametrize("name", ["swin_t", "convnext_tiny"])
def test_networks_of_patches_are_torchvisions_with_a_norm_for_each_level(tmp_path, name):
    model = changed(models.get_model(name))
    torch.save(model.state_dict(), tmp_path / "w.pth")
    net = backbones.build(name, weights=tmp_path / "w.pth").eval()
    for i, norm in enumerate(net.norms):
        nn.init.constant_(norm.weight, i + 2.0)
    x = images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        found, expected = net(images), []
        for i, stage in enumerate(model.features):
            x = stage(x)
            if i % 2:
                y, eps = (x, 1e-5) if name == "swin_t" else (x.permute(0, 2, 3, 1), 1e-6)
                expected.append(
                    (i // 2 + 2) * F.layer_norm(y, y.shape[-1:], eps=eps).permute(0, 3, 1, 2)
                )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def authors_swin(state):
    """torchvision's state dict of Swin-T with the names of its authors' checkpoint, and the buffers
    of that.
    """
    names = {}
    for key, value in state.items():
        part = key.split(".")
        number = int(part[1]) if part[0] == "features" else None
        if number == 0:
            key = "patch_embed." + {"0": "proj.", "2": "norm."}[part[2]] + part[3]
        elif number is not None and number % 2:
            block = ".".join(part[3:]).replace("mlp.0", "mlp.fc1").replace("mlp.3", "mlp.fc2")
            key = f"layers.{number // 2}.blocks.{part[2]}.{block}"
        elif number is not None:
            key = f"layers.{number // 2 - 1}.downsample.{'.'.join(part[2:])}"
        if key.endswith("relative_position_index"):
            value = value.reshape(49, 49)
        names[key] = value
    return names | {"layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49)}


def authors_convnext(state):
    names = {}
    layers = {"block.0": "dwconv", "block.2": "norm", "block.3": "pwconv1", "block.5": "pwconv2"}
    for key, value in state.items():
        part = key.split(".")
        if part[0] == "classifier":
            key = {"0": "norm.", "2": "head."}[part[1]] + part[2]
        elif int(part[1]) % 2 == 0:
            key = f"downsample_layers.{int(part[1]) // 2}.{'.'.join(part[2:])}"
        elif part[3] == "layer_scale":
            key, value = f"stages.{int(part[1]) // 2}.{part[2]}.gamma", value.flatten()
        else:
            key = (
                f"stages.{int(part[1]) // 2}.{part[2]}.{layers[part[3] + '.' + part[4]]}.{part[5]}"
            )
        names[key] = value
    return names


@pytest.mark.system
@pytest.mark.parametrize(
    "name, renamed", [("swin_t", authors_swin), ("convnext_tiny", authors_convnext)]
)
def test_authors_checkpoints_load_as_they_are(tmp_path, name, renamed):
    model = changed(models.get_model(name))
    state = renamed(model.state_dict())
    known = "layers.2.blocks.5.mlp.fc2.bias" if name == "swin_t" else "stages.2.8.pwconv1.bias"
    assert known in state and not any(key.startswith(("features", "classifier")) for key in state)
    torch.save({"model": state}, tmp_path / "w.pth")
    net = backbones.build(name, weights=tmp_path / "w.pth")
    loaded = net.body.state_dict()
    assert (
        all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.items())
        and len(loaded) > 150
    )
    state.pop(known)
    torch.save({"model": state}, tmp_path / "w.pth")
    with pytest.raises(
        ValueError, match=r"1 missing from the file \['features.5.(5.mlp.3|8.block.3).bias'\]"
    ):
        backbones.build(name, weights=tmp_path / "w.pth")


@pytest.mark.network
def test_joint_pyramid_upsampling_by_its_words():
    jpu = backbones.JointPyramidUpsampling((2, 3, 4), width=2).double().eval()
    maps = [torch.randn(1, c, s, 2 * s, dtype=torch.double) for c, s in ((2, 8), (3, 4), (4, 2))]

    def reduced(x, layer):  # convolution, batch norm with its first statistics, ReLU
        return F.relu(F.conv2d(x, layer[0].weight, padding=1) / math.sqrt(1 + 1e-5))

    a, b, c = (reduced(x, layer) for x, layer in zip(maps, jpu.reduce))
    together = torch.cat(
        [
            a,
            F.interpolate(b, size=(8, 16), mode="bilinear"),
            F.interpolate(c, size=(8, 16), mode="bilinear"),
        ],
        1,
    )
    parts = []
    for rate, (depthwise, pointwise) in zip((1, 2, 4, 8), jpu.dilated):
        y = F.conv2d(
            together, depthwise[0].weight, padding=rate, dilation=rate, groups=6
        ) / math.sqrt(1 + 1e-5)
        parts.append(F.relu(F.conv2d(y, pointwise[0].weight) / math.sqrt(1 + 1e-5)))
    found = jpu(maps)
    assert found.shape == (1, 8, 8, 16) == (1, jpu.channels, 8, 16)
    torch.testing.assert_close(found, torch.cat(parts, 1))
    with pytest.raises(ValueError, match=r"output stride 16: swin_t has \[32, 8\]"):
        backbones.build("swin_t", 16)


@pytest.mark.network
def test_efficientnets_kernels_of_5_are_dilated_too():
    body = meta("efficientnet_b5", 8)
    five = [m for m in body.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (5, 5)]
    assert {(m.dilation, m.padding) for m in five} == {
        ((1, 1), (2, 2)),
        ((2, 2), (4, 4)),
        ((4, 4), (8, 8)),
    }


@pytest.mark.network
def test_swin_l_has_its_papers_size():
    with torch.device("meta"):
        net = backbones.build("swin_l")
    # 197M in the paper's Table 1, with the classifier (1536·1000 + 1000), and without the norms of
    # the first three levels
    size = sum(p.numel() for p in net.parameters()) + 1_537_000 - 2 * (192 + 384 + 768)
    assert size == pytest.approx(196.5e6, rel=0.001)


@pytest.mark.network
def test_what_cannot_be_dilated_says_so_and_swin_l_is_not_downloaded():
    with pytest.raises(ValueError, match=r"output stride 16: hrnet_w18 has \[32\]"):
        backbones.build("hrnet_w18", 16)
    with pytest.raises(ValueError, match="convnext_tiny has no multi_grid"):
        backbones.build("convnext_tiny", 8, multi_grid=(1, 2, 4))
    with pytest.raises(ValueError, match="weights of swin_l could not .*; give the path"):
        backbones.build("swin_l", weights="imagenet")


HRNET = {"hrnet_w18": 9_562, "hrnet_w32": 29_306, "hrnet_w48": 65_325}  # thousands of parameters


@pytest.mark.network
@pytest.mark.parametrize("name", HRNET)
def test_hrnet_has_four_maps_at_once_and_its_parameters(name):
    with torch.device("meta"):
        net = backbones.build(name)
        maps = net(torch.zeros(2, 3, 65, 97))
    assert net.strides == (4, 8, 16, 32) and not net.patches
    assert [tuple(m.shape) for m in maps] == [
        (2, c, -(-65 // s), -(-97 // s)) for c, s in zip(net.channels, net.strides)
    ]
    assert sum(p.numel() for p in net.parameters()) / 1000 == pytest.approx(HRNET[name], abs=1)


@pytest.mark.system
def test_hrnet_names_follow_the_authors_checkpoints(tmp_path):
    expected = {
        "conv1.weight": (64, 3, 3, 3),
        "bn2.running_var": (64,),
        "layer1.0.downsample.0.weight": (256, 64, 1, 1),
        "layer1.3.bn3.bias": (256,),
        "transition1.0.0.weight": (18, 256, 3, 3),
        "transition1.1.0.0.weight": (36, 256, 3, 3),
        "stage2.0.branches.1.3.conv2.weight": (36, 36, 3, 3),
        "stage2.0.fuse_layers.0.1.0.weight": (18, 36, 1, 1),
        "stage2.0.fuse_layers.1.0.0.0.weight": (36, 18, 3, 3),
        "transition2.2.0.0.weight": (72, 36, 3, 3),
        "stage3.3.fuse_layers.2.0.0.1.weight": (18,),
        "stage3.3.fuse_layers.2.0.1.0.weight": (72, 18, 3, 3),
        "transition3.3.0.1.bias": (144,),
        "stage4.2.fuse_layers.3.0.2.0.weight": (144, 18, 3, 3),
        "stage4.2.fuse_layers.0.3.1.running_mean": (18,),
        "stage4.2.branches.3.3.bn2.weight": (144,),
    }
    state = backbones.build("hrnet_w18").body.state_dict()
    assert {name: tuple(state[name].shape) for name in expected} == expected
    assert (
        len({name.split(".")[0] for name in state}) == 11
    )  # conv1, bn1, conv2, bn2, layer1, three transitions, three stages
    rest = {
        "incre_modules.0.0.conv1.weight": torch.zeros(2),
        "final_layer.0.weight": torch.zeros(2),
        "classifier.bias": torch.zeros(2),
    }
    torch.save(state | rest, tmp_path / "w.pth")
    again = backbones.build("hrnet_w18", weights=tmp_path / "w.pth").body.state_dict()
    assert all(torch.equal(again[name], state[name]) for name in state)
    with pytest.raises(ValueError, match="weights of hrnet_w18 could not .*; give the path"):
        backbones.build("hrnet_w18", weights="imagenet")


@pytest.mark.network
def test_high_resolution_modules_exchange_all_with_all():
    module = backbones.HighResolutionModule((2, 3, 4)).eval()
    maps = [torch.randn(1, c, s, 2 * s - 1) for c, s in zip((2, 3, 4), (9, 5, 3))]
    a, b, c = (branch(m) for branch, m in zip(module.branches, maps))
    f = module.fuse_layers

    def up(x, like):
        return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=True)

    expected = [
        F.relu(a + up(f[0][1](b), a) + up(f[0][2](c), a)),
        F.relu(up(f[1][0](a), b) + b + up(f[1][2](c), b)),
        F.relu(up(f[2][0](a), c) + f[2][1](b) + c),
    ]
    for found, y in zip(module(maps), expected, strict=True):
        torch.testing.assert_close(found, y)
    assert (
        f[0][0] is None
        and f[2][0][0][2].__class__ is nn.ReLU
        and len(f[2][0][1]) == 2
        and len(f[0][1]) == 2
    )


@pytest.mark.network
def test_hrnet_grows_by_one_map_a_stage():
    net = backbones.build("hrnet_w18").body.eval()
    x = images = torch.randn(1, 3, 64, 64)
    x = net.layer1(F.relu(net.bn2(net.conv2(F.relu(net.bn1(net.conv1(x)))))))
    maps = net.stage2([net.transition1[0](x), net.transition1[1](x)])
    maps = net.stage3(maps + [net.transition2[2](maps[1])])
    maps = net.stage4(maps + [net.transition3[3](maps[2])])
    assert all(torch.equal(a, b) for a, b in zip(net(images), maps, strict=True))
    assert net.layer1[0].downsample[-1].__class__ is nn.BatchNorm2d


@pytest.mark.network
def test_channels_are_those_of_the_papers():
    with torch.device("meta"):
        channels = {name: backbones.build(name).channels for name in SMALL}
    assert channels["resnet18"] == channels["resnet34"] == (64, 128, 256, 512)
    assert channels["resnet50"] == (256, 512, 1024, 2048)
    assert channels["mobilenet_v2"] == (24, 32, 96, 320)  # DeepLab's


def without_squeezing(net):
    """The network without squeeze-and-excitation, whose mean is over other samples where there are
    more.
    """
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, SqueezeExcitation):
                setattr(module, name, nn.Identity())
    return net


@pytest.mark.network
@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50", "mobilenet_v2", "xception65", "efficientnet_b5"]
)
def test_dilated_network_computes_the_same_samples_only_denser(name):
    plain = without_squeezing(backbones.build(name, 32)).eval()
    images = torch.randn(1, 3, 33, 65)
    with torch.no_grad():
        expected = plain(images)
        for stride in (16, 8):
            dense = without_squeezing(backbones.build(name, stride)).eval()
            dense.load_state_dict(plain.state_dict())
            for old, new, a, b in zip(expected, dense(images), plain.strides, dense.strides):
                sampled = new[:, :, :: a // b, :: a // b]
                assert sampled.shape == old.shape and old.std() > 0
                torch.testing.assert_close(
                    sampled, old, rtol=1e-4, atol=1e-4 * old.abs().max().item()
                )


@pytest.mark.network
def test_dilation_rates_by_hand():
    # The first block still reads the map that its stride used to thin out: it keeps the rate before
    # it.
    assert set(kernels(meta("resnet50", 32).layer4)) == {(1, 1)}
    assert kernels(meta("resnet50", 16).layer4) == [(1, 1), (2, 2), (2, 2)]
    assert kernels(meta("resnet50", 8).layer3) == [(1, 1)] + 5 * [(2, 2)]
    assert kernels(meta("resnet50", 8).layer4) == [(2, 2), (4, 4), (4, 4)]


@pytest.mark.network
@pytest.mark.parametrize("stride, rates", [(32, (1, 2, 4)), (16, (2, 4, 8)), (8, (4, 8, 16))])
def test_multi_grid_multiplies_the_rates_of_the_last_blocks(stride, rates):
    body = meta("resnet50", stride, multi_grid=(1, 2, 4))
    assert kernels(body.layer4) == [(rate, rate) for rate in rates]
    assert kernels(body.layer3) == kernels(meta("resnet50", stride).layer3)
    assert body(torch.zeros(1, 3, 33, 33, device="meta"))[-1].shape[-1] == -(-33 // stride)


@pytest.mark.network
def test_multi_grid_repeats_its_last_factor():
    assert [rate for rate, _ in kernels(meta("resnet50", 16, multi_grid=(1, 2)).layer4)] == [
        2,
        4,
        4,
    ]
    assert [rate for rate, _ in kernels(meta("resnet18", 16, multi_grid=(1, 2, 4)).layer4)] == [
        2,
        2,
        4,
        4,
    ]


@pytest.mark.network
def test_multi_grid_is_for_resnets():
    with pytest.raises(
        ValueError, match="mobilenet_v2 has no multi_grid; ResNets and xception65 have it"
    ):
        backbones.build("mobilenet_v2", 16, multi_grid=(1, 2, 4))


@pytest.mark.network
def test_xception65_is_deeplabs_by_its_numbers():
    body = meta("xception65")
    assert (
        sum(p.numel() for p in body.parameters()) == 37_867_312
    )  # 39.9 M with ImageNet's classifier of 2,049,000
    depthwise = [m for m in body.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert len(depthwise) == 3 * (3 + 16 + 2) and all(
        conv.groups == conv.in_channels for conv in depthwise
    )
    assert all(m.eps == 1e-3 for m in body.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.network
def test_xception65_names_follow_deeplabs_checkpoints():
    names = set(meta("xception65").state_dict())
    for name in (
        "entry_flow/conv1_1/weights",
        "entry_flow/block2/unit_1/xception_module/separable_conv3_pointwise/BatchNorm/gamma",
        "entry_flow/block1/unit_1/xception_module/shortcut/BatchNorm/moving_variance",
        "middle_flow/block1/unit_16/xception_module/separable_conv1_depthwise/depthwise_weights",
        "exit_flow/block2/unit_1/xception_module/separable_conv3_pointwise/BatchNorm/beta",
    ):
        for old, new in (
            ("xception_module/", ""),
            ("depthwise_weights", "0.weight"),
            ("weights", "0.weight"),
            ("BatchNorm/gamma", "1.weight"),
            ("BatchNorm/beta", "1.bias"),
            ("BatchNorm/moving_variance", "1.running_var"),
        ):
            name = name.replace(old, new)
        assert name.replace("/", ".") in names


@pytest.mark.network
def test_xception65_dilation_rates_by_hand():
    def rates(stride, **how):
        body = meta("xception65", stride, **how)
        parts = (body.middle_flow.block1.unit_1, body.exit_flow.block1, body.exit_flow.block2)
        assert all(dilation == padding for part in parts for dilation, padding in kernels(part))
        return [[dilation for dilation, _ in kernels(part)] for part in parts]

    assert rates(32) == [[1, 1, 1], [1, 1, 1], [1, 1, 1]]
    assert rates(16) == [[1, 1, 1], [1, 1, 1], [2, 2, 2]]
    assert rates(8) == [[2, 2, 2], [2, 2, 2], [4, 4, 4]]
    assert rates(16, multi_grid=(1, 2, 4)) == [[1, 1, 1], [1, 1, 1], [2, 4, 8]]


def literal_xception65(state, x):
    """DeepLab's Xception-65 at stride 32 from its state dict, layer by layer: the four levels."""

    def conv(name, x, stride=1, groups=1):
        w = state[f"{name}.0.weight"]
        mean, variance, gamma, beta = (
            state[f"{name}.1.{part}"][:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        y = F.conv2d(x, w, stride=stride, padding=w.shape[2] // 2, groups=groups)
        return (y - mean) / (variance + 1e-3) ** 0.5 * gamma + beta

    def separable(name, x, stride, activated):
        x = conv(f"{name}_depthwise", x if activated else F.relu(x), stride, x.shape[1])
        x = conv(f"{name}_pointwise", F.relu(x) if activated else x)
        return F.relu(x) if activated else x

    def unit(name, x, skip, stride=1, activated=False):
        y1 = separable(f"{name}.separable_conv1", x, 1, activated)
        y2 = separable(f"{name}.separable_conv2", y1, 1, activated)
        y3 = separable(f"{name}.separable_conv3", y2, stride, activated)
        residual = {
            "conv": lambda: conv(f"{name}.shortcut", x, stride),
            "sum": lambda: x,
            None: lambda: 0,
        }[skip]()
        return y3 + residual, y2

    x = F.relu(conv("entry_flow.conv1_1", x, 2))
    x = F.relu(conv("entry_flow.conv1_2", x))
    x, _ = unit("entry_flow.block1.unit_1", x, "conv", 2)
    x, quarter = unit("entry_flow.block2.unit_1", x, "conv", 2)
    x, eighth = unit("entry_flow.block3.unit_1", x, "conv", 2)
    for i in range(1, 17):
        x, _ = unit(f"middle_flow.block1.unit_{i}", x, "sum")
    sixteenth = x
    x, _ = unit("exit_flow.block1.unit_1", x, "conv", 2)
    x, _ = unit("exit_flow.block2.unit_1", x, None, activated=True)
    return [quarter, eighth, sixteenth, x]


@pytest.mark.network
def test_xception65_is_deeplabs_layer_by_layer():
    net = backbones.build("xception65").double().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1)
    images = torch.randn(1, 3, 65, 33, dtype=torch.float64)
    with torch.no_grad():
        for level, expected in zip(net(images), literal_xception65(net.body.state_dict(), images)):
            assert expected.std() > 1e-6
            torch.testing.assert_close(
                level, expected, rtol=1e-8, atol=1e-10 * expected.abs().max().item()
            )


@pytest.mark.system
def test_xception65_takes_a_converted_checkpoint_as_its_docstring_says(tmp_path):
    with torch.device("meta"):
        own = backbones.Xception65().state_dict()
    checkpoint, pixels = {}, torch.rand(1, 3, 33, 33)
    for name, value in own.items():  # a checkpoint as TensorFlow lays it out
        if name.endswith("num_batches_tracked"):
            continue
        depthwise = "depthwise" in name and name.endswith("0.weight")
        order = (2, 3, 0, 1) if depthwise else (2, 3, 1, 0)
        checkpoint[name] = (
            torch.randn(value.shape).permute(order)
            if value.ndim == 4
            else torch.rand(value.shape) + 0.5
        )
    converted = {}
    for name, value in checkpoint.items():
        order = (2, 3, 0, 1) if "depthwise" in name else (3, 2, 0, 1)
        converted[name] = value.permute(order) if value.ndim == 4 else value
    torch.save(converted, tmp_path / "before.pth")
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    W = converted["entry_flow.conv1_1.0.weight"]
    converted["entry_flow.conv1_1.1.running_mean"] -= (W * (2 * mean - 1)[:, None, None]).sum(
        (1, 2, 3)
    )
    converted["entry_flow.conv1_1.0.weight"] = W * (2 * std)[:, None, None]
    torch.save(converted, tmp_path / "after.pth")
    first = []
    for name, inputs in (
        ("before", 2 * pixels - 1),
        ("after", (pixels - mean[:, None, None]) / std[:, None, None]),
    ):
        net = backbones.build("xception65", 16, str(tmp_path / f"{name}.pth")).eval()
        first.append(net.body.entry_flow.conv1_1(inputs)[:, :, 1:-1, 1:-1])
    torch.testing.assert_close(*first, rtol=1e-4, atol=1e-4)


@pytest.mark.system
def test_xception65_loads_its_own_weights_and_has_none_of_torchvision(tmp_path):
    torch.save(backbones.Xception65().state_dict(), tmp_path / "x.pth")
    net = backbones.build("xception65", 16, str(tmp_path / "x.pth"))
    saved = torch.load(tmp_path / "x.pth", weights_only=True)
    assert all(
        torch.equal(value, net.body.get_parameter(key))
        for key, value in saved.items()
        if key.endswith(".weight")
    )
    with pytest.raises(ValueError, match="weights of xception65 could not .*; give the path"):
        backbones.build("xception65", 16, "imagenet")


@pytest.mark.network
def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="'resnet19'.*resnet18, .*mobilenet_v2"):
        backbones.build("resnet19")


@pytest.mark.network
@pytest.mark.parametrize("stride", [4, 12, 64])
def test_unknown_stride_lists_the_known_ones(stride):
    with pytest.raises(ValueError, match=rf"{stride}: .*\[32, 16, 8\]"):
        backbones.build("resnet18", stride)


# ------------------------------------------------------------------------------------------ weights


def changed(model):
    """The model with its statistics and norms drawn too, as if it had been trained."""
    for name, value in model.state_dict().items():
        if value.dtype.is_floating_point and value.ndim == 1:
            nn.init.uniform_(value, 0.5, 1.5 if "var" in name or "weight" in name else 0.7)
    return model.eval()


def saved(path, change=lambda state: None):
    state = models.resnet18().state_dict()
    change(state)
    torch.save(state, path)
    return path


@pytest.mark.system
@pytest.mark.parametrize("classifier", [True, False])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_torchvision_weights_give_torchvision_features(tmp_path, name, classifier):
    model = changed(models.get_model(name))
    state = model.state_dict()
    if not classifier:
        state = {
            key: value for key, value in state.items() if not key.startswith(("fc.", "classifier."))
        }
        assert len(state) < len(model.state_dict())
    torch.save(state, tmp_path / "weights.pth")
    net = backbones.build(name, weights=tmp_path / "weights.pth").eval()
    x = images = torch.randn(2, 3, 64, 64)
    expected = []
    with torch.no_grad():
        if name == "resnet18":
            x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
            for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
                expected.append(x := layer(x))
        else:
            for i, layer in enumerate(model.features):
                x = layer(x)
                if i in (3, 6, 13, 17):  # 18 widens to 1280 for the classifier
                    expected.append(x)
        for ours, theirs in zip(net(images, extend=False), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.system
def test_classifier_of_another_number_of_classes_is_no_obstacle(tmp_path):
    path = saved(
        tmp_path / "w.pth",
        lambda state: state.update({"fc.weight": torch.zeros(7, 512), "fc.bias": torch.zeros(7)}),
    )
    backbones.build("resnet18", weights=path)


@pytest.mark.system
@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda state: state.pop("layer1.0.conv1.weight"),
            r"1 missing from the file \['layer1.0.conv1.weight'\], 0 not in the network \[\]",
        ),
        (lambda state: state.update(extra=torch.zeros(2)), r"1 not in the network \['extra'\]"),
        (
            lambda state: state.update({"layer2.0.conv1.weight": torch.zeros(128, 64, 1, 1)}),
            r"size mismatch for layer2.0.conv1.weight: .*\[128, 64, 1, 1\].* from checkpoint, .*"
            r"\[128, 64, 3, 3\]",
        ),
    ],
    ids=["missing", "extra", "shape"],
)
def test_weights_that_do_not_fit_name_the_keys(tmp_path, change, message):
    path = saved(tmp_path / "w.pth", change)
    with pytest.raises(ValueError, match=message) as caught:
        backbones.build("resnet18", weights=path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.system
def test_weights_of_another_network_name_few_keys_of_many(tmp_path):
    path = saved(tmp_path / "w.pth")
    with pytest.raises(ValueError, match="80 missing from the file .* 0 not in the") as caught:
        backbones.build("resnet34", weights=path)
    assert str(caught.value).count("layer") == 4 and len(str(caught.value)) < 600


@pytest.mark.system
@pytest.mark.parametrize(
    "content", [[torch.zeros(2)], {"weights": {"conv1.weight": torch.zeros(2)}}, torch.zeros(2)]
)
def test_file_that_holds_something_else_is_no_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="no state dict"):
        backbones.build("resnet18", weights=tmp_path / "w.pth")


@pytest.mark.system
@pytest.mark.parametrize(
    "wrap, prefix",
    [
        (None, ""), (None, "module."), ("state_dict", "_orig_mod."),
        ("model", "module._orig_mod."), ("state_dict", "_orig_mod.module."),
    ],
)  # fmt: skip
def test_weights_may_be_wrapped_and_prefixed(tmp_path, prefix, wrap):
    state = {f"{prefix}{k}": v for k, v in models.resnet18().state_dict().items()}
    torch.save({wrap: state, "epoch": 3} if wrap else state, tmp_path / "w.pth")
    net = backbones.build("resnet18", weights=tmp_path / "w.pth")
    assert torch.equal(net.body.conv1.weight, state[f"{prefix}conv1.weight"])


@pytest.mark.system
@pytest.mark.parametrize("kept", [0, 0.5, 1], ids=["empty", "truncated", "text"])
def test_unreadable_weights_are_a_value_error_of_one_line(tmp_path, kept):
    path = saved(tmp_path / "w.pth")
    content = path.read_bytes() if kept < 1 else b"some text\nof two lines\n"
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match="cannot be read") as caught:
        backbones.build("resnet18", weights=path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.system
@pytest.mark.parametrize("inside", ["weights", "names"])
def test_damaged_weights_are_a_value_error_that_names_the_part(tmp_path, inside):
    path = saved(tmp_path / "w.pth")
    content = bytearray(path.read_bytes())
    if inside == "weights":
        start = len(content) // 4
        content[start : start + 2**16] = bytes(2**16)
    else:  # a letter of a name: it would be a missing key
        start = content.index(b"conv1.weight")
        content[start] += 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)  # PyTorch does not see it
    message = rf"'{path}' is damaged at w/data(/\d+|\.pkl): copy or download it again"
    for call in (backbones.load_file, lambda path: backbones.build("resnet18", weights=path)):
        with pytest.raises(ValueError, match=message):
            call(path)


@pytest.mark.system
def test_files_of_torch_before_1_6_load(tmp_path):
    x = torch.randn(3)
    torch.save({"x": x}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(backbones.load_file(tmp_path / "w.pth")["x"], x)


@pytest.mark.system
@pytest.mark.parametrize("archive", [True, False])
def test_python_objects_beside_weights_are_named(tmp_path, archive):
    path, kwargs = tmp_path / "w.pth", dict(_use_new_zipfile_serialization=archive)
    state = models.resnet18().state_dict()
    torch.save({"state_dict": state, "best": np.float64(0.7)}, path, **kwargs)
    message = (
        r"\(it holds a Python object, numpy\.(_core|core)\.multiarray\.scalar; save the state "
    )
    message += r"dict alone: torch\.save\(net\.state_dict\(\), path\)\)$"
    with pytest.raises(ValueError, match=message) as caught:
        backbones.build("resnet18", weights=path)
    assert str(caught.value).isprintable()
    torch.save(state, path, **kwargs)  # and the advice is right
    backbones.build("resnet18", weights=path)


@pytest.mark.system
def test_missing_weights_are_a_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        backbones.build("resnet18", weights=tmp_path / "nowhere.pth")


@pytest.mark.network
@pytest.mark.parametrize(
    "error", [URLError("no route"), TimeoutError("no route"), ConnectionResetError("no route")]
)
def test_failed_download_is_a_value_error_that_says_what_to_do(monkeypatch, error):
    def get_model(name, weights):
        assert (name, weights) == ("resnet18", "IMAGENET1K_V1")
        raise error

    monkeypatch.setattr(models, "get_model", get_model)
    with pytest.raises(ValueError, match="resnet18 could not be downloaded .*no route.*path"):
        backbones.build("resnet18", weights="imagenet")


# ------------------------------------------------------------------------------------------- labels


LABELS = torch.arange(2 * 32 * 48).reshape(2, 32, 48) % 3
WRONG = {  # what is wrong -> labels of 3 classes, what is said
    "transposed": (
        LABELS.mT,
        r"labels \[2, 48, 32\] do not match \[2, 3, 32, 48\]: expected \[2, 32",
    ),
    "a quarter": (LABELS[:, ::4, ::4], r"labels \[2, 8, 12\] do not match"),
    "one image": (LABELS[:1], r"labels \[1, 32, 48\] do not match"),
    "a channel": (LABELS.unsqueeze(1), r"labels \[2, 1, 32, 48\] do not match"),
    "float": (LABELS.float(), r"labels are torch.float32: expected int64, call labels.long\(\)"),
    "uint8": (LABELS.byte(), "labels are torch.uint8: expected int64"),
    "-1": (LABELS - 1, r"labels \[-1\] with num_classes=3: expected 0 to 2, or 255 = ignored"),
    "-100": (LABELS.masked_fill(LABELS == 0, -100), r"labels \[-100\] with"),
    "3 and 256": (LABELS.masked_fill(LABELS == 0, 256) + 1, r"labels \[3, 257\] with"),
}


@pytest.mark.network
@pytest.mark.parametrize("method", METHODS)
def test_wrong_labels_are_the_same_error_in_every_network(method):
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        net = importlib.import_module(method).build(3, LIGHT)
        for labels, message in WRONG.values():
            with pytest.raises(ValueError, match=message):
                net(images, labels)
        assert net(images, LABELS.masked_fill(LABELS == 1, 255))


@pytest.mark.network
def test_ids_are_not_looked_at_where_that_would_wait_or_cannot_be():
    wrong = torch.full((2, 4, 4), 9)
    with torch.device("meta"):
        backbones.check_labels(torch.zeros(2, 4, 4, dtype=torch.int64), torch.zeros(2, 3, 4, 4), 3)
    with FakeTensorMode():
        labels, images = torch.zeros(2, 4, 4, dtype=torch.int64), torch.zeros(2, 3, 4, 4)
        backbones.check_labels(labels, images, 3)
        with pytest.raises(ValueError, match="do not match"):
            backbones.check_labels(labels, images.mT[:, :, 1:], 3)

    def compiled(images, labels):
        backbones.check_labels(labels, images, 3)
        return images + 1

    compiled = torch.compile(compiled, backend="eager", fullgraph=True)  # no break in the graph
    assert compiled(torch.zeros(2, 3, 4, 4), wrong).all()
    with pytest.raises(ValueError, match=r"labels \[9\]"):
        backbones.check_labels(wrong, torch.zeros(2, 3, 4, 4), 3)


# ---------------------------------------------------------------------------------------- gradients


LEVELS_READ = [  # every way in which a network reads the levels of a backbone
    ("ksac", "swin_t", {"output_stride": 32}),
    ("ksac", "convnext_tiny", {"output_stride": 32, "decoder": True}),
    ("ksac", "hrnet_w18", {"output_stride": 32}),
    ("caa", "swin_t", {}),  # stride 8 by joint pyramid upsampling
    ("caa", "convnext_tiny", {"decoder": True}),
    ("caa", "hrnet_w18", {"output_stride": 32, "decoder": True}),
    ("car", "swin_t", {"head": "fcn", "output_stride": 32}),
    ("car", "convnext_tiny", {"head": "uper"}),
    ("car", "hrnet_w18", {"head": "ocr"}),
    ("spgnet", "mobilenet_v2", {}),
    ("spgnet", "mobilenet_v2", {"guidance": "se", "supervise": False}),
    ("pyramid_fuse", "swin_t", {}),
    ("pyramid_fuse", "convnext_tiny", {"output": "single", "context": "anl"}),
    ("pyramid_fuse", "hrnet_w18", {"output": "auxiliary"}),
    ("hfgd", "swin_t", {}),
    ("hfgd", "convnext_tiny", {"encoder": "ocr"}),
    ("hfgd", "hrnet_w18", {}),
    ("hfgd", "swin_t", {"stop_features": False}),
    ("hfgd", "convnext_tiny", {"upsampler": None}),
]


@pytest.mark.network
@pytest.mark.parametrize("method, backbone, options", LEVELS_READ)
def test_every_parameter_that_is_not_frozen_gets_a_gradient(method, backbone, options):
    net = importlib.import_module(method).build(3, backbone, **options)
    frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
    own = ("backbone.norms.", "backbone.body.stage4.2.fuse_layers.")
    assert all(name.startswith(own) for name in frozen)
    net.requires_grad_(True)
    # Without a labelled pixel: which parameters get a gradient must not depend on the labels.
    images, labels = torch.randn(2, 3, 32, 32), torch.full((2, 32, 32), 255)
    sum(net(images, labels).values()).backward()
    assert {name for name, p in net.named_parameters() if p.grad is None} == frozen


@pytest.mark.system
def test_two_processes_train_without_looking_for_unused_parameters(two_processes):
    assert two_processes(two_steps) == [True, True]


def two_steps(rank):
    torch.manual_seed(0)
    net = importlib.import_module("ksac").build(3, "hrnet_w18", output_stride=32)
    ddp = nn.parallel.DistributedDataParallel(net)
    for labels in (torch.full((2, 32, 32), 255), torch.zeros(2, 32, 32, dtype=torch.int64)):
        sum(ddp(torch.randn(2, 3, 32, 32), labels).values()).backward()
    return all(p.grad is not None for p in net.parameters() if p.requires_grad)


# --------------------------------------------------------------------------------------------- loss


def literal_cross_entropy(logits, labels):
    total, count = 0, 0
    for n in range(labels.shape[0]):
        for y in range(labels.shape[1]):
            for x in range(labels.shape[2]):
                if labels[n, y, x] != 255:
                    scores = logits[n, :, y, x]
                    total = total - scores[labels[n, y, x]] + scores.exp().sum().log()
                    count += 1
    return total / count


def scene(n=2, k=5, h=4, w=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits, labels = (
        torch.randn(n, k, h, w, generator=generator),
        torch.randint(k, (n, h, w), generator=generator),
    )
    labels[torch.rand(n, h, w, generator=generator) < 0.3] = 255
    return logits.requires_grad_(), labels


@pytest.mark.equation
def test_cross_entropy_by_hand():
    # Two pixels with the logits (ln 3, 0) and (0, 0), true class 0: probabilities 3/4 and 1/2,
    # so the loss is (ln 4/3 + ln 2) / 2 = ln(8/3) / 2 = 0.490415.
    logits = torch.tensor([[1.0986123, 0.0], [0.0, 0.0]]).view(1, 2, 1, 2)
    assert backbones.pixel_cross_entropy(logits, torch.tensor([[[0, 0]]])).item() == pytest.approx(
        0.490415, abs=1e-6
    )
    # The second one ignored: ln 4/3 = 0.287682.
    assert backbones.pixel_cross_entropy(
        logits, torch.tensor([[[0, 255]]])
    ).item() == pytest.approx(0.287682, abs=1e-6)


@pytest.mark.equation
def test_cross_entropy_and_its_gradient_equal_the_literal_loop():
    logits, labels = scene()
    assert 0 < (labels == 255).sum() < labels.numel()
    loss = backbones.pixel_cross_entropy(logits, labels)
    (gradient,) = torch.autograd.grad(loss, logits)
    exact = logits.detach().double().requires_grad_()
    expected = literal_cross_entropy(exact, labels)
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-7)
    ignored = (labels == 255)[:, None].expand_as(gradient)
    assert (gradient[ignored] == 0).all() and (gradient[~ignored] != 0).all()


@pytest.mark.equation
def test_nothing_labelled_is_0_with_a_zero_gradient():
    logits, labels = scene()
    loss = backbones.pixel_cross_entropy(logits, torch.full_like(labels, 255))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0 and (gradient == 0).all()


@pytest.mark.equation
def test_one_labelled_pixel_counts_once():
    logits, labels = scene()
    labels[:] = 255
    labels[1, 2, 0] = 3
    expected = F.cross_entropy(logits[1, :, 2, 0], torch.tensor(3))
    torch.testing.assert_close(backbones.pixel_cross_entropy(logits, labels), expected)


@pytest.mark.equation
def test_absent_classes_do_no_harm():
    logits, labels = scene()
    labels[labels != 255] = 2
    loss = backbones.pixel_cross_entropy(logits, labels)
    assert loss.item() == pytest.approx(
        literal_cross_entropy(logits.detach().double(), labels).item(), rel=1e-6
    )


@pytest.mark.equation
def test_another_number_can_be_ignored():
    logits, labels = scene()
    expected = backbones.pixel_cross_entropy(logits, labels)
    torch.testing.assert_close(
        backbones.pixel_cross_entropy(logits, labels.masked_fill(labels == 255, -1), ignore=-1),
        expected,
    )


@pytest.mark.equation
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_give_a_float32_loss(dtype):
    logits, labels = scene()
    half = logits.detach().to(dtype)
    loss = backbones.pixel_cross_entropy(half, labels)
    assert loss.dtype == torch.float32 and loss.ndim == 0
    assert loss.item() == pytest.approx(
        literal_cross_entropy(half.double(), labels).item(), rel=1e-6
    )


def share_of_the_batch(rank):
    """Losses and gradients of one of two processes, whose share is image `rank` of each batch."""
    results = []
    for logits, labels in joint_batches():
        logits = logits.detach()[rank : rank + 1].requires_grad_()
        loss = backbones.pixel_cross_entropy(logits, labels[rank : rank + 1])
        results.append((loss.detach(), *torch.autograd.grad(loss, logits)))
    return results


def joint_batches():
    """Two images each: unequally labelled; one not at all; neither."""
    logits, labels = scene(n=2, h=6, w=6)
    unequal, one_empty = labels.clone(), labels.clone()
    unequal[1, 1:] = 255
    one_empty[0] = 255
    return [(logits, unequal), (logits, one_empty), (logits, torch.full_like(labels, 255))]


@pytest.mark.system
def test_two_processes_equal_one_with_the_joint_batch(two_processes):
    first, second = two_processes(share_of_the_batch)
    counts = []
    for (logits, labels), (loss0, gradient0), (loss1, gradient1) in zip(
        joint_batches(), first, second, strict=True
    ):
        loss = backbones.pixel_cross_entropy(logits, labels)
        (gradient,) = torch.autograd.grad(loss, logits)
        torch.testing.assert_close((loss0 + loss1) / 2, loss.detach())
        # DDP averages over processes; image r's part of the gradient comes from process r alone
        torch.testing.assert_close(torch.cat([gradient0, gradient1]) / 2, gradient)
        counts.append((labels != 255).sum((1, 2)).tolist())
    assert (
        counts[0][0] > 3 * counts[0][1] > 0
        and counts[1][0] == 0 < counts[1][1]
        and counts[2] == [0, 0]
    )


# ------------------------------------------------------------------------------------------ options


class Network:
    def __init__(
        self, num_classes, backbone="resnet50", *, rates=(1, 6), head="ksac", weights=None
    ):
        pass


@pytest.mark.network
def test_known_options_are_given_back():
    options = {"head": "aspp", "rates": (1,)}
    assert backbones.check_options(Network, options) == options
    assert backbones.check_options(Network, {}) == {}


@pytest.mark.network
def test_unknown_option_lists_the_known_ones_with_their_defaults():
    with pytest.raises(ValueError) as caught:
        backbones.check_options(Network, {"rats": 1, "head": "aspp", "depth": 2})
    text = str(caught.value)
    assert "Network has no option depth, rats;" in text
    assert text.endswith("rates=(1, 6), head='ksac', weights=None") and "num_classes" not in text


@pytest.mark.network
def test_positional_arguments_are_no_options():
    with pytest.raises(ValueError, match="no option backbone"):
        backbones.check_options(Network, {"backbone": "resnet18"})


SIZES = [(513, 769), (160, 180), (33, 34), (48, 17), (1, 16), (64, 96)]


def ramp_of(size):
    """An image whose pixel (i, j) is 3·i + j."""
    return torch.arange(float(size[0]))[:, None] * 3 + torch.arange(float(size[1]))


@pytest.mark.equation
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stride", [4, 8, 16, 32])
@pytest.mark.parametrize("patches", [False, True])
def test_images_are_extended_to_the_next_size_that_aligns(size, stride, patches):
    ramp = ramp_of(size)
    images = backbones.extended(ramp[None, None], stride, patches)
    for side, before in zip(images.shape[2:], size):
        assert side % stride == (0 if patches else 1) and 0 <= side - before < stride
    assert torch.equal(images[0, 0, : size[0], : size[1]], ramp)
    assert images[0, 0, -1, -1] == ramp[-1, -1]  # the border is repeated


@pytest.mark.equation
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stride", [4, 8, 16, 32])
@pytest.mark.parametrize("patches", [False, True])
def test_what_is_sampled_at_its_positions_is_upsampled_to_the_pixels(size, stride, patches):
    images = backbones.extended(ramp_of(size)[None, None], stride, patches)
    h, w = (side // stride + (not patches) for side in images.shape[2:])
    rows, columns = (backbones.positions(stride, n, patches) for n in (h, w))
    # of a patch, which has no middle pixel, what a mean over it gives
    half = 0.5 if patches else 0
    sampled = (rows[:, None] - half) * 3.0 + (columns - half)
    found = backbones.upsample(sampled[None, None], stride, size, patches)[0, 0]
    assert found.shape == size
    rim = stride // 2 if patches else 0  # outside the outermost middles nothing is known
    inner = [slice(rim, min(side, n * stride - rim)) for side, n in zip(size, (h, w))]
    assert torch.allclose(found[inner[0], inner[1]], ramp_of(size)[inner[0], inner[1]], atol=2e-3)


@pytest.mark.equation
def test_positions_by_hand():
    assert backbones.positions(4, 3).tolist() == [0, 4, 8]
    assert backbones.positions(4, 3, patches=True).tolist() == [2, 6, 10]
    # pixel 2 is as near to 0 as to 4: the greater one
    assert backbones.nearest(backbones.positions(4, 3), 9).tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 2]
    middles = backbones.positions(4, 2, patches=True)
    assert backbones.nearest(middles, 8).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert backbones.nearest(backbones.positions(8, 1), 3).tolist() == [0, 0, 0]


@pytest.mark.equation
def test_resizing_keeps_positions_in_place():
    ramp = torch.arange(4.0).expand(1, 1, 2, 4)
    finer = torch.zeros(1, 5, 3, 7)
    for like in (2, finer):
        assert backbones.resize(ramp, like)[0, 0, 0].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3]
    # the halves of a patch are a quarter to the left and to the right of its middle
    expected = [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]
    for like in (2, torch.zeros(1, 5, 4, 8)):
        assert backbones.resize(ramp, like, patches=True)[0, 0, 0].tolist() == expected
    assert backbones.resize(ramp.to(torch.bfloat16), 2).dtype == torch.bfloat16


@pytest.mark.network
@pytest.mark.parametrize("name, patches", [("resnet18", False), ("swin_t", True)])
def test_a_backbone_aligns_as_its_kind_does(name, patches):
    with torch.device("meta"):
        net = backbones.build(name)
        assert [tuple(m.shape[2:]) for m in net(torch.zeros(1, 3, 40, 70))] == (
            [(16, 24), (8, 12), (4, 6), (2, 3)] if patches else [(17, 25), (9, 13), (5, 7), (3, 4)]
        )
    x = torch.randn(1, 2, 3, 4)
    assert torch.equal(net.upsample(x, 8, (17, 20)), backbones.upsample(x, 8, (17, 20), patches))
    assert torch.equal(net.resize(x, 2), backbones.resize(x, 2, patches))
    assert torch.equal(net.positions(8, 3), backbones.positions(8, 3, patches))


@pytest.mark.network
def test_without_extending_the_body_sees_the_image_as_it_is():
    with torch.device("meta"):
        net = backbones.build("resnet18")
        maps = net(torch.zeros(1, 3, 64, 96), extend=False)
    assert [tuple(m.shape[2:]) for m in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]


@pytest.mark.equation
@pytest.mark.parametrize("size", [1, 3, 8])
def test_average_pool_is_torchs_with_its_gradient(size):
    x = torch.randn(2, 3, 7, 11, dtype=torch.float64, requires_grad=True)
    found, expected = backbones.average_pool(x, size), F.adaptive_avg_pool2d(x, size)
    torch.testing.assert_close(found, expected)
    pull = torch.randn_like(found)
    torch.testing.assert_close(
        *(torch.autograd.grad((y * pull).sum(), x)[0] for y in (found, expected))
    )


@pytest.mark.equation
@pytest.mark.parametrize("size", [(2, 4, 7, 1), (2, 4, 1, 7), (2, 4, 3, 5)], ids=str)
@pytest.mark.parametrize("layout", [(0, 1, 2, 3), (0, 2, 3, 1), (0, 3, 2, 1)], ids=str)
def test_a_contiguous_gradient_is_the_same_in_any_layout(size, layout):
    x = torch.randn(size, dtype=torch.float64, requires_grad=True)
    y = backbones.contiguous_gradient(nn.BatchNorm2d(4, dtype=torch.float64)(x))
    pull, strides, back = torch.randn(size, dtype=torch.float64), [], torch.tensor(layout).argsort()
    y.register_hook(lambda gradient: strides.append(gradient.stride()))  # after the function's
    y.backward(pull.permute(layout).contiguous().permute(*back))
    normal = (x - x.mean((0, 2, 3), True)) / (x.var((0, 2, 3), False, True) + 1e-5).sqrt()
    (expected,) = torch.autograd.grad(normal, x, pull)
    torch.testing.assert_close(x.grad, expected)
    assert strides == [torch.empty(size).stride()]


@pytest.mark.equation
def test_what_needs_no_gradient_stays_as_it_is():
    x = torch.zeros(1, 2, 3, 4)
    assert backbones.contiguous_gradient(x) is x and x._backward_hooks is None


@pytest.mark.equation
def test_upsampled_logits_are_float32():
    assert (
        backbones.upsample(torch.zeros(1, 2, 3, 3, dtype=torch.bfloat16), 8, (17, 17)).dtype
        == torch.float32
    )


@pytest.mark.network
@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_a_backbone_answers_to_a_mark_at_pixel_i_times_stride_with_position_i(output_stride):
    # all weights 1 in place of trained ones, so that nothing cancels: the answer is strongest where
    # the mark is
    net = backbones.build("resnet18", output_stride).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.constant_(module.weight, 1 / module.weight[0].numel())
    images = torch.zeros(1, 3, 33 * 8, 33 * 8)
    images[:, :, 128, 96] = 1
    with torch.no_grad():
        answer = net(images)[-1].sum(1)[0]
    row, column = divmod(answer.argmax().item(), answer.shape[1])
    assert (row, column) == (128 // output_stride, 96 // output_stride)


def counted(predicted, labels, K):
    """`confusion` by a loop over the pixels."""
    counts = torch.zeros(K, K, dtype=torch.long)
    for y, label in zip(predicted.flatten().tolist(), labels.flatten().tolist()):
        if label != 255:
            counts[label, y] += 1
    return counts


@pytest.mark.equation
def test_confusion_and_iou_by_hand_and_by_loops():
    predicted, labels = torch.tensor([0, 0, 1, 1, 2, 0]), torch.tensor([0, 1, 1, 1, 1, 255])
    counts = backbones.confusion(predicted, labels, 4)
    assert counts.tolist() == [[1, 0, 0, 0], [1, 2, 1, 0], [0] * 4, [0] * 4]
    assert backbones.iou(counts).tolist()[:3] == [0.5, 0.5, 0] and backbones.iou(counts)[3].isnan()
    predicted, labels = torch.randint(3, (2, 4, 5)), torch.randint(3, (2, 4, 5))
    labels[:, ::3] = 255
    both = [backbones.confusion(y, labels, 3) for y in (predicted, 2 - predicted)]
    for found, y in zip(both, (predicted, 2 - predicted)):
        assert torch.equal(found, counted(y, labels, 3))
        pixels = list(zip(y.flatten().tolist(), labels.flatten().tolist()))
        for k, value in enumerate(backbones.iou(found).tolist()):
            hit = sum(a == k and b == k for a, b in pixels)
            either = sum((a == k or b == k) and b != 255 for a, b in pixels)
            assert value == pytest.approx(hit / either)
    assert torch.equal(
        backbones.iou(torch.stack(both)), torch.stack([backbones.iou(c) for c in both])
    )


@pytest.mark.equation
def test_near_a_border_by_hand():
    # The labels change between columns 4 and 5. At the right 255 is next to a label: no border.
    row = torch.tensor([[[7, 7, 7, 7, 7, 0, 0, 0, 0, 0, 255, 255]]])
    assert backbones.near_border(row).nonzero()[:, 2].tolist() == [2, 3, 4, 5, 6, 7]
    assert torch.equal(backbones.near_border(row.mT), backbones.near_border(row).mT)
    labels = torch.zeros(1, 9, 9, dtype=torch.long)
    labels[0, 4, 4] = 1  # one pixel: the window of 7x7 around it, its corners too
    assert backbones.near_border(labels)[0].nonzero().tolist() == [
        [i, j] for i in range(1, 8) for j in range(1, 8)
    ]


@pytest.mark.equation
@pytest.mark.parametrize("size", [(24, 31), (1, 23), (19, 1), (1, 1)])
def test_near_a_border_equals_the_loop(size):
    labels = torch.zeros(3, *size, dtype=torch.long)
    labels[0, :, size[1] // 2 :] = 254
    labels[0, size[0] // 2 :, :9] = 255
    for _ in range(2):
        labels[1, torch.randint(size[0], ()), torch.randint(size[1], ())] = 1
    labels[2] = 255
    labels[2, ::11, ::5] = torch.randint(2, labels[2, ::11, ::5].shape)
    found, (H, W) = backbones.near_border(labels), size
    assert found.dtype == torch.bool and found.shape == labels.shape
    for n, i, j in product(range(3), range(H), range(W)):
        rows, columns = range(max(0, i - 3), min(H, i + 4)), range(max(0, j - 3), min(W, j + 4))
        around = {labels[n, a, b].item() for a, b in product(rows, columns)} - {255}
        assert found[n, i, j] == (labels[n, i, j] != 255 and len(around) > 1)
    if min(size) > 1:
        assert all(0 < near.float().mean() < 1 for near in found[:2])
    assert torch.equal(backbones.near_border(labels.byte()), found)


class Four(nn.Module):
    """A network from elsewhere: ResNet-18's four maps, or what `wrong` makes of them."""

    def __init__(self, wrong=None):
        super().__init__()
        self.stem, levels, _ = backbones.parts("resnet18")
        self.levels, self.wrong = nn.ModuleList(levels), wrong

    def forward(self, x):
        maps, x = [], self.stem(x)
        for level in self.levels:
            maps.append(x := level(x))
        return self.wrong(maps) if self.wrong else maps


@pytest.mark.network
@pytest.mark.parametrize("name", ["ksac", "caa", "car", "pyramid_fuse", "hfgd"])
def test_a_module_with_four_maps_is_a_backbone(name):
    options = {"output_stride": 32} if name in ("ksac", "caa", "car") else {}
    module, method = Four(), importlib.import_module(name)
    net, own = (method.build(3, one, **options) for one in (module, "resnet18"))
    assert net.backbone.body is module and net.backbone.strides == (4, 8, 16, 32)
    if options:  # theirs has a multi-grid
        own.backbone = backbones.build("resnet18", 32)
    renamed = dict(zip(net.state_dict(), own.state_dict().values(), strict=True))
    net.load_state_dict(renamed)
    images = torch.randn(2, 3, 70, 41)
    assert torch.equal(net.eval()(images), own.eval()(images))


@pytest.mark.network
@pytest.mark.parametrize(
    "wrong, stride, expected",
    [
        (
            None,
            8,
            r"Four as .*\[13, 13\]\] was expected, not .*\[1, 512, 4, 4\]\]; give output_stri",
        ),
        (
            lambda maps: maps[1:],
            32,
            r"with the sides \[\[25, 25\], .* not \[\[1, 128, 13, 13\], .*\]$",
        ),
        (lambda maps: [m.mean(3) for m in maps], 32, r"not \[\[1, 64, 25\], .*\]$"),
        (dict.fromkeys, 32, "was expected, not dict$"),
        (lambda maps: maps[3], 32, "not Tensor$"),
        (lambda maps: [None, *maps], 32, "not AttributeError: 'NoneType' object has no"),
    ],
)
def test_a_module_that_does_not_fit_is_told_what_is_expected(wrong, stride, expected):
    with pytest.raises(ValueError, match=expected):
        backbones.build(Four(wrong), stride)


@pytest.mark.network
def test_a_module_is_left_as_it_was():
    module = Four()
    module.levels[0].eval()  # frozen by its author
    before = {name: x.clone() for name, x in module.state_dict().items()}
    backbones.build(module, 32)
    assert module.training and module.stem.training and not module.levels[0].training
    assert all(torch.equal(x, before[name]) for name, x in module.state_dict().items())
    with pytest.raises(ValueError, match="was expected, not RuntimeError: "):
        backbones.build(Four().double(), 32)
    with pytest.raises(ValueError, match=r"not \[\[1, 3, 97, 97\]\]$"):
        backbones.build(Alone(), 32)


class Alone(nn.Module):
    """It has no parameters."""

    def forward(self, x):
        return [x]


@pytest.mark.network
def test_a_module_has_its_own_weights():
    with pytest.raises(ValueError, match="its weights and multi_grid are its own"):
        backbones.build(Four(), 32, weights="imagenet")
    with pytest.raises(ValueError, match="its weights and multi_grid are its own"):
        backbones.build(Four(), 32, multi_grid=(1, 2, 4))
    with pytest.raises(ValueError, match="expected a name for each stage, .* and no module"):
        importlib.import_module("spgnet").build(3, Four())


@pytest.mark.network
@pytest.mark.parametrize(
    "name, options",
    [
        ("ksac", {}),
        ("caa", {}),
        ("car", dict(head="ocr")),
        ("spgnet", {}),
        ("pyramid_fuse", {}),
        ("hfgd", {}),
    ],
    ids=str,
)
def test_a_network_is_exported_at_one_size_and_runs_at_others(name, options):
    net = importlib.import_module(name).build(3, "resnet18", **options).eval()
    free = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    example = (torch.randn(2, 3, 96, 128),)
    program = torch.export.export(net, example, dynamic_shapes=(free,)).module()
    with torch.no_grad():
        for shape in ((1, 3, 75, 101), (3, 3, 160, 65)):
            images = torch.randn(shape)
            assert torch.equal(program(images), net(images))
