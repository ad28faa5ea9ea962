"""Semantic Prediction Guidance Network (SPGNet).

Bowen Cheng, Liang-Chieh Chen, Yunchao Wei, Yukun Zhu, Zilong Huang, Jinjun Xiong, Thomas S. Huang,
Wen-Mei Hwu, Honghui Shi: "SPGNet: Semantic Prediction Guidance for Scene Parsing", ICCV 2019,
https://arxiv.org/abs/1908.09798.

The idea: encoder-decoders in a row, each of which looks again at what the one before has found.
Between two of them the features are classified, with a loss of their own, and these predictions
say, pixel by pixel and channel by channel, which features are passed on: "supervise and excite".

The paper prints no numbered Eq.; its parts are

    Fig. 2 (a), Sect. 3.2  encoder-decoder               -> EncoderDecoder
    Fig. 2 (b), Sect. 3.3  upsample module               -> UpsampleModule, ResidualBlock
    Fig. 2 (c)             cross-stage aggregation       -> CrossStageAggregation
    Fig. 3, Sect. 3.4      semantic prediction guidance  -> SemanticPredictionGuidance
    Fig. 4, Sect. 4.5      guided attention of a class   -> SPGNet.figures
    Table 4                SE, GE in its place           -> SPGNet(guidance="se"), GatherExcite
    Table 8                hard example mining           -> online_hard_example_loss

Where the paper is silent, chosen so that the parameters which its tables print are met within 2 %:
- The decoder's residual blocks are half as wide in their middle as the decoder.
- Cross-stage aggregation is a 1x1 convolution (batch norm, ReLU) of the previous stage's encoder
  map and one of its decoder map, at each of the four strides, added to the encoder's map, as in
  MSPN (Li et al., 2019).
- The first stage alone has a stem; what the guidance passes on has the channels that the stem would
  give (64 in a ResNet). Our choice, where the tables do not tell either:
- The loss of each stage has weight 1.
- Without guidance ("directly passing", Table 3's second row), and after SE or GE, a 1x1 convolution
  gives the next stage its channels. SE reduces by 16. GE averages, as the caption of Fig. 1 says,
  here over an extent of 8 (GE-θ⁻ of its paper).
- Hard pixels (the paper cites others for them) are those whose true class has a probability below
  0.7, and in each image at least the hardest 15 %, DeeperLab's share.
- Image and feature maps are aligned as at crops of 513 and 769 pixels: backbones.extended and
  backbones.upsample.
- Batch norm, synchronized by train.py, in place of In-place ABN (the same but for memory and a
  leaky ReLU).

The tables' multiply-adds, at 1024x2048, are 2 to 13 % above those of this file. What is missing is
the same for every backbone and grows with the square of the decoder's channels: 9 to 10 G a stage
with 128, 39 G with 256.

    Table 3              channels=128, hard_examples=False, backbones=("resnet18", "resnet18") or
                         ("resnet18",), guidance, excite, identity, supervise; aggregate=False costs
                         0.18 (Sect. 4.4)
    Table 4              the same, guidance
    Tables 5, 6, 7       channels=128, hard_examples=False, backbones (as many stages as names)
    Table 8              channels=128, backbones, hard_examples
    Tables 1, 2, 9       backbones, channels
    Table 10, Sect. 4.6  RECIPES; here and at the end of Sect. 4.4 evaluate.py --scales … --flip

To copy: this file and backbones.py.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import Bottleneck
from torchvision.ops import Conv2dNormActivation, SqueezeExcitation

import backbones

IGNORE = 255

# --------------------------------------------------------------------------------------------- loss


def online_hard_example_loss(logits, labels, threshold=0.7, minimum=0.15):
    """Cross entropy of the hard pixels (Table 8): the mean over those of all processes. Scalar,
    float32.

    logits `[N, K, H, W]`, labels int64 `[N, H, W]`, 255 = ignored. Hard is a pixel whose true class
    has a probability below `threshold`, and in each image at least the hardest `minimum` (a share)
    of its labelled pixels.
    """
    labelled = (labels != IGNORE).flatten(1)  # [N, HW]
    with torch.no_grad():
        loss = F.cross_entropy(
            logits.float(), labels, ignore_index=IGNORE, reduction="none"
        ).flatten(1)
        # 0: the hardest
        rank = loss.masked_fill(~labelled, -1).argsort(dim=1, descending=True).argsort(dim=1)
        hard = labelled & (
            (loss.neg().exp() < threshold) | (rank < labelled.sum(1, keepdim=True) * minimum)
        )
    return backbones.pixel_cross_entropy(logits, labels.masked_fill(~hard.view_as(labels), IGNORE))


# ------------------------------------------------------------------------------------------- layers


class ResidualBlock(Bottleneck):
    """ResNet's bottleneck: `[N, in_channels, h, w]` -> `[N, channels, h, w]`, half as wide in its
    middle.
    """

    def __init__(self, in_channels, channels):
        shortcut = (
            Conv2dNormActivation(in_channels, channels, 1, activation_layer=None)
            if in_channels != channels
            else None
        )
        # channels // 4 · 128 / 64
        super().__init__(in_channels, channels // 4, downsample=shortcut, base_width=128)


class UpsampleModule(nn.Module):
    """Fig. 2 (b): encoder map `[N, C_e, H, W]`, decoder map `[N, C, h, w]`, h <= H -> `[N, C, H,
    W]`.
    """

    def __init__(self, encoder_channels, channels):
        super().__init__()
        self.reduce, self.fuse = (
            ResidualBlock(encoder_channels, channels),
            ResidualBlock(channels, channels),
        )

    def forward(self, encoder_map, decoder_map):
        x = self.reduce(encoder_map)
        return self.fuse(x + backbones.resize(decoder_map, x))


class CrossStageAggregation(nn.Module):
    """Fig. 2 (c): what the stage before adds to an encoder map of `channels`, from its maps of the
    same size.
    """

    def __init__(self, encoder_channels, decoder_channels, channels):
        super().__init__()
        self.encoder = Conv2dNormActivation(encoder_channels, channels, 1)
        self.decoder = Conv2dNormActivation(decoder_channels, channels, 1)

    def forward(self, encoder_map, decoder_map):
        return self.encoder(encoder_map) + self.decoder(decoder_map)


class EncoderDecoder(nn.Module):
    """One stage, Fig. 2 (a): (encoder maps, decoder maps `[N, channels, …]`), four each, finest
    first (strides 4 to 32).

    If it is the `first`, it has a stem and reads images `[N, 3, H, W]`, else what the guidance
    passes on, `[N, entry, H/4, W/4]`; and the maps of the stage before, where it aggregates them.

    before: the widths of that stage's four encoder maps; None: nothing is aggregated.
    """

    def __init__(self, backbone, channels, weights=None, first=True, before=None):
        super().__init__()
        stem, levels, (self.entry, *self.widths) = backbones.parts(backbone, weights)
        self.stem, self.levels = stem if first else None, nn.ModuleList(levels)
        self.image_level = nn.Conv2d(self.widths[-1], channels, 1)
        self.upsample = nn.ModuleList(UpsampleModule(width, channels) for width in self.widths)
        self.aggregate = None
        if before is not None:
            pairs = zip(before, self.widths)
            self.aggregate = nn.ModuleList(CrossStageAggregation(a, channels, b) for a, b in pairs)

    def forward(self, x, maps_before=None):
        x = x if self.stem is None else self.stem(x)
        encoded, decoded = [], []
        for i, level in enumerate(self.levels):
            x = level(x)
            if self.aggregate is not None:
                x = x + self.aggregate[i](maps_before[0][i], maps_before[1][i])
            encoded.append(x)
        y = self.image_level(x.mean((2, 3), keepdim=True))  # global average pooling
        for upsample, x in zip(reversed(self.upsample), reversed(encoded)):
            y = upsample(x, y)
            decoded.insert(0, y)
        return encoded, decoded


class SemanticPredictionGuidance(nn.Module):
    """Fig. 3, Sect. 3.4: decoder map x_d `[N, D, H, W]` -> (input of the next stage `[N,
    out_channels, H, W]`, x_l).

    x_l `[N, K, H, W]` are the logits that are supervised.

    excite: how they act: "sigmoid", "softmax" (over the positions), or "sum", added and nothing
    excited (Table 3)
    identity: the path around the excited features
    """

    def __init__(self, channels, num_classes, out_channels, excite="sigmoid", identity=True):
        super().__init__()
        if excite not in ("sigmoid", "softmax", "sum"):
            raise ValueError(f"excite={excite!r}: it is 'sigmoid', 'softmax' or 'sum'")
        self.excite, self.identity = excite, identity
        self.logits = nn.Conv2d(channels, num_classes, 1)
        self.attention = nn.Conv2d(num_classes, channels, 1)
        self.transform = nn.Conv2d(channels, channels, 1) if excite != "sum" else None
        self.out = nn.Conv2d(channels, out_channels, 1)

    def mask(self, x_l):
        """The guided attention m `[N, D, H, W]`; for "sum" the transformed predictions."""
        m = self.attention(x_l)
        if self.excite == "softmax":
            return m.flatten(2).softmax(2).view_as(m)
        return m.sigmoid() if self.excite == "sigmoid" else m

    def forward(self, x_d):
        x_l = self.logits(x_d)
        m = self.mask(x_l)
        y = m if self.excite == "sum" else m * self.transform(x_d)
        return self.out(x_d + y if self.identity else y), x_l


class GatherExcite(nn.Module):
    """GE-θ⁻ of extent 8 (Hu et al., "Gather-Excite", NeurIPS 2018): x `[N, C, H, W]` times the
    sigmoid of its averages.
    """

    def forward(self, x):
        # around every eighth position
        gathered = F.avg_pool2d(x, 15, stride=8, padding=7, count_include_pad=False)
        return x * backbones.resize(gathered, x).sigmoid()


# ------------------------------------------------------------------------------------------ network


class SPGNet(nn.Module):
    """Stages of encoder-decoders with guidance between them (Fig. 2), bilinear upsampling of the
    last stage's logits.

    net(images): float `[N, 3, H, W]` -> logits float32 `[N, num_classes, H, W]`. net(images,
    labels), labels int64 `[N, H, W]`, 255 = ignored -> dict of scalar losses: "stage_1", … of each
    guidance's logits, if supervised, and "cross_entropy" of the last stage's.

    backbones: a name for each stage; None: `backbone` twice. `weights`: "imagenet", or a path where
    all are of one name
    channels: of the decoders (Table 9), a multiple of 16
    guidance: "spg", "se", "ge", or None: the decoder's map is passed on as it is (Tables 3, 4)
    excite, identity: see SemanticPredictionGuidance; supervise: the loss on its logits (Table 3)
    aggregate: cross-stage feature aggregation
    hard_examples: the losses are of the hard pixels alone (Table 8)
    """

    def __init__(
        self,
        num_classes,
        backbone="resnet50",
        weights=None,
        *,
        backbones=None,
        channels=256,
        guidance="spg",
        excite="sigmoid",
        identity=True,
        supervise=True,
        aggregate=True,
        hard_examples=True,
    ):
        super().__init__()
        names = (backbone, backbone) if backbones is None else backbones
        if (
            not isinstance(names, (tuple, list))
            or not names
            or not all(isinstance(name, str) for name in names)
        ):
            raise ValueError(
                f"backbones={names!r}: expected a name for each stage, as in ('resnet50',) for one"
            )
        if weights not in (None, "imagenet") and len(set(names)) > 1:
            raise ValueError(
                f"weights '{weights}' cannot fit {' and '.join(names)}: give 'imagenet', or one "
                "kind of backbone"
            )
        if channels < 16 or channels % 16:
            raise ValueError(f"channels={channels}: expected a multiple of 16")
        if guidance not in ("spg", "se", "ge", None):
            raise ValueError(f"guidance={guidance!r}: it is 'spg', 'se', 'ge' or None")
        self.supervise, self.hard_examples = supervise and guidance == "spg", hard_examples
        self.stages = nn.ModuleList([EncoderDecoder(names[0], channels, weights)])
        self.guides = nn.ModuleList()
        for name in names[1:]:
            before = self.stages[-1].widths if aggregate else None
            self.stages.append(EncoderDecoder(name, channels, weights, first=False, before=before))
            entry = self.stages[-1].entry
            if guidance == "spg":
                self.guides.append(
                    SemanticPredictionGuidance(channels, num_classes, entry, excite, identity)
                )
            elif guidance == "se":
                self.guides.append(
                    nn.Sequential(
                        SqueezeExcitation(channels, channels // 16), nn.Conv2d(channels, entry, 1)
                    )
                )
            elif guidance == "ge":
                self.guides.append(nn.Sequential(GatherExcite(), nn.Conv2d(channels, entry, 1)))
            else:
                self.guides.append(nn.Conv2d(channels, entry, 1))
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        self.regularized = "classifier"  # car.py acts on what enters it

    def forward(self, images, labels=None):
        loss_of = online_hard_example_loss if self.hard_examples else backbones.pixel_cross_entropy
        x, maps, losses = backbones.extended(images, 32), None, {}
        for i, stage in enumerate(self.stages):
            maps = stage(x, maps)
            x_d = maps[1][0]
            if i == len(self.guides):  # the last stage
                break
            if isinstance(self.guides[i], SemanticPredictionGuidance):
                x, x_l = self.guides[i](x_d)
                if labels is not None and self.supervise:
                    losses[f"stage_{i + 1}"] = loss_of(
                        backbones.upsample(x_l, 4, images.shape[2:]), labels
                    )
            else:
                x = self.guides[i](x_d)
        logits = backbones.upsample(self.classifier(x_d), 4, images.shape[2:])
        if labels is None:
            return logits
        return losses | {"cross_entropy": loss_of(logits, labels)}

    @torch.no_grad()
    def figures(self, image):
        """Sect. 4.5: the first guidance's attention for each class, of one image `[3, H, W]` or
        `[1, 3, H, W]`.

        dict of class number -> map `[H, W]` in 0…1: the l2 norm of the 15 channels of the mask m
        with the class's largest weights. Empty where nothing is excited by predictions. ValueError
        in training mode.
        """
        image = backbones.one_image(self, image)
        guide = self.guides[0] if self.guides else None
        if not isinstance(guide, SemanticPredictionGuidance) or guide.excite == "sum":
            return {}
        x_d = self.stages[0](backbones.extended(image, 32))[1][0]
        m = guide.mask(guide.logits(x_d))[0]  # [D, h, w]
        weights = guide.attention.weight[:, :, 0, 0].T  # [classes, D]
        maps = torch.stack(
            [m[channels].norm(dim=0) for channels in weights.topk(15, dim=1).indices]
        )
        maps = backbones.upsample(maps[None], 4, image.shape[2:])[0]
        low, high = (f((1, 2), keepdim=True) for f in (maps.amin, maps.amax))
        return dict(enumerate((maps - low) / (high - low).clamp(min=1e-12)))


# Sect. 4.2
_COMMON = dict(
    backbone="resnet50",
    weights="imagenet",  # Sect. 3.2 builds on them
    optimizer="sgd",
    lr=0.01,
    power=0.9,
    momentum=0.9,
    weight_decay=1e-4,
    scale=(0.5, 2.0),
    scale_step=0.25,
    color="none",
    bn_momentum=0.1,  # open
)
RECIPES = {
    # crop_size is open, DeepLab's; test scales 0.75 1 1.25 1.5 1.75 2; for Table 1 on train and val
    # together (Sect. 4.3)
    "cityscapes": _COMMON | dict(iterations=80_000, batch_size=8, crop_size=769),
    # Sect. 4.6, "following the settings of DeepLabv3+": its learning rate is 0.007
    "pascal_voc_aug": _COMMON | dict(iterations=30_000, batch_size=28, crop_size=513, lr=0.007),
    "pascal_person_part": _COMMON | dict(iterations=30_000, batch_size=28, crop_size=513, lr=0.007),
}


def build(num_classes, backbone="resnet50", *, weights=None, **options):
    """An SPGNet; `options` are its keywords, the paper's best setting by default. ValueError for an
    unknown one.
    """
    return SPGNet(num_classes, backbone, weights, **backbones.check_options(SPGNet, options))
