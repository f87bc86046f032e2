"""`python -m tensorport`: the command line."""

from tensorport.cli import program

program()
