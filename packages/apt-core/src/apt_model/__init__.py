"""The package of APT 1.x, kept so that code written for it still runs: its names, made out of `apt`.

Each warns when it is first used and says where it is now; docs/migration.md is the whole list. Nothing of `apt` imports
this package: what removes it in the end removes this folder and `apt/plugins/`.
"""
