"""A kit for courses: functions of the papers to write again, graded by this repository's tests.

    python tests/exercise.py list
    python tests/exercise.py make caa.channelized car.class_centers --output handout
    python tests/exercise.py grade submissions/* --exercise caa.channelized car.class_centers

`make` copies the code without the bodies of these functions. Parts whose tests hold a solution are
kept for grading. In the handout, `python tests/exercise.py grade .` marks the others. `grade` runs
the tests of the repository that it is started in against one file of each folder for each exercise,
never the folder's own tests, in a process of its own with a time limit. On Windows only the process
has a limit, not each test. That process can do what Python can: grade in a container.
"""

import argparse
import ast
import contextlib
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
import traceback
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from _pytest.outcomes import Failed

ROOT = Path(__file__).resolve().parent.parent
ALARM = hasattr(signal, "setitimer")  # Windows has none
STARTING = 60  # seconds that a process has besides those of its tests


class Exercise(NamedTuple):
    """What is to be written again, and how it is marked."""

    title: str
    source: str  # paper and equation
    difficulty: int  # 1: a line or two; 2: several steps; 3: to be derived first
    blank: tuple  # the functions whose bodies are taken out
    solutions: tuple  # functions of the test file that hold a solution: not handed out
    hint: str
    parts: tuple  # (what holds, test, or test[of these parameters], marks)


EXERCISES = {
    "caa.column_attention": Exercise(
        "Column attention", "Channelized Axial Attention, thesis Eq. (3.3)", 1,
        ("column_attention",), ("loop_map", "map_of"),
        "Bring the columns in front as a batch dimension; then it is one matrix product.",
        (("hand-worked map of three columns", "test_eq_3_3_column_map_by_hand", 1),
         ("loop over i, j, m, with gradient", "test_eq_3_3_and_3_4_maps_equal_loops[column", 2),
         ("rows are columns of exchanged axes",
          "test_columns_and_rows_are_each_other_on_exchanged_axes", 1),
         ("products beyond float16's largest number",
          "test_float16_queries_beyond_65504_give_a_finite_map", 1))),
    "caa.channelized": Exercise(
        "Channelized attention without the weighted features",
        "Channelized Axial Attention, thesis Eqs. (3.9) to (3.11), Algorithm 2", 3,
        ("channelized",),
        ("loop_map", "loop_column", "loop_row", "loop_axis", "map_of"),
        "The gate does not depend on the index that Eq. (3.11) sums over. What can leave the sum?",
        (("hand-worked column step", "test_eq_3_9_by_hand", 1),
         ("hand-worked row step", "test_eq_3_10_by_hand", 1),
         ("two channels and two images by hand",
          "test_eq_3_11_by_hand_with_two_channels_and_two_images", 1),
         ("loops over i, j, m, n, with gradients", "test_eq_3_9_and_3_10_gated_equal_loops", 2),
         ("the weighted features are not materialised",
          "test_weighted_features_are_not_materialised", 2),
         ("half-precision features are pooled in float32",
          "test_float16_features_are_pooled_in_float32", 1))),
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
         ("hand-worked taps, rearranged form", "test_line_4_by_hand[rearranged", 1),
         ("loop over the nine taps, with gradients",
          "test_line_4_equals_the_loop_with_gradients[rearranged", 2),
         ("the kernel's gradient is the sum over the rates",
          "test_gradient_of_the_shared_kernel_is_the_sum_over_the_rates[rearranged", 1),
         ("maps one position wide, rates larger than the map",
          "test_shared_atrous_equals_separate_convolutions_at_any_size[rearranged", 1),
         ("the faster form is taken",
          "test_the_form_is_chosen_by_channels_and_rates_and_changes_nothing", 1))),
    "car.class_centers": Exercise(
        "Class centres", "Class-Aware Regularization, thesis Eq. (4.1)", 1,
        ("class_centers",), ("loop_centers",),
        "flat() and one_hot() are there. Yᵀ·X adds up the features of each class.",
        (("hand-worked centres of two images", "test_eq_4_1_by_hand", 1),
         ("loop over the pixels, with gradient", "test_eq_4_1_equals_the_loop_with_gradients", 2),
         ("absent and ignored classes",
          "test_absent_and_ignored_classes_have_centre_0_with_a_zero_gradient", 1),
         ("half precision", "test_half_precision_equals_float32[class_centers", 1))),
    "car.intra_center_to_pixel": Exercise(
        "Pixels near the centre of their class",
        "Class-Aware Regularization, thesis Eqs. (4.2), (4.3)", 1,
        ("intra_center_to_pixel",), ("loop_intra",),
        "Ignored pixels add zero loss but stay in the denominator.",
        (("hand-worked loss", "test_eqs_4_2_4_3_intra_by_hand", 1),
         ("loop over pixels and channels, with gradient",
          "test_eqs_4_2_4_3_intra_equals_the_loop_with_gradients", 2),
         ("no gradient reaches the centres",
          "test_no_gradient_reaches_the_centres_of_the_pixel_terms[intra_center_to_pixel", 1),
         ("nothing is labelled",
          "test_nothing_labelled_is_a_loss_of_0_with_a_zero_gradient[intra_center_to_pixel", 1),
         ("half precision", "test_half_precision_equals_float32[intra_center_to_pixel", 1))),
    "car.inter_center_to_center": Exercise(
        "Class centres apart", "Class-Aware Regularization, thesis Eqs. (4.4) to (4.7)", 2,
        ("inter_center_to_center",),
        ("loop_c2c", "test_gradient_reaches_one_of_the_two_centres_between_centres",
         "test_thresholds_are_shared_by_the_other_classes"),
        "The threshold is shared by the K - 1 other classes. One side of the product is stopped.",
        (("hand-worked loss", "test_eqs_4_4_to_4_7_between_centres_by_hand", 1),
         ("loop over the classes, with gradient",
          "test_eqs_4_4_to_4_7_between_centres_equal_the_loop_with_gradients", 2),
         ("the gradient reaches one of the two centres",
          "test_gradient_reaches_one_of_the_two_centres_between_centres", 1),
         ("absent classes", "test_absent_classes_have_centre_0_and_take_part_in_the_softmax", 1),
         ("half precision", "test_half_precision_equals_float32[inter_center_to_center", 1))),
    "car.inter_center_to_pixel": Exercise(
        "Pixels far from the centres of other classes",
        "Class-Aware Regularization, thesis Eqs. (4.8) to (4.14)", 3,
        ("inter_center_to_pixel",), ("loop_c2p",),
        "Replace the energy of a pixel's own class before the softmax, mask it after.",
        (("hand-worked loss", "test_eqs_4_8_to_4_14_between_centres_and_pixels_by_hand", 1),
         ("Eq. (4.11) as printed", "test_eq_4_11_as_printed_has_no_root_of_c", 1),
         ("loop over pixels and classes, with gradient",
          "test_eqs_4_8_to_4_14_between_centres_and_pixels_equal_the_loop_with_gradients", 2),
         ("no gradient reaches the centres",
          "test_no_gradient_reaches_the_centres_of_the_pixel_terms[inter_center_to_pixel", 1),
         ("nothing is labelled",
          "test_nothing_labelled_is_a_loss_of_0_with_a_zero_gradient[inter_center_to_pixel", 1),
         ("half precision", "test_half_precision_equals_float32[inter_center_to_pixel", 1))),
    "pyramid_fuse.pyramid_labels": Exercise(
        "Unity-cells and mix-cells", "Specialize and Fuse, Sect. 3.2, App. B", 2,
        ("pyramid_labels",), ("cell_by_cell",),
        "The smallest and the largest label of a cell tell most. Where is 255 in the way?",
        (("hand-worked pyramid of an 8x8 map", "test_pyramid_labels_by_hand", 2),
         ("the three cases, cell by cell",
          "test_pyramid_labels_are_the_three_cases_of_appendix_b", 2),
         ("sizes that do not fit are refused", "test_labels_of_another_size_are_refused", 1))),
    "pyramid_fuse.relabel": Exercise(
        "What is done by coarser levels", "Specialize and Fuse, Sect. 3.2, Table 7", 2,
        ("relabel",), ("ancestors", "test_relabelling_looks_at_every_ancestor"),
        "Carry one mask from level to level: repeat_cells() brings it to the finer one.",
        (("hand-worked relabelling", "test_relabelling_by_hand", 1),
         ("every ancestor of every cell", "test_relabelling_looks_at_every_ancestor", 2),
         ("nothing below a don't-care cell",
          "test_nothing_below_a_dont_care_cell_is_relabelled", 1),
         ("the threshold", "test_relabelling_has_a_threshold_of_nine_tenths", 1),
         ("an unknown policy is named", "test_unknown_policy_is_named", 1))),
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
        (("hand-worked features of two images",
          "test_fig_3_by_hand_on_two_channels_and_two_images", 2),
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
         ("loop over the positions", "test_guided_logits_equal_the_loop", 1),
         ("the features learn, the kernels do not",
          "test_fine_logits_train_the_features_and_where_asked_the_kernels[True", 2),
         ("the kernels learn where asked",
          "test_fine_logits_train_the_features_and_where_asked_the_kernels[False", 1),
         ("the features are attended first", "test_guided_logits_are_of_the_attended_features",
          1))),
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
        names = [
            x.id for t in getattr(node, "targets", []) for x in ast.walk(t) if hasattr(x, "id")
        ]
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
    modules = {name.split(".")[0] for name in names}
    for module in modules:
        exercises = [EXERCISES[name] for name in names if name.startswith(f"{module}.")]
        for change, file in (blanked, f"{module}.py"), (handed_out, f"tests/test_{module}.py"):
            (output / file).write_text(change((ROOT / file).read_text("utf-8"), exercises), "utf-8")
    (output / "exercise.json").write_text(json.dumps(names) + "\n", "utf-8")
    (output / "EXERCISE.md").write_text(sheet(names, output), "utf-8")
    text = (output / "EXERCISE.md").read_text("utf-8")
    print(f"{output}: {', '.join(names)}; EXERCISE.md is for the students")
    for name in names:
        if not any(f"`{t.split('[')[0]}`" in text for _, t, _ in EXERCISES[name].parts):
            print(
                f"No part of {name} can be tried by students: its tests need the other exercises'"
            )


def sheet(names, output):
    text = ["# Exercises\n\nInstall the packages (`pip install -r requirements.txt`). Write the "
            "functions that raise NotImplementedError. `python tests/exercise.py grade .` marks "
            "the parts whose tests are in this folder. Parts \"kept for grading\" run at your "
            "teacher's. Of what you submit, only the files named below are read.\n"]  # fmt: skip
    for name in names:
        exercise, module = EXERCISES[name], name.split(".")[0]
        here = (output / f"tests/test_{module}.py").read_text("utf-8")
        total = sum(marks for *_, marks in exercise.parts)
        text.append(f"## {exercise.title}\n\n{exercise.source}. Write in `{module}.py`: "
                    f"`{'`, `'.join(exercise.blank)}`. {total} marks.\n\nHint: {exercise.hint}\n\n"
                    "| part | marks | test |\n|---|---|---|")  # fmt: skip
        for what, test, marks in exercise.parts:
            shown = f"`{test.split('[')[0]}`" if holds(here, test) else "kept for grading"
            text.append(f"| {what} | {marks} | {shown} |")
        text.append("")
    return "\n".join(text)


# ------------------------------------------------------------------------------------------ grading


def told(found, expected):
    """What came and what was expected, two tensors, in words."""
    if found.shape != expected.shape:
        return f"expected the shape {list(expected.shape)}, got {list(found.shape)}"
    if found.dtype != expected.dtype:
        return f"expected {expected.dtype}, got {found.dtype}"
    found, expected = found.detach().double(), expected.detach().double()
    if found.numel() <= 12:
        return "expected {}, got {}".format(*(rounded(x.tolist()) for x in (expected, found)))
    apart = (found - expected).abs().nan_to_num(float("inf"))
    place = [i.item() for i in (apart == apart.max()).nonzero()[0]]
    a, b = (rounded(x[tuple(place)].item()) for x in (expected, found))
    return f"of {found.numel()} numbers the one at {place} is furthest off: expected {a}, got {b}"


def rounded(x):
    return [rounded(y) for y in x] if isinstance(x, list) else float(f"{x:.4g}")


def words(error, pair):
    """A failure in one line. pair: the two tensors that were compared last, if they differ."""
    if isinstance(error, NotImplementedError):
        return "not written yet"
    kind = "test_" if isinstance(error, (AssertionError, Failed)) else ""
    libraries = tuple(sysconfig.get_paths()[k] for k in ("stdlib", "purelib", "platlib"))
    own = [f for f in traceback.extract_tb(error.__traceback__)
           if not f.filename.startswith((*libraries, __file__, "<frozen"))]  # fmt: skip
    frame = next((f for f in reversed(own) if Path(f.filename).name.startswith(kind)), None)
    where = f" ({Path(frame.filename).name}, line {frame.lineno})" if frame else ""
    # pytest's own explanations are cut off, and what tensors are apart from their numbers
    text = re.split(r"\n\s*(?:\+  where|comparison|At index|Full diff|\(pytest)", str(error))[0]
    text = re.sub(r"tensor\((.*?)(?:, dtype=[\w.]+)?(?:, grad_fn=<\w+>)?\)", r"\1", text)
    text = (
        " ".join(text.split()).removeprefix("assert ").encode("ascii", "backslashreplace").decode()
    )
    left, equals, right = text.partition(" == ")
    if not isinstance(error, AssertionError):
        text = f"{type(error).__name__}: {text[:200]}"
    elif pair:
        text = told(*pair)
    elif equals and " and " not in text:
        text = f"expected {right[:200]}, got {left[:200]}"
    else:
        text = f"this does not hold: {text}"
    return f"{text[:450]}{where}"


class Recorder:
    """A pytest plugin that runs the `wanted` tests, each at most `limit` seconds, and calls
    `record(test with its parameters, "" or what failed)` after each.
    """

    def __init__(self, wanted, record, limit):
        self.wanted, self.record, self.limit, self.pair = wanted, record, limit, None
        self.stuck = set()  # the tests that took too long, of which one try is enough

    def pytest_collectreport(self, report):
        if report.failed:
            self.record("broken", str(report.longrepr).strip().splitlines()[-1])

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if any(matches(item.name, w) for w in self.wanted)]
        self.record("collected", [item.name for item in items])

    def pytest_runtest_setup(self, item):
        import pytest
        import torch

        self.pair, close = None, torch.testing.assert_close
        compare = {name: getattr(torch, name) for name in ("equal", "allclose")}

        def assert_close(found, expected, *args, **kwargs):
            tensors = all(isinstance(x, torch.Tensor) for x in (found, expected))
            self.pair = (found, expected) if tensors else None
            close(found, expected, *args, **kwargs)
            self.pair = None

        def same(name, found, expected, **kwargs):
            result = compare[name](found, expected, **kwargs)
            self.pair = None if result else (found, expected)
            return result

        def expire(*_):
            self.stuck.add(item.originalname)
            raise TimeoutError(f"not done after {self.limit:g} seconds")

        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(torch.testing, "assert_close", assert_close)
        for name in compare:
            self.patch.setattr(torch, name, partial(same, name))
        if ALARM:
            signal.signal(signal.SIGALRM, expire)
            signal.setitimer(signal.ITIMER_REAL, self.limit)
        if item.originalname in self.stuck:
            expire()

    def pytest_runtest_teardown(self):
        if ALARM:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.patch.undo()

    def pytest_runtest_makereport(self, item, call):
        if call.when == "call" or call.excinfo:
            error = call.excinfo and call.excinfo.value
            self.record(item.name, words(error, self.pair) if error else "")


def holds(source, part):
    """Whether the test file `source` has the test of a part."""
    return f"def {part.split('[')[0]}(" in source


def matches(name, part):
    """Whether the pytest name `test[a-b]` belongs to the part `test` or `test[b`."""
    test, _, parameter = part.partition("[")
    own, _, given = name.partition("[")
    return own == test and (not parameter or parameter in given.rstrip("]").split("-"))


def run_tests(names, record, limit=60):
    """The exercises' tests that are here, in this process, of the modules that are imported; limit:
    seconds for one test.
    """
    import pytest

    wanted, files = [], []
    for name in names:
        file = ROOT / "tests" / f"test_{name.split('.')[0]}.py"
        source = file.read_text("utf-8")
        tests = [test for _, test, _ in EXERCISES[name].parts]
        here = [test for test in tests if holds(source, test)]
        wanted += here
        files += [f"{file}::{test.split('[')[0]}" for test in here]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        flags = ["-vvv", "--rootdir", str(ROOT), "-p", "no:cacheprovider", "--capture=no"]
        pytest.main([*flags, *dict.fromkeys(files)], plugins=[Recorder(wanted, record, limit)])


def run(folder, name, file, limit):
    """What the process of `grade` does: writes a line to `file` for each test."""

    def record(name, result):
        with open(file, "a", encoding="utf-8") as target:
            target.write(json.dumps([name, result]) + "\n")

    sys.path.insert(0, str(ROOT))
    module = name.split(".")[0]
    path = Path(folder) / f"{module}.py"
    try:
        spec = importlib.util.spec_from_file_location(module, path)
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
    except SyntaxError as error:
        return record("broken", f"{path.name}, line {error.lineno}: {error.msg}")
    except FileNotFoundError:
        return record("broken", f"there is no {path.name}")
    except BaseException as error:
        return record("broken", f"{path.name} cannot be imported: {words(error, None)}")
    run_tests([name], record, limit)


def marked(lines, name, ended="the process ended in this part, or before it"):
    """[(part, marks, "" or what failed, or None where the test is not here)] of an exercise."""
    results, parts = [], []
    for line in lines:
        with contextlib.suppress(ValueError):  # cut short, or not ours
            results.append(tuple(json.loads(line)))
    collected = next((value for name, value in results if name == "collected"), [])
    broken = next((value for name, value in results if name == "broken"), None)
    source = (ROOT / "tests" / f"test_{name.split('.')[0]}.py").read_text("utf-8")
    for what, test, marks in EXERCISES[name].parts:
        found = [why for item, why in results if matches(item, test)]
        failed = broken or next((why for why in found if why), "")
        if not holds(source, test):
            failed = None
        elif not failed and (not found or len(found) < sum(matches(i, test) for i in collected)):
            failed = ended
        parts.append((what, marks, failed))
    return parts


def grade(folder, name, limit):
    """`marked` of one submission. limit: seconds for one test; the process has ten times that, and
    STARTING.
    """
    seconds = STARTING + 10 * limit
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        file, ended = Path(temporary) / "results.jsonl", {}
        command = [sys.executable, "-B", Path(__file__).resolve(), "run", Path(folder).resolve()]
        kwargs = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=temporary)
        process = subprocess.Popen(
            [*command, file, str(limit), name], start_new_session=True, **kwargs
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            ended["ended"] = f"stopped after {seconds:g} seconds, in this part or before it"
        finally:
            with contextlib.suppress(ProcessLookupError):
                if hasattr(os, "killpg"):
                    os.killpg(process.pid, signal.SIGKILL)  # what it started, too
            process.kill()
            process.wait()
        lines = file.read_text("utf-8", "replace").splitlines() if file.exists() else []
    return marked(lines, name, **ended)


def grade_all(folders, names, limit, output):
    """Grades on the screen, several at a time, then a table of all."""
    folders = list(dict.fromkeys(map(str, folders)))
    for folder in folders:
        if not Path(folder).is_dir():
            sys.exit(f"exercise.py: '{folder}' is not a folder; give one for each submission")
    names = names or handed(folders[0])
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
    pairs = [(folder, name) for folder in folders for name in names]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        work = pool.map(lambda pair: grade(*pair, limit), pairs)
        everything = {folder: {name: next(work) for name in names} for folder in folders}
    if output:
        keys = "part", "marks", "failed"
        table = {
            folder: {name: [dict(zip(keys, part)) for part in parts] for name, parts in g.items()}
            for folder, g in everything.items()
        }
        Path(output).write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", "utf-8")
    for folder, grades in everything.items():
        print(folder)
        for name, parts in grades.items():
            print(f"  {name:<42} {score(parts)}")
            for what, marks, failed in parts:
                reached = "-" if failed is None else 0 if failed else marks
                here = "kept for grading" if failed is None else failed or "right"
                print(f"    {reached}/{marks} {what}: {here}")
    if len(folders) > 1:
        print("\n" + "  ".join([f"{'submission':<30}", *names, "all"]))
        for folder, grades in everything.items():
            cells = [f"{score(grades[name]):<{len(name)}}" for name in names]
            total = score([part for parts in grades.values() for part in parts])
            print("  ".join([f"{folder[-30:]:<30}", *cells, total]))


def handed(folder):
    """The exercises that the handout's exercise.json names."""
    path = Path(folder) / "exercise.json"
    try:
        return check(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        sys.exit(f"exercise.py: '{path}' cannot be read; give --exercise NAME …")


def score(parts):
    """The marks that were reached of those whose tests are here."""
    here = [(marks, failed) for _, marks, failed in parts if failed is not None]
    return f"{sum(marks for marks, failed in here if not failed)}/{sum(m for m, _ in here)}"


# --------------------------------------------------------------------------------------------- main


def check(names):
    unknown = [name for name in names if name not in EXERCISES]
    unknown += [n for n in names if not (ROOT / "tests" / f"test_{n.split('.')[0]}.py").is_file()]
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
    what = "seconds for one test [10]"
    grading.add_argument("--limit", type=float, default=10, help=what)
    grading.add_argument("--json", metavar="FILE", help="file for all marks")
    running = commands.add_parser("run")  # by `grade`
    for name, kind in ("folder", str), ("file", str), ("limit", float):
        running.add_argument(name, type=kind)
    running.add_argument("name")
    args = parser.parse_args()
    if args.command == "list":
        for name, exercise in EXERCISES.items():
            total = sum(marks for *_, marks in exercise.parts)
            print(f"{name:<42} {'*' * exercise.difficulty:<4} {total} marks  {exercise.source}")
    elif args.command == "make":
        make(check(args.names), args.output)
    elif args.command == "grade":
        grade_all(args.folders, check(args.exercise), args.limit, args.json)
    else:
        run(args.folder, args.name, args.file, args.limit)


if __name__ == "__main__":
    main()
