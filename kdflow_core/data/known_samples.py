"""What a sample is known by, so that one that was tokenized before is not tokenized again."""

import hashlib
import json

from kdflow_core.data.conversations import Conversation


def sample_key(conversation: Conversation, source: str) -> bytes:
    """16 bytes of all that a sample's tokens are made of, and its data source's name; what models
    and templates make of it aside.
    """
    parts = {
        "source": source,
        "messages": conversation.messages,
        "label": conversation.label,
        "tools": conversation.tools,
        "unsupervised": sorted(conversation.unsupervised),
    }
    # What JSON has no form for has one of Python's; one that is another each time is never found.
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=repr)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
