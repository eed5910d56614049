"""One module a command: its arguments, and the lines that it prints."""
