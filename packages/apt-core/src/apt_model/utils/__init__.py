"""What scripts of 1.x took from here. A run chooses its device and seeds itself: `hardware.device`, `training.seed`."""

from apt_model._moved import moved

__getattr__, __dir__ = moved(
    __name__,
    {
        "get_device": ("apt.core.device:pick_device", "apt_model.utils._scripts:get_device"),
        "memory_cleanup": "apt.core.device:release_memory",
        "set_seed": ("torch:manual_seed", "apt_model.utils._scripts:set_seed"),
    },
)
