"""A Python for the programs that tests start, in which the large packages are imported already.

Importing torch, Megatron-Core and vLLM takes ten CPU seconds in each process. So one server imports them once, and
forks a process for each program (server.py). `command.PYTHON` has the arguments of `python`. It is a client: it asks
the server to run the program, passes signals on to the program, and ends as the program ends (client.py). The ranks
and programs that such a program starts with its `sys.executable` are forks too.

A test uses `sys.executable` instead if its claim is about a start itself (imports, signals at the start, what an exit
frees), or if the program inherits more than arguments, environment, folder and the three standard streams, for
example a namespace or limits. The client itself runs a program in a new process if the program has options of Python,
another copy of the sources, or other values of variables that are read when modules are imported.
"""

VARIABLE = "PRELOADED_PYTHON"
"""The environment variable with the path of the session's client."""
