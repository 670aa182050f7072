"""A cache is a folder of `apt.core.cache`, and `apt cache` sizes and cleans all of them."""

from apt_model._moved import moved

__getattr__, __dir__ = moved(
    __name__, {"CacheManager": ("apt.core.cache:cache_dir", "apt_model.utils._cache:CacheManager")}
)
