from __future__ import annotations


class UnsupportedModelError(ValueError):
    """The model, or the state it is in, is outside what pumice can work on; the message says why."""
