"""Kernel-Sharing Atrous Convolution (KSAC).

Ye Huang, Qingqing Wang, Wenjing Jia, Yue Lu, Yuxin Li, Xiangjian He: "See more than once: On the
kernel-sharing atrous convolution for semantic segmentation", Neurocomputing 2021,
https://arxiv.org/abs/1908.09443. Numbers of algorithms, tables and sections are those of Ye Huang's
thesis "Context-aware Image Semantic Segmentation", University of Technology Sydney, 2022.

The idea. ASPP looks at a map through parallel 3x3 convolutions of several atrous rates, and each
has a kernel of its own. Small objects train the kernels of small rates, large objects those of
large rates, and each kernel learns from a part of the objects only. KSAC has one kernel for all
rates. It sees every object more than once, with small and large receptive fields, so it learns from
all of them. The thesis calls this feature augmentation inside the network (Sect. 2.2.2). With three
rates two thirds of the 3x3 weights are saved.

The mathematics, Algorithm 1. T [N, I, H, W] is the input map, 0 outside its borders. K [C, I, 3, 3]
is the shared kernel with its nine taps K_k [C, I], k in {-1, 0, 1}². R: rates, p: a position.

    T'_r[p] = Σ_k K_k T[p + r·k]          for every r in R     line 4    -> shared_atrous
    B_r = BatchNorm_r(T'_r)               [N, C, H, W]         line 5    -> KSAC.pyramid
    pyramid = Σ_r ReLU(B_r)               [N, C, H, W]         "Ensure"  -> KSAC.forward

513x513 pixels are 33x33 positions at output stride 16. The picture has the row of the middle
position: x is a tap that reads the map, o is one that reads a 0 outside it. Columns are alike. At
rate 18 the middle position reads the map with one tap of nine, no position with more than four.

    rate  6      ..........x.....x.....x..........
    rate 12      ....x...........x...........x....
    rate 18    o ................x................ o

Fig. 2.3 joins the pyramid with a 1x1 convolution and an image-level branch -> KSAC.forward. Fig.
2.4 shows feature maps of each rate -> KSACNet.figures.

Read first `separate`, then `rearranged`, which computes the same with the multiply-adds of one
convolution, then KSAC. Tests: tests/test_ksac.py.
To copy: this file and backbones.py. The code above KSACNet needs torch and torchvision alone.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.segmentation import deeplabv3
from torchvision.ops import Conv2dNormActivation

import backbones

# ---------------------------------------------------------------------------------------- equations


def separate(x, weight, rates):
    """Algorithm 1, line 4, as printed: one atrous convolution for each rate, with the same kernel.

    x: T `[N, I, H, W]`, weight: K `[C, I, 3, 3]`, rates: R, whole numbers of at least 1 -> a list
    of maps `[N, C, H, W]`, one for each rate.
    """
    return [F.conv2d(x, weight, padding=r, dilation=r) for r in rates]


def rearranged(x, weight, rates):
    """The same as `separate`, with the multiply-adds of one 3x3 convolution. The form is ours.

    Sect. 2.4.2 says that sharing needs 1x3x3 products for a pixel instead of 3x3x3. That is true of
    this form only: `separate` computes all 3x3x3. The products take N·9·C·H·W numbers.

    Derivation: the nine products K_k T do not depend on the rate,

        T'_r[p] = Σ_k K_k T[p + r·k] = Σ_k (K_k T)[p + r·k]

    so they are computed once, as 1x1 convolutions. Each rate then sums nine shifted maps, which is
    what `fold` does. The formula reads at p + r·k and adds at p. `fold` reads at q and adds at
    q + r·k. Its k is our -k, hence the flipped kernel.
    """
    taps = weight.flip(2, 3).permute(0, 2, 3, 1).flatten(0, 2)  # [C·9, I], as fold wants it
    products = taps @ x.flatten(2)  # K_k T  [N, C·9, H·W]
    return [F.fold(products, x.shape[2:], 3, dilation=r, padding=r) for r in rates]  # Σ_k


# (rates - 1) · channels from which `rearranged` is faster in training: 768 channels for two rates,
# 384 for three. Measured on two CPU cores (docs/results.md), not on a GPU.
REARRANGED_FROM = 768


def shared_atrous(x, weight, rates):
    """Algorithm 1, line 4: T'_r for every rate, by the faster one of the two forms above.

    A kernel with three taps, 100, 10 and 1, on a map of one row. Each digit of a result is what one
    tap has read, and 0 is outside the map:

    >>> x = torch.tensor([[[[1.0, 2.0, 3.0, 4.0, 5.0]]]])
    >>> weight = torch.tensor([[[[0.0, 0.0, 0.0], [100.0, 10.0, 1.0], [0.0, 0.0, 0.0]]]])
    >>> for y in shared_atrous(x, weight, rates=(1, 2)):
    ...     print(y.flatten().tolist())
    [12.0, 123.0, 234.0, 345.0, 450.0]
    [13.0, 24.0, 135.0, 240.0, 350.0]
    """
    if (len(rates) - 1) * x.shape[1] >= REARRANGED_FROM:
        return rearranged(x, weight, rates)
    return separate(x, weight, rates)


# ------------------------------------------------------------------------------------------- layers


class KSAC(nn.Module):
    """The head of Fig. 2.3: `[N, in_channels, H, W]` -> `[N, channels, H, W]`."""

    def __init__(self, in_channels, rates=(6, 12, 18), channels=256):
        super().__init__()
        self.rates = tuple(rates)
        self.pointwise = Conv2dNormActivation(in_channels, channels, 1)
        pooled = Conv2dNormActivation(in_channels, channels, 1)
        self.image_level = nn.Sequential(nn.AdaptiveAvgPool2d(1), pooled)
        self.kernel = nn.Parameter(nn.Conv2d(in_channels, channels, 3).weight.detach())  # line 2
        # One for each rate: K is made before the loop, BATCHNORM is called inside it. Sect. 2.4.3
        # says that more rates add no parameters; these are 2·channels per rate.
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in self.rates)
        # Algorithm 1 sums the rates. Table 2.1's cost fits concatenated rates instead (inferred).
        # Concatenation below, projection and dropout 0.1 are DeepLabv3's.
        project = Conv2dNormActivation(3 * channels, channels, 1)
        self.project = nn.Sequential(project, nn.Dropout(0.1))

    def pyramid(self, x):
        """ReLU(B_r), a list of maps `[N, channels, H, W]`, one for each rate."""
        maps = shared_atrous(x, self.kernel, self.rates)  # T'_r  line 4
        return [F.relu(norm(T_r)) for norm, T_r in zip(self.norms, maps)]  # B_r = norm(T_r)  line 5

    def forward(self, x):
        pyramid = sum(self.pyramid(x))  # Σ_r ReLU(B_r)  [N, channels, H, W]
        image_level = self.image_level(x).expand_as(pyramid)  # one value per channel and image
        return self.project(torch.cat([self.pointwise(x), pyramid, image_level], 1))


# ------------------------------------------------------------------------------------------ network


class KSACNet(nn.Module):
    """Backbone, KSAC, classifier, bilinear upsampling of the logits: DeepLab's frame (Sect. 2.2).

    net(images): float `[N, 3, H, W]` -> logits float32 `[N, num_classes, H, W]`. net(images,
    labels), labels int64 `[N, H, W]`, 255 = ignored -> dict of the scalar loss "cross_entropy".
    Raises ValueError for a training batch of one image: the image-level branch has batch norm.
    Ours: over evaluate.py's --scales 0.5 0.7 1 1.4 2 the mIoU should fall less than with "aspp".

    option          values                                default        thesis
    head            "ksac", "aspp", "fcn"                 "ksac"         Table 2.1
    rates           of KSAC or ASPP, for output stride 16 (6, 12, 18)    Sect. 2.4.1
    extra_rates     further rates, KSAC only: (1, 24)     ()             Table 2.2
    decoder         True: DeepLabv3+'s                    False          Table 2.1 (D)
    output_stride   of the backbone: 8, 16; ours: 32      16             Table 2.1 (OS)
    """

    caption = "The same channels at each rate; KSAC has one kernel. Near borders it reads padding."

    def __init__(self, num_classes, backbone="resnet50", weights=None, *, head="ksac",
                 rates=(6, 12, 18), extra_rates=(), decoder=False, output_stride=16):  # fmt: skip
        super().__init__()
        backbones.check_choices(head=(head, ("ksac", "aspp", "fcn")))
        for name, value, fewest in ("rates", rates, 1), ("extra_rates", extra_rates, 0):
            listed = isinstance(value, (tuple, list)) and len(value) >= fewest
            if not listed or not all(type(rate) is int and rate >= 1 for rate in value):
                raise ValueError(f"{name}={value!r}: expected whole numbers from 1 on: (6, 12, 18)")
        grid = (1, 2, 4) if str(backbone).startswith("resnet") else None  # multi-grid; not stated
        self.backbone = backbones.build(backbone, output_stride, weights, grid)
        low, high = self.backbone.channels[0], self.backbone.channels[-1]
        if head == "ksac":  # ASPP ignores extra_rates: rate 24 makes it worse (Sect. 2.4.3)
            rates = sorted([*rates, *extra_rates])
        # At output stride 8 they double, as in DeepLabv3+. Sect. 2.4.1 gives (6, 12, 18) for all of
        # Table 2.1. Its FLOPs at stride 8 fit (12, 24, 36), padding counted: docs/results.md.
        rates = [max(1, rate * 16 // output_stride) for rate in rates]
        # car.py acts on the input of `regularized`, a batch norm.
        if head == "ksac":
            self.head, self.regularized = KSAC(high, rates), "head.project.0.1"
        elif head == "aspp":
            self.head, self.regularized = ASPP(high, rates), "head.project.1"
        else:
            self.head, self.regularized = FCN(high), "head.0.1"
        if decoder:
            self.backbone.reads(0, 3)  # freezes what only levels 1 and 2 need
            self.decoder = backbones.Decoder(256, low)
            self.stride, self.regularized = 4, "decoder.fuse.1.1"
        else:
            self.backbone.reads(3)
            self.decoder, self.stride = None, self.backbone.strides[-1]
        self.classifier = nn.Conv2d(256, num_classes, 1)
        self.warned = False

    def forward(self, images, labels=None):
        maps = self.backbone(images)  # finest first
        if self.training and not torch.compiler.is_compiling():
            self.check_rates(*maps[-1].shape[2:])
        x = self.head(maps[-1])
        if self.decoder is not None:
            x = self.decoder(x, maps[0], self.backbone.resize)
        logits = self.backbone.upsample(self.classifier(x), self.stride, images.shape[2:])
        if labels is None:
            return logits
        backbones.check_labels(labels, images, self.classifier.out_channels)
        return {"cross_entropy": backbones.pixel_cross_entropy(logits, labels)}

    def check_rates(self, h, w):
        """A warning, the first time that a rate is at least both sides of a map of h x w."""
        beyond = [str(rate) for rate in getattr(self.head, "rates", ()) if rate >= max(h, w)]
        if beyond and not self.warned:
            self.warned = True
            text = f"at rate {', '.join(beyond)} only the centre tap reads a map of {h}x{w}, the "
            text += "others padding; take larger crops, or smaller rates: --option rates=[1,2,3]"
            warnings.warn(text, stacklevel=1)

    @torch.no_grad()
    def figures(self, image):
        """Fig. 2.4 for one image `[3, H, W]` or `[1, 3, H, W]`: 25 feature maps of each rate.

        Each picture `[5·(h + 1), 5·(w + 1)]` is a 5x5 grid of maps, each scaled to 0…1, with NaN
        between them. The first maps, after ReLU: the thesis does not say which it shows. Keys name
        the rates at this output stride. Empty for head="fcn". ValueError in training mode.
        """
        image = backbones.one_image(self, image)
        if isinstance(self.head, FCN):
            return {}
        figures, x = {}, self.backbone(image)[-1]
        for r, y in zip(self.head.rates, self.head.pyramid(x)):
            note = "" if r < max(x.shape[2:]) else " (beyond the map: centre tap alone)"
            name = f"atrous rate {r}{note}: 25 channels"
            figures[f"{name} | 0 | largest of each"] = tiled(y[0, :25])
        return figures


def tiled(maps):
    """25 maps `[25, h, w]`, each scaled to 0…1, in one picture, a position of NaN apart."""
    maps = maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-6)
    maps = F.pad(maps, (0, 1, 0, 1), value=torch.nan)
    h, w = maps.shape[1:]
    return maps.reshape(5, 5, h, w).transpose(1, 2).reshape(5 * h, 5 * w)


# ------------------------------------------------------------------------ compared heads, recipes


class ASPP(deeplabv3.ASPP):
    """The baseline, a kernel for each rate (Sect. 2.2.1): torchvision's, with dropout 0.1."""

    def __init__(self, in_channels, rates=(6, 12, 18), channels=256):
        super().__init__(in_channels, rates, channels)
        self.rates = tuple(rates)
        self.project[-1].p = 0.1

    def pyramid(self, x):
        """The branches of the rates, a list of maps `[N, channels, H, W]`."""
        return [branch(x) for branch in self.convs[1:-1]]  # the first is 1x1, the last image-level


class FCN(nn.Sequential):
    """No context: a 1x1 convolution, inferred from the costs of Table 2.1's first row."""

    def __init__(self, in_channels, channels=256):
        super().__init__(Conv2dNormActivation(in_channels, channels, 1), nn.Dropout(0.1))


_COMMON = dict(
    backbone="xception65",  # Table 2.1's best
    # Sect. 2.3.2 says ImageNet for ADE20K. torchvision has no weights of Xception: --weights PATH.
    weights="imagenet",
    output_stride=16, option=dict(decoder=True),  # Sect. 2.4.4: with it nearly as good as 8
    optimizer="sgd", batch_size=16,  # Sect. 2.3.2, with Xception; MobileNetV2: 32
    crop_size=513,  # Sect. 2.3.1.5; cropped on ADE20K too, where Sect. 2.4.5 says "resize"
    scale=(0.5, 2.0), scale_step=0.25, color="none",  # Sect. 2.3.1.5
    momentum=0.9,  # Sect. 2.3.2, said of ADE20K
    power=0.9, bn_momentum=0.0003,  # open; DeepLab's, whose decay is 0.9997
    weight_decay=4e-5,  # open; DeepLabv3+'s with Xception
)  # fmt: skip
_VOC = _COMMON | dict(option=dict(decoder=True, extra_rates=(1, 24)))  # Table 2.2's best
RECIPES = {
    # Ours, as SHAPES in train.py: rates that fit a map of 7x7.
    "shapes": dict(option=dict(rates=(1, 2, 3), decoder=True)),
    # VOC 2012 in three stages (Sect. 2.3.2), each from the one before: --init RUN/last.pt. Stage 1
    # is on COCO, SBD and VOC mixed; here on COCO alone, its greater part (60K images, 2.3.1.3).
    "coco_voc": _VOC | dict(iterations=300_000, lr=1e-3),
    "pascal_voc_aug": _VOC | dict(iterations=40_000, lr=4e-4),
    "pascal_voc": _VOC | dict(iterations=30_000, lr=2e-4),  # iterations are open; DeepLabv3's
    # Sect. 2.3.2: "manually reduced in half about every 30K iterations"; how many is open.
    "ade20k": _COMMON | dict(iterations=150_000, lr=2e-3, halve_every=30_000),
    # The thesis gives the crop size alone (Sect. 2.3.1.5); iterations and lr are DeepLabv3's.
    "cityscapes": _COMMON | dict(iterations=90_000, lr=7e-3, crop_size=769),
}


def build(num_classes, backbone="resnet50", *, weights=None, **options):
    """A KSACNet. `options` are its keywords; ValueError for an unknown one."""
    return KSACNet(num_classes, backbone, weights, **backbones.check_options(KSACNet, options))
