"""A model is saved as a run, and opened as one."""

from apt_model._moved import moved

__getattr__, __dir__ = moved(
    __name__,
    {
        "save_model": ("apt.api:save_model", "apt_model.training._saved:save_model"),
        "load_model": ("apt.api:load_run", "apt_model.training._saved:load_model"),
        "CheckpointManager": ("apt.checkpoint.store:CheckpointStore", "apt_model.training._manager:CheckpointManager"),
    },
)
