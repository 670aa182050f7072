"""Core's own plugin: the defaults register through the very hook that strangers use."""
