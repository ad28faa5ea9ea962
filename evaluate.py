"""Measure a trained network, visualise it, and count parameters and multiply-adds of any network.

    python evaluate.py --checkpoint runs/caa-shapes/last.pt          # mIoU and IoU per class
    python evaluate.py --checkpoint … --scales 0.75 1 1.25 --flip --json result.json
    python evaluate.py --checkpoint … --images street.jpg            # any photograph, any folder
    python evaluate.py --checkpoint … --figures figures              # internal visualisations
    python evaluate.py --checkpoint … --figures figures --compare OTHER.pt    # beside each other
    python evaluate.py --method caa --backbone resnet101 --cost      # parameters, multiply-adds
    python evaluate.py --method caa --backbone resnet50 --speed      # images per second, memory
    torchrun --nproc-per-node 8 evaluate.py --checkpoint …           # the same, on eight processes

Numbers are over the labelled pixels of the whole split, each image at its own size. A class that is
in neither labels nor predictions has no IoU: it is left out of the mean, and named.
"""

import argparse
import ast
import contextlib
import importlib.util
import inspect
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import backbones
import data
from data import UserError, guarded, own_session

# ------------------------------------------------------------------------------------------ metrics


class ConfusionMatrix:
    """Counts of (true class, predicted class) over all labelled pixels: `matrix` int64
    `[num_classes, num_classes]`.
    """

    def __init__(self, num_classes, device="cpu"):
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, prediction, labels):
        """Add label maps of one shape, of any integer type; pixels labelled 255 do not count."""
        K = len(self.matrix)
        # For an ignored pixel the index is at least 255·K ≥ K², beyond the counts that are kept.
        pairs = labels.flatten().long() * K + prediction.flatten()
        self.matrix += torch.bincount(pairs, minlength=K * K)[: K * K].view(K, K)

    def all_reduce(self):
        """Sum over all processes, which may have counted unequal shares."""
        if dist.is_initialized():
            dist.all_reduce(self.matrix)

    def result(self):
        """mIoU, pixel_accuracy, class_accuracy in 0…1, IoU per class (None: in neither labels nor
        predictions), labelled (whether the class is labelled somewhere).

        class_accuracy is the mean over the labelled classes. NaN where nothing is labelled.
        """
        matrix = self.matrix.cpu().double()
        hit, true, predicted = matrix.diag(), matrix.sum(1), matrix.sum(0)
        union = true + predicted - hit
        iou = hit / union  # NaN where the union is empty
        return {
            "mIoU": iou[union > 0].mean().item(),
            "pixel_accuracy": (hit.sum() / matrix.sum()).item(),
            "class_accuracy": (hit / true)[true > 0].mean().item(),
            "IoU": [value.item() if count else None for value, count in zip(iou, union)],
            "labelled": (true > 0).tolist(),
        }


def table(result, classes):
    """The result as text: IoU per class, then the means; classes without an IoU are named last."""
    pairs = list(zip(classes, result["IoU"]))
    lines = [f"  {name:<20} {value:6.3f}" for name, value in pairs if value is not None]
    rows = {
        name.replace("_", " "): result[name]
        for name in ("mIoU", "pixel_accuracy", "class_accuracy")
    }
    rows |= {f"mIoU at scale {s}": value for s, value in result.get("mIoU_at_scale", {}).items()}
    lines += [f"{k:<22} {math.nan if value is None else value:6.3f}" for k, value in rows.items()]
    absent = ", ".join(name for name, value in pairs if value is None)
    if absent:
        lines.append(f"not in the mean (neither labelled nor predicted): {absent}")
    return "\n".join(lines)


def warn_of_absent(labelled, dataset, name):
    """A warning on stderr, where a result could be wrong unnoticed: classes without any label."""
    absent = [name for name, there_is in zip(dataset.classes, labelled) if not there_is]
    text = f"no label of {name} holds {', '.join(absent)}; is that right? `python data.py` shows"
    text = f"{text} the ids of the files"
    if not any(labelled):
        text = f"no pixel of {name} is labelled: there is nothing to measure"
    if absent:
        print(f"warning: {text}", file=sys.stderr)


# --------------------------------------------------------------------------------------- prediction


@torch.no_grad()
def predict(net, images, scales=(1.0,), flip=False, window=None):
    """Class probabilities `[N, K, H, W]`, float32, of images `[N, 3, H, W]`.

    The mean over the scales, each with its mirror image if `flip`. window: cut each scaled image
    into overlapping squares of that side (steps of two thirds), and average where they overlap.
    """
    total = at_scale(net, images, scales[0], flip, window)
    for scale in scales[1:]:
        total += at_scale(net, images, scale, flip, window)
    return total.div_(len(scales))


@torch.no_grad()
def at_scale(net, images, scale, flip=False, window=None):
    """`predict` of one scale: probabilities at the size of the images, which the network sees
    resized.
    """
    size, scaled, kwargs = images.shape[2:], images, dict(mode="bilinear", align_corners=False)
    if scale != 1:
        target = [max(1, round(side * scale)) for side in size]
        scaled = F.interpolate(images, size=target, antialias=True, **kwargs)
    p = _windows(net, scaled, window)
    if flip:
        p += _windows(net, scaled.flip(3), window).flip(3)
        p /= 2
    return p if p.shape[2:] == size else F.interpolate(p, size=size, **kwargs)


@torch.no_grad()
def classify(net, images, scales=(1.0,), flip=False, window=None):
    """The classes int64 `[N, H, W]` of `predict`. One view needs no probabilities."""
    one = tuple(scales) == (1.0,) and not flip and not (window and max(images.shape[2:]) > window)
    scores = net(images) if one else predict(net, images, scales, flip, window)
    return highest(scores)


def highest(scores):
    """The classes `[N, H, W]` of the highest scores `[N, K, H, W]`; UserError for NaN."""
    values, classes = scores.max(1)
    if not values.isfinite().all():
        text = "the network's logits are not finite: its weights are too large, or damaged"
        raise UserError(f"{text}; train with a lower --lr, or with --amp off")
    return classes


def label_map(net, image, device, amp="off", **kwargs):
    """The predicted classes int64 `[H, W]` of one image, uint8 `[3, H, W]`; kwargs of `predict`."""
    with autocast(device, amp):
        return classify(net, data.normalise(image[None].to(device)), **kwargs)[0]


def _softmax(logits):
    """In place: at 2048x1024 with 171 classes a second map would take 1.4 GB."""
    logits -= logits.amax(1, keepdim=True)
    logits.exp_()
    return logits.div_(logits.sum(1, keepdim=True))


def _windows(net, images, window):
    H, W = images.shape[2:]
    if window is None or max(H, W) <= window:
        return _softmax(net(images).float())
    total, count = None, images.new_zeros(1, 1, H, W)
    for top in _starts(H, window):
        for left in _starts(W, window):
            rows, columns = slice(top, top + window), slice(left, left + window)
            part = _softmax(net(images[:, :, rows, columns]).float())
            if total is None:
                total = part.new_zeros(len(images), part.shape[1], H, W)
            total[:, :, rows, columns] += part
            count[:, :, rows, columns] += 1
    return total.div_(count)


def _starts(side, window):
    last = max(0, side - window)
    return sorted({min(start, last) for start in range(0, last + window, max(1, window * 2 // 3))})


def evaluate(net, dataset, device, amp="off", workers=2, save=None, stopped=lambda: False,
             scales=(1.0,), **kwargs):  # fmt: skip
    """The result of `net` (in evaluation mode) over all of `dataset`, shared among the processes of
    the run.

    Process r of w takes the images r, r + w, …: none twice, none left out; shares may be unequal,
    because nothing is exchanged before the counts are added up. scales, kwargs: see `predict`; of
    several scales the mIoU of each alone is in the result too, "mIoU_at_scale". save: called with
    (index, prediction `[H, W]`). stopped: asked before every image; where it says yes the result is
    that of a part.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    indices = range(rank, len(dataset), world)
    matrix = ConfusionMatrix(dataset.num_classes, device)
    several = scales if len(scales) > 1 else ()
    alone = {scale: ConfusionMatrix(dataset.num_classes, device) for scale in several}
    pairs = read_all(Subset(dataset, indices), device, workers, "evaluating", rank > 0)
    for index, (image, labels) in zip(indices, pairs):
        if stopped():
            break
        with autocast(device, amp):
            if several:
                total = 0
                for scale in scales:
                    p = at_scale(net, image, scale, **kwargs)
                    alone[scale].update(p.argmax(1), labels)
                    total = p.add_(total)
                prediction = highest(total)  # of the sum, as of the mean
            else:
                prediction = classify(net, image, scales, **kwargs)
        matrix.update(prediction, labels)
        if save:
            save(index, prediction[0])
    for counts in (matrix, *alone.values()):
        counts.all_reduce()
    each = {f"{scale:g}": counts.result()["mIoU"] for scale, counts in alone.items()}
    return matrix.result() | ({"mIoU_at_scale": each} if each else {})


def read_all(dataset, device, workers, what, quiet=False):
    """(images float32 `[1, 3, H, W]`, labels int64 `[1, H, W]`) of `dataset`; a progress bar."""
    loader = DataLoader(dataset, batch_size=1, num_workers=workers, worker_init_fn=own_session)
    for image, labels in tqdm(loader, desc=what, unit="img", leave=False, disable=quiet or None):
        yield data.normalise(image.to(device)), labels.to(device).long()


# --------------------- what train.py uses too: networks, checkpoints, processes, precision, flags


def network(method, num_classes, backbone, weights=None, output_stride=None, options=None):
    """`METHOD.build(…)` of METHOD.py; UserError if there is none, or if its options do not fit."""
    module, options = method_file(method), dict(options or {})
    if output_stride is not None:
        options["output_stride"] = output_stride
    reserved = ", ".join({"num_classes", "backbone", "weights"} & set(options))
    if reserved:
        text = f"{reserved} is not an --option; it has a flag of its own, or follows from the"
        raise UserError(f"{text} dataset")
    try:
        return module.build(num_classes, backbone, weights=weights, **options)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(" ".join(str(error).split())) from error
    except (TypeError, RuntimeError) as error:
        if not options:
            raise
        given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        reason = " ".join(str(error).split())
        raise UserError(f"{method} cannot be built with the options {given} ({reason})") from error


def method_file(name):
    """The module NAME.py, with its `build`."""
    known = name.isidentifier() and not name.startswith("__") and importlib.util.find_spec(name)
    if not known or not known.has_location:  # a folder, say
        text = f"unknown method '{name}': there is no file {name}.py"
        raise UserError(f"{text} with a function build")
    module = importlib.import_module(name)
    if not hasattr(module, "build"):
        raise UserError(f"'{name}' is not a method: {module.__file__} has no function build")
    return module


def read_checkpoint(path):
    """What train.py saved at `path`; UserError where it cannot be read."""
    expected = "expected a last.pt or best.pt that train.py wrote"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint '{path}'; {expected}") from None
    except Exception as error:  # a file cut short, or another kind of file, fails in many ways
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = reason.split(" In PyTorch")[0]
        raise UserError(f"checkpoint '{path}' cannot be read ({reason}); {expected}") from None
    parts = {"net", "settings", "step", "classes", "palette"}
    if not isinstance(checkpoint, dict) or not parts <= set(checkpoint):
        text = f"'{path}' is not a checkpoint of train.py"
        raise UserError(f"{text}; a backbone's weights go to --weights")
    if not sound(**checkpoint):
        raise UserError(f"checkpoint '{path}' is damaged; {expected}")
    return checkpoint


def sound(net, settings, step, classes, palette, raw_ids=None, **_):
    """Whether the parts of a checkpoint are of the kinds that train.py saves."""

    def are(kind, values):
        return isinstance(values, (list, tuple)) and all(isinstance(v, kind) for v in values)

    if not (isinstance(settings, dict) and are(str, classes) and are((list, tuple), palette)):
        return False
    names = [settings.get(name) for name in ("method", "backbone", "dataset")]
    colors = all(are(int, c) and len(c) == 3 and 0 <= min(c) <= max(c) < 256 for c in palette)
    ids = raw_ids is None or are(int, raw_ids) and len(raw_ids) == len(classes)
    return (
        isinstance(net, dict) and are(torch.Tensor, list(net.values())) and are(str, names)
        and isinstance(settings.get("option"), dict) and "output_stride" in settings
        and isinstance(settings.get("data_root"), (str, type(None)))
        and isinstance(step, int) and step >= 0 and colors and len(palette) == len(classes) > 0
        and ids and all(0 <= i < 256 for i in raw_ids or [])
    )  # fmt: skip


def load(checkpoint, output_stride=None, options=None):
    """The trained network in a checkpoint, in evaluation mode.

    output_stride, options: evaluate so and not as trained, where that changes no weight. UserError
    where it does, or where the method's file has changed.
    """
    settings, changed = checkpoint["settings"], output_stride is not None or bool(options)
    output_stride = settings["output_stride"] if output_stride is None else output_stride
    options, classes = settings["option"] | (options or {}), len(checkpoint["classes"])
    parts = settings["method"], classes, settings["backbone"], None, output_stride, options
    net = network(*parts)
    restore(net, checkpoint, changed)
    return net.eval()


def restore(net, checkpoint, changed=False):
    """The checkpoint's weights into `net`; UserError where they do not fit."""
    try:
        net.load_state_dict(checkpoint["net"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        if changed:
            text = "with these --option and --output-stride the network has other weights than the"
            text = f"{text} checkpoint; only what changes no weight can be changed ({reason})"
            raise UserError(text) from None
        method = checkpoint["settings"]["method"]
        raise UserError(
            f"the checkpoint does not fit {method}.py as it is now ({reason})"
        ) from None


def processes(device=None):
    """(device, rank, world): under torchrun joins its process group (nccl on CUDA, gloo on the
    CPU).
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind, count = torch.device(device).type, torch.cuda.device_count()
    except RuntimeError:
        kind = None
    if kind not in ("cpu", "cuda", "mps"):
        raise UserError(f"unknown device '{device}'; expected cpu, cuda, cuda:N or mps")
    if kind == "cuda" and (torch.device(device).index or 0) >= count:
        text = f"device '{device}': torch sees {count} CUDA GPUs here; take another"
        raise UserError(f"{text}, or --device cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("device 'mps': torch sees no Apple GPU here; take --device cpu")
    if "WORLD_SIZE" not in os.environ:
        return torch.device(device), 0, 1
    if kind == "mps":
        raise UserError("device 'mps' is for one process: start it without torchrun")
    if kind == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= count:
            text = f"process {local} of this machine has no GPU of its own: there are {count}"
            raise UserError(f"{text}; start fewer processes")
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    except ValueError as error:  # not torchrun's environment
        text = f"the processes cannot meet ({' '.join(str(error).split())[:120]})"
        raise UserError(f"{text}; start them with torchrun, or unset WORLD_SIZE") from None
    return torch.device(device), dist.get_rank(), dist.get_world_size()


def device_name(device):
    """The GPU's name, or that of the device with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else str(device)


def amp_dtype(amp, device):
    """The type of mixed precision "auto", "bf16", "fp16", "off": None, bfloat16 or float16."""
    if amp == "off" or (amp == "auto" and device.type != "cuda"):
        return None
    if amp == "fp16" and device.type != "cuda":
        raise UserError("--amp fp16 needs a CUDA GPU; take bf16 or off")
    if amp == "bf16" or (amp == "auto" and torch.cuda.is_bf16_supported(including_emulation=False)):
        return torch.bfloat16
    return torch.float16


def autocast(device, amp):
    """The context of mixed precision `amp` on `device`."""
    dtype = amp_dtype(amp, device)
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


def parse_options(pairs):
    """["KEY=VALUE", …] -> dict; values are Python literals where they can be, else text."""
    options, words = {}, {"true": "True", "false": "False", "none": "None"}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"--option {pair}: expected KEY=VALUE, as in --option channel_layers=3")
        if key == "output_stride":
            raise UserError(f"--option {pair}: it has a flag of its own, --output-stride")
        try:
            options[key] = ast.literal_eval(words.get(value.lower(), value))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            options[key] = value
        try:
            json.dumps(options[key], allow_nan=False)
        except (ValueError, TypeError):
            raise UserError(
                f"--option {pair}: expected a number, a word, a list or a dict"
            ) from None
    return options


def in_range(name, value, least, most=10**9):
    """UserError where the value of a flag, if it has one, is not a number in least … most."""
    if value is not None and not least <= value <= most:
        flag = name.replace("_", "-")
        raise UserError(f"--{flag} {value}: expected a number from {least} to {most}")


def check_sides(flag, sides):
    """UserError where --FLAG is not one side or two, each of at least 1."""
    if len(sides) > 2:
        given = " ".join(map(str, sides))
        raise UserError(f"--{flag} {given}: expected one side, or height and width")
    for side in sides:
        in_range(flag, side, 1, 100_000)


# ----------------------------------------------------------------------------------- cost and speed


def cost(net, size):
    """(parameters, multiply-adds, multiply-adds of each child) of one image of size (height,
    width), in evaluation mode.

    Multiply-adds are half of what torch.utils.flop_counter counts: matrix products and
    convolutions, nothing else. Attention is counted as its two matrix products, because the counter
    does not know the CPU's fused kernel.
    """
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        net.eval()(torch.zeros(1, 3, *size, device=next(net.parameters()).device))
    children, flops = {name: 0 for name, _ in net.named_children()}, counter.get_flop_counts()
    for name, counts in flops.items():
        parts = name.split(".")
        # a ModuleList is not called, its members are
        depth = 2 if ".".join(parts[:2]) in flops else 3
        if len(parts) == depth and parts[1] in children:
            children[parts[1]] += sum(counts.values()) // 2
    return sum(p.numel() for p in net.parameters()), counter.get_total_flops() // 2, children


def speed(net, num_classes, size, batch_size, device, amp="off", runs=5):
    """Yields ("forward" and "training step" of SGD, (median seconds, peak bytes)) on random images
    of `size`. It trains `net` on noise, so use it no more.
    """
    torch.backends.cudnn.benchmark = True  # as in training
    net.to(device, memory_format=torch.channels_last)
    images = torch.randn(batch_size, 3, *size, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(num_classes, (batch_size, *size), device=device)
    optimizer = torch.optim.SGD(net.parameters(), 1e-4, momentum=0.9)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype(amp, device) is torch.float16)

    def forward():
        net.eval()
        with torch.no_grad(), autocast(device, amp):
            net(images)

    def training():
        net.train()
        with autocast(device, amp):
            loss = sum(net(images, labels).values())
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    for name, work in ("forward", forward), ("training step", training):
        yield name, measure(work, device, runs)


def measure(work, device, runs=5):
    """(median seconds, peak bytes, on CUDA alone) of `work()`, after two calls to warm up."""
    cuda, seconds = device.type == "cuda", []
    wait = torch.cuda.synchronize if cuda else lambda: None
    for _ in range(2):
        work()
    wait()
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(runs):
        start = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(device) if cuda else None
    return statistics.median(seconds), peak


# ----------------------------------------------------------------------------------------- pictures


def light(photo):
    """The uint8 photograph `[3, H, W]` gray and bright, for what is drawn over it: float32."""
    return 100 + 0.6 * photo.float().mean(0, keepdim=True).expand(3, -1, -1)


def drawn(title, figure, photo, palette, boxes=()):
    """The data.Panel of a figure of the uint8 photograph `[3, H, W]`: a label map, or numbers of at
    least 0 with a scale. A map as large as the photograph is drawn over it.

    title: "TEXT", the scale ends at the largest number; or "TEXT | LOW | HIGH", the words at the
    ends of a scale from 0 to 1.
    """
    if not figure.is_floating_point():
        return data.label_panel(title, figure, palette, boxes=boxes)
    figure, (title, *ends) = figure.detach().float().cpu(), title.split(" | ")
    highest = torch.tensor(1.0) if ends else figure.nan_to_num(0).max()
    values = figure / highest.clamp(min=1e-12)
    tile, scale = data.heat(values), tuple(ends) or ("0", f"{highest:.3g}")
    if figure.shape == photo.shape[1:]:
        values = values.nan_to_num(0)
        share = 0.25 + 0.6 * values
        tile = (share * tile + (1 - share) * light(photo)).to(torch.uint8)
    return data.Panel(title, tile, scale, boxes if figure.shape == photo.shape[1:] else ())


def wrong(prediction, truth, photo):
    """uint8 `[3, H, W]`: errors red, what is right a bright photograph, what is ignored black."""
    errors, tile = prediction.cpu() != truth, light(photo)
    tile[:, errors] = torch.tensor([[220.0], [20], [40]])
    tile[:, truth == data.IGNORE] = 0
    return tile.to(torch.uint8)


def compared(predictions):
    """(difference, box) of two or more label maps `[H, W]`: the share of pairs that disagree,
    `[H, W]` in 0…1, and the window (top, left, bottom, right), a quarter as high and wide, where
    they differ most.
    """
    pairs = [a != b for i, a in enumerate(predictions) for b in predictions[i + 1 :]]
    difference = torch.stack(pairs).float().mean(0)
    size = [max(1, side // 4) for side in difference.shape]
    where = F.avg_pool2d(difference[None], (size[0], 1), stride=1)
    where = F.avg_pool2d(where, (1, size[1]), stride=1)[0]
    row, column = divmod(where.argmax().item(), where.shape[1])
    return difference, (row, column, row + size[0], column + size[1])


def comparison(predictions, image, palette, truth=None):
    """The Panels that compare label maps of one image (name -> `[H, W]`, two or more): each map,
    the difference, and the same window of all enlarged, as of `truth`. And the window's box.
    """
    maps = {name: m.cpu() for name, m in predictions.items()}
    difference, box = compared(list(maps.values()))
    panels = [data.label_panel(name, m, palette, boxes=(box,)) for name, m in maps.items()]
    title = "where they differ | same | different"
    panels.append(drawn(title, difference, image, palette, (box,)))
    top, left, bottom, right = box
    panels.append(data.Panel("image, enlarged", image[:, top:bottom, left:right]))
    for name, m in (maps | ({} if truth is None else {"truth": truth})).items():
        panels.append(data.label_panel(f"{name}, enlarged", m[top:bottom, left:right], palette))
    return panels, box


def method_figures(net, image, pixel=None, amp="off"):
    """The method's own figures of one image, uint8 `[3, H, W]`: title -> map; {} if it has none."""
    if not hasattr(net, "figures"):
        return {}
    arguments = {"pixel": pixel} if takes_pixel(net) else {}
    device = next(net.parameters()).device
    try:
        with autocast(device, amp):
            return net.figures(data.normalise(image.to(device)), **arguments)
    except ValueError as error:
        raise UserError(str(error)) from error


def takes_pixel(net):
    """Whether the method's figures are about one pixel."""
    about = "pixel" in inspect.signature(getattr(net, "figures", len)).parameters
    return about and getattr(net, "about_pixel", True)


def figure_sheet(net, image, prediction, palette, classes, truth=None, pixel=None, amp="off"):
    """The sheet of one image: image, truth if there is one, prediction, errors, method's figures.

    image: uint8 `[3, H, W]`. prediction, truth: label maps `[H, W]`. Figures whose key is a class's
    number are named after the class; several label maps of the image's size are compared.
    """
    figures, boxes, prediction = method_figures(net, image, pixel, amp), (), prediction.cpu()
    names = {k: f"attention of {classes[k]}" if isinstance(k, int) else k for k in figures}
    figures = {names[k]: m.cpu() for k, m in figures.items()}
    maps = {k: m for k, m in figures.items() if not m.is_floating_point()}
    if len(maps) > 1 and all(m.shape == image.shape[1:] for m in figures.values()):
        own, box = comparison(maps, image, palette, truth)
        own = [p for p in own if p.title not in maps or not torch.equal(maps[p.title], prediction)]
        boxes = on_prediction = (box,)
    else:
        on_prediction = ()
        if figures and takes_pixel(net):
            row, column = pixel or (image.shape[1] // 2, image.shape[2] // 2)
            by = max(3, image.shape[2] // 60)
            boxes = ((row - by, column - by, row + by, column + by),)
        own = [drawn(title, m, image, palette, boxes) for title, m in figures.items()]
    panels = [data.Panel("image", image, boxes=boxes)]
    if truth is not None:
        panels.append(data.label_panel("truth", truth, palette, boxes=on_prediction))
    panels.append(data.label_panel("prediction", prediction, palette, boxes=on_prediction))
    if truth is not None:
        panels.append(data.Panel("errors (red)", wrong(prediction, truth, image)))
    maps = [m for m in (truth, prediction, *maps.values()) if m is not None]
    caption = getattr(net, "caption", "") if own else ""
    if on_prediction:
        caption = f"{caption} Enlarged: the outlined window, where the predictions differ most."
    return sheet_of([*panels, *own], maps, classes, palette, caption)


def sheet_of(panels, *rest):
    """`data.sheet` with as many columns as leave the fewest gaps, and no panel alone in a row."""
    gaps = {c: (len(panels) % c == 1, -len(panels) % c) for c in (4, 5, 3)}
    return data.sheet(panels, min(gaps, key=gaps.get), *rest)


def comparison_sheet(nets, image, truth, palette, classes, device, amp, **kwargs):
    """The sheet of one image uint8 `[3, H, W]`, its truth `[H, W]`, and what several networks
    predict, `comparison`. nets: name -> network; kwargs of `predict`.
    """
    maps = {name: label_map(net, image, device, amp, **kwargs).cpu() for name, net in nets.items()}
    panels, box = comparison(maps, image, palette, truth)
    first = data.Panel("image", image, boxes=(box,))
    first = [first, data.label_panel("truth", truth, palette, boxes=(box,))]
    caption = "Enlarged: the window, outlined above, in which the predictions differ most."
    return sheet_of([*first, *panels], [truth, *maps.values()], classes, palette, caption)


def class_dependency(net, dataset, device, amp, workers):
    """car.class_dependency of what enters the classifier, over all of `dataset`: `[K, K]` in 0…1,
    on the CPU.
    """
    with autocast(device, amp):
        pairs = read_all(dataset, device, workers, "class dependency")
        return method_file("car").class_dependency(net, pairs, dataset.num_classes).cpu()


def levels(net, dataset, device, amp, workers, file):
    """Table 9 and Figs. 3, C of Specialize and Fuse, printed, and as lists for --json.

    net: a SpecializeAndFuse with output="pyramid", at scale 1. "table": mIoU of the level of the
    row on the pixels where the fused result takes the level of the column, coarse to fine (the
    paper: fine to coarse). "difference": IoU of each class if the level alone is the prediction,
    less that of the fused one; `file` gets it as a picture, clipped to -15 … +1 % as in the paper.
    NaN where a class or a level does not occur.
    """
    L, K = len(net.strides), dataset.num_classes
    counts = [[ConfusionMatrix(K, device) for _ in range(L)] for _ in range(L)]
    prediction = ConfusionMatrix(K, device)
    for images, labels in read_all(dataset, device, workers, "levels"):
        with autocast(device, amp):
            taken, alone, fused = net.levels(images)
        prediction.update(fused, labels)
        for row, level in zip(counts, alone):
            for i, matrix in enumerate(row):
                matrix.update(level, labels.masked_fill(taken != i, data.IGNORE))

    def iou(parts):  # of all the pixels that the parts count
        total = ConfusionMatrix(K)
        total.matrix = sum(part.matrix for part in parts)
        return torch.tensor([math.nan if v is None else v for v in total.result()["IoU"]])

    fused = iou([prediction])
    table = torch.tensor([[matrix.result()["mIoU"] for matrix in row] for row in counts])
    difference = torch.stack([iou(row) - fused for row in counts])
    print("mIoU of each level's prediction (rows) where the unity pyramid takes the level of the"
          " column; –: no cell takes it, or none of these is labelled:")  # fmt: skip
    print("  stride " + "".join(f"{s:>8}" for s in net.strides))
    for stride, row in zip(net.strides, table.tolist()):
        cells = ("–" if math.isnan(value) else f"{value:.3f}" for value in row)
        print(f"  {stride:>6} " + "".join(f"{cell:>8}" for cell in cells))
    print("IoU of each level alone less that of the fused result, its best and worst classes:")
    for stride, row in zip(net.strides, difference):
        order = [i for i in row.argsort(descending=True).tolist() if abs(row[i]) >= 0.0005]
        chosen = [*order[:3], *[i for i in order[-3:] if i not in order[:3]]]
        named = ", ".join(f"{dataset.classes[i]} {row[i]:+.3f}" for i in chosen)
        print(f"  {stride:>6}   {named or 'no class differs'}")
    brightness = (difference.clamp(-0.15, 0.01) + 0.15) / 0.16
    title = "IoU of a level alone (rows) less that of the fused result, for each class (columns)"
    ends, rows = ("-0.15 or less", "+0.01 or more"), [f"stride {s}" for s in net.strides]
    draw_matrix(brightness, dataset.classes, title, ends, rows).save(file)
    return dict(strides=list(net.strides), table=table.tolist(), difference=difference.tolist())


def without_nan(numbers):
    """Numbers in dicts and lists, with None for what is not a number: JSON has no NaN."""
    if isinstance(numbers, dict):
        return {name: without_nan(value) for name, value in numbers.items()}
    if isinstance(numbers, (list, tuple)):
        return [without_nan(value) for value in numbers]
    return None if isinstance(numbers, float) and not math.isfinite(numbers) else numbers


def draw_matrix(values, columns, title, ends=("0", "1"), rows=None, cell=28, margin=130):
    """A matrix of numbers in 0…1 as a picture, dark blue to yellow, NaN grey, under its title, over
    a colour bar with the words `ends`; rows and columns have names. rows: None if theirs are the
    columns'.
    """
    rows = columns if rows is None else rows
    height, width = cell * len(rows), cell * len(columns)
    picture = Image.new("RGB", (margin + width, margin + height), "white")
    tiles = data.heat(values.nan_to_num(0)).repeat_interleave(cell, 1).repeat_interleave(cell, 2)
    tiles[:, values.isnan().repeat_interleave(cell, 0).repeat_interleave(cell, 1)] = 200
    picture.paste(Image.fromarray(tiles.permute(1, 2, 0).numpy()), (margin, margin))
    font = ImageFont.load_default(13)
    turns = Image.Transpose.ROTATE_270, Image.Transpose.ROTATE_90
    sides = (columns, height + 6, "lm"), (rows, margin - 6, "rm")
    for turn, (names, x, anchor) in zip(turns, sides):
        # the columns' names are written on its side, where they are rows
        picture = picture.transpose(turn)
        for i, name in enumerate(names):
            place = x, margin + cell * (i + 0.5)
            ImageDraw.Draw(picture).text(place, name[:18], "black", font, anchor=anchor)
    panel = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    return data.sheet([data.Panel(title, panel, ends)], 1, width=picture.width)


def save_prediction(prediction, palette, file, raw_ids=None):
    """A label map `[H, W]` as a PNG whose pixel values are the class ids, shown in the palette's
    colours.

    raw_ids: the id of each class in the label files and submissions of its benchmark, if another.
    """
    table, colors = torch.zeros(256, dtype=torch.uint8), [0] * 768
    for i, (raw, color) in enumerate(zip(raw_ids or range(len(palette)), palette)):
        table[i], colors[3 * raw : 3 * raw + 3] = raw, color
    picture = Image.fromarray(table[prediction.cpu().long()].numpy())
    picture.putpalette(colors)
    picture.save(file)


# ---------------------------------------------------------------------------------------- the flags

SPLIT, VIEWS = ("a whole split",), ("a whole split", "images")
# name: (default, what it is for, help, argparse's keywords). A flag without effect is refused.
FLAGS = {
    "checkpoint": (None, None, "last.pt or best.pt of train.py", dict(metavar="FILE")),
    "method": (None, None, "file of the method, for --cost and --speed without a checkpoint", {}),
    "images": (None, None, "photographs without labels, or folders of them", dict(nargs="+")),
    "cost": (False, None, "count parameters and multiply-adds", {}),
    "speed": (False, None, "measure images per second and peak memory, forward and training", {}),
    "json": (None, None, "file for all numbers", dict(metavar="FILE")),
    "device": (None, None, "cpu, cuda, cuda:1, mps [a CUDA GPU if there is one, else cpu]", {}),
    "dataset": (None, SPLIT, "dataset to evaluate on [the checkpoint's]", {}),
    "data_root": (None, SPLIT, "folder of the dataset [the checkpoint's]", dict(metavar="DIR")),
    "split": ("val", SPLIT, "split of the dataset [val]", {}),
    "workers": (2, SPLIT, "loader processes [2]", {}),
    "scales": ([1.0], VIEWS, "scales to average over [1]", dict(nargs="+", type=float)),
    "flip": (False, VIEWS, "average over the mirrored image too", {}),
    "window": (None, VIEWS, "side of sliding windows in pixels [whole images]", dict(type=int)),
    "save_predictions": (None, VIEWS, "folder for a palette PNG of each image, with the ids of the "
                         "benchmark's label files", dict(metavar="DIR")),
    "figures": (None, VIEWS, "folder for sheets of eight images, with the method's own figures, "
                "and class dependency", dict(metavar="DIR")),
    "compare": ([], SPLIT, "other checkpoints: figures show their predictions beside each other",
                dict(nargs="+", metavar="FILE")),
    "pixel": (None, VIEWS, "row and column of the pixel that the figures are about [the centre]",
              dict(type=int, nargs=2)),
    "amp": ("auto", (*VIEWS, "speed"), "mixed precision [auto: on CUDA]",
            dict(choices=("auto", "bf16", "fp16", "off"))),
    "backbone": ("resnet50", ("method",), f"{', '.join(backbones.NAMES)} [resnet50]", {}),
    "classes": (59, ("method",), "number of classes [59, as in Pascal Context]", {}),
    "output_stride": (None, ("checkpoint", "method"), "output stride; of a checkpoint: at "
                      "evaluation only", dict(type=int)),
    "option": ([], ("checkpoint", "method"), "option of the method, may be repeated; of a "
               "checkpoint: if it changes no weight", dict(action="append", metavar="KEY=VALUE")),
    "crop_size": ([513], ("cost", "speed"), "side of the image, or height and width [513]",
                  dict(type=int, nargs="+", metavar="N")),
    "batch_size": (2, ("speed",), "images at a time [2]", {}),
    "runs": (5, ("speed",), "timed repetitions, the median is printed [5]", {}),
}  # fmt: skip


def _arguments(arguments):
    """The flags over their defaults. UserError for one that has no effect."""
    text = "Metrics, predictions, figures, cost and speed of a network."
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, description=text)
    for name, (default, _, what, kwargs) in FLAGS.items():
        if not kwargs:
            kwargs = dict(action="store_true") if default is False else {}
            kwargs = kwargs or dict(type=int if isinstance(default, int) else str)
        parser.add_argument("--" + name.replace("_", "-"), help=what, **kwargs)
    given = vars(parser.parse_args(arguments))
    done = {name for name in ("checkpoint", "method", "images", "cost", "speed") if name in given}
    if not done & {"images", "cost", "speed"}:
        done.add("a whole split")
    for name in given:
        uses = FLAGS[name][1]
        if uses and not done & set(uses):
            fits = ", ".join(f"--{use}" if use in FLAGS else use for use in uses)
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} has no effect here: it is for {fits}; leave it out")
    for name in sorted({"pixel", "compare"} & set(given)):
        if "figures" not in given:
            raise UserError(f"--{name} has no effect without --figures DIR")
    if {"pixel", "compare"} <= set(given):
        raise UserError("--pixel has no effect with --compare; leave one of them out")
    args = argparse.Namespace(**{name: flag[0] for name, flag in FLAGS.items()} | given)
    for name in ("window", "classes", "batch_size", "runs"):
        in_range(name, getattr(args, name), 1)
    in_range("workers", args.workers, 0)
    check_sides("crop-size", args.crop_size)
    args.crop_size = (args.crop_size[0], args.crop_size[-1])
    for scale in args.scales:
        in_range("scales", scale, 1e-3, 1e3)
    if bool(args.checkpoint) == bool(args.method):
        raise UserError("give --checkpoint FILE, or --method NAME with --cost or --speed")
    if args.method and (args.images or not (args.cost or args.speed)):
        text = "--method alone has no trained weights: it goes with --cost or --speed"
        raise UserError(f"{text}; else give --checkpoint")
    return args


# ----------------------------------------------------------------------------------------- the work


def _run(args):
    device, rank, world = processes(args.device)
    amp_dtype(args.amp, device)
    if args.json and Path(args.json).suffix != ".json":
        raise UserError(f"--json {args.json}: expected a file that ends in .json")
    if args.json and rank == 0:  # it can be written: better known now than at the end
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).open("a").close()
    if world > 1 and (args.cost or args.speed or args.images):
        text = "--cost, --speed and --images are for one process"
        raise UserError(f"{text}: start them without torchrun")
    checkpoint = read_checkpoint(args.checkpoint) if args.checkpoint else None
    options = parse_options(args.option)
    if checkpoint:
        net, classes = load(checkpoint, args.output_stride, options), len(checkpoint["classes"])
    else:
        classes = args.classes
        net = network(args.method, classes, args.backbone, None, args.output_stride, options)
    net.to(device, memory_format=torch.channels_last)
    crop = checkpoint["settings"].get("crop_size") if checkpoint else None
    if rank == 0 and args.window and isinstance(crop, (int, list)) and args.window < np.max(crop):
        text = f"note: --window {args.window} is smaller than the crops of {crop} in training"
        print(f"{text}; windows of that size may give better results", file=sys.stderr)
    views, numbers, status = dict(scales=args.scales, flip=args.flip, window=args.window), {}, 0
    if args.images:
        numbers["images"], status = _photographs(net, checkpoint, device, args, views)
    if args.cost:
        numbers["cost"] = _cost(net, args.crop_size)
    if args.speed:  # the last use of net
        numbers["speed"] = _speed(net, classes, device, args)
    if not (args.images or args.cost or args.speed):
        numbers = _split(net, checkpoint, device, rank, args, views)
    if args.json and rank == 0:
        Path(args.json).write_text(json.dumps(without_nan(numbers), indent=1) + "\n")
    return status


def _cost(net, size):
    parameters, operations, children = cost(net, size)
    shown = f"{parameters / 1e6:.2f} M parameters, {operations / 1e9:.4f} G multiply-adds"
    print(f"{shown} for {size[0]}x{size[1]}, of which")
    print("\n".join(f"  {name:<12} {count / 1e9:10.4f} G" for name, count in children.items()))
    return dict(size=size, parameters=parameters, multiply_adds=operations, children=children)


def _speed(net, classes, device, args):
    name, (height, width) = device_name(device), args.crop_size
    amp = {None: "off", torch.bfloat16: "bf16", torch.float16: "fp16"}[amp_dtype(args.amp, device)]
    print(f"{args.batch_size} images of {height}x{width}, amp {amp}, {name}")
    numbers = {"device": name, "batch_size": args.batch_size, "size": args.crop_size}
    timed = speed(net, classes, args.crop_size, args.batch_size, device, args.amp, args.runs)
    for what, (seconds, peak) in timed:
        rate = args.batch_size / seconds
        numbers[what] = dict(seconds=seconds, images_per_second=rate, peak_bytes=peak)
        memory = "memory not measured" if peak is None else f"peak {peak / 2**20:.0f} MiB"
        print(f"  {what:<14} {rate:8.2f} images/s ({seconds * 1000:.0f} ms), {memory}", flush=True)
    return numbers


def _photographs(net, checkpoint, device, args, views):
    """`--images`: (the classes' shares of each photograph, exit status 2 if one is broken). Each
    gets an overlay and a palette PNG; a broken one is named, and the others follow.
    """
    classes, palette, numbers, status = checkpoint["classes"], checkpoint["palette"], {}, 0
    folder, files = Path(args.save_predictions or "predictions"), data.photographs(args.images)
    outputs = [f"{file.stem}{end}" for file in files for end in (".png", "_overlay.png")]
    twice = next((name for name in outputs if outputs.count(name) > 1), None)
    if twice:
        text = f"--images: two photographs would share the output file {twice}"
        raise UserError(f"{text}; give them one call each")
    args.save_predictions = str(folder)
    _check_folders(args, {file.parent for file in files if file.is_file()})
    for file in files:
        try:
            image = data.read_image(file, upright=True, huge=args.window is not None)
            _check_pixel(net, args.pixel, image.shape)
        except UserError as error:
            print(f"evaluate.py: {error}", file=sys.stderr)
            status = 2
            continue
        prediction = label_map(net, image, device, args.amp, **views)
        save_prediction(prediction, palette, folder / f"{file.stem}.png", checkpoint.get("raw_ids"))
        overlay = folder / f"{file.stem}_overlay.png"
        panels = [data.Panel("image", image)]
        panels.append(data.Panel("prediction", data.overlay(image, prediction, palette)))
        data.sheet(panels, 2, [prediction.cpu()], classes, palette, width=480).save(overlay)
        if args.figures:
            kwargs = dict(pixel=args.pixel, amp=args.amp)
            picture = figure_sheet(net, image, prediction, palette, classes, **kwargs)
            picture.save(Path(args.figures) / f"{file.stem}_figures.png")
        shares = torch.bincount(prediction.flatten().cpu(), minlength=len(classes))
        shares = shares / prediction.numel()
        numbers[str(file)] = dict(zip(classes, shares.tolist()))
        order = [i for i in shares.argsort(descending=True).tolist() if shares[i] >= 0.005]
        found = ", ".join(f"{classes[i]} {shares[i]:.0%}" for i in order)
        print(f"{file}: {found} -> {overlay}")
    return numbers, status


def _check_folders(args, inputs):
    """Make the folders of predictions and figures. UserError where one holds what is read, or where
    the two are one folder: a file would overwrite another.
    """
    made = []
    for flag in ("save_predictions", "figures"):
        if folder := getattr(args, flag):
            Path(folder).mkdir(parents=True, exist_ok=True)
            if any(Path(folder).samefile(parent) for parent in inputs):
                flag = flag.replace("_", "-")
                raise UserError(f"--{flag} {folder} holds what is read; take another folder")
            if any(Path(folder).samefile(other) for other in made):
                raise UserError(
                    "--figures and --save-predictions need two folders: files have one name"
                )
            made.append(folder)


def _check_pixel(net, pixel, shape):
    """UserError unless the method's figures can be about the pixel (row, column) of an image of
    `shape` `[3, H, W]`.
    """
    if pixel and not takes_pixel(net):
        raise UserError("--pixel has no effect: this method's figures are not about one pixel")
    if pixel and not all(0 <= i < side for i, side in zip(pixel, shape[1:])):
        text = f"--pixel {pixel[0]} {pixel[1]} is outside the image of {shape[1]} rows and"
        raise UserError(f"{text} {shape[2]} columns; give a row and a column from 0")


def _split(net, checkpoint, device, rank, args, views):
    """Metrics, predictions and figures of a whole split."""
    settings = checkpoint["settings"]
    name, own = args.dataset or settings["dataset"], settings["data_root"]
    root = args.data_root or (own if name == settings["dataset"] else data.default_root(name))
    dataset = data.dataset(name, root, args.split)
    if dataset.classes != checkpoint["classes"]:
        text = f"the classes of {name} are not those that {args.checkpoint} was trained on"
        raise UserError(f"{text}; take another --dataset")
    nets, save = {args.checkpoint: net} | _others(args, dataset, device), None
    _check_folders(args, {file.parent for pair in getattr(dataset, "files", ()) for file in pair})
    shown = data.pick_images(dataset, 8) if args.figures else []
    for index in shown if args.pixel else []:
        _check_pixel(net, args.pixel, dataset[index][0].shape)
    if args.save_predictions:
        folder = Path(args.save_predictions)
        raw_ids = getattr(dataset, "raw_ids", None)

        def save(index, prediction):
            file = folder / f"{dataset.name(index)}.png"
            save_prediction(prediction, dataset.palette, file, raw_ids)

    result = evaluate(net, dataset, device, args.amp, args.workers, save, **views)
    labelled = result.pop("labelled")
    if rank == 0:
        mode = f"scales {' '.join(f'{s:g}' for s in args.scales)}{', flip' if args.flip else ''}"
        mode += f", windows of {args.window}" if args.window else ""
        mode += f", output stride {args.output_stride}" if args.output_stride else ""
        mode += "".join(f", {pair}" for pair in args.option)
        images = f"on {name} {args.split}, {len(dataset)} images"
        print(f"{args.checkpoint} (step {checkpoint['step']}) {images}, {mode}")
        print(table(result, dataset.classes))
        warn_of_absent(labelled, dataset, f"{name} {args.split}")
        if args.figures:
            result |= _figures(nets, dataset, shown, device, args, views)
    about = dict(checkpoint=str(args.checkpoint), step=checkpoint["step"], dataset=name)
    about |= dict(split=args.split, images=len(dataset))
    about |= dict(output_stride=args.output_stride, option=args.option)
    result["IoU"] = dict(zip(dataset.classes, result["IoU"]))
    return result | about | views


def _others(args, dataset, device):
    """The networks of `--compare`, by their paths."""
    nets = {}
    for path in args.compare:
        checkpoint = read_checkpoint(path)
        if any(Path(path).resolve() == Path(other).resolve() for other in [*nets, args.checkpoint]):
            raise UserError(
                f"--compare {path}: a checkpoint is compared with others; name each once"
            )
        if checkpoint["classes"] != dataset.classes:
            raise UserError(f"--compare {path} was trained on other classes; take another one")
        nets[path] = load(checkpoint).to(device, memory_format=torch.channels_last)
    return nets


def _figures(nets, dataset, shown, device, args, views):
    """`--figures`: the sheets of the images `shown`, pictures of the whole split; its numbers."""
    folder, numbers, net = Path(args.figures), {}, nets[args.checkpoint]
    names = dataset.palette, dataset.classes
    for index in shown:
        image, truth = dataset[index]
        if args.compare:
            picture = comparison_sheet(nets, image, truth, *names, device, args.amp, **views)
        else:
            prediction = label_map(net, image, device, args.amp, **views)
            picture = figure_sheet(net, image, prediction, *names, truth, args.pixel, args.amp)
        picture.save(folder / f"{dataset.name(index)}.png")
    rest = device, args.amp, args.workers
    if hasattr(net, "classifier") and not args.compare:
        dependency = class_dependency(net, dataset, *rest)
        occurs = dependency.amax(1) > 0
        others = dependency[occurs][:, occurs][~torch.eye(occurs.sum(), dtype=torch.bool)].mean()
        title = "class dependency: how alike the mean features of two classes are, each row over "
        title += "its largest value"
        if occurs.sum() > 1:
            title += f"; the mean of two different classes is {others:.3f}"
            numbers["class_dependency"] = others.item()
            print(f"class dependency: {others:.3f} between two classes, the mean (of 0…1)")
        draw_matrix(dependency, dataset.classes, title).save(folder / "class_dependency.png")
    if getattr(net, "unity", None) is not None and not args.compare:  # a pyramid of outputs
        numbers["levels"] = levels(net, dataset, *rest, folder / "levels.png")
    print(f"figures: {folder}")
    return numbers


def main(arguments=None):
    """Exit status 0, or 2 after an error."""
    return guarded("evaluate.py", lambda: _run(_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
