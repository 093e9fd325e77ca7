"""Everything beyond main.py and datasets.py, one file per capability."""

import importlib.util
import signal
import sys

# Python imports this before it runs `python -m extras.NAME`; only then is sys.argv[0] "-m".
if sys.argv[0] == "-m":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # What these programs write is complete or resumed: Ctrl+C exits without a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    for name in ("numpy", "tqdm", "mlx"):
        if importlib.util.find_spec(name) is None:
            remedy = ". .venv/bin/activate, or pip install -r requirements.txt"
            print(f"extras: no {name} here: {remedy}", file=sys.stderr)
            sys.exit(2)
