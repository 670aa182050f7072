"""What writes text is `apt.api.Generator`."""

from apt_model._moved import moved

__getattr__, __dir__ = moved(
    __name__,
    {"generate_natural_text": ("apt.api:Generator", "apt_model.generation._text:generate_natural_text")},
)
