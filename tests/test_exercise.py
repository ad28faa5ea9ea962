"""The course kit: what is handed out, what is graded, and that each exercise is graded alone."""

import csv
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import exercise
import pytest
import torch
import torch.nn.functional as F
from conftest import WITHOUT_POSIX, without_posix

import caa
import car
import ksac

pytestmark = pytest.mark.system

# One mistake for each exercise: (what is there, what a student might write)
WRONG = {
    "caa.column_attention": ("softmax(q @ q.mT, dim=-1)", "softmax(q @ q.mT, dim=-2)"),
    "caa.channelized": ("/ z.shape[2]", "/ z.shape[1]"),
    "ksac.shared_atrous": ("padding=r, dilation=r", "padding=1, dilation=1"),
    "car.class_centers": ("counts.clamp(min=1)", "counts"),
    "car.intra_center_to_pixel": (".masked_fill(sigma, 0)  # Eq. (4.3)", "  # Eq. (4.3)"),
    "car.inter_center_to_center": ("epsilon / (K - 1)).sum(-1)  # Eq. (4.6)",
                                   "epsilon / K).sum(-1)  # Eq. (4.6)"),
    "car.inter_center_to_pixel": ("+ Y * diagonal", "- Y * diagonal"),
    "pyramid_fuse.pyramid_labels": ("u[smallest < largest] = 0", "u[smallest <= largest] = 0"),
    "pyramid_fuse.relabel": ("done = done | ((u == 1)", "done = ((u == 1)"),
    "pyramid_fuse.fuse": ("repeat_cells(p >= threshold", "repeat_cells(p > threshold"),
    "spgnet.SemanticPredictionGuidance.forward": ("x_d + y if", "x_d - y if"),
    "hfgd.HighLevelFeatureGuidedModule.forward": ("self.attention(u))", "u)"),
}  # fmt: skip


def refuses(text):
    def call(*args, **kwargs):
        raise ValueError(text)

    return call


def nearest(labels, strides, finest="pixel"):
    maps = [labels[:, s // 2 :: s, s // 2 :: s] for s in strides]
    return maps, [torch.ones_like(y) for y in maps[:-1]]


def repeated(y, like):
    return F.interpolate(y, like.shape[-2:])


GUIDE, GUIDED = "SemanticPredictionGuidance.forward", "HighLevelFeatureGuidedModule.forward"
POLICY = "policy='best': it is one of 'true_positive', 'ground_truth', 'naive'"
# Answers that need no thought: for each exercise, {function: what stands in its place}
TRIVIAL = {
    "caa.column_attention": [
        {"column_attention": lambda q: torch.zeros(len(q), q.shape[3], *q.shape[2:3] * 2)},
        {"column_attention": lambda q: torch.full((len(q), q.shape[3], *q.shape[2:3] * 2),
                                                  1 / q.shape[2], dtype=q.dtype)},
        {"column_attention": lambda q: q.permute(0, 3, 2, 1) @ q.permute(0, 3, 1, 2)},
        {"column_attention": lambda q: torch.softmax(  # the row's map
            q.permute(0, 2, 3, 1) @ q.permute(0, 2, 1, 3), -1)},
    ],
    "caa.channelized": [
        {"channelized": lambda A, value, gate, axis: torch.zeros_like(value)},
        {"channelized": lambda A, value, gate, axis: value.clone()},
        {"channelized": lambda A, value, gate, axis: caa.channelized_grouped(  # no gates
            A, value, None, axis, 1)},
        {"channelized": lambda A, value, gate, axis: caa.channelized_grouped(  # α
            A, value, gate, axis, 1)},
        {"channelized": lambda A, value, gate, axis: caa.channelized_grouped(  # α, row by row
            A, value, gate, axis, A.shape[-1])},
    ],
    "ksac.shared_atrous": [
        dict.fromkeys(["separate", "rearranged", "shared_atrous"], lambda x, w, rates: [
            torch.zeros(len(x), len(w), *x.shape[2:], dtype=x.dtype) for _ in rates]),
        dict.fromkeys(["separate", "rearranged", "shared_atrous"], lambda x, w, rates: [x] * 3),
        {"rearranged": lambda x, w, rates: ksac.separate(x, w, rates)},
        {"rearranged": lambda x, w, rates: [F.conv2d(x, w, padding=1)] * len(rates)},
    ],
    "car.class_centers": [
        {"class_centers": lambda x, y, K, scope="batch": (torch.zeros(K, x.shape[1]),
                                                          torch.zeros(K))},
        {"class_centers": lambda x, y, K, scope="batch": (
            x.mean((0, 2, 3)).expand(K, -1), torch.full((K,), y.numel() / K))},
        {"class_centers": lambda x, y, K, scope="batch": (
            torch.stack([(x * (y == k)[:, None]).sum((0, 2, 3)) for k in range(K)]),
            torch.stack([(y == k).sum() for k in range(K)]))},
    ],
    "car.intra_center_to_pixel": [
        {"intra_center_to_pixel": lambda x, y, mu, released=False: x.sum() * 0},
        {"intra_center_to_pixel": lambda x, y, mu, released=False: x.float().square().mean()},
        {"intra_center_to_pixel": lambda x, y, mu, released=False: car.inter_center_to_pixel(
            x, y, mu, released=released)},
        {"intra_center_to_pixel": lambda x, y, mu, released=False: car.f_mse(
            car.flat(x, y) - mu.detach().mean(0), released)},
    ],
    "car.inter_center_to_center": [
        {"inter_center_to_center": lambda mu, epsilon=0.5, released=False: mu.sum() * 0},
        {"inter_center_to_center": lambda mu, epsilon=0.5, released=False: mu.square().mean()},
        {"inter_center_to_center": lambda mu, epsilon=0.5, released=False: torch.softmax(
            mu @ mu.mT / math.sqrt(mu.shape[-1]), -1).square().mean()},
    ],
    "car.inter_center_to_pixel": [
        {"inter_center_to_pixel": lambda x, y, mu, *args, **kwargs: x.sum() * 0},
        {"inter_center_to_pixel": lambda x, y, mu, *args, **kwargs: car.intra_center_to_pixel(
            x, y, mu)},
        {"inter_center_to_pixel": lambda x, y, mu, *args, **kwargs: torch.softmax(
            car.flat(x, y) @ mu.detach().mT.to(x.dtype), -1).square().mean()},
    ],
    "pyramid_fuse.pyramid_labels": [
        {"pyramid_labels": nearest},
        {"pyramid_labels": lambda y, strides=(32, 16, 8, 4), finest="pixel": [
            [torch.full_like(m, 255) for m in maps] for maps in nearest(y, strides)]},
        {"pyramid_labels": lambda y, *args: ([y] * 3, [y] * 2)},
        {"pyramid_labels": refuses("labels of 32x48: expected multiples of the stride 32")},
    ],
    "pyramid_fuse.relabel": [
        {"relabel": lambda y, u, p, threshold=0.9, policy="true_positive": (y, u)},
        {"relabel": lambda y, u, p, threshold=0.9, policy="true_positive": [
            [torch.full_like(m, 255) for m in maps] for maps in (y, u)]},
        {"relabel": refuses(POLICY)},
    ],
    "pyramid_fuse.fuse": [
        {"fuse": lambda y, p, threshold=0.9: y[-1]},
        {"fuse": lambda y, p, threshold=0.9: repeated(y[0], y[-1])},
        {"fuse": lambda y, p, threshold=0.9: sum(repeated(m, y[-1]) for m in y) / len(y)},
        {"chosen_level": lambda p, like, threshold=0.9: torch.zeros_like(like[:, 0]).long()},
    ],
    "spgnet." + GUIDE: [
        {GUIDE: lambda self, x: (torch.zeros_like(self.out(x)), self.logits(x))},
        {GUIDE: lambda self, x: (self.out(x), self.logits(x))},
        {GUIDE: lambda self, x: (self.out(x + self.transform(x)), self.logits(x))},
        {GUIDE: lambda self, x: (x, x)},
    ],
    "hfgd." + GUIDED: [
        {GUIDED: lambda self, u, kernels: torch.zeros_like(kernels(u))},
        {GUIDED: lambda self, u, kernels: u},
        {GUIDED: lambda self, u, kernels: kernels(u)},
        {GUIDED: lambda self, u, kernels: kernels(self.attention(u))},
        {GUIDED: lambda self, u, kernels: kernels(self.attention(u)).detach()},
    ],
}  # fmt: skip


def source(name):
    return (exercise.ROOT / f"{name.split('.')[0]}.py").read_text("utf-8")


def graded(names, limit=600):
    """{exercise: [what failed, "" where a part is right]}, in this process."""
    lines, conftest = [], sys.modules["conftest"]
    for name in names:
        importlib.import_module(name.split(".")[0])
        exercise.run_tests(name, lambda *line, name=name: lines.append((name, *line)), limit)
    sys.modules["conftest"] = conftest  # the session inside has imported it anew
    return {name: [failed for *_, failed in exercise.marked(lines, name)] for name in names}


def marks(name, failed):
    return sum(marks for (*_, marks), why in zip(exercise.EXERCISES[name].parts, failed) if not why)


def write(name, answers, patch):
    """Put the functions {name: function} in the place of those of the exercise's module."""
    for function, answer in answers.items():
        owner, *path = importlib.import_module(name.split(".")[0]), *function.split(".")
        for part in path[:-1]:
            owner = getattr(owner, part)
        patch.setattr(owner, path[-1], answer)


def solve(name, text, patch):
    """Put the exercise's functions of the source `text` in the place of the module's own."""
    fresh = types.ModuleType("fresh")
    exec(compile(text, "fresh.py", "exec"), fresh.__dict__)
    names = {}
    for function in exercise.EXERCISES[name].blank:
        names[function] = fresh
        for part in function.split("."):
            names[function] = getattr(names[function], part)
    write(name, names, patch)


def submitted(folder, **files):
    """A folder of a submission: {module: text}."""
    folder.mkdir(parents=True, exist_ok=True)
    for module, text in files.items():
        (folder / f"{module}.py").write_text(text, "utf-8")
    return folder


def test_all_parts_pass_with_the_solutions():
    grades = graded(list(exercise.EXERCISES))
    assert len(grades) == 12 and set().union(*grades.values()) == {""}
    assert all(3 <= len(parts) <= 7 for parts in grades.values())


@pytest.mark.parametrize("name", exercise.EXERCISES)
def test_an_exercise_without_its_bodies_fails_alone(name, monkeypatch):
    solve(name, exercise.blanked(source(name), [exercise.EXERCISES[name]]), monkeypatch)
    same_file = [n for n in exercise.EXERCISES if n.split(".")[0] == name.split(".")[0]]
    for other, parts in graded(same_file).items():
        assert set(parts) == ({"not written yet"} if other == name else {""}), other


@pytest.mark.parametrize("name", exercise.EXERCISES)
def test_a_wrong_solution_loses_marks_and_is_told_why(name, monkeypatch):
    right, wrong = WRONG[name]
    assert source(name).count(right) == 1
    solve(name, source(name).replace(right, wrong), monkeypatch)
    failed = [why for why in graded([name])[name] if why]
    assert failed and all("\n" not in why and len(why) < 500 for why in failed)
    assert any("expected" in why for why in failed), failed


@pytest.mark.parametrize("name", exercise.EXERCISES)
def test_a_trivial_answer_has_at_most_one_mark(name, monkeypatch):
    assert len(TRIVIAL[name]) >= 3
    for number, answers in enumerate(TRIVIAL[name]):
        with monkeypatch.context() as patch:
            write(name, answers, patch)
            failed = graded([name])[name]
        assert marks(name, failed) <= 1, (number, failed)


TERMS = ["intra_center_to_pixel", "inter_center_to_center", "inter_center_to_pixel"]


@pytest.mark.parametrize("term", TERMS)
def test_an_answer_without_the_released_form_loses_that_part_alone(term, monkeypatch):
    call = getattr(car, term)
    monkeypatch.setattr(car, term, lambda *args, released=False, **kwargs: call(*args, **kwargs))
    *others, released = graded([f"car.{term}"])[f"car.{term}"]
    assert set(others) == {""} and "expected" in released


def test_a_part_counts_once_the_first_ones_hold():
    name = "ksac.shared_atrous"
    one = exercise.EXERCISES[name]
    tests = [test.replace("[", "[x-") for _, test, _ in one.parts]

    def failed(wrong):
        lines = [(name, test, "wrong" if i in wrong else "") for i, test in enumerate(tests)]
        return [why for *_, why in exercise.marked(lines, name)]

    waits = "right, but counts once the hand-worked part holds ({})"
    assert failed([]) == [""] * 6
    assert failed([5]) == [""] * 5 + ["wrong"]
    assert failed([1, 5]) == ["", "wrong"] + [waits.format(one.parts[1][0])] * 3 + ["wrong"]
    assert failed([0]) == ["wrong"] + [waits.format(one.parts[0][0])] * 5


MISTAKES = [
    ("car.intra_center_to_pixel", "return loss.clamp(min=1e-5) if released else loss",
     "return loss.item()", "`intra_center_to_pixel` returned a Python number where a tensor"),
    ("car.intra_center_to_pixel", "return loss.clamp(min=1e-5) if released else loss",
     "loss.clamp(min=1e-5) if released else loss", "returned None: is there no `return`?"),
    ("car.intra_center_to_pixel", "loss = f_mse(D, released)", "loss = D.mean((0, 1))",
     "a tensor of several numbers came where one was expected"),
    ("car.intra_center_to_pixel", "loss = f_mse(D, released)", "loss = f_mse(D.detach(), released)",
     "with scope=batch, released=False: no gradient reaches one of the inputs: RuntimeError"),
    ("car.intra_center_to_pixel", "loss = f_mse(D, released)", "loss = 2 * f_mse(D, released)",
     r"expected 1\.875 ± 1\.9e-06, got 3\.75 \(test_car.py, line \d+\)"),
    ("car.intra_center_to_pixel", "loss = f_mse(D, released)", "loss = f_mse(D, released).float()",
     r"released=False: float32 came where float64 was expected \(test_car.py"),
    ("hfgd." + GUIDED, "if self.stop_kernels:", "if True:",
     r"with stop=False: no gradient reaches the kernels' weight \(test_hfgd.py"),
    ("hfgd." + GUIDED, "self.attention(u))", "self.attention(u.detach()))",
     r"with stop=False: no gradient reaches the features \(test_hfgd.py"),
    ("pyramid_fuse.fuse", "    return fused", "    return fused.float()",
     "float32 came where float64 was expected"),
    ("caa.channelized", "return z.permute(0, 3, 2, 1)", "return z.permute(0, 3, 1, 2)",
     r"expected the shape \[1, 1, 2, 3\], got \[1, 1, 3, 2\]"),
    ("caa.column_attention", "q.mT, dim=-1", "q.mT.float(), dim=-1",
     "two dtypes meet, such as float32 and float64: RuntimeError"),
    ("caa.column_attention", "torch.promote_types(query.dtype, torch.float32)", "torch.float32",
     "with axis=column: float32 came where float64 was expected"),
    ("ksac.shared_atrous", "padding=r) for r in rates]  # Σ_k",
     "padding=r).float() for r in rates]",
     r"with shared_atrous=rearranged, rates=\(1, 2\): float32 came where float64 was expected"),
    ("ksac.shared_atrous", "    taps = weight.flip(2, 3).permute(0, 2, 3, 1).flatten(0, 2)",
     "    return separate(x, weight, rates)\n    taps = weight.flip(2, 3).flatten(0, 2)",
     "multiply-adds of `rearranged` for three rates.* expected 147456.* got 442368"),
]  # fmt: skip


@pytest.mark.parametrize("name, right, wrong, words", MISTAKES, ids=range(len(MISTAKES)))
def test_frequent_mistakes_are_told_in_words(name, right, wrong, words, monkeypatch):
    text = source(name)
    *owner, function = exercise.EXERCISES[name].blank[0].split(".")
    start = text.index(f"def {function}(", text.index("".join(owner)))
    assert text.count(right, start) >= 1
    solve(name, text[:start] + text[start:].replace(right, wrong, 1), monkeypatch)
    failed = graded([name])[name]
    assert any(re.search(words, why) for why in failed), failed


def test_the_form_that_was_taken_is_said(monkeypatch):
    name = "ksac.shared_atrous"
    write(name, {"shared_atrous": lambda *args: ksac.rearranged(*args)}, monkeypatch)
    *others, form = graded([name])[name]
    assert set(others) == {""} and form.startswith(
        "with channels=767, rates=(1, 2), form=separate: forms that `shared_atrous` called: "
        "expected ['separate'], got ['rearranged'] ("
    )


def test_a_handout_has_no_solution(tmp_path):
    for name, one in exercise.EXERCISES.items():
        folder = tmp_path / name
        exercise.make([name], folder)
        module = name.split(".")[0]
        code, tests = (
            (folder / f"{module}.py").read_text("utf-8"),
            folder / f"tests/test_{module}.py",
        )
        assert code.count("raise NotImplementedError(") == len(one.blank)
        compile(code, module, "exec")
        assert not any(f"def {solution}(" in tests.read_text("utf-8") for solution in one.solutions)
        compile(tests.read_text("utf-8"), tests.name, "exec")
        original, own = (
            exercise.functions(exercise.ast.parse(text)) for text in (source(name), code)
        )
        for function, node in original.items():  # all else is as it was
            same = exercise.ast.dump(node) == exercise.ast.dump(own[function])
            assert same == (function not in one.blank)
        sheet = (folder / "EXERCISE.md").read_text("utf-8")
        assert all(part[0] in sheet for part in one.parts)
        assert one.hint in sheet and one.notes in sheet and f"--exercise {name}`" in sheet
    assert "Derivation" not in (tmp_path / "caa.channelized/caa.py").read_text("utf-8").split(
        "def channel_map")[0].split("def channelized(")[1]  # fmt: skip
    with pytest.raises(SystemExit, match="exists; give a new --output folder"):
        exercise.make(["caa.channelized"], tmp_path)
    with pytest.raises(SystemExit, match="no exercise 'caa.nothing'; there are caa.column"):
        exercise.check(["caa.nothing"])


def test_the_sheet_says_what_there_is_to_reach(tmp_path):
    names = ["caa.channelized", "car.inter_center_to_center"]
    exercise.make(names, tmp_path / "out")
    sheet = (tmp_path / "out" / "EXERCISE.md").read_text("utf-8")
    assert "# Exercises\n\n16 marks." in sheet
    assert "9 marks: 7 here, 2 more at grading." in sheet
    assert "7 marks: 4 here, 3 more at grading." in sheet
    assert sheet.count("kept for grading |") == 3
    assert "10 seconds of CPU time" in sheet and "180 seconds on the clock" in sheet
    assert "float64" in sheet and "the released form, for which no other part asks" in sheet
    assert sheet.count("the others once both hold") == 1  # the weighted features come second


def test_no_link_of_a_handout_is_dead(tmp_path):
    exercise.make(["caa.channelized"], tmp_path / "out")
    pages = [*(tmp_path / "out").rglob("*.md")]
    assert {page.name for page in pages} == {"README.md", "EXERCISE.md"}
    for page in pages:
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text("utf-8")):
            path = page.parent / target.partition("#")[0]
            assert target.startswith("https://") or path.exists(), target
    text = "![seen](a.png)[there](x.md#a), [gone](y.md), [far](https://a.b), [here](#c)"
    (tmp_path / "x.md").touch()
    assert exercise.living(text, tmp_path) == (
        "[there](x.md#a), gone (not in this handout), [far](https://a.b), [here](#c)"
    )


def test_a_class_is_graded(tmp_path, capsys):
    name, right = "pyramid_fuse.fuse", source("pyramid_fuse.fuse")
    submissions = {
        "ben": right.replace(*WRONG[name]),
        "eve": "import os\nos._exit(0)\n",
    }
    for student, text in submissions.items():
        exercise.make([name, name], tmp_path / student)
        (tmp_path / student / "pyramid_fuse.py").write_text(text, "utf-8")
        shutil.rmtree(tmp_path / student / "tests")  # they are not what is graded by
    (tmp_path / "eve" / "exercise.json").write_text('["car.class_centers", 3]')  # nor this
    output, table = tmp_path / "new" / "grades.json", tmp_path / "grades.csv"
    exercise.grade_all([tmp_path / s for s in submissions], [], 600, output, table)
    printed, grades = capsys.readouterr().out, json.loads(output.read_text("utf-8"))
    ben, eve = grades["submissions"].values()
    parts = [part["failed"] for part in ben["exercises"][name]["parts"]]
    assert parts[0].startswith("expected ")
    assert {part["failed"] for part in eve["exercises"][name]["parts"]} == {exercise.ENDED}
    for who, entry in ("ben", ben), ("eve", eve):
        kept = [entry[key] for key in ("submission", "marks", "maximum", "percent")]
        assert kept == [who, 0, 5, 0]
        assert f"/2 {who}: 0/5 ({name} 0/5" in printed
    assert eve["flags"] == ["pyramid_fuse.py, line 1: imports os",
                            "pyramid_fuse.py, line 2: uses os._exit(0)"]  # fmt: skip
    assert "look at pyramid_fuse.py, line 2: uses os._exit(0)" in printed
    rows = list(csv.reader(table.read_text("utf-8").splitlines()))
    assert rows[0] == ["submission", "exercise", "marks", "maximum", "percent", "flags"]
    flags = "; ".join(eve["flags"])
    assert rows[1:3] == [["ben", name, "0", "5", "0.0", ""], ["ben", "total", "0", "5", "0.0", ""]]
    assert rows[3:] == [["eve", x, "0", "5", "0.0", flags] for x in (name, "total")]


def test_a_class_goes_on_where_it_was_interrupted(tmp_path, capsys, monkeypatch):
    names = ["caa.column_attention", "caa.channelized"]
    right = [(what, marks, "") for what, _, marks in exercise.EXERCISES[names[0]].parts]
    wrong = [(what, marks, "no") for what, _, marks in exercise.EXERCISES[names[1]].parts]
    class_ = ["ann", "ben", "cyd", "dan"]
    folders = [submitted(tmp_path / student, caa=f"# {student}\n") for student in class_]
    output, done = tmp_path / "grades.json", []
    stops = {"cyd": {"ann", "ben"}}  # who interrupts, once the marks of these are kept
    idle = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"],
                            start_new_session=True)  # fmt: skip

    def kept():
        text = output.read_text("utf-8") if output.exists() else '{"submissions": {}}'
        return {entry["submission"] for entry in json.loads(text)["submissions"].values()}

    def grade(folder, names, limit):
        if folder.name in stops:
            for _ in range(60_000):  # ten minutes; it takes far less
                if kept() == stops[folder.name]:
                    break
                time.sleep(0.01)
            raise KeyboardInterrupt
        if stops and folder.name == "dan":  # not before the interruption has been seen
            exercise.STOPPED.wait(600)
            return {}
        done.append(folder.name)
        return {names[0]: right, names[1]: wrong}

    def again(limit=10):
        done.clear()
        monkeypatch.setattr(exercise, "STOPPED", threading.Event())
        exercise.grade_all(folders, names, limit, output)
        return capsys.readouterr().out

    monkeypatch.setattr(exercise, "grade", grade)
    monkeypatch.setattr(exercise, "RUNNING", {idle})
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    with pytest.raises(SystemExit, match="interrupted; the same command goes on from here"):
        again()
    assert idle.poll() is not None and exercise.STOPPED.is_set()
    assert kept() == {"ann", "ben"}
    stops.clear()
    capsys.readouterr()
    printed = again()
    assert done == ["cyd", "dan"]
    assert printed.count("its files have not changed") == 2
    each = "5/14 (caa.column_attention 5/5, caa.channelized 0/9)"
    assert f"1/2 cyd: {each}\n2/2 dan: {each}\n" in printed
    assert again().count("its files have not changed") == 4 and not done
    submitted(folders[1], caa="# ben again\n", ksac="# is not graded\n")
    submitted(folders[2], ksac="# is not graded\n")
    again()
    assert done == ["ben"]
    for folder in folders:
        submitted(folder, caa=f"# {folder.name} again\n\n")
    stops["ben"] = {"ann"}
    with pytest.raises(SystemExit, match="interrupted"):
        again()
    assert kept() == {"ann"}  # the others' marks are too old
    stops.clear()
    again()
    assert done == class_[1:]
    other = "grades.json' holds other exercises \\(or another --limit\\); give a new name"
    text = output.read_text("utf-8")
    for asked, limit in (names, 20), (names[:1], 10), ([*names, "pyramid_fuse.fuse"], 10):
        with pytest.raises(SystemExit, match=other):
            exercise.grade_all(folders, asked, limit, output)
    assert output.read_text("utf-8") == text and done == class_[1:]
    exercise.grade_all(folders, names[::-1], 10, output)  # the same in another order
    assert done == class_[1:]
    entry = json.loads(output.read_text("utf-8"))["submissions"][str(folders[0])]
    assert [entry[key] for key in ("marks", "maximum", "percent")] == [5, 14, 35.7]
    output.write_text("[]")
    with pytest.raises(SystemExit, match="holds something else than marks; give --json a new name"):
        again()


def test_names_are_as_long_as_tells_them_apart():
    paths = [Path(p) for p in ("/a/x/ann", "/a/y/ann", "/b/y/ann", "/a/ben")]
    assert list(exercise.short_names(paths).values()) == ["x/ann", "a/y/ann", "b/y/ann", "ben"]


def test_an_exercise_that_ends_the_process_ends_alone(tmp_path):
    first, ends = "    with torch.autocast(query", "    import os\n    os._exit(0)\n"
    text = source("caa").replace(first, ends + first, 1)
    name = "pyramid_fuse.fuse"
    folder = submitted(tmp_path / "ann", caa=text, pyramid_fuse=source(name))
    names = ["caa.column_attention", "caa.channelized", name]
    grades = exercise.grade(folder, names, 600)
    assert list(grades) == names
    failed = {n: {why for *_, why in parts} for n, parts in grades.items()}
    assert failed["caa.column_attention"] == {exercise.ENDED}
    assert failed["caa.channelized"] == failed[name] == {""}


# (what touches the grader, [what is said of its lines])
TOUCHES = [
    ("import runpy\nrunpy.run_path(backbones.__file__)",
     ["1: imports runpy", "2: uses backbones.__file__"]),
    ('setattr(torch, "allclose", f)', ["1: uses setattr(torch, 'allclose', f)"]),
    ('vars(torch)["equal"] = f', ["1: uses vars(torch)"]),
    ('torch.sys.modules["caa"]', ["1: uses torch.sys.modules"]),
    ("from torch import sys as s\ns.modules", ["1: imports torch.sys", "2: uses s.modules"]),
    ("import torch as T\nT.testing.assert_close = f", ["2: sets T.testing.assert_close"]),
    ("T = torch\nT.equal = f", ["2: sets T.equal"]),
    ("for torch.equal in [f]: pass", ["1: sets torch.equal"]),
    ("from unittest import mock", ["1: imports unittest.mock"]),
    ('getattr(torch, "test" + "ing")', ["1: uses getattr(torch, 'test' + 'ing')"]),
    ("find = getattr", ["1: uses getattr"]),
    ("import math, subprocess, threading",
     ["1: imports subprocess", "1: imports threading"]),
    ("import atexit, types", ["1: imports atexit", "1: imports types"]),
    ("import pytest, torch.testing", ["1: imports pytest", "1: imports torch.testing"]),
    ("from torch import testing", ["1: imports torch.testing"]),
    ("from torch.utils import _pytree", ["1: imports torch.utils._pytree"]),
    ("import test_caa, helper", ["1: imports helper", "1: imports test_caa"]),
    ('compile("1", "", "eval")', ["1: uses compile('1', '', 'eval')"]),
    ("exec(text)\neval(text)", ["1: uses exec(text)", "2: uses eval(text)"]),
    ('__import__("sys")', ["1: uses __import__('sys')"]),
    ("globals(), locals()", ["1: uses globals()", "1: uses locals()"]),
    ("delattr(torch, x)\ndel torch.x", ["1: uses delattr(torch, x)", "2: sets torch.x"]),
    ("open(backbones.__file__).read()", ["1: uses open(backbones.__file__)"]),
    ("channelized.__globals__", ["1: uses channelized.__globals__"]),
    ("channelized.__code__ = f.__code__", ["1: uses channelized.__code__", "1: uses f.__code__"]),
    ("F.relu.__wrapped__, torch.__dict__",
     ["1: uses F.relu.__wrapped__", "1: uses torch.__dict__"]),
    ("__builtins__", ["1: uses __builtins__"]),
    ("x._getframe(1)", ["1: uses x._getframe(1)"]),
    ("class T(torch.Tensor):\n  def __torch_function__(self, *args): pass",
     ["2: defines __torch_function__"]),
    ('torch.load("tests/x")\n"tests/x"', ["1: names 'tests/x'"]),  # the second one is a comment
]  # fmt: skip
PLAIN = """
import collections, einops, functools, itertools, math, typing
import numpy as np
import torch.nn.functional as F
from torch import Tensor
class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self._cache = 1, {}
    def forward(self, signal):
        modules = signal.mean()
        return self._cache, modules, type(self).__name__
if __name__ == "__main__":
    print(Layer())
"""


def test_what_touches_the_grader_is_flagged(tmp_path):
    for name in exercise.EXERCISES:
        assert exercise.flags(exercise.ROOT, [name]) == []

    def flags(text):
        return exercise.flags(submitted(tmp_path, caa=text), ["caa.channelized"])

    for text, said in TOUCHES:
        assert flags(text) == [f"caa.py, line {what}" for what in said]
        assert flags(source("caa") + text)[0].endswith(said[0].partition(":")[2])
    assert flags(PLAIN) == flags("def broken((") == []


def test_what_is_too_deep_to_be_looked_at_is_flagged(tmp_path):
    folder = submitted(tmp_path, caa="x" + ".__a__" * 2000)
    assert exercise.read(folder, ["caa.channelized"])["flags"] == [
        "a file is nested too deeply to be looked at"
    ]


def test_equal_bodies_are_named(tmp_path, monkeypatch):
    text = source("caa")
    renamed = re.sub(r"\bz\b", "summed", text.replace("average", "mean_of_z"))
    other = text.replace(
        "        average = z.mean(dim=1", "        z = z + 0\n        average = z.mean(1"
    )
    texts = dict(
        ann=other,
        ben=re.sub(r"\bz\b", "y", other).replace("        # The mean is float32", "        # So"),
        cyd=renamed,
        dan=other.replace("z + 0", "z + 1"),
        eve="raise SystemExit",
    )
    folders = [submitted(tmp_path / student, caa=text) for student, text in texts.items()]
    names, output = ["caa.column_attention", "caa.channelized"], tmp_path / "grades.json"
    right = {name: [(what, marks, "") for what, _, marks in exercise.EXERCISES[name].parts]
             for name in names}  # fmt: skip
    monkeypatch.setattr(exercise, "grade", lambda *args: right)

    def alike(folders):
        exercise.grade_all(folders, names, 10, output)
        return json.loads(output.read_text("utf-8"))["alike"]

    ben = folders.pop(1)
    own = "cyd: caa.channelized is the repository's own but for names"
    assert alike([*folders, exercise.ROOT]) == [own]  # column_attention is equal in four, but short
    both = ["ann and ben: caa.channelized is the same but for names", own]
    assert alike([ben]) == both  # late, and alone
    shutil.rmtree(folders[0])
    assert alike([ben]) == both


# It shortens the timer of its own test, so no other test has a short limit.
ENDLESS = """
    import signal
    left, _ = signal.setitimer(signal.ITIMER_PROF, 0.01)
    assert 0 < left <= 601  # the kernel counts in ticks
    while True:
        pass
"""


def test_an_endless_loop_fails_its_parts_alone(monkeypatch):
    name, line = "pyramid_fuse.fuse", "    finest = len(unity_prob)\n"
    assert source(name).count(line) == 1
    solve(name, source(name).replace(line, ENDLESS), monkeypatch)
    found = graded([name, "pyramid_fuse.pyramid_labels"])
    said = "TimeoutError: not done after 600 seconds of CPU time ("
    assert all(why.startswith(said) for why in found[name])
    assert set(found["pyramid_fuse.pyramid_labels"]) == {""}


def script(text, tmp_path, monkeypatch):
    """Put a script in the place of the one that runs the tests. Its fourth word is the file of the
    results.
    """
    path = tmp_path / "script.py"
    path.write_text(text, "utf-8")
    monkeypatch.setattr(exercise, "__file__", path)


@pytest.mark.parametrize("groups", [True, False])
def test_a_process_that_finishes_no_test_is_stopped(groups, tmp_path, monkeypatch):
    if not groups:
        monkeypatch.delattr(os, "killpg", raising=False)
    script("import time\ntime.sleep(600)", tmp_path, monkeypatch)
    monkeypatch.setattr(exercise, "STARTING", 0)
    said = "stopped after 1 seconds in this part, or before it"
    assert exercise.results(tmp_path, ["name"], 1 / 6) == ([], said)


class Slow:
    """A process that writes a line during each of the first four waits, and none after."""

    def __init__(self, command, **kwargs):
        self.file, self.waits = command[5], 0

    def wait(self, seconds):
        self.waits += 1
        if self.waits <= 4:
            with open(self.file, "a") as file:
                file.write('["name", "test", ""]\n')
        raise subprocess.TimeoutExpired("", seconds)


def test_a_process_that_finishes_tests_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", Slow)
    monkeypatch.setattr(exercise, "end", lambda process: None)
    lines, ended = exercise.results(tmp_path, ["name"], 10)
    assert lines == [["name", "test", ""]] * 4 and ended.startswith("stopped after 180 seconds")


CUT = """
import json, os, sys
line = json.dumps(["name", "threads", os.environ["OMP_NUM_THREADS"]])
text = "\\n".join(["3", "{}", "[1]", '["name", "te', line, line[:-3]])
print(text, file=open(sys.argv[3], "a"), end="")
"""


def test_lines_that_are_cut_short_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # one, or the threads' time adds up
    script(CUT, tmp_path, monkeypatch)
    lines = [["name", "threads", "1"]]
    assert exercise.results(tmp_path, ["name"], 10) == (lines, exercise.ENDED)


def test_a_part_of_which_a_case_is_missing_is_not_right():
    name, test = "caa.channelized", "test_eq_3_9_by_hand"
    lines = [(name, "collected", f"{test}[{case}]") for case in "ab"]
    lines += [(name, f"{test}[a]", "")]
    assert exercise.marked(lines, name)[0][2] == exercise.ENDED
    assert exercise.marked([*lines, (name, f"{test}[b]", "")], name)[0][2] == ""


def test_options_that_fit_nothing_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(exercise, "read", None)  # before anything is looked at
    (tmp_path / "a.csv").mkdir()
    same = tmp_path / "a.csv" / ".." / "b"
    for limit, output, table, message in (
        (10, None, tmp_path / "a.csv", "a.csv' is a folder; give --json and --csv a file"),
        (10, tmp_path / "a.csv", None, "a.csv' is a folder; give --json and --csv a file"),
        (10, same, tmp_path / "b", "--json and --csv are both '.*b'; give two files"),
        (0, None, None, "--limit is 0; give a number of seconds above 0"),
        (float("nan"), None, None, "--limit is nan; give a number of seconds above 0"),
    ):
        with pytest.raises(SystemExit, match=message):
            exercise.grade_all([tmp_path], ["caa.channelized"], limit, output, table)
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


def test_all_commands_work_from_any_folder_and_without_what_windows_lacks(tmp_path):
    # Windows' files have another encoding than UTF-8, where none is given. Its pipes have, too.
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_POSIX)
    environment = dict(
        PYTHONPATH=str(tmp_path),
        PYTHONWARNDEFAULTENCODING="1",
        PYTHONWARNINGS="error::EncodingWarning:__main__",
        PYTHONIOENCODING="cp1252",
    )

    def command(*arguments, encoding="cp1252"):
        command = without_posix(exercise.__file__, *arguments)
        variables = os.environ | environment | {"PYTHONIOENCODING": encoding}
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True)
        assert done.returncode == 0, done.stderr.decode("cp1252")
        return done.stdout.decode(encoding)

    name = "car.intra_center_to_pixel"
    assert [line.split()[0] for line in command("list").splitlines()] == list(exercise.EXERCISES)
    assert "EXERCISE.md is for the students" in command("make", name, "--output", "handout")
    text = source(name).replace("loss = f_mse(D, released)", "loss = 2 * f_mse(D, released)")
    (tmp_path / "handout" / "car.py").write_text(text, "utf-8")
    grade = ["grade", "handout", "--limit", "600", "--json", "marks.json", "--csv", "marks.csv"]
    printed = command(*grade)
    assert "This system has no timers: a test has no limit in CPU time" in printed
    assert f"{name:<42} 0/7" in printed and "expected 1.875 ± 1.9e-06" in printed
    assert {"marks.json", "marks.csv"} <= set(os.listdir(tmp_path))
    assert "expected 1.875 \\xb1 1.9e-06" in command(*grade, encoding="ascii")


def test_a_copied_folder_is_imported_from_anywhere(tmp_path, monkeypatch):
    files = [shutil.copy(path, tmp_path) for path in exercise.ROOT.glob("*.py")]
    for file in files:
        monkeypatch.setitem(sys.modules, Path(file).stem, None)  # so that the copy does not stay
        del sys.modules[Path(file).stem]
    elsewhere = [path for path in sys.path if Path(path).resolve() != exercise.ROOT]
    monkeypatch.setattr(sys, "path", [*elsewhere, str(tmp_path)])
    monkeypatch.chdir(tmp_path.parent)
    for name in exercise.EXERCISES:
        module = importlib.import_module(name.split(".")[0])
        assert Path(module.__file__).parent == tmp_path


def test_the_students_own_marks_are_of_what_is_handed_out(tmp_path):
    names = ["spgnet.SemanticPredictionGuidance.forward"]
    exercise.make(names, tmp_path / "out")
    command = [sys.executable, "tests/exercise.py", "grade", "."]
    done = subprocess.run(command, cwd=tmp_path / "out", capture_output=True, text=True)
    assert "0/3 here, 3 more at grading" in done.stdout
    assert done.stdout.count("not written yet") == 3
    assert done.stdout.count("kept for grading") == 2
    assert "look at" not in done.stdout and "repository's own" not in done.stdout


# What a file sets does not reach the exercises of the next one in the same process.
SETTINGS = "import torch\ntorch.set_default_dtype(torch.float64)\ntorch.set_grad_enabled(False)\n"


@pytest.mark.parametrize(
    "text, why",
    [
        (None, "there is no pyramid_fuse.py"),
        ("def fuse((:\n", "pyramid_fuse.py, line 1: "),
        ("import nothing_such\n", "pyramid_fuse.py cannot be imported: ModuleNotFoundError"),
        ("raise SystemExit\n", "pyramid_fuse.py cannot be imported: SystemExit"),
        (SETTINGS + "raise SystemExit\n", "pyramid_fuse.py cannot be imported: SystemExit"),
    ],
)
def test_a_file_that_is_not_python_fails_all_parts(text, why, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyramid_fuse", importlib.import_module("pyramid_fuse"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    if text:
        (tmp_path / "pyramid_fuse.py").write_text(text, "utf-8")
    name = "pyramid_fuse.fuse"
    exercise.run(tmp_path, tmp_path / "results", 10, [name])
    lines = [json.loads(line) for line in (tmp_path / "results").read_text("utf-8").splitlines()]
    assert all(failed.startswith(why) for *_, failed in exercise.marked(lines, name))
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()


def test_exercises_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "exercise.json").write_text("no json")
    with pytest.raises(SystemExit, match="cannot be read; give --exercise NAME"):
        exercise.grade_all([tmp_path], [], 10, None)
    with pytest.raises(SystemExit, match="no exercise 'a.b'"):
        exercise.check(["a.b"])


def test_failures_are_told_in_one_line():
    def of(call, pair=None):
        try:
            call()
        except BaseException as error:
            return exercise.words(error, pair)

    def false(text):
        raise AssertionError(text)

    assert of(lambda: false("assert 3 == 4")).startswith(
        "expected 4, got 3 (test_exercise.py, line"
    )
    shapes = of(lambda: false("assert torch.Size([2, 4]) == (3, 4)"))
    assert shapes.startswith("expected (3, 4), got [2, 4] (")
    dtypes = of(lambda: false("assert (torch.float32 == torch.float16)"))
    assert dtypes.startswith("float32 came where float16 was expected (")
    two = of(lambda: false("assert (3 == 3 and 4 == 5)"))
    assert two.startswith("expected 5, got 4 (")
    assert of(lambda: false("two of three\nassert 3 == 4")).startswith("two of three (")
    assert "this does not hold: raise Assert" in of(lambda: false("assert not True"))
    assert "ValueError: invalid literal for int() with base 10: 'ł'" in of(lambda: int("ł"))
    assert exercise.told(torch.ones(1), 2 * torch.ones(1)) == "expected [2.0], got [1.0]"
    assert exercise.told(torch.ones(9) + 1e-6, torch.ones(9)) == (
        "off by 1e-06 at most, as if float64 had been lost on the way"
    )
    assert exercise.told(torch.ones(1), torch.ones(1).double()) == (
        "float32 came where float64 was expected"
    )
