"""The one exception that scripts turn into a single line and exit code 2."""


class UserError(Exception):
    """A mistake the user can mend: printed as one line, exit code 2."""


def first_line(error: BaseException) -> str:
    """First line of an exception's message, or its type's name: fit for a one-line note."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
