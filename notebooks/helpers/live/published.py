"""Downloads the published run of 2023 from the public history of LlamaIndex (MIT licence)."""

import hashlib
import http.client
import os
import urllib.request

from ..rows import DATA

COMMIT = "6d495ce03f8457fa0b5dd23d4b0501808c12954b"
REPOSITORY = "https://raw.githubusercontent.com/run-llama/llama_index"
URL = f"{REPOSITORY}/{COMMIT}/docs/examples/finetuning/llm_judge"
FOLDER = DATA / "published"
FILES = {  # path -> SHA-256
    "pairwise/train_qa.jsonl": "9dd4e0731f9ec607a36b8533bd8f42570d4529a390f499c3408e3bdd780d0c9f",
    "pairwise/pairwise_finetuning_events.jsonl": (
        "eff41158407195c0c3af4e224c81fd56c217a273b7c8cee1a685f7486510e6dd"
    ),
    "pairwise/resolved_pairwise_finetuning_events.jsonl": (
        "9a87daedc57aeb35220c112af8da5115e6389b477bc4bb7e20d68ebf4e51533d"
    ),
    "pairwise/test_qa.jsonl": "3e52d9189ed5bea334964ec5107a52f6dcdc335a3d1aff3dc2b05efdf1540503",
    "pairwise/test_qa_complete.jsonl": (
        "ae081df0ce6f3d53b44afe213047166cfbd3818f85b12a612a497f9a10608ec0"
    ),
    "correction/correction_finetuning_events.jsonl": (
        "5d813687a33105b071e905ed9d667d308683d944c0a333688fcc9293bd660bb1"
    ),
    "correction/qrd.json": "304a18eb40d441c887f19d39c2a38ae1420eb6c85bf2e65ced0dc498941a4d00",
}


def download() -> list[str]:
    """Fetch the files into FOLDER, from PUBLISHED_URL or else the public commit, and check each.

    Files that are there are left alone. Returns what went wrong, a line a file; such a file is not
    put in place.
    """
    url = (os.environ.get("PUBLISHED_URL") or URL).rstrip("/")
    wrong = []
    for name, expected in FILES.items():
        path = FOLDER / name
        there = path.exists()
        source = path.as_uri() if there else f"{url}/{name}"
        try:
            with urllib.request.urlopen(source, timeout=60) as response:
                data = response.read()  # raises IncompleteRead where the connection breaks
            if (found := hashlib.sha256(data).hexdigest()) != expected:
                hint = "; remove it to fetch it anew" if there else ""
                said = f"its SHA-256 is {found[:12]}…, expected {expected[:12]}…"
                raise ValueError(said + hint)
            if not there:
                path.parent.mkdir(parents=True, exist_ok=True)
                draft = path.with_name(f"{path.name}.tmp")  # a kill leaves no half file in place
                draft.write_bytes(data)
                draft.replace(path)
        except (OSError, ValueError, http.client.HTTPException) as error:  # URLError is an OSError
            wrong.append(f"{source}: {error}")
    return wrong
