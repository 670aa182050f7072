"""The interfaces that providers implement: one file per kind, none of them importing torch.

A provider is a factory: it gets its section of the profile once, validates it, and builds parts from it. A new
provider subclasses the interface of its kind and is registered by its plugin's `apt_register_providers`.
"""

from apt.core.registry import Provider

__all__ = ["Provider"]
