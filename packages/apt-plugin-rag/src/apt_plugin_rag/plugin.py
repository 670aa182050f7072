"""What APT loads of this package: the contract it was written for. It registers no providers yet."""

API_VERSION = (1, 0)
