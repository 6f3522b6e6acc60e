"""The command line: arguments come in, text and an exit code go out.

`main` runs the commands, `parser` and the modules of options read the arguments, `beam_flags` those of
Beam. No other folder imports from here.
"""
