"""Option ranges and one-line errors."""

import argparse
import inspect
import io
import os
import re
import shlex
import subprocess
import sys
import threading
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import REPOSITORY, torchrun_options
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import bench
import fineweb
import hellaswag
import plot
import sample
import train
from runtime import cli, hub


def test_options_out_of_range_are_reported_together_defaults_included():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=cli.Range(int, 1), default=0)
    parser.add_argument("--rate", type=cli.Range(float, above=0))
    parser.add_argument("--share", type=cli.Range(float, 0, 1))
    parser.add_argument("--beta", type=cli.Range(float, 0, below=1), default=0.9)
    parser.add_argument("--size", type=cli.Range(lambda text: text if text == "auto" else int(text), 1))
    cli.check_options(parser, parser.parse_args("--steps 1 --share 1 --size auto --rate inf".split()))
    with pytest.raises(ValueError) as bad:
        options = parser.parse_args("--rate 0 --share 1.5 --beta 1 --size 0".split())
        cli.check_options(parser, options, ["and another problem"])
    assert str(bad.value).splitlines() == [
        "--steps is 0: use at least 1",
        "--rate is 0.0: use more than 0",
        "--share is 1.5: use at least 0 and at most 1",
        "--beta is 1.0: use at least 0 and less than 1",
        "--size is 0: use at least 1",
        "and another problem",
    ]
    with pytest.raises(ValueError, match="--rate is nan: use more than 0"):
        cli.check_options(parser, parser.parse_args(["--steps", "1", "--rate", "nan"]))
    assert [cli.count(text) for text in ("100_000", "1e8")] == [100_000, 10**8]
    for text in ("1.5", "inf"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{text} is not a whole number"):
            cli.count(text)


@pytest.mark.parametrize(
    "error, ending",
    [
        (None, None),
        (ValueError("one\ntwo"), "script.py: error: one\nscript.py: error: two"),
        (FileNotFoundError("no file"), "script.py: error: no file"),
        (OSError(28, "Full", "log"), "script.py: error: log: Full: free some space or use another disk"),
        (OSError(110, "Late"), "script.py: error: Late: check the network, then try again"),
        (OSError(999, "New", "a"), "script.py: error: a: New: check the disk or network, then try again"),
        (MemoryError(), "script.py: error: MemoryError"),
        (RuntimeError("out of memory"), "script.py: error: buy more"),
        (KeyboardInterrupt(), 130),
        (BrokenPipeError(32, "Broken pipe"), None),
    ],
)
def test_user_errors_exit_without_a_traceback(monkeypatch, error, ending):
    def main(args):
        assert args == "options"
        if error:
            raise error

    def explain(found, args):
        assert args == "options"
        return "buy more" if "memory" in str(found) else None

    monkeypatch.setattr("sys.argv", ["folder/script.py"])
    if ending is None:
        return cli.run(main, lambda: "options", explain)
    with pytest.raises(SystemExit) as exit:
        cli.run(main, lambda: "options", explain)
    assert exit.value.code == ending


@pytest.mark.parametrize("text", ["log", "I'm here, ", 'a "quoted" $HOME', "é\nnext", "`date`!", "a\\b"])
def test_word_for_the_shell_is_read_back_as_it_was(text):
    printed = subprocess.run(["bash", "-c", f"printf %s -- {cli.shell_word(text)}"], capture_output=True)
    assert printed.stdout.decode().removeprefix("--") == text
    assert cli.shell_word("I'm") == '"I\'m"' and cli.shell_word("log/a.html") == "log/a.html"


def test_character_that_a_console_cannot_show_is_replaced(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")  # that of Windows in many countries
    monkeypatch.setattr(sys, "stdout", console)
    cli.run(lambda args: print("é → ok"), lambda: None)
    assert console.buffer.getvalue().decode("cp1252").strip() == "é ? ok"


def test_other_errors_keep_their_traceback():
    for error in (RuntimeError("a bug"), ZeroDivisionError()):
        with pytest.raises(type(error)):
            cli.run(lambda args, error=error: (_ for _ in ()).throw(error), lambda: None)


@pytest.mark.parametrize(("ranks", "nodes"), [(1, 1), (8, 1), (8, 2), (1, 2)])
def test_printed_command_runs_on_as_many_ranks(ranks, nodes, monkeypatch):
    for name, number in (("RANK", 0), ("WORLD_SIZE", ranks * nodes), ("LOCAL_WORLD_SIZE", ranks)):
        monkeypatch.setenv(name, str(number))
    monkeypatch.setenv("MASTER_ADDR", "node")
    monkeypatch.setenv("MASTER_PORT", "29500")
    words = ["train.py", "--resume", "--out_dir", "my run's $HOME"]
    launcher, *rest = shlex.split(cli.with_these_ranks(*words))
    if ranks * nodes == 1:
        assert [launcher, *rest] == ["python", *words]
        return
    assert launcher == "torchrun"
    options = torchrun_options(rest)
    assert [options.training_script, *options.training_script_args] == words
    assert options.nproc_per_node == str(ranks) and options.standalone == (nodes == 1)
    assert nodes == 1 or (options.nnodes == str(nodes) and options.rdzv_endpoint == "NODE:29500")


SCRIPT = """
import argparse
{imports}
from runtime import cli
def main(args):
    print("x" * 100)
    open("done", "w").close()
cli.run(main, argparse.Namespace, needs_output={needs_output})
"""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize(
    "needs_output, shell, ending",
    [
        (True, "{} > /dev/full", "script.py: error: No space left on device: free some space or use another"),
        (True, "{{ sleep 0.3; {}; echo $? >&2; }} | true", "0"),
        (True, "{} >&-", ""),
        (False, "{} > /dev/full", ""),
        (False, "{{ sleep 0.3; {}; echo $? >&2; }} | true", "0"),
        (False, "{} >&- 2>&-", ""),
    ],
)
def test_output_that_nobody_can_get_ends_only_what_needs_it(needs_output, shell, ending):
    # Importing the scripts takes seconds: they are imported once, without any stream.
    imports = "import bench, fineweb, hellaswag, plot, sample, train" if "2>&-" in shell else ""
    Path("script.py").write_text(SCRIPT.format(imports=imports, needs_output=needs_output))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": ""}
    command = ["bash", "-c", shell.format(f"{sys.executable} script.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.stderr.startswith(ending) and result.stderr.count("\n") == (ending != "")
    assert result.returncode == ("error" in ending)
    assert Path("done").exists() or needs_output


def test_line_reaches_a_pipe_when_it_is_printed():
    script = "import os; from runtime import cli; cli.run(lambda _: [print('x'), os._exit(0)], lambda: None)"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": ""}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout == "x\n"  # nothing flushes when a process ends like this


def test_long_work_shows_itself_without_a_terminal(monkeypatch, capsys):
    """Each wait ends with a line, so this does not depend on the time."""
    shown = threading.Event()
    show = cli.Work.show
    monkeypatch.setattr(cli.Work, "show", lambda work: (show(work), shown.set()))
    monkeypatch.setattr(cli, "LINE_EVERY_S", 0.01)

    def wait() -> list[str]:
        shown.clear()
        assert shown.wait(60)
        return capsys.readouterr().err.splitlines()

    with cli.watching("loading"):
        assert re.fullmatch(r"loading: \d\d:\d\d so far", wait()[0])
        for i in cli.watched(range(4), "validation"):
            wait()  # may have lines of before
            line = rf"validation: {i} of 4 batches, \d\d:\d\d so far" + (", about .* left" if i else "")
            assert all(re.fullmatch(line, each) for each in wait())
        assert wait()[-1].startswith("loading: ")
    assert not cli.in_progress
    monkeypatch.setenv("RANK", "1")
    asked, is_first = threading.Event(), cli.is_first_rank
    monkeypatch.setattr(cli, "is_first_rank", lambda: (asked.set(), is_first())[1])
    monkeypatch.setattr(cli.Work, "show", lambda work: pytest.fail("only the main rank shows itself"))
    with cli.watching("loading"):
        for _ in range(2):  # the second one shows that nothing has come of the first
            asked.clear()
            assert asked.wait(60)
    assert [i for i in cli.watched(range(4), "validation", stop=False)] == [0, 1, 2, 3]
    assert [i for i in cli.watched(range(4), "validation", stop=True)] == []


def test_failure_of_a_thread_is_one_line(capsys):
    hook = threading.ExceptHookArgs
    cli.report_failed_thread(hook((OSError, OSError(28, "Full", "x"), None, threading.Thread(name="tb"))))
    assert capsys.readouterr().err == "warning: tb has ended: x: Full: free some space or use another disk\n"
    cli.report_failed_thread(hook((KeyError, KeyError("a bug"), None, threading.Thread(name="tb"))))
    assert "a bug" in capsys.readouterr().err


def test_home_is_expanded_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/ada")
    commands = {
        train: "--out_dir=~/1 --data_dir=~/2 --init_from=~/3 --hellaswag_data=~/4",
        fineweb: "--out_dir=~/1 --files ~/2 ~/3",
        hellaswag: "--model=~/1 --data=~/2 --output=~/3",
        sample: "--model=~/1 --export=~/2 --prompt_file=~/3",
        plot: "~/1 ~/2 --output=~/3",
        bench: "compile --against=~/1 --output=~/2",
    }
    for script, words in commands.items():
        args = str(script.parse_args(words.split()))
        assert sorted(re.findall(r"'/ada/(\d)'", args)) == re.findall(r"\d", words), args
        assert "~" not in args
    assert sample.parse_args(["--prompt", "~/a"]).prompt == ["~/a"]


@pytest.mark.parametrize(
    "script, words",
    [(fineweb, ""), (hellaswag, ""), (sample, ""), (train, ""), (plot, "log"), (bench, "gpu")],
)
def test_scripts_work_without_docstrings(script, words, monkeypatch):
    """As with `python -OO`."""
    for each in (script, *filter(inspect.isfunction, vars(script).values())):
        monkeypatch.setattr(each, "__doc__", None)
    script.parse_args(words.split())


@pytest.mark.parametrize(
    "script, words, message",
    [
        (train, "--lr 1", r"unknown option --lr: did you mean --learning_rate \(peak learning rate .*\)\?"),
        (train, "--learning-rate=-1", r"unknown option --learning-rate: did you mean --learning_rate .*"),
        (train, "--gradient_accumulation_steps 8", ".*did you mean --total_batch_size .tokens per step.*"),
        (train, "--quux -1", "unknown option --quux: see --help"),
        (train, "--resume 5", "unexpected '5': see --help"),
        (train, "config/a.py --lr 1", "config/a.py: options replace config files, see --help\n.*--lr: .*"),
        (train, "--compile=False", "argument --compile/--no-compile: takes no value, but was given 'False'"),
        (train, "--resume --out_dir nowhere --step 1", "unknown option --step: did you mean .*"),
        (sample, "--start hi --out_dir log", ".* --prompt .*\n.*--out_dir: did you mean --model .*"),
        (bench, "train --n_layers 2", "unknown option --n_layers: did you mean --n_layer .blocks.."),
        (bench, "sweep --card h100", "unknown option --card: .*"),
        (plot, "--against loss", "argument --against: invalid choice: 'loss' .*"),
        (plot, "", "the following arguments are required: runs"),
    ],
)
def test_wrong_option_is_one_line_with_the_closest_one(script, words, message):
    with pytest.raises(ValueError) as error:
        script.parse_args(words.split())
    assert re.fullmatch(message, str(error.value))


def test_names_of_other_projects_lead_to_options_that_exist():
    for ours, theirs in cli.ALSO_CALLED.items():
        for name in theirs.split():
            answers = []
            for script in (train, fineweb, hellaswag, sample):
                try:
                    script.parse_args([f"--{name}", "1"])
                except ValueError as error:
                    answers.append(str(error))
            assert any(f"unknown option --{name}: did you mean --{ours} (" in a for a in answers), name


@pytest.mark.parametrize("script", [train, fineweb, hellaswag, sample, plot, bench])
def test_help_begins_with_the_commands_and_shows_defaults_that_are_values(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit, match="^0$"):
        script.parse_args(["--help"])
    printed = capsys.readouterr().out
    purpose, commands = script.__doc__.split("\n\n")[:2]
    assert printed.startswith(f"{purpose}\n\n{commands}\n\n") and f"python {script.__name__}.py" in commands
    assert "default: None" not in printed and "(None" not in printed and "usage" not in printed
    if script is train:
        for line in ("items (default: all)", "muon: of everything else) (default: 0.0006)"):
            assert line in printed
        assert re.search(r"patience .* \(default: 0\)\n", printed)
        assert re.search(r"--resume +[^()]*\n", printed)


def test_warning_is_one_line(capsys):
    cli.show_warning(UserWarning("two\n  lines"), UserWarning, "file.py", 3)
    assert capsys.readouterr().err == "warning: two lines\n"


def test_control_characters_do_not_reach_a_terminal():
    text = "".join(map(chr, range(0x110))) + "é\u2028\U0001f600"
    shown = cli.visible(text)
    assert len(shown) == len(text)
    changed = {a for a, b in zip(text, shown, strict=True) if a != b}
    assert changed == {c for c in text if unicodedata.category(c) == "Cc"} - {"\n", "\t"}


@pytest.mark.parametrize("rank, when, printed", [("0", "options", 1), ("1", "options", 0), ("1", "main", 1)])
def test_torchruns_report_ends_with_the_error_and_ranks_do_not_repeat_that_of_options(
    rank, when, printed, monkeypatch, tmp_path
):
    def fail(*args):
        raise ValueError("no such option")

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as ended:
        cli.run(fail, fail if when == "options" else argparse.Namespace)
    line = "train.py: error: no such option"
    assert ended.value.code == (line if printed else 1)
    failure = ProcessFailure(local_rank=int(rank), pid=1, exitcode=1, error_file=str(tmp_path / "error.json"))
    assert ChildFailedError("train.py", {int(rank): failure}).format_msg().splitlines()[-2].endswith(line)


def test_library_without_the_client_that_downloads_need_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace())
    with pytest.raises(ValueError, match="^this huggingface_hub is too old for downloads: pip install -r "):
        hub.raise_temporary_errors.__wrapped__()
