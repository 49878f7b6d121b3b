"""The words of prunefleet: what a job is, what a result is. Knows neither torch nor Ray."""
