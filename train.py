"""Train any method of this repository: plain PyTorch, one process or many, mixed precision on CUDA.

    python train.py                                    # CAA on synthetic images, in minutes
    python train.py --method caa --dataset camvid --data-root DIR    # any dataset, see data.py
    torchrun --nproc-per-node 8 train.py --method caa --dataset pascal_context    # as the paper did

Read `run` first: settings, data, network, optimizer, resuming. Then `loop` and `train_step`.

log.jsonl has a line for each logged step (`step`, `lr`, `loss`, its terms, `images_per_second`) and
each evaluation (`step`, `mIoU`, `pixel_accuracy`, `class_accuracy`, `IoU`).

The same seed gives the same run: augmentation depends on (seed, position in the run), dropout on
(seed, step, process). So workers and interruptions change nothing, on the CPU bit for bit. Several
processes equal one up to dropout and batch norm, which is synchronized on CUDA alone.
"""

import argparse
import contextlib
import importlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.optim.lr_scheduler import PolynomialLR, StepLR
from torch.utils.data import DataLoader
from tqdm import tqdm

import backbones
import data
import evaluate
from data import UserError
from evaluate import OPTION, SIDES, flag, number, whole

try:
    import fcntl
except ImportError:
    fcntl = None  # Windows

CAR = dict(nargs="?", const="default", choices=("default", "paper", "released"))
RANGE = dict(nargs=2, type=number(1e-3, 1e3), metavar=("LOW", "HIGH"))
# name: (default, how its flag is read, what it is). They hold where nothing else says more.
SETTINGS = {
    # what
    "method": ("caa", str, "file METHOD.py"),
    "dataset": ("shapes", str, "name in data.py: shapes, shapes+company, camvid, folder, …"),
    "train_split": ("train", dict(choices=("train", "trainval")), "trainval: train and val too"),
    "data_root": (None, str, "folder of the dataset [datasets/NAME, or that of the same files]"),
    "backbone": ("resnet18", str, "feature extractor: " + ", ".join(backbones.NAMES)),
    "weights": (None, str, "weights of the backbone: none, imagenet, or the path of a state dict"),
    "output_stride": (None, int, "stride of the backbone, 32, 16, 8; hfgd: of the logits, 4, 2, 1"),
    "option": ({}, OPTION, "option of the method's build, may be repeated"),
    "car": (None, CAR, "add car.py's losses; paper: (4.11) as printed; released: the authors'"),
    "init": (None, str, "checkpoint whose weights the run starts from"),
    # how long, how fast
    "iterations": (140, whole(1), "optimizer steps"),
    "batch_size": (8, whole(1, 65_536), "images in a step, of all processes together"),
    "accumulate": (1, whole(1), "parts in which a step is computed, for a GPU with little memory"),
    "optimizer": ("sgd", dict(choices=("sgd", "adam", "adamw")), "rule of the step"),
    "lr": (0.02, number(0), "learning rate at the start"),
    "head_lr": (1.0, number(0), "multiple of the learning rate for all but the backbone"),
    "power": (0.9, number(0), "exponent of the polynomial decay lr · (1 - step/iterations)^power"),
    "halve_every": (0, whole(0), "steps between halvings of the rate, in place of the decay"),
    "momentum": (0.9, number(0, 1), "SGD momentum"),
    "weight_decay": (1e-4, number(0), "weight decay, L2 (decoupled with adamw)"),
    "decay_norms": (True, dict(action=argparse.BooleanOptionalAction), "decay norms and biases"),
    "bn_momentum": (0.1, number(0, 1), "share of the new batch in batch norm's running statistics"),
    # augmentation
    "crop_size": (96, SIDES, "training crop: its side, or height and width"),
    "scale": ((0.75, 1.5), RANGE, "range of the random scale"),
    "scale_step": (0.0, number(0, 1e3), "step between the random scales, 0: any scale"),
    "base_size": (None, whole(1), "longer side of an image at scale 1, in pixels [its own]"),
    "color": ("none", str, "color jitter: none, brightness or photometric"),
    # the machine, and what is kept
    "seed": (0, whole(0, 2**63 - 1), "seed of everything random"),
    "deterministic": (False, dict(action="store_true"), "use only deterministic kernels"),
    "workers": (2, whole(0, 512), "loader processes for each training process"),
    "amp": ("auto", dict(choices=evaluate.AMP), "mixed precision; auto: on CUDA"),
    "compile": (False, dict(action="store_true"), "use torch.compile"),
    "device": (None, str, "cpu, cuda, cuda:1, mps [a CUDA GPU if there is one, else cpu]"),
    "eval_every": (None, whole(1), "steps between evaluations [a tenth of the run, at least 100]"),
    "save_every": (None, whole(1), "steps between checkpoints [as eval_every]"),
}
DEFAULTS = {name: default for name, (default, *_) in SETTINGS.items()}
# Ours: with them and its recipe each method finds things within minutes, from random weights.
SHAPES = dict(optimizer="adamw", lr=5e-4, head_lr=4.0, iterations=340, batch_size=4,
              scale=(1.0, 1.0))  # fmt: skip
AUGMENTATION = ("seed", "crop_size", "scale", "scale_step", "base_size", "color")
# What may differ when a run goes on: it changes no result, or rounding alone
FREE = {"workers", "device", "eval_every", "save_every", "data_root", "compile"}
FILES = ("config.json", "log.jsonl", "last.pt", "best.pt", "curves.png", "samples.png")
LOG_EVERY = 10  # steps
BEFORE = "if there is a last.pt, it holds an earlier step"


# ----------------------------------------------------------------------------------------- settings
def arguments(argv=None):
    """(flags that were given, output folder or None, resume)"""
    parser = evaluate.Parser(description="Train a segmentation method; see train.py's top.")
    for name, (default, form, what) in SETTINGS.items():
        shown = "" if default in (None, {}, False) else f" [{default}]"
        parser.add_flag(name, form, what + shown, default=argparse.SUPPRESS)
    parser.add_flag("output", str, "folder of the run [runs/METHOD-DATASET, numbered if taken]")
    what = "go on with the run in --output; with --method and --dataset: or start it there"
    parser.add_flag("resume", dict(action="store_true"), what)
    given = vars(parser.parse_args(argv))
    output, resume = given.pop("output"), given.pop("resume")
    if resume and output is None:
        raise UserError("--resume needs the run's folder: --output runs/NAME")
    if "option" in given:
        given["option"] = evaluate.parse_options(given["option"])
    if "crop_size" in given:
        height, width = evaluate.two_sides(given["crop_size"])
        given["crop_size"] = height if height == width else [height, width]
    if given.get("weights") == "none":
        given["weights"] = None
    return given, output, resume


def resolve(given):
    """(settings, where each came from): defaults, those of shapes, the method's recipe, flags."""
    settings, origin = dict(DEFAULTS), dict.fromkeys(DEFAULTS, "default")
    method = evaluate.method_file(given.get("method", settings["method"]))
    dataset = given.get("dataset", settings["dataset"])
    recipes = getattr(method, "RECIPES", {})
    if dataset not in recipes:
        dataset = dataset.split("+")[0]  # the recipe of shapes holds with its switches too
    recipe = recipes.get(dataset, {})
    if unknown := ", ".join(sorted(set(recipe) - set(SETTINGS))):
        raise UserError(f"{method.__name__}.py: unknown settings in a recipe: {unknown}")
    shapes = SHAPES if dataset.split("+")[0] == "shapes" else {}
    ours = f"recipe {method.__name__}/{dataset}"
    for source, values in ("shapes", shapes), (ours, recipe), ("command line", given):
        for name, value in values.items():
            settings[name] = settings[name] | value if name == "option" else value
            origin[name] = source
    check_effect(given, settings)
    usual = (DEFAULTS | shapes | recipe)["optimizer"]
    if settings["optimizer"] != usual and "lr" not in given:
        text = f"--optimizer {settings['optimizer']}: give --lr too"
        raise UserError(f"{text}; {settings['lr']:g} is for {usual} ('{origin['lr']}')")
    low, high = settings["scale"]
    if low > high or 0 < settings["scale_step"] < 1e-3:
        text = "expected two factors, the smaller one first, and a step of 0 or at least 0.001"
        raise UserError(f"--scale {low} {high} --scale-step {settings['scale_step']}: {text}")
    settings["data_root"] = settings["data_root"] or str(data.default_root(settings["dataset"]))
    for name in ("eval_every", "save_every"):
        settings[name] = settings[name] or max(100, math.ceil(settings["iterations"] / 10))
    return settings, origin


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
            raise UserError(f"{flag(name)} has no effect here: {reason}; leave it out")


def resumed(last, given):
    """(settings, where each came from) of the run whose checkpoint is `last`."""
    if not last.exists():
        advice = "give --method and --dataset to start a run there"
        if last.with_name("best.pt").exists():
            advice = f"start a new run with --init {last.with_name('best.pt')}"
        raise UserError(f"nothing to resume: '{last}' is not there; {advice}")
    checkpoint = evaluate.read_checkpoint(last)
    # What a later version added has its default; what it dropped is left out.
    settings = DEFAULTS | {k: v for k, v in checkpoint["settings"].items() if k in DEFAULTS}
    origin = dict.fromkeys(DEFAULTS, "default") | checkpoint.get("origin", {})
    check_record(last.with_name("config.json"), settings)
    check_effect(given, settings)
    for name, value in given.items():
        if name == "option":  # those of the recipe need not be repeated
            value = settings[name] | value
        if json.dumps(value) == json.dumps(settings[name]):  # a list equals a tuple
            continue
        if name not in FREE:
            text = f"{flag(name)} {value} differs from this run's {settings[name]}; leave it out"
            new = f"--method {settings['method']} --dataset {settings['dataset']} --init {last}"
            new += f" {flag(name)} …, and what else that run was given"
            raise UserError(f"{text}, or start a new run with its weights: python train.py {new}")
        settings[name], origin[name] = value, "command line"
    return settings, origin


def check_record(path, settings):
    """UserError where config.json, which is for people, says something else than the checkpoint."""
    try:
        record = json.loads(path.read_text())["settings"] if path.exists() else {}
        values = {name: record[name]["value"] for name in record.keys() & settings.keys() - FREE}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"'{path}' is damaged; remove it: the run has its settings") from None
    for name, value in values.items():
        if json.dumps(value) != json.dumps(settings[name]):
            raise UserError(f"'{path}' says {name} {value}, the run has {settings[name]}; undo it")


# ------------------------------------------------------------------------------------ the whole run
def run(given, output, resume):
    """One run, from its first step or its last checkpoint to its end. Returns the exit status."""
    last, can_start = Path(output or "", "last.pt"), {"method", "dataset"} <= set(given)
    resumes = resume and (last.exists() or not can_start)
    s, origin = resumed(last, given) if resumes else resolve(given)
    if s["deterministic"]:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not s["deterministic"]
    device, rank, world = evaluate.processes(s["device"])
    if of_first(resumes) != resumes:
        raise UserError(f"not all processes see '{last}'; take a folder that all machines share")
    if s["batch_size"] % (world * s["accumulate"]):
        text = f"{world} processes with --accumulate {s['accumulate']}"
        raise UserError(f"--batch-size {s['batch_size']}: make it a multiple of the {text}")

    augmentation = {name: s[name] for name in AUGMENTATION}
    name, root = s["dataset"], s["data_root"]
    train_set = data.dataset(name, root, s["train_split"], train=True, **augmentation)
    val_set = data.dataset(name, root, "val")
    net, note = make_net(s, train_set.classes, resumes, device, world)
    model = with_losses(net, s, train_set.num_classes, rank) if s["car"] else net

    state = State(net, s, origin, device, rank)
    state.folder, state.lock = lock_folder(output, s, resumes, rank)
    if resumes:
        state.load(last, train_set.classes)
    counts = s["batch_size"], state.step, s["iterations"]
    sampler = data.PositionSampler(len(train_set), *counts, s["seed"], rank, world)
    loader = DataLoader(train_set, batch_sampler=sampler, num_workers=s["workers"],
                        collate_fn=data.collate, pin_memory=device.type == "cuda",
                        worker_init_fn=data.own_session)  # fmt: skip
    batches = iter(loader)  # the loader processes start before signals are remembered
    if rank == 0:
        print_start(state, train_set, world, note, resume)

    if world > 1:
        ids = [device] if device.type == "cuda" else None
        model = nn.parallel.DistributedDataParallel(model, device_ids=ids)
    if s["compile"]:
        model = torch.compile(model)
    kwargs = dict(total=s["iterations"], initial=state.step, desc="training", unit="step")
    with Stop() as stop, tqdm(**kwargs, disable=rank > 0 or None) as bar:
        stopped = loop(model, state, batches, train_set, val_set, stop, bar)
    if rank == 0:
        print_end(state, val_set, stopped)
    return 128 + (stop.signal or signal.SIGTERM) if stopped else 0


def make_net(s, classes, resumes, device, world):
    """(the network on its device, words about the weights of --init)"""
    torch.manual_seed(s["seed"])
    weights = None if resumes or s["init"] else s["weights"]
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not first:
        any_process(False)  # wait: the first process of each machine downloads the weights
    parts = s["backbone"], weights, s["output_stride"], s["option"]
    net = evaluate.network(s["method"], len(classes), *parts)
    if first:
        any_process(False)
    note = initialise(net, s["init"], classes) if s["init"] and not resumes else ""
    if world > 1 and device.type == "cuda":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = s["bn_momentum"]
    # the faster layout for convolutions, on CPU and CUDA alike
    return net.to(device, memory_format=torch.channels_last), note


def initialise(net, path, classes):
    """--init: every tensor of the checkpoint that fits. Returns words about what does."""
    checkpoint, own = evaluate.read_checkpoint(path), net.state_dict()
    saved = checkpoint["net"].items()
    fitting = {k: v for k, v in saved if k in own and own[k].shape == v.shape}
    if not fitting:
        raise UserError(f"nothing in '{path}' fits; expected the same method and backbone")
    net.load_state_dict(fitting, strict=False)
    new = "" if len(fitting) == len(own) else ", the others are new"
    other = "" if checkpoint["classes"] == classes else "; its classes have other names or order"
    return f"; {len(fitting)} of {len(own)} tensors from {path}{new}{other}"


def with_losses(net, s, num_classes, rank):
    """--car: the terms of car.py join in training; what is saved and evaluated is `net`."""
    form = {"paper": {"literal": True}, "released": {"released": True}}.get(s["car"], {})
    layers = ["classifier"]
    if getattr(net, "classifier", None) is None:
        convolutions = [(k, m) for k, m in net.named_modules() if isinstance(m, nn.Conv2d)]
        layers = [name for name, conv in convolutions if conv.out_channels == num_classes]
    if len(layers) != 1:
        found = f"{num_classes} channels come from {', '.join(layers) or 'no convolution'}"
        text = f"{s['method']} has no .classifier, the convolution that gives the logits; {found}"
        raise UserError(f"--car: {text}; name one of its own: self.classifier = …")
    try:
        model = evaluate.method_file("car").regularize(net, layers[0], num_classes, **form)
    except ValueError as error:
        raise UserError(f"--car: {error}") from error
    if rank == 0 and not hasattr(net, "regularized"):
        print(f"--car acts on what enters .{layers[0]}, because the network names no .regularized")
    return model


def make_optimizer(net, s):
    """SGD, Adam or AdamW, with groups of parameters for head_lr and decay_norms."""
    body, head = [], list(net.parameters())
    if s["head_lr"] != 1:
        if not hasattr(net, "backbone"):
            raise UserError(f"--head-lr: {s['method']} has no part named backbone; leave it out")
        body = list(net.backbone.parameters())
        inside = set(body)
        head = [p for p in head if p not in inside]
    groups = []
    for parameters, lr in (body, s["lr"]), (head, s["head_lr"] * s["lr"]):
        decayed = [p for p in parameters if p.ndim > 1 or s["decay_norms"]]
        rest = [p for p in parameters if p.ndim <= 1 and not s["decay_norms"]]
        groups += [dict(params=decayed, lr=lr), dict(params=rest, lr=lr, weight_decay=0.0)]
    groups = [group for group in groups if group["params"]]
    kind = dict(sgd=torch.optim.SGD, adam=torch.optim.Adam, adamw=torch.optim.AdamW)[s["optimizer"]]
    momentum = dict(momentum=s["momentum"]) if s["optimizer"] == "sgd" else {}
    return kind(groups, s["lr"], weight_decay=s["weight_decay"], **momentum)


class State:
    """What the next step depends on, but random numbers, which follow from (seed, step)."""

    COUNTS = ("step", "evaluated", "best", "labelled", "window", "seconds", "skipped", "in_a_row")

    def __init__(self, net, s, origin, device, rank):
        self.net, self.settings, self.origin = net, s, origin
        self.folder, self.device, self.rank = None, device, rank
        if origin.get("head_lr") == "shapes" and not hasattr(net, "backbone"):
            s["head_lr"], origin["head_lr"] = 1.0, "no backbone"
        self.optimizer = make_optimizer(net, s)
        if s["halve_every"]:
            self.schedule = StepLR(self.optimizer, s["halve_every"], 0.5)
        else:
            self.schedule = PolynomialLR(self.optimizer, s["iterations"], s["power"])
        fp16 = evaluate.amp_dtype(s["amp"], device) is torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)
        self.step, self.evaluated, self.best = 0, 0, -1.0
        self.labelled = False  # whether a pixel was, until now
        self.recent = []  # losses of steps, on the device, that no process has looked at
        self.window, self.seconds = [], 0.0  # of the steps since the last line of the log
        self.skipped, self.in_a_row = 0, 0  # steps that overflowed float16: since then; up to now
        self.recorded = False  # whether config.json is written

    def load(self, path, classes):
        """The state in last.pt. Nobody writes it now: the first process holds the lock."""
        checkpoint = evaluate.read_checkpoint(path)
        if of_first(checkpoint["step"]) != checkpoint["step"]:
            raise UserError(f"'{path}' is older here; take a folder that all machines share")
        if checkpoint["classes"] != classes:
            raise UserError("the dataset has other classes than this run; give its own --data-root")
        evaluate.restore(self.net, checkpoint)
        try:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.schedule.load_state_dict(checkpoint["schedule"])
            if checkpoint["scaler"]:  # empty where the run had no fp16 until now
                self.scaler.load_state_dict(checkpoint["scaler"])
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(f"'{path}' lacks the optimizer's state; take it as --init") from None
        for name in self.COUNTS:
            setattr(self, name, checkpoint.get(name, getattr(self, name)))
        if not of_first((self.folder / "best.pt").exists()):
            self.best = -1.0  # lost: the next evaluation is the best
        if self.rank == 0:
            rewind_log(self.folder, self.step, self.evaluated)

    def save(self, name, dataset):
        """Write the checkpoint; best.pt is for evaluation and --init, last.pt for --resume too."""
        parts = ("net",) if name == "best.pt" else ("net", "optimizer", "schedule", "scaler")
        state = {part: getattr(self, part).state_dict() for part in parts}
        broken = [key for key, value in state["net"].items() if not value.isfinite().all()]
        if broken:
            raise UserError(f"step {self.step}: {broken[0]} is not finite; {BEFORE}; lower --lr")
        state |= {name: getattr(self, name) for name in ("settings", "origin", *self.COUNTS)}
        state |= dict(classes=dataset.classes, palette=[list(color) for color in dataset.palette])
        state |= dict(raw_ids=getattr(dataset, "raw_ids", None))
        evaluate.replace(self.folder / name, lambda temporary: torch.save(state, temporary))
        if not self.recorded:
            write_config(self)
            self.recorded = True


# ----------------------------------------------------------------------------------------- training
def loop(model, state, batches, train_set, val_set, stop, bar):
    """The steps that are left. Returns whether a signal ended them."""
    s, stopped = state.settings, False
    every = LOG_EVERY, s["eval_every"], s["save_every"]
    while True:
        step, last = state.step, state.step == s["iterations"]
        evaluates = last or (step > 0 and step % s["eval_every"] == 0)
        saves = last or step == 1 or (step > 0 and step % s["save_every"] == 0)
        if evaluates and state.evaluated < step and not stopped:
            stopped = validate(state, train_set, val_set, stop)
        if (saves or stopped) and state.rank == 0:
            state.save("last.pt", train_set)
        if stopped or last:
            any_process(False)  # no process leaves before the checkpoint is written
            return stopped

        start, lr = time.perf_counter(), state.schedule.get_last_lr()[0]
        train_step(model, state, *next(batches))
        bar.update()
        stopped, last = any_process(stop.signal), state.step == s["iterations"]
        # before each line of the log, evaluation and checkpoint
        if stopped or last or state.step == 1 or any(state.step % n == 0 for n in every):
            look_at_losses(state)
        state.seconds += time.perf_counter() - start
        if last or state.step % LOG_EVERY == 0:
            log_losses(state, lr, bar)


def train_step(model, state, images, labels):
    """One step of the optimizer; its losses join state.recent. Only float16 waits for the device.

    --accumulate N: this process's share is computed in N parts. A part's losses are weighted by its
    labelled pixels over the step's. So the gradient of a cross entropy over labelled pixels is that
    of the whole batch. What looks at a batch as a whole sees a part: hard examples, relabelled and
    unity cells, CAR's class centres, and batch norm, whose running statistics move N times.
    """
    s, device, parts = state.settings, state.device, state.settings["accumulate"]
    state.labelled = state.labelled or bool((labels != data.IGNORE).any())
    images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
    labels = labels.to(device, non_blocking=True).long()
    torch.manual_seed(data.seed_of(data.DROPOUT, s["seed"], state.step, state.rank))
    state.optimizer.zero_grad(set_to_none=True)
    model.train()
    pairs = list(zip(images.chunk(parts), labels.chunk(parts)))
    weights, total = shares([part for _, part in pairs]), {}
    for i, ((image, label), weight) in enumerate(zip(pairs, weights)):
        # The gradients of all processes are exchanged once, after the last part.
        wait = i < parts - 1 and hasattr(model, "no_sync")
        with model.no_sync() if wait else contextlib.nullcontext():
            with evaluate.autocast(device, s["amp"]):
                losses = model(data.normalise(image), label)
            losses = {name: weight * loss for name, loss in losses.items()}
            state.scaler.scale(sum(losses.values())).backward()
        for name, loss in losses.items():
            total[name] = total.get(name, 0) + loss.detach()
    scale = state.scaler.get_scale()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    if state.scaler.get_scale() >= scale:
        state.in_a_row = 0
        state.schedule.step()
    else:  # the step overflowed float16 and was skipped, as the first ones often are
        state.skipped, state.in_a_row = state.skipped + 1, state.in_a_row + 1
    if state.in_a_row == 50 or scale < 1e-30:
        raise UserError(f"float16 overflowed in {state.in_a_row} steps in a row; try --amp off")
    state.step += 1
    state.recent.append(total)


def shares(labels):
    """The labelled pixels of each part over those of all parts, of all processes; `[parts]`."""
    if len(labels) == 1:
        return [1.0]
    counts = torch.stack([(part != data.IGNORE).sum() for part in labels]).float()
    if dist.is_initialized():
        dist.all_reduce(counts)
    return counts / counts.sum().clamp(min=1)


def look_at_losses(state):
    """Wait for the device, exchange the recent losses; UserError where one is not finite."""
    names = list(dict.fromkeys(name for losses in state.recent for name in losses))
    zero = torch.zeros((), device=state.device)  # for a loss that a step does not have
    rows = [[losses.get(name, zero) for name in names] for losses in state.recent]
    values = torch.stack([torch.stack(row) for row in rows]).float()
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    first, state.recent = state.step - len(values), []
    for step, row in enumerate(values.tolist(), first):
        if not all(map(math.isfinite, row)):
            terms = ", ".join(f"{name} {value:g}" for name, value in zip(names, row))
            text = f"the loss is not finite after step {step} ({terms}); {BEFORE}"
            raise UserError(f"{text}; try larger crops or batches, a lower --lr, or --amp off")
        state.window.append(dict(zip(names, row)))


def log_losses(state, lr, bar):
    """A line of log.jsonl and of the screen: the means of the losses since the last line."""
    s, window = state.settings, state.window
    state.labelled = any_process(state.labelled)
    if not state.labelled:
        raise UserError(f"no pixel of {state.step} steps has a label; see `python data.py`")
    names = dict.fromkeys(name for losses in window for name in losses)
    means = {name: sum(losses.get(name, 0) for losses in window) / len(window) for name in names}
    loss, speed = sum(means.values()), s["batch_size"] * len(window) / state.seconds
    state.window, state.seconds = [], 0.0
    line = dict(step=state.step, lr=lr, loss=loss) | means
    if state.scaler.is_enabled():
        line["skipped_steps"], state.skipped = state.skipped, 0
    if state.rank > 0:
        return
    append_log(state.folder, **line, images_per_second=round(speed, 2))
    text = f"loss {loss:.4f} lr {lr:.2e} {speed:.1f} img/s"
    bar.set_postfix_str(text)
    if bar.disable:  # no terminal
        left = (s["iterations"] - state.step) * s["batch_size"] / speed / 60
        print(f"step {state.step}/{s['iterations']} {text}, {left:.1f} min left", flush=True)


def validate(state, train_set, val_set, stop):
    """Evaluate, log, draw, keep the best. True if a signal came: then nothing is recorded."""
    s, net, device, folder = state.settings, state.net, state.device, state.folder
    net.eval()
    if dist.is_initialized():
        for buffer in net.buffers():  # batch norm's statistics are each process's own on the CPU
            dist.broadcast(buffer, 0)
    torch.backends.cudnn.benchmark = False  # it would tune for each size of image
    result = evaluate.evaluate(net, val_set, device, s["amp"], s["workers"], stop=stop)
    if any_process(stop.signal):
        return True
    labelled = result.pop("labelled")
    first, state.evaluated = state.evaluated == 0, state.step
    better = result["mIoU"] > state.best  # never where nothing is labelled: mIoU is NaN
    if better:
        state.best = result["mIoU"]
    if state.rank == 0:
        if first:
            evaluate.warn_of_absent(labelled, val_set, f"{s['dataset']} val")
        append_log(folder, step=state.step, **result)
        if better:
            state.save("best.pt", train_set)
        draw_curves(folder)
        text = f"step {state.step}: mIoU {result['mIoU']:.4f}"
        draw_samples(folder, net, val_set, device, s["amp"], text)
        tqdm.write(f"{text}, pixel accuracy {result['pixel_accuracy']:.4f}")
    torch.backends.cudnn.benchmark = not s["deterministic"]
    return False


# --------------------------------------------------------------------------- processes and signals
def any_process(value):
    """Whether `value` is true in any process. They wait for one another, on the CPU: for no GPU."""
    true = torch.tensor(float(bool(value)))
    if dist.is_initialized():
        dist.all_reduce(true)
    return true.item() > 0


def of_first(value):
    """The value that the first process has."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


class Stop:
    """Remembers, while it is entered, a signal that ends jobs. A second Ctrl-C ends the process."""

    def __enter__(self):
        self.signal, self.before = None, {}
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
            which = getattr(signal, name, None)  # Windows lacks the last two
            if which and signal.getsignal(which) is not signal.SIG_IGN:  # as nohup ignores SIGHUP
                self.before[which] = signal.signal(which, self)
        return self

    def __call__(self, which, frame):
        self.signal = which
        # A second SIGTERM changes nothing: torchrun passes on what each process got already.
        if signal.getsignal(signal.SIGINT) is self:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def __exit__(self, *_):
        for which, handler in self.before.items():
            signal.signal(which, handler)


# --------------------------------------------------------------------- a run's folder and its files
def lock_folder(output, settings, resumes, rank):
    """(the run's folder, its lock, held while it is open); the first process tells the others."""
    folder, lock, wrong = None, None, None
    if rank == 0:
        name = f"runs/{settings['method']}-{settings['dataset']}"
        numbered = [name, *(f"{name}-{n}" for n in range(2, 10_000))]
        try:
            for folder in map(Path, [output] if output else numbered):
                lock, wrong = take(folder, resumes)
                if not wrong:
                    break
        except OSError as error:
            wrong = f"cannot be the folder of a run ({error.strerror}); take another --output"
    folder, wrong = of_first((folder, wrong))
    if wrong:
        raise UserError(f"'{folder}' {wrong}")
    return folder, lock


def take(folder, resumes):
    """(the lock of a run's folder, what is wrong or None)"""
    lock, files = None, [folder / name for name in FILES if not resumes]
    # A folder that is somebody else's stays as it is.
    if (folder / ".lock").exists() or not any(map(Path.exists, files)):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
        try:
            # Loader processes, which outlive a killed run for a moment, do not inherit it.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return None, "belongs to a run that is training now; wait, or take another --output"
        except (OSError, AttributeError):  # a file system without locks; a system without fcntl
            data.warn(f"'{folder}' cannot be locked here: start no second run in it")
    found = [file.name for file in files if file.exists()]
    if found:
        advice = "--resume goes on where there is a last.pt; else move it away"
        return None, f"holds {found[0]} already; {advice}, or take another --output"
    return lock, None


def write_config(state):
    """config.json: the settings, where each came from, and the versions of what ran."""
    packages = ("torch", "torchvision", "numpy", "PIL")
    versions = {name: importlib.import_module(name).__version__ for name in packages}
    versions |= {"python": sys.version.split()[0], "cuda": torch.version.cuda}
    git, command = None, ["git", "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):  # no git on this machine
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        git = done.stdout.strip() or None
    settings = {k: {"value": v, "from": state.origin[k]} for k, v in state.settings.items()}
    config = dict(settings=settings, versions=versions, git=git)
    config["processes"] = dist.get_world_size() if dist.is_initialized() else 1
    config["device"] = evaluate.device_name(state.device)
    text = json.dumps(config, indent=1) + "\n"
    evaluate.replace(state.folder / "config.json", lambda path: path.write_text(text))


def print_start(state, train_set, world, note, resume):
    """The settings, what is not a default first; what trains, on what, in which folder."""
    s, origin = state.settings, state.origin
    chosen = [name for name in s if origin[name] != "default"]
    for name in sorted(chosen, key=lambda name: origin[name] != "command line"):
        print(f"  {name:<14} {s[name]!s:<40} {origin[name]}")
    rest = ", ".join(f"{name} {value}" for name, value in s.items() if name not in chosen)
    print(f"  defaults: {rest}")
    parameters = sum(p.numel() for p in state.net.parameters()) / 1e6
    images = f"{len(train_set)} training images, {world} x {state.device.type}"
    print(f"{parameters:.2f} M parameters, {images}, {state.folder}{note}")
    if s["train_split"] == "trainval":
        print("val is trained on too: the mIoU on it says nothing about new images")
    if state.step:
        print(f"goes on after step {state.step} of {s['iterations']}")
    elif resume:
        print("there is nothing to resume yet: the run starts")


def print_end(state, val_set, stopped):
    """The result, and one command to look further; of a run that was stopped: to go on."""
    folder = shlex.quote(str(state.folder))
    if stopped:
        again = f"python train.py --output {folder} --resume"
        print(f"stopped after step {state.step}, checkpoint saved; go on with: {again}")
        return
    results = [line for line in read_log(state.folder) if "mIoU" in line]
    if results:
        print(evaluate.table(results[-1:], val_set.classes))
    found, file = f"best mIoU {state.best:.4f}", "best.pt"
    if state.best < 0:
        found, file = "no best.pt: no label in val, or it is lost", "last.pt"
    print(f"{found}; {folder}/samples.png: image, truth and prediction of four images")
    print(f"Look inside: python evaluate.py --checkpoint {folder}/{file} --figures figures")


def append_log(folder, **line):
    """One more line of log.jsonl; what is not a number becomes null."""
    with open(folder / "log.jsonl", "a") as file:
        file.write(json.dumps(evaluate.without_nan(line)) + "\n")


def read_log(folder):
    """The lines of log.jsonl; one that was cut short by a kill is left out."""
    path, lines = folder / "log.jsonl", []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return [x for x in lines if isinstance(x, dict) and isinstance(x.get("step"), int)]


def rewind_log(folder, step, evaluated):
    """Drop what a run logged after its last checkpoint: it will be logged again."""
    text = ""
    for line in read_log(folder):
        last = evaluated if "mIoU" in line else step
        if line["step"] <= last:
            text += json.dumps(line) + "\n"
    evaluate.replace(folder / "log.jsonl", lambda path: path.write_text(text))


def draw_curves(folder):
    """curves.png: the loss and its terms, the learning rate, and the metrics, over the steps."""
    log = read_log(folder)
    losses, results = ([line for line in log if name in line] for name in ("loss", "mIoU"))
    others = ("step", "lr", "images_per_second", "skipped_steps")
    terms = [name for name in (losses or [{}])[0] if name not in others]
    metrics = ("mIoU", "pixel_accuracy", "class_accuracy")
    panels = ("loss", losses, terms), ("learning rate", losses, ["lr"]), ("val", results, metrics)
    picture = Image.new("RGB", (480 * len(panels), 340), "white")
    for i, (title, lines, names) in enumerate(panels):
        series = {k: [(x["step"], x[k]) for x in lines if type(x.get(k)) is float] for k in names}
        picture.paste(data.chart(title, series), (480 * i, 0))
    evaluate.replace(folder / "curves.png", lambda path: picture.save(path, format="png"))


def draw_samples(folder, net, dataset, device, amp, caption):
    """samples.png: image, truth and prediction of four images."""
    panels, maps, palette = [], [], dataset.palette
    for index in data.pick_images(dataset, 4):
        image, truth = dataset[index]
        prediction = evaluate.label_map(net, image, device, amp).cpu()
        maps += [truth, prediction]
        panels.append(data.Panel(f"image {dataset.name(index)}", image))
        panels.append(data.label_panel("truth", truth, palette))
        panels.append(data.label_panel("prediction", prediction, palette))
    picture = data.sheet(panels, 3, maps, dataset.classes, palette, caption)
    evaluate.replace(folder / "samples.png", lambda path: picture.save(path, format="png"))


def main(argv=None):
    """Exit status 0; 2 after a user's error, explained in a line; 128 + N after signal N."""
    return data.guarded("train.py", lambda: run(*arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
