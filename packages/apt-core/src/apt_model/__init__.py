"""The package of APT 1.x, kept so that code written for it still runs: its names, made out of `apt`.

Each warns when it is first used and says where it is now; docs/migration.md is the whole list. Nothing of `apt` imports
this package: what removes it in the end removes this folder and `apt/plugins/`.
"""

from apt_model._moved import moved

__getattr__, __dir__ = moved(
    __name__,
    {
        "APTConfig": ("apt.api:RunConfig", "apt_model.config._options:APTConfig"),
        "APTLargeModel": ("apt.api:ModelBuilder", "apt_model.modeling._model:APTLargeModel"),
        "train_model": ("apt.api:Trainer", "apt_model.training._train:train_model"),
    },
)
