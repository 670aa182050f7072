"""The checks: one module per kind, or per part of a large one. Imported by `apt.testing.check.checks_of`."""
