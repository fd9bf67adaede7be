"""The one exception that scripts turn into a single line and exit code 2."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake the user can mend: printed as one line, exit code 2."""


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
