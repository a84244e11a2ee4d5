"""Limits on untrusted records and media. Those on any file, and on JSON, stand in model.files.untrusted."""

from __future__ import annotations

MAX_RECORD_BYTES = 1 << 24
"""Bytes of one record's JSON. Media stand in files of their own; a text of this size is longer than any context that is trained."""
MAX_RECORD_BRACKETS = 1 << 20
"""Brackets of one record's JSON: objects and lists take twenty times their bytes in memory."""
MAX_TURNS = 1 << 15
"""Turns of one record. A turn takes several tokens: so many turns fill a million tokens."""
MAX_MEDIA = 1 << 13
"""Media of one kind in one record: the frames of two hours, one a second. Each of them is a file to be opened."""
MAX_TOKENIZER_BYTES = 1 << 28
"""Bytes of each file of a tokenizer; the largest vocabularies take a tenth of it."""
MAX_MEMBER_BYTES = 1 << 31
"""Bytes of a medium inside an archive, which is read into memory as a whole."""
