import importlib
import re
import shlex

import pytest
from conftest import REPOSITORY

SCRIPTS = ("train", "fineweb", "hellaswag", "sample", "plot", "bench")


def shell_lines(text):
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.removeprefix("srun ") for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.strip() and not line.startswith(("#", "export "))]


def docstring_lines(name):
    text = importlib.import_module(name).__doc__
    return [line.strip() for line in text.splitlines() if re.match(r" +(python|torchrun) ", line)]


README = (REPOSITORY / "README.md").read_text()
LINES = {*shell_lines(README), *(line for name in SCRIPTS for line in docstring_lines(name))}


@pytest.mark.parametrize("line", sorted(LINES))
def test_every_command_parses(line):
    for command in line.split("&&"):
        words = shlex.split(command, comments=True)
        scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
        if words[:3] == ["pip", "install", "-r"]:
            assert (REPOSITORY / words[3]).exists()
        elif words[:3] != ["python", "-m", "pytest"] and words[0] not in ("hf", "lm_eval"):
            assert words[0] in ("python", "torchrun") and len(scripts) == 1
            assert (name := words[scripts[0]].removesuffix(".py")) in SCRIPTS
            script = importlib.import_module(name)
            script.parse_args(words[scripts[0] + 1 :])


def test_ci_runs_the_readmes_test_command():
    (command,) = [line for line in shell_lines(README) if "pytest" in line]
    assert command in (REPOSITORY / ".ci" / "run").read_text().splitlines()
