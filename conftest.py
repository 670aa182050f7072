"""For a checkout whose packages are not installed: pytest then finds no entry point of theirs."""

pytest_plugins = ["apt.testing.pytest_plugin"]
