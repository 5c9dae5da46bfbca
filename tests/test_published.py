"""The download of the published run."""

import hashlib
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from helpers.live import published

TEXTS = {name: f"{name}\n".encode() * 1000 for name in list(published.FILES)[:3]}


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(
        published, "FILES", {name: hashlib.sha256(text).hexdigest() for name, text in TEXTS.items()}
    )
    monkeypatch.setattr(published, "FOLDER", tmp_path / "new")


@pytest.fixture
def base(tmp_path, monkeypatch):
    for name, text in TEXTS.items():
        path = tmp_path / "mirror" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    monkeypatch.setenv("PUBLISHED_URL", (tmp_path / "mirror").as_uri())
    return tmp_path / "mirror"


def left_behind(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_all_files_come_and_a_second_run_fetches_nothing(base, tmp_path, monkeypatch):
    assert published.download() == []
    assert left_behind(tmp_path / "new") == sorted(TEXTS)
    monkeypatch.setenv("PUBLISHED_URL", "file:///nowhere")
    assert published.download() == []


def test_a_wrong_checksum_and_a_missing_file_leave_nothing_and_stop_nothing(base, tmp_path):
    first, second, third = TEXTS
    (base / first).write_bytes(b"something else")
    (base / second).unlink()
    wrong = published.download()
    assert left_behind(tmp_path / "new") == [third]
    assert len(wrong) == 2 and first in wrong[0] and "SHA-256" in wrong[0] and second in wrong[1]
    (base / first).write_bytes(TEXTS[first])
    (base / second).write_bytes(TEXTS[second])
    assert published.download() == [] and left_behind(tmp_path / "new") == sorted(TEXTS)


def test_a_file_that_was_changed_is_said_and_left(base, tmp_path):
    published.download()
    changed = tmp_path / "new" / list(TEXTS)[0]
    changed.write_text("mine", encoding="utf-8")
    assert "remove it to fetch it anew" in published.download()[0]
    assert changed.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    "fault, said", [("404", "404"), ("cut", "after|IncompleteRead"), ("ok", None)]
)
def test_over_http(tmp_path, monkeypatch, fault, said):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            text = TEXTS[self.path.lstrip("/")]
            self.send_response(404 if fault == "404" else 200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text[:100] if fault == "cut" else text)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        monkeypatch.setenv("PUBLISHED_URL", f"http://127.0.0.1:{server.server_port}")
        wrong = published.download()
    finally:
        server.shutdown()
        server.server_close()
    if said:
        import re

        assert (
            len(wrong) == 3
            and all(re.search(said, line) for line in wrong)
            and left_behind(tmp_path) == []
        )
    else:
        assert wrong == [] and left_behind(tmp_path / "new") == sorted(TEXTS)


def test_a_folder_that_cannot_be_written_is_an_error(base, tmp_path):
    file, text = tmp_path / "new", "a file where the folder should be"
    file.write_text(text, encoding="utf-8")
    assert len(published.download()) == 3 and file.read_text(encoding="utf-8") == text


def test_the_list_is_the_seven_files_of_one_commit(monkeypatch):
    monkeypatch.undo()
    assert len(published.FILES) == 7 and all(
        len(digest) == 64 for digest in published.FILES.values()
    )
    assert len(published.COMMIT) == 40 and published.COMMIT in published.URL
    assert os.path.isabs(published.FOLDER)
