"""What make calls: `python -m helpers run [NOTEBOOK ...]`, `batch`, `fill` and `published`."""

import argparse
import base64
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .embeddings import EMBEDDINGS, read_vectors, write_vectors
from .live import published
from .live.collect import answer_requests, fill
from .log import CallLog
from .rows import judge_mode, snapshot_folder
from .settings import ROOT, CallFailed, RunStopped

NOTEBOOKS = ROOT / "notebooks"
BUILD = ROOT / "build"
# The folder in a snapshot that holds a notebook's part.
PARTS = {
    "01_correctness": "correctness",
    "02_pairwise": "pairwise",
    "03_shared_helpers": "single_grading",
}


@dataclass
class Run:
    """A notebook that was executed: `stopped` is the name of the error that stopped it, or ""."""

    path: Path
    notebook: Any
    stopped: str = ""


def _paths(names: list[str]) -> list[Path]:
    """The notebooks of these names, or all."""
    there = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))  # not a reader's own beside them
    paths = [NOTEBOOKS / f"{Path(name).stem}.ipynb" for name in names] or there
    for path in paths:
        if path not in there:
            known = ", ".join(one.stem for one in there)
            sys.exit(f"no notebook {path.name}; there are {known}")
    return paths


def _pages() -> Path:
    """The folder for executed notebooks and their pages: `build/`, or beside a live run's logs."""
    folder = BUILD if judge_mode() == "replay" else snapshot_folder("")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _execute(path: Path, target: Path, environment: dict[str, str], quietly: bool = False) -> Run:
    """Execute a notebook from a clean kernel, and write it to `target` and its page to `_pages()`.

    It prints what stopped the notebook, but `quietly` not that calls were collected. A snapshot of
    finished rows only, such as the published run, has no log: cells tagged "calls" are left out.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError
    from nbconvert import HTMLExporter

    print(f"{path.name}: running ({judge_mode()})", flush=True)
    start = time.perf_counter()
    notebook = nbformat.read(path, as_version=4)
    if (
        judge_mode() == "replay"
        and not (snapshot_folder(PARTS[path.stem]) / "calls.jsonl").exists()
    ):
        cells = notebook.cells
        notebook.cells = [one for one in cells if "calls" not in one.metadata.get("tags", [])]
    client = NotebookClient(
        notebook,
        timeout=None,
        coalesce_streams=True,  # else a stream is cut where the clock has it
        kernel_name="python3",
        resources={"metadata": {"path": str(NOTEBOOKS)}},
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
    )
    try:
        client.execute(env={**os.environ, **environment, "PROGRESS": "terminal"})
    except CellExecutionError as error:
        if not quietly or error.ename != "Collected":
            print(f"{path.name}: stopped: {error.ename}: {error.evalue}", file=sys.stderr)
        return Run(path, notebook, error.ename)
    except DeadKernelError:
        said = "its kernel died; is there enough memory?"
        print(f"{path.name}: stopped: {said}", file=sys.stderr)
        return Run(path, notebook, "DeadKernelError")
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day, which differ in each run
    nbformat.write(notebook, target)
    page, _ = HTMLExporter().from_notebook_node(notebook)
    (_pages() / f"{path.stem}.html").write_text(page, encoding="utf-8")
    print(f"{path.name}: done in {time.perf_counter() - start:.0f} s", flush=True)
    return Run(path, notebook)


def run(names: list[str], in_place: bool = False) -> int:
    """Execute notebooks, and print the outputs of cells tagged "metrics".

    Notebooks and pages go to `_pages()`. With `in_place`, the notebooks' outputs, the pictures that
    README.md shows and the vectors of their texts are written back into the repository.
    """
    paths, pages = _paths(names), _pages()
    replay = judge_mode() == "replay"
    # Replays need nothing of each other, so they run at the same time and share the cores. Live
    # runs go one by one: the last notebook reads what the others wrote.
    workers = len(paths) if replay else 1
    shared = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}
    vectors = {path: BUILD / f"{path.stem}.npz" for path in paths}

    def execute(path: Path) -> Run:
        vectors[path].unlink(missing_ok=True)
        more = {"KEEP_EMBEDDINGS": str(vectors[path])} if in_place else {}
        return _execute(path, path if in_place else pages / path.name, shared | more)

    if replay:
        with ThreadPoolExecutor(workers) as pool:
            runs = list(pool.map(execute, paths))
    else:
        runs = []
        for path in paths:
            runs.append(execute(path))
            if runs[-1].stopped == "RunStopped":
                break  # what stopped this notebook would stop the next
    whole = [one for one in runs if not one.stopped]
    if in_place:
        _write_back(whole, {} if paths == _paths([]) else read_vectors(EMBEDDINGS), vectors)
    for one in whole:
        for output in _tagged(one.notebook, "metrics"):
            print(f"\n{one.path.stem}\n{output['data']['text/plain']}")
    if whole:
        shown = " ".join(str(pages / f"{one.path.stem}.html") for one in whole)
        print(f"\nTo read on, open {shown}")
    return int(any(one.stopped not in ("", "Collected") for one in runs))


def _tagged(notebook: Any, tag: str) -> list[Any]:
    """The outputs of a notebook's cells that have a tag."""
    cells = [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]
    return [output for cell in cells for output in cell.outputs]


def _write_back(runs: list[Run], vectors: dict, files: dict[Path, Path]) -> None:
    """Write the vectors that the notebooks used, and the pictures that README.md shows."""
    for one in runs:
        vectors |= read_vectors(files[one.path])
        for output in _tagged(one.notebook, "picture"):
            picture = NOTEBOOKS / "images" / f"{one.path.stem}.png"
            picture.parent.mkdir(exist_ok=True)
            picture.write_bytes(base64.b64decode(output["data"]["image/png"]))
    write_vectors(EMBEDDINGS, vectors)


def run_in_batches(names: list[str]) -> int:
    """Run notebooks stage by stage: its requests go to the Batch API, its answers to the log."""
    for path in _paths(names):
        while True:  # each round but the last adds answers
            done = _execute(path, _pages() / path.name, {}, quietly=True)
            if not done.stopped:
                break
            if done.stopped != "Collected":
                return 1
            before = added = 0
            try:
                # Closed at the end: the notebook writes to the log next.
                with CallLog(snapshot_folder(PARTS[path.stem]) / "calls.jsonl") as log:
                    before = len(log)
                    wrong = answer_requests(log)
                    added = len(log) - before
            except (RunStopped, CallFailed, RuntimeError) as stopped:
                print(f"{path.name}: stopped: {stopped}", file=sys.stderr)
                return 1
            print(f"{path.name}: {added} answers added, {before + added} in all", flush=True)
            for line in wrong:
                print(line, file=sys.stderr)
            if not added:
                print(
                    f"{path.name}: stopped: the batch answered none of its requests. `make record` "
                    "asks for them one by one, and makes rows that are refused again invalid",
                    file=sys.stderr,
                )
                return 1
    return 0


def _fill(log_path: Path, results: Path, requests: Path | None) -> int:
    with CallLog(log_path, mode="collect") as log:
        before = len(log)
        wrong = fill(log, results, requests)
        print(f"{log_path}: {len(log) - before} answers added, {len(log)} in all")
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


def _published() -> int:
    wrong = published.download()
    said = (
        f"{len(published.FILES)} files in {published.FOLDER}: run them with "
        "`SNAPSHOT=published make run NOTEBOOK=02_pairwise`"
    )
    print("\n".join(wrong) or said)
    return 1 if wrong else 0


def main() -> int:
    """Run a command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m helpers", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="execute notebooks")
    running.add_argument("notebooks", nargs="*")
    running.add_argument("--in-place", action="store_true", help="write outputs to notebooks/")
    batching = commands.add_parser("batch", help="run notebooks through the Batch API")
    batching.add_argument("notebooks", nargs="*")
    filling = commands.add_parser("fill", help="merge a results file into a call log")
    filling.add_argument("log", type=Path)
    filling.add_argument("results", type=Path)
    filling.add_argument("--requests", type=Path, help="by default requests.jsonl beside the log")
    commands.add_parser("published", help="download the files of the published run of 2023")
    given = parser.parse_args()
    if given.command == "run":
        return run(given.notebooks, given.in_place)
    if given.command == "batch":
        return run_in_batches(given.notebooks)
    if given.command == "published":
        return _published()
    return _fill(given.log, given.results, given.requests)


if __name__ == "__main__":
    sys.exit(main())
