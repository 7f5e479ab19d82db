"""Standard streams that never end a command: what an encoding lacks is escaped, and a reader may go away."""

from __future__ import annotations

import errno
import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


class _Kept(io.FileIO):
    """A stream that goes on when nobody takes what is written; `lost` is why."""

    lost: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Writes what can be written, and counts the rest as written."""
        if self.lost is None:
            try:
                return super().write(data) or 0
            except OSError as error:
                self.lost = error
        return memoryview(data).nbytes


_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # all but newlines and tabs


def harmless(text: str) -> str:
    """A text that may quote strangers' files: what would steer a terminal or turn its letters round is escaped."""
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


@contextmanager
def lenient() -> Iterator[list[OSError]]:
    """Inside, standard output and errors take anything; the list gets what standard output lost, and not to a reader.

    A reader that goes away, as `head` does, has what it wants. A full disk has not: the command ends as it would, and
    the caller says that its output is not whole.
    """
    before, lost = (sys.stdout, sys.stderr), list[OSError]()
    out, sys.stdout = _wrapped(sys.stdout)
    _, sys.stderr = _wrapped(sys.stderr)
    try:
        yield lost
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        if out is not None and out.lost is not None and out.lost.errno != errno.EPIPE:
            lost.append(out.lost)
        sys.stdout, sys.stderr = before


def _wrapped(stream: TextIO | None) -> tuple[_Kept | None, TextIO]:
    """A stream of a file as one that goes on; one of another kind with escapes where it can, or as it is."""
    if stream is None:  # closed: without this the next file that is opened would take its number
        nothing = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  (it lives as long as the command)
        return None, nothing
    if not isinstance(stream, io.TextIOWrapper):
        return None, stream
    buffer = stream.buffer
    raw = buffer.raw if isinstance(buffer, io.BufferedWriter) else buffer
    if type(raw) is not io.FileIO:  # such as the console of Windows
        stream.reconfigure(errors="backslashreplace")
        return None, stream
    stream.flush()
    kept = _Kept(raw.fileno(), "wb", closefd=False)
    options = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
    buffered = io.BufferedWriter(kept) if raw is not buffer else kept
    return kept, io.TextIOWrapper(buffered, stream.encoding, "backslashreplace", **options)  # type: ignore[arg-type]
