import builtins
import functools
import os
import random
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from conftest import REPOSITORY
from tiktoken_ext.openai_public import r50k_pat_str as GPT2_PATTERN

from corpus import documents, tokenizer
from corpus.tokenizer import BatchTokenizer, get_tokenizer
from runtime import machine

pyarrow = pytest.importorskip("pyarrow")  # a machine for the GPU tests may lack it


@pytest.mark.parametrize(
    "text", ["", "\n", "import os\r\n\n", "naïve 漢字 🙂\x00\t", "<|endoftext|>", "x" * 10_000]
)
def test_byte_ids_are_the_bytes(text):
    tokenizer = get_tokenizer("byte")
    assert tokenizer.encode_ordinary(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
    assert encode(BatchTokenizer("byte"), [text, "", text]) == [list(text.encode()), [], list(text.encode())]


def test_end_of_text_is_the_last_id():
    tokenizer = get_tokenizer("byte")
    assert (tokenizer.n_vocab, tokenizer.eot_token) == (257, 256)
    assert tokenizer.decode([256]) == "<|endoftext|>"


def test_unknown_tokenizer_names_the_known_ones():
    with pytest.raises(ValueError, match="choose from gpt2, byte"):
        get_tokenizer("gpt3")


@functools.cache
def trained(text, merges):
    """Return ranks of byte pair encoding: the plain algorithm, on the words of a text."""
    ranks = {bytes([i]): i for i in range(256)}
    words = Counter(tuple(bytes([b]) for b in f" {word}".encode()) for word in text.split())
    for _ in range(merges):
        pairs = Counter()
        for word, times in words.items():
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] += times
        (a, b), _ = pairs.most_common(1)[0]
        ranks[a + b] = len(ranks)
        merged = Counter()
        for word, times in words.items():
            parts = []
            for part in word:
                if parts and parts[-1] == a and part == b:
                    parts[-1] = a + b
                else:
                    parts.append(part)
            merged[tuple(parts)] += times
        words = merged
    return ranks


@pytest.fixture
def small_gpt2(monkeypatch):
    """Stands in for GPT-2's tokenizer, which needs a download: its pattern, with fewer merges."""
    ranks = trained(Path(os.__file__).read_text(), 100)
    special = {"<|endoftext|>": len(ranks)}
    encoding = tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    return encoding


def odd_texts(number):
    """Texts of words, numbers, white space, controls, all planes of Unicode, and special tokens."""
    rng = random.Random(0)
    pieces = [*Path(os.__file__).read_text().split()[:2000], "don't", "we'll", "I'M", "<|endoftext|>"]
    pieces += ["\r\n", "\t", " ", "  ", "\n\n", "\u3000", "\u00a0", "\x85", "\0", "\ufeff", "é", "e\u0301"]
    pieces += ["½", "१२३", "漢字", "🙂", "👩\u200d👧"]

    def piece():
        if rng.random() < 0.1:
            code = rng.randrange(0x110000)
            return chr(code) if not 0xD800 <= code < 0xE000 else "?"
        return rng.choice(pieces) + rng.choice(["", " ", "\n"])

    return ["".join(piece() for _ in range(rng.randrange(1, 60))) for _ in range(number)]


def encode(batch, texts):
    ids, starts = batch.encode(pyarrow.array(texts, pyarrow.large_string()))
    assert ids.dtype == np.uint16
    return [ids[a:b].tolist() for a, b in zip(starts, starts[1:], strict=False)]


def test_batches_have_the_ids_of_tiktoken(small_gpt2):
    texts = odd_texts(1000)
    expected = small_gpt2.encode_ordinary_batch(texts)
    batch = BatchTokenizer("gpt2")
    assert batch.has_gigatoken
    with ThreadPoolExecutor(3) as pool:  # all threads at once, on cold and on warm memory
        results = list(pool.map(lambda _: encode(batch, texts), range(6)))
    assert all(result == expected for result in results)
    assert encode(batch, []) == []
    part = pyarrow.array(["first", "second", "third"], pyarrow.large_string())[1:2]
    assert batch.encode(part)[0].tolist() == small_gpt2.encode_ordinary("second")


def test_cuts_change_no_token(small_gpt2):
    cuts = 0
    for text in odd_texts(300):
        whole = small_gpt2.encode_ordinary(text)
        for cut in {tokenizer.last_cut(text, most) for most in range(len(text) + 5)} - {0}:
            parts = small_gpt2.encode_ordinary(text[:cut]), small_gpt2.encode_ordinary(text[cut:])
            assert parts[0] + parts[1] == whole, (text, cut)
            cuts += 1
    assert cuts > 5000
    assert tokenizer.last_cut("ACGT" * 100, 300) == 0 and tokenizer.last_cut("don't", 5) == 3


@pytest.mark.parametrize("separator", [None, "\n", "<|endoftext|>"])
def test_parts_of_a_text_have_the_tokens_of_the_whole(small_gpt2, separator):
    rng = random.Random(1)
    for text in ("".join(odd_texts(40)[i::5]) for i in range(5)):
        cuts = sorted(rng.sample(range(len(text)), 30))
        blocks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        found = []
        for part, continues in documents.parts_of(iter(blocks), separator, is_bytes=False):
            ids = small_gpt2.encode_ordinary(part)
            found += [found.pop() + ids] if continues else [ids]
        expected = text.split(separator) if separator else [text]
        expected = expected if not separator or expected[-1].strip() else expected[:-1]
        assert found == [small_gpt2.encode_ordinary(each) for each in expected]


@pytest.mark.parametrize("separator", [None, "<|endoftext|>"])
def test_white_space_at_the_end_of_a_text_in_parts_is_kept(separator):
    blocks = ["one word" + "\n" * 20, "\n", "\n"]
    parts = list(documents.parts_of(iter(blocks), separator, is_bytes=False))
    assert "".join(part for part, _ in parts) == "".join(blocks) and len(parts) > 1


def test_long_runs_of_white_space_are_tokenized(small_gpt2, monkeypatch):
    spaces = " " * 1_000_000
    expected = small_gpt2.encode_ordinary(spaces[1:]) + small_gpt2.encode_ordinary(" word")
    assert tokenizer.encode(small_gpt2, spaces + "word").tolist() == expected
    assert encode(BatchTokenizer("gpt2"), [spaces + "word"]) == [expected]  # and is compared with tiktoken
    monkeypatch.setattr(tokenizer, "SHORT_TEXT", 3)
    monkeypatch.setattr(tokenizer, "LONGER_RUN", tokenizer.WHITE_RUN)
    runs = ["a    b", "    \n\nb", "a     ", "     ", " \t\n \u3000 \x1f\x1f\x1f\x1fb"]
    for text in (*runs, *odd_texts(100)):
        assert tokenizer.encode(small_gpt2, text).tolist() == small_gpt2.encode_ordinary(text)


def test_without_gigatoken_tiktoken_does_the_work_and_says_so(small_gpt2, monkeypatch, capsys):
    importing = builtins.__import__

    def missing(name, *args, **options):
        if name == "gigatoken":
            raise ImportError("No module named 'gigatoken'")
        return importing(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    texts = odd_texts(50)
    assert encode(BatchTokenizer("gpt2"), texts) == small_gpt2.encode_ordinary_batch(texts)
    assert capsys.readouterr().out.startswith("tokenizing with tiktoken, ten times as slow (No module")


def test_wrong_ids_in_the_first_texts_end_the_command(small_gpt2, monkeypatch):
    batch, right = BatchTokenizer("gpt2"), tokenizer._encode_fast

    def wrong(fast, texts):
        ids, starts = right(fast, texts)
        ids[min(3, len(ids) - 1)] += 1
        return ids, starts

    monkeypatch.setattr(tokenizer, "_encode_fast", wrong)
    with pytest.raises(ValueError, match="gigatoken's ids are wrong: install the version"):
        encode(batch, ["some words, and some more"])


@pytest.fixture
def made(monkeypatch):
    """The tokenizers of gigatoken that are made, each with the text that it has seen."""
    import gigatoken

    made, make = [], gigatoken.Tokenizer.from_tiktoken

    def noted(*args, **options):
        made.append(make(*args, **options))
        return made[-1]

    monkeypatch.setattr(gigatoken.Tokenizer, "from_tiktoken", noted)
    return made


@pytest.mark.parametrize("system_says", [True, False])
def test_memory_for_words_is_given_back(small_gpt2, monkeypatch, made, system_says):
    memory = iter(range(0, 10_000_000_000, 150_000_000))
    monkeypatch.setattr(tokenizer, "resident_bytes", lambda: next(memory) if system_says else None)
    monkeypatch.setattr(tokenizer, "MOST_TEXT", 4000)
    monkeypatch.setattr(tokenizer, "LEAST_TEXT", 2500)
    batch, texts, numbers = BatchTokenizer("gpt2"), ["word " * 200], []
    for _ in range(12):
        assert encode(batch, texts) == small_gpt2.encode_ordinary_batch(texts)
        numbers.append(len(made))
    # From the sixth on the process has grown by more than 600 MB.
    expected = [1, 1, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5] if system_says else [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert numbers == expected


def test_each_thread_has_its_share_of_the_memory_for_words(small_gpt2, monkeypatch, made):
    size = [0]
    monkeypatch.setattr(tokenizer, "resident_bytes", lambda: size[0])
    monkeypatch.setattr(tokenizer, "LEAST_TEXT", 1)
    batch, texts = BatchTokenizer("gpt2", threads=4, others=1000), ["some words"]  # others: a shard
    most = 4 * tokenizer.MOST_GROWTH + 1000
    for size[0], number in ((0, 1), (most, 1), (most + 1, 2)):
        encode(batch, texts)
        assert len(made) == number


@pytest.mark.skipif(machine.resident_bytes() is None, reason="needs Linux")
def test_freed_memory_is_returned():
    """Blocks below the last one stay with glibc, as the memory of words does."""
    script = """
from runtime.machine import keep_freed_memory, resident_bytes, return_freed_memory
keep_freed_memory()
blocks = [b"x" * (1_000_000 + i) for i in range(300)] + [b"x" * 1000]
del blocks[:-1]
before = resident_bytes()
return_freed_memory()
print(before - resident_bytes())
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, check=True)
    assert int(result.stdout) > 200_000_000
