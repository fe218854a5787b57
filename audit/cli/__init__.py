"""The command line: commands.py, one thin function a command; demo.py, the whole audit on the embedded testbed;
doctor.py, what this machine has and lacks; group.py, exceptions into lines and exit codes;
__main__.py, the console script."""
