"""What main.py and datasets.py load where it takes effect, most of it for a flag."""
