import json
import math
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import in_group
from PIL import Image
from torch import nn

import caa
import data
import evaluate
import train
from data import UserError

pytestmark = pytest.mark.system


class Constant(nn.Module):
    """Logits that are a fixed linear map of each pixel: exactly the same whole, in windows, or
    mirrored.
    """

    def __init__(self, classes=3):
        super().__init__()
        self.classifier = nn.Conv2d(3, classes, 1)

    def forward(self, images):
        return self.classifier(images)


def classes(net, images, **views):
    return evaluate.highest(evaluate.predict(net, images, **views))


# ------------------------------------------------------------------------------------------ metrics


def test_confusion_matrix_by_hand():
    matrix = evaluate.ConfusionMatrix(4)
    labels = torch.tensor([[0, 0, 0, 1], [1, 255, 0, 1]])
    matrix.update(torch.tensor([[0, 0, 1, 1], [1, 2, 0, 0]]), labels)
    # class 0: 3 right of 4 labelled, 1 predicted elsewhere: 3 / 5. class 1: 2 right of 3, 1
    # elsewhere: 2 / 4. The 2 was predicted where nothing is labelled. Classes 2 and 3 are in
    # neither.
    result = matrix.result()
    assert result["IoU"] == [3 / 5, 2 / 4, None, None]
    assert result["mIoU"] == pytest.approx((3 / 5 + 2 / 4) / 2)
    assert result["pixel_accuracy"] == pytest.approx(5 / 7)
    assert result["class_accuracy"] == pytest.approx((3 / 4 + 2 / 3) / 2)


def test_class_predicted_but_never_labelled_has_iou_zero_and_no_class_accuracy():
    matrix = evaluate.ConfusionMatrix(3)
    matrix.update(torch.tensor([0, 2]), torch.tensor([0, 0]))
    result = matrix.result()
    assert result["IoU"] == [1 / 2, None, 0.0]
    assert result["mIoU"] == pytest.approx(1 / 4)
    assert result["class_accuracy"] == pytest.approx(1 / 2)


def test_confusion_matrix_adds_up_over_updates():
    torch.manual_seed(0)
    prediction, labels = torch.randint(5, (4, 7, 9)), torch.randint(5, (4, 7, 9))
    labels[torch.rand(labels.shape) < 0.2] = 255
    whole, parts = evaluate.ConfusionMatrix(5), evaluate.ConfusionMatrix(5)
    whole.update(prediction, labels)
    for p, t in zip(prediction, labels):
        parts.update(p, t)
    expected = [
        [((labels == t) & (prediction == p)).sum().item() for p in range(5)] for t in range(5)
    ]
    assert whole.matrix.tolist() == parts.matrix.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_255_classes_in_bytes_and_ignored_pixels_are_counted_right(dtype):
    torch.manual_seed(0)
    labels, prediction = torch.randint(256, (40, 50)), torch.randint(255, (40, 50))
    labels[0] = prediction[0]  # some hits
    labels[1], prediction[1] = 255, 254  # the largest index that can occur
    matrix = evaluate.ConfusionMatrix(255)
    matrix.update(prediction.to(dtype), labels.to(dtype))
    expected = torch.zeros(255, 255, dtype=torch.int64)
    for t, p in zip(labels.flatten().tolist(), prediction.flatten().tolist()):
        if t != 255:
            expected[t, p] += 1
    assert torch.equal(matrix.matrix, expected)


def test_nothing_labelled_gives_nan_and_no_error():
    matrix = evaluate.ConfusionMatrix(2)
    matrix.update(torch.zeros(3, dtype=torch.int64), torch.full((3,), 255))
    assert np.isnan(matrix.result()["mIoU"])


def test_table_names_the_classes_that_are_left_out():
    one = {"mIoU": 0.5, "pixel_accuracy": 0.6, "class_accuracy": 0.7, "IoU": [0.5, None]}
    text = evaluate.table([one], ["cat", "dog"])
    assert "cat                   0.500" in text
    assert text.endswith("not in the mean (neither labelled nor predicted): dog")
    lines = evaluate.table([one, one | {"mIoU": 0.25, "IoU": [0.1, 0.4]}], ["cat", "dog"])
    assert lines.splitlines()[:3] == [
        "  cat                   0.500  0.100",
        "  dog                     nan  0.400",
        "mIoU                    0.500  0.250",
    ]


# ------------------------------------------------------------------------------------------ predict


def test_predict_gives_probabilities_at_the_size_of_the_image():
    images = torch.randn(2, 3, 33, 47)
    probabilities = evaluate.predict(
        Constant(), images, scales=(0.5, 1.0, 1.7), flip=True, window=20
    )
    assert probabilities.shape == (2, 3, 33, 47)
    assert torch.allclose(probabilities.sum(1), torch.ones(2, 33, 47), atol=1e-5)


def test_predict_at_scale_one_is_the_softmax_of_the_logits():
    net, images = Constant(), torch.randn(1, 3, 9, 11)
    torch.testing.assert_close(evaluate.predict(net, images), net(images).softmax(1))
    assert torch.equal(classes(net, images), net(images).argmax(1))


def test_scales_and_flip_equal_the_plain_average():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))  # not symmetric: mirroring matters
    images, views = torch.randn(1, 3, 16, 24), []
    for size in ((8, 12), (16, 24), (24, 36)):
        scaled = images
        if size != (16, 24):
            scaled = nn.functional.interpolate(images, size=size, mode="bilinear", antialias=True)
        for mirror in (False, True):
            p = net(scaled.flip(3) if mirror else scaled).softmax(1)
            p = p.flip(3) if mirror else p
            views.append(
                nn.functional.interpolate(p, size=(16, 24), mode="bilinear")
                if size != (16, 24)
                else p
            )
    expected = sum(views) / 6
    assert torch.allclose(
        evaluate.predict(net, images, scales=(0.5, 1, 1.5), flip=True), expected, atol=1e-6
    )
    assert not torch.allclose(evaluate.predict(net, images), expected, atol=1e-3)


@pytest.mark.parametrize("size", [(9, 11), (10, 40), (41, 10), (37, 53), (1, 25)])
def test_windows_of_a_network_without_context_equal_the_whole_image(size):
    net, images = Constant(), torch.randn(2, 3, *size)
    assert torch.allclose(
        evaluate.predict(net, images, window=10), evaluate.predict(net, images), atol=1e-6
    )


def test_windows_cover_every_pixel_once_or_more_and_stay_inside():
    for side in (5, 10, 11, 16, 17, 23, 100):
        starts = evaluate._starts(side, 10)
        assert starts[0] == 0 and max(starts) == max(0, side - 10)
        assert all(b - a <= 6 for a, b in zip(starts, starts[1:]))


def test_windows_overlap_is_averaged():
    class Shifted(
        nn.Module
    ):  # answers with the column inside the window: neighbours disagree where they overlap
        def forward(self, x):
            ramp = torch.arange(x.shape[3], dtype=torch.float32).expand(len(x), 1, x.shape[2], -1)
            return torch.cat([ramp, torch.zeros_like(ramp)], 1)

    p = evaluate.predict(Shifted(), torch.zeros(1, 3, 1, 8), window=6)[
        0, 0, 0
    ]  # windows at 0 and 2
    sigmoid = torch.arange(6.0).sigmoid()
    expected = torch.cat([sigmoid[:2], (sigmoid[2:] + sigmoid[:4]) / 2, sigmoid[4:]])
    assert torch.allclose(p, expected)


# ----------------------------------------------------------------------------------- cost and speed


def test_cost_by_hand():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(8, 2, 1))
    parameters, operations, children = evaluate.cost(net, (10, 10))
    assert parameters == 3 * 8 * 9 + 8 * 2 + 2
    assert children == {"0": 10 * 10 * 3 * 8 * 9, "1": 0, "2": 10 * 10 * 8 * 2}
    assert operations == sum(children.values())


def test_cost_of_a_list_is_that_of_its_members():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.list = (
                nn.Conv2d(3, 4, 1, bias=False),
                nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(2)),
            )

        def forward(self, x):
            return self.list[1](self.list[0](self.first(x)))

    _, operations, children = evaluate.cost(Net(), (5, 7))
    assert children == {"first": 35 * 12, "list": 35 * 32} and operations == 35 * 44


def test_cost_command_prices_an_untrained_network(capsys):
    arguments = "--method caa --backbone resnet18 --output-stride 32 --cost --crop-size 65".split()
    arguments += "--classes 7 --device cpu".split()
    assert evaluate.main(arguments) == 0
    out = capsys.readouterr().out
    assert (
        "M parameters" in out and "for 65x65" in out and "backbone" in out and "classifier" in out
    )
    arguments = "--method ksac --backbone resnet18 --cost --speed --crop-size 33 65".split()
    assert evaluate.main([*arguments, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "for 33x65" in out and "2 images of 33x65" in out
    assert evaluate.main("--method caa --cost --crop-size 1 2 3".split()) == 2
    assert "expected one side, or height and width" in capsys.readouterr().err


# -------------------------------------------------------------------------------- a trained network


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """A run of two steps: (its folder, the path of its checkpoint, the dataset's root)."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    flags = "--dataset folder --iterations 2 --batch-size 2 --crop-size 32 --output-stride 32"
    flags += " --workers 0 --device cpu"
    assert train.main([*flags.split(), "--data-root", str(photos), "--output", str(folder)]) == 0
    return folder, str(folder / "last.pt"), photos


def test_evaluate_command_agrees_with_a_plain_loop(trained, tmp_path, capsys):
    _, checkpoint, root = trained
    predictions, numbers = tmp_path / "predictions", tmp_path / "n.json"
    flags = [
        "--save-predictions",
        str(predictions),
        "--json",
        str(numbers),
        "--device",
        "cpu",
        "--workers",
        "0",
    ]
    assert evaluate.main(["--checkpoint", checkpoint, *flags]) == 0
    result = json.loads(numbers.read_text())
    assert f"{result['mIoU']:.3f}" in capsys.readouterr().out
    hits = pixels = 0
    for file in sorted((root / "labels" / "val").glob("*.png")):
        truth, saved = np.asarray(Image.open(file)), Image.open(predictions / file.name)
        assert saved.mode == "P" and saved.size == truth.shape[::-1]
        hits += ((np.asarray(saved) == truth) & (truth != 255)).sum()
        pixels += (truth != 255).sum()
    assert result["pixel_accuracy"] == pytest.approx(hits / pixels)
    assert result["images"] == 5 and result["IoU"].keys() == {"left", "right", "never"}


def test_two_processes_give_the_numbers_of_one_with_unequal_shares(
    trained, tmp_path, two_processes
):
    _, checkpoint, _ = trained  # five images: three and two
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    flags = [
        "--checkpoint",
        checkpoint,
        "--device",
        "cpu",
        "--workers",
        "0",
        "--flip",
        "--scales",
        "0.5",
        "1",
    ]
    assert evaluate.main([*flags, "--json", str(one)]) == 0
    outputs = two_processes(partial(in_group, evaluate.main, [*flags, "--json", str(two)]))
    assert [status for status, _ in outputs] == [0, 0]
    assert sum(printed.count("pixel accuracy") for _, printed in outputs) == 1  # by one process
    a, b = json.loads(one.read_text()), json.loads(two.read_text())
    assert a == b and len(a["mIoU_at_scale"]) == 2


def test_photographs_get_an_overlay_a_palette_png_and_words(trained, tmp_path, capsys):
    _, checkpoint, root = trained
    photo = tmp_path / "gray.jpg"
    Image.fromarray(np.full((45, 61), 90, np.uint8)).save(photo)
    flags = [
        "--images",
        str(photo),
        "--save-predictions",
        str(tmp_path / "p"),
        "--figures",
        str(tmp_path / "f"),
    ]
    assert (
        evaluate.main(
            ["--checkpoint", checkpoint, *flags, "--pixel", "10", "20", "--device", "cpu"]
        )
        == 0
    )
    assert "%" in capsys.readouterr().out
    assert Image.open(tmp_path / "p" / "gray.png").size == (61, 45)
    assert (tmp_path / "p" / "gray_overlay.png").exists()
    assert (
        Image.open(tmp_path / "f" / "gray_figures.png").width > 4 * 240
    )  # image, prediction and three maps of attention


def test_figures_of_a_split(trained, tmp_path):
    _, checkpoint, _ = trained
    assert (
        evaluate.main(
            [
                "--checkpoint",
                checkpoint,
                "--figures",
                str(tmp_path),
                "--device",
                "cpu",
                "--workers",
                "0",
            ]
        )
        == 0
    )
    sheets = [f"{i}.png" for i in range(5)]
    assert sorted(file.name for file in tmp_path.iterdir()) == sheets


def test_checkpoints_are_drawn_beside_each_other(trained, tmp_path, capsys):
    _, checkpoint, _ = trained
    saved = evaluate.read_checkpoint(checkpoint)
    other, strange = tmp_path / "other.pt", tmp_path / "strange.pt"
    torch.save(
        saved | dict(net={k: -v if "classifier" in k else v for k, v in saved["net"].items()}),
        other,
    )
    torch.save(saved | dict(classes=["a", "b", "c"]), strange)
    flags = ["--checkpoint", checkpoint, "--figures", str(tmp_path / "f"), "--device", "cpu"]
    flags += ["--workers", "0"]
    assert evaluate.main([*flags, "--compare", str(other)]) == 0
    pictures = sorted((tmp_path / "f").iterdir())
    assert [file.name for file in pictures] == [f"{i}.png" for i in range(5)]
    # image, truth, two predictions, difference; image, both and the truth enlarged: three columns
    assert Image.open(pictures[0]).width == 3 * 308 + 8
    printed, alone = capsys.readouterr().out, tmp_path / "alone.json"
    assert f"  column 1: {checkpoint}\n  column 2: {other}\n" in printed
    both = ["--json", str(tmp_path / "both.json"), "--compare", str(other)]
    both += ["--save-predictions", str(tmp_path / "both")]
    assert evaluate.main([*flags[:2], *flags[4:], *both]) == 0  # without pictures
    assert evaluate.main([*flags[:2], *flags[4:], "--save-predictions", str(tmp_path / "one")]) == 0
    for file in (tmp_path / "one").iterdir():  # those of the first checkpoint
        assert file.read_bytes() == (tmp_path / "both" / file.name).read_bytes()
    flags_of_other = ["--checkpoint", str(other), *flags[4:], "--json", str(alone)]
    assert evaluate.main(flags_of_other) == 0
    numbers = json.loads((tmp_path / "both.json").read_text())
    assert list(numbers["compared"]) == [str(other)]
    second, alone = numbers["compared"][str(other)], json.loads(alone.read_text())
    assert second["mIoU"] == alone["mIoU"] != numbers["mIoU"] and second["IoU"] == alone["IoU"]
    assert f"{numbers['mIoU']:.3f}  {second['mIoU']:.3f}\n" in printed
    capsys.readouterr()
    assert evaluate.main([*flags, "--compare", str(strange)]) == 2
    assert "strange.pt' was trained on other classes" in capsys.readouterr().err
    line = mistake(capsys, *flags[:4], "--compare", checkpoint)
    assert "a checkpoint is compared with others" in line
    line = mistake(capsys, "--checkpoint", checkpoint, "--cost", "--compare", str(other))
    assert "--compare has no effect here: it goes with a whole split" in line
    line = mistake(capsys, *flags[:4], "--compare", str(other), "--images", "a.jpg")
    assert "--compare has no effect here: it goes with a whole split" in line
    line = mistake(capsys, *flags[:4], "--compare", str(other), "--pixel", "1", "1")
    assert "--compare has no effect with --pixel" in line


@pytest.mark.parametrize(
    "views", [dict(scales=(0.5, 1.0), flip=True), dict(window=8), dict(scales=(1.0,), flip=True)]
)
def test_classes_are_those_of_the_mean_over_the_views(views):
    torch.manual_seed(0)
    net = nn.Conv2d(3, 5, 3, padding=1)
    images = torch.randn(2, 3, 20, 14)
    expected = evaluate.predict(net, images, **views)
    torch.testing.assert_close(expected.sum(1), torch.ones(2, 20, 14))
    assert torch.equal(classes(net, images, **views), expected.argmax(1))


def test_one_view_holds_one_map_of_scores(largest):
    net, images = Constant(40), torch.randn(1, 3, 30, 30)
    with largest:
        classes(net, images)
    assert largest.numbers == 40 * 30 * 30


LIMITS = [
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "larger --accumulate"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "--window"),
    (MemoryError(), "not enough memory"),
    (RuntimeError("unable to write to file </torch_1_2_3>"), "--workers 0"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), "/dev/shm"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "fewer --workers"),
    (OSError(24, "Too many open files"), "ulimit -n"),
    (OSError(28, "No space left on device"), "the disk is full"),
    (
        RuntimeError("[enforce fail at inline_container.cc] . unexpected pos 64 vs 0"),
        "disk is full",
    ),
    (RuntimeError("Connection closed by peer [127.0.0.1]:1"), "another process of this run"),
    (
        ValueError("Expected more than 1 value per channel when training"),
        "--batch-size of at least",
    ),
]


@pytest.mark.parametrize("error, advice", LIMITS, ids=str)
def test_limits_of_the_machine_are_one_line(error, advice, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")

    def work():
        raise error

    assert evaluate.guarded("train.py", work) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("train.py: ") and advice in lines[0]


def test_other_errors_keep_their_traceback():
    def work():
        raise RuntimeError("a fault of the program")

    with pytest.raises(RuntimeError):
        evaluate.guarded("train.py", work)


def test_photographs_come_from_folders_and_a_broken_one_does_not_end_the_list(
    trained, tmp_path, capsys
):
    _, checkpoint, root = trained
    photos = tmp_path / "photos"
    shutil.copytree(root / "images" / "val", photos)
    (photos / "1.png").write_bytes(b"no picture")
    (photos / "._2.png").write_bytes(b"of another system")
    picture = Image.open(photos / "2.png").convert("RGB")
    block = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x01\x00\x12\x01\x03\x00"  # cut short
    picture.save(photos / "turned.jpg", exif=block)
    out = tmp_path / "out"
    flags = ["--checkpoint", checkpoint, "--images", str(photos), "--device", "cpu"]
    assert evaluate.main([*flags, "--save-predictions", str(out)]) == 2
    printed = capsys.readouterr()
    assert "1.png' cannot be read as an image" in printed.err and printed.err.count("\n") == 1
    assert len(printed.out.splitlines()) == 5
    assert sorted(p.stem for p in out.iterdir() if "overlay" not in p.stem) == [
        "0",
        "2",
        "3",
        "4",
        "turned",
    ]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no photograph" in mistake(capsys, *flags[:3], str(empty))
    for name in ("a.png", "a_overlay.png"):
        shutil.copy(photos / "2.png", empty / name)
    assert "2 photographs share the output file a_overlay.png" in mistake(
        capsys, *flags[:3], str(empty)
    )


def test_matrix_has_a_square_for_each_entry_rows_downwards():
    values = torch.tensor([[1.0, 0.0], [0.5, 0.0]])
    picture = evaluate.draw_matrix(values, ["a", "b"], "title", cell=20, margin=40)
    bright, dark, middle = (255, 255, 140), (10, 10, 60), (220, 60, 60)
    left, top = 8, 8 + 17  # the sheet's gap, the title
    places = (50, 50), (70, 50), (50, 70), (70, 70)
    found = [picture.getpixel((left + x, top + y)) for x, y in places]
    assert found == [bright, dark, middle, dark]
    ink = 255 - np.asarray(picture.convert("L")).astype(int)[top:, left:]
    # names left and above, a bar below
    assert ink[40:80, :40].sum() > 0 and ink[:40, 40:80].sum() > 0 and ink[:40, :40].sum() == 0
    assert ink[83:91, :80].sum() > 0


def test_heat_is_dark_at_zero_bright_at_one_and_white_for_nan():
    picture = data.heat(torch.tensor([[0.0, 1.0, math.nan]]))
    assert picture.dtype == torch.uint8
    assert picture[:, 0].T.tolist() == [[10, 10, 60], [255, 255, 140], [255, 255, 255]]


def test_figures_have_a_scale_and_lie_over_the_image_where_they_have_its_size():
    image = torch.full((3, 4, 6), 200, dtype=torch.uint8)
    values = torch.zeros(4, 6)
    values[0, 0] = 2.5
    panel = evaluate.draw_figure("attention", values, image, [], ((1, 1, 2, 2),))
    assert panel.title == "attention" and panel.scale == ("0", "2.5") and panel.boxes
    light = 100 + 0.6 * 200
    expected = [int(0.25 * c + 0.75 * light) for c in (10, 10, 60)]
    assert panel.tile[:, 1, 1].tolist() == expected
    expected = [int(0.85 * c + 0.15 * light) for c in (255, 255, 140)]
    assert panel.tile[:, 0, 0].tolist() == pytest.approx(expected, abs=1)
    other = evaluate.draw_figure(
        "level | stride 32 | stride 4", torch.ones(2, 3), image, [], ((1,) * 4,)
    )
    assert other.title == "level" and other.scale == ("stride 32", "stride 4") and not other.boxes
    assert other.tile[:, 0, 0].tolist() == [255, 255, 140]


def test_a_figures_title_may_mark_a_number_on_its_scale():
    image = torch.zeros(3, 4, 6, dtype=torch.uint8)
    for size in ((4, 6), (2, 3)):
        panel = evaluate.draw_figure("unity | 0 | 1 | 0.9", torch.ones(size), image, [])
        assert panel[0] == "unity" and panel.scale == ("0", "1") and panel.mark == (0.9, "0.9")
    assert evaluate.draw_figure("unity | 0 | 1", torch.ones(4, 6), image, []).mark == ()


class Shown(nn.Module):
    """A network with the figures it is given, about a pixel or not."""

    def __init__(self, figures, about_pixel=True):
        super().__init__()
        self.classifier, self.shown, self.about_pixel = nn.Conv2d(3, 4, 1), figures, about_pixel

    def figures(self, image, pixel=None):
        return self.shown

    caption = "What to look for."


@pytest.fixture
def sheets(monkeypatch):
    """The arguments that `data.sheet` is called with."""
    seen = []
    names = "panels columns maps classes palette caption".split()
    monkeypatch.setattr(data, "sheet", lambda *given: seen.append(dict(zip(names, given))))
    return seen


def sheet_of(net, sheets, size=(40, 60), prediction=None, truth=None, pixel=None):
    image = torch.full((3, *size), 90, dtype=torch.uint8)
    if prediction is None:
        prediction = torch.zeros(size, dtype=torch.long)
    palette, classes = [(i, i, i) for i in range(4)], ["sky", "road", "car", "tree"]
    evaluate.figure_sheet(net, image, prediction, palette, classes, truth, pixel)
    return sheets[-1]


def blocks(rows, columns, seed=0):
    """A map of random numbers, each drawn as a block: so many rows and columns high and wide."""
    torch.manual_seed(seed)
    x = torch.rand(len(rows), len(columns))
    rows, columns = (torch.tensor(sides) for sides in (rows, columns))
    return x.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def test_the_marked_pixels_cell_is_outlined_and_the_cells_once(sheets):
    m = blocks([5, 14, 14, 7], [10, 20, 20, 10])
    row = torch.zeros_like(m)  # its rows are the cells' rows, and it is 0 elsewhere
    row[5:19] = m[5:19]
    small = torch.rand(3, 3)
    found = sheet_of(Shown({"small": small, "row": row, "both": m}), sheets, pixel=(18, 10))
    panels = {panel.title: panel for panel in found["panels"]}
    box = (5, 10, 19, 30)
    for name in ("image", "prediction", "row", "both"):
        assert panels[name].boxes == (box,)
    assert panels["small"].boxes == () and panels["small"].lines == ((), ())
    assert panels["row"].lines == [[0, 5, 19, 33, 40], [0, 10, 30, 50, 60]]
    assert panels["both"].lines == ((), ())
    assert found["caption"] == f"What to look for. {evaluate.CELLS}"
    sheet_of(Shown({"both": m}), sheets, pixel=(19, 9))
    assert sheets[-1]["panels"][0].boxes == ((19, 0, 33, 10),)
    sheet_of(Shown({"both": m}), sheets, pixel=(39, 59))
    assert sheets[-1]["panels"][0].boxes == ((33, 50, 40, 60),)


def test_cells_of_maps_that_are_zero_but_for_one_row_or_column_of_cells():
    m, column, row = blocks([5, 14, 14, 7], [10, 20, 20, 10]), *torch.zeros(2, 40, 60)
    column[:, 10:30], row[19:33] = m[:, 10:30], m[19:33]
    lines, box = evaluate.cells([column, row], (20, 11), (40, 60))
    assert lines == [[0, 5, 19, 33, 40], [0, 10, 30, 50, 60]] and box == (19, 10, 33, 30)


@pytest.mark.parametrize(
    "figure",
    [
        torch.rand(40, 60),  # no blocks
        torch.zeros(40, 60),  # all one
        blocks([3] * 12 + [4], [3] * 20),  # too small
        torch.rand(4, 6),  # of another size
    ],
)
def test_without_cells_that_can_be_seen_a_box_is_around_the_pixel(figure, sheets):
    found = sheet_of(Shown({"a": figure}), sheets, pixel=(18, 10))
    assert found["panels"][0].boxes == ((15, 7, 21, 13),)
    assert all(panel.lines == ((), ()) for panel in found["panels"])
    assert found["caption"] == "What to look for."
    found = sheet_of(Shown({"a": figure}, about_pixel=False), sheets)
    assert found["panels"][0].boxes == ()


def test_more_than_forty_cells_a_side_are_not_outlined():
    for count, seen in ((40, True), (41, False)):
        m = blocks([8] * 3, [8] * count)
        lines, box = evaluate.cells([m], (9, 17), m.shape)
        assert bool(lines[0]) == seen and box == ((8, 16, 16, 24) if seen else (4, 12, 14, 22))


def test_cells_of_a_map_one_position_high_and_where_nothing_is_known():
    m = blocks([40], [20, 20, 20])
    m[:, 20:40] = math.nan
    lines, box = evaluate.cells([m], (3, 25), (40, 60))
    assert lines == [[0, 40], [0, 20, 40, 60]] and box == (0, 20, 40, 40)


def test_figures_of_classes_share_a_scale_and_the_legend_has_their_classes(sheets):
    first, second = torch.rand(40, 60), 3 + torch.rand(40, 60)
    second[0, 0] = 4.5
    net = Shown({0: first, 3: second}, about_pixel=False)
    found = sheet_of(net, sheets, prediction=torch.ones(40, 60, dtype=torch.long))
    sky, tree = found["panels"][2:]
    assert (sky.title, tree.title) == ("attention for sky", "attention for tree")
    assert sky.scale == tree.scale == ("0", "4.5")
    image = torch.full((3, 40, 60), 90, dtype=torch.uint8)
    for panel, m in ((sky, first), (tree, second)):
        expected = evaluate.draw_figure(" | 0 | 1", m / 4.5, image, []).tile
        assert torch.equal(panel.tile, expected)
    assert set().union(*(m.unique().tolist() for m in found["maps"])) == {0, 1, 3}


def test_figures_of_classes_that_are_0_everywhere_are_drawn_too(sheets):
    found = sheet_of(Shown({1: torch.zeros(40, 60)}, about_pixel=False), sheets)
    assert found["panels"][2].scale == ("0", "0")
    image = torch.full((3, 40, 60), 90, dtype=torch.uint8)
    expected = evaluate.draw_figure(" | 0 | 1", torch.zeros(40, 60), image, []).tile
    assert torch.equal(found["panels"][2].tile, expected)


def test_the_prediction_names_the_map_that_it_is(sheets):
    prediction, coarse = torch.ones(40, 60, dtype=torch.long), torch.zeros(40, 60).long()
    net = Shown({"from coarse": coarse, "from fine": prediction.clone()}, about_pixel=False)
    truth = torch.zeros(40, 60, dtype=torch.uint8)
    found = sheet_of(net, sheets, prediction=prediction, truth=truth)
    titles = [panel.title for panel in found["panels"]]
    assert titles[:3] == ["image", "truth", "from fine"]
    assert titles.count("from fine") == 1 and {"from coarse", "from fine, enlarged"} <= set(titles)
    assert found["caption"].startswith("What to look for. Enlarged: ")
    assert found["caption"].endswith("within 3 pixels of the truth's borders.")
    found = sheet_of(net, sheets, prediction=prediction)
    assert found["caption"].endswith("where the predictions differ most.")
    net = Shown({"from coarse": coarse, "prediction": prediction}, about_pixel=False)
    titles = [panel.title for panel in sheet_of(net, sheets, prediction=prediction)["panels"]]
    assert titles[:3] == ["image", "prediction", "from coarse"] and titles.count("prediction") == 1
    titles = [panel.title for panel in sheet_of(net, sheets, prediction=2 * prediction)["panels"]]
    assert titles.count("prediction") == 2  # the method's map is another one: both are shown


def test_errors_are_red_what_is_right_is_light_and_what_is_ignored_black():
    truth, prediction = torch.tensor([[0, 1, 255]]), torch.tensor([[0, 2, 2]])
    tile = evaluate.error_map(prediction, truth, torch.full((3, 1, 3), 50, dtype=torch.uint8))
    assert tile[:, 0].T.tolist() == [[130] * 3, [220, 20, 40], [0, 0, 0]]


# ----------------------------------------------------------------------------------------- mistakes


def mistake(capsys, *flags):
    """The one line that evaluate.py prints for wrong flags."""
    assert evaluate.main([*flags, "--device", "cpu"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in lines if not line.startswith("warning: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_no_classes(value):
    scores = torch.randn(2, 3, 4, 5)
    assert torch.equal(evaluate.highest(scores), scores.argmax(1))
    scores[1, 2, 3, 4] = value
    with pytest.raises(UserError, match="logits are not finite"):
        evaluate.highest(scores)
    net = lambda images: scores  # noqa: E731
    with pytest.raises(UserError, match="logits are not finite"):
        classes(net, torch.zeros(2, 3, 4, 5))


def test_mistakes_are_one_line_that_says_what_to_do(trained, tmp_path, capsys):
    _, checkpoint, root = trained
    assert "give --checkpoint FILE, or --method NAME" in mistake(capsys)
    assert "no checkpoint 'nowhere.pt'" in mistake(capsys, "--checkpoint", "nowhere.pt")
    broken = tmp_path / "broken.pt"
    broken.write_bytes(Path(checkpoint).read_bytes()[:5000])
    assert "cannot be read" in mistake(capsys, "--checkpoint", str(broken))
    other = tmp_path / "other.pt"
    torch.save({"a": torch.zeros(1)}, other)
    assert "is not a checkpoint of train.py" in mistake(capsys, "--checkpoint", str(other))
    assert "unknown method 'cca'" in mistake(capsys, "--method", "cca", "--cost")
    assert "expected a file json.py with a function build" in mistake(
        capsys, "--method", "json", "--cost"
    )
    line = mistake(capsys, "--method", "caa", "--option", "layers=3", "--cost")
    assert "no option layers" in line and "channel_layers=5" in line
    assert "expected KEY=VALUE" in mistake(
        capsys, "--method", "caa", "--option", "layers", "--cost"
    )
    assert "goes with --cost or --speed" in mistake(capsys, "--method", "caa")
    assert "camvid val not found" in mistake(
        capsys, "--checkpoint", checkpoint, "--dataset", "camvid"
    )
    assert "was trained on other classes than those of shapes" in mistake(
        capsys, "--checkpoint", checkpoint, "--dataset", "shapes"
    )
    assert "no file 'no.jpg'" in mistake(capsys, "--checkpoint", checkpoint, "--images", "no.jpg")
    assert "fp16 needs a CUDA GPU" in mistake(capsys, "--checkpoint", checkpoint, "--amp", "fp16")
    for scale in ("0", "1e-320", "1e300", "nan"):
        line = mistake(capsys, "--checkpoint", checkpoint, "--scales", "1", scale)
        assert "expected a number from 0.001 to 1000" in line
    (tmp_path / "a.json").mkdir()  # cannot be written: said before anything is computed
    folder = str(tmp_path / "a.json")
    assert "a.json: expected a file that ends in .json" in mistake(
        capsys, "--checkpoint", checkpoint, "--json", folder
    )
    line = mistake(capsys, "--checkpoint", checkpoint, "--json", checkpoint)
    assert "expected a file that ends in .json" in line
    same = str(Path(checkpoint).parent / ".." / Path(checkpoint).parent.name / "last.pt")
    line = mistake(capsys, "--checkpoint", checkpoint, "--figures", str(tmp_path / "f"),
                   "--compare", same)  # fmt: skip
    assert "is compared with others" in line
    line = mistake(capsys, "--method", "caa", "--option", "output_stride=8", "--cost")
    assert "output_stride is not an --option; take its own flag" in line
    for option in ("a={1,2}", "a=1e999", "a={[]:1}"):
        line = mistake(capsys, "--method", "caa", "--option", option, "--cost")
        assert "--option a=" in line or "no option a" in line
    assert "unknown method 'docs'" in mistake(capsys, "--method", "docs", "--cost")
    assert "--window: expected a whole number from 1" in mistake(
        capsys, "--checkpoint", checkpoint, "--window", "0"
    )
    assert "is outside the image" in mistake(
        capsys, "--checkpoint", checkpoint, "--figures", str(tmp_path), "--pixel", "99", "0"
    )
    photos = [str(root / "images" / split / "0.png") for split in ("train", "val")]
    assert "2 photographs share the output file 0.png" in mistake(
        capsys, "--checkpoint", checkpoint, "--images", *photos
    )
    labels = str(root / "labels" / "val")
    for flag in ("--figures", "--save-predictions"):
        assert "need folders of their own" in mistake(
            capsys, "--checkpoint", checkpoint, flag, labels
        )
    both = ["--figures", str(tmp_path / "b"), "--save-predictions", str(tmp_path / "b")]
    assert "need folders of their own" in mistake(capsys, "--checkpoint", checkpoint, *both)
    assert "need folders of their own" in mistake(
        capsys, "--checkpoint", checkpoint, "--save-predictions", labels
    )


def test_a_checkpoint_is_evaluated_at_another_stride_and_with_options_that_change_no_weight(
    trained, tmp_path, capsys
):
    _, checkpoint, root = trained
    flags = ["--checkpoint", checkpoint, "--device", "cpu", "--workers", "0"]
    changes = ["--output-stride", "16", "--option", "activation=relu"]
    found = tmp_path / "n.json"
    assert evaluate.main([*flags, *changes, "--json", str(found)]) == 0
    assert "scales [1.0], output_stride 16, option ['activation=relu']" in capsys.readouterr().out
    numbers = json.loads(found.read_text())
    assert (numbers["output_stride"], numbers["option"]) == (16, ["activation=relu"])
    saved = evaluate.read_checkpoint(checkpoint)
    net = caa.build(3, "resnet18", output_stride=16, activation="relu").eval()
    net.load_state_dict(saved["net"])
    val, matrix = data.dataset("folder", root, "val"), evaluate.ConfusionMatrix(3)
    for image, label in val:
        with torch.no_grad():
            logits = net(data.normalise(image[None]))
        matrix.update(logits.argmax(1), label[None])
    assert numbers["mIoU"] == matrix.result()["mIoU"]
    other = evaluate.load(saved)(data.normalise(val[0][0][None]))
    assert not torch.allclose(other, net(data.normalise(val[0][0][None])))
    line = mistake(capsys, *flags[:2], "--option", "channelization=False")
    assert "--option, --output-stride or the method's file changed them" in line
    assert "gate_col" in line


def test_flags_without_effect_are_refused(trained, capsys):
    _, checkpoint, _ = trained
    net, cost = ["--checkpoint", checkpoint], ["--method", "caa", "--cost"]
    for flags, words in (
        ([*net, "--backbone", "resnet50"], "--backbone has no effect here: it goes with --method"),
        ([*net, "--classes", "7"], "--classes has no effect here: it goes with --method"),
        (
            [*net, "--crop-size", "65"],
            "--crop-size has no effect here: it goes with --cost or --speed",
        ),
        ([*net, "--images", "a.jpg", "--dataset", "camvid"], "it goes with a whole split"),
        ([*net, "--cost", "--scales", "1"], "--scales has no effect here"),
        ([*cost, "--batch-size", "4"], "--batch-size has no effect here: it goes with --speed"),
        ([*cost, "--split", "train"], "--split has no effect here"),
        ([*cost, "--images", "a.jpg"], "--images has no effect here: it goes with --checkpoint"),
        (["--method", "caa", "--images", "a.jpg"], "--method has no effect here"),
        ([*net, *cost], "give --checkpoint FILE, or --method NAME with --cost or --speed"),
        ([*net, "--pixel", "1", "2"], "--pixel has no effect here: it goes with --figures"),
    ):
        assert words in mistake(capsys, *flags)


def test_wrong_label_in_a_loader_process_is_one_line_too_and_the_command_ends(trained, tmp_path):
    _, checkpoint, root = trained
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    file = copy / "labels" / "val" / "3.png"
    label = np.array(Image.open(file))
    label[0, 0] = 77
    Image.fromarray(label).save(file)
    command = [
        sys.executable,
        evaluate.__file__,
        "--checkpoint",
        checkpoint,
        "--data-root",
        str(copy),
    ]
    done = subprocess.run(
        [*command, "--workers", "2", "--device", "cpu"], capture_output=True, text=True, timeout=600
    )
    line = done.stderr.strip().splitlines()[-1]  # the progress bar may stand before it
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert line.startswith("evaluate.py: '") and "3.png' holds the label ids [77]" in line


def test_unknown_device_is_a_mistake():
    with pytest.raises(UserError, match="unknown device 'gpu'"):
        evaluate.processes("gpu")


def test_parse_options_reads_literals_and_keeps_text():
    assert evaluate.parse_options(
        ["a=3", "b=None", "c=axial", "d=(1, 2)", "e=false", "f=none", "g=1e999", "h={1}"]
    ) == {
        "a": 3,
        "b": None,
        "c": "axial",
        "d": (1, 2),
        "e": False,
        "f": None,
        "g": "1e999",
        "h": "{1}",
    }


def test_palette_png_keeps_ids_and_colours(tmp_path):
    label = torch.tensor([[0, 1], [2, 1]])
    evaluate.save_prediction(label, [(1, 2, 3), (4, 5, 6), (7, 8, 9)], tmp_path / "p.png")
    saved = Image.open(tmp_path / "p.png")
    assert np.asarray(saved).tolist() == label.tolist()
    assert np.asarray(saved.convert("RGB"))[1, 0].tolist() == [7, 8, 9]
    assert data.IGNORE == 255


def test_submissions_have_the_label_files_own_ids(tmp_path, monkeypatch):
    image, label = (
        tmp_path / "leftImg8bit/val/x/x_1_leftImg8bit.png",
        tmp_path / "gtFine/val/x/x_1_gtFine_labelIds.png",
    )
    for path, array in (
        (image, np.zeros((1, 3, 3), np.uint8)),
        (label, np.array([[7, 26, 33]], np.uint8)),
    ):
        path.parent.mkdir(parents=True)
        Image.fromarray(array).save(path)
    dataset = data.dataset("cityscapes", tmp_path, "val")
    truth = dataset[0][1]
    assert truth.tolist() == [[0, 13, 18]]
    evaluate.save_prediction(truth, dataset.palette, tmp_path / "p.png", dataset.raw_ids)
    saved = Image.open(tmp_path / "p.png")
    assert np.asarray(saved).tolist() == [[7, 26, 33]]
    assert np.asarray(saved.convert("RGB"))[0, 1].tolist() == [0, 0, 142]  # a car in its colour
    # the same by command, of the split and of photographs without labels
    net = evaluate.network("caa", 19, "resnet18", output_stride=32)
    settings = dict(
        method="caa",
        backbone="resnet18",
        output_stride=32,
        option={},
        dataset="cityscapes",
        data_root=str(tmp_path),
    )
    about = dict(classes=dataset.classes, palette=dataset.palette, raw_ids=dataset.raw_ids, step=1)
    torch.save(dict(net=net.state_dict(), settings=settings, **about), tmp_path / "net.pt")
    flags = [
        "--checkpoint",
        str(tmp_path / "net.pt"),
        "--device",
        "cpu",
        "--workers",
        "0",
        "--save-predictions",
    ]
    assert evaluate.main([*flags, str(tmp_path / "split")]) == 0
    flags = [flag for flag in flags if flag not in ("--workers", "0")]
    assert evaluate.main([*flags, str(tmp_path / "photos"), "--images", str(image)]) == 0
    with torch.no_grad():
        net = evaluate.load(evaluate.read_checkpoint(tmp_path / "net.pt"))
        prediction = net(data.normalise(dataset[0][0][None])).argmax(1)[0]
    expected = [[dataset.raw_ids[i] for i in row] for row in prediction.tolist()]
    assert min(min(row) for row in expected) >= 7
    for folder in ("split", "photos"):
        assert (
            np.asarray(Image.open(tmp_path / folder / "x_1_leftImg8bit.png")).tolist() == expected
        )
    assert (
        evaluate.main([*flags, str(image.parent), "--images", str(image)]) == 2
    )  # it would overwrite the photograph


class Two(torch.utils.data.Dataset):
    """Two images of random pixels and labels."""

    classes, palette, num_classes = ["a", "b", "c", "d"], [(i, i, i) for i in range(4)], 4

    def __init__(self, size=(30, 40)):
        torch.manual_seed(3)
        self.pairs = [
            (torch.randint(256, (3, *size)).byte(), torch.randint(4, size).byte()) for _ in range(2)
        ]

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return self.pairs[index]


def test_several_scales_are_measured_together_and_each_alone():
    torch.manual_seed(0)
    net, dataset, device = nn.Conv2d(3, 4, 5, padding=2), Two(), torch.device("cpu")
    how = dict(device=device, workers=0, flip=True)
    result = evaluate.evaluate(net, dataset, scales=(0.5, 1.0, 1.5), **how)
    for scale in (0.5, 1.0, 1.5):
        alone = evaluate.evaluate(net, dataset, scales=(scale,), **how)
        assert (
            result["mIoU_at_scale"][f"{scale:g}"] == alone["mIoU"] and "mIoU_at_scale" not in alone
        )
    assert len(set(result["mIoU_at_scale"].values())) == 3
    matrix = evaluate.ConfusionMatrix(4)
    for image, labels in dataset:
        images = data.normalise(image[None])
        prediction = evaluate.predict(net, images, (0.5, 1.0, 1.5), True).argmax(1)
        matrix.update(prediction, labels[None])
    assert result["mIoU"] == matrix.result()["mIoU"]
    assert "mIoU, scale 0.5 alone   0." in evaluate.table([result], dataset.classes)


def test_compared_by_hand():
    a = torch.zeros(8, 16, dtype=torch.long)
    b, c = a.clone(), a.clone()
    b[0, 0] = 1  # one pixel here
    b[4:6, 9:13] = 2  # and a whole window there
    c[5, 10] = 1
    difference, box = evaluate.compared([a, b, c])
    # of the three pairs, two disagree where b alone differs, three where b and c do, each otherwise
    assert difference[0, 0].item() == pytest.approx(2 / 3)
    assert difference[5, 10] == 1 and difference[7, 7] == 0
    assert box == (4, 9, 6, 13)  # rows 4, 5 and columns 9 to 12
    image, palette = torch.zeros(3, 8, 16, dtype=torch.uint8), [(0, 0, 0), (1, 2, 3), (4, 5, 6)]
    panels, found, text = evaluate.comparison({"a": a, "b": b, "c": c}, image, palette, truth=c)
    near = "where the predictions differ most, first of all within 3 pixels of the truth's borders."
    assert text == f"Enlarged: the outlined window, {near}"
    titles = ["image", "a", "b", "c", "truth"]
    enlarged = [f"{title}, enlarged" for title in titles]
    assert [panel.title for panel in panels] == [
        "a",
        "b",
        "c",
        "where the predictions differ",
        *enlarged,
    ]
    assert found == box
    tiles = {panel.title: panel.tile for panel in panels}
    assert tiles["b"][:, 0, 0].tolist() == [1, 2, 3]  # a label map in its colours
    assert (tiles["b, enlarged"] == torch.tensor([4, 5, 6])[:, None, None]).all()
    assert tiles["c, enlarged"][:, 1, 1].tolist() == [1, 2, 3]
    assert tiles["c, enlarged"].shape == (3, 2, 4) and not tiles["a, enlarged"].any()
    share = tiles["where the predictions differ"].sum(0)
    assert share[5, 10] > share[0, 0] > share[7, 7]  # as heat
    assert all(panel.boxes == (box,) for panel in panels[:4]) and not panels[4].boxes


def test_what_is_compared_is_where_most_differs_near_borders_of_the_truth():
    truth = torch.zeros(32, 32, dtype=torch.uint8)
    truth[26:28, 26:28] = 1  # a thin thing
    a, b = torch.zeros(2, 32, 32, dtype=torch.long)
    b[2:18, 2:18] = 2  # a large difference, within a class
    b[26:28, 26:28] = 1
    assert evaluate.compared([a, b])[1] == (2, 2, 10, 10)
    top, left, bottom, right = evaluate.compared([a, b], truth)[1]
    assert top <= 26 and 28 <= bottom and left <= 26 and 28 <= right
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    for known, box in ((truth, (top, left, bottom, right)), (None, (2, 2, 10, 10))):
        assert evaluate.comparison({"a": a, "b": b}, image, [(0, 0, 0)] * 3, known)[1] == box
    b[20:32, 20:32] = 0  # nothing differs there: as without the truth
    assert evaluate.compared([a, b], truth)[1] == (2, 2, 10, 10)
    truth[26:28, 26:28] = 255  # no border, since only one class is known
    b[26, 26] = 1
    assert evaluate.compared([a, b], truth)[1] == (2, 2, 10, 10)


def test_a_matrix_with_losses_begins_at_its_lowest_and_has_its_own_rows():
    values = torch.tensor([[-0.5, 1.5, math.nan]])
    picture = evaluate.draw_matrix(values, ["a", "b", "c"], "title", ["row"], cell=20, margin=40)
    found = [picture.getpixel((8 + x, 8 + 17 + 50)) for x in (50, 70, 90)]
    assert found == [(10, 10, 60), (255, 255, 140), (200, 200, 200)]


def test_zero_is_marked_on_the_bar_of_a_matrix_that_has_it_inside(monkeypatch):
    seen = []
    monkeypatch.setattr(data, "sheet", lambda panels, *rest, **kwargs: seen.extend(panels))
    for values in ([-0.5, 1.5], [0.25, 1.0], [-2.0, -1.0]):
        evaluate.draw_matrix(torch.tensor([values]), ["a", "b"], "title", ["row"])
    assert [panel.mark for panel in seen] == [(0.25, "0"), (), ()]
    assert [panel.scale for panel in seen] == [("-0.5", "1.5"), ("0", "1"), ("-2", "-1")]


def test_a_high_matrix_is_not_made_smaller(monkeypatch):
    seen = []
    monkeypatch.setattr(data, "sheet", lambda panels, *rest, width: seen.append((panels, width)))
    evaluate.draw_matrix(torch.rand(150, 1), ["a"], "title", [f"class {i}" for i in range(150)])
    ((panel,), width) = seen[0]
    assert panel.tile.shape[2] == width and panel.tile.shape[1] <= 2 * width


class Analysed(Constant):
    """A network that measures something of its own."""

    def analyse(self, pairs):
        seen = [tuple(images.shape) for images, labels in pairs]
        assert seen == [(1, 3, 30, 40)] * 2
        several = torch.tensor([[0.5, math.nan], [-0.25, 1.0]])
        return {"one: a number": 0.25, "two: a matrix | x, y | u, v": several}


def test_analyse_prints_keeps_and_draws_what_a_network_measures(tmp_path, capsys):
    args = evaluate.arguments(["--checkpoint", "x.pt", "--analyse", "--figures", str(tmp_path)])
    args.workers = 0
    found = evaluate.analyse(Analysed(4).eval(), Two(), torch.device("cpu"), args)
    assert found["one"] == 0.25 and found["two"][1] == [-0.25, 1.0]
    assert 0 <= found["class dependency"] <= 1
    assert torch.tensor(found["class dependency of pairs"]).shape == (4, 4)
    lines = capsys.readouterr().out.splitlines()
    assert "0.250  one: a number" in lines
    table = lines[lines.index("two: a matrix") + 1 :]
    assert [line.split() for line in table[:3]] == [["u", "v"], ["x", "0.500", "–"],
                                                    ["y", "-0.250", "1.000"]]  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "class_dependency_of_pairs.png",
        "two.png",
    ]
    json.dumps(evaluate.without_nan(found), allow_nan=False)


def test_analyse_by_command(trained, tmp_path, capsys):
    _, checkpoint, _ = trained
    flags = ["--checkpoint", checkpoint, "--device", "cpu", "--workers", "0", "--analyse"]
    assert evaluate.main([*flags, "--json", str(tmp_path / "n.json")]) == 0
    found = json.loads((tmp_path / "n.json").read_text())["analysis"]
    assert f"{found['class dependency']:.3f}  class dependency: " in capsys.readouterr().out


class Regularized(Constant):
    """What CAR acts on is not what enters the classifier."""

    regularized = "last"

    def __init__(self):
        super().__init__(4)
        self.last = nn.ReLU()

    def forward(self, images):
        return self.classifier(self.last(images - 0.2))


def test_class_dependency_is_also_measured_where_car_acts(capsys, monkeypatch):
    args = evaluate.arguments(["--checkpoint", "x.pt", "--analyse"])
    args.workers, net = 0, Regularized().eval()
    found = evaluate.analyse(net, Two(), torch.device("cpu"), args)
    names = ["class dependency", "class dependency of pairs"]
    assert list(found) == [name + where for where in ("", " at the place of CAR") for name in names]
    for layer, name in (("classifier", names[1]), ("last", names[1] + " at the place of CAR")):
        pairs = evaluate.read_all(Two(), torch.device("cpu"), 0, "again")
        expected = evaluate.class_dependency(net, pairs, 4, layer)
        assert found[name] == expected.tolist()
        mean = expected[~torch.eye(4, dtype=torch.bool)].mean().item()
        assert found[name.replace(" of pairs", "")] == pytest.approx(mean)
    assert found[names[1]] != found[names[1] + " at the place of CAR"]
    lines = capsys.readouterr().out.splitlines()
    assert sum("class dependency at the place of CAR: how alike" in line for line in lines) == 1
    net.regularized, passes, measure = "classifier", [], evaluate.class_dependency
    count = lambda *given: passes.append(given) or measure(*given)  # noqa: E731
    monkeypatch.setattr(evaluate, "class_dependency", count)
    assert list(evaluate.analyse(net, Two(), torch.device("cpu"), args)) == names
    assert len(passes) == 1


class Many(Two):
    """Eight classes, which are too many for a row of text."""

    classes, num_classes = list("abcdefgh"), 8
    palette = [(i, i, i) for i in range(8)]


class Row(nn.Module):
    """A network that measures a number that is not known, and some for each class."""

    def analyse(self, pairs):
        values = torch.arange(8.0) / 8
        values[1] = math.nan
        table = torch.stack([values, values + 1])
        return {"none: no class": math.nan, "own: of each class | probability": values[None],
                "two: of each class | x, y": table, "other: square": torch.eye(8),
                "high: of each class | a, b, c, d, e, f, g, h | u": values[:, None]}  # fmt: skip


def test_what_is_unknown_and_what_is_of_each_class_is_printed_readably(tmp_path, capsys):
    args = evaluate.arguments(["--checkpoint", "x.pt", "--analyse", "--figures", str(tmp_path)])
    args.workers = 0
    found = evaluate.analyse(Row(), Many(), torch.device("cpu"), args)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["–", "none:", "no", "class"]

    def after(title, count):
        start = lines.index(title) + 1
        return [line.split() for line in lines[start : start + count]]

    own = after("own: of each class", 9)
    assert own[:3] == [["probability"], ["a", "0.000"], ["b", "–"]] and own[8] == ["h", "0.875"]
    two = after("two: of each class", 9)
    assert two[:2] == [["x", "y"], ["a", "0.000", "1.000"]] and two[8] == ["h", "0.875", "1.875"]
    assert after("high: of each class", 2) == [["u"], ["a", "0.000"]]
    assert "other: square" not in lines and f"other: {tmp_path / 'other.png'}" in lines
    columns = [
        line.rindex("0.875") for line in lines if line.startswith("h ") and "1.8" not in line
    ]
    assert len(columns) == 2 and len(set(columns)) == 1
    text = json.dumps(evaluate.without_nan(found), allow_nan=False)
    assert json.loads(text)["own"][0][:3] == [0.0, None, 0.25] and json.loads(text)["none"] is None
    files = {"own.png", "two.png", "other.png", "high.png"}
    assert {path.name for path in tmp_path.iterdir()} == files


def test_the_map_of_class_dependency_says_how_to_read_it(tmp_path, monkeypatch):
    args = evaluate.arguments(["--checkpoint", "x.pt", "--analyse", "--figures", str(tmp_path)])
    args.workers, titles = 0, []
    picture = Image.new("RGB", (4, 4))
    monkeypatch.setattr(evaluate, "draw_matrix", lambda *given: titles.append(given[2]) or picture)
    evaluate.analyse(Regularized().eval(), Two(), torch.device("cpu"), args)
    assert len(titles) == 2
    end = "each row over its largest. Bright squares off the diagonal are classes that are alike."
    assert all(title.endswith(end) for title in titles)
    names = ["class_dependency_of_pairs.png", "class_dependency_of_pairs_at_the_place_of_CAR.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_miou_over_scale_is_drawn(trained, tmp_path, capsys, monkeypatch):
    _, checkpoint, _ = trained
    flags = ["--checkpoint", checkpoint, "--device", "cpu", "--workers", "0"]
    seen, draw = [], data.chart
    monkeypatch.setattr(data, "chart", lambda *given: seen.append(given) or draw(*given))
    numbers, figures = tmp_path / "n.json", tmp_path / "f"
    flags += ["--figures", str(figures), "--json", str(numbers)]
    assert evaluate.main([*flags, "--scales", "1", "0.5", "1.5"]) == 0
    out = capsys.readouterr().out
    assert f"mIoU over scale: {figures / 'scales.png'}" in out and "mIoU, scale 0.5 alone" in out
    alone = json.loads(numbers.read_text())["mIoU_at_scale"]
    points = [(0.5, alone["0.5"]), (1.0, alone["1"]), (1.5, alone["1.5"])]
    assert [(series, axis) for _, series, axis in seen] == [({"mIoU": points}, "scale")]
    assert Image.open(figures / "scales.png").size == (480, 340)
    assert evaluate.main(flags) == 0
    assert "alone" not in capsys.readouterr().out and len(seen) == 1


def test_fig_4_5_class_dependency_by_hand():
    # A 1x1 classifier on images of 1x3 pixels: what enters it are the images. Class 0 has the mean
    # (2, 0), class 1 (1, 1), class 2 (-1, 0); class 3 does not occur.
    net = nn.Sequential()
    net.classifier = nn.Conv2d(2, 4, 1)
    first = torch.tensor([[[1.0, 3.0, 1.0]], [[0.0, 0.0, 1.0]]])[None]
    second = torch.tensor([[[-1.0, 9.0, -1.0]], [[0.0, 9.0, 0.0]]])[None]
    pairs = [(first, torch.tensor([[[0, 0, 1]]])), (second, torch.tensor([[[2, 255, 2]]]))]
    found = evaluate.class_dependency(net.eval(), pairs, 4)
    products = [[4, 2, 0, 0], [2, 2, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]  # below 0: 0
    expected = [[v / max(max(row), 1) for v in row] for row in products]
    assert found.tolist() == expected


def test_what_is_no_number_is_none_in_json():
    numbers = {"a": math.nan, "b": [1, math.inf], "c": (0.1, {"d": -math.inf})}
    assert evaluate.without_nan(numbers) == {"a": None, "b": [1, None], "c": [0.1, {"d": None}]}


def test_absent_classes_do_not_count_in_the_mean_dependency(monkeypatch, tmp_path):
    # Of four classes two occur; they are half alike in both rows.
    matrix = torch.zeros(4, 4, dtype=torch.float64)
    matrix[0, 0] = matrix[2, 2] = 1
    matrix[0, 2], matrix[2, 0] = 0.5, 0.25
    monkeypatch.setattr(evaluate, "class_dependency", lambda *arguments: matrix)
    args = evaluate.arguments(["--checkpoint", "x.pt", "--analyse"])
    found = evaluate.analyse(Constant(4), Two(), torch.device("cpu"), args)
    assert found["class dependency"] == 0.375


def test_class_dependency_leaves_no_hook_behind():
    net = Constant(4)
    with pytest.raises(RuntimeError):
        evaluate.class_dependency(net, [(torch.zeros(1, 7, 2, 2), torch.zeros(1, 2, 2))], 4)
    assert not net.classifier._forward_pre_hooks


def test_a_runs_record_long_names_and_a_root_for_shapes_are_refused(trained, tmp_path, capsys):
    _, checkpoint, _ = trained
    photo = tmp_path / f"{'b' * 245}.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(photo)
    line = mistake(capsys, "--checkpoint", checkpoint, "--images", str(photo))
    assert "File name too long" in line
    line = mistake(capsys, "--checkpoint", checkpoint, "--json", str(tmp_path / "config.json"))
    assert "expected a file that ends in .json, no run's record" in line
    flags = ["--dataset", "shapes", "--data-root", str(tmp_path)]
    line = mistake(capsys, "--checkpoint", checkpoint, *flags)
    assert "--data-root has no effect here" in line


def test_json_is_written_whole_or_not_at_all(trained, tmp_path, capsys, monkeypatch):
    _, checkpoint, _ = trained
    file = tmp_path / "n.json"
    flags = ["--checkpoint", checkpoint, "--workers", "0", "--json", str(file)]
    assert "camvid val not found" in mistake(capsys, *flags, "--dataset", "camvid")
    assert not list(tmp_path.iterdir())
    file.write_text("of an earlier call")
    monkeypatch.setattr(evaluate, "evaluate", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate.main([*flags, "--device", "cpu"])
    assert file.read_text() == "of an earlier call" and len(list(tmp_path.iterdir())) == 1


def test_the_chosen_gpu_is_the_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert evaluate.processes("cuda:1") == (torch.device("cuda:1"), 0, 1)
    assert evaluate.processes() == (torch.device("cuda:0"), 0, 1)
    assert current == [1, 0]
    with pytest.raises(UserError, match="no GPU 2: there are 2; change --device"):
        evaluate.processes("cuda:2")
