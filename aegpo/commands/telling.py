"""How a command ends: the mistakes of the user or of a plugin are a message and an exit code, no traceback."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from aegpo.commands.streams import harmless
from aegpo.commands.unblamed import blaming_plugins
from aegpo.core.files import refused, way_out
from aegpo.core.foreign import watching_for_the_user
from aegpo.core.processes import DISK_REFUSED, PARENT
from aegpo.errors import AegpoError, ContractError, DiskError, ObserverError, ProcessLostError


@contextmanager
def telling() -> Iterator[None]:
    """Inside, a command runs; its mistakes are told, unless another process tells them.

    Raises:
        SystemExit: with the exit code that says so.
    """
    try:
        with watching_for_the_user(), blaming_plugins():
            yield
    except AegpoError as error:
        tell(error)
        sys.exit(_code(error))
    except OSError as error:
        if not refused(error):
            raise
        print(f"error: {error.filename or 'the disk'}: {error.strerror}; {way_out(error)}", file=sys.stderr)
        sys.exit(2)
    except UnicodeEncodeError as error:
        if error.encoding != sys.getfilesystemencoding() or error.encoding == "utf-8":
            raise
        print(f"error: this locale has no such names ({error}); use one of UTF-8, as LC_ALL=C.UTF-8", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def tell(error: AegpoError, whose: str = "") -> None:
    """Tells a mistake, unless another process does; `whose`: words before it."""
    cause = error.__cause__
    if isinstance(error, ProcessLostError) and isinstance(cause, ContractError):  # amid an update of sharded weights
        traceback.print_exception(cause.__cause__ or cause)
    elif isinstance(error, (ContractError, ObserverError)) and cause and not isinstance(cause, AegpoError):
        traceback.print_exception(cause)  # a part's own failure: its author needs the place
    if not error.told_elsewhere:
        from aegpo.core.registries import with_shipper

        print(harmless(f"error: {whose}{with_shipper(error, str(error))}"), file=sys.stderr)


def _code(error: AegpoError) -> int:
    if isinstance(error, ProcessLostError):
        return 1
    return DISK_REFUSED if isinstance(error, DiskError) and PARENT in os.environ else 2


def tell_missing(parts: Sequence[str]) -> None:
    """Says on standard error which parts of a run's method are not installed, and that nothing depends on them."""
    if parts:
        are = "is" if len(parts) == 1 else "are"
        print(f"note: {', '.join(parts)} {are} not installed, and not needed for what is painted", file=sys.stderr)
