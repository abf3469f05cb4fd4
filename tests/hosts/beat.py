"""A training script that trains nothing: each rank says that it is alive, ten times a second, until it is stopped."""

import os
import time
from pathlib import Path

beat = Path(os.environ["BEAT_FOLDER"], f"{os.environ['PATHSWITCH_PATH']}.rank{os.environ['RANK']}")
stops = [Path(os.environ["PATHSWITCH_STOP_FILE"]), beat.parent / "over"]
while not any(stop.exists() for stop in stops):
    beat.write_text(str(os.getpid()))
    time.sleep(0.1)
