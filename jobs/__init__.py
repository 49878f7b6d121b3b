"""The words of prunefleet: what a job is, what a result is, the sweeps. Knows neither torch nor Ray."""
