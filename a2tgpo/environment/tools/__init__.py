"""The tools: module NAME is what `tools.names: NAME` asks for and what the policy calls as <NAME> ... </NAME>.

Each has one function, called on every rank:

    def build(config: RunConfig) -> Tool
"""
