"""Documents from Wikipedia, by LlamaIndex's reader."""

import functools
import warnings
from typing import Any

from llama_index.core.readers.base import BaseReader
from llama_index.core.schema import Document
from tenacity import Retrying

from ..settings import setting
from .models import retry_policy, status_of

USER_AGENT = "distilling-llm-judges/1.0 (a tutorial; no contact given)"
REFUSED = {
    403: "refused (403): set WIKIPEDIA_USER_AGENT to a name with a way to reach you",
    429: "too many requests (429): run again later",
}


class Wikipedia(BaseReader):
    """LlamaIndex's WikipediaReader, with exact titles, a User-Agent of your own, and refusals.

    The package `wikipedia` under it searches for a "better" title, talks plain http under its
    author's name, and takes a refusal (403, 429) for broken JSON.
    """

    def load_data(self, pages: list[str], **load_kwargs: Any) -> list[Document]:
        """A Document a page, by its exact title. Transient failures are tried again.

        Raises:
            wikipedia.PageError, wikipedia.DisambiguationError: there is no such page, or several.
            requests.HTTPError: the server refused.
        """
        import requests
        import wikipedia.wikipedia as package
        from llama_index.readers.wikipedia import WikipediaReader

        original, session = package.requests, requests.Session()
        session.hooks["response"].append(lambda response, **_: response.raise_for_status())
        session.get = functools.partial(session.get, timeout=30)  # type: ignore[method-assign]
        package.set_user_agent(setting("WIKIPEDIA_USER_AGENT") or USER_AGENT)
        package.API_URL = package.API_URL.replace("http://en.wiki", "https://en.wiki")
        package.requests = session  # its one use of the module is requests.get
        try:
            with session, warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="No parser was explicitly specified")
                load, kwargs = Retrying(**retry_policy()), {"auto_suggest": False, **load_kwargs}
                read = [load(WikipediaReader().load_data, [title], **kwargs)[0] for title in pages]
        finally:
            package.requests = original
        return [
            Document(text=one.text, metadata={"title": title}) for one, title in zip(read, pages)
        ]

    @staticmethod
    def why(error: Exception) -> str:
        """Why a page could not be read, and what to do, in a line."""
        if options := getattr(error, "options", None):
            return f"ambiguous: name one of {', '.join(options[:5])}"
        if type(error).__name__ == "PageError":
            return "there is no page of exactly this title"
        return REFUSED.get(status_of(error) or 0, f"{type(error).__name__}: {error}")


def live_reader() -> BaseReader | None:
    """The reader that DOCUMENTS names, for `SnapshotReader`; None for the bundled documents.

    Raises:
        ValueError: DOCUMENTS names something else.
    """
    source = setting("DOCUMENTS")
    if source not in ("bundled", "wikipedia"):
        raise ValueError(f"DOCUMENTS={source!r}: expected bundled or wikipedia")
    return Wikipedia() if source == "wikipedia" else None
