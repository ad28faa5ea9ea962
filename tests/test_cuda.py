"""What only a CUDA GPU can show, skipped without one; and, on any machine, that no network makes a
tensor on the wrong device.

    python -m pytest tests/test_cuda.py -s      # prints the GPU's name and the peak memory
"""

import importlib
import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import data
import evaluate
import train

METHODS = "caa", "car", "ksac", "spgnet", "pyramid_fuse", "hfgd"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
CLASSES, SIZE = 5, (65, 97)


def network(method, **options):
    """A small network without dropout, whose random numbers differ from device to device."""
    torch.manual_seed(0)
    net = importlib.import_module(method).build(CLASSES, "resnet18", **options)
    for module in net.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return net


def batch(device="cpu"):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, *SIZE, generator=generator)
    labels = torch.randint(CLASSES, (2, 9, 13), generator=generator)
    labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, : SIZE[0], : SIZE[1]]
    labels[:, :5, :7] = 255
    return images.to(device), labels.contiguous().to(device)


def step(net, device, amp="off", scale=1.0):
    """(logits, losses in training mode, gradients) of one batch, on the CPU.

    Gradients are those with the norms in evaluation mode: through the statistics of so small a
    batch rounding errors grow ten-thousandfold.
    """
    net = net.to(device)
    images, labels = batch(device)
    with torch.no_grad(), evaluate.autocast(torch.device(device), amp):
        logits = net.eval()(images)
        losses = net.train()(images, labels)
    for module in net.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    with evaluate.autocast(torch.device(device), amp):
        (scale * sum(net(images, labels).values())).backward()
    gradients = {k: p.grad.cpu() for k, p in net.named_parameters() if p.grad is not None}
    return logits.cpu(), {name: loss.cpu() for name, loss in losses.items()}, gradients


@pytest.fixture
def exact():
    """float32 without TF32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    yield
    matmul.allow_tf32, cudnn.allow_tf32 = before


def difference(a, b):
    """The norm of a - b over that of b."""
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()


def command(arguments, folder, launch=False, **environment):
    """train.py as a user starts it, by torchrun if `launch`: (exit status, what it printed)."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | environment
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    launcher = launcher if launch else []
    full = [sys.executable, *launcher, train.__file__, *arguments]
    done = subprocess.run(full, env=environment, cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def weights(folder, name="last.pt"):
    return torch.load(folder / name, weights_only=True)["net"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


SHORT = "--crop-size 64 --batch-size 4 --backbone resnet18 --workers 0 --eval-every 1000".split()


@pytest.mark.network
@pytest.mark.parametrize("method", METHODS)
def test_no_tensor_is_made_on_another_device(method):
    # Fake tensors have shapes and devices, no numbers: a mixture of two devices is an error, and so
    # is a check of numbers.
    with FakeTensorMode(), torch.device("cuda"):
        net = importlib.import_module(method).build(CLASSES, "resnet18")
        images, labels = torch.randn(2, 3, *SIZE), torch.randint(CLASSES, (2, *SIZE))
        assert net.eval()(images).device.type == "cuda"
        losses = net.train()(images, labels)
    assert {loss.device.type for loss in losses.values()} == {"cuda"}


@needs_gpu
@pytest.mark.cuda
@pytest.mark.parametrize("method", METHODS)
def test_cuda_equals_the_cpu(method, exact, capsys):
    expected = step(network(method), "cpu")
    torch.cuda.reset_peak_memory_stats()
    logits, losses, gradients = step(network(method), "cuda")
    peak = torch.cuda.max_memory_allocated() / 2**20
    with capsys.disabled():
        print(f"\n{method}: peak {peak:.0f} MiB, {torch.cuda.get_device_name()}")
    assert difference(logits, expected[0]) < 1e-4
    assert losses.keys() == expected[1].keys()
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expected[1][name].item(), rel=1e-4), name
    assert gradients.keys() == expected[2].keys()
    ours, theirs = (torch.cat([g.flatten() for g in x.values()]) for x in (gradients, expected[2]))
    assert difference(ours, theirs) < 2e-3


@needs_gpu
@pytest.mark.cuda
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_is_finite_and_its_losses_and_logits_are_float32(method, amp):
    logits, losses, gradients = step(network(method), "cuda", amp, 1024.0 if amp == "fp16" else 1.0)
    assert logits.dtype == torch.float32 and logits.isfinite().all()
    for name, loss in losses.items():
        assert loss.dtype == torch.float32 and loss.isfinite(), name
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    full = step(network(method), "cuda")
    assert difference(logits, full[0]) < 0.05
    total, expected = sum(losses.values()), sum(full[1].values())
    assert total.item() == pytest.approx(expected.item(), rel=0.05)


@needs_gpu
@pytest.mark.cuda
@pytest.mark.parametrize("method", METHODS)
def test_compiled_networks_compute_the_same(method, exact):
    logits, losses, gradients = step(network(method), "cuda")
    torch.compiler.reset()
    compiled = network(method)
    compiled.compile()
    others = step(compiled, "cuda")
    assert difference(others[0], logits) < 1e-4
    for name, loss in others[1].items():
        assert loss.item() == pytest.approx(losses[name].item(), rel=1e-4), name
    ours, theirs = (
        torch.cat([x[name].flatten() for name in gradients]) for x in (others[2], gradients)
    )
    assert difference(ours, theirs) < 2e-3


@needs_gpu
@pytest.mark.cuda
@pytest.mark.parametrize("method", METHODS)
def test_deterministic_runs_have_equal_weights(method, tmp_path):
    flags = [*SHORT, "--method", method, "--iterations", "4", "--deterministic"]
    for name in ("a", "b"):
        status, printed = command([*flags, "--output", name], tmp_path)
        assert status == 0, printed
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


STOPPED = """
import os
import signal
import caa


def build(num_classes, backbone="resnet18", *, weights=None, **options):
    net, calls = caa.build(num_classes, backbone, weights=weights, **options), []

    def count(module, arguments):  # the tenth step is told to stop, as by SLURM
        calls.append(1)
        if len(calls) == int(os.environ.get("STOP_AT", 0)):
            os.kill(os.getpid(), signal.SIGTERM)

    net.register_forward_pre_hook(count)
    return net
"""


@needs_gpu
@pytest.mark.cuda
@pytest.mark.parametrize("amp", ["auto", "fp16", "off"])
def test_twenty_steps_resumed_equal_twenty_in_one_go(amp, tmp_path):
    (tmp_path / "stopped.py").write_text(STOPPED)
    path = f"{tmp_path}{os.pathsep}{os.path.dirname(train.__file__)}"
    flags = [*SHORT, "--method", "stopped", "--iterations", "20", "--deterministic", "--amp", amp]
    status, printed = command([*flags, "--output", "whole"], tmp_path, PYTHONPATH=path)
    assert status == 0, printed
    parts = [*flags, "--output", "parts"]
    status, printed = command(parts, tmp_path, PYTHONPATH=path, STOP_AT="10")
    assert status == 128 + 15 and "stopped after step 10" in printed
    status, printed = command(["--output", "parts", "--resume"], tmp_path, PYTHONPATH=path)
    assert status == 0, printed
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


@needs_gpu
@pytest.mark.cuda
def test_torchrun_with_nccl_trains_and_evaluates(tmp_path):
    flags = [*SHORT, "--iterations", "4", "--output", "one"]
    status, printed = command(flags, tmp_path, launch=True)
    assert status == 0, printed
    config = json.loads((tmp_path / "one/config.json").read_text())
    assert "best mIoU" in printed and config["device"] == torch.cuda.get_device_name()


PLAIN = """
import torch
from torch import nn
import backbones


class Net(nn.Module):
    def __init__(self, num_classes, norm):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.classifier = nn.Conv2d(8, num_classes, 1)

    def forward(self, images, labels=None):
        logits = self.classifier(self.norm(self.conv(images)).relu())
        if labels is None:
            return logits
        return {"cross_entropy": backbones.pixel_cross_entropy(logits, labels)}


def build(num_classes, backbone="resnet18", *, weights=None, norm=True):
    return Net(num_classes, norm)
"""
RANK = """
import sys
import torch.distributed as dist
import train

start = dist.init_process_group
dist.init_process_group = lambda _: start("gloo")  # NCCL refuses two processes on one GPU
sys.exit(train.main(sys.argv[1:]))
"""


@needs_gpu
@pytest.mark.cuda
@pytest.mark.parametrize("norm, accumulate", [("true", "1"), ("false", "2")])
def test_two_processes_on_one_gpu_equal_one_with_the_joint_batch(tmp_path, norm, accumulate):
    # Batch norm is synchronized, so its statistics are those of the joint batch; but in parts they
    # are those of a part.
    (tmp_path / "plain.py").write_text(PLAIN)
    (tmp_path / "rank.py").write_text(RANK)
    path = f"{tmp_path}{os.pathsep}{os.path.dirname(train.__file__)}"
    environment = dict(PYTHONPATH=path, NVIDIA_TF32_OVERRIDE="0")
    flags = [*SHORT, "--method", "plain", "--iterations", "6", "--amp", "off", "--option"]
    flags += [f"norm={norm}", "--accumulate"]
    status, printed = command([*flags, "1", "--output", "one"], tmp_path, **environment)
    assert status == 0, printed
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = dict(WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    full = [sys.executable, "rank.py", *flags, accumulate, "--output", "two"]
    both = []
    for rank in "01":
        variables = os.environ | group | environment | {"RANK": rank}
        kwargs = dict(env=variables, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        both.append(subprocess.Popen(full, stderr=subprocess.STDOUT, **kwargs))
    try:
        outputs = [process.communicate(timeout=600)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], outputs
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-4


@needs_gpu
@pytest.mark.cuda
def test_evaluation_on_the_gpu_is_that_on_the_cpu(exact):
    net, (image, _) = network("caa").eval(), data.dataset("shapes", None, "val")[0]
    views = dict(scales=(0.75, 1.25), flip=True, window=64)
    found = []
    for device in ("cpu", "cuda"):
        net = net.to(device)
        images = data.normalise(image[None].to(device))
        found.append(evaluate.predict(net, images, **views).cpu())
    assert torch.allclose(*found, atol=1e-4)


@needs_gpu
@pytest.mark.cuda
def test_too_little_memory_is_one_line(capsys):
    torch.cuda.set_per_process_memory_fraction(0.002)
    try:
        flags = "--method caa --speed --crop-size 1025 --batch-size 8 --runs 1"
        assert evaluate.main(flags.split()) == 2
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    line = capsys.readouterr().err.strip()
    assert "--accumulate" in line and "--crop-size" in line and len(line.splitlines()) == 1


@needs_gpu
@pytest.mark.cuda
@pytest.mark.parametrize("method", METHODS)
def test_numbers_and_figures_are_made_on_the_gpu_too(method, tmp_path):
    args = evaluate.arguments(["--checkpoint", "x", "--analyse", "--figures", str(tmp_path)])
    dataset, device, args.workers = data.dataset("shapes", None, "val"), torch.device("cuda"), 0
    dataset = torch.utils.data.Subset(dataset, range(2))
    dataset.num_classes, dataset.classes = 12, dataset.dataset.classes
    net = importlib.import_module(method).build(12, "resnet18").eval().to(device)
    assert evaluate.analyse(net, dataset, device, args)
    image, truth = dataset[0]
    prediction = evaluate.label_map(net, image, device)
    about = dataset.dataset.palette, dataset.classes, truth
    assert evaluate.figure_sheet(net, image, prediction, *about).size[0] > 300
