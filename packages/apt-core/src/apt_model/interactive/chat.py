"""A conversation is `apt.api.Chat`, and in a terminal `apt chat`."""

from apt_model._moved import moved

__getattr__, __dir__ = moved(
    __name__, {"chat_with_model": ("apt.api:Chat", "apt_model.interactive._chat:chat_with_model")}
)
