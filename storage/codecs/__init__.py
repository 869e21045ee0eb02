"""Forms in which hidden states are stored, by name. To add one: a file here and a line below."""

from storage.codecs.base import Codec
from storage.codecs.int8 import Int8
from storage.codecs.planes import Planes
from storage.codecs.raw import Raw
from storage.errors import StoreError

CODECS: dict[str, Codec] = {codec.name: codec for codec in (Raw(), Planes(), Int8())}


def codec_named(name: str) -> Codec:
    """The codec of that name. Raises StoreError for one that this version does not know."""
    if name not in CODECS:
        raise StoreError(f"unknown codec '{name}'; this kdflow has {', '.join(CODECS)}")
    return CODECS[name]
