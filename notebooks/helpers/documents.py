"""Documents: pages by title, from a snapshot or live from Wikipedia."""

import functools
import warnings

from llama_index.core.readers.base import BaseReader
from llama_index.core.schema import Document
from tenacity import Retrying

from .models import redact, retry_policy
from .settings import setting
from .snapshots import DATA, judge_mode, snapshot_folder, write_text

USER_AGENT = "distilling-llm-judges/1.0 (a tutorial; no contact given)"


class UnreadPages(RuntimeError):
    """Some pages could not be read, each named with its reason; those that could are kept in the snapshot."""


class Wikipedia(BaseReader):
    """LlamaIndex's WikipediaReader, with the exact title asked for, an own User-Agent, and the server's answers heeded.

    The package `wikipedia` under it searches for a "better" title unless told not to, talks plain http under its author's name, and
    takes a refusal (403, 429) for broken JSON.

    Args:
        user_agent: names you, with a way to reach you, as Wikimedia's policy asks; by default WIKIPEDIA_USER_AGENT.
    """

    def __init__(self, user_agent: str = "") -> None:
        self.user_agent = user_agent or setting("WIKIPEDIA_USER_AGENT") or USER_AGENT

    def load_data(self, pages: list[str], **load_kwargs) -> list[Document]:
        """A Document a page, with its title in the metadata. `load_kwargs` go to `wikipedia.page`; what fails for a while is asked again.

        Raises:
            wikipedia.PageError, wikipedia.DisambiguationError: there is no such page, or several.
            requests.HTTPError: the server refused.
        """
        import requests
        import wikipedia.wikipedia as package
        from llama_index.readers.wikipedia import WikipediaReader

        session = requests.Session()
        session.hooks["response"].append(lambda response, **_: response.raise_for_status())
        session.get = functools.partial(session.get, timeout=30)
        package.requests = session  # its one use of the module is requests.get
        package.set_user_agent(self.user_agent)
        package.API_URL = package.API_URL.replace(
            "http://en.wikipedia.org", "https://en.wikipedia.org"
        )
        kwargs = {"auto_suggest": False, **load_kwargs}
        documents = []
        with session, warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="No parser was explicitly specified"
            )  # of an ambiguous page
            for title in pages:
                [document] = Retrying(**retry_policy())(
                    WikipediaReader().load_data, pages=[title], **kwargs
                )
                documents.append(Document(text=document.text, metadata={"title": title}))
        return documents


def _why(error: Exception) -> str:
    """Why a page could not be read, and what to do, in a line."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 403:
        return "refused (403): set WIKIPEDIA_USER_AGENT to a name with a way to reach you"
    if status == 429:
        return "too many requests (429): run again later"
    if options := getattr(error, "options", None):
        return f"ambiguous: name one of {', '.join(options[:5])}{' …' if len(options) > 5 else ''}"
    if type(error).__name__ == "PageError":
        return "there is no page of exactly this title"
    return redact(f"{type(error).__name__}: {error}")


class SnapshotReader(BaseReader):
    """Reads pages by title from a snapshot's `documents/` folder: the face of LlamaIndex's WikipediaReader.

    Args:
        live: a reader with `load_data(pages=[title], ...)`; by default `Wikipedia()` if DOCUMENTS=wikipedia, else none. A run that
            records or collects reads with it what the snapshot lacks, and keeps it: a corpus is frozen at its first reading. Without
            one, a snapshot that has no documents of its own uses the bundled ones.
    """

    def __init__(self, live: BaseReader | None = None) -> None:
        if live is None and (source := setting("DOCUMENTS")) != "bundled":
            if source != "wikipedia":
                raise ValueError(f"DOCUMENTS={source!r}: expected bundled or wikipedia")
            live = Wikipedia()
        self._live = live

    def load_data(self, pages: list[str], **load_kwargs) -> list[Document]:
        """One Document a page, in the order of `pages`, with its title in the metadata. `load_kwargs` go to `live`.

        Raises:
            FileNotFoundError: a page that is not there, and may not be read.
            UnreadPages: pages that the live reader could not read; all others are in the snapshot by then.
        """
        mode = judge_mode()
        own = snapshot_folder("") / "documents"
        folder = own if own.is_dir() or self._live and mode != "replay" else DATA / "documents"
        paths = {
            title: folder / f"{title.replace(' ', '_').replace('/', '_')}.txt" for title in pages
        }
        unread = {}
        for title, path in paths.items():
            if path.exists():
                continue
            if self._live is None or mode == "replay":
                raise FileNotFoundError(
                    f"no page {title!r} in this snapshot (looked for {path}); to add it, put its text there, or "
                    "record with a live reader (DOCUMENTS=wikipedia)"
                )
            try:
                write_text(path, self._live.load_data(pages=[title], **load_kwargs)[0].text)
            except Exception as error:  # of whatever reader: the other pages are read all the same, and this one is told
                unread[title] = _why(error)
        if unread:
            raise UnreadPages(
                f"{len(unread)} of {len(pages)} pages could not be read; the others are in {folder}.\n"
                + "\n".join(f"  {title}: {why}" for title, why in unread.items())
            )
        return [
            Document(text=path.read_text(encoding="utf-8"), metadata={"title": title})
            for title, path in paths.items()
        ]
