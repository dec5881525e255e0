"""The two tokenizers. Both are `tiktoken.Encoding`s whose last id is `<|endoftext|>`.

    get_tokenizer("gpt2")     # 50,257 ids; tiktoken downloads the vocabulary once, 1.5 MB
    get_tokenizer("byte")     # 257 ids: the 256 bytes and <|endoftext|>; needs no download
    BatchTokenizer("gpt2")    # the same ids for many texts at a time, more than ten times as fast
    to_hugging_face(get_tokenizer("gpt2"), 1024).save_pretrained("folder")
"""

import base64
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tiktoken

from runtime.memory import resident_bytes

if TYPE_CHECKING:
    import gigatoken
    import pyarrow
    from transformers import GPT2Tokenizer

NAMES = ("gpt2", "byte")
CHECKED_BYTES = 200_000  # of the first texts, which are also tokenized by tiktoken: 20 ms
# gigatoken remembers every word that it has seen. A tokenizer is replaced when this process has grown by so
# much since it was made or, where that is not known (not Linux), after so much text.
MOST_GROWTH, MOST_TEXT = 600_000_000, 256_000_000  # bytes


def get_tokenizer(name: str) -> tiktoken.Encoding:
    """Return the tokenizer with that name.

    Raises ValueError for an unknown name, and FileNotFoundError if GPT-2's vocabulary cannot be downloaded.
    """
    if name == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:  # network, proxy and cache folder can each raise different errors
            raise FileNotFoundError(
                f"cannot download the GPT-2 vocabulary ({type(error).__name__}): connect to the network "
                "once, or set TIKTOKEN_CACHE_DIR to a copy of tiktoken's cache from another machine"
            ) from error
    if name == "byte":
        return tiktoken.Encoding(
            name="byte",
            pat_str=r"[^\n]+\n?|\n",  # any split gives the same ids; splitting into lines is fast
            mergeable_ranks={bytes([i]): i for i in range(256)},
            special_tokens={"<|endoftext|>": 256},
        )
    raise ValueError(f"unknown tokenizer {name!r}: choose from {', '.join(NAMES)}")


class BatchTokenizer:
    """Tokenizes many texts at a time, in any number of threads; `<|endoftext|>` in a text is ordinary text.

    GPT-2's ids come from gigatoken, with tiktoken's vocabulary. Those of the first texts are compared with
    tiktoken's. Without gigatoken, and for the other tokenizer, all ids come from tiktoken.
    """

    def __init__(self, name: str):
        self.encoding, self.has_gigatoken = get_tokenizer(name), False
        self.of_thread, self.is_checked = threading.local(), False
        if name == "gpt2":
            try:
                import gigatoken  # noqa: F401

                self.has_gigatoken = True
            except ImportError as error:
                print(f"tokenizing with tiktoken, ten times as slow ({error}): pip install gigatoken")

    def _fast(self, new_text: int) -> "gigatoken.Tokenizer":
        """Return gigatoken's tokenizer of this thread, a new one if it has seen too many words.

        Threads do not share one, because they would wait for each other.
        """
        mine, now = self.of_thread, resident_bytes()
        if hasattr(mine, "fast"):
            mine.text += new_text
            if not (mine.text > MOST_TEXT if now is None else now - mine.size > MOST_GROWTH):
                return mine.fast
            del mine.fast
        import gigatoken

        ranks = self.encoding._mergeable_ranks.items()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "gpt2.tiktoken")
            file.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks))
            mine.fast = gigatoken.Tokenizer.from_tiktoken(file, pretokenizer="gpt2")
        mine.size, mine.text = resident_bytes(), new_text
        return mine.fast

    def encode(self, texts: "pyarrow.LargeStringArray") -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of all texts in uint16, and where each text begins and the last one ends in them.

        Raises ValueError if gigatoken and tiktoken differ.
        """
        if not self.has_gigatoken or not len(texts):
            return self._encode_plainly(texts)
        fast = self._fast(texts.nbytes)
        if not self.is_checked:
            self._check(fast, texts)
        return _encode_fast(fast, texts)

    def _encode_plainly(self, texts: "pyarrow.LargeStringArray") -> tuple[np.ndarray, np.ndarray]:
        ids = [self.encoding.encode_to_numpy(text, disallowed_special=()) for text in texts.to_pylist()]
        return np.concatenate([[], *ids]).astype(np.uint16), np.cumsum([0, *map(len, ids)])

    def _check(self, fast, texts: "pyarrow.LargeStringArray") -> None:
        starts = np.cumsum([0, *(len(text) for text in texts.to_pylist())])
        first = texts[: int(np.searchsorted(starts, CHECKED_BYTES)) + 1]
        results = _encode_fast(fast, first), self._encode_plainly(first)
        if not all(np.array_equal(*pair) for pair in zip(*results, strict=True)):
            raise ValueError("gigatoken's ids are wrong: install the version in requirements.txt")
        self.is_checked = True


def _encode_fast(fast, texts: "pyarrow.LargeStringArray") -> tuple[np.ndarray, np.ndarray]:
    import awkward

    _, starts, data = texts.buffers()
    starts = np.frombuffer(starts, dtype=np.int64)[texts.offset : texts.offset + len(texts) + 1]
    characters = awkward.contents.NumpyArray(np.frombuffer(data, np.uint8), parameters={"__array__": "char"})
    layout = awkward.contents.ListOffsetArray(
        awkward.index.Index64(starts), characters, parameters={"__array__": "string"}
    )
    encoded = fast.encode_batch(awkward.Array(layout), parallel=False).layout
    return encoded.content.data.astype(np.uint16), encoded.offsets.data


def to_hugging_face(encoding: tiktoken.Encoding, max_length: int) -> "GPT2Tokenizer":
    """Return the same tokenizer in Hugging Face's form, for a model with a context of `max_length` tokens.

    Hugging Face needs the merges: for each token, the pair of shorter tokens that it is merged from, as
    OpenAI's vocab.bpe lists them. tiktoken stores only the resulting tokens, so each pair is recovered by
    merging the token's bytes up to the last step.
    """
    from transformers import GPT2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters, ranks = bytes_to_unicode(), encoding._mergeable_ranks

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(parts[i] + parts[i + 1], rank) for i in range(len(parts) - 1)]
            i = pairs.index(min(pairs))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((spell(parts[0]), spell(parts[1])))
    vocab = {spell(token): rank for token, rank in ranks.items()} | encoding._special_tokens
    return GPT2Tokenizer(vocab, merges, model_max_length=max_length)
