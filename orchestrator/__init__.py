"""Which jobs, where, and again: the command line, Ray, the leaderboard."""
