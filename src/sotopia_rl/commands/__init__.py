"""One short function per command. Docstrings and field docstrings are the help texts."""
