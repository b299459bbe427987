"""Many data sets and tasks in one go, on a model of any kind."""
