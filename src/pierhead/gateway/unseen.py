"""What a request can take beyond its own bytes: pictures, files, what is stored, a query that is read again; pure.

It looks for the words by which requests name such things. JSON may spell a letter as an escape, which no client does
for plain ones: who does it is taken to have named all of them. Text that talks about the words has its quotes escaped.
"""

from __future__ import annotations

import msgspec

PICTURE = 16384  # tokens of the largest picture that models of the field take
WHOLE = 1 << 20  # tokens of a context where nobody says how long it is

_PICTURES = (b'"image_url"', b'"image"', b'"input_image"')
ESCAPED = (b"\\u005", b"\\u006", b"\\u007")
_ELSEWHERE = (
    *(b'"file_id"', b'"file_url"', b'"file_data"', b'"video_url"', b'"audio_url"', b'"container_upload"'),
    *(b'"web_search_2', b'"web_fetch_2', b'"web_search_options"', b'"mcp_servers"', b"\\u0032", *ESCAPED),
)
_STORED = (b'"previous_response_id"', b'"conversation"', b'"item_reference"')
_TALK = frozenset(("chat", "messages", "responses"))
_MARKS = 8  # tokens between a query and a document


class _Message(msgspec.Struct):
    images: list[msgspec.Raw] | None = None


class _Ollama(msgspec.Struct):
    images: list[msgspec.Raw] | None = None
    messages: list[_Message] | None = None


class _Ranked(msgspec.Struct):
    query: msgspec.Raw = msgspec.Raw()
    documents: list[msgspec.Raw] | None = None
    text_1: msgspec.Raw = msgspec.Raw()
    text_2: msgspec.Raw = msgspec.Raw()


_ollama = msgspec.json.Decoder(_Ollama).decode
_ranked = msgspec.json.Decoder(_Ranked).decode
_list = msgspec.json.Decoder(list[msgspec.Raw]).decode
_ERRORS = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)


def unseen(operation: str, text: bytes, size: int) -> int:
    """Tokens at most; ``text`` is a body of ``size`` bytes, or its skeleton."""
    if operation in _TALK:
        return _talk(operation, text)
    if operation in ("rerank", "score"):
        return _ranks(text, size)
    if operation in ("ollama-chat", "ollama-generate"):
        return _ollamas(operation, text)
    return 0


def _talk(operation: str, text: bytes) -> int:
    for word in _ELSEWHERE:
        if word in text:
            return WHOLE
    if operation == "responses" and any(word in text for word in _STORED):
        return WHOLE
    if operation == "messages" and b'"document"' in text and b'"source"' in text:
        return WHOLE
    pictures = 0
    for word in _PICTURES:
        if word in text:
            pictures += text.count(word)
    return pictures * PICTURE


def _ollamas(operation: str, text: bytes) -> int:
    if any(word in text for word in ESCAPED) or (operation == "ollama-generate" and b'"context"' in text):
        return WHOLE
    if b'"images"' not in text:
        return 0
    try:
        found = _ollama(text)
    except _ERRORS:
        return WHOLE
    return PICTURE * sum(len(holder.images or ()) for holder in (found, *(found.messages or ())))


def _ranks(text: bytes, size: int) -> int:
    """The query again for every document."""
    try:
        found = _ranked(text)
        query, documents = bytes(found.query), found.documents
        if documents is None and bytes(found.text_2)[:1] == b"[":
            query, documents = bytes(found.text_1), _list(found.text_2)
            if query[:1] == b"[" and len(_list(query)) > 1:
                query = b""  # they are pairs
    except _ERRORS:
        return 0  # what is not of this shape is refused
    long = size if len(text) < size else len(query)  # the skeleton may lack it
    return (long + _MARKS) * len(documents or ())
