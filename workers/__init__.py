"""One job, start to finish. Open `workers/run.py` first. Knows torch; only `workers/entry.py` knows Ray."""
