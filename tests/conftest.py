"""One thread a process: the suite runs several, and torch's default would have them fight."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
