"""Import paths of the first draft of the microkernel, forwarded: each leads to the package that the plugin is now.

They go when `apt_model` goes. Nothing else is here, and nothing of `apt` imports it.
"""
