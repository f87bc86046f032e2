"""The commands that need Python, a module each. Those that need none are in the Rust core."""

from typing import Final

__all__ = ["COMMANDS"]

COMMANDS: Final = ("synthesize", "generate", "chat", "validate", "demo")
"""Names of the modules here that have `run(arguments) -> exit status`, and of the commands."""
