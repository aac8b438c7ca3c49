"""The forms in which models write tool calls. `rollout.call_format` names a module.

Each module has a `CallFormat` with the name `FORMAT`.
"""
