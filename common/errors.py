"""Exceptions that scripts turn into a single line, and what such a line says of foreign ones."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class UserError(Exception):
    """A mistake the user can mend: printed as one line, exit code 2."""

    code = 2


class RunError(UserError):
    """What ended a run that had begun: printed as one line, exit code 1. What was saved stays."""

    code = 1


class EnvError(Exception):
    """An environment failed: one line, exit code 1. `envs` is the vector, if any, that it is number `index` of."""

    def __init__(self, message: str, envs: Any = None, index: int = 0) -> None:
        super().__init__(message)
        self.envs, self.index = envs, index


def first_line(error: BaseException) -> str:
    """First line of an exception's message, or its type's name: fit for a one-line note."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def reading(what: object, remedy: str) -> Iterator[None]:
    """Whatever fails while `what` is read becomes one line with the `remedy`: each fault has an error of its own."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} cannot be read ({first_line(error)}); {remedy}") from error


def blame(error: BaseException) -> str:
    """Type, message and place of an exception of foreign code, in one line."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<")]
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    said = first_line(error)
    return f"{said if said == type(error).__name__ else f'{type(error).__name__}: {said}'}{place}"
