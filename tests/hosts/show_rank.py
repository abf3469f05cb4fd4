"""A training script that trains nothing: it writes down what a rank gets, its environment and its arguments."""

import json
import os
import socket
import sys
from pathlib import Path

folder = Path(os.environ["SHOW_FOLDER"])
got = {"host": socket.gethostname(), "environment": dict(os.environ), "arguments": sys.argv[1:]}
(folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(got))
