"""The command line. Input: arguments. Output: text and an exit code.

`main` runs the commands. `parser` and the modules of options read the arguments. No other folder imports
from here.
"""
