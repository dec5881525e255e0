import pytest
import tiktoken

from tokenizer import get_tokenizer


@pytest.mark.parametrize(
    "text", ["", "\n", "import os\r\n\n", "naïve 漢字 🙂\x00\t", "<|endoftext|>", "x" * 10_000]
)
def test_byte_ids_are_the_bytes(text):
    tokenizer = get_tokenizer("byte")
    assert tokenizer.encode_ordinary(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text


def test_end_of_text_is_the_last_id():
    tokenizer = get_tokenizer("byte")
    assert (tokenizer.n_vocab, tokenizer.eot_token) == (257, 256)
    assert tokenizer.decode([256]) == "<|endoftext|>"


def test_unknown_and_unreachable_tokenizers_name_a_fix(monkeypatch):
    with pytest.raises(ValueError, match="choose from gpt2, byte"):
        get_tokenizer("gpt3")

    def unreachable(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    with pytest.raises(FileNotFoundError, match="TIKTOKEN_CACHE_DIR"):
        get_tokenizer("gpt2")
