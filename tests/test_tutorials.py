"""The tutorials: sources and notebooks are pairs, every chapter runs, every exercise can be failed and solved.

Nothing here knows a chapter's content: exercises, their solutions and wrong answers are registered where they stand
(`tutorials/exercises/__init__.py` says how).
"""

import ast
import base64
import importlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = ROOT / "tutorials"
sys.path.insert(0, str(TUTORIALS))  # as in a notebook, which runs in that folder

import build  # noqa: E402
import exercises  # noqa: E402
from figures import animation  # noqa: E402

CHAPTERS = (
    "01_a_gate_is_a_memory",
    "02_from_a_loop_to_matmuls",
    "03_one_kernel_two_directions",
    "04_gradients_by_hand",
    "05_from_an_image_to_logits",
    "06_what_does_vig_see",
    "07_the_roadmap",
    "08_how_to_trust_a_kernel",
)
SECONDS = 300  # what a chapter may take on two cores
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/])/(work|root|home|tmp|Users|usr|opt|var|mnt)\b|[A-Z]:\\")
NUMBER = re.compile(r"[-+]?(\d[\d,_]*\.?\d*(e[-+]?\d+)?|\binf\b|\bnan\b)", re.IGNORECASE)

each_chapter = pytest.mark.parametrize("chapter", [path.stem for path in build.sources([])])


def read(chapter: str) -> nbformat.NotebookNode:
    return nbformat.read(TUTORIALS / f"{chapter}.ipynb", as_version=4)


def cells(notebook: nbformat.NotebookNode, kind: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == kind]


def text(cell: nbformat.NotebookNode) -> str:
    """What a cell shows as text, without pictures."""
    shown = []
    for output in cell.outputs:
        shown.append(output.get("text", ""))
        shown += [output.get("data", {}).get(kind, "") for kind in ("text/plain", "text/html", "text/markdown")]
    return "\n".join(filter(None, shown))


def prose(notebook: nbformat.NotebookNode) -> str:
    return "\n\n".join(cell.source for cell in cells(notebook, "markdown"))


def checked(chapter: str) -> dict[str, str]:
    """The exercises of a chapter, each with what `check` printed for the stub."""
    found = {}
    for cell in cells(read(chapter), "code"):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "check":
                assert isinstance(node.args[0], ast.Name), cell.source
                found[node.args[0].id] = text(cell)
    return found


def of_chapter(package: str, chapter: str) -> dict[str, object]:
    """The functions that `exercises.chNN` or `solutions.chNN` defines, without helpers."""
    module = importlib.import_module(f"{package}.ch{chapter[:2]}")
    public = {name: f for name, f in vars(module).items() if callable(f) and not name.startswith("_")}
    return {name: f for name, f in public.items() if getattr(f, "__module__", "") == module.__name__}


# --- the notebooks ---------------------------------------------------------------------------------------------------


def test_all_chapters_are_there():
    assert tuple(path.stem for path in build.sources([])) == CHAPTERS
    assert sorted(path.stem for path in TUTORIALS.glob("*.ipynb")) == sorted(CHAPTERS)


@each_chapter
def test_a_notebook_is_its_source(chapter):
    assert build.pair_differs(TUTORIALS / f"{chapter}.py", TUTORIALS / f"{chapter}.ipynb") == ""


def test_a_changed_source_is_noticed(tmp_path):
    source = TUTORIALS / f"{CHAPTERS[0]}.py"
    changed = tmp_path / source.name
    changed.write_text(source.read_text().replace("import torch\n", "import torch  # changed\n", 1))
    assert "is not that of" in build.pair_differs(changed, source.with_suffix(".ipynb"))
    assert "is missing" in build.pair_differs(changed, tmp_path / "no.ipynb")


@each_chapter
def test_a_notebook_was_run_once_from_top_to_bottom_without_errors(chapter):
    code = cells(read(chapter), "code")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "execute_result", "display_data"}
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    assert any(kind.startswith("image/") for output in outputs for kind in output.get("data", {})), "no figure"


@each_chapter
def test_no_output_names_a_folder_of_the_machine(chapter):
    for cell in cells(read(chapter), "code"):
        assert not ABSOLUTE_PATH.search(text(cell)), text(cell)


@each_chapter
def test_a_chapter_begins_with_what_a_reader_must_know_and_ends_with_a_summary(chapter):
    notebook = read(chapter)
    first = notebook.cells[0]
    assert first.cell_type == "markdown"
    assert re.match(rf"# {int(chapter[:2])}\. \S", first.source), first.source.splitlines()[0]
    for fact in ("Time", "Prerequisites", "Device"):
        assert fact in first.source
    headings = re.findall(r"^#+ (.+)$", prose(notebook), re.MULTILINE)
    for heading in ("Common mistakes", "Summary"):
        assert any(heading.lower() in h.lower() for h in headings), f"no heading {heading!r} in {headings}"


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a Markdown file or a notebook."""
    text = prose(nbformat.read(document, as_version=4)) if document.suffix == ".ipynb" else document.read_text()
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_chapter
def test_links_lead_somewhere(chapter):
    text = prose(read(chapter))
    targets = re.findall(r"\]\(([^)\s]+)", text) + re.findall(r'src="([^"]+)"', text)
    links = [target.partition("#") for target in targets if not re.match(r"https?://|attachment:", target)]
    for path, _, anchor in links:
        document = TUTORIALS / (path or f"{chapter}.ipynb")
        assert document.exists(), path
        assert not anchor or document.suffix not in (".md", ".ipynb") or anchor in anchors(document), (path, anchor)
    following = CHAPTERS[int(chapter[:2]) : int(chapter[:2]) + 1]
    assert all(f"{slug}.ipynb" in {path for path, _, _ in links} for slug in following), "no link to the next chapter"


def without_digits(shown: str) -> list[str]:
    return re.sub(r"\W*#\W*", " # ", NUMBER.sub("#", shown)).split()


@each_chapter
def test_a_chapter_runs_and_says_what_it_said(chapter, tmp_path):
    """In a new kernel; what it prints may differ from the committed notebook in digits only."""
    started = time.perf_counter()
    command = [sys.executable, str(TUTORIALS / "build.py"), chapter[:2], "--to", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS + 60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.perf_counter() - started < SECONDS
    again = nbformat.read(tmp_path / f"{chapter}.ipynb", as_version=4)
    for old, new in zip(cells(read(chapter), "code"), cells(again, "code"), strict=True):
        if "varies" not in old.metadata.get("tags", []):
            assert without_digits(text(new)) == without_digits(text(old)), old.source
        assert [o.output_type for o in new.outputs] == [o.output_type for o in old.outputs], old.source


# --- the animations --------------------------------------------------------------------------------------------------


def split(page: str) -> tuple[str, dict]:
    """A page without its numbers, and the numbers."""
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    return page.replace(found[1], ""), json.loads(found[1])


def same(a, b) -> None:
    """Equal up to rounding: floats to four digits behind the point, bytes up to one."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    elif isinstance(a, str):
        x, y = (np.frombuffer(base64.b64decode(text), np.uint8).astype(int) for text in (a, b))
        assert np.abs(x - y).max() <= 1
    else:
        assert a == pytest.approx(b, abs=2e-4)


@pytest.mark.parametrize("name", animation.PAGES)
def test_an_animation_is_what_its_script_writes(name):
    committed = (ROOT / "docs" / "animations" / f"{name}.html").read_text()
    (text, numbers), (new_text, new_numbers) = split(committed), split(animation.page(name))
    assert text == new_text, "python tutorials/build.py --animations"
    same(numbers, new_numbers)
    assert len(committed) < 300_000
    assert not re.search(r"https?://", committed), "an animation needs no network"


def test_the_chunks_of_the_animation_add_up_to_the_loop():
    numbers = split(animation.page("chunk"))[1]
    assert max(numbers["missing"][-1]) == pytest.approx(0, abs=1e-4)
    kinds = np.array(numbers["kinds"])
    assert ((kinds != 0) == np.tril(np.ones_like(kinds))).all()  # each pair is met, once


# --- the exercises ---------------------------------------------------------------------------------------------------


@each_chapter
def test_exercises_have_a_stub_a_checker_and_a_solution_each(chapter):
    names = checked(chapter)
    assert 2 <= len(names) <= 4
    assert of_chapter("solutions", chapter).keys() >= names.keys()
    registered = {name for name, f in of_chapter("exercises", chapter).items() if exercises.CHECKERS.get(name) is f}
    assert registered == set(names)


@each_chapter
def test_a_stub_is_refused_with_a_message(chapter):
    for name, said in checked(chapter).items():
        assert re.search(r"^Not yet: .{20,}", said, re.MULTILINE), f"{name}: {said}"
        assert " raised " not in said, f"{name}: {said}"


@each_chapter
def test_a_solution_is_accepted(chapter):
    solutions = of_chapter("solutions", chapter)
    for name in checked(chapter):
        torch.manual_seed(0)
        verdict = exercises.judge(solutions[name], name)
        assert verdict, f"{name}: {verdict.message}"


@each_chapter
def test_plausible_wrong_answers_are_refused_and_the_mistake_is_named(chapter):
    for name in checked(chapter):
        exercises.find(name)
        assert exercises.WRONG.get(name), f"{name}: register a wrong answer with @wrong"
        for answer, mistake, says in exercises.WRONG[name]:
            torch.manual_seed(0)
            verdict = exercises.judge(answer, name)
            assert not verdict, f"{name} accepts an answer that {mistake}"
            assert re.search(says, verdict.message), f"{name}, an answer that {mistake}: {verdict.message}"


# --- what checkers are made of ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("got", "message"),
    [
        ("text", "x: expected a number or a tensor, got str."),
        (torch.zeros(3), "x: expected the shape [2, 2], got [3]."),
        (torch.tensor([[1.0, 2.0], [3.0, 5.0]]), "x: at index [1, 1] expected 4, got 5; 1 of 4 values differ."),
        (torch.tensor([[1.0, 2.0], [3.0, torch.nan]]), "x: at index [1, 1] expected 4, got nan; 1 of 4 values differ."),
        (torch.tensor([[2.0, 4.0], [6.0, 8.0]]), "x: at index [1, 1] expected 4, got 8; all values are 2 times what"),
        (torch.tensor([[3.0, 4.0], [1.0, 2.0]]), "x: at index [0, 0] expected 1, got 3; the values are right but in"),
        (torch.tensor([[0.0, 0.0], [0.0, 0.0]]), "x: you forgot to add."),
    ],
)
def test_expect_says_what_is_wrong(got, message):
    right = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    with pytest.raises(exercises.NotYet) as refused:
        exercises.expect(got, right, "x", likely={"you forgot to add.": torch.zeros(2, 2)})
    assert str(refused.value).startswith(message)


def test_check_prints_a_verdict_and_never_raises(capsys, monkeypatch):
    def always_three(answer):
        exercises.expect(answer(), 3, "always_three()")

    monkeypatch.setitem(exercises.CHECKERS, "always_three", always_three)
    for body, message in {
        "return 3": "Right: always_three does what was asked.",
        "return 4": "Not yet: always_three(): expected 3, got 4.",
        "...": "Not yet: always_three returns None. Write your answer in place of `...`, and end it with `return`.",
        "return 1 / 0": "Not yet: always_three raised ZeroDivisionError: division by zero",
    }.items():
        namespace = {}
        exec(f"def always_three():\n    {body}", namespace)
        verdict = exercises.check(namespace["always_three"])
        assert bool(verdict) == (body == "return 3")
        assert capsys.readouterr().out.startswith(message)


def test_an_unknown_exercise_is_named_with_those_that_exist():
    with pytest.raises(LookupError, match=r"no exercise is called 'nonsense'; there are .*\w"):
        exercises.find("nonsense")
