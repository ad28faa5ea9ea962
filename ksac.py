"""Kernel-Sharing Atrous Convolution (KSAC).

Ye Huang, Qingqing Wang, Wenjing Jia, Yue Lu, Yuxin Li, Xiangjian He: "See more than once: On the
kernel-sharing atrous convolution for semantic segmentation", Neurocomputing 2021,
https://arxiv.org/abs/1908.09443. The numbers below are those of Ye Huang's thesis "Context-aware
Image Semantic Segmentation" (University of Technology Sydney, 2022), chapter 2.

The idea: ASPP looks at a map through parallel 3x3 convolutions of several atrous rates, each with a
kernel of its own, which learns from the objects that fit its rate. KSAC has one kernel for all
rates, so it sees every object more than once, near and far; with three rates two thirds of the 3x3
weights go, and more rates cost none.

The chapter prints no numbered Eq.; its mathematics is Algorithm 1:

    Algorithm 1, line 2     the shared kernel K      -> KSAC.kernel
    Algorithm 1, line 4     T'_r = Conv2D(T, r, K)   -> shared_atrous
    Algorithm 1, line 5     B_r = BatchNorm(T'_r)    -> KSAC.pyramid (one batch norm for each rate)
    Algorithm 1, "Ensure"   Σ_r ReLU(B_r)            -> KSAC.forward
    Fig. 2.3                the three components     -> KSAC.forward
    Fig. 2.4                feature maps by rate     -> KSACNet.figures

Why more rates are cheap. With W_k, k in {-1, 0, 1}², the nine taps of the kernel,

    T'_r[p]  =  Σ_k W_k T[p + r·k]  =  Σ_k (W_k T)[p + r·k]

and the nine products W_k T are 1x1 convolutions that do not know r: they are computed once, and
each rate is a sum of nine shifted maps. So the multiply-adds of R rates are those of one 3x3
convolution.

What the paper prints and cannot mean:
- Table 2.1's FLOPs are multiply-adds in 2^30, and what KSAC saves there, 2.73G at stride 16 and
  12.65G at 8, is not due to sharing. Its ASPP is priced at the size to which TensorFlow's
  space-to-batch pads each map (33 -> 36, 65 -> 72 positions a side), its KSAC as three convolutions
  without that padding, and with ASPP's projection of 5·256 channels, as if the branches were
  concatenated: 3 · (36² - 33²) · 9·2048·256 = 2.73 · 2^30, and 12.64 for 72² - 65². Algorithm 1
  adds them up, which leaves 3·256. Sharing, as rearranged above, saves 9.70G and 37.65G, of which
  the projection 0.13G and 0.52G.
- Sect. 2.3.1.5 crops ADE20K's scaled images to 513x513 as all others, Sect. 2.4.5 resizes them to
  that size. Here: crops.

Where the paper is silent (there is no released code), as DeepLabv3+ does, on which it builds:
- The components are concatenated and projected to 256 channels (1x1, batch norm, ReLU), dropout
  0.1.
- Rates are those at output stride 16; at 8 they double (in proportion; at least 1). Table 2.1's
  prices agree.
- Multi-grid (1, 2, 4) in a ResNet's last stage, none in Xception.
Where both are silent, our choice:
- A batch norm for each rate: Algorithm 1 makes K before its loop, and calls BATCHNORM inside.
- `head="fcn"`: a 1x1 convolution to 256 channels, which is what Table 2.1's first row, without ASPP
  and KSAC, costs.
- Fig. 2.4 does not say which 25 feature maps it shows; here the first.
- Image and feature map are aligned as at the papers' 513 and 769 pixels: backbones.on_grid and
  backbones.upsample.

    Table 2.1            head, backbone, decoder, output_stride; evaluate.py --scales … --flip
    Table 2.2            rates; the recipe for VOC 2012 has the five of its last rows
    Tables 2.3, 2.4      RECIPES

To copy: this file and backbones.py. `KSAC` and what stands above it need torch and torchvision
alone.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.segmentation import deeplabv3
from torchvision.ops import Conv2dNormActivation

import backbones

# ---------------------------------------------------------------------------------------- equations


def shared_atrous(x, weight, rates, rearranged=None):
    """Algorithm 1, line 4: `Conv2D(T, r, K)` for every rate r, "same"-padded, with the one kernel.

    x `[N, I, H, W]`, weight `[O, I, 3, 3]`, rates: whole numbers of at least 1 -> a map `[N, O, H,
    W]` for each rate. Equal to one `F.conv2d(x, weight, padding=r, dilation=r)` for each; the
    module's docstring has the algebra. The products take N·9·O·H·W numbers; under autocast they are
    rounded before they are summed.

    rearranged: that form, or (False) the separate convolutions; by default what is faster. A fold
    takes about as long as a 3x3 convolution of 160 channels (two CPU cores, torch 2.15, 33x33; GPUs
    were not measured), so sharing pays for itself where (R - 1)·I > R·160: with three rates from
    about 250 channels on, with one never.
    """
    if rearranged is None:
        rearranged = len(rates) > 1 and x.shape[1] >= 256
    if not rearranged:
        return [F.conv2d(x, weight, padding=r, dilation=r) for r in rates]
    taps = (
        weight.flip(2, 3).permute(0, 2, 3, 1).flatten(0, 2)
    )  # [9·O, I]; flipped, since fold adds (W_k T)[q] to q - r·k
    products = taps @ x.flatten(2)  # W_k T  [N, 9·O, H·W]
    return [F.fold(products, x.shape[2:], 3, dilation=r, padding=r) for r in rates]  # Σ_k


# ------------------------------------------------------------------------------------------- layers


class KSAC(nn.Module):
    """The head of Fig. 2.3: `[N, in_channels, H, W]` -> `[N, channels, H, W]`."""

    def __init__(self, in_channels, rates=(6, 12, 18), channels=256):
        super().__init__()
        self.rates, self.channels = tuple(rates), channels
        self.pointwise = Conv2dNormActivation(in_channels, channels, 1)
        self.image_level = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), Conv2dNormActivation(in_channels, channels, 1)
        )
        self.kernel = nn.Parameter(nn.Conv2d(in_channels, channels, 3).weight.detach())  # line 2
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in self.rates)
        self.project = nn.Sequential(
            Conv2dNormActivation(3 * channels, channels, 1), nn.Dropout(0.1)
        )

    def pyramid(self, x):
        """ReLU(B_r) of Algorithm 1, a map `[N, channels, H, W]` for each rate."""
        T = shared_atrous(x, self.kernel, self.rates)  # line 4
        return [F.relu(norm(T_r)) for norm, T_r in zip(self.norms, T)]  # line 5

    def forward(self, x):
        y = sum(self.pyramid(x))  # Σ_r ReLU(B_r)
        return self.project(
            torch.cat([self.pointwise(x), y, self.image_level(x).expand_as(y)], dim=1)
        )


class ASPP(deeplabv3.ASPP):
    """The baseline, a kernel for each rate (Sect. 2.2.1): torchvision's, with DeepLabv3+'s dropout
    of 0.1.
    """

    def __init__(self, in_channels, rates=(6, 12, 18), channels=256):
        super().__init__(in_channels, rates, channels)
        self.rates, self.channels = tuple(rates), channels
        self.project[-1].p = 0.1

    def pyramid(self, x):
        """The branches of the rates, a map `[N, channels, H, W]` for each."""
        return [branch(x) for branch in self.convs[1:-1]]  # the first is 1x1, the last image-level


class FCN(nn.Sequential):
    """A 1x1 convolution, no context (Table 2.1's first row)."""

    def __init__(self, in_channels, channels=256):
        super().__init__(Conv2dNormActivation(in_channels, channels, 1), nn.Dropout(0.1))
        self.channels = channels


# ------------------------------------------------------------------------------------------ network


class KSACNet(nn.Module):
    """Backbone, KSAC, on request the decoder, classifier, bilinear upsampling of the logits (Sect.
    2.2).

    net(images): float `[N, 3, H, W]` -> logits float32 `[N, num_classes, H, W]`. net(images,
    labels), labels int64 `[N, H, W]`, 255 = ignored -> dict of the scalar loss "cross_entropy".
    ValueError for a training batch that leaves one value per channel to the image-level branch's
    batch norm.

    head: "ksac", "aspp" or "fcn"
    rates: atrous rates at output stride 16, (6, 12, 18) or (1, 6, 12, 18, 24) in Table 2.2; at 8
    they are twice as large
    decoder: "D" of Table 2.1, the features of stride 4 in a DeepLabv3+ decoder
    output_stride: of the backbone, 16 or 8
    """

    def __init__(
        self,
        num_classes,
        backbone="resnet50",
        weights=None,
        *,
        head="ksac",
        rates=(6, 12, 18),
        decoder=False,
        output_stride=16,
    ):
        super().__init__()
        if head not in ("ksac", "aspp", "fcn"):
            raise ValueError(f"head={head!r}: it is 'ksac', 'aspp' or 'fcn'")
        if (
            not isinstance(rates, (tuple, list))
            or not rates
            or not all(type(r) is int and r >= 1 for r in rates)
        ):
            raise ValueError(
                f"rates={rates!r}: expected whole numbers of at least 1, as in (6, 12, 18)"
            )
        grid = (1, 2, 4) if backbone.startswith("resnet") else None
        self.backbone = backbones.build(backbone, output_stride, weights, grid)
        low, *_, high = self.backbone.channels
        rates = [max(1, rate * 16 // output_stride) for rate in rates]
        self.head = FCN(high) if head == "fcn" else {"ksac": KSAC, "aspp": ASPP}[head](high, rates)
        self.decoder = (
            backbones.Decoder(self.head.channels, low, self.backbone.corners) if decoder else None
        )
        self.stride = 4 if decoder else self.backbone.strides[-1]
        self.classifier = nn.Conv2d((self.decoder or self.head).channels, num_classes, 1)

    def forward(self, images, labels=None):
        if self.training and len(images) == 1 and not isinstance(self.head, FCN):
            if not any(isinstance(module, nn.SyncBatchNorm) for module in self.head.modules()):
                raise ValueError(
                    "the image-level branch has one value of a channel in an image, and batch norm "
                    "needs more than 1 value "
                    "per channel: take a batch of at least two images for each process, or "
                    "head='fcn'"
                )
        corners = self.backbone.corners
        maps = self.backbone(backbones.on_grid(images, self.backbone.grid, corners))
        x = self.head(maps[-1])
        if self.decoder is not None:
            x = self.decoder(x, maps[0])
        logits = backbones.upsample(self.classifier(x), self.stride, images.shape[2:], corners)
        if labels is None:
            return logits
        return {"cross_entropy": backbones.pixel_cross_entropy(logits, labels)}

    @torch.no_grad()
    def figures(self, image):
        """Fig. 2.4, of one image `[3, H, W]` or `[1, 3, H, W]`: the first 25 feature maps of each
        rate, five by five.

        Each of the maps, `[5·(h + 1), 5·(w + 1)]`, is that branch of the head after ReLU, its
        channels scaled to 0…1 one by one. Their names have the rates at this output stride. Empty
        for head="fcn". ValueError in training mode.
        """
        image = backbones.one_image(self, image)
        if isinstance(self.head, FCN):
            return {}
        x = self.backbone(backbones.on_grid(image, self.backbone.grid, self.backbone.corners))[-1]
        return {
            f"rate {rate}": _tiled(y[0, :25])
            for rate, y in zip(self.head.rates, self.head.pyramid(x))
        }


def _tiled(maps):
    """25 maps `[25, h, w]`, each scaled to 0…1, in one picture, a position apart."""
    maps = F.pad(maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-6), (0, 1, 0, 1))
    h, w = maps.shape[1:]
    return maps.reshape(5, 5, h, w).transpose(1, 2).reshape(5 * h, 5 * w)


# Sect. 2.3. SGD, scales 0.5 to 2 in steps of 0.25, flip, crops of 513.
_COMMON = dict(
    backbone="xception65",  # Table 2.1's best
    # ImageNet's, said of ADE20K only: give --weights PATH (backbones.Xception65 says with which
    # names)
    weights=None,
    output_stride=16,  # Sect. 2.4.4: as good as 8 with the decoder
    option=dict(decoder=True),
    optimizer="sgd",
    batch_size=16,  # with Xception; 32 with MobileNetV2
    crop_size=513,
    scale=(0.5, 2.0),
    scale_step=0.25,
    color="none",
    momentum=0.9,  # said of ADE20K only
    power=0.9,  # open; DeepLab's (ADE20K halves instead)
    weight_decay=4e-5,  # open; DeepLabv3+'s with Xception
    bn_momentum=0.0003,  # open; DeepLab's 0.9997
)
_VOC = _COMMON | dict(option=dict(decoder=True, rates=(1, 6, 12, 18, 24)))  # Table 2.2's best
RECIPES = {
    # VOC 2012, three stages (Sect. 2.3.2), each from the one before: --init RUN/last.pt. The first
    # is on COCO, SBD and VOC mixed; a dataset of COCO's 60K images (Sect. 2.3.1.3) is its greater
    # part
    "coco_voc": _VOC | dict(iterations=300_000, lr=1e-3),
    "pascal_voc_aug": _VOC | dict(iterations=40_000, lr=4e-4),
    "pascal_voc": _VOC | dict(iterations=30_000, lr=2e-4),  # iterations are open; DeepLabv3's
    # Sect. 2.3.2, "manually reduced in half about every 30K iterations"; how many there are is open
    "ade20k": _COMMON | dict(iterations=150_000, lr=2e-3, halve_every=30_000),
    # Sect. 2.3.1.5 says the crops alone; iterations and lr are open: DeepLabv3's, the lr that of
    # VOC
    "cityscapes": _COMMON | dict(iterations=90_000, lr=7e-3, crop_size=769),
}


def build(num_classes, backbone="resnet50", *, weights=None, **options):
    """A KSACNet; `options` are its keywords. ValueError for an unknown one."""
    return KSACNet(num_classes, backbone, weights, **backbones.check_options(KSACNet, options))
