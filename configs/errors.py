"""The root of all errors that are meant for the user."""


class KdflowError(Exception):
    """Base of all errors that kdflow raises on purpose. The message says what was given, what is
    allowed and what to do, and is shown alone; with `expected` False it is a fault of ours, and
    its traceback is shown too.
    """

    expected: bool = True


class ConfigError(KdflowError, ValueError):
    """A recipe or an override that cannot be used; the message names the field and the remedy."""
