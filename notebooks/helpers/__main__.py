"""What make calls: `python -m helpers run [--in-place] [NOTEBOOK ...]`, `... batch [NOTEBOOK ...]`, `... fill LOG RESULTS`, `... published`."""

import argparse
import base64
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import published
from .batch import answer_requests
from .calls import fill
from .embeddings import EMBEDDINGS, read_vectors, write_vectors
from .models import CallFailed
from .settings import ROOT, RunStopped
from .snapshots import CallLog, judge_mode, snapshot_folder

NOTEBOOKS = ROOT / "notebooks"
BUILD = ROOT / "build"


def _paths(names: list[str]) -> list[Path]:
    """The notebooks of these names, or all."""
    there = sorted(
        NOTEBOOKS.glob("[0-9][0-9]_*.ipynb")
    )  # not those that a reader keeps beside them
    paths = [NOTEBOOKS / f"{Path(name).stem}.ipynb" for name in names] or there
    for path in paths:
        if path not in there:
            sys.exit(f"no notebook {path.name}; there are {', '.join(one.stem for one in there)}")
    return paths


def _part(path: Path) -> str:
    """The part of a snapshot that a notebook works on: 01_correctness has "correctness"."""
    return path.stem.split("_", 1)[1].replace("shared_helpers", "single_grading")


def _pages() -> Path:
    """Where executed notebooks and their pages go: `build/`, or beside the logs that a live run writes."""
    folder = BUILD if judge_mode() == "replay" else snapshot_folder("")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _execute(path: Path, environment: dict, target: Path, quietly: bool = False):
    """Execute a notebook from a clean kernel and write it to `target`, and its page (see `_pages`): (the notebook, what stopped it).
    What stopped it is printed, but `quietly` not that calls were collected.

    A snapshot of finished rows only, such as the published run, has no log to replay: cells tagged "calls" are left out then.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    from nbconvert import HTMLExporter

    print(f"{path.name}: running ({judge_mode()})", flush=True)
    start = time.perf_counter()
    notebook = nbformat.read(path, as_version=4)
    if judge_mode() == "replay" and not (snapshot_folder(_part(path)) / "calls.jsonl").exists():
        notebook.cells = [
            cell for cell in notebook.cells if "calls" not in cell.metadata.get("tags", [])
        ]
    try:
        NotebookClient(
            notebook,
            timeout=None,
            kernel_name="python3",
            resources={"metadata": {"path": str(NOTEBOOKS)}},
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
        ).execute(env=environment | {"PROGRESS": "terminal"})
    except CellExecutionError as error:
        if not quietly or error.ename != "Collected":
            print(f"{path.name}: stopped: {error.ename}: {error.evalue}", file=sys.stderr)
        return notebook, error
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day, which differ in each run
    nbformat.write(notebook, target)
    (_pages() / f"{path.stem}.html").write_text(
        HTMLExporter().from_notebook_node(notebook)[0], encoding="utf-8"
    )
    print(f"{path.name}: done in {time.perf_counter() - start:.0f} s", flush=True)
    return notebook, None


def run(names: list[str], in_place: bool = False) -> int:
    """Execute notebooks; write them and their pages (see `_pages`), or the notebooks back in place; print what they tag "metrics"."""
    paths, pages = _paths(names), _pages()
    for old in BUILD.glob("*.npz"):
        old.unlink()
    # A replayed notebook needs no other, so they run all at once, and share the cores: with more threads than cores, the encoders
    # would stand in each other's way. Live ones go one by one, since the last one reads what the others wrote.
    workers = len(paths) if judge_mode() == "replay" else 1
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}
    # Where a notebook whose outputs are to be committed leaves the vectors that it uses.
    kept = {path: BUILD / f"{path.stem}.npz" for path in paths if in_place}

    def execute(path: Path):
        more = {"KEEP_EMBEDDINGS": str(kept[path])} if in_place else {}
        return _execute(path, environment | more, path if in_place else pages / path.name)

    if judge_mode() == "replay":
        with ThreadPoolExecutor(workers) as pool:
            done = list(pool.map(execute, paths))
    else:
        done = []
        for path in paths:
            done.append(execute(path))
            if done[-1][1] and done[-1][1].ename == "RunStopped":
                break  # what stopped this one would stop the next
    if in_place:
        vectors = {} if paths == _paths([]) else read_vectors(EMBEDDINGS)
        for path in paths:
            vectors |= read_vectors(kept[path])
        write_vectors(EMBEDDINGS, vectors)
    shown, wrong = [], False
    for path, (notebook, error) in zip(paths, done):
        if error:
            wrong = wrong or error.ename != "Collected"
            continue
        for tag, output in (
            (tag, output)
            for cell in notebook.cells
            for tag in cell.metadata.get("tags", [])
            for output in cell.outputs
        ):
            if tag == "metrics":
                shown.append((path.stem, output["data"]["text/plain"]))
            elif tag == "picture" and in_place:  # README.md shows it
                picture = NOTEBOOKS / "images" / f"{path.stem}.png"
                picture.parent.mkdir(exist_ok=True)
                picture.write_bytes(base64.b64decode(output["data"]["image/png"]))
    for name, text in shown:
        print(f"\n{name}\n{text}")
    if whole := [
        str(pages / f"{path.stem}.html") for path, (_, error) in zip(paths, done) if not error
    ]:
        print("\nTo read on, open " + " ".join(whole))
    return 1 if wrong else 0


def run_in_batches(names: list[str]) -> int:
    """Run notebooks stage by stage: what a stage has to ask goes to the Batch API, and its answers into the log."""
    for path in _paths(names):
        while True:  # each round but the last adds answers, or ends here
            _, error = _execute(path, dict(os.environ), _pages() / path.name, quietly=True)
            if error is None:
                break
            if error.ename != "Collected":
                return 1
            log = CallLog(snapshot_folder(_part(path)) / "calls.jsonl")
            before = len(log)
            try:
                wrong = answer_requests(log)
            except (RunStopped, CallFailed) as stopped:
                print(f"{path.name}: stopped: {stopped}", file=sys.stderr)
                return 1
            finally:
                log.close()  # the notebook writes to it next
            print(f"{path.name}: {len(log) - before} answers added, {len(log)} in all", flush=True)
            for line in wrong:
                print(line, file=sys.stderr)
            if len(log) == before:
                print(
                    f"{path.name}: stopped: the batch answered none of its requests. `make record` asks for them one by one, and makes "
                    "those that are refused again invalid rows",
                    file=sys.stderr,
                )
                return 1
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m helpers", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="execute notebooks")
    running.add_argument("notebooks", nargs="*")
    running.add_argument(
        "--in-place", action="store_true", help="write the outputs back into notebooks/"
    )
    batching = commands.add_parser(
        "batch", help="run notebooks stage by stage through the Batch API (JUDGE_MODE=collect)"
    )
    batching.add_argument("notebooks", nargs="*")
    filling = commands.add_parser("fill", help="merge a results file into a call log")
    filling.add_argument("log", type=Path)
    filling.add_argument("results", type=Path)
    filling.add_argument("--requests", type=Path, help="by default requests.jsonl beside the log")
    commands.add_parser("published", help="download the files of the published run of 2023")
    given = parser.parse_args()
    if given.command == "batch":
        return run_in_batches(given.notebooks)
    if given.command == "run":
        return run(given.notebooks, given.in_place)
    if given.command == "published":
        wrong = published.download()
        print(
            "\n".join(wrong)
            or f"{len(published.FILES)} files in {published.FOLDER}: run them with `SNAPSHOT=published make run NOTEBOOK=02_pairwise`"
        )
        return 1 if wrong else 0
    log = CallLog(given.log, mode="collect")
    before = len(log)
    wrong = fill(log, given.results, given.requests)
    print(f"{given.log}: {len(log) - before} answers added, {len(log)} in all")
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
