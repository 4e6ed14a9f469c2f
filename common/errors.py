"""Errors that a user can cure. Everything else is a defect of ours and keeps its traceback."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake in input, configuration or environment, told in one message.

    The message names the file, what was found, what was expected, and what to do.
    Verbs print it without a traceback and exit with status 2.
    """


class UserErrors(UserError):
    """Several user errors that belong together and are reported at once."""

    def __init__(self, messages: Iterable[str]) -> None:
        self.messages = list(dict.fromkeys(messages))
        count = len(self.messages)
        head = f"{count} problem{'s' if count != 1 else ''} found:"
        super().__init__("\n".join([head, *(f"  - {m}" for m in self.messages)]))


class ErrorCollector:
    """Gathers user errors so that all of them reach the user in one go."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def add(self, message: str) -> None:
        self.messages.append(message)

    @contextmanager
    def catch(self) -> Iterator[None]:
        """Turn a `UserError` of the block into one more entry and go on after the block."""
        try:
            yield
        except UserErrors as error:
            self.messages.extend(error.messages)
        except UserError as error:
            self.messages.append(str(error))

    def raise_if_any(self) -> None:
        """Raise everything gathered: one message alone as it is, several as a list."""
        if len(set(self.messages)) == 1:
            raise UserError(self.messages[0])
        if self.messages:
            raise UserErrors(self.messages)


def first_line(error: BaseException) -> str:
    """What an error of a library says, on one line; its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
