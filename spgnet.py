"""Semantic Prediction Guidance Network (SPGNet).

Bowen Cheng, Liang-Chieh Chen, Yunchao Wei, Yukun Zhu, Zilong Huang, Jinjun Xiong, Thomas S. Huang,
Wen-Mei Hwu, Honghui Shi, ICCV 2019, https://arxiv.org/abs/1908.09798. No equation is numbered.

The idea. SPGNet puts two encoder-decoders in a row, so that the second refines the features of the
first. What should pass from the first to the second? Squeeze-and-excite pools over the image and
weights whole channels; no loss tells it about classes. Here the first decoder's features are
classified, and these predictions have a loss of their own. A 1x1 convolution turns them into a
weight for every channel at every pixel: "supervise-and-excite". It needs no pooling, because the
decoder's features already hold several scales (Sect. 3.4).

The mathematics. N images of H x W pixels, K classes (the paper's C), D channels in the decoder, E
channels at the entry of the next encoder. W are 1x1 convolutions with biases (ours). ⊙ multiplies
element by element.

    guidance, Fig. 3, Sect. 3.4: x_d comes from the decoder  -> SemanticPredictionGuidance
    x_l = W_l x_d                          [N, K, H/4, W/4]  logits, which have their own loss
    m   = sigmoid(W_m x_l)                 [N, D, H/4, W/4]  the guided attention
    out = W_o (x_d + m ⊙ W_t x_d)          [N, E, H/4, W/4]  the input of the next stage

    one stage, Fig. 2 (a, b): encoder maps e_s, decoder maps d_s, at strides s = 4, 8, 16, 32
    v   = W_g mean(e_32)                   [N, D, 1, 1]      the image level -> EncoderDecoder
    d_s = R_3(R_2(R_1(e_s) + up(d_2s)))    [N, D, H/s, W/s]  ≠ print: R_3 -> UpsampleModule
    x_d = 3x3 convolution of d_4           [N, D, H/4, W/4]  ≠ print -> EncoderDecoder
    R is a bottleneck of ResNet -> ResidualBlock. up is bilinear. At s = 32, v replaces d_2s.

    the encoder maps e' of the next stage, Fig. 2 (c)        -> CrossStageAggregation
    e'_s <- e'_s + A_s(e_s) + B_s(d_s)     at s = 4 with x_d for d_4 (ours)
    A, B are 1x1 convolutions, batch norm, ReLU. The next encoder level and R_1 read this sum.

Fig. 2 (a), one stage. U is the upsample module; after the last stage x_d enters the classifier:

    image --> stem --> e_4 --> e_8 --> e_16 --> e_32 --> mean, W_g
                        |       |        |        |          |
   guidance <-- x_d <-- U <---- U <----- U <----- U <--- v --+

Read first `SemanticPredictionGuidance`, then `EncoderDecoder`, then `SPGNet.forward`. Tests:
tests/test_spgnet.py. To copy: this file and backbones.py.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import Bottleneck
from torchvision.ops import Conv2dNormActivation, SqueezeExcitation

import backbones

# ------------------------------------------------------------------------------------------ layers


class SemanticPredictionGuidance(nn.Module):
    """Fig. 3: x_d `[N, D, h, w]` -> (out `[N, out_channels, h, w]`, x_l `[N, K, h, w]`).

    excite: "sigmoid", or "softmax" over the positions: out = W_o (x_d + m ⊙ W_t x_d); "sum":
    out = W_o (x_d + W_m x_l + W_t x_d). identity=False leaves x_d out.
    """

    def __init__(self, channels, num_classes, out_channels, excite="sigmoid", identity=True):
        super().__init__()
        backbones.check_choices(excite=(excite, ("sigmoid", "softmax", "sum")))
        self.excite, self.identity = excite, identity
        self.logits = nn.Conv2d(channels, num_classes, 1)
        self.attention = nn.Conv2d(num_classes, channels, 1)
        self.transform = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, out_channels, 1)

    def mask(self, x_l):
        """The guided attention m `[N, D, h, w]` of the logits x_l; for "sum" W_m x_l.

        Channel 0 reads class 0, channel 1 class 0 minus class 1. sigmoid(k ln 3) = 3^k / (3^k + 1).

        >>> guide = SemanticPredictionGuidance(2, 2, 1).requires_grad_(False)
        >>> guide.attention.weight[:, :, 0, 0] = torch.tensor([[1.0, 0], [1, -1]])  # W_m
        >>> guide.attention.bias[:] = 0
        >>> x_l = torch.tensor(3.0).log() * torch.tensor([[1, 0], [-1, 1]])  # 2 classes, 2 pixels
        >>> guide.mask(x_l.view(1, 2, 1, 2)).view(2, 2)  # two channels at two pixels
        tensor([[0.7500, 0.5000],
                [0.9000, 0.2500]])
        """
        w = self.attention(x_l)  # W_m x_l  [N, D, h, w]
        if self.excite == "sigmoid":
            return w.sigmoid()
        if self.excite == "softmax":
            return w.flatten(2).softmax(2).view_as(w)
        return w

    def forward(self, x_d):
        x_l = self.logits(x_d)  # [N, K, h, w]
        m = self.mask(x_l)  # [N, D, h, w]
        t = self.transform(x_d)  # W_t x_d  [N, D, h, w]
        # Sect. 4.4 describes "sum" as x_d + W_m x_l. But Table 3 has the same multiply-adds for it
        # as for "sigmoid", 218.0e9, so it contains W_t. It also has a tick for the identity.
        y = m + t if self.excite == "sum" else m * t
        return self.out(x_d + y if self.identity else y), x_l


class ResidualBlock(Bottleneck):
    """`[N, in_channels, h, w] -> [N, channels, h, w]`, "same bottleneck module used in ResNet"
    (Fig. 2). Inferred: the middle has a quarter of the width; the tables' costs agree. Batch norm
    and ReLU replace In-place ABN (Sect. 4.2), which has a leaky ReLU.
    """

    def __init__(self, in_channels, channels):
        shortcut = None
        if in_channels != channels:
            shortcut = Conv2dNormActivation(in_channels, channels, 1, activation_layer=None)
        super().__init__(in_channels, channels // 4, downsample=shortcut)


class UpsampleModule(nn.Module):
    """Fig. 2 (b): maps of encoder `[N, C_e, H, W]` and decoder `[N, C, h, w]` -> `[N, C, H, W]`."""

    def __init__(self, encoder_channels, channels):
        super().__init__()
        self.reduce = ResidualBlock(encoder_channels, channels)  # R_1
        # R_2, R_3, ≠ print: R_2 alone. The tables' multiply-adds need two and a 3x3 convolution on
        # the finest map. Where they are is our choice.
        self.fuse = nn.Sequential(*(ResidualBlock(channels, channels) for _ in range(2)))

    def forward(self, encoder_map, decoder_map):
        x = self.reduce(encoder_map)
        return self.fuse(x + backbones.resize(decoder_map, x))


class CrossStageAggregation(nn.Module):
    """Fig. 2 (c): maps of one stride -> what the next stage adds there, `[N, channels, H, W]`."""

    def __init__(self, encoder_channels, decoder_channels, channels):
        super().__init__()
        # The paper cites MSPN (Li et al., 2019), which has a 1x1 convolution for each of the two.
        self.encoder = Conv2dNormActivation(encoder_channels, channels, 1)  # A
        self.decoder = Conv2dNormActivation(decoder_channels, channels, 1)  # B

    def forward(self, encoder_map, decoder_map):
        return self.encoder(encoder_map) + self.decoder(decoder_map)


class EncoderDecoder(nn.Module):
    """One stage, Fig. 2 (a): (encoder maps, decoder maps `[N, channels, …]`), two lists of four.

    Both are finest first, strides 4 to 32; x_d is the first decoder map. A later stage has no stem:
    it reads what the guidance gives, `[N, entry, H/4, W/4]`, and both lists of the stage before.
    before: widths of the previous stage's encoder maps; None: no cross-stage aggregation.
    """

    def __init__(self, backbone, channels, weights=None, first=True, before=None):
        super().__init__()
        stem, levels, sizes = backbones.parts(backbone, weights)
        self.entry, self.widths = sizes[0], sizes[1:]  # entry: channels of the stem
        self.stem = stem if first else nn.Identity()
        self.levels = nn.ModuleList(levels)
        self.image_level = nn.Conv2d(self.widths[-1], channels, 1)  # W_g, no norm: 1 value an image
        self.upsample = nn.ModuleList(UpsampleModule(width, channels) for width in self.widths)
        self.last = Conv2dNormActivation(channels, channels, 3)  # see UpsampleModule
        self.aggregate = nn.ModuleList()
        for i, width in enumerate(before or ()):
            self.aggregate.append(CrossStageAggregation(width, channels, self.widths[i]))

    def forward(self, x, maps_before=None):
        x = self.stem(x)
        encoded = []
        for i, level in enumerate(self.levels):
            x = level(x)
            if self.aggregate:
                x = x + self.aggregate[i](maps_before[0][i], maps_before[1][i])
            encoded.append(x)
        d = self.image_level(encoded[3].mean((2, 3), keepdim=True))  # v  [N, D, 1, 1]
        decoded = [None] * 4
        for i in (3, 2, 1, 0):
            d = decoded[i] = self.upsample[i](encoded[i], d)
        decoded[0] = self.last(decoded[0])  # x_d
        return encoded, decoded


# ----------------------------------------------------------------------------------------- network


class SPGNet(nn.Module):
    """Encoder-decoders in a row with guidance between them, bilinear upsampling of the logits.

    net(images): float `[N, 3, H, W]` -> logits float32 `[N, num_classes, H, W]`. net(images,
    labels), labels int64 `[N, H, W]`, 255 = ignored -> dict of scalar losses: "stage_1", … of the
    guidances' x_l, if supervised, and "cross_entropy" of the last stage's logits.

    option          values                             default         paper
    backbones       a name for each stage              backbone twice  Tables 3, 5, 6, 7
    channels        D, a multiple of 16                256             Table 9; 3 to 8: 128
    guidance        "spg"; None: W_o and W_l alone     "spg"           Table 3
                    "se", "ge", with supervise=False                   Table 4
    excite          of "spg": "sigmoid", "softmax", "sum"  "sigmoid"   Table 3
    identity        of "spg", False: without x_d in out    True        Table 3 (Id.)
    supervise       False: no loss between stages      True            Table 3 (Sup.)
    aggregate       False: no cross-stage aggregation  True            Sect. 4.4
    hard_examples   False: losses of all pixels        True            Table 8; 3 to 7: False
    """

    caption = "The first stage's attention for each class, one scale. Is it bright on its objects?"

    def __init__(self, num_classes, backbone="resnet50", weights=None, *, backbones=None,
                 channels=256, guidance="spg", excite="sigmoid", identity=True, supervise=True,
                 aggregate=True, hard_examples=True):  # fmt: skip
        super().__init__()
        names = (backbone, backbone) if backbones is None else backbones  # option, not module
        check_values(names, channels, guidance)
        self.stages = nn.ModuleList([EncoderDecoder(names[0], channels, weights)])
        self.guides = nn.ModuleList()
        for name in names[1:]:
            before = self.stages[-1].widths if aggregate else None
            stage = EncoderDecoder(name, channels, weights, first=False, before=before)
            sizes = channels, num_classes, stage.entry
            self.stages.append(stage)
            if guidance == "spg":
                self.guides.append(SemanticPredictionGuidance(*sizes, excite, identity))
            else:
                self.guides.append(WithoutGuidance(*sizes, guidance, supervise))
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        self.regularized = "classifier"  # the losses of car.py act on what enters it
        self.explained = len(names) > 1 and guidance == "spg" and excite != "sum"  # see `figures`
        self.supervise, self.hard_examples = supervise, hard_examples

    def forward(self, images, labels=None):
        if labels is not None:
            backbones.check_labels(labels, images, self.classifier.out_channels)
        loss_of = online_hard_example_loss if self.hard_examples else backbones.pixel_cross_entropy
        size, losses, maps = images.shape[2:], {}, None
        x = backbones.extended(images, 32)
        few = self.training and len(x) == 1 and x.shape[2:] == (33, 33)
        if few and not any(isinstance(module, nn.SyncBatchNorm) for module in self.modules()):
            raise ValueError("33x33 pixels are too few for batch norm: take two images or larger")
        for i, guide in enumerate(self.guides):
            maps = self.stages[i](x, maps)
            x, x_l = guide(maps[1][0])  # of x_d  [N, D, H/4, W/4]
            if labels is not None and self.supervise:
                losses[f"stage_{i + 1}"] = loss_of(backbones.upsample(x_l, 4, size), labels)
        _, decoded = self.stages[-1](x, maps)
        logits = backbones.upsample(self.classifier(decoded[0]), 4, size)
        if labels is None:
            return logits
        return losses | {"cross_entropy": loss_of(logits, labels)}

    @property
    def backbone(self):  # train.py's --head-lr is for all other layers
        return nn.ModuleList(part for stage in self.stages for part in (stage.stem, stage.levels))

    def class_attention(self, images):
        """Fig. 4: the attention of each class in the first guidance, `[N, K, H/4, W/4]`, float32:
        the l2 norm over the 15 channels of m with the class's largest weights in W_m.
        """
        _, decoded = self.stages[0](backbones.extended(images, 32))
        guide = self.guides[0]
        m = guide.mask(guide.logits(decoded[0])).float()  # [N, D, h, w]
        weights = guide.attention.weight[:, :, 0, 0].T  # Fig. 4's matrix  [K, D]
        largest = weights.topk(15, dim=1).indices  # [K, 15]
        return torch.stack([m[:, channels].norm(dim=1) for channels in largest], dim=1)

    @torch.no_grad()
    def figures(self, image):
        """Sect. 4.5: class number -> `class_attention` `[H, W]` of one image `[3, H, W]`. Ours: the
        lowest value of all maps is subtracted. Empty without "spg" or with excite="sum".
        """
        image = backbones.one_image(self, image)
        if not self.explained:
            return {}
        maps = backbones.upsample(self.class_attention(image), 4, image.shape[2:])[0]
        return dict(enumerate(maps - maps.amin()))

    @torch.no_grad()
    def analyse(self, pairs):
        """Ours, of (images, labels): does a class's attention tell its positions from the others of
        the image? All pairs count alike; NaN for a class without one. Empty where `figures` is.
        """
        if not self.explained:
            return {}
        counts = 0
        for images, labels in pairs:
            # Positions of the image, without those of the border that extends it.
            rows, columns = (backbones.positions(4, -(-side // 4)) for side in labels.shape[1:])
            labels = labels[:, rows[:, None], columns]  # [N, h, w]
            maps = self.class_attention(images)[:, :, : len(rows), : len(columns)]
            counts = counts + sum(wins(*pair) for pair in zip(maps, labels))
        area = counts[0] / counts[1]  # under the ROC curve of each class  [K]
        what = "the probability that a class's pixel has more of its attention than another's"
        mean = f"own attention: {what}, mean of the classes; 0.5 is chance, 1 is best"
        each = f"own attention by class: {what} | attention"
        return {mean: area.nanmean().item(), each: area[None]}


def wins(maps, labels):
    """Pairs of a position of class c and one of another class: counts, float64 `[2, K]`. Row 0: map
    c is higher at the position of class c; a tie counts one half. Row 1: all pairs. Of one image:
    maps `[K, h, w]`, labels int64 `[h, w]`, 255 = ignored.
    """
    counts, labelled = torch.zeros(2, len(maps), dtype=torch.float64), labels != 255
    for c in labels[labelled].unique().tolist():
        own, others = maps[c, labels == c], maps[c, labelled & (labels != c)].sort().values
        below = torch.searchsorted(others, own)  # how many of the others are lower
        up_to = torch.searchsorted(others, own, right=True)  # how many are not higher
        counts[0, c] = (below + up_to).sum().item() / 2
        counts[1, c] = len(own) * len(others)
    return counts


def check_values(names, channels, guidance):
    """ValueError for option values that SPGNet does not know."""
    texts = isinstance(names, (tuple, list)) and [isinstance(name, str) for name in names]
    if not texts or not all(texts):
        raise ValueError("backbones: expected a name for each stage, ('resnet50',), and no module")
    if not isinstance(channels, int) or channels < 16 or channels % 16:
        raise ValueError(f"channels={channels!r}: expected a multiple of 16")
    backbones.check_choices(guidance=(guidance, ("spg", "se", "ge", None)))


# -------------------------------------------------------------- what Tables 3, 4 and 8 compare with


class WithoutGuidance(nn.Module):
    """What takes the guidance's place in Tables 3, 4: x_d -> (W_o gate(x_d), x_l), of its shapes.
    gate: "se", "ge"; None: W_o x_d. supervise=False: x_l is None.
    """

    def __init__(self, channels, num_classes, out_channels, gate=None, supervise=True):
        super().__init__()
        self.gate = gather_excite if gate == "ge" else nn.Identity()
        if gate == "se":  # reduction 16 as in SENet; the paper gives none
            self.gate = SqueezeExcitation(channels, channels // 16)
        # Table 3: 215.5e9 multiply-adds without guidance, 218.0e9 with it. The difference is W_m
        # and W_t alone, so both have W_l and W_o. Without guidance, W_l's loss is our reading.
        self.logits = nn.Conv2d(channels, num_classes, 1) if supervise else None
        self.out = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x_d):
        out = self.out(self.gate(x_d))
        return out, None if self.logits is None else self.logits(x_d)


def gather_excite(x):
    """x `[N, C, H, W]` times the sigmoid of its local averages (Hu et al., NeurIPS 2018)."""
    # Ours: GE-θ⁻, without weights, e = 8: windows of 2e - 1 = 15, one at every eighth position.
    gathered = F.avg_pool2d(x, 15, stride=8, padding=7, count_include_pad=False)
    return x * backbones.resize(gathered, x).sigmoid()


def online_hard_example_loss(logits, labels, threshold=0.7, minimum=0.15):
    """Cross entropy, the mean over the hard pixels of all processes (Table 8): scalar, float32.

    logits `[N, K, H, W]`, labels int64 `[N, H, W]` in 0 … K-1, 255 = ignored. A pixel is hard if
    its true class has a probability below `threshold`. In each image at least a share `minimum` of
    the labelled pixels is kept, the hardest. 0 where no pixel is labelled.
    """
    # The paper does not state the rule. 15 % is DeeperLab's, which it cites; 0.7 is a common value.
    loss = F.cross_entropy(logits.float(), labels, ignore_index=255, reduction="none").flatten(1)
    count = (labels != 255).flatten(1).sum(1, keepdim=True)  # [N, 1]
    # An ignored pixel has a loss of 0, the lowest, so it comes last. Ties at 0 change nothing.
    order = loss.detach().argsort(1, descending=True)
    loss = loss.gather(1, order)  # [N, HW], the hardest first
    rank = torch.arange(loss.shape[1], device=loss.device)
    hard = loss.detach().neg().exp() < threshold
    hardest = rank < minimum * count
    return backbones.joint_mean(loss, (hard | hardest) & (rank < count))


_COMMON = dict(  # Sect. 4.2; ResNet-50: Sect. 4.3; ImageNet weights are inferred from Sect. 3.2
    backbone="resnet50", weights="imagenet", optimizer="sgd", lr=0.01, power=0.9, momentum=0.9,
    weight_decay=1e-4, scale=(0.5, 2.0), scale_step=0.25, color="none", bn_momentum=0.1,
)  # fmt: skip
RECIPES = {
    "shapes": dict(lr=1e-3, head_lr=1.0, option=dict(channels=64)),  # ours, as SHAPES in train.py
    # Sect. 4.2 gives no crop size; this is DeepLab's. Tables 1, 2: `--train-split trainval` (Sect.
    # 4.2), evaluated at the scales 0.75 1 1.25 1.5 1.75 2 (Sect. 4.3).
    "cityscapes": _COMMON | dict(iterations=80_000, batch_size=8, crop_size=769),
    # Sect. 4.6: the settings of DeepLabv3+, whose rate is 0.007. All else is as on Cityscapes.
    "pascal_voc_aug": _COMMON | dict(iterations=30_000, batch_size=28, crop_size=513, lr=0.007),
    "pascal_person_part": _COMMON | dict(iterations=30_000, batch_size=28, crop_size=513, lr=0.007),
}


def build(num_classes, backbone="resnet50", *, weights=None, **options):
    """An SPGNet. `options` are its keywords; ValueError for an unknown one."""
    return SPGNet(num_classes, backbone, weights, **backbones.check_options(SPGNet, options))
