"""WikipediaReader live, with the real package `wikipedia`, against a loopback copy of its API."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlparse

import pytest
import wikipedia.wikipedia as package
from llama_index.core import Document

from helpers import SnapshotReader, live_reader
from helpers.generate import UnreadPages
from helpers.live.documents import Wikipedia

TEXTS = {
    "History of Oslo": "Oslo was founded around 1040.",
    "History of Bergen": "Bergen lies between seven mountains.",
    "Old Oslo": "Oslo was founded around 1040.",
}


class Api:
    """What Wikipedia's api.php says of a handful of pages.

    Its `refuse` is {title: (HTTP status, how often)}.
    """

    def __init__(self) -> None:
        self.refuse, self.asked, self.agents, self.searches = {}, [], set(), 0
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                api.agents.add(self.headers["User-Agent"])
                query = {
                    name: value[0]
                    for name, value in parse_qs(
                        urlparse(self.path).query, keep_blank_values=True
                    ).items()
                }
                api.searches += "srsearch" in query
                title = query.get("titles") or {
                    "1": "History of Oslo",
                    "2": "History of Bergen",
                }.get(query.get("pageids"), "")
                api.asked.append(title)
                status, left = api.refuse.get(title, (200, 0))
                if left:
                    api.refuse[title] = status, left - 1
                    return self.say(status, "Please set a user-agent and respect our robot policy")
                return self.say(200, json.dumps({"query": api.page(title, query)}))

            def say(self, status: int, text: str) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/w/api.php"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @staticmethod
    def page(title: str, query: dict) -> dict:
        if title == "Oslo (disambiguation)":
            if query.get("prop") == "revisions":
                return {
                    "pages": {
                        "9": {
                            "revisions": [
                                {
                                    "*": "<ul><li><a>History of Oslo</a></li>"
                                    "<li><a>Oslo, Minnesota</a></li></ul>"
                                }
                            ]
                        }
                    }
                }
            return {
                "pages": {"9": {"pageid": 9, "title": title, "pageprops": {"disambiguation": ""}}}
            }
        if title == "Old Oslo":
            return {
                "redirects": [{"from": "Old Oslo", "to": "History of Oslo"}],
                "pages": {"1": {"pageid": 1, "title": "History of Oslo"}},
            }
        if title not in TEXTS:
            return {"pages": {"-1": {"title": title, "missing": ""}}}
        pageid = {"History of Oslo": "1", "History of Bergen": "2"}[title]
        return {
            "pages": {
                pageid: {
                    "pageid": int(pageid),
                    "title": title,
                    "fullurl": "https://x",
                    "extract": TEXTS[title],
                    "revisions": [{"revid": 7, "parentid": 6}],
                }
            }
        }


@pytest.fixture
def api(monkeypatch, tmp_path):
    running = Api()
    monkeypatch.setattr(package, "API_URL", running.url)
    monkeypatch.setattr(package, "USER_AGENT", package.USER_AGENT)
    monkeypatch.setattr(package, "requests", package.requests)
    for cached in (package.search, package.suggest, package.summary):
        cached.clear_cache()
    monkeypatch.setenv("JUDGE_MODE", "record")
    monkeypatch.setenv("SNAPSHOT", str(tmp_path / "mine"))
    monkeypatch.setenv("DOCUMENTS", "wikipedia")
    yield running
    running.server.shutdown()
    running.server.server_close()


def test_pages_are_read_by_their_titles_and_frozen_at_once(api, monkeypatch):
    monkeypatch.setenv("WIKIPEDIA_USER_AGENT", "judges/1.0 (me@example.org)")
    pages = ["History of Bergen", "History of Oslo", "Old Oslo"]
    read = SnapshotReader(live_reader()).load_data(pages=pages)
    assert [document.text for document in read] == [TEXTS[title] for title in pages]
    assert [document.metadata["title"] for document in read] == pages
    assert api.agents == {"judges/1.0 (me@example.org)"} and not api.searches, (
        "a search may end at another page"
    )
    before = len(api.asked)
    again = SnapshotReader(live_reader()).load_data(pages=pages)
    monkeypatch.setenv("JUDGE_MODE", "replay")
    replayed = SnapshotReader(live_reader()).load_data(pages=pages)
    assert [d.text for d in again] == [d.text for d in replayed] == [d.text for d in read] and len(
        api.asked
    ) == before


@pytest.mark.parametrize(
    "bad, refuse, said",
    [
        ("History of Nowhere", None, "there is no page of exactly this title"),
        ("Oslo (disambiguation)", None, "ambiguous: name one of History of Oslo, Oslo, Minnesota"),
        ("History of Bergen", (403, 99), "refused (403): set WIKIPEDIA_USER_AGENT"),
        ("History of Bergen", (429, 99), "too many requests (429): run again later"),
    ],
)
def test_one_bad_page_is_reported_and_the_others_are_kept(api, bad, refuse, said):
    if refuse:
        api.refuse[bad] = refuse
    with pytest.raises(UnreadPages) as caught:
        SnapshotReader(live_reader()).load_data(pages=[bad, "History of Oslo"])
    assert f"  {bad}: {said}" in str(caught.value) and "1 of 2 pages could not be read" in str(
        caught.value
    )
    assert api.asked.count(bad) == {429: 6}.get(
        refuse and refuse[0], 2 if "disambiguation" in bad else 1
    )
    before = len(api.asked)
    assert (
        SnapshotReader(live_reader()).load_data(pages=["History of Oslo"])[0].text
        == TEXTS["History of Oslo"]
    )
    assert len(api.asked) == before, "the good page was read again"


def test_what_fails_for_a_while_is_asked_again(api):
    api.refuse["History of Oslo"] = 503, 2
    assert (
        SnapshotReader(live_reader()).load_data(pages=["History of Oslo"])[0].text
        == TEXTS["History of Oslo"]
    )


def test_what_to_read_is_a_setting(api, monkeypatch):
    monkeypatch.setenv("DOCUMENTS", "encyclopaedia")
    with pytest.raises(
        ValueError, match="DOCUMENTS='encyclopaedia': expected bundled or wikipedia"
    ):
        SnapshotReader(live_reader())


def test_wikipedia_itself_is_talked_to_in_private(monkeypatch):
    monkeypatch.setattr(package, "API_URL", "http://en.wikipedia.org/w/api.php")
    monkeypatch.setattr(package, "requests", package.requests)
    assert (
        Wikipedia().load_data(pages=[]) == []
        and package.API_URL == "https://en.wikipedia.org/w/api.php"
    )


def test_two_titles_are_two_files_whatever_signs_they_hold(monkeypatch, tmp_path):
    titles = ["AC/DC", "AC DC", "AC_DC", "What? A: <B>|*", "100 %"]

    class Reader:
        def load_data(self, pages):
            return [Document(text=f"The text of {pages[0]}.")]

    monkeypatch.setenv("JUDGE_MODE", "record")
    monkeypatch.setenv("SNAPSHOT", str(tmp_path / "mine"))
    read = SnapshotReader(Reader()).load_data(pages=[*titles, titles[0]])
    assert [one.text for one in read] == [f"The text of {title}." for title in [*titles, titles[0]]]
    files = [path.name for path in (tmp_path / "mine" / "documents").iterdir()]
    assert len(files) == 5 and not set("".join(files)) & set('/\\:*?"<>|')


def test_the_package_s_own_requests_come_back(api):
    before = package.requests
    SnapshotReader(live_reader()).load_data(pages=["History of Oslo"])
    assert package.requests is before
