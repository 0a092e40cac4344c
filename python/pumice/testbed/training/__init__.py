"""How the testbed's weights were made: `python -m pumice.testbed.training --help`."""
