"""The course kit: what is handed out, what is graded, and that each exercise is graded alone."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import exercise
import pytest
from conftest import WITHOUT_POSIX, without_posix

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


def source(name):
    return (exercise.ROOT / f"{name.split('.')[0]}.py").read_text("utf-8")


def graded(names, limit=600):
    """{exercise: [what failed, "" where a part is right]}, in this process."""
    lines, conftest = [], sys.modules["conftest"]
    exercise.run_tests(names, lambda *line: lines.append(json.dumps(line)), limit)
    sys.modules["conftest"] = conftest  # the session inside has imported it anew
    return {name: [failed for *_, failed in exercise.marked(lines, name)] for name in names}


def solve(name, text, monkeypatch):
    """Put the exercise's functions of the source `text` in the place of the module's own."""
    fresh, module = types.ModuleType("fresh"), importlib.import_module(name.split(".")[0])
    exec(compile(text, "fresh.py", "exec"), fresh.__dict__)
    for function in exercise.EXERCISES[name].blank:
        owner, new, *path = module, fresh, *function.split(".")
        for part in path[:-1]:
            owner, new = getattr(owner, part), getattr(new, part)
        monkeypatch.setattr(owner, path[-1], getattr(new, path[-1]))


def test_all_parts_pass_with_the_solutions():
    grades = graded(list(exercise.EXERCISES))
    assert len(grades) == 12 and set().union(*grades.values()) == {""}
    assert all(3 <= len(parts) <= 6 for parts in grades.values())


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
        assert all(part[0] in sheet for part in one.parts) and one.hint in sheet
    assert "Derivation" not in (tmp_path / "caa.channelized/caa.py").read_text("utf-8").split(
        "def channel_map")[0].split("def channelized(")[1]  # fmt: skip
    with pytest.raises(SystemExit, match="exists; give a new --output folder"):
        exercise.make(["caa.channelized"], tmp_path)
    with pytest.raises(SystemExit, match="no exercise 'caa.nothing'; there are caa.column"):
        exercise.check(["caa.nothing"])


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
    output = tmp_path / "grades.json"
    exercise.grade_all([tmp_path / student for student in submissions], [], 600, output)
    printed, grades = capsys.readouterr().out, json.loads(output.read_text("utf-8"))
    grades = {Path(folder).name: marks for folder, marks in grades.items()}
    found = {s: [p["failed"] for p in grades[s][name]] for s in submissions}
    assert found["ben"][0].startswith("expected ") and found["ben"][3] == ""
    assert set(found["eve"]) == {"the process ended in this part, or before it"}
    rows = [line.split() for line in printed.splitlines()[-2:]]
    assert [Path(row[0]).name for row in rows] == list(submissions)
    assert rows[1][1:] == ["0/5"] * 2


# The loop shortens the alarm of its own test, so no other test has a short limit.
ENDLESS = """
    import signal
    left, _ = signal.setitimer(signal.ITIMER_REAL, 0.01)
    assert 0 < left <= 600
    while True:
        pass
"""


def test_an_endless_loop_fails_its_parts_alone(monkeypatch):
    name, line = "pyramid_fuse.fuse", "    finest = len(unity_prob)\n"
    assert source(name).count(line) == 1
    solve(name, source(name).replace(line, ENDLESS), monkeypatch)
    found = graded([name, "pyramid_fuse.pyramid_labels"])
    assert all(why.startswith("TimeoutError: not done after 600 sec") for why in found[name])
    assert set(found["pyramid_fuse.pyramid_labels"]) == {""}


@pytest.mark.parametrize("groups", [True, False])
def test_a_submission_that_never_ends_is_stopped(groups, tmp_path, monkeypatch):
    if not groups:
        monkeypatch.delattr(os, "killpg", raising=False)
    monkeypatch.setattr(exercise, "STARTING", 1)
    (tmp_path / "pyramid_fuse.py").write_text("import time\ntime.sleep(600)\n")
    parts = exercise.grade(tmp_path, "pyramid_fuse.fuse", 0)
    assert {why for *_, why in parts} == {"stopped after 1 seconds, in this part or before it"}


def test_all_commands_work_from_any_folder_and_without_what_windows_lacks(tmp_path):
    # Windows' files have another encoding than UTF-8, where none is given. Its pipes have, too.
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_POSIX)
    environment = dict(
        PYTHONPATH=str(tmp_path),
        PYTHONWARNDEFAULTENCODING="1",
        PYTHONWARNINGS="error::EncodingWarning:__main__",
        PYTHONIOENCODING="cp1252",
    )

    def command(*arguments):
        command = without_posix(exercise.__file__, *arguments)
        kwargs = dict(cwd=tmp_path, env=os.environ | environment, capture_output=True)
        done = subprocess.run(command, **kwargs)
        assert done.returncode == 0, done.stderr.decode("cp1252")
        return done.stdout.decode("cp1252")

    name = "pyramid_fuse.fuse"
    assert [line.split()[0] for line in command("list").splitlines()] == list(exercise.EXERCISES)
    assert "EXERCISE.md is for the students" in command("make", name, "--output", "handout")
    (tmp_path / "handout" / "pyramid_fuse.py").write_text(source(name), "utf-8")
    marks = sum(marks for _, _, marks in exercise.EXERCISES[name].parts)
    printed = command("grade", "handout", "--limit", "600", "--json", "marks.json")
    assert f"{name:<42} {marks}/{marks}" in printed and "marks.json" in os.listdir(tmp_path)


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
    assert "0/3" in done.stdout and done.stdout.count("not written yet") == 2
    assert done.stdout.count("kept for grading") == 2


@pytest.mark.parametrize(
    "text, why",
    [
        (None, "there is no pyramid_fuse.py"),
        ("def fuse((:\n", "pyramid_fuse.py, line 1: "),
        ("import nothing_such\n", "pyramid_fuse.py cannot be imported: ModuleNotFoundError"),
        ("raise SystemExit\n", "pyramid_fuse.py cannot be imported: SystemExit"),
    ],
)
def test_a_file_that_is_not_python_fails_all_parts(text, why, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyramid_fuse", importlib.import_module("pyramid_fuse"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    if text:
        (tmp_path / "pyramid_fuse.py").write_text(text, "utf-8")
    exercise.run(tmp_path, "pyramid_fuse.fuse", tmp_path / "results", 10)
    parts = exercise.marked(
        (tmp_path / "results").read_text("utf-8").splitlines(), "pyramid_fuse.fuse"
    )
    assert all(failed.startswith(why) for *_, failed in parts)


def test_exercises_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "exercise.json").write_text("no json")
    with pytest.raises(SystemExit, match="cannot be read; give --exercise NAME"):
        exercise.grade_all([tmp_path], [], 10, None)
    with pytest.raises(SystemExit, match="no exercise 'a.b'"):
        exercise.check(["a.b"])
    assert exercise.marked(['["collected", []]', '["x'], "car.class_centers")[0][2]  # cut short


def test_failures_are_told_in_one_line_of_ascii():
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
    two = of(lambda: false("assert (3 == 3 and 4 == 5)"))
    assert two.startswith("this does not hold: (3 == 3 and 4 == 5)")
    assert "\\u0142" in of(lambda: 1 / 0 if false is None else int("\u0142"))
    assert exercise.told(exercise_tensor(1.0), exercise_tensor(2.0)) == "expected [2.0], got [1.0]"


def exercise_tensor(value):
    import torch

    return torch.tensor([value])
