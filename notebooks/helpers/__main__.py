"""What make calls: `python -m helpers run [--in-place] [NOTEBOOK ...]`, `... fill LOG RESULTS`, `... published`."""

import argparse
import base64
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import published
from .calls import fill
from .datasets import EMBEDDINGS, read_vectors, write_vectors
from .snapshots import DATA, ROOT, CallLog, judge_mode

NOTEBOOKS = ROOT / "notebooks"
BUILD = ROOT / "build"


def run(names: list[str], in_place: bool = False) -> int:
    """Execute notebooks from a clean kernel; write them and their HTML pages to `build/`; print what they tag "metrics".

    A snapshot of finished rows only, such as the published run, has no log to replay: cells tagged "calls" are left out then.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    from nbconvert import HTMLExporter

    paths = [NOTEBOOKS / f"{Path(name).stem}.ipynb" for name in names] or sorted(NOTEBOOKS.glob("*.ipynb"))
    for path in paths:
        if not path.exists():
            print(f"no notebook {path.name}; there are {', '.join(p.stem for p in sorted(NOTEBOOKS.glob('*.ipynb')))}", file=sys.stderr)
            return 2
    BUILD.mkdir(exist_ok=True)
    for old in BUILD.glob("*.npz"):
        old.unlink()
    # A replayed notebook needs no other, so they run all at once, and share the cores: with more threads than cores, the encoders
    # would stand in each other's way. Live ones go one by one, since the last one reads what the others wrote.
    workers = len(paths) if judge_mode() == "replay" else 1
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}

    def kept(path: Path) -> dict:
        """Where a notebook whose outputs are to be committed leaves the vectors that it uses."""
        return {"KEEP_EMBEDDINGS": str(BUILD / f"{path.stem}.npz")} if in_place else {}

    def execute(path: Path):
        """(the notebook, the error that stopped it)."""
        print(f"{path.name}: running ({judge_mode()})", flush=True)
        start = time.perf_counter()
        notebook = nbformat.read(path, as_version=4)
        if judge_mode() == "replay" and not (DATA / os.environ.get("SNAPSHOT", "") / path.stem.split("_", 1)[1] / "calls.jsonl").exists():
            notebook.cells = [cell for cell in notebook.cells if "calls" not in cell.metadata.get("tags", [])]
        try:
            NotebookClient(notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOKS)}},
                           extra_arguments=["--IPKernelApp.log_level=ERROR"]).execute(env=environment | kept(path))
        except CellExecutionError as error:
            print(f"{path.name}: stopped: {error.ename}: {error.evalue}", file=sys.stderr)
            return notebook, error
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times of day, which differ in each run
        nbformat.write(notebook, path if in_place else BUILD / path.name)
        (BUILD / f"{path.stem}.html").write_text(HTMLExporter().from_notebook_node(notebook)[0], encoding="utf-8")
        print(f"{path.name}: done in {time.perf_counter() - start:.0f} s", flush=True)
        return notebook, None

    with ThreadPoolExecutor(workers) as pool:
        done = list(pool.map(execute, paths))
    if in_place:
        vectors = {} if paths == sorted(NOTEBOOKS.glob("*.ipynb")) else read_vectors(EMBEDDINGS)
        for path in paths:
            vectors |= read_vectors(Path(kept(path)["KEEP_EMBEDDINGS"]))
        write_vectors(EMBEDDINGS, vectors)
    shown, failed = [], False
    for path, (notebook, error) in zip(paths, done):
        if error:
            failed = failed or error.ename != "Collected"
            continue
        for tag, output in ((tag, output) for cell in notebook.cells for tag in cell.metadata.get("tags", []) for output in cell.outputs):
            if tag == "metrics":
                shown.append((path.stem, output["data"]["text/plain"]))
            elif tag == "picture" and in_place:  # README.md shows it
                picture = NOTEBOOKS / "images" / f"{path.stem}.png"
                picture.parent.mkdir(exist_ok=True)
                picture.write_bytes(base64.b64decode(output["data"]["image/png"]))
    for name, text in shown:
        print(f"\n{name}\n{text}")
    if pages := [str(BUILD / f"{path.stem}.html") for path, (_, error) in zip(paths, done) if not error]:
        print("\nTo read on, open " + " ".join(pages))
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m helpers", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="execute notebooks")
    running.add_argument("notebooks", nargs="*")
    running.add_argument("--in-place", action="store_true", help="write the outputs back into notebooks/")
    filling = commands.add_parser("fill", help="merge a results file into a call log")
    filling.add_argument("log", type=Path)
    filling.add_argument("results", type=Path)
    filling.add_argument("--requests", type=Path, help="by default requests.jsonl beside the log")
    commands.add_parser("published", help="download the files of the published run of 2023")
    given = parser.parse_args()
    if given.command == "run":
        return run(given.notebooks, given.in_place)
    if given.command == "published":
        wrong = published.download()
        print("\n".join(wrong) or f"{len(published.FILES)} files in {published.FOLDER}: run them with `SNAPSHOT=published make run NOTEBOOK=02_pairwise`")
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
