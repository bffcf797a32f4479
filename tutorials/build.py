"""Turns the chapters' sources into executed notebooks: `python tutorials/build.py [NN ...]`.

A chapter is written as `NN_slug.py` (jupytext's percent format: reviewable text) and read as `NN_slug.ipynb`, which
carries its figures. Only the source is edited by hand, and begins with

    # ---
    # jupyter:
    #   kernelspec:
    #     display_name: Python 3
    #     language: python
    #     name: python3
    # ---

A cell whose printed text changes from run to run by more than digits carries a tag: `# %% tags=["varies"]`.

A second run changes the notebook only where results changed: times of execution and random identifiers are left out.
"""

import argparse
import importlib
import os
import re
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).resolve().parent
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
SECONDS_PER_CELL = 300
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def sources(numbers: list[str]) -> list[Path]:
    """The chapters with these numbers, all if there are none, in their order."""
    found = sorted(HERE.glob("[0-9][0-9]_*.py"))
    wanted = {f"{int(n):02d}" for n in numbers}
    missing = wanted - {path.name[:2] for path in found}
    if missing:
        raise SystemExit(f"no chapter {', '.join(sorted(missing))}; there are {', '.join(p.stem for p in found)}")
    return [path for path in found if not wanted or path.name[:2] in wanted]


def notebook_of(source: Path) -> nbformat.NotebookNode:
    """The source as a notebook without outputs; a cell's id is its place, not a random word."""
    notebook = jupytext.read(source)
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for i, cell in enumerate(notebook.cells):
        cell.id = f"{source.name[:2]}-{i:03d}"
    return notebook


def execute(notebook: nbformat.NotebookNode, title: str) -> None:
    """Runs every cell in a new kernel, in `tutorials/`, with outputs and without traces of when and where."""
    started = time.perf_counter()

    def progress(cell: nbformat.NotebookNode, cell_index: int) -> None:
        seconds = time.perf_counter() - started
        print(f"\r{title}: cell {cell_index + 1} of {len(notebook.cells)}, {seconds:.0f} s ", end="", flush=True)

    client = NotebookClient(
        notebook,
        timeout=SECONDS_PER_CELL,
        kernel_name=KERNEL["name"],
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],  # else it warns of its connection to this very process
        resources={"metadata": {"path": str(HERE)}},
        on_cell_start=progress,
    )
    os.environ["PYTHONHASHSEED"] = "0"
    os.environ["TQDM_DISABLE"] = "1"  # a bar is drawn over itself; a notebook would keep every stroke
    client.execute()
    print()
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            output.get("metadata", {}).clear()
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)


def pair_differs(source: Path, notebook: Path) -> str:
    """What differs between a source and its notebook, in a sentence; empty if nothing does."""
    if not notebook.exists():
        return f"{notebook.name} is missing"
    ours, theirs = notebook_of(source).cells, nbformat.read(notebook, as_version=4).cells
    if len(ours) != len(theirs):
        return f"{source.name} has {len(ours)} cells, {notebook.name} has {len(theirs)}"
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if (a.cell_type, a.source) != (b.cell_type, b.source):
            return f"cell {i + 1} of {source.name} is not that of {notebook.name}; it begins {a.source[:60]!r}"
    return ""


def build(source: Path, folder: Path) -> None:
    notebook = notebook_of(source)
    try:
        execute(notebook, source.stem)
    except CellExecutionError as error:
        raise SystemExit(f"\n{source.name} stopped:\n{COLOURS.sub('', str(error))}") from None
    nbformat.validate(notebook)
    nbformat.write(notebook, folder / f"{source.stem}.ipynb")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("chapters", nargs="*", metavar="NN", help="numbers of chapters (all)")
    parser.add_argument("--check", action="store_true", help="only compare the sources with the notebooks")
    parser.add_argument("--animations", action="store_true", help="only write docs/animations/*.html")
    parser.add_argument("--to", type=Path, default=HERE, metavar="FOLDER", help="write the notebooks there")
    options = parser.parse_args()
    chapters = sources(options.chapters)
    if options.check:
        differences = list(filter(None, (pair_differs(p, p.with_suffix(".ipynb")) for p in chapters)))
        print("\n".join(differences) or f"{len(chapters)} chapters equal their notebooks")
        return 1 if differences else 0
    if options.animations:
        sys.path.insert(0, str(HERE))
        importlib.import_module("figures.animation").write()
        return 0
    for source in chapters:
        build(source, options.to)
    return 0


if __name__ == "__main__":
    sys.exit(main())
