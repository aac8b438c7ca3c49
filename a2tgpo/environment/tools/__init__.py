"""The modules of the tools. If `tools.names` lists NAME, the policy can call the tool of module NAME as
<NAME> ... </NAME>.

Each module must have this function, which every rank calls:

    def build(config: RunConfig) -> Tool
"""
