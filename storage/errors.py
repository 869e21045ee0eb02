"""Errors of the store."""

from configs.errors import KdflowError


class StoreError(KdflowError, RuntimeError):
    """The store cannot do what was asked; the message says why and what to do."""


class ArtifactMissingError(StoreError, FileNotFoundError):
    """There is no finished artifact (no manifest) under the digest."""


class StoreCorruptError(StoreError):
    """Stored data contradict what was recorded about them."""


class RowsMismatchError(StoreError):
    """Teacher states were asked for a sequence that they do not belong to."""


class StoreFullError(StoreError, OSError):
    """The disk has no room for what is to be written."""
