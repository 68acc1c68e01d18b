"""JSON that notices when it was damaged, and hashes of files beside it.

A disk that flips one bit says nothing, and JSON with another digit is JSON. So what a later start
relies on carries a hash of itself. This is no protection against people, who can make the hash
anew; it tells what was written from what a disk or a cut download made of it.

Nothing but Python's own library: a start is refused for a damaged file before PyTorch is loaded.
"""

import hashlib
import json
from pathlib import Path

SEAL = "sha256"
CHUNK = 2**22  # bytes read at once


def seal(about: dict) -> str:
    """The text of a JSON object with its own hash as the last entry."""
    return json.dumps({**about, SEAL: _digest(about)}, indent=1)


def unseal(text: str) -> dict:
    """What was sealed. Raises: ValueError where it is not what `seal` wrote."""
    try:
        found = json.loads(text)
    except RecursionError:  # ten thousand brackets, one in the other
        found = None
    if not isinstance(found, dict) or SEAL not in found:
        raise ValueError(f"it is no object with its own {SEAL}")
    if found.pop(SEAL) != _digest(found):
        raise ValueError("it is not what was written there")
    return found


def _digest(about: dict) -> str:
    """Of the content, not of the layout: an editor that indents anew does no harm."""
    text = json.dumps(about, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def hash_of(file: Path) -> str:
    """SHA-256 of a file's bytes: some seconds for ten gigabytes."""
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while chunk := content.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
