"""Channelized Axial Attention (CAA).

Ye Huang, Di Kang, Wenjing Jia, Liu Liu, Xiangjian He: "Channelized Axial Attention - considering
Channel Relation within Spatial Attention for Semantic Segmentation", AAAI 2022,
https://arxiv.org/abs/2101.07434. The numbers below are those of Ye Huang's thesis "Context-aware
Image Semantic Segmentation" (University of Technology Sydney, 2022), chapter 3.

The idea: spatial attention says where to look, channel attention what to look at. Side by side or
one after the other they contradict each other. Here the spatial attention is a column step followed
by a row step. Each step multiplies features by weights, then sums them; the channel gate acts
between the multiplication and the sum, and is computed from the weighted features of one row (one
column), not from the whole image's mean.

    Eqs. (3.1), (3.2)  self-attention            -> SpatialAttention(attention="self")
    Eqs. (3.3), (3.4)  column and row maps       -> axial_attention
    Eqs. (3.5), (3.8)  axial attention           -> channelized with gate=None
    Eqs. (3.6), (3.7)  weighted features α, β    -> channelized_grouped (channelized avoids them)
    Eqs. (3.9), (3.10) the gates                 -> channelized (pooling), ChannelAttention (ω)
    Eq.  (3.11)        the whole                 -> SpatialAttention.forward
    Algorithm 2        grouped vectorization     -> channelized_grouped
    Sect. 3.2          conflicts, Figs. 3.1-3.4  -> DualAttention, CAANet.figures
    Sect. 3.3.2.3      the deeper gate           -> ChannelAttention(layers, width)

Why the gate is nearly free. In Eq. (3.9) it multiplies α_{i,j,m} and does not depend on m, the
summed index; and what it is computed from is a sum over m as well. With z_{i,j} = Σ_m α_{i,j,m},
the plain attended features,

    Σ_m gate_i ⊙ α_{i,j,m}  =  gate_i ⊙ z_{i,j},
    gate_i = Gate(Σ_{m,j} α_{i,j,m} / HW) = Gate(mean_j z_{i,j} / H)

so one matrix product gives z, and the H·H·W·C numbers of Algorithm 2 are never laid out. Eq. (3.10)
is the same with the axes exchanged, and self-attention (Table 3.3) is the column step on a map of
one column, HW high.

What the paper prints and cannot mean, or counts in its own way:
- Eqs. (3.5)-(3.11) print A_col(x_{i,j}, x_{m,j}) beside g(x_{m,n}), the map of column j on values
  of column n. Summed as printed that costs H²W²C, not the O(H²W + HW²) of Sect. 3.3.1.2, and it is
  not what Algorithm 2 ([N, H, H, W] times [N, C, H, W]) and Fig. 3.5 do. Here, as there and in the
  released code, each column attends within itself (n in place of j), and the row step attends to
  the column step's result. Σ_{m,j} in Eq. (3.9) then leaves one gate for each row.
- Algorithm 2, line 1, prints a padding of H % G; what line 5 can reshape takes -H % G.
- Table 3.1's increments are multiply-adds in 2^30 of one gate vector for each axis: rows 1x128,
  7x128, 5x64 and 5x256 are exactly the weights of two ChannelAttention. Rows 3x128 and 5x128 print
  0.00027 and 0.00030; the same count gives 0.00031 and 0.00037. A map has H + W such vectors:
  0.013e9 at 513x513 and stride 16, 0.02 % of the network.

Where the paper is silent, as the released code does:
- 3x3 reduction to 512; queries of 64 channels (1x1 convolution, batch norm; query = key), unscaled
  softmax; values with batch norm and ReLU, no residual; an image-level branch; projection to 256,
  dropout 0.1; gates with leaky ReLU 0.2 and no biases; auxiliary loss 0.4; multi-grid (1, 2, 4) in
  the last stage of a ResNet.

Where the released code departs from the paper: it has a ReLU behind the queries' batch norm,
released=True here. The paper has "a 1x1 convolution" (Sect. 3.3.1.1), into which batch norm alone
can be folded. In short runs that trains better: vectors behind a ReLU have no product below 0, so a
long one draws positions that show something else.

Where both are silent, our choice:
- The image-level branch has no batch norm, for there is one value of a channel in an image: too few
  to normalise.
- The head starts as a plain one: the 1x1 convolutions around the attention as the identity. The
  gates start from Kaiming's initialisation, for PyTorch's smaller one would shrink their signal a
  hundredfold. They start near 1/2 in any case, since Σα/HW carries a factor 1/H (1/W). The weights
  of linear queries' batch norm start at 0.7: a query's product with itself is then near 64 · 0.7²,
  32 as behind a ReLU.
- "Axial attention + SE" (Table 3.2) has SENet's reduction, 16.
- The dual designs of Sect. 3.2 are DANet's (Fu et al., CVPR 2019): x + γ·attention with γ learned
  from 0, and a cross entropy of weight 1 for each branch. The channel map is DANet's equation,
  softmax(X Xᵀ); its released code takes softmax(max - X Xᵀ). The spatial side is this file's
  attention, so that the three designs of Fig. 3.1 differ in nothing but where channel attention
  stands; DANet's is attention="self".
- Image and feature map are aligned as at the papers' 513 and 769 pixels: backbones.on_grid and
  backbones.upsample.
- The attention maps and the gates are computed in float32 under mixed precision: an unscaled
  product of 64 channels can exceed float16's 65504, and Σα/HW falls below its smallest normal
  number. The maps are laid out (no fused attention), for they are what Eqs. (3.3) and (3.4) name
  and what the figures show; a column's is small.

    Table 3.1            output_stride=16, channelization, channel_layers, channel_width
    Table 3.2            output_stride=16, channelization=False, se=False or True
    Table 3.3            output_stride=16, attention="self", channelization
    Table 3.4            output_stride, auxiliary; evaluate.py --scales … --flip
    Table 3.5            backbone
    Tables 3.6, 3.8-3.11 RECIPES; evaluate.py --scales … --flip
    Table 3.7            decoder
    Fig. 3.1 (a), (b)    dual="parallel", dual="sequential"

To copy: this file and backbones.py. `SpatialAttention` and what stands above it need torch and
torchvision alone.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import Conv2dNormActivation, SqueezeExcitation

import backbones

# ---------------------------------------------------------------------------------------- equations

# The order of `[N, C, H, W]` in which one axis is attended to: (N, the other axis, the axis, C);
# and the way back.
TO_AXIS = {"column": (0, 3, 2, 1), "row": (0, 2, 3, 1)}
FROM_AXIS = {"column": (0, 3, 2, 1), "row": (0, 3, 1, 2)}


def axial_attention(query, axis):
    """Eq. (3.3) for axis="column", Eq. (3.4) for axis="row": who attends to whom within one column,
    one row.

    query `[N, c, H, W]`, which is the key as well -> softmax over the last index, the attended
    position: `[N, W, H, H]` (column j, query row i, attended row m) or `[N, H, W, W]` (row i, query
    column j, attended column n). float32 at least, also under autocast.
    """
    with torch.autocast(query.device.type, enabled=False):
        query = query.to(torch.promote_types(query.dtype, torch.float32))
        query = query.permute(TO_AXIS[axis])  # [N, W, H, c] or [N, H, W, c]
        return torch.softmax(query @ query.transpose(2, 3), dim=-1)  # Eqs. (3.3), (3.4)


def channelized(attention, value, gate, axis):
    """One axis of Eqs. (3.6)-(3.11): attended features, gated by channel with a gate for each row
    (column).

    attention from `axial_attention`, value `[N, C, H, W]`, gate a callable `[N, L, C] -> [N, L, C]`
    with values in 0…1, L = H for axis="column" and W for axis="row"; None leaves the gate out:
    plain axial attention, Eq. (3.5).
    Returns `[N, C, H, W]`. Equal to `channelized_grouped`; the module's docstring has the algebra.
    """
    value = value.permute(TO_AXIS[axis])  # [N, W, H, C] or [N, H, W, C]
    z = attention.to(value.dtype) @ value  # Σ_m α or Σ_n β of Eqs. (3.6), (3.7)
    if gate is not None:
        length = z.shape[2]
        pooled = (
            z.mean(dim=1, dtype=torch.promote_types(z.dtype, torch.float32)) / length
        )  # [N, L, C]  Σα / HW
        z = z * gate(pooled).unsqueeze(1).to(z.dtype)  # Eqs. (3.9), (3.10)
    return z.permute(FROM_AXIS[axis])


def channelized_grouped(attention, value, gate, axis, groups):
    """Algorithm 2: the same as `channelized`, the weighted features of one group of queries at a
    time laid out.

    Memory N·(L/groups)·L·(other axis)·C numbers, in training (where α is kept for the gradient)
    `groups` times that. The released code has 16 groups. Here to be read and to be compared with;
    nothing else calls it.
    """
    if axis == "row":  # the algorithm is printed for columns: exchange the axes
        return channelized_grouped(
            attention, value.transpose(2, 3), gate, "column", groups
        ).transpose(2, 3)
    N, C, H, W = value.shape
    A = attention.to(value.dtype).permute(2, 0, 3, 1)  # [H, N, H, W]  line 2: the query row first
    A = F.pad(A, (0, 0, 0, 0, 0, 0, 0, -H % groups))  # [H+, N, H, W]  lines 1, 3, 4
    A = A.reshape(groups, -1, N, H, W)  # [G, H+/G, N, H, W]  line 5
    Y = []
    for A_g in A:  # lines 6 to 8
        alpha = A_g.unsqueeze(2) * value  # [H+/G, N, C, H, W]  Eq. (3.6)
        if gate is not None:
            pooled = alpha.sum(dim=(3, 4)) / (H * W)  # [H+/G, N, C]  Σ_{m,j} α / HW
            weight = gate(pooled.transpose(0, 1)).transpose(0, 1).to(alpha.dtype)  # [H+/G, N, C]
            alpha = weight[..., None, None] * alpha  # Eq. (3.9)
        Y.append(alpha.sum(dim=3))  # [H+/G, N, C, W]
    Y = torch.cat(Y)[:H]  # [H, N, C, W]  lines 9 to 11
    return Y.permute(1, 2, 0, 3)  # [N, C, H, W]  line 12


def channel_map(x):
    """The C x C map of DANet's channel attention (Sect. 3.1): x `[N, C, H, W]` -> softmax(X Xᵀ)
    `[N, C, C]`, float32.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.flatten(2).to(torch.promote_types(x.dtype, torch.float32))
        return torch.softmax(x @ x.transpose(1, 2), dim=-1)


# ------------------------------------------------------------------------------------------- layers


class ChannelAttention(nn.Module):
    """The gate of Eqs. (3.9), (3.10): `[N, L, C] -> [N, L, C]` in 0…1, in the precision of its
    weights also under autocast.

    layers: hidden layers of `width` channels, at least 1 (Sect. 3.3.2.3). With layers=1 and
    negative_slope=0 it is as printed, fc[0] being ω_c1 or ω_r1 and fc[1] ω_c2 or ω_r2.
    """

    def __init__(self, channels, width=128, layers=5, negative_slope=0.2):
        super().__init__()
        if layers < 1 or width < 1:
            raise ValueError(
                f"a gate of {layers} layers of {width} channels: expected at least one of each"
            )
        sizes = [channels] + [width] * layers + [channels]
        self.fc = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in zip(sizes, sizes[1:]))
        self.negative_slope = negative_slope
        for fc in self.fc:
            nn.init.kaiming_normal_(fc.weight, a=negative_slope)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.fc[0].weight.dtype)
            for fc in self.fc[:-1]:
                x = F.leaky_relu(fc(x), self.negative_slope)
            return torch.sigmoid(self.fc[-1](x))


class SpatialAttention(nn.Module):
    """Attention over positions, `[N, C, H, W] -> [N, C, H, W]`: axial (Eq. 3.11; 3.5 without gates)
    or self (Eq. 3.1).
    """

    def __init__(
        self,
        channels=512,
        attention="axial",
        channelization=True,
        layers=5,
        width=128,
        query_channels=64,
        released=False,
    ):
        super().__init__()
        if attention not in ("axial", "self"):
            raise ValueError(f"attention={attention!r}: it is 'axial' or 'self'")
        self.axial = attention == "axial"
        how = dict(kernel_size=1, activation_layer=nn.ReLU if released else None)
        self.theta = Conv2dNormActivation(channels, query_channels, **how)
        self.phi = Conv2dNormActivation(channels, query_channels, **how) if self.axial else None
        self.g = Conv2dNormActivation(channels, channels, 1)
        nn.init.dirac_(self.g[0].weight)
        for query in (self.theta, self.phi) if self.axial else (self.theta,):
            nn.init.kaiming_normal_(query[0].weight, nonlinearity="relu")
            nn.init.constant_(query[1].weight, 1.0 if released else 0.7)
        self.gate_col = ChannelAttention(channels, width, layers) if channelization else None
        self.gate_row = (
            ChannelAttention(channels, width, layers) if channelization and self.axial else None
        )

    def maps(self, x):
        """The attention maps of x: (column `[N, W, H, H]`, row `[N, H, W, W]`), or for self (`[N,
        1, HW, HW]`, None).
        """
        if self.axial:
            return axial_attention(self.theta(x), "column"), axial_attention(self.phi(x), "row")
        return axial_attention(
            self.theta(x).flatten(2).unsqueeze(3), "column"
        ), None  # Eq. (3.2): one column of all pixels

    def forward(self, x):
        col, row = self.maps(x)
        if self.axial:
            y = channelized(col, self.g(x), self.gate_col, "column")  # the inner sum of Eq. (3.11)
            return channelized(row, y, self.gate_row, "row")  # the outer sum
        y = channelized(
            col, self.g(x).flatten(2).unsqueeze(3), self.gate_col, "column"
        )  # Eq. (3.1), a gate for each pixel
        return y.reshape(x.shape)


class CAA(nn.Module):
    """The head: `[N, in_channels, H, W]` -> `[N, 256, H, W]`."""

    def __init__(
        self,
        in_channels,
        attention="axial",
        channelization=True,
        layers=5,
        width=128,
        se=False,
        released=False,
    ):
        super().__init__()
        self.reduce = Conv2dNormActivation(in_channels, 512, 3)
        self.attention = SpatialAttention(
            512, attention, channelization, layers, width, released=released
        )
        self.se = SqueezeExcitation(512, 512 // 16) if se else nn.Identity()
        self.after = Conv2dNormActivation(512, 512, 1)
        nn.init.dirac_(self.after[0].weight)
        self.image_level = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(512, 512, 1), nn.ReLU())
        self.project = Conv2dNormActivation(1024, 256, 1)
        self.channels = 256

    def forward(self, x):
        x = self.reduce(x)
        y = self.after(self.se(self.attention(x)))
        return self.project(torch.cat([y, self.image_level(x).expand_as(x)], dim=1))


class DualAttention(nn.Module):
    """Fig. 3.1 (a) "parallel": spatial + channel attention; (b) "sequential": channel, then spatial
    attention.

    `[N, in_channels, H, W]` -> (features `[N, 512, H, W]`, dict of the branches' logits `[N,
    num_classes, H, W]`), the branches that show the conflicts (Sect. 3.2.1): "spatial" and
    "channel", or "channel" with its gradient stopped.
    """

    def __init__(
        self, in_channels, num_classes, design="parallel", attention="axial", released=False
    ):
        super().__init__()
        if design not in ("parallel", "sequential"):
            raise ValueError(f"dual={design!r}: it is None, 'parallel' or 'sequential'")
        self.design, self.channels = design, 512
        self.reduce = Conv2dNormActivation(in_channels, 512, 3)
        self.attention = SpatialAttention(512, attention, channelization=False, released=released)
        self.gamma_spatial, self.gamma_channel = (
            nn.Parameter(torch.zeros(())),
            nn.Parameter(torch.zeros(())),
        )
        self.after = Conv2dNormActivation(512, 512, 3)
        self.channel_logits = nn.Sequential(nn.Dropout(0.1), nn.Conv2d(512, num_classes, 1))
        if design == "parallel":
            self.reduce_channel = Conv2dNormActivation(in_channels, 512, 3)
            self.after_channel = Conv2dNormActivation(512, 512, 3)
            self.spatial_logits = nn.Sequential(nn.Dropout(0.1), nn.Conv2d(512, num_classes, 1))

    def spatial(self, x):
        """x + γ · spatial attention, `[N, 512, H, W]`"""
        return x + self.gamma_spatial * self.attention(x)

    def channel(self, x):
        """x + γ · channel attention, `[N, 512, H, W]`"""
        return x + self.gamma_channel * (channel_map(x).to(x.dtype) @ x.flatten(2)).reshape(x.shape)

    def forward(self, x):
        if self.design == "parallel":
            spatial = self.after(self.spatial(self.reduce(x)))
            channel = self.after_channel(self.channel(self.reduce_channel(x)))
            return spatial + channel, {
                "spatial": self.spatial_logits(spatial),
                "channel": self.channel_logits(channel),
            }
        channel = self.channel(self.reduce(x))
        return self.after(self.spatial(channel)), {"channel": self.channel_logits(channel.detach())}


# ------------------------------------------------------------------------------------------ network


class CAANet(nn.Module):
    """Backbone, CAA (or dual attention), classifier, bilinear upsampling of the logits (Sects.
    3.4.1.1, 3.4.1.2).

    net(images): float `[N, 3, H, W]` -> logits float32 `[N, num_classes, H, W]`. net(images,
    labels), labels int64 `[N, H, W]`, 255 = ignored -> dict of scalar losses: "cross_entropy", with
    `auxiliary` "auxiliary" (0.4 of it), with `dual` the branches' "spatial" and "channel".

    attention: "axial" or "self" (Table 3.3)
    channelization: the gates of Eqs. (3.9), (3.10); channel_layers, channel_width: theirs (Table
    3.1)
    se: squeeze-and-excitation after the attention (Table 3.2, with channelization=False)
    dual: None, "parallel" or "sequential": Sect. 3.2's designs in place of CAA; of the above only
    `attention` applies
    released: queries with the ReLU of the authors' code
    auxiliary: a loss on the backbone's last map (Table 3.4); decoder: DeepLabv3+'s (Table 3.7)
    output_stride: of the backbone, 8 or 16 (Table 3.4)
    """

    def __init__(
        self,
        num_classes,
        backbone="resnet50",
        weights=None,
        *,
        attention="axial",
        channelization=True,
        channel_layers=5,
        channel_width=128,
        se=False,
        dual=None,
        released=False,
        auxiliary=True,
        decoder=False,
        output_stride=8,
    ):
        super().__init__()
        grid = (1, 2, 4) if backbone.startswith("resnet") else None
        self.backbone = backbones.build(backbone, output_stride, weights, grid)
        low, *_, high = self.backbone.channels
        self.stride = self.backbone.strides[-1]
        if dual is not None:
            self.head = DualAttention(high, num_classes, dual, attention, released)
        else:
            self.head = CAA(
                high, attention, channelization, channel_layers, channel_width, se, released
            )
        corners = self.backbone.corners
        self.decoder = backbones.Decoder(self.head.channels, low, corners) if decoder else None
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Conv2d((self.decoder or self.head).channels, num_classes, 1)
        layers = Conv2dNormActivation(high, 256, 1), nn.Dropout(0.1), nn.Conv2d(256, num_classes, 1)
        self.auxiliary = nn.Sequential(*layers) if auxiliary else None

    def forward(self, images, labels=None):
        size, corners = images.shape[2:], self.backbone.corners
        maps = self.backbone(backbones.on_grid(images, self.backbone.grid, corners))
        features = self.head(maps[-1])
        features, branches = features if isinstance(self.head, DualAttention) else (features, {})
        stride = self.stride
        if self.decoder is not None:
            features, stride = self.decoder(features, maps[0]), 4
        logits = backbones.upsample(self.classifier(self.dropout(features)), stride, size, corners)
        if labels is None:
            return logits
        losses = {"cross_entropy": backbones.pixel_cross_entropy(logits, labels)}
        for name, branch in branches.items():
            branch = backbones.upsample(branch, self.stride, size, corners)
            losses[name] = backbones.pixel_cross_entropy(branch, labels)
        if self.auxiliary is not None:
            auxiliary = backbones.upsample(self.auxiliary(maps[-1]), self.stride, size, corners)
            losses["auxiliary"] = 0.4 * backbones.pixel_cross_entropy(auxiliary, labels)
        return losses

    @torch.no_grad()
    def figures(self, image, pixel=None):
        """The pictures of one image `[3, H, W]` or `[1, 3, H, W]`. ValueError in training mode.

        CAA: what the position of `pixel` (row, column in the image; its centre if None) attends to
        before the gates: maps `[H, W]` in 0…1. ValueError where it lies outside the image. Dual
        attention: the label maps `[H, W]` of its branches and of the whole (Figs. 3.3, 3.4).
        """
        image = backbones.one_image(self, image)
        size, corners = image.shape[2:], self.backbone.corners
        x = self.backbone(backbones.on_grid(image, self.backbone.grid, corners))[-1]
        if isinstance(self.head, DualAttention):
            logits = self.head(x)[1].items()
            branches = {
                name: backbones.upsample(y, self.stride, size, corners) for name, y in logits
            }
            labels = {f"{name} attention": y.argmax(1)[0] for name, y in branches.items()}
            return labels | {"prediction": self(image).argmax(1)[0]}
        row, column = backbones.one_pixel(pixel, size)
        shift = self.stride // 2 if corners else 0
        rows, columns = (
            (torch.arange(side) + shift) // self.stride for side in size
        )  # the nearest position
        maps = attended(self.head.attention, self.head.reduce(x), rows[row], columns[column])
        return {name: (m / m.max())[rows[:, None], columns] for name, m in maps.items()}


def attended(attention, x, i, j):
    """What position (i, j) of x `[1, C, H, W]` attends to in a SpatialAttention: dict of maps `[H,
    W]`.

    "column, then row" is A_row(i, j, n) · A_col(n, i, m) at (m, n): in two steps a position reaches
    every other.
    """
    H, W = x.shape[2:]
    col, row = attention.maps(x)
    if row is None:
        return {"self-attention": col[0, 0, i * W + j].reshape(H, W)}
    column, across = col.new_zeros(H, W), col.new_zeros(H, W)
    column[:, j], across[i] = col[0, j, i], row[0, i, j]
    return {
        "column attention": column,
        "row attention": across,
        "column, then row": row[0, i, j] * col[0, :, i].T,
    }


# Sect. 3.4.1.3 for all: SGD at 0.01, (1 - iter/max_iter)^0.9, random flip, scale and crop,
# synchronized batch norm.
_COMMON = dict(
    backbone="resnet101",  # Sect. 3.4.1.1
    weights="imagenet",  # Sect. 3.4.1.1
    output_stride=8,  # Sect. 3.4.1.1: 8 to compare with others, 16 for the ablations
    optimizer="sgd",
    lr=0.01,
    power=0.9,
    batch_size=16,
    crop_size=513,  # open; the released configuration's
    momentum=0.9,  # open; the released configuration's
    weight_decay=1e-4,  # open; the released configuration's
    bn_momentum=0.0003,  # open; the released configuration's (Keras 0.9997)
    scale=(0.5, 2.0),  # open; the released configuration's
    scale_step=0.1,  # open; the released configuration's
    color="none",  # only "the most basic" augmentation
)
RECIPES = {
    "pascal_context": _COMMON | dict(iterations=40_000),  # Sect. 3.4.2
    "coco_stuff10k": _COMMON | dict(iterations=40_000),  # Sect. 3.4.3
    "cityscapes": _COMMON
    | dict(iterations=80_000, batch_size=8, crop_size=769),  # Sects. 3.4.1.3, 3.4.4
    # Sect. 3.4.5 names the backbone; iterations are open: SegFormer's, with whom it compares
    "coco_stuff164k": _COMMON | dict(iterations=80_000, backbone="efficientnet_b5"),
}


def build(num_classes, backbone="resnet50", *, weights=None, **options):
    """A CAANet; `options` are its keywords, the thesis's final setting by default. ValueError for
    an unknown one.
    """
    return CAANet(num_classes, backbone, weights, **backbones.check_options(CAANet, options))
