"""Measure a trained network, visualise it, and count parameters and multiply-adds of any network.

    python evaluate.py --checkpoint runs/caa-shapes/last.pt          # mIoU and IoU per class
    python evaluate.py --checkpoint … --scales 0.75 1 1.25 --flip --json result.json
    python evaluate.py --checkpoint … --images street.jpg            # any photograph, any folder
    python evaluate.py --checkpoint … --figures figures              # internal visualisations
    python evaluate.py --checkpoint … --analyse                      # what the paper argues with
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
import tempfile
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

AMP = ("auto", "bf16", "fp16", "off")  # mixed precision; auto: bf16, or what the GPU has; CPU: off

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
    means = ("mIoU", "pixel_accuracy", "class_accuracy")
    rows = {name.replace("_", " "): result[name] for name in means}
    rows |= {f"mIoU at scale {s}": value for s, value in result.get("mIoU_at_scale", {}).items()}
    lines += [f"{k:<22} {math.nan if value is None else value:6.3f}" for k, value in rows.items()]
    absent = ", ".join(name for name, value in pairs if value is None)
    if absent:
        lines.append(f"not in the mean (neither labelled nor predicted): {absent}")
    return "\n".join(lines)


def warn_of_absent(labelled, dataset, name):
    """A warning on stderr, where a result could be wrong unnoticed: classes without any label."""
    absent = [name for name, there_is in zip(dataset.classes, labelled) if not there_is]
    text = f"no label of {name} holds {', '.join(absent)}; `python data.py` shows the ids"
    if not any(labelled):
        text = f"no pixel of {name} is labelled: there is nothing to measure"
    if absent:
        print(f"warning: {text}", file=sys.stderr)


# --------------------------------------------------------------------------------------- prediction


@torch.no_grad()
def predict(net, images, scales=(1.0,), flip=False, window=None):
    """Class probabilities `[N, K, H, W]`, float32, of images `[N, 3, H, W]`.

    The mean over the scales, each with its mirror image if `flip`. Images are resized bilinearly,
    antialiased where they shrink. window: cut each scaled image into overlapping squares of that
    side (steps of two thirds), and average where they overlap.
    """
    total = 0
    for scale in scales:
        total = at_scale(net, images, scale, flip, window).add_(total)
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
        return highest(predict(net, data.normalise(image[None].to(device)), **kwargs))[0]


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


def evaluate(net, dataset, device, amp="off", workers=2, save=None, stop=None, scales=(1.0,),
             **kwargs):  # fmt: skip
    """The result of `net` (in evaluation mode) over all of `dataset`, shared among the processes of
    the run.

    Process r of w takes the images r, r + w, …: none twice, none left out; shares may be unequal,
    because nothing is exchanged before the counts are added up. scales, kwargs: see `predict`; of
    several scales the mIoU of each alone is in the result too, "mIoU_at_scale". save: called with
    (index, prediction `[H, W]`). stop: where its .signal is set, the result is that of a part.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    indices = range(rank, len(dataset), world)
    matrix = ConfusionMatrix(dataset.num_classes, device)
    alone = {scale: ConfusionMatrix(dataset.num_classes, device) for scale in scales}
    pairs = read_all(Subset(dataset, indices), device, workers, "evaluating", rank > 0)
    for index, (image, labels) in zip(indices, pairs):
        if stop and stop.signal:
            break
        scores = 0  # of the sum over the scales, as of the mean
        for scale in scales:
            with autocast(device, amp):
                p = at_scale(net, image, scale, **kwargs)
            alone[scale].update(p.argmax(1), labels)
            scores = p.add_(scores)
        prediction = highest(scores)
        matrix.update(prediction, labels)
        if save:
            save(index, prediction[0])
    for counts in (matrix, *alone.values()):
        counts.all_reduce()
    each = {f"{scale:g}": counts.result()["mIoU"] for scale, counts in alone.items()}
    return matrix.result() | ({"mIoU_at_scale": each} if len(scales) > 1 else {})


def read_all(dataset, device, workers, what, quiet=False):
    """(images float32 `[1, 3, H, W]`, labels int64 `[1, H, W]`) of `dataset`; a progress bar."""
    loader = DataLoader(dataset, batch_size=1, num_workers=workers, worker_init_fn=own_session)
    for image, labels in tqdm(loader, desc=what, unit="img", leave=False, disable=quiet or None):
        yield data.normalise(image.to(device)), labels.to(device).long()


# --------------------- what train.py uses too: networks, checkpoints, processes, precision, flags


def method_file(name):
    """The module NAME.py, with its `build`."""
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    if found is None or not found.has_location:  # a folder, say
        raise UserError(f"unknown method '{name}': expected a file {name}.py with a function build")
    module = importlib.import_module(name)
    if not hasattr(module, "build"):
        raise UserError(f"'{name}' is not a method: {module.__file__} has no function build")
    return module


def network(method, num_classes, backbone, weights=None, output_stride=None, options=None):
    """`METHOD.build(…)` of METHOD.py; UserError if there is none, or if its options do not fit."""
    module, options = method_file(method), dict(options or {})
    if output_stride is not None:
        options["output_stride"] = output_stride
    if reserved := ", ".join({"num_classes", "backbone", "weights"} & set(options)):
        raise UserError(
            f"{reserved} is not an --option; take its own flag, or the dataset's number"
        )
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


def read_checkpoint(path):
    """What train.py saved at `path`; UserError where it cannot be read."""
    expected = "expected a last.pt or best.pt that train.py wrote"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint '{path}'; {expected}") from None
    except Exception as error:  # a file cut short, or another kind of file, fails in many ways
        reason = (str(error).splitlines() or [type(error).__name__])[0].split(" In PyTorch")[0]
        raise UserError(f"checkpoint '{path}' cannot be read ({reason}); {expected}") from None
    parts = {"net", "settings", "step", "classes", "palette"}
    if not isinstance(checkpoint, dict) or not parts <= set(checkpoint):
        text = f"'{path}' is not a checkpoint of train.py"
        raise UserError(f"{text}; a backbone's weights go to --weights")
    return checkpoint


def load(checkpoint, output_stride=None, options=None):
    """The trained network in a checkpoint, in evaluation mode.

    output_stride, options: evaluate so and not as trained, where that changes no weight. UserError
    where it does, or where the method's file has changed.
    """
    settings, classes = checkpoint["settings"], len(checkpoint["classes"])
    output_stride = settings["output_stride"] if output_stride is None else output_stride
    options = settings["option"] | (options or {})
    parts = settings["backbone"], None, output_stride, options
    net = network(settings["method"], classes, *parts)
    restore(net, checkpoint)
    return net.eval()


def restore(net, checkpoint):
    """The checkpoint's weights into `net`; UserError where they do not fit."""
    try:
        net.load_state_dict(checkpoint["net"])
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        text = (
            f"{checkpoint['settings']['method']}.py has changed, or an --option or --output-stride"
        )
        text = f"the checkpoint's weights do not fit: {text} was given that changes weights"
        raise UserError(f"{text} ({reason})") from None


def replace(path, write):
    """Write under a temporary name, then rename: a reader finds the old file or the new one."""
    temporary = path.with_name(path.name + ".part")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def processes(device=None):
    """(device, rank, world): under torchrun joins its process group (nccl on CUDA, gloo on the
    CPU). A CUDA device becomes the current one.
    """
    device, count = device or ("cuda" if torch.cuda.is_available() else "cpu"), None
    local, several = int(os.environ.get("LOCAL_RANK", 0)), "WORLD_SIZE" in os.environ
    try:
        kind, index = torch.device(device).type, torch.device(device).index or 0
    except RuntimeError:
        kind = None
    if kind not in ("cpu", "cuda", "mps"):
        raise UserError(f"unknown device '{device}'; expected cpu, cuda, cuda:N or mps")
    if kind == "mps" and (several or not torch.backends.mps.is_available()):
        text = "takes an Apple GPU, and one process, without torchrun"
        raise UserError(f"device 'mps' {text}; take --device cpu")
    if kind == "cuda":
        index, count = local if several else index, torch.cuda.device_count()
        if index >= count:
            text = f"there are {count} CUDA GPUs here, and number {index} is asked for"
            raise UserError(f"{text}; start fewer processes, or take another --device")
        device = f"cuda:{index}"
        torch.cuda.set_device(index)
    if not several:
        return torch.device(device), 0, 1
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


class Parser(argparse.ArgumentParser):
    """What is wrong with the flags is a UserError: one line."""

    def error(self, message):
        raise UserError(f"{message.removeprefix('argument ')}; --help lists the flags")


def number(least, most=1e9, kind=float):
    """For argparse's type=: a number from `least` to `most`."""

    def read(text):
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            value = math.nan
        if not least <= value <= most:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(
                f"expected {what} from {least} to {most:.10g}, not {text}"
            )
        return value

    return read


def whole(least, most=10**9):
    """For argparse's type=: a whole number from `least` to `most`."""
    return number(least, most, int)


def two_sides(sides):
    """(height, width) of the values of --crop-size: one side, or both."""
    if len(sides) > 2:
        given = " ".join(map(str, sides))
        raise UserError(f"--crop-size {given}: expected one side, or height and width")
    return sides[0], sides[-1]


def parse_options(pairs):
    """["KEY=VALUE", …] -> dict; values are Python literals where they can be, else text."""
    options, words = {}, {"true": "True", "false": "False", "none": "None"}
    for pair in pairs:
        key, _, value = pair.partition("=")
        if not key or "=" not in pair:
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
            expected = "expected a number, a word, a list or a dict"
            raise UserError(f"--option {pair}: {expected}") from None
    return options


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


def speed(net, num_classes, device, args):
    """`--speed`: prints and returns the median seconds and, on CUDA, the peak bytes of a forward
    pass and of a training step of SGD, after two of each to warm up. It trains `net` on noise.
    """
    torch.backends.cudnn.benchmark = True  # as in training
    cuda, net = device.type == "cuda", net.to(device, memory_format=torch.channels_last)
    count, size, dtype = args.batch_size, args.crop_size, amp_dtype(args.amp, device)
    images = torch.randn(count, 3, *size, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(num_classes, (count, *size), device=device)
    optimizer = torch.optim.SGD(net.parameters(), 1e-4, momentum=0.9)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)

    def forward():
        with torch.no_grad(), autocast(device, args.amp):
            net.eval()(images)

    def training():
        with autocast(device, args.amp):
            loss = sum(net.train()(images, labels).values())
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    name = device_name(device)
    print(f"{count} images of {size[0]}x{size[1]}, amp {str(dtype).removeprefix('torch.')}, {name}")
    numbers = {"device": name, "batch_size": count, "size": size}
    for what, work in ("forward", forward), ("training step", training):
        seconds = []
        for run in range(2 + args.runs):
            if cuda and run == 2:
                torch.cuda.reset_peak_memory_stats(device)
            start = time.perf_counter()
            work()
            if cuda:
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
        middle = statistics.median(seconds[2:])
        peak = torch.cuda.max_memory_allocated(device) if cuda else None
        memory = f"peak {peak / 2**20:.0f} MiB" if cuda else "memory not measured"
        print(f"  {what:<14} {count / middle:8.2f} images/s ({middle * 1000:.0f} ms), {memory}")
        rate = count / middle
        numbers[what] = dict(seconds=middle, images_per_second=rate, peak_bytes=peak)
    return numbers


# ----------------------------------------------------------------------------------------- pictures


def fade(photo):
    """The uint8 photograph `[3, H, W]` gray and bright, for what is drawn over it: float32."""
    return 100 + 0.6 * photo.float().mean(0, keepdim=True).expand(3, -1, -1)


def draw_figure(title, figure, photo, palette, boxes=()):
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
        tile = (share * tile + (1 - share) * fade(photo)).to(torch.uint8)
    return data.Panel(title, tile, scale, boxes if figure.shape == photo.shape[1:] else ())


def error_map(prediction, truth, photo):
    """uint8 `[3, H, W]`: errors red, what is right a bright photograph, what is ignored black."""
    errors, tile = prediction.cpu() != truth, fade(photo)
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
    panels.append(draw_figure(title, difference, image, palette, (box,)))
    top, left, bottom, right = box
    panels.append(data.Panel("image, enlarged", image[:, top:bottom, left:right]))
    for name, m in (maps | ({} if truth is None else {"truth": truth})).items():
        panels.append(data.label_panel(f"{name}, enlarged", m[top:bottom, left:right], palette))
    return panels, box


def takes_pixel(net):
    """Whether the method's figures are about one pixel."""
    about = "pixel" in inspect.signature(getattr(net, "figures", len)).parameters
    return about and getattr(net, "about_pixel", True)


def figure_sheet(net, image, prediction, palette, classes, truth=None, pixel=None, amp="off"):
    """The sheet of one image: image, truth if there is one, prediction, errors, method's figures.

    image: uint8 `[3, H, W]`. prediction, truth: label maps `[H, W]`. Figures whose key is a class's
    number are named after the class; several label maps of the image's size are compared.
    """
    figures, boxes, on_prediction, prediction = {}, (), (), prediction.cpu()
    if hasattr(net, "figures"):
        device = next(net.parameters()).device
        with autocast(device, amp):
            about = {"pixel": pixel} if takes_pixel(net) else {}
            figures = net.figures(data.normalise(image.to(device)), **about)
    names = {k: f"attention of {classes[k]}" if isinstance(k, int) else k for k in figures}
    figures = {names[k]: m.cpu() for k, m in figures.items()}
    maps = {k: m for k, m in figures.items() if not m.is_floating_point()}
    if len(maps) > 1 and all(m.shape == image.shape[1:] for m in figures.values()):
        own, box = comparison(maps, image, palette, truth)
        own = [p for p in own if p.title not in maps or not torch.equal(maps[p.title], prediction)]
        boxes = on_prediction = (box,)
    else:
        if figures and takes_pixel(net):
            row, column = backbones.one_pixel(pixel, image.shape[1:])
            by = max(3, image.shape[2] // 60)
            boxes = ((row - by, column - by, row + by, column + by),)
        own = [draw_figure(title, m, image, palette, boxes) for title, m in figures.items()]
    panels = [data.Panel("image", image, boxes=boxes)]
    if truth is not None:
        panels.append(data.label_panel("truth", truth, palette, boxes=on_prediction))
    panels.append(data.label_panel("prediction", prediction, palette, boxes=on_prediction))
    if truth is not None:
        panels.append(data.Panel("errors (red)", error_map(prediction, truth, image)))
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


@torch.no_grad()
def class_dependency(net, pairs, num_classes, layer="classifier"):
    """Fig. 4.5 of the thesis of car.py: how alike the mean features of every two classes are,
    `[K, K]` float64 in 0…1.

    pairs: (images float `[N, 3, H, W]`, labels int64 `[N, H, W]`, 255 = ignored), any number. A
    class's mean μ is over all of its positions in what enters the submodule `layer`. A row has the
    dot products of one μ with all, over its largest (ours); products below 0, and classes that do
    not occur, are 0. net is in evaluation mode.
    """
    entered, sums, counts = [], 0, 0
    module = net.get_submodule(layer)
    handle = module.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    for images, labels in pairs:
        net(images)
        X = entered.pop().double()  # [N, C, h, w]
        pixels = backbones.pixels_of(net, labels.shape[1:], X.shape[2:])
        rows, columns = (p.clamp(max=n - 1) for p, n in zip(pixels, labels.shape[1:]))
        small = labels[:, rows[:, None], columns]  # [N, h, w]
        Y = (small.unsqueeze(3) == torch.arange(num_classes, device=small.device)).double()
        sums = sums + torch.einsum("nhwk,nchw->kc", Y, X)
        counts = counts + Y.sum((0, 1, 2))
    handle.remove()
    mu = sums / counts.clamp(min=1).unsqueeze(1)  # [K, C]
    similarity = (mu @ mu.T).clamp(min=0)
    return similarity / similarity.amax(1, keepdim=True).clamp(min=1e-12)


def without_nan(numbers):
    """Numbers in dicts and lists, with None for what is not a number: JSON has no NaN."""
    if isinstance(numbers, dict):
        return {name: without_nan(value) for name, value in numbers.items()}
    if isinstance(numbers, (list, tuple)):
        return [without_nan(value) for value in numbers]
    return None if isinstance(numbers, float) and not math.isfinite(numbers) else numbers


def draw_matrix(values, columns, title, rows=None, cell=28, margin=130):
    """A matrix of numbers as a picture, from its lowest (at most 0) in dark blue to its highest in
    yellow, NaN grey, under its title, over a colour bar; rows and columns have names. rows: None if
    theirs are the columns'.
    """
    low, high = min(values.nan_to_num(0).min().item(), 0), values.nan_to_num(0).max().item()
    ends, values = (f"{low:.3g}", f"{high:.3g}"), (values - low) / max(high - low, 1e-12)
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

FILE, DIR, ON = dict(metavar="FILE"), dict(metavar="DIR"), dict(action="store_true")
PIXEL, SIDES = dict(type=int, nargs=2), dict(nargs="+", type=whole(1, 100_000), metavar="N")
OPTION = dict(action="append", metavar="KEY=VALUE")
SCALES, PHOTOS = dict(nargs="+", type=number(1e-3, 1e3)), dict(nargs="+")
SPLIT, NETWORK = ("a whole split",), ("checkpoint", "method")
VIEWS = (*SPLIT, "images")
# name: (default, what it is for, how it is read, help). A flag without effect is refused.
FLAGS = {
    "checkpoint": (None, (), FILE, "last.pt or best.pt of train.py"),
    "method": (None, (), str, "file of the method, for --cost and --speed without a checkpoint"),
    "images": (None, (), PHOTOS, "photographs without labels, or folders of them"),
    "cost": (False, (), ON, "count parameters and multiply-adds"),
    "speed": (False, (), ON, "measure images per second and peak memory, forward and training"),
    "json": (None, (), FILE, "file for all numbers"),
    "device": (None, (), str, "cpu, cuda, cuda:1, mps [a CUDA GPU if there is one, else cpu]"),
    "dataset": (None, SPLIT, str, "dataset to evaluate on [the checkpoint's]"),
    "data_root": (None, SPLIT, DIR, "folder of the dataset [the checkpoint's]"),
    "split": ("val", SPLIT, str, "split of the dataset [val]"),
    "workers": (2, SPLIT, whole(0), "loader processes [2]"),
    "analyse": (False, SPLIT, ON, "the numbers that the method's paper argues with"),
    "compare": ([], SPLIT, PHOTOS, "other checkpoints: their predictions beside each other"),
    "scales": ([1.0], VIEWS, SCALES, "scales to average over [1]"),
    "flip": (False, VIEWS, ON, "average over the mirrored image too"),
    "window": (None, VIEWS, whole(1), "side of sliding windows in pixels [whole images]"),
    "save_predictions": (None, VIEWS, DIR, "folder for palette PNGs with the benchmark's own ids"),
    "figures": (None, VIEWS, DIR, "folder for sheets of eight images, each seen as a whole"),
    "pixel": (None, VIEWS, PIXEL, "row and column that the figures are about [the centre]"),
    "amp": ("auto", (*VIEWS, "speed"), dict(choices=AMP), "mixed precision [auto: on CUDA]"),
    "backbone": ("resnet50", ("method",), str, f"{', '.join(backbones.NAMES)} [resnet50]"),
    "classes": (59, ("method",), whole(1), "number of classes [59, as in Pascal Context]"),
    "output_stride": (None, NETWORK, int, "output stride; of a checkpoint: at evaluation only"),
    "option": (
        [],
        NETWORK,
        OPTION,
        "option of the method; of a checkpoint: if it changes no weight",
    ),
    "crop_size": ([513], ("cost", "speed"), SIDES, "side of the image, or height and width [513]"),
    "batch_size": (2, ("speed",), whole(1), "images at a time [2]"),
    "runs": (5, ("speed",), whole(1), "timed repetitions, the median is printed [5]"),
}


def arguments(argv=None):
    """The flags over their defaults. UserError for one that has no effect."""
    text = "Metrics, predictions, figures, cost and speed of a network."
    parser = Parser(argument_default=argparse.SUPPRESS, description=text)
    for name, (_, _, form, what) in FLAGS.items():
        form = form if type(form) is dict else dict(type=form)
        parser.add_argument("--" + name.replace("_", "-"), help=what, **form)
    given = vars(parser.parse_args(argv))
    done = {name for name in ("checkpoint", "method", "images", "cost", "speed") if name in given}
    if not done & {"images", "cost", "speed"}:
        done.add("a whole split")
    for name in given:
        uses = FLAGS[name][1]
        if uses and not done & set(uses):
            fits = ", ".join(f"--{use}" if use in FLAGS else use for use in uses)
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} has no effect here: it is for {fits}; leave it out")
    for name in sorted({"pixel", "compare"} & set(given)):
        if "figures" not in given:
            raise UserError(f"--{name} has no effect without --figures DIR")
    if {"pixel", "compare"} <= set(given):
        raise UserError("--pixel has no effect with --compare; leave one of them out")
    if ("checkpoint" in given) == ("method" in given):
        raise UserError("give --checkpoint FILE, or --method NAME with --cost or --speed")
    if "method" in given and ("images" in given or not {"cost", "speed"} & set(given)):
        text = "--method alone has no trained weights: it goes with --cost or --speed"
        raise UserError(f"{text}; else give --checkpoint")
    if not given.get("json", ".json").endswith(".json"):
        raise UserError(f"--json {given['json']}: expected a file that ends in .json")
    args = argparse.Namespace(**{name: flag[0] for name, flag in FLAGS.items()} | given)
    args.crop_size = two_sides(args.crop_size)
    return args


# ----------------------------------------------------------------------------------------- the work


def run(args):
    """Do what the flags ask for. Returns the exit status: 2 where a photograph was broken."""
    device, rank, world = processes(args.device)
    amp_dtype(args.amp, device)  # whether the device has it
    if args.json and rank == 0:  # it can be written: better known now than at the end
        folder = Path(args.json).parent
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
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
    views, numbers, status = dict(scales=args.scales, flip=args.flip, window=args.window), {}, 0
    if args.images:
        numbers["images"], status = photographs(net, checkpoint, device, args, views)
    if args.cost:
        numbers["cost"] = print_cost(net, args.crop_size)
    if args.speed:  # the last use of net
        numbers["speed"] = speed(net, classes, device, args)
    if not (args.images or args.cost or args.speed):
        numbers = whole_split(net, checkpoint, device, rank, args, views)
    if args.json and rank == 0:
        text = json.dumps(without_nan(numbers), indent=1) + "\n"
        replace(Path(args.json), lambda path: path.write_text(text))
    return status


def print_cost(net, size):
    """`--cost`"""
    parameters, operations, children = cost(net, size)
    shown = f"{parameters / 1e6:.2f} M parameters, {operations / 1e9:.4f} G multiply-adds"
    print(f"{shown} for {size[0]}x{size[1]}, of which")
    print("\n".join(f"  {name:<12} {count / 1e9:10.4f} G" for name, count in children.items()))
    return dict(size=size, parameters=parameters, multiply_adds=operations, children=children)


def make_folders(args, read):
    """Make the folders of predictions and figures. UserError where a file in them could overwrite
    one of the folders `read`, or the other's.
    """
    taken = {folder.resolve() for folder in read}
    for flag in ("save_predictions", "figures"):
        if name := getattr(args, flag):
            folder = Path(name).resolve()
            if folder in taken:
                text = f"--{flag.replace('_', '-')} {name} holds other files of this call"
                raise UserError(f"{text}; take another folder")
            folder.mkdir(parents=True, exist_ok=True)
            taken.add(folder)


def check_pixel(net, pixel, shape):
    """UserError unless the method's figures can be about the pixel (row, column) of an image of
    `shape` `[3, H, W]`.
    """
    if pixel and not takes_pixel(net):
        raise UserError("--pixel has no effect: this method's figures are not about one pixel")
    try:
        backbones.one_pixel(pixel, shape[1:])
    except ValueError as error:
        raise UserError(f"--pixel: {error}") from None


def photographs(net, checkpoint, device, args, views):
    """`--images`: (the classes' shares of each photograph, exit status 2 if one is broken). Each
    gets an overlay and a palette PNG; a broken one is named, and the others follow.
    """
    classes, palette, numbers, status = checkpoint["classes"], checkpoint["palette"], {}, 0
    files = data.photographs(args.images)
    args.save_predictions = args.save_predictions or "predictions"
    folder = Path(args.save_predictions)
    outputs = [f"{file.stem}{end}" for file in files for end in (".png", "_overlay.png")]
    twice = next((name for name in outputs if outputs.count(name) > 1), None)
    if twice:
        text = f"--images: two photographs would share the output file {twice}"
        raise UserError(f"{text}; give them one call each")
    make_folders(args, {file.parent for file in files if file.is_file()})
    for file in files:
        try:
            image = data.read_image(file, upright=True, huge=args.window is not None)
            check_pixel(net, args.pixel, image.shape)
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
            about = dict(pixel=args.pixel, amp=args.amp)
            picture = figure_sheet(net, image, prediction, palette, classes, **about)
            picture.save(Path(args.figures) / f"{file.stem}_figures.png")
        shares = torch.bincount(prediction.flatten().cpu(), minlength=len(classes))
        shares = shares / prediction.numel()
        numbers[str(file)] = dict(zip(classes, shares.tolist()))
        order = [i for i in shares.argsort(descending=True).tolist() if shares[i] >= 0.005]
        found = ", ".join(f"{classes[i]} {shares[i]:.0%}" for i in order)
        print(f"{file}: {found} -> {overlay}")
    return numbers, status


def whole_split(net, checkpoint, device, rank, args, views):
    """Metrics, predictions, figures and the method's numbers of a whole split."""
    settings = checkpoint["settings"]
    name, own = args.dataset or settings["dataset"], settings["data_root"]
    root = args.data_root or (own if name == settings["dataset"] else data.default_root(name))
    dataset = data.dataset(name, root, args.split)
    nets = {args.checkpoint: net} | compared_networks(args, checkpoint, dataset, device)
    make_folders(args, {file.parent for pair in getattr(dataset, "files", ()) for file in pair})
    shown = data.pick_images(dataset, 8) if args.figures else []
    for index in shown if args.pixel else []:
        check_pixel(net, args.pixel, dataset[index][0].shape)

    def save(index, prediction):
        file = Path(args.save_predictions) / f"{dataset.name(index)}.png"
        save_prediction(prediction, dataset.palette, file, getattr(dataset, "raw_ids", None))

    save = save if args.save_predictions else None
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
        if settings.get("train_split") == "trainval" and args.split in ("train", "val"):
            print(f"warning: {args.split} was trained on (train_split trainval)", file=sys.stderr)
        if args.analyse:
            result["analysis"] = analyse(net, dataset, device, args)
        if args.figures:
            draw_figures(nets, dataset, shown, device, args, views)
    result["IoU"] = dict(zip(dataset.classes, result["IoU"]))
    about = dict(checkpoint=str(args.checkpoint), step=checkpoint["step"], dataset=name)
    about |= dict(split=args.split, images=len(dataset))
    about |= dict(output_stride=args.output_stride, option=args.option)
    return result | about | views


def compared_networks(args, checkpoint, dataset, device):
    """The networks of `--compare`, by their paths. UserError where one has other classes than the
    dataset, also the one of `--checkpoint`.
    """
    nets, saved = {}, {args.checkpoint: checkpoint}
    for path in args.compare:
        if any(Path(path).resolve() == Path(other).resolve() for other in saved):
            text = "a checkpoint is compared with others"
            raise UserError(f"--compare {path}: {text}; name each once")
        saved[path] = read_checkpoint(path)
        nets[path] = load(saved[path]).to(device, memory_format=torch.channels_last)
    for path, checkpoint in saved.items():
        if checkpoint["classes"] != dataset.classes:
            text = f"'{path}' was trained on other classes than those of {args.dataset or 'these'}"
            raise UserError(f"{text}; take another checkpoint, or another --dataset")
    return nets


def draw_figures(nets, dataset, shown, device, args, views):
    """`--figures`: the sheets of the images `shown`."""
    names, net = (dataset.palette, dataset.classes), nets[args.checkpoint]
    for index in shown:
        image, truth = dataset[index]
        if args.compare:
            picture = comparison_sheet(nets, image, truth, *names, device, args.amp, **views)
        else:
            prediction = label_map(net, image, device, args.amp, **views)
            picture = figure_sheet(net, image, prediction, *names, truth, args.pixel, args.amp)
        picture.save(Path(args.figures) / f"{dataset.name(index)}.png")
    print(f"figures: {args.figures}")


def analyse(net, dataset, device, args):
    """`--analyse`: what `net.analyse` measures, and class dependency; printed and returned. With
    `--figures` the matrices are drawn.

    A key is "NAME: WHAT IT SAYS", of a matrix with " | ROW, ROW, … | COLUMN, COLUMN, …" behind it;
    rows or columns that are not named are the classes.
    """
    numbers, kept, K = {}, {}, dataset.num_classes
    with autocast(device, args.amp):
        if hasattr(net, "classifier"):
            pairs = read_all(dataset, device, args.workers, "class dependency")
            dependency = class_dependency(net, pairs, K).cpu()
            others = dependency[~torch.eye(K, dtype=torch.bool) & (dependency.diag() > 0)]
            what = "how alike the mean features of two classes are, 0…1; less is better"
            numbers[f"class dependency: {what}"] = others.mean().item()
            numbers[f"class dependency of pairs: {what}, each row over its largest"] = dependency
        if hasattr(net, "analyse"):
            numbers |= net.analyse(read_all(dataset, device, args.workers, "analysis"))
    for key, value in numbers.items():
        (title, *axes), classes = key.split(" | "), dataset.classes
        name = title.partition(":")[0]
        if isinstance(value, float):
            kept[name] = value
            print(f"{value:.3f}  {title}")
            continue
        kept[name] = value.tolist()
        rows, columns = ([*(axis.split(", ") for axis in axes), classes, classes])[:2]
        if len(columns) <= 6:
            print(title, " " * 20 + "".join(f"{column:>12}" for column in columns), sep="\n")
            for row, line in zip(rows, value.tolist()):
                cells = ("–" if math.isnan(x) else f"{x:.3f}" for x in line)
                print(f"{row:<20}" + "".join(f"{cell:>12}" for cell in cells))
        if args.figures:
            file = Path(args.figures) / f"{name.replace(' ', '_')}.png"
            draw_matrix(value, columns, title, rows).save(file)
            print(f"{title}: {file}")
    return kept


def main(argv=None):
    """Exit status 0, or 2 after an error."""
    return guarded("evaluate.py", lambda: run(arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
