"""Hugging Face folders with tokenizer and model card, and OpenAI's layout of the weights."""

import hashlib
import json
import re
import sys
from dataclasses import fields
from pathlib import Path

import tiktoken
import torch

from corpus.tokenizer import END_OF_TEXT, RANKS_SHA256, get_tokenizer, tiktoken_file, tokenizer_for
from diagnosis.published import HELLASWAG, describe_scores, items_of, unit_of
from model import GPT, GPTConfig
from runtime.files import parsing, whole_folder
from runtime.log import curves_of, is_number, read_log

HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
# OpenAI's checkpoints store these four as (in, out); `nn.Linear` expects (out, in).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
EXPRESSIBLE = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout")  # by transformers
# Options that a model card leaves out: where a run was, on which machine, what it reported.
NOT_ON_CARDS = (
    *("data_dir", "out_dir", "init_from", "resume", "dry_run", "price", "overfit_batch", "eval_only"),
    *("device", "dtype", "compile", "recompute", "batch_size", "keep", "tensorboard", "wandb"),
    *("val_tokens", "hellaswag_data", "hellaswag_limit", "sample_prompt", "sample_tokens"),
    *("early_stop", "max_skipped"),
)


def gpt2_classes() -> tuple[type, type]:
    """Return the config and the model of transformers. Raises ValueError under `python -OO`."""
    if sys.flags.optimize > 1:
        raise ValueError("transformers needs the docstrings that `python -OO` removes: use `python -O`")
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2Config, GPT2LMHeadModel


def read_hugging_face(source: Path) -> tuple[dict, dict[str, torch.Tensor], dict]:
    """Read a Hugging Face folder; the metadata is its `tokenizer`, as `tokenizer_in` describes it."""
    GPT2Config, GPT2LMHeadModel = gpt2_classes()

    sizes = {name: name for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    sizes["block_size"] = "n_positions"
    try:
        with parsing(source, "a GPT-2 in Hugging Face's format", "use another model"):
            values, _ = GPT2Config.get_config_dict(source)
            if values.get("model_type") != "gpt2":
                raise ValueError(f"it is a {values.get('model_type')}")
            theirs = GPT2Config.from_dict(values)
            wanted = {
                "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
                "n_inner": (None, 4 * theirs.n_embd),
                "scale_attn_weights": (True,),
                "scale_attn_by_inverse_layer_idx": (False,),
                "tie_word_embeddings": (True,),
                "layer_norm_epsilon": (1e-5,),
            }
            for name, allowed in wanted.items():
                if getattr(theirs, name) not in allowed:
                    raise ValueError(f"its {name} is {getattr(theirs, name)}, but GPT-2 has {allowed[0]}")
            config = {ours: getattr(theirs, name) for ours, name in sizes.items()}
            if not all(isinstance(size, int) and size > 0 for size in config.values()):
                raise ValueError(f"its sizes are {config}")
            if files := [path for path in source.glob("*") if path.suffix in (".safetensors", ".bin")]:
                check_size(config, sum(path.stat().st_size for path in files))  # at least a byte per weight
            hf_model, report = GPT2LMHeadModel.from_pretrained(
                source, dtype=torch.float32, output_loading_info=True
            )
            if report["missing_keys"]:
                raise ValueError(f"{min(report['missing_keys'])} is missing")
            tokenizer = tokenizer_in(source)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"cannot load {source} ({reason}): check folder or network") from error
    return config, transpose(hf_model.state_dict()), {"tokenizer": tokenizer}


def tokenizer_in(folder: Path) -> str | None:
    """Return which of our tokenizers a Hugging Face folder has the vocabulary of, or None if it has none.

    If the vocabulary is another one, even of the same size, this returns the name of its file.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {letter: bytes([byte]) for byte, letter in bytes_to_unicode().items()}
    of_bytes = hashlib.sha256(tiktoken_file(get_tokenizer("byte")._mergeable_ranks)).hexdigest()
    name = None
    for file in (folder / "tokenizer.json", folder / "vocab.json"):
        if not file.exists():
            continue
        vocab = json.loads(file.read_bytes())
        vocab = dict(vocab["model"]["vocab"] if file.name == "tokenizer.json" else vocab)
        vocab.pop(END_OF_TEXT, None)
        ranks = {
            b"".join(byte_of.get(letter, letter.encode()) for letter in token): rank
            for token, rank in vocab.items()
        }
        digest = hashlib.sha256(tiktoken_file(ranks)).hexdigest()
        name = {RANKS_SHA256: "gpt2", of_bytes: "byte"}.get(digest)
        if name is None:
            return file.name
    return name


def write_hugging_face(
    folder: str | Path, config: dict, state: dict[str, torch.Tensor], vocab_size: int
) -> None:
    """Write a GPT-2 with the fields of a GPTConfig as a Hugging Face folder.

    Only the first `vocab_size` token ids are kept; the last of them is end-of-text. Raises ValueError if the
    folder exists and is not empty, and for a model that transformers' GPT-2 cannot express.
    """
    GPT2Config, GPT2LMHeadModel = gpt2_classes()

    for each in fields(GPTConfig):
        if each.name not in EXPRESSIBLE and config[each.name] != each.default:
            value = f"{each.name} {config[each.name]}"
            raise ValueError(f"GPT-2 in transformers has no {value}: share the checkpoint instead")
    sizes = {name: config[name] for name in ("n_embd", "n_layer", "n_head")}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config["dropout"])
    end_of_text = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), vocab_size - 1)
    # n_ctx is an older name, which OpenAI's folders have and llama.cpp's converter reads.
    lengths = {"vocab_size": vocab_size, **dict.fromkeys(("n_positions", "n_ctx"), config["block_size"])}
    exported = GPT2LMHeadModel(GPT2Config(**sizes, **lengths, **dropout, **end_of_text))
    state = transpose(state)
    for name in ("transformer.wte.weight", "lm_head.weight"):
        state[name] = state[name][:vocab_size]
    shapes = [{name: tuple(w.shape) for name, w in each.items()} for each in (exported.state_dict(), state)]
    if different := sorted(name for name, _ in shapes[0].items() ^ shapes[1].items()):
        place = f"no place for {different[0]}"
        raise ValueError(f"GPT-2 in transformers has {place}: share the checkpoint instead")
    exported.load_state_dict(state)
    with whole_folder(folder) as partial:
        exported.save_pretrained(partial)


def transpose(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert a state dict between our layout and OpenAI's."""
    return {name: w.t().contiguous() if name.endswith(TRANSPOSED) else w for name, w in state.items()}


def check_size(config: dict, stored: int) -> None:
    """Raise ValueError if a model with these sizes would be larger than the `stored` weights.

    It would be allocated before the difference is noticed.
    """
    V, T, L, C = (config[name] for name in ("vocab_size", "block_size", "n_layer", "n_embd"))
    if (V + T + 12 * L * C) * C > stored:
        raise ValueError("it has too few weights for its sizes")


def to_hugging_face(encoding: tiktoken.Encoding) -> tuple[dict[str, int], list[str]]:
    """Return the vocabulary and the merges of a tokenizer, spelled as in OpenAI's and Hugging Face's files.

    The merges are, for each token, the pair of shorter tokens that it is merged from, as in OpenAI's
    vocab.bpe. tiktoken stores only the resulting tokens, so each pair is recovered by merging the token's
    bytes up to the last step.
    """
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
            merges.append(f"{spell(parts[0])} {spell(parts[1])}")
    return {spell(token): rank for token, rank in ranks.items()} | encoding._special_tokens, merges


def save_tokenizer(encoding: tiktoken.Encoding, max_length: int, folder: str | Path) -> None:
    """Write vocab.json with merges.txt, which older tools need, and tokenizer.json, which newer ones load.

    `max_length` is the context of the model.
    """
    # The one with a tokenizer.json in transformers 4, and in 5 another name of GPT2Tokenizer.
    from transformers import GPT2TokenizerFast

    vocab, merges = to_hugging_face(encoding)
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = "".join(f"{line}\n" for line in ["#version: 0.2", *merges])
    (Path(folder) / "merges.txt").write_text(lines, encoding="utf-8")
    GPT2TokenizerFast.from_pretrained(folder, model_max_length=max_length).save_pretrained(folder)


def export(model: GPT, source: str | Path, folder: str | Path) -> None:
    """Write a model that was loaded from `source` as a Hugging Face folder with tokenizer and model card.

    Raises ValueError if the folder exists and is not empty.
    """
    tokenizer = tokenizer_for(model)
    with whole_folder(folder) as partial:
        model.save_pretrained(partial, vocab_size=tokenizer.n_vocab)
        save_tokenizer(tokenizer, model.config.block_size, partial)
        card = model_card(model, tokenizer, Path(source), Path(folder).absolute().name)
        (partial / "README.md").write_text(card, encoding="utf-8")


def is_on_cards(option: str, value: object) -> bool:
    """Return whether a model card lists an option: another run would have to repeat it.

    Text has to be a word, so that no path gets there.
    """
    if option in NOT_ON_CARDS or option.endswith("_every") or value is None or value is False:
        return False
    return not isinstance(value, str) or re.fullmatch(r"[\w.-]+", value) is not None


def model_card(model: GPT, tokenizer: tiktoken.Encoding, source: Path, name: str) -> str:
    """Return a model card for the Hub, in Markdown, with facts from the checkpoint and the log beside it.

    The model is exported with the ids of `tokenizer`, and its example fits into the model's context.
    """
    config, metadata = model.config, model.metadata
    step, args = metadata.get("step"), metadata.get("args") or {}
    unit = unit_of(tokenizer.name)
    parameters = model.num_params() - (config.vocab_size - tokenizer.n_vocab) * config.n_embd
    folder = source if source.is_dir() else source.parent
    log = read_log(folder) if step is not None and (folder / "log.jsonl").exists() else {}
    facts = {"parameters": f"{parameters:,}", "context": f"{config.block_size:,} tokens"}
    if step is not None:
        is_best = metadata.get("val_loss") is not None and step == metadata.get("best_step")
        facts["checkpoint"] = f"step {step:,}" + (", the best validation loss until then" if is_best else "")
    if metadata.get("windows") and isinstance(args.get("block_size"), int):
        facts["tokens seen"] = f"{metadata['windows'] * args['block_size']:,}"
    # An evaluation may be older than the checkpoint.
    last = {kind: [each for each in log.get(kind, []) if each["step"] <= step][-1:] for kind in log}
    if metadata.get("val_loss") is not None:
        at = f", at step {last['val'][0]['step']:,}" if last.get("val") else ""
        facts["validation loss"] = f"{metadata['val_loss']:.4f} {unit}{at}"
    for record in [each for each in log.get("train", []) if each["step"] < step and each.get("loss")][-1:]:
        facts["training loss"] = f"{record['loss']:.4f} {unit}, at step {record['step']:,}"
    for record in last.get("hellaswag", []):
        if items_of(record) == HELLASWAG:
            scores = f"{describe_scores(record)}, at step {record['step']:,}"
            facts["HellaSwag, ± one standard error"] = scores
    for kind in sorted(curves_of(log).keys() - {"val", "hellaswag"}):
        for record in last.get(kind, []):
            curve = curves_of(log)[kind]
            if is_number(record.get(curve)):
                facts[kind] = f"{curve} {record[curve]:.4g}, at step {record['step']:,}"
    origin = ", trained from scratch" if step is not None and "init_from" in args else ""
    if begun_with := args.get("init_from"):
        origin = f", fine-tuned from {begun_with if begun_with in HUB_NAMES else 'another checkpoint'}"
    elif str(source) in HUB_NAMES:
        origin = f", OpenAI's {source}"
    # The prompt takes at most half of the context, and all of the text fits into it.
    half = max(config.block_size // 2, 1)
    prompt = tokenizer.encode_ordinary(str(args.get("sample_prompt") or "The "))[:half]
    text = json.dumps(tokenizer.decode(prompt).strip("\ufffd"), ensure_ascii=False)
    new = max(min(50, config.block_size - half), 1)
    lines = [
        *("---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [gpt2]", "---", ""),
        *(f"# {name}", "", f"A GPT-2{origin}. Use it like any other GPT-2:", ""),
        *("```python", "from transformers import pipeline", ""),
        f'pipeline("text-generation", "{name}")({text}, max_new_tokens={new})',
        *("```", "", "| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in facts.items()), ""),
    ]
    shown = [option for option, value in args.items() if is_on_cards(option, value)]
    if shown:
        lines += ["The options of the run:", "", "| option | value |", "|---|---|"]
        lines += [f"| `--{option}` | {args[option]} |" for option in shown]
    return "\n".join(lines) + "\n"
