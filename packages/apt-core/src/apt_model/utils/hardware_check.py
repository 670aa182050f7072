"""The hardware is described by the kernel, and so is what a model needs of it: counted, not guessed."""

from apt_model._moved import moved

__getattr__, __dir__ = moved(
    __name__,
    {
        "check_hardware_compatibility": (
            "apt.core.device:estimate_memory",
            "apt_model.utils._hardware:check_hardware_compatibility",
        ),
        "estimate_model_memory_requirements": (
            "apt.core.device:estimate_memory",
            "apt_model.utils._hardware:estimate_model_memory_requirements",
        ),
        "get_hardware_profile": ("apt.core.device:describe_hardware", "apt_model.utils._hardware:get_hardware_profile"),
    },
)
