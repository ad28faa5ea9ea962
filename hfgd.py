"""High-level Feature Guided Decoder (HFGD).

Ye Huang, Di Kang, Shenghua Gao, Wen Li, Lixin Duan, 2023, https://arxiv.org/abs/2303.08646.
Sections, figures and tables have the paper's numbers; it numbers no equation.

The idea. The last map of a backbone is coarse, but its features are close to the classes. The finer
maps have the details, but their features are far from the classes. An upsampler that joins them
starts from random weights, and its noisy gradients harm the pretrained backbone and the classifier.
So the class kernels, the last 1x1 convolution, learn from the coarse features alone. The upsampler
learns to make fine features that the same kernels classify. Its gradients go no further.

The mathematics. B4, B8, B16, B32 are the backbone's maps at strides 4 to 32, n is the output
stride, 4, 2 or 1. W [K, 256] and b [K] are the class kernels. sg stops the gradient.

    Z = CAE(B32)                                  [N, 256, H/32, W/32]  -> ContextAugmentedEncoder
    U = U-SFPN(sg(B4), sg(B8), sg(B16), sg(Z))    [N, 256, H/n, W/n]    -> UltraSemanticFPN
    coarse logits = W·Z + b                       [N, K, H/32, W/32]
    fine logits = sg(W)·(U + AA(U)) + sg(b)       [N, K, H/n, W/n] -> HighLevelFeatureGuidedModule
    AA: axial attention                                                 -> AxialAttention

Fig. 3; // is a stopped gradient. L = L_coarse + L_fine + CAR's three losses:

    image --> backbone --B32--> CAE --Z------------> class kernels --> coarse logits --> L_coarse
                 |               | +--> CAR            |
                 //              //                    //
                 |               |                     |
                 +-B4,B8,B16-> U-SFPN --U--> U+AA(U) --> class kernels --> fine logits --> L_fine

    who learns from        backbone   CAE                      class kernels   U-SFPN   AA
    L_coarse                 yes      yes                      yes             no       no
    L_fine                   no       no                       no              yes      yes
    CAR's three losses       yes      but the last convolution no              no       no
    guided=False: L_fine     yes      yes                      yes             yes      (no AA)

At inference the fine logits are the result. Read first `HFGD.forward`, then the layers from the
top. Tests: tests/test_hfgd.py. To copy: this file, car.py and backbones.py.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.ops import Conv2dNormActivation

import backbones
from car import OCR, ClassAwareRegularization, SelfAttention, labels_at, pyramid_pool

# ---------------------------------------------------------------------------------------- attention


def attend(query, value):
    """Each position attends to all positions of its column: softmax_m(q_ijᵀ q_mj) v_mj, over m.

    query `[N, c, H, W]`, which is the key too, value `[N, C, H, W]`, C a multiple of c ->
    `[N, C, H, W]`, of value's dtype. In float32, because an unscaled product can exceed float16.
    The `[N, W, H, H]` weights are not materialised (measured on the CPU). Its fused kernel needs
    values as wide as queries: they are split into C/c parts, as heads that share one query.
    """
    if query.requires_grad:
        # On the CPU, batch norm's backward pass misreads permuted gradients of one-column maps.
        query.register_hook(lambda gradient: None if gradient is None else gradient.contiguous())
    (N, C, H, W), dtype = value.shape, torch.promote_types(query.dtype, torch.float32)
    # Columns come first, channels last in memory, which the fused kernels ask for.
    q, v = (x.to(dtype).permute(0, 3, 2, 1).contiguous() for x in (query, value))  # [N, W, H, …]
    v = v.reshape(N * W, H, -1, q.shape[3]).transpose(1, 2)  # [NW, C/c, H, c]
    q = q.reshape(N * W, 1, H, -1).expand(v.shape)
    with torch.autocast(query.device.type, enabled=False):
        y = F.scaled_dot_product_attention(q, q, v, scale=1.0)  # [NW, C/c, H, c]
    return y.transpose(1, 2).reshape(N, W, H, C).permute(0, 3, 2, 1).to(value.dtype)


class AxialAttention(nn.Module):
    """x + AA(x), `[N, channels, H, W]` -> the same: along the columns, then along the rows.

    The paper names the layer only. As in CAA, of the same authors: queries are keys too, 64
    channels, no scale; values have batch norm and ReLU. released: a ReLU after the queries.
    """

    def __init__(self, channels=256, released=False):
        super().__init__()
        self.theta, self.phi = self.query(channels, released), self.query(channels, released)
        self.g = Conv2dNormActivation(channels, channels, 1)
        nn.init.dirac_(self.g[0].weight)  # so AA(x) starts near a multiple of x

    @staticmethod
    def query(channels, released):
        """1x1 convolution, batch norm. A query's product with itself starts near 32 either way."""
        act = nn.ReLU if released else None
        layer = Conv2dNormActivation(channels, 64, 1, activation_layer=act)
        nn.init.kaiming_normal_(layer[0].weight, nonlinearity="relu")
        nn.init.constant_(layer[1].weight, 1.0 if released else 0.7)
        return layer

    def forward(self, x):
        y = attend(self.theta(x), self.g(x))
        return x + attend(self.phi(x).mT, y.mT).mT


# --------------------------------------------------------------------------------------- upsampling


class SemanticFPN(nn.Module):
    """Four maps of strides 4, 8, 16, 32, finest first -> `[N, width, h, w]` at stride 4 / 2^blocks.

    Kirillov et al., CVPR 2019, with batch norm as all layers here. A leading convolution on each
    map, added up from the coarsest down. A branch then takes each sum to stride 4 by 3x3
    convolutions, each followed by 2x upsampling; the finest has one convolution and no upsampling.
    blocks: that many conv-upsamples more in every branch. kernel: of the leading convolutions.
    """

    def __init__(self, channels, width=256, kernel=1, blocks=0):
        super().__init__()
        self.channels = width
        self.leading = nn.ModuleList(Conv2dNormActivation(c, width, kernel) for c in channels)
        # FPN's 3x3 convolution on each sum would add 12.2·2^30 multiply-adds: too many for Table 5.
        self.branches = nn.ModuleList(
            nn.ModuleList(Conv2dNormActivation(width, width, 3) for _ in range(max(1, i) + blocks))
            for i in range(len(channels))
        )
        # From the authors' library of that time; Table 5 fits better with it (docs/results.md).
        self.last = Conv2dNormActivation(width, width, 1)

    def forward(self, maps, resize):
        x, total, finest = None, 0, 0
        for i in reversed(range(len(maps))):
            y = self.leading[i](maps[i])
            y = x = y if x is None else y + resize(x, 2)
            for k, conv in enumerate(self.branches[i]):
                y = conv(y if k == 0 or i == 0 and k == 1 else resize(y, 2))
            if i == 0 and len(self.branches[0]) == 1:
                finest = y  # it has stride 4 already
            else:
                total = total + y
        # Upsampling is linear, so the sum is upsampled once instead of each branch.
        return self.last(resize(total, 2) + finest)


class UltraSemanticFPN(SemanticFPN):
    """Sect. 3.3: leading 3x3 convolutions; for output stride 2 or 1 one or two blocks more."""

    def __init__(self, channels, output_stride=4, width=256):
        if output_stride not in (4, 2, 1):
            raise ValueError(f"output_stride={output_stride!r}: it is 4, 2 or 1")
        super().__init__(channels, width, kernel=3, blocks={4: 0, 2: 1, 1: 2}[output_stride])


# ----------------------------------------------------------------------------------------- guidance


class PPM(nn.Module):
    """Pyramid pooling (Zhao et al., CVPR 2017): `[N, C, h, w]` -> `[N, 2·C, h, w]`."""

    def __init__(self, channels):
        super().__init__()
        # No batch norm where pooling leaves one value per channel and image.
        norms = None, nn.BatchNorm2d, nn.BatchNorm2d, nn.BatchNorm2d
        layers = (Conv2dNormActivation(channels, channels // 4, 1, norm_layer=n) for n in norms)
        self.pools = nn.ModuleList(layers)

    def forward(self, x):
        return pyramid_pool(x, self.pools)


class ContextAugmentedEncoder(nn.Module):
    """Sect. 3.2, Table 1: the backbone's maps -> (Z `[N, width, h, w]` at the size of the last map;
    for the losses, the features before the trailing convolution, of OCR its regions' logits).

    encoder, leading, released: see HFGD. resize: the backbone's.
    """

    def __init__(self, backbone, num_classes, encoder, leading, width, released):
        super().__init__()
        *_, before, last = backbone.channels
        if encoder == "ours":
            sizes = zip([last] + [512] * len(leading), leading)
            convs = (Conv2dNormActivation(c, 512, kernel) for c, kernel in sizes)
            self.body, channels = SelfAttention(512, nn.Sequential(*convs)), 512
        elif encoder == "self_attention":
            self.body, channels = SelfAttention(last), 512
        elif encoder == "ocr":
            self.body, channels = OCR(last, before, num_classes), 1024
        elif encoder == "aspp":
            # The rates (6, 12, 18) of stride 16 at stride 32. torchvision's Dropout(0.5) is left
            # out: class kernels and upsampler would learn from its noise.
            self.body, channels = ASPP(last, (3, 6, 9), 256), 256
            self.body.project[3] = nn.Identity()
            # No batch norm: after pooling there is one value per channel and image.
            self.body.convs[4][2] = nn.Identity()
        elif encoder == "ppm":
            self.body, channels = PPM(last), 2 * last
        elif encoder == "identity":
            self.body, channels = nn.Identity(), last
        else:
            known = "'ours', 'identity', 'aspp', 'ppm', 'ocr' or 'self_attention'"
            raise ValueError(f"encoder={encoder!r}: it is {known}")
        # car.py's released form: the losses act on the output of a 1x1 convolution.
        released = released and encoder == "ours"
        self.released_conv = nn.Conv2d(512, 512, 1) if released else nn.Identity()
        fits = width is None or (encoder == "aspp" and width == 256)  # it ends in a convolution
        self.last = nn.Identity() if fits else Conv2dNormActivation(channels, width, 1)
        self.channels = channels if fits else width

    def forward(self, maps, resize):
        if isinstance(self.body, OCR):
            x, regions = self.body(maps[-1], maps[-2], resize)
            return self.last(x), regions
        x = self.released_conv(self.body(maps[-1]))
        return self.last(x), x


class HighLevelFeatureGuidedModule(nn.Module):
    """Sect. 3.1: U `[N, 256, h, w]` of the upsampler -> fine logits `[N, K, h, w]`.

    kernels: the class kernels, which learn elsewhere. axial: axial attention on U, which takes the
    gradient of one pixel to all others (Table 2). stop_kernels: see HFGD.
    """

    def __init__(self, width=256, axial=True, stop_kernels=True, released=False):
        super().__init__()
        self.attention = AxialAttention(width, released) if axial else nn.Identity()
        self.stop_kernels = stop_kernels

    def forward(self, u, kernels):
        weights = dict(kernels.named_parameters())
        if self.stop_kernels:
            weights = {name: weight.detach() for name, weight in weights.items()}
        return functional_call(kernels, weights, self.attention(u))


# ------------------------------------------------------------------------------------------ network


class HFGD(nn.Module):
    """Backbone, context-augmented encoder, upsampler, guided module (Fig. 3).

    net(images): float `[N, 3, H, W]` -> logits float32 `[N, num_classes, H, W]`. net(images,
    labels), labels int64 `[N, H, W]`, 255 = ignored -> dict of scalar losses: "fine", with an
    upsampler; "coarse", if guided or without one; with "ours" CAR's "intra_c2p", "inter_c2c",
    "inter_c2p"; with "ocr" "auxiliary", of weight 0.4. The others have weight 1; the paper does not
    say.

    option         values                                            default   paper
    output_stride  of the fine logits: 4, 2, 1                       4         Tables 5, 8, Sect. 9
    encoder        "ours", "identity", "aspp", "ocr", "ppm",         "ours"    Table 1, Sect. 3.2
                   "self_attention": CAR's baseline, one leading 3x3 convolution
    leading        kernels of the leading convolutions of "ours"     (1, 1)    Sect. 3.2
    car            False: "ours" without CAR's losses                True      Sect. 3.2
    upsampler      "usfpn"; "sfpn": SemanticFPN, stride 4 only; None "usfpn"   Tables 1, 3
    width          channels of U and Z; 128 is SemanticFPN's own     256       App. A.1
    guided         False: one cross entropy, no stops, no AA         True      Tables 1, 2, 4, 5
    axial          False: without axial attention                    True      Table 2
    stop_features  False: L_fine trains backbone and CAE too         True      ours; Sect. 3.1
    stop_kernels   False: L_fine trains the class kernels too        True      ours; Sect. 3.1
    released       True: as the code of CAR and CAA; HFGD has none   False
    **terms        intra, inter_c2c, inter_c2p, centers, literal, … of car.ClassAwareRegularization

    SemanticFPN of Table 5 is encoder="identity", upsampler="sfpn", guided=False. Table 10's
    ConvNeXt V2 is not in backbones.py. With stopped features no loss reaches the layer norms on the
    finer maps (Swin, ConvNeXt) or HRNet's last fusions into them; OCR reads the last but one.
    """

    caption = "The same class kernels read coarse and fine features. Compare thin things."

    def __init__(self, num_classes, backbone="resnet50", weights=None, *, output_stride=4,
                 encoder="ours", leading=(1, 1), car=True, upsampler="usfpn", width=256,
                 guided=True, axial=True, stop_features=True, stop_kernels=True, released=False,
                 **terms):  # fmt: skip
        super().__init__()
        if upsampler not in ("usfpn", "sfpn", None):
            raise ValueError(f"upsampler={upsampler!r}: it is 'usfpn', 'sfpn' or None")
        if not isinstance(width, int) or width < 8 or width % 8:
            raise ValueError(f"width={width!r}: expected a multiple of 8")
        odd = isinstance(leading, (tuple, list)) and all(k in (1, 3, 5, 7, 9) for k in leading)
        if not (leading and odd):
            raise ValueError(f"leading={leading!r}: expected odd kernel sizes, as in (1, 1)")
        if terms and (encoder != "ours" or not car):
            raise ValueError(
                f"{', '.join(terms)}: only encoder='ours' with car=True has such losses"
            )
        if upsampler == "sfpn" and output_stride != 4:
            raise ValueError(f"output_stride={output_stride}: upsampler='sfpn' has 4 alone")
        self.backbone = backbones.build(backbone, 32, weights)
        for module in self.backbone.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-6  # Sect. 4
        self.guided, self.stop_features = guided and upsampler is not None, stop_features
        if upsampler is None or (self.guided and stop_features):  # no gradient to the finer maps
            self.backbone.reads(*([2, 3] if encoder == "ocr" else [3]))
        # Without guidance "identity" is the last map as it is (Table 1).
        z_width = None if encoder == "identity" and not self.guided else width
        options = encoder, leading, z_width, released
        self.encoder = ContextAugmentedEncoder(self.backbone, num_classes, *options)
        levels = (*self.backbone.channels[:-1], self.encoder.channels)
        self.upsampler = self.guide = self.car = None
        self.stride = output_stride if upsampler else self.backbone.strides[-1]
        if upsampler == "sfpn":
            self.upsampler = SemanticFPN(levels, width)
        elif upsampler == "usfpn":
            self.upsampler = UltraSemanticFPN(levels, output_stride, width)
        if self.guided:
            self.guide = HighLevelFeatureGuidedModule(width, axial, stop_kernels, released)
        self.classifier = nn.Conv2d((self.upsampler or self.encoder).channels, num_classes, 1)
        self.regularized = "encoder.last" if encoder == "ours" else "classifier"  # Sect. 3.2
        if encoder == "ours" and car:
            self.car = ClassAwareRegularization(num_classes, 512, released=released, **terms)

    def forward(self, images, labels=None):
        size, resize, maps = images.shape[2:], self.backbone.resize, self.backbone(images)
        z, for_losses = self.encoder(maps, resize)
        logits, stop = {}, self.guided and self.stop_features
        if self.upsampler is not None:
            levels = [level.detach() if stop else level for level in (*maps[:-1], z)]
            u = self.upsampler(levels, resize)
            fine = self.guide(u, self.classifier) if self.guided else self.classifier(u)
            logits["fine"] = fine, self.stride
        if self.upsampler is None or self.guided and labels is not None:
            logits["coarse"] = self.classifier(z), self.backbone.strides[-1]
        upsample = self.backbone.upsample
        logits = {name: upsample(y, stride, size) for name, (y, stride) in logits.items()}
        if labels is None:
            return logits.popitem()[1]
        backbones.check_labels(labels, images, self.classifier.out_channels)
        losses = {name: backbones.pixel_cross_entropy(y, labels) for name, y in logits.items()}
        if isinstance(self.encoder.body, OCR):
            regions = upsample(for_losses, self.backbone.strides[-2], size)
            losses["auxiliary"] = 0.4 * backbones.pixel_cross_entropy(regions, labels)
        if self.car is not None:
            stride = self.backbone.strides[-1]
            pixels = [self.backbone.positions(stride, n) for n in for_losses.shape[2:]]
            losses |= self.car(for_losses, labels_at(labels, for_losses.shape[2:], pixels))
        return losses

    @torch.no_grad()
    def figures(self, image):
        """In the manner of Figs. 4, 5: the predictions from coarse and fine features of one image
        `[3, H, W]` or `[1, 3, H, W]`, label maps. Empty if not guided. ValueError in training mode.
        """
        image = backbones.one_image(self, image)
        if not self.guided:
            return {}
        z = self.encoder(self.backbone(image), self.backbone.resize)[0]
        stride, size = self.backbone.strides[-1], image.shape[2:]
        coarse = self.backbone.upsample(self.classifier(z), stride, size)
        fine = f"prediction from fine features, stride {self.stride}"
        predictions = {
            f"prediction from coarse features, stride {stride}": coarse,
            fine: self(image),
        }
        return {name: y.argmax(1)[0] for name, y in predictions.items()}


# Sect. 4. The paper does not give crops (but for Sect. 7.2), scales, momentum, power, brightness:
# CAR's, by the same authors. Nor which checkpoint of ConvNeXt or Swin: --weights takes a path.
_ABLATION = dict(
    backbone="resnet50", weights="imagenet", iterations=30_000, batch_size=16, optimizer="sgd",
    lr=0.01, power=0.9, momentum=0.9, weight_decay=1e-4, bn_momentum=0.0003, crop_size=513,
    scale=(0.5, 2.0), scale_step=0.1, color="brightness",
)  # fmt: skip
_SOTA = _ABLATION | dict(
    backbone="convnext_large", iterations=40_000, optimizer="adamw", lr=4e-5, weight_decay=0.05,
    color="photometric",
)  # fmt: skip
RECIPES = {
    # Sects. 5.1 to 5.5. For Sect. 5.6, Table 6: --backbone convnext_large --iterations 40000
    # --optimizer adamw --lr 4e-5 --weight-decay 0.05 --color photometric. Swin-Large: 40000 too.
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
