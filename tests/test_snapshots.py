"""Rows on disk, folders, and the call log."""

import json
import os
import re
import threading
import tracemalloc
import warnings

import pytest

from helpers import CallLog, judge_mode, load_rows, output_folder, save_rows, snapshot_folder
from helpers.log import call_key, make_row
from helpers.rows import DATA, DamagedFile, write_text


def call(i: int = 0, **changes) -> dict:
    return {
        "model": "m",
        "messages": [{"role": "user", "content": f"prompt {i} – ünïcode"}],
        "params": {"temperature": 0},
        "sample": 0,
        **changes,
    }


@pytest.fixture
def path(tmp_path):
    log = CallLog(tmp_path / "calls.jsonl", "record")
    for i in range(3):
        log.append(make_row(call(i), f"response {i}"))
    return log.path


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_come_back_as_they_were(tmp_path):
    rows = [{"question": "où?", "n": 1.5, "none": None}, {"text": "two\nlines"}]
    save_rows(tmp_path / "new" / "rows.jsonl", rows)
    assert load_rows(tmp_path / "new" / "rows.jsonl") == rows


@pytest.mark.parametrize(
    "line, said",
    [(b"{bad", "expected a JSON object"), (b"[1]", "found list"), (b'{"a": "\xff"}', "UTF-8")],
)
def test_a_bad_row_names_file_and_line(tmp_path, line, said):
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": 1}\n\n' + line + b"\n")
    with pytest.raises(DamagedFile, match=f"rows.jsonl, line 3: .*{said}"):
        load_rows(tmp_path / "rows.jsonl")


def test_the_key_covers_all_that_determines_a_call():
    keys = {
        call_key(**call(**change))
        for change in (
            {},
            {"model": "n"},
            {"params": {"temperature": 1}},
            {"sample": 1},
            {"messages": [{"role": "system", "content": "prompt 0"}]},
        )
    }
    assert len(keys) == 5
    assert call_key(**call(params={"a": 1, "b": 2})) == call_key(**call(params={"b": 2, "a": 1}))


def test_what_was_appended_is_there_after_reopening(path):
    log = CallLog(path, "replay")
    assert len(log) == 3
    assert log.get(call_key(**call(1)))["response"] == "response 1"
    assert log.get(call_key(**call(9))) is None
    assert [row["response"] for row in log.rows()] == ["response 0", "response 1", "response 2"]


def test_the_first_answer_to_a_key_stays(path):
    log = CallLog(path, "record")
    assert log.append(make_row(call(1), "another"))["response"] == "response 1"
    assert len(path.read_text(encoding="utf-8").splitlines()) == 3


def test_a_torn_last_line_is_dropped_and_said_wherever_it_was_cut(path):
    whole = path.read_bytes()
    start = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in range(start + 1, len(whole) - 1, 7):
        path.write_bytes(whole[:cut])
        with pytest.warns(UserWarning, match=r"calls.jsonl, line 3: dropped a torn last line"):
            log = CallLog(path, "record")
        assert len(log) == 2 and len(list(log.rows())) == 2
        assert path.read_bytes() == whole[:cut], "opening must not change the file"
        log.append(make_row(call(2), "response 2"))
        log.append(make_row(call(3), "response 3"))
        assert [row["response"] for row in CallLog(path, "replay").rows()] == [
            f"response {i}" for i in range(4)
        ]


def test_what_is_torn_off_may_be_longer_than_what_follows(path):
    with open(path, "ab") as file:
        file.write(b'{"v": 1, "key": "' + b"x" * 5000)
    with pytest.warns(UserWarning, match="line 4: dropped a torn last line"):
        CallLog(path, "record").append(make_row(call(3), "response 3"))
    with warnings.catch_warnings(action="error"):
        assert len(CallLog(path, "replay")) == 4


def test_a_row_that_lacks_only_its_line_end_counts(path):
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    log = CallLog(path, "record")
    log.append(make_row(call(3), "response 3"))
    assert [row["response"] for row in CallLog(path, "replay").rows()] == [
        f"response {i}" for i in range(4)
    ]
    assert log.get(call_key(**call(3)))["response"] == "response 3"


class FullDisk:
    """A log's file on a disk that takes so many bytes more."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        if not self.room:
            raise OSError(28, "No space left on device")
        written = self.file.write(data[: self.room])
        self.room -= written
        return written


@pytest.mark.parametrize("room", [0, 1, 40])
def test_a_full_disk_spoils_no_line_and_writing_goes_on_when_there_is_room(path, room):
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    log = CallLog(path, "record")
    log._writer = FullDisk(log.open_to_write(), room)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left on device"):
            log.append(make_row(call(3), "response 3"))
        assert log.get(call_key(**call(3))) is None and len(log) == 3
    log._writer.room = 10**6
    log.append(make_row(call(4), "response 4"))
    log.close()
    assert [row["response"] for row in CallLog(path, "replay").rows()] == [
        "response 0",
        "response 1",
        "response 2",
        "response 4",
    ]


def test_the_disk_is_synced_about_once_a_second_and_at_the_end(path, monkeypatch):
    synced, now = [], [100.0]
    monkeypatch.setattr("os.fsync", synced.append)
    monkeypatch.setattr("helpers.log.time.monotonic", lambda: now[0])
    with CallLog(path, "record") as log:
        for i in range(3, 33):
            log.append(make_row(call(i), f"response {i}"))
            now[0] += 0.1
        assert 2 <= len(synced) <= 4
        before = len(synced)
    assert len(synced) == before + 1


def test_a_closed_log_lets_another_write(path):
    with CallLog(path, "record") as first:
        first.append(make_row(call(3), "response 3"))
    second = CallLog(path, "record")
    second.append(make_row(call(4), "response 4"))
    second.close()
    assert len(CallLog(path, "replay")) == 5


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda row: row.update(v=2), "schema version 2, expected 1"),
        (lambda row: row.pop("v"), "schema version None, expected 1"),
        (lambda row: row.pop("usage"), "expected the fields"),
        (lambda row: row.update(response=None), "expected text in 'response'"),
        (lambda row: row["messages"][0].update(content="edited"), "does not match its content"),
        (lambda row: row.update(model="gpt-4"), "does not match its content"),
    ],
)
def test_a_damaged_row_names_file_line_and_what_was_expected(path, change, said):
    rows = lines(path)
    change(rows[1])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(DamagedFile, match=f"calls.jsonl, line 2: .*{re.escape(said)}"):
        CallLog(path, "replay")


def test_bad_json_and_bad_utf8_in_the_middle_are_damage(path):
    good = path.read_bytes().splitlines(keepends=True)
    for bad in (b'{"v": 1, "key\n', b'{"v": "\xff\xfe"}\n', b"\n"):
        path.write_bytes(good[0] + bad + good[2])
        with pytest.raises(DamagedFile, match="line 2"):
            CallLog(path, "replay")


def test_one_key_with_two_answers_is_damage(path):
    row = {**lines(path)[0], "response": "another"}
    path.write_bytes(path.read_bytes() + json.dumps(row).encode() + b"\n")
    with pytest.raises(DamagedFile, match="line 4: .*another answer"):
        CallLog(path, "replay")


def test_a_second_writer_is_refused_and_nothing_is_lost(path):
    first, second = CallLog(path, "record"), CallLog(path, "record")
    first.append(make_row(call(3), "response 3"))
    with pytest.raises(RuntimeError, match="another process is recording"):
        second.append(make_row(call(4), "response 4"))
    assert len(CallLog(path, "replay")) == 4
    del first  # that one has ended, but what it wrote the second has not seen
    with pytest.raises(RuntimeError, match="or has since it was opened here"):
        second.append(make_row(call(4), "response 4"))
    assert len(CallLog(path, "replay")) == 4


def test_replay_leaves_the_folder_alone(path):
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    log = CallLog(path, "replay")
    log.get(call_key(**call(0)))
    log.get(call_key(**call(99)))
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == before


def test_opening_keeps_an_index_only(tmp_path):
    big = CallLog(tmp_path / "calls.jsonl", "record")
    rows = [make_row(call(i), "x" * 5000) for i in range(400)]
    (tmp_path / "calls.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    del big, rows
    tracemalloc.start()
    log = CallLog(tmp_path / "calls.jsonl", "replay")
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(log) == 400 and held < 400 * 1000


def test_modes_and_folders(monkeypatch, tmp_path):
    assert judge_mode() == "replay"
    assert snapshot_folder("correctness") == DATA / "correctness"
    assert output_folder("correctness") == DATA.parent / "build" / "correctness"
    monkeypatch.setenv("JUDGE_MODE", "reply")
    with pytest.raises(ValueError, match="'reply': expected one of replay, record, collect"):
        judge_mode()
    monkeypatch.setenv("JUDGE_MODE", "record")
    assert snapshot_folder("correctness") == DATA / "recorded" / "correctness", (
        "a recording has a folder of its own"
    )
    for bundled in (str(DATA), ".", "recorded/.."):
        monkeypatch.setenv("SNAPSHOT", bundled)
        with pytest.raises(ValueError, match="the bundled snapshot, which is not recorded over"):
            snapshot_folder("correctness")
    monkeypatch.setenv("SNAPSHOT", str(tmp_path))
    assert (
        snapshot_folder("correctness") == output_folder("correctness") == tmp_path / "correctness"
    )
    monkeypatch.setenv("JUDGE_MODE", "replay")
    with pytest.raises(FileNotFoundError, match="pairwise"):
        snapshot_folder("pairwise")


def test_a_text_is_on_disk_when_it_is_written_and_two_writers_do_not_mix(tmp_path, monkeypatch):
    synced, real = [], os.fsync
    monkeypatch.setattr("os.fsync", lambda file: (synced.append(file), real(file)))
    path = tmp_path / "note.json"
    texts = [letter * 300_000 for letter in "abcd"]
    threads = [threading.Thread(target=write_text, args=(path, text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text(encoding="utf-8") in texts and len(synced) == 4
    assert [one.name for one in tmp_path.iterdir()] == ["note.json"], "a draft was left"


def test_a_log_that_only_reads_keeps_no_file_open(path):
    before = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
    logs = [CallLog(path, "replay") for _ in range(5)]
    assert all(log.get(call_key(**call(1))) and len(list(log.rows())) == 3 for log in logs)
    assert len(before) == len(os.listdir("/proc/self/fd") if before else [])


def test_only_the_rows_since_a_former_end_are_read(path):
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    log = CallLog(path, "record")
    end = log.end
    log.append(make_row(call(3), "response 3"))
    assert [row["response"] for row in log.rows(end)] == ["response 3"]
    assert len(list(log.rows())) == 4 and list(log.rows(log.end)) == []
