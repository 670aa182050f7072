"""What trains is `apt.api.Trainer`, and what it is told is a profile."""

from apt_model._moved import moved

__getattr__, __dir__ = moved(__name__, {"train_model": ("apt.api:Trainer", "apt_model.training._train:train_model")})
