"""What a shell sees of an error: one line on standard error, and an exit code."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

# Set to anything, it shows where in the code an error comes from.
TRACEBACK = "PTV2_FAST_TRACEBACK"


class Resumable(KeyboardInterrupt):
    """Ctrl-C, where the same command with --resume goes on."""


class OneLineGroup(TyperGroup):
    """Commands whose errors are one line: exit code 2 for what the user can mend, 1 for the rest, 130 for Ctrl-C."""

    typed: Sequence[str] = ()

    def make_context(self, info_name: Any, args: list[str], *more: Any, **extra: Any) -> Any:
        """Read the flags in front of a command's name."""
        given = bool(args)
        self.typed = list(args)
        try:
            return super().make_context(info_name, args, *more, **extra)
        except Exception as error:
            if not given or not hasattr(error, "format_message"):
                raise
            fail(f"{error.format_message()} (--help lists the commands)", getattr(error, "exit_code", 2))

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            fail(_stopped(ctx, self.typed, isinstance(error, Resumable)), 130)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except ModuleNotFoundError as error:
            fail(f"{error}; `pip install ptv2-fast[train,search]` brings what is needed", 2, error)
        except (ValueError, OSError) as error:
            fail(_message(error), 2, error)
        except Exception as error:
            # Usage errors are typer's own, and have a message for the user.
            if hasattr(error, "format_message"):
                fail(f"{error.format_message()} (--help lists the options)", getattr(error, "exit_code", 2))
            fail(_message(error), 1, error)


def fail(message: str, code: int, error: BaseException | None = None) -> NoReturn:
    """Say it in one line and leave."""
    if error is not None and os.environ.get(TRACEBACK):
        raise error
    typer.echo(f"ptv2-fast: {' '.join(message.split())}".encode("utf-8", "replace").decode(), err=True)
    raise typer.Exit(code) from None


def _message(error: Exception) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if "PytorchStreamWriter" in text or "inline_container" in text:
        return f"a checkpoint could not be written; is the disk full? ({text})"
    # Our own errors say everything; of the others the kind is half of the message.
    own = isinstance(error, ValueError | OSError) or type(error).__module__.startswith("ptv2_fast")
    if own and text:
        return text
    return f"{type(error).__name__}{': ' if text else ''}{text} ({TRACEBACK}=1 shows where)"


def _stopped(ctx: Any, typed: Sequence[str], resumable: bool) -> str:
    if resumable:
        again = [word for word in typed if word not in ("--overwrite", "--resume")]
        return f"stopped; to go on from the last epoch that was saved: {shlex.join(['ptv2-fast', *again, '--resume'])}"
    if ctx.invoked_subcommand == "search":
        return "stopped; the same command goes on with the trials that are missing"
    return "stopped"


def quiet() -> None:
    """Loading says nothing: what matters is said by the commands themselves."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
