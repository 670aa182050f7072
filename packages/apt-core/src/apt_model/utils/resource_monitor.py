"""The monitor is in the kernel: samples, peaks, and a thread that watches."""

from apt_model._moved import moved

__getattr__, __dir__ = moved(
    __name__,
    {
        "ResourceMonitor": ("apt.core.monitor:ResourceMonitor", "apt_model.utils._monitor:ResourceMonitor"),
        "create_resource_monitor": (
            "apt.core.monitor:ResourceMonitor",
            "apt_model.utils._monitor:create_resource_monitor",
        ),
    },
)
