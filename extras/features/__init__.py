"""What main.py and datasets.py load where a flag needs it."""
