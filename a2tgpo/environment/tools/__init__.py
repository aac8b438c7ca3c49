"""The tools: `tools.names: [NAME]` selects module NAME, and the policy calls it as <NAME> ... </NAME>.

Each module has one function, called on every rank:

    def build(config: RunConfig) -> Tool
"""
