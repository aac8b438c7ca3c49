"""The modules of the tools. A module NAME defines the tool NAME, which `tools.names` may list.

Each module must have a function `build`, which takes the `RunConfig` and returns the tool. Every rank calls it.
"""
