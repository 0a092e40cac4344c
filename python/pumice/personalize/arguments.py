"""What the methods of this folder take, checked in one place."""

from __future__ import annotations

from pumice.models import arguments


class PersonalizationWarning(UserWarning):
    """A model was personalized, but it may not be what was wanted."""


def warn(message: str) -> None:
    """Warn at the line that called pumice."""
    arguments.warn(message, PersonalizationWarning)
