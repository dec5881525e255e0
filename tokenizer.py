"""The two tokenizers. Both are `tiktoken.Encoding`s whose last id is `<|endoftext|>`.

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
