"""What attention is told besides arrays."""

from typing import NamedTuple

__all__ = ["Settings"]


class Settings(NamedTuple):
    """Constants of one attention.

    Attributes:
        scale: what scores are multiplied by.
        sliding_window: how many keys a query sees, its own position among them; None for all before it.
    """

    scale: float
    sliding_window: int | None
