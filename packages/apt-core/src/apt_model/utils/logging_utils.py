"""Logging for scripts is one call now, which goes to standard error, without colours."""

from apt_model._moved import moved

__getattr__, __dir__ = moved(
    __name__,
    {
        "setup_colored_logging": "apt.core.logging:setup_logging",
        "setup_logging": "apt.core.logging:setup_logging",
    },
)
