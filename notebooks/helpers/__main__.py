"""What make calls: `python -m helpers run [NOTEBOOK ...]`, `batch`, `fill` and `published`."""

import argparse
import base64
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .embeddings import EMBEDDINGS, read_vectors, write_vectors
from .live import published
from .live.collect import answer_requests, fill
from .log import CallLog
from .rows import judge_mode, output_folder, snapshot_folder
from .settings import ROOT

NOTEBOOKS = ROOT / "notebooks"
# The folder in a snapshot that holds a notebook's part.
PARTS = {
    "01_correctness": "correctness",
    "02_pairwise": "pairwise",
    "03_shared_helpers": "single_grading",
}


def _log_path(name: str) -> Path:
    return snapshot_folder(PARTS[name]) / "calls.jsonl"


def _tagged(notebook: Any, tag: str) -> list[Any]:
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def _execute(name: str, more: dict, in_place: bool = False, quietly: bool = False) -> tuple:
    """Execute a notebook from a clean kernel: (the notebook, the error that stopped it or "").

    The notebook and its page go to `build/`, or beside a live run's logs; `in_place` the notebook
    goes back to where it was. `more` is added to its environment. What stopped it is printed, but
    `quietly` not that calls were collected. A snapshot of finished rows only, such as the published
    run, has no log: cells tagged "calls" are left out.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    path, folder, start = NOTEBOOKS / f"{name}.ipynb", output_folder(""), time.perf_counter()
    print(f"{path.name}: running ({judge_mode()})", flush=True)
    notebook, stopped, said = nbformat.read(path, as_version=4), "", ""
    if judge_mode() == "replay" and not _log_path(name).exists():
        calls = _tagged(notebook, "calls")
        notebook.cells = [cell for cell in notebook.cells if cell not in calls]
    # Talk to the kernel through files, not ports: a replay needs no network, not even loopback.
    sockets = tempfile.TemporaryDirectory()
    by_file = {"transport": "ipc", "ip": str(Path(sockets.name, "kernel"))}
    client = NotebookClient(
        notebook,
        config=Config({} if os.name == "nt" else {"KernelManager": by_file}),
        timeout=None,
        coalesce_streams=True,  # else a stream is cut where the clock has it
        kernel_name="python3",
        resources={"metadata": {"path": str(NOTEBOOKS)}},
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
    )
    try:
        client.execute(env={**os.environ, **more, "PROGRESS": "terminal"})
    except CellExecutionError as error:
        stopped, said = error.ename, f"{error.ename}: {error.evalue}"
    except DeadKernelError:
        stopped, said = "DeadKernelError", "its kernel died; is there enough memory?"
    if stopped:
        if not quietly or stopped != "Collected":
            print(f"{path.name}: stopped: {said}", file=sys.stderr)
        return notebook, stopped
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day, which differ in each run
    nbformat.write(notebook, path if in_place else folder / path.name)
    page, _ = HTMLExporter().from_notebook_node(notebook)
    (folder / f"{name}.html").write_text(page, encoding="utf-8")
    print(f"{path.name}: done in {time.perf_counter() - start:.0f} s", flush=True)
    return notebook, ""


def run(names: list[str], in_place: bool = False) -> int:
    """Execute notebooks, and print the outputs of cells tagged "metrics". Returns an exit status.

    With `in_place`, the notebooks' outputs, the pictures that README.md shows and the vectors of
    their texts are written back into the repository.
    """
    whole, stops, kept = {}, [], output_folder("") / "embeddings.npz"
    kept.unlink(missing_ok=True)
    # Replays need nothing of each other, so they run at the same time and share the cores. Live
    # runs go one by one: the last notebook reads what the others wrote.
    together = len(names) if judge_mode() == "replay" and not in_place else 1
    more = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // together))}
    more |= {"KEEP_EMBEDDINGS": str(kept)} if in_place else {}
    with ThreadPoolExecutor(together) as pool:
        mapped = map if together == 1 else pool.map
        for name, ran in zip(names, mapped(lambda one: _execute(one, more, in_place), names)):
            notebook, stopped = ran
            if stopped:
                stops.append(stopped)
            else:
                whole[name] = notebook
            if stopped == "RunStopped":
                break  # what stopped this notebook would stop the next
    if in_place:
        _write_pictures(whole)
        older = {} if set(whole) == set(PARTS) else read_vectors(EMBEDDINGS)
        write_vectors(EMBEDDINGS, older | read_vectors(kept))
    for name, notebook in whole.items():
        for output in (output for cell in _tagged(notebook, "metrics") for output in cell.outputs):
            print(f"\n{name}\n{output['data']['text/plain']}")
    if whole:
        shown = " ".join(str(output_folder("") / f"{name}.html") for name in whole)
        print(f"\nTo read on, open {shown}")
    return int(any(stopped != "Collected" for stopped in stops))


def _write_pictures(notebooks: dict[str, Any]) -> None:
    for name, notebook in notebooks.items():
        for output in (output for cell in _tagged(notebook, "picture") for output in cell.outputs):
            picture = NOTEBOOKS / "images" / f"{name}.png"
            picture.write_bytes(base64.b64decode(output["data"]["image/png"]))


def run_in_batches(names: list[str]) -> int:
    """Run notebooks stage by stage: its requests go to the Batch API, its answers to the log."""
    for name in names:
        while True:  # each round but the last adds answers
            _, stopped = _execute(name, {}, quietly=True)
            if not stopped:
                break
            if stopped != "Collected":
                return 1
            try:
                with CallLog(_log_path(name)) as log:  # closed at the end: the notebook writes next
                    before = len(log)
                    wrong = answer_requests(log)
            except RuntimeError as error:  # RunStopped and CallFailed are such
                print(f"{name}: stopped: {error}", file=sys.stderr)
                return 1
            _tell(name, log, before, wrong)
            if len(log) == before:
                print(
                    f"{name}: stopped: the batch answered none of its requests. `make record` asks "
                    "for them one by one, and makes rows that are refused again invalid",
                    file=sys.stderr,
                )
                return 1
    return 0


def _tell(what: Any, log: CallLog, before: int, wrong: list[str]) -> None:
    print(f"{what}: {len(log) - before} answers added, {len(log)} in all", flush=True)
    for line in wrong:
        print(line, file=sys.stderr)


def _fill(log_path: Path, results: Path, requests: Path | None) -> int:
    with CallLog(log_path, mode="collect") as log:
        before = len(log)
        wrong = fill(log, results, requests)
    _tell(log_path, log, before, wrong)
    return int(bool(wrong))


def _published(name: str) -> int:
    wrong = published.download(name)
    notebook = "01_correctness" if name == "prometheus" else "02_pairwise"
    said = f"{published.FOLDER / name}: run `SNAPSHOT={name} make run NOTEBOOK={notebook}`"
    print("\n".join(wrong) or said)
    return int(bool(wrong))


def _notebook(given: str) -> str:
    """The name of a notebook, from its name or its file's."""
    if (name := Path(given).stem) not in PARTS:
        raise argparse.ArgumentTypeError(f"no notebook {given!r}; there are {', '.join(PARTS)}")
    return name


def main() -> int:
    """Run a command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m helpers", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="execute notebooks")
    running.add_argument("--in-place", action="store_true", help="write outputs to notebooks/")
    batching = commands.add_parser("batch", help="run notebooks through the Batch API")
    for one in (running, batching):
        one.add_argument("notebooks", nargs="*", type=_notebook)
    filling = commands.add_parser("fill", help="merge a results file into a call log")
    filling.add_argument("log", type=Path)
    filling.add_argument("results", type=Path)
    filling.add_argument("--requests", type=Path, help="by default requests.jsonl beside the log")
    fetching = commands.add_parser("published", help="download real verdicts of GPT-4")
    fetching.add_argument("set", nargs="?", default="published", choices=published.SETS)
    given = parser.parse_args()
    if given.command == "run":
        return run(given.notebooks or list(PARTS), given.in_place)
    if given.command == "batch":
        return run_in_batches(given.notebooks or list(PARTS))
    if given.command == "published":
        return _published(given.set)
    return _fill(given.log, given.results, given.requests)


if __name__ == "__main__":
    sys.exit(main())
