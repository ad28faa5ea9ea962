"""High-level Feature Guided Decoder (HFGD).

Ye Huang, Di Kang, Shenghua Gao, Wen Li, Lixin Duan, 2023, https://arxiv.org/abs/2303.08646.
Sections, figures and tables have the paper's numbers. It prints no equations: these are ours.

The idea. The last map of a backbone is coarse, but its features are close to the classes. The finer
maps have the details, but their features are far from the classes. An upsampler that joins them
starts from random weights, and its noisy gradients harm the pretrained backbone and the classifier.
So the class kernels, the last 1x1 convolution, learn from the coarse features alone. The upsampler
learns to make fine features that the same kernels classify. Its gradients go no further.

The mathematics. B4, B8, B16, B32 are the backbone's maps at strides 4 to 32, n is the output
stride, 4, 2 or 1. P [K, 256] and b [K] are the kernels of K classes. sg stops the gradient.

    Z = CAE(B32)                                  [N, 256, H/32, W/32]  -> ContextAugmentedEncoder
    U = U-SFPN(sg(B4), sg(B8), sg(B16), sg(Z))    [N, 256, H/n, W/n]    -> UltraSemanticFPN
    coarse logits = P·Z + b                       [N, K, H/32, W/32]
    fine logits = sg(P)·(U + AA(U)) + sg(b)       [N, K, H/n, W/n] -> HighLevelFeatureGuidedModule
    AA: axial attention; adding it to U is ours                         -> AxialAttention

Fig. 3; // is a stopped gradient. L = L_coarse + L_fine + CAR's three losses:

    image -> backbone -B32-> CAE ---Z-----------------> class kernels -> coarse logits -> L_coarse
                |             |     |                        |
                //           CAR    //                       //
                |                   |                        |
                +---B4,B8,B16---> U-SFPN --U--> U + AA(U) -> class kernels -> fine logits -> L_fine

The example in `HFGD.forward` prints who learns from what. At inference the fine logits are the
result. Read first `HighLevelFeatureGuidedModule`, then what follows it. Tests: tests/test_hfgd.py.
To copy: this file, car.py and backbones.py.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.ops import Conv2dNormActivation

import backbones
from car import OCR, ClassAwareRegularization, SelfAttention, labels_at

# ------------------------------------------------------------------------------------------- layers


class HighLevelFeatureGuidedModule(nn.Module):
    """Sect. 3.1: U `[N, width, h, w]` of the upsampler -> fine logits `[N, K, h, w]`.

    kernels: the class kernels. They learn from Z, not from U. So U has to come close to Z. axial:
    axial attention takes the gradient of one pixel to all others. The other options: see HFGD.
    """

    def __init__(self, width=256, axial=True, stop_kernels=True, released=False):
        super().__init__()
        self.attention = AxialAttention(width, released) if axial else nn.Identity()
        self.stop_kernels = stop_kernels

    def forward(self, u, kernels):
        weights = dict(kernels.named_parameters())
        if self.stop_kernels:
            weights = {name: weight.detach() for name, weight in weights.items()}
        # It is F.conv2d(x, P.detach(), b.detach()), and hooks on the kernels see x.
        return functional_call(kernels, weights, self.attention(u))


class ContextAugmentedEncoder(nn.Module):
    """Sect. 3.2: the backbone's maps -> three results: Z `[N, width, h, w]`, as large as the last
    map; the features before the trailing convolution; the logits of OCR's regions, or None.

    Table 1's "Ours": leading convolutions, self-attention regularised by CAR, a trailing
    convolution. In the paper two leading 1x1 ones are better than 3x3 (mIoU 50.76, 50.42) or one.
    width None: no trailing convolution. resize: the backbone's. The other options: see HFGD.
    """

    def __init__(self, backbone, num_classes, encoder, leading, width, released):
        super().__init__()
        if encoder == "ours":
            convs, channels = [], backbone.channels[-1]
            for kernel in leading:
                convs.append(Conv2dNormActivation(channels, 512, kernel))
                channels = 512
            self.body = SelfAttention(channels, nn.Sequential(*convs))
        else:
            self.body, channels = other_encoder(encoder, backbone.channels, num_classes)
        # In CAR's released code the losses act on the output of a 1x1 convolution.
        self.released_conv = nn.Conv2d(512, 512, 1) if released else nn.Identity()
        fits = width is None or (encoder == "aspp" and width == channels)  # ASPP has this one
        self.last = nn.Identity() if fits else Conv2dNormActivation(channels, width, 1)
        self.channels = channels if fits else width

    def forward(self, maps, resize):
        if isinstance(self.body, OCR):
            x, regions = self.body(maps[-1], maps[-2], resize)
        else:
            x, regions = self.released_conv(self.body(maps[-1])), None
        return self.last(x), x, regions


class UltraSemanticFPN(nn.Module):
    """Sect. 3.3: B4, B8, B16, Z -> U `[N, width, h, w]` at output stride n = 4, 2 or 1.

    A leading 3x3 convolution on each map, against the noise of low-level features. From the
    coarsest down, each result is upsampled and added to the next finer one. Each sum has a branch
    of 3x3 convolutions and 2x upsampling, and the branches are added up:

        stride   n = 4
             4   conv                            n = 2 adds one "conv, up" to each branch,
             8   conv, up                        n = 1 adds two.
            16   conv, up, conv, up
            32   conv, up, conv, up, conv, up

    kernel: of the leading convolutions. No map of stride 2 is read: Swin and ConvNeXt have none.
    """

    def __init__(self, channels, output_stride=4, width=256, kernel=3):
        super().__init__()
        more = (4, 2, 1).index(output_stride)  # additional convolutions in each branch
        self.channels = width
        self.leading = nn.ModuleList(Conv2dNormActivation(c, width, kernel) for c in channels)
        # FPN's 3x3 convolution per sum is omitted: Table 5 rules out its 12.2·2^30 multiply-adds.
        self.branches = nn.ModuleList()
        for convs in (1, 1, 2, 3):
            branch = [Conv2dNormActivation(width, width, 3) for _ in range(convs + more)]
            self.branches.append(nn.ModuleList(branch))
        # From the authors' library of that time; Table 5 fits better with it (docs/results.md).
        self.last = Conv2dNormActivation(width, width, 1)

    def forward(self, maps, resize):
        sums = [conv(x) for conv, x in zip(self.leading, maps)]
        for i in (2, 1, 0):
            sums[i] = sums[i] + resize(sums[i + 1], 2)
        total = 0
        for i, branch in enumerate(self.branches):
            y = sums[i]
            for k, conv in enumerate(branch):
                y = conv(y)
                if i > 0 or k > 0:  # the first convolution of stride 4 is not followed by "up"
                    y = resize(y, 2)
            total = total + y
        return self.last(total)


class AxialAttention(nn.Module):
    """x + AA(x), `[N, channels, H, W]` -> the same.

    The paper cites Ho et al., Wang et al. and CAA, no details; full self-attention costs too much
    at stride 4 or 2. CAA's layer is our choice: queries are keys too, 64 channels, no scale; values
    have batch norm and ReLU. Ours too: the sum, the initial weights. released: queries have a ReLU.
    """

    def __init__(self, channels=256, released=False):
        super().__init__()
        self.theta, self.phi = self.query(channels, released), self.query(channels, released)
        self.g = Conv2dNormActivation(channels, channels, 1)
        nn.init.dirac_(self.g[0].weight)  # so AA(x) starts near a multiple of x

    @staticmethod
    def query(channels, released):
        act = nn.ReLU if released else None
        layer = Conv2dNormActivation(channels, 64, 1, activation_layer=act)
        nn.init.kaiming_normal_(layer[0].weight, nonlinearity="relu")
        # q·q starts near 64·0.7² = 31, after a ReLU near 32: the softmax starts equally peaked.
        nn.init.constant_(layer[1].weight, 1.0 if released else 0.7)
        return layer

    def forward(self, x):
        theta = backbones.contiguous_gradient(self.theta(x))
        phi = backbones.contiguous_gradient(self.phi(x))
        y = attend(theta, self.g(x))  # along the columns
        return x + attend(phi.mT, y.mT).mT  # along the rows


def attend(query, value):
    """Each position attends to its column: y_ij = Σ_m softmax_m(q_ijᵀ q_mj) v_mj.

    query `[N, c, H, W]`, which is the key too, value `[N, C, H, W]`, C a multiple of c ->
    `[N, C, H, W]`, of value's dtype. In float32, because an unscaled product can exceed float16.
    PyTorch's fused kernels do not materialise the `[N, W, H, H]` weights (measured on the CPU).
    They need values as wide as queries: v is split into C/c parts, as heads that share one query.
    """
    N, C, H, W = value.shape
    c, dtype = query.shape[1], torch.promote_types(query.dtype, torch.float32)
    # Columns come first, channels last in memory, which the fused kernels ask for.
    q = query.to(dtype).permute(0, 3, 2, 1).contiguous()  # [N, W, H, c]
    v = value.to(dtype).permute(0, 3, 2, 1).contiguous()  # [N, W, H, C]
    v = v.reshape(N * W, H, C // c, c).transpose(1, 2)  # [NW, C/c, H, c]
    q = q.reshape(N * W, 1, H, c).expand(v.shape)
    with torch.autocast(query.device.type, enabled=False):
        y = F.scaled_dot_product_attention(q, q, v, scale=1.0)  # [NW, C/c, H, c]
    return y.transpose(1, 2).reshape(N, W, H, C).permute(0, 3, 2, 1).to(value.dtype)


# ------------------------------------------------------------------------------------------ network


class HFGD(nn.Module):
    """Backbone, context-augmented encoder, upsampler, guided module (Fig. 3).

    net(images): float `[N, 3, H, W]` -> logits float32 `[N, num_classes, H, W]`. net(images,
    labels), labels int64 `[N, H, W]`, 255 = ignored -> dict of scalar losses: "fine": with an
    upsampler; "coarse": guided or without one; CAR's three: with "ours"; "auxiliary", of weight
    0.4: with "ocr". The other weights are 1: the paper does not say.

    option         values                                           default  paper
    output_stride  of the fine logits: 4, 2, 1                      4        Tables 5, 8, 9, Sect. 9
    encoder        "ours", "identity", "aspp", "ocr",               "ours"   Tables 1, 4, 5, 8, 10
                   "self_attention": CAR's baseline, one leading 3x3 convolution
    leading        kernels of the leading convolutions of "ours"    (1, 1)   Sect. 3.2
    car            False: "ours" without CAR's losses               True     no table; Sect. 3.2
    upsampler      "usfpn"; "sfpn": SemanticFPN, stride 4; None     "usfpn"  Tables 1 to 5, 8, 10
    width          channels of U and Z; 128 is SemanticFPN's own    256      Sect. 3.3, App. A.1
    guided         False: one cross entropy, no stops, no AA        True     Tab. 1, 2, 4, 5, 8, 10
    axial          False: without axial attention                   True     Table 2
    stop_features  False: L_fine trains backbone and CAE too        True     no table; Sect. 3.1
    stop_kernels   False: L_fine trains the class kernels too       True     no table; Sect. 3.1
    released       True: CAR's, CAA's code; HFGD's only announced    False
    **terms        arguments of car.ClassAwareRegularization: intra, inter_c2c, centers, …

    SemanticFPN of Tables 5, 8, 10 is encoder="identity", upsampler="sfpn", guided=False. Table 10's
    ConvNeXt V2 is not in backbones.py. With stopped features the backbone learns from its last map
    alone, with "ocr" from the last two. Layers that lead to other maps only are frozen.
    """

    caption = "One classifier reads coarse and fine features. Fine ones give the final prediction."

    def __init__(self, num_classes, backbone="resnet50", weights=None, *, output_stride=4,
                 encoder="ours", leading=(1, 1), car=True, upsampler="usfpn", width=256,
                 guided=True, axial=True, stop_features=True, stop_kernels=True, released=False,
                 **terms):  # fmt: skip
        super().__init__()
        encoders = "ours", "identity", "aspp", "ocr", "self_attention"
        upsamplers = "usfpn", "sfpn", None
        backbones.check_choices(encoder=(encoder, encoders), upsampler=(upsampler, upsamplers))
        backbones.check_choices(output_stride=(output_stride, (4, 2, 1)))
        self.guided, self.stop_features = guided and upsampler is not None, stop_features
        step = 64 if self.guided and axial else 8  # the attention's queries have 64 channels
        if not isinstance(width, int) or width < step or width % step:
            raise ValueError(f"width={width!r}: expected a multiple of {step}")
        odd = isinstance(leading, (tuple, list)) and all(k in (1, 3, 5, 7, 9) for k in leading)
        if not (leading and odd):
            raise ValueError(f"leading={leading!r}: expected odd kernel sizes, as in (1, 1)")
        if terms and (encoder != "ours" or not car):
            names = ", ".join(terms)
            raise ValueError(f"{names}: only encoder='ours' with car=True has such losses")
        if upsampler == "sfpn" and output_stride != 4:
            raise ValueError(f"output_stride={output_stride}: upsampler='sfpn' has 4 alone")
        self.backbone = backbones.build(backbone, 32, weights)
        for module in self.backbone.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-6  # Sect. 4
        if upsampler is None or (self.guided and stop_features):  # no gradient to the finer maps
            self.backbone.reads(*([2, 3] if encoder == "ocr" else [3]))
        # Without guidance "identity" is the last map as it is (Table 1).
        z_width = None if encoder == "identity" and not self.guided else width
        options = encoder, leading, z_width, released and encoder == "ours"
        self.encoder = ContextAugmentedEncoder(self.backbone, num_classes, *options)
        levels = (*self.backbone.channels[:-1], self.encoder.channels)
        self.upsampler = self.guide = self.car = None
        if upsampler == "sfpn":
            self.upsampler = SemanticFPN(levels, width)
        elif upsampler == "usfpn":
            self.upsampler = UltraSemanticFPN(levels, output_stride, width)
        if self.guided:
            self.guide = HighLevelFeatureGuidedModule(width, axial, stop_kernels, released)
        channels = self.encoder.channels if upsampler is None else width
        self.stride = self.backbone.strides[-1] if upsampler is None else output_stride
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        self.regularized = "encoder.last" if encoder == "ours" else "classifier"  # CAR's: its input
        if encoder == "ours" and car:
            self.car = ClassAwareRegularization(num_classes, 512, released=released, **terms)

    def forward(self, images, labels=None):
        """Who learns from which loss: backbone, CAE, class kernels, upsampler, guided module.

        >>> net = HFGD(2, "mobilenet_v2", width=64)
        >>> losses = net(torch.randn(1, 3, 33, 33), torch.zeros(1, 33, 33).long())
        >>> for name in ("coarse", "fine", "intra_c2p"):
        ...     net.zero_grad()
        ...     losses[name].backward(retain_graph=True)
        ...     parts = net.backbone, net.encoder, net.classifier, net.upsampler, net.guide
        ...     learns = [any(p.grad is not None for p in part.parameters()) for part in parts]
        ...     print(f"{name:9}", *("yes" if yes else " no" for yes in learns))
        coarse    yes yes yes  no  no
        fine       no  no  no yes yes
        intra_c2p yes yes  no  no  no
        """
        size, resize, upsample = images.shape[2:], self.backbone.resize, self.backbone.upsample
        coarsest, maps, logits = self.backbone.strides[-1], self.backbone(images), {}
        z, features, regions = self.encoder(maps, resize)
        if self.upsampler is not None:
            levels = [*maps[:-1], z]
            if self.guided and self.stop_features:
                levels = [level.detach() for level in levels]
            u = self.upsampler(levels, resize)
            fine = self.guide(u, self.classifier) if self.guided else self.classifier(u)
            logits["fine"] = upsample(fine, self.stride, size)
        if self.upsampler is None or (self.guided and labels is not None):
            logits["coarse"] = upsample(self.classifier(z), coarsest, size)
        if labels is None:
            return logits["coarse" if self.upsampler is None else "fine"]
        backbones.check_labels(labels, images, self.classifier.out_channels)
        losses = {name: backbones.pixel_cross_entropy(y, labels) for name, y in logits.items()}
        if regions is not None:
            regions = upsample(regions, self.backbone.strides[-2], size)
            losses["auxiliary"] = 0.4 * backbones.pixel_cross_entropy(regions, labels)
        if self.car is not None:
            pixels = [self.backbone.positions(coarsest, n) for n in features.shape[2:]]
            losses |= self.car(features, labels_at(labels, features.shape[2:], pixels))
        return losses

    @torch.no_grad()
    def figures(self, image):
        """Ours: the predictions of one network from coarse and from fine features of one image
        `[3, H, W]` or `[1, 3, H, W]`, label maps. Empty if not guided. ValueError in training mode.
        """
        image = backbones.one_image(self, image)
        if not self.guided:
            return {}
        z, _, _ = self.encoder(self.backbone(image), self.backbone.resize)
        stride = self.backbone.strides[-1]
        coarse = self.backbone.upsample(self.classifier(z), stride, image.shape[2:])
        return {
            f"prediction from coarse features, stride {stride}": coarse.argmax(1)[0],
            f"prediction from fine features, stride {self.stride}": self(image).argmax(1)[0],
        }

    def analyse(self, pairs):
        """Ours: mIoU of `figures`' two predictions, everywhere and within 3 pixels of borders."""
        if not self.guided:
            return {}
        K, counts = self.classifier.out_channels, 0
        for images, labels in pairs:
            near = labels.masked_fill(~backbones.near_border(labels), 255)
            for image, *truths in zip(images, labels, near):
                predicted = self.figures(image).values()  # from coarse, from fine features
                found = [backbones.confusion(y, at, K) for y in predicted for at in truths]
                counts = counts + torch.stack(found).view(2, 2, K, K)
        what = "features: mIoU, higher is better; fine should win, by a larger factor near borders"
        axes = "coarse features, fine features | everywhere, near border"
        return {f"{what} (3 pixels) | {axes}": backbones.iou(counts).nanmean(2)}


# -------------------------------------------------------------------------- what the tables compare


class SemanticFPN(UltraSemanticFPN):
    """Kirillov et al., CVPR 2019, here with batch norm: stride 4, leading 1x1 convolutions."""

    def __init__(self, channels, width=256):
        super().__init__(channels, 4, width, kernel=1)


def other_encoder(name, channels, num_classes):
    """Table 1's other encoders: (layer, its channels). channels: the backbone's."""
    last = channels[-1]
    if name == "self_attention":
        return SelfAttention(last), 512
    if name == "ocr":
        return OCR(last, channels[-2], num_classes), 1024
    if name == "aspp":
        aspp = ASPP(last, (3, 6, 9), 256)  # half of stride 16's rates
        aspp.convs[4][2] = nn.Identity()  # no batch norm: pooling leaves one value per channel
        aspp.project[3] = nn.Identity()  # no Dropout(0.5): the class kernels would learn its noise
        return aspp, 256
    return nn.Identity(), last


# Sect. 4, whose batch norm decay 0.9997 is bn_momentum 0.0003. Not in the paper, so as in CAR:
# crops (but for Sect. 7.2), scales, momentum, power, brightness. Open: ConvNeXt's and Swin's files.
_ABLATION = dict(backbone="resnet50", weights="imagenet", iterations=30_000, batch_size=16,
                 optimizer="sgd", lr=0.01, power=0.9, momentum=0.9, weight_decay=1e-4,
                 bn_momentum=0.0003, crop_size=513, scale=(0.5, 2.0), scale_step=0.1,
                 color="brightness")  # fmt: skip
_SOTA = _ABLATION | dict(backbone="convnext_large", iterations=40_000, optimizer="adamw", lr=4e-5,
                         weight_decay=0.05, color="photometric")  # fmt: skip
RECIPES = {
    "shapes": dict(iterations=700, option=dict(width=64)),  # ours, as SHAPES in train.py
    # Sects. 5.1 to 5.5; Swin-Large: --iterations 40000, with SGD, as Sect. 4 reads. 5.6, Table 6:
    # --backbone convnext_large --iterations 40000 --optimizer adamw --lr 4e-5 --weight-decay 0.05
    # --color photometric
    "pascal_context": _ABLATION,
    "coco_stuff164k": _SOTA,  # Sect. 6
    # Sect. 7.2; --output-stride 2 with --iterations 80000. For Sect. 7.1, Table 8: --backbone
    # resnet50 --iterations 30000 --optimizer sgd --lr 0.01 --weight-decay 1e-4 --color brightness
    "cityscapes": _SOTA | dict(crop_size=(513, 1025), iterations=60_000),
}


def build(num_classes, backbone="resnet50", *, weights=None, **options):
    """An HFGD. `options` are its keywords; ValueError for an unknown one."""
    options = backbones.check_options(HFGD, options, ClassAwareRegularization)
    return HFGD(num_classes, backbone, weights, **options)
