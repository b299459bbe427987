"""Unit vectors to a scalar: the table of rows and the losses it names."""
