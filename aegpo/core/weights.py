"""Weights that libraries cannot read: what they raise, and what of it a user is told."""

from __future__ import annotations


def reading_errors() -> tuple[type[Exception], ...]:
    """What `from_pretrained` raises if files are missing, damaged, or not what they should be."""
    from pickle import UnpicklingError

    from safetensors import SafetensorError

    return (OSError, ValueError, RuntimeError, TypeError, KeyError, EOFError, SafetensorError, UnpicklingError)


def brief(error: Exception) -> str:
    """Kind and first line of such an error; torch's advice to read a pickle whatever it runs is not passed on."""
    from pickle import UnpicklingError

    if isinstance(error, UnpicklingError):
        return "a file holds more than tensors, and reading that would run its code"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip().rstrip('.')}" if lines else type(error).__name__
