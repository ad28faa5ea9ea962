"""Measure a trained network, visualise it, and count parameters and multiply-adds of any network.

    python evaluate.py --checkpoint runs/caa-shapes/last.pt          # mIoU and IoU per class
    python evaluate.py --checkpoint … --scales 0.75 1 1.25 --flip --json result.json
    python evaluate.py --checkpoint … --images street.jpg            # any photograph, any folder
    python evaluate.py --checkpoint … --analyse                      # what the paper argues with
    python evaluate.py --checkpoint … --figures figures              # internal visualisations
    python evaluate.py --method caa --backbone resnet101 --cost      # parameters, multiply-adds
    python evaluate.py --method caa --backbone resnet50 --speed      # images per second, memory
    torchrun --nproc-per-node 8 evaluate.py --checkpoint …           # the same, on eight processes

Numbers are over the labelled pixels of the whole split, each image at its own size. A class that is
in neither labels nor predictions has no IoU: it is left out of the mean, and named.
"""

import argparse
import ast
import bisect
import importlib.util
import inspect
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import functional as TF
from tqdm import tqdm

import backbones
import data
from data import UserError, guarded, own_session

AMP = ("auto", "bf16", "fp16", "off")  # mixed precision; auto: bf16, or what the GPU has; CPU: off
CELLS = "Thin lines: the positions of the coarse map, each drawn as a block."
ENLARGED = "Enlarged: the outlined window, where the predictions differ most"
ALIKE = "how alike the mean features of two classes are, 0…1; less is better"
READ = "each row over its largest. Bright squares off the diagonal are classes that are alike."


# --------------------------------------------------------------------------- metrics and prediction
class ConfusionMatrix:
    """`matrix`: int64 `[K, K]`, the pixels of each (true class, predicted class)."""

    def __init__(self, num_classes, device="cpu"):
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, prediction, labels):
        """Add label maps of one shape, of any integer type; pixels labelled 255 do not count."""
        self.matrix += backbones.confusion(prediction, labels, len(self.matrix))

    def result(self):
        """mIoU, pixel_accuracy, class_accuracy, or NaN; of each class: IoU or None, labelled."""
        matrix = self.matrix.cpu().double()
        hit, true = matrix.diag(), matrix.sum(1)
        iou = backbones.iou(matrix)
        return {
            "mIoU": iou.nanmean().item(),
            "pixel_accuracy": (hit.sum() / matrix.sum()).item(),
            "class_accuracy": (hit / true)[true > 0].mean().item(),
            "IoU": [None if math.isnan(value) else value for value in iou.tolist()],
            "labelled": (true > 0).tolist(),
        }


def table(results, classes):
    """Results as text, one column each: IoU per class, the means, then classes without an IoU."""
    ious = dict(zip(classes, zip(*(result["IoU"] for result in results))))
    rows = [(f"  {name}", row) for name, row in ious.items() if any(v is not None for v in row)]
    for name in ("mIoU", "pixel_accuracy", "class_accuracy"):
        rows.append((name.replace("_", " "), [result[name] for result in results]))
    for s in results[0].get("mIoU_at_scale", ()):
        rows.append((f"mIoU, scale {s} alone", [result["mIoU_at_scale"][s] for result in results]))
    lines = []
    for name, row in rows:
        values = (math.nan if value is None else value for value in row)
        lines.append(f"{name:<22}" + "".join(f" {value:6.3f}" for value in values))
    absent = ", ".join(name for name, row in ious.items() if not any(v is not None for v in row))
    if absent:
        lines.append(f"not in the mean (neither labelled nor predicted): {absent}")
    return "\n".join(lines)


def warn_of_absent(labelled, dataset, name):
    """A warning on stderr, where a result could be wrong unnoticed: classes without any label."""
    absent = [c for c, found in zip(dataset.classes, labelled) if not found]
    text = f"no label of {name} holds {', '.join(absent)}; `python data.py` shows the ids"
    if not any(labelled):
        text = f"no pixel of {name} is labelled: there is nothing to measure"
    if absent:
        data.warn(text)


@torch.no_grad()
def predict(net, images, scales=(1.0,), flip=False, window=None):
    """Class probabilities `[N, K, H, W]` of images `[N, 3, H, W]`: the mean over the scales, each
    with its mirror image if `flip`. Images are resized bilinearly, antialiased where they shrink.
    window: cut each into squares of that side, in steps of two thirds; average the overlaps.
    """
    size, kwargs, total = images.shape[2:], dict(mode="bilinear", align_corners=False), 0
    for scale in scales:
        scaled = images
        if scale != 1:
            target = [max(1, round(side * scale)) for side in size]
            scaled = F.interpolate(images, size=target, antialias=True, **kwargs)
        p = _windows(net, scaled, window)
        if flip:
            p += _windows(net, scaled.flip(3), window).flip(3)
            p /= 2
        if scale != 1:
            p = F.interpolate(p, size=size, **kwargs)
        total = p.add_(total)
    return total.div_(len(scales))


def highest(scores):
    """The classes `[N, H, W]` of the highest scores `[N, K, H, W]`; UserError for NaN."""
    values, classes = scores.max(1)
    if not values.isfinite().all():
        raise UserError("the logits are not finite; train with a lower --lr, or with --amp off")
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
    """`ConfusionMatrix.result` of `net`, in evaluation mode; with several scales, each one's mIoU.
    save: called with (index, prediction `[H, W]`). stop: its .signal ends the loop early.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    indices = range(rank, len(dataset), world)
    matrix = ConfusionMatrix(dataset.num_classes, device)
    alone = {s: ConfusionMatrix(dataset.num_classes, device) for s in scales if len(scales) > 1}
    pairs = read_all(Subset(dataset, indices), device, workers, "evaluating", rank > 0)
    for index, (image, labels) in zip(indices, pairs):
        if stop and stop.signal:
            break
        scores = 0  # their sum over the scales: its maximum is where that of the mean is
        for scale in scales:
            with autocast(device, amp):
                p = predict(net, image, (scale,), **kwargs)
            if alone:
                alone[scale].update(p.argmax(1), labels)
            scores = p.add_(scores)
        prediction = highest(scores)
        matrix.update(prediction, labels)
        if save:
            save(index, prediction[0])
    if dist.is_initialized():
        for counts in (matrix, *alone.values()):
            dist.all_reduce(counts.matrix)
    result = matrix.result()
    if alone:
        result["mIoU_at_scale"] = {f"{s:g}": m.result()["mIoU"] for s, m in alone.items()}
    return result


def read_all(dataset, device, workers, what, quiet=False):
    """(images float32 `[1, 3, H, W]`, labels int64 `[1, H, W]`) of `dataset`; a progress bar."""
    loader = DataLoader(dataset, batch_size=1, num_workers=workers, worker_init_fn=own_session)
    for image, labels in tqdm(loader, desc=what, unit="img", leave=False, disable=quiet or None):
        yield data.normalise(image.to(device)), labels.to(device).long()


# --------------------- what train.py uses too: networks, checkpoints, processes, precision, flags
def method_file(name):
    """The module NAME.py; UserError if there is none with a function `build`."""
    known = not name.startswith("__") and name.isidentifier() and importlib.util.find_spec(name)
    module = importlib.import_module(name) if known else None
    if not hasattr(module, "build"):
        raise UserError(f"unknown method '{name}': expected a file {name}.py with a function build")
    return module


def _one_line(error, most=None):
    return " ".join(str(error).split())[:most]


def network(method, num_classes, backbone, weights=None, output_stride=None, options=None):
    """`METHOD.build(…)` of METHOD.py; UserError if there is none, or if its options do not fit."""
    module, options = method_file(method), dict(options or {})
    for name in {"num_classes", "backbone", "weights", "output_stride"} & set(options):
        raise UserError(f"{name} is not an --option; take its own flag, or the dataset's number")
    if output_stride is not None:
        options["output_stride"] = output_stride
    try:
        return module.build(num_classes, backbone, weights=weights, **options)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(_one_line(error)) from error
    except (TypeError, RuntimeError) as error:
        if not options:
            raise
        given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        text = f"{method} cannot be built with the options {given} ({_one_line(error)})"
        raise UserError(text) from error


def read_checkpoint(path):
    """What train.py saved at `path`; UserError where it cannot be read."""
    try:
        checkpoint = backbones.load_file(path)
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError)
        text = f"no checkpoint '{path}'" if missing else f"checkpoint {_one_line(error)}"
        raise UserError(f"{text}; expected a last.pt or best.pt that train.py wrote") from None
    parts = {"net", "settings", "step", "classes", "palette"}
    if not isinstance(checkpoint, dict) or not parts <= set(checkpoint):
        raise UserError(f"'{path}' is not a checkpoint of train.py; a backbone's goes to --weights")
    return checkpoint


def load(checkpoint, output_stride=None, options=None):
    """A checkpoint's network, in evaluation mode; output_stride, options: if others than its."""
    settings, classes = checkpoint["settings"], len(checkpoint["classes"])
    output_stride = settings["output_stride"] if output_stride is None else output_stride
    options = settings["option"] | (options or {})
    net = network(settings["method"], classes, settings["backbone"], None, output_stride, options)
    restore(net, checkpoint)
    return net.eval()


def restore(net, checkpoint):
    """The checkpoint's weights into `net`; UserError where they do not fit."""
    try:
        net.load_state_dict(checkpoint["net"])
    except (RuntimeError, AttributeError, TypeError) as error:
        text = "the checkpoint's weights do not fit; --option, --output-stride or the method's file"
        raise UserError(f"{text} changed them ({_one_line(error, 300)})") from None


def replace(path, write):
    """Write under a temporary name, then rename: a reader finds the old file or the new one."""
    temporary = path.with_name(path.name + ".part")
    try:
        write(temporary)
        with open(temporary) as file:
            os.fsync(file.fileno())  # on the disk before it has the name
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def processes(device=None):
    """(device, rank, world). Joins torchrun's group; a CUDA device becomes the current one."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda", "mps") or not (index or "0").isdecimal():
        raise UserError(f"unknown device '{device}'; expected cpu, cuda, cuda:N or mps")
    several = "WORLD_SIZE" in os.environ
    if kind == "mps" and (several or not torch.backends.mps.is_available()):
        raise UserError("device mps needs an Apple GPU, and no torchrun; take --device cpu")
    device = torch.device(kind)
    if kind == "cuda":
        index = int(os.environ.get("LOCAL_RANK", 0)) if several else int(index or 0)
        count = torch.cuda.device_count()
        if index >= count:
            raise UserError(f"no GPU {index}: there are {count}; change --device or the processes")
        device = torch.device(kind, index)
        torch.cuda.set_device(index)
    if not several:
        return device, 0, 1
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    except ValueError as error:  # not torchrun's environment
        raise UserError(f"take torchrun, or unset WORLD_SIZE ({_one_line(error, 120)})") from None
    return device, dist.get_rank(), dist.get_world_size()


def device_name(device):
    """The GPU's name, or that of the device with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else str(device)


def amp_dtype(amp, device):
    """The type of mixed precision "auto", "bf16", "fp16", "off": None, bfloat16 or float16."""
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if amp == "fp16" and device.type != "cuda":
        raise UserError("--amp fp16 needs a CUDA GPU; take bf16 or off")
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)


def autocast(device, amp):
    """The context of mixed precision `amp` on `device`."""
    dtype = amp_dtype(amp, device)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def flag(name):
    """The flag of a setting: batch_size -> --batch-size."""
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """What is wrong with the flags is a UserError: one line."""

    def error(self, message):
        raise UserError(f"{message.removeprefix('argument ')}; --help lists the flags")

    def add_flag(self, name, form, what, **kwargs):
        """form: the type of the flag's value, or the keywords of `add_argument`."""
        form = form if isinstance(form, dict) else dict(type=form)
        self.add_argument(flag(name), help=what, **form, **kwargs)


def number(least, most=1e9, kind=float):
    """For argparse's type=: a number from `least` to `most`."""

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            what = "a whole number" if kind is int else "a number"
            expected = f"expected {what} from {least} to {most:.10g}, not {text}"
            raise argparse.ArgumentTypeError(expected)
        return value

    return read


whole = partial(number, kind=int)  # a whole number


def two_sides(sides):
    """(height, width) of the values of --crop-size: one side, or both."""
    if len(sides) > 2:
        raise UserError(f"--crop-size {sides}: expected one side, or height and width")
    return sides[0], sides[-1]


def parse_options(pairs):
    """["KEY=VALUE", …] -> dict; values are Python literals if JSON can hold them, else text."""
    options, words = {}, {"true": "True", "false": "False", "none": "None"}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise UserError(f"--option {pair}: expected KEY=VALUE, as in --option channel_layers=3")
        try:
            options[key] = ast.literal_eval(words.get(value.lower(), value))
            json.dumps(options[key], allow_nan=False)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            options[key] = value
    return options


# ----------------------------------------------------------------------------------- cost and speed
def cost(net, size):
    """(parameters, multiply-adds, multiply-adds of each child) for one image of (height, width)."""
    counter = FlopCounterMode(display=False)
    # It counts matrix products and convolutions. The CPU's fused attention it does not know.
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
    """`--speed`: the median seconds and peak bytes, printed and returned. Trains `net` on noise."""
    torch.backends.cudnn.benchmark = True  # as in training
    count, size, name = args.batch_size, args.crop_size, device_name(device)
    images = torch.randn(count, 3, *size, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(num_classes, (count, *size), device=device)
    optimizer, cuda = torch.optim.SGD(net.parameters(), 1e-4, momentum=0.9), device.type == "cuda"
    numbers, amp = dict(device=name, batch_size=count, size=size), amp_dtype(args.amp, device)
    print(f"{count} images of {size[0]}x{size[1]}, amp {amp or 'off'}, {name}")
    for what, training in ("forward", False), ("training step", True):
        net.train(training)
        seconds = []
        for run in range(2 + args.runs):  # two to warm up
            if cuda and run == 2:
                torch.cuda.reset_peak_memory_stats(device)
            start = time.perf_counter()
            with torch.set_grad_enabled(training), autocast(device, args.amp):
                found = net(images, labels) if training else net(images)
            if training:
                optimizer.zero_grad()
                sum(found.values()).backward()
                optimizer.step()
            if cuda:
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
            del found  # the peak is that of one run
        median = statistics.median(seconds[2:])
        peak = torch.cuda.max_memory_allocated(device) if cuda else None
        memory = f"peak {peak / 2**20:.0f} MiB" if cuda else "memory not measured"
        print(f"  {what:<14} {count / median:8.2f} images/s ({median * 1000:.0f} ms), {memory}")
        numbers[what] = dict(seconds=median, images_per_second=count / median, peak_bytes=peak)
    return numbers


# ----------------------------------------------------------------------------------------- pictures
def fade(photo):
    """The uint8 photograph `[3, H, W]` gray and bright, for what is drawn over it: float32."""
    return 100 + 0.6 * photo.float().mean(0, keepdim=True).expand(3, -1, -1)


def draw_figure(title, figure, photo, palette, boxes=(), largest=None):
    """The data.Panel of a label map, or of numbers from 0 to `largest` (None: their own), over the
    photograph if of its size. title: "TEXT"; "TEXT | LOW | HIGH", the words at the ends of a scale
    0 to 1; "TEXT | LOW | HIGH | MARK", and a number that is marked on it.
    """
    if not figure.is_floating_point():
        return data.label_panel(title, figure, palette, boxes=boxes)
    title, *ends = title.split(" | ")
    values = figure.detach().float().cpu()
    largest = 1.0 if ends else largest or values.nan_to_num(0).max().item()
    values = values / max(largest, 1e-12)
    tile, scale = data.heat(values), tuple(ends[:2]) or ("0", f"{largest:.3g}")
    mark = (float(ends[2]), ends[2]) if len(ends) > 2 else ()
    if values.shape != photo.shape[1:]:
        return data.Panel(title, tile, scale, (), mark)
    share = 0.25 + 0.6 * values.nan_to_num(0)
    tile = (share * tile + (1 - share) * fade(photo)).to(torch.uint8)
    return data.Panel(title, tile, scale, boxes, mark)


def cells(maps, pixel, size):
    """((rows, columns) where cells begin or end, box (top, left, bottom, right) of the pixel's).

    Those of the maps that have `size` show each position of a coarse map as a block, a cell, at
    whose border rows, or columns, differ. Without cells, with more than 40 a side or smaller ones
    than 4 pixels, which could not be seen: empty lists, and a box around the pixel.
    """
    maps = [m.float() for m in maps if m.is_floating_point() and m.shape == size]
    maps, borders = torch.stack([torch.zeros(size), *maps]).nan_to_num(-1), []
    for x in maps, maps.mT:
        differ = (x[:, 1:] != x[:, :-1]).any(2).any(0)
        borders.append([0, *(differ.nonzero().flatten() + 1).tolist(), x.shape[1]])
    (row, column), by = pixel or (0, 0), max(3, size[1] // 60)
    counts = [len(border) - 1 for border in borders]
    few = all(count <= min(40, side / 4) for count, side in zip(counts, size))
    if not few or max(counts) == 1:
        return ([], []), (row - by, column - by, row + by, column + by)
    rows, columns = borders
    i, j = bisect.bisect(rows, row), bisect.bisect(columns, column)
    return borders, (rows[i - 1], columns[j - 1], rows[i], columns[j])


def error_map(prediction, truth, photo):
    """uint8 `[3, H, W]`: errors red, what is right a bright photograph, what is ignored black."""
    errors, tile = prediction.cpu() != truth, fade(photo)
    tile[:, errors] = torch.tensor([[220.0], [20], [40]])
    tile[:, truth == data.IGNORE] = 0
    return tile.to(torch.uint8)


def compared(predictions, truth=None):
    """(share of the pairs of label maps that disagree, box (top, left, bottom, right) of most)

    truth: most are counted near its borders; elsewhere differences only decide between equals.
    """
    pairs = [a != b for i, a in enumerate(predictions) for b in predictions[i + 1 :]]
    difference = torch.stack(pairs).float().mean(0)
    weights = 1 if truth is None else backbones.near_border(truth[None])[0] + 1e-6
    size = [max(1, side // 4) for side in difference.shape]
    where = F.avg_pool2d((weights * difference.double())[None], (size[0], 1), stride=1)
    where = F.avg_pool2d(where, (1, size[1]), stride=1)[0]
    row, column = divmod(where.argmax().item(), where.shape[1])
    return difference, (row, column, row + size[0], column + size[1])


def comparison(predictions, image, palette, truth=None):
    """(Panels that compare label maps of an image, name -> `[H, W]`; enlarged box; what it is)"""
    maps = {name: m.cpu() for name, m in predictions.items()}
    difference, box = compared(list(maps.values()), truth)
    panels = [data.label_panel(name, m, palette, boxes=(box,)) for name, m in maps.items()]
    title = "where the predictions differ | same | different"
    panels.append(draw_figure(title, difference, image, palette, (box,)))
    top, left, bottom, right = box
    panels.append(data.Panel("image, enlarged", image[:, top:bottom, left:right]))
    if truth is not None:
        maps["truth"] = truth
    for name, m in maps.items():
        panels.append(data.label_panel(f"{name}, enlarged", m[top:bottom, left:right], palette))
    near = "." if truth is None else ", first of all within 3 pixels of the truth's borders."
    return panels, box, ENLARGED + near


def pixel_of(net, pixel, size):
    """The pixel that figures are about (None: about none); UserError if it cannot be `pixel`."""
    names = inspect.signature(net.figures).parameters if hasattr(net, "figures") else ()
    if "pixel" in names and getattr(net, "about_pixel", True):
        try:
            return backbones.one_pixel(pixel, size)
        except ValueError as error:
            raise UserError(f"--pixel: {error}") from None
    if pixel:
        raise UserError("--pixel has no effect: this method's figures are not about one pixel")
    return None


def figure_sheet(net, image, prediction, palette, classes, truth=None, pixel=None, amp="off"):
    """The sheet of one image: itself, truth, prediction, errors, the method's figures."""
    figures, title, boxes, prediction = {}, "prediction", (), prediction.cpu()
    pixel = pixel_of(net, pixel, prediction.shape)
    if hasattr(net, "figures"):
        device, about = next(net.parameters()).device, {"pixel": pixel} if pixel else {}
        with autocast(device, amp):
            figures = net.figures(data.normalise(image.to(device)), **about)
    of_classes = [k for k in figures if isinstance(k, int)]
    largest = max((figures[k].max().item() for k in of_classes), default=None)  # one scale
    names = {k: f"attention for {classes[k]}" if k in of_classes else k for k in figures}
    figures = {names[k]: m.cpu() for k, m in figures.items()}
    caption = getattr(net, "caption", "") if figures else ""
    maps = {k: m for k, m in figures.items() if not m.is_floating_point()}
    if len(maps) > 1 and all(m.shape == prediction.shape for m in figures.values()):
        own, box, sentence = comparison(maps, image, palette, truth)
        repeated = [name for name, m in maps.items() if torch.equal(m, prediction)][-1:]
        own = [panel for panel in own if panel.title not in repeated]
        title = (repeated or [title])[0]
        boxes, caption = (box,), f"{caption} {sentence}"
    else:
        lines, box = cells(figures.values(), pixel, prediction.shape)
        boxes = (box,) if pixel else ()
        of_class = {names[k] for k in of_classes}
        scales = [largest if name in of_class else None for name in figures]
        own = [draw_figure(*pair, image, palette, boxes, scale)
               for pair, scale in zip(figures.items(), scales)]  # fmt: skip
        if lines[0]:  # drawn once
            first = [panel.tile.shape for panel in own].index(image.shape)
            own[first] = own[first]._replace(lines=lines)
            caption = f"{caption} {CELLS}"
    panels = [data.label_panel(title, prediction, palette, boxes=boxes)]
    if truth is not None:
        panels.append(data.Panel("errors (red)", error_map(prediction, truth, image)))
    maps = [prediction, torch.tensor(of_classes), *maps.values()]
    return _sheet(image, truth, boxes, [*panels, *own], maps, classes, palette, caption)


def _sheet(image, truth, boxes, panels, maps, classes, palette, caption):
    first = [data.Panel("image", image, boxes=boxes)]
    if truth is not None:
        first.append(data.label_panel("truth", truth, palette, boxes=boxes))
        maps = [truth, *maps]
    panels = [*first, *panels]
    # No panel alone in a row, then as few gaps as can be.
    gaps = {c: (len(panels) % c == 1, -len(panels) % c) for c in (4, 5, 3)}
    return data.sheet(panels, min(gaps, key=gaps.get), maps, classes, palette, caption)


@torch.no_grad()
def class_dependency(net, pairs, num_classes, layer="classifier"):
    """Fig. 4.5 of the thesis of car.py: how alike the mean features of every two classes are,
    `[K, K]` float64 in 0…1. pairs: (images, labels) as networks take them in evaluation mode.

    A mean μ is over all positions of a class in what enters the submodule `layer`. A row has the
    dot products of one μ with all, over its largest (ours); below 0 or without the class, 0.
    """
    module, entered, sums, counts = net.get_submodule(layer), [], 0, 0
    with module.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0])):
        for images, labels in pairs:
            net(images)
            X = entered.pop().double()  # [N, C, h, w]
            pixels = backbones.pixels_of(net, labels.shape[1:], X.shape[2:])
            rows, columns = (p.clamp(max=n - 1) for p, n in zip(pixels, labels.shape[1:]))
            small = labels[:, rows[:, None], columns]  # [N, h, w]
            Y = (small.unsqueeze(3) == torch.arange(num_classes, device=small.device)).double()
            sums = sums + torch.einsum("nhwk,nchw->kc", Y, X)
            counts = counts + Y.sum((0, 1, 2))
    mu = sums / counts.clamp(min=1).unsqueeze(1)  # [K, C]
    similarity = (mu @ mu.T).clamp(min=0)
    return similarity / similarity.amax(1, keepdim=True).clamp(min=1e-12)


def without_nan(numbers):
    """What JSON makes of numbers in dicts and lists, with None for NaN and infinity."""
    return json.loads(json.dumps(numbers), parse_constant=lambda _: None)


def draw_matrix(values, columns, title, rows=None, cell=28, margin=130):
    """A picture of a matrix, dark blue to yellow, NaN grey. rows: their names, if not `columns`."""
    known, rows = values.nan_to_num(0), rows or columns
    low, high = min(known.min().item(), 0), known.max().item()
    tiles = data.heat((known - low) / max(high - low, 1e-12))
    tiles[:, values.isnan()] = 200
    width, height = cell * len(columns), cell * len(rows)
    squares = TF.to_pil_image(tiles).resize((width, height), Image.Resampling.NEAREST)
    size = max(width, height // 2, 300)  # not below 300, for the title
    picture = Image.new("RGB", (margin + size, margin + height), "white")
    picture.paste(squares, (margin, margin))
    picture.paste(_names(rows, cell, margin), (0, margin))
    above = _names(columns[::-1], cell, margin).transpose(Image.Transpose.ROTATE_270)
    picture.paste(above, (margin, 0))
    zero = (-low / (high - low), "0") if low < 0 < high else ()
    tile, ends = TF.pil_to_tensor(picture), (f"{low:.3g}", f"{high:.3g}")
    return data.sheet([data.Panel(title, tile, ends, (), zero)], 1, width=picture.width)


def _names(names, cell, margin):
    picture = Image.new("RGB", (margin, cell * len(names)), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for i, name in enumerate(names):
        draw.text((margin - 6, cell * (i + 0.5)), name[:18], "black", font, anchor="rm")
    return picture


def save_prediction(prediction, palette, file, raw_ids=None):
    """A label map `[H, W]` as a palette PNG. raw_ids: the benchmark's class ids, if others."""
    ids, colors = torch.tensor(raw_ids or range(len(palette))), torch.zeros(256, 3).byte()
    colors[ids] = torch.tensor(palette).byte()
    picture = Image.fromarray(ids.byte()[prediction.cpu().long()].numpy())
    picture.putpalette(colors.flatten().tolist())
    picture.save(file)


# ------------------------------------------------------------------------------- flags and the work
ON, MANY, PIXEL = dict(action="store_true"), dict(nargs="+"), dict(type=int, nargs=2)
SIDES, SCALES = dict(nargs="+", type=whole(1, 100_000)), dict(nargs="+", type=number(1e-3, 1e3))
OPTION = dict(action="append", metavar="KEY=VALUE")
SPLIT, NETWORK, FIGURES = ("a whole split",), ("--checkpoint", "--method"), ("--figures",)
VIEWS, WORK = (*SPLIT, "--images"), ("--cost", "--speed")
# name: (default, what it goes with, how it is read, help). A flag without effect is refused.
FLAGS = {
    "checkpoint": (None, (), str, "last.pt or best.pt of train.py"),
    "method": (None, WORK, str, "file of the method, for --cost and --speed without a checkpoint"),
    "images": (None, ("--checkpoint",), MANY, "photographs without labels, or folders of them"),
    "cost": (False, (), ON, "count parameters and multiply-adds"),
    "speed": (False, (), ON, "measure images per second and peak memory, forward and training"),
    "json": (None, (), str, "file for all numbers"),
    "device": (None, (), str, "cpu, cuda, cuda:1, mps [a CUDA GPU if there is one, else cpu]"),
    "dataset": (None, SPLIT, str, "dataset to evaluate on [the checkpoint's]"),
    "data_root": (None, SPLIT, str, "folder of the dataset [the checkpoint's]"),
    "split": ("val", SPLIT, str, "split of the dataset [val]"),
    "workers": (2, SPLIT, whole(0, 512), "loader processes [2]"),
    "analyse": (False, SPLIT, ON, "the numbers that the method's paper argues with"),
    "compare": ([], SPLIT, MANY, "other checkpoints: their numbers, and --figures, side by side"),
    "scales": ([1.0], VIEWS, SCALES, "scales to average over [1]"),
    "flip": (False, VIEWS, ON, "average over the mirrored image too"),
    "window": (None, VIEWS, whole(1), "side of sliding windows in pixels [whole images]"),
    "save_predictions": (None, VIEWS, str, "folder for palette PNGs with the benchmark's own ids"),
    "figures": (None, VIEWS, str, "folder for sheets of pictures, with the method's own figures"),
    "pixel": (None, FIGURES, PIXEL, "row and column that the figures are about [the centre]"),
    "amp": ("auto", (*VIEWS, "--speed"), dict(choices=AMP), "mixed precision [auto: on CUDA]"),
    "backbone": ("resnet50", ("--method",), str, f"{', '.join(backbones.NAMES)} [resnet50]"),
    "classes": (59, ("--method",), whole(1), "number of classes [59, as in Pascal Context]"),
    "output_stride": (None, NETWORK, int, "output stride; of a checkpoint: at evaluation only"),
    "option": ([], NETWORK, OPTION, "option of the method; of a checkpoint: if no weight changes"),
    "crop_size": ([513], WORK, SIDES, "side of the image, or height and width [513]"),
    "batch_size": (2, ("--speed",), whole(1, 65_536), "images at a time [2]"),
    "runs": (5, ("--speed",), whole(1), "timed repetitions, the median is printed [5]"),
}


def arguments(argv=None):
    """The flags over their defaults. UserError for one that has no effect."""
    parser = Parser(argument_default=argparse.SUPPRESS, description="See the top of evaluate.py.")
    for name, (_, _, form, what) in FLAGS.items():
        parser.add_flag(name, form, what)
    given = vars(parser.parse_args(argv))
    done = {f"--{name}" for name in given}
    if not done & {"--images", "--cost", "--speed"}:
        done |= set(SPLIT)
    for name in given:
        uses = FLAGS[name][1]
        if uses and not done & set(uses):
            raise UserError(f"{flag(name)} has no effect here: it goes with {' or '.join(uses)}")
    if ("checkpoint" in given) == ("method" in given):
        raise UserError("give --checkpoint FILE, or --method NAME with --cost or --speed")
    if {"pixel", "compare"} <= set(given):
        raise UserError("--compare has no effect with --pixel; leave one of them out")
    args = argparse.Namespace(**{name: values[0] for name, values in FLAGS.items()} | given)
    args.crop_size = two_sides(args.crop_size)
    return args


def run(args):
    """Do what the flags ask for. Returns the exit status: 2 where a photograph was broken."""
    device, rank, world = processes(args.device)
    amp_dtype(args.amp, device)  # whether the device has it
    if args.json and rank == 0:  # better known now than at the end whether it can be written
        file = Path(args.json)
        if file.suffix != ".json" or file.name == "config.json" or file.is_dir():
            raise UserError(f"--json {file}: expected a file that ends in .json, no run's record")
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()
    if world > 1 and (args.cost or args.speed or args.images):
        raise UserError("--cost, --speed and --images are for one process, without torchrun")
    changes = args.output_stride, parse_options(args.option)
    if args.checkpoint:
        checkpoint = read_checkpoint(args.checkpoint)
        net, classes = load(checkpoint, *changes), len(checkpoint["classes"])
    else:
        checkpoint, classes = None, args.classes
        net = network(args.method, classes, args.backbone, None, *changes)
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
    """`--cost`: what `cost` counts, printed and returned."""
    parameters, operations, children = cost(net, size)
    shown = f"{parameters / 1e6:.2f} M parameters, {operations / 1e9:.4f} G multiply-adds"
    print(f"{shown} for {size[0]}x{size[1]}, of which")
    print("\n".join(f"  {name:<12} {count / 1e9:10.4f} G" for name, count in children.items()))
    return dict(size=size, parameters=parameters, multiply_adds=operations, children=children)


def make_folders(args, read):
    """Make the folders of results. UserError where a file of this call could be overwritten."""
    folders = [Path(name).resolve() for name in (args.save_predictions, args.figures) if name]
    if len(set(folders)) < len(folders) or set(folders) & {path.resolve() for path in read}:
        raise UserError("--save-predictions and --figures need folders of their own; take others")
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)


def photographs(net, checkpoint, device, args, views):
    """`--images`: (shares of the classes in each photograph, exit status 2 if one is broken)."""
    classes, palette, numbers, status = checkpoint["classes"], checkpoint["palette"], {}, 0
    args.save_predictions = args.save_predictions or "predictions"
    files = data.photographs(args.images, (args.save_predictions, args.figures))
    folder = Path(args.save_predictions)
    outputs = [f"{file.stem}{end}" for file in files for end in (".png", "_overlay.png")]
    name, count = Counter(outputs).most_common(1)[0]
    if count > 1:
        raise UserError(f"--images: {count} photographs share the output file {name}; split them")
    make_folders(args, {file.parent for file in files if file.is_file()})
    for file in files:
        try:
            image = data.read_image(file, upright=True, huge=args.window is not None)
            pixel_of(net, args.pixel, image.shape[1:])
        except UserError as error:
            print(f"evaluate.py: {error}", file=sys.stderr)
            status = 2
            continue
        prediction = label_map(net, image, device, args.amp, **views)
        save_prediction(prediction, palette, folder / f"{file.stem}.png", checkpoint.get("raw_ids"))
        overlay = folder / f"{file.stem}_overlay.png"
        drawn = data.Panel("prediction", data.overlay(image, prediction, palette))
        panels, maps = [data.Panel("image", image), drawn], [prediction.cpu()]
        data.sheet(panels, 2, maps, classes, palette, width=480).save(overlay)
        if args.figures:
            about = None, args.pixel, args.amp
            picture = figure_sheet(net, image, prediction, palette, classes, *about)
            picture.save(Path(args.figures) / f"{file.stem}_figures.png")
        counts = torch.bincount(prediction.flatten().cpu(), minlength=len(classes))
        shares = dict(zip(classes, (counts / prediction.numel()).tolist()))
        common = [c for c in sorted(classes, key=shares.get, reverse=True) if shares[c] >= 0.005]
        print(f"{file}: {', '.join(f'{c} {shares[c]:.0%}' for c in common)} -> {overlay}")
        numbers[str(file)] = shares
    return numbers, status


def whole_split(net, checkpoint, device, rank, args, views):
    """Metrics, predictions, figures and the method's numbers of a whole split."""
    settings = checkpoint["settings"]
    name, own = args.dataset or settings["dataset"], settings["data_root"]
    if args.data_root and name.startswith("shapes"):
        raise UserError("--data-root has no effect here: shapes is drawn, it has no files")
    root = args.data_root or (own if name == settings["dataset"] else data.default_root(name))
    dataset = data.dataset(name, root, args.split, huge=args.window is not None)
    nets = {args.checkpoint: net} | compared_networks(args, checkpoint, name, dataset, device)
    make_folders(args, {file.parent for pair in getattr(dataset, "files", ()) for file in pair})
    if args.figures and rank == 0:  # first: a wrong --pixel is better known now than at the end
        draw_figures(nets, dataset, device, args, views)

    def save(index, prediction):
        if args.save_predictions:
            file = Path(args.save_predictions) / f"{dataset.name(index)}.png"
            save_prediction(prediction, dataset.palette, file, getattr(dataset, "raw_ids", None))

    results = {}
    for path, one in nets.items():
        save_own = save if one is net else None
        results[path] = evaluate(one, dataset, device, args.amp, args.workers, save_own, **views)
    result = results[args.checkpoint]
    about = dict(checkpoint=args.checkpoint, step=checkpoint["step"], dataset=name)
    about |= dict(split=args.split, images=len(dataset), **views)
    about |= dict(output_stride=args.output_stride, option=args.option)
    if rank == 0:
        print(", ".join(f"{key} {value}" for key, value in about.items() if value))
        for i, path in enumerate(nets if args.compare else (), 1):
            print(f"  column {i}: {path}")
        print(table(list(results.values()), dataset.classes))
        warn_of_absent(result["labelled"], dataset, f"{name} {args.split}")
        if args.figures and "mIoU_at_scale" in result:
            points = sorted((float(s), v) for s, v in result["mIoU_at_scale"].items() if v == v)
            file = Path(args.figures) / "scales.png"
            data.chart("at each scale alone", {"mIoU": points}, "scale").save(file)
            print(f"mIoU over scale: {file}")
        seen = settings.get("train_split") == "trainval" and name == settings["dataset"]
        if seen and args.split in ("train", "val", "trainval"):
            data.warn(f"{args.split} was trained on (--train-split trainval)")
        if args.analyse:
            result["analysis"] = analyse(net, dataset, device, args)
    for one in results.values():
        del one["labelled"]
        one["IoU"] = dict(zip(dataset.classes, one["IoU"]))
    if args.compare:
        about["compared"] = {path: results[path] for path in args.compare}
    return result | about


def compared_networks(args, checkpoint, name, dataset, device):
    """The networks of `--compare` by path. UserError where classes are not the dataset's."""
    saved = {args.checkpoint: checkpoint} | {path: read_checkpoint(path) for path in args.compare}
    if len({Path(path).resolve() for path in saved}) <= len(args.compare):
        raise UserError("--compare: a checkpoint is compared with others; name each once")
    for path, other in saved.items():
        if other["classes"] != dataset.classes:
            text = f"'{path}' was trained on other classes than those of {name}"
            raise UserError(f"{text}; take another checkpoint, or another --dataset")
    return {p: load(saved[p]).to(device, memory_format=torch.channels_last) for p in args.compare}


def draw_figures(nets, dataset, device, args, views):
    """`--figures`: the sheets of eight images. nets: path -> network."""
    palette, classes, net = dataset.palette, dataset.classes, nets[args.checkpoint]
    for index in data.pick_images(dataset, 8):
        image, truth = dataset[index]
        maps = {k: label_map(n, image, device, args.amp, **views).cpu() for k, n in nets.items()}
        if args.compare:
            panels, box, sentence = comparison(maps, image, palette, truth)
            about = maps.values(), classes, palette, sentence
            picture = _sheet(image, truth, (box,), panels, *about)
        else:
            about = truth, args.pixel, args.amp
            picture = figure_sheet(net, image, maps[args.checkpoint], palette, classes, *about)
        picture.save(Path(args.figures) / f"{dataset.name(index)}.png")
    print(f"figures: {args.figures}")


def analyse(net, dataset, device, args):
    """`--analyse`: class dependency and `net.analyse`, printed, returned, drawn with `--figures`.

    A key is "NAME: WHAT IT SAYS"; of a matrix without classes also " | ROW, … | COLUMN, …".
    """
    numbers, kept, K = {}, {}, dataset.num_classes
    with autocast(device, args.amp):
        layers = ["classifier", getattr(net, "regularized", "classifier")]
        for layer in dict.fromkeys(layers) if hasattr(net, "classifier") else ():
            pairs = read_all(dataset, device, args.workers, "class dependency")
            dependency = class_dependency(net, pairs, K, layer).cpu()
            occur = dependency.diag() > 0
            others = occur & occur.unsqueeze(1) & ~torch.eye(K, dtype=torch.bool)
            where = "" if layer == "classifier" else " at the place of CAR"
            numbers[f"class dependency{where}: {ALIKE}"] = dependency[others].mean().item()
            numbers[f"class dependency of pairs{where}: {ALIKE}; {READ}"] = dependency
        if hasattr(net, "analyse"):
            numbers |= net.analyse(read_all(dataset, device, args.workers, "analysis"))
    for key, value in numbers.items():
        title, *axes = key.split(" | ")
        name = title.partition(":")[0]
        if isinstance(value, float):
            kept[name] = value
            print(f"{value:5.3f}".replace("nan", "  –"), "", title)
            continue
        value = value.cpu()
        kept[name] = value.tolist()
        names = [axis.split(", ") for axis in axes]
        rows, columns = [*names, dataset.classes, dataset.classes][:2]
        turned = len(columns) > 6  # a line of text for each column
        table, down, across = (value.T, columns, rows) if turned else (value, rows, columns)
        if len(across) <= 6:
            print(title, " " * 20 + "".join(f"{column:>12}" for column in across), sep="\n")
            for row, line in zip(down, table.tolist()):
                print(f"{row:<20}" + "".join(f"{x:12.3f}" for x in line).replace("nan", "  –"))
        if args.figures:
            file = Path(args.figures) / f"{name.replace(' ', '_')}.png"
            draw_matrix(value, columns, title, rows).save(file)
            print(f"{name}: {file}")
    return kept


def main(argv=None):
    """Exit status 0, or 2 after an error."""
    return guarded("evaluate.py", lambda: run(arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
