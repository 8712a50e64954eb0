"""JSON that ends with its own digest, so that a changed byte is found."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from bitpress.checkpoint.safetensors import DIGEST_LENGTH
from bitpress.checkpoint.writer import format_json

# The last key: the SHA-256 of the text itself, computed with zeros in the place of the digest.
OWN_DIGEST = "sha256"


def sign_json(table: Mapping[str, Any]) -> str:
    """The text of a table with its own digest as the last value."""
    zeros = "0" * DIGEST_LENGTH
    blank = format_json({**table, OWN_DIGEST: zeros})
    digest = hashlib.sha256(blank.encode()).hexdigest()
    return digest.join(blank.rsplit(zeros, 1))


def is_signed(content: bytes) -> bool:
    """Whether a text is, to the byte, what `sign_json` made."""
    # The digest is the last text: its characters stand before the last quotation mark.
    start = content.rfind(b'"') - DIGEST_LENGTH
    digest = content[start : start + DIGEST_LENGTH]
    blank = content[:start] + b"0" * DIGEST_LENGTH + content[start + DIGEST_LENGTH :]
    return hashlib.sha256(blank).hexdigest().encode() == digest
