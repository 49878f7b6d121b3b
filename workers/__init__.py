"""One job, start to finish: open `run.py` first. torch lives here; only `entry.py` knows Ray."""
