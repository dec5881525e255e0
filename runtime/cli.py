"""What the command lines of all scripts share: options with a range, and errors that are one line."""

import argparse
import contextlib
import difflib
import errno
import inspect
import operator
import os
import re
import shlex
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NoReturn, TextIO, TypeVar

from tqdm import tqdm

from runtime.launcher import is_first_rank, read_launcher, tell_torchrun

USER_ERRORS = (ValueError, OSError, MemoryError)  # what users and their machines can cause
LONGEST_LINE = 700
BAR_EVERY_S, LINE_EVERY_S = 1.0, 10.0  # in which `watching` shows how far it is, on a terminal and otherwise
THIS_COMMAND = "this command"  # the group of options that a resumed run does not take over
# What to do about an error of the system.
ADVICE = {
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file; use another one",
    errno.EISDIR: "it is a folder; name a file",
    errno.EEXIST: "it exists; use another name",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.EACCES: "change the permissions or use another path",
    errno.EPERM: "change the permissions or use another path",
    errno.EROFS: "nothing can be written there; use another path",
    errno.ENOSPC: "free some space or use another disk",
    errno.EDQUOT: "delete some of your files or use another disk",
    errno.EMFILE: "raise the limit of open files with `ulimit -n`",
    errno.EIO: "the disk or network drive fails; check it, then try again",
    errno.ESTALE: "the network drive fails; check it, then try again",
    errno.ETIMEDOUT: "check the network, then try again",
}
# Our options by the names that they have in nanoGPT and in the Trainer and run_clm.py of Hugging Face.
ALSO_CALLED = {
    "batch_size": "per_device_train_batch_size train_batch_size micro_batch_size",
    "total_batch_size": "gradient_accumulation_steps",
    "block_size": "max_seq_length seq_len context_length",
    "learning_rate": "lr",
    "schedule": "lr_scheduler_type decay_lr",
    "max_steps": "max_iters lr_decay_iters",
    "epochs": "num_train_epochs",
    "warmup_steps": "warmup_iters warmup_ratio",
    "weight_decay": "wd",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "grad_clip": "max_grad_norm",
    "val_every": "eval_interval eval_steps",
    "val_tokens": "eval_iters",
    "log_every": "log_interval logging_steps",
    "checkpoint_every": "save_steps always_save_checkpoint",
    "keep": "save_total_limit",
    "early_stop": "early_stopping_patience",
    "resume": "resume_from_checkpoint",
    "eval_only": "do_eval",
    "recompute": "gradient_checkpointing",
    "compile": "torch_compile",
    "dtype": "bf16 fp16 torch_dtype",
    "wandb": "wandb_log wandb_project report_to",
    "seed": "data_seed",
    "data_dir": "dataset dataset_name train_file",
    "dataset": "dataset_name",
    "name": "dataset_config_name",
    "files": "train_file input",
    "workers": "num_proc preprocessing_num_workers",
    "tokenizer": "tokenizer_name",
    "init_from": "model_name_or_path",
    "model": "model_name_or_path init_from out_dir",
    "out_dir": "output_dir",
    "prompt": "start",
}
BOUNDS = {
    "at least": operator.ge,
    "more than": operator.gt,
    "at most": operator.le,
    "less than": operator.lt,
}


class Range:
    """An argparse type: a number of type `kind` within bounds.

    Parsing only converts. `check_options` checks the bounds afterwards, so that all bad options are reported
    together and defaults and presets are checked as well.
    """

    def __init__(
        self,
        kind: Callable[[str], object],
        least: float | None = None,
        most: float | None = None,
        *,
        above: float | None = None,
        below: float | None = None,
    ):
        bounds = zip(BOUNDS, (least, above, most, below), strict=True)
        self.bounds = {name: bound for name, bound in bounds if bound is not None}
        self.kind = kind
        # argparse puts it into its message about text that is not a number.
        self.__name__ = kind.__name__.replace("_", " ")

    def __call__(self, text: str) -> object:
        return self.kind(text)

    def __contains__(self, value: float) -> bool:
        return all(BOUNDS[name](value, bound) for name, bound in self.bounds.items())

    def __str__(self) -> str:
        return " and ".join(f"{name} {bound}" for name, bound in self.bounds.items())


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Shows a description as it is, and the defaults that are values; help texts say what None stands for."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_value = action.default is not None and action.default is not False
        return super()._get_help_string(action) if is_value else action.help


class Parser(argparse.ArgumentParser):
    """A parser whose help begins with the purpose and the commands of a script, the first two paragraphs of
    its docstring. Its errors are ValueError, with a line for each unknown option, instead of the usage."""

    def __init__(self, doc: str | None = None, **options):
        opening = doc and "\n\n".join(inspect.cleandoc(doc).split("\n\n")[:2])
        super().__init__(
            description=opening, formatter_class=HelpFormatter, usage=argparse.SUPPRESS, **options
        )

    def error(self, message: str) -> NoReturn:
        # argparse's words for --compile=False, which is nanoGPT's syntax, are hard to understand.
        raise ValueError(message.replace("ignored explicit argument", "takes no value, but was given"))

    def parse_args(self, args: Sequence[str] | None = None, namespace: None = None) -> argparse.Namespace:
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            raise ValueError("\n".join(unknown_lines(unknown, self.helps(options))))
        return options

    def helps(self, options: argparse.Namespace) -> dict[str, str]:
        """Return the help texts of all options, those of the chosen subcommand included."""
        helps = {}
        for action in self._actions:
            helps |= {flag: action.help for flag in action.option_strings}
            if isinstance(action, argparse._SubParsersAction):
                helps |= action.choices[getattr(options, action.dest)].helps(options)
        return helps


def unknown_lines(unknown: list[str], helps: dict[str, str]) -> list[str]:
    """Return a line for each option among the words that a parser does not know, or else for the first word.

    `helps` are the help texts of the options that it knows.
    """
    lines = [f"{word}: options replace config files, see --help" for word in unknown if word.endswith(".py")]
    for word in unknown:
        if re.match("--?[A-Za-z]", word):  # a negative number is the value of another one
            flag = word.partition("=")[0]
            closest = closest_option(flag, list(helps))
            advice = f"did you mean {closest} ({helps[closest]})?" if closest else "see --help"
            lines.append(f"unknown option {flag}: {advice}")
    return lines or [f"unexpected {unknown[0]!r}: see --help"]


def closest_option(flag: str, known: list[str]) -> str | None:
    """Return the known option that an unknown one most likely stands for, or None."""
    name = flag.lstrip("-").replace("-", "_")
    renamed = [f"--{ours}" for ours, theirs in ALSO_CALLED.items() if name in theirs.split()]
    closest = [option for option in renamed if option in known]
    closest = closest or difflib.get_close_matches(f"--{name}", known, n=1)
    return closest[0] if closest else None


SEED = Range(int, 0, 2**63 - 1)  # what all random streams accept


def count(text: str) -> int:
    """Convert a whole number as people write it: 100000000, 100_000_000 or 1e8."""
    number = float(text)
    if not number.is_integer():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number")
    return int(number)


def check_options(
    parser: argparse.ArgumentParser, args: argparse.Namespace, others: Iterable[str] = ()
) -> None:
    """Raise ValueError with a line for each option outside its `Range` and for each of the other problems."""
    problems = [
        f"--{action.dest} is {value}: use {action.type}"
        for action in parser._actions
        if isinstance(action.type, Range)
        and isinstance(value := getattr(args, action.dest), int | float)
        and value not in action.type
    ]
    if problems := [*problems, *others]:
        raise ValueError("\n".join(problems))


def of_this_command(parser: argparse.ArgumentParser) -> set[str]:
    """Return the names of the options that are about a single command."""
    groups = [group for group in parser._action_groups if group.title == THIS_COMMAND]
    return {"help", *(action.dest for group in groups for action in group._group_actions)}


def as_words(parser: argparse.ArgumentParser, options: dict[str, object]) -> list[str]:
    """Return options as the words of a command line, so that they are checked like those of a user.

    Leaves out those that are None, that the parser does not know, and that are about a single command.
    """
    words, ignored = [], of_this_command(parser)
    for action in parser._actions:
        value, flags = options.get(action.dest), action.option_strings
        if value is None or action.dest in ignored:
            continue
        if isinstance(value, list) and action.nargs:
            words += [flags[0], *map(str, value)]
        elif not isinstance(value, bool):
            words.append(f"{flags[0]}={value}")
        elif value or len(flags) > 1:  # --shuffle and --no-shuffle
            words.append(flags[0 if value else 1])
    return words


def shell_word(text: str) -> str:
    """Quote a text for the shell that people use on this system."""
    if os.name == "nt":
        return subprocess.list2cmdline([text])
    word = shlex.quote(text)
    return f'"{text}"' if word != text and not set(text) & set('"$`\\!') else word


def command_line(*words: object, ranks: int = 1, nodes: int = 1) -> str:
    """Return a command of this project, such as `train.py --resume`, as people can paste it into a shell.

    `ranks` is per node. Where several nodes meet is for their user to fill in.
    """
    meet = "--standalone"
    if nodes > 1:
        meet = f"--nnodes={nodes} --rdzv_backend=c10d --rdzv_endpoint=NODE:29500"
    launcher = "python" if ranks == nodes == 1 else f"torchrun {meet} --nproc_per_node={ranks}"
    return " ".join([launcher, *(shell_word(str(word)) for word in words)])


def with_these_ranks(*words: object) -> str:
    """Return a command on as many ranks as this process is one of."""
    launcher = read_launcher()
    ranks = launcher.local_world_size
    return command_line(*words, ranks=ranks, nodes=launcher.world_size // ranks)


def this_command() -> str:
    """Return the command that is running."""
    return with_these_ranks(*sys.argv)


def user_path(text: str) -> str:
    """An argparse type for files and folders: expands ~, which shells leave alone in `--option=~/path`."""
    return os.path.expanduser(text)


def visible(text: str) -> str:
    """Return a text whose control characters are replaced: in a terminal, some of them do harm."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)  # all but tabs and line ends


def summary(doc: str | None) -> str | None:
    """Return the first paragraph of a docstring, which `python -OO` removes."""
    return doc and doc.split("\n\n")[0]


def error_lines(error: BaseException) -> list[str]:
    """Return the lines of an error message: for errors of the system what to do, for those without a message
    their name. Lines that a damaged file has made very long are cut."""
    if isinstance(error, OSError) and error.strerror:
        what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        lines = [f"{what}: {ADVICE.get(error.errno, 'check the disk or network, then try again')}"]
    else:
        lines = str(error).splitlines() or [type(error).__name__]
    return [line if len(line) < LONGEST_LINE else f"{line[:400]} … {line[-200:]}" for line in lines]


class Unbreakable:
    """A stream that ignores errors, for a run that goes on when its terminal is gone or its disk is full."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self.stream.write(text)

    def flush(self) -> None:
        flush_or_drop(self.stream)


def flush_or_drop(stream: TextIO) -> None:
    """Print what can be printed, and drop the rest, which Python would try to print again when it exits."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def show_warning(message: Warning | str, *where: object) -> None:
    """Print a warning as one line, without the source line that Python adds."""
    tqdm.write(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def report_failed_thread(failed: threading.ExceptHookArgs) -> None:
    """Print one line for a thread of a library that an error of the system has ended."""
    if isinstance(failed.exc_value, USER_ERRORS):
        name = failed.thread.name if failed.thread else "a thread"
        print(f"warning: {name} has ended: {' '.join(error_lines(failed.exc_value))}", file=sys.stderr)
    else:
        threading.__excepthook__(failed)


def run(
    main: Callable[[argparse.Namespace], None],
    parse_args: Callable[[], argparse.Namespace],
    explain: Callable[[BaseException, argparse.Namespace], str | None] = lambda error, args: None,
    *,
    needs_output: bool = True,
) -> None:
    """Run a script. Errors that its user can fix end it with one line per problem and exit status 1.

    `explain` returns the line for a RuntimeError or KeyboardInterrupt that deserves one, or else None. A
    script that `needs_output` ends when it can no longer print: without an error if the reader of a pipe has
    seen enough. Any other goes on.
    """
    threading.excepthook, warnings.showwarning = report_failed_thread, show_warning
    for name in ("stdout", "stderr"):  # None if it was closed
        stream = getattr(sys, name) or open(os.devnull, "w")
        if name == "stdout" and hasattr(stream, "reconfigure"):  # a console may not show every character
            stream.reconfigure(errors="replace", line_buffering=True)  # a file or pipe gets lines at once
        setattr(sys, name, stream if needs_output else Unbreakable(stream))
    args = None
    try:
        args = parse_args()
        try:
            main(args)
            sys.stdout.flush()
        except (RuntimeError, KeyboardInterrupt) as error:
            if not (message := explain(error, args)):
                raise
            raise ValueError(message) from error
    except KeyboardInterrupt:
        sys.exit(130)
    except USER_ERRORS as error:
        if isinstance(error, BrokenPipeError) and needs_output:
            return flush_or_drop(sys.stdout)
        script = Path(sys.argv[0]).name
        flush_or_drop(sys.stdout)
        message = "\n".join(f"{script}: error: {line}" for line in error_lines(error))
        is_known = tell_torchrun(message) and args is None  # all ranks have the same command line
        sys.exit(1 if is_known and not is_first_rank() else message)


@dataclass(eq=False)
class Work:
    """What a block does that takes long: `n` of `total` units are done, if their number is known."""

    what: str
    total: int | None
    unit: str
    n: int
    options: dict  # of tqdm
    started: float = field(default_factory=time.monotonic)
    shown: float = field(default_factory=time.monotonic)
    bar: tqdm | None = None

    def update(self, n: int = 1) -> None:
        self.n += n

    def show(self) -> None:
        """Print a line. On a terminal, it takes the place of the one before and is removed in the end."""
        self.shown, far = time.monotonic(), "{elapsed} so far"
        if self.total:
            far = "{n_fmt} of {total_fmt} {unit}, {elapsed} so far"
        if self.total and self.n:
            far += ", about {remaining} left"
        form = dict(total=self.total, unit=self.unit, bar_format=f"{{desc}}: {far}", **self.options)
        if not sys.stderr.isatty():
            line = tqdm.format_meter(self.n, elapsed=self.shown - self.started, prefix=self.what, **form)
            print(line, file=sys.stderr, flush=True)
            return
        if self.bar is None:
            self.bar = tqdm(desc=self.what, leave=False, **form)
            self.bar.start_t -= self.shown - self.started
        self.bar.desc, self.bar.n, self.bar.total = self.what, self.n, self.total
        self.bar.bar_format = form["bar_format"]
        self.bar.refresh()


in_progress: list[Work] = []
showing = threading.RLock()  # the garbage collector may end a block anywhere


@cache
def start_showing() -> None:
    """Start the thread that shows the innermost work in progress, on the main rank."""

    never = threading.Event()

    def show() -> None:
        while True:
            every_s = BAR_EVERY_S if sys.stderr.isatty() else LINE_EVERY_S
            never.wait(min(every_s, BAR_EVERY_S))
            with showing:
                is_due = in_progress and time.monotonic() - in_progress[-1].shown >= every_s
                if is_due and is_first_rank():
                    in_progress[-1].show()

    threading.Thread(target=show, daemon=True).start()


@contextlib.contextmanager
def watching(
    what: str, total: int | None = None, unit: str = "", initial: int = 0, **options
) -> Iterator[Work]:
    """Show how far a block is that takes long.

    The block calls `update`. What it is doing shows even if it does not get to that. Of blocks inside one
    another, the innermost one shows itself. A block that is short costs some microseconds.
    """
    start_showing()
    work = Work(what, total, unit, initial, options | {"initial": initial})
    in_progress.append(work)
    try:
        yield work
    finally:
        with showing:
            in_progress.remove(work)
            if work.bar is not None:
                work.bar.close()


Batch = TypeVar("Batch")


def watched(
    batches: Sequence[Batch], what: str, unit: str = "batches", stop: object = False
) -> Iterator[Batch]:
    """Yield the batches until `stop` is true, and show how far that is."""
    with watching(what, len(batches), unit) as work:
        for batch in batches:
            if stop:
                return
            yield batch
            work.update()
