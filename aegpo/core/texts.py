"""Bytes of a file as text: UTF-8, or the place where it is not and what would be right."""

from __future__ import annotations

import codecs

_OTHERS = {  # longer marks first: that of UTF-32 begins as one of UTF-16 does
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class NotTextError(ValueError):
    """Bytes that are no UTF-8 text: what they are and what would be right, with the place."""

    def __init__(self, message: str, content: bytes, position: int) -> None:
        super().__init__(message)
        start = content.rfind(b"\n", 0, position) + 1
        self.line = content.count(b"\n", 0, position) + 1  # counted from 1, as `column`
        self.column = len(content[start:position].decode("utf-8", "replace")) + 1
        self.row = content[start:].partition(b"\n")[0].decode("utf-8", "replace").rstrip("\r")

    @property
    def message(self) -> str:
        """What is wrong, without the place."""
        return str(self.args[0])


def utf8(content: bytes) -> str:
    """The text of a file, without the mark that some programs begin UTF-8 with.

    Raises:
        NotTextError: if it is in another encoding, or is no text.
    """
    for mark, name in _OTHERS.items():
        if content.startswith(mark):
            raise NotTextError(f"{name} text; save it as UTF-8", b"", 0)
    content = content.removeprefix(codecs.BOM_UTF8)
    if (position := content.find(b"\0")) >= 0:
        what = "a byte 0, which text does not have; if this is text, in UTF-16 perhaps, save it as UTF-8"
        raise NotTextError(what, content, position)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"not UTF-8 text (byte 0x{content[error.start]:02x}); save it as UTF-8"
        raise NotTextError(what, content, error.start) from error
