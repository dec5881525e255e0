"""The two tokenizers, both `tiktoken.Encoding`s whose last id is `<|endoftext|>`.

get_tokenizer("gpt2")     # 50,257 ids; tiktoken downloads the vocabulary once, 1.5 MB
get_tokenizer("byte")     # 257 ids: the 256 bytes and <|endoftext|>; needs no download
"""

import tiktoken

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
