"""The two tokenizers, both `tiktoken.Encoding`s whose last id is `<|endoftext|>`.

    get_tokenizer("gpt2")     # 50,257 ids; tiktoken downloads the vocabulary once, 1.5 MB
    get_tokenizer("byte")     # 257 ids: the 256 bytes and <|endoftext|>; needs no download
    to_hugging_face(get_tokenizer("gpt2"), 1024).save_pretrained("folder")
"""

from typing import TYPE_CHECKING

import tiktoken

if TYPE_CHECKING:
    from transformers import GPT2Tokenizer

NAMES = ("gpt2", "byte")


def get_tokenizer(name: str) -> tiktoken.Encoding:
    """Raises ValueError for an unknown name and FileNotFoundError when the vocabulary cannot be had."""
    if name == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:  # whatever the network, a proxy or the cache folder can raise
            raise FileNotFoundError(
                f"cannot get the GPT-2 vocabulary ({type(error).__name__}): connect to the network once, or "
                "set TIKTOKEN_CACHE_DIR to a folder copied from a machine where tiktoken has cached it"
            ) from error
    if name == "byte":
        return tiktoken.Encoding(
            name="byte",
            pat_str=r"[^\n]+\n?|\n",  # by line: any cut gives the same ids, this one is quick
            mergeable_ranks={bytes([i]): i for i in range(256)},
            special_tokens={"<|endoftext|>": 256},
        )
    raise ValueError(f"unknown tokenizer {name!r}: choose from {', '.join(NAMES)}")


def to_hugging_face(encoding: tiktoken.Encoding, max_length: int) -> "GPT2Tokenizer":
    """The same tokenizer in Hugging Face's form, for a model with a context of `max_length` tokens.

    What is no single token by itself is put together from pairs in the order of their ranks, as OpenAI's
    vocab.bpe lists them; tiktoken keeps only what comes out, so each pair is found by merging up to it.
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
