"""The commands that make, use and show results, each in a file of its name.

Command lines come in; each command parses them, calls one function of the packages above and prints
what it returns: results to standard output, messages and progress to standard error. Heavy imports
happen inside, so that `--help` is quick.

To read: arguments (groups of options, and what they mean as settings), then any command.
"""
