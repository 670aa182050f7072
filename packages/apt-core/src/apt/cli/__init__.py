"""The command line. Its modules import what they need when a command needs it: `apt --help` is to be instant."""
