"""The command line: commands.py, one thin function a command; demo.py, the whole audit on the embedded testbed;
__main__.py, the console script."""
