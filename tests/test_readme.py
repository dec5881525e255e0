import contextlib
import importlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, wait_until
from torch.distributed.launcher.api import LaunchConfig

import train
from model import GPT, GPTConfig
from training import prepare

SCRIPTS = ("train", "fineweb", "hellaswag", "sample", "plot", "bench")
NO_COMMANDS = ("#", "export ", "trap ", "wait ", "apt ", "mkdir ", "while ", "python3 ")  # of this project


def shell_lines(text):
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    lines = [line.strip().removeprefix("srun ").removesuffix(" &") for line in lines]
    lines += [" ".join(line.split()) for line in re.findall(r"(?<!`)`(python [^`]+)`", text)]
    return [line for line in lines if line.strip() and not line.startswith(NO_COMMANDS)]


def docstring_lines(name):
    text = importlib.import_module(name).__doc__
    return [line.strip() for line in text.splitlines() if re.match(r" +(python|torchrun) ", line)]


README = (REPOSITORY / "README.md").read_text()
CONTRIBUTING = (REPOSITORY / "CONTRIBUTING.md").read_text()
DOCS = {path.stem: path.read_text() for path in (REPOSITORY / "docs").glob("*.md")}
NODES = DOCS["nodes"]
LINES = {line for text in (README, CONTRIBUTING, *DOCS.values()) for line in shell_lines(text)}
LINES |= {line for name in SCRIPTS for line in docstring_lines(name)}


@pytest.mark.parametrize("line", sorted(LINES))
def test_every_command_parses(line, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    for part in line.split("&&"):
        words = shlex.split(os.path.expandvars(part), comments=True)
        scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
        if words[:3] == ["pip", "install", "-r"]:
            assert (REPOSITORY / words[3]).exists()
        elif words[0] == "hf":
            import click
            from huggingface_hub.cli import hf

            if not hasattr(hf, "app"):
                pytest.skip("this huggingface_hub parses its commands in another way")
            name, command, arguments = hf.app.resolve_command(click.Context(hf.app), words[1:])
            command.make_context(name, arguments)
        elif words[:3] != ["python", "-m", "pytest"] and words[0] != "lm_eval":  # which is not installed here
            assert words[0] in ("python", "torchrun") and len(scripts) == 1
            assert (name := words[scripts[0]].removesuffix(".py")) in SCRIPTS
            script = importlib.import_module(name)
            helps = pytest.raises(SystemExit, match="^0$")
            with helps if words[-1] == "--help" else contextlib.nullcontext():
                script.parse_args(words[scripts[0] + 1 :])


PAGES = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", path.read_text()):
        name, _, anchor = target.partition("#")
        linked = path.parent / name if name else path
        assert linked.exists(), target
        headings = re.findall(r"^#+ (.*)$", linked.read_text(), flags=re.MULTILINE) if anchor else []
        anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert not anchor or anchor in anchors, target


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
    rows = re.findall(r"^\| .* \| `(.+)` \| `(.+)` \| (\w+) \| ([\d.]+) \|$", NODES, flags=re.MULTILINE)
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


# Stands in for srun, scontrol and scancel. The run ends with STATUS or, if that is empty, after a signal.
SLURM_COMMAND = """#!{python}
import json, os, pathlib, signal, sys, time

def note(what):
    with open("calls", "a") as file:
        file.write(what + "\\n")

def save(*_):
    time.sleep(0.3)  # longer than a script that does not wait takes for its next command
    note("saved")
    sys.exit(1)

name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
if name == "scontrol" and words[0] == "show":
    print("node0\\nnode1")
elif name == "srun":
    signal.signal(signal.SIGTERM, save)
    pathlib.Path("srun.json").write_text(json.dumps([os.getpid(), words, dict(os.environ)]))
    note("srun")
    if os.environ["STATUS"]:
        sys.exit(int(os.environ["STATUS"]))
    signal.pause()
else:
    note(" ".join([name, *words]))
    if name == "scancel":
        os.kill(json.loads(pathlib.Path("srun.json").read_text())[0], signal.SIGTERM)
"""
(SLURM_JOB,) = re.findall(r"^#!/bin/bash\n.*?(?=^```)", NODES, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def run_job(tmp_path):
    """Run the Slurm job, which gets a signal if `number` is given, and return its status and calls."""

    def run(status: str = "", number: int = 0) -> tuple[int, list[str]]:
        commands = tmp_path / "commands"
        commands.mkdir()
        for name in ("srun", "scontrol", "scancel"):
            (commands / name).write_text(SLURM_COMMAND.format(python=sys.executable))
            (commands / name).chmod(0o755)
        about = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "64", "SLURM_JOB_NODELIST": "node[0-1]"}
        about |= {"PATH": f"{commands}:{os.environ['PATH']}", "STATUS": status}
        calls = tmp_path / "calls"
        Path("job.sh").write_text(SLURM_JOB)
        job = subprocess.Popen(["bash", "job.sh"], env={**os.environ, **about}, start_new_session=True)
        try:
            wait_until(lambda: (calls.exists() and calls.read_text()) or job.poll() is not None)
            if number:
                job.send_signal(number)
            return job.wait(20), calls.read_text().splitlines()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
            job.wait()

    return run


def test_slurm_job_is_requeued_after_its_ranks_have_saved(run_job):
    _, calls = run_job(number=signal.SIGUSR1)
    assert calls == ["srun", "scancel --signal=TERM 7", "saved", "scontrol requeue 7"]
    assert "--signal=B:USR1@" in SLURM_JOB and "--requeue" in SLURM_JOB


@pytest.mark.parametrize("status", ["0", "3"])
def test_slurm_job_whose_run_has_finished_or_failed_ends_with_its_status(run_job, status):
    assert run_job(status) == (int(status), ["srun"])


def test_slurm_job_that_is_cancelled_ends(run_job):
    assert run_job(number=signal.SIGTERM) == (-signal.SIGTERM, ["srun"])


def test_slurm_job_passes_its_settings_on(run_job):
    run_job("0")
    _, words, environment = json.loads(Path("srun.json").read_text())
    assert {"--rdzv_endpoint=node0:29500", "--rdzv_id=7", "--resume"} <= {*words}
    assert environment["SRUN_CPUS_PER_TASK"] == "64"
    set_here = set(re.findall(r"^(?:export )?(\w+)=", SLURM_JOB, flags=re.MULTILINE))
    assert len(set_here) == 4 and set_here <= environment.keys()


@pytest.mark.skipif(not hasattr(LaunchConfig, "shutdown_timeout"), reason="torch 2.13 introduced it")
def test_slurm_job_sets_what_torchrun_reads_and_has_time_to_save(run_job, monkeypatch):
    run_job("0")
    *_, environment = json.loads(Path("srun.json").read_text())
    names = [name for name in environment if name.startswith("TORCH_") and name in SLURM_JOB]
    sources = "".join(path.read_text() for path in Path(torch.distributed.__file__).parent.rglob("*.py"))
    assert len(names) == 2 and all(f'"{name}"' in sources for name in names)
    default = LaunchConfig(1, 2, 8).shutdown_timeout
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    (before_limit,) = re.findall(r"--signal=\S+@(\d+)", SLURM_JOB)
    assert default < LaunchConfig(1, 2, 8).shutdown_timeout < int(before_limit)


def test_python_of_the_readme_runs_and_agrees_with_transformers(monkeypatch, capsys):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(sys, "path", [*sys.path])
    torch.manual_seed(0)
    GPT(GPTConfig(block_size=64, vocab_size=320, n_layer=1, n_head=2, n_embd=16)).save_pretrained("log", 257)
    (code,) = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    names = {}
    exec(code, names)
    loss = float(capsys.readouterr().out.splitlines()[-1].split()[0])
    theirs = AutoModelForCausalLM.from_pretrained("exported")
    assert loss == pytest.approx(theirs(names["idx"], labels=names["idx"]).loss.item(), rel=1e-5)
    greedy = names["model"].generate(names["idx"], 20, temperature=0)
    assert greedy.equal(theirs.generate(names["idx"], max_new_tokens=20, do_sample=False))


def test_ci_runs_the_readmes_test_command():
    (command,) = [line for line in shell_lines(README) if line.endswith("pytest -n 2")]
    assert command in (REPOSITORY / ".ci" / "run").read_text().splitlines()
