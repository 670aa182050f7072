"""APT trains transformer language models whose parts are plugins. Scripts and plugins import from `apt.api`."""

__version__ = "2.0.0a8"
