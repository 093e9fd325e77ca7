"""Everything beyond main.py and datasets.py, one file per capability."""
