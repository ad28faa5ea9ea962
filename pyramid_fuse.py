"""Specialize and Fuse: a pyramid of outputs.

Chi-Wei Hsiao, Cheng Sun, Hwann-Tzong Chen, Min Sun: "Specialize and Fuse: Pyramidal Output
Representation for Semantic Segmentation", ICCV 2021, https://arxiv.org/abs/2108.01866.

The idea: a large cell that lies within one class needs one label, not one for each of its pixels.
So the network predicts labels at several levels, coarse to fine, and for each cell whether all of
its pixels share a class (a unity-cell). What a coarser level has settled is left out of the finer
ones, in training ("done by coarser") as in the fused result. Each level then specializes in what it
is left with.

    Sect. 3.1, App. B   ground truth of both pyramids    -> pyramid_labels
    Sect. 3.2, Table 7  "done by coarser"                -> relabel
    Eq. (1)             loss                             -> pyramid_loss
    Eq. (2)             fused output                     -> fuse
    Sect. 4.1           unity head                       -> UnityHead
    Eq. (3)             feature pyramid                  -> SemanticHead.forward
    Eqs. (4), (5)       context, coarse to fine          -> SemanticHead.forward
    Eq. (6), (10)       pooled context                   -> PyramidPool
    Eq. (7)             final projection                 -> SemanticHead.project, and the classifier
    Eqs. (8), (9)       context aggregation              -> ContextAggregation
    Eqs. (10), (11)     context update                   -> ContextUpdate
    App. D              decoder of a ResNet              -> ResNetDecoder
    Fig. A              levels, and how they are fused   -> SpecializeAndFuse.figures
    Table 9, Figs. 3, C what each level is good at       -> levels_compared

Lists of levels run from coarse to fine, as in the paper; labels are int64 with 255 = "don't care".

What the paper leaves open, and what was chosen here:
- The label of a finest cell, all of which count as unity-cells, is that of the pixel next to its
  middle.
- The unity head's 1x1 convolutions have neither norm nor activation, as Sect. 4.1 mentions none;
  one of them embeds pixels and centroids. Then the head is linear up to its sigmoid, and costs next
  to nothing:

      w · (e(x) - e(mean x)) + b  =  s - mean s + b,  s = w · e(x) of one channel for all levels

  A cell's deviations average to 0, so its probability is at most σ(b): none reaches τ before b does
  (2.2 for 0.9).
- τ decides in training too what a true positive is.
- Attention divides by the root of the channels, as its source [22] does; queries, keys and values
  have 512.
- ANL's APNB block is context aggregation from the level's own pooled features.
- Experiment J: 0.4 of the mean of the coarser levels' losses, on the raw pyramidal ground truth.
  Table A prints "{4, 8, 16}" for them; all but the finest, as its text says, are 8, 16, 32.
- An output of one level is trained on the same labels as the finest of the pyramid.
- Appendix D's 3x3 convolutions have batch norm and ReLU; HRNet's last stage has three modules.
- Eq. (2)'s Up repeats each cell; features and logits are upsampled with align_corners=False.

    Table A, ID       context        output       policy
    A, B, C           None, "anl", "ours"         "single"
    D, E, F           None           "pyramid"    "naive", "ground_truth", "true_positive"
    G, H, I           "anl", "anl_multi", "ours"  "pyramid"
    J                 "ours"         "auxiliary"
    K                 "ours"         "pyramid"    with strides=(32, 4)
    Tables 6 to 8     the same rows; hrnet_w32, 16K and 4K of ADE20K's training images (Sect. 5.4)
    Tables 1 to 4     RECIPES; evaluate.py --scales … --flip
    Tables 5, B       evaluate.py --speed; HRNet48: context=None, output="single"; ANL: "anl"

To copy: this file and backbones.py. Down to `pyramid_loss` all but backbones.pixel_cross_entropy is
torch alone.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import Conv2dNormActivation

import backbones

IGNORE = 255  # "don't care"
POLICIES = ("true_positive", "ground_truth", "naive")

# --------------------------------------------------------------------------------- pyramidal output


def pyramid_labels(labels, strides=(32, 16, 8, 4)):
    """Sect. 3.1, App. B: (semantic, unity), the ground truth of each level.

    labels `[N, H, W]`, H and W multiples of strides[0] -> semantic: for each level `[N, H/s, W/s]`,
    the class of a unity-cell; unity: for all but the finest `[N, H/s, W/s]`, 1 unity-cell, 0
    mix-cell. 255: the class of a mix-cell, and both where a cell holds pixels that are not labelled
    and at most one class. ValueError for another size.
    """
    H, W = labels.shape[1:]
    if H % strides[0] or W % strides[0]:
        raise ValueError(
            f"labels of {H}x{W}: expected multiples of the coarsest stride, {strides[0]}"
        )
    ignored = labels == IGNORE  # whether a cell has pixels without a label
    # its smallest and greatest class; 255 and -1 where there is none
    low, high = (
        labels,
        labels.masked_fill(ignored, -1),
    )
    middle, size = strides[-1] // 2, 1
    semantic, unity = [labels[:, middle :: strides[-1], middle :: strides[-1]]], []
    for stride in reversed(strides[:-1]):
        by = stride // size
        low, high, ignored = (
            _cells(low, by).amin(-1),
            _cells(high, by).amax(-1),
            _cells(ignored, by).any(-1),
        )
        size, mixed = stride, low < high
        clear = (low == high) & ~ignored
        semantic.insert(0, low.masked_fill(~clear, IGNORE))
        unity.insert(0, clear.long().masked_fill(~clear & ~mixed, IGNORE))
    return semantic, unity


def _cells(x, side):
    """`[N, H, W]` -> `[N, H/side, W/side, side²]`"""
    return x.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3).flatten(3)


def _up(x, like):
    """x at the size of `like`, each cell repeated."""
    by = like.shape[-1] // x.shape[-1]
    return x.repeat_interleave(by, -2).repeat_interleave(by, -1)


@torch.no_grad()
def relabel(semantic, unity, unity_prob, threshold=0.9, policy="true_positive"):
    """Sect. 3.2, Table 7: (semantic, unity) in which the cells that are "done by coarser" are 255.

    semantic, unity: from pyramid_labels; unity_prob: predicted, for all but the finest level `[N,
    h, w]` in 0…1.

    policy: which cells settle what lies below them: "true_positive", unity-cells that are predicted
    as such (at least `threshold`); "ground_truth", all unity-cells (the simple fix); "naive", none.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy={policy!r}: it is {', '.join(map(repr, POLICIES))}")
    relabelled, kept = [semantic[0]], []
    done = torch.zeros_like(semantic[0], dtype=torch.bool)
    for level, (u, p) in enumerate(zip(unity, unity_prob)):
        kept.append(u.masked_fill(done, IGNORE))
        if policy != "naive":
            done = done | ((u == 1) & (p >= threshold) if policy == "true_positive" else u == 1)
        finer = semantic[level + 1]
        done = _up(done, finer)
        relabelled.append(finer.masked_fill(done, IGNORE))
    return relabelled, kept


def chosen_level(unity_prob, finest, threshold=0.9):
    """Which level Eq. (2) takes at each finest cell: int64 `[N, h, w]`, 0 the coarsest, for the
    size of `finest`.
    """
    level = torch.full(finest.shape[:1] + finest.shape[-2:], len(unity_prob), device=finest.device)
    for i, p in reversed(list(enumerate(unity_prob))):
        level = level.masked_fill(_up(p >= threshold, finest), i)  # the coarser one overrides
    return level


def fuse(semantic, unity_prob, threshold=0.9):
    """Eq. (2), at the finest level: the prediction of the coarsest level whose cell is a
    unity-cell.

    semantic: for each level `[N, C, h, w]`; unity_prob: for all but the finest `[N, h, w]` in 0…1
    -> `[N, C, H/s_L, W/s_L]`.
    """
    level = chosen_level(unity_prob, semantic[-1], threshold).unsqueeze(1)
    fused = semantic[-1]
    for i, y in enumerate(semantic[:-1]):
        fused = torch.where(level == i, _up(y, fused), fused)
    return fused


def pyramid_loss(semantic_logits, unity_prob, semantic, unity):
    """Eq. (1): {"semantic": 1/L · Σ CE, "unity": 1/(L - 1) · Σ BCE}, scalars, float32.

    Each is the mean over the cells, of all processes, that are not 255.
    """
    ce = [backbones.pixel_cross_entropy(y, label) for y, label in zip(semantic_logits, semantic)]
    bce = []
    for p, label in zip(unity_prob, unity):
        p = p.float().clamp(1e-7, 1 - 1e-7)
        both = torch.stack([(1 - p).log(), p.log()], dim=1)  # its softmax is (1 - p, p) again
        bce.append(backbones.pixel_cross_entropy(both, label))
    return {"semantic": sum(ce) / len(ce), "unity": sum(bce) / len(bce)}


# ------------------------------------------------------------------------------------------- layers


class UnityHead(nn.Module):
    """Sect. 4.1: X `[N, D, h, w]` -> for each coarser level float32 `[N, h/k, w/k]`, the
    probability of a unity-cell.

    factors: k of each, cells of the finest level on a side, as in (8, 4, 2). The module's docstring
    has the algebra.
    """

    def __init__(self, in_channels, factors, channels=64):
        super().__init__()
        self.factors = factors
        # biases would cancel in the difference
        self.reduce = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.embed, self.same = (
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.Conv2d(channels, 1, 1),
        )

    def forward(self, x):
        s = F.conv2d(self.embed(self.reduce(x)), self.same.weight)  # [N, 1, h, w]
        s = s.to(torch.promote_types(s.dtype, torch.float32))  # a half would round p to 1
        unity = []
        for k in self.factors:
            same = (s - _up(F.avg_pool2d(s, k), s) + self.same.bias).sigmoid()  # as the centroid
            unity.append(-F.max_pool2d(-same, k).squeeze(1))  # the pixel that is least so
        return unity


class PyramidPool(nn.Module):
    """Eqs. (6), (10): `[N, C, h, w]` -> `[N, C, 110]`, averages over 1x1, 3x3, 6x6 and 8x8 bins."""

    def forward(self, x):
        return torch.cat(
            [backbones.average_pool(x, bins).flatten(2) for bins in (1, 3, 6, 8)], dim=2
        )


class ContextAggregation(nn.Module):
    """CA, Eqs. (8), (9): x `[N, C, h, w]`, context θ `[N, C, T]` -> x' `[N, C, h, w]`."""

    def __init__(self, channels):
        super().__init__()
        self.query = nn.Conv2d(channels, channels, 1)
        self.key, self.value = nn.Conv1d(channels, channels, 1), nn.Conv1d(channels, channels, 1)
        self.aggregate = Conv2dNormActivation(2 * channels, channels, 1)

    def forward(self, x, theta):
        query, key, value = self.query(x).flatten(2).mT, self.key(theta).mT, self.value(theta).mT
        attended = F.scaled_dot_product_attention(query, key, value)  # Eq. (8)  [N, h·w, C]
        return self.aggregate(torch.cat([attended.mT.reshape(x.shape), x], dim=1))  # Eq. (9)


class ContextUpdate(nn.Module):
    """CU, Eqs. (10), (11): x' `[N, C, h, w]`, θ of the level before `[N, C, T]` -> θ of this level
    `[N, C, T]`.
    """

    def __init__(self, channels):
        super().__init__()
        self.pool = PyramidPool()
        self.update = Conv2dNormActivation(2 * channels, channels, 1)

    def forward(self, x, theta):
        both = torch.cat([self.pool(x), theta], dim=1)  # Eq. (10)
        return self.update(both.unsqueeze(3)).squeeze(3)  # Eq. (11)


class SemanticHead(nn.Module):
    """Sect. 4.2: X `[N, D, h, w]` -> for each level what its last 1x1 convolution reads, `[N,
    channels, h/k, w/k]`.

    factors: k of each level, as in (8, 4, 2, 1). context: "ours"; "anl", a block at the finest
    level before it is pooled; "anl_multi", one at each level; None. outputs: how many levels, the
    finest ones, are returned.
    """

    def __init__(self, in_channels, factors, context="ours", outputs=4, channels=512):
        super().__init__()
        if context not in ("ours", "anl", "anl_multi", None):
            raise ValueError(f"context={context!r}: it is 'ours', 'anl', 'anl_multi' or None")
        self.factors, self.context, self.pool = factors, context, PyramidPool()
        self.reduce = nn.Conv2d(in_channels, channels, 1)
        blocks = {"ours": len(factors), "anl": 1, "anl_multi": len(factors), None: 0}[context]
        self.aggregate = nn.ModuleList(ContextAggregation(channels) for _ in range(blocks))
        updates = len(factors) - 1 if context == "ours" else 0
        self.update = nn.ModuleList(ContextUpdate(channels) for _ in range(updates))
        self.project = nn.ModuleList(
            Conv2dNormActivation(channels, channels, 1) for _ in range(outputs)
        )

    def forward(self, x):
        x = self.reduce(x)  # X^(L)
        if self.context == "anl":
            x = self.aggregate[0](x, self.pool(x))
        levels = [F.avg_pool2d(x, k) if k > 1 else x for k in self.factors]  # Eq. (3)
        if self.context == "anl_multi":
            levels = [
                block(level, self.pool(level)) for block, level in zip(self.aggregate, levels)
            ]
        if self.context == "ours":
            theta = self.pool(x)  # Eq. (6)
            for i, aggregate in enumerate(self.aggregate):
                levels[i] = aggregate(levels[i], theta)  # Eq. (4)
                if i < len(self.update):
                    theta = self.update[i](levels[i], theta)  # Eq. (5)
        levels = levels[-len(self.project) :]
        # Eq. (7), all but its last layer
        return [project(level) for project, level in zip(self.project, levels)]


class ResNetDecoder(nn.Module):
    """App. D: a backbone's four maps, finest first -> the same four with 48, 96, 192, 384 channels,
    fused.

    A 3x3 convolution each, then HRNet's last stage.
    """

    channels = (48, 96, 192, 384)

    def __init__(self, channels):
        super().__init__()
        self.reduce = nn.ModuleList(
            Conv2dNormActivation(a, b, 3) for a, b in zip(channels, self.channels)
        )
        self.fuse = nn.Sequential(
            *(backbones.HighResolutionModule(self.channels) for _ in range(3))
        )

    def forward(self, maps):
        return self.fuse([reduce(x) for reduce, x in zip(self.reduce, maps)])


# ------------------------------------------------------------------------------------------ network


class SpecializeAndFuse(nn.Module):
    """Backbone (with the decoder if it is no HRNet), unity head and semantic head, fused (Fig. 2).

    net(images): float `[N, 3, H, W]` -> logits float32 `[N, num_classes, H, W]`. net(images,
    labels), labels int64 `[N, H, W]`, 255 = ignored -> dict of the scalar losses of Eq. (1),
    "semantic" and "unity"; for one level "semantic", with output="auxiliary" also "auxiliary".
    Images whose sides are no multiples of the coarsest stride are resized to the nearest that are,
    and the logits back (Sect. 3.1).

    strides: of the levels, coarse to fine; the finest is the features', 4
    context: "ours", "anl", "anl_multi" or None (Table 6)
    output: "pyramid"; "single", the finest level alone; "auxiliary", the same with losses of the
    others (Table 8)
    policy: what is relabelled, see relabel (Table 7); threshold: τ, of a unity-cell
    """

    def __init__(
        self,
        num_classes,
        backbone="resnet50",
        weights=None,
        *,
        strides=(32, 16, 8, 4),
        context="ours",
        output="pyramid",
        policy="true_positive",
        threshold=0.9,
    ):
        super().__init__()
        strides = tuple(strides) if isinstance(strides, (tuple, list)) else (strides,)
        if (
            strides[-1:] != (4,)
            or len(strides) < 2
            or any(a <= b or a % b for a, b in zip(strides, strides[1:]))
        ):
            raise ValueError(
                f"strides={strides}: expected multiples, coarse to fine, the last 4, as in (32, "
                "16, 8, 4)"
            )
        if output not in ("pyramid", "single", "auxiliary"):
            raise ValueError(f"output={output!r}: it is 'pyramid', 'single' or 'auxiliary'")
        if policy not in POLICIES:
            raise ValueError(f"policy={policy!r}: it is {', '.join(map(repr, POLICIES))}")
        if not isinstance(threshold, (int, float)):
            raise ValueError(f"threshold={threshold!r}: expected a number, as 0.9")
        if output == "single" and context == "anl_multi":
            raise ValueError(
                "context='anl_multi' is for several levels: with output='single' take 'anl'"
            )
        self.strides, self.output, self.policy, self.threshold = strides, output, policy, threshold
        self.backbone = backbones.build(backbone, 32, weights)
        self.decoder = (
            None if backbone.startswith("hrnet") else ResNetDecoder(self.backbone.channels)
        )
        width = sum(self.backbone.channels if self.decoder is None else self.decoder.channels)  # D
        factors = [stride // 4 for stride in strides]
        if output == "single" and context != "ours":
            factors = factors[-1:]  # nothing needs the coarser levels
        self.semantic = SemanticHead(
            width, factors, context, 1 if output == "single" else len(factors)
        )
        self.unity = UnityHead(width, factors[:-1]) if output == "pyramid" else None
        coarser = len(self.semantic.project) - 1
        self.coarse_classifiers = nn.ModuleList(
            nn.Conv2d(512, num_classes, 1) for _ in range(coarser)
        )
        self.classifier = nn.Conv2d(512, num_classes, 1)  # of the finest level
        self.regularized = f"semantic.project.{coarser}.1"  # car.py acts on what enters it

    def pyramids(self, images):
        """(semantic logits of each level `[N, C, h, w]`, unity probabilities of all but the finest
        `[N, h, w]`).
        """
        maps = self.backbone(images, extend=False)  # they were resized, as Sect. 5 says
        maps = maps if self.decoder is None else self.decoder(maps)
        how = dict(size=maps[0].shape[2:], mode="bilinear", align_corners=False)
        # X  [N, D, H/4, W/4]
        x = torch.cat([maps[0], *(F.interpolate(m, **how) for m in maps[1:])], dim=1)
        classifiers = [*self.coarse_classifiers, self.classifier]
        semantic = [classifier(level) for classifier, level in zip(classifiers, self.semantic(x))]
        return semantic, [] if self.unity is None else self.unity(x)

    def fitted(self, images):
        """The images at the nearest size of which the coarsest stride is a divisor."""
        s = self.strides[0]
        size = [max(1, (side + s // 2) // s) * s for side in images.shape[2:]]
        return _resized(images, size)

    def forward(self, images, labels=None):
        fitted = self.fitted(images)
        semantic, unity_prob = self.pyramids(fitted)
        if labels is None:
            logits = (
                fuse(semantic, unity_prob, self.threshold)
                if self.output == "pyramid"
                else semantic[-1]
            )
            return _resized(_resized(logits.float(), fitted.shape[2:]), images.shape[2:])
        if fitted.shape != images.shape:
            labels = F.interpolate(
                labels[:, None].float(), size=fitted.shape[2:], mode="nearest-exact"
            )[:, 0].long()
        truth, unity = pyramid_labels(labels, self.strides)
        if self.output == "pyramid":
            truth, unity = relabel(truth, unity, unity_prob, self.threshold, self.policy)
            return pyramid_loss(semantic, unity_prob, truth, unity)
        losses = [
            backbones.pixel_cross_entropy(y, label) for y, label in zip(semantic[::-1], truth[::-1])
        ]
        auxiliary = (
            {"auxiliary": 0.4 * sum(losses[1:]) / len(losses[1:])}
            if self.output == "auxiliary"
            else {}
        )
        return {"semantic": losses[0]} | auxiliary

    @torch.no_grad()
    def figures(self, image):
        """Fig. A, of one image `[3, H, W]` or `[1, 3, H, W]`: label maps and maps in 0…1, each of
        its level's size.

        "semantic s", "unity s": raw, of the level of stride s; "chosen s": its labels where the
        fused result takes them, 255 where a coarser level has (done by coarser) or a finer one will
        (a mix-cell); "level": which it takes, 0 the coarsest, 1 the finest; "fused". Empty for one
        level. ValueError in training mode.
        """
        images = self.fitted(backbones.one_image(self, image))
        if self.output != "pyramid":
            return {}
        semantic, unity_prob = self.pyramids(images)
        labels = [y.argmax(1)[0] for y in semantic]
        level = chosen_level(unity_prob, semantic[-1], self.threshold)[0]
        pictures = {f"semantic {s}": y for s, y in zip(self.strides, labels)}
        pictures |= {f"unity {s}": p[0] for s, p in zip(self.strides, unity_prob)}
        for i, (s, y) in enumerate(zip(self.strides, labels)):
            pictures[f"chosen {s}"] = _up(y, level).masked_fill(level != i, IGNORE)
        pictures["level"] = level / (len(self.strides) - 1)
        return pictures | {"fused": fuse(semantic, unity_prob, self.threshold).argmax(1)[0]}


def _resized(x, size):
    """x `[N, C, h, w]` at that size, bilinear."""
    if x.shape[2:] == torch.Size(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


@torch.no_grad()
def levels_compared(net, pairs, num_classes):
    """Table 9 and Figs. 3, C: (table, difference), IoU in 0…1.

    net: a SpecializeAndFuse with output="pyramid", in evaluation mode; pairs: an iterable of
    (images `[N, 3, H, W]`, labels `[N, H, W]`). table `[L, L]`: mIoU of the semantic level of the
    row on the pixels for which the unity pyramid takes the level of the column, coarse to fine (the
    paper prints them fine to coarse). difference `[L, num_classes]`: IoU of each class if the level
    alone is the prediction, less that of the fused one (levels by nearest neighbour at the images'
    size). NaN where a class or a level does not occur. For example:

        net = evaluate.load(evaluate.read_checkpoint("runs/pyramid_fuse-camvid/last.pt"))
        val = data.dataset("camvid", "datasets/camvid", "val")
        pairs = ((data.normalise(x[None]), y[None].long()) for x, y in val)
        table, difference = levels_compared(net, pairs, val.num_classes)
    """
    L = len(net.strides)
    # [chosen level, level, truth, prediction]
    counts = torch.zeros(L, L, num_classes, num_classes, dtype=torch.int64)
    for images, labels in pairs:
        fitted = net.fitted(images)
        semantic, unity_prob = net.pyramids(fitted)
        level = chosen_level(unity_prob, semantic[-1], net.threshold)
        how = dict(size=labels.shape[1:], mode="nearest-exact")
        level = F.interpolate(level[:, None].float(), **how)[:, 0].long()
        for i, y in enumerate(semantic):
            prediction = _resized(
                _resized(_up(y, semantic[-1]).float(), fitted.shape[2:]), labels.shape[1:]
            ).argmax(1)
            known = labels != IGNORE
            index = ((level * L + i) * num_classes + labels)[known] * num_classes + prediction[
                known
            ]
            counts += torch.bincount(index.cpu(), minlength=counts.numel()).view_as(counts)

    def iou(matrix):  # [..., K, K] -> [..., K], NaN for a class that is nowhere
        hit = matrix.diagonal(dim1=-2, dim2=-1).double()
        return hit / (matrix.sum(-1) + matrix.sum(-2) - hit)

    fused = iou(sum(counts[i, i] for i in range(L)))
    return iou(counts).nanmean(-1).T, iou(counts.sum(0)) - fused


# Sect. 5.1.1; iterations are epochs · images / 16
# weights: --weights, the path of HRNet's ImageNet checkpoint, or with a ResNet "imagenet"
_COMMON = dict(
    backbone="hrnet_w48",
    optimizer="sgd",
    momentum=0.9,
    power=0.9,
    weight_decay=1e-4,
    batch_size=16,
    crop_size=512,
    scale=(0.5, 2.0),
    color="brightness",
    bn_momentum=0.1,  # open
)
RECIPES = {
    "ade20k": _COMMON | dict(lr=0.02, iterations=151_575),  # 120 epochs of 20,210
    "coco_stuff10k": _COMMON | dict(lr=0.001, iterations=61_875),  # 110 epochs of 9,000
    "pascal_context": _COMMON | dict(lr=0.001, iterations=62_475),  # 200 epochs of 4,998
}


def build(num_classes, backbone="resnet50", *, weights=None, **options):
    """A SpecializeAndFuse; `options` are its keywords, the paper's by default. ValueError for an
    unknown one.
    """
    return SpecializeAndFuse(
        num_classes, backbone, weights, **backbones.check_options(SpecializeAndFuse, options)
    )
