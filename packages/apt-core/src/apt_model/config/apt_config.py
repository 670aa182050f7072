"""The configuration of a model is the section `model` of a profile now."""

from apt_model._moved import moved

__getattr__, __dir__ = moved(__name__, {"APTConfig": ("apt.api:RunConfig", "apt_model.config._options:APTConfig")})
