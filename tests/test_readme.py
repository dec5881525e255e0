import contextlib
import importlib
import math
import re
import shlex

import click
import pytest
import torch
from conftest import REPOSITORY
from huggingface_hub.cli import hf

import train
from model import GPT, GPTConfig
from runtime import prepare

SCRIPTS = ("train", "fineweb", "hellaswag", "sample", "plot", "bench")


def shell_lines(text):
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.removeprefix("srun ") for block in blocks for line in block.splitlines()]
    lines += [" ".join(line.split()) for line in re.findall(r"(?<!`)`(python [^`]+)`", text)]
    return [line for line in lines if line.strip() and not line.startswith(("#", "export "))]


def docstring_lines(name):
    text = importlib.import_module(name).__doc__
    return [line.strip() for line in text.splitlines() if re.match(r" +(python|torchrun) ", line)]


README = (REPOSITORY / "README.md").read_text()
CONTRIBUTING = (REPOSITORY / "CONTRIBUTING.md").read_text()
LINES = {*shell_lines(README + CONTRIBUTING), *(line for name in SCRIPTS for line in docstring_lines(name))}


@pytest.mark.parametrize("line", sorted(LINES))
def test_every_command_parses(line):
    for part in line.split("&&"):
        words = shlex.split(part, comments=True)
        scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
        if words[:3] == ["pip", "install", "-r"]:
            assert (REPOSITORY / words[3]).exists()
        elif words[0] == "hf":
            name, command, arguments = hf.app.resolve_command(click.Context(hf.app), words[1:])
            command.make_context(name, arguments)
        elif words[:3] != ["python", "-m", "pytest"] and words[0] != "lm_eval":  # which is not installed here
            assert words[0] in ("python", "torchrun") and len(scripts) == 1
            assert (name := words[scripts[0]].removesuffix(".py")) in SCRIPTS
            script = importlib.import_module(name)
            helps = pytest.raises(SystemExit, match="^0$")
            with helps if words[-1] == "--help" else contextlib.nullcontext():
                script.parse_args(words[scripts[0] + 1 :])


TRAINING = [line for line in sorted(LINES) if re.search(r"^[^#]* train\.py(?! --help)", line)]


@pytest.mark.parametrize("line", TRAINING)
def test_every_training_command_makes_sense(line):
    """Its learning rate reaches the peak early and decays, and its batch divides over the ranks."""
    words = shlex.split(line.split("&&")[-1], comments=True)
    options = words[words.index("train.py") + 1 :]
    args = train.parse_args(options)
    launched = [word for word in words if word.startswith(("--nnodes", "--nproc_per_node"))]
    ranks = [int(word.partition("=")[2]) for word in launched]
    prepare.check_args(args, math.prod(ranks), train.option_parser())
    rates = [train.learning_rate_at(step, args) for step in range(args.max_steps + 1)]
    assert max(rates) == args.learning_rate and rates.index(max(rates)) <= 0.05 * args.max_steps
    assert rates[-1] == pytest.approx(args.min_lr) and rates[-1] <= 0.1 * max(rates)


def test_table_of_cards_matches_the_formula():
    rows = re.findall(r"^\| .* \| `(.+)` \| `(.+)` \| (\w+) \| ([\d.]+) \|$", README, flags=re.MULTILINE)
    assert len(rows) == 7
    for preset, options, dtype, gigabytes in rows:
        args = train.parse_args(["--preset", preset, *options.split()])
        with torch.device("meta"):
            model = GPT(GPTConfig(n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd))
        model.recompute = args.recompute
        sizes = args.batch_size, args.block_size, getattr(torch, dtype)
        bytes_ = model.training_bytes(*sizes, compiled=True) + 1e9  # CUDA's context and fragmentation
        assert float(gigabytes) == round(bytes_ / 1e9, 1), (preset, options)
        assert args.total_batch_size % (args.batch_size * args.block_size) == 0


def test_ci_runs_the_readmes_test_command():
    (command,) = [line for line in shell_lines(README) if "pytest" in line]
    assert command in (REPOSITORY / ".ci" / "run").read_text().splitlines()
