"""How the testbed was made, from nothing: README.md in this folder has the data, the commands and what they cost.

Run from a checkout (`python -m tests.recipe.train ...`); the installed package leaves this folder out.
"""
