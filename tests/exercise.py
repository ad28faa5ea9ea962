"""A kit for courses: functions of the papers to write again, graded by this repository's tests.

    python tests/exercise.py list
    python tests/exercise.py make caa.channelized car.class_centers --output handout
    python tests/exercise.py grade submissions/* --exercise caa.channelized car.class_centers

`make` copies the code without the bodies of these functions. Parts whose tests hold a solution are
kept for grading. In the handout, `python tests/exercise.py grade .` marks the others. `grade` runs
the tests of the repository that it is started in against the files of each folder, never the
folder's own tests. A submission has one process, each test a limit in CPU time (not on Windows).
A process that finishes no test for minutes is ended. With --json `grade` goes on where it was
interrupted. A submission can do what Python can: grade in a container, and read what is flagged.
"""

import argparse
import ast
import contextlib
import csv
import functools
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 10  # seconds of CPU time for one test
# A process that finishes no test in so many seconds on the clock is ended: STARTING, and PATIENCE
# times the limit. So a busy machine takes no marks.
STARTING, PATIENCE = 120, 6
TIMED = hasattr(signal, "setitimer")  # Windows has no timers
ALIKE_FROM = 50  # statements and expressions: in three lines or fewer there is little to choose


class Exercise(NamedTuple):
    """What is to be written again, and how it is marked."""

    title: str
    source: str  # paper and equation
    difficulty: int  # 1: a line or two; 2: several steps; 3: to be derived first
    blank: tuple  # the functions whose bodies are taken out
    solutions: tuple  # functions of the test file that hold a solution: not handed out
    hint: str
    parts: tuple  # (what holds, test, or test[of these parameters], marks)
    notes: str = ""  # what the tests ask for besides the equation
    first: int = 1  # so many parts, hand-worked, come first: each has to hold for those after it


HALF = "half precision, which is computed in float32"
RELEASED = "the released form, for which no other part asks"

EXERCISES = {
    "caa.column_attention": Exercise(
        "Column attention", "Channelized Axial Attention, thesis Eq. (3.3)", 1,
        ("column_attention",), ("loop_map", "map_of"),
        "Bring the columns in front as a batch dimension; then it is one matrix product.",
        (("hand-worked map of three columns", "test_eq_3_3_column_map_by_hand", 1),
         ("loop over i, j, m, with gradient", "test_eq_3_3_and_3_4_maps_equal_loops[column", 2),
         ("rows are columns of exchanged axes",
          "test_columns_and_rows_are_each_other_on_exchanged_axes", 1),
         ("products beyond float16's largest number, in float32",
          "test_float16_queries_beyond_65504_give_a_finite_map", 1))),
    "caa.channelized": Exercise(
        "Channelized attention without the weighted features",
        "Channelized Axial Attention, thesis Eqs. (3.9) to (3.11), Algorithm 2", 3,
        ("channelized",),
        ("loop_map", "loop_column", "loop_row", "loop_axis", "map_of"),
        "The gate does not depend on the index that Eq. (3.11) sums over. What can leave the sum?",
        (("hand-worked column step", "test_eq_3_9_by_hand", 1),
         ("the weighted features are not computed, also not in groups",
          "test_weighted_features_are_never_computed", 3),
         ("hand-worked row step", "test_eq_3_10_by_hand", 1),
         ("two channels and two images by hand",
          "test_eq_3_11_by_hand_with_two_channels_and_two_images", 1),
         ("loops over i, j, m, n, with gradients", "test_eq_3_9_and_3_10_gated_equal_loops", 2),
         ("half-precision features are pooled in float32",
          "test_float16_features_are_pooled_in_float32", 1)),
        "Half-precision values keep their precision; the gate's average is float32.", first=2),
    "ksac.shared_atrous": Exercise(
        "One kernel for all rates", "Kernel-Sharing Atrous Convolution, thesis Algorithm 1", 2,
        ("separate", "rearranged", "shared_atrous"),
        ("loop_conv2d", "algorithm_1",
         "test_shared_atrous_equals_separate_convolutions_at_any_size",
         "test_gradient_of_the_shared_kernel_is_the_sum_over_the_rates",
         "test_the_form_is_chosen_by_channels_and_rates_and_changes_nothing"),
        "A rate is a dilation. What padding keeps the size of the map? For `rearranged`, multiply "
        "first, then shift: torch.nn.functional.fold adds up what is shifted.",
        (("hand-worked taps, plain form", "test_line_4_by_hand[separate", 1),
         ("hand-worked taps, rearranged form, with the multiply-adds of one convolution",
          "test_rearranged_taps_by_hand_with_the_multiply_adds_of_one_convolution", 3),
         ("loop over the nine taps, with gradients",
          "test_line_4_equals_the_loop_with_gradients[rearranged", 2),
         ("the kernel's gradient is the sum over the rates",
          "test_gradient_of_the_shared_kernel_is_the_sum_over_the_rates[rearranged", 1),
         ("maps one position wide, rates larger than the map",
          "test_shared_atrous_equals_separate_convolutions_at_any_size[rearranged", 1),
         ("the faster form is taken",
          "test_the_form_is_chosen_by_channels_and_rates_and_changes_nothing", 1)),
        "`shared_atrous` calls one of the other two; REARRANGED_FROM says which.", first=2),
    "car.class_centers": Exercise(
        "Class centres", "Class-Aware Regularization, thesis Eq. (4.1)", 1,
        ("class_centers",), ("loop_centers",),
        "flat() and one_hot() are there. Yᵀ·X adds up the features of each class.",
        (("hand-worked centres of two images", "test_eq_4_1_by_hand", 1),
         ("loop over the pixels, with gradient", "test_eq_4_1_equals_the_loop_with_gradients", 2),
         ("absent and ignored classes",
          "test_absent_and_ignored_classes_have_centre_0_with_a_zero_gradient", 1),
         (HALF, "test_half_precision_equals_float32[class_centers", 1))),
    "car.intra_center_to_pixel": Exercise(
        "Pixels near the centre of their class",
        "Class-Aware Regularization, thesis Eqs. (4.2), (4.3)", 1,
        ("intra_center_to_pixel",), ("loop_intra",),
        "Ignored pixels add zero loss but stay in the denominator.",
        (("hand-worked loss", "test_eqs_4_2_4_3_intra_by_hand", 1),
         ("loop over pixels and channels, with gradient",
          "test_eqs_4_2_4_3_intra_equals_the_loop_with_gradients[False", 2),
         ("no gradient reaches the centres",
          "test_no_gradient_reaches_the_centres_of_the_pixel_terms[intra_center_to_pixel", 1),
         ("nothing is labelled",
          "test_nothing_labelled_is_a_loss_of_0_with_a_zero_gradient[intra_center_to_pixel", 1),
         (HALF, "test_half_precision_equals_float32[intra_center_to_pixel", 1),
         (RELEASED, "test_released_intra_squares_the_mean_by_hand", 1))),
    "car.inter_center_to_center": Exercise(
        "Class centres apart", "Class-Aware Regularization, thesis Eqs. (4.4) to (4.7)", 2,
        ("inter_center_to_center",),
        ("loop_c2c", "test_gradient_reaches_one_of_the_two_centres_between_centres",
         "test_thresholds_are_shared_by_the_other_classes"),
        "The threshold is shared by the K - 1 other classes. One side of the product is stopped.",
        (("hand-worked loss", "test_eqs_4_4_to_4_7_between_centres_by_hand", 1),
         ("loop over the classes, with gradient",
          "test_eqs_4_4_to_4_7_between_centres_equal_the_loop_with_gradients[False", 2),
         ("the gradient reaches one of the two centres",
          "test_gradient_reaches_one_of_the_two_centres_between_centres", 1),
         ("absent classes", "test_absent_classes_have_centre_0_and_take_part_in_the_softmax", 1),
         (HALF, "test_half_precision_equals_float32[inter_center_to_center", 1),
         (RELEASED, "test_released_c2c_squares_the_mean_by_hand", 1))),
    "car.inter_center_to_pixel": Exercise(
        "Pixels far from the centres of other classes",
        "Class-Aware Regularization, thesis Eqs. (4.8) to (4.14)", 3,
        ("inter_center_to_pixel",), ("loop_c2p",),
        "Replace the energy of a pixel's own class before the softmax, mask it after.",
        (("hand-worked loss", "test_eqs_4_8_to_4_14_between_centres_and_pixels_by_hand", 1),
         ("Eq. (4.11) as printed", "test_eq_4_11_as_printed_has_no_root_of_c", 1),
         ("loop over pixels and classes, with gradient",
          "test_eqs_4_8_to_4_14_between_centres_and_pixels_equal_the_loop_with_gradients[form0", 2),
         ("no gradient reaches the centres",
          "test_no_gradient_reaches_the_centres_of_the_pixel_terms[inter_center_to_pixel", 1),
         ("nothing is labelled",
          "test_nothing_labelled_is_a_loss_of_0_with_a_zero_gradient[inter_center_to_pixel", 1),
         (HALF, "test_half_precision_equals_float32[inter_center_to_pixel", 1),
         (RELEASED, "test_released_inter_c2p_counts_ignored_pixels_and_squares_the_mean", 1))),
    "pyramid_fuse.pyramid_labels": Exercise(
        "Unity-cells and mix-cells", "Specialize and Fuse, Sect. 3.2, App. B", 2,
        ("pyramid_labels",), ("cell_by_cell",),
        "The smallest and the largest label of a cell tell most. Where is 255 in the way?",
        (("hand-worked pyramid of an 8x8 map", "test_pyramid_labels_by_hand", 1),
         ("the three cases, cell by cell",
          "test_pyramid_labels_are_the_three_cases_of_appendix_b", 3),
         ("sizes that do not fit are refused", "test_labels_of_another_size_are_refused", 1)),
        "All results are int64, as the labels."),
    "pyramid_fuse.relabel": Exercise(
        "What is done by coarser levels", "Specialize and Fuse, Sect. 3.2, Table 7", 2,
        ("relabel",), ("ancestors", "test_relabelling_looks_at_every_ancestor"),
        "Carry one mask from level to level: repeat_cells() brings it to the finer one.",
        (("hand-worked relabelling", "test_relabelling_by_hand", 1),
         ("every ancestor of every cell", "test_relabelling_looks_at_every_ancestor", 2),
         ("nothing below a don't-care cell",
          "test_nothing_below_a_dont_care_cell_is_relabelled", 1),
         ("the threshold", "test_relabelling_has_a_threshold_of_nine_tenths", 1),
         ("an unknown policy is named", "test_unknown_policy_is_named", 1)),
        "All results are int64, as the labels."),
    "pyramid_fuse.fuse": Exercise(
        "Fusing the pyramid", "Specialize and Fuse, Eq. (2)", 1,
        ("chosen_level", "fuse"), ("test_eq_2_equals_its_sum_with_gradients",),
        "Go from fine to coarse, and let the coarser level override.",
        (("hand-worked fusion of three levels", "test_eq_2_by_hand", 1),
         ("the sum as printed, with gradients", "test_eq_2_equals_its_sum_with_gradients", 2),
         ("the threshold", "test_fusion_has_a_threshold_of_nine_tenths", 1),
         ("thresholds at their ends", "test_thresholds_at_their_ends", 1))),
    "spgnet.SemanticPredictionGuidance.forward": Exercise(
        "Semantic prediction guidance", "SPGNet, Sect. 3.4, Fig. 3", 2,
        ("SemanticPredictionGuidance.mask", "SemanticPredictionGuidance.forward"),
        ("loop_guidance",),
        "Four 1x1 convolutions are there. The softmax is over the positions.",
        (("hand-worked features of two images, sigmoid",
          "test_fig_3_by_hand_on_two_channels_and_two_images[sigmoid", 1),
         ("hand-worked features of two images, softmax",
          "test_fig_3_by_hand_on_two_channels_and_two_images[softmax", 1),
         ("loop over the positions, with gradients", "test_guidance_equals_the_loop_with_gradients",
          2),
         ("its loss trains the logits alone",
          "test_the_loss_of_the_guidance_trains_the_logits_alone", 1),
         ("one image, one position wide", "test_guidance_of_one_image_and_one_position_wide", 1))),
    "hfgd.HighLevelFeatureGuidedModule.forward": Exercise(
        "Fine logits by class kernels that learn elsewhere",
        "High-level Feature Guided Decoder, Sect. 3.1", 2,
        ("HighLevelFeatureGuidedModule.forward",), ("test_guided_logits_equal_the_loop",),
        "torch.func.functional_call runs a module with other weights, detached ones, say.",
        (("hand-worked logits", "test_guided_logits_by_hand", 1),
         ("the features learn, the kernels do not",
          "test_fine_logits_train_the_features_and_where_asked_the_kernels[True", 3),
         ("loop over the positions", "test_guided_logits_equal_the_loop", 1),
         ("the kernels learn where asked",
          "test_fine_logits_train_the_features_and_where_asked_the_kernels[False", 1),
         ("the features are attended first", "test_guided_logits_are_of_the_attended_features",
          1)), first=2),
}  # fmt: skip


# ------------------------------------------------------------------------------------------- making


def functions(tree):
    """Functions of a module, methods as CLASS.METHOD: name -> node."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            inside = (child for child in node.body if isinstance(child, ast.FunctionDef))
            found |= {f"{node.name}.{child.name}": child for child in inside}
        elif isinstance(node, ast.FunctionDef):
            found[node.name] = node
    return found


def blanked(source, exercises):
    """The source without the bodies of the exercises' functions, and without their derivations."""
    lines, nodes = source.splitlines(), functions(ast.parse(source))
    wanted = [(nodes[name], exercise) for exercise in exercises for name in exercise.blank]
    for node, exercise in sorted(wanted, key=lambda pair: -pair[0].lineno):
        indent, first = " " * (node.col_offset + 4), node.body[0]
        start = first.lineno - 1
        if ast.get_docstring(node):
            text = "\n".join(lines[start : first.end_lineno])
            if "Derivation:" in text:
                text = text[: text.index("Derivation:")].rstrip() + f'\n{indent}"""'
            head = text.splitlines()
        else:
            head = []
            while lines[start - 1].lstrip().startswith("#"):
                start -= 1
        task = f"{exercise.source.split(', ', 1)[1]}: {exercise.title}"
        head.append(f'{indent}raise NotImplementedError("{task}")')
        lines[start : node.end_lineno] = head
    return "\n".join(lines) + "\n"


def handed_out(source, exercises):
    """The test file with the parts that hold no solution, and what they need."""
    tree, lines = ast.parse(source), source.splitlines()
    defined = {}
    for node in tree.body:
        targets = getattr(node, "targets", [])
        names = [x.id for t in targets for x in ast.walk(t) if hasattr(x, "id")]
        names += [node.name] if hasattr(node, "name") else []
        defined |= dict.fromkeys(names, node)

    def needs(name, seen):
        """All names of the file that `name` reaches, as a fixture too."""
        if name in defined and name not in seen:
            seen.add(name)
            for node in ast.walk(defined[name]):
                needs(getattr(node, "id", getattr(node, "arg", None)), seen)
        return seen

    secret = {name for exercise in exercises for name in exercise.solutions}
    tests = [test.split("[")[0] for exercise in exercises for _, test, _ in exercise.parts]
    reached = [needs(test, set()) for test in tests]
    kept = set().union(*(names for names in reached if not names & secret), {"pytestmark"})
    kept = [defined.get(name) for name in kept]
    text = ['"""Parts of the exercise: EXERCISE.md says what each is."""\n']
    for node in tree.body[1:]:
        if isinstance(node, (ast.Import, ast.ImportFrom)) or node in kept:
            decorators = getattr(node, "decorator_list", [])
            start = min([node.lineno, *(d.lineno for d in decorators)]) - 1
            gap = "\n\n" if hasattr(node, "name") else ""
            text.append(gap + "\n".join(lines[start : node.end_lineno]))
    return "\n".join(text) + "\n"


def make(names, output):
    """The handout of these exercises in the folder `output`."""
    output, names = Path(output), list(dict.fromkeys(names))
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        sys.exit(f"exercise.py: '{output}' exists; give a new --output folder")
    (output / "tests").mkdir(parents=True)
    for pattern in ("*.py", "*.toml", "*.txt", "*.md", "LICENSE", "tests/conftest.py"):
        for path in ROOT.glob(pattern):
            shutil.copy(path, output / path.relative_to(ROOT))
    shutil.copy(__file__, output / "tests")
    for module in {name.split(".")[0] for name in names}:
        exercises = [EXERCISES[name] for name in names if name.startswith(f"{module}.")]
        for change, file in (blanked, f"{module}.py"), (handed_out, f"tests/test_{module}.py"):
            (output / file).write_text(change((ROOT / file).read_text("utf-8"), exercises), "utf-8")
    for page in output.glob("*.md"):
        page.write_text(living(page.read_text("utf-8"), output), "utf-8")
    (output / "exercise.json").write_text(json.dumps(names) + "\n", "utf-8")
    text = sheet(names, output)
    (output / "EXERCISE.md").write_text(text, "utf-8")
    print(f"{output}: {', '.join(names)}; EXERCISE.md is for the students")
    for name in names:
        if not any(f"`{t.split('[')[0]}`" in text for _, t, _ in EXERCISES[name].parts):
            print(f"Students can try no part of {name}: its tests need the other exercises'")


def living(text, folder):
    """A page without pictures that are not in `folder`, and with words in place of dead links."""

    def linked(match):
        picture, words, target = match.groups()
        if ":" in target or (folder / target.partition("#")[0]).exists():
            return match[0]
        return "" if picture else f"{words} (not in this handout)"

    return re.sub(r"(!?)\[([^]]*)\]\(([^)\s]+)\)", linked, text)


def sheet(names, output):
    """EXERCISE.md: what is to be written, what each part is worth, and how it is marked."""
    total = sum(marks for name in names for *_, marks in EXERCISES[name].parts)
    text = [f"# Exercises\n\n{total} marks. Install the packages (`pip install -r "
            "requirements.txt`). Write the functions that raise NotImplementedError. Of what you "
            "submit, only the files named below are read.\n\n"
            "`python tests/exercise.py grade .` marks the parts whose tests are in this folder. "
            "Parts \"kept for grading\" run at your teacher's.\n\n"
            "The tests use float64: a result of float64 tensors must be float64, too. Each test "
            f"has {LIMIT} seconds of CPU time. Marking runs on Linux, macOS, and on Windows "
            "without this limit. A test that takes "
            f"{STARTING + PATIENCE * LIMIT} seconds on the clock ends its exercise.\n"]  # fmt: skip
    for name in names:
        exercise = EXERCISES[name]
        tests = (output / "tests" / test_file(name).name).read_text("utf-8")
        total = sum(marks for *_, marks in exercise.parts)
        here = sum(marks for _, test, marks in exercise.parts if holds(tests, test))
        order = "the others once it holds"
        if exercise.first == 2:
            order = "the second once it holds, the others once both hold"
        text.append(f"## {exercise.title}\n\n{exercise.source}. Write in `{file_of(name)}`: "
                    f"`{'`, `'.join(exercise.blank)}`.\n\n{total} marks: {here} here, "
                    f"{total - here} more at grading. `python tests/exercise.py grade . --exercise "
                    f"{name}` marks this exercise alone. The first part counts alone, {order}.\n\n"
                    f"Hint: {exercise.hint} {exercise.notes}".rstrip())  # fmt: skip
        text.append("\n| part | marks | test |\n|---|---|---|")
        for what, test, marks in exercise.parts:
            shown = f"`{test.split('[')[0]}`" if holds(tests, test) else "kept for grading"
            text.append(f"| {what} | {marks} | {shown} |")
        text.append("")
    return "\n".join(text)


# ---------------------------------------------------------------------------------- what went wrong

MEANINGS = (  # of torch's words: (what they are like, what is said before them)
    (r"same dtype|but found|did not match", "two dtypes meet, such as float32 and float64"),
    (r"not require grad|used in the graph", "no gradient reaches one of the inputs"),
    (r"converted to Scalar", "a tensor of several numbers came where one was expected"),
    (r"size of tensor a|cannot be multiplied|is invalid for", "shapes do not fit"),
)


def told(found, expected):
    """What came and what was expected, two tensors, in words."""
    if found.shape != expected.shape:
        return f"expected the shape {list(expected.shape)}, got {list(found.shape)}"
    if found.dtype != expected.dtype:
        return came(str(found.dtype), str(expected.dtype))
    found, expected = found.detach().double(), expected.detach().double()
    apart = (found - expected).abs().nan_to_num(float("inf"))
    if apart.max() < 1e-5 * expected.abs().max():
        return f"off by {apart.max():.0e} at most, as if float64 had been lost on the way"
    if found.numel() <= 12:
        return "expected {}, got {}".format(*(rounded(x.tolist()) for x in (expected, found)))
    place = [i.item() for i in (apart == apart.max()).nonzero()[0]]
    a, b = (rounded(x[tuple(place)].item()) for x in (expected, found))
    return f"of {found.numel()} numbers the one at {place} is furthest off: expected {a}, got {b}"


def came(found, expected):
    if found.startswith("torch.") and expected.startswith("torch."):  # dtypes
        return f"{found[6:]} came where {expected[6:]} was expected"
    return f"expected {expected[:200]}, got {found[:200]}"


def rounded(x):
    return [rounded(y) for y in x] if isinstance(x, list) else float(f"{x:.4g}")


def words(error, pair):
    """A failure in one line. pair: the two tensors that were compared last, if they differ."""
    if isinstance(error, NotImplementedError):
        return "not written yet"
    kind = "test_" if isinstance(error, (AssertionError, pytest.fail.Exception)) else ""
    libraries = tuple(sysconfig.get_paths()[k] for k in ("stdlib", "purelib", "platlib"))
    own = [f for f in traceback.extract_tb(error.__traceback__)
           if not f.filename.startswith((*libraries, __file__, "<frozen"))]  # fmt: skip
    frame = next((f for f in reversed(own) if Path(f.filename).name.startswith(kind)), None)
    where = f" ({Path(frame.filename).name}, line {frame.lineno})" if frame else ""
    if isinstance(error, AssertionError) and (pair or str(error)):
        text = told(*pair) if pair else asserted(str(error), frame.line if frame else "")
    else:
        meanings = [meaning for like, meaning in MEANINGS if re.search(like, str(error))]
        text = " ".join(f"{type(error).__name__}: {error}".split())[:250]
        text = ": ".join([*meanings[:1], text])
    return f"{text[:450]}{where}"


def asserted(text, line):
    """What an assertion in this line says: its own sentence, or both sides of an equality."""
    text, _, explained = text.partition("\nassert ")
    if explained or not text.startswith("assert "):
        return " ".join(text.split())
    # pytest's own explanations are cut off, and what tensors are apart from their numbers
    text = re.split(r"\n\s*(?:\+  where|comparison|At index|Full diff|\(pytest)", text)[0]
    text = re.sub(
        r"(?:tensor|torch\.Size)\((.*?)(?:, dtype=[\w.]+)?(?:, grad_fn=<\w+>)?\)", r"\1", text
    )
    text = " ".join(text.split()).removeprefix("assert ")
    if re.fullmatch(r"\(.* and .*\)|\([^()]*\)", text):
        text = text[1:-1].split(" and ")[-1]  # those before it hold
    left, equals, right = text.partition(" == ")
    if equals:
        return came(left, right)
    return f"this does not hold: {line if text.split()[-1] in ('True', 'False') else text}"


def answering(name, function):
    """The function, but a result that is no tensor at all is said in words."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        result = function(*args, **kwargs)
        assert result is not None, f"`{name}` returned None: is there no `return`?"
        if isinstance(result, (int, float)):
            raise AssertionError(f"`{name}` returned a Python number where a tensor was expected")
        return result

    return call


# -------------------------------------------------------------------------------- running the tests


class Recorder:
    """A pytest plugin that runs the tests of `parts`, each at most `limit` seconds, and calls
    `record(test with its parameters, "" or what failed)` after each.
    """

    def __init__(self, parts, record, limit):
        self.parts, self.record, self.limit, self.pair = parts, record, limit, None
        self.stuck = set()  # the tests that took too long, of which one try is enough

    def pytest_collectreport(self, report):
        if report.failed:
            self.record("broken", str(report.longrepr).splitlines()[-1].removeprefix("E   "))

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if any(matches(item.name, p) for p in self.parts)]
        for item in items:
            self.record("collected", item.name)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        self.pair = None
        if item.originalname in self.stuck:
            raise TimeoutError("another case of this test took too long")
        try:
            with limited(self.limit):
                return (yield)
        except TimeoutError:
            self.stuck.add(item.originalname)
            raise

    def pytest_runtest_makereport(self, item, call):
        if call.when == "call" or call.excinfo:
            why = words(call.excinfo.value, self.pair) if call.excinfo else ""
            if why and hasattr(item, "callspec") and why != "not written yet":
                case = ", ".join(f"{key}={value}" for key, value in item.callspec.params.items())
                why = f"with {case[:100]}: {why}"
            self.record(item.name, why)

    def watch(self, patch):
        """Remember the two tensors that a test compares last, if they differ."""
        import torch

        close = torch.testing.assert_close

        def assert_close(found, expected, *args, **kwargs):
            tensors = all(isinstance(x, torch.Tensor) for x in (found, expected))
            self.pair = (found, expected) if tensors else None
            close(found, expected, *args, **kwargs)
            self.pair = None

        def same(compare, found, expected, **kwargs):
            alike = found.shape == expected.shape and found.dtype == expected.dtype
            result = alike and compare(found, expected, **kwargs)
            self.pair = None if result else (found, expected)
            return result

        patch.setattr(torch.testing, "assert_close", assert_close)
        for name in ("equal", "allclose"):
            patch.setattr(torch, name, functools.partial(same, getattr(torch, name)))


@contextlib.contextmanager
def limited(seconds):
    """Ends what is in it after `seconds` of CPU time, where the system has a timer for it."""

    def expire(number, frame):
        raise TimeoutError(f"not done after {seconds:g} seconds of CPU time")

    if TIMED:
        signal.signal(signal.SIGPROF, expire)
        signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        if TIMED:
            signal.setitimer(signal.ITIMER_PROF, 0)


def holds(source, part):
    """Whether the test file `source` has the test of a part."""
    return f"def {part.split('[')[0]}(" in source


def matches(name, part):
    """Whether the pytest name `test[a-b]` belongs to the part `test` or `test[b`."""
    test, _, parameter = part.partition("[")
    own, _, given = name.partition("[")
    return own == test and (not parameter or parameter in given.rstrip("]").split("-"))


def run_tests(name, record, limit=LIMIT):
    """The exercise's tests that are here, in this process, of the module that is imported."""
    file = test_file(name)
    source = file.read_text("utf-8")
    parts = [test for _, test, _ in EXERCISES[name].parts if holds(source, test)]
    tests = dict.fromkeys(f"{file}::{test.split('[')[0]}" for test in parts)
    recorder = Recorder(parts, record, limit)
    with pytest.MonkeyPatch.context() as patch:
        for function in EXERCISES[name].blank:
            owner, *path = sys.modules[name.split(".")[0]], *function.split(".")
            for part in path[:-1]:
                owner = getattr(owner, part, None)
            if callable(own := getattr(owner, path[-1], None)):
                patch.setattr(owner, path[-1], answering(function, own))
        recorder.watch(patch)
        flags = ["-vvv", "--tb=no", "--capture=no", "-pno:cacheprovider", f"--rootdir={ROOT}"]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            pytest.main([*flags, *tests], plugins=[recorder])


def run(folder, file, limit, names):
    """What the process of `grade` does: writes lines [exercise, test, result] to `file`."""
    import torch
    import torchvision  # noqa: F401  before the limit of the submission's own import

    def record(*line):
        with open(file, "a", encoding="utf-8") as target:
            target.write(json.dumps([name, *line]) + "\n")

    sys.path.insert(0, str(ROOT))
    for name in names:
        before = set(sys.modules)
        if why := imported(Path(folder) / file_of(name), limit):
            record("broken", why)
        else:
            run_tests(name, record, limit)
        # The next exercise meets this repository's other modules, and torch as it was.
        for new in set(sys.modules) - before:
            path = Path(getattr(sys.modules[new], "__file__", None) or "")
            if path.parent in (ROOT, ROOT / "tests", Path(folder)):
                del sys.modules[new]
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)


def imported(path, limit):
    """Imports the submission's file in place of this repository's; returns "" or what failed."""
    try:
        with limited(limit):
            spec = importlib.util.spec_from_file_location(path.stem, path)
            sys.modules[path.stem] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[path.stem])
    except SyntaxError as error:
        return f"{path.name}, line {error.lineno}: {error.msg}"
    except FileNotFoundError:
        return f"there is no {path.name}"
    except BaseException as error:
        return f"{path.name} cannot be imported: {words(error, None)}"
    return ""


# ------------------------------------------------------------------------------------------ grading

RUNNING, STOPPED = set(), threading.Event()  # processes; whether no more are started
ENDED = "the process ended in this part, or before it"


def grade(folder, names, limit):
    """{exercise: `marked`} of one submission, by one process. An exercise that ends it ends alone:
    another process runs those after it.
    """
    grades, left = {}, list(names)
    while left and not STOPPED.is_set():
        lines, ended = results(folder, left, limit)
        for name in left:
            grades[name] = marked(lines, name, ended)
            if any(failed == ended for *_, failed in grades[name]):
                break
        left = left[left.index(name) + 1 :]
    return grades


def results(folder, names, limit):
    """The lines of a process that runs the exercises, and what is said if it ended too early."""
    ended, lines, size, patience = ENDED, [], None, STARTING + PATIENCE * limit
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        file = Path(temporary) / "results.jsonl"
        file.touch()
        command = [sys.executable, "-B", __file__, "run", Path(folder).resolve(), file, str(limit)]
        kwargs = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=temporary)
        kwargs["env"] = os.environ | {"OMP_NUM_THREADS": "1"}  # or its threads' time adds up
        process = subprocess.Popen([*command, *names], start_new_session=True, **kwargs)
        RUNNING.add(process)
        try:
            while size != (size := file.stat().st_size):  # as long as lines are added
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0 if STOPPED.is_set() else patience)
                    break
            else:
                ended = f"stopped after {patience:g} seconds in this part, or before it"
        finally:
            end(process)
            RUNNING.discard(process)
        text = file.read_text("utf-8", "replace")
    for line in text.splitlines():
        with contextlib.suppress(ValueError, TypeError):  # cut short
            line = json.loads(line)
            lines += [line] if [type(x) for x in line] == [str] * 3 else []
    return lines, ended


def end(process):
    with contextlib.suppress(ProcessLookupError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)  # what it started, too
        else:
            process.kill()
    process.wait()


def marked(lines, name, ended=ENDED):
    """[(part, marks, "" or what failed, or None where the test is not here)] of an exercise."""
    own = [(test, result) for owner, test, result in lines if owner == name]
    collected = [result for test, result in own if test == "collected"]
    broken = next((result for test, result in own if test == "broken"), None)
    source, parts = test_file(name).read_text("utf-8"), []
    for what, test, marks in EXERCISES[name].parts:
        found = [why for item, why in own if matches(item, test)]
        failed = broken or next((why for why in found if why), "")
        waiting = [before for before, _, why in parts[: EXERCISES[name].first] if why]
        if not holds(source, test):
            failed = None
        elif not failed and (not found or len(found) < sum(matches(i, test) for i in collected)):
            failed = ended
        elif not failed and waiting:
            failed = f"right, but counts once the hand-worked part holds ({waiting[0]})"
        parts.append((what, marks, failed))
    return parts


def test_file(name):
    return ROOT / "tests" / f"test_{file_of(name)}"


# ------------------------------------------------------------------------------------------ a class


def grade_all(folders, names, limit, output=None, table=None):
    """Grades several submissions at a time. A line, and the files of marks, after each."""
    folders = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    for folder in folders:
        if not folder.is_dir():
            sys.exit(f"exercise.py: '{folder}' is not a folder; give one for each submission")
    for path in filter(None, (output, table)):
        if Path(path).is_dir():
            sys.exit(f"exercise.py: '{path}' is a folder; give --json and --csv a file")
    if output and table and Path(output).resolve() == Path(table).resolve():
        sys.exit(f"exercise.py: --json and --csv are both '{output}'; give two files")
    if not 0 < limit < float("inf"):
        sys.exit(f"exercise.py: --limit is {limit:g}; give a number of seconds above 0")
    names = list(dict.fromkeys(names)) or handed(folders[0])
    kept = earlier(output, names, limit)
    if not TIMED:
        print("This system has no timers: a test has no limit in CPU time.")
    short = short_names({*map(Path, kept), *folders})
    entries = {str(folder): read(folder, names) for folder in folders}
    new = [f for f in entries if kept.get(f, {}).get("digest") != entries[f]["digest"]]
    kept |= {path: kept.get(path, {}) | entries[path] for path in entries}
    for path, entry in kept.items():
        entry["submission"] = short[Path(path)]
        if path in entries and path not in new:
            print(f"{short[Path(path)]}: its files have not changed, the marks are those of before")
    marks = dict(exercises=names, limit=limit, alike=alike(kept.values(), names))
    marks["submissions"] = {path: entry for path, entry in kept.items() if path not in new}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        work = {pool.submit(grade, Path(path), names, limit): path for path in new}
        try:
            for number, done in enumerate(as_completed(work), 1):
                path = work[done]
                marks["submissions"][path] = kept[path] | counted(done.result())
                keep(marks, output, table)
                line = line_of(marks["submissions"][path])
                print(f"{number}/{len(new)} {line}", flush=True)
        except BaseException as error:  # an interruption, or a file that cannot be written
            STOPPED.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(RUNNING):
                end(process)
            if not isinstance(error, KeyboardInterrupt):
                raise
            on = "the same command goes on from here" if output else "--json would keep the marks"
            sys.exit(f"exercise.py: interrupted; {on}")
    keep(marks, output, table)
    for path in entries:
        show(marks["submissions"][path])
    print("\n".join(["", *marks["alike"]]))


def read(folder, names):
    """What is known of a submission before it is run."""
    entry = dict(digest=digest(folder, names), bodies=dict.fromkeys(names, ""))
    try:
        entry["flags"] = flags(folder, names)
        if folder != ROOT:
            entry["bodies"] = {n: body(tree_of(folder / file_of(n)), n) for n in names}
    except (RecursionError, MemoryError):
        entry["flags"] = ["a file is nested too deeply to be looked at"]
    return entry


def counted(grades):
    """The marks of a submission as JSON keeps them; parts that are not here count nowhere."""
    exercises = {}
    for name, parts in grades.items():
        rows = [dict(part=what, marks=0 if why or why is None else marks, maximum=marks, failed=why)
                for what, marks, why in parts]  # fmt: skip
        exercises[name] = total([r for r in rows if r["failed"] is not None]) | dict(parts=rows)
    return total(exercises.values()) | dict(exercises=exercises)


def total(rows):
    marks, maximum = (sum(row[key] for row in rows) for key in ("marks", "maximum"))
    return dict(marks=marks, maximum=maximum, percent=round(100 * marks / max(maximum, 1), 1))


def earlier(output, names, limit):
    """{folder: its marks} of the JSON file, if it is there already."""
    if not output or not Path(output).exists():
        return {}
    try:
        marks = json.loads(Path(output).read_text("utf-8"))
        asked, kept = (set(marks["exercises"]), marks["limit"]), marks["submissions"]
    except (OSError, ValueError, TypeError, KeyError):
        sys.exit(f"exercise.py: '{output}' holds something else than marks; give --json a new name")
    if asked != (set(names), limit):
        other = "holds other exercises (or another --limit)"
        sys.exit(f"exercise.py: '{output}' {other}; give a new name")
    return kept


def digest(folder, names):
    """Of what the marks depend on besides exercises and limit: tests, the submission's files."""
    files = [Path(__file__), ROOT / "tests" / "conftest.py"]
    files += [file for name in sorted(names) for file in (test_file(name), folder / file_of(name))]
    known = [hashlib.sha256(f.read_bytes()).hexdigest() if f.is_file() else "" for f in files]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def short_names(folders):
    """{folder: its own name, or as much of its path as tells it apart}."""
    names = {}
    for folder in folders:
        count = 1
        while sum(other.parts[-count:] == folder.parts[-count:] for other in folders) > 1:
            count += 1
        names[folder] = "/".join(folder.parts[-count:])
    return names


def keep(marks, output, table):
    """Rewrites the files of marks, each by a rename, so that an interruption loses nothing."""
    entries = dict(sorted(marks["submissions"].items()))
    text = json.dumps(marks | dict(submissions=entries), indent=1, ensure_ascii=False)
    texts = {output: text + "\n"}
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(["submission", "exercise", "marks", "maximum", "percent", "flags"])
    for entry in entries.values():
        for name, row in (entry["exercises"] | dict(total=entry)).items():
            own = [f for f in entry["flags"] if name == "total" or f.startswith(file_of(name))]
            numbers = [row[key] for key in ("marks", "maximum", "percent")]
            writer.writerow([entry["submission"], name, *numbers, "; ".join(own)])
    texts[table] = rows.getvalue()
    for path in filter(None, texts):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(f"{path}.part").write_text(texts[path], "utf-8", newline="\n")
        os.replace(f"{path}.part", path)


def line_of(entry):
    each = [f"{name} {score(exercise)}" for name, exercise in entry["exercises"].items()]
    flagged = [f"{len(entry['flags'])} to look at"] if entry["flags"] else []
    return f"{entry['submission']}: {score(entry)} ({', '.join([*each, *flagged])})"


def show(entry):
    """What each part of a submission has, in words."""
    print(f"\n{line_of(entry)}")
    for flag in entry["flags"]:
        print(f"  look at {flag}")
    for name, exercise in entry["exercises"].items():
        parts = exercise["parts"]
        withheld = sum(part["maximum"] for part in parts if part["failed"] is None)
        more = f" here, {withheld} more at grading" if withheld else ""
        print(f"  {name:<42} {score(exercise)}{more}")
        for part in parts:
            failed, marks = part["failed"], part["marks"]
            why = "kept for grading" if failed is None else failed or "right"
            print(f"    {'-' if failed is None else marks}/{part['maximum']} {part['part']}: {why}")


def score(row):
    return f"{row['marks']}/{row['maximum']}"


def handed(folder):
    """The exercises that the handout's exercise.json names."""
    path = Path(folder) / "exercise.json"
    try:
        return check(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        sys.exit(f"exercise.py: '{path}' cannot be read; give --exercise NAME …")


# ------------------------------------------------------------------------- what a teacher looks at

# What a file may import, functions that reach what no import shows, and attributes that lead to
# other modules. A name is looked at in the repository's own file, too: what is there, is harmless.
HARMLESS = set("torch math functools itertools typing collections numpy einops".split())
FUNCTIONS = set(
    "__import__ compile delattr eval exec getattr globals locals open setattr vars".split()
)
ATTRIBUTES = FUNCTIONS | set(
    "builtins ctypes f_back f_globals gi_frame hub importlib inspect library mock modules os "
    "overrides signal subprocess sys testing threading".split()
)
DAILY = {"__init__", "__name__"}
FILES = "tests/", "test_", "exercise.", "results.jsonl"


def tree_of(path):
    """The syntax tree of a file; an empty one where there is none."""
    with contextlib.suppress(OSError, SyntaxError, ValueError):
        return ast.parse(path.read_bytes())
    return ast.Module([], [])


def flags(folder, names):
    """Where the files touch what grades them, and this repository's files do not."""
    found = []
    for file in dict.fromkeys(map(file_of, names)):
        ours = {what for _, what in touches(tree_of(ROOT / file))}
        places = touches(tree_of(Path(folder) / file))
        found += [f"{file}, line {line}: {what[:100]}" for line, what in places if what not in ours]
    return found


def touches(tree):
    """[(line, what)]: imports, names of Python's inside, attributes that are set elsewhere than on
    `self`, and texts that name the grader's files.
    """
    places, done = set(), set()
    for node in ast.walk(tree):
        if node in done:
            continue
        found = list(touched(node))
        places |= {(node.lineno, what) for what in found}
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            done.add(node.value)  # a docstring
        elif found and not isinstance(node, ast.FunctionDef):
            done.update(ast.walk(node))  # one line says it all
    return sorted(places)


def touched(node):
    called = node.func if isinstance(node, ast.Call) else node
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        start = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        for name in (start + alias.name for alias in node.names):
            root, *others = name.split(".")
            if root not in HARMLESS or any(x in ATTRIBUTES or x[0] == "_" for x in others):
                yield f"imports {name}"
    elif isinstance(node, ast.FunctionDef):
        if node.name.startswith("__") and node.name not in DAILY:
            yield f"defines {node.name}"
    elif isinstance(called, ast.Name):
        if called.id in FUNCTIONS or (called.id.startswith("__") and called.id not in DAILY):
            yield f"uses {ast.unparse(node)}"
    elif isinstance(called, ast.Attribute):
        name, own = called.attr, isinstance(called.value, ast.Name) and called.value.id == "self"
        hidden = name.startswith("__" if own else "_") and name not in DAILY
        if name in ATTRIBUTES or hidden:
            yield f"uses {ast.unparse(node)}"
        elif not isinstance(called.ctx, ast.Load) and not own:
            yield f"sets {ast.unparse(node)}"
    elif isinstance(node, ast.Constant) and any(file in str(node.value) for file in FILES):
        yield f"names {node.value!r}"


def alike(entries, names):
    """Sentences about submissions whose functions are equal but for names of variables."""
    sentences = []
    for name in names:
        ours, groups = body(tree_of(ROOT / file_of(name)), name), {}
        for entry in entries:
            groups.setdefault(entry["bodies"][name], []).append(entry["submission"])
        for text, who in groups.items():
            people = " and ".join(filter(None, [", ".join(who[:-1]), who[-1]]))
            if text and text == ours:
                sentences.append(f"{people}: {name} is the repository's own but for names")
            elif text and len(who) > 1:
                sentences.append(f"{people}: {name} is the same but for names")
    return sentences


def body(tree, name):
    """Of the exercise's functions with numbered variables, a digest; "" where they are short."""
    size, text, found = 0, "", functions(tree)
    for node in (found[function] for function in EXERCISES[name].blank if function in found):
        start = 1 if ast.get_docstring(node) else 0
        inside = [x for part in (node.args, *node.body[start:]) for x in ast.walk(part)]
        size += sum(isinstance(x, (ast.stmt, ast.expr)) for x in inside)
        own = [x.arg if isinstance(x, ast.arg) else x.id for x in inside if isinstance(x, ast.arg)
               or (isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store))]  # fmt: skip
        numbers = {variable: f"v{i}" for i, variable in enumerate(dict.fromkeys(own))}
        for x in inside:
            if isinstance(x, ast.arg):
                x.arg, x.annotation = numbers[x.arg], None
            elif isinstance(x, ast.Name):
                x.id = numbers.get(x.id, x.id)
        text += "".join(map(ast.dump, [node.args, *node.body[start:]]))
    return hashlib.sha256(text.encode()).hexdigest() if size >= ALIKE_FROM else ""


def file_of(name):
    return f"{name.split('.')[0]}.py"


# --------------------------------------------------------------------------------------------- main


def check(names):
    unknown = [name for name in names if name not in EXERCISES or not test_file(name).is_file()]
    if unknown:
        sys.exit(f"exercise.py: no exercise '{unknown[0]}'; there are {', '.join(EXERCISES)}")
    return names


def main():
    parser = argparse.ArgumentParser(description="Exercises of a course; see the file's top.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="list|make|grade")
    commands.add_parser("list", help="names, papers, difficulty, marks")
    making = commands.add_parser("make", help="a handout of some exercises")
    making.add_argument("names", nargs="+", metavar="NAME")
    making.add_argument("--output", required=True, metavar="DIR", help="new folder")
    grading = commands.add_parser("grade", help="the marks of submissions")
    grading.add_argument("folders", nargs="+", metavar="DIR")
    what = "exercises [those of the first folder's exercise.json]"
    grading.add_argument("--exercise", nargs="+", default=[], metavar="NAME", help=what)
    what = f"seconds of CPU time for one test [{LIMIT}]"
    grading.add_argument("--limit", type=float, default=LIMIT, help=what)
    what = "file for all marks; what is in it and has not changed is not run again"
    grading.add_argument("--json", metavar="FILE", help=what)
    grading.add_argument("--csv", metavar="FILE", help="table of all marks")
    running = commands.add_parser("run")  # by `grade`
    for name, kind in ("folder", str), ("file", str), ("limit", float):
        running.add_argument(name, type=kind)
    running.add_argument("names", nargs="+")
    args = parser.parse_args()
    for stream in (sys.stdout, sys.stderr):  # a console that lacks a character shows its number
        stream.reconfigure(errors="backslashreplace")
    if args.command == "list":
        for name, exercise in EXERCISES.items():
            marks = sum(marks for *_, marks in exercise.parts)
            print(f"{name:<42} {'*' * exercise.difficulty:<4} {marks} marks  {exercise.source}")
    elif args.command == "make":
        make(check(args.names), args.output)
    elif args.command == "grade":
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the processes, as Ctrl-C
        grade_all(args.folders, check(args.exercise), args.limit, args.json, args.csv)
    else:
        run(args.folder, args.file, args.limit, args.names)


if __name__ == "__main__":
    main()
