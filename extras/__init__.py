"""Everything beyond main.py and datasets.py, one file per capability."""

import signal
import sys

# Python imports this before it runs `python -m extras.NAME`, and only then is sys.argv[0] "-m".
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # What these programs write is complete or resumed, so Ctrl+C may exit without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
