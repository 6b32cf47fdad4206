"""The front door for Python: what the command line can do, with the same names and defaults, in objects and arrays."""
