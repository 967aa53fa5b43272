"""The command line: its commands, and the exit codes and messages of errors.

Exit codes: 0 success; 1 an unexpected error; 2 invalid input, with one line that names what and
where; 130 interrupted; 141 a closed pipe.
"""

from __future__ import annotations

import errno
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer

from . import __version__
from .commands import bench, compact, doctor, export, launch, results, run, study, targets
from .core.console import echo, spelled_out
from .core.errors import InputError, ModelWarning

INTERRUPTED, BROKEN_PIPE = 130, 141
# Subcommands of `vitrim study` that do not run anything.
NOT_RESUMED = (["show"], ["report"])
FAULTS_OF_A_PATH = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY),
    *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP),
)
HELP = """Compress a trained Vision Transformer for a small device, and measure the result.

[bold]Start here[/bold]

  vitrim run                      the whole chain on images and model of the package (minutes)
  vitrim run recipe.toml          the same on your data and model
  vitrim run --keys               every key of a recipe

[bold]Single steps[/bold]

  vitrim train recipe.toml        the dense baseline
  vitrim compress recipe.toml     the baseline and its masks
  vitrim compact MODEL --mask mask.safetensors --out small
  vitrim export small --out small-int8 --precision int8
  vitrim bench small-int8 --threads 1
  vitrim compare before.json after.json

[bold]Many runs[/bold]

  vitrim study STUDY.toml --out studies/mine
  vitrim study show studies/mine --sort top1
"""

app = typer.Typer(
    name="vitrim",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=HELP,
)
app.command("run")(run.run)
app.command("train")(run.train)
app.command("compress")(run.compress)
app.command("compact")(compact.compact)
app.command("export")(export.export)
app.command("bench")(bench.bench)
app.command("report")(results.report)
app.command("compare")(results.compare)
app.add_typer(study.app, name="study")
app.add_typer(targets.app, name="targets")
app.command("doctor")(doctor.doctor)


def _print_version(requested: bool) -> None:
    if requested:
        echo(f"vitrim {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: bool = typer.Option(
        False,
        "--version",
        callback=_print_version,
        is_eager=True,
        help="Print the version and stop.",
    ),
) -> None:
    del version


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    raise SystemExit(call(arguments))


def call(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; errors are printed on standard error."""
    with spelled_out():
        return _call(list(map(_expanded, sys.argv[1:] if arguments is None else arguments)))


def _call(given: list[str]) -> int:
    try:
        with _model_warnings_in_one_line():
            result = app(given, standalone_mode=False, prog_name="vitrim")
        code = result if isinstance(result, int) else 0
        # Some versions of typer turn Ctrl-C into this code without a message.
        return _fail(_how_to_resume(given), INTERRUPTED) if code == INTERRUPTED else code
    except InputError as error:
        return _fail(str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(_how_to_resume(given), INTERRUPTED)
    except BrokenPipeError:
        # Python flushes standard output at exit, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except MemoryError:
        return _fail("out of memory; choose a smaller train.batch_size, or a smaller model", 1)
    except OSError as error:
        return _file_error(error)
    except Exception as error:
        # Usage errors print themselves. typer has a copy of click, so they are recognised by their
        # attributes.
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show()
            return int(error.exit_code)
        return _unexpected(error)


@contextmanager
def _model_warnings_in_one_line() -> Iterator[None]:
    """Print each `ModelWarning` once, without the line of code that caused it."""
    printed = set[str]()

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if not issubclass(category, ModelWarning):
            default(message, category, *place, **more)
        elif str(message) not in printed:
            printed.add(str(message))
            print(f"vitrim: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        default = warnings.showwarning
        warnings.showwarning = show
        yield


def _file_error(error: OSError) -> int:
    """Report an error of the disk, or of a path that was given; others are unexpected."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = error.filename or "the disk"
        return _fail(
            f"{place}: no space left; free some space, or name another folder with --out", 2
        )
    if error.errno in FAULTS_OF_A_PATH and error.filename is not None:
        path = os.fsdecode(error.filename)
        return _fail(f"{path}: {error.strerror}; check the path and its permissions", 2)
    return _unexpected(error)


def _expanded(argument: str) -> str:
    """Replace `~` at the beginning of a path, also in --option=~/path, which shells leave as is."""
    option, equals, value = argument.partition("=")
    if not (option.startswith("--") and equals):
        option, equals, value = "", "", argument
    if value.startswith("~") and not os.path.lexists(value):
        value = os.path.expanduser(value)
    return f"{option}{equals}{value}"


def _unexpected(error: Exception) -> int:
    if os.environ.get("VITRIM_TRACEBACK"):
        raise error
    first = (str(error).strip().splitlines() or [""])[0]
    return _fail(
        f"unexpected {type(error).__name__}: {first} "
        "(this is a bug of vitrim; VITRIM_TRACEBACK=1 shows the traceback)",
        1,
    )


def _how_to_resume(given: list[str]) -> str:
    if not given or given[0] not in (*run.RESUMABLE, "study") or given[1:2] in NOT_RESUMED:
        return "interrupted"
    words = [word for word in given if word not in ("--resume", "--overwrite")]
    return f"interrupted; resume with: vitrim {shlex.join(words)} --resume"


def _fail(line: str, code: int) -> int:
    line = " ".join(line.split())
    if not launch.passed_to_launcher(line):
        print(f"vitrim: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
