"""The voters come with apt-core."""

from apt_model._moved import moved

__getattr__, __dir__ = moved(
    __name__,
    {
        "EntropyVoter": "apt.builtin.voter:EntropyVoter",
        "SelfConsistencyVoter": "apt.builtin.voter:SelfConsistencyVoter",
    },
    package="apt-core",
)
