"""The modules of the tools. If `tools.names` lists NAME, the policy calls the tool of the module NAME as <NAME> ...
</NAME>.

Each module must have the function `build(config: RunConfig) -> Tool`, which every rank calls.
"""
