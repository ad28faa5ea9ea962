"""Feature extractors, a decoder, and the pixel loss that every network here shares.

A backbone is torchvision's ImageNet model, or one of this file where torchvision has none. It gives
its maps at four levels and is dilated on request:

    net = backbones.build("resnet50", output_stride=8, weights="imagenet")
    maps = net(images)        # four maps, finest first: strides 4, 8, 8, 8
    net.channels, net.strides # (256, 512, 1024, 2048), (4, 8, 8, 8)

Dilation (Chen et al., "Rethinking Atrous Convolution", 2017): where the stride of a stage is
removed, the convolutions after it are dilated by the same factor. Each kernel then still sees the
samples that it was trained on (but for `multi_grid`, and EfficientNets' squeeze-and-excitation).

The section "alignment" says where the positions of a map are on the image. A Backbone's `forward`,
`upsample`, `resize` and `positions` take care of it. To copy: this file alone.
"""

import inspect
import itertools
import re
import zipfile
from collections import OrderedDict
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision import models
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import Conv2dNormActivation

# The last layer of each level, finest level first: children of the model, or of its `features`.
_RESNET = ("layer1", "layer2", "layer3", "layer4")
_PATCHES = ("1", "3", "5", "7")  # networks that cut the image into patches
_EFFICIENT = ("2", "3", "5", "8")
# It ends at 320 channels, before the 1x1 convolution to 1280, as in DeepLab, on which KSAC builds
# (Sandler et al., "MobileNetV2", CVPR 2018, Sect. 6.3). KSAC's Table 2.1 could not decide.
_MOBILE = ("3", "6", "13", "17")
# Names; these layers, or None: the model itself returns the maps; channels; output strides.
_FAMILIES = (
    ("resnet18 resnet34", _RESNET, (64, 128, 256, 512), [32, 16, 8]),
    ("resnet50 resnet101 resnet152", _RESNET, (256, 512, 1024, 2048), [32, 16, 8]),
    ("mobilenet_v2", _MOBILE, (24, 32, 96, 320), [32, 16, 8]),
    ("xception65", None, (256, 728, 728, 2048), [32, 16, 8]),
    ("hrnet_w18", None, (18, 36, 72, 144), [32]),
    ("hrnet_w32", None, (32, 64, 128, 256), [32]),
    ("hrnet_w48", None, (48, 96, 192, 384), [32]),
    ("efficientnet_b5", _EFFICIENT, (40, 64, 176, 2048), [32, 16, 8]),
    ("efficientnet_b7", _EFFICIENT, (48, 80, 224, 2560), [32, 16, 8]),
    ("convnext_tiny convnext_small swin_t swin_s", _PATCHES, (96, 192, 384, 768), [32, 8]),
    ("convnext_base swin_b", _PATCHES, (128, 256, 512, 1024), [32, 8]),
    ("convnext_large swin_l", _PATCHES, (192, 384, 768, 1536), [32, 8]),
)
_LEVELS = {name: levels for names, *levels in _FAMILIES for name in names.split()}
NAMES = tuple(_LEVELS)


class Backbone(nn.Module):
    """A model that returns its four levels, finest first: `[N, channels[l], h_l, w_l]`.

    `body` keeps the model's parameter names. patches: the network cuts the image into patches, and
    each level gets a layer norm, as in the authors' segmentation code. jpu: the last level is that
    of JointPyramidUpsampling.
    """

    def __init__(self, model, ends, channels, strides, jpu=False):
        super().__init__()
        self.patches, self.coarsest = ends is _PATCHES, strides[-1]
        self.channels_last = isinstance(model, models.SwinTransformer)
        self.body = _Levels(getattr(model, "features", model), ends) if ends else model
        if hasattr(model, "features"):
            self.body = nn.Sequential(OrderedDict(features=self.body))
        eps = 1e-5 if self.channels_last else 1e-6
        normed = channels if self.patches else ()
        self.norms = nn.ModuleList(nn.LayerNorm(c, eps=eps) for c in normed)
        self.jpu = JointPyramidUpsampling(channels[1:]) if jpu else None
        self.channels = (*channels[:3], self.jpu.channels) if jpu else channels
        self.strides = (*strides[:3], strides[1]) if jpu else strides
        # The functions of these names below, for this kind of backbone.
        self.upsample = partial(upsample, patches=self.patches)
        self.resize = partial(resize, patches=self.patches)
        self.positions = partial(positions, patches=self.patches)
        self.stride_of = partial(stride_of, coarsest=self.coarsest, patches=self.patches)

    def forward(self, images, extend=True):
        """Images float `[N, 3, H, W]` -> the list of four maps.

        extend: enlarge the images so that maps and pixels are aligned; else the caller aligns them.
        """
        maps = self.body(extended(images, self.coarsest, self.patches) if extend else images)
        if self.patches:
            maps = maps if self.channels_last else [m.permute(0, 2, 3, 1) for m in maps]
            maps = [norm(m).permute(0, 3, 1, 2) for norm, m in zip(self.norms, maps)]
        return maps if self.jpu is None else [*maps[:3], self.jpu(maps[1:])]

    def reads(self, *levels):
        """Freeze what learns nothing where a network reads these levels alone; 0 is the finest."""
        own = self.body.stage4[-1].fuse_layers if isinstance(self.body, HRNet) else self.norms
        needed = (*levels, 1, 2, 3) if self.jpu else levels
        for level, layers in enumerate(own):
            layers.requires_grad_(level in needed)


class _Levels(nn.Sequential):
    """A model's layers up to its last level: images -> the outputs of the layers named in `ends`.
    (create_feature_extractor reorders a Swin Transformer's parameters and hides layers from hooks.)
    """

    def __init__(self, model, ends):
        layers = list(model.named_children())
        names = [name for name, _ in layers]
        super().__init__(OrderedDict(layers[: names.index(ends[-1]) + 1]))
        self.ends = ends

    def forward(self, x):
        maps = []
        for name, layer in self.named_children():
            x = layer(x)
            if name in self.ends:
                maps.append(x)
        return maps


def build(name, output_stride=32, weights=None, multi_grid=None):
    """The backbone `name` at `output_stride` 32, 16 or 8 (HRNets: 32; Swin Transformers and
    ConvNeXts: 32, or 8 by Joint Pyramid Upsampling).

    weights: None (random), "imagenet" (downloaded by torchvision; the first version of its weights,
    as in its own segmentation models), or the path of a state dict with torchvision's names; of a
    Swin Transformer or ConvNeXt also the authors' checkpoint. (xception65, HRNets and swin_l: a
    path only; the classes Xception65 and HRNet say with which names.)
    multi_grid: factors of the dilation rates of the last stage's blocks (there, Sect. 3.2.1: 1, 2,
    4; rates 2, 4, 8 at output stride 16) or of the last three convolutions of xception65. The last
    factor repeats. Only ResNets and xception65 have it. ValueError for an unknown name, stride or
    multi_grid, and as load_weights.
    name: also a torch module: images -> a list of four maps, finest first, aligned as a ResNet's.
    """
    if isinstance(name, nn.Module):
        if weights or multi_grid:
            raise ValueError("the backbone is a module: its weights and multi_grid are its own")
        return _of_module(name, output_stride)
    if name not in _LEVELS:
        raise ValueError(f"unknown backbone '{name}'; there are {', '.join(NAMES)}")
    ends, channels, known = _LEVELS[name]
    if output_stride not in known:
        raise ValueError(f"output stride {output_stride}: {name} has {known}")
    if multi_grid and not name.startswith(("resnet", "xception")):
        raise ValueError(f"{name} has no multi_grid; ResNets and xception65 have it")
    model = _model(name, weights, output_stride, multi_grid)
    jpu = ends is _PATCHES and output_stride == 8
    if ends in (_RESNET, _MOBILE, _EFFICIENT):
        _dilate(model, output_stride, multi_grid)
    strides = tuple(min(stride, 32 if jpu else output_stride) for stride in (4, 8, 16, 32))
    return Backbone(model, ends, channels, strides, jpu)


@torch.no_grad()
def _of_module(module, output_stride):
    """The Backbone of a user's module. An image of 97x97 tells whether its maps are aligned."""
    strides = {s: tuple(min(stride, s) for stride in (4, 8, 16, 32)) for s in (8, 16, 32)}
    sizes = {s: [[96 // stride + 1] * 2 for stride in own] for s, own in strides.items()}
    tensors = itertools.chain(module.parameters(), module.buffers(), [torch.zeros(0)])
    image = torch.zeros(1, 3, 97, 97, device=next(tensors).device)
    modes = [(part, part.training) for part in module.modules()]
    try:
        maps = module.eval()(image)
        shapes = [list(m.shape) for m in maps] if isinstance(maps, (list, tuple)) else []
        found = shapes or type(maps).__name__
    except Exception as error:  # whatever it raises
        shapes, found = [], f"{type(error).__name__}: {error}"
    for part, training in modes:
        part.training = training
    fitting = [s for s in sizes if [shape[2:] for shape in shapes] == sizes[s]]
    if output_stride not in fitting:
        text = f"{type(module).__name__} as the backbone: from float32 images [1, 3, 97, 97] a list"
        text += f" of four maps with the sides {sizes.get(output_stride)} was expected, not {found}"
        raise ValueError(text + (f"; give output_stride={fitting[0]}" if fitting else ""))
    return Backbone(module, None, tuple(shape[1] for shape in shapes), strides[output_stride])


def parts(name, weights=None):
    """A ResNet or MobileNetV2 in parts, to put something in between: (stem, levels, channels).

    stem: images -> stride 4; the four levels follow one another, strides 4, 8, 16, 32; channels: of
    the stem and of each level. (MobileNetV2's first level is in its stem: as a level of its own it
    does nothing.) weights: as in `build`. ValueError for another backbone, and as load_weights.
    """
    known = [name for name in NAMES if name.startswith(("resnet", "mobilenet"))]
    check_choices(backbone=(name, known))
    model, channels = _model(name, weights), _LEVELS[name][1]
    if name == "mobilenet_v2":
        levels = [nn.Identity(), model.features[4:7], model.features[7:14], model.features[14:18]]
        return model.features[:4], levels, (24, *channels)
    stem = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)
    return stem, [model.layer1, model.layer2, model.layer3, model.layer4], (64, *channels)


def _model(name, weights, output_stride=32, multi_grid=None):
    """The model of this name with its weights: torchvision's, not dilated, or one of this file."""
    if weights == "imagenet":
        try:
            return models.get_model(name, weights="IMAGENET1K_V1")
        except (OSError, RuntimeError, ValueError) as error:  # no network; cut short; unknown to it
            text = f"weights of {name} could not be downloaded ({error}); give the path of a file"
            raise ValueError(text) from error
    if name == "xception65":
        model = Xception65(output_stride, multi_grid or (1, 1, 1))
    elif name.startswith("hrnet"):
        model = HRNet(_LEVELS[name][1])
    elif name == "swin_l":  # Liu et al., "Swin Transformer", ICCV 2021, Sect. 3.3
        sizes = [4, 4], 192, [2, 2, 18, 2], [6, 12, 24, 48], [7, 7]
        model = models.SwinTransformer(*sizes, stochastic_depth_prob=0.2)
    else:
        model = models.get_model(name, weights=None)
    if weights is not None:
        load_weights(model, weights)
    return model


def _dilate(model, output_stride, multi_grid):
    """Replace the strides beyond `output_stride` by dilation."""
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    strided = [conv for conv in convs if conv.stride[0] > 1 and conv.kernel_size[0] > 1]
    removed = strided[len(strided) - 16 // output_stride :]  # the last 0, 1 or 2
    rate = 1
    for conv in convs:
        _set_rate(conv, rate)
        if conv in removed:  # the map it reads is as dense as in training, those after it denser
            rate *= 2
        if rate > 1:
            conv.stride = (1, 1)  # also a shortcut's, which is 1x1
    for i, block in enumerate(model.layer4 if multi_grid else ()):
        factor = multi_grid[min(i, len(multi_grid) - 1)]
        for conv in (m for m in block.modules() if isinstance(m, nn.Conv2d)):
            _set_rate(conv, rate * factor)


def _set_rate(conv, rate):
    """Dilate a convolution; the map keeps its size."""
    if (reach := conv.kernel_size[0] // 2) > 0:
        conv.dilation, conv.padding = (rate, rate), (rate * reach, rate * reach)


class JointPyramidUpsampling(nn.Module):
    """A map of stride 8 (Wu et al., "FastFCN: Rethinking Dilated Convolution", 2019, Fig. 3).
    Maps of strides 8, 16, 32 of patches -> `[N, 4·512, H/8, W/8]`: each reduced to 512, and four
    separable convolutions of rates 1, 2, 4, 8 on all of them at stride 8.
    """

    def __init__(self, channels, width=512):
        super().__init__()
        self.reduce = nn.ModuleList(Conv2dNormActivation(c, width, 3) for c in channels)
        together, self.channels = len(channels) * width, 4 * width
        self.dilated = nn.ModuleList()
        for rate in (1, 2, 4, 8):
            kwargs = dict(dilation=rate, groups=together, activation_layer=None)
            depthwise = Conv2dNormActivation(together, together, 3, **kwargs)
            self.dilated.append(nn.Sequential(depthwise, Conv2dNormActivation(together, width, 1)))

    def forward(self, maps):
        finest, *coarser = (reduce(m) for reduce, m in zip(self.reduce, maps))
        x = torch.cat([finest, *(resize(m, finest, patches=True) for m in coarser)], dim=1)
        return torch.cat([layer(x) for layer in self.dilated], dim=1)


_batch_norm = partial(nn.BatchNorm2d, eps=1e-3)  # TensorFlow's ε
_normed = partial(Conv2dNormActivation, norm_layer=_batch_norm, activation_layer=None)


class _XceptionUnit(nn.Module):
    """Three separable convolutions, the last one with the stride, and around them the skip "conv",
    "sum" or None: x -> its output, and that of the second convolution.

    A ReLU is before each separable convolution, or, where `activated`, after both halves of each.
    setattr and getattr, because the names are those of DeepLab's checkpoints.
    """

    def __init__(self, inputs, outputs, skip, stride=1, rates=(1, 1, 1), activated=False):
        super().__init__()
        relu = nn.ReLU if activated else None
        self.activated = activated
        for i, (a, b, rate) in enumerate(zip([inputs, *outputs], outputs, rates), 1):
            kwargs = dict(groups=a, dilation=rate, stride=stride if i == 3 else 1)
            depthwise = _normed(a, a, 3, activation_layer=relu, **kwargs)
            setattr(self, f"separable_conv{i}_depthwise", depthwise)
            setattr(self, f"separable_conv{i}_pointwise", _normed(a, b, 1, activation_layer=relu))
        self.shortcut = nn.Identity() if skip == "sum" else None
        if skip == "conv":
            self.shortcut = _normed(inputs, outputs[-1], 1, stride=stride)

    def separable(self, i, x):
        x = x if self.activated else F.relu(x)
        x = getattr(self, f"separable_conv{i}_depthwise")(x)
        return getattr(self, f"separable_conv{i}_pointwise")(x)

    def forward(self, x):
        second = self.separable(2, self.separable(1, x))
        y = self.separable(3, second)
        return y if self.shortcut is None else y + self.shortcut(x), second


class Xception65(nn.Module):
    """Xception as DeepLab modified it (Chen et al., "Encoder-Decoder with Atrous Separable
    Convolution", ECCV 2018, Fig. 4).

    `[N, 3, H, W]` -> four maps, finest first; the first is DeepLabv3+'s low-level features. Where a
    stride is removed, what follows is dilated. The names follow DeepLab's TensorFlow checkpoints;
    docs/results.md says how to convert one.
    """

    def __init__(self, output_stride=32, multi_grid=(1, 1, 1)):
        super().__init__()

        def block(*units):
            return nn.Sequential(OrderedDict((f"unit_{i}", u) for i, u in enumerate(units, 1)))

        wide, stride = (728, 728, 728), 1 if output_stride == 8 else 2
        rates = 3 * [2 // stride]
        self.entry_flow = nn.Sequential()
        self.entry_flow.conv1_1 = _normed(3, 32, 3, stride=2, activation_layer=nn.ReLU)
        self.entry_flow.conv1_2 = _normed(32, 64, 3, activation_layer=nn.ReLU)
        self.entry_flow.block1 = block(_XceptionUnit(64, (128, 128, 128), "conv", 2))
        self.entry_flow.block2 = block(_XceptionUnit(128, (256, 256, 256), "conv", 2))
        self.entry_flow.block3 = block(_XceptionUnit(256, wide, "conv", stride))
        middle = [_XceptionUnit(728, wide, "sum", rates=rates) for _ in range(16)]
        self.middle_flow = nn.Sequential(OrderedDict(block1=block(*middle)))
        self.exit_flow = nn.Sequential()
        stride = 2 if output_stride == 32 else 1
        self.exit_flow.block1 = block(_XceptionUnit(728, (728, 1024, 1024), "conv", stride, rates))
        rates = [32 // output_stride * multi_grid[min(i, len(multi_grid) - 1)] for i in range(3)]
        unit = _XceptionUnit(1024, (1536, 1536, 2048), None, 1, rates, activated=True)
        self.exit_flow.block2 = block(unit)

    def forward(self, x):
        x = self.entry_flow.conv1_2(self.entry_flow.conv1_1(x))
        x, _ = self.entry_flow.block1.unit_1(x)
        x, quarter = self.entry_flow.block2.unit_1(x)
        x, eighth = self.entry_flow.block3.unit_1(x)
        for unit in self.middle_flow.block1:
            x, _ = unit(x)
        y, _ = self.exit_flow.block1.unit_1(x)
        y, _ = self.exit_flow.block2.unit_1(y)
        return [quarter, eighth, x, y]


class HighResolutionModule(nn.Module):
    """Basic blocks on each of several maps, then an exchange (Wang et al., TPAMI 2019, Fig. 3).
    List of maps `[N, channels[i], H / 2^i, …]`, finest first -> the same.
    """

    def __init__(self, channels):
        super().__init__()
        levels = range(len(channels))
        blocks = [[BasicBlock(c, c) for _ in range(4)] for c in channels]
        self.branches = nn.ModuleList(nn.Sequential(*branch) for branch in blocks)
        self.fuse_layers = nn.ModuleList(nn.ModuleList() for _ in levels)
        for target, source in itertools.product(levels, levels):
            a, b, layer = channels[source], channels[target], None
            if source > target:
                layer = Conv2dNormActivation(a, b, 1, activation_layer=None)
            elif source < target:  # convolutions of stride 2
                steps = [Conv2dNormActivation(a, a, 3, stride=2) for _ in range(source + 1, target)]
                last = Conv2dNormActivation(a, b, 3, stride=2, activation_layer=None)
                layer = nn.Sequential(*steps, last)
            self.fuse_layers[target].append(layer)

    def forward(self, maps):
        maps = [branch(x) for branch, x in zip(self.branches, maps)]
        fused = []
        for target, layers in zip(maps, self.fuse_layers):
            moved = [x if layer is None else layer(x) for x, layer in zip(maps, layers)]
            fused.append(F.relu(sum(resize(x, target) for x in moved)))
        return fused


class HRNet(nn.Module):
    """High-resolution network (Wang et al., TPAMI 2019): `[N, 3, H, W]` -> four maps, finest first.
    The authors' ImageNet checkpoints (HRNet-Image-Classification) load as they are. Coarser maps
    are upsampled bilinearly, as in their code for segmentation.
    """

    def __init__(self, channels):
        super().__init__()

        def coarser(inputs, outputs):
            return nn.Sequential(Conv2dNormActivation(inputs, outputs, 3, stride=2))

        self.conv1, self.bn1 = nn.Conv2d(3, 64, 3, 2, 1, bias=False), nn.BatchNorm2d(64)
        self.conv2, self.bn2 = nn.Conv2d(64, 64, 3, 2, 1, bias=False), nn.BatchNorm2d(64)
        wider = Conv2dNormActivation(64, 256, 1, activation_layer=None)
        first = Bottleneck(64, 64, downsample=wider)
        self.layer1 = nn.Sequential(first, *(Bottleneck(256, 64) for _ in range(3)))
        second = coarser(256, channels[1])
        self.transition1 = nn.ModuleList([Conv2dNormActivation(256, channels[0], 3), second])
        self.stage2 = nn.Sequential(HighResolutionModule(channels[:2]))
        self.transition2 = nn.ModuleList([None, None, coarser(*channels[1:3])])
        self.stage3 = nn.Sequential(*(HighResolutionModule(channels[:3]) for _ in range(4)))
        self.transition3 = nn.ModuleList([None, None, None, coarser(*channels[2:])])
        self.stage4 = nn.Sequential(*(HighResolutionModule(channels) for _ in range(3)))

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer1(F.relu(self.bn2(self.conv2(x))))
        maps = self.stage2([layer(x) for layer in self.transition1])
        maps = self.stage3([*maps, self.transition2[-1](maps[-1])])
        return self.stage4([*maps, self.transition3[-1](maps[-1])])


# Names in a file -> torchvision's.
_RENAMED = (
    (r"^((module|_orig_mod)\.)+", ""),  # DistributedDataParallel, torch.compile
    (r"patch_embed\.proj", "features.0.0"),  # the authors' Swin Transformer
    (r"patch_embed\.norm", "features.0.2"),
    (r"layers\.(\d)\.blocks", lambda found: f"features.{2 * int(found[1]) + 1}"),
    (r"layers\.(\d)\.downsample", lambda found: f"features.{2 * int(found[1]) + 2}"),
    (r"\.mlp\.fc1", ".mlp.0"),
    (r"\.mlp\.fc2", ".mlp.3"),
    (r"downsample_layers\.(\d)", lambda found: f"features.{2 * int(found[1])}"),  # ConvNeXt
    (r"(stages\..*)\.norm", r"\1.block.2"),
    (r"stages\.(\d)", lambda found: f"features.{2 * int(found[1]) + 1}"),
    (r"\.dwconv", ".block.0"),
    (r"\.pwconv1", ".block.3"),
    (r"\.pwconv2", ".block.5"),
    (r"\.gamma", ".layer_scale"),
)
# Not compared: a classifier's parameters, and buffers that follow from the form of the network.
_CLASSIFIERS = ("fc.", "classifier.", "norm.", "head.", "incre_", "downsamp_", "final_")
_FORM = ("num_batches_tracked", "relative_position_index", "attn_mask")


def _compared(keys):
    return [k for k in keys if not k.startswith(_CLASSIFIERS) and not k.endswith(_FORM)]


def load_weights(model, path):
    """Load the state dict at `path` into `model`, without the classifier and what is after it.

    The state dict may be in the file under "model" or "state_dict", its names may begin with
    "module." or "_orig_mod.", and may be those of the authors of Swin Transformer or ConvNeXt.
    ValueError that names keys or shapes that differ, and as load_file.
    """
    try:
        state = load_file(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"no weights at '{path}': give a file, or 'imagenet'") from None
    for name in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
        raise ValueError(f"'{path}' holds no state dict, also not under 'model' or 'state_dict'")
    for pattern, name in _RENAMED:
        state = {re.sub(pattern, name, str(key)): x for key, x in state.items()}
    state = {key: state[key] for key in _compared(state)}
    for key in (key for key in state if key.endswith("layer_scale")):
        state[key] = state[key].reshape(-1, 1, 1)  # the authors' are flat
    try:
        found = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # its second line names the first shape that differs
        reason = str(error).splitlines()[1].strip()
        raise ValueError(f"'{path}' does not fit: {reason}") from error
    missing, unknown = _compared(found.missing_keys), found.unexpected_keys
    if missing or unknown:
        text = f"'{path}' does not fit: {len(missing)} missing from the file {missing[:4]}"
        raise ValueError(f"{text}, {len(unknown)} not in the network {unknown[:4]}")


def load_file(path):
    """What torch.save wrote to `path`, on the CPU: tensors, and Python's own types.

    Raises FileNotFoundError, and ValueError in one line for any other reason. The archive's
    checksums are compared, which PyTorch does not do: it loads a damaged file.
    """
    damaged = None
    try:
        if zipfile.is_zipfile(path):  # before PyTorch 1.6 a file was no archive
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        if damaged is None:
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        lines = f"{type(error).__name__} {error}".splitlines()
        reason = next((line.strip() for line in lines if "Unpickler" in line), lines[0])
        if objects := re.findall(r"GLOBAL (\S+)", reason):
            save = "save the state dict alone: torch.save(net.state_dict(), path)"
            reason = f"it holds a Python object, {objects[0]}; {save}"
        raise ValueError(f"'{path}' cannot be read ({reason})") from error
    raise ValueError(f"'{path}' is damaged at {damaged}: copy or download it again")


class Decoder(nn.Module):
    """The decoder of DeepLabv3+: x `[N, channels, h, w]`, low `[N, low_channels, H, W]` at stride 4
    -> `[N, 256, H, W]`. `resize` is the backbone's. Chen et al., "Encoder-Decoder with Atrous
    Separable Convolution", ECCV 2018, Fig. 2; with plain 3x3 convolutions, of which Table 2.1 of
    the thesis counts the multiply-adds.
    """

    def __init__(self, channels, low_channels):
        super().__init__()
        self.low = Conv2dNormActivation(low_channels, 48, 1)
        fuse = [Conv2dNormActivation(c, 256, 3) for c in (channels + 48, 256)]
        self.fuse = nn.Sequential(*fuse)
        self.channels = 256

    def forward(self, x, low, resize):
        return self.fuse(torch.cat([resize(x, low), self.low(low)], dim=1))


def average_pool(x, size):
    """F.adaptive_avg_pool2d(x, size), whose own backward pass is not deterministic on CUDA."""
    ones = (torch.eye(side, device=x.device, dtype=x.dtype) for side in x.shape[2:])
    rows, columns = (F.adaptive_avg_pool1d(one, size) for one in ones)
    return rows.mT @ x @ columns


def contiguous_gradient(x):
    """x `[N, C, H, W]`, unchanged; the layer that made it receives a contiguous gradient.

    On the CPU, batch norm misreads a permuted gradient of a map one position wide or high.
    """
    if x.requires_grad:
        x.register_hook(lambda gradient: None if gradient is None else gradient.contiguous())
    return x


def check_labels(labels, images, num_classes):
    """ValueError unless labels are int64 `[N, H, W]` in 0 … K-1 or 255 = ignored.

    images `[N, C, H, W]`, or features. Ids are looked at on the CPU alone, and not while compiling:
    on CUDA the process would have to wait for the device.
    """
    size = [len(images), *images.shape[2:]]
    if list(labels.shape) != size:
        advice = f"for a feature map, labels_at(labels, {tuple(size[1:])}) takes its positions'"
        text = f"labels {list(labels.shape)} do not match {list(images.shape)}: expected {size}"
        raise ValueError(f"{text}; {advice}")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels are {labels.dtype}: expected int64, call labels.long()")
    if torch.compiler.is_compiling() or type(labels) is not torch.Tensor or not labels.is_cpu:
        return  # FakeTensor and the like hold no numbers
    wrong = (labels < 0) | ((labels >= num_classes) & (labels != 255))
    if wrong.any():
        known = f"num_classes={num_classes}: expected 0 to {num_classes - 1}, or 255 = ignored"
        advice = "give the dataset's number of classes, or map its labels"
        raise ValueError(f"labels {labels[wrong].unique().tolist()} with {known}; {advice}")


def joint_mean(values, counted):
    """The mean of `values` where `counted`, over all processes: scalar.

    values: float, counted: bool, of one shape. Where nothing is counted it is 0, with a zero
    gradient. DistributedDataParallel averages gradients over its processes, so each process divides
    by its share of the common count: two processes give the result and the gradient of one with the
    joint batch. All of them must call it.
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
# padding K//2 computes its output i around pixel i·s. So n + 1 positions span n·s + 1 pixels:
#
#     pixel       0   1   2   3   4   5   6   7   8          stride 4: 2·4 + 1 pixels
#     position    0               1               2          3 positions
#
# The papers' crops have such sides: 513 = 16·32 + 1, 769 = 24·32 + 1. Other images are extended to
# the next n·s + 1 by repeating their border, s being the coarsest stride. Then the outermost
# positions of all maps are on the outermost pixels, so maps are resized with align_corners=True.
#
# Swin Transformers and ConvNeXts cut the image into patches of s x s pixels. A position is the
# middle of its patch. Images are extended to multiples of s, and align_corners is False:
#
#     pixel       0   1   2   3 | 4   5   6   7              2·4 pixels
#     position          0       |       1                    2 positions


def extended(images, stride, patches=False):
    """Images `[N, C, H, W]`, at right and bottom extended to n·stride + 1; patches: n·stride."""
    remainder = 0 if patches else 1
    bottom, right = ((remainder - side) % stride for side in images.shape[2:])
    return F.pad(images, (0, right, 0, bottom), mode="replicate")


def upsample(logits, stride, size, patches=False):
    """Logits `[N, K, h, w]` at `stride` -> float32 `[N, K, *size]`, bilinear; size: the image's."""
    x = resize(logits.float(), stride, patches)
    if torch.compiler.is_compiling():  # A view would limit the image sizes of an exported program.
        bottom, right = (wanted - side for wanted, side in zip(size, x.shape[2:]))
        return F.pad(x, (0, right, 0, bottom))
    return x[:, :, : size[0], : size[1]]


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
    """The pixel of each position along one side, int64; of patches the middle, rounded up."""
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


def spread(sides, size):
    """Row and column indices, int64, of the positions of a map of `size` spread over an image."""
    return [((torch.arange(n) + 0.5) * (side / n)).long() for side, n in zip(sides, size)]


def pixels_of(net, sides, size):
    """Row and column indices, in an image with `sides`, of the positions of a map of `size`.

    The networks here, which have `regularized`, know their strides. Maps of others are taken to be
    spread evenly, because that is how their logits are resized to the image.
    """
    own, at, stride_at = getattr(net, "backbone", None), positions, stride_of  # as in SPGNet
    if isinstance(own, Backbone):
        at, stride_at = own.positions, own.stride_of
    strides = [stride_at(*pair) for pair in zip(sides, size)]
    # One position alone does not tell its stride: it has that of the other side.
    found = [stride for stride in strides if stride]
    ours = at is not positions or hasattr(net, "regularized")
    if not ours or not found or len(found) < sum(n > 1 for n in size):
        return spread(sides, size)
    return [at(stride or found[0], n) for stride, n in zip(strides, size)]


def near_border(labels):
    """The labelled pixels within 3 pixels (7x7) of another label: `[N, H, W]` -> bool."""
    known, values = labels != 255, labels.float()
    largest = F.max_pool2d(values.masked_fill(~known, -1), 7, 1, 3)
    smallest = -F.max_pool2d(-values, 7, 1, 3)  # 255 only where nothing is labelled
    return known & (largest > smallest)


# ------------------------------------------------------------------------------------- for networks


def confusion(predicted, labels, num_classes):
    """The number of pixels of each (true class, predicted class), int64 `[K, K]`.

    predicted, labels: of one shape, of any integer type; pixels labelled 255 do not count.
    """
    K = num_classes
    # For an ignored pixel the index is at least 255·K ≥ K², beyond the counts that are kept.
    pairs = labels.flatten().long() * K + predicted.flatten()
    return torch.bincount(pairs, minlength=K * K)[: K * K].view(K, K)


def iou(counts):
    """IoU of each class, of `confusion`'s counts: `[…, K, K]` -> `[…, K]`, NaN of an absent one."""
    hit = counts.diagonal(dim1=-2, dim2=-1)
    return hit / (counts.sum(-1) + counts.sum(-2) - hit)


def one_image(net, image):
    """`figures`' image as `[1, 3, H, W]`; ValueError for a batch of several, and in training."""
    if net.training:
        raise ValueError("figures are drawn in evaluation mode: call net.eval() first")
    if image.numel() != image.shape[-3:].numel():
        raise ValueError(f"figures are of one image, not of a batch of shape {list(image.shape)}")
    return image.reshape(1, *image.shape[-3:])


def one_pixel(pixel, size):
    """(row, column) of a pixel, None: the centre; ValueError outside an image of `size`."""
    H, W = size
    i, j = (H // 2, W // 2) if pixel is None else pixel
    if not (0 <= i < H and 0 <= j < W):
        raise ValueError(f"pixel ({i}, {j}) is outside the image: it has {H} rows and {W} columns")
    return i, j


def check_choices(**options):
    """ValueError for an option that is not one of its values: name=(value, known values)."""
    for name, (value, known) in options.items():
        if value not in known:
            raise ValueError(f"{name}={value!r}: it is one of {', '.join(map(repr, known))}")


def check_options(network, options, *parts):
    """`options`, checked: each is a keyword-only argument of the class `network`, or of one of the
    classes `parts`, to which `network` hands it on.

    ValueError for an unknown one: it lists the known ones. ValueError also where the default is
    True or False and the value is neither, or the default is a float and the value not a number.
    """
    parameters = [p for c in (network, *parts) for p in inspect.signature(c).parameters.values()]
    known = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    unknown = ", ".join(sorted(set(options) - set(known)))
    if unknown:
        listed = ", ".join(f"{name}={default!r}" for name, default in known.items())
        text = f"{network.__name__} has no option {unknown}; its options and defaults are {listed}"
        raise ValueError(text)
    for name, value in options.items():
        kind, switch = type(known[name]), isinstance(value, bool)
        if kind is bool and not switch:
            raise ValueError(f"{name}={value!r}: expected True or False")
        number = isinstance(value, (int, float)) and not switch
        if (kind is float and not number) or (kind is int and switch):
            raise ValueError(f"{name}={value!r}: expected a number")
    return options
