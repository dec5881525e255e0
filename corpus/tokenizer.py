"""The two tokenizers. Both are `tiktoken.Encoding`s whose last id is `<|endoftext|>`.

    get_tokenizer("gpt2")     # 50,257 ids; the vocabulary is downloaded once, 1.5 MB
    get_tokenizer("byte")     # 257 ids: the 256 bytes and <|endoftext|>; needs no download
    BatchTokenizer("gpt2")    # the same ids for many texts at a time, more than ten times as fast

GPT-2's vocabulary comes from OpenAI or, if that fails, from the Hugging Face Hub.
"""

import base64
import hashlib
import json
import re
import tempfile
import threading
import unicodedata
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tiktoken

from runtime import hub
from runtime.files import parsing
from runtime.machine import resident_bytes, return_freed_memory

if TYPE_CHECKING:
    import gigatoken
    import pyarrow

NAMES = ("gpt2", "byte")
SIZES = {"gpt2": 50_257, "byte": 257}  # token ids, with end-of-text
END_OF_TEXT = "<|endoftext|>"
OPENAI_S = 5  # after which the Hub is asked
# Of r50k_base.tiktoken, which has GPT-2's ranks: tiktoken 0.14, tiktoken_ext/openai_public.py.
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
CHECKED_BYTES = 200_000  # of the first texts, which are also tokenized by tiktoken: 20 ms
# White space in GPT-2's pattern is Unicode's White_Space; Python's \s has four more characters.
WHITE_SPACE = "[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
WHITE_RUN, IS_WHITE = re.compile(f"{WHITE_SPACE}+"), re.compile(WHITE_SPACE).match
LONGER_RUN = re.compile(WHITE_SPACE + "{100}")  # rare, so that others need not be looked at one by one
SHORT_TEXT = 100_000  # characters, of which tiktoken can have any
# gigatoken remembers every word that it has seen: 0.2 MB for each MB of prose, 10 MB where all words are new.
# A tokenizer is replaced when this process has grown by MOST_GROWTH per thread and what the caller needs, but
# not before LEAST_TEXT, as to make one takes 0.3 s. Where the growth is not known (not Linux), it is replaced
# after MOST_TEXT.
MOST_GROWTH, LEAST_TEXT, MOST_TEXT = 600_000_000, 32_000_000, 256_000_000  # bytes


def get_tokenizer(name: str) -> tiktoken.Encoding:
    """Return the tokenizer with that name.

    Raises ValueError for an unknown name, and OSError, within a minute, if GPT-2's vocabulary is neither
    cached nor can be downloaded.
    """
    if name == "gpt2":
        # tiktoken's download has no time limit, and some networks do not let it through.
        openai = hub.started(lambda: tiktoken.get_encoding("gpt2"))
        try:
            return openai.result(timeout=OPENAI_S)
        except Exception as error:  # network, proxy and cache folder can each raise different errors
            reason = type(error).__name__
        try:
            return gpt2_from_hub(reason)
        except OSError:
            if openai.done() and not openai.exception():  # it was only slow
                return openai.result()
            raise
    if name == "byte":
        return tiktoken.Encoding(
            name="byte",
            pat_str=r"[^\n]+\n?|\n",  # any split gives the same ids; splitting into lines is fast
            mergeable_ranks={bytes([i]): i for i in range(256)},
            special_tokens={END_OF_TEXT: 256},
        )
    raise ValueError(f"unknown tokenizer {name!r}: choose from {', '.join(NAMES)}")


@cache
def gpt2_from_hub(reason: str) -> tiktoken.Encoding:
    """Return GPT-2's tokenizer, made from the vocabulary on the Hub, for when tiktoken cannot download it.

    Raises OSError if it cannot be downloaded either, and ValueError if it is not OpenAI's vocabulary.
    """
    from tiktoken_ext.openai_public import r50k_pat_str

    file = hub.fetch(
        "openai-community/gpt2",
        "vocab.json",
        what=f"download GPT-2's vocabulary, neither from OpenAI ({reason}) nor from the Hugging Face Hub",
        advice="connect to the network once, set TIKTOKEN_CACHE_DIR to a copy of tiktoken's cache from "
        "another machine, or set HF_ENDPOINT to a mirror",
    )
    # Tokens are spelled in letters that stand for bytes: for itself if it is printable, else one from 256 on.
    printable = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
    others = [byte for byte in range(256) if byte not in printable]
    bytes_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    with parsing(file, "OpenAI's vocabulary", "delete it, and check HF_ENDPOINT"):
        vocabulary = json.loads(file.read_bytes())
        end_of_text = {END_OF_TEXT: vocabulary.pop(END_OF_TEXT)}
        ranks = {bytes(bytes_of[letter] for letter in token): rank for token, rank in vocabulary.items()}
        digest = hashlib.sha256(tiktoken_file(ranks)).hexdigest()
        if digest != RANKS_SHA256 or end_of_text[END_OF_TEXT] != len(ranks):
            raise ValueError(f"the hash of its tokens is {digest[:12]}…, not {RANKS_SHA256[:12]}…")
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=end_of_text)


def encode(tokenizer: tiktoken.Encoding, text: str) -> np.ndarray:
    """Return the ids of a text in uint32. In it, `<|endoftext|>` is ordinary text.

    tiktoken's stack overflows in a run of some hundred thousand white-space characters that other text
    follows. GPT-2's pattern takes all of such a run but its last character, so a cut before that character
    changes no token. A run at the end of a text is taken whole and needs no stack.
    """
    if len(text) <= SHORT_TEXT or tokenizer.name == "byte" or not LONGER_RUN.search(text):
        return tokenizer.encode_to_numpy(text, disallowed_special=())
    runs = [match for match in WHITE_RUN.finditer(text) if match.end() - match.start() > SHORT_TEXT]
    cuts = [0, *(run.end() - 1 for run in runs if run.end() < len(text)), len(text)]
    parts = (text[start:end] for start, end in pairwise(cuts))
    return np.concatenate([tokenizer.encode_to_numpy(part, disallowed_special=()) for part in parts])


def kind_of(character: str) -> str:
    """Return which part of GPT-2's pattern a character belongs to: L, N, white space, other or unassigned."""
    if IS_WHITE(character):
        return "white space"
    category = unicodedata.category(character)
    if category == "Cn":  # newer versions of Unicode may know it
        return "unassigned"
    return category[0] if category[0] in "LN" else "other"


def last_cut(text: str, most: int) -> int:
    """Return the last place up to `most` where a cut changes none of GPT-2's tokens, or 0 if there is none.

    A token of letters or of numbers ends before a character of any other kind.
    """
    for place in range(min(most, len(text) - 1), 0, -1):
        before, after = kind_of(text[place - 1]), kind_of(text[place])
        if before in ("L", "N") and after not in (before, "unassigned"):
            return place
    return 0


def tiktoken_file(ranks: dict[bytes, int]) -> bytes:
    """Return a vocabulary in tiktoken's format: a line for each token, by rank."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ordered)


class BatchTokenizer:
    """Tokenizes many texts at a time, in up to `threads` threads; `<|endoftext|>` in a text is ordinary text.

    GPT-2's ids come from gigatoken, with tiktoken's vocabulary. Those of the first texts are compared with
    tiktoken's. Without gigatoken, and for the other tokenizer, all ids come from tiktoken. The caller needs
    about `others` bytes of memory itself.
    """

    def __init__(self, name: str, threads: int = 1, others: int = 0):
        self.encoding, self.has_gigatoken = get_tokenizer(name), False
        self.most_growth, self.first_size = MOST_GROWTH * threads + others, resident_bytes()
        self.of_thread, self.is_checked = threading.local(), False
        if name == "gpt2":
            try:
                from gigatoken import Tokenizer  # noqa: F401  # not there in a folder of that name

                self.has_gigatoken = True
            except ImportError as error:
                print(f"tokenizing with tiktoken, ten times as slow ({error}): pip install gigatoken")

    def _fast(self, new_text: int) -> "gigatoken.Tokenizer":
        """Return gigatoken's tokenizer of this thread, a new one if it has seen too many words.

        Threads do not share one, because they would wait for each other.
        """
        mine = self.of_thread
        if hasattr(mine, "fast"):
            mine.text += new_text
            if not self._is_full(mine.text):
                return mine.fast
            del mine.fast
            return_freed_memory()
        import gigatoken

        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "gpt2.tiktoken")
            file.write_bytes(tiktoken_file(self.encoding._mergeable_ranks))
            mine.fast = gigatoken.Tokenizer.from_tiktoken(file, pretokenizer="gpt2")
        mine.text = new_text
        return mine.fast

    def _is_full(self, text: int) -> bool:
        """Return whether a tokenizer that has seen so many bytes of text is to be replaced."""
        now = resident_bytes()
        if now is None:
            return text > MOST_TEXT
        return text > LEAST_TEXT and now - self.first_size > self.most_growth

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
        if self.encoding.name == "byte":
            ids = [np.frombuffer(text.encode(), np.uint8) for text in texts.to_pylist()]
        else:
            ids = [encode(self.encoding, text) for text in texts.to_pylist()]
        joined = np.concatenate([[], *ids], dtype=np.uint16, casting="unsafe")
        return joined, np.cumsum([0, *map(len, ids)])

    def _check(self, fast, texts: "pyarrow.LargeStringArray") -> None:
        import pyarrow

        some, left = [], CHECKED_BYTES
        for text in texts:
            some.append(text.as_py()[:left])
            if not (left := left - len(some[-1])):
                break
        first = pyarrow.array(some, pyarrow.large_string())
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


def is_padded(size: int, n_vocab: int) -> bool:
    """Return whether a number of ids is that of a tokenizer, or padded to the next multiple of 64 or 128."""
    return n_vocab <= size <= -(-n_vocab // 128) * 128


def name_for(model) -> str:
    """Return the name of the tokenizer that a GPT was trained with, which is not loaded.

    A checkpoint of ours names it, and the run may have had any larger --vocab_size. Other models are judged
    by the tokenizer's files beside them and by their number of ids, which may be padded to the next multiple
    of 128. Raises ValueError for any other vocabulary, in which text would get the wrong ids.
    """
    size = model.config.vocab_size
    trained_on = (model.metadata.get("args") or {}).get("tokenizer")
    named = trained_on or model.metadata.get("tokenizer")
    for name, n_vocab in SIZES.items():
        fits = size >= n_vocab if trained_on else is_padded(size, n_vocab)
        if named in (None, name) and fits:
            return name
    tokens = f"{size:,} token ids" + (f" of the tokenizer {named}" if named else "")
    ours = " nor ".join(f"{name}'s {n_vocab:,}" for name, n_vocab in SIZES.items())
    raise ValueError(
        f"the model has {tokens}: neither {ours}, padded at most to a multiple of 128; "
        "use the Hugging Face tools for it"
    )


def tokenizer_for(model) -> tiktoken.Encoding:
    """Return the tokenizer that a GPT was trained with. Raises ValueError if it is not one of the two."""
    return get_tokenizer(name_for(model))
