"""What of a user's text may be shown, recorded and hashed: URLs without their secrets."""

import re
from collections.abc import Mapping
from typing import Any, TypeVar

Value = TypeVar("Value")

# `user:password@`, up to the last @ before the path; a password may hold slashes where no port can
# be meant. Then the path, and a query or fragment, which may be a signature.
_URL = re.compile(
    r"""(?P<scheme>\b[a-zA-Z][a-zA-Z0-9+.-]*://)
        (?P<user>[^\s/?\#'"<>]*@ | [^\s/@:?\#'"<>]*:(?!\d{1,5}(?:[/?\#]|$))[^\s?\#'"<>]*@)?
        (?P<rest>[^\s?\#'"<>]*)
        (?P<query>[?\#][^\s'"<>]*)?""",
    re.VERBOSE,
)
HIDDEN = "(not shown)"
# Where what stands before the @ is a container, not a user.
_CONTAINERS = ("abfs://", "abfss://", "wasb://", "wasbs://")


def public(value: Value) -> Value:
    """The value with users, passwords, queries and fragments of all URLs in it taken out; of nested
    plain values, of all of them. A value without any is returned as it is.
    """
    if isinstance(value, str):
        return _URL.sub(_stripped, value)  # type: ignore[return-value]
    if isinstance(value, Mapping):
        return {public(key): public(inner) for key, inner in value.items()}  # type: ignore[return-value]
    if isinstance(value, list | tuple):
        return type(value)(public(inner) for inner in value)
    return value


def _stripped(match: re.Match[str]) -> str:
    scheme, user = match["scheme"], match["user"] or ""
    kept = user if scheme.lower() in _CONTAINERS and ":" not in user else ""
    query = match["query"] or ""
    behind = query[len(query.rstrip(":;,.)]")) :]  # of the sentence that the URL stands in
    return f"{scheme}{kept}{match['rest']}{behind}"


def public_config(config: Any) -> dict[str, Any]:
    """The config, or a section of it, as plain values that may be shown, recorded and hashed: of
    environment variables the names alone.
    """
    dumped: dict[str, Any] = public(config.model_dump(mode="json"))
    workers = dumped.get("workers")
    if isinstance(workers, dict) and workers.get("env"):
        workers["env"] = dict.fromkeys(workers["env"], HIDDEN)
    return dumped
