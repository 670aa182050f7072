"""Recovery is in the kernel, beside the errors that a user can mend."""

from apt_model._moved import moved

__getattr__, __dir__ = moved(
    __name__,
    {
        "EnhancedErrorHandler": ("apt.core.errors:ErrorHandler", "apt_model.utils._errors:EnhancedErrorHandler"),
        "ErrorContext": ("apt.core.errors:ErrorHandler.trying", "apt_model.utils._errors:ErrorContext"),
        "ErrorHandler": ("apt.core.errors:ErrorHandler", "apt_model.utils._errors:EnhancedErrorHandler"),
        "memory_cleanup": "apt.core.device:release_memory",
        "safe_execute": ("apt.core.errors:ErrorHandler.run", "apt_model.utils._errors:safe_execute"),
    },
)
