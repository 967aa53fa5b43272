"""The command line: what a person types, and what they are told when it goes wrong.

Exit codes: 0 done; 1 something unexpected; 2 the input is at fault (one line says what and where);
130 interrupted.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

import typer

from . import __version__
from .commands import bench, compact, compare, doctor, export, report, run, targets
from .core.errors import InputError

INTERRUPTED = 130

app = typer.Typer(
    name="vitrim",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Trim a trained Vision Transformer until it runs on a small machine, and measure what that costs and brings.

[bold]Start here[/bold]

  vitrim run                      the whole chain on the images and the model in the package (minutes)
  vitrim run recipe.toml          the same on your own data and model
  vitrim run --keys               everything that a recipe can say

[bold]One link at a time[/bold]

  vitrim train recipe.toml        only the dense baseline
  vitrim compress recipe.toml     the baseline and its masks
  vitrim compact MODEL --mask mask.safetensors --out small
  vitrim export small --out small-int8 --precision int8
  vitrim bench small-int8 --threads 1
  vitrim compare before.json after.json
""",
)
app.command("run")(run.run)
app.command("train")(run.train)
app.command("compress")(run.compress)
app.command("compact")(compact.compact)
app.command("export")(export.export)
app.command("bench")(bench.bench)
app.command("report")(report.report)
app.command("compare")(compare.compare)
app.add_typer(targets.app, name="targets")
app.command("doctor")(doctor.doctor)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vitrim {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and stop."
    ),
) -> None:
    del version


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process with its exit code."""
    raise SystemExit(call(arguments))


def call(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is returned, and every error has been told on standard
    error.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        result = app(given, standalone_mode=False, prog_name="vitrim")
        code = result if isinstance(result, int) else 0
        # Some versions of typer turn Ctrl-C into this code themselves, and say nothing.
        return _tell(_how_to_go_on(given), INTERRUPTED) if code == INTERRUPTED else code
    except InputError as error:
        return _tell(str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        return _tell(_how_to_go_on(given), INTERRUPTED)
    except BrokenPipeError:
        # The reader of a pipe has seen enough; nothing may be written to it any more, not even at
        # exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except MemoryError:
        return _tell("out of memory; choose a smaller train.batch_size, or a smaller model", 1)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return _tell(
                f"{error.filename or 'the disk'}: no space left; free some space, or name another folder with --out",
                2,
            )
        return _unexpected(error)
    except Exception as error:
        # Errors of usage know how to show themselves; typer brings its own copy of click, so they
        # are known by what they can do.
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show()
            return int(error.exit_code)
        return _unexpected(error)


def _unexpected(error: Exception) -> int:
    if os.environ.get("VITRIM_TRACEBACK"):
        raise error
    first = (str(error).strip().splitlines() or [""])[0]
    return _tell(
        f"unexpected {type(error).__name__}: {first} (this is a fault of vitrim; VITRIM_TRACEBACK=1 shows where it happened)",
        1,
    )


def _how_to_go_on(given: list[str]) -> str:
    if given and given[0] in run.RESUMABLE:
        words = [word for word in given if word not in ("--resume", "--overwrite")]
        return (
            f"interrupted; resume with: vitrim {' '.join(_quoted(word) for word in words)} --resume"
        )
    return "interrupted"


def _quoted(word: str) -> str:
    import shlex

    return shlex.quote(word)


def _tell(line: str, code: int) -> int:
    print(f"vitrim: {' '.join(line.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
