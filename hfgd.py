"""High-level Feature Guided Decoder (HFGD).

Ye Huang, Di Kang, Shenghua Gao, Wen Li, Lixin Duan: "HFGD: High-level Feature Guided Decoder for
Semantic Segmentation", https://arxiv.org/abs/2303.08646.

The idea: a backbone's last map is coarse (output stride 32), but its features are nearly those that
classify; the finer maps have the details, and a gap to the classes. So the class kernels, the last
1x1 convolution, learn from the coarse features alone. An upsampling head learns to give features
that the same kernels classify at a fine stride. What it learns stays in
it: no gradient goes from it to the kernels, to the encoder or to the backbone.

Who receives gradient from which loss (Fig. 3); each cell has a test:

                         backbone   encoder   class kernels   upsampler, axial attention
    coarse                   x         x            x
    fine                                                                 x
    CAR's three, auxiliary   x         x
    without guidance there is no "coarse", and "fine" trains all:
    fine                     x         x            x                    x

(Under guidance the layer norms of a Swin Transformer's and ConvNeXt's finer maps learn nothing, nor
do an HRNet's last fusions into its finer maps: only the upsampler reads them.)

    Sect. 3.1, Fig. 3   stopped gradients               -> HFGD.forward
    Sect. 3.1           class kernels reused            -> HighLevelFeatureGuidedModule
    Sect. 3.2           context-augmented encoder       -> ContextAugmentedEncoder
    Sect. 3.3           SemanticFPN, Ultra SemanticFPN  -> SemanticFPN, UltraSemanticFPN
    Figs. 4, 5          predictions beside each other   -> compared, HFGD.figures
The paper numbers no equation.

What the paper leaves open, and what was chosen here:
- Losses: "coarse" and "fine" are cross entropies of the logits, upsampled to the labels, with
  weight 1; CAR's are car.py's.
- CAR acts on the output of the self-attention, in front of the trailing convolution, as Sect. 3.2
  words it. (In car.py, by its paper, on what enters the classifier.) released=True is the form of
  its authors' code, with their 1x1 convolution in between; and caa.py's released=True for the axial
  attention.
- The upsampler's coarsest input is the encoder's output. SemanticFPN adds maps top-down like FPN
  (Kirillov et al., "Panoptic Feature Pyramid Networks", CVPR 2019), but without FPN's 3x3
  convolution on each of the sums: Table 5's 45.65 leave no room for their 12.2 (in 2^30, as there).
  Batch norm and ReLU follow each convolution; maps are upsampled bilinearly.
- Axial attention is caa.py's without channelization, on 256 channels, added to its input as car.py
  adds its self-attention. Its 64 query channels are that file's too; Table 5 tells of a wider one.
- ASPP's rates are 3, 6, 9 at stride 32. All but "identity" end with 256 channels; "identity" too
  where it is guided.

    Table 1     encoder, upsampler=None or "sfpn", guided=False
    Table 2     upsampler="sfpn", guided=False; axial=False; both on
    Table 3     upsampler
    Table 4     encoder, upsampler, guided=False or True
    Table 5     output_stride; SemanticFPN is encoder="identity", upsampler="sfpn", guided=False
    Tables 6-9  RECIPES, output_stride; evaluate.py --scales … --flip
    Table 10    backbone (ConvNeXt V2 is not in backbones.py)

To copy: this file, backbones.py, car.py, caa.py, and ksac.py, which car.py imports. SemanticFPN and
what stands above it need torch and torchvision alone.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.ops import Conv2dNormActivation

import backbones
import caa
import car

# --------------------------------------------------------------------------------------- upsampling


class SemanticFPN(nn.Module):
    """Four maps of strides 4, 8, 16, 32, finest first -> `[N, 256, h, w]`, at stride 4 / 2^blocks.

    A leading convolution on each map (`kernel` 1x1), added up from the coarsest down; then a branch
    of convolutions, each with an upsampling, from every stride to 4, where the finest has one
    without; the branches are added. blocks: more of them for every branch. resize: the backbone's.
    """

    def __init__(self, channels, kernel=1, blocks=0):
        super().__init__()
        self.channels, self.blocks = 256, blocks
        self.leading = nn.ModuleList(Conv2dNormActivation(c, 256, kernel) for c in channels)
        self.branches = nn.ModuleList(
            nn.ModuleList(Conv2dNormActivation(256, 256, 3) for _ in range(max(1, level) + blocks))
            for level in range(len(channels))
        )

    def branch(self, level, x, resize):
        """A level's map at the stride of the output; the finest level is upsampled once less."""
        for i, conv in enumerate(self.branches[level]):
            x = conv(x)
            x = x if level == i == 0 else resize(x, 2)
        return x

    def forward(self, maps, resize):
        coarsest = len(maps) - 1
        x = self.leading[coarsest](maps[coarsest])
        total = self.branch(coarsest, x, resize)
        for level in reversed(range(coarsest)):
            x = self.leading[level](maps[level]) + resize(x, 2)
            total = total + self.branch(level, x, resize)
        return total


class UltraSemanticFPN(SemanticFPN):
    """Sect. 3.3: SemanticFPN with leading 3x3 convolutions and, for output_stride 2 or 1, one or
    two blocks more.
    """

    def __init__(self, channels, output_stride=4):
        if output_stride not in (4, 2, 1):
            raise ValueError(f"output_stride={output_stride!r}: it is 4, 2 or 1")
        super().__init__(channels, kernel=3, blocks={4: 0, 2: 1, 1: 2}[output_stride])


# ----------------------------------------------------------------------------------------- guidance


class ContextAugmentedEncoder(nn.Module):
    """Sect. 3.2, Table 1: a backbone's maps -> Z `[N, channels, h, w]` at the last one's size, and
    what the losses need.

    encoder: "ours", two 1x1 convolutions, self-attention, a trailing 1x1 convolution;
    "self_attention" (car.py's: one 3x3 convolution before it); "ocr" (car.py's); "aspp"
    (torchvision's); "identity", the last map as it is, or where `project` behind a 1x1 convolution.
    channels: of Z, 256; for "identity" as it is the last map's. released: CAR's, of "ours" alone.
    """

    def __init__(self, backbone, num_classes, encoder="ours", project=True, released=False):
        super().__init__()
        before, last = backbone.channels[-2:]
        self.stride = backbone.strides[-1]
        if encoder == "ours":
            leading = Conv2dNormActivation(last, 512, 1), Conv2dNormActivation(512, 512, 1)
            self.body, width = car.SelfAttention(512, nn.Sequential(*leading)), 512
        elif encoder == "self_attention":
            self.body, width = car.SelfAttention(last), 512
        elif encoder == "ocr":
            self.body, width = car.OCR(last, before, num_classes), 1024
        elif encoder == "aspp":
            self.body, width = ASPP(last, (3, 6, 9), 256), 256
        elif encoder == "identity":
            self.body, width = nn.Identity(), last
        else:
            raise ValueError(
                f"encoder={encoder!r}: it is 'ours', 'identity', 'aspp', 'ocr' or 'self_attention'"
            )
        done = encoder == "aspp" or encoder == "identity" and not project
        self.linear = (
            nn.Conv2d(width, width, 1) if released and encoder == "ours" else nn.Identity()
        )
        self.last = nn.Identity() if done else Conv2dNormActivation(width, 256, 1)
        self.channels = width if done else 256
        self.car = (
            car.ClassAwareRegularization(num_classes, 512, released=released)
            if encoder == "ours"
            else None
        )

    def forward(self, maps, resize):
        """(Z, seen): for `losses` the features `[N, 512, h, w]` that CAR acts on, or OCR's regions
        `[N, K, 2h, 2w]`.
        """
        if isinstance(self.body, car.OCR):
            x, regions = self.body(maps[-1], maps[-2], resize)
            return self.last(x), regions
        x = self.linear(self.body(maps[-1]))
        return self.last(x), x

    def losses(self, seen, labels, backbone):
        """CAR's of "ours"; "auxiliary" of OCR, 0.4 of its regions' cross entropy. labels `[N, H,
        W]`, 255 = ignored.
        """
        if self.car is not None:
            pixels = [backbone.positions(self.stride, n) for n in seen.shape[2:]]
            return self.car(seen, car.labels_at(labels, seen.shape[2:], pixels))
        if not isinstance(self.body, car.OCR):
            return {}
        regions = backbone.upsample(seen, self.stride // 2, labels.shape[1:])
        return {"auxiliary": 0.4 * backbones.pixel_cross_entropy(regions, labels)}


class HighLevelFeatureGuidedModule(nn.Module):
    """Sect. 3.1: U `[N, 256, h, w]` of the upsampler -> logits `[N, K, h, w]`.

    kernels: the 1x1 convolution of 256 to K channels that is trained elsewhere. axial: axial
    attention on U, which takes the gradient of one pixel to all others (Table 2). released: queries
    as caa.py's released=True.
    """

    def __init__(self, axial=True, released=False):
        super().__init__()
        self.attention = (
            caa.SpatialAttention(256, channelization=False, released=released) if axial else None
        )

    def forward(self, u, kernels):
        u = u if self.attention is None else u + self.attention(u)
        stopped = {name: parameter.detach() for name, parameter in kernels.named_parameters()}
        return functional_call(kernels, stopped, u)


# ------------------------------------------------------------------------------------------ network


class HFGD(nn.Module):
    """Backbone, context-augmented encoder, upsampler, guided module (Fig. 3).

    net(images): float `[N, 3, H, W]` -> logits float32 `[N, num_classes, H, W]`, the fine ones
    where there is an upsampler. net(images, labels), labels int64 `[N, H, W]`, 255 = ignored ->
    dict of scalar losses: "fine", "coarse", CAR's "intra_c2p", "inter_c2c", "inter_c2p" with the
    encoder "ours", "auxiliary" with "ocr". Without guidance no "coarse"; without upsampler no
    "fine".

    output_stride: of the fine logits, 4, 2 or 1 (Tables 5, 8); without upsampler it is 32
    encoder: "ours", "identity", "aspp", "ocr", "self_attention" (Table 1)
    upsampler: "usfpn", "sfpn" (stride 4 only), or None: the coarse logits (Tables 1, 3)
    guided: gradients are stopped and the class kernels reused (Tables 2, 4), where there is an
    upsampler; axial: then with
        axial attention
    released: CAR of the encoder "ours" and the axial attention's queries as in their authors' code,
    see car.py and caa.py
    """

    def __init__(
        self,
        num_classes,
        backbone="resnet50",
        weights=None,
        *,
        output_stride=4,
        encoder="ours",
        upsampler="usfpn",
        guided=True,
        axial=True,
        released=False,
    ):
        super().__init__()
        self.backbone = backbones.build(backbone, 32, weights)
        for module in self.backbone.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-6  # Sect. 4
        self.guided = guided and upsampler is not None
        self.encoder = ContextAugmentedEncoder(
            self.backbone, num_classes, encoder, self.guided, released
        )
        levels = (*self.backbone.channels[:-1], self.encoder.channels)
        if upsampler == "usfpn":
            self.upsampler = UltraSemanticFPN(levels, output_stride)
        elif upsampler == "sfpn":
            if output_stride != 4:
                raise ValueError(
                    f"output_stride={output_stride!r}: upsampler='sfpn' has 4; 2 and 1 are "
                    "U-SFPN's, 'usfpn'"
                )
            self.upsampler = SemanticFPN(levels)
        elif upsampler is None:
            self.upsampler, output_stride = None, self.backbone.strides[-1]
        else:
            raise ValueError(f"upsampler={upsampler!r}: it is 'usfpn', 'sfpn' or None")
        self.guide = HighLevelFeatureGuidedModule(axial, released) if self.guided else None
        self.stride = output_stride
        # CAR acts on what enters this submodule
        self.regularized = "encoder.last" if encoder == "ours" else "classifier"
        # the class kernels
        self.classifier = nn.Conv2d((self.upsampler or self.encoder).channels, num_classes, 1)

    def forward(self, images, labels=None):
        size, resize, maps = images.shape[2:], self.backbone.resize, self.backbone(images)
        z, seen = self.encoder(maps, resize)
        logits = {}
        if self.guided:
            u = self.upsampler([level.detach() for level in (*maps[:-1], z)], resize)
            logits["fine"] = self.guide(u, self.classifier), self.stride
        elif self.upsampler is not None:
            logits["fine"] = self.classifier(self.upsampler([*maps[:-1], z], resize)), self.stride
        if self.upsampler is None or self.guided and labels is not None:
            logits["coarse"] = self.classifier(z), self.backbone.strides[-1]
        logits = {
            name: self.backbone.upsample(y, stride, size) for name, (y, stride) in logits.items()
        }
        if labels is None:
            return logits.popitem()[1]
        losses = {name: backbones.pixel_cross_entropy(y, labels) for name, y in logits.items()}
        return losses | self.encoder.losses(seen, labels, self.backbone)

    @torch.no_grad()
    def figures(self, image):
        """As Figs. 4, 5, of one image `[3, H, W]` or `[1, 3, H, W]`: the label maps of the coarse
        features and of the fine ones, by the same class kernels, `compared`. Empty without
        guidance. ValueError in training mode.
        """
        image = backbones.one_image(self, image)
        if not self.guided:
            return {}
        z = self.encoder(self.backbone(image), self.backbone.resize)[0]
        stride, size = self.backbone.strides[-1], image.shape[2:]
        coarse = self.backbone.upsample(self.classifier(z), stride, size)
        predictions = {"coarse": coarse, f"stride {self.stride}": self(image)}
        return compared({name: y.argmax(1)[0] for name, y in predictions.items()})


def compared(predictions):
    """Figs. 4, 5: label maps, and enlarged, of each, where they differ the most.

    predictions: name -> int64 `[H, W]`, two or more -> the same, "difference" (`[H, W]`, the share
    of 0…1 of the pairs that disagree there), and "NAME, enlarged" (`[H/4, W/4]`), the same window
    of all. For SemanticFPN and two HFGDs, say:

        paths = {name: f"runs/{name}/last.pt" for name in ("sfpn", "os4", "os2")}
        nets = {k: evaluate.load(evaluate.read_checkpoint(path)) for k, path in paths.items()}
        image, cpu = val[7][0], torch.device("cpu")
        maps = hfgd.compared({k: evaluate.label_map(net, image, cpu) for k, net in nets.items()})
        tiles = [image, *evaluate.drawn(maps, image, val.palette)]
        data.sheet([tiles], ["image", *maps], val.classes, val.palette).save("compared.png")
    """
    maps = list(predictions.values())
    pairs = [a != b for i, a in enumerate(maps) for b in maps[i + 1 :]]
    difference = torch.stack(pairs).float().mean(0)
    size = [max(1, side // 4) for side in difference.shape]
    where = F.avg_pool2d(difference[None], size, stride=1)[0]
    row, column = divmod(where.argmax().item(), where.shape[1])
    window = slice(row, row + size[0]), slice(column, column + size[1])
    enlarged = {f"{name}, enlarged": p[window] for name, p in predictions.items()}
    return predictions | {"difference": difference} | enlarged


# Sect. 4. Crops but Cityscapes' and the scales are open: CAR's, of the same authors.
_ABLATION = dict(
    backbone="resnet50",
    weights="imagenet",  # open which; of ConvNeXt's authors' checkpoints any loads by its path
    iterations=30_000,
    batch_size=16,
    optimizer="sgd",
    lr=0.01,
    power=0.9,  # open
    momentum=0.9,  # open
    weight_decay=1e-4,
    bn_momentum=0.0003,  # "Batch Norm Decay 0.9997"
    crop_size=513,
    scale=(0.5, 2.0),
    scale_step=0.1,
    color="brightness",  # open; photometric distortion is off
)
_SOTA = _ABLATION | dict(
    backbone="convnext_large",
    iterations=40_000,
    optimizer="adamw",
    lr=4e-5,
    weight_decay=0.05,
    color="photometric",
)
RECIPES = {
    # Sect. 5.1 to 5.5. For Sect. 5.6, Table 6: --backbone convnext_large --iterations 40000
    # --optimizer adamw --lr 4e-5 --weight-decay 0.05 --color photometric; swin_l too has 40000
    # iterations
    "pascal_context": _ABLATION,
    "coco_stuff164k": _SOTA,  # Sect. 6
    # Sect. 7.2; at --output-stride 2 with --iterations 80000. For Sect. 7.1, Table 8: --backbone
    # resnet50 --iterations 30000 --optimizer sgd --lr 0.01 --weight-decay 1e-4 --color brightness
    "cityscapes": _SOTA | dict(crop_size=(513, 1025), iterations=60_000),
}


def build(num_classes, backbone="resnet50", *, weights=None, **options):
    """An HFGD; `options` are its keywords, the paper's final setting by default. ValueError for an
    unknown one.
    """
    return HFGD(num_classes, backbone, weights, **backbones.check_options(HFGD, options))
