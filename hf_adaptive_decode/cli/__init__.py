"""The command line: one file a command, behind the dispatcher in `main`."""
