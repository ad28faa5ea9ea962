import colorsys
import hashlib
import http.server
import io
import shutil
import struct
import subprocess
import sys
import threading
import types
import unicodedata
import warnings
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageCms
from torch.utils.data import DataLoader, default_collate
from torchvision.datasets import Cityscapes
from torchvision.transforms.v2 import functional as TF

import data

pytestmark = pytest.mark.system

# ------------------------------------------------------------------------------------------ helpers


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(path)
    return path


def photo(height=4, width=6, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def camvid(root, label, image=None):
    label = np.asarray(label, np.uint8)
    save(root / "train/a.png", photo(*label.shape) if image is None else image)
    save(root / "trainannot/a.png", label)
    return data.dataset("camvid", root, "train")


def folder(root, label, image=None, classes="one\ntwo\nthree\n", split="train"):
    if not isinstance(label, Image.Image):
        label = Image.fromarray(np.asarray(label, np.uint8))
    save(
        root / "images" / split / "a.png",
        photo(label.height, label.width) if image is None else image,
    )
    save(root / "labels" / split / "a.png", label)
    (root / "classes.txt").write_text(classes)
    return data.dataset("folder", root, split)


def mistake(call, *parts):
    """`call` is a UserError of one line that holds all `parts`."""
    with pytest.raises(data.UserError) as caught:
        call()
    text = str(caught.value)
    assert text and "\n" not in text
    for part in parts:
        assert str(part) in text


def tensors(image, label):
    """Two uint8 tensors: what `augment` takes."""
    return torch.as_tensor(image).to(torch.uint8), torch.as_tensor(label).to(torch.uint8)


def ramp(height, width):
    """An image whose first channel is the column and whose second is the row of each pixel."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([columns, rows, torch.zeros_like(rows)]).to(torch.uint8)


def blocks(height=96, width=96, side=24):
    return (
        torch.arange(16)
        .view(4, 4)
        .repeat_interleave(side, 0)
        .repeat_interleave(side, 1)[:height, :width]
        .to(torch.uint8)
    )


# -------------------------------------------------------------------------------------------- files


def test_camvid_keeps_0_to_10_and_ignores_11_and_255(tmp_path):
    raw = [[0, 1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 255, 0]]
    image, label = camvid(tmp_path, raw)[0]
    assert label.tolist() == [[0, 1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 255, 255, 0]]
    assert label.dtype == image.dtype == torch.uint8 and image.shape == (3, 2, 7)
    assert type(image) is type(label) is torch.Tensor


@pytest.mark.parametrize("wrong", [12, 13, 100, 254])
def test_camvid_rejects_12_to_254_naming_file_and_id(tmp_path, wrong):
    dataset = camvid(tmp_path, [[0, wrong], [3, 11]])
    mistake(lambda: dataset[0], tmp_path / "trainannot/a.png", f"[{wrong}]", "0-11, 255")


def test_camvid_has_eleven_classes_in_its_order_with_its_colors(tmp_path):
    dataset = camvid(tmp_path, [[0]])
    names = "sky building pole road pavement tree sign fence car pedestrian bicyclist"
    assert dataset.classes == names.split()
    assert dataset.num_classes == len(dataset.palette) == 11
    assert dataset.palette[0] == (128, 128, 128) and dataset.palette[3] == (128, 64, 128)
    assert dataset.palette[10] == (0, 128, 192)


def test_folder_keeps_its_ids_and_255(tmp_path):
    dataset = folder(tmp_path, [[0, 1, 2, 255]])
    assert dataset[0][1].tolist() == [[0, 1, 2, 255]]
    assert dataset.classes == ["one", "two", "three"] and dataset.num_classes == 3


@pytest.mark.parametrize("wrong", [3, 4, 254])
def test_folder_rejects_ids_from_the_number_of_classes_naming_the_file(tmp_path, wrong):
    dataset = folder(tmp_path, [[0, wrong, 255]])
    mistake(lambda: dataset[0], tmp_path / "labels/train/a.png", f"[{wrong}]", "0-2, 255")


def test_folder_palette_has_another_color_for_each_class(tmp_path):
    dataset = folder(tmp_path, [[0]], classes="".join(f"c{i}\n" for i in range(60)))
    assert len(set(dataset.palette)) == 60 and (0, 0, 0) not in dataset.palette
    assert all(isinstance(c, int) and 0 <= c <= 255 for color in dataset.palette for c in color)


def test_palette_label_keeps_its_ids_whatever_its_colors(tmp_path):
    label = Image.fromarray(np.array([[0, 2, 1, 255]], np.uint8)).convert("P")
    label.putdata([0, 2, 1, 255])
    label.putpalette([200, 100, 50] * 256)
    assert label.mode == "P"
    assert folder(tmp_path, label)[0][1].tolist() == [[0, 2, 1, 255]]


def test_one_bit_label_is_0_and_1(tmp_path):
    label = Image.new("1", (3, 1))
    label.putpixel((1, 0), 1)
    dataset = folder(tmp_path, label)
    assert Image.open(tmp_path / "labels/train/a.png").mode == "1"
    assert dataset[0][1].tolist() == [[0, 1, 0]]


@pytest.mark.parametrize("mode", ["RGB", "LA", "I;16"])
def test_label_that_is_not_one_8_bit_channel_is_a_mistake(tmp_path, mode):
    dataset = folder(tmp_path, Image.new(mode, (3, 2)))
    mistake(lambda: dataset[0], tmp_path / "labels/train/a.png", "not a label map", "mode P or L")


def test_label_of_another_size_is_a_mistake_giving_both(tmp_path):
    dataset = camvid(tmp_path, np.zeros((4, 6)), photo(4, 7))
    mistake(
        lambda: dataset[0], tmp_path / "trainannot/a.png", "6x4", tmp_path / "train/a.png", "7x4"
    )


def test_label_of_the_transposed_size_is_a_mistake(tmp_path):
    dataset = camvid(tmp_path, np.zeros((4, 6)), photo(6, 4))
    mistake(lambda: dataset[0], "6x4", "4x6")


@pytest.mark.parametrize("side", ["train", "trainannot"])
@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_broken_file_is_a_mistake_naming_it(tmp_path, side, damage):
    noise = np.random.default_rng(0).integers(0, 11, (40, 40), np.uint8)
    dataset = camvid(tmp_path, noise)
    path = tmp_path / side / "a.png"
    content = path.read_bytes()
    path.write_bytes(
        {"truncated": content[: len(content) // 2], "text": b"not an\nimage\n", "empty": b""}[
            damage
        ]
    )
    mistake(lambda: dataset[0], path, "cannot be read as an image")


def test_file_that_vanished_is_a_mistake_naming_it(tmp_path):
    dataset = camvid(tmp_path, [[0]])
    (tmp_path / "train/a.png").unlink()
    mistake(lambda: dataset[0], "no file", tmp_path / "train/a.png")


def test_missing_folder_is_a_mistake_naming_it(tmp_path):
    mistake(lambda: data.dataset("camvid", tmp_path, "train"), tmp_path / "train", "not there")
    save(tmp_path / "train/a.png", photo())
    mistake(lambda: data.dataset("camvid", tmp_path, "train"), tmp_path / "trainannot", "not there")


def test_empty_folder_is_a_mistake_naming_it(tmp_path):
    save(tmp_path / "trainannot/a.png", np.zeros((2, 2), np.uint8))
    (tmp_path / "train").mkdir()
    mistake(
        lambda: data.dataset("camvid", tmp_path, "train"), tmp_path / "train", "nothing of it there"
    )


@pytest.mark.parametrize("alone", ["images/train", "labels/train"])
def test_file_without_partner_is_a_mistake_naming_its_label(tmp_path, alone):
    folder(tmp_path, [[0]])
    save(tmp_path / alone / "lonely.png", np.zeros((2, 2), np.uint8))
    mistake(
        lambda: data.dataset("folder", tmp_path, "train"),
        tmp_path / "labels/train/lonely.png",
        "partner",
    )


def test_in_a_benchmark_an_image_without_label_is_left_out_with_a_warning(tmp_path, capsys):
    camvid(tmp_path, [[0]])
    save(tmp_path / "train/lonely.png", photo())
    save(
        tmp_path / "trainannot/other_labelTrainIds.png", np.zeros((2, 2), np.uint8)
    )  # of no image: no matter
    capsys.readouterr()
    dataset = data.dataset("camvid", tmp_path, "train")
    assert [dataset.name(i) for i in range(len(dataset))] == ["a"]
    err = capsys.readouterr().err
    assert (
        f"has 1 of 367 images; the first that is missing: {tmp_path / 'trainannot/lonely.png'}"
        in err
    )


def test_pairs_are_matched_by_name_and_sorted(tmp_path):
    for i, stem in enumerate(["b", "c", "a"]):
        save(tmp_path / f"images/val/{stem}.jpg", np.full((8, 8, 3), 60 * i, np.uint8))
        save(tmp_path / f"labels/val/{stem}.png", np.full((8, 8), i, np.uint8))
    (tmp_path / "images/val/notes.txt").write_text("no image")
    (tmp_path / "classes.txt").write_text("x\ny\nz\n")
    dataset = data.dataset("folder", tmp_path, "val")
    assert [dataset.name(i) for i in range(len(dataset))] == ["a", "b", "c"]
    for i in range(3):
        image, label = dataset.raw(i)
        assert abs(int(image[0, 0, 0]) - 60 * int(label[0, 0])) <= 2


def test_unknown_names_are_mistakes_that_list_the_known(tmp_path):
    mistake(lambda: data.dataset("imagenet", tmp_path), "'imagenet'", "shapes", "camvid", "folder")
    mistake(lambda: data.dataset("camvid+scale", tmp_path), "'camvid+scale'", "camvid")
    mistake(lambda: data.dataset("camvid", tmp_path, "val2"), "'val2'", "train, val, test")
    mistake(lambda: data.dataset("shapes", split="test"), "'test'", ", ".join(data.Shapes.SPLITS))
    mistake(lambda: data.dataset("shapes+thick"), "'thick'", "scale, company, unity, thin")
    mistake(
        lambda: data.dataset("shapes", color="sepia"), "'sepia'", "none, brightness, photometric"
    )


def test_unknown_folder_split_is_a_mistake_naming_where_it_looked(tmp_path):
    folder(tmp_path, [[0]])
    mistake(
        lambda: data.dataset("folder", tmp_path, "test"), tmp_path / "images" / "test", "not there"
    )


@pytest.mark.parametrize("name", ["camvid", "folder"])
def test_no_root_is_a_mistake(name):
    mistake(lambda: data.dataset(name), name, "--data-root")


def test_missing_or_empty_or_overfull_classes_txt_is_a_mistake(tmp_path):
    mistake(lambda: data.dataset("folder", tmp_path), tmp_path / "classes.txt")
    mistake(lambda: folder(tmp_path, [[0]], classes="\n \n"), tmp_path / "classes.txt", "': 0;")
    mistake(
        lambda: folder(tmp_path, [[0]], classes="".join(f"c{i}\n" for i in range(255))),
        tmp_path / "classes.txt",
        "': 255; expected 2 to 254",
    )
    assert (
        folder(tmp_path, [[0]], classes="".join(f"c{i}\n" for i in range(254))).num_classes == 254
    )


# ------------------------------------------------------------------------------------------- images


def test_gray_image_becomes_three_equal_channels(tmp_path):
    gray = photo()[..., 0]
    image, _ = camvid(tmp_path, np.zeros(gray.shape), gray).raw(0)
    assert image.shape == (3, 4, 6) and image.dtype == torch.uint8
    for channel in image:
        assert np.array_equal(channel, gray)


def test_images_keep_the_order_of_rows_and_channels(tmp_path):
    array = photo()
    image, _ = camvid(tmp_path, np.zeros((4, 6)), array).raw(0)
    assert np.array_equal(image.permute(1, 2, 0), array)


def test_normalisation_takes_off_imagenets_mean_and_deviation(tmp_path):
    image, _ = camvid(tmp_path, [[0]], np.array([[[255, 0, 51]]], np.uint8))[0]
    image = data.normalise(image)
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    assert image.flatten().tolist() == pytest.approx(expected, rel=1e-5)


def test_normalise_keeps_batches_their_device_and_their_layout():
    images = torch.randint(256, (2, 3, 4, 5), dtype=torch.uint8)
    images = images.to(memory_format=torch.channels_last)
    found = data.normalise(images)
    assert found.dtype == torch.float32 and found.is_contiguous(memory_format=torch.channels_last)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (data.MEAN, data.STD))
    assert torch.allclose(found, (images.float() / 255 - mean) / std, atol=1e-6)
    back = ((found * std + mean) * 255).round()
    assert torch.equal(back, images.float())


# ------------------------------------------------------------------------------------- augmentation


def window(size, crop_size, scale, scale_step=0.0):
    """[(start, length in the image, length in the crop) of rows, the same of columns]"""
    slices, new_size = data.random_window(size, crop_size, scale, scale_step)
    return [(s.start, s.stop - s.start, new) for s, new in zip(slices, new_size)]


@pytest.mark.parametrize(
    "size", [(40, 50), (120, 90), (33, 47), (1, 60), (60, 1), (1, 1), (32, 32)]
)
@pytest.mark.parametrize("crop", [32, 33])
def test_every_crop_is_full_and_padded_right_and_below_with_the_mean_and_255(size, crop):
    for seed in range(8):
        torch.manual_seed(seed)
        sample = tensors(torch.full((3, *size), 200), np.ones(size))
        image, label = data.augment(*sample, crop_size=crop)
        assert image.shape == (3, crop, crop) and image.dtype == torch.uint8
        assert label.shape == (crop, crop) and label.dtype == torch.uint8
        assert label.is_contiguous() and image.permute(1, 2, 0).is_contiguous()
        height, width = (label[:, 0] != 255).sum(), (label[0] != 255).sum()
        assert height > 0 and width > 0
        assert (label[:height, :width] == 1).all()
        assert (label[height:] == 255).all() and (label[:, width:] == 255).all()
        padding = label == 255
        assert (image[:, ~padding] == 200).all()
        assert (image[:, padding].T == torch.tensor([124, 116, 104])).all()
        assert padding.any() or 2 * min(size) >= crop


def test_padding_is_zero_after_normalising_to_a_hundredth():
    color = torch.tensor(data.MEAN_COLOR, dtype=torch.uint8).view(1, 3, 1, 1)
    assert data.normalise(color).abs().max() < 0.01


def test_image_at_least_as_large_as_the_largest_window_is_never_padded():
    for seed in range(50):
        torch.manual_seed(seed)
        sample = tensors(torch.zeros(3, 64, 65), np.zeros((64, 65)))
        _, label = data.augment(*sample, crop_size=32, scale=(0.5, 2.0))
        assert (label == 0).all()


def test_a_padded_side_has_the_scaled_length():
    torch.manual_seed(0)
    sample = tensors(torch.zeros(3, 20, 30), np.zeros((20, 30)))
    _, label = data.augment(*sample, crop_size=64, scale=(1.5, 1.5))
    assert ((label[:, 0] == 0).sum(), (label[0] == 0).sum()) == (30, 45)


def test_base_size_is_the_longer_side_at_scale_1():
    # 200x100, scale 1.5: without it 300x150, with 50 75x38, with 800 1200x600
    for base, sides in ((None, (300, 150)), (50, (75, 38)), (800, (1200, 600))):
        whole = data.random_window((200, 100), (2000, 2000), (1.5, 1.5), 0.0, base)
        assert whole == ((slice(0, 200), slice(0, 100)), list(sides))
    cut = data.random_window((200, 100), (32, 32), (1.5, 1.5), 0.0, 50)  # 32 / 1.5 · 200 / 50
    assert [s.stop - s.start for s in cut[0]] == [85, 85] and cut[1] == [32, 32]
    small = data.dataset("shapes", train=True, crop_size=96, scale=(1.0, 1.0), base_size=24)
    assert (small[0][1] != 255).sum() == 24 * 24


@pytest.mark.parametrize("axis", [0, 1], ids=["columns", "rows"])
@pytest.mark.parametrize("size", [(200, 240), (70, 90)], ids=["cut", "padded"])
def test_image_and_label_stay_aligned_through_scale_crop_and_flip(axis, size):
    # Image and label both hold the pixel's own coordinate, so wherever a pixel goes, they agree to
    # half a pixel. The third channel counts down: half the difference is the place, whatever the
    # rounding of gray levels (torch 2.6 rounds down).
    image = ramp(*size)
    image[2] = 255 - image[axis]
    flips, total, gaps = 0, 40, []
    for seed in range(total):
        torch.manual_seed(seed)
        new_image, new_label = data.augment(*tensors(image, image[axis]), crop_size=96)
        seen = new_label != 255
        height, width = seen[:, 0].sum(), seen[0].sum()
        # At its rim, resizing repeats the outermost pixels.
        inner = slice(4, height - 4), slice(4, width - 4)
        up, down = new_image[[axis, 2]].double()
        gap = ((up + 255 - down) / 2 - new_label)[inner]
        assert gap.abs().max() <= 1
        gaps.append(gap.mean().abs())  # up to 0.5: at half the size a place is between two labels
        flips += bool(new_image[0, 5, 5] > new_image[0, 5, width - 5])
    assert 0.25 * total < flips < 0.75 * total
    assert max(gaps) < 0.6 and sum(gaps) / total < 0.1


def test_blocks_of_color_and_of_label_agree_away_from_borders():
    label = blocks()
    generator = torch.Generator().manual_seed(0)
    colors = torch.randint(0, 256, (16, 3), generator=generator, dtype=torch.uint8)
    image = colors[label.long()].permute(2, 0, 1)
    compared = 0
    for seed in range(12):
        torch.manual_seed(seed)
        new_image, new_label = data.augment(*tensors(image, label), crop_size=64)
        distance = (new_image[:, None].int() - colors.int().T[:, :, None, None]).abs().sum(0)
        windows = new_label.unfold(0, 5, 1).unfold(1, 5, 1).flatten(2).int()
        inner = (windows.amax(-1) == windows.amin(-1)) & (windows[..., 0] != 255)
        nearest = distance.argmin(0)[2:-2, 2:-2]
        assert torch.equal(nearest[inner], new_label[2:-2, 2:-2][inner].long())
        compared += inner.sum()
    assert compared > 12 * 500


@pytest.mark.parametrize("color", data.COLORS)
def test_ids_after_augmentation_are_original_ids_and_255(color):
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([0, 3, 9, 200])
    label = ids[torch.randint(4, (50, 60), generator=generator)]
    image = torch.randint(256, (3, 50, 60), generator=generator)
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        new_label = data.augment(*tensors(image, label), crop_size=48, color=color)[1]
        seen |= set(new_label.unique().tolist())
    assert seen == {0, 3, 9, 200, 255}


def test_the_label_is_padded_with_255_after_the_look_up():
    torch.manual_seed(0)
    image, label = tensors(torch.zeros(3, 100, 20), np.full((100, 20), 8))
    _, label = data.augment(image, label, crop_size=32, scale=(1.0, 1.0))
    assert (label[:, :20] == 8).all() and (label[:, 20:] == 255).all()


def test_scale_step_gives_only_the_factors_of_the_grid_and_all_of_them():
    torch.manual_seed(0)
    factors = set()
    for _ in range(200):
        rows, columns = window((5000, 5000), (1000, 1000), (0.5, 2.0), 0.25)
        factors |= {round(new / source, 2) for _, source, new in (rows, columns)}
        assert rows[1] == columns[1]  # one factor for both sides
    assert sorted(factors) == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]


def test_factors_without_a_grid_fill_the_range_evenly():
    torch.manual_seed(0)
    rows = [window((50000, 50000), (10000, 10000), (0.5, 2.0))[0] for _ in range(600)]
    factors = sorted(new / source for _, source, new in rows)
    assert 0.499 < factors[0] < 0.53 and 1.97 < factors[-1] < 2.001
    assert factors[300] == pytest.approx(1.25, abs=0.12)
    assert len({round(f, 3) for f in factors}) > 300


def test_factors_of_a_small_image_are_in_the_range_too():
    torch.manual_seed(0)
    size = (1000, 1)
    factors = [window(size, (10000, 10000), (0.5, 2.0))[0][2] / 1000 for _ in range(200)]
    assert 0.5 <= min(factors) < 0.55 and 1.95 < max(factors) <= 2


def test_windows_lie_inside_and_reach_both_ends():
    torch.manual_seed(0)
    found = [window((12, 10), (8, 8), (1.0, 1.0)) for _ in range(200)]
    assert {rows for rows, _ in found} == {(top, 8, 8) for top in range(5)}
    assert {columns for _, columns in found} == {(left, 8, 8) for left in range(3)}


def test_at_factor_1_the_crop_is_a_cut_of_the_image():
    generator = torch.Generator().manual_seed(0)
    image, label = tensors(torch.randint(256, (3, 30, 40), generator=generator), ramp(30, 40)[0])
    flips = 0
    for seed in range(8):
        torch.manual_seed(seed)
        (top, *_), (left, *_) = window((30, 40), (16, 16), (1.0, 1.0))
        torch.manual_seed(seed)
        new_image, new_label = data.augment(image, label, crop_size=16, scale=(1.0, 1.0))
        if new_label[0, 0] > new_label[0, 1]:
            flips, new_image, new_label = flips + 1, new_image.flip(2), new_label.flip(1)
        assert torch.equal(new_image, image[:, top : top + 16, left : left + 16])
        assert np.array_equal(new_label, label[top : top + 16, left : left + 16])
    assert 0 < flips < 8


def test_crops_can_be_wider_than_high():
    rows, columns = window((30, 90), (8, 16), (1.0, 1.0))
    assert rows[1:] == (8, 8) and columns[1:] == (16, 16)
    # wider than the images: filled up
    image, label = data.dataset("shapes", train=True, crop_size=(48, 130), scale=(1.0, 1.0))[0]
    assert image.shape == (3, 48, 130) and label.shape == (48, 130) and (label[:, -1] == 255).any()


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_cutting_first_equals_resizing_the_whole_image_first(factor):
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(256, (3, 8, 8), generator=generator).to(torch.uint8)
    image, label = tensors(TF.resize(small, [100, 120]), blocks(100, 120, 30))
    height, width = int(100 * factor), int(120 * factor)
    whole = TF.resize(image, [height, width], antialias=True)
    rows, columns = (((np.arange(n) + 0.5) / factor).astype(int) for n in (height, width))
    whole_label = label[rows][:, columns]
    compared = flips = 0
    for seed in range(16):
        torch.manual_seed(seed)
        (top, *_), (left, *_) = window((100, 120), (32, 32), (factor, factor))
        if (top * factor) % 1 or (left * factor) % 1:
            continue  # such a window begins between two pixels of the resized image
        torch.manual_seed(seed)
        new_image, new_label = data.augment(image, label, crop_size=32, scale=(factor, factor))
        y, x = int(top * factor), int(left * factor)
        expected, expected_label = (
            whole[:, y : y + 32, x : x + 32],
            whole_label[y : y + 32, x : x + 32],
        )
        difference = (new_image.int() - expected.int())[:, 2:-2, 2:-2].abs().max()
        flipped = (new_image.int() - expected.flip(2).int())[:, 2:-2, 2:-2].abs().max()
        assert min(difference, flipped) <= 1
        if flipped < difference:
            flips, expected_label = flips + 1, expected_label.flip(1)
        assert torch.equal(new_label, expected_label)
        compared += 1
    assert compared >= 2 and flips < compared


@pytest.mark.parametrize("color", data.COLORS)
def test_color_changes_the_image_only(color):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(20, 230, (3, 24, 24), generator=generator)
    image, label = tensors(image, ramp(24, 24)[0])
    changed = 0
    for seed in range(24):
        torch.manual_seed(seed)
        new_image, new_label = data.augment(
            image, label, crop_size=24, scale=(1.0, 1.0), color=color
        )
        if not np.array_equal(new_label, label):
            new_image, new_label = new_image.flip(2), new_label.flip(1)
        assert np.array_equal(new_label, label)
        difference = new_image.int() - image.int()
        changed += bool(difference.any())
        if color == "brightness":
            assert difference.unique().numel() == 1
    assert changed == 0 if color == "none" else changed > 5


def brightened(values):
    """The gray values of an image of one row after color="brightness"; the row may be flipped."""
    image, label = tensors(torch.tensor(values).expand(3, 1, -1), np.full((1, len(values)), 7))
    size = (1, len(values))
    image, label = data.augment(image, label, crop_size=size, scale=(1.0, 1.0), color="brightness")
    assert image.dtype == torch.uint8 and (label == 7).all() and (image == image[:1]).all()
    return image[0, 0].tolist()


def test_brightness_adds_one_whole_number_to_half_of_the_images():
    torch.manual_seed(0)
    shifts = []
    for _ in range(600):
        first, second = brightened([100, 100])
        assert first == second
        shifts.append(first - 100)
    assert set(shifts) == set(range(-10, 11))
    assert 0.45 < shifts.count(0) / 600 < 0.6  # 1/2 + 1/2 · 1/21 = 0.524


def test_brightness_ends_at_black_and_white():
    torch.manual_seed(0)
    seen = {tuple(sorted(brightened([0, 255]))) for _ in range(200)}
    assert min(dark for dark, _ in seen) == 0 and max(dark for dark, _ in seen) == 10
    assert min(light for _, light in seen) == 245 and max(light for _, light in seen) == 255
    assert all(dark == 0 or light == 255 for dark, light in seen)  # no value wraps around


# -------------------------------------------------------------------------------------- determinism


def test_sample_depends_on_seed_and_position_alone():
    def sample(key, seed=3):
        return data.dataset("shapes", train=True, crop_size=48, seed=seed)[key]

    torch.manual_seed(1)
    image, label = sample((5, 70))
    torch.manual_seed(2)
    torch.rand(7)
    again = sample((5, 70))
    assert torch.equal(image, again[0]) and torch.equal(label, again[1])
    assert label.dtype == image.dtype == torch.uint8
    assert not torch.equal(image, sample((5, 71))[0])
    assert not torch.equal(image, sample((5, 70), seed=4)[0])
    assert not torch.equal(image, sample((6, 70))[0])


def test_files_are_augmented_by_position_too(tmp_path):
    camvid(tmp_path, ramp(60, 60)[1].numpy() % 11)
    dataset = data.dataset("camvid", tmp_path, "train", train=True, crop_size=32, seed=1)
    assert torch.equal(dataset[0, 4][0], dataset[0, 4][0])
    assert not torch.equal(dataset[0, 4][0], dataset[0, 5][0])


def test_plain_index_means_the_position_of_the_same_number():
    dataset = data.dataset("shapes", train=True, crop_size=48)
    assert torch.equal(dataset[6][0], dataset[6, 6][0])


def test_without_train_nothing_is_random():
    dataset = data.dataset("shapes", split="val", crop_size=48)
    image, label = dataset[0, 1]
    assert image.shape == (3, 96, 96) and torch.equal(image, dataset[0, 2][0])
    raw_image, raw_label = dataset.raw(0)
    assert torch.equal(image, raw_image) and torch.equal(label, raw_label)


def test_global_randomness_is_left_alone():
    dataset = data.dataset("shapes", train=True, crop_size=48, color="photometric")
    torch.manual_seed(11)
    np.random.seed(11)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    dataset[3]
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


def test_gpu_randomness_is_left_alone(monkeypatch):
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    data.dataset("shapes", train=True, crop_size=48)[3]
    assert seeds == []


def test_seed_of_gives_63_bits_that_differ_by_every_number_and_their_order():
    seeds = [data.seed_of(a, b) for a in range(30) for b in range(30)]
    assert len(set(seeds)) == 900
    assert all(0 <= seed < 2**63 for seed in seeds) and max(seeds) > 2**61
    assert data.seed_of(1, 2) == data.seed_of(1, 2)


def test_batches_are_the_same_with_0_and_2_workers():
    dataset = data.dataset("shapes", train=True, crop_size=32)

    def batches(workers):
        sampler = data.PositionSampler(len(dataset), 4, 2, 5)
        how = dict(batch_sampler=sampler, num_workers=workers, collate_fn=data.collate)
        return list(DataLoader(dataset, **how))

    alone, shared = batches(0), batches(2)
    assert len(alone) == len(shared) == 3 and alone[0][0].shape == (4, 3, 32, 32)
    for (image, label), (other_image, other_label) in zip(alone, shared):
        assert torch.equal(image, other_image) and torch.equal(label, other_label)


def test_collate_makes_the_batch_of_torch_in_channels_last_order():
    dataset = data.dataset("shapes", train=True, crop_size=(32, 40))
    samples = [dataset[i] for i in range(3)]
    images, labels = data.collate(samples)
    expected, expected_labels = default_collate(samples)
    assert torch.equal(images, expected) and torch.equal(labels, expected_labels)
    assert images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_each_batch_in_order(world):
    alone = list(data.PositionSampler(10, 8, 0, 6, seed=5))
    shares = [
        list(data.PositionSampler(10, 8, 0, 6, seed=5, rank=rank, world=world))
        for rank in range(world)
    ]
    assert all(len(batch) == 8 // world for share in shares for batch in share)
    assert [[pair for share in step for pair in share] for step in zip(*shares)] == alone


def test_positions_count_on_without_a_gap():
    batches = list(data.PositionSampler(7, 3, 0, 5))
    assert [position for batch in batches for _, position in batch] == list(range(15))


@pytest.mark.parametrize("start", [0, 1, 3, 9])
def test_interrupted_run_goes_on_with_the_tail_of_a_full_one(start):
    full = list(data.PositionSampler(7, 3, 0, 9, seed=2))
    tail = data.PositionSampler(7, 3, start, 9, seed=2)
    assert list(tail) == full[start:] and len(tail) == 9 - start
    assert list(tail) == full[start:]  # a second time too


def test_every_epoch_is_another_permutation_of_all():
    pairs = [pair for batch in data.PositionSampler(10, 5, 0, 8, seed=1) for pair in batch]
    epochs = [[index for index, _ in pairs[start : start + 10]] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_another_seed_gives_another_order():
    assert list(data.PositionSampler(50, 50, 0, 1, seed=1)) != list(
        data.PositionSampler(50, 50, 0, 1, seed=2)
    )


def test_batch_across_the_border_of_two_epochs_takes_from_both():
    in_tens = [i for batch in data.PositionSampler(5, 5, 0, 3) for i, _ in batch]
    in_threes = [i for batch in data.PositionSampler(5, 3, 0, 5) for i, _ in batch]
    assert in_threes == in_tens
    assert sorted(in_threes[:5]) == sorted(in_threes[5:10]) == list(range(5))


def test_batch_larger_than_the_dataset_is_filled_from_several_epochs():
    (batch,) = data.PositionSampler(3, 9, 0, 1)
    assert sorted(index for index, _ in batch) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


# ------------------------------------------------------------------------------------------- shapes


def labels(name, split, count=40):
    dataset = data.dataset(name, split=split)
    return [dataset.raw(i)[1].numpy().astype(int) for i in range(count)]


def extents(name, split):
    """The longer side of each thing class's bounding box, as a share of the image."""
    found = []
    for label in labels(name, split):
        for id in np.unique(label[label >= 5]):
            found.append(max(np.ptp(axis) + 1 for axis in np.nonzero(label == id)) / 96)
    return found


def own_company(name, split):
    """Of all borders between a thing and stuff: the share where the stuff is the thing's own."""
    classes = data.Shapes("val").classes
    own = {
        classes.index(thing): classes.index(stuff)
        for stuff, things in data.Shapes.COMPANY.items()
        for thing in things
    }
    hits = []
    for label in labels(name, split):
        for turned in (label, label[:, ::-1], label.T, label.T[:, ::-1]):
            a, b = turned[:, 1:], turned[:, :-1]
            border = (a >= 5) & (b < 5)
            hits += [
                own[thing] == stuff for thing, stuff in zip(a[border].tolist(), b[border].tolist())
            ]
    return np.mean(hits)


def uniform_cells(name):
    cells = np.stack(labels(name, "train")).reshape(-1, 6, 16, 6, 16)
    return (cells.max((2, 4)) == cells.min((2, 4))).mean()


def strokes(name):
    """(share of the pixels of rings, crosses and lines amid 5x5 of their own, share of the three
    among the things).
    """
    all_labels = np.stack(labels(name, "train"))
    classes = data.Shapes("val").classes
    kinds = [classes.index(kind) for kind in ("ring", "cross", "line")]
    windows = np.lib.stride_tricks.sliding_window_view(all_labels, (5, 5), (1, 2))
    inner = windows.max((-2, -1)) == windows.min((-2, -1))
    center = all_labels[:, 2:-2, 2:-2]
    present = [(all_labels == id).any((1, 2)).sum() for id in range(5, 12)]
    broad = (inner & np.isin(center, kinds)).sum() / np.isin(center, kinds).sum()
    return broad, sum(present[kind - 5] for kind in kinds) / sum(present)


def test_same_index_is_the_same_image_whatever_the_seed():
    one, two = data.Shapes("train", seed=1), data.Shapes("train", seed=2)
    for index in (0, 7):
        assert torch.equal(one.raw(index)[0], two.raw(index)[0]) and torch.equal(
            one.raw(index)[1], two.raw(index)[1]
        )
    assert not torch.equal(one.raw(0)[1], one.raw(7)[1])


def test_splits_show_different_images():
    first = [data.Shapes(split).raw(0)[0] for split in data.Shapes.SPLITS]
    both = first.pop()  # trainval begins with train
    assert torch.equal(both, first[0])
    for i, image in enumerate(first):
        assert all(not torch.equal(image, other) for other in first[:i])


def test_shapes_have_image_label_and_names_that_fit():
    dataset = data.Shapes("val")
    image, label = dataset.raw(3)
    assert (
        image.shape == (3, 96, 96)
        and label.shape == (96, 96)
        and image.dtype == label.dtype == torch.uint8
    )
    assert dataset.num_classes == len(dataset.classes) == len(set(dataset.palette)) == 12
    assert (len(dataset), len(data.Shapes("train"))) == (100, 2000) and dataset.name(
        3
    ) == "val_000003"
    assert data.Shapes("val", size=50).raw(0)[1].shape == (50, 50)
    assert len(data.Shapes("val", length=7)) == 7


def test_all_classes_and_nothing_else_appear():
    seen = np.unique(np.stack(labels("shapes", "train", 30)))
    assert seen.tolist() == list(range(12))


def mean_colors(name):
    """Thing id -> the mean colours `[images, 3]` of the things of that class."""
    dataset, means = data.dataset(name), {}
    for i in range(80):
        image, label = dataset.raw(i)
        for id in label.unique().tolist():
            if id >= 5 and (label == id).sum() > 20:
                means.setdefault(id, []).append(image[:, label == id].float().mean(1))
    return {id: torch.stack(means[id]) for id in range(5, 12)}


def test_a_things_hue_hints_at_its_class():
    # Things are drawn by hand here: alone, so that each is one thing.
    world = data.Shapes("train")
    hues, others = {}, []
    for seed in range(400):
        rng, canvas = np.random.default_rng(seed), np.full((96, 96, 3), -1.0)
        label = np.zeros((96, 96), np.uint8)
        world._thing(rng, canvas, label, 20)
        thing = canvas[label >= 5]
        brightest = thing[thing.sum(1).argmax()] / 255
        hue, saturation, value = colorsys.rgb_to_hsv(*brightest)
        hues.setdefault(label.max() - 5, []).append(hue)
        others.append((saturation, value))
        darkest = colorsys.rgb_to_hsv(*thing[thing.sum(1).argmin()] / 255)
        assert darkest[0] == pytest.approx(hue, abs=1e-6) and darkest[1] == pytest.approx(
            saturation
        )
    assert sorted(hues) == list(range(7))
    for kind, found in hues.items():
        distance = (np.array(found) - kind / 7 + 0.5) % 1 - 0.5  # on the circle
        assert (
            np.abs(distance).max() <= 0.03 + 1e-9 and 0.012 < distance.std() < 0.022
        )  # uniform: 0.017
    saturation, value = np.array(others).T
    assert saturation.min() >= 0.6 - 1e-9 and saturation.max() > 0.95
    assert value.min() >= 0.6 and np.percentile(value, 5) > 0.6  # shading brightens the brightest


def test_with_form_things_are_not_told_apart_by_color():
    # The mean colour of a class over many images is about the same gray for all things.
    def statistics(name):
        means = mean_colors(name).values()
        centers = torch.stack([m.mean(0) for m in means])
        return (centers - centers.mean(0)).abs().max(), torch.stack([m.std(0) for m in means]).min()

    apart, spread = statistics("shapes+form")
    assert apart < 40 < spread
    apart, spread = statistics("shapes")
    assert apart > 60 > spread


def test_form_changes_the_colors_of_things_and_nothing_else():
    for switches in ("", "+thin", "+company", "+scale", "+unity"):
        hint, form = data.dataset("shapes" + switches), data.dataset(f"shapes+form{switches}")
        for i in range(4):
            (image, label), (other, same) = hint.raw(i), form.raw(i)
            assert torch.equal(label, same)
            differs = (image != other).any(0)
            assert not differs[label < 5].any() and differs[label >= 5].float().mean() > 0.8


def test_smaller_things_occlude_larger_ones():
    world, drawn = data.Shapes("train"), []
    original = world._thing
    world._thing = lambda rng, image, label, radius: (
        drawn.append((radius, label.copy())) or original(rng, image, label, radius)
    )
    hidden = 0
    for i in range(10):
        drawn.clear()
        _, final = world.raw(i)
        radii = [radius for radius, _ in drawn]
        assert radii == sorted(radii, reverse=True) and 4 <= len(radii) <= 9
        for (_, before), (_, after) in zip(drawn[1:], [*drawn[2:], (0, final.numpy())]):
            hidden += ((before >= 5) & (before != after)).sum()  # a later thing replaces an earlier
    assert hidden > 500


def test_without_a_switch_things_range_from_small_to_half_the_image():
    sizes = extents("shapes+unity", "train")
    assert np.percentile(sizes, 10) < 0.12 and np.percentile(sizes, 90) > 0.4


def test_scale_separates_the_sizes_of_the_splits():
    small, train, val, large = (
        extents("shapes+scale+unity", s) for s in ("val_small", "train", "val", "val_large")
    )
    assert 0.05 < np.median(small) < 0.13
    assert 0.17 < np.median(train) < 0.32 and 0.17 < np.median(val) < 0.32
    assert 0.38 < np.median(large) < 0.65
    assert (
        np.percentile(train, 5) > 0.12 > np.percentile(small, 60)
    )  # boxes of two of a kind are larger
    assert np.percentile(large, 10) > np.percentile(train, 60)


def test_company_is_kept_in_train_and_val_and_shuffled_in_val_shuffled():
    assert own_company("shapes+company", "train") > 0.7
    assert own_company("shapes+company", "val") > 0.7
    assert own_company("shapes+company", "val_shuffled") < 0.35
    assert own_company("shapes", "train") < 0.35


def test_unity_makes_most_cells_uniform():
    assert uniform_cells("shapes") < 0.45
    assert uniform_cells("shapes+unity") > 0.65


def test_thin_makes_strokes_of_two_to_three_pixels_and_more_of_them():
    (broad, share), (thin, thin_share) = strokes("shapes"), strokes("shapes+thin")
    assert broad > 0.15 and thin < broad / 2
    assert share < 0.55 and thin_share > 0.6


def inside(kind, *points, width=None):
    u, v = np.array(points, float).T
    return data._inside(kind, u, v, width).tolist()


def test_forms_by_hand():
    assert inside("disk", (0, 0), (0.7, 0.7), (0.99, 0), (1.01, 0), (0.8, 0.8)) == [
        True,
        True,
        True,
        False,
        False,
    ]
    assert inside("ring", (0, 0), (0.5, 0), (0.7, 0), (0, -0.95), (1.1, 0)) == [
        False,
        False,
        True,
        True,
        False,
    ]
    assert inside("square", (0, 0), (0.79, 0.79), (-0.79, 0.79), (0.81, 0)) == [
        True,
        True,
        True,
        False,
    ]
    # corners at distance 1, straight sides at distance 1/2
    assert inside(
        "triangle", (0, 0), (-0.98, 0), (0.49, 0), (0.51, 0), (0.48, 0.8), (0.48, -0.8)
    ) == [1, 1, 1, 0, 1, 1]
    assert inside(
        "cross", (0, 0), (0.9, 0), (0, -0.9), (0.2, 0.9), (0.5, 0.5), (0.3, 0.3), (1.1, 0)
    ) == [
        1,
        1,
        1,
        1,
        0,
        0,
        0,
    ]
    assert inside("line", (0, 0), (0.9, 0.1), (-0.9, -0.1), (0, 0.2), (1.1, 0)) == [
        True,
        True,
        True,
        False,
        False,
    ]


def test_star_has_five_tips():
    turns = np.linspace(0, 2 * np.pi, 720, endpoint=False)
    far = data._inside("star", 0.8 * np.cos(turns), 0.8 * np.sin(turns))
    assert (far & ~np.roll(far, 1)).sum() == 5
    assert data._inside("star", 0.39 * np.cos(turns), 0.39 * np.sin(turns)).all()
    assert not data._inside("star", 1.01 * np.cos(turns), 1.01 * np.sin(turns)).any()


def test_strokes_have_the_width_asked_for():
    assert inside("ring", (0.95, 0), (0.85, 0), width=0.1) == [True, False]
    assert inside("cross", (0.04, 0.9), (0.06, 0.9), width=0.1) == [True, False]
    assert inside("line", (0.9, 0.04), (0.9, 0.06), width=0.1) == [True, False]


# ----------------------------------------------------------------------------------------- pictures


def test_colorize_takes_the_palette_and_black_for_255():
    label = torch.tensor([[0, 1], [2, 255]])
    picture = data.colorize(label, [(1, 2, 3), (40, 50, 60), (250, 251, 252)])
    assert picture.dtype == torch.uint8
    assert picture.permute(1, 2, 0).tolist() == [
        [[1, 2, 3], [40, 50, 60]],
        [[250, 251, 252], [0, 0, 0]],
    ]


def test_overlay_leaves_ignored_pixels_and_tints_the_others():
    image = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(3, 1, 1)
    label = torch.full((16, 16), 255)
    label[0] = 0
    label[1] = 1
    picture = data.overlay(image, label, [(255, 0, 0), (0, 0, 255)])
    assert torch.equal(picture[:, 2:], image[:, 2:])
    assert (picture[0, 0] > 100).all() and (picture[2, 0] < 100).all()
    assert (picture[2, 1] > 100).all() and (picture[0, 1] < 100).all()


def test_overlay_of_an_all_ignored_image_is_the_image():
    image = torch.arange(48, dtype=torch.uint8).view(3, 4, 4)
    assert torch.equal(data.overlay(image, torch.full((4, 4), 255), [(255, 0, 0)]), image)


def test_sheet_is_wide_enough_for_its_columns_and_high_enough_for_its_rows():
    red, blue = (
        torch.tensor(color, dtype=torch.uint8).view(3, 1, 1).expand(3, 10, 20)
        for color in ((255, 0, 0), (0, 0, 255))
    )
    panels = [data.Panel(name, tile) for name, tile in zip("abcd", (red, blue, red, blue))]
    picture = data.sheet(panels, 3, width=80)
    assert isinstance(picture, Image.Image)
    assert picture.width == 3 * 88 + 8 and picture.height >= 2 * (17 + 40)
    array = np.asarray(picture)
    assert (
        (array == (255, 0, 0)).all(-1).sum() == (array == (0, 0, 255)).all(-1).sum() == 2 * 80 * 40
    )


def test_sheet_outlines_boxes_and_leaves_what_is_in_them():
    tile = torch.full((3, 20, 20), 9, dtype=torch.uint8)
    picture = np.asarray(data.sheet([data.Panel("", tile, boxes=((5, 10, 9, 18),))], 1, width=40))
    frame = np.argwhere((picture == (0x88,) * 3).all(-1)).min(0) + 1  # the tile's upper left corner
    box = picture[frame[0] + 10 : frame[0] + 19, frame[1] + 20 : frame[1] + 37]  # twice as large
    assert (box[0] == 0).all() and (box[:, 0] == 0).all() and (box[-1] == 0).all()
    assert (box[1:-1, 1:-1] == 9).all()
    outside = picture[frame[0] + 9, frame[1] + 19 : frame[1] + 38]
    assert (outside == 255).all()


def test_sheet_has_a_colour_bar_and_long_titles_take_two_lines():
    tile = torch.full((3, 8, 8), 9, dtype=torch.uint8)
    plain = data.sheet([data.Panel("one", tile)], 1, width=120)
    bar = data.sheet([data.Panel("one", tile, ("0", "0.5"))], 1, width=120)
    assert (np.asarray(bar) == (255, 255, 140)).all(-1).sum() == 8
    assert bar.height > plain.height
    long = data.sheet([data.Panel("one two three four five six", tile)], 1, width=120)
    assert long.height == plain.height + 17
    caption = data.sheet([data.Panel("one", tile)], 1, caption="what to look for", width=120)
    assert caption.height == plain.height + 17


def test_legend_shows_the_classes_that_occur_and_ignored():
    tile = torch.full((3, 8, 8), 9, dtype=torch.uint8)
    colors = [(200, 10, 10), (10, 200, 10), (10, 10, 200)]

    def shown(*maps):
        maps = [torch.tensor([values]) for values in maps]
        picture = data.sheet([data.Panel("t", tile)], 1, maps, ["x", "y", "z"], colors, width=200)
        array = np.asarray(picture)
        swatches = {}
        for color in [*colors, (0, 0, 0), data.GREY]:
            same = np.lib.stride_tricks.sliding_window_view((array == color).all(-1), (11, 11))
            swatches[color] = bool(same.all((2, 3)).any())
        return [color for color, found in swatches.items() if found]

    assert shown([0, 2], [2, 255]) == [colors[0], colors[2], (0, 0, 0)]
    assert shown([1, 254]) == [colors[1], data.GREY]
    assert shown() == []


def frame_of(picture):
    """(top, left) of the pixels inside the frame of a sheet's first tile."""
    return np.argwhere((picture == 0x88).all(-1)).min(0) + 1


@pytest.mark.parametrize("place", [0.7, 0.25])
def test_a_mark_is_a_tick_at_its_place_on_the_colour_bar_with_a_word_under_it(place):
    tile = torch.full((3, 8, 8), 9, dtype=torch.uint8)
    plain = np.asarray(data.sheet([data.Panel("", tile, ("0", "1"))], 1, width=200))
    panel = data.Panel("", tile, ("0", "1"), mark=(place, "here"))
    picture = np.asarray(data.sheet([panel], 1, width=200))
    assert picture.shape == plain.shape
    top, left = frame_of(picture)
    bar = slice(top + 200 + 3, top + 200 + 11)
    changed = np.flatnonzero((picture[bar] != plain[bar]).any((0, 2))) - left
    at = round(place * 199)
    assert changed.tolist() == [at - 1, at, at + 1] and (picture[bar, left + at] == 0).all()
    assert (picture[bar, left + at - 1] == 255).all()
    word = np.flatnonzero((picture[bar.stop + 3 :] != plain[bar.stop + 3 :]).any((0, 2))) - left
    assert abs((word[0] + word[-1]) / 2 - at) < 3 and 15 < word[-1] - word[0] < 40


@pytest.mark.parametrize("place", [0.02, 0.98])
def test_a_marks_word_does_not_touch_those_at_the_ends(place):
    tile, ends = torch.full((3, 8, 8), 9, dtype=torch.uint8), ("-0.0812", "0.0613")
    plain = np.asarray(data.sheet([data.Panel("", tile, ends)], 1, width=200))
    panel = data.Panel("", tile, ends, mark=(place, "0"))
    picture = np.asarray(data.sheet([panel], 1, width=200))
    top, _ = frame_of(picture)
    below = top + 200 + 14
    old, word = (x[below:] != 255 for x in (plain, picture))
    old, word = old.any((0, 2)), (word & ~old).any((0, 2))
    assert word.any() and not (old & word).any()
    middle = np.flatnonzero(word)
    assert not old[middle[0] - 4 : middle[-1] + 5].any()


def test_lines_are_drawn_at_rows_and_columns_of_the_tile_and_nowhere_else():
    tile = torch.full((3, 10, 20), 9, dtype=torch.uint8)
    panel = data.Panel("", tile, lines=([0, 4, 10], [5]))
    picture = np.asarray(data.sheet([panel], 1, width=40))  # twice as large
    top, left = frame_of(picture)
    drawn = (picture[top : top + 20, left : left + 40] != 9).any(-1)
    expected = np.zeros((20, 40), bool)
    expected[[0, 8]] = expected[:, 10] = True  # row 10 is on the frame
    assert (drawn == expected).all()


def inked(picture, color):
    """Where the ink of a chart is nearer to `color` than to white."""
    far = np.abs(np.asarray(picture).astype(int) - np.array(color)).sum(-1)
    return far < 90


def test_equal_series_are_one_line_and_those_without_points_none():
    blue, orange = (0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)
    line = [(step, 4 - step / 10) for step in range(1, 31)]
    same = data.chart("loss", {"loss": line, "cross_entropy": list(line), "none": []})
    alone = data.chart("loss", {"loss = cross_entropy": line})
    assert (np.asarray(same) == np.asarray(alone)).all()
    assert inked(same, blue).any() and not inked(same, orange).any()
    close = [(x, 0.999 * y) for x, y in line]  # what is drawn over the first leaves it seen
    both = data.chart("loss", {"loss": line, "cross_entropy": close})
    columns = [inked(both, color)[60:].any(0) for color in (blue, orange)]
    assert (columns[0] & columns[1]).sum() > 250


def test_a_chart_says_what_x_is_and_shows_a_point_alone():
    points = {"mIoU": [(0.5, 0.25), (2, 0.75)]}
    pictures = [np.asarray(data.chart("t", points, *axis)) for axis in ((), ("scale",))]
    rows, columns = np.nonzero((pictures[0] != pictures[1]).any(-1))
    assert rows.min() > 320 and 200 < columns.min() and columns.max() < 330  # in the middle below
    default = np.asarray(data.chart("t", points, "step"))
    assert (pictures[0] == default).all()
    alone = inked(data.chart("t", {"mIoU": [(1, 0.5)]}), (0x1F, 0x77, 0xB4))[40:]
    assert 30 < alone.sum() < 90


def test_picked_images_are_spread_and_show_many_classes():
    class Few(list):
        def __getitem__(self, i):
            return None, torch.tensor(super().__getitem__(i))

    # eight images in two parts: the third has most classes; of the others the sixth those that
    # were not shown
    held = Few([[0], [0], [0, 1], [0], [0, 1], [2, 3], [0], [0]])
    assert data.pick_images(held, 2) == [2, 5]
    assert data.pick_images(held, 20) == list(range(8)) and data.pick_images(Few([[1]]), 4) == [0]


# ------------------------------------------------------------------------------------------- report


def test_main_prints_counts_that_add_up_and_draws_a_sheet(tmp_path, capsys):
    assert data.main(["shapes", "--split", "val", "--output", str(tmp_path / "new/s.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "shapes val: 100 images, 96x96, 12 classes"
    assert lines[1].endswith(": 0-11")
    rows = [line.split() for line in lines[3:16]]
    assert [row[1] for row in rows] == [*data.Shapes("val").classes, "(ignored)"]
    assert sum(int(row[2]) for row in rows) == 100 * 96 * 96
    assert sum(float(row[3].rstrip("%")) for row in rows) == pytest.approx(100, abs=0.1)
    assert rows[-1] == ["255", "(ignored)", "0", "0.00%", "0"]
    with Image.open(tmp_path / "new/s.png") as picture:
        assert picture.width == 6 * 248 + 8


def test_report_counts_by_hand(tmp_path, capsys):
    folder(tmp_path, [[0, 0, 1], [255, 0, 1]])
    save(tmp_path / "images/train/b.png", photo(1, 4))
    save(tmp_path / "labels/train/b.png", np.array([[0, 0, 0, 255]], np.uint8))
    data.report(data.dataset("folder", tmp_path, "train"), "mine")
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0] == "mine: 2 images, 4x1 to 3x2, 3 classes"
    assert lines[1].endswith(": 0-1, 255")
    assert [line.split() for line in lines[3:7]] == [
        ["0", "one", "6", "60.00%", "2"],
        ["1", "two", "2", "20.00%", "1"],
        ["2", "three", "0", "0.00%", "0"],
        ["255", "(ignored)", "2", "20.00%", "2"],
    ]
    assert printed.err == "warning: no label holds three\n"


def test_main_ends_with_2_and_one_line_for_a_wrong_id(tmp_path, capsys):
    folder(tmp_path, [[0, 7]])
    output = tmp_path / "s.png"
    assert data.main(["folder", "--data-root", str(tmp_path), "--output", str(output)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "labels/train/a.png") in line and "[7]" in line
    assert not output.exists()


def test_all_kinds_of_faults_are_reported_in_one_pass(tmp_path, capsys):
    folder(tmp_path, [[0, 1]])
    images, labels = tmp_path / "images/train", tmp_path / "labels/train"
    image, label = next(images.iterdir()), next(labels.iterdir())
    shutil.copy(image, images / f"alone{image.suffix}")
    shutil.copy(label, labels / "single.png")
    (images / f"broken{image.suffix}").write_bytes(b"no image")
    shutil.copy(label, labels / "broken.png")
    flags = ["folder", "--data-root", str(tmp_path), "--output", str(tmp_path / "s.png")]
    assert data.main([*flags, "--workers", "0"]) == 2
    *lines, last = capsys.readouterr().err.splitlines()
    assert "3 of 4 pairs are wrong" in last
    assert f"no file '{labels / 'alone.png'}'" in lines
    assert f"no file '{images / 'single.jpg'}'" in lines
    assert any("cannot be read as an image" in line for line in lines)
    first = f"as of '{images / 'alone.png'}' and '{labels / 'alone.png'}' one is missing"
    mistake(lambda: data.dataset("folder", tmp_path), "2 images or labels lack", first)


def test_a_contact_sheet_never_replaces_a_file_of_the_dataset(tmp_path, capsys):
    folder(tmp_path, [[0, 1]])
    photograph = next((tmp_path / "images/train").iterdir())
    before, root = photograph.read_bytes(), str(tmp_path)
    assert data.main(["folder", "--data-root", root, "--output", str(photograph)]) == 2
    assert "is among the dataset's files" in capsys.readouterr().err
    assert photograph.read_bytes() == before
    assert data.main(["shapes", "--data-root", root, "--output", f"{root}/s.png"]) == 2
    assert "--data-root has no effect here" in capsys.readouterr().err


def test_main_ends_with_2_and_one_line_for_an_unknown_split(tmp_path, capsys):
    assert data.main(["shapes", "--split", "dawn", "--output", str(tmp_path / "s.png")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "'dawn'" in line


# --------------------------------------------------------------------------------------- benchmarks


def listed(path, *ids):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{i}\n" for i in ids))


def pair(image, label, values):
    """A photograph and a label map of one row, or none where the path is None."""
    save(image, photo(1, len(values)))
    if label is not None:
        save(label, np.array([values], np.uint8))


@pytest.fixture
def matlab(monkeypatch):
    """A function that writes a label map into a .mat file's field; scipy, which not every machine
    has, is played.
    """

    def write(path, field, values):
        path.parent.mkdir(parents=True, exist_ok=True)
        content = np.asarray(values)
        if field == "GTcls":  # a structure, as scipy gives it
            content = np.empty((1, 1), dtype=[("Segmentation", object)])
            content["Segmentation"][0, 0] = np.asarray(values)
        with path.open("wb") as file:
            np.save(file, {field: content}, allow_pickle=True)

    scipy = types.ModuleType("scipy.io")
    scipy.loadmat = lambda path: np.load(path, allow_pickle=True).item()
    monkeypatch.setitem(sys.modules, "scipy", types.ModuleType("scipy"))
    monkeypatch.setitem(sys.modules, "scipy.io", scipy)
    return write


def labels_of(name, root, split="train"):
    dataset = data.dataset(name, root, split)
    return {dataset.name(i): dataset[i][1][0].tolist() for i in range(len(dataset))}


def voc_tree(
    root,
    lists,
    year="VOC2012",
    sets="Segmentation",
    labels="SegmentationClass",
    values=(0, 20, 255),
):
    """VOC as it is shipped: `lists`, split -> ids; each id has a photograph, and a label where
    `labels` names a folder.
    """
    base = root / "VOCdevkit" / year
    for split, ids in lists.items():
        listed(base / "ImageSets" / sets / f"{split}.txt", *ids)
        for i in ids:
            pair(base / f"JPEGImages/{i}.jpg", labels and base / f"{labels}/{i}.png", values)
    return base


def test_pascal_voc_keeps_0_to_20_and_ignores_the_borders(tmp_path):
    base = voc_tree(
        tmp_path,
        {
            "train": ["2007_a", "2007_b"],
            "val": ["2008_c"],
            "trainval": ["2007_a", "2007_b", "2008_c"],
        },
    )
    assert labels_of("pascal_voc", tmp_path) == {"2007_a": [0, 20, 255], "2007_b": [0, 20, 255]}
    assert list(labels_of("pascal_voc", tmp_path, "val")) == ["2008_c"]
    assert len(data.dataset("pascal_voc", tmp_path, "trainval")) == 3
    dataset = data.dataset("pascal_voc", tmp_path)
    assert (
        dataset.num_classes == 21
        and dataset.classes[0] == "background"
        and dataset.classes[-1] == "tvmonitor"
    )
    assert dataset.palette[:4] == [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)]
    assert dataset.palette[15] == (192, 128, 128) and dataset.palette[20] == (
        0,
        64,
        128,
    )  # person, tvmonitor
    save(base / "SegmentationClass/2007_b.png", np.array([[0, 21, 255]], np.uint8))
    mistake(lambda: dataset[1], base / "SegmentationClass/2007_b.png", "[21]", "0-20, 255")


# VOC train a b, val c; SBD train b c d, val e f. (a b | b c d | e f) - c = a b d e f
AUGMENTED = {"a": [0, 1, 255], "b": [0, 1, 255], "d": [2, 3, 4], "e": [2, 3, 4], "f": [2, 3, 4]}


def test_train_aug_is_voc_and_sbd_without_vocs_validation_from_converted_labels(tmp_path):
    base = voc_tree(tmp_path, {"train": ["a", "b"], "val": ["c"]}, values=(0, 1, 255))
    for i in "abcdef":
        pair(base / f"JPEGImages/{i}.jpg", base / f"SegmentationClassAug/{i}.png", (2, 3, 4))
    assert (
        labels_of("pascal_voc_aug", tmp_path) == AUGMENTED
    )  # c is left out; a and b have VOC's labels
    assert labels_of("pascal_voc_aug", tmp_path, "val") == {"c": [0, 1, 255]}


def test_train_aug_is_voc_and_sbd_without_vocs_validation_from_sbd_as_shipped(tmp_path, matlab):
    base = voc_tree(tmp_path, {"train": ["a", "b"], "val": ["c"]}, values=(0, 1, 255))
    sbd = tmp_path / "benchmark_RELEASE/dataset"
    listed(sbd / "train.txt", "b", "c", "d")
    listed(sbd / "val.txt", "e", "f")
    for i in "bcdef":
        matlab(sbd / f"cls/{i}.mat", "GTcls", np.array([[2, 3, 4]], np.uint8))
    pair(
        base / "JPEGImages/d.jpg", None, (0, 0, 0)
    )  # a photograph of VOC's, the others are SBD's own
    for i in "def":
        pair(sbd / f"img/{i}.jpg", None, (0, 0, 0))
    assert labels_of("pascal_voc_aug", tmp_path) == AUGMENTED
    folders = {
        image.stem: image.parent.name for image, _ in data.dataset("pascal_voc_aug", tmp_path).files
    }
    assert folders == dict.fromkeys("abd", "JPEGImages") | dict.fromkeys("ef", "img")
    # converted labels take the place of SBD's, its lists stay: x is in none
    for i in "defx":
        save(base / f"SegmentationClassAug/{i}.png", np.array([[5, 6, 7]], np.uint8))
    converted = dict.fromkeys("def", [5, 6, 7])
    assert labels_of("pascal_voc_aug", tmp_path) == AUGMENTED | converted


def test_pascal_context_has_59_classes_from_converted_labels(tmp_path):
    lists = {"train": ["a"], "val": ["b"]}
    voc_tree(
        tmp_path, lists, "VOC2010", "SegmentationContext", "SegmentationClassContext", (0, 1, 59)
    )
    assert labels_of("pascal_context", tmp_path) == {"a": [255, 0, 58]}  # background is ignored
    dataset = data.dataset("pascal_context", tmp_path, "val")
    assert dataset.num_classes == 59 and (dataset.classes[0], dataset.classes[58]) == (
        "aeroplane",
        "wood",
    )


@pytest.mark.parametrize("folder", ["trainval", "VOCdevkit/VOC2010/trainval"])
def test_pascal_context_has_59_of_459_ids_from_its_own_files(folder, tmp_path, matlab):
    voc_tree(tmp_path, {"train": ["a"], "val": ["b"]}, "VOC2010", "Main", None, (0,) * 7)
    for i in "ab":
        # aeroplane 2, bag 9, window 454, wood 458; 1, 3 and 459 are none of the 59
        matlab(
            tmp_path / folder / f"{i}.mat",
            "LabelMap",
            np.array([[1, 2, 3, 9, 458, 459, 454]], np.uint16),
        )
    assert labels_of("pascal_context", tmp_path) == {"a": [255, 0, 255, 1, 58, 255, 57]}
    names = dict(zip(data._CONTEXT_IDS.split(), data.dataset("pascal_context", tmp_path).classes))
    # names in alphabetical order, as the ids rise
    assert list(names.values()) == sorted(names.values()) and len(names) == 59
    assert [int(i) for i in names] == sorted(int(i) for i in names)


def test_pascal_person_part_keeps_0_to_6(tmp_path):
    for split, i in (("train", "a"), ("val", "b")):
        listed(tmp_path / f"list/{split}_id.txt", i)
        pair(tmp_path / f"JPEGImages/{i}.jpg", tmp_path / f"SegmentationPart/{i}.png", (0, 6, 255))
    assert labels_of("pascal_person_part", tmp_path) == {"a": [0, 6, 255]}
    classes = "background head torso upper-arms lower-arms upper-legs lower-legs"
    assert data.dataset("pascal_person_part", tmp_path, "val").classes == classes.split()


def test_ade20k_is_raw_less_1_and_0_is_ignored(tmp_path):
    base = tmp_path / "ADEChallengeData2016"
    for part, name in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        image, label = (
            base / "images" / part / f"{name}.jpg",
            base / "annotations" / part / f"{name}.png",
        )
        pair(image, label, (0, 1, 2, 150))
        Image.open(image).convert("L").save(image)  # a few are gray
    assert labels_of("ade20k", tmp_path) == {"ADE_train_00000001": [255, 0, 1, 149]}
    labels = tmp_path / "ADEChallengeData2016"
    for i in range(2, 12):  # eleven images: the fifth and the tenth by name are val
        for kind in ("images", "annotations"):
            first = next((labels / kind / "training").glob("*1.*"))
            first.with_stem(f"ADE_train_{i:08d}").write_bytes(first.read_bytes())
    names = {
        split: [pair[0].stem[-2:] for pair in data.dataset("ade20k_16k", tmp_path, split).files]
        for split in ("train", "val")
    }
    train = ["01", "02", "03", "04", "06", "07", "08", "09", "11"]
    assert names == dict(train=train, val=["05", "10"])
    dataset = data.dataset("ade20k", tmp_path, "val")
    assert dataset[0][0].shape == (3, 1, 4) and dataset.num_classes == 150
    known = {
        0: "wall",
        12: "person",
        16: "mountain",
        17: "plant",
        91: "dirt track",
        140: "pier",
        149: "flag",
    }
    assert {i: dataset.classes[i] for i in known} == known and (0, 0, 0) not in dataset.palette
    assert dataset.raw_ids == list(range(1, 151))


def test_cityscapes_takes_19_of_its_raw_ids(tmp_path):
    raw = list(range(34)) + [255]  # 34 and more are none of its ids
    for split, city in (("train", "aachen"), ("train", "bochum"), ("val", "munster")):
        stem = f"{city}_000000_000019"
        image = tmp_path / f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png"
        pair(image, tmp_path / f"gtFine/{split}/{city}/{stem}_gtFine_labelIds.png", raw)
    dataset = data.dataset("cityscapes", tmp_path)
    assert [dataset.name(i).split("_")[0] for i in range(2)] == ["aachen", "bochum"]
    label = dataset[0][1][0].tolist()
    used = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    assert [label[i] for i in used] == list(range(19)) and label.count(255) == 35 - 19
    assert dataset.raw_ids == used and (dataset.classes[0], dataset.classes[18]) == (
        "road",
        "bicycle",
    )
    theirs = {
        c.train_id: (c.name, c.color)
        for c in Cityscapes.classes
        if c.train_id < 19 and c.train_id >= 0
    }
    assert {i: (dataset.classes[i], dataset.palette[i]) for i in range(19)} == theirs
    save(
        tmp_path / "gtFine/val/munster/munster_000000_000019_gtFine_labelIds.png",
        np.array([raw[:-1] + [34]], np.uint8),
    )
    mistake(lambda: data.dataset("cityscapes", tmp_path, "val")[0], "[34]", "has 0-33, 255")


def test_coco_stuff164k_is_the_id_less_1_without_the_unused(tmp_path):
    used = [i for i in range(182) if i not in (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)]
    raw = [*range(182), 255]
    for split in ("train", "val"):
        pair(
            tmp_path / f"images/{split}2017/000000000009.jpg",
            tmp_path / f"annotations/{split}2017/000000000009.png",
            raw,
        )
    label = labels_of("coco_stuff164k", tmp_path)["000000000009"]
    assert [label[i] for i in used] == list(range(171)) and label.count(255) == 12
    dataset = data.dataset("coco_stuff164k", tmp_path, "val")
    assert dataset.num_classes == 171 and dataset.raw_ids == used
    # COCO's ids: person 1, toothbrush 90; stuff from banner 92 to wood 182
    assert [dataset.classes[label[i - 1]] for i in (1, 90, 92, 182)] == [
        "person",
        "toothbrush",
        "banner",
        "wood",
    ]
    assert (
        dataset.classes[80:] == sorted(dataset.classes[80:]) and (0, 0, 0) not in dataset.palette
    )  # the stuff


def test_coco_stuff10k_is_the_id_without_0_and_the_unused(tmp_path, matlab):
    used = [i for i in range(1, 183) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)]
    for part, i in (("train", "COCO_train2014_1"), ("test", "COCO_train2014_2")):
        listed(tmp_path / f"imageLists/{part}.txt", i)
        pair(tmp_path / f"images/{i}.jpg", None, range(183))
        matlab(tmp_path / f"annotations/{i}.mat", "S", np.arange(183, dtype=np.uint8)[None])
    label = labels_of("coco_stuff10k", tmp_path)["COCO_train2014_1"]
    assert [label[i] for i in used] == list(range(171)) and label.count(255) == 12
    assert list(labels_of("coco_stuff10k", tmp_path, "val")) == [
        "COCO_train2014_2"
    ]  # the authors' test list


def test_coco_stuff10k_converted_has_train_ids(tmp_path):
    listed(tmp_path / "imageLists/train.txt", "a")
    pair(tmp_path / "images/a.jpg", tmp_path / "annotations/a_labelTrainIds.png", (0, 170, 255))
    assert labels_of("coco_stuff10k", tmp_path) == {"a": [0, 170, 255]}


COCO_OF_VOC = [0, 5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72]


def test_coco_voc_maps_cocos_things_and_keeps_images_with_more_than_1000_pixels_of_them(
    tmp_path, monkeypatch
):
    raw = np.zeros((40, 40), np.uint8)  # all person
    raw[0, :21] = [max(0, i - 1) for i in COCO_OF_VOC]
    raw[1, :4] = [255, 7, 100, 181]  # unlabelled; truck, and two of the stuff
    few = np.full((40, 40), 7, np.uint8)
    few.flat[:1000], few[-1] = 0, 255
    for stem, label in (("many", raw), ("few", few)):
        save(tmp_path / f"images/train2017/{stem}.jpg", photo(40, 40))
        save(tmp_path / f"annotations/train2017/{stem}.png", label)
    dataset = data.dataset("coco_voc", tmp_path)
    assert [dataset.name(i) for i in range(len(dataset))] == ["many"]
    label = dataset[0][1]
    assert (
        label[0, 1:21].tolist() == list(range(1, 21))
        and label[1, :4].tolist() == [255, 0, 0, 0]
        and label[5, 5] == 15
    )
    assert dataset.raw_ids == list(range(21))  # several ids are background
    assert (tmp_path / "coco_voc_train.txt").read_text() == "# of 2 pairs\nmany\n"
    with monkeypatch.context() as patched:
        patched.setattr(data, "_examined", None)  # the second time nothing is read
        assert len(data.dataset("coco_voc", tmp_path)) == 1
    save(tmp_path / "images/train2017/more.jpg", photo(40, 40))
    save(tmp_path / "annotations/train2017/more.png", raw)
    with monkeypatch.context() as patched:
        patched.setenv("WORLD_SIZE", "2")
        mistake(
            lambda: data.dataset("coco_voc", tmp_path),
            "is made once: run `python data.py coco_voc --data-root",
        )
    assert (
        len(data.dataset("coco_voc", tmp_path)) == 2
    )  # of another number of pairs the list is made anew


def test_coco_voc_names_wrong_labels_and_makes_no_list_of_the_others(tmp_path, capsys):
    for stem in "ab":
        save(tmp_path / f"images/val2017/{stem}.jpg", photo(40, 40))
        save(tmp_path / f"annotations/val2017/{stem}.png", np.zeros((40, 40), np.uint8))
    (tmp_path / "annotations/val2017/b.png").write_bytes(b"broken")
    wrong = tmp_path / "annotations/val2017/b.png"
    mistake(lambda: data.dataset("coco_voc", tmp_path, "val"), wrong, "cannot be read as an image")
    assert not (tmp_path / "coco_voc_val.txt").exists()
    assert "warning: coco_stuff164k val has 2 of 5000 images" in capsys.readouterr().err
    save(wrong, np.full((40, 40), 7, np.uint8))
    save(tmp_path / "annotations/val2017/a.png", np.full((40, 40), 7, np.uint8))
    mistake(
        lambda: data.dataset("coco_voc", tmp_path, "val"),
        "none of the 2 images",
        "more than 1000 pixels",
    )


def test_matlab_files_that_cannot_be_read_are_mistakes(tmp_path, matlab, monkeypatch):
    lut = data._lut({0: 0})
    path = tmp_path / "a.mat"
    mistake(lambda: data.read_label(path, lut), "no file", path)
    path.write_bytes(b"no such thing\n" * 20)
    mistake(lambda: data.read_label(path, lut), path, "cannot be read as a MATLAB label map")
    matlab(path, "other", np.zeros((2, 2)))
    mistake(lambda: data.read_label(path, lut), path, "no field GTcls, LabelMap or S")
    matlab(path, "S", np.array([[0, 700]], np.uint16))
    mistake(lambda: data.read_label(path, lut), path, "[700]", "has 0, 255; write 255 there")
    (tmp_path / "classes.txt").touch()  # no dataset's: there is no folder labels beside it
    with pytest.raises(data.UserError, match="write 255 there$"):
        data.read_label(path, lut)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    mistake(lambda: data.read_label(path, lut), path, "pip install scipy", "convert to PNG")


@pytest.mark.parametrize("field", ["GTcls", "LabelMap", "S"])
def test_matlab_files_by_scipy_itself(field, tmp_path):
    scipy = pytest.importorskip("scipy.io")
    values = np.array([[0, 2]], np.uint16)
    scipy.savemat(
        tmp_path / "a.mat", {field: {"Segmentation": values} if field == "GTcls" else values}
    )
    lut = data._lut({0: 5, 2: 7})
    assert data.read_label(tmp_path / "a.mat", lut).tolist() == [[5, 7]]


NAMES = [name for name in data.LAYOUTS if name != "folder"]


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_dataset_says_what_was_looked_for_found_and_expected_and_its_source(
    name, tmp_path
):
    layout = data.LAYOUTS[name]
    nowhere = tmp_path / "nowhere"
    for call in (partial(data.dataset, name, nowhere, split) for split in layout.counts):
        mistake(call, nowhere, "looked for", "no such folder", layout.tree, layout.source)
    (tmp_path / "something else").mkdir()
    mistake(
        lambda: data.dataset(name, tmp_path, "train"),
        "looked for",
        "there is: something else;",
        layout.tree,
    )
    mistake(
        lambda: data.dataset(name, tmp_path, "dev"),
        f"{name} has no split 'dev'; it has {', '.join(layout.counts)}",
    )


def test_half_unpacked_is_missing_too(tmp_path):
    base = voc_tree(tmp_path, {"train": []})
    mistake(
        lambda: data.dataset("pascal_voc", tmp_path),
        base / "ImageSets/Segmentation/train.txt",
        "names no image",
    )
    base = voc_tree(tmp_path, {"train": ["a", "b"]}, labels=None)
    mistake(
        lambda: data.dataset("pascal_voc", tmp_path), base / "SegmentationClass/a.png", "not there"
    )
    (tmp_path / "leftImg8bit/train/x").mkdir(parents=True)
    save(tmp_path / "leftImg8bit/train/x/x_1_leftImg8bit.png", photo())
    mistake(
        lambda: data.dataset("cityscapes", tmp_path),
        tmp_path / "gtFine/train/x/x_1_gtFine_labelIds.png",
        "not there",
    )


def test_fewer_files_than_the_split_has_are_a_warning(tmp_path, capsys, monkeypatch):
    base = voc_tree(tmp_path, {"train": ["a", "b", "c"]})
    assert len(data.dataset("pascal_voc", tmp_path)) == 3
    err = capsys.readouterr().err
    assert "warning: pascal_voc train has 3 of 1464 images; get the others from http://host" in err
    (base / "SegmentationClass/b.png").unlink()
    dataset = data.dataset("pascal_voc", tmp_path)
    assert [dataset.name(i) for i in range(2)] == ["a", "c"]
    assert (
        f"has 2 of 1464 images; the first that is missing: {base / 'SegmentationClass/b.png'}"
        in capsys.readouterr().err
    )
    monkeypatch.setenv("RANK", "1")
    data.dataset("pascal_voc", tmp_path)
    assert not capsys.readouterr().err  # once a job


def test_a_whole_split_is_no_warning(tmp_path, capsys):
    folder(tmp_path, [[0]])
    assert not capsys.readouterr().err
    stems = [f"{i:04}" for i in range(101)]
    for stem in stems:
        save(tmp_path / f"val/{stem}.png", photo(1, 1))
        save(tmp_path / f"valannot/{stem}.png", np.zeros((1, 1), np.uint8))
    assert len(data.dataset("camvid", tmp_path, "val")) == 101
    assert not capsys.readouterr().err


def test_the_splits_sizes_are_the_official_ones():
    counts = {name: layout.counts for name, layout in data.LAYOUTS.items()}
    assert counts["camvid"] == dict(train=367, val=101, test=233)
    assert counts["pascal_voc"] == dict(train=1464, val=1449, trainval=2913)
    assert counts["pascal_voc_aug"] == dict(train=10582, val=1449)
    assert counts["pascal_context"] == dict(train=4998, val=5105)
    assert counts["pascal_person_part"] == dict(train=1716, val=1817)
    assert counts["ade20k"] == dict(train=20210, val=2000)
    assert counts["cityscapes"] == dict(train=2975, val=500, test=1525)
    assert counts["coco_stuff10k"] == dict(train=9000, val=1000)
    assert counts["coco_stuff164k"] == dict(train=118287, val=5000)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_report_reads_all_and_names_every_wrong_pair(workers, tmp_path, capsys):
    for i, label in enumerate(([0, 7], [0, 1], [9, 1])):
        save(tmp_path / f"images/train/{i}.png", photo(1, 2))
        save(tmp_path / f"labels/train/{i}.png", np.array([label], np.uint8))
    save(tmp_path / "images/train/3.png", photo(2, 2))
    save(tmp_path / "labels/train/3.png", np.zeros((1, 2), np.uint8))
    (tmp_path / "classes.txt").write_text("one\ntwo\n")
    output = str(tmp_path / "s.png")
    assert (
        data.main(
            ["folder", "--data-root", str(tmp_path), "--output", output, "--workers", str(workers)]
        )
        == 2
    )
    first, second, third, last = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "labels/train/0.png") in first and "[7]" in first
    assert str(tmp_path / "labels/train/2.png") in second and "[9]" in second
    assert str(tmp_path / "labels/train/3.png") in third and "2x1" in third and "2x2" in third
    assert last == "data.py: 3 of 4 pairs are wrong; correct the files"
    assert data.main(["folder", "--data-root", str(tmp_path), "--workers", "-1"]) == 2
    assert capsys.readouterr().err == "data.py: --workers -1: expected a number of at least 0\n"


def test_the_report_reads_on_as_many_processes_as_asked(tmp_path, monkeypatch):
    loaders = []

    class Loader(data.DataLoader):
        def __init__(self, *arguments, **options):
            loaders.append(options["num_workers"])
            super().__init__(*arguments, **options | {"num_workers": 0})

    monkeypatch.setattr(data, "DataLoader", Loader)
    dataset = folder(tmp_path, [[0]])
    for workers in (0, 1, 5):
        data.report(dataset, "mine", workers)
    assert loaders == [0, 1, 1]  # never more than there are pairs


# ---------------------------------------------------------------------------------------- odd files


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_photographs_of_16_bits_become_8_and_those_of_32_are_refused(kind, tmp_path):
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    path = tmp_path / f"a.{kind}"
    Image.fromarray(ramp).save(path)
    image = data.read_image(path)
    assert image.dtype == torch.uint8 and image.shape == (3, 16, 16)
    assert torch.equal(image[0].flatten().long(), torch.arange(256))
    if kind == "tiff":
        for dtype in (np.int32, np.float32):
            Image.fromarray(ramp.astype(dtype)).save(path)
            mistake(lambda: data.read_image(path), path, "no fixed range", "8 or 16 bits")


def test_photographs_with_labels_that_a_camera_turned_are_counted_in_a_warning(tmp_path, capsys):
    dataset = folder(tmp_path, [[0, 1], [1, 2], [0, 0]])
    file = dataset.files[0][0]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(file).save(file, exif=exif)
    data.warn_once.cache_clear()
    assert dataset[0][0].shape == (3, 3, 2)  # as stored
    dataset[0]
    assert capsys.readouterr().err.count("carry an EXIF orientation") == 1
    assert data.read_image(str(file), upright=True).shape == (3, 2, 3)
    data.report(dataset, "mine")
    counted = f"warning: 1 of 1 photographs in '{file.parent}' carry an EXIF orientation"
    assert counted in capsys.readouterr().err
    Image.open(file).rotate(90, expand=True).save(file, exif=exif)
    mistake(lambda: dataset[0], "is 2x3 and", "3x2;", "as it is stored, without", "its EXIF block")


def test_a_broken_exif_block_is_left_out(tmp_path):
    block = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x01\x00\x12\x01\x03\x00"  # cut short
    Image.new("RGB", (3, 2)).save(tmp_path / "a.jpg", exif=block)
    assert data.read_image(tmp_path / "a.jpg", upright=True).shape == (3, 2, 3)
    with Image.open(tmp_path / "a.jpg") as image:
        assert not data._is_turned(image)


def test_lists_and_names_may_begin_with_a_mark_and_have_to_be_utf_8(tmp_path):
    voc_tree(tmp_path, {"train": ["a", "b"]})
    path = tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [data.dataset("pascal_voc", tmp_path).name(i) for i in range(2)] == ["a", "b"]
    path.write_text("a\n", encoding="utf-16")
    mistake(lambda: data.dataset("pascal_voc", tmp_path), path, "is not UTF-8 text")
    other = tmp_path / "other"
    names = b"\xef\xbb\xbfone\ntwo\nthree\n".decode()
    assert folder(other, [[0]], classes=names).classes == ["one", "two", "three"]
    (other / "classes.txt").write_bytes("stra\xdfe\n".encode("latin-1"))
    mistake(lambda: data.dataset("folder", other), "classes.txt", "is not UTF-8 text")
    (other / "classes.txt").write_text("a\nb\na\n")
    mistake(lambda: data.dataset("folder", other), "classes.txt", "names 'a' twice")


def test_dot_files_are_no_pictures_and_labels_may_end_in_capitals(tmp_path):
    folder(tmp_path, [[0, 1]])
    for kind, name in (("images", "._a.png"), ("labels", "._a.png")):
        (tmp_path / kind / "train" / name).write_bytes(b"of another system")
    label = next(p for p in (tmp_path / "labels/train").iterdir() if p.name[0] != ".")
    label.rename(label.with_suffix(".PNG"))
    dataset = data.dataset("folder", tmp_path)
    assert len(dataset) == 1 and dataset[0][1].tolist() == [[0, 1]]


def test_huge_photographs_are_read_where_windows_are_given(tmp_path, monkeypatch):
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    advice = "megapixels; make it smaller; evaluate.py --window N reads it"  # only it has the flag
    mistake(lambda: data.read_image(tmp_path / "a.png"), "a.png", advice)
    assert data.read_image(tmp_path / "a.png", huge=True).shape == (3, 30, 30)
    label = np.zeros((30, 30), np.uint8)
    mistake(lambda: folder(tmp_path, label)[0], "images/train/a.png", advice)
    image, label = data.dataset("folder", tmp_path, huge=True)[0]  # as evaluate.py --window has it
    assert image.shape == (3, 30, 30) and label.shape == (30, 30)
    assert Image.MAX_IMAGE_PIXELS == 400


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "JPEG2000", "AVIF", "TIFF"])
def test_labels_of_a_lossy_format_are_refused_whatever_the_name_says(kind, tmp_path):
    dataset = folder(tmp_path, np.arange(400).reshape(20, 20) % 3)
    path, label = tmp_path / "labels/train/a.png", dataset[0][1]
    kwargs = dict(compression="jpeg") if kind == "TIFF" else {}
    try:
        Image.fromarray(label.numpy()).save(path, format=kind, **kwargs)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow does not write {kind}")
    name = "jpeg" if kind == "TIFF" else kind
    mistake(lambda: dataset[0], path, f"holds {name} data", "from its source: PNG, 8 bit, mode L")
    assert data.main(["folder", "--data-root", str(tmp_path), "--workers", "0"]) == 2
    path.rename(path.with_suffix(".jpg"))  # the image has no other label
    mistake(lambda: data.dataset("folder", tmp_path)[0], "labels/train")
    Image.fromarray(label.numpy()).save(path, format="BMP")  # nothing is lost
    path.with_suffix(".jpg").unlink()
    assert torch.equal(data.dataset("folder", tmp_path)[0][1], label)


@pytest.mark.parametrize("name", ["folder", "camvid", "ade20k", "coco_stuff164k", "cityscapes"])
def test_images_in_subfolders_are_read_and_no_two_have_one_name(name, tmp_path):
    base, end, label_end = "", ".png", ".png"
    if name == "ade20k":
        base = "ADEChallengeData2016"
    if name == "cityscapes":
        end, label_end = "_leftImg8bit.png", "_gtFine_labelIds.png"
    images, labels = {
        "folder": ("images/train", "labels/train"),
        "camvid": ("train", "trainannot"),
        "ade20k": ("images/training", "annotations/training"),
        "coco_stuff164k": ("images/train2017", "annotations/train2017"),
        "cityscapes": ("leftImg8bit/train", "gtFine/train"),
    }[name]
    places = ["a", "day1/a", "day1/noon/b", "day2/a"]
    for i, place in enumerate(places):
        save(tmp_path / base / images / f"{place}{end}", np.full((2, 2, 3), i, np.uint8))
        save(tmp_path / base / labels / f"{place}{label_end}", np.full((2, 2), 7 + i, np.uint8))
    (tmp_path / "classes.txt").write_text("".join(f"c{i}\n" for i in range(11)))
    dataset = data.dataset(name, tmp_path)
    names = [dataset.name(i) for i in range(len(dataset))]
    expected = [place.replace("/", "_") + end.removesuffix(".png") for place in places]
    assert sorted(names) == expected
    for i, (image, label) in enumerate(dataset):
        number = expected.index(names[i])
        assert (image == number).all() and label[0, 0] == dataset.lut[7 + number]
        assert torch.equal(label, dataset.raw(i)[1])
        if i + 1 == len(dataset):
            break


def test_names_without_folders_where_these_are_enough_and_a_clash_is_a_mistake(tmp_path):
    folder(tmp_path, [[0]])
    folder(tmp_path, [[1]], split="val")
    both = data.dataset("folder", tmp_path, "trainval")  # two files a.png
    assert [both.name(i) for i in range(2)] == ["train_a", "val_a"]
    assert data.dataset("folder", tmp_path, "val").name(0) == "a"
    for place in ("day/a", "day_a"):
        for kind in ("images", "labels"):
            save(tmp_path / kind / f"val/{place}.png", np.zeros((1, 1), np.uint8))
    mistake(lambda: data.dataset("folder", tmp_path, "val"), "share the name day_a; rename one")


def test_linked_folders_are_read_and_a_link_that_leads_back_ends(tmp_path):
    folder(tmp_path, [[0]])
    for kind in ("images", "labels"):
        save(tmp_path / "elsewhere" / kind / "b.png", np.zeros((1, 1), np.uint8))
        (tmp_path / kind / "train/day").symlink_to(tmp_path / "elsewhere" / kind)
        (tmp_path / kind / "train/back").symlink_to(tmp_path / kind)
    dataset = data.dataset("folder", tmp_path)
    assert sorted(dataset.name(i) for i in range(len(dataset))) == ["a", "b"]


def test_one_class_and_blank_lines_among_the_classes_are_mistakes(tmp_path):
    names = tmp_path / "classes.txt"
    mistake(lambda: folder(tmp_path, [[0]], classes="car\n"), names, "name the background too")
    for line, text in ((1, "\none\ntwo\n"), (2, "one\n \ntwo\n"), (3, "one\ntwo\n\n\nthree")):
        call = partial(folder, tmp_path, [[0]], classes=text)
        mistake(call, f"line {line} of '{names}' is blank")
    assert folder(tmp_path, [[0]], classes="one\ntwo\n\n \n").classes == ["one", "two"]


@pytest.mark.parametrize("kind", ["RGBA.png", "LA.png", "P.png", "P.gif", "RGB.png", "L.png"])
def test_what_transparency_hides_becomes_white_and_the_rest_stays(kind, tmp_path, recwarn):
    mode, end = kind.split(".")
    kwargs = {}
    if "A" in mode:
        image = Image.new("RGBA", (3, 1))
        image.putdata([(200, 10, 90, 0), (200, 10, 90, 255), (200, 10, 90, 51)])
        image = image.convert(mode)
    else:
        image = Image.new("RGB", (3, 1))
        image.putdata([(0, 0, 0), (200, 10, 90), (200, 10, 90)])
        image = image.convert(mode)
        kwargs = dict(transparency=image.getpixel((0, 0)))
    seen = np.asarray(image.convert("RGB"))[0, 1].tolist()
    image.save(tmp_path / f"a.{end}", **kwargs)
    found = data.read_image(tmp_path / f"a.{end}")[:, 0].T.tolist()
    assert found[:2] == [[255, 255, 255], seen]
    if "A" in mode:  # a fifth of the colour
        assert found[2] == pytest.approx([0.2 * value + 0.8 * 255 for value in seen], abs=1)
    assert not recwarn.list


def test_photographs_of_every_ending_that_pillow_reads_are_taken(tmp_path, capsys):
    data.warn_once.cache_clear()
    written = []
    for end in ("jfif", "gif", "jp2", "avif", "webp", "jpe", "JPG", "tga", "bmp", "pgm"):
        try:
            save(tmp_path / f"images/train/{end}.{end}", photo())
        except (KeyError, OSError, ValueError):  # this Pillow cannot
            (tmp_path / f"images/train/{end}.{end}").unlink(missing_ok=True)
            continue
        save(tmp_path / f"labels/train/{end}.png", np.zeros((4, 6), np.uint8))
        written.append(end)
    assert {"jfif", "gif", "webp", "JPG"} <= set(written)
    (tmp_path / "classes.txt").write_text("one\ntwo\n")
    dataset = data.dataset("folder", tmp_path)
    assert sorted(dataset.name(i) for i in range(len(dataset))) == sorted(written)
    assert all(dataset[i][0].shape == (3, 4, 6) for i in range(len(dataset)))
    files = data.photographs([tmp_path / "images"])
    assert len(files) == len(written) and not capsys.readouterr().err
    for name in ("a.heic", "b.pdf", "c.eps", "d.h5"):
        (tmp_path / "images/train" / name).write_bytes(b"of another program")
    assert data.photographs([tmp_path / "images"]) == files
    text = (
        f"warning: 4 files in '{tmp_path / 'images'}' are left out: Pillow does not read 'a.heic'"
    )
    assert text in capsys.readouterr().err


def test_results_in_a_folder_of_photographs_are_no_photographs(tmp_path):
    photograph = save(tmp_path / "a.png", photo())
    result = save(tmp_path / "predictions/a.png", photo())
    assert data.photographs([tmp_path], [tmp_path / "predictions", None]) == [photograph]
    assert data.photographs([tmp_path]) == [photograph, result]
    assert data.photographs([result.parent], [result.parent]) == [result]


def test_images_of_lists_may_have_another_ending(tmp_path):
    base = voc_tree(tmp_path, {"train": ["a", "b"]})
    for name, new in (("JPEGImages/a.jpg", "a.jfif"), ("SegmentationClass/b.png", "b.PNG")):
        (base / name).rename((base / name).with_name(new))
    dataset = data.dataset("pascal_voc", tmp_path)
    assert [path.name for path in dataset.files[0]] == ["a.jfif", "a.png"]
    assert [path.name for path in dataset.files[1]] == ["b.jpg", "b.PNG"]
    assert dataset[0][1].tolist() == dataset[1][1].tolist() == [[0, 20, 255]]


@pytest.mark.parametrize("line", ["/{}/{}.jpg /{}/{}.png", "VOC2012/{}/{}.jpg ../x/{}/{}.png"])
def test_lists_may_hold_the_paths_of_both_files(line, tmp_path):
    base = voc_tree(tmp_path, {"train": ["a", "b.c"], "val": ["d"]})
    path = base / "ImageSets/Segmentation/train.txt"
    ids, kind = ("a", "b.c", "a"), "SegmentationClass"
    listed(path, *(line.format("JPEGImages", i, kind, i) for i in ids))
    dataset = data.dataset("pascal_voc", tmp_path)
    assert [dataset.name(i) for i in range(3)] == [*ids]
    assert [dataset.files[1][0].name, dataset.files[1][1].name] == ["b.c.jpg", "b.c.png"]
    # a list of other labels
    save(base / "SegmentationClassAug/a.png", np.array([[5, 6, 7]], np.uint8))
    listed(path, line.format("JPEGImages", "a", "SegmentationClassAug", "a"))
    for name in ("pascal_voc", "pascal_voc_aug"):
        assert labels_of(name, tmp_path) == {"a": [5, 6, 7]}


def test_every_layout_with_lists_reads_paths(tmp_path):
    voc_tree(tmp_path, {"train": ["a"], "val": ["b"]}, "VOC2010", "SegmentationContext",
             "SegmentationClassContext", (0, 1, 59))  # fmt: skip
    base = tmp_path / "VOCdevkit/VOC2010/ImageSets/SegmentationContext/train.txt"
    listed(base, "/JPEGImages/a.jpg /SegmentationClassContext/a.png")
    assert labels_of("pascal_context", tmp_path) == {"a": [255, 0, 58]}
    pair(tmp_path / "JPEGImages/a.jpg", tmp_path / "SegmentationPart/a.png", (0, 6, 255))
    listed(tmp_path / "list/train_id.txt", "/JPEGImages/a.jpg /SegmentationPart/a.png")
    assert labels_of("pascal_person_part", tmp_path) == {"a": [0, 6, 255]}
    pair(tmp_path / "images/a.jpg", tmp_path / "annotations/a_labelTrainIds.png", (0, 170, 255))
    listed(tmp_path / "imageLists/train.txt", "images/a.jpg annotations/a_labelTrainIds.png")
    assert labels_of("coco_stuff10k", tmp_path) == {"a": [0, 170, 255]}


def test_names_match_in_every_form_of_unicode(tmp_path):
    one, other = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    assert one != other
    for split, (image, label) in dict(train=(one, other), val=(other, one)).items():
        save(tmp_path / f"images/{split}/{image}/{image}.png", photo(1, 3))
        save(tmp_path / f"labels/{split}/{label}/{label}.png", np.array([[0, 1, 1]], np.uint8))
        (tmp_path / "classes.txt").write_text("one\ntwo\n")
        assert labels_of("folder", tmp_path, split) == {image: [0, 1, 1]}
    base = voc_tree(tmp_path, {"train": [one], "val": [other]})
    for kind, end in (("JPEGImages", "jpg"), ("SegmentationClass", "png")):
        (base / kind / f"{one}.{end}").rename(base / kind / "x")
        (base / kind / f"{other}.{end}").rename(base / kind / f"{one}.{end}")
        (base / kind / "x").rename(base / kind / f"{other}.{end}")
        (base / kind / f"{one}.{end}").unlink()
    assert labels_of("pascal_voc", tmp_path) == {other: [0, 20, 255]}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_name_with_a_line_break_leaves_the_message_whole(workers, tmp_path, capsys):
    folder(tmp_path, [[0, 1]])
    for kind in ("images", "labels"):
        (tmp_path / kind / "train/a.png").rename(tmp_path / kind / "train/a\nb\x1b.png")
    (tmp_path / "images/train/a\nb\x1b.png").write_bytes(b"broken")
    flags = ["folder", "--data-root", str(tmp_path), "--workers", str(workers)]
    assert data.main(flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"data.py: '{tmp_path}/images/train/a\\nb\\x1b.png' cannot be read as an image" in line

    def work():  # as in train.py
        next(iter(DataLoader(data.dataset("folder", tmp_path), num_workers=workers)))

    assert data.guarded("train.py", work) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"train.py: '{tmp_path}/images/train/a\\nb\\x1b.png' cannot be read as an image" in line


def test_names_that_the_terminal_does_not_have_are_printed_with_replaced_characters(
    tmp_path, monkeypatch
):
    folder(tmp_path, [[0, 1]], classes="stra\u00dfe\nb\u00e4ume\nc\n")
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    flags = ["folder", "--data-root", str(tmp_path), "--output", str(tmp_path / "s.png")]
    assert data.main([*flags, "--workers", "0"]) == 0
    terminal.flush()
    assert b"stra?e" in terminal.buffer.getvalue()


# -------------------------------------------------------------------------------------- downloading


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(its folder, its address): a web server of this machine."""
    root = tmp_path_factory.mktemp("server")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(root))
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield root, f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()


def official(name, tmp_path):
    """The trees that the archives of `name` hold, by archive, as their authors lay them out."""
    tree = tmp_path / "trees"
    picture, label = photo(1, 3), np.array([[0, 1, 255]], np.uint8)
    if name.startswith("pascal_voc"):
        voc_tree(tree / "0", {"train": ["a"], "val": ["b"]})
        sbd = tree / "1/benchmark_RELEASE/dataset"
        save(sbd / "img/c.jpg", picture)
        listed(sbd / "train.txt", "c")
        listed(sbd / "val.txt", "a")
        (sbd / "cls").mkdir()
    elif name == "ade20k":
        for part, stem in (("training", "ADE_train_1"), ("validation", "ADE_val_1")):
            save(tree / f"0/ADEChallengeData2016/images/{part}/{stem}.jpg", picture)
            save(tree / f"0/ADEChallengeData2016/annotations/{part}/{stem}.png", label)
    else:
        for i, split in enumerate(("train2017", "val2017")):
            save(tree / f"{i}/{split}/1.jpg", picture)
            save(tree / f"2/{split}/1.png", label)
    return tree


@pytest.mark.parametrize("name", ["pascal_voc", "pascal_voc_aug", "ade20k", "coco_stuff164k"])
def test_download_makes_the_layout_that_is_read(name, server, tmp_path, monkeypatch, capsys):
    served, address = server
    tree, archives = official(name, tmp_path), []
    for i, archive in enumerate(data.ARCHIVES[name]):
        file = archive.url.rsplit("/", 1)[1]
        kind = {"tar": "tar", "tgz": "gztar", "zip": "zip"}[file.rsplit(".", 1)[1]]
        base = served / name / f"{i}"
        shutil.make_archive(str(base), kind, tree / str(i))
        made = next((served / name).glob(f"{i}.*"))
        made.rename(served / name / file)
        md5 = archive.md5 and hashlib.md5((served / name / file).read_bytes()).hexdigest()
        archives.append(archive._replace(url=f"{address}/{name}/{file}", md5=md5))
    monkeypatch.setitem(data.ARCHIVES, name, tuple(archives))
    root = tmp_path / "root"
    for path in archives[0].makes[:1]:  # a part that is there already is not touched
        if name == "coco_stuff164k":
            save(root / path / "1.jpg", photo(1, 3))
            (root / path / "mine.txt").write_text("mine")
    data.download(name, root)
    if name != "pascal_voc_aug":  # SBD's labels are MATLAB's: its files are looked at below
        assert len(data.dataset(name, root, "train")) == len(data.dataset(name, root, "val")) == 1
    else:
        assert (root / "benchmark_RELEASE/dataset/img/c.jpg").exists()
    if name == "coco_stuff164k":
        assert (root / "images/train2017/mine.txt").read_text() == "mine"
    left = [
        p for p in root.rglob("*") if p.suffix in (".part", ".zip", ".tar", ".tgz", ".unpacked")
    ]
    assert left == []
    shutil.rmtree(served / name)  # what is there is not fetched again
    capsys.readouterr()
    data.download(name, root)
    assert capsys.readouterr().out.count("is there already") == len(archives)


def test_an_archive_that_is_cut_short_or_changed_is_not_used(server, tmp_path, monkeypatch):
    served, address = server
    (served / "a.zip").write_bytes(b"half of it")
    root, archive = tmp_path / "root", data.Archive(f"{address}/a.zip", ("a",), md5="0" * 32)
    monkeypatch.setitem(data.ARCHIVES, "ade20k", (archive,))
    mistake(lambda: data.download("ade20k", root), "a.zip cannot be downloaded", "corrupted")
    assert list(root.iterdir()) == []
    monkeypatch.setitem(data.ARCHIVES, "ade20k", (archive._replace(md5=None),))
    mistake(lambda: data.download("ade20k", root), "unpacked (File is not a zip file)", "remove")
    assert not (root / "a.zip").exists()
    (root / "a.zip").write_bytes(b"put there by hand")
    mistake(lambda: data.download("ade20k", root), f"remove '{root / 'a.zip'}', if it is there")
    (root / "a.zip").unlink()
    gone = archive._replace(url=f"{address}/nothing.zip")
    monkeypatch.setitem(data.ARCHIVES, "ade20k", (gone,))
    mistake(
        lambda: data.download("ade20k", root), "cannot be downloaded", "nothing.zip'", "try again"
    )

    class Short(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 10)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Short) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{httpd.server_address[1]}/b.zip"
        monkeypatch.setitem(data.ARCHIVES, "ade20k", (data.Archive(url, ("b",)),))
        mistake(lambda: data.download("ade20k", root), "b.zip")
        httpd.shutdown()
    assert not list(root.glob("*b.zip"))


def test_what_needs_an_account_names_its_source(tmp_path, capsys):
    for name in ("cityscapes", "camvid", "folder"):
        call = partial(data.download, name, tmp_path)
        mistake(call, "is not downloaded by this command", data.LAYOUTS[name].source)
    assert data.main(["pascal_voc", "--data-root", str(tmp_path)]) == 2
    line = f"by `python data.py pascal_voc --download --data-root {tmp_path}`"
    assert line in capsys.readouterr().err


def test_datasets_that_share_files_share_their_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert data.default_root("coco_voc") == Path("datasets/coco_stuff164k")
    Path("datasets/coco_voc").mkdir(parents=True)
    assert data.default_root("coco_voc") == Path("datasets/coco_voc")
    assert data.default_root("camvid") == Path("datasets/camvid")


# -------------------------------------------------------------------------- decoding, several uses


def pictures(tmp_path):
    """Files of every kind that `read_image` decides about, by name."""
    array = photo(37, 50)
    array[:, :25] = np.arange(25, dtype=np.uint8)[:, None] * 10
    rgb = Image.fromarray(array)
    exif, profile = Image.Exif(), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    exif[0x0112] = 6
    palette, gray16 = rgb.convert("P"), np.arange(37 * 50, dtype=np.uint16).reshape(37, 50) * 30
    kinds = {
        "rgb.png": (rgb, {}),
        "interlaced.webp": (rgb, {}),
        "rgb.bmp": (rgb, {}),
        "rgb.tif": (rgb, {}),
        "colour_key.png": (rgb, dict(transparency=tuple(int(c) for c in array[0, 0]))),
        "profile.png": (rgb, dict(icc_profile=profile.tobytes())),
        "turned.png": (rgb, dict(exif=exif)),
        "turned.jpg": (rgb, dict(exif=exif)),
        "gray.png": (rgb.convert("L"), {}),
        "gray.jpg": (rgb.convert("L"), {}),
        "gray16.png": (Image.fromarray(gray16), {}),
        "gray_alpha.png": (rgb.convert("LA"), {}),
        "alpha.png": (rgb.convert("RGBA"), {}),
        "palette.png": (palette, {}),
        "palette_key.png": (palette, dict(transparency=3)),
        "one_bit.png": (rgb.convert("1"), {}),
        "cmyk.jpg": (rgb.convert("CMYK"), dict(quality=95)),
        "rgb.jpg": (rgb, dict(quality=90)),
        "full.jpg": (rgb, dict(quality=90, subsampling=0)),
        "progressive.jpg": (rgb, dict(quality=60, progressive=True)),
    }
    for name, (image, kwargs) in kinds.items():
        image.save(tmp_path / name, **kwargs)
    (tmp_path / "rgb16.png").write_bytes(rgb16(5, 7))
    (tmp_path / "late_exif.png").write_bytes(late_exif((tmp_path / "rgb.png").read_bytes()))
    return sorted(tmp_path.iterdir())


def chunk(kind, content):
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def rgb16(height, width, step=600):
    """A PNG of three channels of 16 bits, which Pillow does not write; values are step apart."""
    values = (np.arange(height * width * 3).reshape(height, -1) * step).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def late_exif(png):
    """The PNG with an EXIF block after its pixels, which says that it is to be turned."""
    exif = Image.Exif()
    exif[0x0112] = 6
    end = png.index(b"IEND") - 4
    return png[:end] + chunk(b"eXIf", exif.tobytes()[6:]) + png[end:]


@pytest.mark.parametrize("upright", [False, True])
def test_every_kind_of_picture_is_read_as_pillow_reads_it(upright, tmp_path, monkeypatch):
    paths = pictures(tmp_path)
    fast, decode = set(), torchvision.io.decode_image

    def counted(*arguments):
        fast.add(path.name)
        return decode(*arguments)

    for path in paths:
        monkeypatch.setattr(torchvision.io, "decode_image", counted)
        found = data.read_image(path, upright=upright)
        monkeypatch.setattr(torchvision.io, "decode_image", None)  # Pillow reads all of them
        expected = data.read_image(path, upright=upright)
        assert found.dtype == torch.uint8 and found.shape == expected.shape, path
        # PNG loses nothing. JPEG: libjpeg's own versions may round the inverse DCT and the
        # conversion of colours differently, by 2 gray values at most, in the mean far less.
        difference = (found.int() - expected.int()).abs()
        limit = 2 if path.suffix == ".jpg" else 0
        assert difference.max() <= limit and difference.float().mean() <= limit / 10, path
        assert found.stride() == expected.stride(), path
        turned = path.stem in ("turned", "late_exif")
        assert found.shape == {True: (3, 50, 37), False: (3, 37, 50)}[turned and upright] or (
            path.name == "rgb16.png" and found.shape == (3, 5, 7)
        )
    assert fast == {"rgb.png", "rgb.jpg", "full.jpg", "progressive.jpg"}


def test_decoding_says_nothing(tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in pictures(tmp_path):
            data.read_image(path, upright=True)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["jpg", "png"])
@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
def test_a_broken_tail_is_a_mistake_that_pillow_names(kind, share, tmp_path):
    path = save(tmp_path / f"a.{kind}", photo(64, 64))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    mistake(lambda: data.read_image(path), path, "cannot be read as an image", "truncated")


def test_without_decode_image_pillow_reads(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", photo())
    monkeypatch.delattr(torchvision.io, "decode_image")
    assert np.array_equal(data.read_image(path).permute(1, 2, 0), photo())


def test_palette_labels_never_become_colours_and_jpegs_are_photographs(tmp_path):
    label = Image.fromarray(np.array([[0, 2, 1]], np.uint8)).convert("P")
    label.putpalette([200, 100, 50] * 256)
    label.putdata([0, 2, 1])
    path = save(tmp_path / "a.png", label)
    assert data.read_label(path, data._lut(range(3))).tolist() == [[0, 2, 1]]
    assert data.read_image(path)[:, 0, 0].tolist() == [200, 100, 50]


def test_uses_of_randomness_share_no_seed():
    uses = data.AUGMENTATION, data.ORDER, data.DROPOUT
    assert len(set(uses)) == 3 and 0 not in uses
    # One number more that is 0 gives the same seed in numpy: with the use in front it cannot be of
    # another use.
    numbers = [(3,), (3, 0), (3, 0, 0), (0,), (0, 3), (0, 0, 3)]
    seeds = {use: {data.seed_of(use, *n) for n in numbers} for use in uses}
    for one in uses:
        for other in uses:
            assert one == other or not seeds[one] & seeds[other]
    seen = []
    dataset = data.dataset("shapes", train=True, crop_size=32, seed=3)
    dataset.transform = lambda image, label: seen.append(torch.initial_seed())
    dataset[0, 5]
    order = torch.Generator().manual_seed(data.seed_of(data.ORDER, 3, 0))
    expected = torch.randperm(10, generator=order).tolist()
    (batch,) = data.PositionSampler(10, 10, 0, 1, seed=3)
    assert [index for index, _ in batch] == expected
    assert seen == [data.seed_of(data.AUGMENTATION, 3, 5)]
    assert data.seed_of(data.DROPOUT, 3, 5, 0) != seen[0]  # it was the same without the use


# ------------------------------------------------------------------------------ ends of a process


def failing(error):
    def work():
        raise error

    return work


def test_the_line_is_printed_before_the_process_group_ends(capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(data.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(
        data.dist, "destroy_process_group", lambda: seen.append(capsys.readouterr())
    )
    assert data.guarded("train.py", failing(data.UserError("wrong; mend it"))) == 2
    assert [captured.err for captured in seen] == ["train.py: wrong; mend it\n"]
    assert data.guarded("train.py", lambda: None) == 0 and len(seen) == 2


def test_processes_with_the_same_line_print_it_once_and_every_other_line_is_seen(
    capsys, monkeypatch
):
    store = data.dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    same, own = data.UserError("no such dataset"), data.UserError("'a.png' is broken")
    for error in (same, same, own, same, OSError(28, "No space left on device")):
        assert data.guarded("train.py", failing(error)) == 2
    first, second, third = capsys.readouterr().err.splitlines()
    assert (first, second) == ("train.py: no such dataset", "train.py: 'a.png' is broken")
    assert "the disk is full" in third


def test_processes_that_cannot_meet_print_their_lines_all_the_same(capsys, monkeypatch):
    def unreachable(*arguments, **kwargs):
        raise RuntimeError("no store")

    monkeypatch.setattr(data.dist, "TCPStore", unreachable)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    for _ in range(2):
        assert data.guarded("train.py", failing(data.UserError("wrong"))) == 2
    assert capsys.readouterr().err == "train.py: wrong\n" * 2


WITHOUT = """
import os, signal, sys
sys.modules["fcntl"] = None
for module, names in ((os, "setsid killpg sched_getaffinity"),
                      (signal, "SIGHUP SIGUSR1 setitimer")):
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
import data
data.own_session(0)
assert data.cores() >= 1
sys.exit(data.main(["shapes", "--split", "val", "--workers", "1", "--output", sys.argv[1]]))
"""


def test_it_works_without_what_windows_lacks(tmp_path):
    output = tmp_path / "s.png"
    command = [sys.executable, "-c", WITHOUT, str(output)]
    done = subprocess.run(command, cwd=Path(data.__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "shapes val: 100 images" in done.stdout and output.exists()


# ---------------------------------------------------------------------------------------- trainval


def two_splits(name, root, matlab):
    """The smallest tree of a layout: train has the image a (ADE20K and its kin: five), val b."""
    base = {"ade20k_16k": "ade20k", "coco_voc": "coco_stuff164k"}.get(name, name)
    for split, i in (("train", "a"), ("val", "b")):
        both = range(5) if base == "ade20k" else [""]
        for stem in (f"{i}{n}" for n in both):
            part = {"train": "training", "val": "validation"}[split]
            ade, city = root / "ADEChallengeData2016", f"x/{stem}_"
            image, label = {
                "camvid": (f"{split}/{stem}.png", f"{split}annot/{stem}.png"),
                "folder": (f"images/{split}/{stem}.png", f"labels/{split}/{stem}.png"),
                "ade20k": (
                    ade / f"images/{part}/{stem}.jpg",
                    ade / f"annotations/{part}/{stem}.png",
                ),
                "cityscapes": (
                    f"leftImg8bit/{split}/{city}leftImg8bit.png",
                    f"gtFine/{split}/{city}gtFine_labelIds.png",
                ),
                "coco_stuff164k": (
                    f"images/{split}2017/{stem}.jpg",
                    f"annotations/{split}2017/{stem}.png",
                ),
                "coco_stuff10k": (f"images/{stem}.jpg", f"annotations/{stem}_labelTrainIds.png"),
                "pascal_person_part": (f"JPEGImages/{stem}.jpg", f"SegmentationPart/{stem}.png"),
            }.get(base, (None, None))
            if image:
                save(root / image, photo(40, 40))
                save(root / label, np.ones((40, 40), np.uint8))
    (root / "classes.txt").write_text("one\ntwo\n")
    listed(root / "imageLists/train.txt", "a")
    listed(root / "imageLists/test.txt", "b")
    listed(root / "list/train_id.txt", "a")
    listed(root / "list/val_id.txt", "b")
    lists = {"train": ["a"], "val": ["b"]}
    if name == "pascal_voc":
        lists["trainval"] = ["b", "a"]  # its own list
    if name == "pascal_context":
        folder = "SegmentationClassContext"
        voc_tree(root, lists, "VOC2010", "SegmentationContext", folder, (0, 1, 59))
    elif name.startswith("pascal_voc"):
        voc_tree(root, lists)
    if name == "pascal_voc_aug":
        save(root / "VOCdevkit/VOC2012/SegmentationClassAug/a.png", np.ones((1, 3), np.uint8))


@pytest.mark.parametrize("name", data.LAYOUTS)
def test_trainval_is_train_then_val_in_every_layout(name, tmp_path, capsys):
    two_splits(name, tmp_path, None)
    train, val, both = (data.dataset(name, tmp_path, s) for s in ("train", "val", "trainval"))
    expected = [*train.files, *val.files]
    assert both.files == (expected[::-1] if name == "pascal_voc" else expected)
    assert len(train) and len(val) and both.classes == train.classes
    assert torch.equal(both[len(train)][1], val[0][1] if name != "pascal_voc" else train[0][1])
    counts = data.LAYOUTS[name].counts
    total = counts.get("trainval") or sum(counts.get(s) or 0 for s in ("train", "val"))
    assert total == 0 or f"trainval has {len(both)} of {total} images" in capsys.readouterr().err


def test_a_folder_named_trainval_is_taken_as_it_is(tmp_path):
    folder(tmp_path, [[0]], split="train")
    assert len(folder(tmp_path, [[1]], split="val")) == 1
    assert len(data.dataset("folder", tmp_path, "trainval")) == 2
    assert len(folder(tmp_path, [[1]], split="trainval")) == 1


def test_trainval_of_shapes_is_train_then_val():
    both, train, val = (
        data.dataset("shapes+company", split=s) for s in ("trainval", "train", "val")
    )
    assert len(both) == len(train) + len(val) == 2100
    for index, split, place in (
        (0, train, 0),
        (1999, train, 1999),
        (2000, val, 0),
        (2099, val, 99),
    ):
        for one, other in zip(both.raw(index), split.raw(place)):
            assert torch.equal(one, other)
    with pytest.raises(IndexError):
        both.raw(2100)


def test_two_labels_of_one_name_and_a_split_that_is_no_name_are_mistakes(tmp_path):
    root = tmp_path / "root"
    (root / "images/train").mkdir(parents=True)
    (root / "labels/train").mkdir(parents=True)
    (root / "classes.txt").write_text("a\nb\n")
    picture = Image.fromarray(np.zeros((4, 4), np.uint8))
    picture.save(root / "images/train/x.png")
    for name in ("x.png", "x.PNG"):
        picture.save(root / "labels/train" / name)
    mistake(lambda: data.dataset("folder", root, "train"), "x.PNG'", "have one name")
    for split in ("", ".", "../x", "a/b"):
        mistake(lambda split=split: data.dataset("folder", root, split), "the name of a split")


def test_two_images_of_one_name_in_a_folder_of_a_list_do_not_hide_the_others(tmp_path):
    # A list names x.jpg and gone.jpg; that y is there twice is nobody's concern.
    voc = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (voc / folder).mkdir(parents=True)
    picture = Image.fromarray(np.zeros((4, 4), np.uint8))
    for name in ("x.jpg", "y.jpg", "y.png"):
        picture.save(voc / "JPEGImages" / name)
    picture.save(voc / "SegmentationClass" / "x.png")
    (voc / "ImageSets/Segmentation/train.txt").write_text("x\ngone\n")
    assert len(data.dataset("pascal_voc", tmp_path, "train")) == 1


def test_a_contact_sheet_never_takes_the_place_of_a_picture_of_another_split(photos, capsys):
    picture = photos / "images" / "val" / "0.png"
    before = picture.read_bytes()
    given = ["folder", "--data-root", str(photos), "--workers", "0", "--output", str(picture)]
    assert data.main(given) == 2
    assert "is among the dataset's files" in capsys.readouterr().err
    assert picture.read_bytes() == before


@pytest.mark.parametrize("kind", ["gray.png", "gray.tiff", "gray.pgm", "rgb.png"])
def test_photographs_of_12_bits_in_16_are_counted_in_a_warning(kind, tmp_path, capsys):
    dataset = folder(tmp_path, np.zeros((5, 7)))
    gray = np.arange(35, dtype=np.uint16).reshape(5, 7) * 117  # up to 3978
    name, end = kind.split(".")
    content = rgb16(5, 7, 38)  # up to 3952
    if name == "gray":
        Image.fromarray(gray).save(tmp_path / f"dark.{end}")
        content = (tmp_path / f"dark.{end}").read_bytes()
    dataset.files[0][0].write_bytes(content)
    data.warn_once.cache_clear()
    assert dataset[0][0].max() == 15
    dataset[0]
    text = f"photographs in '{tmp_path / 'images/train'}' have 16 bits and no value above 4095"
    assert capsys.readouterr().err.count(text) == 1
    data.report(dataset, "mine", workers=1)
    assert f"warning: 1 of 1 {text}" in capsys.readouterr().err
    bright = rgb16(5, 7, 600)
    if name == "gray":
        Image.fromarray(gray * 16).save(tmp_path / f"dark.{end}")
        bright = (tmp_path / f"dark.{end}").read_bytes()
    dataset.files[0][0].write_bytes(bright)
    data.report(dataset, "mine")
    assert "16 bits" not in capsys.readouterr().err


def test_photographs_in_two_splits_are_counted_in_a_warning(tmp_path, capsys):
    for split, count in (("train", 4), ("val", 3), ("trainval", 6)):
        for i in range(count):
            save(tmp_path / f"images/{split}/{split}{i}.png", photo(seed=i if i < 2 else count + i))
            save(tmp_path / f"labels/{split}/{split}{i}.png", np.zeros((4, 6), np.uint8))
    (tmp_path / "classes.txt").write_text("one\ntwo\n")
    flags = ["folder", "--data-root", str(tmp_path), "--output", str(tmp_path / "s.png")]
    assert data.main([*flags, "--workers", "0"]) == 0
    images = tmp_path / "images"
    text = f"2 photographs are in more than one split, as '{images / 'train/train0.png'}' and "
    assert f"warning: {text}'{images / 'val/val0.png'}'" in capsys.readouterr().err
    for i in range(2):
        save(images / f"val/val{i}.png", photo(seed=90 + i))
    assert data.main([*flags, "--workers", "0"]) == 0
    assert "more than one split" not in capsys.readouterr().err
