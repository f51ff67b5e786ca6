"""A paper package, small enough to run its tables in tests: the method of the command line's tests, and two tables."""

__version__ = "0.1.0"
