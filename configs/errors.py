"""The root of all errors that are meant for the user."""

from configs.secrets import public


class KdflowError(Exception):
    """Base of all errors that kdflow raises on purpose. The message says what was given, what is
    allowed and what to do, and is shown alone; with `expected` False it is a fault of ours, and
    its traceback is shown too. Secrets in URLs never get into a message.
    """

    expected: bool = True

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(public(argument) for argument in arguments))


class ConfigError(KdflowError, ValueError):
    """A recipe or an override that cannot be used; the message names the field and the remedy."""
