"""A command as a program: what all five share, and how an outcome becomes an exit status.

All five commands exit with:

    0    done
    1    done, but a requested measurement failed, or a limit of qbench-compare is broken
    2    invalid input: one line on stderr names the option, the value and a fix
    70   a bug in qbench: one line on stderr names a log file with the traceback (`--debug` prints it instead)
    130  interrupted by Ctrl-C or SIGTERM
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, NoReturn

import click

from orchestrator import __version__
from orchestrator.cli.crash import report_crash
from orchestrator.errors import QbenchError

BAD_INPUT = 2
INTERNAL_ERROR = os.EX_SOFTWARE
INTERRUPTED = 130


def qbench_command(name: str) -> Callable[[Callable[..., Any]], click.Command]:
    """Make a click command with the options that all of ours share: `-h`, `--version` and `--debug`."""

    def decorate(function: Callable[..., Any]) -> click.Command:
        command = click.command(name, context_settings={"help_option_names": ["-h", "--help"]})(
            _quietly(function)
        )
        command = click.version_option(__version__)(command)
        return click.option(
            "--debug", is_flag=True, expose_value=False, callback=_set_debug,
            help="On an internal error, print the traceback instead of writing it to a log file.",
        )(command)  # fmt: skip

    return decorate


def _quietly(function: Callable[..., Any]) -> Callable[..., Any]:
    """End without an error if stdout is closed: `| head` has then read all that it wanted."""

    @wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python fails when it flushes at exit
            return 0

    return run


@dataclass
class _Invocation:
    """State that must outlive click's context, which is gone by the time an error is handled."""

    debug: bool = False


def _set_debug(context: click.Context, option: click.Parameter, debug: bool) -> None:
    context.ensure_object(_Invocation).debug = debug


def run_command(command: click.Command) -> NoReturn:
    """Run a click command as a program: the one place that turns outcomes into exit statuses."""
    invocation = _Invocation()
    try:
        status = command.main(standalone_mode=False, obj=invocation)
    except QbenchError as error:
        fail(str(error))
    except click.ClickException as error:
        fail(" ".join(error.format_message().split()))
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        sys.exit(INTERRUPTED)
    except Exception as error:
        click.echo(report_crash(error, debug=invocation.debug), err=True)
        sys.exit(INTERNAL_ERROR)
    sys.exit(status if isinstance(status, int) else 0)


def fail(line: str) -> NoReturn:
    """Print the line as an error, and exit with the status of invalid input."""
    click.echo(f"error: {line}", err=True)
    sys.exit(BAD_INPUT)
