"""Did an edit help? See README.md in this folder, and __main__.py, where the command begins."""
