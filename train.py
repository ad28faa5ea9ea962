"""Train any method of this repository: plain PyTorch, one process or many, mixed precision on CUDA.

    python train.py                                    # CAA on synthetic images, in minutes
    python train.py --method caa --dataset camvid --data-root DIR    # any dataset, see data.py
    torchrun --nproc-per-node 8 train.py --method caa --dataset pascal_context    # as the paper did
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train.py …
    python train.py --output runs/caa-shapes --resume                # go on where a run stopped

Settings are the defaults below, then the method's RECIPES for the dataset, then the flags. Each is
printed and kept in config.json with where it came from. `--batch-size` is that of all processes
together; `--accumulate N` computes the share of each process in N parts.

A run's folder: config.json; log.jsonl, a line for each logged step (`step`, `lr`, `loss`, its
terms, `images_per_second`) and each evaluation (`step`, `mIoU`, `pixel_accuracy`, `class_accuracy`,
`IoU`); last.pt and best.pt (highest mIoU); curves.png; samples.png.

The same seed gives the same run: a sample's augmentation depends on (seed, position in the run),
a step's dropout on (seed, step, process). So workers, interruptions and --resume change nothing, on
the CPU bit for bit. Several processes equal one with the joint batch up to dropout, of which each
has its own, and batch norm, which is synchronized on CUDA alone. On several machines --output has
to be a folder that all of them see.
"""

import argparse
import contextlib
import fcntl
import importlib
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.optim.lr_scheduler import PolynomialLR, StepLR
from torch.utils.data import DataLoader
from tqdm import tqdm

import backbones
import data
import evaluate
from data import UserError

# name: (default, what it is). The defaults are those of every dataset without a recipe.
SETTINGS = {
    # what
    "method": ("caa", "file METHOD.py"),
    "dataset": ("shapes", "name in data.py: shapes, shapes+company, camvid, folder, …"),
    "data_root": (None, "folder of the dataset [datasets/NAME, or that of the same files]"),
    "backbone": ("resnet18", "feature extractor: " + ", ".join(backbones.NAMES)),
    "weights": (None, "weights of the backbone: none, imagenet, or the path of a state dict"),
    "output_stride": (None, "stride of the backbone, 32, 16, 8; hfgd: of the logits, 4, 2, 1"),
    "option": ({}, "option of the method's build, may be repeated"),
    "car": (None, "add car.py's losses; paper: Eq. (4.11) as printed; released: the authors' form"),
    "init": (None, "checkpoint whose weights the run starts from"),
    # how long, how fast
    "iterations": (140, "optimizer steps"),
    "batch_size": (8, "images in a step, of all processes together"),
    "accumulate": (1, "parts in which a step is computed, for a GPU with too little memory"),
    "optimizer": ("sgd", "sgd, adam or adamw"),
    "lr": (0.02, "learning rate at the start"),
    "head_lr": (1.0, "multiple of the learning rate for all but the backbone"),
    "power": (0.9, "exponent of the polynomial decay lr · (1 - step/iterations)^power"),
    "halve_every": (0, "steps between halvings of the rate, in place of the decay, 0: none"),
    "momentum": (0.9, "SGD momentum"),
    "weight_decay": (1e-4, "weight decay, L2 (decoupled with adamw)"),
    "decay_norms": (True, "weight decay for norms and biases too"),
    "bn_momentum": (0.1, "share of the new batch in batch norm's running statistics"),
    # augmentation
    "crop_size": (96, "training crop: its side, or height and width"),
    "scale": ((0.75, 1.5), "range of the random scale"),
    "scale_step": (0.0, "step between the random scales, 0: any scale"),
    "base_size": (None, "longer side of an image at scale 1, in pixels [its own]"),
    "color": ("none", "color jitter: none, brightness or photometric"),
    # the machine, and what is kept
    "seed": (0, "seed of everything random"),
    "deterministic": (False, "use only deterministic kernels"),
    "workers": (2, "loader processes for each training process"),
    "amp": ("auto", "mixed precision: auto, bf16, fp16, off; auto: on CUDA"),
    "compile": (False, "use torch.compile"),
    "device": (None, "cpu, cuda, cuda:1, mps [a CUDA GPU if there is one, else cpu]"),
    "eval_every": (None, "steps between evaluations [a tenth of the run, at least 100]"),
    "save_every": (None, "steps between checkpoints [as eval_every]"),
}
# Flags with a form of their own
FORMS = {
    "option": dict(action="append", metavar="KEY=VALUE"),
    "scale": dict(nargs=2, type=float, metavar=("LOW", "HIGH")),
    "crop_size": dict(nargs="+", type=int, metavar="N"),
    "car": dict(nargs="?", const="default", choices=("default", "paper", "released")),
    "decay_norms": dict(action=argparse.BooleanOptionalAction),
    "optimizer": dict(choices=("sgd", "adam", "adamw")),
    "amp": dict(choices=("auto", "bf16", "fp16", "off")),
} | dict.fromkeys(("output_stride", "base_size", "eval_every", "save_every"), dict(type=int))
# What may differ when a run goes on: it changes no result, or rounding alone
FREE = {"workers", "device", "eval_every", "save_every", "data_root", "compile"}
AUGMENTATION = ("seed", "crop_size", "scale", "scale_step", "base_size", "color")
LOG_EVERY = 10  # steps


# ----------------------------------------------------------------------------------------- settings


def arguments(argv=None):
    """(flags that were given, output folder or None, resume)"""
    parser = argparse.ArgumentParser(description="Train a segmentation method; see train.py's top.")
    for name, (default, what) in SETTINGS.items():
        kwargs = dict(type=type(default)) if default is not None else {}
        kwargs = dict(action="store_true") if default is False else FORMS.get(name, kwargs)
        shown = "" if default in (None, {}) or default is False else f" [{default}]"
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, default=argparse.SUPPRESS, help=what + shown, **kwargs)
    what = "folder of the run [runs/METHOD-DATASET, with a number where that is taken]"
    parser.add_argument("--output", metavar="DIR", help=what)
    what = "go on with the run in --output; with --method and --dataset: or start it there"
    parser.add_argument("--resume", action="store_true", help=what)
    given = vars(parser.parse_args(argv))
    output, resume = given.pop("output"), given.pop("resume")
    if "option" in given:
        given["option"] = evaluate.parse_options(given["option"])
    if len(given.get("crop_size", ())) == 1:
        given["crop_size"] = given["crop_size"][0]
    if given.get("weights") == "none":
        given["weights"] = None
    return given, output, resume


def resolve(given):
    """(settings, where each came from): defaults, then the method's recipe, then the flags."""
    settings = {name: default for name, (default, _) in SETTINGS.items()}
    origin = dict.fromkeys(settings, "default")
    method = evaluate.method_file(given.get("method", settings["method"]))
    dataset = given.get("dataset", settings["dataset"])
    recipe = getattr(method, "RECIPES", {}).get(dataset, {})
    strange = ", ".join(sorted(set(recipe) - set(SETTINGS)))
    if strange:
        text = f"the recipe for {dataset} in {method.__name__}.py has unknown settings: {strange}"
        raise UserError(f"{text}; train.py lists the known ones")
    for values, source in (recipe, f"recipe {method.__name__}/{dataset}"), (given, "command line"):
        for name, value in values.items():
            settings[name] = settings[name] | value if name == "option" else value
            origin[name] = source
    check_effect(given, settings)
    return completed(settings), origin


def completed(settings):
    """The settings with defaults that depend on others filled in, if all numbers are in range."""
    if settings["data_root"] is None:
        settings["data_root"] = str(data.default_root(settings["dataset"]))
    for name in ("eval_every", "save_every"):
        if settings[name] is None:
            settings[name] = max(100, math.ceil(settings["iterations"] / 10))
    for name in ("iterations", "batch_size", "accumulate", "eval_every", "save_every", "base_size"):
        evaluate.in_range(name, settings[name], 1)
    evaluate.in_range("seed", settings["seed"], 0, 2**63 - 1)
    for name in ("workers", "lr", "head_lr", "power", "weight_decay", "halve_every"):
        evaluate.in_range(name, settings[name], 0)
    for name in ("momentum", "bn_momentum"):
        evaluate.in_range(name, settings[name], 0, 1)
    sides = settings["crop_size"]
    sides = [sides] if isinstance(sides, int) else list(sides)
    evaluate.check_sides("crop-size", sides)
    settings["crop_size"] = sides if len(sides) == 2 else sides[0]
    low, high = settings["scale"] = list(settings["scale"])
    if not 1e-3 <= low <= high <= 1e3:
        text = f"--scale {low} {high}: expected two factors from 0.001 to 1000"
        raise UserError(f"{text}, the smaller one first")
    if settings["scale_step"]:
        evaluate.in_range("scale_step", settings["scale_step"], 1e-3, 1e3)
    return settings


def check_effect(given, s):
    """UserError for a flag that changes nothing in a run of the settings `s`."""
    idle = {
        "weights": s["init"] and "--init gives all weights",
        "momentum": s["optimizer"] != "sgd" and f"the optimizer is {s['optimizer']}",
        "power": s["halve_every"] and "the learning rate is halved every --halve-every steps",
        "data_root": s["dataset"].startswith("shapes") and "shapes is drawn, it has no files",
    }
    for name, reason in idle.items():
        if reason and given.get(name) is not None:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} has no effect here: {reason}; leave it out")


def resumed(output, given):
    """(settings, origin, checkpoint) of the run in `output`.

    UserError for a flag that would change its result. A setting that a later version added has its
    default.
    """
    if output is None:
        raise UserError("--resume needs the run's folder: --output runs/NAME")
    path, last = Path(output) / "config.json", Path(output) / "last.pt"
    if not path.is_file():
        text = (
            "expected the --output folder of an earlier run, or --method and --dataset to start one"
        )
        text = f"start a new run with --init {last}" if last.is_file() else text
        raise UserError(f"nothing to resume: '{path}' is not there; {text}")
    try:
        saved = json.loads(path.read_text())["settings"]
        settings, origin = {}, {}
        for name, (default, _) in SETTINGS.items():
            default = json.loads(json.dumps(default))  # lists, as in config.json
            if name in saved or name == "method":
                settings[name], origin[name] = saved[name]["value"], saved[name]["from"]
            else:
                settings[name], origin[name] = default, "default"
            kinds = {float: (int, float), int: (int, list)}.get(type(default), type(default))
            if default is not None and not isinstance(settings[name], kinds):
                raise TypeError
        settings = completed(settings)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError):
        raise UserError(f"'{path}' is damaged; start a new run with --init {last}") from None
    check_effect(given, settings)
    if "option" in given:  # those of the recipe need not be repeated
        given["option"] = settings["option"] | given["option"]
    for name, value in json.loads(json.dumps(given)).items():  # lists, as in config.json
        if name not in FREE and value != settings[name]:
            text = f"--{name.replace('_', '-')} {value} differs from this run's {settings[name]}"
            raise UserError(f"{text}; leave it out, or start a new run with --init {last}")
        if value != settings[name]:
            settings[name], origin[name] = value, "command line"
    checkpoint = evaluate.read_checkpoint(last) if last.exists() else None
    parts = {"optimizer", "schedule", "scaler", "evaluated", "best"}
    whole = not checkpoint or parts <= set(checkpoint)
    if not whole or checkpoint and checkpoint["step"] > settings["iterations"]:
        wrong = f"does not belong to '{path}'" if whole else "has no state of an optimizer"
        raise UserError(f"'{last}' {wrong}; start a new run with --init {last}")
    return completed(settings), origin, checkpoint


# ----------------------------------------------------------------------------------- files of a run


def claimed(output, settings, resumes, rank):
    """(the run's folder, its lock, which is held while it is open). The first process takes the
    folder and tells the others.

    UserError where another run holds it: a checkpoint is in it (unless the run resumes it), or a
    lock. Where the file system has no locks there is only a warning.
    """
    answer = [None, None]  # the folder, or what is wrong
    lock = None
    if rank == 0:
        name, number = f"runs/{settings['method']}-{settings['dataset']}", 1
        while True:
            folder = Path(output or (name if number == 1 else f"{name}-{number}"))
            folder.mkdir(parents=True, exist_ok=True)
            lock = open(folder / ".lock", "w")
            try:
                # Loader processes, which outlive a killed run for a moment, do not inherit it.
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                wrong = None
                if not resumes and any(folder.glob("*.pt")):
                    wrong = "holds a run already; add --resume to go on with it, or take another"
            except (BlockingIOError, PermissionError):
                wrong = "belongs to a run that is training now; wait for it, or take another"
            except OSError as error:
                print(f"warning: '{folder}' cannot be locked ({error.strerror})", file=sys.stderr)
                wrong = None
            if wrong is None or output:
                break
            number += 1
        answer = [folder, wrong and f"'{folder}' {wrong} --output"]
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    folder, wrong = answer
    if wrong:
        raise UserError(wrong)
    return folder, lock


def write_config(folder, settings, origin, device, world):
    """config.json, and the same to read on the screen."""
    packages = ("torch", "torchvision", "numpy", "PIL")
    versions = {name: importlib.import_module(name).__version__ for name in packages}
    versions |= {"python": platform.python_version(), "cuda": torch.version.cuda}
    try:
        command = ["git", "describe", "--always", "--dirty"]
        kwargs = dict(cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        git = subprocess.run(command, **kwargs).stdout.strip() or None
    except OSError:
        git = None  # no git on this machine
    kept = {name: {"value": value, "from": origin[name]} for name, value in settings.items()}
    config = dict(settings=kept, versions=versions, git=git, processes=world)
    config["device"] = evaluate.device_name(device)
    text = json.dumps(config, indent=1) + "\n"
    replace(folder / "config.json", lambda path: path.write_text(text))
    chosen = [name for name in settings if origin[name] != "default"]
    for name in sorted(chosen, key=lambda name: origin[name] != "command line"):
        print(f"  {name:<14} {settings[name]!s:<40} {origin[name]}")
    rest = [f"{name} {value}" for name, value in settings.items() if name not in chosen]
    print(f"  defaults: {', '.join(rest)}")


def replace(path, write):
    """Write under a temporary name, then rename: a reader finds the old file or the new one."""
    temporary = path.with_name(path.name + ".part")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_log(folder):
    """The lines of log.jsonl; one that was cut short by a kill is left out."""
    path, lines = folder / "log.jsonl", []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict) and "step" in line]


def rewind_log(folder, step, evaluated):
    """Drop what a run logged after its last checkpoint: it will be logged again."""
    last = {True: evaluated, False: step}
    kept = [line for line in read_log(folder) if line["step"] <= last["mIoU" in line]]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    replace(folder / "log.jsonl", lambda path: path.write_text(text))


def append_log(folder, **line):
    """One more line of log.jsonl; what is not a number becomes null."""
    with open(folder / "log.jsonl", "a") as file:
        file.write(json.dumps(evaluate.without_nan(line)) + "\n")


def draw_curves(folder):
    """curves.png: the loss and its terms, the learning rate, and the metrics, over the steps."""
    log = read_log(folder)
    steps, results = ([line for line in log if name in line] for name in ("loss", "mIoU"))
    terms = [n for n in (steps[0] if steps else {}) if n not in ("step", "lr", "images_per_second")]
    metrics = ("mIoU", "pixel_accuracy", "class_accuracy")
    panels = (
        ("loss", steps, terms),
        ("learning rate", steps, ["lr"]),
        ("validation", results, metrics),
    )
    picture = Image.new("RGB", (480 * len(panels), 340), "white")
    for i, (title, lines, names) in enumerate(panels):
        series = {n: [(x["step"], x[n]) for x in lines if x.get(n) is not None] for n in names}
        picture.paste(_panel(title, series), (480 * i, 0))
    replace(folder / "curves.png", lambda path: picture.save(path, format="png"))


def _panel(title, series, width=480, height=340):
    # drawn at twice the size, for smooth lines
    picture = Image.new("RGB", (2 * width, 2 * height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(24)
    left, top, right, bottom = 120, 30 * len(series) + 40, 2 * width - 40, 2 * height - 60
    draw.text((left, 16), title, "black", font)
    points = [point for line in series.values() for point in line]
    highest = [max((abs(point[i]) for point in points), default=0) for i in (0, 1)]
    (x_step, x_end), (y_step, y_end) = map(_ticks, highest)
    y_start = -y_end if any(y < 0 for _, y in points) else 0

    def place(x, y):
        up = (bottom - top) * (y - y_start) / (y_end - y_start)
        return left + (right - left) * x / x_end, bottom - up

    for i in range(round(y_start / y_step), round(y_end / y_step) + 1):
        x, y = place(0, i * y_step)
        draw.line((x, y, right, y), "#dddddd", 2)
        draw.text((x - 12, y), f"{i * y_step:.4g}", "black", font, anchor="rm")
    for i in range(round(x_end / x_step) + 1):
        x, y = place(i * x_step, y_start)
        draw.text((x, y + 14), f"{i * x_step:g}", "black", font, anchor="mt")
    colors = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#17becf")
    for i, (name, line) in enumerate(series.items()):
        color, places = colors[i % len(colors)], [place(*point) for point in line]
        draw.line(places, color, 4, joint="curve")
        for x, y in places if len(places) < 30 else []:
            draw.ellipse((x - 6, y - 6, x + 6, y + 6), color)
        last = f"  {line[-1][1]:.3g}" if line else ""
        draw.text((right, 16 + 30 * i), f"{name.replace('_', ' ')}{last}", color, font, anchor="ra")
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _ticks(highest):
    """(distance, end) of round ticks from 0 to at least `highest`, at most six of them."""
    power = 10.0 ** math.floor(math.log10(highest or 1))
    distance = next(d * power for d in (0.2, 0.5, 1, 2) if highest <= 5 * d * power)
    return distance, distance * max(1, math.ceil(highest / distance - 1e-9))


def draw_samples(folder, net, dataset, device, amp, indices):
    """samples.png: image, truth and prediction of these images."""
    panels, maps, palette = [], [], dataset.palette
    for index in indices:
        image, truth = dataset[index]
        maps += [truth, evaluate.label_map(net, image, device, amp).cpu()]
        panels += [data.Panel(f"image {dataset.name(index)}", image)]
        names = "truth", "prediction"
        panels += [data.label_panel(name, m, palette) for name, m in zip(names, maps[-2:])]
    picture = data.sheet(panels, 3, maps, dataset.classes, palette)
    replace(folder / "samples.png", lambda path: picture.save(path, format="png"))


# ---------------------------------------------------------------------------- network and optimizer


def make_net(s, classes, resumes, device, world):
    """(the network on its device, a line about the weights it starts from or None)."""
    torch.manual_seed(s["seed"])
    weights = None if resumes or s["init"] else s["weights"]
    parts = s["method"], len(classes), s["backbone"], weights, s["output_stride"], s["option"]
    net = evaluate.network(*parts)
    note = initialise(net, s["init"], classes) if s["init"] and not resumes else None
    if world > 1 and device.type == "cuda":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = s["bn_momentum"]
    # the faster layout for convolutions, on CPU and CUDA alike
    return net.to(device, memory_format=torch.channels_last), note


def initialise(net, path, classes=None):
    """--init: every tensor of the checkpoint that fits; a line says which do not.

    classes: the names of this run's, if a line is to say that the checkpoint's are others.
    """
    checkpoint, own = evaluate.read_checkpoint(path), net.state_dict()
    saved = checkpoint["net"]
    fitting = {k: v for k, v in saved.items() if k in own and own[k].shape == v.shape}
    if not fitting:
        expected = "expected a checkpoint of the same method and backbone"
        raise UserError(f"nothing in '{path}' fits this network; {expected}")
    net.load_state_dict(fitting, strict=False)
    left = [name for name in own if name not in fitting]
    more = f" and {len(left) - 3} more" if len(left) > 3 else ""
    as_new = f"; as new: {', '.join(left[:3])}{more}" if left else ""
    if classes and checkpoint["classes"] != classes:
        as_new += "; its classifier is of other classes (names, number or order)"
    return f"{len(fitting)} of {len(own)} tensors from {path}{as_new}"


def with_losses(net, s, num_classes, rank):
    """--car: the terms of car.py join in training; what is saved and evaluated is `net`."""
    form = {"paper": {"literal": True}, "released": {"released": True}}.get(s["car"], {})
    try:
        model = evaluate.method_file("car").regularize(net, "classifier", num_classes, **form)
    except ValueError as error:
        raise UserError(f"--car: {error}") from error
    if rank == 0 and not hasattr(net, "regularized"):
        print("--car acts on what enters .classifier, because the network names no .regularized")
    return model


def make_optimizer(net, s):
    """SGD, Adam or AdamW.

    With decay_norms=False what has one dimension (norms, biases) is not decayed. All that is not in
    net.backbone learns at head_lr · lr.
    """
    parts = [(list(net.parameters()), s["lr"])]
    if s["head_lr"] != 1:
        if not hasattr(net, "backbone"):
            raise UserError(f"--head-lr: {s['method']} has no part named backbone; leave it out")
        inside = set(net.backbone.parameters())
        head = [p for p in net.parameters() if p not in inside]
        parts = [(list(net.backbone.parameters()), s["lr"]), (head, s["head_lr"] * s["lr"])]
    groups = []
    for parameters, lr in parts:
        decayed = [p for p in parameters if p.ndim > 1 or s["decay_norms"]]
        groups.append(dict(params=decayed, lr=lr))
        if not s["decay_norms"]:
            rest = [p for p in parameters if p.ndim <= 1]
            groups.append(dict(params=rest, lr=lr, weight_decay=0.0))
    kind = dict(sgd=torch.optim.SGD, adam=torch.optim.Adam, adamw=torch.optim.AdamW)[s["optimizer"]]
    momentum = dict(momentum=s["momentum"]) if s["optimizer"] == "sgd" else {}
    return kind(groups, s["lr"], weight_decay=s["weight_decay"], **momentum)


class State:
    """What the next step depends on; a checkpoint holds it. Random numbers are not in it, because
    they follow from (seed, step).
    """

    def __init__(self, net, s, folder, device, rank):
        self.net, self.settings, self.folder, self.device, self.rank = net, s, folder, device, rank
        self.optimizer = make_optimizer(net, s)
        if s["halve_every"]:
            self.schedule = StepLR(self.optimizer, s["halve_every"], 0.5)
        else:
            self.schedule = PolynomialLR(self.optimizer, s["iterations"], s["power"])
        fp16 = evaluate.amp_dtype(s["amp"], device) is torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)
        self.step, self.evaluated, self.best = 0, 0, -1.0
        self.shown = None  # the validation images of samples.png
        self.labelled = False  # whether a pixel was, until now

    def load(self, checkpoint):
        evaluate.restore(self.net, checkpoint)
        try:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.schedule.load_state_dict(checkpoint["schedule"])
            if checkpoint["scaler"]:  # empty where the run had no fp16 until now
                self.scaler.load_state_dict(checkpoint["scaler"])
        except (AttributeError, KeyError, TypeError, ValueError):
            text = "the optimizer's state in last.pt is not that of this run"
            raise UserError(f"{text}; start a new run with --init last.pt") from None
        for name in ("step", "evaluated", "best"):
            setattr(self, name, checkpoint[name])
        self.labelled = self.step > 0

    def save(self, name, dataset):
        """Write the checkpoint `name`, but never one whose weights are not finite. best.pt holds
        what evaluation and --init need, last.pt also what --resume needs.
        """
        parts = ("net",) if name == "best.pt" else ("net", "optimizer", "schedule", "scaler")
        state = {part: getattr(self, part).state_dict() for part in parts}
        broken = [key for key, value in state["net"].items() if not value.isfinite().all()]
        if broken:
            which = f"{broken[0]} and {len(broken) - 1} more"
            text = f"weights are not finite after step {self.step} ({which})"
            raise UserError(f"{text}; {self.kept()}; try a lower --lr, or --amp off")
        state |= {name: getattr(self, name) for name in ("step", "evaluated", "best", "settings")}
        state |= dict(classes=dataset.classes, palette=[list(color) for color in dataset.palette])
        state |= dict(raw_ids=getattr(dataset, "raw_ids", None))
        replace(self.folder / name, lambda temporary: torch.save(state, temporary))

    def kept(self):
        """What is left of the run, in words."""
        last = self.folder / "last.pt"
        return f"{last} is from before" if last.exists() else "no checkpoint was written yet"


# ----------------------------------------------------------------------------------------- training


class Stop:
    """Remembers, while it is entered, that a signal came which ends jobs; a second Ctrl-C ends the
    process at once.

    A second SIGTERM does not: launchers send it both to torchrun and, through that, to its
    processes. SLURM can announce a job's end by SIGUSR1, which torchrun does not pass on.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

    def __enter__(self):
        self.signal = None
        self.before = {number: signal.getsignal(number) for number in self.SIGNALS}
        for number, handler in self.before.items():
            if handler is not signal.SIG_IGN:  # as nohup ignores SIGHUP
                signal.signal(number, self)
        return self

    def __call__(self, number, frame):
        self.signal = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def mean_over_processes(values, device):
    """The numbers, each the mean over all processes: one exchange, one wait for the device."""
    values = [torch.as_tensor(v, dtype=torch.float32, device=device).detach() for v in values]
    values = torch.stack(values)
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values.tolist()


def train_step(model, state, images, labels, stop):
    """One step of the optimizer. Returns (each loss, the mean over the processes; whether any
    process was told to stop).

    --accumulate N: this process's share is computed in N parts. A part's losses are weighted by its
    labelled pixels, of all processes, over the step's. So the gradient of a cross entropy over
    labelled pixels is that of the whole batch. What looks at a batch as a whole sees a part: hard
    examples, relabelled and unity cells, CAR's class centres, and batch norm, whose running
    statistics move N times.
    """
    s, device, parts = state.settings, state.device, state.settings["accumulate"]
    images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
    labels = labels.to(device, non_blocking=True).long()
    torch.manual_seed(data.seed_of(data.DROPOUT, s["seed"], state.step, state.rank))
    state.optimizer.zero_grad(set_to_none=True)
    model.train()
    pairs = list(zip(images.chunk(parts), labels.chunk(parts)))
    weights = shares([part for _, part in pairs])
    terms = []  # of each part
    for i, ((image, label), weight) in enumerate(zip(pairs, weights)):
        # The gradients of all processes are exchanged once, after the last part.
        wait = i < parts - 1 and hasattr(model, "no_sync")
        with model.no_sync() if wait else contextlib.nullcontext():
            with evaluate.autocast(device, s["amp"]):
                losses = model(data.normalise(image), label)
            terms.append({name: weight * loss for name, loss in losses.items()})
            state.scaler.scale(sum(terms[-1].values())).backward()
    flat = [loss for part in terms for loss in part.values()]
    told = (labels != data.IGNORE).any(), stop.signal or 0
    *values, labelled, stopped = mean_over_processes([*flat, *told], device)
    names = list(terms[0])
    losses = {name: sum(values[i :: len(names)]) for i, name in enumerate(names)}
    if not all(map(math.isfinite, values)):
        listed = ", ".join(f"{name} {value:g}" for name, value in losses.items())
        text = f"the loss is not finite after step {state.step} ({listed}); {state.kept()}"
        raise UserError(f"{text}; try a lower --lr, larger crops or batches, or --amp off")
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.schedule.step()
    state.step += 1
    state.labelled |= labelled > 0
    return losses, stopped > 0


def shares(labels):
    """The labelled pixels of each part over those of all parts, of all processes; `[parts]`."""
    if len(labels) == 1:
        return [1.0]
    counts = torch.stack([(part != data.IGNORE).sum() for part in labels]).float()
    if dist.is_initialized():
        dist.all_reduce(counts)
    return counts / counts.sum().clamp(min=1)


def loop(model, state, batches, train_set, val_set, stop, bar):
    """The steps that are left, with evaluations, log and checkpoints. Returns whether a signal
    ended them.
    """
    s, stopped, sums, since = state.settings, False, {}, time.perf_counter()
    while True:
        last = state.step == s["iterations"]
        due = last or (state.step > 0 and state.step % s["eval_every"] == 0)
        if due and state.evaluated < state.step and not stopped:
            stopped = validate(state, train_set, val_set, stop)
            since = time.perf_counter()
        due = stopped or last or (state.step > 0 and state.step % s["save_every"] == 0)
        if state.rank == 0 and due:
            state.save("last.pt", train_set)
        if stopped or last:
            # no process leaves before the checkpoint is written
            mean_over_processes([0.0], state.device)
            return stopped

        lr = state.schedule.get_last_lr()[0]
        losses, stopped = train_step(model, state, *next(batches), stop)
        bar.update()
        for name, value in losses.items():
            sums.setdefault(name, []).append(value)
        if state.step % LOG_EVERY == 0 or state.step == s["iterations"]:
            if not state.labelled:
                text = f"no pixel of the first {state.step} steps has a label"
                raise UserError(f"{text}; `python data.py` shows the ids of the labels")
            means = {name: sum(line) / len(line) for name, line in sums.items()}
            steps = len(next(iter(sums.values())))
            speed = s["batch_size"] * steps / (time.perf_counter() - since)
            sums, since, loss = {}, time.perf_counter(), sum(means.values())
            text = f"loss {loss:.4f} lr {lr:.2e} {speed:.1f} img/s"
            bar.set_postfix_str(text)
            if state.rank == 0:
                line = dict(step=state.step, lr=lr, loss=loss) | means
                append_log(state.folder, **line, images_per_second=round(speed, 2))
                if bar.disable:  # no terminal: a plain line instead of the bar
                    left = (s["iterations"] - state.step) * s["batch_size"] / speed / 60
                    text = f"step {state.step}/{s['iterations']} {text}, {left:.1f} min left"
                    print(text, flush=True)


def validate(state, train_set, val_set, stop):
    """Evaluate, log, draw, keep the best. Returns whether any process was told to stop: then
    nothing is recorded.
    """
    s, net, device, folder = state.settings, state.net, state.device, state.folder
    net.eval()
    if dist.is_initialized():
        # batch norm's statistics, each process's own on the CPU: all evaluate one network
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)
    stopped = lambda: stop.signal is not None  # noqa: E731
    result = evaluate.evaluate(net, val_set, device, s["amp"], s["workers"], stopped=stopped)
    if mean_over_processes([stop.signal or 0], device)[0] > 0:
        return True
    labelled = result.pop("labelled")
    if state.rank == 0 and state.evaluated == 0:
        evaluate.warn_of_absent(labelled, val_set, f"{s['dataset']} val")
    state.evaluated = state.step
    better = result["mIoU"] > state.best  # never where nothing is labelled: mIoU is NaN
    if better:
        state.best = result["mIoU"]
    if state.rank == 0:
        append_log(folder, step=state.step, **result)
        draw_curves(folder)
        state.shown = state.shown or data.pick_images(val_set, 4)
        draw_samples(folder, net, val_set, device, s["amp"], state.shown)
        numbers = f"mIoU {result['mIoU']:.4f}, pixel accuracy {result['pixel_accuracy']:.4f}"
        tqdm.write(f"step {state.step}: {numbers}")
        if better:
            if not (folder / "last.pt").exists():  # a best.pt alone could not be resumed
                state.save("last.pt", train_set)
            state.save("best.pt", train_set)
    return False


# --------------------------------------------------------------------------------------------- main


def run(given, output, resume):
    """One run, from its first step or its last checkpoint to its end. Returns the exit status."""
    # Settings are read before the processes meet: none may see what another one made.
    starts = {"method", "dataset"} <= set(given)
    if resume and not (output and starts and not (Path(output) / "last.pt").exists()):
        s, origin, checkpoint = resumed(output, given)
    else:
        (s, origin), checkpoint = resolve(given), None
    if s["deterministic"]:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not s["deterministic"]
    device, rank, world = evaluate.processes(s["device"])
    if s["batch_size"] % (world * s["accumulate"]):
        text = f"a batch of {s['batch_size']} cannot be shared by {world} processes with"
        raise UserError(
            f"{text} --accumulate {s['accumulate']}; make it a multiple of their product"
        )

    augmentation = {name: s[name] for name in AUGMENTATION}
    train_set = data.dataset(s["dataset"], s["data_root"], "train", train=True, **augmentation)
    val_set = data.dataset(s["dataset"], s["data_root"], "val")
    if checkpoint and checkpoint["classes"] != train_set.classes:
        text = f"'{s['data_root']}' has other classes than this run (names, number or order)"
        raise UserError(f"{text}; give the --data-root that it was started with")

    net, note = make_net(s, train_set.classes, checkpoint is not None, device, world)
    model = with_losses(net, s, train_set.num_classes, rank) if s["car"] else net
    folder, lock = claimed(output, s, checkpoint is not None, rank)
    state = State(net, s, folder, device, rank)
    if checkpoint:
        state.load(checkpoint)
        del checkpoint
    counts = s["batch_size"], state.step, s["iterations"]
    sampler = data.PositionSampler(len(train_set), *counts, s["seed"], rank, world)
    loader = DataLoader(train_set, batch_sampler=sampler, num_workers=s["workers"],
                        collate_fn=data.collate, pin_memory=device.type == "cuda",
                        worker_init_fn=data.own_session)  # fmt: skip
    if rank == 0:
        write_config(folder, s, origin, device, world)
        parameters = sum(p.numel() for p in net.parameters()) / 1e6
        images = f"{len(train_set)} training images, {world} x {device.type}"
        print(f"{parameters:.2f} M parameters, {images}, {folder}")
        if note:
            print(note)
        if state.step:
            rewind_log(folder, state.step, state.evaluated)
            print(f"goes on after step {state.step} of {s['iterations']}")
        else:
            (folder / "log.jsonl").unlink(missing_ok=True)
            if resume:
                print("there is nothing to resume yet: the run starts")
    if world > 1:
        # Some weights never learn, as the norms of finer maps that nothing reads.
        ids = [device] if device.type == "cuda" else None
        wrapper = nn.parallel.DistributedDataParallel
        model = wrapper(model, device_ids=ids, find_unused_parameters=True)
    if s["compile"]:
        model = torch.compile(model)
    kwargs = dict(total=s["iterations"], initial=state.step, desc="training", unit="step")
    with Stop() as stop, tqdm(**kwargs, disable=rank > 0 or None) as bar:
        stopped = loop(model, state, iter(loader), train_set, val_set, stop, bar)
    if rank == 0 and stopped:
        again = f"python train.py --output {shlex.quote(str(folder))} --resume"
        print(f"stopped after step {state.step}, checkpoint saved; go on with: {again}")
    elif rank == 0:
        results = [line for line in read_log(folder) if "mIoU" in line]
        print(evaluate.table(results[-1], val_set.classes) if results else "log.jsonl is gone")
        best = f"best mIoU {state.best:.4f}" if state.best >= 0 else "no label in val, no best.pt"
        files = ("samples.png", "curves.png", "log.jsonl", "last.pt", "best.pt")
        sizes = {name: folder / name for name in files if (folder / name).is_file()}
        sizes = [f"{name} ({path.stat().st_size / 1e6:.1f} MB)" for name, path in sizes.items()]
        print(f"{best}; in {folder}: {', '.join(sizes)}")
        which, file = "best.pt" if state.best >= 0 else "last.pt", f"{s['method']}.py"
        print(f"Look at {folder}/samples.png: image, truth and prediction of four images.")
        command = f"python evaluate.py --checkpoint {shlex.quote(str(folder / which))}"
        print(f"Look inside the network: {command} --figures figures")
        tests = Path(__file__).with_name("tests") / f"test_{file}"
        also = f"; the equations' tests: tests/{tests.name}" if tests.exists() else ""
        print(f"Read {file} beside its paper{also}")
    if lock:
        lock.close()
    return 128 + (stop.signal or signal.SIGTERM) if stopped else 0


def main(argv=None):
    """Exit status 0; 2 after a user's error, explained in a line; 128 + N after signal N."""
    return data.guarded("train.py", lambda: run(*arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
