"""Feature extractors, a decoder, and the pixel loss that every network here shares.

A backbone is torchvision's ImageNet model, or one of this file where torchvision has none. It gives
its maps at four levels and is dilated on request:

    net = backbones.build("resnet50", output_stride=8, weights="imagenet")
    maps = net(images)        # four maps, finest first: strides 4, 8, 8, 8
    net.channels, net.strides # (256, 512, 1024, 2048), (4, 8, 8, 8)

Dilation (Chen et al., "Rethinking Atrous Convolution", 2017): where the stride of a stage is
removed, the convolutions after it are dilated by the same factor. Each kernel then still sees the
samples that it was trained on. (An EfficientNet's squeeze-and-excitation averages over more of
them.) `multi_grid` departs from that: it sets the rates of all blocks of the last stage to its
factors (there, Sect. 3.2.1: 2, 4, 8 at output stride 16 for 1, 2, 4).

Alignment: the section "alignment" says where the positions of a map are on the image, and a
Backbone's `forward`, `upsample`, `resize` and `positions` take care of it. No method file has to.

To copy: this file stands alone.
"""

import inspect
import re
from collections import OrderedDict

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import Conv2dNormActivation

# name -> (the last module of each level, and the channels it gives), finest level first
_RESNET = ("layer1", "layer2", "layer3", "layer4")
_PATCHES = ("features.1", "features.3", "features.5", "features.7")  # cuts the image into patches
_EFFICIENT = ("features.2", "features.3", "features.5", "features.8")
_LEVELS = {
    "resnet18": (_RESNET, (64, 128, 256, 512)),
    "resnet34": (_RESNET, (64, 128, 256, 512)),
    "resnet50": (_RESNET, (256, 512, 1024, 2048)),
    "resnet101": (_RESNET, (256, 512, 1024, 2048)),
    "resnet152": (_RESNET, (256, 512, 1024, 2048)),
    # It ends at 320 channels, before the 1x1 convolution to 1280: there DeepLab has its heads
    # (Sandler et al., "MobileNetV2", CVPR 2018, Sect. 6.3). KSAC's Table 2.1 prints no
    # multiply-adds for it that could decide, and builds on DeepLabv3+.
    "mobilenet_v2": (
        ("features.3", "features.6", "features.13", "features.17"),
        (24, 32, 96, 320),
    ),
    "xception65": (
        (
            "entry_flow.block2.unit_1.separable_conv2_pointwise",  # DeepLabv3+'s low-level features
            "entry_flow.block3.unit_1.separable_conv2_pointwise",
            "middle_flow",
            "exit_flow",
        ),
        (256, 728, 728, 2048),
    ),
    "hrnet_w18": (None, (18, 36, 72, 144)),
    "hrnet_w32": (None, (32, 64, 128, 256)),
    "hrnet_w48": (None, (48, 96, 192, 384)),
    "efficientnet_b5": (_EFFICIENT, (40, 64, 176, 2048)),
    "efficientnet_b7": (_EFFICIENT, (48, 80, 224, 2560)),
    "convnext_tiny": (_PATCHES, (96, 192, 384, 768)),
    "convnext_small": (_PATCHES, (96, 192, 384, 768)),
    "convnext_base": (_PATCHES, (128, 256, 512, 1024)),
    "convnext_large": (_PATCHES, (192, 384, 768, 1536)),
    "swin_t": (_PATCHES, (96, 192, 384, 768)),
    "swin_s": (_PATCHES, (96, 192, 384, 768)),
    "swin_b": (_PATCHES, (128, 256, 512, 1024)),
    "swin_l": (_PATCHES, (192, 384, 768, 1536)),
}
NAMES = tuple(_LEVELS)
_CLASSIFIERS = (
    "fc.",
    "classifier.",
    "norm.",
    "head.",
    "incre_modules.",
    "downsamp_modules.",
    "final_layer.",
)


class Backbone(nn.Module):
    """A model that returns its four levels, finest first: `[N, channels[l], h_l, w_l]`.

    `body` keeps the model's parameter names. patches: the network cuts the image into patches, and
    each level gets a layer norm, as in the authors' segmentation code. jpu: the last level is that
    of JointPyramidUpsampling.
    """

    def __init__(self, model, nodes, channels, strides, jpu=False):
        super().__init__()
        self.patches, self.coarsest = nodes is _PATCHES, strides[-1]
        self.channels_last = isinstance(model, models.SwinTransformer)
        self.body = _with_levels(model, nodes) if nodes else model
        eps = 1e-5 if self.channels_last else 1e-6
        normed = channels if self.patches else ()
        self.norms = nn.ModuleList(nn.LayerNorm(c, eps=eps) for c in normed)
        self.jpu = JointPyramidUpsampling(channels[1:]) if jpu else None
        self.channels = (*channels[:3], self.jpu.channels) if jpu else channels
        self.strides = (*strides[:3], strides[1]) if jpu else strides

    def forward(self, images, extend=True):
        """Images float `[N, 3, H, W]` -> the list of four maps.

        extend: enlarge the images to a size at which maps and pixels are aligned. Without it the
        sides have to be such a size already, or the caller aligns the maps in its own way.
        """
        x = extended(images, self.coarsest, self.patches) if extend else images
        maps = self.body(x)
        maps = list(maps.values()) if isinstance(maps, dict) else maps
        if self.patches:
            maps = maps if self.channels_last else [m.permute(0, 2, 3, 1) for m in maps]
            maps = [norm(m).permute(0, 3, 1, 2) for norm, m in zip(self.norms, maps)]
        return maps if self.jpu is None else [*maps[:3], self.jpu(maps[1:])]

    def upsample(self, x, stride, size):
        """The function `upsample` of this file, for this backbone."""
        return upsample(x, stride, size, self.patches)

    def resize(self, x, like):
        """The function `resize` of this file, for this backbone."""
        return resize(x, like, self.patches)

    def positions(self, stride, length):
        """The function `positions` of this file, for this backbone."""
        return positions(stride, length, self.patches)

    def stride_of(self, side, length):
        """The function `stride_of` of this file, for this backbone."""
        return stride_of(side, length, self.coarsest, self.patches)


class _Levels(nn.Sequential):
    """Layers one after another; the list of the outputs of those named in `ends`."""

    def __init__(self, layers, ends):
        super().__init__(OrderedDict(layers))
        self.ends = ends

    def forward(self, x):
        maps = []
        for name, layer in self.named_children():
            x = layer(x)
            if name in self.ends:
                maps.append(x)
        return maps


def _with_levels(model, nodes):
    """`model` without what is after its last level, as a module that returns the four levels.

    The parameters keep their names. (torchvision's create_feature_extractor does the same for any
    model, but its tracing takes longer than building the model.)
    """
    if nodes[0].startswith("entry_flow"):  # within the layers of an Xception
        return create_feature_extractor(model, list(nodes))
    features = nodes[0].startswith("features")
    layers = list((model.features if features else model).named_children())
    ends = [node.removeprefix("features.") for node in nodes]
    last = [name for name, _ in layers].index(ends[-1])
    levels = _Levels(layers[: last + 1], ends)
    return nn.Sequential(OrderedDict(features=levels)) if features else levels


def build(name, output_stride=32, weights=None, multi_grid=None):
    """The backbone `name` at `output_stride` 32, 16 or 8 (HRNets: 32; Swin Transformers and
    ConvNeXts: 32 or 8).

    weights: None (random), "imagenet" (downloaded by torchvision; the first version of its weights,
    as in its own segmentation models), or the path of a state dict with torchvision's names; of a
    Swin Transformer or ConvNeXt also the authors' checkpoint. (xception65, HRNets and swin_l: a
    path only; the classes Xception65 and HRNet say with which names.)
    multi_grid: factors of the dilation rates of the last stage's blocks (xception65: of its last
    three convolutions); ResNets and xception65 only; the last factor repeats.

    Raises ValueError for an unknown name or stride, and for a state dict that does not fit: with
    the keys that differ.
    """
    if name not in _LEVELS:
        raise ValueError(f"unknown backbone '{name}'; there are {', '.join(NAMES)}")
    if output_stride not in (8, 16, 32):
        raise ValueError(f"output stride {output_stride}: {name} has 32, 16 and 8")
    nodes, channels = _LEVELS[name]
    jpu = nodes is _PATCHES and output_stride == 8
    if nodes in (_PATCHES, None) and (output_stride < 32 and not jpu or multi_grid):
        also = ", or 8 by Joint Pyramid Upsampling" if nodes else ""
        raise ValueError(
            f"{name} cannot be dilated: its output stride is 32{also}, without multi_grid"
        )
    if name == "xception65":
        model = _loaded(Xception65(output_stride, multi_grid or (1, 1, 1)), name, weights)
    elif name == "swin_l":
        model = _loaded(_swin_l(), name, weights)
    elif name.startswith("hrnet"):
        model = _loaded(HRNet(channels), name, weights)
    else:
        model = _torchvision(name, weights)
        if nodes is not _PATCHES:
            _dilate(model, nodes, output_stride, multi_grid)
    strides = tuple(min(stride, 32 if jpu else output_stride) for stride in (4, 8, 16, 32))
    return Backbone(model, nodes, channels, strides, jpu)


def parts(name, weights=None):
    """A ResNet or MobileNetV2 in parts, for networks that put something in between: (stem, levels,
    channels).

    stem: images -> stride 4; the four levels follow one another, strides 4, 8, 16, 32; channels: of
    the stem and of each level. (MobileNetV2's first level is in its stem: as a level of its own it
    does nothing.) weights: as in `build`.
    Raises ValueError as `build`, and for a backbone of another kind.
    """
    if name.startswith("resnet") and name in _LEVELS:
        model, channels = _torchvision(name, weights), (64, *_LEVELS[name][1])
        stem = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)
        return stem, [model.layer1, model.layer2, model.layer3, model.layer4], channels
    if name == "mobilenet_v2":
        features = _torchvision(name, weights).features
        levels = [nn.Identity(), features[4:7], features[7:14], features[14:18]]
        return features[:4], levels, (24, *_LEVELS[name][1])
    known = [known for known in NAMES if known.startswith("resnet")]
    raise ValueError(f"backbone '{name}': here it is {', '.join(known)} or mobilenet_v2")


def _torchvision(name, weights):
    """torchvision's model of this name with its weights."""
    if weights != "imagenet":
        return _loaded(models.get_model(name, weights=None), name, weights)
    try:
        return models.get_model(name, weights="IMAGENET1K_V1")
    except (OSError, RuntimeError) as error:  # URLError and others; RuntimeError: cut short
        raise ValueError(
            f"the ImageNet weights of {name} could not be downloaded ({error}); "
            "give the path of a state dict instead, or leave the weights out"
        ) from error


def _loaded(model, name, weights):
    """The model, with the weights of the path that is given."""
    if weights == "imagenet":
        raise ValueError(
            f"torchvision has no weights of {name}; give the path of a state dict, see backbones.py"
        )
    if weights is not None:
        load_weights(model, weights)
    return model


def _swin_l():
    """Swin-L (Liu et al., "Swin Transformer", ICCV 2021, Sect. 3.3), which torchvision has not,
    with its names.
    """
    return models.SwinTransformer(
        [4, 4], 192, [2, 2, 18, 2], [6, 12, 24, 48], [7, 7], stochastic_depth_prob=0.2
    )


def _dilate(model, nodes, output_stride, multi_grid):
    """Trade the strides beyond `output_stride` for dilation, level by level."""
    if nodes is _RESNET:
        levels = [model.get_submodule(node) for node in nodes]
    else:
        ends = [0] + [int(node.split(".")[1]) + 1 for node in nodes]
        levels = [model.features[start:end] for start, end in zip(ends, ends[1:])]
    rate = 1
    for level, stride in zip(levels, (4, 8, 16, 32)):
        before, rate = rate, rate * 2 if stride > output_stride else rate
        for conv in (module for module in level.modules() if isinstance(module, nn.Conv2d)):
            # a convolution that loses its stride still reads samples as dense as those it was
            # trained on
            applied = before if conv.stride[0] > 1 else rate
            if stride > output_stride:
                conv.stride = (1, 1)
            if (reach := conv.kernel_size[0] // 2) > 0:
                conv.dilation, conv.padding = (applied, applied), (applied * reach, applied * reach)
    if multi_grid:
        if nodes is not _RESNET:
            raise ValueError(
                "multi_grid multiplies the rates of the last blocks of a ResNet or xception65"
            )
        for i, block in enumerate(levels[-1]):
            factor = multi_grid[min(i, len(multi_grid) - 1)]
            for conv in (module for module in block.modules() if isinstance(module, nn.Conv2d)):
                if conv.kernel_size[0] > 1:
                    conv.dilation = conv.padding = (rate * factor, rate * factor)


class JointPyramidUpsampling(nn.Module):
    """A map of stride 8 for what cannot be dilated (Wu et al., "FastFCN: Rethinking Dilated
    Convolution", 2019, Fig. 3).

    Maps of strides 8, 16, 32 of patches -> `[N, 4·512, H/8, W/8]`: each reduced to 512, and four
    separable convolutions of rates 1, 2, 4, 8 on all of them at stride 8.
    """

    def __init__(self, channels, width=512):
        super().__init__()
        self.reduce = nn.ModuleList(Conv2dNormActivation(c, width, 3) for c in channels)
        together, self.channels = len(channels) * width, 4 * width
        self.dilated = nn.ModuleList(
            nn.Sequential(
                Conv2dNormActivation(
                    together, together, 3, dilation=rate, groups=together, activation_layer=None
                ),
                Conv2dNormActivation(together, width, 1),
            )
            for rate in (1, 2, 4, 8)
        )

    def forward(self, maps):
        finest, *coarser = (reduce(m) for reduce, m in zip(self.reduce, maps))
        x = torch.cat([finest, *(resize(m, finest, patches=True) for m in coarser)], dim=1)
        return torch.cat([layer(x) for layer in self.dilated], dim=1)


def _normed(inputs, outputs, kernel, activation=None, **kwargs):
    """Convolution, batch norm with TensorFlow's ε, activation."""
    layer = Conv2dNormActivation(inputs, outputs, kernel, activation_layer=activation, **kwargs)
    layer[1].eps = 1e-3
    return layer


class _XceptionUnit(nn.Module):
    """Three separable convolutions, the last one with the stride, and around them the skip "conv",
    "sum" or None.

    A ReLU stands before each separable convolution, or, where `activated`, after both halves of
    each. setattr and getattr, for the names are those of DeepLab's checkpoints.
    """

    def __init__(self, inputs, outputs, skip, stride=1, rates=(1, 1, 1), activated=False):
        super().__init__()
        relu = nn.ReLU if activated else None
        self.skip, self.activated = skip, activated
        for i, (a, b, rate) in enumerate(zip([inputs, *outputs], outputs, rates), 1):
            kwargs = dict(stride=stride if i == 3 else 1, dilation=rate, groups=a)
            setattr(self, f"separable_conv{i}_depthwise", _normed(a, a, 3, relu, **kwargs))
            setattr(self, f"separable_conv{i}_pointwise", _normed(a, b, 1, relu))
        if skip == "conv":
            self.shortcut = _normed(inputs, outputs[-1], 1, stride=stride)

    def forward(self, x):
        y = x
        for i in (1, 2, 3):
            y = y if self.activated else F.relu(y)
            y = getattr(self, f"separable_conv{i}_pointwise")(
                getattr(self, f"separable_conv{i}_depthwise")(y)
            )
        return y if self.skip is None else y + (self.shortcut(x) if self.skip == "conv" else x)


class Xception65(nn.Module):
    """Xception as DeepLab modified it (Chen et al., "Encoder-Decoder with Atrous Separable
    Convolution", ECCV 2018, Fig. 4).

    `[N, 3, H, W]` -> `[N, 2048, H / output_stride, …]`. Where a stride is removed, what follows is
    dilated.

    The names follow DeepLab's TensorFlow checkpoints. To convert one: leave out `xception_65/` and
    `xception_module/`, a dot for each slash; `weights` [h, w, in, out] are `0.weight` by permute(3,
    2, 0, 1), `depthwise_weights` [h, w, in, 1] by permute(2, 3, 0, 1); `BatchNorm/{gamma, beta,
    moving_mean, moving_variance}` are `1.{weight, bias, running_mean, running_var}`; what is not in
    entry_flow, middle_flow, exit_flow is dropped (logits, momenta, global_step). So
    middle_flow/block1/unit_3/xception_module/separable_conv2_pointwise/weights is
    `middle_flow.block1.unit_3.separable_conv2_pointwise.0.weight`. Those networks take pixels 2z -
    1, z in 0…1; here they come as x = (z - m) / s, with ImageNet's mean m and deviation s: 2z - 1 =
    2s·x + 2m - 1. So with W the weight of entry_flow.conv1_1 subtract Σ W·(2m - 1) from its
    running_mean, then multiply W by 2s (exact but at the image's border).
    """

    def __init__(self, output_stride=32, multi_grid=(1, 1, 1)):
        super().__init__()
        stride, rate = 2, 1  # of the map so far; of what follows

        def block(inputs, outputs, skip, by=1, units=1, grid=(1, 1, 1), activated=False):
            nonlocal stride, rate
            kept = by if stride < output_stride else 1
            rates = [rate * factor for factor in grid]
            parts = [_XceptionUnit(inputs, outputs, skip, kept, rates, activated)]
            parts += [
                _XceptionUnit(outputs[-1], outputs, skip, 1, rates, activated)
                for _ in range(units - 1)
            ]
            stride, rate = stride * kept, rate * by // kept
            return nn.Sequential(
                OrderedDict((f"unit_{i}", part) for i, part in enumerate(parts, 1))
            )

        self.entry_flow = nn.Sequential()
        self.entry_flow.conv1_1 = _normed(3, 32, 3, nn.ReLU, stride=2)
        self.entry_flow.conv1_2 = _normed(32, 64, 3, nn.ReLU)
        self.entry_flow.block1 = block(64, (128, 128, 128), "conv", by=2)
        self.entry_flow.block2 = block(128, (256, 256, 256), "conv", by=2)
        self.entry_flow.block3 = block(256, (728, 728, 728), "conv", by=2)
        self.middle_flow = nn.Sequential()
        self.middle_flow.block1 = block(728, (728, 728, 728), "sum", units=16)
        self.exit_flow = nn.Sequential()
        self.exit_flow.block1 = block(728, (728, 1024, 1024), "conv", by=2)
        grid = [multi_grid[min(i, len(multi_grid) - 1)] for i in range(3)]
        self.exit_flow.block2 = block(1024, (1536, 1536, 2048), None, grid=grid, activated=True)

    def forward(self, x):
        return self.exit_flow(self.middle_flow(self.entry_flow(x)))


class HighResolutionModule(nn.Module):
    """Four basic blocks on each of several maps, then an exchange among them all (Wang et al.,
    TPAMI 2019, Fig. 3).

    List of maps `[N, channels[i], H / 2^i, …]`, finest first -> the same.
    """

    def __init__(self, channels):
        super().__init__()
        levels = range(len(channels))
        self.branches = nn.ModuleList(
            nn.Sequential(*(BasicBlock(c, c) for _ in range(4))) for c in channels
        )
        self.fuse_layers = nn.ModuleList(
            nn.ModuleList(self._moved(channels, source, target) for source in levels)
            for target in levels
        )

    @staticmethod
    def _moved(channels, source, target):
        """From the map `source` to the map `target`: 1x1 and then upsampled, or convolutions of
        stride 2.
        """
        a, b = channels[source], channels[target]
        if source == target:
            return None
        if source > target:
            return Conv2dNormActivation(a, b, 1, activation_layer=None)
        steps = [Conv2dNormActivation(a, a, 3, stride=2) for _ in range(target - source - 1)]
        return nn.Sequential(*steps, Conv2dNormActivation(a, b, 3, stride=2, activation_layer=None))

    def forward(self, maps):
        maps = [branch(x) for branch, x in zip(self.branches, maps)]
        fused = []
        for target, layers in zip(maps, self.fuse_layers):
            moved = [x if layer is None else layer(x) for x, layer in zip(maps, layers)]
            fused.append(F.relu(sum(resize(x, target) for x in moved)))
        return fused


class HRNet(nn.Module):
    """High-resolution network (Wang et al., TPAMI 2019): `[N, 3, H, W]` -> four maps, strides 4, 8,
    16, 32, finest first.

    The names are those of the authors' ImageNet checkpoints (HRNet-Image-Classification), which
    load as they are; what belongs to their classifier is dropped. Coarser maps are upsampled
    bilinearly, as in their code for segmentation.
    """

    def __init__(self, channels):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 3, 2, 1, bias=False), nn.BatchNorm2d(64)
        self.conv2, self.bn2 = nn.Conv2d(64, 64, 3, 2, 1, bias=False), nn.BatchNorm2d(64)
        wider = Conv2dNormActivation(64, 256, 1, activation_layer=None)
        self.layer1 = nn.Sequential(
            Bottleneck(64, 64, downsample=wider), *(Bottleneck(256, 64) for _ in range(3))
        )
        coarser = nn.Sequential(Conv2dNormActivation(256, channels[1], 3, stride=2))
        self.transition1 = nn.ModuleList([Conv2dNormActivation(256, channels[0], 3), coarser])
        self.stage2 = nn.Sequential(HighResolutionModule(channels[:2]))
        self.transition2 = self._coarser(channels[:3])
        self.stage3 = nn.Sequential(*(HighResolutionModule(channels[:3]) for _ in range(4)))
        self.transition3 = self._coarser(channels)
        self.stage4 = nn.Sequential(*(HighResolutionModule(channels) for _ in range(3)))

    @staticmethod
    def _coarser(channels):
        """The maps so far as they are (None), and a coarser one made of the last."""
        coarser = nn.Sequential(Conv2dNormActivation(channels[-2], channels[-1], 3, stride=2))
        return nn.ModuleList([None] * (len(channels) - 1) + [coarser])

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer1(F.relu(self.bn2(self.conv2(x))))
        maps = self.stage2([layer(x) for layer in self.transition1])
        maps = self.stage3([*maps, self.transition2[-1](maps[-1])])
        return self.stage4([*maps, self.transition3[-1](maps[-1])])


# The authors' names -> torchvision's. Each after a name that only they have.
_AUTHORS = {
    "patch_embed.proj.weight": (  # Swin Transformer
        (r"patch_embed\.proj", "features.0.0"),
        (r"patch_embed\.norm", "features.0.2"),
        (r"layers\.(\d)\.blocks", lambda found: f"features.{2 * int(found[1]) + 1}"),
        (r"layers\.(\d)\.downsample", lambda found: f"features.{2 * int(found[1]) + 2}"),
        (r"\.mlp\.fc1", ".mlp.0"),
        (r"\.mlp\.fc2", ".mlp.3"),
    ),
    "downsample_layers.0.0.weight": (  # ConvNeXt
        (r"downsample_layers\.(\d)", lambda found: f"features.{2 * int(found[1])}"),
        (r"stages\.(\d)", lambda found: f"features.{2 * int(found[1]) + 1}"),
        (r"\.dwconv", ".block.0"),
        (r"\.norm\.", ".block.2."),
        (r"\.pwconv1", ".block.3"),
        (r"\.pwconv2", ".block.5"),
        (r"\.gamma", ".layer_scale"),
        (r"^norm\.", "classifier.0."),
    ),
}
_FORM = ("num_batches_tracked", "relative_position_index", "attn_mask")


def _torchvision_names(state):
    """The state dict of an authors' checkpoint with torchvision's names; others as they are."""
    for mark, names in _AUTHORS.items():
        if mark in state:
            for pattern, name in names:
                state = {re.sub(pattern, name, key): value for key, value in state.items()}
    return {
        key: x.reshape(-1, 1, 1) if key.endswith("layer_scale") else x for key, x in state.items()
    }


def load_weights(model, path):
    """Load the state dict at `path` into `model`; a classifier (and all of the file that lies
    behind it) may be missing.

    The state dict may be in the file under "model" or "state_dict", its names may begin with
    "module." or "_orig_mod.", and may be those of the authors of Swin Transformer or ConvNeXt.

    Raises ValueError that lists the keys and shapes that differ, FileNotFoundError where there is
    no file.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no weights at '{path}'; give 'imagenet' or the path of a state dict"
        ) from None
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise ValueError(f"'{path}' cannot be read as a PyTorch state dict ({reason})") from error
    for name in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not isinstance(state, dict) or not all(
        isinstance(v, torch.Tensor) and isinstance(k, str) for k, v in state.items()
    ):
        keys = (
            f"a dict of {_few([str(key) for key in state])}"
            if isinstance(state, dict)
            else type(state).__name__
        )
        raise ValueError(f"'{path}' holds no state dict (names to tensors), but {keys}")
    for prefix in ("module.", "_orig_mod.", "module."):  # of DistributedDataParallel, of compile
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    own, state = _features(model.state_dict()), _features(_torchvision_names(state))
    missing = [key for key in own if key not in state]
    unknown = [key for key in state if key not in own]
    shapes = [
        f"{key} {list(state[key].shape)} in the file, {list(own[key].shape)} in the network"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if missing or unknown or shapes:
        parts = {
            "missing from the file": missing,
            "not in the network": unknown,
            "of another shape": shapes,
        }
        raise ValueError(
            f"'{path}' does not fit: "
            + "; ".join(
                f"{len(keys)} {what} ({_few(keys)})" for what, keys in parts.items() if keys
            )
        )
    model.load_state_dict(state, strict=False)


def _features(state):
    """The state dict without the classifier, and without what the network's form alone settles."""
    return {
        key: x
        for key, x in state.items()
        if not key.startswith(_CLASSIFIERS) and not key.endswith(_FORM)
    }


def _few(names, most=4):
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


class Decoder(nn.Module):
    """The decoder of DeepLabv3+.

    x `[N, channels, h, w]`, low `[N, low_channels, H, W]` at stride 4 -> `[N, 256, H, W]`. `resize`
    is the backbone's. Chen et al., "Encoder-Decoder with Atrous Separable Convolution", ECCV 2018,
    Fig. 2; with plain 3x3 convolutions, of which Table 2.1 of the thesis counts the multiply-adds.
    """

    def __init__(self, channels, low_channels):
        super().__init__()
        self.low = Conv2dNormActivation(low_channels, 48, 1)
        self.fuse = nn.Sequential(
            Conv2dNormActivation(channels + 48, 256, 3), Conv2dNormActivation(256, 256, 3)
        )
        self.channels = 256

    def forward(self, x, low, resize):
        return self.fuse(torch.cat([resize(x, low), self.low(low)], dim=1))


def average_pool(x, size):
    """F.adaptive_avg_pool2d(x, size) as matrix products: its own backward pass is not deterministic
    on CUDA.
    """
    ones = (torch.eye(side, device=x.device, dtype=x.dtype) for side in x.shape[2:])
    rows, columns = (F.adaptive_avg_pool1d(one, size) for one in ones)
    return rows.mT @ x @ columns


def joint_mean(values, counted):
    """The mean of `values` where `counted`, over all processes: scalar; 0 with a zero gradient
    where nothing is counted.

    values: float, counted: bool, of one shape. DistributedDataParallel averages gradients over its
    processes, so each process divides by its share of the common count: two processes give the
    result and the gradient of one with the joint batch. All of them must call it.
    """
    count = counted.sum()
    if dist.is_initialized():
        dist.all_reduce(count)
        count = count / dist.get_world_size()
    return values.masked_fill(~counted, 0).sum() / count.clamp(min=1e-6)


def pixel_cross_entropy(logits, labels, ignore=255):
    """Cross entropy, the mean over the labelled pixels of all processes: see joint_mean.

    logits `[N, K, H, W]`, labels int64 `[N, H, W]` in 0 … K-1 or `ignore` -> scalar, float32.
    """
    # CUDA's own mean is not deterministic.
    loss = F.cross_entropy(logits.float(), labels, ignore_index=ignore, reduction="none")
    return joint_mean(loss, labels != ignore)


# ---------------------------------------------------------------------------------------- alignment
#
# Where the positions of a map are on the image. A convolution of stride s, kernel size K and
# padding K//2 computes its output i around pixel i·s. So n + 1 positions span n·s + 1 pixels, for
# stride 4:
#
#     pixel       0   1   2   3   4   5   6   7   8          2·4 + 1 pixels
#     position    0               1               2          3 positions
#
# The papers' crops have such sides: 513 = 16·32 + 1, 769 = 24·32 + 1. Images of other sides are
# extended to the next n·s + 1 by repeating their border, s being the coarsest stride. Then the
# outermost positions of all maps are on the outermost pixels, so maps are resized with
# align_corners=True. Otherwise map and image drift apart by up to a stride. The extension adds a
# row and a column of positions where a side is a multiple of s.
#
# Swin Transformers and ConvNeXts cut the image into patches of s x s pixels. A position is the
# middle of its patch:
#
#     pixel       0   1   2   3 | 4   5   6   7              2·4 pixels
#     position          0       |       1                    2 positions
#
# Images are then extended to multiples of s, and maps are resized with align_corners=False.


def extended(images, stride, patches=False):
    """Images `[N, C, H, W]`, extended at the right and the bottom to the next n·stride + 1 pixels.

    patches: to the next multiple of `stride`.
    """
    remainder = 0 if patches else 1
    bottom, right = ((remainder - side) % stride for side in images.shape[2:])
    return F.pad(images, (0, right, 0, bottom), mode="replicate")


def upsample(logits, stride, size, patches=False):
    """Logits `[N, K, h, w]` at `stride` -> float32 `[N, K, *size]`, bilinear; size: the image's."""
    sides = (n * stride if patches else (n - 1) * stride + 1 for n in logits.shape[2:])
    kwargs = dict(mode="bilinear", align_corners=not patches)
    full = F.interpolate(logits.float(), size=tuple(sides), **kwargs)
    return full[:, :, : size[0], : size[1]]


def resize(x, like, patches=False):
    """Map `[N, C, h, w]` -> `[N, C, h', w']`, bilinear, of the same dtype.

    like: the map whose size it takes, or a whole number: x's stride divided by it.
    """
    if isinstance(like, int):
        size = [n * like if patches else (n - 1) * like + 1 for n in x.shape[2:]]
    else:
        size = like.shape[2:]
    if x.shape[2:] == torch.Size(size):
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=not patches)


def positions(stride, length, patches=False):
    """The pixel of each of the `length` positions of a map at `stride`, along one side, int64.

    patches: the middle of the patch, rounded up.
    """
    return torch.arange(length) * stride + (stride // 2 if patches else 0)


def stride_of(side, length, coarsest=32, patches=False):
    """The stride of a map of `length` positions along an image's `side`, None if it is no stride.

    coarsest: the stride for which the image is extended.
    """
    side = extended(torch.empty(1, 1, 1, side), coarsest, patches).shape[3]
    span, gaps = (side, length) if patches else (side - 1, length - 1)
    return span // gaps if gaps and span % gaps == 0 and span // gaps <= coarsest else None


def nearest(positions, side):
    """For each of `side` pixels the index of the nearest of the positions, int64 `[side]`."""
    middles = (positions[1:] + positions[:-1]) / 2
    return torch.bucketize(torch.arange(side), middles, right=True)


# ------------------------------------------------------------------------------------- for networks


def one_image(net, image):
    """The image given to a network's `figures`, `[3, H, W]` or `[1, 3, H, W]`, as `[1, 3, H, W]`.

    ValueError for a batch of several, and where `net` is in training mode: figures show what it
    predicts.
    """
    if net.training:
        raise ValueError("figures are drawn in evaluation mode: call net.eval() first")
    if image.numel() != image.shape[-3:].numel():
        raise ValueError(f"figures are of one image, not of a batch of shape {list(image.shape)}")
    return image.reshape(1, *image.shape[-3:])


def one_pixel(pixel, size):
    """(row, column) of the pixel that a figure is about: `pixel`, or the centre of an image of
    `size` if None.

    ValueError where it is outside.
    """
    H, W = size
    row, column = (H // 2, W // 2) if pixel is None else pixel
    if not (0 <= row < H and 0 <= column < W):
        raise ValueError(
            f"pixel ({row}, {column}) is outside the image: it has {H} rows and {W} columns"
        )
    return row, column


def check_choices(**options):
    """ValueError for an option that is not one of its values: name=(value, known values)."""
    for name, (value, known) in options.items():
        if value not in known:
            raise ValueError(f"{name}={value!r}: it is one of {', '.join(map(repr, known))}")


def check_options(network, options, *parts):
    """`options`, if each is a keyword-only argument of the class `network`, or of one of the
    classes `parts`, to which it hands them on; else a ValueError that lists those. For a
    default that is True or False the value has to be one of them, for a float a number.
    """
    parameters = [p for c in (network, *parts) for p in inspect.signature(c).parameters.values()]
    known = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    unknown = sorted(set(options) - set(known))
    if unknown:
        listed = ", ".join(f"{name}={default!r}" for name, default in known.items())
        raise ValueError(
            f"{network.__name__} has no option {', '.join(unknown)}; its options and defaults are "
            f"{listed}"
        )
    for name, value in options.items():
        kind = {bool: bool, float: (int, float)}.get(type(known[name]), object)
        number = type(known[name]) in (int, float) and isinstance(value, bool)
        if number or not isinstance(value, kind):
            expected = "True or False" if kind is bool else "a number"
            raise ValueError(f"{name}={value!r}: expected {expected}")
    return options
