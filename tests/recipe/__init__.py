"""How the testbed was made, from nothing: README.md in this folder has the data, the commands and what they cost.

Run from a checkout (`python -m audit.testbed.recipe.train ...`); the installed package leaves this folder out.
"""
